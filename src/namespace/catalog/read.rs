//! Reading catalogs: whole objects, verified by their names.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    CatalogError,
    format::{self, PartRef, Root},
    head,
};
use crate::{
    base::{
        digest::Digest,
        volume::{Base, StackLayer},
    },
    namespace::{background::blocking, change::Item, trim},
    tier::{Bucket, TierError, layout},
};

/// How often an object that comes damaged is read before it counts as damaged in the bucket.
const READS: u32 = 4;

/// A catalog that can be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    pub digest: Digest,
    pub root: Arc<Root>,
    /// Of the log up to this time of its keys something may be gone; 0: nothing is.
    pub floor_millis: u64,
}

/// The catalog that a view of a layer begins with; `None`: it begins with the log.
///
/// Three requests at most, for a layer that an earlier version left without a base one more for each catalog that
/// is tried.
pub async fn of_layer(bucket: &dyn Bucket, layer: &StackLayer) -> Result<Option<Opened>, CatalogError> {
    let volume = layer.volume.as_str();
    match layer.base {
        Some(Base { catalog: None, .. }) => Ok(None),
        Some(Base {
            catalog: Some(digest),
            ..
        }) => {
            let root = Arc::new(root(bucket, volume, &digest).await?);
            Ok(Some(Opened {
                digest,
                root,
                floor_millis: 0,
            }))
        }
        None => {
            let Some(opened) = newest(bucket, volume, layer.until_millis).await? else {
                return Ok(None);
            };
            // Sweeps keep the log of a view up to a moment.
            let floor_millis = match layer.until_millis {
                None => trim::floor_millis(bucket, volume).await?,
                Some(_) => 0,
            };
            Ok(Some(Opened {
                floor_millis,
                ..opened
            }))
        }
    }
}

/// The newest catalog of `volume`, or the newest that has nothing later than `until_millis`.
///
/// Two requests, and one more for each older one that is tried. `None`: there is none that will do,
/// and the log has all that is to be known.
pub async fn newest(
    bucket: &dyn Bucket,
    volume: &str,
    until_millis: Option<u64>,
) -> Result<Option<Opened>, CatalogError> {
    let Some((head, _)) = head::read(bucket, volume).await? else {
        return Ok(None);
    };
    let opened = |digest, root| {
        Some(Opened {
            digest,
            root: Arc::new(root),
            floor_millis: 0,
        })
    };
    let fits = |watermark: u64| until_millis.is_none_or(|until| watermark <= until);
    let root = root(bucket, volume, &head.catalog).await?;
    if fits(root.watermark_millis) {
        return Ok(opened(head.catalog, root));
    }
    for earlier in root
        .earlier
        .iter()
        .filter(|earlier| fits(earlier.watermark_millis))
    {
        match self::root(bucket, volume, &earlier.digest).await {
            Ok(root) => return Ok(opened(earlier.digest, root)),
            // Removed since; an older one may still be there.
            Err(CatalogError::Missing { .. }) => {}
            Err(err) => return Err(err),
        }
    }
    Ok(None)
}

/// Reads a root. One request.
pub async fn root(bucket: &dyn Bucket, volume: &str, digest: &Digest) -> Result<Root, CatalogError> {
    let bytes = root_object(bucket, volume, digest).await?;
    root_of(volume, digest, bytes).await
}

/// The bytes of a root. One request.
pub(super) async fn root_object(
    bucket: &dyn Bucket,
    volume: &str,
    digest: &Digest,
) -> Result<Bytes, CatalogError> {
    let key = layout::catalog(volume, digest);
    object(bucket, &key, digest, format::MAX_ROOT_BYTES).await
}

/// What the bytes of a root say. No request.
pub(super) async fn root_of(volume: &str, digest: &Digest, bytes: Bytes) -> Result<Root, CatalogError> {
    let key = layout::catalog(volume, digest);
    blocking(move || Root::decode(&bytes).map_err(|err| CatalogError::format(key, &err))).await
}

/// Reads the items of a part, in their order. One request; some milliseconds of computing.
pub async fn part(bucket: &dyn Bucket, volume: &str, part: &PartRef) -> Result<Vec<Item>, CatalogError> {
    let bytes = part_object(bucket, volume, &part.digest).await?;
    items_of(volume, part, bytes).await
}

/// The bytes of a part. One request.
pub(super) async fn part_object(
    bucket: &dyn Bucket,
    volume: &str,
    digest: &Digest,
) -> Result<Bytes, CatalogError> {
    let key = layout::catalog(volume, digest);
    object(bucket, &key, digest, format::MAX_PART_BYTES).await
}

/// The items in the bytes of a part. No request; some milliseconds of computing.
pub(super) async fn items_of(volume: &str, part: &PartRef, bytes: Bytes) -> Result<Vec<Item>, CatalogError> {
    let key = layout::catalog(volume, &part.digest);
    let count = part.items;
    blocking(move || {
        let items = format::decode_part(&bytes).map_err(|err| CatalogError::format(key.clone(), &err))?;
        if items.len() as u64 != count {
            let why = "it has another number of items than its root says".to_owned();
            return Err(CatalogError::Damaged { key, why });
        }
        Ok(items)
    })
    .await
}

/// Reads an object whose bytes are those of its name. They may be damaged on the way, so what is
/// wrong is read again at once.
async fn object(
    bucket: &dyn Bucket,
    key: &str,
    digest: &Digest,
    max_bytes: u64,
) -> Result<Bytes, CatalogError> {
    for _ in 0..READS {
        match bucket.get(key, None, max_bytes).await {
            Ok(Some(object)) => {
                let (bytes, digest) = (object.bytes, *digest);
                let hashed = bytes.clone();
                if blocking(move || Digest::of(&hashed) == digest).await {
                    return Ok(bytes);
                }
            }
            Ok(None) => return Err(CatalogError::Missing { key: key.to_owned() }),
            // Too large: as damaged as can be.
            Err(TierError::Malformed { .. }) => {}
            Err(err) => return Err(err.into()),
        }
    }
    Err(CatalogError::Damaged {
        key: key.to_owned(),
        why: "its bytes are not those of its name".to_owned(),
    })
}

/// All registers of a catalog, part by part: for whoever wants to see everything that a volume
/// names. One request for each part, memory of one part.
#[derive(Debug)]
pub struct Items<'a> {
    bucket: &'a dyn Bucket,
    volume: &'a str,
    root: &'a Root,
    next: usize,
}

impl<'a> Items<'a> {
    #[must_use]
    pub fn of(bucket: &'a dyn Bucket, volume: &'a str, root: &'a Root) -> Self {
        Self {
            bucket,
            volume,
            root,
            next: 0,
        }
    }

    /// The items of the next part, in their order; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<Item>>, CatalogError> {
        let Some(part) = self.root.parts.get(self.next) else {
            return Ok(None);
        };
        let items = self::part(self.bucket, self.volume, part).await?;
        self.next += 1;
        Ok(Some(items))
    }
}

/// The objects of a catalog, by their names: its root, its parts, and the older catalogs that it
/// remembers. Who deletes from a bucket keeps the first two of every catalog that somebody may open.
#[must_use]
pub fn objects_of(digest: Digest, root: &Root) -> Vec<Digest> {
    let parts = root.parts.iter().chain(&root.linked);
    std::iter::once(digest)
        .chain(parts.map(|part| part.digest))
        .collect()
}
