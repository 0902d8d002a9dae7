//! Whether a store is kept by sweeps or by a lifecycle rule of its bucket: no daemon is needed for it, only the store.

use std::time::Duration;

use super::{bucket, error::StartError};
use crate::{
    config::Settings,
    tier::{
        probe,
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
    probe::set_lifetime(bucket.as_ref(), lifetime)
        .await
        .map_err(failed)
}
