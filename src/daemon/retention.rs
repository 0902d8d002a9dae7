//! Whether a store is kept by sweeps or by a lifecycle rule of its bucket: no daemon is needed for it, only the store.
//!
//! The rule itself is the operator's, who is told to install it when the store says that there is one, and to remove it
//! before the store says that there is none. So a rule never deletes from a store whose machines do not refresh:
//!
//! | the command | the store says | the rule |
//! |---|---|---|
//! | did not say that it was done, of `lifecycle` | one or the other | was not printed: not installed |
//! | said so, of `lifecycle` | a lifetime, as read back if need be | may be installed |
//! | did not say that it was done, of `sweep` | one or the other | was removed before, and stays so: run it again |
//!
//! A store that says a lifetime where no rule is deletes nothing: it is not swept, and machines refresh what they use.

use std::time::Duration;

use super::{bucket, error::StartError};
use crate::{
    config::Settings,
    namespace::snapshot,
    tier::{
        SharedBucket, lifetime,
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
    let said = lifetime::say(bucket.as_ref(), lifetime).await.map_err(failed)?;
    // Who makes a snapshot looks at the lifetime after it is there: one of both sees the other.
    if lifetime.is_some()
        && let Err(err) = must_have_no_snapshot(&bucket).await
    {
        // Should that fail, the store says a lifetime, and nobody was told to install a rule: nothing is deleted.
        lifetime::take_back(bucket.as_ref(), &said)
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
