//! Which files and directories were used here lately, in memory.
//!
//! # Invariants
//!
//! - Noting a use takes one lock that nobody holds for longer than a few changes of a map: whoever answers the kernel
//!   never waits for the disk or the network here.
//! - What was used is either waiting to be told, or counts as told.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::store::rows::Ino;

/// A set of numbers of files. They are given one after the other, so neighbours share a word: between a quarter of a
/// byte and 17 bytes each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inos(HashMap<u64, u64>);

impl Inos {
    fn place(ino: Ino) -> (u64, u64) {
        (ino.0 / 64, 1 << (ino.0 % 64))
    }

    pub fn insert(&mut self, ino: Ino) {
        let (word, bit) = Self::place(ino);
        *self.0.entry(word).or_default() |= bit;
    }

    #[must_use]
    pub fn has(&self, ino: Ino) -> bool {
        let (word, bit) = Self::place(ino);
        self.0.get(&word).is_some_and(|bits| bits & bit != 0)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many they are.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.values().map(|bits| u64::from(bits.count_ones())).sum()
    }

    pub fn add_all(&mut self, other: &Self) {
        for (word, bits) in &other.0 {
            *self.0.entry(*word).or_default() |= bits;
        }
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = Ino> + '_ {
        let in_word = |(word, bits): (&u64, &u64)| {
            let (word, bits) = (*word, *bits);
            (0..64)
                .filter(move |bit| bits >> bit & 1 == 1)
                .map(move |bit| Ino(word * 64 + bit))
        };
        self.0.iter().flat_map(in_word)
    }
}

#[derive(Debug, Default)]
struct Uses {
    /// Waiting to be told.
    fresh: Inos,
    /// Told since the last turn: another use need not be told.
    told: Inos,
    /// Told before the last turn.
    before: Inos,
}

/// Notes what is used, while somebody wants to know.
#[derive(Debug, Default)]
pub struct Touched {
    is_on: AtomicBool,
    uses: Mutex<Uses>,
}

impl Touched {
    fn uses(&self) -> MutexGuard<'_, Uses> {
        self.uses.lock().expect("no code panics while it holds the uses")
    }

    /// Notes uses from now on.
    pub fn turn_on(&self) {
        self.is_on.store(true, Ordering::Relaxed);
    }

    /// Notes nothing from now on, and forgets what was noted.
    pub fn turn_off(&self) {
        self.is_on.store(false, Ordering::Relaxed);
        *self.uses() = Uses::default();
    }

    /// Notes that a file or directory is used.
    pub fn note(&self, ino: Ino) {
        if !self.is_on.load(Ordering::Relaxed) {
            return;
        }
        let mut uses = self.uses();
        if !uses.told.has(ino) {
            uses.fresh.insert(ino);
        }
    }

    /// Whether it was used since the turn before the last one.
    pub fn is_recent(&self, ino: Ino) -> bool {
        self.is_on.load(Ordering::Relaxed) && {
            let uses = self.uses();
            uses.fresh.has(ino) || uses.told.has(ino) || uses.before.has(ino)
        }
    }

    /// Whether anything waits to be told.
    pub fn is_waiting(&self) -> bool {
        !self.uses().fresh.is_empty()
    }

    /// How many wait to be told.
    pub fn waiting(&self) -> u64 {
        self.uses().fresh.len()
    }

    /// What waits to be told; it counts as told from now on.
    pub fn take(&self) -> Inos {
        let mut uses = self.uses();
        let fresh = std::mem::take(&mut uses.fresh);
        uses.told.add_all(&fresh);
        fresh
    }

    /// Takes back what could not be told.
    pub fn give_back(&self, inos: &Inos) {
        if self.is_on.load(Ordering::Relaxed) {
            self.uses().fresh.add_all(inos);
        }
    }

    /// Has what was told before be told again when it is used from now on.
    pub fn turn(&self) {
        let mut uses = self.uses();
        uses.before = std::mem::take(&mut uses.told);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(touched: &Touched) -> Vec<u64> {
        let mut all: Vec<u64> = touched.take().iter().map(|ino| ino.0).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn a_use_is_told_once_and_again_after_a_turn() {
        let touched = Touched::default();
        touched.note(Ino(1));
        assert!(taken(&touched).is_empty(), "nobody wanted to know");
        touched.turn_on();
        for ino in [5, 64, 5, 63, 1 << 40] {
            touched.note(Ino(ino));
        }
        assert_eq!(taken(&touched), [5, 63, 64, 1 << 40]);
        touched.note(Ino(5));
        assert!(taken(&touched).is_empty());
        touched.turn();
        touched.note(Ino(5));
        assert_eq!(taken(&touched), [5]);
    }

    #[test]
    fn what_could_not_be_told_is_told_later() {
        let touched = Touched::default();
        touched.turn_on();
        touched.note(Ino(7));
        let taken_once = touched.take();
        touched.note(Ino(8));
        touched.give_back(&taken_once);
        assert_eq!(taken(&touched), [7, 8]);
    }

    #[test]
    fn recent_is_what_was_used_since_the_turn_before_the_last() {
        let touched = Touched::default();
        touched.turn_on();
        touched.note(Ino(7));
        assert!(touched.is_recent(Ino(7)) && !touched.is_recent(Ino(8)));
        touched.take();
        assert!(touched.is_recent(Ino(7)));
        touched.turn();
        assert!(touched.is_recent(Ino(7)));
        touched.turn();
        assert!(!touched.is_recent(Ino(7)));
        touched.note(Ino(7));
        touched.turn_off();
        assert!(!touched.is_recent(Ino(7)));
    }
}
