//! Bodies as they are stored: raw, or one zstd frame.
//!
//! A frame carries the size of its content, so that a reader knows the memory
//! it needs before it unpacks a byte, and a lying server cannot fill it.

use std::{cell::RefCell, io::Read};

use bytes::Bytes;

use super::{Body, TierError};
use crate::base::digest::Digest;

/// The fastest level that zstd has by itself: uploads share the machine with a build.
const LEVEL: i32 = 1;

/// Bodies shorter than this are sent as they are: a request costs more than they do.
const MIN_BYTES: usize = 256;

thread_local! {
    /// Kept per thread, because making one costs more than packing a small body.
    static COMPRESSOR: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
}

/// Prepares `raw` for storing: compressed if asked for and if that saves a tenth at least.
///
/// Hashes the bytes that will be sent. Takes a few milliseconds for the largest chunk.
#[must_use]
pub fn encode(raw: Bytes, compress: bool) -> Body {
    match compress.then(|| compressed(&raw)).flatten() {
        Some(packed) => packed_body(packed),
        None => Body::raw(raw),
    }
}

/// Like [`encode`] of bytes whose digest the caller has just computed, which
/// saves hashing them a second time when they are sent raw.
#[must_use]
pub fn encode_known(raw: Bytes, digest: Digest, compress: bool) -> Body {
    match compress.then(|| compressed(&raw)).flatten() {
        Some(packed) => packed_body(packed),
        None => Body {
            bytes: raw,
            sha256: digest,
            zstd: false,
        },
    }
}

fn packed_body(packed: Vec<u8>) -> Body {
    Body {
        sha256: Digest::of(&packed),
        bytes: packed.into(),
        zstd: true,
    }
}

/// Compresses, or returns `None` when that saves less than a tenth.
#[must_use]
pub fn compressed(raw: &[u8]) -> Option<Vec<u8>> {
    if raw.len() < MIN_BYTES {
        return None;
    }
    let packed = COMPRESSOR.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = zstd::bulk::Compressor::new(LEVEL).ok();
        }
        slot.as_mut()?.compress(raw).ok()
    })?;
    (packed.len() <= raw.len() - raw.len() / 10).then_some(packed)
}

/// Unpacks a frame of at most `max_bytes` of content.
///
/// # Errors
///
/// [`TierError::Malformed`] for anything else.
pub fn decode(key: &str, packed: &[u8], max_bytes: u64) -> Result<Bytes, TierError> {
    let malformed = |why: String| TierError::Malformed {
        key: key.to_owned(),
        why,
    };
    let broken = |err: std::io::Error| malformed(format!("it is not a zstd frame: {err}"));
    let too_long = || malformed(format!("it unpacks to more than {max_bytes} bytes"));
    let announced = zstd::zstd_safe::get_frame_content_size(packed)
        .map_err(|_| malformed("it is not a zstd frame".to_owned()))?;
    if let Some(len) = announced {
        if len > max_bytes {
            return Err(too_long());
        }
        let raw = zstd::bulk::decompress(packed, len as usize).map_err(broken)?;
        return Ok(raw.into());
    }
    // Another program stored it: no size, so it is unpacked up to the limit.
    let mut raw = Vec::new();
    zstd::stream::read::Decoder::new(packed)
        .and_then(|decoder| decoder.take(max_bytes.saturating_add(1)).read_to_end(&mut raw))
        .map_err(broken)?;
    if raw.len() as u64 > max_bytes {
        return Err(too_long());
    }
    Ok(raw.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::id::random_bytes;

    #[test]
    fn what_packs_well_is_packed_and_comes_back() {
        let raw = Bytes::from(vec![7; 100_000]);
        let body = encode(raw.clone(), true);
        assert!(body.zstd && body.bytes.len() < 1000);
        assert_eq!(body.sha256, Digest::of(&body.bytes));
        assert_eq!(decode("k", &body.bytes, 100_000).unwrap(), raw);
    }

    #[test]
    fn what_does_not_pack_is_sent_as_it_is() {
        let noise = Bytes::copy_from_slice(&random_bytes::<4096>());
        for raw in [noise, Bytes::from_static(b"short"), Bytes::new()] {
            let body = encode_known(raw.clone(), Digest::of(&raw), true);
            assert!(!body.zstd);
            assert_eq!((body.sha256, body.bytes), (Digest::of(&raw), raw));
        }
        assert!(!encode(vec![0; 4096].into(), false).zstd);
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_before_it_fills_memory() {
        let announced = encode(vec![0; 1 << 20].into(), true).bytes;
        let mut silent = Vec::new();
        zstd::stream::copy_encode(&vec![0; 100_000][..], &mut silent, 1).unwrap();
        for frame in [&announced[..], &silent[..]] {
            let error = decode("k", frame, 1000).unwrap_err().to_string();
            assert!(error.contains("more than 1000 bytes"), "{error}");
        }
        assert_eq!(decode("k", &silent, 100_000).unwrap().len(), 100_000);
    }

    #[test]
    fn a_broken_frame_is_refused() {
        let mut frame = encode(vec![0; 4096].into(), true).bytes.to_vec();
        frame.truncate(frame.len() - 2);
        for bytes in [&frame[..], b"", b"not zstd"] {
            assert!(matches!(
                decode("k", bytes, 10_000),
                Err(TierError::Malformed { .. })
            ));
        }
    }
}
