//! Uploads one blob: its chunks, then its chunk list if that is an object of its own.
//!
//! # Invariants
//!
//! - The bytes that are sent were hashed after they were read: what differs from its name is
//!   quarantined, never sent.
//! - A blob counts as durable only after the bucket acknowledged, or was seen to have, each of its objects.
//! - "It exists already" is success: within one trust domain the name proves the content. Of what a sweep
//!   condemned it is not: that is stored again under another key (`rescue`).
//! - Each request holds one of the uploader's places for each 2 MiB that it sends, which are in memory.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::{
    Shared,
    chunks::{confirm, upload_chunks},
    rescue,
};
use crate::{
    base::{BoxFuture, digest::Digest, retry::Backoff},
    store::{
        StoreError,
        blobs::{Blob, Blobs},
        ledger::Ledger,
        manifest::{self, MAX_INLINE_CHUNKS},
        rows::{BlobRow, Change, ListObject},
    },
    tier::{Body, Put, TierError, body, layout},
};

/// How often a request is made before the blob is given up for this time.
const ATTEMPTS: u32 = 3;

/// A request of at most 4 MiB that takes longer is taken for lost.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// How an upload ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Durable,
    /// It was no longer dirty.
    Gone,
    Quarantined,
}

/// Why an upload did not end.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    #[error(transparent)]
    Bucket(#[from] TierError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another blob that it was to go with failed, and says why.
    #[error("it was to go with another, which failed")]
    Together,
    /// The same, for a reason that lies on this disk.
    #[error("it was to go with another, which this disk did not give")]
    TogetherLater,
    /// Nobody wants it any more.
    #[error("no file has it any more")]
    Unwanted,
    /// The uploader is being shut down.
    #[error("the uploader stops")]
    Stopped,
}

pub(super) async fn upload_blob(shared: Arc<Shared>, row: Arc<BlobRow>) -> Result<Outcome, UploadError> {
    let digest = row.digest;
    if !shared.blobs.is_dirty(&digest)? {
        return Ok(Outcome::Gone);
    }
    let _uploading = shared.uploading(row.size);
    let began_millis = shared.bucket.clock().now_millis();
    let Some(blob) = keep(&shared.blobs, &shared.ledger, &row)? else {
        return Ok(Outcome::Gone);
    };
    let wrong = upload_chunks(&shared, &blob).await?;
    if !wrong.is_empty() {
        shared.blobs.quarantine(&blob, &wrong)?;
        shared.counters.quarantined_blob();
        return Ok(Outcome::Quarantined);
    }
    if blob.chunks().chunks().len() > MAX_INLINE_CHUNKS {
        upload_list(&shared, &blob).await?;
    }
    if !shared.blobs.set_durable(&digest, began_millis)? {
        return Ok(Outcome::Gone);
    }
    shared.counters.uploaded_blob();
    Ok(Outcome::Durable)
}

/// Keeps a blob here that was dirty a moment ago; `None` if it was forgotten in between: then its file may be
/// there still, and is not to be sent.
pub(super) fn keep(blobs: &Blobs, ledger: &Ledger, row: &BlobRow) -> Result<Option<Arc<Blob>>, StoreError> {
    let leased = blobs.lease(&row.digest, row.size);
    // From here on it is not forgotten any more; before, it may have been.
    if ledger.blob(&row.digest)?.is_none() {
        return Ok(None);
    }
    leased?.map(Some).ok_or(StoreError::Missing { blob: row.digest })
}

/// Uploads the chunk list, with the places of the chunks, and notes its name.
async fn upload_list(shared: &Shared, blob: &Arc<Blob>) -> Result<(), UploadError> {
    let known = shared.condemned.known().await?;
    let (mut digest, mut bytes) = encode_list(shared, blob)?;
    if known.is_condemned(&digest) {
        // Another place of one chunk makes it another list.
        rescue::upload_again(shared, blob, &[0]).await?;
        (digest, bytes) = encode_list(shared, blob)?;
    }
    let size = bytes.len() as u64;
    let _place = shared.places.acquire().await.map_err(|_| UploadError::Stopped)?;
    let body = body::encode_known(bytes, digest, shared.bucket.compresses());
    let began_millis = shared.bucket.clock().now_millis();
    put(shared, &layout::blob(&digest), body).await?;
    confirm(shared, began_millis, [(digest, None)])?;
    let list = ListObject { digest, size };
    shared.ledger.commit(vec![Change::PutList(blob.digest(), list)])?;
    shared.counters.sent(size);
    Ok(())
}

fn encode_list(shared: &Shared, blob: &Blob) -> Result<(Digest, Bytes), StoreError> {
    let mut places = Vec::with_capacity(blob.chunks().chunks().len());
    for chunk in blob.chunks().chunks() {
        places.push(shared.ledger.chunk(&chunk.digest)?.and_then(|row| row.place));
    }
    let bytes = manifest::encode(blob.chunks(), &places);
    Ok((Digest::of(&bytes), bytes))
}

/// Creates an object; of one that is named by its content it is as good that it exists already.
pub(super) async fn put(shared: &Shared, key: &str, body: Body) -> Result<Put, UploadError> {
    retrying(shared, "put", key, || shared.bucket.put_new(key, body.clone())).await
}

/// Runs what waits for the disk, or computes for long, away from the runtime's workers.
pub(super) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, UploadError> {
    spawn_blocking(work).await.map_err(|_| UploadError::Stopped)
}

/// Makes a request, and again after a short wait while it may help.
pub(super) async fn retrying<'a, T>(
    shared: &Shared,
    verb: &'static str,
    key: &str,
    request: impl Fn() -> BoxFuture<'a, Result<T, TierError>>,
) -> Result<T, UploadError> {
    let mut backoff = Backoff::new(super::FIRST_WAIT, Duration::from_secs(2));
    let mut kicks = shared.kicks.subscribe();
    for attempt in 1.. {
        let answer = timeout(REQUEST_TIMEOUT, request()).await.unwrap_or_else(|_| {
            Err(TierError::Unavailable {
                verb,
                key: key.to_owned(),
                source: "no answer in time".into(),
            })
        });
        match answer {
            Ok(done) => return Ok(done),
            Err(err) if !err.is_transient() || attempt == ATTEMPTS || shared.is_stopping() => {
                return Err(err.into());
            }
            Err(err) => {
                tracing::debug!(error = %err, attempt, "an upload request failed");
                shared.counters.retried();
            }
        }
        tokio::select! {
            () = sleep(backoff.next_wait()) => {}
            _ = kicks.changed() => {}
        }
    }
    unreachable!("the loop ends by its last attempt")
}
