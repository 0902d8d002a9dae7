//! Reads the other machines' changes from the logs of the mounted volume and of those below it.
//!
//! This file is the loop that follows one log, and its handle; `stack` has one for each layer,
//! `reader` lists, fetches and applies, and `cursor` knows what was seen and where to look.
//!
//! # Policy
//!
//! - A poll comes every second while the mount was used in the last 5 minutes, else every 10 s ([`Pace`]);
//!   the first use after a rest brings one at once. It is one LIST, and one GET for each new segment. That is for each
//!   volume that may change: a mount of a job's fork polls the fork and its parent, and somebody looks every 10 s
//!   whether the fork was deleted, one GET.
//! - It lists from the newest key less some seconds; the first poll, one every `FULL_PACE`
//!   and one that someone waits for list the whole window.
//! - After a failure the wait doubles up to `MAX_BACKOFF`, with jitter. Failures are told
//!   once each in the log, and in the status until a poll succeeds.
//! - The cursor is kept in the ledger with every full listing, and every `KEEP_PACE` while
//!   segments come; a crash costs a second reading of the segments since.
//! - A volume that is seen up to a moment is polled until all that was published by then must
//!   have appeared, and never again. A snapshot is never polled.

//!
//! # On paper
//!
//! How the log's cost grows. `m` machines mount a volume, `w` of them write at a time; one that writes makes up
//! to 4 segments a second (the publisher's pace), in the mean of a build one every 2 s.
//!
//! | | 10 machines | 1,000 | 10,000 |
//! |---|---|---|---|
//! | LISTs of those in use (1 a second each) | 10/s | 1,000/s | 10,000/s |
//! | the same in dollars an hour ($0.005 for 1,000) | 0.18 | 18 | 180 |
//! | LISTs of those that rest (1 in 10 s) | 1/s | 100/s | 1,000/s |
//! | the same in dollars an hour | 0.02 | 1.8 | 18 |
//! | a segment of each of 5 % of them every 2 s | 0.25/s | 25/s | 250/s |
//! | GETs of all followers together (`m` a segment) | 2.5/s | 25,000/s | 2,500,000/s |
//! | the same in dollars an hour ($0.0004 for 1,000) | 0.004 | 36 | 3,600 |
//! | GETs of one follower | 0.25/s | 25/s | 250/s |
//! | bytes to one follower, 20 files a segment (1.2 KB) | 0.3 KB/s | 30 KB/s | 300 KB/s |
//! | bytes to all followers | 3 KB/s | 30 MB/s | 3 GB/s |
//! | memory of a cursor (30 bytes a writer in the window) | 300 B | 30 KB | 300 KB |
//!
//! Names play no part but in the size of the tree: a poll costs the same with 100,000,000 of them, and a
//! change is merged with a few rows looked up (some 20 us). Mounts of forks make twice the LISTs, one for each layer that
//! may change.
//!
//! Measured: a segment of one new file has 148 bytes, one of 1,500 new small files 79,576, so some 100 and 53 for each. One follower
//! makes 1.0 requests a second in use and 0.1 at rest (`scripts/bench --only follow-use,follow-idle`). The rest of the table is
//! calculated.
//!
//! Where it stops: S3 gives a prefix 5,500 reads a second and splits prefixes under load, so listings of one log are
//! good for some thousands of machines in use. The GETs of segments grow with the square of the fleet: at 1,000
//! machines of which 5 % write they cost twice what the listings do, $36 an hour, and $720 if all wrote. What comes after: segments relayed by peers, so that the
//! bucket is read once a zone; and a pace that follows the number of writers.
//!
//! A machine with an empty cache reads the log from its newest catalog on ([`super::catalog`]): at most
//! 2,000 segments, 16 at once, or fewer of very long ones.

mod cursor;
mod fetch;
mod reader;
mod stack;
#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

pub(super) use cursor::{Cursor, SegmentKey, WINDOW_MILLIS, before};
pub(super) use fetch::segment as fetch_segment;
#[cfg(test)]
pub(super) use reader::LogView;
pub(super) use reader::{FollowError, Polled, Reader, Sink, note_key};
pub use stack::{LayerStatus, StackFollowerHandle, followed_volumes, spawn};

use super::background::words;
use crate::{base::retry::Backoff, store::StoreError};

const FULL_PACE: Duration = Duration::from_secs(60);
const KEEP_PACE: Duration = Duration::from_secs(5);
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// How often a log is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// From one poll to the next while the mount is in use.
    pub busy: Duration,
    /// From one poll to the next while it rests.
    pub idle: Duration,
    /// It rests when it was not used for so long.
    pub rests_after: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            busy: Duration::from_secs(1),
            idle: Duration::from_secs(10),
            rests_after: Duration::from_secs(300),
        }
    }
}

/// What the follower has seen.
#[derive(Clone, Debug, Default)]
pub struct FollowStatus {
    pub segments: u64,
    pub segment_bytes: u64,
    pub changes: u64,
    /// Milliseconds since 1970, bucket's clock: everything published before is applied here.
    pub caught_up_millis: u64,
    /// Nothing can come any more, and nobody looks.
    pub settled: bool,
    pub last_error: Option<String>,
}

#[derive(Debug)]
pub struct FollowerHandle {
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    started: Instant,
    pace: Pace,
    status: Mutex<FollowStatus>,
    /// Milliseconds since `started`.
    used: AtomicU64,
    /// Ends the wait between two polls.
    wake: Notify,
    /// Ends the wait after a failure, too, and asks for a full listing.
    asked: Notify,
    /// Polls that began.
    begun: AtomicU64,
    /// The newest poll that was applied whole, counted as `begun` counts.
    applied: watch::Sender<u64>,
}

impl Shared {
    fn new(pace: Pace) -> Self {
        Self {
            started: Instant::now(),
            pace,
            status: Mutex::default(),
            used: AtomicU64::new(0),
            wake: Notify::new(),
            asked: Notify::new(),
            begun: AtomicU64::new(0),
            applied: watch::Sender::new(0),
        }
    }

    fn status(&self) -> MutexGuard<'_, FollowStatus> {
        self.status
            .lock()
            .expect("no code panics while it holds the status")
    }

    fn uptime_millis(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Since the last use; the start counts as one, because whoever mounts wants to use it.
    fn rest(&self) -> Duration {
        let used = self.used.load(Ordering::Relaxed);
        Duration::from_millis(self.uptime_millis().saturating_sub(used))
    }

    fn note_use(&self) {
        let rested = self.rest() > self.pace.rests_after;
        self.used.store(self.uptime_millis(), Ordering::Relaxed);
        if rested {
            self.wake.notify_one();
        }
    }

    /// Asks for a poll that begins after the call; returns its number at least.
    fn ask(&self) -> u64 {
        let wanted = self.begun.load(Ordering::SeqCst) + 1;
        self.asked.notify_one();
        wanted
    }

    /// Waits until a poll was applied that [`Self::ask`] asked for.
    async fn reached(&self, wanted: u64, deadline: Instant) -> bool {
        let mut applied = self.applied.subscribe();
        let reached = applied.wait_for(|poll| *poll >= wanted);
        matches!(tokio::time::timeout_at(deadline, reached).await, Ok(Ok(_)))
    }
}

/// Starts to follow one log on `runtime`.
pub(super) fn start<S: Sink>(
    runtime: &tokio::runtime::Handle,
    pace: Pace,
    open: impl Fn() -> Result<Reader<S>, StoreError> + Send + Sync + 'static,
) -> FollowerHandle {
    let shared = Arc::new(Shared::new(pace));
    let (stop, stopped) = watch::channel(false);
    let task = runtime.spawn(run(open, Arc::clone(&shared), stopped));
    FollowerHandle { shared, stop, task }
}

/// When the loop did what it does now and then.
#[derive(Default)]
struct Rhythm {
    full: Option<Instant>,
    kept: Option<Instant>,
}

fn is_due(last: Option<Instant>, pace: Duration) -> bool {
    last.is_none_or(|last| last.elapsed() >= pace)
}

/// Follows until told to stop. A poll that is broken off leaves nothing half done.
async fn run<S: Sink>(
    open: impl Fn() -> Result<Reader<S>, StoreError>,
    shared: Arc<Shared>,
    mut stop: watch::Receiver<bool>,
) {
    let mut reader = None;
    let mut backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
    let mut rhythm = Rhythm::default();
    let mut asked = false;
    loop {
        let began = Instant::now();
        let number = shared.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let full = asked || is_due(rhythm.full, FULL_PACE);
        let result = tokio::select! {
            result = poll(&mut reader, &open, full, &mut rhythm) => result,
            _ = stop.changed() => break,
        };
        let done = reader.as_mut().map(Reader::take_done).unwrap_or_default();
        // Not before the cursor is kept, or the next start would not know.
        let settled = result.is_ok() && reader.as_ref().is_some_and(Reader::is_settled);
        note(&mut shared.status(), &done, settled, result.as_ref().err());
        let failed = result.is_err();
        let wait = if failed {
            backoff.next_wait()
        } else {
            backoff.reset();
            asked = false;
            if done.full {
                rhythm.full = Some(began);
            }
            shared.applied.send_replace(number);
            let pace = if shared.rest() <= shared.pace.rests_after {
                shared.pace.busy
            } else {
                shared.pace.idle
            };
            pace.saturating_sub(began.elapsed())
        };
        tokio::select! {
            () = tokio::time::sleep(wait), if !settled => {}
            () = shared.wake.notified(), if !failed && !settled => {}
            () = shared.asked.notified() => {
                asked = true;
                backoff.reset();
            }
            _ = stop.changed() => break,
        }
    }
    if let Some(Err(err)) = reader.as_mut().map(Reader::keep) {
        tracing::warn!(error = words(&err), "what was read of the log will be read again");
    }
}

async fn poll<S: Sink>(
    reader: &mut Option<Reader<S>>,
    open: &impl Fn() -> Result<Reader<S>, StoreError>,
    full: bool,
    rhythm: &mut Rhythm,
) -> Result<(), FollowError> {
    if reader.is_none() {
        *reader = Some(open()?);
    }
    let reader = reader.as_mut().expect("it was opened above");
    reader.poll(full).await?;
    if full || is_due(rhythm.kept, KEEP_PACE) {
        reader.keep()?;
        rhythm.kept = Some(Instant::now());
    }
    Ok(())
}

fn note(status: &mut FollowStatus, done: &Polled, settled: bool, err: Option<&FollowError>) {
    status.settled = settled;
    status.segments += done.segments;
    status.segment_bytes += done.segment_bytes;
    status.changes += done.changes;
    status.caught_up_millis = status.caught_up_millis.max(done.began_millis);
    let text = err.map(|err| words(err));
    if let Some(text) = &text
        && status.last_error.as_ref() != Some(text)
    {
        tracing::warn!(
            error = text,
            "changes of other machines are not seen; trying again"
        );
    }
    status.last_error = text;
}

impl FollowerHandle {
    /// Notes that the mount is in use: polls come every second for the next 5 minutes. Cheap.
    pub fn used(&self) {
        self.shared.note_use();
    }

    pub fn status(&self) -> FollowStatus {
        self.shared.status().clone()
    }

    /// Waits until one whole poll that began after the call has been applied: it sees
    /// everything that was published before the call. False when `deadline` passed first.
    #[cfg(test)]
    pub async fn caught_up(&self, deadline: Instant) -> bool {
        self.shared.reached(self.shared.ask(), deadline).await
    }

    /// Stops, and keeps what was seen.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        if let Err(err) = self.task.await {
            tracing::error!(error = %err, "the follower had died");
        }
    }
}
