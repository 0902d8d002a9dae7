//! The chunk list of a long blob, as an object of its own.
//!
//! A blob of more than [`MAX_INLINE_CHUNKS`] chunks does not carry its list in
//! the entry that names it. The list is stored like a chunk, under the SHA-256 of its
//! bytes, and the entry carries that digest and the size.
//!
//! # Format
//!
//! Version 1, of chunks that are objects of their own. Integers are little-endian.
//!
//! ```text
//! 8 bytes   "casmcl\0\x01"      the last byte is the version
//! 36 bytes  per chunk, in order:
//!     32 bytes  SHA-256 of the chunk
//!     4 bytes   its length in bytes, 1 to 2,097,152
//! ```
//!
//! Version 2, of chunks in packs:
//!
//! ```text
//! 8 bytes   "casmcl\0\x02"
//! 4 bytes   number of chunks
//! 36 bytes  per chunk, as in version 1
//! the rest  their places, see [`super::pack`]
//! ```
//!
//! Equal lists with equal places have equal bytes. `tests/golden_manifest.rs` pins both versions;
//! a reader refuses any other.

use bytes::Bytes;

use super::pack::{self, PackPlace};
use crate::base::{
    chunk::{Chunk, ChunkList, MAX_CHUNK_BYTES},
    digest::Digest,
};

/// The longest list that an entry carries itself.
pub const MAX_INLINE_CHUNKS: usize = 1024;

/// The longest list object that is read: the chunks of a blob of about a tebibyte.
pub const MAX_LIST_BYTES: u64 = 128 << 20;

const PLAIN: &[u8; 8] = b"casmcl\0\x01";
const PLACED: &[u8; 8] = b"casmcl\0\x02";
const RECORD_BYTES: usize = 36;

/// Bytes are not a chunk list.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ManifestError {
    #[error("it is not a chunk list, or one of a newer version")]
    Magic,
    #[error("it ends within a record")]
    Length,
    #[error("chunk {index} has an impossible length of {len} bytes")]
    Chunk { index: usize, len: u32 },
    #[error(transparent)]
    Places(#[from] pack::BadPlaces),
}

/// A list that was read, with the places of its chunks; no places: each is an object of its own.
pub type Placed = (ChunkList, Vec<Option<PackPlace>>);

/// The object of a list; its name is the digest of these bytes.
#[must_use]
pub fn encode(list: &ChunkList, places: &[Option<PackPlace>]) -> Bytes {
    let count = list.chunks().len();
    let places = pack::encode_places(places);
    let mut bytes = Vec::with_capacity(PLACED.len() + 4 + count * RECORD_BYTES + places.len());
    if places.is_empty() {
        bytes.extend_from_slice(PLAIN);
    } else {
        bytes.extend_from_slice(PLACED);
        bytes.extend_from_slice(&(count as u32).to_le_bytes());
    }
    for chunk in list.chunks() {
        bytes.extend_from_slice(chunk.digest.as_bytes());
        bytes.extend_from_slice(&chunk.len.to_le_bytes());
    }
    bytes.extend_from_slice(&places);
    bytes.into()
}

/// Reads a list object.
///
/// # Errors
///
/// [`ManifestError`] for anything that [`encode`] does not write.
pub fn decode(bytes: &[u8]) -> Result<Placed, ManifestError> {
    if let Some(records) = bytes.strip_prefix(PLAIN) {
        return Ok((decode_records(records)?, Vec::new()));
    }
    let rest = bytes.strip_prefix(PLACED).ok_or(ManifestError::Magic)?;
    let (count, rest) = rest.split_first_chunk::<4>().ok_or(ManifestError::Length)?;
    let count = u32::from_le_bytes(*count) as usize;
    let (records, places) = count
        .checked_mul(RECORD_BYTES)
        .and_then(|len| rest.split_at_checked(len))
        .ok_or(ManifestError::Length)?;
    let places = pack::decode_places(places, count)?;
    Ok((decode_records(records)?, places))
}

fn decode_records(records: &[u8]) -> Result<ChunkList, ManifestError> {
    let (records, rest) = records.as_chunks::<RECORD_BYTES>();
    if !rest.is_empty() {
        return Err(ManifestError::Length);
    }
    let read = |(index, record): (usize, &[u8; RECORD_BYTES])| {
        let (digest, len) = record.split_at(32);
        let digest = Digest::from_slice(digest).ok_or(ManifestError::Length)?;
        let len = u32::from_le_bytes(len.try_into().map_err(|_| ManifestError::Length)?);
        if len == 0 || len > MAX_CHUNK_BYTES {
            return Err(ManifestError::Chunk { index, len });
        }
        Ok(Chunk { digest, len })
    };
    let chunks: Result<Vec<_>, _> = records.iter().enumerate().map(read).collect();
    Ok(ChunkList::new(chunks?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anything_but_a_list_is_refused() {
        let list = ChunkList::new(vec![Chunk {
            digest: Digest::EMPTY,
            len: 5,
        }]);
        let good = encode(&list, &[]);
        assert_eq!(decode(&good), Ok((list.clone(), Vec::new())));
        assert_eq!(decode(b""), Err(ManifestError::Magic));
        assert_eq!(decode(&good[..43]), Err(ManifestError::Length));
        let mut newer = good.to_vec();
        newer[7] = 3;
        assert_eq!(decode(&newer), Err(ManifestError::Magic));
        let mut long = good.to_vec();
        long[40..].copy_from_slice(&(MAX_CHUNK_BYTES + 1).to_le_bytes());
        assert!(matches!(
            decode(&long),
            Err(ManifestError::Chunk { index: 0, .. })
        ));
        let places = vec![Some(PackPlace {
            pack: Digest::of(b"pack"),
            offset: 52,
            stored_len: 5,
            zstd: false,
        })];
        let placed = encode(&list, &places);
        assert_eq!(decode(&placed), Ok((list, places)));
        for cut in [9, 40, placed.len() - 1] {
            assert!(decode(&placed[..cut]).is_err(), "{cut}");
        }
    }
}
