//! What `casmount status` knows: the JSON, field by field.
//!
//! All sizes are bytes, all counters start with the daemon, all moments are
//! milliseconds since 1970.
//!
//! ```text
//! mountpoint volume store store_id machine version pid   what this is
//! state                       "serving" or "stopping"
//! uptime_seconds memory_bytes
//! snapshot.tag .as_of_millis  what is mounted is this snapshot of the volume; null: the volume itself
//! read_only passthrough       passthrough: the kernel reads and writes cache files by itself
//! cache_dir log_file
//! cache.limit_bytes min_free_bytes disk_free_bytes
//!      .resident_bytes .resident_blobs        on this disk, verified
//!      .dirty_bytes .dirty_blobs              not in the bucket yet
//!      .evicted_bytes .evicted_blobs          dropped to keep the budget
//!      .quarantined_blobs                     their bytes differ from their name; never uploaded
//! files.open .open_for_writing .settling .sealed .passthrough_opens
//!      .hits .misses                          opens whose bytes were all here, or were not
//!      .lost                                  blobs that the bucket turned out not to have
//!      .misnamed                              not what their names promise (cas/<xx>/<sha256>); not shared, the
//!      .last_misnamed                         newest of them
//!      .withheld                              lookups of action-cache entries that name a missing blob
//! presets[].dir .preset .origin          directories with a preset; dir: "." for the root; origin: "mount",
//!                                        "volume" or "recognised"
//! upload.uploading_blobs .uploading_bytes .uploaded_blobs .uploaded_bytes .retries .last_error
//! publish.pending_changes .published_changes .segments .last_error
//! follow.segments .changes .caught_up_millis .last_error    of all layers together
//! layers[].volume                        what is mounted, from the top: the volume, then what it is a fork of
//!      .until_millis                     what was published later is not seen; null: all of it is
//!      .settled                          nothing can come any more, and nobody looks
//!      .segments .changes .caught_up_millis .last_error
//! catalogs[].volume                      layers that are loaded from a catalog as they are used, from the top
//!      .catalog .watermark_millis        which, and up to when it has everything
//!      .names .parts                     of the whole of it; null: nothing was loaded since the start
//!      .kept_parts                       how many of them are on this disk
//!      .fetched_parts .loaded_registers .last_error
//! compact.done .last_error               catalogs that this daemon made
//! uses.expire_seconds                    how long names of the lowest volume may be unused; null: nobody wants to know
//!     .lifetime_seconds                  how old blobs become by a lifecycle rule of the store; null: there is none
//!     .waiting                           names that were used here and are not told, or kept young, since
//!     .told_millis .told_until_millis    when names were last told, and until when that speaks of them; else null
//!     .kept_young_millis                 when the blobs of all that had been used were last looked at; else null
//!     .kept_young_blobs                  blobs that were looked at
//!     .last_error
//! tiers[].url .reachable .last_error .clock_offset_millis
//! last_error                  the newest trouble that needs the bucket or an operator, else null
//! ```

use serde::{Deserialize, Serialize};

use crate::{
    base::{snapshot::Frozen, volume::StackLayer},
    namespace::{
        catalog::{CatalogStatus, compactor::CompactorStatus},
        follow::{FollowStatus, LayerStatus},
        preset::{
            at,
            table::{Origin, Shown},
        },
        publish::PublishStatus,
        touch::tell::TellStatus,
    },
    store::ledger::Totals,
    upload::UploadStatus,
    vfs::VfsStatus,
};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub mountpoint: String,
    pub volume: String,
    #[serde(default)]
    pub snapshot: Option<Snapshot>,
    pub store: String,
    pub store_id: String,
    pub machine: String,
    pub version: String,
    pub pid: u32,
    pub state: State,
    pub uptime_seconds: u64,
    pub memory_bytes: u64,
    pub read_only: bool,
    pub passthrough: bool,
    pub cache_dir: String,
    pub log_file: Option<String>,
    pub cache: Cache,
    pub files: Files,
    pub upload: Upload,
    pub publish: Publish,
    pub follow: Follow,
    pub layers: Vec<Layer>,
    #[serde(default)]
    pub presets: Vec<PresetDir>,
    pub catalogs: Vec<Catalog>,
    #[serde(default)]
    pub compact: Compact,
    #[serde(default)]
    pub uses: Uses,
    pub tiers: Vec<Tier>,
    pub last_error: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub tag: String,
    pub as_of_millis: u64,
}

impl From<&Frozen> for Snapshot {
    fn from(frozen: &Frozen) -> Self {
        Self {
            tag: frozen.tag.to_string(),
            as_of_millis: frozen.as_of_millis,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    #[default]
    Serving,
    Stopping,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    pub limit_bytes: u64,
    pub min_free_bytes: u64,
    pub disk_free_bytes: u64,
    pub resident_bytes: u64,
    pub resident_blobs: u64,
    pub dirty_bytes: u64,
    pub dirty_blobs: u64,
    pub evicted_bytes: u64,
    pub evicted_blobs: u64,
    pub quarantined_blobs: u64,
}

impl Cache {
    pub fn new(totals: &Totals, limit_bytes: u64, min_free_bytes: u64, disk_free_bytes: u64) -> Self {
        Self {
            limit_bytes,
            min_free_bytes,
            disk_free_bytes,
            resident_bytes: totals.resident_bytes,
            resident_blobs: totals.resident_blobs,
            dirty_bytes: totals.dirty_bytes,
            dirty_blobs: totals.dirty_blobs,
            evicted_bytes: totals.evicted_bytes,
            evicted_blobs: totals.evicted_blobs,
            quarantined_blobs: totals.quarantined_blobs,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    pub open: u64,
    pub open_for_writing: u64,
    pub settling: u64,
    pub sealed: u64,
    pub passthrough_opens: u64,
    pub hits: u64,
    pub misses: u64,
    pub lost: u64,
    #[serde(default)]
    pub misnamed: u64,
    #[serde(default)]
    pub last_misnamed: Option<String>,
    #[serde(default)]
    pub withheld: u64,
}

impl From<VfsStatus> for Files {
    fn from(vfs: VfsStatus) -> Self {
        Self {
            open: vfs.open_files,
            open_for_writing: vfs.open_for_writing,
            settling: vfs.settling,
            sealed: vfs.sealed,
            passthrough_opens: vfs.passthrough_opens,
            hits: vfs.hits,
            misses: vfs.misses,
            lost: vfs.lost,
            misnamed: vfs.misnamed,
            last_misnamed: None,
            withheld: vfs.withheld,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    pub uploading_blobs: u64,
    pub uploading_bytes: u64,
    pub uploaded_blobs: u64,
    pub uploaded_bytes: u64,
    pub retries: u64,
    pub last_error: Option<String>,
}

impl From<UploadStatus> for Upload {
    fn from(upload: UploadStatus) -> Self {
        Self {
            uploading_blobs: upload.uploading_blobs,
            uploading_bytes: upload.uploading_bytes,
            uploaded_blobs: upload.uploaded_blobs,
            uploaded_bytes: upload.uploaded_bytes,
            retries: upload.retries,
            last_error: upload.last_error,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    pub pending_changes: u64,
    pub published_changes: u64,
    pub segments: u64,
    pub last_error: Option<String>,
}

impl From<PublishStatus> for Publish {
    fn from(publish: PublishStatus) -> Self {
        Self {
            pending_changes: publish.pending_changes,
            published_changes: publish.published_changes,
            segments: publish.segments,
            last_error: publish.last_error,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Follow {
    pub segments: u64,
    pub changes: u64,
    pub caught_up_millis: u64,
    pub last_error: Option<String>,
}

impl From<FollowStatus> for Follow {
    fn from(follow: FollowStatus) -> Self {
        Self {
            segments: follow.segments,
            changes: follow.changes,
            caught_up_millis: follow.caught_up_millis,
            last_error: follow.last_error,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    pub volume: String,
    pub until_millis: Option<u64>,
    pub settled: bool,
    pub segments: u64,
    pub changes: u64,
    pub caught_up_millis: u64,
    pub last_error: Option<String>,
}

impl From<LayerStatus> for Layer {
    fn from(layer: LayerStatus) -> Self {
        Self {
            volume: layer.layer.volume.to_string(),
            until_millis: until_millis(&layer.layer),
            settled: layer.follow.settled,
            segments: layer.follow.segments,
            changes: layer.follow.changes,
            caught_up_millis: layer.follow.caught_up_millis,
            last_error: layer.follow.last_error,
        }
    }
}

/// A layer of a snapshot is seen up to a moment, too.
fn until_millis(layer: &StackLayer) -> Option<u64> {
    let frozen = layer.frozen.as_ref().map(|frozen| frozen.as_of_millis);
    layer.until_millis.or(frozen)
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uses {
    pub expire_seconds: Option<u64>,
    pub lifetime_seconds: Option<u64>,
    pub waiting: u64,
    pub told_millis: Option<u64>,
    pub told_until_millis: Option<u64>,
    pub kept_young_millis: Option<u64>,
    pub kept_young_blobs: u64,
    pub last_error: Option<String>,
}

impl From<TellStatus> for Uses {
    fn from(told: TellStatus) -> Self {
        Self {
            expire_seconds: told.expire.map(|expire| expire.as_secs()),
            lifetime_seconds: told.lifetime.map(|lifetime| lifetime.as_secs()),
            waiting: told.waiting,
            told_millis: told.told_millis,
            told_until_millis: told.told_until_millis,
            kept_young_millis: told.kept_young_millis,
            kept_young_blobs: told.kept_young_blobs,
            last_error: told.last_error,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PresetDir {
    pub dir: String,
    pub preset: String,
    pub origin: String,
}

impl From<Shown> for PresetDir {
    fn from(shown: Shown) -> Self {
        let origin = match shown.origin {
            Origin::Mount => "mount",
            Origin::Volume => "volume",
            Origin::Recognised => "recognised",
        };
        Self {
            dir: at::shown(&String::from_utf8_lossy(&shown.dir)).to_owned(),
            preset: shown.preset.to_string(),
            origin: origin.to_owned(),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Catalog {
    pub volume: String,
    pub catalog: String,
    pub watermark_millis: u64,
    pub names: Option<u64>,
    pub parts: Option<u64>,
    pub kept_parts: u64,
    pub fetched_parts: u64,
    pub loaded_registers: u64,
    pub last_error: Option<String>,
}

impl From<CatalogStatus> for Catalog {
    fn from(catalog: CatalogStatus) -> Self {
        Self {
            volume: catalog.volume,
            catalog: catalog.catalog,
            watermark_millis: catalog.watermark_millis,
            names: catalog.names,
            parts: catalog.parts,
            kept_parts: catalog.kept_parts,
            fetched_parts: catalog.fetched_parts,
            loaded_registers: catalog.loaded_registers,
            last_error: catalog.last_error,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compact {
    pub done: u64,
    pub last_error: Option<String>,
}

impl Compact {
    /// Of two volumes.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            done: self.done + other.done,
            last_error: self.last_error.or(other.last_error),
        }
    }
}

impl From<CompactorStatus> for Compact {
    fn from(compactor: CompactorStatus) -> Self {
        Self {
            done: compactor.done,
            last_error: compactor.last_error,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tier {
    pub url: String,
    /// Whether the newest request that told was answered.
    pub reachable: bool,
    pub last_error: Option<String>,
    /// What the bucket's clock shows more than this machine's.
    pub clock_offset_millis: i64,
}

impl Tier {
    /// Judges the bucket by those who use it: the follower asks it every few
    /// seconds, so a failure of the others alone is not an outage.
    pub fn new(
        url: String,
        clock_offset_millis: i64,
        follow: &Follow,
        upload: &Upload,
        publish: &Publish,
    ) -> Self {
        let errors = [&follow.last_error, &upload.last_error, &publish.last_error];
        Self {
            url,
            reachable: follow.last_error.is_none(),
            last_error: errors.into_iter().flatten().next().cloned(),
            clock_offset_millis,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names that monitoring reads, sorted. Add, never rename.
    const NAMES: &str = "cache cache.dirty_blobs cache.dirty_bytes cache.disk_free_bytes cache.evicted_blobs \
        cache.evicted_bytes cache.limit_bytes cache.min_free_bytes cache.quarantined_blobs cache.resident_blobs \
        cache.resident_bytes cache_dir catalogs catalogs.catalog catalogs.fetched_parts catalogs.kept_parts catalogs.last_error \
        catalogs.loaded_registers catalogs.names catalogs.parts catalogs.volume catalogs.watermark_millis compact \
        compact.done compact.last_error files files.hits files.last_misnamed files.lost files.misnamed files.misses files.open \
        files.open_for_writing files.passthrough_opens files.sealed files.settling files.withheld follow \
        follow.caught_up_millis follow.changes follow.last_error follow.segments last_error layers \
        layers.caught_up_millis layers.changes layers.last_error layers.segments layers.settled \
        layers.until_millis layers.volume log_file machine \
        memory_bytes mountpoint passthrough pid presets presets.dir presets.origin presets.preset publish publish.last_error publish.pending_changes \
        publish.published_changes publish.segments read_only snapshot snapshot.as_of_millis snapshot.tag state store store_id tiers \
        tiers.clock_offset_millis tiers.last_error tiers.reachable tiers.url upload upload.last_error \
        upload.retries upload.uploaded_blobs upload.uploaded_bytes upload.uploading_blobs \
        upload.uploading_bytes uptime_seconds uses uses.expire_seconds uses.kept_young_blobs uses.kept_young_millis \
        uses.last_error uses.lifetime_seconds uses.told_millis uses.told_until_millis uses.waiting version volume";

    fn collect(prefix: &str, value: &serde_json::Value, names: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(fields) => {
                for (name, value) in fields {
                    let name = if prefix.is_empty() {
                        name.clone()
                    } else {
                        format!("{prefix}.{name}")
                    };
                    collect(&name, value, names);
                    names.push(name);
                }
            }
            serde_json::Value::Array(items) => items.iter().for_each(|item| collect(prefix, item, names)),
            _ => {}
        }
    }

    #[test]
    fn names_in_the_json_are_the_documented_ones() {
        let status = Status {
            snapshot: Some(Snapshot::default()),
            tiers: vec![Tier::default()],
            layers: vec![Layer::default()],
            presets: vec![PresetDir::default()],
            catalogs: vec![Catalog::default()],
            ..Status::default()
        };
        let mut names = Vec::new();
        collect("", &serde_json::to_value(&status).unwrap(), &mut names);
        names.sort();
        assert_eq!(names, NAMES.split_whitespace().collect::<Vec<_>>());
    }

    #[test]
    fn a_failed_upload_alone_is_not_an_outage() {
        let failed = Upload {
            last_error: Some("denied".into()),
            ..Upload::default()
        };
        let tier = Tier::new(
            "s3://b".into(),
            0,
            &Follow::default(),
            &failed,
            &Publish::default(),
        );
        assert!(tier.reachable);
        assert_eq!(tier.last_error.as_deref(), Some("denied"));
    }
}
