//! Which volumes lie below a volume, as the bucket says it.
//!
//! A fork is a volume with a parent: what it says nothing of is looked up in the parent. That
//! is all there is to it, so making one costs the same however large the parent is. How the
//! layers are merged is [`super::tree`]'s to say.
//!
//! # Format of `volumes/<name>/volume.json` (version 1)
//!
//! JSON, one object; presets replace it, and the deletion of the volume ([`super::volumes`]):
//!
//! ```text
//! version              1; read first and alone, so that a newer one can change all the rest
//! parent.volume        optional: the volume below
//! parent.until_millis  optional: of the parent, and of all that lies below it, nothing is seen that
//!                      was published later (the time in a segment's key, by the bucket's clock)
//! bases                optional: where the view of each volume below begins, up to parent.until_millis:
//!                      {<volume>: {catalog, watermark_millis}}; without catalog at the begin of its log
//! own_prefix           optional: true when its blobs and packs are below its own prefix ([`crate::tier::domain`])
//! created_millis       when the volume was made, by the bucket's clock; for people
//! deleted_millis       optional: when it was deleted, by the bucket's clock; nothing else of it counts then
//! deletion_undecided   optional: true while the deletion may still be taken back; nothing was removed so far
//! presets              optional: presets of directories, see [`super::preset::volume`]
//! ```
//!
//! The object is made with the condition that there is none, and replaced with the condition that
//! it is the version that was read. Members that are not known are ignored. A volume without this object lies over nothing; it
//! exists when it has a segment.
//!
//! # Invariants
//!
//! - The parent of a volume never changes: a volume that exists gets none.
//! - A name is made once: that of a deleted volume stays taken, so that a machine that comes back late
//!   with changes for it, or with a cache directory of it, is never mixed with another volume of that name.
//! - At most [`TreeLayer::MAX_BELOW`] volumes lie below one, and none twice.
//! - Nothing is ever written to a parent.
//! - A fork that sees its parent up to a moment says when it is made which catalogs that view begins with. Sweeps keep
//!   these, and the logs from there to the moment; of a fork that does not say it (an earlier version made it), all
//!   of the logs up to the moment.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    catalog::{CatalogError, head},
    follow::{SegmentKey, before},
    publish::LATE_MILLIS,
};
use crate::{
    base::volume::{Base, Stack, StackLayer, VolumeName},
    store::rows::TreeLayer,
    tier::{
        Body, Bucket, Etag, Put, TierError, layout, probe,
        sweeping::{self, DEFAULT_WINDOW},
    },
};

const VERSION: u32 = 1;

/// How often a change of the object is tried that others are quicker with.
const CHANGE_ATTEMPTS: u32 = 8;

/// `volume.json` is far below this.
const MAX_BYTES: u64 = 64 << 10;

/// The content of `volume.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeJson {
    pub version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<StackLayer>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own_prefix: bool,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub bases: BTreeMap<VolumeName, Base>,
    pub created_millis: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted_millis: Option<u64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deletion_undecided: bool,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub presets: BTreeMap<String, String>,
}

/// What a name stands for.
#[expect(clippy::large_enum_variant, reason = "one is made, looked at and dropped")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing, so far.
    Absent,
    /// A volume that lies over nothing.
    Plain,
    Fork(VolumeJson, StackLayer),
    /// A volume that was deleted.
    Deleted,
}

/// What lies below a volume cannot be known or made.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    #[error(transparent)]
    Bucket(#[from] TierError),
    #[error(
        "volume {volume} was made by a newer casmount (volume.json version {version}, this program knows \
         {VERSION}): use that version, or name another volume"
    )]
    Newer { volume: VolumeName, version: u32 },
    #[error("{} is damaged ({why}): restore it, or name another volume", layout::volume(volume.as_str()))]
    Malformed { volume: VolumeName, why: String },
    #[error(
        "volume {volume} is a fork of volume {parent}, which does not exist in this store: restore it, or \
         name another volume"
    )]
    NoParent { volume: VolumeName, parent: VolumeName },
    #[error(
        "volume {volume} lies below itself ({stack} over {volume}): correct {}, or name another volume",
        layout::volume(stack.layers().last().map_or("", |layer| layer.volume.as_str()))
    )]
    Cycle { volume: VolumeName, stack: Stack },
    #[error(
        "{} volumes lie below volume {volume}, and that is the most: fork one of those below it",
        TreeLayer::MAX_BELOW
    )]
    TooDeep { volume: VolumeName },
    #[error("volume {volume} exists already: choose another name")]
    Exists { volume: VolumeName },
    #[error(
        "there is no volume {volume} in this store to fork: correct the name; a volume exists as soon as a \
         machine has published a change of it"
    )]
    NothingToFork { volume: VolumeName },
    #[error(
        "volume {volume} was deleted: name another volume; what was not published of it stays in the cache \
         directories of the machines that had it mounted"
    )]
    Deleted { volume: VolumeName },
    #[error("volume {volume} exists and is no fork of volume {wanted}: choose another name")]
    OtherParent { volume: VolumeName, wanted: VolumeName },
    #[error(
        "the server of {url} ignores If-None-Match, so two machines could make one volume at once: forks need \
         a server that honours it"
    )]
    NoConditions { url: String },
    #[error("the settings of volume {volume} are being changed by others all the time: try again")]
    Contended { volume: VolumeName },
    #[error("cannot read which catalog volume {volume} has")]
    Catalog {
        volume: VolumeName,
        source: Box<CatalogError>,
    },
    /// A sweep may have taken what it would begin with.
    #[error("making the fork took longer than half the window of the store: try again")]
    Slow,
}

/// How much of its parent a fork sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForkPoint {
    /// All of it, also what is published later.
    Live,
    /// What was published before the fork was made.
    Now,
}

impl VolumeJson {
    /// The bytes of the object.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("no member can fail to be written");
        bytes.push(b'\n');
        bytes
    }

    /// Reads the object of `volume`.
    pub fn decode(volume: &VolumeName, bytes: &[u8]) -> Result<Self, StackError> {
        #[derive(Deserialize)]
        struct VersionOnly {
            version: u32,
        }
        let malformed = |err: serde_json::Error| StackError::Malformed {
            volume: volume.clone(),
            why: err.to_string(),
        };
        let VersionOnly { version } = serde_json::from_slice(bytes).map_err(malformed)?;
        if version > VERSION {
            return Err(StackError::Newer {
                volume: volume.clone(),
                version,
            });
        }
        serde_json::from_slice(bytes).map_err(malformed)
    }
}

/// Reads what `volume` lies over; a volume that is not there yet lies over nothing.
///
/// One request for each layer, and one more for each that is no fork itself.
pub async fn read(bucket: &dyn Bucket, volume: &VolumeName) -> Result<Stack, StackError> {
    let json = read_live(bucket, volume).await?;
    stack_of(bucket, volume, json).await
}

/// The same for settings that were read, whatever they say of a deletion.
pub(super) async fn stack_of(
    bucket: &dyn Bucket,
    volume: &VolumeName,
    json: Option<VolumeJson>,
) -> Result<Stack, StackError> {
    let mut stack = Stack::of(volume.clone());
    let mut until_millis: Option<u64> = None;
    let mut bases = BTreeMap::new();
    let mut above = volume.clone();
    let mut next = json;
    while let Some(json) = next {
        if json.own_prefix {
            stack.keep_last_apart();
        }
        let Some(mut parent) = json.parent else { break };
        let below = parent.volume.clone();
        if stack.layers().iter().any(|layer| layer.volume == below) {
            return Err(StackError::Cycle { volume: below, stack });
        }
        if stack.layers().len() > usize::from(TreeLayer::MAX_BELOW) {
            return Err(StackError::TooDeep {
                volume: volume.clone(),
            });
        }
        next = read_live(bucket, &below).await?;
        if next.is_none() && !has_segment(bucket, &below).await? {
            return Err(StackError::NoParent {
                volume: above,
                parent: below,
            });
        }
        // A layer is not seen for longer than the one that leads to it.
        if let Some(until) = parent.until_millis
            && until_millis.is_none_or(|shorter| until < shorter)
        {
            (until_millis, bases) = (Some(until), json.bases);
        }
        parent.until_millis = until_millis;
        parent.base = bases.get(&parent.volume).copied();
        // Whether its blobs are apart, it says itself.
        parent.own_prefix = false;
        // Nor is any of it a snapshot, whatever is written there.
        parent.frozen = None;
        stack.push(parent);
        above = below;
    }
    Ok(stack)
}

/// What `volume` is; two requests at most.
pub async fn standing(bucket: &dyn Bucket, volume: &VolumeName) -> Result<Standing, StackError> {
    Ok(match read_json(bucket, volume).await? {
        Some((json, _)) if json.deleted_millis.is_some() => Standing::Deleted,
        Some((json, _)) => match json.parent.clone() {
            Some(parent) => Standing::Fork(json, parent),
            None => Standing::Plain,
        },
        None if has_segment(bucket, volume).await? => Standing::Plain,
        None => Standing::Absent,
    })
}

/// Makes the volume `name`, a fork of `from`. With `own_prefix`, or when `from` has one, its
/// blobs are kept below its own prefix.
///
/// The bucket must have answered before: the time is taken from its clock.
pub async fn create_fork(
    bucket: &dyn Bucket,
    name: &VolumeName,
    from: &VolumeName,
    point: ForkPoint,
    own_prefix: bool,
) -> Result<VolumeJson, StackError> {
    let exists = || StackError::Exists { volume: name.clone() };
    match standing(bucket, name).await? {
        Standing::Absent => {}
        Standing::Deleted => return Err(StackError::Deleted { volume: name.clone() }),
        Standing::Plain | Standing::Fork(..) => return Err(exists()),
    }
    if standing(bucket, from).await? == Standing::Absent {
        return Err(StackError::NothingToFork { volume: from.clone() });
    }
    let below = read(bucket, from).await?;
    if below.layers().len() > usize::from(TreeLayer::MAX_BELOW) {
        return Err(StackError::TooDeep { volume: from.clone() });
    }
    if !probe::honours_conditions(bucket).await? {
        return Err(StackError::NoConditions { url: bucket.url() });
    }
    let now = bucket.clock().now_millis();
    let (until_millis, bases) = match point {
        ForkPoint::Live => (None, BTreeMap::new()),
        ForkPoint::Now => (
            Some(newest(bucket, &below, now).await?),
            bases(bucket, &below).await?,
        ),
    };
    let json = VolumeJson {
        version: VERSION,
        parent: Some(StackLayer {
            until_millis,
            ..StackLayer::live(from.clone())
        }),
        bases,
        // Who may write the blobs of such a parent must not be believed by those of all.
        own_prefix: own_prefix || below.layers().iter().any(|layer| layer.own_prefix),
        created_millis: now,
        deleted_millis: None,
        deletion_undecided: false,
        presets: BTreeMap::new(),
    };
    let key = layout::volume(name.as_str());
    let made = match bucket.put_new(&key, Body::raw(json.encode())).await? {
        Put::Written(_) => Ok(json),
        // A lost reply looks like a refusal.
        Put::Refused => match read_json(bucket, name).await? {
            Some((there, _)) if there == json => Ok(json),
            _ => Err(exists()),
        },
    }?;
    if until_millis.is_some() && is_slow(bucket, now).await? {
        bucket.delete(&key).await?;
        return Err(StackError::Slow);
    }
    // Who deletes a volume looks for forks of it after it said so: one of both sees the other.
    if let Err(err) = read_live(bucket, from).await {
        if matches!(err, StackError::Deleted { .. }) {
            bucket.delete(&key).await?;
        }
        return Err(err);
    }
    Ok(made)
}

/// Makes the fork `name` of `from` if there is none; a parent that is not there is made, too, without
/// anything in it. False when the fork was there.
pub async fn ensure_fork(
    bucket: &dyn Bucket,
    name: &VolumeName,
    from: &VolumeName,
) -> Result<bool, StackError> {
    let other = || StackError::OtherParent {
        volume: name.clone(),
        wanted: from.clone(),
    };
    match standing(bucket, name).await? {
        Standing::Fork(_, parent) if parent.volume == *from => return Ok(false),
        Standing::Deleted => return Err(StackError::Deleted { volume: name.clone() }),
        Standing::Plain | Standing::Fork(..) => return Err(other()),
        Standing::Absent if name == from => return Err(other()),
        Standing::Absent => {}
    }
    if standing(bucket, from).await? == Standing::Absent {
        let json = VolumeJson {
            version: VERSION,
            parent: None,
            own_prefix: false,
            bases: BTreeMap::new(),
            created_millis: bucket.clock().now_millis(),
            deleted_millis: None,
            deletion_undecided: false,
            presets: BTreeMap::new(),
        };
        // Refused: another machine was first.
        bucket
            .put_new(&layout::volume(from.as_str()), Body::raw(json.encode()))
            .await?;
    }
    match create_fork(bucket, name, from, ForkPoint::Live, false).await {
        Ok(_) => Ok(true),
        // Another machine of the same job was first.
        Err(StackError::Exists { .. }) => match standing(bucket, name).await? {
            Standing::Fork(_, parent) if parent.volume == *from => Ok(false),
            _ => Err(other()),
        },
        Err(err) => Err(err),
    }
}

/// The settings of `volume`, with the version of their object.
pub(super) async fn read_json(
    bucket: &dyn Bucket,
    volume: &VolumeName,
) -> Result<Option<(VolumeJson, Etag)>, StackError> {
    let key = layout::volume(volume.as_str());
    match bucket.get(&key, None, MAX_BYTES).await? {
        Some(object) => Ok(Some((VolumeJson::decode(volume, &object.bytes)?, object.etag))),
        None => Ok(None),
    }
}

/// The settings of `volume`, which must not be deleted.
async fn read_live(bucket: &dyn Bucket, volume: &VolumeName) -> Result<Option<VolumeJson>, StackError> {
    let json = read_json(bucket, volume).await?.map(|(json, _)| json);
    match json {
        Some(json) if json.deleted_millis.is_some() => Err(StackError::Deleted {
            volume: volume.clone(),
        }),
        json => Ok(json),
    }
}

/// Changes the presets in the object of a volume, making it if there is none; returns those that
/// it has then.
///
/// Another's change in between is kept: `change` is applied to what is there then, and members that
/// this program does not know stay. The bucket must have answered before: the time is taken from its clock.
pub(super) async fn change_presets(
    bucket: &dyn Bucket,
    volume: &VolumeName,
    change: impl Fn(&mut BTreeMap<String, String>) + Send,
) -> Result<BTreeMap<String, String>, StackError> {
    if !probe::honours_conditions(bucket).await? {
        return Err(StackError::NoConditions { url: bucket.url() });
    }
    let key = layout::volume(volume.as_str());
    for _ in 0..CHANGE_ATTEMPTS {
        let old = bucket.get(&key, None, MAX_BYTES).await?;
        let mut json = match &old {
            Some(object) => VolumeJson::decode(volume, &object.bytes)?,
            None => VolumeJson {
                version: VERSION,
                parent: None,
                own_prefix: false,
                bases: BTreeMap::new(),
                created_millis: bucket.clock().now_millis(),
                deleted_millis: None,
                deletion_undecided: false,
                presets: BTreeMap::new(),
            },
        };
        if json.deleted_millis.is_some() {
            return Err(StackError::Deleted {
                volume: volume.clone(),
            });
        }
        let before = json.presets.clone();
        change(&mut json.presets);
        if json.presets == before {
            return Ok(before);
        }
        let put = match &old {
            Some(object) => {
                let body = Body::raw(with_presets(volume, &object.bytes, &json.presets)?);
                bucket.put_if(&key, body, &object.etag).await?
            }
            None => bucket.put_new(&key, Body::raw(json.encode())).await?,
        };
        match put {
            Put::Written(_) => return Ok(json.presets),
            // Somebody was quicker, or a reply was lost: the next look tells.
            Put::Refused => {}
        }
    }
    Err(StackError::Contended {
        volume: volume.clone(),
    })
}

/// The bytes of an object with other presets and all else as it was.
fn with_presets(
    volume: &VolumeName,
    old: &[u8],
    presets: &BTreeMap<String, String>,
) -> Result<Vec<u8>, StackError> {
    let malformed = |err: serde_json::Error| StackError::Malformed {
        volume: volume.clone(),
        why: err.to_string(),
    };
    let mut members: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(old).map_err(malformed)?;
    let value = serde_json::to_value(presets).map_err(malformed)?;
    members.insert("presets".to_owned(), value);
    let mut bytes = serde_json::to_vec_pretty(&members).map_err(malformed)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Whether a volume has anything: what was in its log may be in a catalog alone.
async fn has_segment(bucket: &dyn Bucket, volume: &VolumeName) -> Result<bool, TierError> {
    let prefix = layout::log_prefix(volume.as_str());
    Ok(!bucket.list(&prefix, None).await?.objects.is_empty()
        || bucket.head(&layout::head(volume.as_str())).await?.is_some())
}

/// A moment before which everything was published that is in the logs now: `now`, unless a
/// machine's clock is a little ahead of ours. One request for each layer.
pub(super) async fn newest(bucket: &dyn Bucket, stack: &Stack, now: u64) -> Result<u64, TierError> {
    let mut newest = now;
    for layer in stack.layers() {
        let volume = layer.volume.as_str();
        let page = bucket
            .list(&layout::log_prefix(volume), Some(&before(volume, now)))
            .await?;
        let segments = page.objects.iter();
        let millis = segments.filter_map(|object| Some(SegmentKey::parse(volume, &object.key)?.millis));
        // Further in the future a segment would not have counted as published.
        let ahead = millis.filter(|millis| *millis <= now + LATE_MILLIS).max();
        newest = newest.max(ahead.unwrap_or(0));
    }
    Ok(newest)
}

/// The catalogs that views of the layers of `stack` begin with, as of now. One request for each layer.
async fn bases(bucket: &dyn Bucket, stack: &Stack) -> Result<BTreeMap<VolumeName, Base>, StackError> {
    let mut bases = BTreeMap::new();
    for layer in stack.layers() {
        let base = match layer.until_millis {
            None => {
                let read = head::read(bucket, layer.volume.as_str()).await;
                let head = read.map_err(|err| StackError::Catalog {
                    volume: layer.volume.clone(),
                    source: Box::new(err),
                })?;
                let base = head.map(|(head, _)| Base {
                    catalog: Some(head.catalog),
                    watermark_millis: head.watermark_millis,
                });
                Some(base.unwrap_or_default())
            }
            // What lies above it keeps it, and so do we from now on.
            Some(_) => layer.base,
        };
        bases.extend(base.map(|base| (layer.volume.clone(), base)));
    }
    Ok(bases)
}

/// Whether a sweep may have taken what was the newest catalog at `began`, because nothing named it: it goes no
/// sooner than a window after another one took its place.
async fn is_slow(bucket: &dyn Bucket, began: u64) -> Result<bool, TierError> {
    let took = bucket.clock().now_millis().saturating_sub(began);
    let window = sweeping::read_window(bucket).await?;
    let window = window.map_or(DEFAULT_WINDOW.as_millis() as u64, |(window, _)| {
        window.window_millis
    });
    Ok(took > window / 2)
}

#[cfg(test)]
mod tests;
