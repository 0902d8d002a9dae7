//! What snapshots refer to: catalogs, which stay whole, and what is named in them.
//!
//! The one place that whoever deletes asks, be it blobs, old catalogs or segments: [`of`] says which catalogs a
//! snapshot names, [`Named::objects`] which objects of a volume's catalogs these consist of, and [`part`] reads the
//! registers in them, which refer to blobs.
//!
//! No segment is needed for a snapshot's sake: all of it is in its catalogs.
//!
//! Making a snapshot keeps parts of what is the newest catalog then, takes less than half a window of sweeps, and is taken
//! back when one of them is gone at its end. So whoever deletes catalogs leaves those that were the newest less than a window
//! ago, and reads the snapshots after it chose what to delete.

use std::collections::HashSet;

use super::SnapshotError;
use crate::{
    base::{digest::Digest, snapshot::SnapshotTag, volume::VolumeName},
    namespace::{
        catalog::{
            CatalogError,
            format::{PartRef, Root},
            read,
        },
        change::Item,
        patience::patiently,
    },
    tier::{Bucket, TierError, layout},
};

/// A catalog that a snapshot names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// Whose it is: the volume of the snapshot, or one that it lies over.
    pub volume: VolumeName,
    pub catalog: Digest,
    pub root: Root,
}

impl Named {
    /// The objects that it consists of, in `volumes/<volume>/catalogs/`.
    #[must_use]
    pub fn objects(&self) -> Vec<Digest> {
        read::objects_of(self.catalog, &self.root)
    }
}

/// The catalogs that the snapshot `tag` of `volume` names; `None` when it was deleted.
///
/// # Errors
///
/// It is there and cannot be read: what it refers to is not known.
pub async fn of(
    bucket: &dyn Bucket,
    volume: &VolumeName,
    tag: &SnapshotTag,
) -> Result<Option<Vec<Named>>, SnapshotError> {
    let Some(snapshot) = super::read(bucket, volume, tag).await? else {
        return Ok(None);
    };
    let mut named = Vec::new();
    for layer in &snapshot.layers {
        let root = match root(bucket, &layer.volume, &layer.catalog).await {
            Ok(root) => root,
            // Whoever deleted the snapshot since may have taken that, too.
            Err(CatalogError::Missing { .. }) if super::read(bucket, volume, tag).await?.is_none() => {
                return Ok(None);
            }
            Err(err) => return Err(err.into()),
        };
        named.push(Named {
            volume: layer.volume.clone(),
            catalog: layer.catalog,
            root,
        });
    }
    Ok(Some(named))
}

/// Reads a root, and again while the bucket is in trouble.
async fn root(bucket: &dyn Bucket, volume: &VolumeName, digest: &Digest) -> Result<Root, CatalogError> {
    patiently(|| async {
        match read::root(bucket, volume.as_str(), digest).await {
            Err(CatalogError::Bucket(err)) => Err(err),
            read => Ok(read),
        }
    })
    .await?
}

/// Reads a part of a catalog, and again while the bucket is in trouble.
pub async fn part(
    bucket: &dyn Bucket,
    volume: &VolumeName,
    part: &PartRef,
) -> Result<Vec<Item>, SnapshotError> {
    let items = patiently(|| async {
        match read::part(bucket, volume.as_str(), part).await {
            Err(CatalogError::Bucket(err)) => Err(err),
            read => Ok(read),
        }
    });
    Ok(items.await??)
}

/// An object of a catalog that is not in the bucket. One request for a thousand objects of the volume's catalogs.
pub(super) async fn missing(
    bucket: &dyn Bucket,
    volume: &VolumeName,
    digest: Digest,
    root: &Root,
) -> Result<Option<Digest>, TierError> {
    let mut wanted: HashSet<Digest> = read::objects_of(digest, root).into_iter().collect();
    let prefix = layout::catalogs_prefix(volume.as_str());
    let mut after = prefix.clone();
    loop {
        let page = patiently(|| bucket.list(&prefix, Some(&after))).await?;
        for object in &page.objects {
            let name = object.key.strip_prefix(&prefix);
            if let Some(name) = name.and_then(|name| name.parse().ok()) {
                wanted.remove(&name);
            }
        }
        match page.objects.last() {
            Some(last) if page.more && last.key > after && !wanted.is_empty() => {
                last.key.clone_into(&mut after);
            }
            _ => return Ok(wanted.into_iter().next()),
        }
    }
}
