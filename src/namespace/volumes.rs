//! The volumes of a store: which there are, and deleting one.
//!
//! # Deleting
//!
//! 1. A volume that another one lies over is not deleted: that one would lose what it shows. Nor is one with
//!    snapshots, which are for ever, until each of them is deleted ([`super::snapshot`]).
//! 2. `volume.json` is replaced by one that says `deleted_millis`, on the condition that it is still the one
//!    that was read. From here on nobody mounts, forks or promotes the volume; so what a crash leaves is
//!    never mistaken for an empty volume, nor for one that lies over nothing.
//! 3. Forks and snapshots are looked for once more: who makes one looks at the volume after it wrote the fork's or
//!    the snapshot's object, so one of both sees the other. If there is one, the old `volume.json` is put back.
//! 4. Everything else of the volume is removed. A repeat finishes what a crash left.
//!
//! `volume.json` stays, a few hundred bytes: a machine that was suspended meanwhile may still write
//! a segment, and without it the log would look like a volume of its own. Blobs stay as well: other
//! volumes may name them, and finding out is the sweep's.

use std::sync::Arc;

use tokio::task::JoinSet;

use super::{
    patience::patiently,
    snapshot,
    stack::{StackError, Standing, VolumeJson, read_json, standing},
};
use crate::{
    base::{
        snapshot::SnapshotTag,
        volume::{StackLayer, VolumeName},
    },
    tier::{Body, Bucket, Put, SharedBucket, TierError, layout},
};

/// Objects that are removed at once.
const PARALLEL: usize = 16;

/// How often `volume.json` may change between reading and replacing it.
const TRIES: u32 = 4;

/// A volume as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub volume: VolumeName,
    pub parent: Option<StackLayer>,
    pub own_prefix: bool,
    /// `None`: it has no settings, because it is no fork.
    pub created_millis: Option<u64>,
    pub deleted_millis: Option<u64>,
    /// Why its settings cannot be read.
    pub trouble: Option<String>,
}

/// A volume was not deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    #[error(transparent)]
    Stack(#[from] StackError),
    #[error("there is no volume {volume} in this store: correct the name")]
    Absent { volume: VolumeName },
    #[error("volume {volume} is no fork, and only forks can be deleted")]
    NoFork { volume: VolumeName },
    #[error("{} over volume {volume}: delete {} first", lie(forks), if forks.len() == 1 { "it" } else { "them" })]
    Covered {
        volume: VolumeName,
        forks: Vec<VolumeName>,
    },
    #[error(
        "volume {volume} has {} {}: delete {} first, with casmount snapshot delete",
        if tags.len() == 1 { "snapshot" } else { "snapshots" },
        named(tags),
        if tags.len() == 1 { "it" } else { "them" }
    )]
    Snapshots {
        volume: VolumeName,
        tags: Vec<SnapshotTag>,
    },
    #[error("the settings of volume {volume} change all the time: try again")]
    Contended { volume: VolumeName },
}

impl From<TierError> for DeleteError {
    fn from(err: TierError) -> Self {
        Self::Stack(err.into())
    }
}

fn lie(forks: &[VolumeName]) -> String {
    let names: Vec<&str> = forks.iter().map(VolumeName::as_str).collect();
    match names[..] {
        [one] => format!("volume {one} lies"),
        _ => format!("volumes {} lie", names.join(", ")),
    }
}

/// A few names help, a thousand do not.
fn named(tags: &[SnapshotTag]) -> String {
    const SHOWN: usize = 5;
    let some: Vec<&str> = tags.iter().take(SHOWN).map(SnapshotTag::as_str).collect();
    match tags.len().saturating_sub(SHOWN) {
        0 => some.join(", "),
        more => format!("{} and {more} more", some.join(", ")),
    }
}

/// What became of a volume that was deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// An earlier deletion had begun, or ended, already.
    pub again: bool,
    /// Objects that were removed now.
    pub objects: u64,
}

/// Lists all volumes of a store in the order of their names, also those that were deleted.
///
/// Two requests for each, at most.
pub async fn list(bucket: &SharedBucket) -> Result<Vec<Listed>, TierError> {
    let mut volumes = Vec::new();
    for volume in names(bucket.as_ref()).await? {
        volumes.push(look(bucket.as_ref(), volume).await?);
    }
    Ok(volumes)
}

/// The names below which there is anything.
pub(super) async fn names(bucket: &dyn Bucket) -> Result<Vec<VolumeName>, TierError> {
    let mut names = Vec::new();
    let mut after = layout::VOLUMES_PREFIX.to_owned();
    loop {
        let page = patiently(|| bucket.list(layout::VOLUMES_PREFIX, Some(&after))).await?;
        let Some(first) = page.objects.first() else {
            return Ok(names);
        };
        let rest = first.key.strip_prefix(layout::VOLUMES_PREFIX).unwrap_or_default();
        let Some((folder, _)) = rest.split_once('/') else {
            // An object that is none of ours.
            first.key.clone_into(&mut after);
            continue;
        };
        names.extend(folder.parse::<VolumeName>().ok());
        // Sorts behind everything of that volume, and before everything of the next.
        after = format!("{}{folder}0", layout::VOLUMES_PREFIX);
    }
}

async fn look(bucket: &dyn Bucket, volume: VolumeName) -> Result<Listed, TierError> {
    let read = read_json(bucket, &volume).await;
    let listed = Listed {
        volume,
        parent: None,
        own_prefix: false,
        created_millis: None,
        deleted_millis: None,
        trouble: None,
    };
    Ok(match read {
        Ok(Some((json, _))) => Listed {
            parent: json.parent,
            own_prefix: json.own_prefix,
            created_millis: Some(json.created_millis),
            deleted_millis: json.deleted_millis,
            ..listed
        },
        Ok(None) => listed,
        Err(StackError::Bucket(err)) => return Err(err),
        Err(err) => Listed {
            trouble: Some(err.to_string()),
            ..listed
        },
    })
}

/// The volumes that lie directly over `volume`.
async fn forks_of(bucket: &SharedBucket, volume: &VolumeName) -> Result<Vec<VolumeName>, TierError> {
    let over = |listed: &Listed| {
        let parent = listed.parent.as_ref().map(|parent| &parent.volume);
        parent == Some(volume) && listed.deleted_millis.is_none()
    };
    let all = list(bucket).await?.into_iter();
    Ok(all.filter(over).map(|listed| listed.volume).collect())
}

/// Deletes the fork `volume`; `on_removed` hears how many objects went so far.
pub async fn delete(
    bucket: &SharedBucket,
    volume: &VolumeName,
    on_removed: impl FnMut(u64),
) -> Result<Deleted, DeleteError> {
    let again = match standing(bucket.as_ref(), volume).await? {
        Standing::Absent => {
            return Err(DeleteError::Absent {
                volume: volume.clone(),
            });
        }
        Standing::Plain => {
            return Err(DeleteError::NoFork {
                volume: volume.clone(),
            });
        }
        Standing::Deleted => {
            // A deletion that was killed between its second and its third step left a fork that nobody can read.
            // What it lies over is kept, for whoever mends that by hand.
            refuse_if_needed(bucket, volume).await?;
            true
        }
        Standing::Fork(..) => {
            refuse_if_needed(bucket, volume).await?;
            mark(bucket, volume).await?;
            false
        }
    };
    let objects = remove_rest(bucket, volume, on_removed).await?;
    Ok(Deleted { again, objects })
}

/// Refuses what would take something from another volume or from a snapshot.
async fn refuse_if_needed(bucket: &SharedBucket, volume: &VolumeName) -> Result<(), DeleteError> {
    let volume = volume.clone();
    let forks = forks_of(bucket, &volume).await?;
    if !forks.is_empty() {
        return Err(DeleteError::Covered { volume, forks });
    }
    let tags = snapshot::tags(bucket.as_ref(), &volume).await?;
    if !tags.is_empty() {
        return Err(DeleteError::Snapshots { volume, tags });
    }
    Ok(())
}

/// Says that a volume is deleted; takes that back if another one lies over it by now, or it has a snapshot.
async fn mark(bucket: &SharedBucket, volume: &VolumeName) -> Result<(), DeleteError> {
    let key = layout::volume(volume.as_str());
    for _ in 0..TRIES {
        let Some((json, etag)) = read_json(bucket.as_ref(), volume).await? else {
            return Err(DeleteError::Absent {
                volume: volume.clone(),
            });
        };
        if json.deleted_millis.is_some() {
            // Another one is at it, or the reply to our own request was lost.
            return Ok(());
        }
        let marked = VolumeJson {
            deleted_millis: Some(bucket.clock().now_millis()),
            ..json.clone()
        };
        let Put::Written(marked) = bucket.put_if(&key, Body::raw(marked.encode()), &etag).await? else {
            continue;
        };
        if let Err(refused) = refuse_if_needed(bucket, volume).await {
            bucket.put_if(&key, Body::raw(json.encode()), &marked).await?;
            return Err(refused);
        }
        return Ok(());
    }
    Err(DeleteError::Contended {
        volume: volume.clone(),
    })
}

/// Removes everything of a deleted volume but its settings.
async fn remove_rest(
    bucket: &SharedBucket,
    volume: &VolumeName,
    mut on_removed: impl FnMut(u64),
) -> Result<u64, TierError> {
    let prefix = layout::volume_prefix(volume.as_str());
    let settings = layout::volume(volume.as_str());
    let mut after = prefix.clone();
    let mut removed = 0;
    loop {
        let page = patiently(|| bucket.list(&prefix, Some(&after))).await?;
        let keys = page.objects.iter().map(|object| object.key.clone());
        let mut keys = keys.filter(|key| *key != settings);
        let mut under_way = JoinSet::new();
        loop {
            while under_way.len() < PARALLEL
                && let Some(key) = keys.next()
            {
                let bucket = Arc::clone(bucket);
                under_way.spawn(async move { patiently(|| bucket.delete(&key)).await });
            }
            match under_way.join_next().await {
                Some(Ok(done)) => done?,
                Some(Err(err)) if err.is_panic() => std::panic::resume_unwind(err.into_panic()),
                Some(Err(_shutdown)) => std::future::pending().await,
                None => break,
            }
            removed += 1;
            on_removed(removed);
        }
        match page.objects.last() {
            Some(last) if page.more && last.key > after => last.key.clone_into(&mut after),
            _ => return Ok(removed),
        }
    }
}
