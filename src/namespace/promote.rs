//! Makes what a fork says a part of its parent.
//!
//! This file says what is promoted; `durable` makes sure of the blobs, and `write` publishes.
//!
//! # Laws
//!
//! 1. Promoted is what the fork itself says (its uppermost layer), deletions too; never what it only shows of
//!    its parent. So the cost does not depend on the parent.
//! 2. A change keeps the stamp that it was made with, but for laws 6 and 7. Of two changes of a path the later one counts, as between
//!    two machines of one volume: what the parent changed after the fork did stays.
//! 3. Merging is idempotent, so a promotion may be repeated, also after a crash, also while another
//!    machine does the same. What the fork says later is promoted by the next promotion.
//! 4. Changes go out in the order of their stamps, which is that of cause and effect: whoever reads a part
//!    of a promotion, or after a crash all there is of it, never sees an effect without its cause.
//! 5. A name goes out only when every object that it needs is known to be in the bucket. If one is not,
//!    nothing is promoted.
//! 6. A stamp from the future (a wrong clock, or ill will) becomes one of now: it shall not win for ever.
//! 7. Of two changes of a path with one stamp nobody knows which counts: whoever has the one keeps it, whoever reads
//!    both takes the other. No machine makes them; but writers that are not trusted could copy a stamp of the parent's log. So
//!    where they wrote the fork, the machine in a stamp becomes a digest of the fork's name and of the whole change: the same for
//!    the same change, whenever and by whomever it is promoted, and for no other.
//!
//! The fork stays as it is. Where it goes on to say what was promoted, it hides what its parent says later,
//! as ever.
//!
//! A fork whose writers are trusted less keeps its blobs below its own prefix. `adopt` then reads every byte, and copies
//! what is right: only a machine that may write the parent's blobs can promote it.
//!
//! # Cost
//!
//! Reading the fork's log ([`super::view`]), one HEAD for each pack and each blob of its own that is named, and
//! one PUT for some 16,000 changes.

mod adopt;
mod durable;
pub(super) mod write;

use crate::{
    base::{
        clock::{MAX_COUNTER, Stamp},
        digest::Digest,
        id::MachineId,
        volume::{StackLayer, VolumeName},
    },
    tier::{SharedBucket, TierError, layout},
};

use adopt::Domains;

use super::{
    change::PathChange,
    publish::LATE_MILLIS,
    segment::{self, EncodedChange},
    stack::{self, StackError, Standing},
    view::{self, Registers, ViewError},
};

/// What a promotion did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promoted {
    pub into: VolumeName,
    /// Paths that the fork says something of.
    pub changes: u64,
    /// How many of these are deletions.
    pub removed: u64,
    /// Segments that were written.
    pub segments: u64,
    /// Objects of the bucket that were confirmed.
    pub confirmed: u64,
}

/// Nothing was promoted, or a part; a repeat does the whole.
#[derive(Debug, thiserror::Error)]
pub enum PromoteError {
    #[error(transparent)]
    Stack(#[from] StackError),
    #[error(transparent)]
    View(#[from] ViewError),
    #[error("there is no volume {volume} in this store: correct the name")]
    Absent { volume: VolumeName },
    #[error("volume {volume} is no fork, so there is nothing to promote it into")]
    NoFork { volume: VolumeName },
    #[error("volume {volume} is a fork of volume {parent}, not of volume {into}: promote it into {parent}")]
    NotParent {
        volume: VolumeName,
        parent: VolumeName,
        into: VolumeName,
    },
    #[error(
        "the bytes of {count} {} of volume {volume} are gone from the store, {path} first: make or remove \
         {} there, then promote again",
        if *count == 1 { "file" } else { "files" },
        if *count == 1 { "it" } else { "them" }
    )]
    Lost {
        volume: VolumeName,
        count: u64,
        path: String,
    },
    #[error(
        "the bytes of {count} {} of volume {volume} are not in the store as {} says, {path} first: nothing of a \
         writer who does that should be promoted; make or remove {} there to promote the rest",
        if *count == 1 { "file" } else { "files" },
        if *count == 1 { "its name" } else { "their names" },
        if *count == 1 { "it" } else { "them" }
    )]
    Wrong {
        volume: VolumeName,
        count: u64,
        path: String,
    },
    #[error(
        "the store took too long to write a part of the promotion: try again, nothing is promoted twice by that"
    )]
    Late,
    #[error("{path} cannot be promoted: {why}")]
    Unpublishable { path: String, why: &'static str },
}

impl From<TierError> for PromoteError {
    fn from(err: TierError) -> Self {
        Self::Stack(err.into())
    }
}

/// How far a promotion is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromoteStep {
    Reading { segments: u64, of: u64 },
    Confirming { objects: u64, of: u64 },
    Writing { changes: u64, of: u64 },
}

/// Whoever wants to know how far it is.
pub type OnStep<'a> = &'a (dyn Fn(PromoteStep) + Send + Sync);

/// Makes what `fork` says a part of `into`, its parent.
///
/// The bucket must have answered before: times are taken from its clock.
pub async fn promote(
    bucket: &SharedBucket,
    fork: &VolumeName,
    into: &VolumeName,
    on_step: OnStep<'_>,
) -> Result<Promoted, PromoteError> {
    let domains = check(bucket, fork, into).await?;
    let layer = StackLayer::live(fork.clone());
    let reading = |segments, of| on_step(PromoteStep::Reading { segments, of });
    let registers = view::registers(bucket, &layer, &reading).await?;
    let mut changes = in_order(registers, bucket.clock().now_millis(), MachineId::random());
    if domains.is_some() {
        stamp_anew(fork, &mut changes);
    }
    let removed = changes.iter().filter(|change| change.entry.is_none()).count() as u64;
    let confirmed = match &domains {
        Some(domains) => adopt::adopt(bucket, domains, fork, &mut changes, on_step).await?,
        None => durable::confirm(bucket, fork, &changes, on_step).await?,
    };
    // The fork or its parent can have been deleted meanwhile; nothing is written into what nobody reads.
    check(bucket, fork, into).await?;
    let segments = write::write(bucket, into, &changes, on_step).await?;
    Ok(Promoted {
        into: into.clone(),
        changes: changes.len() as u64,
        removed,
        segments,
        confirmed,
    })
}

/// Refuses what is not a fork of `into`; returns where blobs are to be looked at, if the fork's are apart.
async fn check(
    bucket: &SharedBucket,
    fork: &VolumeName,
    into: &VolumeName,
) -> Result<Option<Domains>, PromoteError> {
    let volume = || fork.clone();
    let json = match stack::standing(bucket.as_ref(), fork).await? {
        Standing::Absent => return Err(PromoteError::Absent { volume: volume() }),
        Standing::Plain => return Err(PromoteError::NoFork { volume: volume() }),
        Standing::Deleted => return Err(StackError::Deleted { volume: volume() }.into()),
        Standing::Fork(_, parent) if parent.volume != *into => {
            return Err(PromoteError::NotParent {
                volume: volume(),
                parent: parent.volume,
                into: into.clone(),
            });
        }
        Standing::Fork(json, _) => json,
    };
    // Also when something further below is odd: its readers are refused then.
    let below = stack::read(bucket.as_ref(), into).await?;
    let prefix = |volume: &VolumeName| layout::volume_prefix(volume.as_str());
    let apart = below.layers().iter().filter(|layer| layer.own_prefix);
    Ok(json.own_prefix.then(|| Domains {
        trusted: apart
            .map(|layer| prefix(&layer.volume))
            .chain([String::new()])
            .collect(),
        from: prefix(fork),
    }))
}

/// The changes of a fork in the order in which they go out (laws 4 and 6).
fn in_order(registers: Registers, now: u64, machine: MachineId) -> Vec<PathChange> {
    let mut changes: Vec<PathChange> = registers
        .into_iter()
        .map(|(path, register)| PathChange {
            path,
            stamp: register.stamp,
            entry: register.entry,
        })
        .collect();
    changes.sort_by(|a, b| (a.stamp, &a.path).cmp(&(b.stamp, &b.path)));
    let latest = now + LATE_MILLIS;
    let ahead = changes.iter_mut().filter(|change| change.stamp.millis > latest);
    for (counter, change) in (0..).zip(ahead) {
        change.stamp = Stamp {
            millis: latest,
            counter,
            machine,
        };
    }
    changes
}

/// Gives changes of writers that are not trusted stamps that no other change has (law 7), and orders them by these.
fn stamp_anew(fork: &VolumeName, changes: &mut [PathChange]) {
    for change in changes.iter_mut() {
        let mut said = change.clone();
        // Where the bytes are is no part of what is said, and promoting changes it.
        if let Some(blob) = said.entry.as_mut().and_then(|entry| entry.blob.as_mut()) {
            blob.places.clear();
        }
        // What cannot be encoded is not published either.
        let encoded = segment::encode_change(&said, MachineId(0));
        let encoded = encoded.as_ref().map_or(&[][..], EncodedChange::as_bytes);
        let digest = Digest::of(&[fork.as_str().as_bytes(), b"/", encoded].concat());
        let (number, _) = digest
            .as_bytes()
            .split_first_chunk::<8>()
            .expect("a digest has 32 bytes");
        // 0 is nobody's: that of names that expired.
        let machine = MachineId(u64::from_be_bytes(*number).max(1));
        let counter = change.stamp.counter.min(MAX_COUNTER);
        change.stamp = Stamp {
            counter,
            machine,
            ..change.stamp
        };
    }
    changes.sort_by(|a, b| (a.stamp, &a.path).cmp(&(b.stamp, &b.path)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        namespace::{
            change::{Entry, EntryBlob, EntryChunks},
            view::Register,
        },
        store::{pack::PackPlace, rows::NodeKind},
    };

    fn blob(bytes: &[u8], places: Vec<Option<PackPlace>>) -> EntryBlob {
        EntryBlob {
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            chunks: EntryChunks::Single,
            places,
        }
    }

    #[test]
    fn changes_that_differ_never_have_one_stamp_and_one_change_always_the_same() {
        let copied = Stamp {
            millis: 1_767_225_600_000,
            counter: 3,
            machine: MachineId(5),
        };
        let stamped = |fork: &str, blob: Option<EntryBlob>, stamp| {
            let entry = blob.map(|blob| Entry {
                blob: Some(blob),
                ..Entry::new(NodeKind::File, 0o644)
            });
            let mut changes = [PathChange {
                path: b"a".to_vec(),
                stamp,
                entry,
            }];
            stamp_anew(&fork.parse().unwrap(), &mut changes);
            changes[0].stamp
        };
        let place = PackPlace {
            pack: Digest::of(b"pack"),
            offset: 52,
            stored_len: 1,
            zstd: false,
        };
        let one = stamped("pr-1", Some(blob(b"x", Vec::new())), copied);
        assert_eq!((one.millis, one.counter), (copied.millis, copied.counter));
        assert_eq!(one, stamped("pr-1", Some(blob(b"x", vec![Some(place)])), copied));
        let others = [
            stamped("pr-1", Some(blob(b"y", Vec::new())), copied),
            stamped("pr-2", Some(blob(b"x", Vec::new())), copied),
            stamped("pr-1", None, copied),
            copied,
        ];
        assert!(!others.contains(&one), "{others:?}");
        // Nor is it taken for a name that expired.
        let expired = copied.expired(490_000).unwrap();
        assert!(!stamped("pr-1", None, expired).is_expired());
    }

    #[test]
    fn changes_go_out_in_the_order_in_which_they_were_made_and_none_is_of_the_future() {
        let now = 1_767_225_600_000;
        let stamp = |millis, machine| Stamp {
            millis,
            counter: 0,
            machine: MachineId(machine),
        };
        let registers = [
            ("a", stamp(now, 2)),
            ("b", stamp(now - 5, 1)),
            ("c", stamp(u64::MAX, 1)),
            ("d", stamp(now + 900_000, 1)),
            ("e", stamp(now, 1)),
        ];
        let registers = registers
            .into_iter()
            .map(|(path, stamp)| (path.as_bytes().to_vec(), Register { stamp, entry: None }));
        let changes = in_order(registers.collect(), now, MachineId(7));
        let order: Vec<&[u8]> = changes.iter().map(|change| change.path.as_slice()).collect();
        assert_eq!(order, [b"b", b"e", b"a", b"d", b"c"]);
        assert!(changes.is_sorted_by(|a, b| a.stamp < b.stamp));
        let last = changes[4].stamp;
        assert_eq!((last.millis, last.machine), (now + LATE_MILLIS, MachineId(7)));
    }
}
