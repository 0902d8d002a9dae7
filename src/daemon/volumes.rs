//! Which volumes a start mounts, whether the cache directory is theirs, and whether they are still there.
//!
//! A cache directory holds the tree of one stack of volumes, or of one snapshot. Mounting another one with it
//! would mix two trees, so it is refused while nothing is changed yet.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::task::JoinHandle;

use super::{
    bucket,
    error::{StartError, chain},
};
use crate::{
    base::volume::Stack,
    config::{CommitMode, Settings},
    namespace::{
        follow::followed_volumes,
        publish::PublishHalt,
        stack::{self, StackError, Standing},
    },
    store::Store,
    tier::SharedBucket,
};

/// How often a fork is looked at that may have been deleted by somebody else. A GET costs a
/// tenth of the listings that a follower makes in this time.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Refuses a cache directory of another volume or snapshot, before anybody is asked anything.
pub fn check_volume(settings: &Settings, bound: Option<&Stack>) -> Result<(), StartError> {
    let Some(bound) = bound else { return Ok(()) };
    let tag = bound.snapshot().map(|frozen| &frozen.tag);
    if *bound.volume() == settings.volume && tag == settings.snapshot.as_ref() {
        return Ok(());
    }
    let volume = &settings.volume;
    let at = settings.snapshot.as_ref();
    Err(StartError::OtherVolume {
        dir: settings.cache_dir.clone(),
        bound: bound.to_string(),
        wanted: at.map_or_else(|| volume.to_string(), |tag| format!("{volume} at snapshot {tag}")),
    })
}

/// Makes the fork that the settings ask for, if it is not there.
pub async fn make_fork(
    settings: &Settings,
    bucket: &SharedBucket,
    within: Duration,
) -> Result<(), StartError> {
    let Some(from) = &settings.fork_from else {
        return Ok(());
    };
    let made = stack::ensure_fork(bucket.as_ref(), &settings.volume, from);
    match tokio::time::timeout(within, made).await {
        Ok(Ok(true)) => tracing::info!(volume = %settings.volume, %from, "made a fork"),
        Ok(Ok(false)) => {}
        Ok(Err(StackError::Bucket(cause))) => return Err(bucket::failed(settings, cause)),
        Ok(Err(source)) => return Err(StartError::Volume { source }),
        Err(_) => return Err(bucket::failed(settings, bucket::no_answer("volume.json", within))),
    }
    Ok(())
}

/// Refuses settings that want a fork where the volume is none, or is one of another volume.
pub fn check_fork(settings: &Settings, stack: &Stack) -> Result<(), StartError> {
    let parent = stack.layers().get(1).map(|layer| &layer.volume);
    match (&settings.fork_from, parent) {
        (Some(wanted), parent) if parent != Some(wanted) => Err(StartError::Volume {
            source: StackError::OtherParent {
                volume: settings.volume.clone(),
                wanted: wanted.clone(),
            },
        }),
        (None, None) if settings.commit == CommitMode::OnSuccess => Err(StartError::Usage {
            why: format!(
                "--commit on-success needs a fork, and volume {} is none: name its parent with --fork-from",
                settings.volume
            ),
        }),
        _ => Ok(()),
    }
}

/// Looks now and then whether the mounted fork was deleted; if so, nothing is published any more.
///
/// `None` when it is no fork: those cannot be deleted. Aborted by whoever holds it.
pub fn watch(bucket: &SharedBucket, stack: &Stack, publishing: PublishHalt) -> Option<JoinHandle<()>> {
    // Nor is anything published in a snapshot.
    if stack.layers().len() < 2 || stack.snapshot().is_some() {
        return None;
    }
    let (bucket, volume) = (Arc::clone(bucket), stack.volume().clone());
    Some(tokio::spawn(async move {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            // Whatever else is wrong, others meet and tell it.
            if let Ok(Standing::Deleted) = stack::standing(bucket.as_ref(), &volume).await {
                let deleted = StackError::Deleted { volume };
                return publishing.halt(deleted.to_string());
            }
        }
    }))
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

pub fn check_stack(dir: &Path, bound: Option<&Stack>, wanted: &Stack) -> Result<(), StartError> {
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
    let is_its_own = stack.snapshot().is_none() && followed.iter().any(|volume| volume == wanted);
    if !followed.is_empty() && !is_its_own {
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
