//! A bucket as one sees it whose lifecycle rule deletes blobs and packs by their age: what is found there is kept young.
//!
//! The rule counts from the last write of an object, so an object that is to stay is written again before it is due, by
//! a copy onto itself, for which no byte crosses the network ([`Bucket::refresh`]). Whether there is such a rule, and what
//! it has for a lifetime, the store says ([`super::probe::StoreJson`]); without one everything passes through.
//!
//! # Invariants
//!
//! `L` is the lifetime of the rule.
//!
//! - A blob or pack that [`Bucket::head`] says is there, or that [`Bucket::put_new`] says exists already, is younger
//!   than `L/2`. So whoever skips an upload because of it, or names it, has `L/2` from then on.
//! - So is one that was read, if it can be written by this machine. A read never fails because of it.
//!
//! So a name that is published, or used, finds its bytes for at least a quarter of `L`: a window of the sweep, for which
//! "it exists" is believed, is at most half of `L`. What nobody writes, reads or names for `L` is gone; nothing else
//! keeps it, no fork and no promise of a name.
//!
//! Who may read an object but not write it (a pull request's machine, of the main branch's blobs) is told that one which
//! is older than `L/2` is absent when he asks, because he cannot keep it, and stores it where he may.
//!
//! # Cost
//!
//! Nothing for what is younger; a HEAD and a COPY for an object in use every `L/2`, whichever machine comes first. With
//! 1,000,000 objects in use and a lifetime of 30 days 67,000 copies a day, 34 cents.

use std::{ops::Range, time::Duration};

use tokio::sync::OnceCell;

use super::{Body, Bucket, Etag, Object, ObjectMeta, Page, Put, SharedBucket, TierError, layout, lifetime};
use crate::base::{BoxFuture, clock::ServerClock};

/// See the module.
#[derive(Debug)]
pub struct RetainingBucket {
    inner: SharedBucket,
    /// Read when it is first needed, if the store was away before.
    lifetime_millis: OnceCell<Option<u64>>,
}

impl RetainingBucket {
    /// `lifetime` is what the store says, if it was asked.
    #[must_use]
    pub fn new(inner: SharedBucket, lifetime: Option<Option<Duration>>) -> Self {
        let millis = |lifetime: Duration| lifetime.as_millis() as u64;
        let known = lifetime.map(|lifetime| lifetime.map(millis));
        Self {
            inner,
            lifetime_millis: OnceCell::new_with(known),
        }
    }

    /// The lifetime of what the rule deletes; `None` for all else, and without a rule.
    async fn lifetime(&self, key: &str) -> Result<Option<u64>, TierError> {
        if ![layout::BLOBS_PREFIX, layout::PACKS_PREFIX]
            .iter()
            .any(|prefix| key.starts_with(prefix))
        {
            return Ok(None);
        }
        let read = || async {
            let lifetime = lifetime::read(self.inner.as_ref()).await?;
            Ok::<_, TierError>(lifetime.map(|lifetime| lifetime.as_millis() as u64))
        };
        self.lifetime_millis.get_or_try_init(read).await.copied()
    }

    /// Refreshes an object if it is too old; false when it is gone, or cannot be kept from here.
    async fn keep(&self, key: &str, modified_millis: u64, lifetime: u64) -> Result<bool, TierError> {
        let age = self.inner.clock().now_millis().saturating_sub(modified_millis);
        if age < lifetime / 2 {
            return Ok(true);
        }
        match self.inner.refresh(key).await {
            Err(TierError::Denied { .. }) => Ok(false),
            done => done,
        }
    }
}

impl Bucket for RetainingBucket {
    fn url(&self) -> String {
        self.inner.url()
    }

    fn clock(&self) -> &ServerClock {
        self.inner.clock()
    }

    fn compresses(&self) -> bool {
        self.inner.compresses()
    }

    fn get<'a>(
        &'a self,
        key: &'a str,
        range: Option<Range<u64>>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<Option<Object>, TierError>> {
        Box::pin(async move {
            let found = self.inner.get(key, range, max_bytes).await?;
            if let Some(object) = &found
                && let Some(lifetime) = self.lifetime(key).await.unwrap_or_default()
                && let Err(err) = self.keep(key, object.modified_millis, lifetime).await
            {
                tracing::debug!(key, error = %err, "an object that is used could not be refreshed now");
            }
            Ok(found)
        })
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<ObjectMeta>, TierError>> {
        Box::pin(async move {
            let Some(found) = self.inner.head(key).await? else {
                return Ok(None);
            };
            let is_kept = match self.lifetime(key).await? {
                Some(lifetime) => self.keep(key, found.modified_millis, lifetime).await?,
                None => true,
            };
            Ok(is_kept.then_some(found))
        })
    }

    fn put_new<'a>(&'a self, key: &'a str, body: Body) -> BoxFuture<'a, Result<Put, TierError>> {
        Box::pin(async move {
            let put = self.inner.put_new(key, body.clone()).await?;
            let lifetime = self.lifetime(key).await?;
            let Some(lifetime) = lifetime.filter(|_| put == Put::Refused) else {
                return Ok(put);
            };
            let Some(found) = self.inner.head(key).await? else {
                // It expired in between.
                return self.inner.put_new(key, body).await;
            };
            let age = self
                .inner
                .clock()
                .now_millis()
                .saturating_sub(found.modified_millis);
            if age < lifetime / 2 || self.inner.refresh(key).await? {
                return Ok(put);
            }
            self.inner.put_new(key, body).await
        })
    }

    fn put_if<'a>(
        &'a self,
        key: &'a str,
        body: Body,
        etag: &'a Etag,
    ) -> BoxFuture<'a, Result<Put, TierError>> {
        self.inner.put_if(key, body, etag)
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>) -> BoxFuture<'a, Result<Page, TierError>> {
        self.inner.list(prefix, after)
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), TierError>> {
        self.inner.delete(key)
    }

    fn delete_many<'a>(&'a self, keys: &'a [String]) -> BoxFuture<'a, Result<(), TierError>> {
        self.inner.delete_many(keys)
    }

    fn refresh<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, TierError>> {
        self.inner.refresh(key)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        sync::Arc,
        time::{Duration, SystemTime},
    };

    use super::*;
    use crate::tier::{
        probe,
        url::{ConnectOptions, connect},
    };

    const LIFETIME: Duration = Duration::from_secs(100_000);

    struct Store {
        dir: tempfile::TempDir,
        all: SharedBucket,
        kept: RetainingBucket,
    }

    impl Store {
        /// `known` is what the store said when it was asked, if it was.
        async fn new(known: &[Option<Duration>]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let url = format!("file://{}", dir.path().display());
            let all = connect(&url.parse().unwrap(), &ConnectOptions::default())
                .await
                .unwrap();
            let kept = RetainingBucket::new(Arc::clone(&all), known.first().copied());
            Self { dir, all, kept }
        }

        async fn object(&self, key: &str, age: Duration) {
            self.all.put_new(key, Body::raw("x")).await.unwrap();
            let file = File::options()
                .write(true)
                .open(self.dir.path().join(key))
                .unwrap();
            file.set_modified(SystemTime::now() - age).unwrap();
        }

        async fn is_young(&self, key: &str) -> bool {
            let found = self.all.head(key).await.unwrap().unwrap();
            self.all.clock().now_millis() - found.modified_millis < 50_000
        }
    }

    #[tokio::test]
    async fn what_is_found_is_younger_than_half_the_lifetime() {
        let store = Store::new(&[Some(LIFETIME)]).await;
        let old = LIFETIME * 6 / 10;
        for key in ["blobs/sha256/aa/x", "packs/aa/x"] {
            store.object(key, old).await;
            assert!(store.kept.head(key).await.unwrap().is_some());
            assert!(store.is_young(key).await, "{key} was asked for");
            store.object_again(key, old).await;
            assert_eq!(
                store.kept.put_new(key, Body::raw("y")).await.unwrap(),
                Put::Refused
            );
            assert!(store.is_young(key).await, "{key} was found to exist");
            store.object_again(key, old).await;
            let read = store.kept.get(key, Some(0..1), 10).await.unwrap().unwrap();
            assert_eq!(read.bytes, "x");
            assert!(store.is_young(key).await, "{key} was read");
        }
        assert!(store.kept.head("packs/aa/none").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_young_and_what_the_rule_does_not_mean_is_left_alone() {
        let store = Store::new(&[Some(LIFETIME)]).await;
        store.object("packs/aa/x", LIFETIME * 4 / 10).await;
        store.object("volumes/main/head.json", LIFETIME).await;
        for key in ["packs/aa/x", "volumes/main/head.json"] {
            store.kept.head(key).await.unwrap();
            store.kept.get(key, None, 10).await.unwrap();
            assert!(!store.is_young(key).await, "{key}");
        }
        let store = Store::new(&[None]).await;
        store.object("packs/aa/x", LIFETIME).await;
        store.kept.head("packs/aa/x").await.unwrap();
        assert!(!store.is_young("packs/aa/x").await, "there is no rule");
    }

    #[tokio::test]
    async fn the_store_is_asked_when_it_was_not_before() {
        let store = Store::new(&[]).await;
        probe::open_store(store.all.as_ref(), probe::IfAbsent::Create)
            .await
            .unwrap();
        lifetime::say(store.all.as_ref(), Some(LIFETIME)).await.unwrap();
        store.object("packs/aa/x", LIFETIME).await;
        store.kept.head("packs/aa/x").await.unwrap();
        assert!(store.is_young("packs/aa/x").await);
    }

    #[tokio::test]
    async fn a_lifetime_is_taken_back_unless_another_was_said_since() {
        let store = Store::new(&[]).await;
        let all = store.all.as_ref();
        probe::open_store(all, probe::IfAbsent::Create).await.unwrap();
        let lifetime = Some(LIFETIME);
        let said = lifetime::say(all, lifetime).await.unwrap();
        assert_eq!(said.before(), None);
        lifetime::take_back(all, &said).await.unwrap();
        assert_eq!(lifetime::read(all).await.unwrap(), None);
        let said = lifetime::say(all, lifetime).await.unwrap();
        for other in [Some(LIFETIME * 2), lifetime] {
            let again = lifetime::say(all, other).await.unwrap();
            assert!(again.before().is_some());
            lifetime::take_back(all, &said).await.unwrap();
            assert_eq!(lifetime::read(all).await.unwrap(), other);
        }
    }

    impl Store {
        async fn object_again(&self, key: &str, age: Duration) {
            self.all.delete(key).await.unwrap();
            self.object(key, age).await;
        }
    }
}
