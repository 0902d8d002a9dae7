//! Numbers that change with what a directory lists: so that a list may be kept.
//!
//! # Invariants
//!
//! - Two equal numbers of a directory mean that no name in it came, went or became another file in between, as far as
//!   both were asked for when no change was being committed. A number is never given twice.
//! - A number that is forgotten, because many directories were asked for, reads as a change.

use std::{
    num::NonZeroUsize,
    sync::{Mutex, MutexGuard},
};

use lru::LruCache;

use crate::store::rows::Ino;

/// Directories whose numbers are known.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1 << 14).expect("not zero");

#[derive(Debug)]
pub(super) struct Editions(Mutex<Known>);

#[derive(Debug)]
struct Known {
    last: u64,
    of: LruCache<Ino, u64>,
}

impl Default for Editions {
    fn default() -> Self {
        Self(Mutex::new(Known {
            last: 0,
            of: LruCache::new(REMEMBERED),
        }))
    }
}

impl Editions {
    pub(super) fn of(&self, dir: Ino) -> u64 {
        let mut known = self.lock();
        let known = &mut *known;
        *known.of.get_or_insert(dir, || {
            known.last += 1;
            known.last
        })
    }

    /// What these directories list has changed, and can be read.
    pub(super) fn end(&self, dirs: &[Ino]) {
        if dirs.is_empty() {
            return;
        }
        let mut known = self.lock();
        for dir in dirs {
            known.of.pop(dir);
        }
    }

    /// What any directory lists may have changed.
    pub(super) fn end_all(&self) {
        self.lock().of.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().expect("a panic ends the process")
    }
}
