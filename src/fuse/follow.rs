//! Whom the thread that answers should be near: the program that asks one thing after the other.
//!
//! Such a program waits for each answer, so it and the thread that answers hardly ever run at the same time.
//! On one CPU a request then costs two switches between them. On two that are busy with other work, as those of a machine
//! that builds are, each of them waits for a compiler to be interrupted on the other CPU, on a virtual
//! machine by way of the hypervisor. So after some requests in a row of one thread, the reader of requests moves to the CPU
//! on which that thread ran, and stays while this goes on. This file decides it; [`super::turns`] does it.
//!
//! Where a CPU is idle, the scheduler wakes the program there, not where its answer comes from, and both sides
//! look for each other without sleep (see [`super::turns`]). So nobody is followed before a reader lost its CPU to another
//! program; who is found elsewhere all the same is left alone for a while.
//!
//! Measured (2 CPUs of a virtual machine, Linux 6.18, 10,000 operations each; both CPUs compile at a lower priority):
//! open + read + close of a small file 398 us before, 31 us with it; utimensat 35 us, 17 us; create + write + close +
//! rename 500 to 1,000 us, 165 to 220 us. Both bound to one CPU by hand, which is what it aims at: 22, 12 and 100 us.
//!
//! # Policy
//!
//! - Requests that another thread sent, that come late, or that carry many bytes (both sides work at the same time then)
//!   end it. Several programs at once are served wherever the scheduler likes.
//! - Requests that nobody waits for (RELEASE, FORGET) name no thread, and change nothing.

use std::time::{Duration, Instant};

/// How many requests in a row make a thread one to be near.
const ROW: u32 = 8;

/// A pause after which a row is over.
const PAUSE: Duration = Duration::from_millis(1);

/// After so many requests it is looked for the first time whether the thread stayed; and after so many from then on,
/// or this time.
const FIRST_LOOK: u32 = 8;
const LOOK_REQUESTS: u32 = 128;
const LOOK_AFTER: Duration = Duration::from_millis(4);

/// How long nobody is followed after that came to nothing.
const APART: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Follow {
    caller: u32,
    row: u32,
    last: Instant,
    near: Option<Near>,
    not_before: Instant,
}

/// Where the caller was found.
#[derive(Clone, Copy, Debug)]
struct Near {
    cpu: usize,
    /// When it is to be looked again: at this request of the row, or at this time.
    next_row: u32,
    next_time: Instant,
}

/// Where the thread that took a request should run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Anywhere,
    /// Where it is.
    Stay,
    On(usize),
    /// It is to be found out where this caller runs, and told by [`Follow::found`].
    Find(u32),
}

impl Follow {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            caller: 0,
            row: 0,
            last: now,
            near: None,
            not_before: now,
        }
    }

    /// A request came. `caller` is the thread that waits for the answer, 0 if none does or it cannot be seen.
    /// `is_busy`: other programs want the CPUs.
    pub(super) fn asked(&mut self, caller: u32, is_busy: bool, now: Instant) -> Place {
        if caller == 0 {
            return Place::Stay;
        }
        if caller != self.caller || now.saturating_duration_since(self.last) > PAUSE {
            self.leave();
            self.caller = caller;
        }
        self.last = now;
        self.row = self.row.saturating_add(1);
        match self.near {
            Some(near) if self.row < near.next_row && now < near.next_time => Place::On(near.cpu),
            None if self.row < ROW || !is_busy || now < self.not_before => Place::Anywhere,
            _ => Place::Find(caller),
        }
    }

    /// Where `caller` runs.
    pub(super) fn found(&mut self, caller: u32, cpu: Option<usize>, now: Instant) -> Place {
        let before = self.near.take();
        if caller != self.caller {
            return Place::Anywhere;
        }
        let Some(cpu) = cpu.filter(|cpu| before.is_none_or(|before| before.cpu == *cpu)) else {
            self.give_up(now);
            return Place::Anywhere;
        };
        let requests = if before.is_some() {
            LOOK_REQUESTS
        } else {
            FIRST_LOOK
        };
        self.near = Some(Near {
            cpu,
            next_row: self.row.saturating_add(requests),
            next_time: now + LOOK_AFTER,
        });
        Place::On(cpu)
    }

    /// Nobody is followed for a while: whom it would be does not stay, cannot be seen, or is where the reader may not be.
    pub(super) fn give_up(&mut self, now: Instant) {
        self.leave();
        self.not_before = now + APART;
    }

    /// Whether the reader is near somebody.
    pub(super) fn is_near(&self) -> bool {
        self.near.is_some()
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

    /// The requests of one thread until it is looked for.
    fn row(follow: &mut Follow, caller: u32, now: Instant) {
        for _ in 1..ROW {
            assert_eq!(follow.asked(caller, true, now), Place::Anywhere);
        }
        assert_eq!(follow.asked(caller, true, now), Place::Find(caller));
    }

    #[test]
    fn a_row_of_requests_is_followed_until_another_thread_asks() {
        let now = Instant::now();
        let mut follow = Follow::new(now);
        row(&mut follow, 7, now);
        assert_eq!(follow.found(7, Some(3), now), Place::On(3));
        assert!(follow.is_near());
        assert_eq!(follow.asked(7, true, now), Place::On(3));
        assert_eq!(
            follow.asked(0, true, now),
            Place::Stay,
            "nobody waits for a RELEASE"
        );
        assert_eq!(follow.asked(7, true, now), Place::On(3));
        row(&mut follow, 8, now);
        assert!(!follow.is_near());
        assert_eq!(follow.asked(7, true, now), Place::Anywhere);
        assert_eq!(follow.found(8, Some(1), now), Place::Anywhere, "too late");
    }

    #[test]
    fn two_that_take_turns_are_not_followed() {
        let now = Instant::now();
        let mut follow = Follow::new(now);
        for _ in 0..100 {
            assert_eq!(follow.asked(1, true, now), Place::Anywhere);
            assert_eq!(follow.asked(2, true, now), Place::Anywhere);
        }
    }

    #[test]
    fn a_pause_or_other_work_ends_a_row() {
        let mut now = Instant::now();
        let mut follow = Follow::new(now);
        for _ in 0..100 {
            now += PAUSE + Duration::from_nanos(1);
            assert_eq!(follow.asked(1, true, now), Place::Anywhere);
        }
        row(&mut follow, 2, now);
        follow.leave();
        row(&mut follow, 2, now);
    }

    #[test]
    fn it_is_looked_again_soon_then_after_many_requests_and_after_a_while() {
        let mut now = Instant::now();
        let mut follow = Follow::new(now);
        row(&mut follow, 7, now);
        for requests in [FIRST_LOOK, LOOK_REQUESTS, LOOK_REQUESTS] {
            assert_eq!(follow.found(7, Some(1), now), Place::On(1));
            for _ in 1..requests {
                assert_eq!(follow.asked(7, true, now), Place::On(1));
            }
            assert_eq!(follow.asked(7, true, now), Place::Find(7));
        }
        follow.found(7, Some(1), now);
        let found = now;
        while now - found < LOOK_AFTER {
            assert_eq!(follow.asked(7, true, now), Place::On(1));
            now += PAUSE;
        }
        assert_eq!(follow.asked(7, true, now), Place::Find(7));
        assert_eq!(follow.found(7, None, now), Place::Anywhere, "it ended");
    }

    #[test]
    fn nobody_is_followed_where_a_cpu_is_idle_and_who_is_followed_stays_so() {
        let now = Instant::now();
        let mut follow = Follow::new(now);
        for _ in 0..100 {
            assert_eq!(follow.asked(7, false, now), Place::Anywhere);
        }
        assert_eq!(follow.asked(7, true, now), Place::Find(7));
        follow.found(7, Some(1), now);
        assert_eq!(follow.asked(7, false, now), Place::On(1));
    }

    #[test]
    fn one_that_does_not_stay_is_left_alone_for_a_while() {
        let mut now = Instant::now();
        let mut follow = Follow::new(now);
        row(&mut follow, 7, now);
        follow.found(7, Some(0), now);
        while follow.asked(7, true, now) != Place::Find(7) {}
        assert_eq!(follow.found(7, Some(1), now), Place::Anywhere);
        let left = now;
        while now - left < APART {
            assert_eq!(follow.asked(7, true, now), Place::Anywhere);
            now += PAUSE;
        }
        assert_eq!(follow.asked(7, true, now), Place::Find(7));
    }
}
