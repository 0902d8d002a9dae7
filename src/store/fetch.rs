//! Fault-in: bringing chunks from the bucket, verified before a byte is served.
//!
//! This file turns reads into chunks; `fetch_chunk` brings one, `fetch_run` several by one request, and
//! `readahead` decides which to bring before they are asked for. What is resident never waits for the bucket.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{runtime::Handle, task::JoinSet};

use super::{
    StoreError,
    blobs::{Blob, Blobs},
    error::chain,
    fetch_chunk::ChunkFetcher,
    ledger::Ledger,
    manifest,
    readahead::Readahead,
    reclaim::Reclaimer,
    rows::{Change, ListObject},
};
use crate::{
    base::{buffers, digest::Digest},
    tier::SharedBucket,
};

pub use super::fetch_chunk::FetchStatus;

/// Requests under way at once for a blob that is fetched whole.
const MAX_RUNS: usize = 8;

/// Where a reader is in a blob: lets the fetcher see a sequential reader and
/// fetch ahead of it. One for each open handle.
#[derive(Debug, Default)]
pub struct ReadCursor(Mutex<Readahead>);

impl ReadCursor {
    fn lock(&self) -> MutexGuard<'_, Readahead> {
        self.0.lock().expect("no code panics while it holds the cursor")
    }
}

/// Bytes that are on this machine.
#[derive(Debug)]
pub enum Here<'a> {
    /// Read from the disk into the caller's buffer.
    Read(&'a [u8]),
    /// Still in memory.
    Shared(Bytes),
}

impl AsRef<[u8]> for Here<'_> {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Read(bytes) => bytes,
            Self::Shared(bytes) => bytes,
        }
    }
}

/// Brings chunks. Its methods run on a tokio runtime.
#[derive(Debug)]
pub struct Fetcher {
    chunks: Arc<ChunkFetcher>,
    ledger: Arc<Ledger>,
    /// Where readahead runs: the runtime of the first asynchronous call.
    runtime: OnceLock<Handle>,
}

impl Fetcher {
    /// `read_timeout` bounds how long a read waits for the bucket.
    pub fn new(
        bucket: SharedBucket,
        ledger: Arc<Ledger>,
        blobs: Arc<Blobs>,
        reclaimer: Arc<Reclaimer>,
        read_timeout: Duration,
    ) -> Self {
        Self {
            chunks: Arc::new(ChunkFetcher::new(
                bucket,
                Arc::clone(&ledger),
                blobs,
                reclaimer,
                read_timeout,
            )),
            ledger,
            runtime: OnceLock::new(),
        }
    }

    /// Reads bytes that are here without waiting, into `buffer` in place of what it holds if
    /// they are not in memory; `None` when some are not here.
    ///
    /// Counts as a step of the reader, so a sequential one is fetched ahead
    /// of while it reads what came before. For the threads that must not wait.
    pub fn read_resident<'a>(
        &self,
        blob: &Arc<Blob>,
        cursor: &ReadCursor,
        offset: u64,
        len: usize,
        buffer: &'a mut Vec<u8>,
    ) -> Result<Option<Here<'a>>, StoreError> {
        let here = match self.fresh(blob, offset, len) {
            Some(parts) => match <[Bytes; 1]>::try_from(parts) {
                Ok([bytes]) => Here::Shared(bytes),
                Err(parts) => {
                    join(&parts, buffer);
                    Here::Read(buffer)
                }
            },
            None if blob.try_read_into(offset, len, buffer)? => Here::Read(buffer),
            None => return Ok(None),
        };
        self.read_ahead(blob, cursor, offset, len as u64);
        Ok(Some(here))
    }

    /// Bytes that came a moment ago, in parts that adjoin.
    fn fresh(&self, blob: &Blob, offset: u64, len: usize) -> Option<Vec<Bytes>> {
        let end = offset.saturating_add(len as u64).min(blob.size());
        self.chunks.fresh.get(&blob.digest(), offset..end.max(offset))
    }

    /// Reads bytes of a blob, fetching the chunks that are not here. Served
    /// from memory when the disk is full. Short only at the end of the blob.
    pub async fn read(
        &self,
        blob: &Arc<Blob>,
        cursor: &ReadCursor,
        offset: u64,
        len: usize,
    ) -> Result<Bytes, StoreError> {
        self.runtime.get_or_init(Handle::current);
        let end = offset.saturating_add(len as u64).min(blob.size());
        let len = end.saturating_sub(offset) as usize;
        self.read_ahead(blob, cursor, offset, len as u64);
        if let Some(parts) = self.fresh(blob, offset, len) {
            return Ok(joined(parts));
        }
        if let Some(bytes) = blob.try_read(offset, len)? {
            return Ok(bytes.into());
        }
        let covering = blob.chunks().covering(offset, len as u64);
        let part = |index: usize| {
            let start = blob.chunks().start(index);
            let until = blob.chunks().start(index + 1).min(end);
            (offset.max(start) - start) as usize..(until - start) as usize
        };
        if covering.len() == 1 {
            let chunk = self
                .chunks
                .chunk(blob, covering.start, self.chunks.deadline())
                .await?;
            return Ok(chunk.slice(part(covering.start)));
        }
        self.read_several(blob, covering, part, len).await
    }

    /// Reads parts of several chunks, all of which are asked for at once.
    async fn read_several(
        &self,
        blob: &Arc<Blob>,
        covering: Range<usize>,
        part: impl Fn(usize) -> Range<usize>,
        len: usize,
    ) -> Result<Bytes, StoreError> {
        let deadline = self.chunks.deadline();
        let mut under_way = JoinSet::new();
        for run in self.chunks.runs_ahead(blob, covering.clone())? {
            under_way.spawn(Arc::clone(&self.chunks).run(Arc::clone(blob), run));
        }
        while let Some(done) = under_way.join_next().await {
            done.expect("fetching does not panic")?;
        }
        let first = covering.start;
        let offset = blob.chunks().start(first) + part(first).start as u64;
        if let Some(parts) = self.fresh(blob, offset, len) {
            return Ok(joined(parts));
        }
        let mut bytes = BytesMut::with_capacity(len);
        for index in covering {
            let part = part(index);
            let start = blob.chunks().start(index) + part.start as u64;
            if let Some(resident) = blob.try_read(start, part.len())? {
                bytes.extend_from_slice(&resident);
            } else {
                // On its way for others, or one that the disk did not take.
                let chunk = self.chunks.chunk(blob, index, deadline).await?;
                bytes.extend_from_slice(&chunk[part]);
            }
        }
        Ok(bytes.freeze())
    }

    /// Makes the first chunk resident: what an open of a blob does, so that a
    /// blob that is gone is found out before a read.
    pub async fn ensure_first(&self, blob: &Arc<Blob>) -> Result<(), StoreError> {
        self.runtime.get_or_init(Handle::current);
        if blob.size() == 0 || blob.has_chunk(0) {
            return Ok(());
        }
        self.chunks.chunk(blob, 0, self.chunks.deadline()).await?;
        Ok(())
    }

    /// Makes every chunk resident, as far as the disk takes them: the caller looks at
    /// `is_whole`. Each chunk has the read timeout for itself.
    pub async fn ensure_whole(&self, blob: &Arc<Blob>) -> Result<(), StoreError> {
        self.runtime.get_or_init(Handle::current);
        let mut under_way = JoinSet::new();
        for run in self.chunks.runs(blob, 0..blob.chunks().chunks().len())? {
            if under_way.len() >= MAX_RUNS
                && let Some(done) = under_way.join_next().await
            {
                done.expect("fetching does not panic")?;
            }
            under_way.spawn(Arc::clone(&self.chunks).run(Arc::clone(blob), run));
        }
        while let Some(done) = under_way.join_next().await {
            done.expect("fetching does not panic")?;
        }
        Ok(())
    }

    /// Fetches the chunk list of a blob whose entry carries it as a blob of its own,
    /// verifies and commits it.
    pub async fn fetch_manifest(
        &self,
        list: Digest,
        list_size: u64,
        blob: Digest,
        size: u64,
    ) -> Result<(), StoreError> {
        if self.ledger.manifest(&blob, size)?.is_some() {
            return Ok(());
        }
        if list_size > manifest::MAX_LIST_BYTES {
            return Err(StoreError::Corrupt { blob });
        }
        let bytes = self.chunks.object(list, list_size, blob).await?;
        match manifest::decode(&bytes) {
            Ok((chunks, places)) if chunks.size() == size => {
                let mut changes = self.ledger.told_places(&chunks, &places)?;
                let object = ListObject {
                    digest: list,
                    size: list_size,
                };
                changes.push(Change::PutList(blob, object));
                changes.push(Change::PutManifest(blob, chunks));
                self.ledger.commit(changes)
            }
            wrong => {
                tracing::warn!(%blob, %list, problem = ?wrong.err(), "a chunk list is not that of its blob");
                Err(StoreError::Corrupt { blob })
            }
        }
    }

    pub fn status(&self) -> FetchStatus {
        self.chunks.status()
    }

    /// Starts fetching what a sequential reader will ask for next.
    fn read_ahead(&self, blob: &Arc<Blob>, cursor: &ReadCursor, offset: u64, len: u64) {
        if blob.is_whole() {
            return;
        }
        let Some(runtime) = self.runtime.get() else { return };
        let ahead = {
            let mut cursor = cursor.lock();
            let ahead = cursor.advance(blob.chunks(), offset, len);
            if ahead.is_empty() {
                return;
            }
            // Whoever reads them will be told what is wrong.
            let whole_packs = self.chunks.to_end_of_pack(blob, ahead.clone()).unwrap_or(ahead);
            cursor.asked_until(whole_packs.end);
            whole_packs
        };
        match self.chunks.runs_ahead(blob, ahead) {
            Ok(runs) => {
                for run in runs {
                    runtime.spawn(Arc::clone(&self.chunks).run_ahead(Arc::clone(blob), run));
                }
            }
            // Whoever reads them will be told.
            Err(err) => tracing::debug!(error = %chain(&err), "cannot read ahead"),
        }
    }
}

/// Puts `parts` into `buffer`, in place of what it holds.
fn join(parts: &[Bytes], buffer: &mut Vec<u8>) {
    buffer.clear();
    for part in parts {
        buffer.extend_from_slice(part);
    }
}

fn joined(parts: Vec<Bytes>) -> Bytes {
    match <[Bytes; 1]>::try_from(parts) {
        Ok([bytes]) => bytes,
        Err(parts) => {
            let mut bytes = buffers::take(parts.iter().map(Bytes::len).sum());
            join(&parts, &mut bytes);
            buffers::share(bytes)
        }
    }
}
