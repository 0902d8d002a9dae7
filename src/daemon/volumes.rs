//! Which volumes a start mounts, and whether the cache directory is theirs.
//!
//! A cache directory holds the tree of one stack of volumes. Mounting another one with it
//! would mix two trees, so it is refused while nothing is changed yet.

use std::{path::Path, time::Duration};

use super::{
    bucket,
    error::{StartError, chain},
};
use crate::{
    base::volume::{Stack, VolumeName},
    config::Settings,
    namespace::{
        follow::followed_volumes,
        stack::{self, StackError},
    },
    store::Store,
    tier::SharedBucket,
};

/// Refuses a cache directory of another volume, before anybody is asked anything.
pub fn check_volume(dir: &Path, bound: Option<&Stack>, wanted: &VolumeName) -> Result<(), StartError> {
    match bound {
        Some(bound) if bound.volume() != wanted => Err(StartError::OtherVolume {
            dir: dir.to_owned(),
            bound: bound.to_string(),
            wanted: wanted.to_string(),
        }),
        _ => Ok(()),
    }
}

/// Asks the store what the volume lies over; while it is away, the cache directory knows.
pub async fn resolve(
    settings: &Settings,
    bucket: &SharedBucket,
    bound: Option<&Stack>,
    reachable: bool,
    within: Duration,
) -> Result<Stack, StartError> {
    let remembered = || {
        bound
            .cloned()
            .unwrap_or_else(|| Stack::of(settings.volume.clone()))
    };
    if !reachable {
        return Ok(remembered());
    }
    let stack = match tokio::time::timeout(within, stack::read(bucket.as_ref(), &settings.volume)).await {
        Ok(Ok(stack)) => stack,
        Ok(Err(StackError::Bucket(err))) if err.is_transient() && bound.is_some() => {
            tracing::warn!(
                err = chain(&err),
                "the store went away: its volumes are those of the last mount"
            );
            remembered()
        }
        Err(_) if bound.is_some() => {
            tracing::warn!(
                "the store does not say in time what its volumes are: they are those of the last mount"
            );
            remembered()
        }
        Ok(Err(StackError::Bucket(cause))) => return Err(bucket::failed(settings, cause)),
        Ok(Err(source)) => return Err(StartError::Volume { source }),
        Err(_) => return Err(bucket::failed(settings, bucket::no_answer("volume.json", within))),
    };
    check_stack(&settings.cache_dir, bound, &stack)?;
    Ok(stack)
}

fn check_stack(dir: &Path, bound: Option<&Stack>, wanted: &Stack) -> Result<(), StartError> {
    match bound {
        Some(bound) if bound != wanted => Err(StartError::OtherVolume {
            dir: dir.to_owned(),
            bound: bound.to_string(),
            wanted: wanted.to_string(),
        }),
        _ => Ok(()),
    }
}

/// Makes the opened cache directory belong to `stack`, if it belongs to nothing yet.
///
/// One that is older than this note belongs to the volume whose log it followed.
pub fn bind(store: &mut Store, stack: &Stack) -> Result<(), StartError> {
    let cache = |source| StartError::Cache {
        path: store.dir.clone(),
        source,
    };
    if store.stack().is_some() {
        // Looked at before, but another daemon may have come first.
        return check_stack(&store.dir, store.stack(), stack);
    }
    let followed = followed_volumes(&store.ledger).map_err(cache)?;
    let wanted = stack.volume().as_str();
    if !followed.is_empty() && !followed.iter().any(|volume| volume == wanted) {
        return Err(StartError::OtherVolume {
            dir: store.dir.clone(),
            bound: followed.join(" and "),
            wanted: stack.to_string(),
        });
    }
    if followed.len() > 1 {
        tracing::warn!(
            ?followed,
            "the cache directory was used with several volumes, whose files are mixed in it"
        );
    }
    let dir = store.dir.clone();
    store
        .bind_stack(stack.clone())
        .map_err(|source| StartError::Cache { path: dir, source })
}
