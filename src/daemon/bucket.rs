//! Reaching the store that the settings name.

use std::{sync::Arc, time::Duration};

use crate::{
    base::volume::{Stack, StackLayer},
    config::Settings,
    daemon::error::StartError,
    tier::{
        SharedBucket, TierError,
        domain::DomainBucket,
        layout,
        probe::{self, IfAbsent},
        retaining::RetainingBucket,
        url::{self, ConnectOptions, StoreUrl},
    },
};

/// Reads the URL of a store.
pub fn parse_url(store: &str) -> Result<StoreUrl, StartError> {
    store
        .parse::<StoreUrl>()
        .map_err(|err| StartError::Usage { why: err.to_string() })
}

/// Connects; nothing is asked of the bucket yet.
pub async fn connect(settings: &Settings) -> Result<SharedBucket, StartError> {
    let store = parse_url(&settings.store)?;
    let options = ConnectOptions {
        endpoint_url: settings.endpoint_url.clone(),
        region: settings.region.clone(),
        ..ConnectOptions::default()
    };
    url::connect(&store, &options)
        .await
        .map_err(|err| failed(settings, err))
}

/// How long a store may take to say who it is.
const OPEN_WITHIN: Duration = Duration::from_secs(30);

/// Connects to a store that must be there; its clock is known from here on, and what is named of its blobs is kept
/// young if they have a lifetime.
pub async fn open(settings: &Settings) -> Result<SharedBucket, StartError> {
    let bucket = connect(settings).await?;
    let answer = probe::open_store(bucket.as_ref(), IfAbsent::Refuse);
    match tokio::time::timeout(OPEN_WITHIN, answer).await {
        Ok(Ok(facts)) => Ok(Arc::new(RetainingBucket::new(bucket, Some(facts.lifetime)))),
        Ok(Err(cause)) => Err(failed(settings, cause)),
        Err(_) => Err(failed(settings, no_answer(layout::STORE, OPEN_WITHIN))),
    }
}

/// The bucket as a mount of `stack` uses it: the blobs of forks whose writers are trusted less are apart.
pub fn of_stack(bucket: &SharedBucket, stack: &Stack) -> SharedBucket {
    let prefix = |layer: &StackLayer| layout::volume_prefix(layer.volume.as_str());
    let apart = |layer: &StackLayer| layer.own_prefix.then(|| prefix(layer));
    let reads: Vec<String> = stack.layers().iter().filter_map(apart).collect();
    if reads.is_empty() {
        return Arc::clone(bucket);
    }
    let own = stack.layers().first().and_then(apart);
    Arc::new(DomainBucket::new(Arc::clone(bucket), own, reads))
}

/// The store took too long to answer.
pub fn no_answer(key: &str, within: Duration) -> TierError {
    TierError::Unavailable {
        verb: "read",
        key: key.to_owned(),
        source: format!("no answer within {} s", within.as_secs()).into(),
    }
}

pub fn failed(settings: &Settings, cause: TierError) -> StartError {
    StartError::Bucket {
        store: settings.store.clone(),
        cause,
    }
}
