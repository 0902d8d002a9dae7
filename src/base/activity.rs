//! Whether programs are waiting for this daemon just now.
//!
//! Work that nobody waits for (sealing, uploading) takes its time while they do: with two cores
//! and a stream of new files it otherwise halved the speed at which they were made.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// A request counts for this long.
const LASTS: Duration = Duration::from_millis(20);

/// When the last request came. Costs a store of one word.
#[derive(Debug)]
pub struct Activity {
    start: Instant,
    /// Microseconds since `start`; 0 for never.
    last: AtomicU64,
}

impl Default for Activity {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            last: AtomicU64::new(0),
        }
    }
}

impl Activity {
    /// Notes a request.
    pub fn note(&self) {
        let now = self.start.elapsed().as_micros() as u64;
        self.last.store(now.max(1), Ordering::Relaxed);
    }

    /// Whether a request came a moment ago.
    pub fn is_busy(&self) -> bool {
        let last = self.last.load(Ordering::Relaxed);
        last != 0 && self.start.elapsed() < Duration::from_micros(last) + LASTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_for_a_moment() {
        let activity = Activity::default();
        assert!(!activity.is_busy());
        activity.note();
        assert!(activity.is_busy());
        std::thread::sleep(LASTS * 2);
        assert!(!activity.is_busy());
    }
}
