//! Which volumes lie below a volume, as the bucket says it.
//!
//! A fork is a volume with a parent: what it says nothing of is looked up in the parent. That
//! is all there is to it, so making one costs the same however large the parent is. How the
//! layers are merged is [`super::tree`]'s to say.
//!
//! # Format of `volumes/<name>/volume.json` (version 1)
//!
//! JSON, one object, written once, with the condition that there is none:
//!
//! ```text
//! version              1; read first and alone, so that a newer one can change all the rest
//! parent.volume        the volume below
//! parent.until_millis  optional: of the parent, and of all that lies below it, nothing is seen that
//!                      was published later (the time in a segment's key, by the bucket's clock)
//! created_millis       when the volume was made, by the bucket's clock; for people
//! ```
//!
//! Members that are not known are ignored. A volume without this object lies over nothing; it
//! exists when it has a segment.
//!
//! # Invariants
//!
//! - The parent of a volume never changes: a volume that exists gets none.
//! - At most [`TreeLayer::MAX_BELOW`] volumes lie below one, and none twice.
//! - Nothing is ever written to a parent.

use serde::{Deserialize, Serialize};

use super::{
    follow::{SegmentKey, before},
    publish::LATE_MILLIS,
};
use crate::{
    base::volume::{Stack, StackLayer, VolumeName},
    store::rows::TreeLayer,
    tier::{Body, Bucket, Put, TierError, layout, probe},
};

const VERSION: u32 = 1;

/// `volume.json` is far below this.
const MAX_BYTES: u64 = 64 << 10;

/// The content of `volume.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeJson {
    pub version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<StackLayer>,
    pub created_millis: u64,
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
        "the server of {url} ignores If-None-Match, so two machines could make one volume at once: forks need \
         a server that honours it"
    )]
    NoConditions { url: String },
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
    let mut stack = Stack::of(volume.clone());
    let mut until_millis = None;
    let mut above = volume.clone();
    let mut next = read_json(bucket, volume).await?;
    while let Some(mut parent) = next.and_then(|json| json.parent) {
        let below = parent.volume.clone();
        if stack.layers().iter().any(|layer| layer.volume == below) {
            return Err(StackError::Cycle { volume: below, stack });
        }
        if stack.layers().len() > usize::from(TreeLayer::MAX_BELOW) {
            return Err(StackError::TooDeep {
                volume: volume.clone(),
            });
        }
        next = read_json(bucket, &below).await?;
        if next.is_none() && !has_segment(bucket, &below).await? {
            return Err(StackError::NoParent {
                volume: above,
                parent: below,
            });
        }
        // A layer is not seen for longer than the one that leads to it.
        until_millis = [until_millis, parent.until_millis].into_iter().flatten().min();
        parent.until_millis = until_millis;
        stack.push(parent);
        above = below;
    }
    Ok(stack)
}

/// Makes the volume `name`, a fork of `from`.
///
/// The bucket must have answered before: the time is taken from its clock.
pub async fn create_fork(
    bucket: &dyn Bucket,
    name: &VolumeName,
    from: &VolumeName,
    point: ForkPoint,
) -> Result<VolumeJson, StackError> {
    let exists = || StackError::Exists { volume: name.clone() };
    if read_json(bucket, name).await?.is_some() || has_segment(bucket, name).await? {
        return Err(exists());
    }
    if read_json(bucket, from).await?.is_none() && !has_segment(bucket, from).await? {
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
    let json = VolumeJson {
        version: VERSION,
        parent: Some(StackLayer {
            volume: from.clone(),
            until_millis: match point {
                ForkPoint::Live => None,
                ForkPoint::Now => Some(newest(bucket, &below, now).await?),
            },
        }),
        created_millis: now,
    };
    let key = layout::volume(name.as_str());
    match bucket.put_new(&key, Body::raw(json.encode())).await? {
        Put::Written(_) => Ok(json),
        // A lost reply looks like a refusal.
        Put::Refused if read_json(bucket, name).await?.as_ref() == Some(&json) => Ok(json),
        Put::Refused => Err(exists()),
    }
}

async fn read_json(bucket: &dyn Bucket, volume: &VolumeName) -> Result<Option<VolumeJson>, StackError> {
    let key = layout::volume(volume.as_str());
    match bucket.get(&key, None, MAX_BYTES).await? {
        Some(object) => VolumeJson::decode(volume, &object.bytes).map(Some),
        None => Ok(None),
    }
}

/// Whether a volume has anything: what was in its log may be in a catalog alone.
async fn has_segment(bucket: &dyn Bucket, volume: &VolumeName) -> Result<bool, TierError> {
    let prefix = layout::log_prefix(volume.as_str());
    Ok(!bucket.list(&prefix, None).await?.objects.is_empty()
        || bucket.head(&layout::head(volume.as_str())).await?.is_some())
}

/// A moment before which everything was published that is in the logs now: `now`, unless a
/// machine's clock is a little ahead of ours. One request for each layer.
async fn newest(bucket: &dyn Bucket, stack: &Stack, now: u64) -> Result<u64, TierError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> VolumeName {
        text.parse().unwrap()
    }

    #[test]
    fn the_object_is_written_as_ever() {
        let live = VolumeJson {
            version: VERSION,
            parent: Some(StackLayer {
                volume: name("main"),
                until_millis: None,
            }),
            created_millis: 1_767_225_600_000,
        };
        let text = "{\n  \"version\": 1,\n  \"parent\": {\n    \"volume\": \"main\"\n  },\n  \
                    \"created_millis\": 1767225600000\n}\n";
        assert_eq!(String::from_utf8(live.encode()).unwrap(), text);
        assert_eq!(VolumeJson::decode(&name("f"), text.as_bytes()).unwrap(), live);
        let text = text.replace("\"main\"\n", "\"main\",\n    \"until_millis\": 7\n");
        let bounded = VolumeJson::decode(&name("f"), text.as_bytes()).unwrap();
        assert_eq!(bounded.parent.as_ref().unwrap().until_millis, Some(7));
        assert_eq!(String::from_utf8(bounded.encode()).unwrap(), text);
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let decode = |text: &str| VolumeJson::decode(&name("f"), text.as_bytes()).unwrap_err();
        let newer = decode(r#"{"version": 2, "layers": []}"#).to_string();
        assert!(newer.contains("newer casmount (volume.json version 2"), "{newer}");
        for text in [
            "",
            "[]",
            r#"{"version": 1}"#,
            r#"{"version": 1, "created_millis": 1, "parent": {"volume": "../main"}}"#,
        ] {
            let err = decode(text);
            assert!(matches!(err, StackError::Malformed { .. }), "{text}: {err}");
            assert!(
                err.to_string().starts_with("volumes/f/volume.json is damaged ("),
                "{err}"
            );
        }
        // What a newer program of this version adds is ignored.
        VolumeJson::decode(
            &name("f"),
            br#"{"version": 1, "created_millis": 1, "preset": "bazel"}"#,
        )
        .unwrap();
    }
}
