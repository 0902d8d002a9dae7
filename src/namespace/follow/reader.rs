//! Lists the log, fetches segments that are new, and applies them in the order of their keys.
//!
//! There is no sleep and no clock here; `follow` drives it.
//!
//! # Invariants
//!
//! - Segments are applied in the order of their keys, and one of a machine never
//!   before the one that it names as `previous`: when that one is not known yet (its
//!   upload was slow, so it appeared behind where the listing is), the listing goes back to it.
//! - A segment is known to the cursor, and the cursor kept in the ledger, only after its
//!   changes were committed. The reverse, applied and not known, costs a
//!   second reading; merging is idempotent.
//! - A segment that cannot be fetched now ends the listing before it; one that is damaged
//!   is reported once, left out, and tried again at each full listing that reaches it.
//! - Own segments of the mounted volume are left out. A machine whose cache directory is new
//!   has a new id, and reads what it wrote under the old one. Of a volume below, own ones are
//!   read as well: what this machine said there is not in this tree.
//! - A log of which something was removed that this machine did not see is not gone on with: after a rest of more than
//!   [`AWAY_MILLIS`] it is asked what sweeps took, before and after each listing. What is above their floor
//!   ([`crate::namespace::trim`]) was there to be seen; what is below it was there when the newest full listing began, or
//!   is in the catalog that the tree begins with.
//! - Of a volume that is seen up to a moment, segments that carry a later time are left out. When
//!   none that it carries before can appear any more, nothing is asked of the bucket.
//!
//! # Chunk lists
//!
//! An entry may name its chunk list as a blob (`Listed`). It is fetched before the entry
//! is applied, so that an open never waits for it; a list that is gone or damaged does not
//! stop the log, its blob then reads as lost here.
//!
//! # Cost
//!
//! One LIST for a thousand new segments, one GET for each, [`PARALLEL`] at once. Memory: the segments under way, of which
//! as many are fetched as take some 64 MiB ([`MAX_UNDER_WAY`]) by what the listing says of their sizes, and changes of
//! one batch. Names that are alike and were deleted pack more densely than that: a segment of those takes more than it is
//! taken for, at most [`MAX_READ_BYTES`].

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
};

use super::{
    cursor::{Cursor, Listing, SegmentKey, before},
    fetch,
};
use crate::{
    base::{BoxFuture, digest::Digest, id::MachineId},
    namespace::{
        TreeError,
        catalog::{CatalogError, compact::TOMBSTONE_MILLIS, head},
        change::{EntryChunks, PathChange},
        segment::{self, Decoded, SegmentError},
        trim,
    },
    store::StoreError,
    tier::{Page, SharedBucket, TierError, layout},
};

/// Segments that are fetched at once.
const PARALLEL: usize = 16;

/// What segments that are fetched at once may take in memory; one is always fetched.
const MAX_UNDER_WAY: u64 = 64 << 20;

/// A segment takes so many times its length as stored, when it was read: a change has 50 to 100 bytes there, and some 300
/// in memory.
const GROWS_BY: u64 = 6;

/// And at most this, in whatever it consists: three times the longest payload.
const MAX_READ_BYTES: u64 = 3 * segment::MAX_PAYLOAD_BYTES;

/// After a full listing that came to its end, so long nothing is removed that it did not see: sweeps keep the log of
/// the last hour at least ([`crate::namespace::sweep::MIN_LOG_AGE`]).
const AWAY_MILLIS: u64 = 1_800_000;

/// Changes that are applied as one, and about the bytes that they take; a segment is never divided.
const BATCH_CHANGES: usize = 4096;
const BATCH_BYTES: u64 = 8 << 20;

/// What the reader needs of this machine.
pub trait Sink: Send + Sync + 'static {
    /// Merges changes of other machines, and tells the kernel.
    fn apply(&self, changes: Vec<PathChange>) -> BoxFuture<'_, Result<(), TreeError>>;
    /// Fetches the chunk list `list` of `blob` and keeps it. Both come with their sizes.
    fn fetch_list(&self, list: (Digest, u64), blob: (Digest, u64)) -> BoxFuture<'_, Result<(), StoreError>>;
    fn note(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError>;
    fn keep_note(&self, key: &str, value: Vec<u8>) -> Result<(), StoreError>;
}

/// The log was not read to its end; what was read before is applied.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    #[error("cannot read the log")]
    Bucket(#[from] TierError),
    /// Going on could bring back what others removed long ago.
    #[error(
        "this machine saw nothing of volume {volume} for longer than its log is kept: unmount it and mount it again"
    )]
    AwayTooLong { volume: String },
    #[error("cannot read which catalog is the newest, and what of the log is gone")]
    Head(#[source] CatalogError),
    #[error("cannot fetch a chunk list that segment {key} names")]
    List { key: String, source: StoreError },
    #[error("cannot apply changes of other machines")]
    Tree(#[from] TreeError),
    #[error("cannot keep what was read of the log")]
    Ledger(#[from] StoreError),
}

/// Which log is read, and what of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogView {
    pub volume: String,
    /// The machine whose segments are left out.
    pub without: Option<MachineId>,
    /// Segments with a later time in their key are left out.
    pub until_millis: Option<u64>,
}

/// What a poll did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Polled {
    pub segments: u64,
    pub segment_bytes: u64,
    pub changes: u64,
    /// The bucket's time when the listing began.
    pub began_millis: u64,
    /// Whether the whole window was listed.
    pub full: bool,
}

/// How reading a page ended.
enum Ended {
    Whole,
    /// A segment names this one as previous, which was not read.
    Gap(SegmentKey),
}

pub struct Reader<S> {
    view: LogView,
    sink: Arc<S>,
    bucket: SharedBucket,
    now_millis: Arc<dyn Fn() -> u64 + Send + Sync>,
    cursor: Cursor,
    /// As it is in the ledger.
    kept: Cursor,
    /// Segments that were reported as unreadable.
    unreadable: BTreeSet<SegmentKey>,
    /// What was done since it was last asked.
    done: Polled,
}

/// What the keys of all notes about logs start with; the name of a volume follows.
pub const NOTE_PREFIX: &str = "log/";

pub fn note_key(volume: &str) -> String {
    format!("{NOTE_PREFIX}{volume}/followed")
}

impl<S: Sink> Reader<S> {
    /// Goes on where the last run of the daemon stopped, or begins with the log.
    pub fn open(
        view: LogView,
        sink: Arc<S>,
        bucket: SharedBucket,
        now_millis: Arc<dyn Fn() -> u64 + Send + Sync>,
    ) -> Result<Self, StoreError> {
        let cursor = sink
            .note(&note_key(&view.volume))?
            .and_then(|bytes| Cursor::from_bytes(&bytes))
            .unwrap_or_default();
        Ok(Self {
            view,
            sink,
            bucket,
            now_millis,
            kept: cursor.clone(),
            cursor,
            unreadable: BTreeSet::new(),
            done: Polled::default(),
        })
    }

    /// What was applied since the last call, also by polls that failed.
    pub fn take_done(&mut self) -> Polled {
        std::mem::take(&mut self.done)
    }

    /// Applies everything new; looks at the whole window when `full`, or when it must.
    ///
    /// The cursor is kept in the ledger by [`Self::keep`], which the caller calls now and then.
    pub async fn poll(&mut self, full: bool) -> Result<(), FollowError> {
        if self.is_settled() {
            return Ok(());
        }
        if self.cursor.reached_millis().is_some() {
            self.check_away().await?;
        }
        let mut listing = self.list(full).await?;
        if listing.resumed {
            // Segments can have come behind the place where it was resumed.
            listing = self.list(true).await?;
        }
        self.done.began_millis = listing.began;
        self.done.full = listing.full;
        Ok(())
    }

    /// Refuses to go on with a log of which a part may be in a catalog alone: a start of the daemon
    /// begins with that.
    async fn check_away(&self) -> Result<(), FollowError> {
        if self.view.until_millis.is_some() {
            // Sweeps keep the log of a fork's view.
            return Ok(());
        }
        let too_long = || FollowError::AwayTooLong {
            volume: self.view.volume.clone(),
        };
        let reached = self.cursor.reached_millis();
        if reached.is_none_or(|reached| reached.saturating_add(AWAY_MILLIS) < (self.now_millis)()) {
            let floor = trim::floor_millis(self.bucket.as_ref(), &self.view.volume).await;
            if floor.map_err(FollowError::Head)? > reached.unwrap_or(0) {
                return Err(too_long());
            }
        }
        let Some(reached) = reached else {
            return Ok(());
        };
        let remembered = reached.saturating_add(TOMBSTONE_MILLIS);
        if (self.now_millis)() <= remembered {
            return Ok(());
        }
        let head = head::read(self.bucket.as_ref(), &self.view.volume).await;
        match head.map_err(FollowError::Head)? {
            Some((head, _)) if head.watermark_millis > remembered => Err(too_long()),
            _ => Ok(()),
        }
    }

    /// Whether everything that is to be seen was read, for good.
    pub fn is_settled(&self) -> bool {
        self.view
            .until_millis
            .is_some_and(|until| self.cursor.is_settled(until))
    }

    /// Keeps the cursor, if it changed.
    pub fn keep(&mut self) -> Result<(), StoreError> {
        if self.cursor != self.kept {
            self.sink
                .keep_note(&note_key(&self.view.volume), self.cursor.to_bytes())?;
            self.kept = self.cursor.clone();
        }
        Ok(())
    }

    async fn list(&mut self, full: bool) -> Result<Listing, FollowError> {
        let now = (self.now_millis)();
        let mut listing = self.cursor.begin(&self.view.volume, now, full);
        let prefix = layout::log_prefix(&self.view.volume);
        let end = self
            .view
            .until_millis
            .map(|until| before(&self.view.volume, until.saturating_add(1)));
        // What was gone back for once: it is read by now, or not there.
        let mut sought = BTreeSet::new();
        loop {
            let page = self.bucket.list(&prefix, Some(&listing.after)).await?;
            let keys = self.segments_of(&page);
            let newest = keys.iter().map(|(key, _)| key.millis).max();
            let wanted = keys.into_iter().filter(|(key, _)| self.wants(*key, listing.full));
            if let Ended::Gap(previous) = self.read(wanted.collect(), &sought).await? {
                sought.insert(previous);
                listing.go_back(&self.view.volume, previous.millis);
                continue;
            }
            let Some(last) = page.objects.last() else { break };
            if last.key <= listing.after {
                return Err(TierError::Malformed {
                    key: prefix,
                    why: "a listing went back".to_owned(),
                }
                .into());
            }
            self.cursor.advance(&mut listing, &last.key, newest);
            if !page.more || end.as_ref().is_some_and(|end| last.key >= *end) {
                break;
            }
            if listing.full {
                self.keep()?;
            }
        }
        // It may have slept in the middle.
        self.check_away().await?;
        let now = (self.now_millis)();
        // The replies set right what was wrong with the clock when it began.
        listing.began = listing.began.min(now);
        self.cursor.finish(&listing, now);
        if listing.full {
            let start = self.cursor.window_start();
            self.unreadable.retain(|key| key.millis >= start);
        }
        Ok(listing)
    }

    /// The segments of a page, and about how many bytes each takes in memory.
    fn segments_of(&self, page: &Page) -> Vec<(SegmentKey, u64)> {
        let parse = |key: &str| {
            let parsed = SegmentKey::parse(&self.view.volume, key);
            if parsed.is_none() {
                tracing::debug!(key, "an object in the log is no segment");
            }
            parsed.filter(|key| self.view.until_millis.is_none_or(|until| key.millis <= until))
        };
        page.objects
            .iter()
            .filter_map(|object| Some((parse(&object.key)?, read_bytes(object.size))))
            .collect()
    }

    fn wants(&self, key: SegmentKey, full: bool) -> bool {
        self.view.without != Some(key.machine)
            && !self.cursor.knows(key)
            && (full || !self.unreadable.contains(&key))
    }

    /// Fetches `wanted`, several at once, and applies them in their order.
    async fn read(
        &mut self,
        mut wanted: VecDeque<(SegmentKey, u64)>,
        sought: &BTreeSet<SegmentKey>,
    ) -> Result<Ended, FollowError> {
        let mut fetches: VecDeque<(SegmentKey, u64, Fetch)> = VecDeque::new();
        let mut under_way = 0;
        let mut batch = Batch::default();
        loop {
            while let Some((key, bytes)) = wanted.front().copied()
                && (fetches.is_empty() || (fetches.len() < PARALLEL && under_way + bytes <= MAX_UNDER_WAY))
            {
                wanted.pop_front();
                under_way += bytes;
                fetches.push_back((key, bytes, self.fetch(key)));
            }
            let Some((key, bytes, fetch)) = fetches.pop_front() else {
                break;
            };
            under_way -= bytes;
            let decoded = match fetch.join().await {
                Ok(decoded) => decoded,
                Err(err) => {
                    self.apply(&mut batch).await?;
                    return Err(err);
                }
            };
            match decoded {
                // Removed since it was listed: what it said is in a catalog.
                None => batch.keys.push(key),
                Some(Err(err)) => self.report(key, &err),
                Some(Ok(decoded)) => {
                    let gap = self
                        .gap(&decoded, &batch)
                        .filter(|previous| !sought.contains(previous));
                    if let Some(previous) = gap {
                        self.apply(&mut batch).await?;
                        return Ok(Ended::Gap(previous));
                    }
                    batch.add(key, decoded);
                }
            }
            if batch.is_full() {
                self.apply(&mut batch).await?;
            }
        }
        self.apply(&mut batch).await?;
        Ok(Ended::Whole)
    }

    /// The machine's segment before this one, when it may be there and was not applied.
    fn gap(&self, decoded: &Decoded, batch: &Batch) -> Option<SegmentKey> {
        let (millis, seq) = decoded.head.previous?;
        let previous = SegmentKey {
            millis,
            machine: decoded.head.machine,
            seq,
        };
        let settled = millis < self.cursor.window_start()
            || self.cursor.knows(previous)
            || batch.keys.contains(&previous)
            || self.unreadable.contains(&previous);
        (!settled).then_some(previous)
    }

    async fn apply(&mut self, batch: &mut Batch) -> Result<(), FollowError> {
        let Batch {
            keys, bytes, changes, ..
        } = std::mem::take(batch);
        let (segments, count) = (keys.len() as u64, changes.len() as u64);
        if !changes.is_empty() {
            self.sink.apply(changes).await?;
        }
        for key in keys {
            self.unreadable.remove(&key);
            self.cursor.note(key);
        }
        self.done.segments += segments;
        self.done.segment_bytes += bytes;
        self.done.changes += count;
        Ok(())
    }

    fn report(&mut self, key: SegmentKey, err: &SegmentError) {
        if let SegmentError::Newer { .. } = err {
            self.cursor.note_unread(key);
        }
        if self.unreadable.insert(key) {
            let key = key.to_key(&self.view.volume);
            tracing::error!(key, error = %err, "a segment is left out; its changes are not seen here");
        }
    }

    fn fetch(&self, key: SegmentKey) -> Fetch {
        Fetch(tokio::spawn(fetch(
            key,
            self.view.volume.clone(),
            Arc::clone(&self.bucket),
            Arc::clone(&self.sink),
        )))
    }
}

/// About what a segment takes in memory that has so many bytes in the bucket.
fn read_bytes(stored: u64) -> u64 {
    stored.saturating_mul(GROWS_BY).min(MAX_READ_BYTES)
}

/// Segments whose changes are applied as one.
#[derive(Default)]
struct Batch {
    keys: Vec<SegmentKey>,
    /// As stored.
    bytes: u64,
    changes: Vec<PathChange>,
    changes_bytes: u64,
}

impl Batch {
    fn add(&mut self, key: SegmentKey, decoded: Decoded) {
        self.keys.push(key);
        self.bytes += decoded.stored_bytes;
        self.changes_bytes += decoded.changes.iter().map(segment::estimate_bytes).sum::<u64>();
        self.changes.extend(decoded.changes);
    }

    fn is_full(&self) -> bool {
        self.changes.len() >= BATCH_CHANGES || self.changes_bytes >= BATCH_BYTES
    }
}

type Fetched = Result<fetch::Segment, FollowError>;

/// A fetch under way; dropping it ends it.
struct Fetch(tokio::task::JoinHandle<Fetched>);

impl Fetch {
    async fn join(mut self) -> Fetched {
        match (&mut self.0).await {
            Ok(fetched) => fetched,
            Err(err) => match err.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_shutdown) => std::future::pending().await,
            },
        }
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Fetches one segment and the chunk lists that it names; `None` when it is gone.
async fn fetch<S: Sink>(name: SegmentKey, volume: String, bucket: SharedBucket, sink: Arc<S>) -> Fetched {
    let decoded = match fetch::segment(bucket.as_ref(), &volume, name).await? {
        Some(Ok(decoded)) => decoded,
        other => return Ok(other),
    };
    for change in &decoded.changes {
        let Some(blob) = change.entry.as_ref().and_then(|entry| entry.blob.as_ref()) else {
            continue;
        };
        let EntryChunks::Listed { digest, size } = blob.chunks else {
            continue;
        };
        match sink.fetch_list((digest, size), (blob.digest, blob.size)).await {
            Ok(()) => {}
            Err(StoreError::Missing { .. } | StoreError::Corrupt { .. }) => {
                let key = name.to_key(&volume);
                tracing::warn!(key, blob = %blob.digest, list = %digest, "the chunk list of a blob is lost");
            }
            Err(source) => {
                return Err(FollowError::List {
                    key: name.to_key(&volume),
                    source,
                });
            }
        }
    }
    Ok(Some(Ok(decoded)))
}
