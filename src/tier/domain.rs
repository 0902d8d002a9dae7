//! A bucket as one sees it whose blobs are kept apart: those of a fork whose writers are trusted less.
//!
//! Blobs and packs (and probes) are written below the fork's own prefix, `volumes/<name>/`, and nowhere else.
//! They are read where all have them, and only then from the fork's own prefix and those of forks below
//! it: most of what a fork reads is its parent's, and what lies below a fork's own prefix can
//! never stand before a good object of the same name. Everything else passes through.
//!
//! # Invariants
//!
//! - No request of this bucket writes a blob or pack that others than the fork's readers see.
//! - That a blob exists is believed of the shared prefix, where only trusted writers write, and of the
//!   fork's own; a conditional write is decided in its own alone.

use std::ops::Range;

use super::{Body, Bucket, Etag, Object, ObjectMeta, Page, Put, SharedBucket, TierError, layout};
use crate::base::{BoxFuture, clock::ServerClock};

/// See the module.
#[derive(Debug)]
pub struct DomainBucket {
    inner: SharedBucket,
    /// Where is written; `None`: where all write.
    own: Option<String>,
    /// Where is read after the shared prefix, in this order.
    reads: Vec<String>,
}

impl DomainBucket {
    /// Writes below `own`, which ends in a slash, and reads also below the prefixes `reads`.
    #[must_use]
    pub fn new(inner: SharedBucket, own: Option<String>, reads: Vec<String>) -> Self {
        Self { inner, own, reads }
    }

    /// Where an object is written.
    fn written(&self, key: &str) -> String {
        match &self.own {
            Some(own) if is_kept_apart(key) => format!("{own}{key}"),
            _ => key.to_owned(),
        }
    }

    /// Where an object may be, in order.
    fn places(&self, key: &str) -> Vec<String> {
        if key.starts_with(layout::PROBE_PREFIX) {
            vec![self.written(key)]
        } else if is_kept_apart(key) {
            let apart = self.reads.iter().map(|prefix| format!("{prefix}{key}"));
            std::iter::once(key.to_owned()).chain(apart).collect()
        } else {
            vec![key.to_owned()]
        }
    }
}

fn is_kept_apart(key: &str) -> bool {
    [layout::BLOBS_PREFIX, layout::PACKS_PREFIX, layout::PROBE_PREFIX]
        .iter()
        .any(|prefix| key.starts_with(prefix))
}

impl Bucket for DomainBucket {
    fn url(&self) -> String {
        self.inner.url()
    }

    fn clock(&self) -> &ServerClock {
        self.inner.clock()
    }

    fn compresses(&self) -> bool {
        self.inner.compresses()
    }

    fn own_prefix(&self) -> Option<&str> {
        self.own.as_deref()
    }

    fn get<'a>(
        &'a self,
        key: &'a str,
        range: Option<Range<u64>>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<Option<Object>, TierError>> {
        Box::pin(async move {
            for place in self.places(key) {
                let found = self.inner.get(&place, range.clone(), max_bytes).await?;
                if found.is_some() {
                    return Ok(found);
                }
            }
            Ok(None)
        })
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<ObjectMeta>, TierError>> {
        Box::pin(async move {
            // A fork below may be deleted, and with it its own blobs: only what stays counts as there.
            let shared = (!key.starts_with(layout::PROBE_PREFIX)).then(|| key.to_owned());
            let mut places: Vec<String> = shared.into_iter().chain([self.written(key)]).collect();
            places.dedup();
            for place in places {
                if let Some(found) = self.inner.head(&place).await? {
                    return Ok(Some(ObjectMeta {
                        key: key.to_owned(),
                        ..found
                    }));
                }
            }
            Ok(None)
        })
    }

    fn put_new<'a>(&'a self, key: &'a str, body: Body) -> BoxFuture<'a, Result<Put, TierError>> {
        Box::pin(async move { self.inner.put_new(&self.written(key), body).await })
    }

    fn put_if<'a>(
        &'a self,
        key: &'a str,
        body: Body,
        etag: &'a Etag,
    ) -> BoxFuture<'a, Result<Put, TierError>> {
        Box::pin(async move { self.inner.put_if(&self.written(key), body, etag).await })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>) -> BoxFuture<'a, Result<Page, TierError>> {
        // Nobody who mounts lists blobs; whoever does, means those of all.
        self.inner.list(prefix, after)
    }

    fn refresh<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, TierError>> {
        Box::pin(async move { self.inner.refresh(&self.written(key)).await })
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), TierError>> {
        Box::pin(async move { self.inner.delete(&self.written(key)).await })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::tier::url::{ConnectOptions, connect};

    #[tokio::test]
    async fn what_is_written_stays_apart_and_what_is_read_is_that_of_all_first() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}", dir.path().display());
        let all = connect(&url.parse().unwrap(), &ConnectOptions::default())
            .await
            .unwrap();
        let own = "volumes/pr-1/".to_owned();
        let apart = DomainBucket::new(Arc::clone(&all), Some(own.clone()), vec![own]);
        let read = async |bucket: &dyn Bucket, key: &str| {
            let object = bucket.get(key, None, 100).await.unwrap();
            object.map(|object| object.bytes.to_vec())
        };
        let (key, log) = ("blobs/sha256/aa/x", "volumes/pr-1/log/x");
        apart.put_new(key, Body::raw("own")).await.unwrap();
        apart.put_new(log, Body::raw("log")).await.unwrap();
        assert_eq!(read(all.as_ref(), key).await, None);
        assert_eq!(
            read(all.as_ref(), "volumes/pr-1/blobs/sha256/aa/x")
                .await
                .unwrap(),
            b"own"
        );
        assert_eq!(read(all.as_ref(), log).await.unwrap(), b"log");
        assert_eq!(read(&apart, key).await.unwrap(), b"own");
        assert_eq!(
            apart.put_new(key, Body::raw("again")).await.unwrap(),
            Put::Refused
        );
        assert_eq!(apart.head(key).await.unwrap().unwrap().key, key);
        all.put_new(key, Body::raw("of all")).await.unwrap();
        assert_eq!(read(&apart, key).await.unwrap(), b"of all");
        apart.delete(key).await.unwrap();
        assert_eq!(read(all.as_ref(), key).await.unwrap(), b"of all");
        assert_eq!(read(&apart, "packs/aa/x").await, None);
    }
}
