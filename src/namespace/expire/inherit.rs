//! Keeps what a fork told of its uses when the fork is deleted: it goes to the volume that has the names.
//!
//! A fork whose machines may write nothing else tells below its own prefix what it uses of the lowest volume. That goes
//! with the fork, so it is told again before, in the lowest volume itself, as what was used on those days.
//!
//! # Invariants
//!
//! - Nothing of the fork is removed, nor is it said to be deleted, before its uses are there. So at any time they are found
//!   in the fork or in the volume, by whoever reads the forks first.
//! - What its machines tell until its deletion is decided is looked for once more then, before it is removed.
//! - Telling them twice changes nothing: a repeat after a crash does.
//!
//! # Whom it believes
//!
//! Nobody trusts who wrote it. A lie can only keep names that would have expired: those that it names, for as long as if
//! they had been used when the fork was deleted, because nothing counts as told later. And no more than
//! [`MAX_NAMES`] of them a fork, 20 MB, the last that were told. What cannot be read counts for nothing, and never stops a deletion.
//!
//! # Cost
//!
//! A GET to know that nobody wants to know; else a LIST for a thousand objects, a GET for each, and a PUT for each day;
//! and a LIST again at the end.

use std::collections::{BTreeMap, HashSet};

use super::{ExpireError, uses};
use crate::{
    base::{
        id::{MachineId, random_bytes},
        volume::VolumeName,
    },
    namespace::{
        background::words,
        patience::patiently,
        stack::{self, StackError},
        touch::{
            format::{MAX_GOOD_FOR_MILLIS, MAX_NAMES, Told},
            tell::read_expiry,
        },
    },
    tier::{Body, SharedBucket, TierError, layout},
};

const DAY_MILLIS: u64 = 24 * 3_600_000;

/// Objects of one fork that are read, the newest: what a thousand machines tell in a month and more.
const MAX_OBJECTS: usize = 1 << 20;

/// Objects that are read at once, and then put in order: whoever wrote them may have made each as large as can be.
const TOGETHER: usize = 16;

/// Names that are read of one fork, each as often as it was told.
const MAX_TOLD: usize = 64 * MAX_NAMES;

/// The keys of what was inherited.
pub type Inherited = HashSet<String>;

/// Tells in the lowest volume below the fork `volume` what was told in the fork; returns how many names that are.
/// What `inherited` has, an earlier call told.
///
/// Before the fork is deleted, or after that was broken off. The bucket must have answered before: the time is taken
/// from its clock.
///
/// # Errors
///
/// When the bucket does not answer. All else counts for nothing: a fork can be deleted also where nothing can be told.
pub async fn inherit(
    bucket: &SharedBucket,
    volume: &VolumeName,
    inherited: &mut Inherited,
) -> Result<u64, TierError> {
    match try_inherit(bucket, volume, inherited).await {
        Err(ExpireError::Bucket(err) | ExpireError::Volume(StackError::Bucket(err)))
            if err.is_transient() =>
        {
            Err(err)
        }
        Err(err) => {
            tracing::warn!(%volume, error = words(&err), "what the fork used of the volume below it counts for nothing");
            Ok(0)
        }
        Ok(names) => Ok(names),
    }
}

async fn try_inherit(
    bucket: &SharedBucket,
    volume: &VolumeName,
    inherited: &mut Inherited,
) -> Result<u64, ExpireError> {
    let Some((json, _)) = stack::read_json(bucket.as_ref(), volume).await? else {
        return Ok(0);
    };
    let Some(parent) = json.parent else {
        return Ok(0);
    };
    let below = stack::read(bucket.as_ref(), &parent.volume).await?;
    let lowest = below
        .layers()
        .last()
        .map_or(&parent.volume, |layer| &layer.volume);
    let Some((expiry, _)) = read_expiry(bucket.as_ref(), lowest).await? else {
        return Ok(0);
    };
    let now = bucket.clock().now_millis();
    let from = now.saturating_sub(expiry.expire_millis.saturating_add(MAX_GOOD_FOR_MILLIS));
    let mut found = uses::list(bucket, volume, from).await?;
    found.keys.retain(|(key, _)| !inherited.contains(key));
    let keys: Vec<String> = found.keys.iter().map(|(key, _)| key.clone()).collect();
    let days = newest_of(bucket, volume, found, now).await?;
    let mut names = 0;
    for told in days.into_values() {
        let random = u64::from_be_bytes(random_bytes());
        let key = layout::touched(lowest.as_str(), told.written_millis, MachineId::random(), random);
        names += told.marks().len() as u64;
        let body = Body::raw(told.encode());
        patiently(|| bucket.put_new(&key, body.clone())).await?;
    }
    inherited.extend(keys);
    Ok(names)
}

/// What was told, a day at a time, each name on the last day on which it was.
///
/// One that another deletion of the fork removes meanwhile was inherited by that.
async fn newest_of(
    bucket: &SharedBucket,
    volume: &VolumeName,
    found: uses::Found,
    now_millis: u64,
) -> Result<BTreeMap<u64, Told>, ExpireError> {
    let mut keys: Vec<(String, u64)> = found.keys;
    keys.reverse();
    keys.truncate(MAX_OBJECTS);
    let mut read_names = 0;
    let mut seen: HashSet<u64> = HashSet::new();
    let mut days: BTreeMap<u64, (u64, u64, Vec<u64>)> = BTreeMap::new();
    for together in keys.chunks(TOGETHER) {
        // In no order, and the order decides of which day a name is.
        let mut read: Vec<Told> = Vec::new();
        let keys = together.iter().map(|(key, _)| key.clone());
        uses::read(bucket, volume, keys, true, |told| read.push(told)).await?;
        read_names += read.iter().map(|told| told.marks().len()).sum::<usize>();
        read.sort_by_key(|told| std::cmp::Reverse(told.written_millis));
        for told in read {
            let written = told.written_millis.min(now_millis);
            let day = days
                .entry(written / DAY_MILLIS)
                .or_insert((written, 0, Vec::new()));
            day.0 = day.0.max(written);
            day.1 = day.1.max(told.good_for_millis);
            for mark in told.marks() {
                if seen.len() < MAX_NAMES && seen.insert(*mark) {
                    day.2.push(*mark);
                }
            }
        }
        if seen.len() == MAX_NAMES || read_names > MAX_TOLD {
            tracing::warn!(%volume, "the fork told of more names than are believed");
            break;
        }
    }
    let told = days
        .into_iter()
        .filter(|(_, (_, _, marks))| !marks.is_empty())
        .map(|(day, (written, good_for, marks))| (day, Told::new(written, good_for, marks)));
    Ok(told.collect())
}
