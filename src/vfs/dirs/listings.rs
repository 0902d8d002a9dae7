//! The listings that are kept, and what offsets in them mean.
//!
//! An offset names a listing, a place in it and the name before that place, so that it can be found again in whatever
//! order listings are evicted:
//!
//! ```text
//! 1 bit 0 | 15 bits number of the listing, never 0 | 20 bits entries before it | 28 bits mark of the last of them
//! ```
//!
//! The mark is of the name alone, drawn with a key of this process. Numbers and places come again (after 32,767 listings,
//! after 2^20 names), the number of a listing that is held never: with the mark, a listing whose number came again is
//! taken for the one before only where the same name is at the same place, behind which it goes on as well.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use lru::LruCache;

use crate::store::rows::{Ino, NodeKind};

/// Who did not go on with a listing for so long does not come back to it.
pub(super) const ABANDONED: Duration = Duration::from_secs(300);

const NUMBER_BITS: u32 = 15;
const COUNT_BITS: u32 = 20;
const MARK_BITS: u32 = 28;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Fewer than there are numbers.
    pub listings: usize,
    /// In all of them, for the next reader.
    pub names: usize,
    /// In all of them, when readers are in the middle of some.
    pub begun: usize,
}

impl Default for Limits {
    /// Some 20 MB, and some 80 MB while they are read.
    fn default() -> Self {
        Self {
            listings: 1 << 13,
            names: 1 << 18,
            begun: 1 << 20,
        }
    }
}

/// What an offset says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    number: u16,
    count: u32,
    mark: u32,
}

impl Place {
    /// `None` for the start.
    pub fn decode(offset: u64) -> Option<Self> {
        (offset != 0).then_some(Self {
            number: (offset >> (COUNT_BITS + MARK_BITS)) as u16 & ((1 << NUMBER_BITS) - 1),
            count: (offset >> MARK_BITS) as u32 & ((1 << COUNT_BITS) - 1),
            mark: offset as u32 & ((1 << MARK_BITS) - 1),
        })
    }

    fn encode(self) -> u64 {
        (u64::from(self.number) << COUNT_BITS | u64::from(self.count)) << MARK_BITS | u64::from(self.mark)
    }

    /// Whether it is behind this name.
    pub fn is_behind(self, marks: &Marks, name: &[u8]) -> bool {
        marks.of(name) == self.mark
    }

    /// How many entries were before it, but for whole multiples of 2^20.
    pub fn count(self) -> usize {
        self.count as usize
    }
}

/// Gives names their marks.
#[derive(Clone, Debug, Default)]
pub(super) struct Marks(RandomState);

impl Marks {
    pub fn of(&self, name: &[u8]) -> u32 {
        (self.0.hash_one(name) >> (u64::BITS - MARK_BITS)) as u32
    }
}

#[derive(Debug)]
pub(super) struct Entry {
    pub name: Box<[u8]>,
    pub ino: Ino,
    pub kind: NodeKind,
    pub mark: u32,
}

#[derive(Debug)]
pub(super) struct Listing {
    edition: u64,
    /// What offsets in it begin with.
    number: u16,
    /// Entries before its first one, when it goes on with another one that is gone.
    skipped: usize,
    marks: Marks,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
pub(super) struct Seen {
    pub entries: Vec<Entry>,
    /// The last name asked for, and whether there may be more behind it.
    pub after: Option<Vec<u8>>,
    pub complete: bool,
    /// What it shows depends on more than the names in the directory: nobody may keep it.
    pub depends: bool,
}

impl Listing {
    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("a panic ends the process")
    }

    pub fn entry(&self, name: &[u8], ino: Ino, kind: NodeKind) -> Entry {
        Entry {
            mark: self.marks.of(name),
            name: name.into(),
            ino,
            kind,
        }
    }

    /// Whether it has `.` and `..`.
    pub fn is_from_start(&self) -> bool {
        self.skipped == 0
    }

    /// The offset behind the first `count` entries, the last of which has this mark.
    pub fn offset_of(&self, count: usize, mark: u32) -> u64 {
        let count = (self.skipped + count) as u32 & ((1 << COUNT_BITS) - 1);
        let number = self.number;
        Place { number, count, mark }.encode()
    }

    /// How many entries are before a place in this listing; `None` if it is in another one, which had the same number.
    pub fn find(&self, place: Place) -> Option<usize> {
        let seen = self.seen();
        let round = 1 << COUNT_BITS;
        let first = (place.count() + round - self.skipped % round) % round;
        let mut counts = (first..=seen.entries.len()).step_by(round);
        counts.find(|&count| count > 0 && seen.entries[count - 1].mark == place.mark)
    }
}

/// Listings, by their numbers: the newest of directories, and those before them that are still being read.
#[derive(Debug)]
pub(in crate::vfs) struct Listings {
    limits: Limits,
    pub(super) marks: Marks,
    /// Those that were read last come first.
    all: LruCache<u16, Held>,
    newest: HashMap<Ino, u16>,
    /// In all of them.
    names: usize,
    last: u16,
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
    pub(in crate::vfs) fn new() -> Self {
        Self::with(Limits::default())
    }

    pub(super) fn with(limits: Limits) -> Self {
        Self {
            limits,
            marks: Marks::default(),
            all: LruCache::unbounded(),
            newest: HashMap::new(),
            names: 0,
            last: 0,
        }
    }

    /// The newest listing of a directory, if it is of this edition.
    pub(super) fn newest(&self, dir: Ino, edition: u64) -> Option<&Arc<Listing>> {
        let held = self.all.peek(self.newest.get(&dir)?)?;
        (held.listing.edition == edition).then_some(&held.listing)
    }

    /// Directories of which the newest listing is here.
    pub(super) fn listed(&self) -> Vec<Ino> {
        self.newest.keys().copied().collect()
    }

    /// Somebody begins to read: the newest listing of a directory, or a new one.
    pub(super) fn begin(&mut self, dir: Ino, edition: u64, now: Instant) -> Arc<Listing> {
        let listing = if let Some(listing) = self.newest(dir, edition) {
            Arc::clone(listing)
        } else {
            let listing = self.make(dir, edition, 0, now);
            self.newest.insert(dir, listing.number);
            listing
        };
        self.began(&listing, now);
        listing
    }

    /// Somebody goes on behind a name, and has had `skipped` entries from a listing that is gone.
    pub(super) fn resume(
        &mut self,
        dir: Ino,
        edition: u64,
        name: Vec<u8>,
        skipped: usize,
        now: Instant,
    ) -> Arc<Listing> {
        // It does not begin at the start, also when that many were skipped that their number begins anew.
        let skipped = if skipped == 0 { 1 << COUNT_BITS } else { skipped };
        let listing = self.make(dir, edition, skipped, now);
        listing.seen().after = Some(name);
        self.began(&listing, now);
        listing
    }

    fn began(&mut self, listing: &Listing, now: Instant) {
        if let Some(held) = self.all.get_mut(&listing.number) {
            held.begun += 1;
            held.read = now;
        }
        self.limit(now);
    }

    /// A reader that began could not be answered.
    pub(super) fn give_back(&mut self, listing: &Listing) {
        let Some(held) = self.all.peek_mut(&listing.number) else {
            return;
        };
        held.begun = held.begun.saturating_sub(1);
        if held.begun == 0 && held.names == 0 {
            self.remove(listing.number);
        }
    }

    fn make(&mut self, dir: Ino, edition: u64, skipped: usize, now: Instant) -> Arc<Listing> {
        loop {
            self.last = self.last % ((1 << NUMBER_BITS) - 1) + 1;
            if !self.all.contains(&self.last) {
                break;
            }
        }
        let listing = Arc::new(Listing {
            edition,
            number: self.last,
            skipped,
            marks: self.marks.clone(),
            seen: Mutex::default(),
        });
        let held = Held {
            dir,
            listing: Arc::clone(&listing),
            names: 0,
            begun: 0,
            read: now,
        };
        self.all.put(self.last, held);
        listing
    }

    fn remove(&mut self, number: u16) {
        if let Some(held) = self.all.pop(&number) {
            self.names -= held.names;
            if self.newest.get(&held.dir) == Some(&number) {
                self.newest.remove(&held.dir);
            }
        }
    }

    /// The listing in which a place is, for who is in the middle of it.
    pub(super) fn go_on(&mut self, dir: Ino, place: Place, now: Instant) -> Option<Arc<Listing>> {
        let held = self.all.get_mut(&place.number).filter(|held| held.dir == dir)?;
        held.read = now;
        Some(Arc::clone(&held.listing))
    }

    /// A listing was read, and has so many names by now; `ended`: to its end; `depends`: it is for this reader only.
    pub(super) fn was_read(&mut self, listing: &Listing, names: usize, ended: bool, depends: bool) {
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
        let limits = self.limits;
        while self.all.len() > limits.listings || self.names > limits.names {
            let idle = self.all.iter().rev().find(|(_, held)| !held.is_begun(now));
            let Some(number) = idle.map(|(&number, _)| number) else {
                break;
            };
            self.remove(number);
        }
        // The one that was read last stays.
        while (self.all.len() > limits.listings || self.names > limits.begun) && self.all.len() > 1 {
            let Some(number) = self.all.peek_lru().map(|(&number, _)| number) else {
                return;
            };
            self.remove(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIR: Ino = Ino(7);

    const LIMITS: Limits = Limits {
        listings: 100,
        names: 2_000,
        begun: 8_000,
    };

    fn now() -> Instant {
        Instant::now()
    }

    /// Any place in a listing.
    fn place(listing: &Listing) -> Place {
        Place::decode(listing.offset_of(3, 7)).unwrap()
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
        let mut listings = Listings::with(LIMITS);
        assert!(listings.newest(DIR, 1).is_none());
        let one = read_all(&mut listings, DIR, 1, 10);
        assert!(Arc::ptr_eq(&one, &listings.begin(DIR, 1, now())));
        assert!(listings.newest(DIR, 1).is_some());
        let two = listings.begin(DIR, 2, now());
        assert!(!Arc::ptr_eq(&one, &two));
        assert!(listings.newest(DIR, 1).is_none());
        assert_ne!(one.offset_of(3, 7), two.offset_of(3, 7));
        assert!(Arc::ptr_eq(
            &two,
            &listings.go_on(DIR, place(&two), now()).unwrap()
        ));
        assert!(
            listings.go_on(Ino(8), place(&two), now()).is_none(),
            "of another directory"
        );
    }

    #[test]
    fn who_is_in_the_middle_keeps_a_listing_that_others_would_push_out() {
        let mut listings = Listings::with(LIMITS);
        let middle = listings.begin(DIR, 1, now());
        listings.was_read(&middle, 100, false, false);
        for edition in 2..400 {
            read_all(&mut listings, Ino(edition % 3 + 7), edition, 100);
        }
        assert!(listings.go_on(DIR, place(&middle), now()).is_some());
        assert!(listings.names <= LIMITS.names && listings.all.len() <= LIMITS.listings);
        assert_eq!(listings.newest.len(), 3);
        listings.was_read(&middle, 100, true, false);
        for edition in 400..800 {
            read_all(&mut listings, Ino(8), edition, 100);
        }
        assert!(
            listings.go_on(DIR, place(&middle), now()).is_none(),
            "it was read to its end"
        );
    }

    #[test]
    fn names_have_a_limit_whoever_is_in_the_middle() {
        let mut listings = Listings::with(LIMITS);
        for dir in 1..100_u64 {
            let begun = listings.begin(Ino(dir), 1, now());
            listings.was_read(&begun, LIMITS.begun / 8, false, false);
            assert!(listings.names <= LIMITS.begun);
            assert!(listings.go_on(Ino(dir), place(&begun), now()).is_some());
        }
        let sum: usize = listings.all.iter().map(|(_, held)| held.names).sum();
        assert_eq!(listings.names, sum);
        assert!(listings.newest.len() <= listings.all.len());
        // One that is longer than all that may be kept is there while it is read.
        let long = listings.begin(DIR, 2, now());
        listings.was_read(&long, 2 * LIMITS.begun, false, false);
        assert!(listings.go_on(DIR, place(&long), now()).is_some());
        assert_eq!(listings.all.len(), 1);
        listings.was_read(&long, 2 * LIMITS.begun, true, false);
        assert!(listings.all.is_empty());
        assert_eq!((listings.names, listings.newest.len()), (0, 0));
    }

    #[test]
    fn who_stops_in_the_middle_or_is_not_answered_leaves_nothing_for_long() {
        let mut listings = Listings::with(LIMITS);
        let began = now();
        let stub = listings.begin(DIR, 1, began);
        listings.give_back(&stub);
        assert!(listings.all.is_empty() && listings.newest.is_empty());
        let stopped = listings.begin(DIR, 1, began);
        listings.was_read(&stopped, LIMITS.names, false, false);
        let later = began + ABANDONED;
        let other = listings.begin(Ino(8), 1, later);
        listings.was_read(&other, 1, false, false);
        assert_eq!((listings.names, listings.all.len()), (1, 1));
    }

    #[test]
    fn a_listing_for_one_reader_is_given_to_no_other() {
        let mut listings = Listings::with(LIMITS);
        let mine = listings.begin(DIR, 1, now());
        listings.was_read(&mine, 10, false, true);
        assert!(!Arc::ptr_eq(&mine, &listings.begin(DIR, 1, now())));
        assert!(listings.go_on(DIR, place(&mine), now()).is_some(), "it goes on");
    }

    #[test]
    fn a_place_is_found_in_its_listing_whatever_its_number_was_before() {
        let mut listings = Listings::with(LIMITS);
        let listing = listings.begin(DIR, 1, now());
        for name in [b"a".as_slice(), b"b", b"c"] {
            let entry = listing.entry(name, Ino(1), NodeKind::File);
            listing.seen().entries.push(entry);
        }
        let mark = |name: &[u8]| listing.marks.of(name);
        let at = |count, name| Place::decode(listing.offset_of(count, mark(name))).unwrap();
        assert_eq!(Place::decode(0), None);
        assert_eq!(Place::decode(at(2, b"b").encode()), Some(at(2, b"b")));
        assert!(i64::try_from(at(2, b"b").encode()).is_ok());
        assert_eq!(listing.find(at(2, b"b")), Some(2));
        assert_eq!(listing.find(at(2, b"other")), None);
        assert_eq!(listing.find(at(4, b"d")), None);
        assert!(at(2, b"b").is_behind(&listing.marks, b"b"));
        // One that goes on with another, also where the count of that one began anew.
        for skipped in [0, 5, (1 << COUNT_BITS) - 1] {
            let rest = listings.resume(DIR, 1, b"c".to_vec(), skipped, now());
            assert!(!rest.is_from_start());
            for name in [b"d", b"e"] {
                let entry = rest.entry(name, Ino(1), NodeKind::File);
                rest.seen().entries.push(entry);
            }
            for (count, name) in [(1, b"d"), (2, b"e")] {
                let place = Place::decode(rest.offset_of(count, mark(name))).unwrap();
                assert_eq!(place.count(), (skipped + count) % (1 << COUNT_BITS));
                assert_eq!(rest.find(place), Some(count));
            }
            let other = listings.begin(DIR, 1, now());
            assert!(Arc::ptr_eq(&other, &listing), "it is for nobody who begins");
        }
    }

    #[test]
    fn numbers_come_again_but_never_that_of_a_listing_that_is_held() {
        let mut listings = Listings::with(LIMITS);
        let middle = listings.begin(DIR, 1, now());
        listings.was_read(&middle, 1, false, false);
        let mut numbers = Vec::new();
        for edition in 1..=1 << NUMBER_BITS {
            let other = read_all(&mut listings, Ino(8), edition, 1);
            assert_ne!(other.number, middle.number);
            assert!(other.number > 0 && other.number >> NUMBER_BITS == 0);
            numbers.push(other.number);
        }
        assert_eq!(numbers[0], numbers[(1 << NUMBER_BITS) - 2], "they come again");
        let found = listings.go_on(DIR, place(&middle), now()).unwrap();
        assert!(Arc::ptr_eq(&found, &middle));
    }
}
