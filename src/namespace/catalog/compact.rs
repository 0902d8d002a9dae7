//! Makes the newest catalog of a volume out of the one before and the log since.
//!
//! # Invariants
//!
//! - Nothing of the log is removed here; sweeps do, of what the newest catalogs have.
//! - Who loses the replacing of `head.json` has changed nothing that anybody sees; the parts that he
//!   wrote are garbage, which `sweep` removes.
//! - Sweeps that run beside it take nothing that it names: parts that it keeps are those of the newest catalog for
//!   as long as `head.json` is the one that it replaces, and parts that it writes have names that never were. A
//!   sweep changes `head.json` before it deletes a catalog, so a compaction that took longer than that loses.
//! - What is gone while it reads was in a newer catalog: it has lost then.
//! - The watermark trails by [`TRAIL`]; and the log is read from the window of a full listing before the old
//!   watermark, so a segment that appeared late is folded the next time.
//! - A segment that only a newer version can read ends it: what it says must not be left out for all.

use std::{collections::VecDeque, path::PathBuf, sync::Arc, time::Duration};

use super::{
    CatalogError,
    delta::Delta,
    fold::{self, FoldOptions},
    format::{Earlier, Root},
    head::{self, Head},
    read, write,
};
use crate::{
    base::{digest::Digest, id::MachineId, volume::VolumeName},
    namespace::{
        follow::{SegmentKey, WINDOW_MILLIS, before},
        segment::{self, Decoded, SegmentError},
        stack,
    },
    tier::{Etag, SharedBucket, TierError, layout, probe},
};

/// How far a watermark trails: longer than a segment may take to appear before it is published again.
pub const TRAIL: Duration = Duration::from_secs(300);

/// How long a tombstone stays in a catalog: as long as a machine may be away and go on with the log.
pub const TOMBSTONE_MILLIS: u64 = 7 * 24 * 3_600_000;

/// Segments that are fetched at once.
const PARALLEL: usize = 16;

/// How often a segment that comes damaged is fetched before it counts as damaged in the bucket.
const FETCHES: u32 = 4;

/// Older catalogs that a root remembers: all of them up to the first number, then one a day.
const EARLIER_ALL: usize = 32;
const EARLIER_MOST: usize = 128;

/// Who compacts, and how.
#[derive(Clone, Debug)]
pub struct CompactOptions {
    pub machine: MachineId,
    /// [`TRAIL`], but for tests.
    pub trail: Duration,
    /// Where changes are put down when memory does not do.
    pub spill_dir: PathBuf,
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub segments: u64,
    pub changes: u64,
    /// The log is read; parts are being written.
    pub folding: bool,
}

/// What a compaction did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compaction {
    pub head: Head,
    pub segments: u64,
    pub changes: u64,
    /// Segments that are damaged in the bucket: nobody can read them, and they are not in the catalog.
    pub left_out: u64,
    pub written_parts: u64,
    pub written_bytes: u64,
}

/// How a compaction ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done(Compaction),
    /// No segment is newer than the catalog and older than the trail.
    NothingNew(Option<Head>),
    /// Another machine was first; its catalog is as good.
    Lost,
}

/// Makes a new catalog of `volume`, if there is anything new.
pub async fn compact(
    bucket: &SharedBucket,
    volume: &VolumeName,
    options: &CompactOptions,
    progress: impl Fn(Progress),
) -> Result<Outcome, CatalogError> {
    let is_fork = stack::read(bucket.as_ref(), volume)
        .await
        .map_err(|err| CatalogError::Volume(Box::new(err)))?
        .layers()
        .len()
        > 1;
    let volume = volume.as_str();
    let old = match Old::read(bucket, volume).await {
        // Another machine's catalog came between the two requests, perhaps.
        Err(CatalogError::Missing { .. }) => Old::read(bucket, volume).await?,
        read => read?,
    };
    let based_on = old.head.as_ref().map(|(_, etag)| etag.clone());
    let done = make(bucket, volume, old, is_fork, options, &progress).await;
    if matches!(done, Err(CatalogError::Missing { .. }))
        && head::read(bucket.as_ref(), volume).await?.map(|(_, etag)| etag) != based_on
    {
        return Ok(Outcome::Lost);
    }
    done
}

/// Makes a catalog out of `old` and the log since.
async fn make(
    bucket: &SharedBucket,
    volume: &str,
    old: Old,
    is_fork: bool,
    options: &CompactOptions,
    progress: &impl Fn(Progress),
) -> Result<Outcome, CatalogError> {
    let now = bucket.clock().now_millis();
    let watermark = now.saturating_sub(options.trail.as_millis() as u64);
    let since = old.root.as_ref().map_or(0, |root| root.watermark_millis);
    let mut gathered = Gathered {
        bucket,
        volume,
        delta: Delta::new(options.spill_dir.clone()),
        done: Progress::default(),
        newest: 0,
        left_out: 0,
    };
    gathered
        .read(since.saturating_sub(WINDOW_MILLIS), watermark, progress)
        .await?;
    if gathered.newest <= since {
        return Ok(Outcome::NothingNew(old.head.map(|(head, _)| head)));
    }
    if !probe::honours_conditions(bucket.as_ref()).await? {
        return Err(CatalogError::NoConditions { url: bucket.url() });
    }
    let (done, left_out) = (gathered.done, gathered.left_out);
    progress(Progress {
        folding: true,
        ..done
    });
    let checkpoint = Checkpoint {
        watermark_millis: watermark,
        machine: options.machine,
        keeps_tombstones: is_fork,
        part_bytes: write::PART_BYTES,
    };
    let Some((head, sent)) = checkpoint.write(bucket, volume, old, gathered.delta).await? else {
        return Ok(Outcome::Lost);
    };
    Ok(Outcome::Done(Compaction {
        head,
        segments: done.segments,
        changes: done.changes,
        left_out,
        written_parts: sent.parts,
        written_bytes: sent.bytes,
    }))
}

/// The catalog before.
#[derive(Debug, Default)]
pub struct Old {
    head: Option<(Head, Etag)>,
    root: Option<Root>,
}

impl Old {
    /// Reads what `head.json` names. Two requests.
    pub async fn read(bucket: &SharedBucket, volume: &str) -> Result<Self, CatalogError> {
        let head = head::read(bucket.as_ref(), volume).await?;
        let root = match &head {
            Some((head, _)) => Some(read::root(bucket.as_ref(), volume, &head.catalog).await?),
            None => None,
        };
        Ok(Self { head, root })
    }
}

/// A catalog to be written.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoint {
    pub watermark_millis: u64,
    pub machine: MachineId,
    /// What lies below the volume would show where a tombstone is missing.
    pub keeps_tombstones: bool,
    /// About what a part has before compression; [`write::PART_BYTES`], but for tests.
    pub part_bytes: usize,
}

impl Checkpoint {
    /// Folds `delta` into the catalog before and makes the result the newest; `None` when another
    /// machine was first.
    pub async fn write(
        self,
        bucket: &SharedBucket,
        volume: &str,
        old: Old,
        delta: Delta,
    ) -> Result<Option<(Head, write::Sent)>, CatalogError> {
        let (parts, linked) = old
            .root
            .as_ref()
            .map_or((&[][..], &[][..]), |root| (&root.parts, &root.linked));
        let keep_from = if self.keeps_tombstones {
            0
        } else {
            self.watermark_millis.saturating_sub(TOMBSTONE_MILLIS)
        };
        let options = FoldOptions {
            bucket,
            volume,
            keep_dead_from_millis: keep_from,
            stale_dead_millis: keep_from.saturating_sub(TOMBSTONE_MILLIS),
            part_bytes: self.part_bytes,
        };
        let sorted = delta.into_sorted().map_err(CatalogError::Spill)?;
        let folded = fold::fold((parts, linked), sorted, &options).await?;
        let root = Root {
            watermark_millis: self.watermark_millis,
            written_millis: bucket.clock().now_millis(),
            machine: self.machine,
            earlier: earlier(&old),
            names: folded.parts.iter().map(|part| part.names).sum(),
            parts: folded.parts,
            linked: folded.linked,
        };
        let object = root.encode();
        let digest = Digest::of(&object);
        write::put(bucket, volume, &digest, object).await?;
        let head = Head {
            version: head::VERSION,
            catalog: digest,
            watermark_millis: root.watermark_millis,
            names: root.names,
            parts: (root.parts.len() + root.linked.len()) as u64,
            written_millis: root.written_millis,
            machine: self.machine,
        };
        let etag = old.head.as_ref().map(|(_, etag)| etag);
        let won = head::replace(bucket.as_ref(), volume, &head, etag).await?;
        Ok(won.then_some((head, folded.sent)))
    }
}

/// The catalogs before the one to be written: who sees the volume up to a moment looks for one there.
fn earlier(old: &Old) -> Vec<Earlier> {
    const DAY_MILLIS: u64 = 24 * 3_600_000;
    let (Some((head, _)), Some(root)) = (&old.head, &old.root) else {
        return Vec::new();
    };
    let newest = Earlier {
        digest: head.catalog,
        watermark_millis: head.watermark_millis,
    };
    let mut kept: Vec<Earlier> = Vec::new();
    for earlier in std::iter::once(newest).chain(root.earlier.iter().copied()) {
        let day = |millis: u64| millis / DAY_MILLIS;
        let same_day = kept
            .last()
            .is_some_and(|last| day(last.watermark_millis) == day(earlier.watermark_millis));
        if kept.len() < EARLIER_ALL || !same_day {
            kept.push(earlier);
        }
    }
    kept.truncate(EARLIER_MOST);
    kept
}

/// What the log says, as far as it is read.
struct Gathered<'a> {
    bucket: &'a SharedBucket,
    volume: &'a str,
    delta: Delta,
    done: Progress,
    /// The newest time in a key.
    newest: u64,
    left_out: u64,
}

type Fetch = tokio::task::JoinHandle<Result<Option<Result<Decoded, SegmentError>>, TierError>>;

impl Gathered<'_> {
    /// Reads all segments that carry times from `from` to `until`.
    async fn read(
        &mut self,
        from: u64,
        until: u64,
        progress: &impl Fn(Progress),
    ) -> Result<(), CatalogError> {
        let prefix = layout::log_prefix(self.volume);
        let end = before(self.volume, until.saturating_add(1));
        let mut after = before(self.volume, from);
        loop {
            let page = self.bucket.list(&prefix, Some(&after)).await?;
            let keys = page.objects.iter().filter(|object| object.key < end);
            let wanted: VecDeque<_> = keys
                .filter_map(|object| SegmentKey::parse(self.volume, &object.key))
                .collect();
            self.fetch_all(wanted, progress).await?;
            let Some(last) = page.objects.last() else { break };
            if !page.more || last.key >= end {
                break;
            }
            after.clone_from(&last.key);
        }
        Ok(())
    }

    async fn fetch_all(
        &mut self,
        mut wanted: VecDeque<SegmentKey>,
        progress: &impl Fn(Progress),
    ) -> Result<(), CatalogError> {
        let mut fetches: VecDeque<(SegmentKey, AbortOnDrop)> = VecDeque::new();
        loop {
            while fetches.len() < PARALLEL
                && let Some(key) = wanted.pop_front()
            {
                let (bucket, name) = (Arc::clone(self.bucket), key.to_key(self.volume));
                let fetch = tokio::spawn(async move { fetch(&bucket, &name).await });
                fetches.push_back((key, AbortOnDrop(fetch)));
            }
            let Some((key, mut fetch)) = fetches.pop_front() else {
                return Ok(());
            };
            let fetched = match (&mut fetch.0).await {
                Ok(fetched) => fetched?,
                Err(err) => match err.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    Err(_shutdown) => std::future::pending().await,
                },
            };
            self.take(key, fetched)?;
            progress(self.done);
        }
    }

    fn take(
        &mut self,
        key: SegmentKey,
        fetched: Option<Result<Decoded, SegmentError>>,
    ) -> Result<(), CatalogError> {
        let name = || key.to_key(self.volume);
        let decoded = match fetched {
            // Removed since it was listed: another machine's catalog has it, and its head is there.
            None => return Err(CatalogError::Missing { key: name() }),
            Some(Err(err @ SegmentError::Newer { .. })) => {
                return Err(CatalogError::Newer {
                    key: name(),
                    why: err.to_string(),
                });
            }
            Some(Err(err)) => {
                tracing::error!(key = name(), error = %err, "a segment is damaged and left out of the catalog");
                self.left_out += 1;
                return Ok(());
            }
            Some(Ok(decoded)) => decoded,
        };
        if let Some(skipped) = decoded
            .skipped
            .iter()
            .find(|skipped| skipped.why == segment::SAYS_NOTHING)
        {
            let path = String::from_utf8_lossy(&skipped.path);
            return Err(CatalogError::Newer {
                key: name(),
                why: format!("of {path} it says what this program does not understand"),
            });
        }
        self.newest = self.newest.max(key.millis);
        self.done.segments += 1;
        self.done.changes += decoded.changes.len() as u64;
        for change in decoded.changes {
            self.delta.insert(change).map_err(CatalogError::Spill)?;
        }
        Ok(())
    }
}

struct AbortOnDrop(Fetch);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Fetches one segment; `None` when it is gone. Bytes may be damaged on the way.
async fn fetch(bucket: &SharedBucket, key: &str) -> Result<Option<Result<Decoded, SegmentError>>, TierError> {
    let mut fetched = None;
    for _ in 0..FETCHES {
        let bytes = match bucket.get(key, None, segment::MAX_SEGMENT_BYTES).await {
            Ok(Some(object)) => object.bytes,
            Ok(None) => return Ok(None),
            Err(TierError::Malformed { .. }) => {
                let why = "it is larger than any segment";
                fetched = Some(Err(SegmentError::Malformed { why }));
                continue;
            }
            Err(err) => return Err(err),
        };
        match segment::decode(&bytes) {
            Err(err @ SegmentError::Malformed { .. }) => fetched = Some(Err(err)),
            done => return Ok(Some(done)),
        }
    }
    Ok(fetched)
}
