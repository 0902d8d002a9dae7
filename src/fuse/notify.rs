//! Tells the kernel what to forget.
//!
//! The kernel takes locks for that which a request may hold while it waits for
//! the daemon: so this is done by a thread of its own, which nothing else waits for.
//!
//! A name that changed changes what its directory lists: the kernel drops the entries that it kept of it, too. What
//! programs change through this mount it sees itself.
//!
//! Each notice is sent twice, the second time after [`AGAIN`]: a look-up or a
//! list of entries that was answered just before a change may be entered into the kernel's cache just after
//! the first notice, and would stay there for as long as entries live.

use std::{
    collections::VecDeque,
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use fuser::{INodeNo, Notifier};

use crate::namespace::tree::{Notice, TellKernel};

/// When a notice is repeated: longer than any look-up takes that is answered from this disk.
const AGAIN: Duration = Duration::from_secs(1);

pub(super) struct Notices(Sender<Vec<Notice>>);

impl Notices {
    /// Starts the thread; it ends when the last teller is gone.
    pub(super) fn start(notifier: Notifier) -> io::Result<Self> {
        let (sender, receiver) = crossbeam_channel::unbounded();
        thread::Builder::new()
            .name("notify".to_owned())
            .spawn(move || run(&notifier, &receiver))?;
        Ok(Self(sender))
    }

    pub(super) fn teller(&self) -> TellKernel {
        let sender = self.0.clone();
        Arc::new(move |notices| {
            // Fails only when the mount is gone, and the kernel's caches with it.
            let _ = sender.send(notices);
        })
    }
}

fn run(notifier: &Notifier, receiver: &Receiver<Vec<Notice>>) {
    let mut again: VecDeque<(Instant, Vec<Notice>)> = VecDeque::new();
    loop {
        let wait = again
            .front()
            .map(|(due, _)| due.saturating_duration_since(Instant::now()));
        let received = match wait {
            None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(wait) => receiver.recv_timeout(wait),
        };
        match received {
            Ok(notices) => {
                send_all(notifier, &notices);
                again.push_back((Instant::now() + AGAIN, notices));
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Some((_, notices)) = again.pop_front() {
                    send_all(notifier, &notices);
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn send_all(notifier: &Notifier, notices: &[Notice]) {
    let mut dirs = Vec::new();
    for notice in notices {
        if let Notice::Entry { parent, .. } = notice
            && dirs.last() != Some(parent)
        {
            dirs.push(*parent);
        }
        let sent = match notice {
            Notice::Entry { parent, name } => {
                notifier.inval_entry(INodeNo(parent.0), OsStr::from_bytes(name))
            }
            // A negative offset: the attributes only, the pages stay.
            Notice::Attributes { ino } => notifier.inval_inode(INodeNo(ino.0), -1, 0),
            Notice::Listing { dir } => {
                dirs.push(*dir);
                continue;
            }
        };
        if let Err(err) = sent {
            tracing::debug!(?notice, error = %err, "the kernel did not take a notice");
        }
    }
    dirs.sort_unstable();
    dirs.dedup();
    for dir in dirs {
        // One that the kernel does not know has nothing to drop.
        let _ = notifier.inval_inode(INodeNo(dir.0), 0, 0);
    }
}
