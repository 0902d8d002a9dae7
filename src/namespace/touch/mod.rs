//! Which names machines use, told coarsely, so that names that nobody uses can leave a volume ([`super::expire`]).
//!
//! [`recorder`] notes uses in memory, [`tell`] writes them to the bucket now and then, [`mod@format`] specifies the bytes.
//!
//! # What a use is
//!
//! The kernel's page cache hides reads, so these count: a lookup that finds the name, an open and the close after it, a
//! change of attributes (`utimensat` is how Bazel and ccache say that they used a file), the listing of a
//! directory and what is made in it. An action-cache entry that is shown to Bazel uses all that it names. A listing does
//! not use what it lists; a name that is only asked for (`stat`) counts again when the kernel forgot it.
//!
//! Only what is told before counts for others, and this machine itself keeps what it used in the meantime (law 8 of
//! [`super::tree`]).
//!
//! # Who tells
//!
//! Every daemon whose mount can be written to, once a sweep was run with `--expire`: before that nobody wants to know, and
//! nothing is noted, kept or written. Names of a volume that lies over nothing expire, so those are told, also by
//! whoever sees them through a fork: in the volume that has them, or, when the credentials do not permit that, below
//! the fork's prefix, where an expiry looks as well. When such a fork is deleted, what was told there goes to the volume that
//! has the names ([`super::expire::inherit`]).
//!
//! Not told is what a mount that is read only uses (it writes nothing, whatever it may), nor what a machine uses that may
//! write nothing (it says so once), nor what an older casmount uses. For these a volume looks as if they were not there:
//! a name that only they use goes when it was written that long ago. Who has such machines chooses a time in which
//! the others use or write again all that is worth keeping.
//!
//! # What is lost
//!
//! A machine that is killed has not told what it used since the last telling: at most [`Pace::pause`], an hour. That is
//! safe because nothing rests on it but convenience: a name goes early only if it was used in that hour and never else in
//! all the time of the expiry, by no machine, and then it reads as a miss and is made again. Its blob stays for
//! the window of the sweep.
//!
//! # On paper
//!
//! How the cost grows. `m` machines, each of which uses `n` names of a volume again and again. For an expiry of 30
//! days [`Pace::again`] is a day, and [`Pace::pause`] an hour. Estimates from the format, but for the bytes of
//! a name: 3.0 with 1,000,000 names in one object, 3.8 with 10,000.
//!
//! | `n` = 1,000,000 | 10 machines | 1,000 | 10,000 |
//! |---|---|---|---|
//! | told, a day | 30 MB | 3 GB | 30 GB |
//! | PUTs a day, at most (24 a machine and 5 when it starts) | 290 | 29,000 | 290,000 (1.5 $) |
//! | GETs a day, to know whether to tell (24 a machine) | 240 | 24,000 | 240,000 (0.1 $) |
//! | kept, when each day was put together by an expiry | 90 MB | 90 MB | 90 MB |
//! | read by an expiry a day later | 120 MB | 3 GB | 30 GB |
//!
//! A job that uses 5,000 names and is gone after ten minutes tells 20 KB by one PUT: 10,000 of them a day are 200 MB and 5
//! cents. On a machine a name that was used takes between a quarter of a byte and 17 bytes of memory, for two days.
//! Looking up the paths of 1,000,000 names takes some 20 s of one core, spread over 80 s.
//!
//! Filters (Bloom, xor) would take 1.2 bytes a name at one false hit in a hundred, but false hits add up over all
//! objects of the time: with 300,000 filters every name has one. Numbers that all machines compute alike do not
//! add up: of 10,000,000 names in use one unused name in 100,000 looks used.
//!
//! Where it stops: at 10,000 machines that each use all of 1,000,000 names every day an expiry reads 30 GB. What
//! comes after: machines that tell a part each, chosen by how many there are, because all use the same.

pub mod format;
pub mod recorder;
pub mod tell;

use std::time::Duration;

pub use recorder::Touched;

/// How often a machine tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// A name that was told is told again when it is used this long after.
    pub again: Duration,
    /// The longest time from a use to its telling, while the bucket answers.
    pub pause: Duration,
}

/// An expiry is told apart in so many steps.
const AGAIN_SHARE: u32 = 8;
const MAX_AGAIN: Duration = Duration::from_secs(24 * 3600);
const PAUSE_SHARE: u32 = 32;
const MAX_PAUSE: Duration = Duration::from_secs(3600);

impl Pace {
    /// For names that may be unused for `expire`.
    #[must_use]
    pub fn of(expire: Duration) -> Self {
        Self {
            again: (expire / AGAIN_SHARE).min(MAX_AGAIN),
            pause: (expire / PAUSE_SHARE).min(MAX_PAUSE),
        }
    }

    /// For how long what is told speaks of names that are used on and on: until they are told again, which takes one
    /// pause until it is begun, and may take another until it is done.
    #[must_use]
    pub fn good_for(&self) -> Duration {
        self.again + 2 * self.pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_often_enough_for_every_expiry() {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        for expire in [Duration::from_secs(4), DAY, 30 * DAY, 3650 * DAY] {
            let pace = Pace::of(expire);
            assert!(pace.good_for() < expire / 4, "{expire:?}");
            assert!(pace.good_for().as_millis() as u64 <= format::MAX_GOOD_FOR_MILLIS);
            assert!(pace.pause > Duration::ZERO);
        }
        assert_eq!(Pace::of(30 * DAY).again, DAY);
        assert_eq!(Pace::of(30 * DAY).pause, Duration::from_secs(3600));
    }
}
