//! Reads the other machines' changes from the volume's log.
use std::sync::Arc;

use super::tree::{TellKernel, Tree};
use crate::{store::Store, tier::SharedBucket};

/// What the follower has seen.
#[derive(Clone, Debug, Default)]
pub struct FollowStatus {
    pub segments: u64,
    pub changes: u64,
    /// Milliseconds since 1970, bucket's clock: everything published before is applied here.
    pub caught_up_millis: u64,
    pub last_error: Option<String>,
}

#[derive(Debug)]
pub struct FollowerHandle {}

pub fn spawn(
    runtime: &tokio::runtime::Handle,
    volume: String,
    tree: Arc<Tree>,
    store: Arc<Store>,
    bucket: SharedBucket,
    tell_kernel: TellKernel,
) -> FollowerHandle {
    let _ = (runtime, volume, tree, store, bucket, tell_kernel);
    todo!()
}

impl FollowerHandle {
    /// Notes that the mount is in use: polls come every second for the next 5 minutes. Cheap.
    pub fn used(&self) {
        todo!()
    }
    pub fn status(&self) -> FollowStatus {
        todo!()
    }
    /// Waits until one whole poll that began after the call has been applied.
    pub async fn caught_up(&self, deadline: tokio::time::Instant) -> bool {
        let _ = deadline;
        todo!()
    }
    pub async fn shutdown(self) {
        todo!()
    }
}
