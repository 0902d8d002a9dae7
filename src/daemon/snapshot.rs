//! Making, listing, deleting and mounting snapshots. Only the last needs a daemon.

use std::time::Duration;

use super::{
    bucket,
    error::{StartError, chain},
    volumes,
};
use crate::{
    base::{
        id::MachineId,
        snapshot::SnapshotTag,
        volume::{Stack, VolumeName},
    },
    config::Settings,
    namespace::{
        preset::volume::Kept,
        snapshot::{self, Created, Listed, SnapshotError, SnapshotOptions, Step},
        stack::StackError,
    },
    tier::{SharedBucket, TierError, layout},
};

/// Makes the snapshot `tag` of the volume of `settings`, as it is now.
pub async fn create(
    settings: &Settings,
    tag: &SnapshotTag,
    on_step: &(dyn Fn(Step) + Send + Sync),
) -> Result<Created, StartError> {
    let bucket = bucket::open(settings).await?;
    let options = SnapshotOptions {
        machine: MachineId::random(),
        created_by: who(),
        spill_dir: std::env::temp_dir(),
    };
    let created = snapshot::create(&bucket, &settings.volume, tag, &options, on_step).await;
    created.map_err(|err| odd(settings, err))
}

/// The snapshots of `volume`, or of all volumes of the store.
pub async fn list(settings: &Settings, volume: Option<&VolumeName>) -> Result<Vec<Listed>, StartError> {
    let bucket = bucket::open(settings).await?;
    let listed = snapshot::list(&bucket, volume).await;
    listed.map_err(|err| odd(settings, err))
}

/// Deletes the snapshot `tag` of the volume of `settings`.
pub async fn delete(settings: &Settings, tag: &SnapshotTag) -> Result<(), StartError> {
    let bucket = bucket::open(settings).await?;
    let deleted = snapshot::delete(bucket.as_ref(), &settings.volume, tag).await;
    deleted.map_err(|err| odd(settings, err))
}

/// What is mounted as the snapshot `tag`, with its presets; while the store is away, the cache directory knows, and
/// its index has the presets.
pub async fn of_mount(
    settings: &Settings,
    tag: &SnapshotTag,
    bucket: &SharedBucket,
    bound: Option<&Stack>,
    reachable: bool,
    within: Duration,
) -> Result<(Stack, Option<Kept>), StartError> {
    let key = || layout::snapshot(settings.volume.as_str(), tag.as_str());
    let no_answer = || bucket::no_answer(&key(), within);
    let cause = if reachable {
        let read = snapshot::read(bucket.as_ref(), &settings.volume, tag);
        match tokio::time::timeout(within, read).await {
            Ok(Ok(Some(snapshot))) => {
                let stack = snapshot.stack(tag);
                volumes::check_stack(&settings.cache_dir, bound, &stack)?;
                return Ok((stack, Some(snapshot.presets)));
            }
            Ok(Ok(None)) => {
                let (volume, tag) = (settings.volume.clone(), tag.clone());
                return Err(odd(settings, SnapshotError::Absent { volume, tag }));
            }
            Ok(Err(SnapshotError::Bucket(err))) => err,
            Ok(Err(err)) => return Err(odd(settings, err)),
            Err(_) => no_answer(),
        }
    } else {
        no_answer()
    };
    remembered(settings, bound, cause)
}

/// A snapshot never changes, so that a machine that was here before goes on with what it knows.
fn remembered(
    settings: &Settings,
    bound: Option<&Stack>,
    cause: TierError,
) -> Result<(Stack, Option<Kept>), StartError> {
    match bound {
        Some(bound) if cause.is_transient() => {
            tracing::warn!(err = chain(&cause), "the snapshot is that of the last mount");
            Ok((bound.clone(), None))
        }
        _ => Err(bucket::failed(settings, cause)),
    }
}

/// Whoever runs this, as people say it.
fn who() -> String {
    let named = |name| std::env::var(name).ok().filter(|user: &String| !user.is_empty());
    let user = named("USER").or_else(|| named("LOGNAME"));
    let user = user.unwrap_or_else(|| format!("uid {}", rustix::process::geteuid().as_raw()));
    let host = rustix::system::uname();
    format!("{user}@{}", host.nodename().to_string_lossy())
}

fn odd(settings: &Settings, err: SnapshotError) -> StartError {
    match err {
        SnapshotError::Bucket(cause) | SnapshotError::Volume(StackError::Bucket(cause)) => {
            bucket::failed(settings, cause)
        }
        source => StartError::Snapshot { source },
    }
}
