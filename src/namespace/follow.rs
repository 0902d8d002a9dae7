//! Reads the other machines' changes from the volume's log.
//!
//! This file is the loop and its handle; `reader` lists, fetches and applies, and
//! `cursor` knows what was seen and where to look.
//!
//! # Policy
//!
//! - A poll comes every `BUSY_PACE` while the mount was used within `BUSY_FOR`, else every
//!   `IDLE_PACE`; the first use after a rest brings one at once.
//! - It lists from the newest key less some seconds; the first poll, one every `FULL_PACE`
//!   and one that someone waits for list the whole window.
//! - After a failure the wait doubles up to `MAX_BACKOFF`, with jitter. Failures are told
//!   once each in the log, and in the status until a poll succeeds.
//! - The cursor is kept in the ledger with every full listing, and every `KEEP_PACE` while
//!   segments come; a crash costs a second reading of the segments since.

mod cursor;
mod reader;

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

pub(super) use reader::{FollowError, Polled, Reader, Sink};

use super::{
    TreeError,
    background::{blocking, words},
    change::PathChange,
    tree::{TellKernel, Tree},
};
use crate::{
    base::{BoxFuture, digest::Digest, retry::Backoff},
    store::{Store, StoreError, rows::Change},
    tier::SharedBucket,
};

const BUSY_PACE: Duration = Duration::from_secs(1);
const IDLE_PACE: Duration = Duration::from_secs(10);
const BUSY_FOR: Duration = Duration::from_secs(300);
const FULL_PACE: Duration = Duration::from_secs(60);
const KEEP_PACE: Duration = Duration::from_secs(5);
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// What the follower has seen.
#[derive(Clone, Debug, Default)]
pub struct FollowStatus {
    pub segments: u64,
    pub changes: u64,
    /// Milliseconds since 1970, bucket's clock: everything published before is applied here.
    pub caught_up_millis: u64,
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
    fn new() -> Self {
        Self {
            started: Instant::now(),
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
        let rested = self.rest() > BUSY_FOR;
        self.used.store(self.uptime_millis(), Ordering::Relaxed);
        if rested {
            self.wake.notify_one();
        }
    }

    /// Waits for a poll that begins after the call.
    async fn caught_up(&self, deadline: Instant) -> bool {
        let wanted = self.begun.load(Ordering::SeqCst) + 1;
        let mut applied = self.applied.subscribe();
        self.asked.notify_one();
        let reached = applied.wait_for(|poll| *poll >= wanted);
        matches!(tokio::time::timeout_at(deadline, reached).await, Ok(Ok(_)))
    }
}

/// Starts the follower on `runtime`.
pub fn spawn(
    runtime: &tokio::runtime::Handle,
    volume: String,
    tree: Arc<Tree>,
    store: Arc<Store>,
    bucket: SharedBucket,
    tell_kernel: TellKernel,
) -> FollowerHandle {
    let machine = store.machine;
    let sink = Arc::new(Home {
        tree,
        store,
        tell_kernel,
    });
    let open = move || {
        let clock = Arc::clone(&bucket);
        Reader::open(
            volume.clone(),
            machine,
            Arc::clone(&sink),
            Arc::clone(&bucket),
            Arc::new(move || clock.clock().now_millis()),
        )
    };
    start(runtime, open)
}

pub(super) fn start<S: Sink>(
    runtime: &tokio::runtime::Handle,
    open: impl Fn() -> Result<Reader<S>, StoreError> + Send + Sync + 'static,
) -> FollowerHandle {
    let shared = Arc::new(Shared::new());
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
        note(&mut shared.status(), &done, result.as_ref().err());
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
            let pace = if shared.rest() <= BUSY_FOR {
                BUSY_PACE
            } else {
                IDLE_PACE
            };
            pace.saturating_sub(began.elapsed())
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shared.wake.notified(), if !failed => {}
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

fn note(status: &mut FollowStatus, done: &Polled, err: Option<&FollowError>) {
    status.segments += done.segments;
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

    /// The same as a function that can be handed on.
    pub fn on_use(&self) -> Arc<dyn Fn() + Send + Sync> {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || shared.note_use())
    }

    pub fn status(&self) -> FollowStatus {
        self.shared.status().clone()
    }

    /// Waits until one whole poll that began after the call has been applied: it sees
    /// everything that was published before the call. False when `deadline` passed first.
    pub async fn caught_up(&self, deadline: Instant) -> bool {
        self.shared.caught_up(deadline).await
    }

    /// Stops, and keeps what was seen.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        if let Err(err) = self.task.await {
            tracing::error!(error = %err, "the follower had died");
        }
    }
}

/// This machine, as the reader needs it.
struct Home {
    tree: Arc<Tree>,
    store: Arc<Store>,
    tell_kernel: TellKernel,
}

impl Sink for Home {
    fn apply(&self, changes: Vec<PathChange>) -> BoxFuture<'_, Result<(), TreeError>> {
        let tree = Arc::clone(&self.tree);
        let staging = self.store.staging.clone();
        let tell_kernel = Arc::clone(&self.tell_kernel);
        Box::pin(blocking(move || {
            let applied = tree.apply(crate::store::rows::TreeLayer::TOP, changes)?;
            for id in applied.discarded {
                staging.remove_after_barrier(id);
            }
            if !applied.notices.is_empty() {
                tell_kernel(applied.notices);
            }
            Ok(())
        }))
    }

    fn fetch_list(&self, list: (Digest, u64), blob: (Digest, u64)) -> BoxFuture<'_, Result<(), StoreError>> {
        let fetcher = &self.store.fetcher;
        Box::pin(fetcher.fetch_manifest(list.0, list.1, blob.0, blob.1))
    }

    fn note(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.ledger.meta(key)
    }

    fn keep_note(&self, key: &str, value: Vec<u8>) -> Result<(), StoreError> {
        self.store
            .ledger
            .commit(vec![Change::PutMeta(key.to_owned(), value)])
    }
}
