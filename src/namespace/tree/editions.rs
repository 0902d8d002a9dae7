//! Numbers that change with what a directory lists: so that a list may be kept.
//!
//! # Invariants
//!
//! - Two equal numbers of a directory mean that no name in it came, went or became another file in between, as far as
//!   both were asked for when no change was being committed. A number is never given twice.
//! - A number that is forgotten, because many directories were asked for, reads as a change.
//! - Where presets come to count, which hide names, all numbers change, and the kernel is told to list anew.

use std::{
    collections::VecDeque,
    num::NonZeroUsize,
    sync::{Mutex, MutexGuard},
};

use lru::LruCache;

use super::{InUse, Notice, Tree};
use crate::{
    namespace::{TreeError, preset::Preset},
    store::{error::chain, rows::Ino},
};

/// Directories whose numbers are known.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1 << 14).expect("not zero");

/// Directories of which the kernel is told, when a preset comes to count in them, that what they list may be another thing:
/// more than a cache of Bazel has. Of others it is told with the next change in them.
const LISTED_ANEW: usize = 4096;

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

impl Tree {
    /// Presets count elsewhere now: in directories in which a tool was `recognised`, and in some of those that were
    /// `moved`. Returns what the kernel has to be told. The changes are made by then, so what fails is logged.
    pub(super) fn presets_count(
        &self,
        in_use: &mut InUse,
        recognised: &[(Ino, Preset)],
        moved: &[Ino],
    ) -> Vec<Notice> {
        let failed = |err: &TreeError| {
            tracing::error!(error = %chain(err), "what a preset keeps here may be told, and be listed as before");
        };
        if !recognised.is_empty()
            && let Err(err) = self.recognised(in_use, recognised)
        {
            failed(&err);
        }
        // Out of a preset nothing is taken that the kernel kept; a tool's own directory is known by its number.
        let moved = moved
            .iter()
            .filter(|dir| self.presets.is_chosen() || self.has_preset(**dir));
        let dirs: Vec<Ino> = recognised
            .iter()
            .map(|(dir, _)| dir)
            .chain(moved)
            .copied()
            .collect();
        if dirs.is_empty() {
            return Vec::new();
        }
        self.editions.end_all();
        let mut notices = Vec::new();
        if let Err(err) = self.list_anew(dirs, &mut notices) {
            failed(&err);
        }
        notices
    }

    /// Whether a preset counts in a directory; also when that cannot be told.
    fn has_preset(&self, dir: Ino) -> bool {
        let node = self.ledger.node(dir).ok().flatten();
        node.is_none_or(|node| self.preset_of(&node).map_or(true, |preset| preset.is_some()))
    }

    /// Has these directories, and those below them, be listed anew.
    fn list_anew(&self, dirs: Vec<Ino>, notices: &mut Vec<Notice>) -> Result<(), TreeError> {
        let mut dirs = VecDeque::from(dirs);
        while let Some(dir) = dirs.pop_front().filter(|_| notices.len() < LISTED_ANEW) {
            notices.push(Notice::Listing { dir });
            dirs.extend(self.dirs_in(dir)?);
        }
        Ok(())
    }
}
