//! Everything that refers to objects, one function a source.
//!
//! Today these are the logs of all volumes, seen as of now and as of each moment at which a fork lies over one, and
//! the catalogs that `snapshots` name.
//! A new kind of object below `volumes/` is read here, or the sweep refuses the store: [`inventory`] knows
//! every key, or stops.

mod snapshots;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use tokio::task::JoinSet;

use super::{
    SweepError,
    asking::Asking,
    marks::Marks,
    report::Progress,
    winners::{Held, Part, TooMany, Views, Winners},
};
use crate::{
    base::{digest::Digest, snapshot::SnapshotTag, volume::VolumeName},
    namespace::{
        change::{Entry, EntryBlob, EntryChunks},
        follow::SegmentKey,
        segment::{self, Decoded},
        stack::{self, StackError},
    },
    store::{
        manifest::{self, ManifestError, Placed},
        pack::PackPlace,
    },
    tier::{TierError, layout, sweeping::mark},
};

/// Segments that are fetched at once, and held in memory.
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
    pub snapshots: u64,
    /// Roots and parts in `volumes/<name>/catalogs/` that snapshots name, of whichever volume these are. They are
    /// kept, however old.
    pub catalogs: HashMap<VolumeName, HashSet<Digest>>,
}

/// What a volume has in the bucket.
#[derive(Debug, Default)]
struct Volume {
    has_json: bool,
    /// It keeps its blobs apart, because its writers are trusted less: what they write must not end a sweep.
    is_apart: bool,
    /// It has blobs of its own.
    has_blobs: bool,
    /// A key that nothing is known of.
    unknown: Option<String>,
    /// In the order of their keys.
    segments: Vec<SegmentKey>,
    snapshots: BTreeSet<SnapshotTag>,
}

/// Reads all references. They are those of a moment after the call.
pub async fn read(
    asking: &Asking,
    now_millis: u64,
    window_millis: u64,
    tell: &mut (dyn FnMut(&Progress) + Send),
) -> Result<References, SweepError> {
    let mut volumes = inventory(asking).await?;
    let mut views = views(asking, &mut volumes).await?;
    for volume in volumes.values() {
        match &volume.unknown {
            Some(key) if !volume.is_apart => return Err(SweepError::Unknown { key: key.clone() }),
            Some(key) => tracing::warn!(key, "nothing is known of this object, and it counts for nothing"),
            None => {}
        }
    }
    let mut found = References {
        volumes: volumes.len() as u64,
        segments: volumes.values().map(|volume| volume.segments.len() as u64).sum(),
        ..References::default()
    };
    let from_millis = now_millis.saturating_sub(window_millis);
    let mut reading = Reading {
        asking,
        tell,
        done: 0,
        total: found.segments,
        lists: HashMap::new(),
        with_blobs: volumes
            .iter()
            .filter(|(_, volume)| volume.has_blobs)
            .map(|(name, _)| name.clone())
            .collect(),
    };
    for (name, volume) in &volumes {
        let views = Views::new(from_millis, views.remove(name).unwrap_or_default());
        found.names += reading.log(name, volume, &views, &mut found.marks).await?;
    }
    reading.snapshots(&volumes, &mut found).await?;
    found.lost_lists = reading.lists.values().filter(|list| list.is_none()).count() as u64;
    found.marks.sort();
    Ok(found)
}

/// What the sweep does with an object below `volumes/`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// It is read.
    Segment(SegmentKey),
    /// It is read.
    Json,
    /// It is read.
    Snapshot(SnapshotTag),
    /// It refers to nothing that segments do not refer to: no segment is ever removed, but with its volume.
    Repeats,
    /// Of a volume that keeps its own; no sweep touches it.
    Blob,
}

/// Knows every key of a volume; `None` for any other.
fn kind(volume: &str, key: &str) -> Option<Kind> {
    if key == layout::volume(volume) {
        return Some(Kind::Json);
    }
    if let Some(segment) = SegmentKey::parse(volume, key) {
        return Some(Kind::Segment(segment));
    }
    if let Some(tag) = layout::snapshot_tag(volume, key) {
        return tag.parse().ok().map(Kind::Snapshot);
    }
    let rest = key.strip_prefix(layout::VOLUMES_PREFIX)?;
    let rest = rest.strip_prefix(volume)?.strip_prefix('/')?;
    if rest.starts_with("blobs/") {
        return Some(Kind::Blob);
    }
    // Checkpoints of the log, the packs of a volume that keeps its own, which no sweep touches, and what is used.
    let folders = ["catalogs/", "packs/", "probe/", "touched/"];
    let repeats = rest == "head.json" || folders.iter().any(|folder| rest.starts_with(folder));
    repeats.then_some(Kind::Repeats)
}

/// Lists everything below `volumes/`, and understands all of it.
///
/// It is listed twice, and what was there at either time counts: names can move from a volume that is listed
/// late to one that was listed before, and their volume be deleted in between.
async fn inventory(asking: &Asking) -> Result<BTreeMap<VolumeName, Volume>, SweepError> {
    let mut volumes: BTreeMap<VolumeName, Volume> = BTreeMap::new();
    for _ in 0..2 {
        add_listed(asking, &mut volumes).await?;
    }
    for volume in volumes.values_mut() {
        volume.segments.sort_unstable();
        volume.segments.dedup();
    }
    Ok(volumes)
}

async fn add_listed(asking: &Asking, volumes: &mut BTreeMap<VolumeName, Volume>) -> Result<(), SweepError> {
    let mut after = None;
    loop {
        let (objects, more) = asking.page(layout::VOLUMES_PREFIX, &mut after).await?;
        for object in objects {
            let unknown = || SweepError::Unknown {
                key: object.key.clone(),
            };
            let rest = object
                .key
                .strip_prefix(layout::VOLUMES_PREFIX)
                .unwrap_or_default();
            let (name, _) = rest.split_once('/').ok_or_else(unknown)?;
            let name: VolumeName = name.parse().map_err(|_| unknown())?;
            let kind = kind(name.as_str(), &object.key);
            let volume = volumes.entry(name).or_default();
            let Some(kind) = kind else {
                volume.unknown.get_or_insert(object.key);
                continue;
            };
            match kind {
                Kind::Segment(segment) => volume.segments.push(segment),
                Kind::Json => volume.has_json = true,
                Kind::Snapshot(tag) => {
                    volume.snapshots.insert(tag);
                }
                Kind::Blob => volume.has_blobs = true,
                Kind::Repeats => {}
            }
        }
        if !more {
            return Ok(());
        }
    }
}

/// At which moments forks see the volumes below them.
async fn views(
    asking: &Asking,
    volumes: &mut BTreeMap<VolumeName, Volume>,
) -> Result<HashMap<VolumeName, Vec<u64>>, SweepError> {
    let mut views: HashMap<VolumeName, Vec<u64>> = HashMap::new();
    for (name, volume) in volumes.iter_mut().filter(|(_, volume)| volume.has_json) {
        let stack = match stack::read(asking.bucket(), name).await {
            Ok(stack) => stack,
            Err(StackError::Bucket(err)) => return Err(err.into()),
            // It sees nothing any more. What is left of its log is read all the same.
            Err(StackError::Deleted { volume: gone }) if gone == *name => continue,
            Err(source) => return Err(SweepError::Volume { source }),
        };
        volume.is_apart = stack.layers()[0].own_prefix;
        for layer in &stack.layers()[1..] {
            if let Some(until) = layer.until_millis {
                views.entry(layer.volume.clone()).or_default().push(until);
            }
        }
    }
    Ok(views)
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
    /// Reads what a volume's log refers to, in as many parts as its names need. Returns how many names it has.
    async fn log(
        &mut self,
        name: &VolumeName,
        volume: &Volume,
        views: &Views,
        marks: &mut Marks,
    ) -> Result<u64, SweepError> {
        let mut of = 1;
        loop {
            let mut names = Some(0);
            for number in 0..of {
                let part = Part { number, of };
                let read = self.part(name, volume, Winners::new(views, part, marks)).await?;
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
        name: &VolumeName,
        volume: &Volume,
        mut winners: Winners<'_>,
    ) -> Result<Result<u64, TooMany>, SweepError> {
        for together in volume.segments.chunks(TOGETHER) {
            let mut under_way = JoinSet::new();
            for (index, segment) in together.iter().enumerate() {
                let (asking, segment, key) = (self.asking.clone(), *segment, segment.to_key(name.as_str()));
                under_way.spawn(async move { (index, fetch(&asking, segment, key).await) });
            }
            let mut fetched = under_way.join_all().await;
            fetched.sort_unstable_by_key(|(index, _)| *index);
            for (segment, (_, decoded)) in together.iter().zip(fetched) {
                let key = segment.to_key(name.as_str());
                let changes = unless_apart(volume, decoded.map(|decoded| decoded.changes))?;
                for change in &changes.unwrap_or_default() {
                    let held = match &change.entry {
                        None => None,
                        Some(Entry { blob: None, .. }) => Some(Held::Nothing),
                        Some(Entry { blob: Some(blob), .. }) => {
                            let held = unless_apart(volume, self.held(blob, &key, name).await)?;
                            Some(held.unwrap_or(Held::Nothing))
                        }
                    };
                    if let Err(too_many) = winners.add(segment.millis, &change.path, change.stamp, held) {
                        return Ok(Err(too_many));
                    }
                }
                self.done += 1;
                (self.tell)(&Progress {
                    step: "reading what is in use, segments",
                    done: self.done,
                    total: Some(self.total.max(self.done)),
                });
            }
        }
        Ok(Ok(winners.finish()))
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

/// Lets what the writers of a volume that is kept apart got wrong count for nothing: only its own readers lose.
fn unless_apart<T>(volume: &Volume, result: Result<T, SweepError>) -> Result<Option<T>, SweepError> {
    match result {
        Err(err @ (SweepError::Segment { .. } | SweepError::List { .. } | SweepError::Snapshot { .. }))
            if volume.is_apart =>
        {
            tracing::warn!(error = %err, "it counts for nothing, because its writers are not trusted");
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
