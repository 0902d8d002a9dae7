//! Objects of catalogs: from this disk, or from the bucket, which is asked until it answers.
//!
//! Who asks for the same at once shares one request; whoever joined one that failed before its own time was over asks again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

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
    store::{StoreError, objects::Objects},
    tier::{SharedBucket, TierError},
};

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// An object that is here.
#[derive(Clone, Debug)]
pub(super) struct Got {
    pub(super) bytes: Bytes,
    pub(super) source: Source,
}

/// Where the bytes of an object came from.
#[derive(Clone, Debug)]
pub(super) enum Source {
    Disk,
    /// It is on the disk now.
    Kept,
    /// It is not, and was not to be.
    Passed,
    NotKept(Arc<StoreError>),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Fetch {
    pub(super) bucket: SharedBucket,
    pub(super) objects: Objects,
    /// How long an object is waited for.
    within: Duration,
    /// Catalogs of more bytes are not kept on this disk.
    most: u64,
    under_way: Flights<Digest, Result<Got, Arc<CatalogError>>>,
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
        // The disk is asked first; whether it is kept is known only when it was read.
        let got = self.object(digest, get, false, None).await?;
        let root = read::root_of(volume, digest, got.bytes.clone()).await?;
        if !matches!(got.source, Source::Disk)
            && self.keeps(&root)
            && let Source::NotKept(err) = self.keep(*digest, got.bytes).await
        {
            tracing::debug!(error = %err, "the root of a catalog is not kept");
        }
        Ok(root)
    }

    /// The bytes of a part of `root`. Those that come from the bucket are counted.
    pub(super) async fn part(
        &self,
        volume: &str,
        root: &Root,
        part: &PartRef,
        counter: &AtomicU64,
    ) -> Result<Got, Arc<CatalogError>> {
        let get = || read::part_object(self.bucket.as_ref(), volume, &part.digest);
        self.object(&part.digest, get, self.keeps(root), Some(counter))
            .await
    }

    async fn object<F>(
        &self,
        name: &Digest,
        get: impl Fn() -> F,
        keep: bool,
        counter: Option<&AtomicU64>,
    ) -> Result<Got, Arc<CatalogError>>
    where
        F: Future<Output = Result<Bytes, CatalogError>>,
    {
        let deadline = Instant::now() + self.within;
        loop {
            let fetch = async {
                let (objects, digest) = (self.objects.clone(), *name);
                if let Some(bytes) = blocking(move || objects.read(&digest)).await {
                    let source = Source::Disk;
                    return Ok(Got { bytes, source });
                }
                let bytes = self.insist_until(deadline, &get).await?;
                if let Some(counter) = counter {
                    counter.fetch_add(1, Ordering::Relaxed);
                }
                let source = if keep {
                    self.keep(digest, bytes.clone()).await
                } else {
                    Source::Passed
                };
                Ok(Got { bytes, source })
            };
            match self.under_way.run(*name, fetch).await {
                // It may have been another's, whose time was over sooner.
                Err(err) if err.is_transient() && Instant::now() + MAX_BACKOFF < deadline => {}
                done => return done,
            }
        }
    }

    async fn keep(&self, name: Digest, bytes: Bytes) -> Source {
        let objects = self.objects.clone();
        match blocking(move || objects.keep(&name, &bytes)).await {
            Ok(()) => Source::Kept,
            Err(err) => Source::NotKept(Arc::new(err)),
        }
    }

    /// Asks until the answer is there, it can be none, or the time is over.
    pub(super) async fn insist<T, F>(&self, read: impl Fn() -> F) -> Result<T, CatalogError>
    where
        F: Future<Output = Result<T, CatalogError>>,
    {
        self.insist_until(Instant::now() + self.within, read).await
    }

    async fn insist_until<T, F>(&self, deadline: Instant, read: impl Fn() -> F) -> Result<T, CatalogError>
    where
        F: Future<Output = Result<T, CatalogError>>,
    {
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
