//! Letting names expire: no daemon is needed for it, only the store.

use super::{bucket, error::StartError};
use crate::{
    config::Settings,
    namespace::{
        expire::{self, ExpireError, ExpireOptions, VolumeExpiry},
        sweep::Progress,
    },
    tier::lifetime,
};

/// Lets names expire in the volumes of the store of `settings`. False: what they named is not a sweep's to delete, but goes
/// by a lifecycle rule.
pub async fn run(
    settings: &Settings,
    options: &ExpireOptions,
    tell: &mut (dyn FnMut(&Progress) + Send),
) -> Result<(Vec<VolumeExpiry>, bool), StartError> {
    let bucket = bucket::open(settings).await?;
    let lifetime = lifetime::read(bucket.as_ref()).await;
    let lifetime = lifetime.map_err(|cause| bucket::failed(settings, cause))?;
    match expire::expire(&bucket, options, tell).await {
        Ok(expired) => Ok((expired, lifetime.is_none())),
        Err(ExpireError::Bucket(cause)) => Err(bucket::failed(settings, cause)),
        Err(source) => Err(StartError::Expire { source }),
    }
}
