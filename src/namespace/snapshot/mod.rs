//! Snapshots: a state of a volume under a tag, for ever.
//!
//! A snapshot names a catalog of the volume and one of each volume that it lay over, by their digests; so what it
//! shows never changes, whatever becomes of the logs and of the volumes' own catalogs. `create` makes one, `list`
//! lists and deletes, [`references`] says what is kept for its sake.
//!
//! ```text
//! create: log so far ─ catalog::freeze ─ a root for each layer ─ snapshots/<tag>.json
//! mount:  snapshots/<tag>.json ─ a stack of frozen layers ─ catalog::attach ─ directories are loaded when touched
//! ```
//!
//! # Which state
//!
//! All that was published when the command began, of every layer, as far as the layer is seen by the volume: a fork
//! of a moment is snapshotted with its parent of that moment. Also what the newest catalogs lack, because their
//! watermarks trail ([`super::catalog::freeze`]). What is published while the command runs may be in it or not; what
//! appears later is not, whatever time it carries. Tombstones of a layer that lies over another one are kept,
//! because they hide what is below. Presets are those of the moment, too.
//!
//! # Format of `volumes/<name>/snapshots/<tag>.json` (version 1)
//!
//! JSON, one object, made with the condition that there is none, and never replaced:
//!
//! ```text
//! version           1; read first and alone, so that a newer one can change all the rest
//! as_of_millis      the state is that of this time, of the bucket's clock
//! created_millis    when it was made, by the bucket's clock; for people
//! created_by        by whom: user@host; for people
//! names             live registers of all layers; for people
//! layers            from the top, the volume itself first, at least one:
//!   volume          whose catalog it is
//!   catalog         name of the catalog's root in `volumes/<volume>/catalogs/`, 64 hexadecimal digits
//!   own_prefix      optional: true when its blobs and packs are below its own prefix ([`crate::tier::domain`])
//! presets           optional: presets of directories, directory to name, as in [`super::preset::volume`]
//! ```
//!
//! Members that are not known are ignored. `tests/golden_snapshot.rs` pins the bytes.
//!
//! # Invariants
//!
//! - The object is written after everything that it names, and is looked at again after it was written: a volume that
//!   was deleted meanwhile, or a catalog that is gone, takes it back.
//! - It never changes. A tag that was deleted may be made again, and is another snapshot then.
//! - A volume with snapshots is not deleted ([`super::volumes`]), and what it lies over is not either.
//! - What a snapshot names is in use for the sweep as long as the object is there ([`references`]).
//!
//! # Cost
//!
//! Making one: what compacting each layer costs, a listing of each layer's catalogs, and two small requests.
//! Mounting one: beside the requests of every mount, one for the object, one for the root of each layer, and those of
//! the directories that are touched. Following it: none.

mod create;
mod list;
pub mod references;

use serde::{Deserialize, Serialize};

pub use create::{Created, SnapshotOptions, Step, create};
pub use list::{Listed, delete, list, tags};

use super::{catalog::CatalogError, patience::patiently, preset::volume::Kept, stack::StackError};
use crate::{
    base::{
        digest::Digest,
        snapshot::{Frozen, SnapshotTag},
        volume::{Stack, StackLayer, VolumeName},
    },
    store::rows::TreeLayer,
    tier::{Bucket, TierError, layout},
};

pub const VERSION: u32 = 1;

/// It is far below this.
const MAX_BYTES: u64 = 256 << 10;

/// The content of `snapshots/<tag>.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub version: u32,
    pub as_of_millis: u64,
    pub created_millis: u64,
    pub created_by: String,
    pub names: u64,
    /// From the top.
    pub layers: Vec<SnapshotLayer>,
    #[serde(default, skip_serializing_if = "Kept::is_empty")]
    pub presets: Kept,
}

/// One volume as a snapshot shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotLayer {
    pub volume: VolumeName,
    /// Name of the root.
    pub catalog: Digest,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own_prefix: bool,
}

/// A snapshot cannot be made, read or deleted. Split by what the user does next.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error(transparent)]
    Bucket(#[from] TierError),
    #[error(transparent)]
    Volume(#[from] StackError),
    #[error(transparent)]
    Catalog(CatalogError),
    #[error("there is no volume {volume} in this store; see which there are with: casmount volume list")]
    NoVolume { volume: VolumeName },
    #[error(
        "volume {volume} has a snapshot {tag} already, and a tag is made once: choose another one, or delete that one \
         first"
    )]
    Exists { volume: VolumeName, tag: SnapshotTag },
    #[error("volume {volume} has no snapshot {tag}; see which there are with: casmount snapshot list")]
    Absent { volume: VolumeName, tag: SnapshotTag },
    #[error(
        "{key} was made by a newer casmount (version {version}, this program knows {VERSION}): use that version"
    )]
    Newer { key: String, version: u32 },
    #[error("{key} is damaged ({why}): restore it, or delete the snapshot")]
    Damaged { key: String, why: String },
    #[error(
        "the server of {url} ignores If-None-Match, so two machines could make one snapshot at once: snapshots need \
         a server that honours it"
    )]
    NoConditions { url: String },
    #[error(
        "the store is kept by a lifecycle rule, which deletes bytes however long a snapshot names them: go back to sweeps \
         first (casmount sweep --retention sweep, and remove the rule)"
    )]
    AgesOut,
    #[error(
        "making the snapshot took longer than half the window of sweeps ({} s), so that a sweep may have taken what it \
         names: try again, or give the store a longer window",
        window_millis / 2000
    )]
    Slow { window_millis: u64 },
    #[error("{key} went away while the snapshot was made, so there is none: try again")]
    Vanished { key: String },
}

impl From<CatalogError> for SnapshotError {
    fn from(err: CatalogError) -> Self {
        match err {
            CatalogError::Bucket(err) => Self::Bucket(err),
            err => Self::Catalog(err),
        }
    }
}

impl Snapshot {
    /// The bytes of the object.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("no member can fail to be written");
        bytes.push(b'\n');
        bytes
    }

    /// Reads the object of the snapshot `tag` of `volume`.
    pub fn decode(volume: &VolumeName, tag: &SnapshotTag, bytes: &[u8]) -> Result<Self, SnapshotError> {
        #[derive(Deserialize)]
        struct VersionOnly {
            version: u32,
        }
        let key = || layout::snapshot(volume.as_str(), tag.as_str());
        let damaged = |why: String| SnapshotError::Damaged { key: key(), why };
        let read = serde_json::from_slice(bytes).map_err(|err| damaged(err.to_string()));
        let VersionOnly { version } = read?;
        if version > VERSION {
            return Err(SnapshotError::Newer { key: key(), version });
        }
        let snapshot: Self = serde_json::from_slice(bytes).map_err(|err| damaged(err.to_string()))?;
        let mut volumes: Vec<&VolumeName> = snapshot.layers.iter().map(|layer| &layer.volume).collect();
        volumes.sort_unstable();
        match snapshot.layers.first() {
            _ if volumes.windows(2).any(|two| two[0] == two[1]) => {
                Err(damaged("it has a volume twice".to_owned()))
            }
            None => Err(damaged("it has no layers".to_owned())),
            Some(top) if top.volume != *volume => Err(damaged(format!("it is one of volume {}", top.volume))),
            Some(_) if snapshot.layers.len() > usize::from(TreeLayer::MAX_BELOW) + 1 => {
                Err(damaged("it has too many layers".to_owned()))
            }
            Some(_) => Ok(snapshot),
        }
    }

    /// What is mounted of it.
    #[must_use]
    pub fn stack(&self, tag: &SnapshotTag) -> Stack {
        let layer = |layer: &SnapshotLayer| StackLayer {
            volume: layer.volume.clone(),
            until_millis: None,
            own_prefix: layer.own_prefix,
            base: None,
            frozen: Some(Frozen {
                tag: tag.clone(),
                as_of_millis: self.as_of_millis,
                catalog: layer.catalog,
            }),
        };
        let layers = self.layers.iter().map(layer).collect();
        Stack::of_snapshot(layers).expect("it has a layer, and all are of one tag")
    }
}

/// Reads the snapshot `tag` of `volume`; `None`: there is none. One request.
pub async fn read(
    bucket: &dyn Bucket,
    volume: &VolumeName,
    tag: &SnapshotTag,
) -> Result<Option<Snapshot>, SnapshotError> {
    let key = layout::snapshot(volume.as_str(), tag.as_str());
    let object = match patiently(|| bucket.get(&key, None, MAX_BYTES)).await {
        Err(TierError::Malformed { key, why }) => return Err(SnapshotError::Damaged { key, why }),
        other => other?,
    };
    object
        .map(|object| Snapshot::decode(volume, tag, &object.bytes))
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(text: &str) -> Result<Snapshot, SnapshotError> {
        Snapshot::decode(&"fork".parse().unwrap(), &"v=1".parse().unwrap(), text.as_bytes())
    }

    fn text(layers: &str) -> String {
        format!(
            r#"{{"version": 1, "as_of_millis": 1, "created_millis": 2, "created_by": "a@b", "names": 0,
               "layers": [{layers}]}}"#
        )
    }

    fn layer(volume: &str) -> String {
        format!(r#"{{"volume": "{volume}", "catalog": "{}"}}"#, Digest::of(b"x"))
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let newer = decode(r#"{"version": 2, "roots": []}"#).unwrap_err().to_string();
        assert_eq!(
            newer,
            "volumes/fork/snapshots/v=1.json was made by a newer casmount (version 2, this program knows 1): use \
             that version"
        );
        let layers: Vec<_> = (0..9).map(|number| layer(&format!("v{number}"))).collect();
        let many = format!("{}, {}", layer("fork"), layers.join(", "));
        for odd in [
            "",
            "[]",
            r#"{"version": 1}"#,
            &text(""),
            &text(&layer("main")),
            &text(&layer("../x")),
            &text(r#"{"volume": "fork", "catalog": "12"}"#),
            &text(&many),
            &text(&[layer("fork"), layer("fork")].join(",")),
        ] {
            let err = decode(odd).unwrap_err();
            assert!(matches!(err, SnapshotError::Damaged { .. }), "{odd}: {err}");
            assert!(
                err.to_string()
                    .starts_with("volumes/fork/snapshots/v=1.json is damaged ("),
                "{err}"
            );
        }
    }

    #[test]
    fn what_is_mounted_are_its_catalogs_alone() {
        let snapshot = decode(&text(&[layer("fork"), layer("main")].join(","))).unwrap();
        let stack = snapshot.stack(&"v=1".parse().unwrap());
        assert_eq!(stack.volume().as_str(), "fork");
        for layer in stack.layers() {
            let frozen = layer.frozen.as_ref().unwrap();
            assert_eq!(frozen.catalog, Digest::of(b"x"));
            assert_eq!((frozen.as_of_millis, layer.until_millis), (1, None));
        }
    }
}
