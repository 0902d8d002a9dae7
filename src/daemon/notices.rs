//! Between the follower, which starts before the mount, and the kernel, which
//! can be told something only after it.
//!
//! # Invariant
//!
//! A notice of something that the kernel may already know reaches it: from
//! the moment before the mount, notices are kept until the kernel can be told.
//! Notices from before that are dropped, because the kernel knew nothing yet.

use std::sync::{Arc, Mutex};

use crate::namespace::tree::{Notice, TellKernel};

/// Where notices go just now.
enum Way {
    Drop,
    Keep(Vec<Notice>),
    Tell(TellKernel),
}

/// A way for notices that is opened later.
pub struct NoticeGate {
    way: Mutex<Way>,
}

impl std::fmt::Debug for NoticeGate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NoticeGate").finish_non_exhaustive()
    }
}

impl NoticeGate {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            way: Mutex::new(Way::Drop),
        })
    }

    /// What the follower calls.
    pub fn teller(self: &Arc<Self>) -> TellKernel {
        let gate = Arc::clone(self);
        Arc::new(move |notices| gate.tell(notices))
    }

    /// To be called right before the mount.
    pub fn mounting(&self) {
        *self.way.lock().expect("no code panics while it holds the gate") = Way::Keep(Vec::new());
    }

    /// To be called right after the mount.
    pub fn mounted(&self, kernel: &TellKernel) {
        let mut way = self.way.lock().expect("no code panics while it holds the gate");
        if let Way::Keep(kept) = std::mem::replace(&mut *way, Way::Tell(Arc::clone(kernel))) {
            // Inside the lock, so that no later notice overtakes these. It queues them, and waits a moment at most.
            if !kept.is_empty() {
                kernel(kept);
            }
        }
    }

    fn tell(&self, mut notices: Vec<Notice>) {
        let kernel = {
            let mut way = self.way.lock().expect("no code panics while it holds the gate");
            match &mut *way {
                Way::Drop => return,
                Way::Keep(kept) => return kept.append(&mut notices),
                Way::Tell(kernel) => Arc::clone(kernel),
            }
        };
        kernel(notices);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::rows::Ino;

    #[test]
    fn nothing_from_the_mount_on_is_lost_or_overtaken() {
        let gate = NoticeGate::new();
        let tell = gate.teller();
        let notice = |ino| vec![Notice::Attributes { ino: Ino(ino) }];
        let told = Arc::new(Mutex::new(Vec::new()));
        let kernel: TellKernel = {
            let told = Arc::clone(&told);
            Arc::new(move |notices| told.lock().unwrap().extend(notices))
        };
        tell(notice(1));
        gate.mounting();
        tell(notice(2));
        tell(notice(3));
        gate.mounted(&kernel);
        tell(notice(4));
        let expected: Vec<_> = (2..5).flat_map(notice).collect();
        assert_eq!(*told.lock().unwrap(), expected);
    }
}
