//! How long to wait before the next attempt.
//!
//! "Equal jitter": the wait is drawn evenly from the upper half of a bound that
//! doubles, so that a thousand machines that failed together do not come back
//! together (Brooker, "Exponential Backoff And Jitter", 2015).

use std::time::Duration;

use super::id::random_bytes;

/// The waits of one series of attempts.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    attempt: u32,
}

impl Backoff {
    /// Waits of up to `first`, doubling up to `most`.
    #[must_use]
    pub const fn new(first: Duration, most: Duration) -> Self {
        Self {
            first,
            most,
            attempt: 0,
        }
    }

    /// The bound of the next wait.
    #[must_use]
    fn bound(&self) -> Duration {
        self.first
            .saturating_mul(2u32.saturating_pow(self.attempt))
            .min(self.most)
    }

    /// Draws the next wait. The lower half of the bound is never drawn, so
    /// that a series of waits cannot be almost no wait at all.
    pub fn next_wait(&mut self) -> Duration {
        let bound = self.bound();
        self.attempt = self.attempt.saturating_add(1);
        let share = f64::from(u32::from_be_bytes(random_bytes())) / f64::from(u32::MAX);
        bound.mul_f64(0.5 + 0.5 * share)
    }

    /// Starts the series over, after a success.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_their_limit_and_start_over() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        for bound in [100, 200, 400, 800, 1000, 1000] {
            let wait = backoff.next_wait().as_millis();
            assert!(
                (bound / 2..=bound).contains(&wait),
                "{wait} is not within {bound}"
            );
        }
        backoff.reset();
        assert!(backoff.next_wait() <= Duration::from_millis(100));
    }
}
