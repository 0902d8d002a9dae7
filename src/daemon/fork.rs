//! Making, promoting and deleting forks: no daemon is needed for it, only the store.

use std::{path::PathBuf, time::Duration};

use tokio::time::Instant;

use super::{
    bucket,
    error::{StartError, chain},
};
use crate::{
    base::{id::MachineId, volume::VolumeName},
    config::Settings,
    namespace::{
        catalog::compactor,
        expire::{self, Inherited},
        promote::{self, OnStep, PromoteError, Promoted},
        stack::{self, ForkPoint, StackError, VolumeJson},
        view::ViewError,
        volumes::{self, DeleteError, Deleted},
    },
    tier::SharedBucket,
};

/// How long the store may take to make a fork.
const WITHIN: Duration = Duration::from_secs(30);

/// How long a catalog of the parent may take after a promotion.
const COMPACT_WITHIN: Duration = Duration::from_secs(600);

/// Makes the volume `name`, a fork of `from`, in the store of `settings`.
pub async fn create(
    settings: &Settings,
    name: &VolumeName,
    from: &VolumeName,
    point: ForkPoint,
    own_prefix: bool,
) -> Result<VolumeJson, StartError> {
    // Nobody forks a volume of a store that is not there.
    let bucket = bucket::open(settings).await?;
    let made = stack::create_fork(bucket.as_ref(), name, from, point, own_prefix);
    match tokio::time::timeout(WITHIN, made).await {
        Ok(Ok(made)) => Ok(made),
        Ok(Err(StackError::Bucket(cause))) => Err(bucket::failed(settings, cause)),
        Ok(Err(source)) => Err(StartError::Volume { source }),
        Err(_) => Err(bucket::failed(settings, bucket::no_answer("volumes/", WITHIN))),
    }
}

/// Makes what the fork `name` says a part of its parent `into`.
pub async fn promote(
    settings: &Settings,
    name: &VolumeName,
    into: &VolumeName,
    on_step: OnStep<'_>,
) -> Result<Promoted, StartError> {
    let bucket = bucket::open(settings).await?;
    let promoted = promote::promote(&bucket, name, into, on_step).await;
    if promoted.is_ok() {
        let until = Instant::now() + COMPACT_WITHIN;
        compact(&bucket, into, MachineId::random(), std::env::temp_dir(), until).await;
    }
    promoted.map_err(|err| match err {
        PromoteError::Stack(StackError::Bucket(cause)) | PromoteError::View(ViewError::Bucket(cause)) => {
            bucket::failed(settings, cause)
        }
        source => StartError::Promote { source },
    })
}

/// Makes a catalog of the parent if its log has grown: where all work in forks, nobody else may be there to do it. Nothing
/// depends on it, so it is given up at `until`.
pub(super) async fn compact(
    bucket: &SharedBucket,
    into: &VolumeName,
    machine: MachineId,
    spill_dir: PathBuf,
    until: Instant,
) {
    let work = compactor::after_writing(bucket, into, machine, spill_dir);
    match tokio::time::timeout_at(until, work).await {
        Ok(Ok(_)) => {}
        Ok(Err(err)) => tracing::warn!(err = chain(&err), %into, "the log of the parent is not compacted"),
        Err(_) => {
            tracing::info!(%into, "compacting the log of the parent took too long, and is left to another machine");
        }
    }
}

/// Deletes the fork `name`; what it told of its uses stays.
pub async fn delete(
    settings: &Settings,
    name: &VolumeName,
    on_removed: impl FnMut(u64),
) -> Result<Deleted, StartError> {
    let bucket = bucket::open(settings).await?;
    let failed = |cause| bucket::failed(settings, cause);
    let mut inherited = Inherited::new();
    let inherit = expire::inherit(&bucket, name, &mut inherited).await;
    inherit.map_err(failed)?;
    let decided = volumes::decide(&bucket, name).await;
    let decided = decided.map_err(|err| match err {
        DeleteError::Stack(StackError::Bucket(cause)) => failed(cause),
        source => StartError::Delete { source },
    })?;
    // What its machines told meanwhile.
    let inherit = expire::inherit(&bucket, name, &mut inherited).await;
    inherit.map_err(failed)?;
    decided.remove_rest(&bucket, on_removed).await.map_err(failed)
}
