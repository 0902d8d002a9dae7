//! What requests are answered from, until the mount lets go of it.
//!
//! The kernel may go on asking after an unmount: a mount namespace that was made meanwhile (a container) has a copy of
//! the mount, or a program a file of one that was detached; both end with the process. What is closed must be
//! closed before, and by then nobody may change it any more.
//!
//! # Invariants
//!
//! - After [`Hold::let_go`] no request gets the vfs. It is answered with `ENOTCONN`, as the kernel answers once the
//!   process has ended: programs see one end, not two.
//! - A request that has the vfs by then keeps it for as long as this disk takes. Those that wait for
//!   the network are ended ([`Ending::or`]).

use std::sync::{Arc, RwLock};

use tokio::sync::watch;

use crate::vfs::{Vfs, VfsError};

pub(super) struct Hold {
    vfs: RwLock<Option<Arc<Vfs>>>,
    ended: watch::Sender<bool>,
}

impl Hold {
    pub(super) fn new(vfs: Arc<Vfs>) -> Self {
        Self {
            vfs: RwLock::new(Some(vfs)),
            ended: watch::Sender::new(false),
        }
    }

    /// The vfs, for one request.
    pub(super) fn vfs(&self) -> Option<Arc<Vfs>> {
        self.vfs.read().expect("a panic ends the process").clone()
    }

    /// Never waits for a request.
    pub(super) fn let_go(&self) {
        let held = self.vfs.write().expect("a panic ends the process").take();
        self.ended.send_replace(true);
        drop(held);
    }

    /// For a task, which answers later.
    pub(super) fn ending(&self) -> Ending {
        Ending(self.ended.subscribe())
    }
}

/// Hears when the mount lets go.
pub(super) struct Ending(watch::Receiver<bool>);

impl Ending {
    /// Waits for `work`, and drops it when the mount lets go first.
    pub(super) fn or<T>(
        mut self,
        work: impl Future<Output = Result<T, VfsError>>,
    ) -> impl Future<Output = Result<T, VfsError>> {
        // Large: what fetches has much in it.
        let work = Box::pin(work);
        async move {
            tokio::select! {
                done = work => done,
                // An error: who would have told is gone as well.
                _ = self.0.wait_for(|ended| *ended) => Err(VfsError::Unmounted),
            }
        }
    }
}
