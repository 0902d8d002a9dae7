//! The end: drain, unmount, drain what came in between, close.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rustix::io::Errno;
use tokio::{sync::mpsc, time::Instant};

use super::{
    answer::StopRequest,
    commit,
    control::{
        protocol::{Reply, UnmountReport},
        server::ControlServer,
    },
    drain,
    layers::sole,
    serving::Serving,
    users,
};

/// How long a stop by signal drains. systemd's `TimeoutStopSec` in the unit is longer.
pub const DRAIN_WITHIN: Duration = Duration::from_secs(90);
/// How long tearing down may take once nothing is left to wait for.
const TAKE_DOWN_WITHIN: Duration = Duration::from_secs(5);

/// Why the daemon stops.
#[derive(Debug)]
pub enum Cause {
    /// Nobody can be asked: a mount in use is detached.
    Signal,
    /// Somebody can be asked: a mount in use stays, unless told otherwise.
    Command(StopRequest),
    /// `umount` or `fusermount3` took the mount away.
    Gone,
}

impl Cause {
    fn deadline(&self) -> Instant {
        match self {
            Self::Command(request) => request.deadline,
            Self::Signal | Self::Gone => Instant::now() + DRAIN_WITHIN,
        }
    }

    fn replies(&self) -> Option<&mpsc::Sender<Reply>> {
        match self {
            Self::Command(request) => Some(&request.replies),
            Self::Signal | Self::Gone => None,
        }
    }
}

/// Drains and unmounts. `None`: the mount is in use and stays, and whoever asked was told.
pub async fn drain_and_unmount(serving: &Serving, cause: &Cause) -> Option<UnmountReport> {
    serving.stopping.store(true, Ordering::Relaxed);
    let deadline = cause.deadline();
    // Most of the work, while programs can still read.
    let report = drain::run(serving, deadline, cause.replies()).await;
    let unmounted = match cause {
        Cause::Gone => {
            return Some(UnmountReport {
                drained: report,
                committed: None,
            });
        }
        Cause::Signal => serving.mounted.unmount(false).or_else(|err| {
            tracing::warn!(%err, users = ?users::of(&serving.mountpoint), "the mount is in use; detaching it");
            serving.mounted.unmount(true)
        }),
        Cause::Command(request) => serving.mounted.unmount(request.lazy),
    };
    if let Err(err) = unmounted {
        if let Cause::Command(request) = cause {
            serving.stopping.store(false, Ordering::Relaxed);
            let reply = if is_busy(&err) {
                Reply::Busy {
                    users: users::of(&serving.mountpoint),
                }
            } else {
                Reply::Error {
                    message: format!("cannot unmount {}: {err}", serving.mountpoint.display()),
                }
            };
            let _ = request.replies.send(reply).await;
            return None;
        }
        tracing::error!(%err, "cannot unmount");
    }
    // What was closed since the first drain.
    let mut seconds = report.seconds;
    let mut last = drain::run(serving, deadline, cause.replies()).await;
    // Now nothing can be closed any more, in copies of the mount elsewhere neither, where that went on until now.
    serving.mounted.let_go();
    if !elsewhere(serving).is_empty() {
        seconds += last.seconds;
        last = drain::run(serving, deadline, cause.replies()).await;
    }
    last.seconds += seconds;
    // Whoever only takes the mount away, or kills the daemon, did not say that the work was good.
    let committed = match cause {
        Cause::Command(request) if request.success => {
            commit::at_success(serving, &last, deadline, cause.replies()).await
        }
        Cause::Command(_) | Cause::Signal | Cause::Gone => None,
    };
    Some(UnmountReport {
        drained: last,
        committed,
    })
}

/// Those who have a copy of the mount in a mount namespace of their own.
fn elsewhere(serving: &Serving) -> Vec<users::User> {
    (serving.device.as_deref()).map_or_else(Vec::new, users::elsewhere)
}

/// `fusermount3` only says it in words.
fn is_busy(err: &io::Error) -> bool {
    Errno::from_io_error(err) == Some(Errno::BUSY) || err.to_string().contains("busy")
}

/// Closes everything, then says the last words to whoever asked.
pub async fn close(serving: Arc<Serving>, mut server: ControlServer, cause: Cause, report: UnmountReport) {
    serving.ending.send_replace(true);
    server.retire();
    // What is used of the mount by now ends with the process; the cache directory is closed before.
    serving.mounted.let_go();
    let elsewhere = elsewhere(&serving);
    if !elsewhere.is_empty() {
        tracing::warn!(
            processes = ?elsewhere,
            "the mount is still there in mount namespaces that were made of this one; nothing can be read or written there any more: let them get its end by shared or slave propagation"
        );
    }
    if let Some(serving) = sole(serving, Instant::now() + TAKE_DOWN_WITHIN).await {
        drop(serving.mounted);
        serving.layers.take_down(TAKE_DOWN_WITHIN).await;
    } else {
        tracing::warn!("a command is still being answered; the next start mends as after a crash");
    }
    if let Cause::Command(request) = cause {
        let _ = request.replies.send(Reply::Unmounted(report)).await;
    }
    server.finish(Duration::from_secs(2)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_mount_is_recognized_from_both_who_say_so() {
        assert!(is_busy(&Errno::BUSY.into()));
        assert!(is_busy(&io::Error::other(
            "fusermount3: failed to unmount /m: Device or resource busy"
        )));
        assert!(!is_busy(&Errno::PERM.into()));
    }
}
