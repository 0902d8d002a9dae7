//! Which places in the order of changes were given out a moment ago.
//!
//! The close of a file that was just created is told late: `close(2)` does not wait for it, to
//! save a request. By the time it is recorded its program may have made the next file, which may
//! build on the first. So the first close of a file counts as made before everything that got its
//! place within the last moments.

use std::time::{Duration, Instant};

/// How late the close of a file may be recorded. Mostly it takes well below a millisecond.
const LATE: Duration = Duration::from_millis(50);

/// The first places given out in two periods, each of [`LATE`] at most.
#[derive(Debug, Default)]
pub(super) struct RecentPlaces {
    before: Option<(Instant, u64)>,
    now: Option<(Instant, u64)>,
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
}
