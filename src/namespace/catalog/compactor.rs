//! Compacts the mounted volume, and those below it, now and then, without anyone asking.
//!
//! # Policy
//!
//! - It is worth looking when so much was published or read here as would make a catalog due, of segments or of
//!   bytes; looking costs the head and listings. While the volume rests nothing is asked.
//! - A catalog is due after [`Threshold::segments`] segments or [`Threshold::bytes`] bytes of log since the
//!   last one, as far as the log is older than [`Threshold::trail`]. What is too young for it is waited for, also when
//!   nothing more comes.
//! - All machines of a fleet see that at the same time: each waits a random part of
//!   [`Threshold::spread`] and looks again, so that mostly one does the work. Two that do it all the
//!   same cost requests, nothing else. How long that may take is a setting of the mount (`compact-within`): a machine that is
//!   always there may do it for others, which leave it to it.
//! - After a failure it waits ten minutes. A server without conditional writes, or credentials that do not
//!   permit it, end it: that is said once. Of a volume below the mounted one the latter is no error, because others have it
//!   mounted who may.
//!
//! A mount that only reads has none, nor have the layers below a fork that keeps its blobs apart: its machines may not write
//! there ([`volumes`]).
//!
//! What jobs write into the parent of their forks may be all that is ever written there, and a job may be over before it
//! would be thought of. So whoever promoted looks as well, once, and compacts at once ([`after_writing`]). Many may end
//! at the same time; each draws by chance how far beyond the threshold it goes by, so that mostly one does the work.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::sync::watch;

use super::{
    CatalogError,
    compact::{self, CompactOptions, Outcome, TRAIL},
    head,
};
use crate::{
    base::{
        id::{MachineId, random_bytes},
        volume::{Stack, StackLayer, VolumeName},
    },
    namespace::{
        background::words,
        follow::{SegmentKey, before},
    },
    tier::{SharedBucket, TierError, layout},
};

/// When a catalog is due.
#[derive(Clone, Copy, Debug)]
pub struct Threshold {
    /// How often it is thought of.
    pub pace: Duration,
    pub segments: u64,
    pub bytes: u64,
    pub spread: Duration,
    pub trail: Duration,
}

/// The least time from one thought to the next.
const MIN_PACE: Duration = Duration::from_secs(1);

impl Threshold {
    /// One that makes a catalog within `within` after it is due, and the time that the work takes.
    #[must_use]
    pub fn within(within: Duration) -> Self {
        let pace = (within / 6).max(MIN_PACE);
        Self {
            pace,
            spread: within.saturating_sub(pace),
            // What a machine that begins reads within a few seconds: sixteen at once, 30 ms each.
            segments: 2000,
            bytes: 64 << 20,
            trail: TRAIL,
        }
    }

    fn is_met(&self, amount: LogAmount) -> bool {
        amount.segments >= self.segments || amount.bytes >= self.bytes
    }
}

/// The wait after a failure.
const RETRY: Duration = Duration::from_secs(600);

/// How much of a log there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogAmount {
    pub segments: u64,
    pub bytes: u64,
}

impl LogAmount {
    fn add(&mut self, bytes: u64) {
        self.segments += 1;
        self.bytes += bytes;
    }

    fn without(self, other: Self) -> Self {
        Self {
            segments: self.segments.saturating_sub(other.segments),
            bytes: self.bytes.saturating_sub(other.bytes),
        }
    }
}

/// What was published by this machine and read of others, since the daemon started.
pub type LogSeen = Arc<dyn Fn() -> LogAmount + Send + Sync>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompactorStatus {
    /// Catalogs that this daemon made.
    pub done: u64,
    pub last_error: Option<String>,
}

#[derive(Debug)]
pub struct CompactorHandle {
    status: Arc<Mutex<CompactorStatus>>,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl CompactorHandle {
    pub fn status(&self) -> CompactorStatus {
        lock(&self.status).clone()
    }

    /// Stops; a compaction under way is given up, which costs nothing but its work.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        if let Err(err) = self.task.await {
            tracing::error!(error = %err, "the compactor had died");
        }
    }
}

fn lock(status: &Mutex<CompactorStatus>) -> MutexGuard<'_, CompactorStatus> {
    status.lock().expect("no code panics while it holds the status")
}

/// A volume that is compacted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compacted {
    pub volume: VolumeName,
    /// It lies below the mounted one.
    pub is_below: bool,
}

/// The volumes of a stack that a machine compacts which has it mounted and writes to it.
#[must_use]
pub fn volumes(stack: &Stack) -> Vec<Compacted> {
    let [top, below @ ..] = stack.layers() else {
        return Vec::new();
    };
    if top.frozen.is_some() {
        return Vec::new();
    }
    // What is seen up to a moment has its catalog.
    let below = below
        .iter()
        .filter(|layer| !top.own_prefix && layer.until_millis.is_none());
    let compacted = |layer: &StackLayer, is_below| Compacted {
        volume: layer.volume.clone(),
        is_below,
    };
    std::iter::once(compacted(top, false))
        .chain(below.map(|layer| compacted(layer, true)))
        .collect()
}

/// Makes a catalog of `volume` if one is due, for whoever has written to it and goes. True if it made one.
pub async fn after_writing(
    bucket: &SharedBucket,
    volume: &VolumeName,
    machine: MachineId,
    spill_dir: PathBuf,
) -> Result<bool, CatalogError> {
    let threshold = Threshold::within(Duration::ZERO);
    let beyond = 1.0 + chance();
    let work = Work {
        volume: volume.clone(),
        bucket: Arc::clone(bucket),
        machine,
        spill_dir,
        threshold: Threshold {
            segments: (threshold.segments as f64 * beyond) as u64,
            bytes: (threshold.bytes as f64 * beyond) as u64,
            ..threshold
        },
    };
    let waiting = work.since_head().await?;
    Ok(work.threshold.is_met(waiting.old) && work.compact().await?)
}

/// From 0 to 1.
fn chance() -> f64 {
    f64::from(u32::from_le_bytes(random_bytes())) / f64::from(u32::MAX)
}

/// One volume, and how it is compacted.
struct Work {
    volume: VolumeName,
    bucket: SharedBucket,
    machine: MachineId,
    spill_dir: PathBuf,
    threshold: Threshold,
}

struct Compactor {
    work: Work,
    is_below: bool,
    seen: LogSeen,
    status: Arc<Mutex<CompactorStatus>>,
}

/// Starts to watch over the log of a volume on `runtime`.
pub fn spawn(
    runtime: &tokio::runtime::Handle,
    compacted: Compacted,
    bucket: &SharedBucket,
    machine: MachineId,
    spill_dir: PathBuf,
    seen: LogSeen,
    threshold: Threshold,
) -> CompactorHandle {
    let status = Arc::default();
    let compactor = Compactor {
        work: Work {
            volume: compacted.volume,
            bucket: Arc::clone(bucket),
            machine,
            spill_dir,
            threshold,
        },
        is_below: compacted.is_below,
        seen,
        status: Arc::clone(&status),
    };
    let (stop, mut stopped) = watch::channel(false);
    let task = runtime.spawn(async move {
        tokio::select! {
            () = compactor.run() => {}
            _ = stopped.changed() => {}
        }
    });
    CompactorHandle { status, stop, task }
}

impl Compactor {
    async fn run(self) {
        let threshold = self.work.threshold;
        // Nobody knows how much log there was before: the first look is due at once.
        let mut looked_at = None;
        loop {
            tokio::time::sleep(threshold.pace).await;
            let seen = (self.seen)();
            if looked_at.is_some_and(|at| !threshold.is_met(seen.without(at))) {
                continue;
            }
            match self.look().await {
                Ok(left) => {
                    looked_at = Some(seen.without(left.all));
                    lock(&self.status).last_error = None;
                    tokio::time::sleep(self.work.too_young_for(&left)).await;
                }
                Err(CatalogError::Bucket(TierError::Denied { permission, key, .. })) if self.is_below => {
                    // Somebody else's to do.
                    tracing::info!(permission, key, volume = %self.work.volume, "this machine may not compact the log");
                    return;
                }
                Err(err) => {
                    let text = words(&err);
                    if lock(&self.status).last_error.as_ref() != Some(&text) {
                        tracing::warn!(error = text, volume = %self.work.volume, "the log is not compacted");
                    }
                    lock(&self.status).last_error = Some(text);
                    if matches!(
                        err,
                        CatalogError::NoConditions { .. } | CatalogError::Bucket(TierError::Denied { .. })
                    ) {
                        return;
                    }
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Makes a catalog if one is due; returns how much is left in the log behind the newest.
    async fn look(&self) -> Result<Waiting, CatalogError> {
        let work = &self.work;
        let waiting = work.since_head().await?;
        if !work.threshold.is_met(waiting.old) {
            return Ok(waiting);
        }
        tokio::time::sleep(work.threshold.spread.mul_f64(chance())).await;
        let waiting = work.since_head().await?;
        if !work.threshold.is_met(waiting.old) {
            return Ok(waiting);
        }
        if work.compact().await? {
            lock(&self.status).done += 1;
        }
        work.since_head().await
    }
}

/// What the log has behind the newest catalog.
#[derive(Clone, Copy, Debug, Default)]
struct Waiting {
    /// What could go into a new catalog.
    old: LogAmount,
    /// The same, with what is too young for it.
    all: LogAmount,
    /// The time in the key of the segment with which that is enough.
    enough_millis: Option<u64>,
}

impl Work {
    /// True if the catalog is this one's.
    async fn compact(&self) -> Result<bool, CatalogError> {
        let options = CompactOptions {
            machine: self.machine,
            trail: self.threshold.trail,
            spill_dir: self.spill_dir.clone(),
        };
        match compact::compact(&self.bucket, &self.volume, &options, |_| {}).await? {
            Outcome::Done(done) => {
                tracing::info!(
                    volume = %self.volume,
                    segments = done.segments,
                    changes = done.changes,
                    names = done.head.names,
                    written_parts = done.written_parts,
                    "made a catalog"
                );
                Ok(true)
            }
            Outcome::Lost | Outcome::NothingNew(_) => Ok(false),
        }
    }

    /// For how long what makes a catalog due will be too young for it, if only that is missing.
    fn too_young_for(&self, waiting: &Waiting) -> Duration {
        let now = self.bucket.clock().now_millis();
        waiting.enough_millis.map_or(Duration::ZERO, |enough| {
            let young = now.saturating_sub(enough);
            self.threshold.trail.saturating_sub(Duration::from_millis(young))
        })
    }

    /// How much there is in the log behind the newest catalog, as far as it matters.
    async fn since_head(&self) -> Result<Waiting, CatalogError> {
        let volume = self.volume.as_str();
        let head = head::read(self.bucket.as_ref(), volume).await?;
        let from = head.map_or(0, |(head, _)| head.watermark_millis.saturating_add(1));
        let trail = self.threshold.trail.as_millis() as u64;
        let end = before(volume, self.bucket.clock().now_millis().saturating_sub(trail));
        let prefix = layout::log_prefix(volume);
        let mut after = before(volume, from);
        let mut waiting = Waiting::default();
        loop {
            let page = self.bucket.list(&prefix, Some(&after)).await?;
            for object in &page.objects {
                let Some(key) = SegmentKey::parse(volume, &object.key) else {
                    continue;
                };
                waiting.all.add(object.size);
                if object.key < end {
                    waiting.old = waiting.all;
                }
                if waiting.enough_millis.is_none() && self.threshold.is_met(waiting.all) {
                    waiting.enough_millis = Some(key.millis);
                }
            }
            let Some(last) = page.objects.last() else { break };
            // Either it is due now, or all that matters is that it will be.
            if !page.more || self.threshold.is_met(waiting.all) {
                break;
            }
            after.clone_from(&last.key);
        }
        Ok(waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::{Fault, MemoryBucket, eventually_async};

    #[test]
    fn layers_below_are_compacted_by_who_may_write_there_and_sees_all_of_them() {
        let layer = |volume: &str| StackLayer::live(volume.parse().unwrap());
        let compacted = |layers: Vec<StackLayer>| {
            let stack = Stack::try_from(layers).unwrap();
            let volumes = volumes(&stack).into_iter();
            let below: Vec<bool> = volumes.clone().map(|compacted| compacted.is_below).collect();
            assert!(
                !below[0] && below[1..].iter().all(|is_below| *is_below),
                "{below:?}"
            );
            volumes
                .map(|compacted| compacted.volume.to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(compacted(vec![layer("main")]), ["main"]);
        assert_eq!(compacted(vec![layer("job"), layer("main")]), ["job", "main"]);
        let bounded = StackLayer {
            until_millis: Some(7),
            ..layer("main")
        };
        assert_eq!(compacted(vec![layer("job"), bounded]), ["job"]);
        let apart = StackLayer {
            own_prefix: true,
            ..layer("pr-1")
        };
        assert_eq!(compacted(vec![apart, layer("main")]), ["pr-1"]);
    }

    #[test]
    fn a_log_is_compacted_within_the_time_that_is_set() {
        for secs in [0, 1, 6, 360, 86_400] {
            let threshold = Threshold::within(Duration::from_secs(secs));
            assert!(threshold.pace >= MIN_PACE);
            let longest = (threshold.pace + threshold.spread).max(MIN_PACE);
            assert_eq!(longest, Duration::from_secs(secs.max(1)));
        }
    }

    #[tokio::test]
    async fn who_may_not_compact_is_told_of_the_mounted_volume_and_not_of_those_below() {
        for is_below in [false, true] {
            let memory = MemoryBucket::new();
            memory.fail(|_, _| Some(Fault::Denied));
            let bucket: SharedBucket = memory;
            let compacted = Compacted {
                volume: "main".parse().unwrap(),
                is_below,
            };
            let threshold = Threshold {
                pace: Duration::from_millis(1),
                ..Threshold::within(Duration::ZERO)
            };
            let handle = spawn(
                &tokio::runtime::Handle::current(),
                compacted,
                &bucket,
                MachineId(1),
                std::env::temp_dir(),
                Arc::new(LogAmount::default),
                threshold,
            );
            eventually_async("it ends", || handle.task.is_finished()).await;
            assert_eq!(handle.status().last_error.is_none(), is_below);
        }
    }
}
