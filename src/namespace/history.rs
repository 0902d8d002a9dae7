//! What was published in a volume lately: its segments, the newest first.
//!
//! # Cost
//!
//! A bucket lists forwards only, so the newest segments are looked for in the last hour, then in eight times
//! as much, and so on. Each look costs one LIST for a thousand segments; all of them together hardly more than the
//! last one. Then one GET for each segment that is shown.
//!
//! Of what sweeps took of the log, the catalogs do not say who published it, nor when: [`before`] says what they have.

use std::collections::BTreeMap;

use super::{
    catalog::head,
    change::PathChange,
    follow::SegmentKey,
    patience::patiently,
    trim,
    view::{self, ViewError},
};
use crate::{
    base::{id::MachineId, volume::VolumeName},
    tier::SharedBucket,
};

const FIRST_LOOK_MILLIS: u64 = 3_600_000;
const WIDER: u64 = 8;

/// How often it is looked again when a sweep takes what was found.
const READS: u32 = 3;

/// One segment of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publication {
    pub machine: MachineId,
    /// Of the bucket's clock, milliseconds since 1970.
    pub millis: u64,
    pub seq: u64,
    pub changes: Vec<PathChange>,
}

impl Publication {
    /// Changes that left nothing at their path.
    #[must_use]
    pub fn removed(&self) -> u64 {
        let removed = self.changes.iter().filter(|change| change.entry.is_none());
        removed.count() as u64
    }
}

/// What the catalogs of a volume have of the log that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Before {
    /// Publications up to this moment may be gone.
    pub floor_millis: u64,
    /// What is there by the newest catalog.
    pub names: u64,
}

/// Says what became of the log that is gone; `None` when it is whole.
pub async fn before(bucket: &SharedBucket, volume: &VolumeName) -> Result<Option<Before>, ViewError> {
    let floor_millis = patiently(|| trim::floor_millis(bucket.as_ref(), volume.as_str())).await?;
    if floor_millis == 0 {
        return Ok(None);
    }
    let head = patiently(|| head::read(bucket.as_ref(), volume.as_str())).await?;
    Ok(head.map(|(head, _)| Before {
        floor_millis,
        names: head.names,
    }))
}

/// Reads the `limit` segments of `volume` that were published last, the newest first.
pub async fn newest(
    bucket: &SharedBucket,
    volume: &VolumeName,
    limit: usize,
) -> Result<Vec<Publication>, ViewError> {
    for _ in 0..READS {
        if let Some(found) = once(bucket, volume, limit).await? {
            return Ok(found);
        }
    }
    let volume = volume.clone();
    Err(ViewError::Vanishing { volume })
}

/// Looks once; `None` when something went meanwhile.
async fn once(
    bucket: &SharedBucket,
    volume: &VolumeName,
    limit: usize,
) -> Result<Option<Vec<Publication>>, ViewError> {
    let now = bucket.clock().now_millis();
    let mut back = FIRST_LOOK_MILLIS;
    let keys = loop {
        let from = now.checked_sub(back);
        let keys = view::list(bucket, volume, from, None).await?;
        if keys.len() >= limit || from.is_none() {
            break keys;
        }
        back = back.saturating_mul(WIDER);
    };
    let keys: Vec<SegmentKey> = keys.into_iter().rev().take(limit).collect();
    let mut found = BTreeMap::new();
    let take = |key: SegmentKey, decoded: super::segment::Decoded| {
        let publication = Publication {
            machine: key.machine,
            millis: key.millis,
            seq: key.seq,
            changes: decoded.changes,
        };
        found.insert(key, publication);
    };
    let whole = view::fetch(bucket, volume, keys, take).await?;
    Ok(whole.then(|| found.into_values().rev().collect()))
}
