//! Compacting a volume: no daemon is needed for it, only the store.

use super::{bucket, error::StartError};
use crate::{
    base::id::MachineId,
    config::Settings,
    namespace::catalog::{
        CatalogError,
        compact::{self, CompactOptions, Outcome, Progress},
    },
    tier::probe::{self, IfAbsent},
};

/// Makes a new catalog of the volume of `settings`.
pub async fn run(
    settings: &Settings,
    trail: std::time::Duration,
    progress: impl Fn(Progress),
) -> Result<Outcome, StartError> {
    let bucket = bucket::connect(settings).await?;
    // Nobody compacts a store that is not there; and its clock is known from here on.
    probe::open_store(bucket.as_ref(), IfAbsent::Refuse)
        .await
        .map_err(|err| bucket::failed(settings, err))?;
    let options = CompactOptions {
        machine: MachineId::random(),
        trail,
        spill_dir: std::env::temp_dir(),
    };
    compact::compact(&bucket, &settings.volume, &options, progress)
        .await
        .map_err(|err| match err {
            CatalogError::Bucket(cause) => bucket::failed(settings, cause),
            source => StartError::Catalog { source },
        })
}
