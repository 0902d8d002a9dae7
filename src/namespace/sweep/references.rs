//! Everything that refers to objects, one function a source.
//!
//! These are the catalogs and logs of all volumes, seen as of now and as of each moment at which a fork lies over one:
//! the names of the catalog that is the floor of a volume ([`super::log`]) and of all segments that are left, as
//! changes in their order; all that the catalogs have that forks begin with; and the catalogs that `snapshots` name.
//! `inventory` knows every key below `volumes/`, or stops. `again` reads what came when something went meanwhile.

mod again;
mod fetch;
mod snapshots;

use std::collections::{BTreeSet, HashMap, HashSet};

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
    base::{
        digest::Digest,
        volume::{VolumeName, VolumePattern},
    },
    namespace::{
        catalog::format::PartRef,
        change::{Entry, EntryBlob, EntryChunks, Item, PathChange},
        follow::SegmentKey,
        segment::Decoded,
    },
    tier::sweeping::mark,
};

/// Segments and parts that are fetched at once, and held in memory.
const TOGETHER: usize = 16;

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

/// Reads all references. They are those of a moment after the call; `volumes` is an inventory, made with `untrusted`.
pub async fn read(
    asking: &Asking,
    volumes: &Volumes,
    untrusted: &[VolumePattern],
    ages: Ages,
    tell: &mut (dyn FnMut(&Progress) + Send),
) -> Result<References, SweepError> {
    let mut found = References {
        volumes: volumes.len() as u64,
        segments: volumes.values().map(|volume| volume.segments.len() as u64).sum(),
        ..References::default()
    };
    let mut is_behind = false;
    for (name, volume) in volumes {
        // It was deleted while it was listed, or so that something is left. Its catalogs are not read.
        is_behind |= volume.is_deleted() && !volume.catalogs.is_empty();
        let log = Log::read(asking, name.as_str(), volume, ages).await;
        let log = match again::unless_deleted(asking, name, log).await {
            // All that is left of one that was deleted is left to the next sweep.
            Ok(None) => {
                is_behind = true;
                None
            }
            log => unless_apart(asking, volume, log)?.flatten(),
        };
        found.logs.insert(name.clone(), log.unwrap_or_default());
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
        vanished: HashSet::new(),
        vanished_last: None,
        lost: HashSet::new(),
        doubted: BTreeSet::new(),
        is_behind,
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
        let names = reading.log(&mut source, &mut found.marks).await;
        let names = again::unless_deleted(asking, name, names).await?;
        reading.is_behind |= names.is_none();
        found.names += names.unwrap_or(0);
        let uncovered = source
            .uncovered
            .into_iter()
            .map(|segment| (name.clone(), segment));
        found.uncovered.extend(uncovered);
        for opened in &log.pinned {
            let read = reading.pinned(name, volume, opened, &mut found.marks).await;
            let read = again::unless_deleted(asking, name, read).await?;
            reading.is_behind |= read.is_none();
        }
    }
    reading.snapshots(volumes, &mut found).await?;
    reading.catch_up(volumes, untrusted, &mut found).await?;
    found.lost_lists = reading.lost_lists();
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
    /// Segments that were listed, and not there any more.
    vanished: HashSet<(VolumeName, SegmentKey)>,
    /// The key of the last of them, since everything was listed last.
    vanished_last: Option<String>,
    /// Chunk lists that were not there when they were looked for.
    lost: HashSet<Digest>,
    /// Volumes of writers that are not trusted, of which something was not there. It went if they were deleted; else it may
    /// never have been.
    doubted: BTreeSet<VolumeName>,
    /// Something went while it was read: what it named may be named elsewhere by now ([`again`]).
    is_behind: bool,
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
                for items in self.parts(name, volume, together).await? {
                    for change in items.into_iter().filter_map(Item::into_change) {
                        let held = self.held_by(&change, "a catalog", name, volume).await?;
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
            let fetched = fetch::segments(self.asking, name, together).await;
            for (segment, decoded) in together.iter().zip(fetched) {
                let key = segment.to_key(name.as_str());
                if matches!(decoded, Err(SweepError::Vanished { .. })) {
                    self.vanished(name, *segment);
                    self.progress(1);
                    continue;
                }
                let changes = unless_apart(self.asking, volume, decoded.map(|decoded| decoded.changes))?;
                let is_seen = source.all_until.is_some_and(|until| segment.millis <= until);
                for change in &changes.unwrap_or_default() {
                    let held = self.held_by(change, &key, name, volume).await?;
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

    /// Reads parts of a catalog; none of them where they count for nothing.
    async fn parts(
        &mut self,
        name: &VolumeName,
        volume: &Volume,
        parts: &[PartRef],
    ) -> Result<Vec<Vec<Item>>, SweepError> {
        let read = fetch::parts(self.asking, name, parts).await;
        if volume.is_apart && matches!(&read, Err(err) if err.is_missing()) {
            self.doubted.insert(name.clone());
        }
        Ok(unless_apart(self.asking, volume, read)?.unwrap_or_default())
    }

    /// Marks all that a catalog has.
    async fn pinned(
        &mut self,
        name: &VolumeName,
        volume: &Volume,
        opened: &Opened,
        marks: &mut Marks,
    ) -> Result<(), SweepError> {
        for together in opened.root.parts.chunks(TOGETHER) {
            for items in self.parts(name, volume, together).await? {
                for change in items.into_iter().filter_map(Item::into_change) {
                    let held = self.held_by(&change, "a catalog", name, volume).await?;
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
        name: &VolumeName,
        volume: &Volume,
    ) -> Result<Option<Held>, SweepError> {
        Ok(match &change.entry {
            None => None,
            Some(Entry { blob: None, .. }) => Some(Held::Nothing),
            Some(Entry { blob: Some(blob), .. }) => {
                let held = unless_apart(self.asking, volume, self.held(blob, by, name, volume).await)?;
                Some(held.unwrap_or(Held::Nothing))
            }
        })
    }

    /// What the blob of an entry consists of.
    async fn held(
        &mut self,
        blob: &EntryBlob,
        segment: &str,
        name: &VolumeName,
        volume: &Volume,
    ) -> Result<Held, SweepError> {
        let chunks = match &blob.chunks {
            EntryChunks::Single if blob.size == 0 => return Ok(Held::Nothing),
            EntryChunks::Single => vec![mark(&blob.digest)],
            EntryChunks::Inline(list) => list.chunks().iter().map(|chunk| mark(&chunk.digest)).collect(),
            EntryChunks::Listed { digest, size } => {
                if !self.lists.contains_key(digest) {
                    let read =
                        fetch::list(self.asking, &self.with_blobs, digest, *size, segment, name).await?;
                    self.lists.insert(*digest, read);
                }
                match &self.lists[digest] {
                    Some(_) => {}
                    None if volume.is_apart => {
                        self.doubted.insert(name.clone());
                    }
                    None => self.is_behind = true,
                }
                let listed = self.lists[digest].iter().flatten().copied();
                listed.chain([mark(digest)]).collect()
            }
        };
        Ok(Held::new(
            chunks.into_iter().chain(fetch::packs(&blob.places)).collect(),
        ))
    }
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
