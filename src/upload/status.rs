//! What the uploader is doing, as `casmount status` shows it.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

/// What the uploader is doing.
#[derive(Clone, Debug, Default)]
pub struct UploadStatus {
    pub uploading_blobs: u64,
    pub uploading_bytes: u64,
    pub uploaded_blobs: u64,
    /// Bytes of chunks that were sent, before compression.
    pub uploaded_bytes: u64,
    /// Chunks that the bucket had already.
    pub skipped_chunks: u64,
    pub retries: u64,
    pub quarantined_blobs: u64,
    /// The newest failure, in words, until an upload succeeds.
    pub last_error: Option<String>,
}

/// The counters behind [`UploadStatus`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    uploading_blobs: AtomicU64,
    uploading_bytes: AtomicU64,
    uploaded_blobs: AtomicU64,
    uploaded_bytes: AtomicU64,
    skipped_chunks: AtomicU64,
    retries: AtomicU64,
    quarantined_blobs: AtomicU64,
    /// Grows with each chunk and blob that is done.
    progress: AtomicU64,
    last_error: Mutex<Option<String>>,
}

impl Counters {
    /// Counts a blob as being uploaded until the guard is dropped.
    pub(super) fn uploading(self: &Arc<Self>, bytes: u64) -> UploadingGuard {
        self.uploading_blobs.fetch_add(1, Ordering::Relaxed);
        self.uploading_bytes.fetch_add(bytes, Ordering::Relaxed);
        UploadingGuard {
            counters: Arc::clone(self),
            bytes,
        }
    }

    pub(super) fn sent(&self, bytes: u64) {
        self.uploaded_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn skipped(&self) {
        self.skipped_chunks.fetch_add(1, Ordering::Relaxed);
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn uploaded_blob(&self) {
        self.uploaded_blobs.fetch_add(1, Ordering::Relaxed);
        self.progress.fetch_add(1, Ordering::Relaxed);
        *self.last_error() = None;
    }

    pub(super) fn quarantined_blob(&self) {
        self.quarantined_blobs.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn retried(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn failed(&self, words: String) {
        *self.last_error() = Some(words);
    }

    pub(super) fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    pub(super) fn status(&self) -> UploadStatus {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        UploadStatus {
            uploading_blobs: load(&self.uploading_blobs),
            uploading_bytes: load(&self.uploading_bytes),
            uploaded_blobs: load(&self.uploaded_blobs),
            uploaded_bytes: load(&self.uploaded_bytes),
            skipped_chunks: load(&self.skipped_chunks),
            retries: load(&self.retries),
            quarantined_blobs: load(&self.quarantined_blobs),
            last_error: self.last_error().clone(),
        }
    }

    fn last_error(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.last_error
            .lock()
            .expect("no code panics while it holds the error")
    }
}

#[derive(Debug)]
pub(super) struct UploadingGuard {
    counters: Arc<Counters>,
    bytes: u64,
}

impl Drop for UploadingGuard {
    fn drop(&mut self) {
        self.counters.uploading_blobs.fetch_sub(1, Ordering::Relaxed);
        self.counters
            .uploading_bytes
            .fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
