//! Time that machines with wrong clocks can agree on.
//!
//! A [`Stamp`] is a hybrid logical clock reading (Kulkarni et al., "Logical
//! Physical Clocks", 2014) with the machine's id as the tie breaker: the order
//! in which "last writer wins" is decided, on every machine alike. Its physical
//! part follows the *bucket's* clock, which [`ServerClock`] estimates from the
//! `Date` of replies, so that a machine whose own clock is wrong neither wins
//! nor loses for ever.

use std::{
    fmt,
    sync::Mutex,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::id::MachineId;

/// When a change was made, and by whom. Greater wins.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// Milliseconds since 1970 of the bucket's clock, as the machine knew it.
    pub millis: u64,
    /// Orders changes of one millisecond.
    pub counter: u32,
    pub machine: MachineId,
}

impl Stamp {
    /// Older than every stamp that a clock gives.
    pub const ZERO: Self = Self {
        millis: 0,
        counter: 0,
        machine: MachineId(0),
    };

    /// The stamp of the deletion of what was written at `self` and expired in the hour `hours` since 1970.
    ///
    /// It follows directly on `self`: every write of a later millisecond counts for more than the deletion, so an
    /// expiry removes the version that it judged, and no later one. The counter says when it expired, for whoever
    /// asks how old the deletion is ([`Self::made_millis`]): the time in `self` is that of the write. No machine has
    /// the number 0, and no counter of a machine comes to 2^31.
    ///
    /// `None` for a stamp that has no such follower: one of a deletion of this kind itself, and one of a broken clock.
    #[must_use]
    pub fn expired(self, hours: u32) -> Option<Self> {
        (self.counter < EXPIRED && hours < EXPIRED).then_some(Self {
            millis: self.millis,
            counter: EXPIRED | hours,
            machine: MachineId(0),
        })
    }

    /// Whether this is the stamp of a name that expired.
    #[must_use]
    pub fn is_expired(self) -> bool {
        self.machine == MachineId(0) && self.counter >= EXPIRED
    }

    /// When the change was made: for one that expired not the time that orders it, but that of the expiry.
    #[must_use]
    pub fn made_millis(self) -> u64 {
        if self.is_expired() {
            u64::from(self.counter & !EXPIRED) * HOUR_MILLIS
        } else {
            self.millis
        }
    }
}

/// Set in the counter of a name that expired; below it is the hour.
const EXPIRED: u32 = 1 << 31;

/// The greatest counter of a change that a machine made.
pub const MAX_COUNTER: u32 = EXPIRED - 1;

pub const HOUR_MILLIS: u64 = 3_600_000;

impl fmt::Debug for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}@{}", self.millis, self.counter, self.machine)
    }
}

/// How far ahead of the bucket's clock a stamp of another machine may pull ours.
///
/// A machine that published before it had heard the bucket's time could
/// otherwise push every clock of the fleet into the future.
pub const MAX_AHEAD: Duration = Duration::from_secs(3600);

/// Gives stamps that only grow, and that follow every stamp seen.
#[derive(Debug)]
pub struct Hlc {
    machine: MachineId,
    last: Mutex<(u64, u32)>,
}

impl Hlc {
    /// Starts after `seen`, the greatest stamp that this machine remembers.
    #[must_use]
    pub fn new(machine: MachineId, seen: Stamp) -> Self {
        Self {
            machine,
            last: Mutex::new((seen.millis, seen.counter)),
        }
    }

    #[must_use]
    pub fn machine(&self) -> MachineId {
        self.machine
    }

    /// Returns a stamp greater than all given and all observed; `now_millis`
    /// is the bucket's time as [`ServerClock::now_millis`] estimates it.
    pub fn now(&self, now_millis: u64) -> Stamp {
        let mut last = self.last.lock().expect("no code panics while it holds the clock");
        *last = match now_millis.cmp(&last.0) {
            std::cmp::Ordering::Greater => (now_millis, 0),
            _ if last.1 == u32::MAX => (last.0 + 1, 0),
            _ => (last.0, last.1 + 1),
        };
        Stamp {
            millis: last.0,
            counter: last.1,
            machine: self.machine,
        }
    }

    /// Makes later stamps follow `seen`, unless it lies more than
    /// [`MAX_AHEAD`] in the future; returns whether it was believed.
    pub fn observe(&self, seen: Stamp, now_millis: u64) -> bool {
        if seen.millis > now_millis.saturating_add(MAX_AHEAD.as_millis() as u64) {
            return false;
        }
        let mut last = self.last.lock().expect("no code panics while it holds the clock");
        *last = (*last).max((seen.millis, seen.counter));
        true
    }
}

/// Milliseconds since 1970 of this machine's own clock.
#[must_use]
pub fn local_millis() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_millis() as u64)
}

/// Estimates the bucket's clock from the times that its replies carry.
///
/// Each reply bounds the difference between the two clocks: a `Date` of `d`
/// seconds, asked for at local time `s` and received at `r`, was written when
/// the server's clock was in `[d, d + 1)`. The bounds of all replies are
/// intersected; the smallest correction that lies within them is used. A
/// reply outside the bounds means that a clock was set: it starts them anew.
#[derive(Debug, Default)]
pub struct ServerClock {
    bounds: Mutex<Option<(i64, i64)>>,
}

impl ServerClock {
    /// Takes in one reply; all times in milliseconds since 1970.
    pub fn observe(&self, sent: u64, received: u64, server: u64, resolution: u64) {
        let low = server as i64 - received as i64;
        let high = (server + resolution) as i64 - sent as i64;
        let mut bounds = self
            .bounds
            .lock()
            .expect("no code panics while it holds the clock");
        *bounds = match *bounds {
            Some((l, h)) if l.max(low) <= h.min(high) => Some((l.max(low), h.min(high))),
            _ => Some((low, high)),
        };
    }

    /// What to add to the local clock, in milliseconds; 0 until a reply was seen.
    #[must_use]
    pub fn offset_millis(&self) -> i64 {
        let bounds = self
            .bounds
            .lock()
            .expect("no code panics while it holds the clock");
        bounds.map_or(0, |(low, high)| 0.clamp(low, high.max(low)))
    }

    /// The bucket's time now, in milliseconds since 1970.
    #[must_use]
    pub fn now_millis(&self) -> u64 {
        local_millis().saturating_add_signed(self.offset_millis())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_grow_when_the_clock_goes_back() {
        let clock = Hlc::new(MachineId(1), Stamp::ZERO);
        let first = clock.now(1000);
        assert!(clock.now(10) > first);
        assert!(clock.now(2000).counter == 0);
    }

    #[test]
    fn a_stamp_follows_what_was_seen_but_not_the_far_future() {
        let clock = Hlc::new(MachineId(1), Stamp::ZERO);
        let seen = Stamp {
            millis: 5000,
            counter: 7,
            machine: MachineId(2),
        };
        assert!(clock.observe(seen, 1000));
        assert!(clock.now(1000) > seen);
        let absurd = Stamp {
            millis: u64::MAX,
            counter: 0,
            machine: MachineId(3),
        };
        assert!(!clock.observe(absurd, 1000));
        assert!(clock.now(9000).millis == 9000);
    }

    #[test]
    fn the_smallest_correction_within_the_bounds_is_used() {
        let clock = ServerClock::default();
        assert_eq!(clock.offset_millis(), 0);
        // The server's second began up to 999 ms ago: no correction is needed.
        clock.observe(10_400, 10_450, 10_000, 1000);
        assert_eq!(clock.offset_millis(), 0);
        // A clock that is an hour slow is corrected by an hour less the doubt.
        let wrong = ServerClock::default();
        wrong.observe(10_000, 10_100, 3_610_000, 1000);
        assert_eq!(wrong.offset_millis(), 3_599_900);
    }

    #[test]
    fn a_clock_that_was_set_starts_the_bounds_anew() {
        let clock = ServerClock::default();
        clock.observe(10_000, 10_010, 10_000, 1000);
        clock.observe(20_000, 20_010, 90_000, 1000);
        assert_eq!(clock.offset_millis(), 69_990);
    }
}
