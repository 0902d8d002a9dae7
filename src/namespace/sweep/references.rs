//! Everything that refers to objects, one function a source.
//!
//! These are the catalogs and logs of all volumes, seen as of now and as of each moment at which a fork lies over one:
//! the names of the catalog that is the floor of a volume ([`super::log`]) and of all segments that are left, as
//! changes in their order; all that the catalogs have that forks begin with; and the catalogs that `snapshots` name.
//! `inventory` knows every key below `volumes/`, or stops.

mod snapshots;

use std::collections::{HashMap, HashSet};

use tokio::task::JoinSet;

use super::{
    SweepError,
    asking::Asking,
    inventory::{Volume, Volumes},
    log::{Ages, Log, Opened},
    marks::Marks,
    report::Progress,
    winners::{Held, InCatalog, Part, TooMany, Views, Winners},
};
use crate::{
    base::{digest::Digest, volume::VolumeName},
    namespace::{
        catalog::{format::PartRef, read},
        change::{Entry, EntryBlob, EntryChunks, Item, PathChange},
        follow::SegmentKey,
        segment::{self, Decoded},
    },
    store::{
        manifest::{self, ManifestError, Placed},
        pack::PackPlace,
    },
    tier::{TierError, layout, sweeping::mark},
};

/// Segments and parts that are fetched at once, and held in memory.
const TOGETHER: usize = 16;

/// How often bytes that come damaged are fetched before they count as damaged in the bucket.
const FETCHES: u32 = 4;

/// What is in use.
#[derive(Debug, Default)]
pub struct References {
    /// Of every chunk, chunk list and pack that something refers to.
    pub marks: Marks,
    pub volumes: u64,
    pub segments: u64,
    pub names: u64,
    /// Chunk lists that are gone from the bucket: their blobs are unreadable already.
    pub lost_lists: u64,
    /// What is kept of each volume.
    pub logs: HashMap<VolumeName, Log>,
    /// Segments whose changes are in no catalog.
    pub uncovered: HashSet<(VolumeName, SegmentKey)>,
    pub snapshots: u64,
    /// Roots and parts in `volumes/<name>/catalogs/` that snapshots name, of whichever volume these are. They are
    /// kept, however old.
    pub catalogs: HashMap<VolumeName, HashSet<Digest>>,
}

/// Reads all references. They are those of a moment after the call.
pub async fn read(
    asking: &Asking,
    volumes: &Volumes,
    ages: Ages,
    tell: &mut (dyn FnMut(&Progress) + Send),
) -> Result<References, SweepError> {
    let mut found = References {
        volumes: volumes.len() as u64,
        segments: volumes.values().map(|volume| volume.segments.len() as u64).sum(),
        ..References::default()
    };
    for (name, volume) in volumes {
        let log = Log::read(asking, name.as_str(), volume, ages).await?;
        found.logs.insert(name.clone(), log);
    }
    let parts = found
        .logs
        .values()
        .flat_map(|log| log.floor.iter().chain(&log.pinned));
    let parts: u64 = parts.map(|opened| opened.root.parts.len() as u64).sum();
    let from_millis = ages.began_millis.saturating_sub(ages.window_millis);
    let mut reading = Reading {
        asking,
        tell,
        done: 0,
        total: found.segments + parts,
        lists: HashMap::new(),
        with_blobs: volumes
            .iter()
            .filter(|(_, volume)| volume.has_blobs)
            .map(|(name, _)| name.clone())
            .collect(),
    };
    for (name, volume) in volumes {
        let log = &found.logs[name];
        let floor = log.floor.as_ref().map_or(0, |floor| floor.root.watermark_millis);
        let (later, before): (Vec<u64>, Vec<u64>) = volume
            .moments
            .iter()
            .map(|moment| moment.until_millis)
            .partition(|until| *until >= floor);
        let mut source = Source {
            name,
            volume,
            log,
            views: Views::new(from_millis, later),
            // All that is said up to the last of them is in use; what comes later may be.
            all_until: before.into_iter().max(),
            uncovered: HashSet::new(),
        };
        found.names += reading.log(&mut source, &mut found.marks).await?;
        let uncovered = source
            .uncovered
            .into_iter()
            .map(|segment| (name.clone(), segment));
        found.uncovered.extend(uncovered);
        for opened in &log.pinned {
            reading.pinned(name, volume, opened, &mut found.marks).await?;
        }
    }
    reading.snapshots(volumes, &mut found).await?;
    found.lost_lists = reading.lists.values().filter(|list| list.is_none()).count() as u64;
    found.marks.sort();
    Ok(found)
}

/// A volume that is read.
struct Source<'a> {
    name: &'a VolumeName,
    volume: &'a Volume,
    log: &'a Log,
    views: Views,
    /// Forks see all that was published up to here, and lie before the floor.
    all_until: Option<u64>,
    uncovered: HashSet<SegmentKey>,
}

/// The reading of all logs.
struct Reading<'a> {
    asking: &'a Asking,
    tell: &'a mut (dyn FnMut(&Progress) + Send),
    done: u64,
    total: u64,
    /// The marks of chunk lists that were read; `None`: it is gone.
    lists: HashMap<Digest, Option<Vec<u64>>>,
    /// Volumes that have blobs of their own: lists may be among them.
    with_blobs: Vec<VolumeName>,
}

impl Reading<'_> {
    /// Reads what a volume refers to, in as many parts as its names need. Returns how many names it has.
    async fn log(&mut self, source: &mut Source<'_>, marks: &mut Marks) -> Result<u64, SweepError> {
        let mut of = 1;
        loop {
            let mut names = Some(0);
            for number in 0..of {
                let part = Part { number, of };
                let read = self.part(source, part, marks).await?;
                names = names.zip(read.ok()).map(|(names, more)| names + more);
                if names.is_none() {
                    break;
                }
            }
            if let Some(names) = names {
                return Ok(names);
            }
            // What was found so far is right, and stays.
            of *= 2;
        }
    }

    async fn part(
        &mut self,
        source: &mut Source<'_>,
        part: Part,
        marks: &mut Marks,
    ) -> Result<Result<u64, TooMany>, SweepError> {
        let Source {
            name, volume, log, ..
        } = *source;
        let mut also = Vec::new();
        let views = source.views.clone();
        let mut winners = Winners::new(&views, part, marks);
        if let Some(floor) = &log.floor {
            for together in floor.root.parts.chunks(TOGETHER) {
                for items in unless_apart(self.asking, volume, read_parts(self.asking, name, together).await)?
                    .unwrap_or_default()
                {
                    for change in items.into_iter().filter_map(Item::into_change) {
                        let held = self.held_by(&change, "a catalog", source).await?;
                        if let Err(too_many) = winners.begin(&change.path, change.stamp, held) {
                            return Ok(Err(too_many));
                        }
                    }
                }
                self.progress(together.len());
            }
        }
        let segments: Vec<SegmentKey> = volume.segments.keys().copied().collect();
        for together in segments.chunks(TOGETHER) {
            let mut under_way = JoinSet::new();
            for (index, segment) in together.iter().enumerate() {
                let (asking, segment, key) = (self.asking.clone(), *segment, segment.to_key(name.as_str()));
                under_way.spawn(async move { (index, fetch(&asking, segment, key).await) });
            }
            let mut fetched = under_way.join_all().await;
            fetched.sort_unstable_by_key(|(index, _)| *index);
            for (segment, (_, decoded)) in together.iter().zip(fetched) {
                let key = segment.to_key(name.as_str());
                let changes = unless_apart(self.asking, volume, decoded.map(|decoded| decoded.changes))?;
                let is_seen = source.all_until.is_some_and(|until| segment.millis <= until);
                for change in &changes.unwrap_or_default() {
                    let held = self.held_by(change, &key, source).await?;
                    if is_seen {
                        also.extend(held.iter().flat_map(Held::marks));
                    }
                    if log.is_below_floor(*segment) {
                        if is_in_floor(&winners, change, source, *segment) {
                            continue;
                        }
                        source.uncovered.insert(*segment);
                    }
                    if let Err(too_many) = winners.add(segment.millis, &change.path, change.stamp, held) {
                        return Ok(Err(too_many));
                    }
                }
                self.progress(1);
            }
        }
        let names = winners.finish();
        for mark in also {
            marks.add(mark);
        }
        Ok(Ok(names))
    }

    /// Marks all that a catalog has.
    async fn pinned(
        &mut self,
        name: &VolumeName,
        volume: &Volume,
        opened: &Opened,
        marks: &mut Marks,
    ) -> Result<(), SweepError> {
        let log = Log::default();
        let source = Source {
            name,
            volume,
            log: &log,
            views: Views::default(),
            all_until: None,
            uncovered: HashSet::new(),
        };
        for together in opened.root.parts.chunks(TOGETHER) {
            for items in unless_apart(self.asking, volume, read_parts(self.asking, name, together).await)?
                .unwrap_or_default()
            {
                for change in items.into_iter().filter_map(Item::into_change) {
                    let held = self.held_by(&change, "a catalog", &source).await?;
                    held.iter().flat_map(Held::marks).for_each(|mark| marks.add(mark));
                }
            }
            self.progress(together.len());
        }
        Ok(())
    }

    fn progress(&mut self, more: usize) {
        self.done += more as u64;
        (self.tell)(&Progress {
            step: "reading what is in use, segments and parts of catalogs",
            done: self.done,
            total: Some(self.total.max(self.done)),
        });
    }

    /// What a change refers to; `None`: it says that there is nothing.
    async fn held_by(
        &mut self,
        change: &PathChange,
        by: &str,
        source: &Source<'_>,
    ) -> Result<Option<Held>, SweepError> {
        Ok(match &change.entry {
            None => None,
            Some(Entry { blob: None, .. }) => Some(Held::Nothing),
            Some(Entry { blob: Some(blob), .. }) => {
                let held = unless_apart(self.asking, source.volume, self.held(blob, by, source.name).await)?;
                Some(held.unwrap_or(Held::Nothing))
            }
        })
    }

    /// What the blob of an entry consists of.
    async fn held(
        &mut self,
        blob: &EntryBlob,
        segment: &str,
        volume: &VolumeName,
    ) -> Result<Held, SweepError> {
        let chunks = match &blob.chunks {
            EntryChunks::Single if blob.size == 0 => return Ok(Held::Nothing),
            EntryChunks::Single => vec![mark(&blob.digest)],
            EntryChunks::Inline(list) => list.chunks().iter().map(|chunk| mark(&chunk.digest)).collect(),
            EntryChunks::Listed { digest, size } => {
                if !self.lists.contains_key(digest) {
                    let read =
                        find_list(self.asking, &self.with_blobs, digest, *size, segment, volume).await?;
                    self.lists.insert(*digest, read);
                }
                let listed = self.lists[digest].iter().flatten().copied();
                listed.chain([mark(digest)]).collect()
            }
        };
        Ok(Held::new(chunks.into_iter().chain(packs(&blob.places)).collect()))
    }
}

/// The marks of a chunk list, wherever it is: a fork that keeps its blobs apart keeps its lists there as well, while
/// the chunks may be where all have theirs.
async fn find_list(
    asking: &Asking,
    with_blobs: &[VolumeName],
    list: &Digest,
    size: u64,
    segment: &str,
    volume: &VolumeName,
) -> Result<Option<Vec<u64>>, SweepError> {
    let shared = layout::blob(list);
    if let Some(marks) = read_list(asking, list, shared.clone(), size, segment).await? {
        return Ok(Some(marks));
    }
    let mut apart = with_blobs.to_vec();
    apart.sort_by_key(|name| name != volume);
    for name in apart {
        let key = format!("{}{shared}", layout::volume_prefix(name.as_str()));
        match read_list(asking, list, key, size, segment).await {
            Ok(Some(marks)) => return Ok(Some(marks)),
            // What is damaged there may be meant to be.
            Ok(None) | Err(SweepError::List { .. }) => {}
            Err(err) => return Err(err),
        }
    }
    tracing::warn!(key = shared, segment, "the chunk list of a blob is gone");
    Ok(None)
}

/// Reads parts of a catalog, in their order.
async fn read_parts(
    asking: &Asking,
    name: &VolumeName,
    parts: &[PartRef],
) -> Result<Vec<Vec<Item>>, SweepError> {
    let mut under_way = JoinSet::new();
    for (index, part) in parts.iter().cloned().enumerate() {
        let (asking, name) = (asking.clone(), name.clone());
        under_way.spawn(async move {
            let read = asking
                .again(|bucket| Box::pin(read::part(bucket, name.as_str(), &part)))
                .await;
            (index, read)
        });
    }
    let mut fetched = under_way.join_all().await;
    fetched.sort_unstable_by_key(|(index, _)| *index);
    let items = fetched
        .into_iter()
        .map(|(_, read)| read.map_err(|err| SweepError::from_catalog(name.as_str(), err)));
    items.collect()
}

/// Whether the floor has a change of a segment that is below it.
fn is_in_floor(winners: &Winners<'_>, change: &PathChange, source: &Source<'_>, segment: SegmentKey) -> bool {
    match winners.has(&change.path, change.stamp) {
        InCatalog::Yes | InCatalog::Elsewhere => true,
        InCatalog::No => false,
        // It was there when the catalog was made, and a tombstone came, or it is one, that was forgotten since.
        InCatalog::Absent => {
            let meta = source.volume.segments.get(&segment);
            change.stamp.millis < source.log.forgotten_millis
                && meta.is_some_and(|meta| !Log::is_late(segment, *meta))
        }
    }
}

/// Lets what the writers of a volume that are not trusted got wrong count for nothing: only its own readers lose.
pub(super) fn unless_apart<T>(
    asking: &Asking,
    volume: &Volume,
    result: Result<T, SweepError>,
) -> Result<Option<T>, SweepError> {
    match result {
        Err(err) if volume.is_apart && err.is_of_writer() => {
            asking.ignore(&err.told());
            Ok(None)
        }
        result => result.map(Some),
    }
}

fn packs(places: &[Option<PackPlace>]) -> impl Iterator<Item = u64> {
    places.iter().flatten().map(|place| mark(&place.pack))
}

/// Fetches a segment; damaged bytes are fetched again, they may be damaged on the way.
async fn fetch(asking: &Asking, segment: SegmentKey, key: String) -> Result<Decoded, SweepError> {
    let mut why = String::new();
    for _ in 0..FETCHES {
        let found = asking
            .again(|bucket| bucket.get(&key, None, segment::MAX_SEGMENT_BYTES))
            .await;
        let bytes = match found {
            Ok(Some(object)) => object.bytes,
            Ok(None) => return Err(SweepError::Vanished { key }),
            Err(err @ TierError::Malformed { .. }) => {
                why = err.to_string();
                continue;
            }
            Err(err) => return Err(err.into()),
        };
        match segment::decode(&bytes) {
            Ok(decoded) => match decoded.skipped.first() {
                Some(skipped) => {
                    let path = String::from_utf8_lossy(&skipped.path);
                    why = format!("its change of {path}: {}", skipped.why);
                    break;
                }
                None if decoded.head.machine == segment.machine && decoded.head.seq == segment.seq => {
                    return Ok(decoded);
                }
                None => "it is another segment than its key says".clone_into(&mut why),
            },
            Err(err) => why = err.to_string(),
        }
    }
    Err(SweepError::Segment { key, why })
}

/// Reads the marks of a chunk list; `None` when it is not there.
async fn read_list(
    asking: &Asking,
    list: &Digest,
    key: String,
    size: u64,
    segment: &str,
) -> Result<Option<Vec<u64>>, SweepError> {
    let mut why = String::new();
    for _ in 0..FETCHES {
        let most = size.min(manifest::MAX_LIST_BYTES);
        match asking.again(|bucket| bucket.get(&key, None, most)).await {
            Ok(None) => return Ok(None),
            Ok(Some(object)) if Digest::of(&object.bytes) == *list => match marks_of(&object.bytes) {
                Ok(marks) => return Ok(Some(marks)),
                Err(err) => {
                    why = err.to_string();
                    break;
                }
            },
            Ok(Some(_)) => "its bytes are others than its name says".clone_into(&mut why),
            Err(err @ TierError::Malformed { .. }) => why = err.to_string(),
            Err(err) => return Err(err.into()),
        }
    }
    Err(SweepError::List {
        key,
        segment: segment.to_owned(),
        why,
    })
}

fn marks_of(list: &[u8]) -> Result<Vec<u64>, ManifestError> {
    let (chunks, places): Placed = manifest::decode(list)?;
    let chunks = chunks.chunks().iter().map(|chunk| mark(&chunk.digest));
    Ok(chunks.chain(packs(&places)).collect())
}
