//! Chunks: the unit of transfer, verification and residency.
//!
//! A blob is cut by content (`FastCDC` 2020, Xia et al., "The Design of Fast
//! Content-Defined Chunking for Data Deduplication Based Storage Systems"), so
//! that a change in the middle of a large file changes the chunks around it
//! only. The parameters are the Remote Execution API's for `SplitBlob`: an
//! average of 512 KiB, a quarter and four times of it as the limits,
//! normalization level 2, seed 0. They are part of the bucket's format: two
//! machines that cut differently would share nothing. `tests/golden_chunking.rs` pins them.
//!
//! # Invariants
//!
//! - Chunks are in order, without gaps, none of them empty; their lengths add up to the blob.
//! - A blob of at most [`MAX_CHUNK_BYTES`] is one chunk, whose digest is the blob's.

use std::io::{self, Read};

use fastcdc::v2020::{Normalization, StreamCDC};

use super::digest::{Digest, Hasher};

pub const MIN_CHUNK_BYTES: u32 = 128 << 10;
pub const AVG_CHUNK_BYTES: u32 = 512 << 10;
pub const MAX_CHUNK_BYTES: u32 = 2 << 20;

/// One piece of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub digest: Digest,
    pub len: u32,
}

/// The ordered chunks of one blob, with their places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkList {
    chunks: Vec<Chunk>,
    /// Where each chunk begins; one more than there are chunks, the last is the size.
    starts: Vec<u64>,
}

impl ChunkList {
    #[must_use]
    pub fn new(chunks: Vec<Chunk>) -> Self {
        let mut starts = Vec::with_capacity(chunks.len() + 1);
        let mut start = 0;
        starts.push(0);
        for chunk in &chunks {
            start += u64::from(chunk.len);
            starts.push(start);
        }
        Self { chunks, starts }
    }

    /// The list of a blob that is one chunk, or none if it is empty.
    ///
    /// # Panics
    ///
    /// When `size` is over [`MAX_CHUNK_BYTES`]: such a blob is never one chunk.
    #[must_use]
    pub fn single(digest: Digest, size: u64) -> Self {
        assert!(
            size <= u64::from(MAX_CHUNK_BYTES),
            "a blob of {size} bytes is not one chunk"
        );
        let chunk = Chunk {
            digest,
            len: size as u32,
        };
        Self::new(if size == 0 { Vec::new() } else { vec![chunk] })
    }

    #[must_use]
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    #[must_use]
    pub fn size(&self) -> u64 {
        self.starts[self.chunks.len()]
    }

    /// Where chunk `index` begins, in bytes from the start of the blob.
    #[must_use]
    pub fn start(&self, index: usize) -> u64 {
        self.starts[index]
    }

    /// The indexes of the chunks that hold any of `len` bytes from `offset`;
    /// empty past the end.
    #[must_use]
    pub fn covering(&self, offset: u64, len: u64) -> std::ops::Range<usize> {
        let end = offset.saturating_add(len).min(self.size());
        if offset >= end {
            return 0..0;
        }
        let first = self.starts.partition_point(|&start| start <= offset) - 1;
        let last = self.starts.partition_point(|&start| start < end);
        first..last
    }
}

/// A blob's name and pieces, as hashing its bytes found them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sliced {
    pub digest: Digest,
    pub chunks: ChunkList,
}

/// Reads `source` to its end, hashing the whole and each chunk.
///
/// A blob of one chunk is hashed once; every byte of a longer one twice, for
/// the blob's name and for its chunk's. Memory is bounded by a few times
/// [`MAX_CHUNK_BYTES`].
///
/// # Errors
///
/// What `source` reports.
pub fn slice(mut source: impl Read) -> io::Result<Sliced> {
    let mut head = Vec::new();
    source
        .by_ref()
        .take(u64::from(MAX_CHUNK_BYTES) + 1)
        .read_to_end(&mut head)?;
    if head.len() <= MAX_CHUNK_BYTES as usize {
        let digest = Digest::of(&head);
        return Ok(Sliced {
            digest,
            chunks: ChunkList::single(digest, head.len() as u64),
        });
    }
    let mut whole = Hasher::default();
    let mut chunks = Vec::new();
    let pieces = StreamCDC::with_level(
        io::Cursor::new(head).chain(source),
        MIN_CHUNK_BYTES as usize,
        AVG_CHUNK_BYTES as usize,
        MAX_CHUNK_BYTES as usize,
        Normalization::Level2,
    );
    for piece in pieces {
        let data = piece.map_err(io::Error::from)?.data;
        chunks.push(Chunk {
            digest: whole.update_and_name(&data),
            len: data.len() as u32,
        });
    }
    Ok(Sliced {
        digest: whole.finish(),
        chunks: ChunkList::new(chunks),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes that look random and are the same everywhere (xorshift64).
    fn noise(len: usize, mut state: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }

    #[test]
    fn a_blob_up_to_the_maximum_is_one_chunk_named_like_the_blob() {
        for len in [0, 1, MAX_CHUNK_BYTES as usize] {
            let bytes = noise(len, 7);
            let sliced = slice(bytes.as_slice()).unwrap();
            assert_eq!(sliced.digest, Digest::of(&bytes));
            assert_eq!(sliced.chunks, ChunkList::single(sliced.digest, len as u64));
        }
    }

    #[test]
    fn a_change_in_the_middle_changes_few_chunks() {
        let mut bytes = noise(24 << 20, 42);
        let before = slice(bytes.as_slice()).unwrap();
        bytes[12 << 20] ^= 1;
        let after = slice(bytes.as_slice()).unwrap();
        let changed = after
            .chunks
            .chunks()
            .iter()
            .filter(|chunk| !before.chunks.chunks().contains(chunk))
            .count();
        assert_ne!(before.digest, after.digest);
        assert!((1..=3).contains(&changed), "{changed} chunks changed");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn chunks_are_the_blob(len in 0usize..9 << 20, seed in 1u64..) {
            let bytes = noise(len, seed);
            let sliced = slice(bytes.as_slice()).unwrap();
            prop_assert_eq!(sliced.digest, Digest::of(&bytes));
            prop_assert_eq!(sliced.chunks.size(), len as u64);
            for (index, chunk) in sliced.chunks.chunks().iter().enumerate() {
                let start = sliced.chunks.start(index) as usize;
                prop_assert_eq!(chunk.digest, Digest::of(&bytes[start..start + chunk.len as usize]));
            }
        }

        #[test]
        fn covering_names_every_chunk_of_a_range(lens in prop::collection::vec(1u32..50, 0..20), offset in 0u64..600, len in 0u64..600) {
            let list = ChunkList::new(lens.iter().map(|&len| Chunk { digest: Digest::EMPTY, len }).collect());
            let found = list.covering(offset, len);
            for index in 0..lens.len() {
                let overlaps = list.start(index) < offset + len && list.start(index + 1) > offset && len > 0;
                prop_assert_eq!(found.contains(&index), overlaps);
            }
        }
    }
}
