//! What goes while it is read: reads what came since, which may name what the gone named.
//!
//! Forks of jobs are deleted every few minutes where there are many, and other sweeps run: a segment that was listed need not be
//! there any more when it is read. Two things may have happened.
//!
//! - Its volume was deleted. Nobody reads that any more; but what it said may have been promoted before, by a segment
//!   that was published after everything was listed. That one was there before the first one went. So everything below
//!   `volumes/` is listed once more, and the segments that no earlier listing had are read at once, until nothing goes
//!   any more. All that they name counts as used. The same goes for a chunk list that is not there, because promoting
//!   copies it; but where only somebody names it who is not trusted, and may name what never was, his volume must have been
//!   deleted.
//! - Another sweep removed it, because the floor has what it says. That floor was published at least a window before, when
//!   the segment was condemned, so this sweep goes by it, or by a later one, and reads what it has.
//!
//! A catalog of a volume that was deleted counts as gone like its segments, and so does `head.json`. One that is missing
//! otherwise stops the sweep, unless those who write it are not trusted. Of a volume that was deleted before its settings
//! were read, catalogs are not read at all: if it had any, it counts as one that went.

use std::collections::{BTreeMap, HashSet};

use super::{Reading, References, TOGETHER, fetch, unless_apart};
use crate::{
    base::volume::{VolumeName, VolumePattern},
    namespace::{
        follow::SegmentKey,
        stack::{self, StackError, Standing},
        sweep::{
            SweepError,
            asking::Asking,
            inventory::{Volume, Volumes, listed_again},
            marks::Marks,
            winners::Held,
        },
    },
};

/// How often everything is listed again. Each time only what was published in the meantime is to be read.
const ROUNDS: u32 = 32;

/// So many times in a row nothing goes any more before it is enough: names can move from a volume that is listed late to
/// one that was listed before, and their volume be deleted in between ([`mod@crate::namespace::sweep::inventory`]).
const QUIET: u32 = 2;

/// Lets a catalog be gone whose volume was deleted meanwhile.
pub(super) async fn unless_deleted<T>(
    asking: &Asking,
    name: &VolumeName,
    result: Result<T, SweepError>,
) -> Result<Option<T>, SweepError> {
    let err = match result {
        Err(err) if err.is_missing() => err,
        result => return result.map(Some),
    };
    if is_deleted(asking, name).await? {
        return Ok(None);
    }
    Err(err)
}

async fn is_deleted(asking: &Asking, name: &VolumeName) -> Result<bool, SweepError> {
    match stack::standing(asking.bucket(), name).await {
        Ok(standing) => Ok(matches!(standing, Standing::Deleted)),
        Err(StackError::Bucket(err)) => Err(err.into()),
        Err(source) => Err(SweepError::Volume { source }),
    }
}

impl Reading<'_> {
    /// Notes that a segment that was listed is gone.
    pub(super) fn vanished(&mut self, name: &VolumeName, segment: SegmentKey) {
        self.vanished_last = Some(segment.to_key(name.as_str()));
        self.vanished.insert((name.clone(), segment));
        self.is_behind = true;
    }

    /// Reads what was published since `volumes` was listed, if something went while it was read.
    pub(super) async fn catch_up(
        &mut self,
        volumes: &Volumes,
        untrusted: &[VolumePattern],
        found: &mut References,
    ) -> Result<(), SweepError> {
        self.settle_doubts().await?;
        if !self.is_behind {
            return Ok(());
        }
        let known = volumes.iter();
        let mut known: BTreeMap<_, _> = known
            .map(|(name, volume)| (name.clone(), volume.is_apart))
            .collect();
        let mut caught_up: BTreeMap<VolumeName, HashSet<SegmentKey>> = BTreeMap::new();
        let mut quiet = 0;
        for _ in 0..ROUNDS {
            self.is_behind = false;
            self.vanished_last = None;
            self.forget_lost_lists();
            let now = listed_again(self.asking, untrusted, &mut known).await?;
            for (name, volume) in &now {
                if volume.has_blobs && !self.with_blobs.contains(name) {
                    self.with_blobs.push(name.clone());
                }
            }
            for (name, volume) in &now {
                let before = volumes.get(name);
                let read = caught_up.entry(name.clone()).or_default();
                let is_read = |segment: &SegmentKey| {
                    let was_listed = before.is_some_and(|before| before.segments.contains_key(segment));
                    read.contains(segment)
                        || (was_listed && !self.vanished.contains(&(name.clone(), *segment)))
                };
                let fresh = volume.segments.keys().copied();
                let fresh: Vec<SegmentKey> = fresh.filter(|segment| !is_read(segment)).collect();
                read.extend(self.fresh(name, volume, &fresh, &mut found.marks).await?);
            }
            self.settle_doubts().await?;
            quiet = if self.is_behind { 0 } else { quiet + 1 };
            if quiet == QUIET {
                return Ok(());
            }
        }
        // A chunk list that is nowhere is a loss of its own.
        match self.vanished_last.take() {
            Some(key) => Err(SweepError::Vanished { key }),
            None => Ok(()),
        }
    }

    /// Marks all that segments name; returns which were there.
    async fn fresh(
        &mut self,
        name: &VolumeName,
        volume: &Volume,
        segments: &[SegmentKey],
        marks: &mut Marks,
    ) -> Result<Vec<SegmentKey>, SweepError> {
        let mut read = Vec::new();
        for together in segments.chunks(TOGETHER) {
            let fetched = fetch::segments(self.asking, name, together).await;
            for (segment, decoded) in together.iter().zip(fetched) {
                if matches!(decoded, Err(SweepError::Vanished { .. })) {
                    self.vanished(name, *segment);
                    continue;
                }
                read.push(*segment);
                let key = segment.to_key(name.as_str());
                let changes = unless_apart(self.asking, volume, decoded.map(|decoded| decoded.changes))?;
                for change in &changes.unwrap_or_default() {
                    let held = self.held_by(change, &key, name, volume).await?;
                    held.iter().flat_map(Held::marks).for_each(|mark| marks.add(mark));
                }
            }
        }
        Ok(read)
    }

    /// Asks which of the volumes were deleted of which something was not there.
    async fn settle_doubts(&mut self) -> Result<(), SweepError> {
        for name in std::mem::take(&mut self.doubted) {
            self.is_behind |= is_deleted(self.asking, &name).await?;
        }
        Ok(())
    }

    /// Has chunk lists that were not there be looked for again: they may have been copied elsewhere.
    fn forget_lost_lists(&mut self) {
        let lost = self.lists.iter().filter(|(_, marks)| marks.is_none());
        self.lost.extend(lost.map(|(list, _)| *list));
        self.lists.retain(|_, marks| marks.is_some());
    }

    /// How many chunk lists are nowhere.
    pub(super) fn lost_lists(&mut self) -> u64 {
        self.forget_lost_lists();
        let lost = self.lost.iter().filter(|list| !self.lists.contains_key(*list));
        lost.count() as u64
    }
}
