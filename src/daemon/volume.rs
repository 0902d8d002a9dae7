//! Looking at volumes without a mount: no daemon is needed for it, only the store.

use super::{bucket, error::StartError};
use crate::{
    base::volume::VolumeName,
    config::Settings,
    namespace::{
        catalog::CatalogError,
        diff::{self, Difference},
        history::{self, Before, Publication},
        stack::{self, StackError, Standing},
        view::{OnRead, Read, Stacked, ViewError},
        volumes::{self, Listed},
    },
    tier::SharedBucket,
};

/// The volumes of the store; with `all` also every one that was deleted, else perhaps some of these.
pub async fn list(settings: &Settings, all: bool) -> Result<Vec<Listed>, StartError> {
    let bucket = bucket::open(settings).await?;
    let listed = if all {
        volumes::list(&bucket).await
    } else {
        volumes::list_live(&bucket).await
    };
    listed.map_err(|cause| bucket::failed(settings, cause))
}

/// What is different in `b` from `a`, as mounts of both would show it.
pub async fn diff(
    settings: &Settings,
    a: &VolumeName,
    b: &VolumeName,
    on_read: OnRead<'_>,
) -> Result<Vec<(Vec<u8>, Difference)>, StartError> {
    let bucket = bucket::open(settings).await?;
    let mut read = Read::new();
    let a = stacked(settings, &bucket, a, &mut read, on_read).await?;
    let b = stacked(settings, &bucket, b, &mut read, on_read).await?;
    Ok(diff::diff(&a, &b))
}

async fn stacked(
    settings: &Settings,
    bucket: &SharedBucket,
    volume: &VolumeName,
    read: &mut Read,
    on_read: OnRead<'_>,
) -> Result<Stacked, StartError> {
    must_exist(settings, bucket, volume).await?;
    let stack = stack::read(bucket.as_ref(), volume).await;
    let stack = stack.map_err(|err| odd(settings, err))?;
    let stacked = Stacked::read(bucket, &stack, read, on_read).await;
    stacked.map_err(|err| unreadable(settings, err))
}

/// The `limit` segments that were published last in `volume` itself, the newest first; and, when they are fewer,
/// what became of those before.
pub async fn log(
    settings: &Settings,
    volume: &VolumeName,
    limit: usize,
) -> Result<(Vec<Publication>, Option<Before>), StartError> {
    let bucket = bucket::open(settings).await?;
    must_exist(settings, &bucket, volume).await?;
    let told = async {
        let newest = history::newest(&bucket, volume, limit).await?;
        let before = if newest.len() < limit {
            history::before(&bucket, volume).await?
        } else {
            None
        };
        Ok((newest, before))
    };
    told.await.map_err(|err| unreadable(settings, err))
}

/// Refuses a name that stands for nothing: most likely it is misspelt.
async fn must_exist(
    settings: &Settings,
    bucket: &SharedBucket,
    volume: &VolumeName,
) -> Result<(), StartError> {
    match stack::standing(bucket.as_ref(), volume).await {
        Ok(Standing::Plain | Standing::Fork(..)) => Ok(()),
        Ok(Standing::Absent) => Err(StartError::NoVolume {
            volume: volume.to_string(),
            store: settings.store.clone(),
        }),
        Ok(Standing::Deleted) => Err(StartError::Volume {
            source: StackError::Deleted {
                volume: volume.clone(),
            },
        }),
        Err(err) => Err(odd(settings, err)),
    }
}

fn odd(settings: &Settings, err: StackError) -> StartError {
    match err {
        StackError::Bucket(cause) => bucket::failed(settings, cause),
        source => StartError::Volume { source },
    }
}

fn unreadable(settings: &Settings, err: ViewError) -> StartError {
    match err {
        ViewError::Bucket(cause) | ViewError::Catalog(CatalogError::Bucket(cause)) => {
            bucket::failed(settings, cause)
        }
        source => StartError::View { source },
    }
}
