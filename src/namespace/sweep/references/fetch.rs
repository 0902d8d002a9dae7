//! Fetches what refers to objects: segments, parts of catalogs, chunk lists.

use super::{Decoded, SweepError};
use crate::{
    base::{digest::Digest, volume::VolumeName},
    namespace::{
        catalog::{format::PartRef, read},
        change::Item,
        follow::SegmentKey,
        segment,
        sweep::asking::Asking,
        together::together,
    },
    store::{
        manifest::{self, ManifestError, Placed},
        pack::PackPlace,
    },
    tier::{TierError, layout, sweeping::mark},
};

/// How often bytes that come damaged are fetched before they count as damaged in the bucket.
const FETCHES: u32 = 4;

/// Fetches segments, at once; the answers are in their order.
pub(super) async fn segments(
    asking: &Asking,
    name: &VolumeName,
    segments: &[SegmentKey],
) -> Vec<Result<Decoded, SweepError>> {
    let asks = segments.iter().map(|segment| {
        let (asking, segment, key) = (asking.clone(), *segment, segment.to_key(name.as_str()));
        async move { segment_of(&asking, segment, key).await }
    });
    together(asks.collect::<Vec<_>>()).await
}

/// Fetches a segment; damaged bytes are fetched again, they may be damaged on the way.
async fn segment_of(asking: &Asking, segment: SegmentKey, key: String) -> Result<Decoded, SweepError> {
    let mut why = String::new();
    for _ in 0..FETCHES {
        let found = asking
            .again(|bucket| bucket.get(&key, None, segment::MAX_SEGMENT_BYTES))
            .await;
        let bytes = match found {
            Ok(Some(object)) => object.bytes,
            Ok(None) => return Err(SweepError::Vanished { key }),
            Err(err @ TierError::Malformed { .. }) => {
                why = err.to_string();
                continue;
            }
            Err(err) => return Err(err.into()),
        };
        match segment::decode(&bytes) {
            Ok(decoded) => match decoded.skipped.first() {
                Some(skipped) => {
                    let path = String::from_utf8_lossy(&skipped.path);
                    why = format!("its change of {path}: {}", skipped.why);
                    break;
                }
                None if decoded.head.machine == segment.machine && decoded.head.seq == segment.seq => {
                    return Ok(decoded);
                }
                None => "it is another segment than its key says".clone_into(&mut why),
            },
            Err(err) => why = err.to_string(),
        }
    }
    Err(SweepError::Segment { key, why })
}

/// Reads parts of a catalog, in their order.
pub(super) async fn parts(
    asking: &Asking,
    name: &VolumeName,
    parts: &[PartRef],
) -> Result<Vec<Vec<Item>>, SweepError> {
    let asks = parts.iter().cloned().map(|part| {
        let (asking, name) = (asking.clone(), name.clone());
        async move {
            let read = asking
                .again(|bucket| Box::pin(read::part(bucket, name.as_str(), &part)))
                .await;
            read.map_err(|err| SweepError::from_catalog(name.as_str(), err))
        }
    });
    together(asks.collect::<Vec<_>>()).await.into_iter().collect()
}

/// The marks of a chunk list, wherever it is: a fork that keeps its blobs apart keeps its lists there as well, while
/// the chunks may be where all have theirs.
pub(super) async fn list(
    asking: &Asking,
    with_blobs: &[VolumeName],
    list: &Digest,
    size: u64,
    segment: &str,
    volume: &VolumeName,
) -> Result<Option<Vec<u64>>, SweepError> {
    let shared = layout::blob(list);
    if let Some(marks) = read_list(asking, list, shared.clone(), size, segment).await? {
        return Ok(Some(marks));
    }
    let mut apart = with_blobs.to_vec();
    apart.sort_by_key(|name| name != volume);
    for name in apart {
        let key = format!("{}{shared}", layout::volume_prefix(name.as_str()));
        match read_list(asking, list, key, size, segment).await {
            Ok(Some(marks)) => return Ok(Some(marks)),
            // What is damaged there may be meant to be.
            Ok(None) => {}
            Err(err) if err.is_of_writer() => {}
            Err(err) => return Err(err),
        }
    }
    tracing::warn!(key = shared, segment, "the chunk list of a blob is gone");
    Ok(None)
}

/// Reads the marks of a chunk list; `None` when it is not there.
async fn read_list(
    asking: &Asking,
    list: &Digest,
    key: String,
    size: u64,
    segment: &str,
) -> Result<Option<Vec<u64>>, SweepError> {
    let mut why = String::new();
    for _ in 0..FETCHES {
        let most = size.min(manifest::MAX_LIST_BYTES);
        match asking.again(|bucket| bucket.get(&key, None, most)).await {
            Ok(None) => return Ok(None),
            Ok(Some(object)) if Digest::of(&object.bytes) == *list => match marks_of(&object.bytes) {
                Ok(marks) => return Ok(Some(marks)),
                Err(err) => {
                    why = err.to_string();
                    break;
                }
            },
            Ok(Some(_)) => "its bytes are others than its name says".clone_into(&mut why),
            Err(err @ TierError::Malformed { .. }) => why = err.to_string(),
            Err(err) => return Err(err.into()),
        }
    }
    Err(SweepError::List {
        key,
        segment: segment.to_owned(),
        why,
    })
}

fn marks_of(list: &[u8]) -> Result<Vec<u64>, ManifestError> {
    let (chunks, places): Placed = manifest::decode(list)?;
    let chunks = chunks.chunks().iter().map(|chunk| mark(&chunk.digest));
    Ok(chunks.chain(packs(&places)).collect())
}

pub(super) fn packs(places: &[Option<PackPlace>]) -> impl Iterator<Item = u64> {
    places.iter().flatten().map(|place| mark(&place.pack))
}
