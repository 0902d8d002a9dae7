//! What sweeps have condemned, as far as this machine knows.
//!
//! Nothing runs by itself: whoever uploads or publishes asks, and what was read longer than a part of the
//! window ago is read again then. A machine at rest costs the bucket nothing.
//!
//! # Invariants
//!
//! - What is returned was read, whole, less than `MAX_AGE_SHARE` of the window ago. A machine that
//!   slept, or cannot read it now, gets nothing.
//! - Its age is counted from before the reading began, by the bucket's clock.
//! - Where blobs are kept apart, an object is condemned when it is so in either place: it may be in both.
//!
//! # Cost
//!
//! One LIST every eighth of the window, at most every quarter of an hour; one GET more when the store has a
//! window of its own, and one for each list that is new. Memory: 8 bytes for each condemned object.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Mutex;

use crate::{
    base::digest::Digest,
    tier::{
        SharedBucket, TierError, layout,
        sweeping::{self, DEFAULT_WINDOW, SweepList, mark, mark_of_key},
    },
};

/// It is read again when it is older than this part of the window, or than [`MAX_PACE`].
const PACE_SHARE: u64 = 8;
const MAX_PACE: Duration = Duration::from_secs(900);

/// It is good for nothing any more when it is older than this part of the window.
const MAX_AGE_SHARE: u64 = 4;

/// Tells the bucket's time, in milliseconds since 1970.
pub type BucketTime = Arc<dyn Fn() -> u64 + Send + Sync>;

/// What was read of `sweep/`.
#[derive(Clone, Debug)]
pub struct Known {
    /// The bucket's time when the reading began.
    pub read_millis: u64,
    pub window_millis: u64,
    lists: BTreeMap<String, Arc<SweepList>>,
    /// Where blobs are kept apart.
    own_prefix: Option<String>,
}

impl Known {
    /// Whether the object of this digest counts as absent.
    #[must_use]
    pub fn is_condemned(&self, object: &Digest) -> bool {
        let mut marks = vec![mark(object)];
        if let Some(own) = self.own_prefix.as_ref().filter(|_| !self.lists.is_empty()) {
            let keys = [layout::blob(object), layout::pack(object)];
            marks.extend(keys.map(|key| mark_of_key(&format!("{own}{key}"))));
        }
        let mut lists = self.lists.values();
        lists.any(|list| marks.iter().any(|mark| list.has_mark(*mark)))
    }

    /// Whether "the bucket has it", seen at `confirmed_millis`, is still good for a while.
    #[must_use]
    pub fn is_fresh(&self, confirmed_millis: u64, now_millis: u64) -> bool {
        // What was seen in the future was seen by a clock that was set.
        confirmed_millis <= now_millis && now_millis - confirmed_millis < self.window_millis / 3
    }

    /// Until when a segment must be acknowledged that names what was last seen at `confirmed_millis`.
    #[must_use]
    pub fn good_until(&self, confirmed_millis: u64) -> u64 {
        confirmed_millis.min(self.read_millis) + self.window_millis / 2
    }

    fn age(&self, now_millis: u64) -> Option<u64> {
        now_millis.checked_sub(self.read_millis)
    }

    fn is_younger_than(&self, now_millis: u64, age_millis: u64) -> bool {
        self.age(now_millis).is_some_and(|age| age < age_millis)
    }
}

/// Reads and remembers what sweeps condemned.
pub struct Condemned {
    bucket: SharedBucket,
    now_millis: BucketTime,
    known: Mutex<Option<Arc<Known>>>,
}

impl std::fmt::Debug for Condemned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Condemned").finish_non_exhaustive()
    }
}

impl Condemned {
    #[must_use]
    pub fn new(bucket: SharedBucket, now_millis: BucketTime) -> Self {
        Self {
            bucket,
            now_millis,
            known: Mutex::default(),
        }
    }

    /// By the clock of the bucket itself.
    #[must_use]
    pub fn of(bucket: &SharedBucket) -> Self {
        let clock = Arc::clone(bucket);
        Self::new(Arc::clone(bucket), Arc::new(move || clock.clock().now_millis()))
    }

    /// The bucket's time.
    #[must_use]
    pub fn now_millis(&self) -> u64 {
        (self.now_millis)()
    }

    /// What is condemned, read again when it is time.
    ///
    /// # Errors
    ///
    /// When it cannot be read, and what was read before is too old: nothing may be believed to be in
    /// the bucket then, and nothing be published.
    pub async fn known(&self) -> Result<Arc<Known>, TierError> {
        let mut known = self.known.lock().await;
        let now = self.now_millis();
        if let Some(known) = known.as_ref() {
            let pace = (known.window_millis / PACE_SHARE).min(MAX_PACE.as_millis() as u64);
            if known.is_younger_than(now, pace) {
                return Ok(Arc::clone(known));
            }
        }
        match self.read(known.as_deref()).await {
            Ok(read) => {
                let read = Arc::new(read);
                *known = Some(Arc::clone(&read));
                Ok(read)
            }
            Err(err) => {
                let now = self.now_millis();
                let usable = known
                    .as_ref()
                    .filter(|known| known.is_younger_than(now, known.window_millis / MAX_AGE_SHARE));
                match usable {
                    Some(known) if err.is_transient() => {
                        tracing::debug!(error = %err, "what is condemned was not read again");
                        Ok(Arc::clone(known))
                    }
                    _ => Err(err),
                }
            }
        }
    }

    async fn read(&self, before: Option<&Known>) -> Result<Known, TierError> {
        let bucket = self.bucket.as_ref();
        let (began, began_millis) = (Instant::now(), self.now_millis());
        let found = sweeping::list(bucket).await?;
        // The first answer of a bucket corrects what was taken for its time.
        let corrected = self
            .now_millis()
            .saturating_sub(began.elapsed().as_millis() as u64);
        let read_millis = began_millis.min(corrected);
        let window = if found.has_window {
            sweeping::read_window(bucket).await?.map(|(window, _)| window)
        } else {
            None
        };
        let window_millis = window.map_or(DEFAULT_WINDOW.as_millis() as u64, |window| window.window_millis);
        let mut lists = BTreeMap::new();
        for (id, _) in found.lists {
            // Lists are immutable.
            let list = match before.and_then(|before| before.lists.get(&id)) {
                Some(list) => Some(Arc::clone(list)),
                None => sweeping::read_list(bucket, &id).await?.map(Arc::new),
            };
            if let Some(list) = list {
                lists.insert(id, list);
            }
        }
        Ok(Known {
            read_millis,
            window_millis,
            lists,
            own_prefix: bucket.own_prefix().map(str::to_owned),
        })
    }
}
