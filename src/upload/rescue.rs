//! Stores again what a sweep condemned.
//!
//! A condemned object may be deleted at any moment until its list is gone, and nobody can tell a sweep to leave
//! it. So its chunks are stored under a key that nobody ever had: that of a pack with one more
//! member, random bytes that nothing names. No sweep knows that key, and it is as young as can be. The places of
//! the chunks travel with the entries, as ever; the old object goes its way.

use std::sync::Arc;

use super::{
    Shared,
    chunks::{confirm_members, prepare_pack},
    task::{UploadError, aside, put},
};
use crate::{
    base::{digest::Digest, id::random_bytes},
    store::blobs::Blob,
    tier::{Put, TierError, layout},
};

/// Nobody draws the same twice.
const SALT_BYTES: usize = 16;

/// Sends chunks of `blob` under a new key; returns those whose bytes on this disk are others.
pub(super) async fn upload_again(
    shared: &Shared,
    blob: &Arc<Blob>,
    group: &[usize],
) -> Result<Vec<usize>, UploadError> {
    let salt = random_bytes::<SALT_BYTES>();
    let (read, indexes, compress) = (Arc::clone(blob), group.to_vec(), shared.bucket.compresses());
    let prepared = aside(move || prepare_pack(&read, &indexes, Some(&salt), compress)).await??;
    let (pack, body) = match prepared {
        Ok(ready) => ready,
        Err(wrong) => return Ok(wrong),
    };
    let began_millis = shared.bucket.clock().now_millis();
    let key = layout::pack(&pack.name);
    let put = put(shared, &key, body).await?;
    // Refused: the reply to an earlier attempt of this very request was lost.
    debug_assert!(matches!(put, Put::Written(_) | Put::Refused));
    if shared.condemned.known().await?.is_condemned(&pack.name) {
        // Eight bytes of its name are those of another object; the next one has others.
        return Err(UploadError::Bucket(TierError::Unavailable {
            verb: "store again",
            key,
            source: "its name is like one that a sweep condemned".into(),
        }));
    }
    let mut members = pack.members;
    members.retain(|(digest, _)| *digest != Digest::of(&salt));
    confirm_members(shared, began_millis, members)?;
    for &index in group {
        shared.counters.sent(u64::from(blob.chunks().chunks()[index].len));
    }
    Ok(Vec::new())
}
