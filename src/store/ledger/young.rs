//! Which names the index cannot have, so that it need not be asked.
//!
//! Most names that a build looks up first are not there: it is about to make them. The index
//! takes 10 to 15 us to say so, in the time that the program waits (an eighth of what creating
//! a file took). For directories that were made while this process runs it need not be asked:
//! every name in them was put there by this process, and is noted in a Bloom filter (Bloom,
//! "Space/time trade-offs in hash coding with allowable errors", 1970).
//!
//! # Invariants
//!
//! - Directories have numbers that [`Ledger::next_ino`](super::Ledger::next_ino) gave out.
//! - A name that was ever put below a young directory is noted. A name that was taken away stays
//!   noted, and one that was never there may seem to be: both cost a question.

use std::hash::{BuildHasher, RandomState};

use crate::store::rows::Ino;

/// 2 MiB, which the kernel gives as they are touched. With a million names one
/// question in a hundred is asked in vain; with ten million nearly all are.
const BITS: u64 = 1 << 24;

/// Bits a name sets.
const HASHES: u64 = 4;

#[derive(Debug)]
pub struct Young {
    /// Numbers from here on are given out by this process.
    first: Ino,
    words: Vec<u64>,
    hasher: RandomState,
}

impl Young {
    /// `first`: no row of the index has this number as its parent, or a greater one.
    pub fn new(first: Ino) -> Self {
        Self {
            first,
            words: vec![0; (BITS / 64) as usize],
            hasher: RandomState::new(),
        }
    }

    /// Notes that a name is put into the rows.
    pub fn note(&mut self, parent: Ino, name: &[u8]) {
        if parent >= self.first {
            for (word, bit) in self.places(parent, name) {
                self.words[word] |= bit;
            }
        }
    }

    /// Whether the index may have a name. Never false for one that was noted.
    pub fn may_have(&self, parent: Ino, name: &[u8]) -> bool {
        parent < self.first
            || self
                .places(parent, name)
                .all(|(word, bit)| self.words[word] & bit != 0)
    }

    fn places(&self, parent: Ino, name: &[u8]) -> impl Iterator<Item = (usize, u64)> + use<> {
        let hash = self.hasher.hash_one((parent, name));
        // Two halves make all hashes: Kirsch and Mitzenmacher, "Less Hashing, Same Performance", 2006.
        let (start, step) = (hash >> 32, hash << 1 | 1);
        (0..HASHES).map(move |at| {
            let place = start.wrapping_add(at.wrapping_mul(step)) % BITS;
            ((place / 64) as usize, 1 << (place % 64))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_noted_name_may_be_there_and_few_others() {
        let mut young = Young::new(Ino(100));
        let name = |number: u32| format!("file-{number}.o").into_bytes();
        for number in 0..100_000 {
            young.note(Ino(100 + u64::from(number % 7)), &name(number));
        }
        for number in 0..100_000 {
            assert!(young.may_have(Ino(100 + u64::from(number % 7)), &name(number)));
        }
        let wrong = (0..100_000)
            .filter(|&number| young.may_have(Ino(200), &name(number)))
            .count();
        assert!(wrong < 100, "{wrong} of 100,000");
    }

    #[test]
    fn of_older_directories_nothing_is_known() {
        let mut young = Young::new(Ino(100));
        assert!(young.may_have(Ino(99), b"name"));
        young.note(Ino(99), b"name");
        assert!(!young.may_have(Ino(100), b"name"));
    }
}
