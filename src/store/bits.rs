//! A set of chunk numbers that many threads read and add to without a lock.
//!
//! Whoever sees a number in the set also sees what was written before it was
//! put in (release and acquire), so "the bit is set" means "the bytes are in the file".

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

/// A set of numbers below a limit.
#[derive(Debug)]
pub(super) struct Bits {
    words: Box<[AtomicU64]>,
    limit: usize,
    count: AtomicUsize,
}

impl Bits {
    pub(super) fn empty(limit: usize) -> Self {
        Self {
            words: (0..limit.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            limit,
            count: AtomicUsize::new(0),
        }
    }

    pub(super) fn full(limit: usize) -> Self {
        let bits = Self::empty(limit);
        bits.fill();
        bits
    }

    /// Reads the form of [`Self::to_bytes`]; what is missing is not in the set, what is too much is ignored.
    pub(super) fn from_bytes(limit: usize, bytes: &[u8]) -> Self {
        let bits = Self::empty(limit);
        for number in 0..limit.min(bytes.len() * 8) {
            if bytes[number / 8] >> (number % 8) & 1 == 1 {
                bits.insert(number);
            }
        }
        bits
    }

    /// A bit for each number, the lowest bit of the first byte first.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self
            .words
            .iter()
            .flat_map(|word| word.load(Ordering::Acquire).to_le_bytes())
            .collect();
        bytes.truncate(self.limit.div_ceil(8));
        bytes
    }

    pub(super) fn contains(&self, number: usize) -> bool {
        self.words[number / 64].load(Ordering::Acquire) >> (number % 64) & 1 == 1
    }

    pub(super) fn contains_all(&self, mut numbers: Range<usize>) -> bool {
        self.is_full() || numbers.all(|number| self.contains(number))
    }

    pub(super) fn insert(&self, number: usize) {
        let bit = 1 << (number % 64);
        if self.words[number / 64].fetch_or(bit, Ordering::AcqRel) & bit == 0 {
            self.count.fetch_add(1, Ordering::AcqRel);
        }
    }

    pub(super) fn remove(&self, number: usize) {
        let bit = 1 << (number % 64);
        if self.words[number / 64].fetch_and(!bit, Ordering::AcqRel) & bit != 0 {
            self.count.fetch_sub(1, Ordering::AcqRel);
        }
    }

    pub(super) fn fill(&self) {
        (0..self.limit).for_each(|number| self.insert(number));
    }

    pub(super) fn clear(&self) {
        (0..self.limit).for_each(|number| self.remove(number));
    }

    pub(super) fn is_full(&self) -> bool {
        self.count.load(Ordering::Acquire) == self.limit
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_reads_back_from_its_bytes() {
        let bits = Bits::empty(70);
        for number in [0, 9, 63, 64, 69] {
            bits.insert(number);
            bits.insert(number);
        }
        let bytes = bits.to_bytes();
        assert_eq!(bytes, [1, 2, 0, 0, 0, 0, 0, 128, 33]);
        let again = Bits::from_bytes(70, &bytes);
        assert_eq!(again.to_bytes(), bytes);
        assert!(!again.is_full() && !again.is_empty());
    }

    #[test]
    fn a_set_is_full_when_every_number_is_in_it_and_not_before() {
        let bits = Bits::empty(65);
        (0..64).for_each(|number| bits.insert(number));
        assert!(!bits.is_full() && bits.contains_all(3..64) && !bits.contains_all(63..65));
        bits.insert(64);
        assert!(bits.is_full());
        bits.remove(5);
        assert!(!bits.is_full() && !bits.contains(5));
        assert!(Bits::full(65).is_full() && Bits::full(0).is_full());
    }

    #[test]
    fn bytes_of_another_length_do_not_reach_beyond_the_limit() {
        assert!(!Bits::from_bytes(20, &[0xff]).contains(8));
        assert_eq!(Bits::from_bytes(3, &[0xff, 0xff]).to_bytes(), [7]);
    }
}
