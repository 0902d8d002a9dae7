//! Where the daemon's words go: standard error in the foreground, else a file.
//!
//! Never onto the mount (a write there would wait for the writer), which
//! [`check`] makes sure of. Rotation is left to logrotate with `copytruncate`:
//! the file is opened for appending.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use tracing_subscriber::{EnvFilter, fmt::time::SystemTime};

use super::mountinfo::is_within;

/// Opens a log file for appending, with the directory it is in.
pub fn open(path: &Path) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    // Paths of files are in it: not for everyone's eyes.
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

/// Refuses a log below the mountpoint.
pub fn check(log: Option<&PathBuf>, mountpoint: &Path) -> Result<(), String> {
    match log {
        Some(log) if is_within(log.as_os_str().as_bytes(), mountpoint) => Err(format!(
            "the log file {} is inside the mount; name a place outside of it",
            log.display()
        )),
        _ => Ok(()),
    }
}

/// Starts logging; call once. `level` was checked when the settings were read.
pub fn start(level: &str, file: Option<File>) {
    let filter = EnvFilter::try_new(filter_text(level)).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_timer(SystemTime)
        .with_target(false);
    // A second start in one process (tests) keeps the first.
    let _ = match file {
        Some(file) => builder
            .with_ansi(false)
            .with_writer(std::sync::Mutex::new(file))
            .try_init(),
        None => builder
            .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
            .with_writer(io::stderr)
            .try_init(),
    };
}

/// A bare level is ours: the libraries below speak up only when something is wrong.
fn filter_text(level: &str) -> String {
    if level.chars().all(|c| c.is_ascii_alphabetic()) {
        format!("warn,casmount={level}")
    } else {
        level.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_inside_the_mount_is_refused() {
        assert!(check(Some(&"/mnt/c/log".into()), Path::new("/mnt/c")).is_err());
        assert!(check(Some(&"/mnt/cc/log".into()), Path::new("/mnt/c")).is_ok());
        assert!(check(None, Path::new("/mnt/c")).is_ok());
    }

    #[test]
    fn a_level_is_that_of_this_program_only() {
        assert_eq!(filter_text("debug"), "warn,casmount=debug");
        assert_eq!(
            filter_text("info,casmount::upload=trace"),
            "info,casmount::upload=trace"
        );
    }

    #[test]
    fn a_log_is_appended_to_and_private() {
        use std::{io::Write, os::unix::fs::PermissionsExt};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/x.log");
        open(&path).unwrap().write_all(b"a").unwrap();
        open(&path).unwrap().write_all(b"b").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"ab");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
