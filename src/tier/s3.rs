//! A bucket of S3, or of a server that speaks its protocol.
//!
//! Only this module and those below it know the SDK. Callers own the policy of
//! retries: the SDK makes a second attempt at most, and a conditional write
//! that meets another one (409) is repeated a few times.
//!
//! # What a caller must know
//!
//! - A reply can be lost after the write was done. The second attempt then
//!   finds its own object and answers [`Put::Refused`]: whoever must know whose
//!   object it is reads it, or uses keys that nobody else writes.
//! - A reply to HEAD has no body, so a bucket that is gone looks like an absent
//!   object there.
//! - Every body is sent with its SHA-256, which is part of the signature, so
//!   the bytes are not hashed a second time to be signed.

mod batch;
mod clock;
mod connect;
mod refresh;
mod reply;

use std::{fmt::Write, ops::Range, sync::Arc, time::Duration};

use aws_sdk_s3::{Client, operation::get_object::GetObjectOutput, primitives::ByteStream};
use bytes::Bytes;

use self::{
    clock::ClockWatch,
    reply::{Ask, Refusal, refusal},
};
use super::{Body, Bucket, Etag, Object, ObjectMeta, Page, Put, TierError, aside, body};
use crate::base::{BoxFuture, buffers, clock::ServerClock, digest::Digest, retry::Backoff};

/// How often a conditional write that met another one is repeated.
const CONFLICT_ATTEMPTS: u32 = 5;

/// Servers exist that answer with the whole object when a range is asked for: a longer one is not read. Twice
/// the longest object that parts are asked of.
const MAX_UNASKED_BYTES: u64 = 8 << 20;

/// Frames from this size on are unpacked away from the runtime's workers.
const UNPACK_ASIDE_BYTES: usize = 32 << 10;

/// What must hold for a write to be done.
#[derive(Clone, Copy, Debug)]
enum Condition<'a> {
    Absent,
    Version(&'a Etag),
}

/// One bucket, or the part of it below a prefix.
#[derive(Debug)]
pub struct S3Bucket {
    client: Client,
    bucket: String,
    /// Empty, or ends in a slash.
    prefix: String,
    clock: Arc<ServerClock>,
    body_timeout: Duration,
}

impl S3Bucket {
    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn watch(&self) -> ClockWatch {
        ClockWatch::new(&self.clock)
    }

    fn ask<'a>(&'a self, verb: &'static str, permission: &'static str, key: &'a str) -> Ask<'a> {
        Ask {
            verb,
            permission,
            bucket: &self.bucket,
            key,
        }
    }

    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        max_bytes: u64,
    ) -> Result<Option<Object>, TierError> {
        let ask = self.ask("get", "s3:GetObject", key);
        if range.as_ref().is_some_and(Range::is_empty) {
            return Err(ask.malformed("an empty range was asked for"));
        }
        let header = range
            .as_ref()
            .map(|range| format!("bytes={}-{}", range.start, range.end - 1));
        let sent = self
            .client
            .get_object()
            .bucket(&self.bucket)
            .key(self.full(key))
            .set_range(header)
            .customize()
            .interceptor(self.watch())
            .send()
            .await;
        let reply = match sent {
            Ok(reply) => reply,
            Err(error) => return refusal(error, &ask).missing_is(None, &ask),
        };
        // Some servers answer with the whole object.
        let whole = range.is_some() && reply.content_range().is_none();
        if whole
            && reply
                .content_length()
                .is_none_or(|len| len as u64 > MAX_UNASKED_BYTES)
        {
            return Err(TierError::Unsupported {
                why: format!("the server of {} ignores ranges", self.url()),
            });
        }
        let limit = match &range {
            Some(_) if whole => MAX_UNASKED_BYTES,
            Some(range) => (range.end - range.start).min(max_bytes),
            None => max_bytes,
        };
        let etag = Etag(reply.e_tag().unwrap_or_default().to_owned());
        let modified_millis = millis(reply.last_modified());
        let packed = range.is_none() && reply.content_encoding().is_some_and(names_zstd);
        let bytes = match tokio::time::timeout(self.body_timeout, read_body(reply, limit, &ask)).await {
            Ok(read) => read?,
            Err(elapsed) => return Err(ask.unavailable(elapsed)),
        };
        let transferred_bytes = bytes.len() as u64;
        let bytes = match range {
            None if packed => unpack(key, bytes, max_bytes).await?,
            Some(range) if whole => {
                let end = range.end.min(transferred_bytes) as usize;
                bytes.slice((range.start as usize).min(end)..end)
            }
            _ => bytes,
        };
        Ok(Some(Object {
            bytes,
            etag,
            transferred_bytes,
            modified_millis,
        }))
    }

    async fn head(&self, key: &str) -> Result<Option<ObjectMeta>, TierError> {
        // The permission to read covers HEAD.
        let ask = self.ask("ask for", "s3:GetObject", key);
        let sent = self
            .client
            .head_object()
            .bucket(&self.bucket)
            .key(self.full(key))
            .customize()
            .interceptor(self.watch())
            .send()
            .await;
        match sent {
            Ok(reply) => Ok(Some(ObjectMeta {
                key: key.to_owned(),
                size: reply.content_length().unwrap_or_default().max(0) as u64,
                modified_millis: millis(reply.last_modified()),
            })),
            Err(error) => refusal(error, &ask).missing_is(None, &ask),
        }
    }

    async fn put(&self, key: &str, body: Body, condition: Condition<'_>) -> Result<Put, TierError> {
        let ask = self.ask("put", "s3:PutObject", key);
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_millis(500));
        let mut attempt = 1;
        loop {
            let request = self
                .client
                .put_object()
                .bucket(&self.bucket)
                .key(self.full(key))
                .content_type("application/octet-stream")
                .set_content_encoding(body.zstd.then(|| "zstd".to_owned()))
                .checksum_sha256(base64(&body.sha256))
                .body(ByteStream::from(body.bytes.clone()));
            let request = match condition {
                Condition::Absent => request.if_none_match("*"),
                Condition::Version(etag) => request.if_match(&etag.0),
            };
            let sent = request
                .customize()
                .interceptor(self.watch())
                .disable_payload_signing()
                .send()
                .await;
            match sent {
                Ok(reply) => return Ok(Put::Written(Etag(reply.e_tag().unwrap_or_default().to_owned()))),
                Err(error) => match (refusal(error, &ask), condition) {
                    // An absent object is another version; S3 answers 404 then.
                    (Refusal::Condition, _) | (Refusal::Missing, Condition::Version(_)) => {
                        return Ok(Put::Refused);
                    }
                    (Refusal::Conflict, _) if attempt < CONFLICT_ATTEMPTS => {
                        attempt += 1;
                        tokio::time::sleep(backoff.next_wait()).await;
                    }
                    (
                        other @ (Refusal::Conflict | Refusal::Missing | Refusal::Range | Refusal::Failed(_)),
                        _,
                    ) => return Err(other.into_error(&ask)),
                },
            }
        }
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, TierError> {
        let ask = self.ask("list", "s3:ListBucket", prefix);
        let sent = self
            .client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(self.full(prefix))
            .set_start_after(after.map(|key| self.full(key)))
            .customize()
            .interceptor(self.watch())
            .send()
            .await;
        let reply = match sent {
            Ok(reply) => reply,
            Err(error) => {
                return Err(match refusal(error, &ask) {
                    // Nothing but the bucket can be missing here.
                    Refusal::Missing => TierError::NoBucket {
                        bucket: self.bucket.clone(),
                    },
                    other
                    @ (Refusal::Condition | Refusal::Conflict | Refusal::Range | Refusal::Failed(_)) => {
                        other.into_error(&ask)
                    }
                });
            }
        };
        let objects: Vec<_> = reply
            .contents()
            .iter()
            .filter_map(|object| {
                Some(ObjectMeta {
                    key: object.key()?.strip_prefix(&self.prefix)?.to_owned(),
                    size: object.size().unwrap_or_default().max(0) as u64,
                    modified_millis: millis(object.last_modified()),
                })
            })
            .collect();
        let more = reply.is_truncated().unwrap_or_default();
        if more && objects.is_empty() {
            return Err(ask.malformed("the server says that there is more, but sends nothing"));
        }
        Ok(Page { objects, more })
    }

    async fn delete(&self, key: &str) -> Result<(), TierError> {
        let ask = self.ask("delete", "s3:DeleteObject", key);
        let sent = self
            .client
            .delete_object()
            .bucket(&self.bucket)
            .key(self.full(key))
            .customize()
            .interceptor(self.watch())
            .send()
            .await;
        match sent {
            Ok(_) => Ok(()),
            Err(error) => refusal(error, &ask).missing_is((), &ask),
        }
    }
}

impl Bucket for S3Bucket {
    fn url(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.prefix)
            .trim_end_matches('/')
            .to_owned()
    }

    fn clock(&self) -> &ServerClock {
        &self.clock
    }

    fn compresses(&self) -> bool {
        true
    }

    fn get<'a>(
        &'a self,
        key: &'a str,
        range: Option<Range<u64>>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<Option<Object>, TierError>> {
        Box::pin(self.get(key, range, max_bytes))
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<ObjectMeta>, TierError>> {
        Box::pin(self.head(key))
    }

    fn put_new<'a>(&'a self, key: &'a str, body: Body) -> BoxFuture<'a, Result<Put, TierError>> {
        Box::pin(self.put(key, body, Condition::Absent))
    }

    fn put_if<'a>(
        &'a self,
        key: &'a str,
        body: Body,
        etag: &'a Etag,
    ) -> BoxFuture<'a, Result<Put, TierError>> {
        Box::pin(self.put(key, body, Condition::Version(etag)))
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>) -> BoxFuture<'a, Result<Page, TierError>> {
        Box::pin(self.list(prefix, after))
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), TierError>> {
        Box::pin(self.delete(key))
    }

    fn delete_many<'a>(&'a self, keys: &'a [String]) -> BoxFuture<'a, Result<(), TierError>> {
        Box::pin(self.delete_batch(keys))
    }

    fn refresh<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, TierError>> {
        Box::pin(self.copy_onto_itself(key))
    }
}

/// Reads a body to its end, and no more than `limit` bytes of it.
async fn read_body(reply: GetObjectOutput, limit: u64, ask: &Ask<'_>) -> Result<Bytes, TierError> {
    let too_long = || ask.malformed(format!("it has more than {limit} bytes"));
    let announced = reply.content_length().unwrap_or_default().max(0) as u64;
    if announced > limit {
        return Err(too_long());
    }
    let mut stream = reply.body;
    let mut whole = buffers::take(announced as usize);
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|error| ask.unavailable(error))?;
        if (whole.len() + piece.len()) as u64 > limit {
            return Err(too_long());
        }
        whole.extend_from_slice(&piece);
    }
    Ok(buffers::share(whole))
}

async fn unpack(key: &str, packed: Bytes, max_bytes: u64) -> Result<Bytes, TierError> {
    if packed.len() < UNPACK_ASIDE_BYTES {
        return body::decode(key, &packed, max_bytes);
    }
    let owned = key.to_owned();
    aside("unpack", key, move || body::decode(&owned, &packed, max_bytes)).await
}

/// Whether a `Content-Encoding` is ours; some servers keep `aws-chunked` in the list.
fn names_zstd(encoding: &str) -> bool {
    encoding
        .split(',')
        .any(|name| name.trim().eq_ignore_ascii_case("zstd"))
}

fn millis(time: Option<&aws_sdk_s3::primitives::DateTime>) -> u64 {
    time.and_then(|time| time.to_millis().ok())
        .map_or(0, |millis| millis.max(0) as u64)
}

/// Writes a digest as the protocol's headers have it (RFC 4648, section 4).
fn base64(digest: &Digest) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(44);
    for group in digest.as_bytes().chunks(3) {
        let mut bits = [0; 4];
        bits[1..=group.len()].copy_from_slice(group);
        let bits = u32::from_be_bytes(bits);
        for place in 0..=group.len() {
            let index = bits >> (18 - 6 * place) & 63;
            text.push(char::from(ALPHABET[index as usize]));
        }
        for _ in group.len()..3 {
            text.write_char('=').expect("writing to a text cannot fail");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_in_base64_is_what_other_tools_print() {
        // `printf abc | openssl dgst -sha256 -binary | base64`
        assert_eq!(
            base64(&Digest::of(b"abc")),
            "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0="
        );
    }

    #[test]
    fn zstd_is_found_among_other_encodings() {
        assert!(names_zstd("zstd") && names_zstd("aws-chunked, ZSTD"));
        assert!(!names_zstd("gzip") && !names_zstd(""));
    }
}
