//! Makes snapshots.
//!
//! # Beside sweeps and deletions
//!
//! What the catalogs name was in use when the command began, so a sweep keeps it for a window at least (rule 2 of
//! [`super::super::sweep`]), and after the object is there for its sake. A command that needs longer than half a
//! window takes its object back. Who deletes a volume looks for snapshots after it said so, and who makes one
//! looks at the volume after the object is there: one of both sees the other. So it is with a store that gets a
//! lifecycle rule.

use std::path::PathBuf;

use super::{Snapshot, SnapshotError, SnapshotLayer, VERSION, references};
use crate::{
    base::{
        id::MachineId,
        snapshot::SnapshotTag,
        volume::{Stack, VolumeName},
    },
    namespace::{
        catalog::{
            compact::Progress,
            freeze::{self, FreezeOptions, Made},
        },
        patience::patiently,
        preset,
        stack::{self, StackError, Standing},
    },
    tier::{
        Body, Bucket, Put, SharedBucket, layout, lifetime, probe,
        sweeping::{self, DEFAULT_WINDOW},
    },
};

/// Who makes a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotOptions {
    /// Writes the catalogs.
    pub machine: MachineId,
    /// For people.
    pub created_by: String,
    /// Where changes are put down when memory does not do.
    pub spill_dir: PathBuf,
}

/// How far it is.
#[derive(Clone, Debug)]
pub struct Step {
    /// The layer that is read.
    pub volume: VolumeName,
    pub progress: Progress,
}

/// A snapshot that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    pub snapshot: Snapshot,
    /// Parts of catalogs that were not in the bucket before.
    pub written_parts: u64,
    pub written_bytes: u64,
}

/// Makes the snapshot `tag` of `volume` as it is now.
///
/// The bucket must have answered before: the time is taken from its clock.
pub async fn create(
    bucket: &SharedBucket,
    volume: &VolumeName,
    tag: &SnapshotTag,
    options: &SnapshotOptions,
    on_step: &(dyn Fn(Step) + Send + Sync),
) -> Result<Created, SnapshotError> {
    let began = bucket.clock().now_millis();
    must_be_there(bucket.as_ref(), volume).await?;
    let key = layout::snapshot(volume.as_str(), tag.as_str());
    let exists = || SnapshotError::Exists {
        volume: volume.clone(),
        tag: tag.clone(),
    };
    // Before anything is read and written for nothing.
    if patiently(|| bucket.head(&key)).await?.is_some() {
        return Err(exists());
    }
    if !probe::honours_conditions(bucket.as_ref()).await? {
        return Err(SnapshotError::NoConditions { url: bucket.url() });
    }
    must_keep(bucket.as_ref()).await?;
    let stack = stack::read(bucket.as_ref(), volume).await?;
    let as_of_millis = stack::newest(bucket.as_ref(), &stack, began).await?;
    let presets = preset::volume::read(bucket.as_ref(), &stack).await?;
    let layers = freeze_layers(bucket, &stack, as_of_millis, options, on_step).await?;
    let snapshot = Snapshot {
        version: VERSION,
        as_of_millis,
        created_millis: bucket.clock().now_millis(),
        created_by: options.created_by.clone(),
        names: layers.iter().map(|made| made.root.names).sum(),
        layers: (stack.layers().iter().zip(&layers))
            .map(|(layer, made)| SnapshotLayer {
                volume: layer.volume.clone(),
                catalog: made.digest,
                own_prefix: layer.own_prefix,
            })
            .collect(),
        presets,
    };
    match bucket.put_new(&key, Body::raw(snapshot.encode())).await {
        Ok(Put::Written(_)) => {}
        // It may be there all the same, and must not stand unchecked.
        Err(err) => match super::read(bucket.as_ref(), volume, tag).await {
            Ok(Some(there)) if there == snapshot => {}
            _ => return Err(err.into()),
        },
        // A lost reply looks like a refusal.
        Ok(Put::Refused) => match super::read(bucket.as_ref(), volume, tag).await? {
            Some(there) if there == snapshot => {}
            _ => return Err(exists()),
        },
    }
    if let Err(err) = stands(bucket, &stack, &layers, began).await {
        patiently(|| bucket.delete(&key)).await?;
        return Err(err);
    }
    Ok(Created {
        snapshot,
        written_parts: layers.iter().map(|made| made.sent.parts).sum(),
        written_bytes: layers.iter().map(|made| made.sent.bytes).sum(),
    })
}

async fn must_be_there(bucket: &dyn Bucket, volume: &VolumeName) -> Result<(), SnapshotError> {
    let volume = volume.clone();
    match stack::standing(bucket, &volume).await? {
        Standing::Absent => Err(SnapshotError::NoVolume { volume }),
        Standing::Deleted => Err(StackError::Deleted { volume }.into()),
        Standing::Plain | Standing::Fork(..) => Ok(()),
    }
}

async fn must_keep(bucket: &dyn Bucket) -> Result<(), SnapshotError> {
    match patiently(|| lifetime::read(bucket)).await? {
        Some(_) => Err(SnapshotError::AgesOut),
        None => Ok(()),
    }
}

/// A catalog of each layer. The upper ones first: what is promoted meanwhile is in one of both at least.
async fn freeze_layers(
    bucket: &SharedBucket,
    stack: &Stack,
    as_of_millis: u64,
    options: &SnapshotOptions,
    on_step: &(dyn Fn(Step) + Send + Sync),
) -> Result<Vec<Made>, SnapshotError> {
    let mut made = Vec::new();
    let lowest = stack.layers().len() - 1;
    for (number, layer) in stack.layers().iter().enumerate() {
        let freezing = FreezeOptions {
            now_millis: as_of_millis,
            layer: layer.clone(),
            machine: options.machine,
            spill_dir: options.spill_dir.clone(),
            keeps_tombstones: number < lowest,
        };
        let tell = |progress| {
            on_step(Step {
                volume: layer.volume.clone(),
                progress,
            });
        };
        made.push(freeze::freeze(bucket, layer.volume.as_str(), &freezing, &tell).await?);
    }
    Ok(made)
}

/// Whether a snapshot that is in the bucket now names what stays there.
async fn stands(
    bucket: &SharedBucket,
    stack: &Stack,
    made: &[Made],
    began: u64,
) -> Result<(), SnapshotError> {
    must_be_there(bucket.as_ref(), stack.volume()).await?;
    must_keep(bucket.as_ref()).await?;
    for (layer, made) in stack.layers().iter().zip(made) {
        let gone = references::missing(bucket.as_ref(), &layer.volume, made.digest, &made.root).await?;
        if let Some(gone) = gone {
            return Err(SnapshotError::Vanished {
                key: layout::catalog(layer.volume.as_str(), &gone),
            });
        }
    }
    let window = patiently(|| sweeping::read_window(bucket.as_ref())).await?;
    let window_millis = window.map_or(DEFAULT_WINDOW.as_millis() as u64, |(window, _)| {
        window.window_millis
    });
    if bucket.clock().now_millis().saturating_sub(began) > window_millis / 2 {
        return Err(SnapshotError::Slow { window_millis });
    }
    Ok(())
}
