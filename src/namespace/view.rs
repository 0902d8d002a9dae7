//! What a volume says, read without a mount: from its catalog, and from the log since.
//!
//! [`registers`] reads one volume: every path that it has something to say of, with the newest change. It is
//! the one place that knows where registers come from. [`Stacked`] reads a volume with those below it, and
//! [`Stacked::visible`] tells what a mount would show: the laws of [`super::tree`], as a function of values.
//!
//! # Cost
//!
//! One GET for each part of the catalog; one LIST for a thousand segments that are newer and one GET for each,
//! [`PARALLEL`] at once. Memory: the newest change of every path of the volume, some 300 bytes each.
//!
//! # What cannot be read
//!
//! A segment of a newer version ends the reading: what it says is not known. So does a damaged one, which
//! followers leave out: this is for people and for promotions, and neither wants a part for the whole.

use std::{
    collections::{BTreeMap, HashMap, HashSet, btree_map::Entry as Slot},
    sync::Arc,
};

use tokio::task::JoinSet;

use super::{
    catalog::{CatalogError, format::PartRef, read},
    change::{Entry, Item, PathChange},
    follow::{SegmentKey, WINDOW_MILLIS, before, fetch_segment},
    patience::patiently,
    segment::{Decoded, SegmentError},
};
use crate::{
    base::{
        clock::Stamp,
        volume::{Stack, StackLayer, VolumeName},
    },
    store::rows::NodeKind,
    tier::{SharedBucket, TierError, layout},
};

/// Segments that are fetched at once.
pub const PARALLEL: usize = 16;

/// How often a volume is read anew that changes in a way that hides something.
const READS: u32 = 3;

/// The newest change of one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Register {
    pub stamp: Stamp,
    /// `None`: there is nothing at this path.
    pub entry: Option<Entry>,
    /// By when it was published: the time in the key of the first segment that says it, or, of what is in no segment any
    /// more, the watermark of the catalog.
    pub published_millis: u64,
}

/// Every path that a volume says something of.
pub type Registers = BTreeMap<Vec<u8>, Register>;

/// A volume cannot be read as a whole.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    #[error(transparent)]
    Bucket(#[from] TierError),
    #[error("segment {key} was written by a newer casmount (format {major}): use that version")]
    Newer { key: String, major: u8 },
    #[error(
        "segment {key} is damaged ({why}), so what it says is lost: restore it, or remove it to go on without it"
    )]
    Damaged { key: String, why: &'static str },
    #[error("volume {volume} is being cleaned up while it is read: try again in a moment")]
    Vanishing { volume: VolumeName },
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

/// Says how far a reading is: segments and parts of catalogs that were read, of how many.
pub type OnRead<'a> = &'a (dyn Fn(u64, u64) + Send + Sync);

/// Reads all that a volume says, or said up to a moment. In other words: the source of registers.
pub async fn registers(
    bucket: &SharedBucket,
    layer: &StackLayer,
    on_read: OnRead<'_>,
) -> Result<Registers, ViewError> {
    for _ in 1..READS {
        match once(bucket, layer, on_read).await {
            // A sweep takes what is in a newer catalog; one that lasts is told.
            Ok(None) | Err(ViewError::Catalog(CatalogError::Missing { .. })) => {}
            Ok(Some(registers)) => return Ok(registers),
            Err(err) => return Err(err),
        }
    }
    once(bucket, layer, on_read)
        .await?
        .ok_or_else(|| ViewError::Vanishing {
            volume: layer.volume.clone(),
        })
}

/// Reads a volume once; `None` when something of it went meanwhile.
async fn once(
    bucket: &SharedBucket,
    layer: &StackLayer,
    on_read: OnRead<'_>,
) -> Result<Option<Registers>, ViewError> {
    let opened = patiently(|| read::of_layer(bucket.as_ref(), layer)).await?;
    let from = opened
        .as_ref()
        .map(|opened| opened.root.watermark_millis.saturating_sub(WINDOW_MILLIS));
    let keys = list(bucket, &layer.volume, from, layer.until_millis).await?;
    let watermark = opened.as_ref().map_or(0, |opened| opened.root.watermark_millis);
    let parts = opened.map(|opened| opened.root.parts.clone()).unwrap_or_default();
    let mut registers = Registers::new();
    let (mut read, of) = (0, (parts.len() + keys.len()) as u64);
    fetch_parts(bucket, &layer.volume, parts, |items| {
        for change in items.into_iter().filter_map(Item::into_change) {
            merge(&mut registers, change, watermark);
        }
        read += 1;
        on_read(read, of);
    })
    .await?;
    let whole = fetch(bucket, &layer.volume, keys, |key, decoded| {
        for change in decoded.changes {
            merge(&mut registers, change, key.millis);
        }
        read += 1;
        on_read(read, of);
    })
    .await?;
    Ok(whole.then_some(registers))
}

/// Fetches parts of a catalog, several at once, and hands over each as it comes.
async fn fetch_parts(
    bucket: &SharedBucket,
    volume: &VolumeName,
    parts: Vec<PartRef>,
    mut take: impl FnMut(Vec<Item>),
) -> Result<(), ViewError> {
    let mut parts = parts.into_iter();
    let mut under_way = JoinSet::new();
    loop {
        while under_way.len() < PARALLEL
            && let Some(part) = parts.next()
        {
            let (bucket, volume) = (Arc::clone(bucket), volume.clone());
            under_way.spawn(async move {
                patiently(|| read::part(bucket.as_ref(), volume.as_str(), &part)).await
            });
        }
        match under_way.join_next().await {
            None => return Ok(()),
            Some(Ok(items)) => take(items?),
            Some(Err(err)) if err.is_panic() => std::panic::resume_unwind(err.into_panic()),
            Some(Err(_shutdown)) => std::future::pending().await,
        }
    }
}

/// Within a volume the greater stamp counts (law 1). What was published again says anew where its bytes are.
fn merge(registers: &mut Registers, change: PathChange, published_millis: u64) {
    let mut register = Register {
        stamp: change.stamp,
        entry: change.entry,
        published_millis,
    };
    match registers.entry(change.path) {
        Slot::Vacant(slot) => {
            slot.insert(register);
        }
        Slot::Occupied(mut slot) if slot.get().stamp <= register.stamp => {
            if slot.get().stamp == register.stamp {
                register.published_millis = published_millis.min(slot.get().published_millis);
            }
            slot.insert(register);
        }
        Slot::Occupied(_) => {}
    }
}

/// The segments of a volume that carry a time from `from` to `until`, in the order of their keys.
pub(super) async fn list(
    bucket: &SharedBucket,
    volume: &VolumeName,
    from: Option<u64>,
    until: Option<u64>,
) -> Result<Vec<SegmentKey>, ViewError> {
    let prefix = layout::log_prefix(volume.as_str());
    let mut after = before(volume.as_str(), from.unwrap_or(0));
    let mut keys = Vec::new();
    loop {
        let page = patiently(|| bucket.list(&prefix, Some(&after))).await?;
        let parsed = page
            .objects
            .iter()
            .filter_map(|object| SegmentKey::parse(volume.as_str(), &object.key));
        keys.extend(parsed.filter(|key| until.is_none_or(|until| key.millis <= until)));
        match page.objects.last() {
            Some(last) if page.more && last.key > after => last.key.clone_into(&mut after),
            _ => return Ok(keys),
        }
    }
}

/// Fetches segments, several at once, and hands them over in their order; false when one is gone by now.
pub(super) async fn fetch(
    bucket: &SharedBucket,
    volume: &VolumeName,
    keys: Vec<SegmentKey>,
    mut take: impl FnMut(SegmentKey, Decoded),
) -> Result<bool, ViewError> {
    let mut keys = keys.into_iter().enumerate();
    let mut under_way = JoinSet::new();
    // Those that came before their turn.
    let mut early = BTreeMap::new();
    let mut turn = 0;
    loop {
        while under_way.len() + early.len() < PARALLEL
            && let Some((number, key)) = keys.next()
        {
            let (bucket, volume) = (Arc::clone(bucket), volume.clone());
            under_way.spawn(async move {
                let volume = volume.as_str();
                let fetched = patiently(|| fetch_segment(bucket.as_ref(), volume, key)).await;
                (number, key, fetched)
            });
        }
        let Some(done) = under_way.join_next().await else {
            return Ok(true);
        };
        let (number, key, fetched) = match done {
            Ok(done) => done,
            Err(err) => match err.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_shutdown) => std::future::pending().await,
            },
        };
        match fetched? {
            Some(Ok(decoded)) => {
                early.insert(number, (key, decoded));
                while let Some((key, decoded)) = early.remove(&turn) {
                    take(key, decoded);
                    turn += 1;
                }
            }
            Some(Err(SegmentError::Newer { major })) => {
                let key = key.to_key(volume.as_str());
                return Err(ViewError::Newer { key, major });
            }
            Some(Err(SegmentError::Malformed { why })) => {
                let key = key.to_key(volume.as_str());
                return Err(ViewError::Damaged { key, why });
            }
            None => return Ok(false),
        }
    }
}

/// What is seen at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen<'a> {
    Entry(&'a Entry),
    /// A directory that nobody described, which is there for what is in it.
    Kept,
}

/// A volume with those below it, from the top.
#[derive(Clone, Debug)]
pub struct Stacked(Vec<Arc<Registers>>);

/// Layers that were read once, for stacks that share them.
pub type Read = HashMap<StackLayer, Arc<Registers>>;

impl From<Vec<Arc<Registers>>> for Stacked {
    fn from(layers: Vec<Arc<Registers>>) -> Self {
        Self(layers)
    }
}

impl Stacked {
    /// Reads the layers of `stack` that are not in `read` yet.
    pub async fn read(
        bucket: &SharedBucket,
        stack: &Stack,
        read: &mut Read,
        on_read: OnRead<'_>,
    ) -> Result<Self, ViewError> {
        let mut layers = Vec::new();
        for layer in stack.layers() {
            let known = read.get(layer).cloned();
            let registers_of = match known {
                Some(known) => known,
                None => Arc::new(registers(bucket, layer, on_read).await?),
            };
            read.insert(layer.clone(), Arc::clone(&registers_of));
            layers.push(registers_of);
        }
        Ok(Self(layers))
    }

    /// What a mount shows, path by path (laws 1 and 2 of [`super::tree`]).
    #[must_use]
    pub fn visible(&self) -> BTreeMap<&[u8], Seen<'_>> {
        let mut upper: BTreeMap<&[u8], &Register> = BTreeMap::new();
        for registers in &self.0 {
            for (path, register) in registers.iter() {
                upper.entry(path).or_insert(register);
            }
        }
        let live: Vec<(&[u8], &Entry)> = upper
            .into_iter()
            .filter_map(|(path, register)| Some((path, register.entry.as_ref()?)))
            .collect();
        let mut kept: HashSet<&[u8]> = HashSet::new();
        for (path, _) in &live {
            let mut below = *path;
            while let Some(slash) = below.iter().rposition(|&byte| byte == b'/') {
                below = &below[..slash];
                if !kept.insert(below) {
                    break;
                }
            }
        }
        let mut visible: BTreeMap<&[u8], Seen<'_>> = kept.iter().map(|path| (*path, Seen::Kept)).collect();
        for (path, entry) in live {
            if entry.kind == NodeKind::Dir || !kept.contains(path) {
                visible.insert(path, Seen::Entry(entry));
            }
        }
        visible
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::id::MachineId;

    fn entry(kind: NodeKind, perm: u32) -> Entry {
        Entry::new(kind, perm)
    }

    /// Path, time, and what is there: its kind and its mode.
    type Told<'a> = (&'a str, u64, Option<(NodeKind, u32)>);

    fn registers(all: &[Told<'_>]) -> Arc<Registers> {
        let mut registers = Registers::new();
        for (path, millis, what) in all {
            let change = PathChange {
                path: path.as_bytes().to_vec(),
                stamp: Stamp {
                    millis: *millis,
                    counter: 0,
                    machine: MachineId(1),
                },
                entry: what.map(|(kind, perm)| entry(kind, perm)),
            };
            merge(&mut registers, change, 0);
        }
        Arc::new(registers)
    }

    fn seen(layers: Vec<Arc<Registers>>) -> Vec<(String, Option<u32>)> {
        let stacked = Stacked(layers);
        let visible = stacked.visible();
        let tell = |(path, seen): (&&[u8], &Seen<'_>)| {
            let perm = match seen {
                Seen::Entry(entry) => Some(entry.perm),
                Seen::Kept => None,
            };
            (String::from_utf8(path.to_vec()).unwrap(), perm)
        };
        visible.iter().map(tell).collect()
    }

    const FILE: NodeKind = NodeKind::File;
    const DIR: NodeKind = NodeKind::Dir;

    #[test]
    fn the_greater_stamp_counts_within_a_volume_and_the_upper_layer_over_it() {
        let lower = registers(&[("a", 9, Some((FILE, 1))), ("b", 9, Some((FILE, 1)))]);
        let upper = registers(&[
            ("a", 2, Some((FILE, 2))),
            ("a", 1, Some((FILE, 3))),
            ("b", 1, None),
        ]);
        assert_eq!(seen(vec![upper, lower]), [("a".to_owned(), Some(2))]);
    }

    #[test]
    fn a_live_child_keeps_its_directories_and_hides_a_file_there() {
        let only = registers(&[
            ("d", 5, None),
            ("d/e/f", 1, Some((FILE, 1))),
            ("g", 5, Some((FILE, 2))),
            ("g/h", 1, Some((DIR, 3))),
            ("i", 1, Some((DIR, 4))),
            ("i/j", 2, None),
        ]);
        let expected = [
            ("d", None),
            ("d/e", None),
            ("d/e/f", Some(1)),
            ("g", None),
            ("g/h", Some(3)),
            ("i", Some(4)),
        ];
        let expected = expected.map(|(path, perm)| (path.to_owned(), perm));
        assert_eq!(seen(vec![only]), expected);
    }
}
