//! Sends dirty blobs to the bucket, later.
//!
//! The queue is a query over the index, so a crash loses none of it. This file has the loop that
//! starts uploads; `task` is the upload of one blob, `small` that of many small ones by one request.
//!
//! # Policy
//!
//! - Oldest first, several blobs and chunks at once, at most `parallel` requests in all.
//! - Small blobs wait a moment for others to travel with, unless somebody waits for them.
//! - After a failure of the bucket nothing new is started for a while, then one upload at a
//!   time until one succeeds. Waits double up to `max_backoff`; progress of any kind, or a
//!   [`UploaderHandle::kick`], starts them over. While someone waits for a flush they are short.
//! - What an operator must mend (permissions, a bucket that is gone) is tried again slowly and
//!   logged once a minute.
//! - A blob that cannot be read from this disk waits by itself and holds up no other.
//! - One that no file has any more, and that was never uploaded, is not: nobody waits for it, and the upload of a long
//!   one ends in the middle. It is forgotten soon ([`Ledger::is_unwanted`]).
//! - What a sweep condemned counts as absent, see [`condemned`]. What goes beyond skipping an upload is
//!   [`vouch`]'s to say: whether a name may be published now.

mod chunks;
pub mod condemned;
mod rescue;
mod small;
mod status;
mod task;
pub mod vouch;

#[cfg(test)]
mod open_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod vouch_tests;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, Semaphore, watch},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tracing::{debug, error, warn};

pub use status::UploadStatus;

use self::{
    condemned::Condemned,
    small::{Ended, upload_together},
    status::UploadingGuard,
    task::{Outcome, upload_blob},
    vouch::Voucher,
};
use crate::{
    base::{activity::Activity, digest::Digest, retry::Backoff},
    store::{
        Store, StoreError,
        blobs::Blobs,
        error::chain,
        fetch::Fetcher,
        ledger::Ledger,
        pack::{self, MAX_MEMBERS},
        rows::BlobRow,
    },
    tier::SharedBucket,
};
pub use task::UploadError;

#[derive(Clone, Debug)]
pub struct UploadOptions {
    /// Requests under way at once.
    pub parallel: usize,
    /// The longest wait between two attempts.
    pub max_backoff: Duration,
    /// While programs wait for the daemon, and nobody for a flush, uploads are begun more slowly.
    pub activity: Arc<Activity>,
}

impl Default for UploadOptions {
    fn default() -> Self {
        Self {
            parallel: 8,
            max_backoff: Duration::from_secs(10),
            activity: Arc::default(),
        }
    }
}

/// The first wait after a failure.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// How often the queue is looked at when nobody says that there is something new.
const POLL: Duration = Duration::from_secs(1);

/// The longest wait while someone waits for a flush: it should end as soon as the bucket is back.
const FLUSH_WAIT: Duration = Duration::from_secs(1);

/// The wait after a failure that an operator must mend, and between two log lines about it.
const OPERATOR_WAIT: Duration = Duration::from_secs(15);
const OPERATOR_LOG_PAUSE: Duration = Duration::from_secs(60);

/// Between the begins of two uploads while programs keep the daemon busy: 250 a second.
const BUSY_PAUSE: Duration = Duration::from_millis(4);
/// For how long uploads are held back like that; others wait for the files.
const MAX_PACED: Duration = Duration::from_secs(4);

/// How long small blobs wait for others: a machine that makes them one by one sends two packs a second.
const GATHER: Duration = Duration::from_millis(500);

/// Rows taken from the queue at once.
const BATCH: usize = 8 * MAX_MEMBERS;

/// How long a shutdown lets requests end.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// The shortest time between two looks of someone who waits.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug)]
struct Shared {
    ledger: Arc<Ledger>,
    blobs: Arc<Blobs>,
    bucket: SharedBucket,
    condemned: Condemned,
    options: UploadOptions,
    /// Requests that may be made now.
    places: Arc<Semaphore>,
    counters: Arc<status::Counters>,
    kicks: watch::Sender<u64>,
    stopping: AtomicBool,
    /// Told when a blob is no longer dirty.
    cleaned: Notify,
    /// How many wait in `wait_clean`.
    waiting: AtomicUsize,
}

#[derive(Debug)]
pub struct UploaderHandle {
    shared: Arc<Shared>,
    run: JoinHandle<()>,
}

/// Starts the uploader on `runtime`. Its queue is a query over the index.
pub fn spawn(
    runtime: &tokio::runtime::Handle,
    store: Arc<Store>,
    bucket: SharedBucket,
    options: UploadOptions,
) -> UploaderHandle {
    let (ledger, blobs) = (Arc::clone(&store.ledger), Arc::clone(&store.blobs));
    // Not kept: whoever closes the store must own it.
    drop(store);
    spawn_over(runtime, ledger, blobs, bucket, options)
}

fn spawn_over(
    runtime: &tokio::runtime::Handle,
    ledger: Arc<Ledger>,
    blobs: Arc<Blobs>,
    bucket: SharedBucket,
    options: UploadOptions,
) -> UploaderHandle {
    let shared = Arc::new(Shared {
        ledger,
        blobs,
        condemned: Condemned::of(&bucket),
        bucket,
        places: Arc::new(Semaphore::new(options.parallel.max(1))),
        options,
        counters: Arc::default(),
        kicks: watch::Sender::new(0),
        stopping: AtomicBool::new(false),
        cleaned: Notify::new(),
        waiting: AtomicUsize::new(0),
    });
    let run = runtime.spawn(Loop::new(Arc::clone(&shared)).run());
    UploaderHandle { shared, run }
}

impl UploaderHandle {
    /// Looks at the queue now, and forgets a wait after a failure.
    pub fn kick(&self) {
        self.shared.kick();
    }

    pub fn status(&self) -> UploadStatus {
        self.shared.counters.status()
    }

    /// Waits until none of the blobs dirty at the call is dirty any more; ends early when
    /// `deadline` passes, or the index fails. Returns how many are left.
    ///
    /// A blob that turns out to be damaged is quarantined, and does not count as left.
    pub async fn wait_clean(&self, deadline: Instant) -> u64 {
        let Ok(mut left) = self.shared.ledger.dirty_blobs(usize::MAX) else {
            return self.shared.ledger.totals().dirty_blobs;
        };
        let _waiting = WaitingGuard::new(&self.shared);
        self.shared.kick();
        // Uploads go oldest first, as the list does: what is done is found at its front mostly.
        left.reverse();
        loop {
            let cleaned = self.shared.cleaned.notified();
            while left.last().is_some_and(|row| !self.shared.is_awaited(row)) {
                left.pop();
            }
            if left.is_empty() {
                return 0;
            }
            // Not every way to be no longer dirty goes through the uploader.
            let look = deadline.min(Instant::now() + POLL);
            if timeout_at(look, cleaned).await.is_err() && Instant::now() >= deadline {
                left.retain(|row| self.shared.is_awaited(row));
                return left.len() as u64;
            }
            sleep(LOOK_PAUSE).await;
        }
    }

    /// Whoever publishes names asks this first.
    pub fn voucher(&self, fetcher: Arc<Fetcher>) -> Voucher {
        Voucher::new(Arc::clone(&self.shared), fetcher)
    }

    /// Ends the uploads under way and stops. What is not done stays dirty.
    pub async fn shutdown(self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.kick();
        if let Err(err) = self.run.await
            && err.is_panic()
        {
            error!("the uploader had panicked");
        }
    }
}

/// Someone waits for a flush while this lives.
struct WaitingGuard<'a>(&'a Shared);

impl<'a> WaitingGuard<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.waiting.fetch_add(1, Ordering::AcqRel);
        Self(shared)
    }
}

impl Drop for WaitingGuard<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Shared {
    fn kick(&self) {
        self.kicks.send_modify(|kicks| *kicks += 1);
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn uploading(&self, bytes: u64) -> UploadingGuard {
        self.counters.uploading(bytes)
    }

    /// Whether a blob is still to be uploaded.
    fn is_awaited(&self, row: &BlobRow) -> bool {
        // Where nobody can tell it may be.
        !self.ledger.is_unwanted(&row.digest) && self.blobs.is_dirty(&row.digest).unwrap_or(true)
    }
}

/// The state of the loop that starts uploads.
struct Loop {
    shared: Arc<Shared>,
    queue: VecDeque<Arc<BlobRow>>,
    busy: HashSet<Digest>,
    /// Blobs that this disk did not give, and when they are tried again.
    unreadable: HashMap<Digest, (Instant, Backoff)>,
    tasks: JoinSet<Vec<Ended>>,
    /// Small blobs that do not fill a pack wait until then.
    gathering_until: Instant,
    /// Some do.
    gathering: bool,
    /// Set after the bucket failed, until an upload succeeds.
    failing: bool,
    backoff: Backoff,
    /// Nothing is started before this.
    paused_until: Option<Instant>,
    /// Nothing is started before this while programs wait for the daemon.
    paced_until: Instant,
    paced_since: Option<Instant>,
    progress_seen: u64,
    operator_told: Option<Instant>,
}

impl Loop {
    fn new(shared: Arc<Shared>) -> Self {
        Self {
            backoff: Backoff::new(FIRST_WAIT, shared.options.max_backoff),
            shared,
            queue: VecDeque::new(),
            busy: HashSet::new(),
            unreadable: HashMap::new(),
            tasks: JoinSet::new(),
            gathering_until: Instant::now(),
            gathering: false,
            failing: false,
            paused_until: None,
            paced_until: Instant::now(),
            paced_since: None,
            progress_seen: 0,
            operator_told: None,
        }
    }

    async fn run(mut self) {
        let mut kicks = self.shared.kicks.subscribe();
        while !self.shared.is_stopping() {
            let now = Instant::now();
            if self.paused_until.is_none_or(|until| until <= now) {
                self.paused_until = None;
                if let Err(err) = self.start_uploads() {
                    error!(error = %err, "cannot read the upload queue");
                }
            }
            let mut until = self
                .paused_until
                .unwrap_or(now + POLL)
                .min(now + self.longest_wait());
            if self.paused_until.is_none()
                && self.is_paced()
                && !self.queue.is_empty()
                && self.tasks.len() < self.most()
            {
                until = until.min(self.paced_until);
            }
            if self.gathering && self.paused_until.is_none() && self.tasks.len() < self.most() {
                until = until.min(self.gathering_until.max(now));
            }
            tokio::select! {
                Some(done) = self.tasks.join_next() => match done {
                    Ok(ended) => {
                        for (digest, result) in ended {
                            self.finished(digest, result);
                        }
                    }
                    Err(err) => error!(error = %err, "an upload ended by itself"),
                },
                kicked = kicks.changed() => {
                    debug_assert!(kicked.is_ok(), "the sender lives in what this holds");
                    self.forget_waits();
                }
                () = sleep_until(until) => {}
            }
        }
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        if timeout(SHUTDOWN_GRACE, ended).await.is_err() {
            self.tasks.shutdown().await;
        }
    }

    /// The wait is cut short for a flush that begins in the middle of it.
    fn longest_wait(&mut self) -> Duration {
        if self.shared.waiting.load(Ordering::Acquire) == 0 {
            return POLL.max(self.shared.options.max_backoff);
        }
        let soon = Instant::now() + FLUSH_WAIT;
        if let Some(until) = &mut self.paused_until {
            *until = (*until).min(soon);
        }
        FLUSH_WAIT
    }

    fn forget_waits(&mut self) {
        self.paused_until = None;
        self.backoff.reset();
        self.unreadable.clear();
        self.gathering_until = Instant::now();
    }

    /// Whether uploads give way to programs: while these keep the daemon busy, but not for ever.
    fn is_paced(&mut self) -> bool {
        if self.shared.waiting.load(Ordering::Acquire) > 0 || !self.shared.options.activity.is_busy() {
            self.paced_since = None;
            return false;
        }
        self.paced_since.get_or_insert_with(Instant::now).elapsed() < MAX_PACED
    }

    /// How many uploads may run.
    fn most(&self) -> usize {
        if self.failing {
            1
        } else {
            self.shared.options.parallel.max(1)
        }
    }

    /// Starts as many uploads as may run.
    fn start_uploads(&mut self) -> Result<(), StoreError> {
        let most = self.most();
        self.gathering = false;
        if self.shared.ledger.totals().dirty_blobs == 0 {
            self.queue.clear();
            self.paced_since = None;
            return Ok(());
        }
        if self.tasks.len() >= most {
            return Ok(());
        }
        let now = Instant::now();
        if self.queue.is_empty() {
            // Those that are passed over below must not hide the others.
            let unwanted = self.shared.ledger.unwanted_count();
            let limit = BATCH + self.busy.len() + self.unreadable.len() + unwanted;
            self.queue.extend(self.shared.ledger.dirty_blobs(limit)?);
        }
        while self.tasks.len() < most {
            if self.is_paced() && now < self.paced_until {
                break;
            }
            let Some(rows) = self.next_upload(now) else {
                break;
            };
            self.paced_until = now + BUSY_PAUSE * rows.len() as u32;
            self.busy.extend(rows.iter().map(|row| row.digest));
            let shared = Arc::clone(&self.shared);
            self.tasks.spawn(async move {
                match &rows[..] {
                    [row] => {
                        let (digest, row) = (row.digest, Arc::clone(row));
                        vec![(digest, upload_blob(shared, row).await)]
                    }
                    _ => upload_together(shared, rows).await,
                }
            });
        }
        Ok(())
    }

    /// What goes next: one blob, or several small ones.
    fn next_upload(&mut self, now: Instant) -> Option<Vec<Arc<BlobRow>>> {
        loop {
            let first = self.queue.pop_front()?;
            if !self.is_free(&first.digest, now) {
                continue;
            }
            if !small::fits(0, 0, first.size) {
                return Some(vec![first]);
            }
            let mut bytes = first.size;
            let mut together = vec![first];
            let mut more = false;
            for row in std::mem::take(&mut self.queue) {
                if !self.is_free(&row.digest, now) {
                    continue;
                }
                if small::fits(together.len(), bytes, row.size) {
                    bytes += row.size;
                    together.push(row);
                } else {
                    more |= row.size <= pack::small_bytes();
                    self.queue.push_back(row);
                }
            }
            let is_full = more || together.len() == MAX_MEMBERS;
            if !is_full && now < self.gathering_until && self.shared.waiting.load(Ordering::Acquire) == 0 {
                // They stay in the index, and are found there again with those that came meanwhile.
                self.gathering = true;
                continue;
            }
            self.gathering_until = now + GATHER;
            return Some(together);
        }
    }

    /// Whether a blob may be uploaded now.
    fn is_free(&self, digest: &Digest, now: Instant) -> bool {
        let waits = self.unreadable.get(digest);
        !self.busy.contains(digest)
            && !self.shared.ledger.is_unwanted(digest)
            && waits.is_none_or(|(until, _)| *until <= now)
    }

    fn finished(&mut self, digest: Digest, result: Result<Outcome, UploadError>) {
        self.busy.remove(&digest);
        match result {
            Ok(outcome) => {
                self.unreadable.remove(&digest);
                debug!(%digest, ?outcome, "upload ended");
                if outcome == Outcome::Durable {
                    self.failing = false;
                    self.backoff.reset();
                }
                self.shared.cleaned.notify_waiters();
            }
            Err(UploadError::Stopped | UploadError::Together) => {}
            Err(UploadError::Unwanted) => self.shared.cleaned.notify_waiters(),
            // It was forgotten when it was about to be read.
            Err(UploadError::Store(_)) if self.shared.blobs.is_dirty(&digest).is_ok_and(|dirty| !dirty) => {
                self.shared.cleaned.notify_waiters();
            }
            Err(UploadError::TogetherLater) => self.wait_by_itself(digest),
            Err(UploadError::Bucket(err)) => self.bucket_failed(&err),
            Err(UploadError::Store(err)) => {
                let words = chain(&err);
                error!(%digest, error = %words, "a dirty blob cannot be read; the upload is tried again later");
                self.shared.counters.failed(words);
                self.wait_by_itself(digest);
            }
        }
    }

    fn wait_by_itself(&mut self, digest: Digest) {
        let again = Backoff::new(POLL, OPERATOR_LOG_PAUSE);
        let (until, backoff) = self.unreadable.entry(digest).or_insert((Instant::now(), again));
        *until = Instant::now() + backoff.next_wait();
    }

    fn bucket_failed(&mut self, err: &crate::tier::TierError) {
        let words = chain(err);
        let progress = self.shared.counters.progress();
        if progress != self.progress_seen {
            self.progress_seen = progress;
            self.backoff.reset();
        }
        let now = Instant::now();
        if err.is_transient() {
            if !self.failing {
                warn!(error = %words, "uploads fail; they will be tried again");
            }
        } else if self
            .operator_told
            .is_none_or(|told| now - told >= OPERATOR_LOG_PAUSE)
        {
            error!(error = %words, "uploads are refused; nothing is lost, but nothing leaves this machine");
            self.operator_told = Some(now);
        }
        self.failing = true;
        self.shared.counters.failed(words);
        self.shared.counters.retried();
        // Uploads that fail together are one failure.
        if self.paused_until.is_none() {
            let wait = if err.is_transient() {
                self.backoff.next_wait()
            } else {
                OPERATOR_WAIT
            };
            self.paused_until = Some(now + wait);
        }
    }
}
