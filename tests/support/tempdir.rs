//! Directories of tests, on the disk: a cache on tmpfs or overlayfs would test other code.
//!
//! A test that was killed cannot unmount. Its directory carries its process id, so the
//! next test that starts finds dead mounts of processes that are gone, and takes them away.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::mount::{UnmountFlags, unmount};

/// A directory that goes away with everything that is mounted below it.
pub struct TestDir(Option<tempfile::TempDir>);

impl TestDir {
    pub fn new() -> Self {
        let root = root();
        fs::create_dir_all(&root).expect("the directory of tests can be made");
        sweep(&root);
        let prefix = format!("{}-", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in(&root);
        let dir = dir.expect("a directory can be made");
        // Some tests use it as another user.
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("our own directory");
        Self(Some(dir))
    }

    pub fn path(&self) -> &Path {
        self.0.as_ref().expect("taken in drop only").path()
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        unmount_below(self.path());
        let dir = self.0.take().expect("taken here only");
        if std::env::var_os("CASMOUNT_TEST_KEEP").is_some() {
            eprintln!("kept: {}", dir.keep().display());
        }
    }
}

/// Where tests keep their files: `CASMOUNT_TEST_DIR`, or the target directory.
pub fn root() -> PathBuf {
    match std::env::var_os("CASMOUNT_TEST_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("m"),
    }
}

/// Every mount point of this mount namespace, in the order of mounting.
pub fn mountpoints() -> Vec<PathBuf> {
    mounts().into_iter().map(|(point, _)| point).collect()
}

/// Every mount of this mount namespace with its type, in the order of mounting.
pub fn mounts() -> Vec<(PathBuf, String)> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").expect("/proc is there");
    let mount = |line: &str| {
        let point = unescape(line.split(' ').nth(4)?);
        let kind = line.split_once(" - ")?.1.split(' ').next()?;
        Some((point, kind.to_owned()))
    };
    table.lines().filter_map(mount).collect()
}

/// Takes away whatever is mounted at or below a directory, even while it is used.
pub fn unmount_below(dir: &Path) {
    // Bounded: something else might mount as fast as this unmounts.
    for _ in 0..100 {
        let below = mountpoints()
            .into_iter()
            .rev()
            .find(|point| point.starts_with(dir));
        let Some(point) = below else { return };
        if unmount(&point, UnmountFlags::DETACH).is_err() {
            let mut fusermount = std::process::Command::new("fusermount3");
            let _ = fusermount.arg("-uz").arg(&point).status();
        }
    }
}

/// Mount points in mountinfo write blanks and the like as three octal digits.
fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = field.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(
        bytes,
    ))
}

/// Removes what tests left that were killed.
fn sweep(root: &Path) {
    let Ok(entries) = fs::read_dir(root) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.split_once('-')?.0.parse::<u32>().ok());
        let Some(owner) = owner else { continue };
        if !Path::new(&format!("/proc/{owner}")).exists() {
            unmount_below(&entry.path());
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
