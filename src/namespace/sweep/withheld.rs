//! Tells an object that is denied for a reason of its own from credentials that may not read.
//!
//! To both the bucket says that it is denied. But one is what whoever wrote the object chose, an archived storage class
//! ([InvalidObjectState]) or a key to encrypt with, and must not end a sweep where he is not trusted; the other is the
//! sweeper's own policy, and went unnoticed all that it may not read would count for nothing, and be deleted.
//!
//! # Policy
//!
//! - After a denial a key is asked for that nobody ever had, behind the one that was denied. S3 decides by the policy first:
//!   who may read there is told that there is no such object, because he may list, as a sweep must; who may not is denied. In the first case the object counts
//!   as malformed ([`TierError::Malformed`]); in every other it stays denied, and ends the sweep.
//! - What a file system denies stays denied: the owner of a file says nothing of who is at fault.
//!
//! One GET for each denial.
//!
//! [InvalidObjectState]: https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html

use std::{error::Error as _, io, ops::Range};

use crate::{
    base::{BoxFuture, clock::ServerClock, id::random_bytes},
    namespace::background::words,
    tier::{Body, Bucket, Etag, Object, ObjectMeta, Page, Put, SharedBucket, TierError},
};

/// A bucket whose readers are told so. All else passes through.
#[derive(Debug)]
pub struct WithheldBucket(pub SharedBucket);

impl WithheldBucket {
    async fn judged<T>(&self, key: &str, read: Result<T, TierError>) -> Result<T, TierError> {
        let err = match read {
            Err(err @ TierError::Denied { .. }) => err,
            read => return read,
        };
        let said = match err.source() {
            Some(said) if said.is::<io::Error>() => return Err(err),
            said => said.map(words).unwrap_or_default(),
        };
        let nobodys = format!("{key}.{:016x}", u64::from_be_bytes(random_bytes()));
        match self.0.get(&nobodys, None, 0).await {
            Ok(None) => Err(TierError::Malformed {
                key: key.to_owned(),
                why: format!(
                    "what lies beside it may be read, and it may not, so it is archived or encrypted with another key ({said})"
                ),
            }),
            _ => Err(err),
        }
    }
}

impl Bucket for WithheldBucket {
    fn url(&self) -> String {
        self.0.url()
    }

    fn clock(&self) -> &ServerClock {
        self.0.clock()
    }

    fn compresses(&self) -> bool {
        self.0.compresses()
    }

    fn own_prefix(&self) -> Option<&str> {
        self.0.own_prefix()
    }

    fn get<'a>(
        &'a self,
        key: &'a str,
        range: Option<Range<u64>>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<Option<Object>, TierError>> {
        Box::pin(async move { self.judged(key, self.0.get(key, range, max_bytes).await).await })
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<ObjectMeta>, TierError>> {
        Box::pin(async move { self.judged(key, self.0.head(key).await).await })
    }

    fn put_new<'a>(&'a self, key: &'a str, body: Body) -> BoxFuture<'a, Result<Put, TierError>> {
        self.0.put_new(key, body)
    }

    fn put_if<'a>(
        &'a self,
        key: &'a str,
        body: Body,
        etag: &'a Etag,
    ) -> BoxFuture<'a, Result<Put, TierError>> {
        self.0.put_if(key, body, etag)
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>) -> BoxFuture<'a, Result<Page, TierError>> {
        self.0.list(prefix, after)
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), TierError>> {
        self.0.delete(key)
    }

    fn refresh<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, TierError>> {
        self.0.refresh(key)
    }

    fn delete_many<'a>(&'a self, keys: &'a [String]) -> BoxFuture<'a, Result<(), TierError>> {
        self.0.delete_many(keys)
    }
}
