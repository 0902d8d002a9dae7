//! Where the daemon's words go: standard error in the foreground, else a file.
//!
//! Never onto the mount (a write there would wait for the writer), which
//! [`check`] makes sure of. Rotation is left to logrotate with `copytruncate`:
//! the file is opened for appending.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io,
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use tracing::{Event, Subscriber, field};
use tracing_subscriber::{
    EnvFilter, Layer,
    fmt::time::SystemTime,
    layer::{Context, SubscriberExt},
    util::SubscriberInitExt,
};

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
            .finish()
            .with(AnswersToNobody)
            .try_init(),
        None => builder
            .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
            .with_writer(io::stderr)
            .finish()
            .with(AnswersToNobody)
            .try_init(),
    };
}

/// Keeps from the log that the kernel took no answer because nobody waits for it any more (`ENOENT`).
///
/// `fuser` calls that an error. It is how a request ends whose program was interrupted or killed: the answer to the
/// kernel's word of that comes after the answer to the request itself. Whatever else goes wrong with an answer is told.
struct AnswersToNobody;

impl<S: Subscriber> Layer<S> for AnswersToNobody {
    fn event_enabled(&self, event: &Event<'_>, _context: Context<'_, S>) -> bool {
        // What comes by the `log` crate is of this one target, and has its own as a field.
        if event.metadata().target() != "log" {
            return true;
        }
        let mut record = LogRecord::default();
        event.record(&mut record);
        !(record.of_fuser && record.not_waited_for)
    }
}

/// What counts of a record of the `log` crate.
#[derive(Default)]
struct LogRecord {
    of_fuser: bool,
    not_waited_for: bool,
}

impl field::Visit for LogRecord {
    fn record_str(&mut self, field: &field::Field, value: &str) {
        self.of_fuser |= field.name() == "log.target" && value.starts_with("fuser::");
    }

    fn record_debug(&mut self, field: &field::Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let words = format!("{value:?}");
            let number = format!("(os error {})", libc::ENOENT);
            self.not_waited_for |=
                words.starts_with("Failed to send FUSE reply:") && words.ends_with(&number);
        }
    }
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
    fn an_answer_that_nobody_waits_for_is_no_error() {
        #[derive(Clone, Default)]
        struct Lines(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);
        impl io::Write for Lines {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .finish()
            .with(AnswersToNobody);
        tracing::subscriber::with_default(subscriber, || {
            // As the bridge from the `log` crate makes them.
            let told = |by: &str, code: i32| {
                let err = io::Error::from_raw_os_error(code);
                tracing::event!(target: "log", tracing::Level::ERROR, { log.target = by }, "Failed to send FUSE reply: {err}");
            };
            told("fuser::reply", libc::ENOENT);
            told("fuser::reply", libc::EINVAL);
            told("another", libc::ENOENT);
            tracing::error!("Failed to send FUSE reply: {}", io::Error::from_raw_os_error(2));
        });
        let lines = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert_eq!(lines.lines().count(), 3, "{lines}");
        assert!(lines.contains("Invalid argument"), "{lines}");
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
