//! Which volumes are deleted for good, in one object: nobody has to ask each of them again.
//!
//! A volume that is deleted leaves `volume.json`, because its name stays taken ([`super::volumes`]). Where each job has a
//! fork of its own there are soon many more of these than volumes that live, and who looks for forks, or for what is in use, would
//! read all of them. What they say never changes any more, so whoever deletes volumes puts what he read together.
//!
//! # Format of `deleted.json` (version 1)
//!
//! JSON, one object; `Content-Encoding: zstd` where the store has that:
//!
//! ```text
//! version   1; read first and alone
//! volumes   {<volume>: {modified_millis, size, own_prefix}}: when its volume.json was written last, as a listing shows it,
//!           how long it is, and (optional) that its blobs were kept apart
//! ```
//!
//! Members that are not known are ignored. A test below pins it.
//!
//! # Invariants
//!
//! - It only saves requests: whatever it does not say, or cannot be read of it, is asked for.
//! - A volume is in it only after its deletion was decided, which is for ever.
//! - What it says of a volume counts only while a listing shows the same `volume.json`, by time and length: one that was put
//!   back by hand is read.
//! - It is replaced with the condition that it is the version that was read; who loses leaves it to the next.
//!
//! # Cost
//!
//! Of `d` volumes that were deleted and `n` that live, looking for forks costs a LIST for a thousand of both, a GET of
//! 15 bytes for each of `d` (40 before compression), and one GET for each of `n` and of at most [`ENOUGH`] that were deleted
//! last. A thousand jobs a day with a fork each make 365,000 after a year: 365 LISTs and some 5 MB, 0.2 cents and some
//! 20 s, instead of 365,000 GETs, 15 cents and 20 minutes at sixteen at once. At 64 MiB, 1,500,000 volumes, no more are
//! added. What comes after: a tombstone for each name in one place by itself, so that listings do not meet it either.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::patience::patiently;
use crate::{
    base::volume::VolumeName,
    tier::{Bucket, Etag, ObjectMeta, TierError, body, layout},
};

const VERSION: u32 = 1;

/// The longest that is written, and read.
const MAX_BYTES: u64 = 64 << 20;

/// So many have to be read one by one before it is written anew.
pub const ENOUGH: usize = 256;

/// What was read of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletedVolume {
    modified_millis: u64,
    size: u64,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own_prefix: bool,
}

impl DeletedVolume {
    /// `listed` is how a listing showed its settings before they were read.
    #[must_use]
    pub fn new(listed: &ObjectMeta, own_prefix: bool) -> Self {
        Self {
            modified_millis: listed.modified_millis,
            size: listed.size,
            own_prefix,
        }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct DeletedJson {
    version: u32,
    volumes: BTreeMap<VolumeName, DeletedVolume>,
}

/// The object as it was read.
#[derive(Debug, Default)]
pub struct DeletedVolumes {
    volumes: BTreeMap<VolumeName, DeletedVolume>,
    /// `None`: there is none.
    etag: Option<Etag>,
    /// What is there is not to be replaced.
    is_others: bool,
}

impl DeletedVolumes {
    /// One request.
    pub async fn read(bucket: &dyn Bucket) -> Result<Self, TierError> {
        #[derive(Deserialize)]
        struct VersionOnly {
            version: u32,
        }
        let read = patiently(|| bucket.get(layout::DELETED, None, MAX_BYTES)).await;
        let others = |why: &dyn std::fmt::Display| {
            tracing::warn!(key = layout::DELETED, %why, "deleted volumes are looked at one by one");
            Self {
                is_others: true,
                ..Self::default()
            }
        };
        let object = match read {
            Ok(Some(object)) => object,
            Ok(None) => return Ok(Self::default()),
            Err(err @ TierError::Malformed { .. }) => return Ok(others(&err)),
            Err(err) => return Err(err),
        };
        let json = match serde_json::from_slice(&object.bytes) {
            Ok(VersionOnly { version }) if version > VERSION => {
                return Ok(others(&"it is of a newer casmount"));
            }
            Ok(_) => serde_json::from_slice::<DeletedJson>(&object.bytes),
            Err(err) => Err(err),
        };
        Ok(Self {
            etag: Some(object.etag),
            volumes: match json {
                Ok(json) => json.volumes,
                // It is written anew.
                Err(err) => others(&err).volumes,
            },
            is_others: false,
        })
    }

    /// What is known of `volume`, if it is deleted for good and `listed` is how a listing shows its settings.
    #[must_use]
    pub fn get(&self, volume: &VolumeName, listed: Option<(u64, u64)>) -> Option<DeletedVolume> {
        let known = self.volumes.get(volume)?;
        (listed? == (known.modified_millis, known.size)).then_some(*known)
    }

    /// Adds those that were found deleted for good. That nobody can is no error.
    pub async fn add(mut self, bucket: &dyn Bucket, found: BTreeMap<VolumeName, DeletedVolume>) {
        if self.is_others {
            return;
        }
        self.volumes.extend(found);
        let count = self.volumes.len();
        let json = DeletedJson {
            version: VERSION,
            volumes: self.volumes,
        };
        let bytes = serde_json::to_vec(&json).expect("no member can fail to be written");
        if bytes.len() as u64 > MAX_BYTES {
            tracing::warn!(count, "too many volumes were deleted to note them in one object");
            return;
        }
        let body = body::encode(bytes.into(), bucket.compresses());
        let put = match &self.etag {
            Some(etag) => bucket.put_if(layout::DELETED, body, etag).await,
            None => bucket.put_new(layout::DELETED, body).await,
        };
        match put {
            Ok(put) => tracing::debug!(count, ?put, "noted which volumes are deleted"),
            Err(err) => tracing::debug!(count, %err, "which volumes are deleted is not noted"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::MemoryBucket;

    fn of(modified_millis: u64, size: u64) -> DeletedVolume {
        DeletedVolume {
            modified_millis,
            size,
            own_prefix: false,
        }
    }

    #[tokio::test]
    async fn the_object_is_written_as_it_always_was() {
        let bucket = MemoryBucket::new();
        let apart = DeletedVolume {
            own_prefix: true,
            ..of(1_767_225_600_001, 312)
        };
        let found = [("job-1", of(1_767_225_600_000, 290)), ("pr-2", apart)];
        let found = found.map(|(name, of)| (name.parse().unwrap(), of));
        DeletedVolumes::default().add(bucket.as_ref(), found.into()).await;
        let golden = r#"{"version":1,"volumes":{"job-1":{"modified_millis":1767225600000,"size":290},"#
            .to_owned()
            + r#""pr-2":{"modified_millis":1767225600001,"size":312,"own_prefix":true}}}"#;
        let object = bucket.object(layout::DELETED).unwrap();
        assert_eq!(String::from_utf8(object.to_vec()).unwrap(), golden);
        let more = golden.replace("\"volumes\"", "\"more\": [], \"volumes\"");
        bucket.insert(layout::DELETED.to_owned(), more.into());
        let read = DeletedVolumes::read(bucket.as_ref()).await.unwrap();
        assert_eq!(
            read.get(&"pr-2".parse().unwrap(), Some((1_767_225_600_001, 312))),
            Some(apart)
        );
    }

    #[tokio::test]
    async fn what_is_noted_is_known_of_the_same_settings_only() {
        let bucket = MemoryBucket::new();
        let one: VolumeName = "job-1".parse().unwrap();
        let two: VolumeName = "job-2".parse().unwrap();
        let none = DeletedVolumes::read(bucket.as_ref()).await.unwrap();
        assert_eq!(none.get(&one, Some((5, 300))), None);
        none.add(bucket.as_ref(), BTreeMap::from([(one.clone(), of(5, 300))]))
            .await;
        let first = DeletedVolumes::read(bucket.as_ref()).await.unwrap();
        let late = DeletedVolumes::read(bucket.as_ref()).await.unwrap();
        first
            .add(bucket.as_ref(), BTreeMap::from([(two.clone(), of(6, 301))]))
            .await;
        // Who is late changes nothing.
        late.add(bucket.as_ref(), BTreeMap::new()).await;
        let both = DeletedVolumes::read(bucket.as_ref()).await.unwrap();
        assert_eq!(both.get(&one, Some((5, 300))), Some(of(5, 300)));
        assert_eq!(both.get(&two, Some((6, 301))), Some(of(6, 301)));
        for listed in [None, Some((6, 300)), Some((5, 301))] {
            assert_eq!(both.get(&one, listed), None);
        }
    }
}
