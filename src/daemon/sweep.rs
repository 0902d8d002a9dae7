//! Sweeping a store: no daemon is needed for it, only the store.

use super::{bucket, error::StartError};
use crate::{
    config::Settings,
    namespace::sweep::{self, Progress, SweepError, SweepOptions, SweepReport},
    tier::probe::{self, IfAbsent},
};

/// Sweeps the store of `settings`. One that is not there yet is made when a window is given for it.
pub async fn run(
    settings: &Settings,
    options: &SweepOptions,
    tell: &mut (dyn FnMut(&Progress) + Send),
) -> Result<SweepReport, StartError> {
    let bucket = bucket::connect(settings).await?;
    let failed = |cause| bucket::failed(settings, cause);
    let new_window = options.window.filter(|_| !options.dry_run);
    let if_absent = if new_window.is_some() {
        IfAbsent::Create
    } else {
        IfAbsent::Refuse
    };
    // Its clock is known from here on.
    let facts = probe::open_store(bucket.as_ref(), if_absent)
        .await
        .map_err(failed)?;
    if let Some(lifetime) = facts.lifetime {
        return Err(StartError::Usage {
            why: format!(
                "the store {} is kept by a lifecycle rule of its bucket, which deletes what nobody used for {} s: no sweep is \
                 needed; casmount sweep --retention sweep ends that",
                settings.store,
                lifetime.as_secs()
            ),
        });
    }
    let swept = async {
        if facts.created
            && let Some(window) = new_window
        {
            sweep::set_first_window(&bucket, window).await?;
        }
        sweep::sweep(&bucket, options, tell).await
    };
    swept.await.map_err(|err| match err {
        SweepError::Bucket(cause) => failed(cause),
        source => StartError::Sweep { source },
    })
}
