//! Objects of catalogs: from this disk, or from the bucket, which is asked until it answers.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;

use super::{
    CatalogError,
    format::{PartRef, Root},
    read,
};
use crate::{
    base::{digest::Digest, flight::Flights, retry::Backoff},
    namespace::background::blocking,
    store::objects::Objects,
    tier::{SharedBucket, TierError},
};

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// Where the bytes of an object came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Disk,
    Bucket,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Fetch {
    pub(super) bucket: SharedBucket,
    pub(super) objects: Objects,
    /// Of one object.
    within: Duration,
    /// Catalogs of more bytes are not kept on this disk.
    most: u64,
    under_way: Flights<Digest, Result<(Bytes, Source), Arc<CatalogError>>>,
}

impl Fetch {
    pub(super) fn new(bucket: &SharedBucket, objects: &Objects, within: Duration, most: u64) -> Self {
        Self {
            bucket: Arc::clone(bucket),
            objects: objects.clone(),
            within,
            most,
            under_way: Flights::default(),
        }
    }

    /// Whether all of a catalog is kept on this disk.
    pub(super) fn keeps(&self, root: &Root) -> bool {
        bytes_of(root) <= self.most
    }

    pub(super) async fn root(&self, volume: &str, digest: &Digest) -> Result<Root, Arc<CatalogError>> {
        let get = || read::root_object(self.bucket.as_ref(), volume, digest);
        let (bytes, source) = self.object(digest, get, false).await?;
        let root = read::root_of(volume, digest, bytes.clone()).await?;
        if source == Source::Bucket && self.keeps(&root) {
            self.keep(*digest, bytes).await;
        }
        Ok(root)
    }

    /// The bytes of a part of `root`.
    pub(super) async fn part(
        &self,
        volume: &str,
        root: &Root,
        part: &PartRef,
    ) -> Result<(Bytes, Source), Arc<CatalogError>> {
        let get = || read::part_object(self.bucket.as_ref(), volume, &part.digest);
        self.object(&part.digest, get, self.keeps(root)).await
    }

    async fn object<F>(
        &self,
        name: &Digest,
        get: impl Fn() -> F,
        keep: bool,
    ) -> Result<(Bytes, Source), Arc<CatalogError>>
    where
        F: Future<Output = Result<Bytes, CatalogError>>,
    {
        let fetch = async {
            let (objects, digest) = (self.objects.clone(), *name);
            if let Some(bytes) = blocking(move || objects.read(&digest)).await {
                return Ok((bytes, Source::Disk));
            }
            let bytes = self.insist(get).await?;
            if keep {
                self.keep(digest, bytes.clone()).await;
            }
            Ok((bytes, Source::Bucket))
        };
        self.under_way.run(*name, fetch).await
    }

    async fn keep(&self, name: Digest, bytes: Bytes) {
        let objects = self.objects.clone();
        let kept = blocking(move || objects.keep(&name, &bytes)).await;
        if let Err(err) = kept {
            // It is fetched again when it is wanted.
            tracing::debug!(error = %err, "an object of a catalog is not kept");
        }
    }

    /// Asks until the answer is there, it can be none, or the time is over.
    pub(super) async fn insist<T, F>(&self, read: impl Fn() -> F) -> Result<T, CatalogError>
    where
        F: Future<Output = Result<T, CatalogError>>,
    {
        let deadline = Instant::now() + self.within;
        let mut backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
        loop {
            let err = match tokio::time::timeout_at(deadline, read()).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(err)) if !err.is_transient() => return Err(err),
                Ok(Err(err)) => err,
                Err(_) => CatalogError::Bucket(TierError::Unavailable {
                    verb: "read",
                    key: "a catalog".to_owned(),
                    source: format!("no answer within {} s", self.within.as_secs()).into(),
                }),
            };
            let wait = backoff.next_wait();
            if Instant::now() + wait >= deadline {
                return Err(err);
            }
            tokio::time::sleep(wait).await;
        }
    }
}

/// All of a catalog but its root.
pub(super) fn bytes_of(root: &Root) -> u64 {
    let parts = root.linked.iter().chain(&root.parts);
    parts.map(|part| part.bytes).sum()
}
