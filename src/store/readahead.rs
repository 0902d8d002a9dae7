//! Decides what to fetch ahead of a reader.
//!
//! This file decides; `fetch` acts. A reader is sequential when each read
//! begins about where the last one ended; from its second such read
//! on, chunks behind it are fetched too, at first two, then twice as many with
//! each chunk that it enters. A random reader gets what it asks for and nothing else.
//! More is asked for when half of what was asked for was read, and up to the end of the last pack,
//! so that a pack's chunks come by one request.
//!
//! The kernel's own readahead sends several requests of one reader at once, which
//! arrive in any order: a request counts as near when it begins at most
//! [`BACK_BYTES`] before or [`FORWARD_BYTES`] behind the expected place (the distances that
//! mountpoint-s3 found to be enough).

use std::ops::Range;

use crate::base::chunk::ChunkList;

/// Chunks fetched ahead of a reader when it is first seen to be sequential.
const FIRST_WINDOW: usize = 2;

/// Chunks fetched ahead of a steady reader: 24 MiB on the average, some six packs. Half of it
/// is what a fast disk takes in while a far bucket answers one request.
const MAX_WINDOW: usize = 48;

const BACK_BYTES: u64 = 512 << 10;
const FORWARD_BYTES: u64 = 1 << 20;

/// What is known of one reader.
#[derive(Debug, Default)]
pub(super) struct Readahead {
    /// Where the furthest read ended.
    next: u64,
    reads: u64,
    window: usize,
    /// The furthest chunk that was read.
    last: usize,
    /// Chunks below this were asked for already.
    asked: usize,
}

impl Readahead {
    /// Takes in a read of `len` bytes from `offset`; returns the chunks to fetch ahead of it.
    pub(super) fn advance(&mut self, chunks: &ChunkList, offset: u64, len: u64) -> Range<usize> {
        let covering = chunks.covering(offset, len);
        if covering.is_empty() {
            return 0..0;
        }
        let near = offset.saturating_add(BACK_BYTES) >= self.next
            && offset <= self.next.saturating_add(FORWARD_BYTES);
        let last = covering.end - 1;
        if self.reads == 0 || !near {
            *self = Self {
                next: offset + len,
                reads: 1,
                window: 0,
                last,
                asked: covering.end,
            };
            return 0..0;
        }
        // A read of what was read before is no progress: two small reads in one place are not a pattern.
        let end = offset.saturating_add(len);
        if end <= self.next {
            return 0..0;
        }
        self.next = end;
        self.reads += 1;
        if self.window == 0 {
            self.window = FIRST_WINDOW;
        } else if last > self.last {
            self.window = (self.window * 2).min(MAX_WINDOW);
        }
        self.last = self.last.max(last);
        let count = chunks.chunks().len();
        let until = (self.last + 1 + self.window).min(count);
        let from = self.asked.max(covering.end).min(until);
        if until < count && (until - from) * 2 < self.window {
            return 0..0;
        }
        self.asked = self.asked.max(until);
        from..until
    }

    /// Notes that the chunks below `until` were asked for, beyond those that [`Self::advance`] named.
    pub(super) fn asked_until(&mut self, until: usize) {
        self.asked = self.asked.max(until);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{chunk::Chunk, digest::Digest};

    const CHUNK: u64 = 512 << 10;

    fn blob(chunks: usize) -> ChunkList {
        let chunk = Chunk {
            digest: Digest::EMPTY,
            len: CHUNK as u32,
        };
        ChunkList::new(vec![chunk; chunks])
    }

    #[test]
    fn one_read_anywhere_asks_for_nothing_ahead() {
        let list = blob(100);
        for offset in [0, 5 * CHUNK, 99 * CHUNK] {
            assert!(Readahead::default().advance(&list, offset, 4096).is_empty());
        }
    }

    #[test]
    fn a_random_reader_never_gets_anything_ahead() {
        let list = blob(1000);
        let mut reader = Readahead::default();
        for step in 0..200u64 {
            let offset = step * 389 % 1000 * CHUNK;
            assert!(reader.advance(&list, offset, 4096).is_empty(), "{offset}");
        }
    }

    #[test]
    fn a_sequential_reader_is_kept_ahead_of_and_no_chunk_is_named_twice() {
        let list = blob(100);
        let mut reader = Readahead::default();
        let mut asked = Vec::new();
        for offset in (0..90 * CHUNK).step_by(128 << 10) {
            asked.extend(reader.advance(&list, offset, 128 << 10));
        }
        let mut sorted = asked.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(asked, sorted);
        assert_eq!(asked, (1..100).collect::<Vec<_>>());
        // It was the full window ahead long before the end.
        let mut reader = Readahead::default();
        for offset in (0..20 * CHUNK).step_by(128 << 10) {
            reader.advance(&list, offset, 128 << 10);
        }
        assert!((20 + MAX_WINDOW / 2..=20 + MAX_WINDOW).contains(&reader.asked));
    }

    #[test]
    fn requests_of_one_reader_may_arrive_out_of_order() {
        let list = blob(100);
        let mut reader = Readahead::default();
        let mut asked = Vec::new();
        for step in [0u64, 2, 1, 3, 5, 4, 7, 6, 8, 9, 11, 10] {
            asked.extend(reader.advance(&list, step * (128 << 10), 128 << 10));
        }
        assert!(asked.len() >= 4, "{asked:?}");
    }

    #[test]
    fn nothing_is_asked_for_behind_the_end() {
        let list = blob(3);
        let mut reader = Readahead::default();
        for offset in (0..4 * CHUNK).step_by(64 << 10) {
            assert!(reader.advance(&list, offset, 64 << 10).all(|index| index < 3));
        }
    }
}
