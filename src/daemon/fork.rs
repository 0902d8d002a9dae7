//! Making a fork of a volume: no daemon is needed for it, only the store.

use std::time::Duration;

use super::{bucket, error::StartError};
use crate::{
    base::volume::VolumeName,
    config::Settings,
    namespace::stack::{self, ForkPoint, StackError, VolumeJson},
    tier::{
        SharedBucket,
        probe::{self, IfAbsent},
    },
};

/// How long the store may take to answer everything that it is asked.
const WITHIN: Duration = Duration::from_secs(30);

/// Makes the volume `name`, a fork of `from`, in the store of `settings`.
pub async fn create(
    settings: &Settings,
    name: &VolumeName,
    from: &VolumeName,
    point: ForkPoint,
) -> Result<VolumeJson, StartError> {
    let bucket = bucket::connect(settings).await?;
    let made = tokio::time::timeout(WITHIN, ask(&bucket, name, from, point)).await;
    match made {
        Ok(Ok(made)) => Ok(made),
        Ok(Err(StackError::Bucket(cause))) => Err(bucket::failed(settings, cause)),
        Ok(Err(source)) => Err(StartError::Volume { source }),
        Err(_) => Err(bucket::failed(settings, bucket::no_answer("volumes/", WITHIN))),
    }
}

async fn ask(
    bucket: &SharedBucket,
    name: &VolumeName,
    from: &VolumeName,
    point: ForkPoint,
) -> Result<VolumeJson, StackError> {
    // Nobody forks a volume of a store that is not there; and its clock is known from here on.
    probe::open_store(bucket.as_ref(), IfAbsent::Refuse).await?;
    stack::create_fork(bucket.as_ref(), name, from, point).await
}
