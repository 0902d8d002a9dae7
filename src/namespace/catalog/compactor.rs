//! Compacts the mounted volume, and those below it, now and then, without anyone asking.
//!
//! # Policy
//!
//! - It is worth looking when so many segments were published or read here as would make a
//!   catalog due; looking costs the head and listings. While the volume rests nothing is asked.
//! - A catalog is due after [`Threshold::segments`] segments or [`Threshold::bytes`] bytes of log since the
//!   last one. All machines of a fleet see that at the same time: each waits a random part of
//!   [`Threshold::spread`] and looks again, so that mostly one does the work. Two that do it all the
//!   same cost requests, nothing else.
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

impl Default for Threshold {
    fn default() -> Self {
        Self {
            pace: Duration::from_secs(60),
            // What a machine that begins reads within a few seconds: sixteen at once, 30 ms each.
            segments: 2000,
            bytes: 64 << 20,
            spread: Duration::from_secs(300),
            trail: TRAIL,
        }
    }
}

/// The wait after a failure.
const RETRY: Duration = Duration::from_secs(600);

/// Segments published by this machine and read of others, since the daemon started.
pub type SegmentCount = Arc<dyn Fn() -> u64 + Send + Sync>;

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
    let threshold = Threshold::default();
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
    let (segments, bytes) = work.since_head().await?;
    Ok(work.is_due(segments, bytes) && work.compact().await?)
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
    seen: SegmentCount,
    status: Arc<Mutex<CompactorStatus>>,
}

/// Starts to watch over the log of a volume on `runtime`.
pub fn spawn(
    runtime: &tokio::runtime::Handle,
    compacted: Compacted,
    bucket: &SharedBucket,
    machine: MachineId,
    spill_dir: PathBuf,
    seen: SegmentCount,
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
        // Nobody knows how much log there was before: the first look is due at once.
        let mut looked_at = None;
        loop {
            tokio::time::sleep(self.work.threshold.pace).await;
            let seen = (self.seen)();
            if looked_at.is_some_and(|at| seen < at + self.work.threshold.segments) {
                continue;
            }
            match self.look().await {
                Ok(waiting) => {
                    looked_at = Some(seen.saturating_sub(waiting));
                    lock(&self.status).last_error = None;
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

    /// Makes a catalog if one is due; returns how many segments are in the log behind the newest.
    async fn look(&self) -> Result<u64, CatalogError> {
        let work = &self.work;
        let (segments, bytes) = work.since_head().await?;
        if !work.is_due(segments, bytes) {
            return Ok(segments);
        }
        tokio::time::sleep(work.threshold.spread.mul_f64(chance())).await;
        let (segments, bytes) = work.since_head().await?;
        if !work.is_due(segments, bytes) {
            return Ok(segments);
        }
        if work.compact().await? {
            lock(&self.status).done += 1;
        }
        Ok(0)
    }
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

    fn is_due(&self, segments: u64, bytes: u64) -> bool {
        segments >= self.threshold.segments || bytes >= self.threshold.bytes
    }

    /// How much of the log could go into a new catalog, as far as it matters.
    async fn since_head(&self) -> Result<(u64, u64), CatalogError> {
        let volume = self.volume.as_str();
        let head = head::read(self.bucket.as_ref(), volume).await?;
        let from = head.map_or(0, |(head, _)| head.watermark_millis.saturating_add(1));
        let trail = self.threshold.trail.as_millis() as u64;
        let end = before(volume, self.bucket.clock().now_millis().saturating_sub(trail));
        let prefix = layout::log_prefix(volume);
        let mut after = before(volume, from);
        let (mut segments, mut bytes) = (0, 0);
        loop {
            let page = self.bucket.list(&prefix, Some(&after)).await?;
            for object in page.objects.iter().filter(|object| object.key < end) {
                if SegmentKey::parse(volume, &object.key).is_some() {
                    segments += 1;
                    bytes += object.size;
                }
            }
            let Some(last) = page.objects.last() else { break };
            if !page.more || last.key >= end || self.is_due(segments, bytes) {
                break;
            }
            after.clone_from(&last.key);
        }
        Ok((segments, bytes))
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
                ..Threshold::default()
            };
            let handle = spawn(
                &tokio::runtime::Handle::current(),
                compacted,
                &bucket,
                MachineId(1),
                std::env::temp_dir(),
                Arc::new(|| 0),
                threshold,
            );
            eventually_async("it ends", || handle.task.is_finished()).await;
            assert_eq!(handle.status().last_error.is_none(), is_below);
        }
    }
}
