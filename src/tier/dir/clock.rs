//! Learns the time of the file system, which on NFS is the server's.
//!
//! The time of a file that was written a moment ago is that of the store. Every write tells it; who only reads, as a
//! follower does, writes a file of its own once in a while ([`RENEW`]), and at once when the clock of this machine was set:
//! then what was known of the difference is wrong. Where nothing may be written, nothing is learned: such a
//! mount gives no stamps, and goes by the clock of its machine.
//!
//! The times of objects that are listed tell less than it seems, and are not used. One that was written at `t` says that the
//! store's clock was past `t` then, not what it is now: `t` may be of last week. And a time of a file can be set, or be
//! that of a clock that was wrong: a single object of next year would pull the clock of every machine that lists it,
//! again with each listing, where a reply of S3 tells the time of that reply.

use std::{
    fs::Metadata,
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};

use super::{PRIVATE, State, mtime_millis};
use crate::base::clock::local_millis;

/// How long what was learned is good for, unless something is written. A small file then, which is synced.
const RENEW: Duration = Duration::from_secs(300);

/// The clock of this machine was set when it went so much faster or slower than time.
const SET_MILLIS: u64 = 500;

impl State {
    /// Learns the time again, when what is known of it may be wrong. For who only reads.
    pub(super) fn renew_clock(&self) {
        let now = local_millis();
        let is_known = {
            let learned = self.learned.lock().expect("no code panics while it holds it");
            learned.is_some_and(|(at, millis)| {
                let passed = at.elapsed();
                let expected = millis + passed.as_millis() as u64;
                passed < RENEW && now.abs_diff(expected) < SET_MILLIS
            })
        };
        // Without the private folder it is no store yet.
        if !is_known && self.root.join(PRIVATE).is_dir() {
            // Also when that fails: it is not tried with each listing.
            self.learned(now);
            self.sample_clock();
        }
    }

    fn learned(&self, now: u64) {
        *self.learned.lock().expect("no code panics while it holds it") = Some((Instant::now(), now));
    }

    /// Takes in the time of a file that was written since `sent`.
    pub(super) fn observe_clock(&self, sent: u64, meta: &Metadata) {
        // The kernel stamps files with the time of its last tick; some servers with whole seconds.
        let resolution = if meta.mtime_nsec() == 0 { 1000 } else { 12 };
        self.clock
            .observe(sent, local_millis(), mtime_millis(meta), resolution);
        self.learned(local_millis());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::{Body, Bucket, dir::DirBucket};

    const HOUR: u64 = 3_600_000;

    #[tokio::test]
    async fn who_only_lists_learns_the_time_again() {
        let dir = tempfile::tempdir().unwrap();
        let bucket = DirBucket::connect(dir.path().to_owned()).await;
        bucket.list("a/", None).await.unwrap();
        assert_eq!(
            dir.path().read_dir().unwrap().count(),
            0,
            "nothing is left in what is no store"
        );
        bucket.put_new("a/b", Body::raw(b"x".to_vec())).await.unwrap();
        let right = || bucket.clock().offset_millis().unsigned_abs() < 1_000;
        assert!(right());
        let wrong = || {
            let now = local_millis();
            bucket.clock().observe(now, now, now + HOUR, 10);
            assert!(!right());
        };
        let list = async || bucket.list("a/", None).await.unwrap().objects.len();
        // What was learned a moment ago is not asked for again.
        wrong();
        assert_eq!(list().await, 1);
        assert!(!right());
        // This machine's clock was set since.
        *bucket.state.learned.lock().unwrap() = Some((Instant::now(), local_millis() - HOUR));
        assert_eq!(list().await, 1);
        assert!(right());
        // It was long ago.
        wrong();
        let before = Instant::now().checked_sub(RENEW).unwrap();
        *bucket.state.learned.lock().unwrap() = Some((before, local_millis() - RENEW.as_millis() as u64));
        assert_eq!(list().await, 1);
        assert!(right());
        let left = dir.path().join(PRIVATE).join("tmp").read_dir().unwrap();
        assert_eq!(left.count(), 0);
    }
}
