//! The presets of directories: what the volume says of them, taken at a start and changed by a command.

use std::{sync::Arc, time::Duration};

use super::{
    bucket,
    error::{StartError, chain},
};
use crate::{
    base::volume::{Stack, VolumeName},
    config::Settings,
    namespace::{
        preset::volume::{self, Kept, PresetChange},
        stack::{self, StackError},
        tree::Tree,
    },
    store::{ledger::Ledger, rows::Change},
    tier::{
        SharedBucket,
        probe::{self, IfAbsent},
    },
};

/// How long the store may take to answer a command.
const WITHIN: Duration = Duration::from_secs(30);

/// What the volume said at the last mount, as JSON: for a start while the store is away.
const META_OF_VOLUME: &str = "presets/volume";

/// Asks the store for the presets of the volume and of those below it; `None` while it is away.
pub async fn of_volume(
    bucket: &SharedBucket,
    stack: &Stack,
    reachable: bool,
    within: Duration,
) -> Result<Option<Kept>, StartError> {
    if !reachable {
        return Ok(None);
    }
    match tokio::time::timeout(within, volume::read(bucket.as_ref(), stack)).await {
        Ok(Ok(kept)) => Ok(Some(kept)),
        Ok(Err(StackError::Bucket(err))) => {
            let err = chain(&err);
            tracing::warn!(err, "the presets of the volume are those of the last mount");
            Ok(None)
        }
        Err(_) => {
            tracing::warn!("the store does not say in time what the presets of the volume are");
            Ok(None)
        }
        Ok(Err(source)) => Err(StartError::Volume { source }),
    }
}

/// Gives the tree its presets; `by_volume` is remembered.
pub fn take(
    tree: &Arc<Tree>,
    ledger: &Ledger,
    settings: &Settings,
    by_volume: Option<Kept>,
) -> Result<(), StartError> {
    let failed = |source| StartError::Tree { source };
    let remembered = ledger.meta(META_OF_VOLUME).map_err(|err| failed(err.into()))?;
    let remembered: Kept = remembered
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default();
    let by_volume = by_volume.unwrap_or_else(|| remembered.clone());
    if by_volume != remembered {
        let bytes = serde_json::to_vec(&by_volume).expect("a map of strings is JSON");
        ledger
            .commit(vec![Change::PutMeta(META_OF_VOLUME.to_owned(), bytes)])
            .map_err(|err| failed(err.into()))?;
    }
    tree.set_presets(&settings.presets, &volume::known(&by_volume))
        .map_err(failed)
}

/// Changes the presets in the settings of a volume; returns those that it has then.
pub async fn change(
    settings: &Settings,
    volume: &VolumeName,
    change: &PresetChange,
) -> Result<Kept, StartError> {
    let bucket = bucket::connect(settings).await?;
    let asking = async {
        // Nobody changes a store that is not there; and its clock is known from here on.
        probe::open_store(bucket.as_ref(), IfAbsent::Refuse).await?;
        volume::change(bucket.as_ref(), volume, change).await
    };
    answered(settings, asking).await
}

/// Reads the presets of a volume, with those of the volumes below it.
pub async fn list(settings: &Settings, volume: &VolumeName) -> Result<Kept, StartError> {
    let bucket = bucket::connect(settings).await?;
    let asking = async {
        probe::open_store(bucket.as_ref(), IfAbsent::Refuse).await?;
        let stack = stack::read(bucket.as_ref(), volume).await?;
        volume::read(bucket.as_ref(), &stack).await
    };
    answered(settings, asking).await
}

async fn answered(
    settings: &Settings,
    asking: impl Future<Output = Result<Kept, StackError>>,
) -> Result<Kept, StartError> {
    match tokio::time::timeout(WITHIN, asking).await {
        Ok(Ok(kept)) => Ok(kept),
        Ok(Err(StackError::Bucket(cause))) => Err(bucket::failed(settings, cause)),
        Ok(Err(source)) => Err(StartError::Volume { source }),
        Err(_) => Err(bucket::failed(settings, bucket::no_answer("volume.json", WITHIN))),
    }
}
