//! How much of a volume's log sweeps keep, and which of its catalogs.
//!
//! # Format of `volumes/<name>/trim.json` (version 1)
//!
//! JSON, one object, written by sweeps alone, replaced with the condition that it is the version that was read:
//!
//! ```text
//! version           1; read first and alone, so that a newer one can change all the rest
//! kept              catalogs, {catalog, watermark_millis}, ascending. The watermark of the first is the floor:
//!                   segments that carry this time or an earlier one in their keys are going, or gone, and the
//!                   catalog has all that they say. The others are the floors to come.
//! ```
//!
//! Members that are not known are ignored. A volume without it has its whole log.
//!
//! # Invariants
//!
//! - The floor never goes down.
//! - It says so before anything below it is condemned, so a window before anything is gone.
//! - Of all catalogs in it every object is kept.

use serde::{Deserialize, Serialize};

use super::catalog::CatalogError;
use crate::{
    base::digest::Digest,
    tier::{Body, Bucket, Etag, Put, layout},
};

const VERSION: u32 = 1;

/// It is far below this.
const MAX_BYTES: u64 = 64 << 10;

/// A catalog that sweeps keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    pub catalog: Digest,
    pub watermark_millis: u64,
}

/// The content of `trim.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trim {
    pub version: u32,
    pub kept: Vec<Kept>,
}

impl Default for Trim {
    fn default() -> Self {
        Self {
            version: VERSION,
            kept: Vec::new(),
        }
    }
}

impl Trim {
    /// The catalog that has all of the log that may be gone.
    #[must_use]
    pub fn floor(&self) -> Option<Kept> {
        self.kept.first().copied()
    }

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
        let damaged = |why: String| CatalogError::Damaged {
            key: layout::trim(volume),
            why,
        };
        let VersionOnly { version } =
            serde_json::from_slice(bytes).map_err(|err| damaged(err.to_string()))?;
        if version > VERSION {
            return Err(CatalogError::Newer {
                key: layout::trim(volume),
                why: format!("version {version}, this program knows {VERSION}"),
            });
        }
        let trim: Self = serde_json::from_slice(bytes).map_err(|err| damaged(err.to_string()))?;
        if !trim
            .kept
            .is_sorted_by(|a, b| a.watermark_millis < b.watermark_millis)
        {
            return Err(damaged("its catalogs are not in order".to_owned()));
        }
        Ok(trim)
    }
}

/// Reads what sweeps keep of `volume`; `None`: no sweep said so yet. One request.
pub async fn read(bucket: &dyn Bucket, volume: &str) -> Result<Option<(Trim, Etag)>, CatalogError> {
    match bucket.get(&layout::trim(volume), None, MAX_BYTES).await? {
        Some(object) => Ok(Some((Trim::decode(volume, &object.bytes)?, object.etag))),
        None => Ok(None),
    }
}

/// Up to which time of its keys something of the log of `volume` may be gone; 0: nothing is. One request.
pub async fn floor_millis(bucket: &dyn Bucket, volume: &str) -> Result<u64, CatalogError> {
    let read = read(bucket, volume).await?;
    let floor = read.and_then(|(trim, _)| trim.floor());
    Ok(floor.map_or(0, |floor| floor.watermark_millis))
}

/// Puts `trim` in the place of the version `old`, or where there is none; false when another sweep was first.
pub async fn replace(
    bucket: &dyn Bucket,
    volume: &str,
    trim: &Trim,
    old: Option<&Etag>,
) -> Result<bool, CatalogError> {
    let key = layout::trim(volume);
    let body = Body::raw(trim.encode());
    let put = match old {
        Some(etag) => bucket.put_if(&key, body, etag).await?,
        None => bucket.put_new(&key, body).await?,
    };
    Ok(match put {
        Put::Written(_) => true,
        // A lost reply looks like a refusal.
        Put::Refused => read(bucket, volume)
            .await?
            .is_some_and(|(there, _)| there == *trim),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(watermark_millis: u64) -> Kept {
        Kept {
            catalog: Digest::of(b"x"),
            watermark_millis,
        }
    }

    #[test]
    fn the_object_is_written_as_ever() {
        let trim = Trim {
            kept: vec![kept(7)],
            ..Trim::default()
        };
        let text = "{\n  \"version\": 1,\n  \"kept\": [\n    {\n      \"catalog\": \
                    \"2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881\",\n      \
                    \"watermark_millis\": 7\n    }\n  ]\n}\n";
        assert_eq!(String::from_utf8(trim.encode()).unwrap(), text);
        assert_eq!(Trim::decode("v", text.as_bytes()).unwrap(), trim);
        assert_eq!(trim.floor(), Some(kept(7)));
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let newer = Trim::decode("v", br#"{"version": 2}"#).unwrap_err();
        assert!(matches!(newer, CatalogError::Newer { .. }), "{newer}");
        let wrong = Trim {
            kept: vec![kept(7), kept(7)],
            ..Trim::default()
        };
        for bytes in [b"{}".to_vec(), wrong.encode()] {
            let err = Trim::decode("v", &bytes).unwrap_err();
            assert!(matches!(err, CatalogError::Damaged { .. }), "{err}");
        }
    }
}
