//! Which snapshots there are, and deleting one.
//!
//! Deleting removes the object alone. What it kept is in use no more, and goes by the next sweeps, a window later at
//! the earliest: until then a mount of it reads on.

use super::{Snapshot, SnapshotError};
use crate::{
    base::{snapshot::SnapshotTag, volume::VolumeName},
    namespace::{patience::patiently, volumes},
    tier::{Bucket, SharedBucket, TierError, layout},
};

/// A snapshot as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub volume: VolumeName,
    pub tag: SnapshotTag,
    /// `None` where it cannot be read, with why.
    pub snapshot: Result<Snapshot, String>,
}

/// Lists the snapshots of `volume`, or of all volumes, in the order of their names and tags.
///
/// One request for each snapshot and one for each volume; of all volumes, two.
pub async fn list(bucket: &SharedBucket, volume: Option<&VolumeName>) -> Result<Vec<Listed>, SnapshotError> {
    let names = match volume {
        Some(volume) => vec![volume.clone()],
        None => volumes::live_names(bucket.as_ref()).await?,
    };
    let mut all = Vec::new();
    for volume in names {
        for tag in tags(bucket.as_ref(), &volume).await? {
            let snapshot = match super::read(bucket.as_ref(), &volume, &tag).await {
                Ok(Some(snapshot)) => Ok(snapshot),
                // Deleted meanwhile.
                Ok(None) => continue,
                Err(SnapshotError::Bucket(err)) => return Err(err.into()),
                Err(err) => Err(err.to_string()),
            };
            all.push(Listed {
                volume: volume.clone(),
                tag,
                snapshot,
            });
        }
    }
    Ok(all)
}

/// The tags of all snapshots of `volume`, sorted.
pub async fn tags(bucket: &dyn Bucket, volume: &VolumeName) -> Result<Vec<SnapshotTag>, TierError> {
    let prefix = layout::snapshots_prefix(volume.as_str());
    let mut tags = Vec::new();
    let mut after = prefix.clone();
    loop {
        let page = patiently(|| bucket.list(&prefix, Some(&after))).await?;
        let keys = page.objects.iter().map(|object| object.key.as_str());
        tags.extend(keys.filter_map(|key| layout::snapshot_tag(volume.as_str(), key)?.parse().ok()));
        match page.objects.last() {
            Some(last) if page.more && last.key > after => last.key.clone_into(&mut after),
            _ => break,
        }
    }
    // Keys have ".json" behind the tag, and sort by that.
    tags.sort_unstable();
    Ok(tags)
}

/// Deletes the snapshot `tag` of `volume`, also one that cannot be read.
pub async fn delete(
    bucket: &dyn Bucket,
    volume: &VolumeName,
    tag: &SnapshotTag,
) -> Result<(), SnapshotError> {
    let key = layout::snapshot(volume.as_str(), tag.as_str());
    if patiently(|| bucket.head(&key)).await?.is_none() {
        return Err(SnapshotError::Absent {
            volume: volume.clone(),
            tag: tag.clone(),
        });
    }
    Ok(patiently(|| bucket.delete(&key)).await?)
}
