//! Listing directories.
//!
//! A directory that was listed once is listed again by the kernel alone, from the entries that it kept
//! (`FOPEN_CACHE_DIR`), until it is told that a name in it changed, just as it is told of each name that it keeps. Nobody
//! tells the daemon that a directory is opened, where the kernel can do without (`FUSE_NO_OPENDIR_SUPPORT`, Linux 5.1): a
//! second `find` or `git status` asks nothing. On older ones each open says whether the entries are still right.
//! When nobody asked anything for four fifths of the time after which a mount counts as not in use (4 minutes), what is kept of
//! those that are listed here is dropped: who waits for a file by listing has to be heard of, or others' changes would come
//! as slowly as to a mount that nobody uses.
//!
//! A *listing* is the entries of a directory in one edition ([`Tree::edition`](crate::namespace::tree::Tree::edition)), in
//! order, as far as somebody asked for them. Readers of the same edition share it. It asks the tree for more, a page at a
//! time, from the last name it has. A name that is made or removed meanwhile may or may not be seen, all
//! others are seen exactly once, as readdir(3) wants it.
//!
//! # Invariants
//!
//! - An offset names its listing, a place in it and the name before that, so it never means another entry, whoever gave it:
//!   the kernel goes on behind an entry that it had kept for another reader when what it kept is dropped in between.
//! - A listing is there as long as somebody may be in the middle of it, also when the directory has changed since: until as
//!   many readers came to its end as began, and then while there is room; longest until `Limits::begun` names are in all.
//! - Who goes on at an offset of a listing that is gone goes on behind that name, in a listing that begins there: a name that
//!   was deleted has left a tombstone, and names are listed in one order, so nothing is missed or seen twice. This costs
//!   one look through the registers of the directory.
//! - What depends on more than the names of the directory (entries of an action cache that are not shown, see
//!   [`super::lookup`]) is listed anew for each reader, and the kernel drops it again.
//! - Offsets are positive for programs, and 0 is the start.
//!
//! What is not held: a name of this machine alone leaves no tombstone when it is deleted, and those of a directory that is
//! renamed stay behind. Who is to go on behind such a name, when its listing is gone as well, begins anew: names are
//! better seen twice than not at all.

mod listings;
#[cfg(test)]
mod tests;

use std::{
    sync::{Arc, MutexGuard},
    time::Instant,
};

pub(super) use listings::Listings;
use listings::{Listing, Place};

use super::{Attr, Keep, Vfs, VfsError};
use crate::{
    namespace::{TreeError, tree::Notice},
    store::rows::{Ino, NodeKind},
};

/// One entry of a directory.
#[derive(Clone, Debug)]
pub struct DirEntry {
    pub name: Vec<u8>,
    pub ino: Ino,
    pub kind: NodeKind,
    /// Where to go on behind this entry.
    pub next_offset: u64,
}

/// Entries from an offset on; empty at the end.
pub type DirPage = Vec<DirEntry>;

/// Names asked for at once.
const PAGE: usize = 512;

impl Vfs {
    /// For kernels that open directories: whether the entries that they kept of one are still right.
    pub fn open_dir(&self, ino: Ino) -> bool {
        self.used();
        self.tree.touch(ino);
        self.listings().newest(ino, self.tree.edition(ino)).is_some()
    }

    /// Has the kernel drop what it keeps of directories, once in a while without requests: who lists one again and again, to wait
    /// for a file, is heard of then, and the mount is in use. `asked`: since the last request.
    pub(super) fn ask_who_lists(&self, asked: &mut bool) {
        // Early enough that the mount is never taken for one that nobody uses.
        let is_quiet = self.options.activity.quiet_for() >= self.options.rests_after / 5 * 4;
        if !is_quiet || *asked {
            *asked = is_quiet;
            return;
        }
        *asked = true;
        let listed = self.listings().listed();
        self.tell(listed.into_iter().map(|dir| Notice::Listing { dir }).collect());
    }

    fn listings(&self) -> MutexGuard<'_, Listings> {
        self.listings.lock().expect("a panic ends the process")
    }

    /// Entries from `offset` on, `.` and `..` first. Offset 0 looks at the directory anew.
    pub fn read_dir(&self, dir: Ino, offset: u64) -> Result<DirPage, VfsError> {
        self.used();
        self.tree.touch(dir);
        let node = self.tree.node(dir)?.ok_or(TreeError::NotFound)?;
        let up = node.dir.as_ref().ok_or(TreeError::NotDirectory)?.up;
        let (listing, start) = self.place_of(dir, offset)?;
        self.read_listing(dir, up, &listing, start)
            .inspect_err(|_| self.listings().give_back(&listing))
    }

    fn read_listing(&self, dir: Ino, up: Ino, listing: &Listing, start: usize) -> Result<DirPage, VfsError> {
        let mut seen = listing.seen();
        if seen.entries.is_empty() && listing.is_from_start() {
            seen.entries.push(listing.entry(b".", dir, NodeKind::Dir));
            seen.entries.push(listing.entry(b"..", up, NodeKind::Dir));
        }
        while seen.entries.len() <= start + 2 && !seen.complete {
            let (names, next) = self.tree.list(dir, seen.after.as_deref(), PAGE)?;
            let (mut page, mut depends) = (Vec::with_capacity(names.len()), false);
            for (name, node) in names {
                let place = self.tree.name_rule(dir, &name)?.action;
                depends |= place.is_some();
                if !place.is_some_and(|place| self.is_known_withheld(dir, place, &node)) {
                    page.push(listing.entry(&name, node.ino, node.kind));
                }
            }
            // All of the page, or nothing of it.
            seen.depends |= depends;
            seen.entries.append(&mut page);
            seen.complete = next.is_none();
            seen.after = next;
        }
        let entries = seen.entries.iter().enumerate().skip(start).take(PAGE);
        let page: DirPage = entries
            .map(|(index, entry)| DirEntry {
                name: entry.name.to_vec(),
                ino: entry.ino,
                kind: entry.kind,
                next_offset: listing.offset_of(index + 1, entry.mark),
            })
            .collect();
        let (names, depends) = (seen.entries.len(), seen.depends);
        drop(seen);
        self.listings().was_read(listing, names, page.is_empty(), depends);
        // The kernel gives nobody what it keeps before it has all of it.
        if depends && page.is_empty() {
            self.tell(vec![Notice::Listing { dir }]);
        }
        Ok(page)
    }

    /// The listing in which an offset is, and how many entries are before it.
    fn place_of(&self, dir: Ino, offset: u64) -> Result<(Arc<Listing>, usize), VfsError> {
        let (edition, now) = (self.tree.edition(dir), Instant::now());
        let Some(place) = Place::decode(offset) else {
            return Ok((self.listings().begin(dir, edition, now), 0));
        };
        let held = self.listings().go_on(dir, place, now);
        if let Some(listing) = held
            && let Some(start) = listing.find(place)
        {
            return Ok((listing, start));
        }
        self.resume_at(dir, place, edition, now)
    }

    /// Where to go on at a place in a listing that is gone.
    fn resume_at(
        &self,
        dir: Ino,
        place: Place,
        edition: u64,
        now: Instant,
    ) -> Result<(Arc<Listing>, usize), VfsError> {
        let marks = self.listings().marks.clone();
        // Those two are in every listing, and in none of the registers.
        for (count, name) in [(1, b".".as_slice()), (2, b"..")] {
            if place.count() == count && place.is_behind(&marks, name) {
                return Ok((self.listings().begin(dir, edition, now), count));
            }
        }
        let name = self.tree.find_known(dir, |name| place.is_behind(&marks, name))?;
        let mut listings = self.listings();
        Ok(match name {
            Some(name) => (listings.resume(dir, edition, name, place.count(), now), 0),
            // Nobody knows where that was: better seen twice than not at all.
            None => (listings.begin(dir, edition, now), 0),
        })
    }

    /// Attributes of what an entry that was listed is now; `None` if there is no such name any more. A file that took the place
    /// of the one that was listed is the entry then: the name was there all the time.
    pub fn entry_attr(&self, dir: Ino, entry: &DirEntry) -> Result<Option<(Attr, Keep)>, VfsError> {
        let (node, keep) = if matches!(entry.name.as_slice(), b"." | b"..") {
            (self.tree.node(entry.ino)?, Keep::Long)
        } else {
            let node = self.tree.lookup(dir, &entry.name)?;
            (node, self.keep_of(dir, &entry.name)?)
        };
        Ok(node.map(|node| (self.attr_of(&node), keep)))
    }
}
