//! What of a volume's log still counts: folds its changes, in the order of their segments, into references.
//!
//! Pure: no request, no clock.
//!
//! # Invariants
//!
//! - A change that any view of the volume can show is a reference: that of the greatest stamp now, those that were
//!   it at a moment at which a fork or snapshot sees the volume, and those that were it within the last window.
//! - So is every change that was published within the last window, whatever its stamp: a machine may have
//!   seen it before the one that counts.
//!
//! Which of two changes counts is [`super::super::tree`]'s law 1. The other laws add nothing: a path that a directory
//! hides, or that a fork says otherwise of, is a reference all the same.
//!
//! # Memory
//!
//! 72 bytes a path. Paths are divided by their hash into parts, one a reading of the log, so that it has a limit.

use std::collections::{HashMap, hash_map::Entry};

use super::marks::Marks;
use crate::base::{clock::Stamp, digest::Digest};

/// Names that are held at once.
pub const MAX_NAMES: usize = 1_800_000;

/// At which moments somebody sees a volume.
#[derive(Clone, Debug, Default)]
pub struct Views {
    /// From here on at all.
    from_millis: u64,
    /// And at these: what was published up to then. Ascending.
    moments: Vec<u64>,
}

impl Views {
    pub fn new(from_millis: u64, mut moments: Vec<u64>) -> Self {
        moments.sort_unstable();
        Self { from_millis, moments }
    }

    /// Whether anybody sees what was there from `from` until just before `until`.
    fn show(&self, from: u64, until: u64) -> bool {
        let before = |at: u64| self.moments.partition_point(|moment| *moment < at);
        until > self.from_millis || before(from) < before(until)
    }
}

/// The marks of what an entry refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Held {
    #[default]
    Nothing,
    One(u64),
    Two(u64, u64),
    Many(Box<[u64]>),
}

impl Held {
    pub fn new(mut marks: Vec<u64>) -> Self {
        marks.sort_unstable();
        marks.dedup();
        match marks[..] {
            [] => Self::Nothing,
            [one] => Self::One(one),
            [one, two] => Self::Two(one, two),
            _ => Self::Many(marks.into()),
        }
    }

    pub fn marks(&self) -> impl Iterator<Item = u64> {
        let (few, many) = match self {
            Self::Nothing => ([None, None], &[][..]),
            Self::One(one) => ([Some(*one), None], &[][..]),
            Self::Two(one, two) => ([Some(*one), Some(*two)], &[][..]),
            Self::Many(many) => ([None, None], &many[..]),
        };
        few.into_iter().flatten().chain(many.iter().copied())
    }

    pub fn add_to(&self, marks: &mut Marks) {
        self.marks().for_each(|mark| marks.add(mark));
    }
}

#[derive(Debug)]
struct Winner {
    stamp: Stamp,
    /// When it was published.
    since: u64,
    is_live: bool,
    held: Held,
}

/// Which share of all paths is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub number: u64,
    pub of: u64,
}

/// More paths than can be held at once: the log is to be read in smaller parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

/// Whether a catalog has what a segment says of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InCatalog {
    /// That, or something later.
    Yes,
    /// Something earlier.
    No,
    /// Nothing.
    Absent,
    /// The path is of another part.
    Elsewhere,
}

/// The changes that count so far.
#[derive(Debug)]
pub struct Winners<'a> {
    views: &'a Views,
    part: Part,
    names: HashMap<u128, Winner>,
    marks: &'a mut Marks,
}

impl<'a> Winners<'a> {
    pub fn new(views: &'a Views, part: Part, marks: &'a mut Marks) -> Self {
        Self {
            views,
            part,
            names: HashMap::new(),
            marks,
        }
    }

    /// Takes in a register of the catalog that is read before all segments.
    pub fn begin(&mut self, path: &[u8], stamp: Stamp, held: Option<Held>) -> Result<(), TooMany> {
        self.add(0, path, stamp, held)
    }

    /// Whether what was taken in has a change, or a later one of its path.
    pub fn has(&self, path: &[u8], stamp: Stamp) -> InCatalog {
        match self.name(path).map(|name| self.names.get(&name)) {
            None => InCatalog::Elsewhere,
            Some(None) => InCatalog::Absent,
            Some(Some(winner)) if winner.stamp >= stamp => InCatalog::Yes,
            Some(Some(_)) => InCatalog::No,
        }
    }

    /// Takes in a change of a segment that was published at `published`, which never goes back.
    ///
    /// `held`: what its entry refers to; `None`: it says that there is nothing.
    pub fn add(
        &mut self,
        published: u64,
        path: &[u8],
        stamp: Stamp,
        held: Option<Held>,
    ) -> Result<(), TooMany> {
        let Some(name) = self.name(path) else {
            return Ok(());
        };
        let is_live = held.is_some();
        let change = Winner {
            stamp,
            since: published,
            is_live,
            held: held.unwrap_or_default(),
        };
        let full = self.names.len() >= MAX_NAMES;
        match self.names.entry(name) {
            Entry::Vacant(_) if full => return Err(TooMany),
            Entry::Vacant(vacant) => {
                vacant.insert(change);
            }
            Entry::Occupied(mut winner) if stamp > winner.get().stamp => {
                let loser = winner.insert(change);
                if self.views.show(loser.since, published) {
                    loser.held.add_to(self.marks);
                }
            }
            // Published again, with other places perhaps: both are good, for as long as it counts.
            Entry::Occupied(mut winner) if stamp == winner.get().stamp => {
                let winner = winner.get_mut();
                if winner.held != change.held {
                    winner.held = Held::new(winner.held.marks().chain(change.held.marks()).collect());
                }
            }
            // It was late: nobody shows it who has read everything before.
            Entry::Occupied(_) => {
                if published > self.views.from_millis {
                    change.held.add_to(self.marks);
                }
            }
        }
        Ok(())
    }

    /// Ends the fold: what counts now is used. Returns how many names there are.
    pub fn finish(self) -> u64 {
        let mut live = 0;
        for winner in self.names.into_values() {
            live += u64::from(winner.is_live);
            winner.held.add_to(self.marks);
        }
        live
    }

    /// What stands for a path; `None` if it is of another part.
    fn name(&self, path: &[u8]) -> Option<u128> {
        let digest = Digest::of(path);
        let (name, _) = digest
            .as_bytes()
            .split_first_chunk::<16>()
            .expect("a digest has 32 bytes");
        let name = u128::from_be_bytes(*name);
        ((name as u64) % self.part.of == self.part.number).then_some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::id::MachineId;

    const ALL: Part = Part { number: 0, of: 1 };

    fn stamp(millis: u64) -> Stamp {
        Stamp {
            millis,
            counter: 0,
            machine: MachineId(1),
        }
    }

    /// Folds (published, stamp, blob), all of one path; returns the blobs that are in use.
    fn used(views: &Views, changes: &[(u64, u64, Option<u64>)]) -> Vec<u64> {
        let mut marks = Marks::default();
        let mut winners = Winners::new(views, ALL, &mut marks);
        for (published, millis, blob) in changes {
            let held = blob.map(Held::One);
            winners.add(*published, b"a", stamp(*millis), held).unwrap();
        }
        winners.finish();
        marks.sort();
        (0..10).filter(|blob| marks.has(*blob)).collect()
    }

    #[test]
    fn what_counts_now_is_used_and_what_was_replaced_long_ago_is_not() {
        let views = Views::new(1000, Vec::new());
        assert_eq!(used(&views, &[(10, 1, Some(1)), (20, 2, Some(2))]), [2]);
        assert_eq!(used(&views, &[(10, 1, Some(1)), (20, 2, None)]), [0_u64; 0]);
        // The one that came first is the later one.
        assert_eq!(used(&views, &[(10, 2, Some(2)), (20, 1, Some(1))]), [2]);
    }

    #[test]
    fn what_was_replaced_within_the_window_is_used() {
        let views = Views::new(1000, Vec::new());
        assert_eq!(used(&views, &[(10, 1, Some(1)), (1001, 2, None)]), [1]);
        assert_eq!(used(&views, &[(10, 1, Some(1)), (1000, 2, None)]), [0_u64; 0]);
        assert_eq!(used(&views, &[(10, 2, Some(2)), (1001, 1, Some(1))]), [1, 2]);
    }

    #[test]
    fn what_a_fork_sees_at_its_moment_is_used() {
        let changes = [(10, 1, Some(1)), (20, 2, Some(2)), (30, 3, Some(3))];
        for (moment, expected) in [
            (9, vec![3]),
            (10, vec![1, 3]),
            (19, vec![1, 3]),
            (20, vec![2, 3]),
            (30, vec![3]),
        ] {
            let views = Views::new(1000, vec![moment]);
            assert_eq!(used(&views, &changes), expected, "at {moment}");
        }
        let views = Views::new(1000, vec![25, 12]);
        assert_eq!(used(&views, &changes), [1, 2, 3]);
    }

    #[test]
    fn a_change_that_was_published_again_keeps_both_of_its_places() {
        let views = Views::new(1000, Vec::new());
        let twice = [(10, 1, Some(1)), (20, 1, Some(2)), (30, 2, None)];
        assert_eq!(used(&views, &twice[..2]), [1, 2]);
        assert_eq!(used(&views, &twice), [0_u64; 0]);
    }

    #[test]
    fn parts_are_all_of_it() {
        let mut marks = Marks::default();
        let views = Views::default();
        let mut names = 0;
        for number in 0..3 {
            let mut winners = Winners::new(&views, Part { number, of: 3 }, &mut marks);
            for path in 0..100_u64 {
                let held = Some(Held::One(path));
                winners.add(1, &path.to_le_bytes(), stamp(1), held).unwrap();
            }
            names += winners.finish();
        }
        marks.sort();
        assert_eq!(names, 100);
        assert!((0..100).all(|path| marks.has(path)));
    }
}
