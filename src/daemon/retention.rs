//! Whether a store is kept by sweeps or by a lifecycle rule of its bucket: no daemon is needed for it, only the store.

use std::time::Duration;

use super::{bucket, error::StartError};
use crate::{
    config::Settings,
    namespace::snapshot,
    tier::{
        SharedBucket, probe,
        sweeping::{self, DEFAULT_WINDOW},
    },
};

/// A blob that was seen in the bucket is believed to be there for half a window; it is then younger than half its lifetime.
const WINDOWS: u64 = 2;

/// Says how old blobs and packs of the store of `settings` become; `None`: as old as a sweep lets them.
pub async fn set(settings: &Settings, lifetime: Option<Duration>) -> Result<(), StartError> {
    let bucket = bucket::open(settings).await?;
    let failed = |cause| bucket::failed(settings, cause);
    if let Some(lifetime) = lifetime {
        must_have_no_snapshot(&bucket).await?;
        let stored = sweeping::read_window(bucket.as_ref()).await.map_err(failed)?;
        let now = bucket.clock().now_millis();
        let window = stored.map_or(DEFAULT_WINDOW.as_millis() as u64, |(window, _)| {
            window.longest_millis(now)
        });
        if (lifetime.as_millis() as u64) < WINDOWS * window {
            return Err(StartError::Usage {
                why: format!(
                    "a lifetime is at least two windows of the store, of {} s each: take a longer one",
                    window / 1000
                ),
            });
        }
    }
    let before = probe::read_lifetime(bucket.as_ref()).await.map_err(failed)?;
    probe::set_lifetime(bucket.as_ref(), lifetime)
        .await
        .map_err(failed)?;
    // Who makes a snapshot looks at the lifetime after it is there: one of both sees the other.
    if lifetime.is_some()
        && let Err(err) = must_have_no_snapshot(&bucket).await
    {
        probe::set_lifetime(bucket.as_ref(), before)
            .await
            .map_err(failed)?;
        return Err(err);
    }
    Ok(())
}

async fn must_have_no_snapshot(bucket: &SharedBucket) -> Result<(), StartError> {
    let snapshots = snapshot::list(bucket, None).await;
    let snapshots = snapshots.map_err(|source| StartError::Snapshot { source })?;
    match snapshots.first() {
        None => Ok(()),
        Some(first) => Err(StartError::Usage {
            why: format!(
                "a lifecycle rule would delete what snapshots name, for example {} of volume {}: delete them first, or \
                 let sweeps keep the store",
                first.tag, first.volume
            ),
        }),
    }
}
