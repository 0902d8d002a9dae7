//! Turns pending changes into segments, one after the other.
//!
//! One [`Writer::step`] looks at the pending changes, cuts ([`super::super::cut`])
//! and writes as many segments as the look yields. There is no clock, no sleep and no
//! task here; `publish` drives it.
//!
//! # Invariants
//!
//! - A segment is written only after the one before it was acknowledged, and
//!   names it (`previous`), so that no reader applies it first.
//! - A change is marked as published only when a segment that carries it was
//!   acknowledged within [`LATE_MILLIS`] of the time in its key: later than
//!   that, a follower may have looked past that time already.
//! - It is marked only when it was acknowledged while all blobs that it names were sure to be kept by sweeps
//!   ([`crate::upload::vouch`]): a machine that slept in the middle looks at them again, and publishes again. One
//!   that slept before it began to write the segment writes none.
//! - A change that waited for so long that catalogs may have forgotten a later deletion of its name ([`OLD_MILLIS`]) is not
//!   told as it was made: machines that know the deletion would show something else than those that do not. It is made
//!   again, now ([`Source::renew`]), once this machine has read what the others said meanwhile; until then it stays
//!   here. What was made after it waits for it, for at most [`OLD_HOLD`].
//! - A sequence number is never used twice. It is reserved in the ledger before use, and
//!   each run of the daemon begins at a number made from the time, so that
//!   even a cache directory that was restored from a backup does not repeat one.
//!
//! # After a failure
//!
//! Nothing is remembered of a segment whose reply was lost or came too late:
//! the next step looks again, and writes under a new key. Should the first one be
//! there after all, its changes are merged twice, which changes nothing.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use prost::Message;

use crate::{
    base::{BoxFuture, clock::Stamp, id::MachineId},
    namespace::{
        TreeError,
        catalog::compact::TOMBSTONE_MILLIS,
        change::PathChange,
        cut::{self, Limits, Look, Row, RowState},
        segment::{self, EncodedChange, Head},
        tree::{Pending, Readiness},
    },
    store::{
        StoreError,
        rows::{Ino, Place},
    },
    tier::{Body, Put, SharedBucket, TierError, layout},
    upload::UploadError,
};

/// How far the bucket's time may be from the time in a key when the segment is acknowledged.
pub const LATE_MILLIS: u64 = 60_000;

/// A change that is older when it could be told may have been followed by a deletion that nobody remembers; the hour is
/// for those who read it late.
pub const OLD_MILLIS: u64 = TOMBSTONE_MILLIS - 3_600_000;

/// How long such a change holds back what was made after it while it cannot be made again: until the log and a catalog
/// are read, mostly a few seconds.
pub const OLD_HOLD: Duration = Duration::from_secs(60);

/// Rows of the first look, and of the largest: what is behind waits for the next step.
const FIRST_LOOK: usize = 1024;
pub const MAX_LOOK: usize = 32_768;

/// A segment aims at what one request carries well; at its most it is still read in one piece.
const LIMITS: Limits = Limits {
    aim_changes: 4096,
    aim_bytes: 1 << 20,
    max_changes: 32_768,
    max_bytes: segment::MAX_PAYLOAD_BYTES / 2,
};

/// Sequence numbers that one commit reserves.
const RESERVED: u64 = 256;

/// Segments that one millisecond of the bucket's time could have numbered.
const SEQS_PER_MILLI: u64 = 1024;

/// What the writer needs of this machine.
pub trait Source: Send + Sync + 'static {
    /// Own changes that are not published, in the order of their places.
    fn pending(&self, limit: usize) -> BoxFuture<'_, Result<Vec<Pending>, TreeError>>;
    /// Says until when a segment may be acknowledged that carries `chosen`; `None`: not now, some of
    /// their blobs are to be uploaded again first.
    fn vouch<'a>(&'a self, chosen: &'a [Pending]) -> BoxFuture<'a, Result<Option<u64>, PublishError>>;
    /// Has changes count as made now, unless the name changed again since; false while it is not known here what the
    /// others said meanwhile.
    fn renew<'a>(&'a self, old: &'a [Pending]) -> BoxFuture<'a, Result<bool, TreeError>>;
    /// Marks changes as published, unless the name changed again since.
    fn published(&self, done: Vec<(Ino, Vec<u8>, Stamp)>) -> BoxFuture<'_, Result<(), TreeError>>;
    /// A place behind that of every change so far.
    fn next_place(&self) -> u64;
    fn note(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError>;
    fn keep_note(&self, key: &str, value: Vec<u8>) -> Result<(), StoreError>;
}

/// The two clocks of the writer.
#[derive(Clone)]
pub struct Clocks {
    /// Milliseconds since 1970 of the bucket's clock.
    pub bucket: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Only grows, evenly.
    pub uptime: Arc<dyn Fn() -> Duration + Send + Sync>,
}

/// Changes were not published; they stay pending.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error("cannot read or mark the changes to publish")]
    Tree(#[from] TreeError),
    #[error("cannot keep the number of the next segment")]
    Ledger(#[from] StoreError),
    #[error("cannot write a segment")]
    Bucket(#[from] TierError),
    /// Whether the bucket has the blobs of the changes, and will keep them, is not known.
    #[error("cannot make sure that the bucket keeps the blobs")]
    Blobs(#[from] UploadError),
    /// This machine slept before it wrote them: a sweep may have taken blobs.
    #[error("{} s passed since the blobs of the changes were last sure to be kept: they are looked at again", late_millis / 1000)]
    Slept { late_millis: u64 },
    /// A sweep may have taken blobs that it names.
    #[error("segment {key} was acknowledged {} s after its blobs were last sure to be kept", late_millis / 1000)]
    Stale { key: String, late_millis: u64 },
    /// Another writer uses this machine's id, or a reply was lost on the way.
    #[error("segment {key} was there already")]
    Taken { key: String },
    #[error("segment {key} was acknowledged {} s away from the time in its key", off_millis / 1000)]
    Late { key: String, off_millis: u64 },
}

/// What a step did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Changes that are left, as far as the look went.
    pub pending: u64,
    pub published: u64,
    pub segments: u64,
    pub segment_bytes: u64,
    /// How long reading the pending changes took.
    pub look_took: Duration,
    /// A change that no segment can carry, in words.
    pub unpublishable: Option<String>,
}

/// What is kept in the ledger under [`note_key`].
#[derive(Clone, PartialEq, Eq, Message)]
struct Book {
    /// Numbers below are, or may be, used.
    #[prost(uint64, tag = "1")]
    reserved: u64,
    /// The segment acknowledged last.
    #[prost(uint64, optional, tag = "2")]
    last_millis: Option<u64>,
    #[prost(uint64, optional, tag = "3")]
    last_seq: Option<u64>,
}

fn note_key(volume: &str) -> String {
    format!("log/{volume}/published")
}

/// The oldest change of a name behind a place that is not published.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Since {
    first_seq: u64,
    published_seq: u64,
}

impl Since {
    fn place(place: u64) -> Self {
        Self {
            first_seq: place,
            published_seq: 0,
        }
    }
}

pub struct Writer<S> {
    volume: String,
    machine: MachineId,
    source: Arc<S>,
    bucket: SharedBucket,
    clocks: Clocks,
    book: Book,
    next_seq: u64,
    /// When a change was first seen to be pending.
    seen: HashMap<Since, Duration>,
    /// Of names that changed again while a change of theirs was being published: the place of
    /// that one, by the `first_seq` that the tree goes on to tell.
    overtaken: HashMap<u64, u64>,
    /// Places of changes that no segment can carry.
    unpublishable: HashSet<u64>,
    /// Since when a change is known to be too old to be told as it was made.
    old: HashMap<u64, Duration>,
}

impl<S: Source> Writer<S> {
    /// Goes on where the last run of the daemon stopped.
    pub fn open(
        volume: String,
        machine: MachineId,
        source: Arc<S>,
        bucket: SharedBucket,
        clocks: Clocks,
    ) -> Result<Self, StoreError> {
        // A note that cannot be read loses the link to the last segment, no more.
        let book = source
            .note(&note_key(&volume))?
            .and_then(|bytes| Book::decode(bytes.as_slice()).ok())
            .unwrap_or_default();
        let next_seq = book
            .reserved
            .max((clocks.bucket)().saturating_mul(SEQS_PER_MILLI));
        Ok(Self {
            volume,
            machine,
            source,
            bucket,
            clocks,
            book: Book {
                reserved: next_seq,
                ..book
            },
            next_seq,
            seen: HashMap::new(),
            overtaken: HashMap::new(),
            unpublishable: HashSet::new(),
            old: HashMap::new(),
        })
    }

    /// Publishes what may be published now.
    pub async fn step(&mut self) -> Result<Step, PublishError> {
        let began = (self.clocks.uptime)();
        let (mut pending, mut complete) = self.look().await?;
        let old: Vec<Pending> = pending.iter().filter(|of| self.is_old(of)).cloned().collect();
        self.age(&old);
        if !old.is_empty() && self.source.renew(&old).await? {
            let renewed: Vec<Since> = old.iter().flat_map(|of| self.since(of.place)).collect();
            for since in renewed {
                // It holds what is behind it as a change of now does.
                self.seen.remove(&since);
            }
            (pending, complete) = self.look().await?;
        }
        self.remember(&pending, complete);
        let mut step = Step {
            look_took: (self.clocks.uptime)().saturating_sub(began),
            ..Step::default()
        };
        loop {
            let rows: Vec<Row> = pending.iter().map(|of| self.row(of)).collect();
            let chosen = cut::cut(
                Look {
                    rows: &rows,
                    complete,
                },
                &LIMITS,
            );
            if chosen.is_empty() {
                break;
            }
            let mut chosen = chosen.into_iter().peekable();
            let mut index = 0;
            let (take, keep) = pending.into_iter().partition(|_| {
                index += 1;
                chosen.next_if_eq(&(index - 1)).is_some()
            });
            pending = keep;
            let Some(until_millis) = self.source.vouch(&take).await? else {
                // They are Waiting at the next look, and what is behind them with them.
                pending.extend(take);
                break;
            };
            self.publish(take, until_millis, &mut step).await?;
        }
        step.pending = pending.len() as u64;
        Ok(step)
    }

    /// Notes since when changes are too old.
    fn age(&mut self, old: &[Pending]) {
        let now = (self.clocks.uptime)();
        let places: HashSet<u64> = old.iter().map(|of| of.place.seq).collect();
        self.old.retain(|place, _| places.contains(place));
        for place in places {
            self.old.entry(place).or_insert(now);
        }
    }

    /// Whether a change could be told, but not as it was made.
    fn is_old(&self, pending: &Pending) -> bool {
        let until = pending.stamp.made_millis().saturating_add(OLD_MILLIS);
        matches!(pending.readiness, Readiness::Ready(_)) && until <= (self.clocks.bucket)()
    }

    /// Reads pending changes until all are seen, or enough to publish some.
    async fn look(&self) -> Result<(Vec<Pending>, bool), TreeError> {
        let mut limit = FIRST_LOOK;
        loop {
            let pending = self.source.pending(limit).await?;
            if pending.len() < limit {
                return Ok((pending, true));
            }
            let first = pending.iter().find(|of| {
                !matches!(
                    of.readiness,
                    Readiness::Writing | Readiness::Rewriting | Readiness::Never
                )
            });
            let stopped = first.is_some_and(|of| matches!(of.readiness, Readiness::Waiting));
            if stopped || limit >= MAX_LOOK {
                return Ok((pending, false));
            }
            limit = (limit * 8).min(MAX_LOOK);
        }
    }

    /// Notes since when each change is pending.
    fn remember(&mut self, pending: &[Pending], complete: bool) {
        let now = (self.clocks.uptime)();
        // What a look does not show may still be pending; but the memory has its limit.
        if complete || self.seen.len() > 8 * MAX_LOOK {
            let shown: HashSet<u64> = pending.iter().map(|of| of.place.first_seq).collect();
            self.overtaken.retain(|first_seq, _| shown.contains(first_seq));
            let shown: HashSet<u64> = pending.iter().map(|of| of.place.seq).collect();
            self.unpublishable.retain(|seq| shown.contains(seq));
            let shown: HashSet<Since> = pending.iter().flat_map(|of| self.since(of.place)).collect();
            self.seen.retain(|since, _| shown.contains(since));
        }
        for of in pending {
            for since in self.since(of.place) {
                self.seen.entry(since).or_insert(now);
            }
        }
    }

    /// Names the oldest and the newest change at a place, for `seen`.
    fn since(&self, place: Place) -> [Since; 2] {
        let published_seq = self.overtaken.get(&place.first_seq).copied().unwrap_or(0);
        [
            Since {
                first_seq: place.first_seq,
                published_seq,
            },
            Since::place(place.seq),
        ]
    }

    fn row(&self, pending: &Pending) -> Row {
        let now = (self.clocks.uptime)();
        let waited = |since| now.saturating_sub(self.seen.get(&since).copied().unwrap_or(now));
        let [oldest, newest] = self.since(pending.place);
        let state = match &pending.readiness {
            Readiness::Writing => RowState::Writing,
            Readiness::Rewriting => RowState::Rewriting,
            Readiness::Waiting => RowState::Waiting,
            Readiness::Never => RowState::Never,
            Readiness::Ready(_) if self.unpublishable.contains(&pending.place.seq) => RowState::Never,
            // What was made after it may build on it; but the others are not kept waiting for ever.
            Readiness::Ready(_) if self.is_old(pending) => {
                let since = self.old.get(&pending.place.seq).copied().unwrap_or(now);
                if now.saturating_sub(since) < OLD_HOLD {
                    RowState::Waiting
                } else {
                    RowState::Never
                }
            }
            Readiness::Ready(change) => RowState::Ready {
                bytes: segment::estimate_bytes(change),
            },
        };
        Row {
            place: Place {
                seq: pending.place.seq,
                first_seq: pending.place.first_seq.max(oldest.published_seq + 1),
            },
            state,
            held: waited(oldest),
            age: waited(newest),
        }
    }

    /// Writes one segment and marks its changes.
    async fn publish(
        &mut self,
        chosen: Vec<Pending>,
        until_millis: u64,
        step: &mut Step,
    ) -> Result<(), PublishError> {
        let mut encoded: Vec<EncodedChange> = Vec::with_capacity(chosen.len());
        let mut done = Vec::with_capacity(chosen.len());
        let mut places = Vec::with_capacity(chosen.len());
        for pending in chosen {
            let Readiness::Ready(change) = &pending.readiness else {
                unreachable!("a cut chooses what is ready");
            };
            match segment::encode_change(change, self.machine) {
                Ok(bytes) => {
                    encoded.push(bytes);
                    places.push(pending.place);
                    done.push((pending.parent, pending.name, pending.stamp));
                }
                Err(why) => {
                    self.unpublishable.insert(pending.place.seq);
                    step.unpublishable = Some(refusal(change, why));
                }
            }
        }
        if encoded.is_empty() {
            return Ok(());
        }
        let seq = self.take_seq()?;
        let millis = self.key_millis();
        let now = (self.clocks.bucket)();
        if now >= until_millis {
            let late_millis = now - until_millis;
            return Err(PublishError::Slept { late_millis });
        }
        let head = Head {
            machine: self.machine,
            seq,
            published_millis: millis,
            previous: self.book.last_millis.zip(self.book.last_seq),
        };
        let key = layout::segment(&self.volume, millis, self.machine, seq);
        let object = segment::encode(&head, &encoded);
        let stored_bytes = object.len() as u64;
        match self.bucket.put_new(&key, Body::raw(object)).await? {
            Put::Written(_) => {}
            Put::Refused => return Err(PublishError::Taken { key }),
        }
        let acknowledged = (self.clocks.bucket)();
        if acknowledged >= until_millis {
            let late_millis = acknowledged - until_millis;
            return Err(PublishError::Stale { key, late_millis });
        }
        let off_millis = acknowledged.abs_diff(millis);
        if off_millis > LATE_MILLIS {
            return Err(PublishError::Late { key, off_millis });
        }
        // Before the marks: what is marked is never published without being named as `previous`.
        self.book.last_millis = Some(millis);
        self.book.last_seq = Some(seq);
        self.keep_book()?;
        step.published += done.len() as u64;
        step.segments += 1;
        step.segment_bytes += stored_bytes;
        self.source.published(done).await?;
        // Kept by the next look for those that changed again meanwhile.
        self.overtaken
            .extend(places.iter().map(|place| (place.first_seq, place.seq)));
        Ok(())
    }

    fn take_seq(&mut self) -> Result<u64, StoreError> {
        if self.next_seq >= self.book.reserved {
            self.book.reserved = self.next_seq + RESERVED;
            if let Err(err) = self.keep_book() {
                self.book.reserved = self.next_seq;
                return Err(err);
            }
        }
        let seq = self.next_seq;
        self.next_seq += 1;
        Ok(seq)
    }

    /// The time in the next key: now, but never before the last key because a clock was set back a little.
    fn key_millis(&self) -> u64 {
        let now = (self.clocks.bucket)();
        let last = self.book.last_millis.unwrap_or(0);
        if last <= now.saturating_add(LATE_MILLIS / 2) {
            now.max(last)
        } else {
            now
        }
    }

    fn keep_book(&self) -> Result<(), StoreError> {
        self.source
            .keep_note(&note_key(&self.volume), self.book.encode_to_vec())
    }
}

fn refusal(change: &PathChange, why: &str) -> String {
    format!(
        "{} cannot be shared: {why}",
        String::from_utf8_lossy(&change.path)
    )
}
