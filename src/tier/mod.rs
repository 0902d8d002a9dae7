//! Places outside this machine that hold blobs.
//!
//! Today there is one kind, the *bucket*: S3 or a directory, behind one trait
//! of whole objects. Everything above speaks of keys ([`layout`]) and bytes;
//! only `s3` knows the SDK and only `dir` knows the file system.
//!
//! Absence is a value on a query (`None`), never an error; an error means that
//! nobody knows whether the object is there.

pub mod body;
pub mod dir;
pub mod domain;
pub mod error;
pub mod layout;
pub mod lifetime;
pub mod probe;
pub mod retaining;
pub mod s3;
pub mod sweeping;
pub mod url;

use std::{ops::Range, sync::Arc};

use bytes::Bytes;

use crate::base::{BoxFuture, clock::ServerClock, digest::Digest};

pub use error::TierError;

/// The version of one object, for `If-Match`. Opaque.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Etag(pub String);

/// What an object carries, as it is stored.
#[derive(Clone, Debug)]
pub struct Body {
    /// The bytes to send; compressed when `zstd` says so.
    pub bytes: Bytes,
    /// SHA-256 of `bytes`, sent along so that the server refuses damage.
    pub sha256: Digest,
    /// Whether `bytes` are a zstd frame (`Content-Encoding: zstd`).
    pub zstd: bool,
}

impl Body {
    /// A body that is stored as it is.
    #[must_use]
    pub fn raw(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self {
            sha256: Digest::of(&bytes),
            bytes,
            zstd: false,
        }
    }
}

/// An object that was read, decompressed.
#[derive(Clone, Debug)]
pub struct Object {
    pub bytes: Bytes,
    pub etag: Etag,
    /// Bytes that crossed the network, which compression makes fewer.
    pub transferred_bytes: u64,
    /// When it was last written: milliseconds since 1970 of the bucket's clock; 0 when that was not told.
    pub modified_millis: u64,
}

/// What is known of an object without reading it.
#[derive(Clone, Debug)]
pub struct ObjectMeta {
    pub key: String,
    /// Bytes as stored.
    pub size: u64,
    /// Milliseconds since 1970 of the bucket's clock.
    pub modified_millis: u64,
}

/// What became of a conditional write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Put {
    Written(Etag),
    /// The condition did not hold: it exists already, or is another version.
    Refused,
}

/// One page of a listing, in the order of the keys' bytes.
#[derive(Clone, Debug, Default)]
pub struct Page {
    pub objects: Vec<ObjectMeta>,
    /// There is more behind the last key of `objects`.
    pub more: bool,
}

/// The most objects that one call of [`Bucket::delete_many`] removes; S3 takes no more by one request.
pub const DELETE_BATCH: usize = 1000;

/// A bucket: whole objects under keys. All keys are relative to the store's prefix.
///
/// Implementations retry nothing on their own beyond what their client library
/// does by itself within one call; callers own the policy.
/// The contract is pinned by `tests/tier.rs`, which runs on every implementation.
pub trait Bucket: Send + Sync + std::fmt::Debug {
    /// How users name this bucket: `s3://name/prefix`, `file:///dir`.
    fn url(&self) -> String;

    /// The bucket's clock, as every reply so far bounds it.
    fn clock(&self) -> &ServerClock;

    /// Whether compressed bodies are worth storing here. Where they are not, they are unpacked first.
    fn compresses(&self) -> bool;

    /// Below which prefix blobs and packs are written; `None`: where all have theirs.
    fn own_prefix(&self) -> Option<&str> {
        None
    }

    /// Reads an object, or bytes `range` of it as stored; `None` if there is none.
    ///
    /// Without `range` the bytes are decompressed, and more than `max_bytes` of
    /// them is [`TierError::Malformed`] (a lying server must not fill memory).
    fn get<'a>(
        &'a self,
        key: &'a str,
        range: Option<Range<u64>>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<Option<Object>, TierError>>;

    /// Asks whether an object exists.
    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<ObjectMeta>, TierError>>;

    /// Creates an object, unless there is one (`If-None-Match: *`).
    fn put_new<'a>(&'a self, key: &'a str, body: Body) -> BoxFuture<'a, Result<Put, TierError>>;

    /// Replaces the version `etag` of an object (`If-Match`).
    fn put_if<'a>(
        &'a self,
        key: &'a str,
        body: Body,
        etag: &'a Etag,
    ) -> BoxFuture<'a, Result<Put, TierError>>;

    /// Lists up to 1,000 objects whose keys start with `prefix` and sort behind `after`.
    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>) -> BoxFuture<'a, Result<Page, TierError>>;

    /// Removes an object; absent already is success.
    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), TierError>>;

    /// Writes an object onto itself, so that its age begins anew; false when there is none.
    fn refresh<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, TierError>>;

    /// Removes up to [`DELETE_BATCH`] objects; absent already is success.
    ///
    /// After an error some of them may be gone: the same call can be made again.
    fn delete_many<'a>(&'a self, keys: &'a [String]) -> BoxFuture<'a, Result<(), TierError>> {
        Box::pin(async move {
            for key in keys {
                self.delete(key).await?;
            }
            Ok(())
        })
    }
}

/// A bucket that every layer above shares.
pub type SharedBucket = Arc<dyn Bucket>;

/// Runs work that blocks, or that computes for milliseconds, away from the runtime's workers.
async fn aside<T: Send + 'static>(
    verb: &'static str,
    key: &str,
    work: impl FnOnce() -> Result<T, TierError> + Send + 'static,
) -> Result<T, TierError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime is being shut down.
        Err(error) => Err(TierError::Unavailable {
            verb,
            key: key.to_owned(),
            source: Box::new(error),
        }),
    }
}
