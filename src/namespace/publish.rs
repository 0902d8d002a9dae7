//! Writes this machine's changes to the volume's log.
use std::sync::Arc;

use super::tree::Tree;
use crate::{store::Store, tier::SharedBucket};

/// What the publisher is doing.
#[derive(Clone, Debug, Default)]
pub struct PublishStatus {
    pub pending_changes: u64,
    pub published_changes: u64,
    pub segments: u64,
    pub last_error: Option<String>,
}

#[derive(Debug)]
pub struct PublisherHandle {}

pub fn spawn(
    runtime: &tokio::runtime::Handle,
    volume: String,
    tree: Arc<Tree>,
    store: Arc<Store>,
    bucket: SharedBucket,
) -> PublisherHandle {
    let _ = (runtime, volume, tree, store, bucket);
    todo!()
}

impl PublisherHandle {
    /// Looks for changes now, and forgets a wait after a failure.
    pub fn kick(&self) {
        todo!()
    }
    pub fn status(&self) -> PublishStatus {
        todo!()
    }
    /// Waits until every change that was pending at the call (open files excepted) is published; ends early
    /// when `deadline` passes. Returns how many are left.
    pub async fn wait_published(&self, deadline: tokio::time::Instant) -> u64 {
        let _ = deadline;
        todo!()
    }
    pub async fn shutdown(self) {
        todo!()
    }
}
