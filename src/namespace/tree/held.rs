//! Files without a name that the kernel still knows.
//!
//! A program can come back to a file that nobody has open as far as this daemon is told: by a descriptor
//! of `O_PATH`, or one of a FIFO, a socket or a device. The kernel says when the last of those is gone
//! (FORGET), so until then such a file stays, as on a local disk.
//!
//! Only files count here that lost their last name by a request of the kernel: it knew each of them and forgets each
//! once. Should it have forgotten one twice (a look-up that came to nothing counts), the file is gone a moment
//! later, as before: its memory is a help, nothing rests on it.

use std::{
    collections::HashSet,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use super::Tree;
use crate::store::rows::Ino;

/// Files without a name that the kernel has not forgotten.
#[derive(Debug, Default)]
pub(super) struct Held {
    inos: Mutex<HashSet<Ino>>,
    /// Whether there are any: the kernel forgets many files, and hardly ever one of these.
    some: AtomicBool,
}

impl Held {
    pub(super) fn contains(&self, ino: Ino) -> bool {
        self.lock().contains(&ino)
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<Ino>> {
        self.inos.lock().expect("a panic ends the process")
    }
}

impl Tree {
    /// Keeps files that lost their last name by a request of the kernel until it forgets them. To be called before
    /// that request is answered.
    pub fn hold(&self, nameless: &[Ino]) {
        if nameless.is_empty() {
            return;
        }
        self.held.lock().extend(nameless);
        self.held.some.store(true, Ordering::Release);
    }

    /// The kernel has forgotten a file: without a name and an open it goes a moment later.
    pub fn forgotten(&self, ino: Ino) {
        if !self.held.some.load(Ordering::Acquire) {
            return;
        }
        let mut held = self.held.lock();
        let was_held = held.remove(&ino);
        self.held.some.store(!held.is_empty(), Ordering::Release);
        drop(held);
        if was_held {
            self.lock().limbo.push_back((Instant::now(), ino));
        }
    }
}
