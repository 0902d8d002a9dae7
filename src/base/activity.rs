//! Whether programs keep this daemon busy just now.
//!
//! Work that nobody waits for (sealing, uploading) takes its time while they do: with two cores
//! and a stream of new files it otherwise halved the speed at which they were made. An
//! ordinary build, of some hundred requests a second, leaves room for all of it.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Requests are counted for so long, in milliseconds.
const WINDOW_MILLIS: u64 = 20;

/// So many in a window, 2500 a second, are a stream.
const STREAM: u64 = 50;

const COUNT_BITS: u32 = 16;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;

/// How many requests come. Costs the change of one word each.
#[derive(Debug)]
pub struct Activity {
    start: Instant,
    /// The number of the current window, and below it the counts of the one before and of this one.
    state: AtomicU64,
}

impl Default for Activity {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            state: AtomicU64::new(0),
        }
    }
}

impl Activity {
    /// Notes a request.
    pub fn note(&self) {
        self.note_in(self.window());
    }

    /// Whether requests come in a stream.
    pub fn is_busy(&self) -> bool {
        self.is_busy_in(self.window())
    }

    /// How long no request came, to 20 ms.
    pub fn quiet_for(&self) -> Duration {
        self.quiet_for_in(self.window())
    }

    fn quiet_for_in(&self, window: u64) -> Duration {
        let last = self.state.load(Relaxed) >> (2 * COUNT_BITS);
        Duration::from_millis(window.saturating_sub(last) * WINDOW_MILLIS)
    }

    fn note_in(&self, window: u64) {
        let count = |state| {
            let (before, now) = counts_at(state, window);
            Some(window << (2 * COUNT_BITS) | before << COUNT_BITS | (now + 1).min(COUNT_MASK))
        };
        // Always `Some`.
        let _ = self.state.fetch_update(Relaxed, Relaxed, count);
    }

    fn is_busy_in(&self, window: u64) -> bool {
        let (before, now) = counts_at(self.state.load(Relaxed), window);
        before.max(now) >= STREAM
    }

    fn window(&self) -> u64 {
        // From 1 on: in window 0 nothing was counted.
        self.start.elapsed().as_millis() as u64 / WINDOW_MILLIS + 1
    }
}

/// The counts of the window before `window` and of `window` itself.
fn counts_at(state: u64, window: u64) -> (u64, u64) {
    let (before, now) = (state >> COUNT_BITS & COUNT_MASK, state & COUNT_MASK);
    match window.checked_sub(state >> (2 * COUNT_BITS)) {
        // A thread that was held up between the clock and here counts for the window that began meanwhile.
        Some(0) | None => (before, now),
        Some(1) => (now, 0),
        Some(_) => (0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_of_requests_counts_until_it_ends() {
        let activity = Activity::default();
        assert!(!activity.is_busy_in(1));
        for count in 1..=STREAM {
            activity.note_in(1);
            assert_eq!(activity.is_busy_in(1), count == STREAM);
        }
        assert!(activity.is_busy_in(2) && !activity.is_busy_in(3));
        activity.note_in(2);
        assert!(activity.is_busy_in(2), "it was one a moment ago");
        activity.note_in(3);
        assert!(!activity.is_busy_in(3));
    }

    #[test]
    fn the_clock_moves_the_windows() {
        let activity = Activity::default();
        assert!(activity.window() >= 1 && !activity.is_busy());
        activity.note();
        assert_ne!(activity.state.load(Relaxed), 0);
    }

    #[test]
    fn it_is_known_how_long_no_request_came() {
        let activity = Activity::default();
        activity.note_in(7);
        assert_eq!(activity.quiet_for_in(7), Duration::ZERO);
        assert_eq!(activity.quiet_for_in(6), Duration::ZERO);
        assert_eq!(activity.quiet_for_in(57), Duration::from_secs(1));
        assert_eq!(Activity::default().quiet_for_in(51), Duration::from_millis(1020));
    }

    #[test]
    fn counts_move_on_with_the_windows() {
        let state = (7 << (2 * COUNT_BITS)) + (3 << COUNT_BITS) + 60;
        assert_eq!(counts_at(state, 7), (3, 60));
        assert_eq!(counts_at(state, 6), (3, 60));
        assert_eq!(counts_at(state, 8), (60, 0));
        assert_eq!(counts_at(state, 9), (0, 0));
    }
}
