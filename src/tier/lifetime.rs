//! How old blobs and packs of a store become before a lifecycle rule of its bucket deletes them: reading it, saying it, and
//! taking that back.
//!
//! It is a member of `casmount.json`, see [`super::probe`].
//!
//! # Invariants
//!
//! - Two operators may say one lifetime at once, and one of them take it back, because he saw a snapshot that the other did
//!   not. So each says it in words of his own (`lifetime_by`), also when it is said already, and takes back only these:
//!   of those who were told that the store says it, and installed a rule, nobody's word is taken back by another.
//! - Versions that do not know the member `lifetime_by` leave it out when they say a lifetime; nobody then takes these words for his.

use std::time::Duration;

use super::{
    Body, Bucket, Etag, Put, TierError, layout,
    probe::{MAX_BYTES, StoreJson, read_store},
};
use crate::base::id::random_bytes;

/// How old blobs and packs of a store become; one request.
pub async fn read(bucket: &dyn Bucket) -> Result<Option<Duration>, TierError> {
    Ok(read_store(bucket).await?.and_then(|store| store.lifetime()))
}

/// What was said of a store's lifetime, and can be taken back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaidLifetime {
    before: StoreJson,
    now: StoreJson,
}

impl SaidLifetime {
    /// What the store said before.
    #[must_use]
    pub fn before(&self) -> Option<Duration> {
        self.before.lifetime()
    }

    /// Whether the bytes of `casmount.json` are these very words.
    #[must_use]
    pub fn is_said_by(&self, bytes: &[u8]) -> bool {
        self.now.encode() == bytes
    }
}

/// Says how old blobs and packs of a store become before the bucket's lifecycle rule deletes them.
///
/// Machines learn it when they start: none may have the store mounted.
///
/// # Errors
///
/// When it is not known, or not so, that the store says it now, by this call. A reply that was lost on the way is no
/// reason: what the store says is read again, because whoever is told that nothing changed may install, or keep, a rule
/// that nobody refreshes anything for.
pub async fn say(bucket: &dyn Bucket, lifetime: Option<Duration>) -> Result<SaidLifetime, TierError> {
    let (stored, etag) = read_versioned(bucket).await?;
    let said = SaidLifetime {
        now: StoreJson {
            format: match lifetime {
                Some(_) => layout::LIFECYCLE_FORMAT_VERSION,
                None => layout::FORMAT_VERSION,
            },
            lifetime_millis: lifetime.map(|lifetime| lifetime.as_millis() as u64),
            lifetime_by: lifetime.map(|_| format!("{:016x}", u64::from_be_bytes(random_bytes()))),
            ..stored.clone()
        },
        before: stored,
    };
    // Never so of a lifetime.
    if said.now == said.before {
        return Ok(said);
    }
    let body = Body::raw(said.now.encode());
    let failed = match bucket.put_if(layout::STORE, body, &etag).await {
        Ok(Put::Written(_)) => return Ok(said),
        Ok(Put::Refused) => TierError::Unavailable {
            verb: "change",
            key: layout::STORE.to_owned(),
            source: "it was changed by others at the same time".into(),
        },
        Err(err) if err.is_transient() => err,
        Err(err) => return Err(err),
    };
    // It may have been done all the same.
    match read_store(bucket).await {
        Ok(Some(now)) if now == said.now => Ok(said),
        Ok(_) => Err(failed),
        Err(err) => Err(TierError::Unavailable {
            verb: "change",
            key: layout::STORE.to_owned(),
            source: format!(
                "whether the store says it now is not known ({err}): run it again before you install or remove a rule"
            )
            .into(),
        }),
    }
}

/// Takes back what [`say`] said: the store says what it said before, unless somebody said something since, were it
/// the same.
pub async fn take_back(bucket: &dyn Bucket, said: &SaidLifetime) -> Result<(), TierError> {
    let (stored, etag) = read_versioned(bucket).await?;
    if stored == said.now {
        // Refused: somebody says something at this moment, or the reply was lost.
        bucket
            .put_if(layout::STORE, Body::raw(said.before.encode()), &etag)
            .await?;
    }
    Ok(())
}

async fn read_versioned(bucket: &dyn Bucket) -> Result<(StoreJson, Etag), TierError> {
    let Some(object) = bucket.get(layout::STORE, None, MAX_BYTES).await? else {
        return Err(TierError::Unsupported {
            why: format!("{} is no casmount store yet", bucket.url()),
        });
    };
    Ok((StoreJson::decode(&object.bytes, &bucket.url())?, object.etag))
}
