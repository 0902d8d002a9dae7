//! Letting names expire: no daemon is needed for it, only the store.

use super::{bucket, error::StartError};
use crate::{
    config::Settings,
    namespace::{
        expire::{self, ExpireError, ExpireOptions, VolumeExpiry},
        sweep::Progress,
    },
};

/// Lets names expire in the volumes of the store of `settings`.
pub async fn run(
    settings: &Settings,
    options: &ExpireOptions,
    tell: &mut (dyn FnMut(&Progress) + Send),
) -> Result<Vec<VolumeExpiry>, StartError> {
    let bucket = bucket::open(settings).await?;
    let expired = expire::expire(&bucket, options, tell).await;
    expired.map_err(|err| match err {
        ExpireError::Bucket(cause) => bucket::failed(settings, cause),
        source => StartError::Expire { source },
    })
}
