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
//! 6. A stamp that is later than its change was published (a wrong clock, or ill will) becomes the time of that: it shall
//!    not win for ever. The time is that in the key of the segment, so that a repeat gives the same stamp, whatever
//!    the parent changed in between. Once the fork is compacted nothing tells it any more but the watermark of the catalog: of these
//!    changes a promotion gives a later stamp after each compaction of the fork, which wins over what the parent changed in
//!    between. Nothing else is lost by that, and no change of the fork ever.
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

use std::collections::HashMap;

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
    let mut changes = in_order(fork, registers, bucket.clock().now_millis());
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
fn in_order(fork: &VolumeName, registers: Registers, now: u64) -> Vec<PathChange> {
    let mut changes: Vec<(PathChange, u64)> = registers
        .into_iter()
        .map(|(path, register)| {
            let change = PathChange {
                path,
                stamp: register.stamp,
                entry: register.entry,
            };
            // Keys and catalogs of forks can say anything as well.
            (change, register.published_millis.min(now))
        })
        .collect();
    changes.sort_by(|(a, _), (b, _)| (a.stamp, &a.path).cmp(&(b.stamp, &b.path)));
    // How many of one time there are so far.
    let mut counters: HashMap<u64, u32> = HashMap::new();
    for (change, published) in &mut changes {
        if change.stamp.millis <= *published + LATE_MILLIS {
            continue;
        }
        let counter = counters.entry(*published).or_default();
        change.stamp = Stamp {
            millis: *published,
            counter: (*counter).min(MAX_COUNTER),
            machine: told_by(fork, change),
        };
        *counter = counter.saturating_add(1);
    }
    let mut changes: Vec<PathChange> = changes.into_iter().map(|(change, _)| change).collect();
    changes.sort_by(|a, b| (a.stamp, &a.path).cmp(&(b.stamp, &b.path)));
    changes
}

/// A machine that says this change of this fork, and nothing else: a digest of both.
fn told_by(fork: &VolumeName, change: &PathChange) -> MachineId {
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
    MachineId(u64::from_be_bytes(*number).max(1))
}

/// Gives changes of writers that are not trusted stamps that no other change has (law 7), and orders them by these.
fn stamp_anew(fork: &VolumeName, changes: &mut [PathChange]) {
    for change in changes.iter_mut() {
        change.stamp = Stamp {
            counter: change.stamp.counter.min(MAX_COUNTER),
            machine: told_by(fork, change),
            ..change.stamp
        };
    }
    changes.sort_by(|a, b| (a.stamp, &a.path).cmp(&(b.stamp, &b.path)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use crate::{
        namespace::{
            catalog::compact::{self, CompactOptions},
            change::{Entry, EntryBlob, EntryChunks},
            stack::ForkPoint,
            view::Register,
        },
        store::{pack::PackPlace, rows::NodeKind},
        tier::{
            Body,
            url::{ConnectOptions, connect},
        },
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
        const NOW: u64 = 1_767_225_600_000;
        let stamp = |millis, machine| Stamp {
            millis,
            counter: 0,
            machine: MachineId(machine),
        };
        // When it was said to be made, and when it was published.
        let registers = [
            ("a", stamp(NOW, 2), NOW),
            ("b", stamp(NOW - 5, 1), NOW),
            ("c", stamp(u64::MAX, 1), NOW - 90_000),
            ("d", stamp(NOW + 900_000, 1), NOW - 90_000),
            ("e", stamp(NOW, 1), NOW),
            // A time that nobody can have published at.
            ("f", stamp(u64::MAX, 1), u64::MAX),
        ];
        let of = |now| {
            let registers = registers.into_iter().map(|(path, stamp, published_millis)| {
                let register = Register {
                    stamp,
                    entry: None,
                    published_millis,
                };
                (path.as_bytes().to_vec(), register)
            });
            in_order(&"fork".parse().unwrap(), registers.collect(), now)
        };
        let changes = of(NOW);
        let order: Vec<&[u8]> = changes.iter().map(|change| change.path.as_slice()).collect();
        assert_eq!(order[..4], [b"d", b"c", b"b", b"e"]);
        assert!(changes.is_sorted_by(|a, b| a.stamp < b.stamp));
        assert!(changes.iter().all(|change| change.stamp.millis <= NOW));
        let found = |changes: &[PathChange], path: &[u8]| {
            changes.iter().find(|change| change.path == path).unwrap().stamp
        };
        assert_eq!(found(&changes, b"c").millis, NOW - 90_000);
        let later = of(NOW + 7_200_000);
        for path in [b"a", b"b", b"c", b"d", b"e"] {
            assert_eq!(
                found(&later, path),
                found(&changes, path),
                "a repeat says another time"
            );
        }
    }

    #[tokio::test]
    async fn a_repeat_takes_nothing_from_what_the_parent_changed_since_whatever_time_the_fork_says() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}", dir.path().display());
        let bucket = connect(&url.parse().unwrap(), &ConnectOptions::default())
            .await
            .unwrap();
        let (main, fork): (VolumeName, VolumeName) = ("main".parse().unwrap(), "fork".parse().unwrap());
        let say = async |volume: &VolumeName, path: &str, millis, mode| {
            let change = PathChange {
                path: path.as_bytes().to_vec(),
                stamp: Stamp {
                    millis,
                    counter: 0,
                    machine: MachineId(5),
                },
                entry: Some(Entry::new(NodeKind::Fifo, mode)),
            };
            write::write(&bucket, volume, &[change], &|_| {}).await.unwrap();
        };
        let now = || bucket.clock().now_millis();
        bucket.put_new("probe/clock", Body::raw("x")).await.unwrap();
        say(&main, "a", now() - 10_000, 0o600).await;
        stack::create_fork(bucket.as_ref(), &fork, &main, ForkPoint::Live, false)
            .await
            .unwrap();
        say(&fork, "a", u64::MAX / 2, 0o644).await;
        let mode = async || {
            let layer = StackLayer::live(main.clone());
            let registers = view::registers(&bucket, &layer, &|_, _| {}).await.unwrap();
            registers[b"a".as_slice()].entry.as_ref().unwrap().perm
        };
        let promote = async || promote(&bucket, &fork, &main, &|_| {}).await.unwrap();
        promote().await;
        assert_eq!(mode().await, 0o644);
        tokio::time::sleep(Duration::from_millis(2)).await;
        say(&main, "a", now(), 0o640).await;
        promote().await;
        assert_eq!(mode().await, 0o640, "the repeat undid what came since");
        // Compacting makes it known again, as of then, and once.
        let options = CompactOptions {
            machine: MachineId(5),
            trail: Duration::ZERO,
            spill_dir: dir.path().to_owned(),
        };
        tokio::time::sleep(Duration::from_millis(2)).await;
        compact::compact(&bucket, &fork, &options, |_| {}).await.unwrap();
        let log = bucket.list(&layout::log_prefix("fork"), None).await.unwrap();
        for object in log.objects {
            bucket.delete(&object.key).await.unwrap();
        }
        promote().await;
        tokio::time::sleep(Duration::from_millis(2)).await;
        say(&main, "a", now(), 0o660).await;
        promote().await;
        assert_eq!(mode().await, 0o660, "the repeat undid what came since");
    }
}
