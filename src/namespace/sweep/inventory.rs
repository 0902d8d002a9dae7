//! Everything below `volumes/`: lists it, and knows every key of a volume, or stops.
//!
//! A new kind of object below `volumes/` gets a [`Kind`] here, and what it refers to is read in `references`; until
//! then a sweep refuses the store.
//!
//! Somebody who may write below some names only, and is not trusted, must not be able to stop sweeps. So what is not known
//! counts for nothing, and is told, where no machine looks for anything that refers to blobs:
//!
//! - what is of no volume ([`layout`]), because its name is none, or because nothing of it exists;
//! - what is of a volume that keeps its blobs apart, or that the operator calls untrusted. That only he can tell of a
//!   volume without settings: the main one may have none either, and his policy says who may write which.

use std::collections::{BTreeMap, BTreeSet};

use super::{SweepError, asking::Asking};
use crate::{
    base::{
        digest::Digest,
        snapshot::SnapshotTag,
        volume::{Base, Stack, VolumeName, VolumePattern},
    },
    namespace::{
        deleted::DeletedVolumes,
        follow::SegmentKey,
        stack::{self, StackError},
        together::together,
    },
    tier::layout,
};

/// What a listing says of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    pub size: u64,
    pub modified_millis: u64,
}

/// A moment at which a fork sees the volumes below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    pub until_millis: u64,
    /// `None`: it is not known with which catalog the view begins.
    pub base: Option<Base>,
}

/// What a volume is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    #[default]
    Plain,
    /// It lies over another one, so its tombstones stay for ever.
    Fork,
    /// Nobody reads it any more.
    Deleted,
}

/// What a volume has in the bucket.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is another thing that a listing shows"
)]
#[derive(Debug, Default)]
pub struct Volume {
    /// Of its settings.
    json: Option<Meta>,
    pub standing: Standing,
    /// Its writers are trusted less: it keeps its blobs apart, or is called so. What they write must not end a sweep.
    pub is_apart: bool,
    /// There is something of it that machines go by.
    exists: bool,
    /// It has catalogs that something names, or had.
    pub has_head: bool,
    /// It has blobs or packs of its own.
    pub has_blobs: bool,
    /// A key that nothing is known of.
    unknown: Option<String>,
    /// In the order of their keys.
    pub segments: BTreeMap<SegmentKey, Meta>,
    /// Roots and parts.
    pub catalogs: BTreeMap<Digest, Meta>,
    pub snapshots: BTreeSet<SnapshotTag>,
    pub moments: Vec<Moment>,
}

impl Volume {
    pub fn is_deleted(&self) -> bool {
        self.standing == Standing::Deleted
    }
}

pub type Volumes = BTreeMap<VolumeName, Volume>;

/// What the sweep does with an object below `volumes/`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// It is read, and removed when a catalog has what it says.
    Segment(SegmentKey),
    /// It is read.
    Json,
    /// It is removed when nothing refers to it.
    Catalog(Digest),
    /// It is read.
    Snapshot(SnapshotTag),
    /// Of a volume that keeps its own. It is removed as those of all are.
    Blob,
    /// It is read where it matters, and stays.
    Stays,
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
    if let Some(name) = rest.strip_prefix("catalogs/") {
        return Some(name.parse().map_or(Kind::Stays, Kind::Catalog));
    }
    if rest.starts_with(layout::BLOBS_PREFIX) || rest.starts_with(layout::PACKS_PREFIX) {
        return Some(Kind::Blob);
    }
    // What is used, says nothing of objects.
    let folders = [layout::PROBE_PREFIX, "touched/"];
    let stays =
        ["head.json", "trim.json"].contains(&rest) || folders.iter().any(|folder| rest.starts_with(folder));
    stays.then_some(Kind::Stays)
}

/// Lists everything below `volumes/`, and understands all of it.
///
/// It is listed twice, and what was there at either time counts: names can move from a volume that is listed
/// late to one that was listed before, and their volume be deleted in between.
pub async fn inventory(asking: &Asking, untrusted: &[VolumePattern]) -> Result<Volumes, SweepError> {
    let mut volumes = Volumes::new();
    for _ in 0..2 {
        add_listed(asking, &mut volumes).await?;
    }
    add_stacks(asking, &mut volumes).await?;
    for (name, volume) in &mut volumes {
        volume.is_apart |= untrusted.iter().any(|untrusted| untrusted.matches(name));
    }
    refuse_unknown(asking, &volumes)?;
    Ok(volumes)
}

/// Lists everything below `volumes/` once more, and understands all of it. What lies over what is not read again, and
/// who is trusted only of volumes that `known` does not have, which are added to it.
///
/// One GET for each of these, before which everything is listed, and nothing after: what is to be read can be read at once.
pub async fn listed_again(
    asking: &Asking,
    untrusted: &[VolumePattern],
    known: &mut BTreeMap<VolumeName, bool>,
) -> Result<Volumes, SweepError> {
    let mut volumes = Volumes::new();
    add_listed(asking, &mut volumes).await?;
    let fresh = volumes.keys().filter(|name| !known.contains_key(*name));
    let asks = fresh.cloned().map(|name| {
        let (asking, has_json) = (asking.clone(), volumes[&name].json.is_some());
        let is_untrusted = untrusted.iter().any(|untrusted| untrusted.matches(&name));
        async move {
            let is_apart = is_untrusted || has_json && is_apart(&asking, &name).await?;
            Ok::<_, SweepError>((name, is_apart))
        }
    });
    for is_apart in together(asks.collect::<Vec<_>>()).await {
        known.extend([is_apart?]);
    }
    for (name, volume) in &mut volumes {
        volume.is_apart = known[name];
    }
    refuse_unknown(asking, &volumes)?;
    Ok(volumes)
}

/// Whether a volume keeps its blobs apart.
async fn is_apart(asking: &Asking, name: &VolumeName) -> Result<bool, SweepError> {
    match stack::read_json(asking.bucket(), name).await {
        Ok(json) => Ok(json.is_some_and(|(json, _)| json.own_prefix)),
        Err(StackError::Bucket(err)) => Err(err.into()),
        Err(source) => Err(SweepError::Volume { source }),
    }
}

/// Stops at a key that nothing is known of, unless it is of nobody who is trusted.
fn refuse_unknown(asking: &Asking, volumes: &Volumes) -> Result<(), SweepError> {
    for volume in volumes.values() {
        match &volume.unknown {
            Some(key) if volume.exists && !volume.is_apart => {
                return Err(SweepError::Unknown { key: key.clone() });
            }
            Some(key) => asking.ignore(&format_args!("{key}: nothing is known of it")),
            None => {}
        }
    }
    Ok(())
}

async fn add_listed(asking: &Asking, volumes: &mut Volumes) -> Result<(), SweepError> {
    let mut after = None;
    loop {
        let (objects, more) = asking.page(layout::VOLUMES_PREFIX, &mut after).await?;
        for object in objects {
            let name = layout::volume_of(&object.key).and_then(|name| name.parse::<VolumeName>().ok());
            let Some(name) = name else {
                asking.ignore(&format_args!("{}: it is of no volume", object.key));
                continue;
            };
            let kind = kind(name.as_str(), &object.key);
            let of_log = layout::log_prefix(name.as_str());
            let is_head = object.key == layout::head(name.as_str());
            let is_trim = object.key == layout::trim(name.as_str());
            let volume = volumes.entry(name).or_default();
            volume.has_head |= is_head || is_trim;
            volume.exists |= is_head
                || object.key.starts_with(&of_log)
                || matches!(kind, Some(Kind::Json | Kind::Snapshot(_)));
            let Some(kind) = kind else {
                volume.unknown.get_or_insert(object.key);
                continue;
            };
            let meta = Meta {
                size: object.size,
                modified_millis: object.modified_millis,
            };
            match kind {
                Kind::Segment(segment) => {
                    volume.segments.insert(segment, meta);
                }
                Kind::Catalog(digest) => {
                    volume.catalogs.insert(digest, meta);
                }
                Kind::Snapshot(tag) => {
                    volume.snapshots.insert(tag);
                }
                Kind::Json => volume.json = Some(meta),
                Kind::Blob => volume.has_blobs = true,
                Kind::Stays => {}
            }
        }
        if !more {
            return Ok(());
        }
    }
}

/// What the settings of a volume say.
enum Settings {
    Live(Stack),
    Deleted { is_apart: bool },
}

/// How often a stack is read of which volumes are deleted meanwhile, from the top.
const RACES: u32 = 4;

async fn settings(asking: &Asking, name: &VolumeName) -> Result<Settings, SweepError> {
    let mut races = 0;
    loop {
        let read = match stack::read_json(asking.bucket(), name).await {
            Ok(Some((json, _))) if json.deleted_millis.is_some() && !json.deletion_undecided => {
                return Ok(Settings::Deleted {
                    is_apart: json.own_prefix,
                });
            }
            // A deletion that is not decided may be taken back: all is kept until then.
            Ok(json) => stack::stack_of(asking.bucket(), name, json.map(|(json, _)| json)).await,
            Err(err) => Err(err),
        };
        match read {
            Ok(stack) => return Ok(Settings::Live(stack)),
            Err(StackError::Bucket(err)) => return Err(err.into()),
            Err(StackError::Deleted { .. }) if races < RACES => races += 1,
            Err(source) => return Err(SweepError::Volume { source }),
        }
    }
}

/// Reads what lies over what, and from when on.
async fn add_stacks(asking: &Asking, volumes: &mut Volumes) -> Result<(), SweepError> {
    let deleted = DeletedVolumes::read(asking.bucket()).await?;
    let mut names = Vec::new();
    for (name, volume) in volumes.iter_mut() {
        let Some(json) = volume.json else { continue };
        match deleted.get(name, Some((json.modified_millis, json.size))) {
            Some(known) => {
                volume.standing = Standing::Deleted;
                volume.is_apart = known.own_prefix;
            }
            None => names.push(name.clone()),
        }
    }
    let asks = names.into_iter().map(|name| {
        let asking = asking.clone();
        async move {
            let settings = settings(&asking, &name).await;
            (name, settings)
        }
    });
    for (name, settings) in together(asks).await {
        let volume = volumes.entry(name).or_default();
        let stack = match settings? {
            Settings::Live(stack) => stack,
            Settings::Deleted { is_apart } => {
                // It sees nothing any more. What is left of its log is read all the same. Its writers may have
                // credentials still, and must not end a sweep now either.
                volume.standing = Standing::Deleted;
                volume.is_apart = is_apart;
                continue;
            }
        };
        volume.is_apart = stack.layers()[0].own_prefix;
        if stack.layers().len() > 1 {
            volume.standing = Standing::Fork;
        }
        for layer in &stack.layers()[1..] {
            let Some(until_millis) = layer.until_millis else {
                continue;
            };
            let moment = Moment {
                until_millis,
                base: layer.base,
            };
            let moments = &mut volumes.entry(layer.volume.clone()).or_default().moments;
            if !moments.contains(&moment) {
                moments.push(moment);
            }
        }
    }
    Ok(())
}
