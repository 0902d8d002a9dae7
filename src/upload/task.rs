//! Uploads one blob: its chunks, then its chunk list if that is an object of its own.
//!
//! # Invariants
//!
//! - The bytes that are sent were hashed after they were read: what differs from its name is
//!   quarantined, never sent.
//! - A blob counts as durable only after the bucket acknowledged, or was seen to have, each of its objects.
//! - "It exists already" is success: within one trust domain the name proves the content.
//! - Each request holds one of the uploader's places, and with it at most one chunk in memory.

use std::{collections::HashSet, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::OwnedSemaphorePermit,
    task::{JoinSet, spawn_blocking},
    time::{sleep, timeout},
};

use super::Shared;
use crate::{
    base::{BoxFuture, digest::Digest, retry::Backoff},
    store::{
        StoreError,
        blobs::Blob,
        manifest::{self, MAX_INLINE_CHUNKS},
        rows::{BlobRow, Change},
        seal::is_trusted,
    },
    tier::{Body, TierError, body, layout},
};

/// How often a request is made before the blob is given up for this time.
const ATTEMPTS: u32 = 3;

/// A request of at most 2 MiB that takes longer is taken for lost.
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
pub(super) enum UploadError {
    #[error(transparent)]
    Bucket(#[from] TierError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The uploader is being shut down.
    #[error("the uploader stops")]
    Stopped,
}

/// What became of one chunk.
#[derive(Debug)]
enum ChunkOutcome {
    Done,
    /// The bytes at this chunk's place are not the chunk.
    Wrong(usize),
}

/// What one chunk's bytes turned out to be.
enum Prepared {
    Right(Body),
    Wrong,
}

pub(super) async fn upload_blob(shared: Arc<Shared>, row: Arc<BlobRow>) -> Result<Outcome, UploadError> {
    let digest = row.digest;
    if !shared.blobs.is_dirty(&digest)? {
        return Ok(Outcome::Gone);
    }
    let _uploading = shared.counters.uploading(row.size);
    let began_millis = shared.bucket.clock().now_millis();
    let Some(blob) = shared.blobs.lease(&digest, row.size)? else {
        return Err(StoreError::Missing { blob: digest }.into());
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

/// Uploads what the bucket lacks; returns the chunks that are wrong here.
async fn upload_chunks(shared: &Arc<Shared>, blob: &Arc<Blob>) -> Result<Vec<usize>, UploadError> {
    let mut wrong = Vec::new();
    let mut seen = HashSet::new();
    let mut under_way = JoinSet::new();
    for (index, chunk) in blob.chunks().chunks().iter().enumerate() {
        if !seen.insert(chunk.digest) {
            continue;
        }
        // Taken before the task starts, so that a long blob does not make a task for each chunk.
        let place = Arc::clone(&shared.places)
            .acquire_owned()
            .await
            .map_err(|_| UploadError::Stopped)?;
        while let Some(done) = under_way.try_join_next() {
            note(done, &mut wrong)?;
        }
        if shared.is_stopping() {
            return Err(UploadError::Stopped);
        }
        if !wrong.is_empty() || !shared.blobs.is_dirty(&blob.digest())? {
            break;
        }
        under_way.spawn(upload_chunk(Arc::clone(shared), Arc::clone(blob), index, place));
    }
    while let Some(done) = under_way.join_next().await {
        note(done, &mut wrong)?;
    }
    Ok(wrong)
}

type Joined = Result<Result<ChunkOutcome, UploadError>, tokio::task::JoinError>;

fn note(done: Joined, wrong: &mut Vec<usize>) -> Result<(), UploadError> {
    match done.map_err(|_| UploadError::Stopped)?? {
        ChunkOutcome::Done => {}
        ChunkOutcome::Wrong(index) => wrong.push(index),
    }
    Ok(())
}

async fn upload_chunk(
    shared: Arc<Shared>,
    blob: Arc<Blob>,
    index: usize,
    _place: OwnedSemaphorePermit,
) -> Result<ChunkOutcome, UploadError> {
    let chunk = blob.chunks().chunks()[index];
    let key = layout::blob(&chunk.digest);
    // The only chunk of a small blob is new nearly always: asking first would double the requests.
    let ask_first = blob.chunks().chunks().len() > 1;
    if ask_first && is_there(&shared, &chunk.digest, &key).await? {
        shared.counters.skipped();
        return Ok(ChunkOutcome::Done);
    }
    let compress = shared.bucket.compresses();
    let prepared = spawn_blocking(move || prepare(&blob, index, chunk.digest, compress))
        .await
        .map_err(|_| UploadError::Stopped)?;
    let body = match prepared? {
        Prepared::Right(body) => body,
        Prepared::Wrong => return Ok(ChunkOutcome::Wrong(index)),
    };
    put(&shared, &key, body).await?;
    if ask_first {
        confirm(&shared, chunk.digest)?;
    }
    shared.counters.sent(u64::from(chunk.len));
    Ok(ChunkOutcome::Done)
}

async fn upload_list(shared: &Shared, blob: &Blob) -> Result<(), UploadError> {
    let bytes = manifest::encode(blob.chunks());
    let digest = Digest::of(&bytes);
    let key = layout::blob(&digest);
    let _place = shared.places.acquire().await.map_err(|_| UploadError::Stopped)?;
    if is_there(shared, &digest, &key).await? {
        return Ok(());
    }
    let len = bytes.len() as u64;
    put(
        shared,
        &key,
        body::encode_known(bytes, digest, shared.bucket.compresses()),
    )
    .await?;
    confirm(shared, digest)?;
    shared.counters.sent(len);
    Ok(())
}

/// Whether the bucket has an object, by memory or by asking.
async fn is_there(shared: &Shared, digest: &Digest, key: &str) -> Result<bool, UploadError> {
    let confirmed = shared.ledger.chunk_confirmed(digest)?;
    if confirmed.is_some_and(|millis| is_trusted(millis, shared.bucket.clock().now_millis())) {
        return Ok(true);
    }
    let found = retrying(shared, "head", key, || shared.bucket.head(key)).await?;
    if found.is_some() {
        confirm(shared, *digest)?;
    }
    Ok(found.is_some())
}

/// Creates an object; that it exists already is as good.
async fn put(shared: &Shared, key: &str, body: Body) -> Result<(), UploadError> {
    retrying(shared, "put", key, || shared.bucket.put_new(key, body.clone())).await?;
    Ok(())
}

fn confirm(shared: &Shared, digest: Digest) -> Result<(), StoreError> {
    let now = shared.bucket.clock().now_millis();
    shared.ledger.commit(vec![Change::ConfirmChunk(digest, now)])
}

/// Reads a chunk from the disk and checks it.
fn prepare(blob: &Blob, index: usize, digest: Digest, compress: bool) -> Result<Prepared, StoreError> {
    let bytes: Bytes = match blob.read_unverified(index) {
        Ok(Some(bytes)) => bytes,
        // No file, or one that is too short.
        Ok(None) => return Ok(Prepared::Wrong),
        Err(StoreError::Disk { source, .. }) if source.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Ok(Prepared::Wrong);
        }
        Err(err) => return Err(err),
    };
    if Digest::of(&bytes) != digest {
        return Ok(Prepared::Wrong);
    }
    Ok(Prepared::Right(body::encode_known(bytes, digest, compress)))
}

/// Makes a request, and again after a short wait while it may help.
async fn retrying<'a, T>(
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
