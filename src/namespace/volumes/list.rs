//! Lists the volumes of a store.
//!
//! Those that are known to be deleted for good ([`crate::namespace::deleted`]) are not asked for, unless all are wanted.

use std::sync::Arc;

use crate::{
    base::volume::{StackLayer, VolumeName},
    namespace::{
        deleted::DeletedVolumes,
        patience::patiently,
        stack::{StackError, read_json},
        together::together,
    },
    tier::{Bucket, ObjectMeta, SharedBucket, TierError, layout},
};

/// A volume as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub volume: VolumeName,
    pub parent: Option<StackLayer>,
    pub own_prefix: bool,
    /// `None`: it has no settings, because it is no fork.
    pub created_millis: Option<u64>,
    pub deleted_millis: Option<u64>,
    /// The deletion may still be taken back.
    pub deletion_undecided: bool,
    /// Why its settings cannot be read.
    pub trouble: Option<String>,
}

impl Listed {
    /// Whether it shows its names, or will again: nothing is taken from it while its deletion is not decided.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.deleted_millis.is_none() || self.deletion_undecided
    }
}

/// Lists all volumes of a store in the order of their keys, also those that were deleted.
///
/// One GET for each, some at once, and one LIST for each that has many objects or a thousand objects of others.
pub async fn list(bucket: &SharedBucket) -> Result<Vec<Listed>, TierError> {
    let found = found(bucket.as_ref()).await?;
    look_at(bucket, found.into_iter().map(|found| found.volume)).await
}

/// Lists those that live, and some that were deleted lately.
///
/// One GET for each, some at once; one for those that were deleted before; and listings as in [`list`].
pub async fn list_live(bucket: &SharedBucket) -> Result<Vec<Listed>, TierError> {
    let deleted = DeletedVolumes::read(bucket.as_ref()).await?;
    let mut found = found(bucket.as_ref()).await?;
    found.retain(|found| !found.is_in(&deleted));
    look_at(bucket, found.into_iter().map(|found| found.volume)).await
}

/// The names below which there is anything, but for those of volumes that are known to be deleted.
pub async fn live_names(bucket: &dyn Bucket) -> Result<Vec<VolumeName>, TierError> {
    let deleted = DeletedVolumes::read(bucket).await?;
    let found = found(bucket).await?.into_iter();
    let live = found.filter(|found| !found.is_in(&deleted));
    Ok(live.map(|found| found.volume).collect())
}

pub(super) async fn look_at(
    bucket: &SharedBucket,
    volumes: impl IntoIterator<Item = VolumeName, IntoIter: Send> + Send,
) -> Result<Vec<Listed>, TierError> {
    let looks = volumes.into_iter().map(|volume| {
        let bucket = Arc::clone(bucket);
        async move { look(bucket.as_ref(), volume).await }
    });
    together(looks.collect::<Vec<_>>()).await.into_iter().collect()
}

/// A name below which there is something.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub volume: VolumeName,
    /// How its settings were listed, if they were.
    pub settings: Option<ObjectMeta>,
}

impl Found {
    pub fn is_in(&self, deleted: &DeletedVolumes) -> bool {
        let listed = self.settings.as_ref();
        let listed = listed.map(|listed| (listed.modified_millis, listed.size));
        deleted.get(&self.volume, listed).is_some()
    }
}

/// The names below which there is anything. The settings of those that have much else may not be listed.
pub(super) async fn found(bucket: &dyn Bucket) -> Result<Vec<Found>, TierError> {
    let mut all: Vec<Found> = Vec::new();
    let mut after = layout::VOLUMES_PREFIX.to_owned();
    loop {
        let page = patiently(|| bucket.list(layout::VOLUMES_PREFIX, Some(&after))).await?;
        // What is in no folder is none of ours.
        let folder = |object: &ObjectMeta| layout::volume_of(&object.key).map(str::to_owned);
        for object in &page.objects {
            let Some(volume) = layout::volume_of(&object.key).and_then(|name| name.parse().ok()) else {
                continue;
            };
            if all.last().is_none_or(|last| last.volume != volume) {
                let settings = None;
                all.push(Found { volume, settings });
            }
            if let Some(last) = all.last_mut()
                && object.key == layout::volume(last.volume.as_str())
            {
                last.settings = Some(object.clone());
            }
        }
        let Some(last) = page.objects.last().filter(|_| page.more) else {
            return Ok(all);
        };
        after = match folder(last) {
            // Sorts behind everything of that volume, and before everything of the next.
            Some(folder) => format!("{}{folder}0", layout::VOLUMES_PREFIX),
            None => last.key.clone(),
        };
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
        deletion_undecided: false,
        trouble: None,
    };
    Ok(match read {
        Ok(Some((json, _))) => Listed {
            parent: json.parent,
            own_prefix: json.own_prefix,
            created_millis: Some(json.created_millis),
            deleted_millis: json.deleted_millis,
            deletion_undecided: json.deletion_undecided,
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
