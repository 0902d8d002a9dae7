//! Writes this machine's changes to the volume's log.
//!
//! This file is the loop and its handle; `writer` makes the segments, and
//! [`super::cut`] decides what goes into them.
//!
//! # Policy
//!
//! - Pending changes are looked at every `PACE` (blobs become durable beside),
//!   every `IDLE_PACE` while there are none, and at a kick. A look that took
//!   long is repeated less often, so that a backlog never costs more than a
//!   tenth of a core.
//! - A burst of changes becomes few segments: `PACE` is also the least time
//!   between two of them, unless the first one was full, or someone waits.
//! - After a failure the wait doubles up to `MAX_BACKOFF`, with jitter. Failures
//!   are told once each in the log, and in the status until a step succeeds.
//!
//! - A publisher that is halted (its volume was deleted) writes nothing any more; what is pending stays.
//!
//! In a read-only mount there is no publisher.

mod writer;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

pub(super) use writer::{Clocks, LATE_MILLIS, PublishError, Source, Step, Writer};
#[cfg(test)]
pub(super) use writer::{OLD_HOLD, OLD_MILLIS};

use super::{
    TreeError,
    background::{blocking, words},
    change::{EntryBlob, EntryChunks},
    error::NotLoaded,
    tree::{Pending, Readiness, TellKernel, Tree},
};
use crate::{
    base::{BoxFuture, chunk::ChunkList, clock::Stamp, digest::Digest, retry::Backoff},
    store::{
        Store, StoreError,
        rows::{Change, Ino},
    },
    tier::SharedBucket,
    upload::vouch::{Named, NamedChunks, Vouch, Voucher},
};

const PACE: Duration = Duration::from_millis(250);
const IDLE_PACE: Duration = Duration::from_millis(500);
/// While someone waits for changes to be published.
const HASTY_PACE: Duration = Duration::from_millis(50);
/// Waits between two looks are at least this many times as long as a look.
const LOOK_SHARE: u32 = 10;
/// Changes that are made again at once.
const TOGETHER: usize = 512;
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// What the publisher is doing.
#[derive(Clone, Debug, Default)]
pub struct PublishStatus {
    /// As far as the last look went, which has a limit.
    pub pending_changes: u64,
    pub published_changes: u64,
    pub segments: u64,
    pub segment_bytes: u64,
    /// Files that were never published, whose blobs are neither here nor in the bucket any more.
    pub lost: u64,
    pub last_error: Option<String>,
}

/// How a publisher learns what the others said while this machine was away.
#[derive(Clone)]
pub struct Meanwhile {
    /// Whether all of it was read, up to a moment ago.
    pub is_read: Arc<dyn Fn() -> bool + Send + Sync>,
    /// Loads a directory from catalogs; false when that failed.
    pub load: Arc<dyn Fn(NotLoaded) -> BoxFuture<'static, bool> + Send + Sync>,
}

#[derive(Debug)]
pub struct PublisherHandle(Publishing<Home>);

/// The loop at work, for whichever source of changes.
#[derive(Debug)]
pub(super) struct Publishing<S> {
    source: Arc<S>,
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    status: Mutex<PublishStatus>,
    /// Ends every wait.
    kick: Notify,
    /// Ends the wait between two looks, but not the one after a failure.
    hasten: Notify,
    /// Why nothing may be published any more.
    halted: OnceLock<String>,
}

/// Ends publishing for good, from outside.
#[derive(Clone, Debug)]
pub struct PublishHalt(Arc<Shared>);

impl PublishHalt {
    /// Lets nothing be published any more; the status says `why`.
    pub fn halt(&self, why: String) {
        if self.0.halted.set(why).is_ok() {
            self.0.kick.notify_one();
        }
    }
}

impl std::fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Meanwhile").finish_non_exhaustive()
    }
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, PublishStatus> {
        self.status
            .lock()
            .expect("no code panics while it holds the status")
    }
}

/// Starts the publisher on `runtime`.
#[expect(
    clippy::too_many_arguments,
    reason = "each is another part of what is put together"
)]
pub fn spawn(
    runtime: &tokio::runtime::Handle,
    volume: String,
    tree: Arc<Tree>,
    store: Arc<Store>,
    bucket: SharedBucket,
    voucher: Voucher,
    tell_kernel: TellKernel,
    meanwhile: Meanwhile,
) -> PublisherHandle {
    let machine = store.machine;
    let home = Arc::new(Home {
        tree,
        store,
        voucher,
        tell_kernel,
        meanwhile,
        lost: AtomicU64::new(0),
        lost_told: AtomicU64::new(0),
    });
    let started = Instant::now();
    let clock = Arc::clone(&bucket);
    let clocks = Clocks {
        bucket: Arc::new(move || clock.clock().now_millis()),
        uptime: Arc::new(move || started.elapsed()),
    };
    let source = Arc::clone(&home);
    let open = move || {
        let (source, bucket) = (Arc::clone(&source), Arc::clone(&bucket));
        Writer::open(volume.clone(), machine, source, bucket, clocks.clone())
    };
    PublisherHandle(start(runtime, home, open))
}

pub(super) fn start<S: Source>(
    runtime: &tokio::runtime::Handle,
    source: Arc<S>,
    open: impl Fn() -> Result<Writer<S>, StoreError> + Send + Sync + 'static,
) -> Publishing<S> {
    let shared = Arc::new(Shared::default());
    let (stop, stopped) = watch::channel(false);
    let task = runtime.spawn(run(open, Arc::clone(&shared), stopped));
    Publishing {
        source,
        shared,
        stop,
        task,
    }
}

/// Publishes until told to stop. A step that is broken off leaves nothing half done.
async fn run<S: Source>(
    open: impl Fn() -> Result<Writer<S>, StoreError>,
    shared: Arc<Shared>,
    mut stop: watch::Receiver<bool>,
) {
    let mut writer = None;
    let mut backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
    loop {
        if let Some(why) = shared.halted.get() {
            tracing::error!(why, "nothing is published any more");
            shared.status().last_error = Some(why.clone());
            return;
        }
        let result = tokio::select! {
            result = step(&mut writer, &open) => result,
            _ = stop.changed() => return,
        };
        let failed = result.is_err();
        let wait = match result {
            Ok(step) => {
                backoff.reset();
                note_step(&mut shared.status(), &step);
                let pace = if step.pending > 0 { PACE } else { IDLE_PACE };
                pace.max(step.look_took * LOOK_SHARE)
            }
            Err(err) => {
                note_failure(&mut shared.status(), &err);
                backoff.next_wait()
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shared.kick.notified() => backoff.reset(),
            () = shared.hasten.notified(), if !failed => {}
            _ = stop.changed() => return,
        }
    }
}

async fn step<S: Source>(
    writer: &mut Option<Writer<S>>,
    open: &impl Fn() -> Result<Writer<S>, StoreError>,
) -> Result<Step, PublishError> {
    if writer.is_none() {
        *writer = Some(open()?);
    }
    writer.as_mut().expect("it was opened above").step().await
}

fn note_step(status: &mut PublishStatus, step: &Step) {
    if step.unpublishable.is_some() && status.last_error != step.unpublishable {
        tracing::error!(why = step.unpublishable, "a change stays on this machine");
    }
    status.pending_changes = step.pending;
    status.published_changes += step.published;
    status.segments += step.segments;
    status.segment_bytes += step.segment_bytes;
    status.last_error.clone_from(&step.unpublishable);
}

fn note_failure(status: &mut PublishStatus, err: &PublishError) {
    let text = words(err);
    if status.last_error.as_ref() != Some(&text) {
        tracing::warn!(error = text, "changes are not published; trying again");
    }
    status.last_error = Some(text);
}

impl PublisherHandle {
    /// Looks for changes now, and forgets a wait after a failure.
    pub fn kick(&self) {
        self.0.kick();
    }

    pub fn status(&self) -> PublishStatus {
        PublishStatus {
            lost: self.0.source.lost.load(Ordering::Relaxed),
            ..self.0.status()
        }
    }

    /// How many files were lost of which nobody who waited was told yet: it is for the caller to tell.
    pub fn take_lost(&self) -> u64 {
        let home = &self.0.source;
        let lost = home.lost.load(Ordering::Relaxed);
        lost.saturating_sub(home.lost_told.swap(lost, Ordering::Relaxed))
    }

    /// What ends publishing for good.
    pub fn to_halt(&self) -> PublishHalt {
        PublishHalt(Arc::clone(&self.0.shared))
    }

    /// What it is doing, for whoever outlives this handle.
    pub fn watch_status(&self) -> impl Fn() -> PublishStatus + Send + Sync + 'static {
        let shared = Arc::clone(&self.0.shared);
        move || shared.status().clone()
    }

    /// Waits until every change that was pending at the call (open files excepted) is published; ends early
    /// when `deadline` passes. Returns how many are left: at least that many, when they are very many.
    ///
    /// A name that changes again meanwhile is waited for until its newest change is published.
    pub async fn wait_published(&self, deadline: Instant) -> u64 {
        self.0.wait_published(deadline).await
    }

    /// Stops. What is pending stays pending, across restarts.
    pub async fn shutdown(self) {
        self.0.shutdown().await;
    }
}

impl<S: Source> Publishing<S> {
    pub(super) fn kick(&self) {
        self.shared.kick.notify_one();
    }

    pub(super) fn status(&self) -> PublishStatus {
        self.shared.status().clone()
    }

    pub(super) async fn wait_published(&self, deadline: Instant) -> u64 {
        let mark = self.source.next_place();
        self.kick();
        loop {
            let began = Instant::now();
            let left = match self.source.pending(writer::MAX_LOOK).await {
                Ok(pending) => pending.iter().filter(|of| counts(of, mark)).count() as u64,
                // The loop meets the same error, and tells it.
                Err(_) => 1,
            };
            if left == 0 || Instant::now() >= deadline || self.shared.halted.get().is_some() {
                return left;
            }
            self.shared.hasten.notify_one();
            let pace = HASTY_PACE.max(began.elapsed() * 4);
            tokio::time::sleep_until(deadline.min(Instant::now() + pace)).await;
        }
    }

    pub(super) async fn shutdown(self) {
        self.stop.send_replace(true);
        if let Err(err) = self.task.await {
            tracing::error!(error = %err, "the publisher had died");
        }
    }
}

/// Whether a change was pending when places were at `mark`, and could be published.
fn counts(pending: &Pending, mark: u64) -> bool {
    let publishable = match pending.readiness {
        Readiness::Waiting | Readiness::Ready(_) => true,
        Readiness::Writing | Readiness::Rewriting | Readiness::Never => false,
    };
    publishable && pending.place.first_seq < mark
}

/// This machine, as the writer needs it.
struct Home {
    tree: Arc<Tree>,
    store: Arc<Store>,
    voucher: Voucher,
    tell_kernel: TellKernel,
    meanwhile: Meanwhile,
    lost: AtomicU64,
    /// How many of them somebody who waited was told of.
    lost_told: AtomicU64,
}

impl std::fmt::Debug for Home {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Home").finish_non_exhaustive()
    }
}

impl Home {
    async fn renew_some(&self, old: &[Pending]) -> Result<bool, TreeError> {
        let names = || old.iter().map(|of| (of.parent, of.name.clone(), of.stamp));
        // Each of them has one directory to be loaded, and may be one itself.
        for _ in 0..=2 * old.len() {
            let (tree, names) = (Arc::clone(&self.tree), names().collect::<Vec<_>>());
            match blocking(move || tree.renew(&names)).await {
                Err(TreeError::NotLoaded(missing)) => {
                    if !(self.meanwhile.load)(missing).await {
                        return Ok(false);
                    }
                }
                renewed => {
                    for path in renewed? {
                        tracing::warn!(
                            path = %String::from_utf8_lossy(&path),
                            "a change waited for so long that it counts as made now: later deletions of it may be forgotten"
                        );
                    }
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Hides files whose blobs are nowhere: they were never published, and never will be.
    async fn lose(&self, chosen: &[Pending], lost: &[Digest]) -> Result<(), TreeError> {
        for pending in chosen {
            let Some(blob) = blob_of(pending).filter(|blob| lost.contains(&blob.digest)) else {
                continue;
            };
            let (tree, digest) = (Arc::clone(&self.tree), blob.digest);
            let (parent, name) = (pending.parent, pending.name.clone());
            let notices = blocking(move || tree.lose_name(parent, &name, digest)).await?;
            // Else it has other bytes by now.
            if !notices.is_empty() {
                self.lost.fetch_add(1, Ordering::Relaxed);
                tracing::error!(
                    name = %String::from_utf8_lossy(&pending.name),
                    %digest,
                    "a file is lost that was never published: this machine slept for longer than the sweep window"
                );
                (self.tell_kernel)(notices);
            }
        }
        Ok(())
    }
}

fn blob_of(pending: &Pending) -> Option<&EntryBlob> {
    match &pending.readiness {
        Readiness::Ready(change) => change.entry.as_ref()?.blob.as_ref(),
        Readiness::Writing | Readiness::Rewriting | Readiness::Waiting | Readiness::Never => None,
    }
}

/// What the bucket must have of a blob; nothing of an empty one.
pub(super) fn named(blob: &EntryBlob) -> Option<Named> {
    let chunks = match &blob.chunks {
        EntryChunks::Single if blob.size == 0 => return None,
        EntryChunks::Single => {
            NamedChunks::Told(ChunkList::single(blob.digest, blob.size), blob.places.clone())
        }
        EntryChunks::Inline(list) => NamedChunks::Told(list.clone(), blob.places.clone()),
        EntryChunks::Listed { digest, size } => NamedChunks::Listed(*digest, *size),
    };
    Some(Named {
        digest: blob.digest,
        size: blob.size,
        chunks,
    })
}

impl Source for Home {
    fn pending(&self, limit: usize) -> BoxFuture<'_, Result<Vec<Pending>, TreeError>> {
        let tree = Arc::clone(&self.tree);
        Box::pin(blocking(move || tree.pending(limit)))
    }

    fn vouch<'a>(&'a self, chosen: &'a [Pending]) -> BoxFuture<'a, Result<Option<u64>, PublishError>> {
        Box::pin(async move {
            let asked = chosen.iter().filter_map(blob_of).filter_map(named).collect();
            match self.voucher.vouch(asked).await? {
                Vouch::Until(millis) => Ok(Some(millis)),
                Vouch::Later => Ok(None),
                Vouch::Lost(lost) => {
                    self.lose(chosen, &lost).await?;
                    Ok(None)
                }
            }
        })
    }

    fn renew<'a>(&'a self, old: &'a [Pending]) -> BoxFuture<'a, Result<bool, TreeError>> {
        Box::pin(async move {
            if !(self.meanwhile.is_read)() {
                return Ok(false);
            }
            for old in old.chunks(TOGETHER) {
                if !self.renew_some(old).await? {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    fn published(&self, done: Vec<(Ino, Vec<u8>, Stamp)>) -> BoxFuture<'_, Result<(), TreeError>> {
        let tree = Arc::clone(&self.tree);
        Box::pin(blocking(move || tree.published(&done)))
    }

    fn next_place(&self) -> u64 {
        self.store.ledger.next_place()
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
