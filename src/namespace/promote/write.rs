//! Publishes the changes of a promotion as segments of the parent.
//!
//! They are of a machine that never was before and never will be again, so no number of a segment can be used
//! twice. Each names the one before it, so that no reader applies a later one first.
//!
//! What is acknowledged too late, or not at all, is written again under a new key: a follower may have
//! looked past the time in the old one. Should that one be there after all, its changes are merged twice.

use super::{OnStep, PromoteError, PromoteStep};
use crate::{
    base::{id::MachineId, retry::Backoff, volume::VolumeName},
    namespace::{
        change::PathChange,
        publish::LATE_MILLIS,
        segment::{self, EncodedChange, Head, MAX_PAYLOAD_BYTES},
    },
    tier::{Body, Put, SharedBucket, layout},
};

use std::time::Duration;

/// A segment is still read in one piece.
const MAX_CHANGES: usize = 16_384;
const MAX_BYTES: u64 = MAX_PAYLOAD_BYTES / 2;

/// How often one segment is written before it is given up.
const TRIES: u32 = 5;
const FIRST_WAIT: Duration = Duration::from_millis(200);
const MAX_WAIT: Duration = Duration::from_secs(3);

struct Writer<'a> {
    bucket: &'a SharedBucket,
    volume: &'a VolumeName,
    machine: MachineId,
    next_seq: u64,
    /// The segment acknowledged last.
    previous: Option<(u64, u64)>,
}

/// Writes all changes, in their order; returns how many segments that took.
pub(in crate::namespace) async fn write(
    bucket: &SharedBucket,
    into: &VolumeName,
    changes: &[PathChange],
    on_step: OnStep<'_>,
) -> Result<u64, PromoteError> {
    let mut writer = Writer {
        bucket,
        volume: into,
        machine: MachineId::random(),
        next_seq: 1,
        previous: None,
    };
    let mut rest = changes;
    let mut segments = 0;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(fitting(rest));
        writer.segment(now).await?;
        rest = later;
        segments += 1;
        on_step(PromoteStep::Writing {
            changes: (changes.len() - rest.len()) as u64,
            of: changes.len() as u64,
        });
    }
    Ok(segments)
}

/// How many of the first changes go into one segment: one at least.
fn fitting(changes: &[PathChange]) -> usize {
    let mut bytes = 0;
    let fits = changes.iter().take(MAX_CHANGES).take_while(|change| {
        bytes += segment::estimate_bytes(change);
        bytes <= MAX_BYTES
    });
    fits.count().max(1)
}

impl Writer<'_> {
    async fn segment(&mut self, changes: &[PathChange]) -> Result<(), PromoteError> {
        let encode = |change: &PathChange| {
            segment::encode_change(change, self.machine).map_err(|why| PromoteError::Unpublishable {
                path: String::from_utf8_lossy(&change.path).into_owned(),
                why,
            })
        };
        let encoded = changes.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
        let mut backoff = Backoff::new(FIRST_WAIT, MAX_WAIT);
        let mut trouble = PromoteError::Late;
        for _ in 0..TRIES {
            match self.attempt(&encoded).await {
                Ok(true) => return Ok(()),
                Ok(false) => trouble = PromoteError::Late,
                Err(err) if err.is_transient() => trouble = err.into(),
                Err(err) => return Err(err.into()),
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
        Err(trouble)
    }

    /// Writes a segment under a new key; false when it may be overlooked.
    async fn attempt(&mut self, encoded: &[EncodedChange]) -> Result<bool, crate::tier::TierError> {
        let seq = self.next_seq;
        self.next_seq += 1;
        let millis = self.bucket.clock().now_millis();
        let head = Head {
            machine: self.machine,
            seq,
            published_millis: millis,
            previous: self.previous,
        };
        let key = layout::segment(self.volume.as_str(), millis, self.machine, seq);
        let put = self
            .bucket
            .put_new(&key, Body::raw(segment::encode(&head, encoded)))
            .await?;
        // Refused: there by a request whose reply was lost, nobody knows since when.
        let in_time = self.bucket.clock().now_millis().abs_diff(millis) <= LATE_MILLIS;
        if put == Put::Refused || !in_time {
            return Ok(false);
        }
        self.previous = Some((millis, seq));
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::{clock::Stamp, volume::StackLayer},
        namespace::{history, view},
        tier::url::{ConnectOptions, connect},
    };

    #[tokio::test]
    async fn many_changes_become_a_chain_of_segments_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}", dir.path().display());
        let bucket = connect(&url.parse().unwrap(), &ConnectOptions::default())
            .await
            .unwrap();
        let volume: VolumeName = "main".parse().unwrap();
        let change = |number: u64| PathChange {
            path: format!("f{number}").into_bytes(),
            stamp: Stamp {
                millis: number,
                counter: 0,
                machine: MachineId(number % 3),
            },
            entry: None,
        };
        let changes: Vec<PathChange> = (1..=40_000).map(change).collect();
        let written = write(&bucket, &volume, &changes, &|_| {}).await.unwrap();
        assert_eq!(written, 3);
        let mut log = history::newest(&bucket, &volume, 10).await.unwrap();
        log.reverse();
        assert_eq!(log.len(), 3);
        let machine = log[0].machine;
        assert!(log.iter().all(|of| of.machine == machine));
        let read: Vec<PathChange> = log.into_iter().flat_map(|of| of.changes).collect();
        assert!(read == changes, "other changes, or in another order");
        let layer = StackLayer::live(volume);
        let registers = view::registers(&bucket, &layer, &|_, _| {}).await.unwrap();
        assert_eq!(registers.len(), 40_000);
        assert_eq!(write(&bucket, &layer.volume, &[], &|_| {}).await.unwrap(), 0);
    }
}
