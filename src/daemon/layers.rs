//! The layers between the mount and the bucket: put up in order, taken down in reverse.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{runtime::Handle, task::JoinHandle, time::Instant};

use crate::{
    base::{activity::Activity, id::StoreId, volume::Stack},
    config::{Budget, CompactWithin, OwnerMode, Settings},
    namespace::{
        TreeError,
        catalog::{
            Loader, attach,
            compactor::{self, CompactorHandle, LogAmount, LogSeen, Threshold},
            prefetch::{self, PrefetchHandle},
            read::Opened,
        },
        follow::{self, StackFollowerHandle},
        preset::volume::Kept,
        publish::{self, Meanwhile, PublisherHandle},
        touch::tell::{self, Lifetime, Refresh, TellerHandle},
        tree::{TellKernel, Tree},
    },
    store::{Store, StoreOptions},
    tier::SharedBucket,
    upload::{self, UploadOptions, UploaderHandle},
    vfs::{Owner, Vfs, VfsOptions},
};

use super::{error::StartError, presets, volumes};

/// Uploads under way at once: enough to fill a 10 Gbit/s link with chunks of
/// half a megabyte at S3's usual 20 to 30 ms, few enough to hold in memory.
const PARALLEL_UPLOADS: usize = 16;
/// The log is read when it was read so lately: a mount that rests reads it every ten seconds.
const READ_WITHIN_MILLIS: u64 = 60_000;
/// A bucket that is back is noticed this late when nobody waits for it.
const MAX_BACKOFF: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Layers {
    pub store: Arc<Store>,
    pub vfs: Arc<Vfs>,
    pub uploader: UploaderHandle,
    pub publisher: PublisherHandle,
    pub follower: Arc<StackFollowerHandle>,
    /// Of a fork.
    watch: Option<JoinHandle<()>>,
    /// Of a tree that is loaded from catalogs.
    prefetch: Option<PrefetchHandle>,
    /// Of the mounted volume and of those below it; a mount that only reads has none, nor one that leaves it to others.
    pub compactors: Vec<CompactorHandle>,
    /// A mount that only reads has none.
    pub teller: Option<TellerHandle>,
}

impl Layers {
    /// Opens the cache directory and starts everything above it.
    ///
    /// `volume_presets` are those in the settings of the volume; `None`: those of the last mount. The lifetime is that of the
    /// blobs of the store; `None`: it was away.
    /// Must run inside `runtime`, on a thread that may block.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is another part of what is put together"
    )]
    pub fn put_up(
        settings: &Settings,
        budget: Budget,
        store_id: StoreId,
        (stack, catalogs): (&Stack, &[Option<Opened>]),
        volume_presets: Option<Kept>,
        (bucket, lifetime): (&SharedBucket, Option<Option<Duration>>),
        tell_kernel: &TellKernel,
        runtime: &Handle,
    ) -> Result<Self, StartError> {
        let options = StoreOptions {
            dir: settings.cache_dir.clone(),
            cache_size: budget.cache_size,
            min_free: budget.min_free,
            read_timeout: settings.read_timeout,
        };
        let mut store =
            Store::open(options, store_id, Arc::clone(bucket)).map_err(|source| StartError::Cache {
                path: settings.cache_dir.clone(),
                source,
            })?;
        if let Err(refused) = volumes::bind(&mut store, stack) {
            if let Err(err) = store.close() {
                tracing::warn!(
                    err = super::error::chain(&err),
                    "the cache directory was not closed cleanly"
                );
            }
            return Err(refused);
        }
        let store = Arc::new(store);
        tracing::info!(recovery = ?store.recovery, machine = %store.machine, "opened the cache directory");
        let clock = Arc::clone(bucket);
        let tree = Tree::open(
            Arc::clone(&store.ledger),
            store.machine,
            Arc::new(move || clock.clock().now_millis()),
        )
        .map_err(|source| StartError::Tree { source })?;
        presets::take(&tree, &store.ledger, settings, volume_presets)?;
        let decided = attach::settle(&tree, &store.ledger, stack, catalogs)
            .map_err(|source| StartError::Tree { source })?;
        if !decided.attached.is_empty() {
            let (volumes, started_over) = (&decided.attached, decided.started_over);
            tracing::info!(
                ?volumes,
                started_over,
                "the tree is loaded from catalogs as it is used"
            );
        }
        let activity = Arc::new(Activity::default());
        let uploader = upload::spawn(
            runtime,
            Arc::clone(&store),
            Arc::clone(bucket),
            UploadOptions {
                parallel: PARALLEL_UPLOADS,
                max_backoff: MAX_BACKOFF,
                activity: Arc::clone(&activity),
            },
        );
        let pace = pace_of(settings);
        let follower = follow::spawn(runtime, stack, &tree, &store, bucket, tell_kernel, pace);
        let follower = Arc::new(follower);
        let vfs = Vfs::new(
            vfs_options(settings, activity, pace),
            Arc::clone(&store),
            Arc::clone(&tree),
        )
        .map_err(|source| StartError::Files { source })?;
        tree.set_tell_kernel(Arc::clone(tell_kernel));
        let mut prefetch = None;
        if tree.has_catalogs() {
            let within = settings.read_timeout;
            let most_kept = settings.catalog_prefetch.unwrap_or(budget.catalog_prefetch());
            let loader = Loader::new(stack, &tree, &store, bucket, within, most_kept, catalogs);
            let loader = Arc::new(loader.map_err(|source| StartError::Tree {
                source: TreeError::Store(source),
            })?);
            prefetch = Some(prefetch::spawn(runtime, &loader));
            vfs.set_loader(loader);
        }
        // Weak, so that the mount does not keep the follower when all is taken down.
        let followed: Weak<StackFollowerHandle> = Arc::downgrade(&follower);
        vfs.set_on_use(Arc::new(move || {
            if let Some(follower) = followed.upgrade() {
                follower.used();
            }
        }));
        let teller = (!settings.read_only).then(|| {
            let voucher = || uploader.voucher(Arc::clone(&store.fetcher));
            // Who writes his blobs elsewhere cannot keep those of all.
            let is_apart = stack.layers()[0].own_prefix;
            let lifetime = match if is_apart { Some(None) } else { lifetime } {
                Some(None) => Lifetime::Unlimited,
                Some(Some(lifetime)) => Lifetime::Limited(Refresh {
                    lifetime,
                    voucher: voucher(),
                }),
                None => Lifetime::Unknown(voucher()),
            };
            tell::spawn(runtime, stack, &tree, bucket, store.machine, lifetime)
        });
        let publisher = publish::spawn(
            runtime,
            stack.volume().to_string(),
            tree,
            Arc::clone(&store),
            Arc::clone(bucket),
            uploader.voucher(Arc::clone(&store.fetcher)),
            Arc::clone(tell_kernel),
            meanwhile(&follower, &vfs, bucket),
        );
        let watch = volumes::watch(bucket, stack, publisher.to_halt());
        let threshold = match settings.compact_within {
            CompactWithin::Time(within) if !settings.read_only => Some(Threshold::within(within)),
            CompactWithin::Time(_) | CompactWithin::Never => None,
        };
        let compactors = threshold.map_or_else(Vec::new, |threshold| {
            let compact = |compacted| {
                compactor::spawn(
                    runtime,
                    compacted,
                    bucket,
                    store.machine,
                    settings.cache_dir.clone(),
                    seen_of_logs(&follower, &publisher),
                    threshold,
                )
            };
            compactor::volumes(stack).into_iter().map(compact).collect()
        });
        Ok(Self {
            store,
            vfs,
            uploader,
            publisher,
            follower,
            watch,
            prefetch,
            compactors,
            teller,
        })
    }

    /// Stops everything and closes the cache directory. The mount is gone by then.
    ///
    /// What cannot be ended in time (a disk that does not answer) is left to the end of the process; the next start
    /// then mends as after a crash.
    pub async fn take_down(self, within: Duration) {
        let deadline = Instant::now() + within;
        if let Some(watch) = self.watch {
            watch.abort();
        }
        if let Some(prefetch) = self.prefetch {
            prefetch.shutdown().await;
        }
        for compactor in self.compactors {
            compactor.shutdown().await;
        }
        if let Some(teller) = self.teller {
            teller.shutdown().await;
        }
        self.uploader.shutdown().await;
        self.publisher.shutdown().await;
        if let Some(follower) = sole(self.follower, deadline).await {
            follower.shutdown().await;
        } else {
            tracing::warn!("the follower is still in use");
        }
        self.vfs.shutdown();
        drop(self.vfs);
        let Some(store) = sole(self.store, deadline).await else {
            tracing::warn!("the cache directory is still in use; the next start mends it as after a crash");
            return;
        };
        if let Err(err) = store.close() {
            let err = super::error::chain(&err);
            tracing::error!(
                err,
                "the cache directory was not closed cleanly; the next start mends it"
            );
        }
    }
}

/// Waits until nobody else holds `shared`.
pub async fn sole<T>(shared: Arc<T>, deadline: Instant) -> Option<T> {
    let mut shared = shared;
    loop {
        match Arc::try_unwrap(shared) {
            Ok(own) => return Some(own),
            Err(_) if Instant::now() >= deadline => return None,
            Err(still_shared) => shared = still_shared,
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What this daemon read of all logs of the mount, and published.
fn seen_of_logs(follower: &Arc<StackFollowerHandle>, publisher: &PublisherHandle) -> LogSeen {
    // Weak, so that a compactor keeps nobody when all is taken down.
    let (follower, published) = (Arc::downgrade(follower), publisher.watch_status());
    Arc::new(move || {
        let read = follower.upgrade().map(|follower| follower.status());
        let (read, published) = (read.unwrap_or_default(), published());
        LogAmount {
            segments: read.segments + published.segments,
            bytes: read.segment_bytes + published.segment_bytes,
        }
    })
}

/// What the publisher has to know of the others.
fn meanwhile(follower: &Arc<StackFollowerHandle>, vfs: &Arc<Vfs>, bucket: &SharedBucket) -> Meanwhile {
    // Weak, so that the publisher keeps nobody when all is taken down.
    let (follower, vfs, clock) = (Arc::downgrade(follower), Arc::downgrade(vfs), Arc::clone(bucket));
    Meanwhile {
        is_read: Arc::new(move || {
            let read = follower
                .upgrade()
                .map_or(0, |follower| follower.status().caught_up_millis);
            read.saturating_add(READ_WITHIN_MILLIS) >= clock.clock().now_millis()
        }),
        load: Arc::new(move |missing| {
            let vfs = vfs.upgrade();
            Box::pin(async move {
                match vfs {
                    // Why not is told by who loads.
                    Some(vfs) => vfs.load(missing).await.is_ok(),
                    None => false,
                }
            })
        }),
    }
}

fn pace_of(settings: &Settings) -> follow::Pace {
    let usual = follow::Pace::default();
    follow::Pace {
        idle: settings.rest_pace.unwrap_or(usual.idle),
        rests_after: settings.rests_after.unwrap_or(usual.rests_after),
        ..usual
    }
}

fn vfs_options(settings: &Settings, activity: Arc<Activity>, pace: follow::Pace) -> VfsOptions {
    let uid = settings
        .uid
        .unwrap_or_else(|| rustix::process::geteuid().as_raw());
    let gid = settings
        .gid
        .unwrap_or_else(|| rustix::process::getegid().as_raw());
    let owner = match settings.owner {
        OwnerMode::Preserve => Owner::Preserve,
        OwnerMode::Mount => Owner::Fixed { uid, gid },
    };
    VfsOptions {
        owner,
        user: (uid, gid),
        umask: settings.umask,
        settle: settings.settle,
        read_only: settings.read_only,
        xattr: settings.xattr,
        activity,
        rests_after: pace.rests_after,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_last_holder_gets_the_value() {
        let shared = Arc::new(5);
        let other = Arc::clone(&shared);
        let soon = Instant::now() + Duration::from_secs(5);
        let (own, ()) = tokio::join!(sole(shared, soon), async { drop(other) });
        assert_eq!(own, Some(5));
        let held = Arc::new(6);
        let _other = Arc::clone(&held);
        assert_eq!(sole(held, Instant::now()).await, None);
    }
}
