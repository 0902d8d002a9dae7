//! Sends dirty blobs to the bucket, later.
//!
//! (to be completed by the implementation)

use std::{sync::Arc, time::Duration};

use crate::{store::Store, tier::SharedBucket};

#[derive(Clone, Debug)]
pub struct UploadOptions {
    /// Requests under way at once.
    pub parallel: usize,
    /// The longest wait between two attempts.
    pub max_backoff: Duration,
}

/// What the uploader is doing.
#[derive(Clone, Debug, Default)]
pub struct UploadStatus {
    pub uploading_blobs: u64,
    pub uploading_bytes: u64,
    pub uploaded_blobs: u64,
    pub uploaded_bytes: u64,
    pub retries: u64,
    /// The newest failure, in words, until an upload succeeds.
    pub last_error: Option<String>,
}

#[derive(Debug)]
pub struct UploaderHandle {}

/// Starts the uploader on `runtime`. Its queue is a query over the index.
pub fn spawn(
    runtime: &tokio::runtime::Handle,
    store: Arc<Store>,
    bucket: SharedBucket,
    options: UploadOptions,
) -> UploaderHandle {
    let _ = (runtime, store, bucket, options);
    todo!()
}

impl UploaderHandle {
    /// Looks at the queue now, and forgets a wait after a failure.
    pub fn kick(&self) {
        todo!()
    }
    pub fn status(&self) -> UploadStatus {
        todo!()
    }
    /// Waits until none of the blobs dirty at the call is dirty any more; ends early when
    /// `deadline` passes. Returns how many are left.
    pub async fn wait_clean(&self, deadline: tokio::time::Instant) -> u64 {
        let _ = deadline;
        todo!()
    }
    /// Ends the uploads under way and stops.
    pub async fn shutdown(self) {
        todo!()
    }
}
