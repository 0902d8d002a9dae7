//! Tells the kernel what to forget.
//!
//! The kernel takes locks for that which a request may hold while it waits for
//! the daemon: so this is done by threads of its own, which nothing else waits for. To forget a name takes the lock of its
//! directory, which a look-up in it holds until it is answered, and that may wait for the bucket. To forget attributes, or what
//! was kept of a directory, takes none of these, so it is never held up: each has its thread.
//!
//! What `..` is in a directory that a program moved is told before its request is answered, so that this program sees it
//! next: by a thread that tells nothing else, and is waited for no longer than [`PATIENCE`], because the kernel may hold a page
//! of a directory while it copies into memory that is a file of this mount.
//!
//! A name that changed changes what its directory lists: the kernel drops the entries that it kept of it, too. What
//! programs change through this mount it sees itself.
//!
//! Each notice is sent twice, the second time after [`AGAIN`]: a look-up or a
//! list of entries that was answered just before a change may be entered into the kernel's cache just after
//! the first notice, and would stay there for as long as entries live.

use std::{
    collections::{BTreeSet, VecDeque},
    convert::Infallible,
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use fuser::{INodeNo, Notifier};

use crate::{
    base::cpus,
    namespace::tree::{Notice, TellKernel},
    store::rows::Ino,
};

/// When a notice is repeated: longer than any look-up takes that is answered from this disk.
const AGAIN: Duration = Duration::from_secs(1);

/// How long who moved a directory waits for the kernel to have heard of it.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
struct Batch {
    notices: Arc<Vec<Notice>>,
    /// Dropped when the kernel was told.
    told: Option<Sender<Infallible>>,
}

impl Batch {
    fn new(notices: Vec<Notice>, told: Option<Sender<Infallible>>) -> Self {
        let notices = Arc::new(notices);
        Self { notices, told }
    }
}

pub(super) struct Notices {
    inodes: Sender<Batch>,
    names: Sender<Batch>,
    moved: Sender<Batch>,
}

impl Notices {
    /// Starts the threads; they end when the last teller is gone.
    pub(super) fn start(notifier: &Notifier) -> io::Result<Self> {
        Ok(Self {
            inodes: spawn("notify", notifier.clone(), forget_inodes)?,
            names: spawn("notify-names", notifier.clone(), forget_names)?,
            moved: spawn("notify-moved", notifier.clone(), forget_inodes)?,
        })
    }

    pub(super) fn teller(&self) -> TellKernel {
        let (inodes, names, moved) = (self.inodes.clone(), self.names.clone(), self.moved.clone());
        Arc::new(move |mut notices| {
            // Where sending fails, the mount is gone, and the kernel's caches with it.
            if notices.iter().any(is_move) {
                let moves = notices.extract_if(.., |notice| is_move(notice)).collect();
                let (told, wait) = crossbeam_channel::bounded(0);
                let _ = moved.send(Batch::new(moves, Some(told)));
                // Nothing comes: it ends with the sender or the time.
                let _ = wait.recv_timeout(PATIENCE);
            }
            let batch = Batch::new(notices, None);
            if batch
                .notices
                .iter()
                .any(|notice| matches!(notice, Notice::Entry { .. }))
            {
                let _ = names.send(batch.clone());
            }
            let _ = inodes.send(batch);
        })
    }
}

fn is_move(notice: &Notice) -> bool {
    matches!(notice, Notice::Moved { .. })
}

fn spawn(name: &str, notifier: Notifier, send: fn(&Notifier, &[Notice])) -> io::Result<Sender<Batch>> {
    let (sender, receiver) = crossbeam_channel::unbounded();
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Programs do not wait for it, but see what is old until it ran.
        cpus::come_first();
        run(&receiver, |notices| send(&notifier, notices));
    })?;
    Ok(sender)
}

fn run(receiver: &Receiver<Batch>, send: impl Fn(&[Notice])) {
    let mut again: VecDeque<(Instant, Arc<Vec<Notice>>)> = VecDeque::new();
    loop {
        let wait = again
            .front()
            .map(|(due, _)| due.saturating_duration_since(Instant::now()));
        let received = match wait {
            None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(wait) => receiver.recv_timeout(wait),
        };
        match received {
            Ok(Batch { notices, told }) => {
                send(&notices);
                drop(told);
                again.push_back((Instant::now() + AGAIN, notices));
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Some((_, notices)) = again.pop_front() {
                    send(&notices);
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// What is no name: attributes, and what was kept of directories.
fn forget_inodes(notifier: &Notifier, notices: &[Notice]) {
    let mut dirs: BTreeSet<Ino> = BTreeSet::new();
    for notice in notices {
        match notice {
            Notice::Entry { parent: dir, .. } | Notice::Listing { dir } | Notice::Moved { dir } => {
                dirs.insert(*dir);
            }
            // A negative offset: the attributes only, the pages stay.
            Notice::Attributes { ino } => told(notice, notifier.inval_inode(INodeNo(ino.0), -1, 0)),
        }
    }
    for dir in dirs {
        // One that the kernel does not know has nothing to drop.
        let _ = notifier.inval_inode(INodeNo(dir.0), 0, 0);
    }
}

fn forget_names(notifier: &Notifier, notices: &[Notice]) {
    for notice in notices {
        if let Notice::Entry { parent, name } = notice {
            told(
                notice,
                notifier.inval_entry(INodeNo(parent.0), OsStr::from_bytes(name)),
            );
        }
    }
}

fn told(notice: &Notice, sent: io::Result<()>) {
    if let Err(err) = sent {
        tracing::debug!(?notice, error = %err, "the kernel did not take a notice");
    }
}
