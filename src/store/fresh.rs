//! Chunks that came a moment ago, still in memory.
//!
//! A sequential reader of a cold blob asks for bytes shortly after they came. Answering from
//! the buffer that they came in saves reading them back from the file; and the chunks of a run lie
//! side by side in one buffer, so that a long read is one slice of it.
//!
//! # Invariants
//!
//! - What is in here was verified. A blob never changes, so it stays right whatever becomes of the file.
//! - It takes at most [`MAX_BYTES`], and a piece leaves when as much as it has was read of it: a sequential reader
//!   takes each byte once, by requests that arrive in any order.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;

use crate::base::digest::Digest;

/// More than one reader is kept ahead of, see [`super::readahead`]: what it asks for next must not be the
/// oldest that leaves.
const MAX_BYTES: usize = 32 << 20;

/// Adjoining bytes of a blob.
#[derive(Debug)]
struct Piece {
    blob: Digest,
    start: u64,
    bytes: Bytes,
    unread_bytes: usize,
}

impl Piece {
    fn range(&self) -> Range<u64> {
        self.start..self.start + self.bytes.len() as u64
    }
}

#[derive(Debug, Default)]
pub(super) struct Fresh {
    /// The oldest first.
    pieces: Mutex<VecDeque<Piece>>,
    /// How many there are, to look at without the lock.
    count: AtomicUsize,
}

impl Fresh {
    /// Keeps verified bytes of `blob` that begin at `start`.
    pub(super) fn put(&self, blob: Digest, start: u64, bytes: Bytes) {
        if bytes.len() > MAX_BYTES {
            return;
        }
        let mut pieces = self.pieces();
        pieces.push_back(Piece {
            blob,
            start,
            unread_bytes: bytes.len(),
            bytes,
        });
        let mut held: usize = pieces.iter().map(|piece| piece.bytes.len()).sum();
        while held > MAX_BYTES
            && let Some(oldest) = pieces.pop_front()
        {
            held -= oldest.bytes.len();
        }
        self.count.store(pieces.len(), Ordering::Relaxed);
    }

    /// The bytes `range` of `blob`, in parts that adjoin; `None` if some are not here.
    pub(super) fn get(&self, blob: &Digest, range: Range<u64>) -> Option<Vec<Bytes>> {
        if self.count.load(Ordering::Relaxed) == 0 || range.is_empty() {
            return None;
        }
        let mut pieces = self.pieces();
        let mut parts = Vec::with_capacity(1);
        let mut at = range.start;
        while at < range.end {
            let holds = |piece: &Piece| piece.blob == *blob && piece.range().contains(&at);
            let place = pieces.iter().position(holds)?;
            let piece = &pieces[place];
            let until = range.end.min(piece.range().end);
            let offset = |byte: u64| (byte - piece.start) as usize;
            parts.push((place, piece.bytes.slice(offset(at)..offset(until))));
            at = until;
        }
        for (place, part) in &parts {
            let unread = &mut pieces[*place].unread_bytes;
            *unread = unread.saturating_sub(part.len());
        }
        pieces.retain(|piece| piece.unread_bytes > 0);
        self.count.store(pieces.len(), Ordering::Relaxed);
        Some(parts.into_iter().map(|(_, part)| part).collect())
    }

    fn pieces(&self) -> MutexGuard<'_, VecDeque<Piece>> {
        self.pieces
            .lock()
            .expect("no code panics while it holds the pieces")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_there_until_all_of_them_were_read_in_any_order() {
        let fresh = Fresh::default();
        let [one, other] = [Digest::of(b"one"), Digest::of(b"other")];
        fresh.put(one, 100, Bytes::from_static(b"0123456789"));
        assert_eq!(fresh.get(&one, 105..110).unwrap(), ["56789"]);
        assert_eq!(fresh.get(&other, 102..105), None);
        for missing in [99..101, 105..111, 110..112, 103..103] {
            assert_eq!(fresh.get(&one, missing), None);
        }
        assert_eq!(fresh.get(&one, 102..105).unwrap(), ["234"]);
        assert_eq!(fresh.get(&one, 100..102).unwrap(), ["01"]);
        assert_eq!(fresh.get(&one, 102..105), None);
    }

    #[test]
    fn bytes_of_several_pieces_come_in_parts() {
        let fresh = Fresh::default();
        let blob = Digest::of(b"blob");
        fresh.put(blob, 5, Bytes::from_static(b"56789"));
        fresh.put(blob, 0, Bytes::from_static(b"01234"));
        fresh.put(blob, 11, Bytes::from_static(b"b"));
        assert_eq!(fresh.get(&blob, 3..12), None, "10 is not here");
        assert_eq!(fresh.get(&blob, 0..8).unwrap(), ["01234", "567"]);
        assert_eq!(fresh.get(&blob, 4..8), None, "the first was read whole");
        assert_eq!(fresh.get(&blob, 8..10).unwrap(), ["89"]);
        assert_eq!(fresh.get(&blob, 11..12).unwrap(), ["b"]);
        assert_eq!(fresh.count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn the_oldest_leave_when_there_is_too_much() {
        let fresh = Fresh::default();
        let blob = Digest::of(b"blob");
        let quarter = Bytes::from(vec![7; MAX_BYTES / 4]);
        for number in 0..5 {
            fresh.put(blob, number * quarter.len() as u64, quarter.clone());
        }
        assert_eq!(fresh.get(&blob, 0..1), None);
        assert!(
            fresh
                .get(&blob, quarter.len() as u64..quarter.len() as u64 + 1)
                .is_some()
        );
        fresh.put(blob, 0, Bytes::from(vec![0; MAX_BYTES + 1]));
        assert_eq!(fresh.get(&blob, 0..1), None);
    }
}
