//! Listing directories.
//!
//! A directory that was listed once is listed again by the kernel alone, from the entries that it kept
//! (`FOPEN_CACHE_DIR`), until it is told that a name in it changed, just as it is told of each name that it keeps. Nobody
//! tells the daemon that a directory is opened, where the kernel can do without (`FUSE_NO_OPENDIR_SUPPORT`, Linux 5.1): a
//! second `find` or `git status` asks nothing. On older ones each open says whether the entries are still right.
//! When nobody asked anything for `QUIET`, what is kept of the newest `MAX_LISTINGS` is dropped: who waits for a file by
//! listing has to be heard of, or others' changes would come as slowly as to a mount that nobody uses.
//!
//! A *listing* is the entries of a directory in one edition ([`Tree::edition`](crate::namespace::tree::Tree::edition)), in
//! order, as far as somebody asked for them. Readers of the same edition share it. It asks the tree for more, a page at a
//! time, from the last name it has. A name that is made or removed meanwhile may or may not be seen, all
//! others are seen exactly once, as readdir(3) wants it.
//!
//! # Invariants
//!
//! - An offset names its listing and a place in it, so it never means another entry, whoever gave it: the kernel goes
//!   on behind an entry that it had kept for another reader when what it kept is dropped in between.
//! - A listing is there as long as somebody may be in the middle of it, also when the directory has changed since: until as
//!   many readers came to its end as began, and then while there is room; longest until `MAX_BEGUN` names are in all.
//! - What depends on more than the names of the directory (entries of an action cache that are not shown, see
//!   [`super::lookup`]) is listed anew for each reader, and the kernel drops it again.
//! - Offsets are positive for programs, and 0 is the start. Numbers of listings come again after 2^31.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use lru::LruCache;

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

#[derive(Debug)]
struct Listing {
    edition: u64,
    /// What offsets in it begin with.
    number: u64,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    entries: Vec<(Box<[u8]>, Ino, NodeKind)>,
    /// The last name asked for, and whether there may be more behind it.
    after: Option<Vec<u8>>,
    complete: bool,
    /// What it shows depends on more than the names in the directory: nobody may keep it.
    depends: bool,
}

impl Listing {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("a panic ends the process")
    }
}

/// Names asked for at once.
const PAGE: usize = 512;

/// Listings that are kept for the next reader, and names in all of them: some 20 MB.
const MAX_LISTINGS: usize = 1 << 13;
const MAX_NAMES: usize = 1 << 18;

/// Names in all listings, when readers are in the middle of some: some 80 MB.
const MAX_BEGUN: usize = 1 << 20;

/// Before the mount counts as not in use (`namespace::follow`).
const QUIET: Duration = Duration::from_secs(240);

/// Who did not go on with a listing for so long does not come back to it.
const ABANDONED: Duration = Duration::from_secs(300);

/// Listings, by their numbers: the newest of directories, and those before them that are still being read.
#[derive(Debug)]
pub(super) struct Listings {
    /// Those that were read last come first.
    all: LruCache<u64, Held>,
    newest: HashMap<Ino, u64>,
    /// In all of them.
    names: usize,
    last: u64,
}

#[derive(Debug)]
struct Held {
    dir: Ino,
    listing: Arc<Listing>,
    names: usize,
    /// Readers that began, and did not come to the end.
    begun: u32,
    /// When it was read last.
    read: Instant,
}

impl Held {
    /// Whether somebody may be in the middle of it: who stops there says so to nobody.
    fn is_begun(&self, now: Instant) -> bool {
        self.begun > 0 && now.saturating_duration_since(self.read) < ABANDONED
    }
}

impl Listings {
    pub(super) fn new() -> Self {
        Self {
            all: LruCache::unbounded(),
            newest: HashMap::new(),
            names: 0,
            last: 0,
        }
    }

    /// The newest listing of a directory, if it is of this edition.
    fn newest(&self, dir: Ino, edition: u64) -> Option<&Arc<Listing>> {
        let held = self.all.peek(self.newest.get(&dir)?)?;
        (held.listing.edition == edition).then_some(&held.listing)
    }

    /// Somebody begins to read: the newest listing of a directory, or a new one.
    fn begin(&mut self, dir: Ino, edition: u64, now: Instant) -> Arc<Listing> {
        let listing = match self.newest(dir, edition) {
            Some(listing) => Arc::clone(listing),
            None => self.make(dir, edition, now),
        };
        if let Some(held) = self.all.get_mut(&listing.number) {
            held.begun += 1;
            held.read = now;
        }
        self.limit(now);
        listing
    }

    /// A reader that began could not be answered.
    fn give_back(&mut self, listing: &Listing) {
        let Some(held) = self.all.peek_mut(&listing.number) else {
            return;
        };
        held.begun = held.begun.saturating_sub(1);
        if held.begun == 0 && held.names == 0 {
            self.remove(listing.number);
        }
    }

    fn make(&mut self, dir: Ino, edition: u64, now: Instant) -> Arc<Listing> {
        self.last += 1;
        let number = self.last & (u64::MAX >> 33);
        self.remove(number);
        let listing = Arc::new(Listing {
            edition,
            number,
            seen: Mutex::default(),
        });
        let held = Held {
            dir,
            listing: Arc::clone(&listing),
            names: 0,
            begun: 0,
            read: now,
        };
        self.newest.insert(dir, number);
        self.all.put(number, held);
        listing
    }

    fn remove(&mut self, number: u64) {
        if let Some(held) = self.all.pop(&number) {
            self.names -= held.names;
            if self.newest.get(&held.dir) == Some(&number) {
                self.newest.remove(&held.dir);
            }
        }
    }

    /// The listing of this number, for who is in the middle of it.
    fn go_on(&mut self, dir: Ino, number: u64, now: Instant) -> Option<Arc<Listing>> {
        let held = self.all.get_mut(&number).filter(|held| held.dir == dir)?;
        held.read = now;
        Some(Arc::clone(&held.listing))
    }

    /// A listing was read, and has so many names by now; `ended`: to its end; `depends`: it is for this reader only.
    fn was_read(&mut self, listing: &Listing, names: usize, ended: bool, depends: bool) {
        let number = listing.number;
        let Some(held) = self.all.peek_mut(&number) else {
            return;
        };
        // Another reader may have noted more already.
        let (names, now) = (names.max(held.names), held.read);
        self.names = self.names + names - std::mem::replace(&mut held.names, names);
        held.begun -= u32::from(ended && held.begun > 0);
        let dir = held.dir;
        if depends && self.newest.get(&dir) == Some(&number) {
            self.newest.remove(&dir);
        }
        self.limit(now);
    }

    /// Drops what was not read for long: first what nobody is in the middle of.
    fn limit(&mut self, now: Instant) {
        while self.all.len() > MAX_LISTINGS || self.names > MAX_NAMES {
            let idle = self.all.iter().rev().find(|(_, held)| !held.is_begun(now));
            let Some(number) = idle.map(|(&number, _)| number) else {
                break;
            };
            self.remove(number);
        }
        // The one that was read last stays.
        while (self.all.len() > MAX_LISTINGS || self.names > MAX_BEGUN) && self.all.len() > 1 {
            let Some(number) = self.all.peek_lru().map(|(&number, _)| number) else {
                return;
            };
            self.remove(number);
        }
    }
}

/// An offset behind the first `count` entries of a listing.
fn offset_of(listing: &Listing, count: usize) -> u64 {
    listing.number << 32 | count as u64
}

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
        let is_quiet = self.options.activity.quiet_for() >= QUIET;
        if !is_quiet || *asked {
            *asked = is_quiet;
            return;
        }
        *asked = true;
        let listed = self.listings().newest.keys().copied().collect::<Vec<_>>();
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
        let (listing, start) = self.place_of(dir, offset);
        self.read_listing(dir, up, &listing, start)
            .inspect_err(|_| self.listings().give_back(&listing))
    }

    fn read_listing(&self, dir: Ino, up: Ino, listing: &Listing, start: usize) -> Result<DirPage, VfsError> {
        let mut seen = listing.seen();
        if seen.entries.is_empty() {
            seen.entries.push((b".".as_slice().into(), dir, NodeKind::Dir));
            seen.entries.push((b"..".as_slice().into(), up, NodeKind::Dir));
        }
        while seen.entries.len() <= start + 2 && !seen.complete {
            let (names, next) = self.tree.list(dir, seen.after.as_deref(), PAGE)?;
            let (mut page, mut depends) = (Vec::with_capacity(names.len()), false);
            for (name, node) in names {
                let place = self.tree.name_rule(dir, &name)?.action;
                depends |= place.is_some();
                if !place.is_some_and(|place| self.is_known_withheld(dir, place, &node)) {
                    page.push((name.into(), node.ino, node.kind));
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
            .map(|(index, (name, ino, kind))| DirEntry {
                name: name.to_vec(),
                ino: *ino,
                kind: *kind,
                next_offset: offset_of(listing, index + 1),
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
    fn place_of(&self, dir: Ino, offset: u64) -> (Arc<Listing>, usize) {
        let (edition, now) = (self.tree.edition(dir), Instant::now());
        let mut listings = self.listings();
        if offset == 0 {
            return (listings.begin(dir, edition, now), 0);
        }
        let start = (offset & u64::from(u32::MAX)) as usize;
        // Should its listing be gone, too many having been begun since, the place is as good as any.
        let listing = listings.go_on(dir, offset >> 32, now);
        (
            listing.unwrap_or_else(|| listings.begin(dir, edition, now)),
            start,
        )
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

#[cfg(test)]
mod tests {
    use super::*;

    const DIR: Ino = Ino(7);

    fn now() -> Instant {
        Instant::now()
    }

    /// As a reader that reads all of it.
    fn read_all(listings: &mut Listings, dir: Ino, edition: u64, names: usize) -> Arc<Listing> {
        let listing = listings.begin(dir, edition, now());
        listings.was_read(&listing, names, false, false);
        listings.was_read(&listing, names, true, false);
        listing
    }

    #[test]
    fn readers_of_one_edition_share_a_listing() {
        let mut listings = Listings::new();
        assert!(listings.newest(DIR, 1).is_none());
        let one = read_all(&mut listings, DIR, 1, 10);
        assert!(Arc::ptr_eq(&one, &listings.begin(DIR, 1, now())));
        assert!(listings.newest(DIR, 1).is_some());
        let two = listings.begin(DIR, 2, now());
        assert!(!Arc::ptr_eq(&one, &two));
        assert!(listings.newest(DIR, 1).is_none());
        assert_ne!(offset_of(&one, 3), offset_of(&two, 3));
        assert_eq!(listings.go_on(DIR, two.number, now()).unwrap().edition, 2);
        assert!(
            listings.go_on(Ino(8), two.number, now()).is_none(),
            "of another directory"
        );
    }

    #[test]
    fn who_is_in_the_middle_keeps_a_listing_that_others_would_push_out() {
        let mut listings = Listings::new();
        let middle = listings.begin(DIR, 1, now());
        listings.was_read(&middle, 100, false, false);
        for edition in 2..20_000 {
            read_all(&mut listings, Ino(edition % 3 + 7), edition, 100);
        }
        assert!(listings.go_on(DIR, middle.number, now()).is_some());
        assert!(listings.names <= MAX_NAMES && listings.all.len() <= MAX_LISTINGS);
        assert_eq!(listings.newest.len(), 3);
        listings.was_read(&middle, 100, true, false);
        for edition in 20_000..40_000 {
            read_all(&mut listings, Ino(8), edition, 100);
        }
        assert!(
            listings.go_on(DIR, middle.number, now()).is_none(),
            "it was read to its end"
        );
    }

    #[test]
    fn names_have_a_limit_whoever_is_in_the_middle() {
        let mut listings = Listings::new();
        for dir in 1..100_u64 {
            let begun = listings.begin(Ino(dir), 1, now());
            listings.was_read(&begun, MAX_BEGUN / 8, false, false);
            assert!(listings.names <= MAX_BEGUN);
            assert!(listings.go_on(Ino(dir), begun.number, now()).is_some());
        }
        let sum: usize = listings.all.iter().map(|(_, held)| held.names).sum();
        assert_eq!(listings.names, sum);
        assert!(listings.newest.len() <= listings.all.len());
        // One that is longer than all that may be kept is there while it is read.
        let long = listings.begin(DIR, 2, now());
        listings.was_read(&long, 2 * MAX_BEGUN, false, false);
        assert!(listings.go_on(DIR, long.number, now()).is_some());
        assert_eq!(listings.all.len(), 1);
        listings.was_read(&long, 2 * MAX_BEGUN, true, false);
        assert!(listings.all.is_empty());
        assert_eq!((listings.names, listings.newest.len()), (0, 0));
    }

    #[test]
    fn who_stops_in_the_middle_or_is_not_answered_leaves_nothing_for_long() {
        let mut listings = Listings::new();
        let began = now();
        let stub = listings.begin(DIR, 1, began);
        listings.give_back(&stub);
        assert!(listings.all.is_empty() && listings.newest.is_empty());
        let stopped = listings.begin(DIR, 1, began);
        listings.was_read(&stopped, MAX_NAMES, false, false);
        let later = began + ABANDONED;
        let other = listings.begin(Ino(8), 1, later);
        listings.was_read(&other, 1, false, false);
        assert_eq!((listings.names, listings.all.len()), (1, 1));
    }

    #[test]
    fn a_listing_for_one_reader_is_given_to_no_other() {
        let mut listings = Listings::new();
        let mine = listings.begin(DIR, 1, now());
        listings.was_read(&mine, 10, false, true);
        assert!(!Arc::ptr_eq(&mine, &listings.begin(DIR, 1, now())));
        assert!(listings.go_on(DIR, mine.number, now()).is_some(), "it goes on");
    }
}
