//! What was published in a volume lately: its segments, the newest first.
//!
//! # Cost
//!
//! A bucket lists forwards only, so the newest segments are looked for in the last hour, then in eight times
//! as much, and so on. Each look costs one LIST for a thousand segments; all of them together hardly more than the
//! last one. Then one GET for each segment that is shown.

use std::collections::BTreeMap;

use super::{
    change::PathChange,
    follow::SegmentKey,
    view::{self, ViewError},
};
use crate::{
    base::{id::MachineId, volume::VolumeName},
    tier::SharedBucket,
};

const FIRST_LOOK_MILLIS: u64 = 3_600_000;
const WIDER: u64 = 8;

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

/// Reads the `limit` segments of `volume` that were published last, the newest first.
pub async fn newest(
    bucket: &SharedBucket,
    volume: &VolumeName,
    limit: usize,
) -> Result<Vec<Publication>, ViewError> {
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
    if !view::fetch(bucket, volume, keys, take).await? {
        let volume = volume.clone();
        return Err(ViewError::Vanishing { volume });
    }
    Ok(found.into_values().rev().collect())
}
