//! The newest catalog of a volume, as the bucket says it.
//!
//! # Format of `volumes/<name>/head.json` (version 1)
//!
//! JSON, one object, replaced with the condition that it is the version that was read, or made with
//! the condition that there is none:
//!
//! ```text
//! version           1; read first and alone, so that a newer one can change all the rest
//! catalog           name of the catalog's root, 64 hexadecimal digits
//! watermark_millis  the catalog has everything that segments say which carry this time or an
//!                   earlier one in their keys, but for those that appear late
//! names             live registers; for people
//! parts             of the catalog; for people
//! written_millis    when, by the bucket's clock; for people
//! machine           by whom; for people
//! fence             optional, random: changed by a sweep that is about to delete catalogs, so that no compaction
//!                   that began before replaces the object ([`fence`])
//! ```
//!
//! Members that are not known are ignored.

use serde::{Deserialize, Serialize};

use super::CatalogError;
use crate::{
    base::{
        digest::Digest,
        id::{MachineId, random_bytes},
    },
    tier::{Body, Bucket, Etag, Put, layout},
};

pub const VERSION: u32 = 1;

/// It is far below this.
const MAX_BYTES: u64 = 64 << 10;

/// The content of `head.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    pub version: u32,
    pub catalog: Digest,
    pub watermark_millis: u64,
    pub names: u64,
    pub parts: u64,
    pub written_millis: u64,
    pub machine: MachineId,
}

impl Head {
    /// The bytes of the object.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("no member can fail to be written");
        bytes.push(b'\n');
        bytes
    }

    /// Reads the object of `volume`.
    pub fn decode(volume: &str, bytes: &[u8]) -> Result<Self, CatalogError> {
        #[derive(Deserialize)]
        struct VersionOnly {
            version: u32,
        }
        let damaged = |err: serde_json::Error| CatalogError::Damaged {
            key: layout::head(volume),
            why: err.to_string(),
        };
        let VersionOnly { version } = serde_json::from_slice(bytes).map_err(damaged)?;
        if version > VERSION {
            return Err(CatalogError::Newer {
                key: layout::head(volume),
                why: format!("version {version}, this program knows {VERSION}"),
            });
        }
        serde_json::from_slice(bytes).map_err(damaged)
    }
}

/// Asks which catalog of `volume` is the newest; `None`: it has none. One request.
pub async fn read(bucket: &dyn Bucket, volume: &str) -> Result<Option<(Head, Etag)>, CatalogError> {
    match bucket.get(&layout::head(volume), None, MAX_BYTES).await? {
        Some(object) => Ok(Some((Head::decode(volume, &object.bytes)?, object.etag))),
        None => Ok(None),
    }
}

/// Puts `head` in the place of the version `old`, or where there is none; false when another
/// machine was first.
pub async fn replace(
    bucket: &dyn Bucket,
    volume: &str,
    head: &Head,
    old: Option<&Etag>,
) -> Result<bool, CatalogError> {
    let key = layout::head(volume);
    let body = Body::raw(head.encode());
    let put = match old {
        Some(etag) => bucket.put_if(&key, body, etag).await,
        None => bucket.put_new(&key, body).await,
    };
    match put {
        Ok(Put::Written(_)) => Ok(true),
        // A lost reply looks like a refusal, or like an outage.
        Ok(Put::Refused) => Ok(read(bucket, volume)
            .await?
            .is_some_and(|(there, _)| there == *head)),
        Err(err) => match read(bucket, volume).await {
            Ok(Some((there, _))) if there == *head => Ok(true),
            _ => Err(err.into()),
        },
    }
}

/// How often the object may change while it is fenced.
const FENCE_TRIES: u32 = 8;

/// Changes the object of `volume` in a way that means nothing: whoever read it before cannot replace it any more.
/// False when it changes all the time.
pub async fn fence(bucket: &dyn Bucket, volume: &str) -> Result<bool, CatalogError> {
    let key = layout::head(volume);
    for _ in 0..FENCE_TRIES {
        let Some(object) = bucket.get(&key, None, MAX_BYTES).await? else {
            return Ok(true);
        };
        // Refuses what a newer version wrote.
        Head::decode(volume, &object.bytes)?;
        let damaged = |err: serde_json::Error| CatalogError::Damaged {
            key: key.clone(),
            why: err.to_string(),
        };
        let mut members: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&object.bytes).map_err(damaged)?;
        let random = format!("{:016x}", u64::from_be_bytes(random_bytes()));
        members.insert("fence".to_owned(), random.into());
        let mut bytes = serde_json::to_vec_pretty(&members).map_err(damaged)?;
        bytes.push(b'\n');
        if let Put::Written(_) = bucket.put_if(&key, Body::raw(bytes), &object.etag).await? {
            return Ok(true);
        }
    }
    Ok(false)
}
