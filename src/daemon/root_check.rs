//! Whether the mount answers, seen through the kernel.
//!
//! The daemon must not look itself: a thread that waits for its own mount
//! can be the one that was to answer. So a child process looks, and is given up
//! when it takes too long.

use std::{
    ffi::OsStr,
    fs, io,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use tokio::time::Instant;

/// The hidden subcommand that [`look`] is.
pub const SUBCOMMAND: &str = "__read-root";

/// `FUSE_SUPER_MAGIC` of linux/magic.h.
const FUSE_MAGIC: u64 = 0x6573_5546;

/// Runs a child that looks at the root of the mount; returns when it has seen it.
pub async fn answers(mountpoint: &Path, within: Duration) -> io::Result<()> {
    let deadline = Instant::now() + within;
    // Stays the same program even after an upgrade replaced the file.
    let mut child = Command::new("/proc/self/exe")
        .args([OsStr::new(SUBCOMMAND), mountpoint.as_os_str()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()?;
    loop {
        if let Some(status) = child.try_wait()? {
            return if status.success() {
                Ok(())
            } else {
                Err(io::Error::other("reading the root of the mount failed"))
            };
        }
        if Instant::now() >= deadline {
            // It ends when the mount goes; waiting for it here could be for ever.
            let _ = child.kill();
            return Err(io::ErrorKind::TimedOut.into());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// What the child does: `statfs`, `stat` and the first names of the directory.
pub fn look(mountpoint: &Path) -> io::Result<()> {
    let kind = rustix::fs::statfs(mountpoint)?.f_type as u64;
    if kind != FUSE_MAGIC {
        return Err(io::Error::other("nothing is mounted there"));
    }
    fs::metadata(mountpoint)?;
    match fs::read_dir(mountpoint)?.next().transpose() {
        // It is in a catalog that cannot be read now: the mount says so, and has what is elsewhere.
        Err(err) if err.raw_os_error() == Some(libc::EIO) => Ok(()),
        other => other.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_without_the_mount_is_no_answer() {
        let dir = tempfile::tempdir().unwrap();
        assert!(look(dir.path()).is_err());
        assert!(look(&dir.path().join("no")).is_err());
    }
}
