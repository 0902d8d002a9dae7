//! Which places in the order of changes were given out a moment ago.
//!
//! The close of a file that was just created is told late: `close(2)` does not wait for it, to
//! save a request. By the time it is recorded its program may have made the next file, which may
//! build on the first. So the first close of a file counts as made before everything that got its
//! place within the last moments, and a directory whose attributes were set in that time is told once
//! more: `tar` and `cp -a` set its times when they have closed its last file, and must have the last word.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::store::rows::Ino;

/// How late the close of a file may be recorded. Mostly it takes well below a millisecond.
const LATE: Duration = Duration::from_millis(50);

/// The first places given out in two periods, each of [`LATE`] at most; and the directories told of.
#[derive(Debug, Default)]
pub(super) struct RecentPlaces {
    before: Option<(Instant, u64)>,
    now: Option<(Instant, u64)>,
    dirs: VecDeque<(Instant, Ino)>,
}

impl RecentPlaces {
    /// Notes that a place was given out.
    pub(super) fn gave(&mut self, place: u64, at: Instant) {
        if self.now.is_none_or(|(since, _)| at >= since + LATE) {
            self.before = self.now.replace((at, place));
        }
    }

    /// A place that none of those given out within [`LATE`] before `at` is below; the greatest
    /// number if there are none.
    pub(super) fn since(&self, at: Instant) -> u64 {
        let may_be_recent = |(since, _): &(Instant, u64)| at < *since + 2 * LATE;
        self.before
            .filter(may_be_recent)
            .or(self.now.filter(may_be_recent))
            .map_or(u64::MAX, |(_, place)| place)
    }
}

impl RecentPlaces {
    /// Notes that the attributes of a directory were set, to be told to others.
    pub(super) fn told(&mut self, dir: Ino, at: Instant) {
        self.forget_dirs(at);
        self.dirs.push_back((at, dir));
    }

    /// Whether they were within [`LATE`] before `at`.
    pub(super) fn was_told(&mut self, dir: Ino, at: Instant) -> bool {
        self.forget_dirs(at);
        self.dirs.iter().any(|(_, told)| *told == dir)
    }

    fn forget_dirs(&mut self, at: Instant) {
        while self.dirs.front().is_some_and(|(told, _)| at > *told + LATE) {
            self.dirs.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recent_places_are_found_and_few_others() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut places = RecentPlaces::default();
        assert_eq!(places.since(at(0)), u64::MAX);
        for place in 1..=40 {
            places.gave(place, at(place * 10));
        }
        // Places 36 to 40 were given out within the last 50 ms.
        let since = places.since(at(405));
        assert!((26..=36).contains(&since), "{since}");
        // Long after, none is recent.
        assert_eq!(places.since(at(600)), u64::MAX);
        places.gave(41, at(1000));
        assert_eq!(places.since(at(1001)), 41);
    }

    #[test]
    fn directories_are_remembered_for_a_moment() {
        let start = Instant::now();
        let mut places = RecentPlaces::default();
        places.told(Ino(5), start);
        places.told(Ino(6), start + LATE);
        assert!(places.was_told(Ino(5), start + LATE) && !places.was_told(Ino(7), start + LATE));
        let later = start + LATE + Duration::from_millis(1);
        assert!(!places.was_told(Ino(5), later) && places.was_told(Ino(6), later));
    }
}
