//! Fetches one segment and checks that it is the one that its key names.
//!
//! Bytes may be damaged on the way: what is wrong is fetched again at once, a few times, before it counts
//! as damaged in the bucket.

use super::SegmentKey;
use crate::{
    namespace::segment::{self, Decoded, SegmentError},
    tier::{Bucket, TierError},
};

/// How often a segment that comes damaged is fetched before it counts as damaged in the bucket.
const FETCHES: u32 = 6;

/// A segment, or what is wrong with it; `None` when there is none under its key.
pub type Segment = Option<Result<Decoded, SegmentError>>;

/// Fetches the segment `name` of `volume`.
pub async fn segment(bucket: &dyn Bucket, volume: &str, name: SegmentKey) -> Result<Segment, TierError> {
    let key = name.to_key(volume);
    let mut fetched = once(bucket, &key, name).await;
    for _ in 1..FETCHES {
        if !matches!(&fetched, Ok(Some(Err(err))) if !matches!(err, SegmentError::Newer { .. })) {
            break;
        }
        fetched = once(bucket, &key, name).await;
    }
    fetched
}

async fn once(bucket: &dyn Bucket, key: &str, name: SegmentKey) -> Result<Segment, TierError> {
    let bytes = match bucket.get(key, None, segment::MAX_SEGMENT_BYTES).await {
        Ok(Some(object)) => object.bytes,
        Ok(None) => return Ok(None),
        // Too large: as damaged as can be.
        Err(TierError::Malformed { .. }) => {
            let why = "it is larger than any segment";
            return Ok(Some(Err(SegmentError::Malformed { why })));
        }
        Err(err) => return Err(err),
    };
    let decoded = match segment::decode(&bytes) {
        Ok(decoded) if decoded.head.machine == name.machine && decoded.head.seq == name.seq => decoded,
        Ok(_) => {
            let why = "it is another segment than its key says";
            return Ok(Some(Err(SegmentError::Malformed { why })));
        }
        Err(err) => return Ok(Some(Err(err))),
    };
    for skipped in &decoded.skipped {
        let path = String::from_utf8_lossy(&skipped.path);
        tracing::warn!(key, %path, why = skipped.why, "a change of another machine is left out");
    }
    Ok(Some(Ok(decoded)))
}
