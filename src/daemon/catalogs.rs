//! The newest catalogs of what is mounted, asked for before anything is put up.

use std::{sync::Arc, time::Duration};

use super::{
    bucket,
    error::{StartError, chain},
};
use crate::{
    base::volume::Stack,
    config::Settings,
    namespace::catalog::{
        CatalogError,
        read::{self, Opened},
    },
    tier::SharedBucket,
};

/// Asks for the newest catalog of each layer of `stack`: all of them, or none when one did not come.
/// Of a snapshot those that it names, so that one that cannot be read is told at once; a machine that was here before
/// reads them when it needs them.
///
/// A machine that was here before goes on with its log when it gets no answer; one that begins
/// does not: what is in a catalog may be nowhere else.
pub async fn newest(
    settings: &Settings,
    bucket: &SharedBucket,
    stack: &Stack,
    is_known: bool,
    within: Duration,
) -> Result<Vec<Option<Opened>>, StartError> {
    if stack.snapshot().is_some() && is_known {
        return Ok(Vec::new());
    }
    let mut newest = Vec::new();
    for layer in stack.layers() {
        let volume = layer.volume.as_str();
        let ask = async {
            let Some(frozen) = &layer.frozen else {
                return read::of_layer(bucket.as_ref(), layer).await;
            };
            let root = read::root(bucket.as_ref(), volume, &frozen.catalog).await?;
            Ok(Some(Opened {
                digest: frozen.catalog,
                root: Arc::new(root),
                // Nothing is read behind it.
                floor_millis: 0,
            }))
        };
        let answer = tokio::time::timeout(within, ask).await;
        newest.push(match answer {
            Ok(Ok(opened)) => opened,
            Ok(Err(err)) if is_known => {
                tracing::warn!(err = chain(&err), volume, "going on without the newest catalogs");
                return Ok(Vec::new());
            }
            Err(_) if is_known => {
                tracing::warn!(
                    volume,
                    "the store does not say in time what its newest catalog is"
                );
                return Ok(Vec::new());
            }
            Ok(Err(CatalogError::Bucket(cause))) => return Err(bucket::failed(settings, cause)),
            Ok(Err(source)) => return Err(StartError::Catalog { source }),
            Err(_) => return Err(bucket::failed(settings, bucket::no_answer("head.json", within))),
        });
    }
    Ok(newest)
}
