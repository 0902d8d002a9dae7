//! Mounts that a dead or stuck daemon left behind.

use std::{
    io,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use super::finding::Finding;
use crate::daemon::{mountinfo, mountpoint};

/// A mount that has not answered by then is stuck.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);

pub fn check() -> Vec<Finding> {
    let mounts = mountinfo::all().unwrap_or_default();
    mounts
        .into_iter()
        .filter(mountinfo::Mount::is_casmount)
        .map(|mount| judge(&mount.path, ask(mount.path.clone())))
        .collect()
}

/// Asks the root of a mount for its attributes; `None` when it does not answer.
///
/// The thread that waits ends with this process.
fn ask(path: PathBuf) -> Option<io::Result<()>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(std::fs::metadata(path).map(|_| ())));
    receiver.recv_timeout(ANSWERS_WITHIN).ok()
}

fn judge(path: &Path, answer: Option<io::Result<()>>) -> Finding {
    let place = path.display();
    match answer {
        None => Finding::warn(
            "mounts",
            format!("the mount at {place} does not answer"),
            format!("see its log; to take it away: umount -l {place}"),
        ),
        Some(Err(err)) if mountpoint::is_dead(&err) => Finding::warn(
            "mounts",
            format!("a daemon that died left its mount at {place}"),
            format!("casmount mount {place} takes it over; casmount unmount {place} takes it away"),
        ),
        // Another user's mount cannot be looked into, and need not be.
        Some(_) => Finding::ok("mounts", format!("the mount at {place} answers")),
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;
    use crate::cli::doctor::finding::Severity;

    #[test]
    fn a_dead_mount_is_told_from_a_stuck_and_a_living_one() {
        let judged = |answer| judge(Path::new("/m"), answer);
        assert!(judged(Some(Err(Errno::NOTCONN.into()))).what.contains("died"));
        assert!(judged(None).what.contains("does not answer"));
        assert_eq!(judged(Some(Ok(()))).severity, Severity::Ok);
        assert_eq!(judged(Some(Err(Errno::ACCESS.into()))).severity, Severity::Ok);
    }
}
