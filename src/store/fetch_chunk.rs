//! One chunk from the bucket into a blob's file: single flight, verified, bounded in time and memory.
//! `fetch_run` brings several by one request, `fetch_pack` small blobs with their neighbours.
//!
//! # Invariants
//!
//! - No byte leaves this file before the SHA-256 and the length of its chunk were checked.
//! - However many ask, a chunk of a blob is fetched once; blobs that share a
//!   chunk and want it at the same time share the request.
//! - Every wait ends at the deadline of whoever waits.
//!
//! # Policy
//!
//! An absent object is final: the bucket is strongly consistent. Wrong bytes are asked for
//! [`WRONG_ATTEMPTS`] times, because a proxy on the way may have damaged them; a bucket in
//! trouble until the deadline. A chunk that finds no room on the disk is served from memory.

use std::{
    num::NonZeroUsize,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use lru::LruCache;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
    time::{Instant, sleep, timeout, timeout_at},
};
use tracing::{debug, error, warn};

use super::{
    StoreError,
    blobs::{Blob, Blobs},
    error::chain,
    fetch_pack::Neighbours,
    fetch_run::Brought,
    fresh::Fresh,
    ledger::Ledger,
    pack::PackPlace,
    reclaim::Reclaimer,
};
use crate::{
    base::{digest::Digest, flight::Flights, retry::Backoff},
    tier::{SharedBucket, TierError, body, layout},
};

/// Chunks under way at once; a run of them counts as one for each 2 MiB. Enough to fill a 10 Gbit/s
/// line at 20 ms a request, and 64 MiB of memory when every chunk is as long as can be.
const MAX_REQUESTS: usize = 32;

/// Of these, how many readahead may hold: a reader that waits never queues behind guesses only.
const MAX_AHEAD: usize = 24;

/// How often wrong bytes are asked for again.
const WRONG_ATTEMPTS: u32 = 3;

/// A request that has not answered after a third of the time that a reader has
/// is taken for stalled and made anew, but never before this.
const MIN_ATTEMPT: Duration = Duration::from_secs(1);

/// Chunks kept in memory that found no room on the disk, so that the small reads
/// of one chunk do not fetch it each: at most 16 MiB of chunks, in buffers of twice that.
const UNKEPT_CHUNKS: NonZeroUsize = NonZeroUsize::new(8).unwrap();

/// How long readahead rests after the disk did not take a chunk: what it brought would be gone before it is read.
const FULL_PAUSE: Duration = Duration::from_secs(5);

/// Between two log lines about the same kind of trouble.
const LOG_PAUSE: Duration = Duration::from_secs(1);

/// What fetching did since the start.
#[derive(Clone, Debug, Default)]
pub struct FetchStatus {
    pub chunks: u64,
    /// Bytes of chunks, as they are on this disk.
    pub bytes: u64,
    /// Bytes that crossed the network.
    pub transferred_bytes: u64,
    /// Answers whose bytes were not what the name says.
    pub wrong_answers: u64,
    /// Chunks that the bucket did not have.
    pub missing: u64,
    /// Requests made again after a failure.
    pub retries: u64,
    /// Chunks served from memory because the disk did not take them.
    pub unkept: u64,
    /// The newest failure, in words, until a fetch succeeds.
    pub last_error: Option<String>,
}

#[derive(Debug, Default)]
struct Counters {
    chunks: AtomicU64,
    bytes: AtomicU64,
    transferred_bytes: AtomicU64,
    wrong_answers: AtomicU64,
    missing: AtomicU64,
    retries: AtomicU64,
    unkept: AtomicU64,
    last_error: Mutex<Option<String>>,
    logged: Mutex<Option<Instant>>,
}

/// Why a chunk did not come; cloned for all who waited.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    Missing,
    Corrupt,
    Unreachable(Arc<TierError>),
    /// The index failed; its own error went to the log.
    Index(Arc<StoreError>),
}

impl Failure {
    pub(super) fn of_blob(self, blob: Digest) -> StoreError {
        match self {
            Self::Missing => StoreError::Missing { blob },
            Self::Corrupt => StoreError::Corrupt { blob },
            Self::Unreachable(source) => StoreError::Unreachable { blob, source },
            Self::Index(source) => StoreError::Index {
                verb: "note a fetched chunk",
                source: Box::new(source),
            },
        }
    }
}

/// Verified bytes; the place among the requests is held until they are written.
#[derive(Clone, Debug)]
struct Arrived {
    bytes: Bytes,
    _permit: Arc<OwnedSemaphorePermit>,
}

#[derive(Debug)]
pub(super) struct ChunkFetcher {
    pub(super) bucket: SharedBucket,
    pub(super) ledger: Arc<Ledger>,
    pub(super) disk: Disk,
    read_timeout: Duration,
    pub(super) requests: Arc<Semaphore>,
    pub(super) ahead: Semaphore,
    pub(super) fills: Flights<(Digest, usize), Result<Bytes, Failure>>,
    /// By the blob and the first and last of its chunks.
    pub(super) runs: Flights<(Digest, usize, usize), Brought>,
    gets: Flights<Digest, Result<Arrived, Failure>>,
    pub(super) fresh: Fresh,
    pub(super) neighbours: Neighbours,
    unkept: Mutex<LruCache<Digest, Bytes>>,
    full_at: Mutex<Option<Instant>>,
    counters: Counters,
}

impl ChunkFetcher {
    pub(super) fn new(
        bucket: SharedBucket,
        ledger: Arc<Ledger>,
        blobs: Arc<Blobs>,
        reclaimer: Arc<Reclaimer>,
        read_timeout: Duration,
    ) -> Self {
        Self {
            bucket,
            ledger,
            disk: Disk { blobs, reclaimer },
            read_timeout,
            requests: Arc::new(Semaphore::new(MAX_REQUESTS)),
            ahead: Semaphore::new(MAX_AHEAD),
            fills: Flights::default(),
            runs: Flights::default(),
            gets: Flights::default(),
            fresh: Fresh::default(),
            neighbours: Neighbours::default(),
            unkept: Mutex::new(LruCache::new(UNKEPT_CHUNKS)),
            full_at: Mutex::default(),
            counters: Counters::default(),
        }
    }

    /// When a read that begins now must have ended.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.read_timeout
    }

    /// Returns the bytes of a chunk and makes it resident if the disk lets us.
    pub(super) async fn chunk(
        &self,
        blob: &Arc<Blob>,
        index: usize,
        deadline: Instant,
    ) -> Result<Bytes, StoreError> {
        let digest = blob.digest();
        let chunk = blob.chunks().chunks()[index].digest;
        if let Some(bytes) = self.unkept().get(&chunk) {
            return Ok(bytes.clone());
        }
        let fill = self
            .fills
            .run((digest, index), self.fill(blob, index, chunk, deadline));
        let filled = timeout_at(deadline, fill)
            .await
            .unwrap_or_else(|_| Err(Failure::Unreachable(Arc::new(no_answer(layout::blob(&chunk))))));
        filled.map_err(|failure| {
            let error = failure.of_blob(digest);
            self.report(&error);
            error
        })
    }

    /// Like [`Self::chunk`], for nobody in particular: gives way to readers, says nothing of failures.
    pub(super) async fn chunk_ahead(&self, blob: Arc<Blob>, index: usize) {
        let Ok(_place) = self.ahead.acquire().await else {
            return;
        };
        if blob.has_chunk(index) || self.was_full_lately() {
            return;
        }
        let chunk = blob.chunks().chunks()[index].digest;
        let deadline = self.deadline();
        let fill = self
            .fills
            .run((blob.digest(), index), self.fill(&blob, index, chunk, deadline));
        if let Ok(Err(failure)) = timeout_at(deadline, fill).await {
            debug!(blob = %blob.digest(), chunk = index, ?failure, "readahead failed");
        }
    }

    /// Returns the verified object `name` of `len` bytes.
    pub(super) async fn object(&self, name: Digest, len: u64, blob: Digest) -> Result<Bytes, StoreError> {
        let deadline = self.deadline();
        let get = self.gets.run(name, self.get_verified(name, len, deadline));
        let got = timeout_at(deadline, get)
            .await
            .unwrap_or_else(|_| Err(Failure::Unreachable(Arc::new(no_answer(layout::blob(&name))))));
        match got {
            Ok(arrived) => Ok(arrived.bytes),
            Err(failure) => {
                let error = failure.of_blob(blob);
                self.report(&error);
                Err(error)
            }
        }
    }

    pub(super) async fn fill(
        &self,
        blob: &Arc<Blob>,
        index: usize,
        chunk: Digest,
        deadline: Instant,
    ) -> Result<Bytes, Failure> {
        // Whoever asked may have looked before the last flight landed; and a doubted chunk may be right.
        if let Some(bytes) = self.local(blob, index, chunk).await? {
            return Ok(bytes);
        }
        let len = u64::from(blob.chunks().chunks()[index].len);
        let arrived = self
            .gets
            .run(chunk, self.get_verified(chunk, len, deadline))
            .await;
        if let Err(Failure::Missing) = &arrived
            && let Err(err) = self.disk.blobs.note_missing(blob, chunk)
        {
            return Err(Failure::Index(Arc::new(err)));
        }
        let arrived = arrived?;
        self.keep(blob, index, &arrived).await;
        Ok(arrived.bytes)
    }

    /// Looks for the bytes in the file: of a resident chunk, or of a doubted one that proves right.
    async fn local(&self, blob: &Arc<Blob>, index: usize, chunk: Digest) -> Result<Option<Bytes>, Failure> {
        let resident = blob.has_chunk(index);
        if !resident && !blob.file.doubts_chunk(index) {
            return Ok(None);
        }
        let blobs = Arc::clone(&self.disk.blobs);
        let blob = Arc::clone(blob);
        let look = blocking(move || {
            let bytes = blob.read_unverified(index)?;
            if resident {
                return Ok(bytes.filter(|_| blob.has_chunk(index)));
            }
            let right = bytes.as_ref().is_some_and(|bytes| Digest::of(bytes) == chunk);
            blobs.settle_doubt(&blob, index, right)?;
            Ok(bytes.filter(|_| right))
        });
        let found = look.await;
        found.or_else(|err: StoreError| {
            if matches!(err, StoreError::Index { .. }) {
                Err(Failure::Index(Arc::new(err)))
            } else {
                // The disk cannot read it: perhaps the bucket can.
                error!(error = %chain(&err), "cannot read from the cache");
                Ok(None)
            }
        })
    }

    /// Writes a chunk to its place. That it cannot is no reason not to serve it.
    async fn keep(&self, blob: &Arc<Blob>, index: usize, arrived: &Arrived) {
        let (disk, stored_in, to_store) = (self.disk.clone(), Arc::clone(blob), arrived.clone());
        let stored = blocking(move || disk.store(&stored_in, index..index + 1, &to_store.bytes)).await;
        self.note_stored(stored);
        self.note_kept(blob, index, &arrived.bytes);
    }

    /// Keeps a chunk in memory that is not on the disk after all.
    pub(super) fn note_kept(&self, blob: &Blob, index: usize, bytes: &Bytes) {
        // Neither does a quarantined file take it, nor one that was taken over meanwhile.
        if !blob.has_chunk(index) {
            self.counters.unkept.fetch_add(1, Ordering::Relaxed);
            let chunk = blob.chunks().chunks()[index].digest;
            self.unkept().put(chunk, bytes.clone());
        }
    }

    /// Takes in how writing chunks ended.
    pub(super) fn note_stored(&self, stored: Result<(), StoreError>) {
        if let Err(err) = stored {
            *self
                .full_at
                .lock()
                .expect("no code panics while it holds the time") = Some(Instant::now());
            if self.may_log() {
                warn!(error = %chain(&err), "what was fetched was served but not kept");
            }
        }
    }

    /// Where the bucket has a chunk: in a pack, or as an object of its own.
    pub(super) fn place(&self, chunk: &Digest) -> Result<Option<PackPlace>, Failure> {
        let row = self.ledger.chunk(chunk);
        let row = row.map_err(|err| Failure::Index(Arc::new(err)))?;
        Ok(row.and_then(|row| row.place))
    }

    async fn get_verified(&self, name: Digest, len: u64, deadline: Instant) -> Result<Arrived, Failure> {
        let mut place = self.place(&name)?;
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let mut wrong = 0;
        if let Some(place) = place
            && let Some(bytes) = Box::pin(self.with_neighbours(place, name, len)).await
        {
            let permit = Arc::clone(&self.requests).acquire_owned().await;
            self.count_arrival(len, 0);
            return Ok(Arrived {
                bytes,
                _permit: Arc::new(permit.expect("nobody closes it")),
            });
        }
        loop {
            let key = place.map_or_else(|| layout::blob(&name), |place| layout::pack(&place.pack));
            let range = place.map(|place| place.range());
            let permit = Arc::clone(&self.requests)
                .acquire_owned()
                .await
                .expect("nobody closes it");
            let failure = match timeout(self.attempt_time(), self.bucket.get(&key, range, len)).await {
                Ok(Ok(Some(object))) => {
                    let transferred = object.transferred_bytes;
                    if let Some(bytes) = verified(object.bytes, place, name, len).await {
                        self.count_arrival(len, transferred);
                        return Ok(Arrived {
                            bytes,
                            _permit: Arc::new(permit),
                        });
                    }
                    Failure::Corrupt
                }
                // It may have an object of its own beside.
                Ok(Ok(None)) if place.take().is_some() => continue,
                Ok(Ok(None)) => {
                    self.counters.missing.fetch_add(1, Ordering::Relaxed);
                    return Err(Failure::Missing);
                }
                Ok(Err(TierError::Malformed { .. })) => Failure::Corrupt,
                Ok(Err(err)) if !err.is_transient() => return Err(Failure::Unreachable(Arc::new(err))),
                Ok(Err(err)) => Failure::Unreachable(Arc::new(err)),
                Err(_) => Failure::Unreachable(Arc::new(no_answer(key.clone()))),
            };
            drop(permit);
            if matches!(failure, Failure::Corrupt) {
                wrong += 1;
                self.wrong_answer(&key, wrong);
                if wrong == WRONG_ATTEMPTS {
                    return Err(failure);
                }
            }
            let wait = backoff.next_wait();
            if Instant::now() + wait >= deadline {
                return Err(failure);
            }
            self.counters.retries.fetch_add(1, Ordering::Relaxed);
            sleep(wait).await;
        }
    }

    pub(super) fn wrong_answer(&self, key: &str, attempt: u32) {
        self.counters.wrong_answers.fetch_add(1, Ordering::Relaxed);
        warn!(%key, attempt, "the bucket answered with wrong bytes");
    }

    /// How long one request may take.
    pub(super) fn attempt_time(&self) -> Duration {
        (self.read_timeout / 3).max(MIN_ATTEMPT)
    }

    pub(super) fn count_arrival(&self, len: u64, transferred: u64) {
        let counters = &self.counters;
        counters.chunks.fetch_add(1, Ordering::Relaxed);
        counters.bytes.fetch_add(len, Ordering::Relaxed);
        self.count_transfer(transferred);
        *counters
            .last_error
            .lock()
            .expect("no code panics while it holds it") = None;
    }

    pub(super) fn count_transfer(&self, bytes: u64) {
        let transferred = &self.counters.transferred_bytes;
        transferred.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn was_full_lately(&self) -> bool {
        let full_at = *self
            .full_at
            .lock()
            .expect("no code panics while it holds the time");
        full_at.is_some_and(|at| at.elapsed() < FULL_PAUSE)
    }

    pub(super) fn report(&self, error: &StoreError) {
        let words = chain(error);
        if self.may_log() {
            warn!(error = %words, "a read failed");
        }
        *self
            .counters
            .last_error
            .lock()
            .expect("no code panics while it holds it") = Some(words);
    }

    fn may_log(&self) -> bool {
        let mut logged = self
            .counters
            .logged
            .lock()
            .expect("no code panics while it holds it");
        let now = Instant::now();
        let due = logged.is_none_or(|logged| now - logged >= LOG_PAUSE);
        if due {
            *logged = Some(now);
        }
        due
    }

    fn unkept(&self) -> std::sync::MutexGuard<'_, LruCache<Digest, Bytes>> {
        self.unkept
            .lock()
            .expect("no code panics while it holds the chunks")
    }

    pub(super) fn status(&self) -> FetchStatus {
        let counters = &self.counters;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FetchStatus {
            chunks: load(&counters.chunks),
            bytes: load(&counters.bytes),
            transferred_bytes: load(&counters.transferred_bytes),
            wrong_answers: load(&counters.wrong_answers),
            missing: load(&counters.missing),
            retries: load(&counters.retries),
            unkept: load(&counters.unkept),
            last_error: counters
                .last_error
                .lock()
                .expect("no code panics while it holds it")
                .clone(),
        }
    }
}

/// Hashes on a thread that may be busy: half a millisecond is long for those that poll.
pub(super) async fn verified(
    bytes: Bytes,
    place: Option<PackPlace>,
    name: Digest,
    len: u64,
) -> Option<Bytes> {
    blocking(move || unpacked_and_checked(bytes, place, name, len)).await
}

/// The chunk that an answer of the bucket holds; `None` for anything else.
pub(super) fn unpacked_and_checked(
    stored: Bytes,
    place: Option<PackPlace>,
    name: Digest,
    len: u64,
) -> Option<Bytes> {
    let bytes = match place {
        Some(place) if stored.len() != place.stored_len as usize => return None,
        Some(place) if place.zstd => body::decode("", &stored, len).ok()?,
        _ => stored,
    };
    (bytes.len() as u64 == len && Digest::of(&bytes) == name).then_some(bytes)
}

/// What takes chunks in.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) blobs: Arc<Blobs>,
    pub(super) reclaimer: Arc<Reclaimer>,
}

impl Disk {
    /// Writes verified, adjoining chunks to their place, evicting others for them if need be.
    pub(super) fn store(&self, blob: &Blob, chunks: Range<usize>, bytes: &[u8]) -> Result<(), StoreError> {
        // What the index's reserve gave is not for what can be fetched again.
        let first = if self.blobs.is_disk_full() {
            Err(StoreError::Full)
        } else {
            self.blobs.store_chunks(blob, chunks.clone(), bytes)
        };
        match first {
            Err(StoreError::Full) => {
                self.reclaimer.make_room(bytes.len() as u64);
                if self.blobs.is_disk_full() {
                    return Err(StoreError::Full);
                }
                self.blobs.store_chunks(blob, chunks, bytes)
            }
            stored => stored,
        }
    }
}

/// Runs `job` on a thread that may block.
pub(super) async fn blocking<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(job).await {
        Ok(done) => done,
        Err(err) if err.is_panic() => std::panic::resume_unwind(err.into_panic()),
        // The runtime is being shut down, and with it whoever waits here.
        Err(_) => std::future::pending().await,
    }
}

pub(super) fn no_answer(key: String) -> TierError {
    TierError::Unavailable {
        verb: "get",
        key,
        source: "no answer in time".into(),
    }
}
