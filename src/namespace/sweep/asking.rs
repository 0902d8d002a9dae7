//! Requests of a sweep, made again while that may help.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use super::withheld::WithheldBucket;
use crate::{
    base::{BoxFuture, retry::Backoff},
    namespace::patience::Passing,
    tier::{Bucket, ObjectMeta, SharedBucket, TierError},
    upload::condemned::BucketTime,
};

/// How often a request is made before the sweep stops.
const ATTEMPTS: u32 = 4;
const FIRST_WAIT: Duration = Duration::from_millis(200);
const MAX_WAIT: Duration = Duration::from_secs(5);

/// So many are told of what counts for nothing.
const TOLD: usize = 20;

/// The bucket and its clock, and what was found in it that counts for nothing.
#[derive(Clone)]
pub struct Asking {
    bucket: SharedBucket,
    now: BucketTime,
    ignored: Arc<Mutex<BTreeSet<String>>>,
}

impl Asking {
    pub fn new(bucket: SharedBucket, now: BucketTime) -> Self {
        Self {
            bucket: Arc::new(WithheldBucket(bucket)),
            now,
            ignored: Arc::default(),
        }
    }

    /// Notes what counts for nothing, for the report.
    pub fn ignore(&self, what: &dyn fmt::Display) {
        // Whoever chose the key is not to be trusted with a terminal.
        let what: String = what.to_string().escape_debug().collect();
        tracing::warn!(what, "it counts for nothing");
        let mut ignored = self.ignored.lock().expect("no code panics while it holds these");
        if ignored.len() < TOLD {
            ignored.insert(what);
        }
    }

    /// Some of what was ignored since this was asked last.
    pub fn take_ignored(&self) -> Vec<String> {
        let mut ignored = self.ignored.lock().expect("no code panics while it holds these");
        std::mem::take(&mut *ignored).into_iter().collect()
    }

    pub fn bucket(&self) -> &dyn Bucket {
        self.bucket.as_ref()
    }

    /// The bucket's time.
    pub fn now(&self) -> u64 {
        (self.now)()
    }

    /// Makes a request, and again after a wait while the bucket is in trouble.
    pub async fn again<'a, T, E: Passing + std::fmt::Display>(
        &'a self,
        request: impl Fn(&'a dyn Bucket) -> BoxFuture<'a, Result<T, E>>,
    ) -> Result<T, E> {
        let mut backoff = Backoff::new(FIRST_WAIT, MAX_WAIT);
        for attempt in 1.. {
            match request(self.bucket()).await {
                Err(err) if err.may_pass() && attempt < ATTEMPTS => {
                    tracing::debug!(error = %err, attempt, "a request of the sweep failed");
                    tokio::time::sleep(backoff.next_wait()).await;
                }
                done => return done,
            }
        }
        unreachable!("the loop ends by its last attempt")
    }

    /// Lists the next page of `prefix` behind the last object of the one before.
    pub async fn page(
        &self,
        prefix: &str,
        after: &mut Option<String>,
    ) -> Result<(Vec<ObjectMeta>, bool), TierError> {
        let (behind, of) = (after.clone(), prefix.to_owned());
        let page = self.again(|bucket| bucket.list(&of, behind.as_deref())).await;
        let page = page?;
        if let Some(last) = page.objects.last() {
            if after.as_ref().is_some_and(|after| last.key <= *after) {
                return Err(TierError::Malformed {
                    key: prefix.to_owned(),
                    why: "a listing went back".to_owned(),
                });
            }
            *after = Some(last.key.clone());
        }
        let more = page.more && !page.objects.is_empty();
        Ok((page.objects, more))
    }
}
