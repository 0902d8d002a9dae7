//! The start, step by step; what fails before the cache directory is opened
//! has changed nothing on this machine.

use std::{
    fs::DirBuilder,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::watch};

use super::{
    announce::Announcer, bucket, catalogs, error::StartError, layers::Layers, mountinfo, mountpoint,
    notices::NoticeGate, presets, readahead, root_check, serving::Serving, snapshot, volumes,
};
use crate::{
    base::id::{MachineId, StoreId},
    config::{Budget, Settings, budget},
    fuse::{self, MountOptions},
    store::{
        cachedir::{self, Binding},
        inspect,
    },
    tier::{
        SharedBucket, TierError, layout,
        probe::{self, IfAbsent, ProbeMode, ProbeReport},
        retaining::RetainingBucket,
    },
};

/// How long a store may take to answer before it counts as away.
const STORE_WITHIN: Duration = Duration::from_secs(20);
/// How long the first whole read of the volume's log may take on a machine that
/// has none of it, and on one that only has to catch up.
const FIRST_POLL_WITHIN: Duration = Duration::from_secs(120);
const NEXT_POLL_WITHIN: Duration = Duration::from_secs(5);
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);
/// A clock that is further off makes stamps and segment names of this machine odd.
pub const CLOCK_TOLERANCE_MILLIS: u64 = 2000;

/// What is to be mounted where.
#[derive(Clone, Debug)]
pub struct Plan {
    pub settings: Settings,
    /// Canonical.
    pub mountpoint: PathBuf,
    /// Where the log goes, to be shown.
    pub log_file: Option<PathBuf>,
}

/// Starts everything; returns when the mount answers.
pub async fn start(plan: &Plan, announcer: &Announcer) -> Result<Serving, StartError> {
    let started = Instant::now();
    let settings = &plan.settings;
    announcer.step("checking the mountpoint");
    if mountpoint::prepare(&plan.mountpoint)? {
        tracing::warn!(mountpoint = %plan.mountpoint.display(), "took over the mount of a daemon that died");
    }
    let binding = binding(&settings.cache_dir)?;
    let bound = binding.as_ref().and_then(|binding| binding.stack.as_ref());
    volumes::check_volume(settings, bound)?;
    let known = binding.as_ref().map(|binding| binding.store);
    announcer.step("asking the store");
    let bucket = bucket::connect(settings).await?;
    let (store_id, lifetime) = identify(settings, &bucket, known).await?;
    let reachable = lifetime.is_some();
    // Who only reads keeps nothing young: it writes nothing.
    let bucket: SharedBucket = if settings.read_only {
        bucket
    } else {
        Arc::new(RetainingBucket::new(bucket, lifetime))
    };
    if known.is_none() && reachable {
        // Whether what is absent is told from what is forbidden, before absence counts.
        refuse(
            settings,
            &probe_store(settings, &bucket, ProbeMode::ReadOnly).await?,
        )?;
    }
    if reachable && !settings.read_only {
        volumes::make_fork(settings, &bucket, STORE_WITHIN).await?;
    }
    let (stack, frozen_presets) = if let Some(tag) = &settings.snapshot {
        snapshot::of_mount(settings, tag, &bucket, bound, reachable, STORE_WITHIN).await?
    } else {
        let stack = volumes::resolve(settings, &bucket, bound, reachable, STORE_WITHIN).await?;
        (stack, None)
    };
    volumes::check_fork(settings, &stack)?;
    let (whole_bucket, bucket) = (Arc::clone(&bucket), bucket::of_stack(&bucket, &stack));
    if known.is_none() && reachable {
        announcer.step("probing the store");
        probe_first_use(settings, &bucket).await?;
    }
    let volume_presets = match stack.snapshot() {
        Some(_) => frozen_presets,
        None => presets::of_volume(&bucket, &stack, reachable, STORE_WITHIN).await?,
    };

    let catalogs = if reachable {
        catalogs::newest(settings, &bucket, &stack, known.is_some(), STORE_WITHIN).await?
    } else {
        Vec::new()
    };

    announcer.step("opening the cache directory");
    let disk = budget::disk_of(&settings.cache_dir).map_err(|source| StartError::Disk {
        verb: "look at the disk of",
        path: settings.cache_dir.clone(),
        source,
    })?;
    let budget = Budget::on_disk_of(disk.total_bytes, settings.cache_size, settings.min_free);
    let gate = NoticeGate::new();
    let layers = Layers::put_up(
        settings,
        budget,
        store_id,
        (&stack, &catalogs),
        volume_presets,
        (&bucket, lifetime),
        &gate.teller(),
        &Handle::current(),
    )?;
    if reachable && stack.snapshot().is_none() {
        announcer.step("reading the log of the volume");
        let within = if known.is_some() {
            NEXT_POLL_WITHIN
        } else {
            FIRST_POLL_WITHIN
        };
        if !layers
            .follower
            .caught_up(tokio::time::Instant::now() + within)
            .await
        {
            let last_error = layers.follower.status().last_error;
            tracing::warn!(
                ?within,
                ?last_error,
                "mounting before the log of the volume was read whole"
            );
        }
    }

    announcer.step("mounting");
    gate.mounting();
    let mounted = match fuse::mount(Arc::clone(&layers.vfs), &mount_options(plan), Handle::current()) {
        Ok(mounted) => Arc::new(mounted),
        Err(source) => {
            layers.take_down(Duration::from_secs(5)).await;
            return Err(StartError::Mount {
                path: plan.mountpoint.clone(),
                source,
            });
        }
    };
    gate.mounted(&mounted.tell_kernel());
    if let Err(source) = root_check::answers(&plan.mountpoint, ANSWERS_WITHIN).await {
        if let Err(err) = mounted.unmount(true) {
            tracing::error!(%err, "cannot take the mount away again");
        }
        mounted.let_go();
        drop(mounted);
        layers.take_down(Duration::from_secs(5)).await;
        return Err(StartError::NotAnswering {
            path: plan.mountpoint.clone(),
            source,
        });
    }
    if let Err(err) = readahead::widen(&plan.mountpoint) {
        tracing::debug!(%err, "the kernel reads ahead by its own measure");
    }
    if !mounted.passthrough() && settings.passthrough {
        tracing::info!(
            "no passthrough here: reads and writes go through the daemon; casmount doctor says why"
        );
    }
    Ok(Serving {
        settings: settings.clone(),
        budget,
        mountpoint: plan.mountpoint.clone(),
        device: mountinfo::at(&plan.mountpoint)
            .ok()
            .flatten()
            .map(|mount| mount.device),
        log_file: plan.log_file.clone(),
        started,
        store_id,
        bucket,
        whole_bucket,
        layers,
        mounted,
        stopping: AtomicBool::new(false),
        ending: watch::channel(false).0,
    })
}

/// What the cache directory belongs to; `None` if it was never used.
fn binding(dir: &Path) -> Result<Option<Binding>, StartError> {
    inspect::binding(dir).map_err(|source| StartError::Cache {
        path: dir.to_owned(),
        source,
    })
}

/// Makes the folders above the store of a mount without settings. Those above any other store are
/// not made: one that is missing is a disk that is not mounted, or a typing error.
fn make_room_for_default_store(settings: &Settings) {
    if let Some(above) = settings.default_store.as_deref().and_then(Path::parent) {
        // What hinders it, the store itself will tell.
        let _ = DirBuilder::new().recursive(true).mode(0o700).create(above);
    }
}

/// Asks the store who it is. While it is away, a cache directory that was
/// used before knows, and what is on it can be served.
///
/// Returns also how old blobs become in it; `None`: it did not answer.
async fn identify(
    settings: &Settings,
    bucket: &SharedBucket,
    known: Option<StoreId>,
) -> Result<(StoreId, Option<Option<Duration>>), StartError> {
    // Who only reads makes nothing; who was here before expects what was here.
    let if_absent = if settings.read_only || known.is_some() {
        IfAbsent::Refuse
    } else {
        IfAbsent::Create
    };
    if matches!(if_absent, IfAbsent::Create) {
        make_room_for_default_store(settings);
    }
    let answer = tokio::time::timeout(STORE_WITHIN, probe::open_store(bucket.as_ref(), if_absent))
        .await
        .unwrap_or_else(|_| Err(bucket::no_answer(layout::STORE, STORE_WITHIN)));
    match (answer, known) {
        (Ok(facts), _) => {
            if facts.created {
                tracing::info!(store = settings.store, id = %facts.id, "made a new store");
            }
            for warning in facts.warnings {
                tracing::warn!("{warning}");
            }
            Ok((facts.id, Some(facts.lifetime)))
        }
        // A directory that was there before may be on a disk that is not mounted yet.
        (Err(err), Some(known))
            if err.is_transient()
                || (matches!(err, TierError::NoBucket { .. }) && settings.store.starts_with("file:")) =>
        {
            let err = super::error::chain(&err);
            tracing::warn!(
                err,
                "the store is away: serving what is on this disk until it is back"
            );
            Ok((known, None))
        }
        (Err(err), _) => Err(bucket::failed(settings, err)),
    }
}

/// Finds out before the first mount what would go wrong later.
async fn probe_first_use(settings: &Settings, bucket: &SharedBucket) -> Result<(), StartError> {
    let mode = if settings.read_only {
        ProbeMode::ReadOnly
    } else {
        ProbeMode::ReadWrite
    };
    let report = probe_store(settings, bucket, mode).await?;
    let offset = report.clock_offset_millis;
    if offset.unsigned_abs() > CLOCK_TOLERANCE_MILLIS {
        tracing::warn!(
            offset_millis = offset,
            "this machine's clock differs from the store's, which is used"
        );
    }
    if report.conditional_create == Some(false) || report.conditional_replace == Some(false) {
        tracing::warn!("this store has no conditional writes; blobs and changes are safe without them");
    }
    refuse(settings, &report)?;
    for finding in report.findings().into_iter().filter(|finding| !finding.fatal) {
        tracing::warn!("{}", finding.text);
    }
    Ok(())
}

async fn probe_store(
    settings: &Settings,
    bucket: &SharedBucket,
    mode: ProbeMode,
) -> Result<ProbeReport, StartError> {
    probe::probe(bucket.as_ref(), MachineId::random(), mode)
        .await
        .map_err(|err| bucket::failed(settings, err))
}

/// Ends a start in a store that cannot be used.
fn refuse(settings: &Settings, report: &ProbeReport) -> Result<(), StartError> {
    match report.findings().into_iter().find(|finding| finding.fatal) {
        None => Ok(()),
        Some(finding) => Err(StartError::Refused {
            store: settings.store.clone(),
            why: finding.text,
        }),
    }
}

fn mount_options(plan: &Plan) -> MountOptions {
    MountOptions {
        mountpoint: plan.mountpoint.clone(),
        allow_other: plan.settings.allow_other,
        read_only: plan.settings.read_only,
        source: format!("casmount:{}", plan.settings.volume),
        threads: std::thread::available_parallelism()
            .map_or(2, usize::from)
            .clamp(2, 8),
        passthrough: plan
            .settings
            .passthrough
            .then(|| plan.settings.cache_dir.join(cachedir::FORMAT)),
    }
}
