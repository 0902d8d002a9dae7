//! The presets in the settings of a volume: `presets` in `volumes/<name>/volume.json`.
//!
//! ```text
//! presets   optional: an object, directory (from the root of the volume) to the name of a preset
//! ```
//!
//! A fork has those of the volumes below it, as far as it says nothing of the directory itself.
//! A mount reads them when it starts. A name that this program does not know was made by a newer
//! one: it is left out, and the directory is one like any other.

use std::collections::BTreeMap;

use super::at::PresetAt;
use crate::{
    base::volume::{Stack, VolumeName},
    namespace::stack::{StackError, change_presets, read_json},
    tier::Bucket,
};

/// A directory and the name of its preset, as they are kept.
pub type Kept = BTreeMap<String, String>;

/// Reads the presets of a stack. One request for each layer.
pub async fn read(bucket: &dyn Bucket, stack: &Stack) -> Result<Kept, StackError> {
    let mut all = Kept::new();
    for layer in stack.layers() {
        let json = read_json(bucket, &layer.volume).await?.map(|(json, _)| json);
        for (dir, name) in json.map(|json| json.presets).unwrap_or_default() {
            all.entry(dir).or_insert(name);
        }
    }
    Ok(all)
}

/// Those that this program knows; tells of the others in the log.
#[must_use]
pub fn known(kept: &Kept) -> Vec<PresetAt> {
    let read = |(dir, name): (&String, &String)| {
        let at = name.parse().and_then(|preset| PresetAt::new(dir, preset));
        if let Err(why) = &at {
            tracing::warn!(dir, why, "a preset in the settings of the volume is left out");
        }
        at.ok()
    };
    kept.iter().filter_map(read).collect()
}

/// What to change in the settings of a volume.
#[derive(Clone, Debug, Default)]
pub struct PresetChange {
    pub set: Vec<PresetAt>,
    /// Directories whose preset goes.
    pub remove: Vec<String>,
}

/// Changes the presets of `volume` itself; returns all that it has then.
///
/// The bucket must have answered before: the time of a new object is taken from its clock.
pub async fn change(
    bucket: &dyn Bucket,
    volume: &VolumeName,
    change: &PresetChange,
) -> Result<Kept, StackError> {
    change_presets(bucket, volume, |kept| {
        for at in &change.set {
            kept.insert(at.dir().to_owned(), at.preset.name().to_owned());
        }
        kept.retain(|dir, _| !change.remove.contains(dir));
    })
    .await
}
