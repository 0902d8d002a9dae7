//! Whom the thread that answers should be near: the program that asks one thing after the other.
//!
//! Such a program waits for each answer, so it and the thread that answers hardly ever run at the same time.
//! On one CPU a request then costs two switches between them, and nobody is woken elsewhere, which on a virtual machine takes
//! longer than most answers. So after some requests in a row of one thread, the reader of requests moves to the CPU
//! on which that thread ran, and stays while this goes on. This file decides it; [`super::turns`] does it.
//!
//! # How the CPU is shared
//!
//! - The scheduler wakes a program where it ran before if that CPU is idle, else on one that is, which is never the one
//!   where the answer comes from. But a CPU on which only threads of `SCHED_IDLE` run counts as idle
//!   (`select_idle_sibling` in `kernel/sched/fair.c`). So the reader becomes such a thread while it is near
//!   ([`Share::Idle`]): the program is woken beside it, and runs at once, if both are of one control group, or nearly
//!   always.
//! - Such a thread waits for whatever else wants that CPU. When a request waits with it ([`Follow::starved`]) nobody is
//!   followed like this for a while; nor when one took very long, which looks the same. To be an ordinary thread again takes
//!   `CAP_SYS_NICE`: a daemon without it follows nobody where a CPU is idle.
//! - Where the CPUs are busy with other work, as those of a machine that builds are, nothing is idle, and the reader shares
//!   the CPU like any other thread.
//!
//! Measured (2 CPUs of a virtual machine, Linux 6.18, medians of eight rounds of 10,000 operations, interleaved; before, with
//! it, and with both sides bound to one CPU by hand, which is what it aims at). CPUs that are idle: utimensat 42, 18
//! and 12 us; open + read + close of a small file 37, 25 and 20 us; create + write + close + rename 207, 140 and 105 us.
//! Two programs that compute at a lower priority: open + read + close 398, 20 and 20 us; create to rename 500 to 1,000, 140 and
//! 105 us. What remains is that the program is woken elsewhere now and then, mostly when the watch ran.
//!
//! # Policy
//!
//! - Requests that another thread sent, that come late, or that carry many bytes (both sides work at the same time then)
//!   end it. Several programs at once are served wherever the scheduler likes.
//! - Requests that nobody waits for (RELEASE, FORGET) name no thread, and change nothing.
//! - Who moves again soon is left alone for a while; so is, once it moved, who is followed with a fair share, because nothing
//!   keeps it.

use std::time::{Duration, Instant};

use crate::base::cpus::Share;

/// How many requests in a row make a thread one to be near.
const ROW: u32 = 8;

/// A pause after which a row is over.
const PAUSE: Duration = Duration::from_millis(1);

/// After so many requests it is looked for the first time whether the thread stayed; and after so many from then on,
/// or this time.
const FIRST_LOOK: u32 = 8;
const LOOK_REQUESTS: u32 = 128;
const LOOK_AFTER: Duration = Duration::from_millis(4);

/// A reader that sleeps as long before a request is not where the program runs: there it does not even get to sleep,
/// because it is only given the CPU when the program waits for the next answer.
const GAP: Duration = Duration::from_micros(8);

/// Who made fewer requests in one place did not stay there, and is followed to so many of these.
const STAYS: u32 = 16;
const MOVES: u32 = 4;

/// How long nobody is followed after that came to nothing, and how long no reader makes way for others after one had to
/// wait too long for that. The second number after that happened many times.
const APART: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(128));
const FAIR: (Duration, Duration) = (Duration::from_millis(8), Duration::from_secs(1));

/// After so many requests in which all went well it is as if it never had not.
const WELL: u32 = 512;

/// Something that is not tried for a while, for twice as long each time it failed.
#[derive(Debug)]
struct Attempt {
    not_before: Instant,
    wait: Duration,
    waits: (Duration, Duration),
    /// Requests since it failed.
    well: u32,
}

impl Attempt {
    fn new(waits: (Duration, Duration), now: Instant) -> Self {
        Self {
            not_before: now,
            wait: waits.0,
            waits,
            well: 0,
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        now >= self.not_before
    }

    fn failed(&mut self, now: Instant) {
        self.not_before = now + self.wait;
        self.wait = (2 * self.wait).min(self.waits.1);
        self.well = 0;
    }

    fn goes_well(&mut self) {
        self.well = self.well.saturating_add(1);
        if self.well == WELL {
            self.wait = self.waits.0;
        }
    }
}

#[derive(Debug)]
pub(super) struct Follow {
    caller: u32,
    row: u32,
    last: Instant,
    near: Option<Near>,
    attempt: Attempt,
    can_idle: bool,
    idle: Attempt,
}

/// Where the caller was found.
#[derive(Clone, Copy, Debug)]
struct Near {
    spot: Spot,
    /// It was found there at this request of the row, and moved so many times before without staying anywhere.
    since: u32,
    moves: u32,
    /// When it is to be looked again: at this request of the row, or at this time; or, for a reader that makes way, when
    /// it was far from the program from this request on.
    next_row: u32,
    next_time: Instant,
    /// The reader slept since the last request of the row.
    gap: bool,
}

/// A CPU, and how the reader runs there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    pub(super) cpu: usize,
    pub(super) share: Share,
}

/// Where the thread that took a request should run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Anywhere,
    /// Where it is.
    Stay,
    On(Spot),
    /// It is to be found out where this caller runs, and told by [`Follow::found`].
    Find(u32),
}

impl Follow {
    /// `can_idle`: a reader can be [`Share::Idle`].
    pub(super) fn new(can_idle: bool, now: Instant) -> Self {
        Self {
            caller: 0,
            row: 0,
            last: now,
            near: None,
            attempt: Attempt::new(APART, now),
            can_idle,
            idle: Attempt::new(FAIR, now),
        }
    }

    /// A request came, `gap` after the answer before it. `caller` is the thread that waits for the answer, 0 if none does or
    /// it cannot be seen. `is_busy`: other programs want the CPUs.
    pub(super) fn asked(&mut self, caller: u32, is_busy: bool, gap: Duration, now: Instant) -> Place {
        if let Some(near) = &mut self.near {
            near.gap |= gap >= GAP;
        }
        if caller == 0 {
            return Place::Stay;
        }
        if caller != self.caller || now.saturating_duration_since(self.last) > PAUSE {
            self.leave();
            self.caller = caller;
        }
        self.last = now;
        self.row = self.row.saturating_add(1);
        let Some(near) = &mut self.near else {
            let not_yet = self.row < ROW || !self.attempt.is_due(now) || self.share(is_busy, now).is_none();
            return if not_yet {
                Place::Anywhere
            } else {
                Place::Find(caller)
            };
        };
        self.attempt.goes_well();
        if near.spot.share == Share::Idle {
            self.idle.goes_well();
        }
        let look = match near.spot.share {
            Share::Fair => self.row >= near.next_row || now >= near.next_time,
            Share::Idle => std::mem::take(&mut near.gap) && self.row >= near.next_row,
        };
        if look {
            Place::Find(caller)
        } else {
            Place::On(near.spot)
        }
    }

    /// How a reader that begins to follow somebody runs; `None`: none should.
    fn share(&self, is_busy: bool, now: Instant) -> Option<Share> {
        if is_busy {
            return Some(Share::Fair);
        }
        (self.can_idle && self.idle.is_due(now)).then_some(Share::Idle)
    }

    /// Where `caller` runs.
    pub(super) fn found(&mut self, caller: u32, cpu: Option<usize>, is_busy: bool, now: Instant) -> Place {
        let before = self.near.take();
        if caller != self.caller {
            return Place::Anywhere;
        }
        let share = match before.map(|before| before.spot.share) {
            Some(Share::Fair) => Some(Share::Fair),
            _ => self.share(is_busy, now),
        };
        let (Some(cpu), Some(share)) = (cpu, share) else {
            self.give_up(now);
            return Place::Anywhere;
        };
        let moved = before.filter(|before| before.spot.cpu != cpu);
        let moves = moved.map_or(0, |before| {
            if self.row < before.since.saturating_add(STAYS) {
                before.moves + 1
            } else {
                1
            }
        });
        if moves > 0 && (share == Share::Fair || moves > MOVES) {
            self.give_up(now);
            return Place::Anywhere;
        }
        let spot = Spot { cpu, share };
        let requests = match share {
            _ if before.is_some() && moves == 0 => LOOK_REQUESTS,
            Share::Fair => FIRST_LOOK,
            Share::Idle => 0,
        };
        self.near = Some(Near {
            spot,
            since: self.row,
            moves,
            next_row: self.row.saturating_add(requests),
            next_time: now + LOOK_AFTER,
            gap: false,
        });
        Place::On(spot)
    }

    /// Nobody is followed for a while: whom it would be does not stay, cannot be seen, or is where the reader may not be.
    pub(super) fn give_up(&mut self, now: Instant) {
        self.leave();
        self.attempt.failed(now);
    }

    /// A reader that made way for others had to wait for the CPU while a request did.
    pub(super) fn starved(&mut self, now: Instant) {
        self.leave();
        self.idle.failed(now);
    }

    #[cfg(test)]
    pub(super) fn has_starved(&self) -> bool {
        self.idle.wait > FAIR.0
    }

    /// Whether the reader is near somebody.
    pub(super) fn is_near(&self) -> bool {
        self.near.is_some()
    }

    /// Whose requests they are.
    pub(super) fn caller(&self) -> u32 {
        self.caller
    }

    /// What goes on is another kind of work, or nothing.
    pub(super) fn leave(&mut self) {
        self.row = 0;
        self.near = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOSELY: Duration = Duration::from_micros(1);

    fn fair(cpu: usize) -> Place {
        Place::On(Spot {
            cpu,
            share: Share::Fair,
        })
    }

    fn idle(cpu: usize) -> Place {
        Place::On(Spot {
            cpu,
            share: Share::Idle,
        })
    }

    /// The requests of one thread until it is looked for.
    fn row(follow: &mut Follow, caller: u32, is_busy: bool, now: Instant) {
        for _ in 1..ROW {
            assert_eq!(follow.asked(caller, is_busy, CLOSELY, now), Place::Anywhere);
        }
        assert_eq!(follow.asked(caller, is_busy, CLOSELY, now), Place::Find(caller));
    }

    #[test]
    fn a_row_of_requests_is_followed_until_another_thread_asks() {
        let now = Instant::now();
        for (is_busy, near) in [(true, fair as fn(usize) -> Place), (false, idle)] {
            let mut follow = Follow::new(true, now);
            let asked = |follow: &mut Follow, caller| follow.asked(caller, is_busy, CLOSELY, now);
            row(&mut follow, 7, is_busy, now);
            assert_eq!(follow.found(7, Some(3), is_busy, now), near(3));
            assert!(follow.is_near());
            assert_eq!(asked(&mut follow, 7), near(3));
            assert_eq!(asked(&mut follow, 0), Place::Stay, "nobody waits for a RELEASE");
            assert_eq!(asked(&mut follow, 7), near(3));
            row(&mut follow, 8, is_busy, now);
            assert!(!follow.is_near());
            assert_eq!(asked(&mut follow, 7), Place::Anywhere);
            assert_eq!(
                follow.found(8, Some(1), is_busy, now),
                Place::Anywhere,
                "too late"
            );
        }
    }

    #[test]
    fn two_that_take_turns_are_not_followed() {
        let now = Instant::now();
        let mut follow = Follow::new(true, now);
        for caller in [1, 2].repeat(100) {
            assert_eq!(follow.asked(caller, true, CLOSELY, now), Place::Anywhere);
        }
    }

    #[test]
    fn a_pause_or_other_work_ends_a_row() {
        let mut now = Instant::now();
        let mut follow = Follow::new(true, now);
        for _ in 0..100 {
            now += PAUSE + Duration::from_nanos(1);
            assert_eq!(follow.asked(1, true, CLOSELY, now), Place::Anywhere);
        }
        row(&mut follow, 2, true, now);
        follow.leave();
        row(&mut follow, 2, true, now);
    }

    #[test]
    fn with_a_fair_share_it_is_looked_again_soon_then_after_many_requests_and_after_a_while() {
        let mut now = Instant::now();
        let mut follow = Follow::new(true, now);
        row(&mut follow, 7, true, now);
        for requests in [FIRST_LOOK, LOOK_REQUESTS, LOOK_REQUESTS] {
            assert_eq!(follow.found(7, Some(1), true, now), fair(1));
            for _ in 1..requests {
                assert_eq!(follow.asked(7, true, CLOSELY, now), fair(1));
            }
            assert_eq!(follow.asked(7, true, CLOSELY, now), Place::Find(7));
        }
        follow.found(7, Some(1), true, now);
        let found = now;
        while now - found < LOOK_AFTER {
            assert_eq!(follow.asked(7, true, CLOSELY, now), fair(1));
            now += PAUSE;
        }
        assert_eq!(follow.asked(7, true, CLOSELY, now), Place::Find(7));
        assert_eq!(follow.found(7, None, true, now), Place::Anywhere, "it ended");
    }

    #[test]
    fn a_reader_that_makes_way_looks_for_its_program_when_it_slept() {
        let now = Instant::now();
        let mut follow = Follow::new(true, now);
        row(&mut follow, 7, false, now);
        assert_eq!(follow.found(7, Some(0), false, now), idle(0));
        for _ in 0..10 * LOOK_REQUESTS {
            assert_eq!(follow.asked(7, false, CLOSELY, now), idle(0));
        }
        for cpu in [1, 0, 1] {
            // Before a request that nobody waits for, too.
            assert_eq!(follow.asked(0, false, GAP, now), Place::Stay);
            assert_eq!(follow.asked(7, false, CLOSELY, now), Place::Find(7));
            assert_eq!(follow.found(7, Some(cpu), false, now), idle(cpu));
            for _ in 0..STAYS {
                assert_eq!(follow.asked(7, false, CLOSELY, now), idle(cpu));
            }
        }
        // Who is there all the same is not looked for at every request.
        assert_eq!(follow.asked(7, false, GAP, now), Place::Find(7));
        assert_eq!(follow.found(7, Some(1), false, now), idle(1));
        for _ in 1..LOOK_REQUESTS {
            assert_eq!(follow.asked(7, false, GAP, now), idle(1));
        }
        assert_eq!(follow.asked(7, false, GAP, now), Place::Find(7));
        assert_eq!(
            follow.found(7, Some(1), true, now),
            fair(1),
            "other programs want the CPUs now"
        );
    }

    #[test]
    fn where_no_reader_can_make_way_nobody_is_followed_on_idle_cpus() {
        let now = Instant::now();
        let mut follow = Follow::new(false, now);
        for _ in 0..100 {
            assert_eq!(follow.asked(7, false, CLOSELY, now), Place::Anywhere);
        }
        assert_eq!(follow.asked(7, true, CLOSELY, now), Place::Find(7));
        follow.found(7, Some(1), true, now);
        assert_eq!(
            follow.asked(7, false, CLOSELY, now),
            fair(1),
            "who is followed stays so"
        );
    }

    /// How long nobody is followed from `now` on, which is moved to its end.
    fn pause(follow: &mut Follow, is_busy: bool, now: &mut Instant) -> Duration {
        let began = *now;
        while follow.asked(7, is_busy, CLOSELY, *now) == Place::Anywhere {
            *now += Duration::from_millis(1);
            assert!(*now - began < Duration::from_secs(10));
        }
        *now - began
    }

    #[test]
    fn one_that_does_not_stay_is_left_alone_for_longer_and_longer() {
        let mut now = Instant::now();
        let mut follow = Follow::new(true, now);
        for is_busy in [true, false] {
            let mut pauses = Vec::new();
            for _ in 0..20 {
                row(&mut follow, 7, is_busy, now);
                let mut cpu = 0;
                let mut place = follow.found(7, Some(cpu), is_busy, now);
                while place != Place::Anywhere {
                    while follow.asked(7, is_busy, GAP, now) != Place::Find(7) {}
                    cpu += 1;
                    place = follow.found(7, Some(cpu), is_busy, now);
                }
                assert_eq!(cpu, if is_busy { 1 } else { MOVES as usize + 1 });
                pauses.push(pause(&mut follow, is_busy, &mut now));
                follow.leave();
            }
            assert!(
                pauses[0] <= 2 * APART.0 + ROW * Duration::from_millis(1),
                "{pauses:?}"
            );
            assert!(
                pauses.is_sorted() && *pauses.last().unwrap() >= APART.1,
                "{pauses:?}"
            );
            // Until it stays.
            row(&mut follow, 7, is_busy, now);
            follow.found(7, Some(0), is_busy, now);
            for _ in 0..2 * WELL {
                if follow.asked(7, is_busy, CLOSELY, now) == Place::Find(7) {
                    follow.found(7, Some(0), is_busy, now);
                }
            }
            follow.leave();
        }
    }

    #[test]
    fn what_goes_well_with_a_fair_share_says_nothing_of_making_way() {
        let mut now = Instant::now();
        let mut follow = Follow::new(true, now);
        for _ in 0..2 {
            row(&mut follow, 7, false, now);
            assert_eq!(follow.found(7, Some(0), false, now), idle(0));
            follow.starved(now);
            row(&mut follow, 7, true, now);
            for _ in 0..2 * WELL {
                if follow.asked(7, true, CLOSELY, now) != fair(0) {
                    follow.found(7, Some(0), true, now);
                }
            }
            follow.leave();
            now += FAIR.1;
        }
        assert_eq!(follow.idle.wait, 4 * FAIR.0);
    }

    #[test]
    fn after_it_waited_in_vain_no_reader_makes_way_for_a_while() {
        let mut now = Instant::now();
        let mut follow = Follow::new(true, now);
        row(&mut follow, 7, false, now);
        assert_eq!(follow.found(7, Some(0), false, now), idle(0));
        follow.starved(now);
        assert!(!follow.is_near());
        row(&mut follow, 7, true, now);
        assert_eq!(follow.found(7, Some(0), true, now), fair(0));
        follow.leave();
        assert!(pause(&mut follow, false, &mut now) >= FAIR.0);
        assert_eq!(follow.found(7, Some(0), false, now), idle(0));
        follow.starved(now);
        assert!(pause(&mut follow, false, &mut now) >= 2 * FAIR.0);
    }
}
