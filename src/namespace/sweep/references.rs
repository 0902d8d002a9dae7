//! Everything that refers to objects, one function a source.
//!
//! Today these are the logs of all volumes, seen as of now and as of each moment at which a fork lies over one.
//! A new kind of object below `volumes/` is read here, or the sweep refuses the store: [`inventory`] knows
//! every key, or stops.

use std::collections::{BTreeMap, HashMap};

use tokio::task::JoinSet;

use super::{
    SweepError,
    asking::Asking,
    marks::Marks,
    report::Progress,
    winners::{Held, Part, TooMany, Views, Winners},
};
use crate::{
    base::{digest::Digest, volume::VolumeName},
    namespace::{
        change::{EntryBlob, EntryChunks},
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
}

/// What a volume has in the bucket.
#[derive(Debug, Default)]
struct Volume {
    lies_over_others: bool,
    /// In the order of their keys.
    segments: Vec<SegmentKey>,
}

/// Reads all references. They are those of a moment after the call.
pub async fn read(
    asking: &Asking,
    now_millis: u64,
    window_millis: u64,
    tell: &mut (dyn FnMut(&Progress) + Send),
) -> Result<References, SweepError> {
    let volumes = inventory(asking).await?;
    let mut views = views(asking, &volumes).await?;
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
    };
    for (name, volume) in &volumes {
        let views = Views::new(from_millis, views.remove(name).unwrap_or_default());
        found.names += reading.log(name, volume, &views, &mut found.marks).await?;
    }
    found.lost_lists = reading.lists.values().filter(|list| list.is_none()).count() as u64;
    found.marks.sort();
    Ok(found)
}

/// What the sweep does with an object below `volumes/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It is read.
    Segment(SegmentKey),
    /// It is read.
    Json,
    /// It refers to nothing that segments do not refer to: no segment is ever removed, but with its volume.
    Repeats,
}

/// Knows every key of a volume; `None` for any other.
fn kind(volume: &str, key: &str) -> Option<Kind> {
    if key == layout::volume(volume) {
        return Some(Kind::Json);
    }
    if let Some(segment) = SegmentKey::parse(volume, key) {
        return Some(Kind::Segment(segment));
    }
    let rest = key.strip_prefix(layout::VOLUMES_PREFIX)?;
    let rest = rest.strip_prefix(volume)?.strip_prefix('/')?;
    // Checkpoints of the log, and the blobs of a volume that keeps its own, which no sweep touches.
    let folders = ["catalogs/", "blobs/", "packs/", "probe/"];
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
            let kind = kind(name.as_str(), &object.key).ok_or_else(unknown)?;
            let volume = volumes.entry(name).or_default();
            match kind {
                Kind::Segment(segment) => volume.segments.push(segment),
                Kind::Json => volume.lies_over_others = true,
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
    volumes: &BTreeMap<VolumeName, Volume>,
) -> Result<HashMap<VolumeName, Vec<u64>>, SweepError> {
    let mut views: HashMap<VolumeName, Vec<u64>> = HashMap::new();
    for (name, _) in volumes.iter().filter(|(_, volume)| volume.lies_over_others) {
        let stack = match stack::read(asking.bucket(), name).await {
            Ok(stack) => stack,
            Err(StackError::Bucket(err)) => return Err(err.into()),
            // It sees nothing any more. What is left of its log is read all the same.
            Err(StackError::Deleted { volume }) if volume == *name => continue,
            Err(source) => return Err(SweepError::Volume { source }),
        };
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
                let decoded = decoded?;
                let key = segment.to_key(name.as_str());
                for change in &decoded.changes {
                    let held = match &change.entry {
                        None => None,
                        Some(entry) => Some(match &entry.blob {
                            Some(blob) => self.held(blob, &key).await?,
                            None => Held::Nothing,
                        }),
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
    async fn held(&mut self, blob: &EntryBlob, segment: &str) -> Result<Held, SweepError> {
        let chunks = match &blob.chunks {
            EntryChunks::Single if blob.size == 0 => return Ok(Held::Nothing),
            EntryChunks::Single => vec![mark(&blob.digest)],
            EntryChunks::Inline(list) => list.chunks().iter().map(|chunk| mark(&chunk.digest)).collect(),
            EntryChunks::Listed { digest, size } => {
                if !self.lists.contains_key(digest) {
                    let read = read_list(self.asking, digest, *size, segment).await?;
                    self.lists.insert(*digest, read);
                }
                let listed = self.lists[digest].iter().flatten().copied();
                listed.chain([mark(digest)]).collect()
            }
        };
        Ok(Held::new(chunks.into_iter().chain(packs(&blob.places)).collect()))
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

/// Reads the marks of a chunk list; `None` when it is gone, and the blob with it.
async fn read_list(
    asking: &Asking,
    list: &Digest,
    size: u64,
    segment: &str,
) -> Result<Option<Vec<u64>>, SweepError> {
    let key = layout::blob(list);
    let mut why = String::new();
    for _ in 0..FETCHES {
        let most = size.min(manifest::MAX_LIST_BYTES);
        match asking.again(|bucket| bucket.get(&key, None, most)).await {
            Ok(None) => {
                tracing::warn!(key, segment, "the chunk list of a blob is gone");
                return Ok(None);
            }
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
