//! Forks that come and go while a sweep reads.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::{
    Sweeper, TRAIL, VOLUME, WINDOW, Writer, compact, new_world, settle, sweep,
    world::{Door, World},
};
use crate::{
    base::{clock::Stamp, digest::Digest, id::MachineId, volume::VolumeName},
    namespace::{
        catalog::compact::{CompactOptions, Outcome},
        change::{Entry, EntryBlob, EntryChunks, PathChange},
        deleted::{DeletedVolume, DeletedVolumes},
        promote,
        segment::{self, Head},
        stack::{self, ForkPoint},
        trim::{Kept, Trim},
        volumes,
    },
    store::rows::NodeKind,
    tier::{Body, Bucket, Put, SharedBucket, layout},
};

const CONTENT: &[u8] = b"in use by a job";

fn job() -> VolumeName {
    "job".parse().unwrap()
}

async fn put(world: &Arc<World>, key: &str, bytes: Vec<u8>) {
    let put = Door::open(world).put_new(key, Body::raw(bytes)).await.unwrap();
    assert!(matches!(put, Put::Written(_)), "{key}");
}

/// How a fork is made, and where what it says is.
#[derive(Clone, Copy, Debug, Default)]
struct Made {
    own_prefix: bool,
    /// In a catalog alone, because sweeps emptied the log; else in both.
    trimmed: bool,
}

/// A fork of the volume with a name of a blob that any sweep would delete now, if there were no such name.
async fn job_with_a_name(world: &Arc<World>, made: Made) {
    let digest = Digest::of(CONTENT);
    put(world, &layout::blob(&digest), CONTENT.to_vec()).await;
    let mut writer = Writer::new(1, world);
    writer.write(0, 1);
    writer.finish().await;
    world.advance(WINDOW + 1);
    sweep(world).await.unwrap();
    world.advance(WINDOW + 1);
    let door = Door::in_time(world);
    let from = VOLUME.parse().unwrap();
    stack::create_fork(&door, &job(), &from, ForkPoint::Live, made.own_prefix)
        .await
        .unwrap();
    if made.own_prefix {
        let key = layout::volume_prefix("job") + &layout::blob(&digest);
        put(world, &key, CONTENT.to_vec()).await;
    }
    let (now, machine) = (world.now(), MachineId(9));
    let blob = EntryBlob {
        digest,
        size: CONTENT.len() as u64,
        chunks: EntryChunks::Single,
        places: Vec::new(),
    };
    let change = PathChange {
        path: b"job".to_vec(),
        stamp: Stamp {
            millis: now,
            counter: 0,
            machine,
        },
        entry: Some(Entry {
            blob: Some(blob),
            ..Entry::new(NodeKind::File, 0o644)
        }),
    };
    let segment = layout::segment("job", now, machine, 1);
    put(world, &segment, said(1, now, &change)).await;
    world.advance(TRAIL.as_millis() as u64 + 1);
    compact(world).await;
    let bucket: SharedBucket = Arc::new(Door::open(world));
    let options = CompactOptions {
        machine,
        trail: TRAIL,
        spill_dir: std::env::temp_dir(),
    };
    let outcome = compact::compact(&bucket, &job(), &options, |_| {}).await.unwrap();
    let Outcome::Done(done) = outcome else {
        panic!("no catalog: {outcome:?}");
    };
    if made.trimmed {
        let floor = Kept {
            catalog: done.head.catalog,
            watermark_millis: done.head.watermark_millis,
        };
        let trim = Trim {
            kept: vec![floor],
            ..Trim::default()
        };
        put(world, &layout::trim("job"), trim.encode()).await;
        bucket.delete(&segment).await.unwrap();
    }
}

async fn promote_and_delete(world: &Arc<World>) {
    let bucket: SharedBucket = Arc::new(Door::in_time(world));
    let into = VOLUME.parse().unwrap();
    promote::promote(&bucket, &job(), &into, &|_| {}).await.unwrap();
    delete(&bucket).await;
}

async fn delete(bucket: &SharedBucket) {
    let decided = volumes::decide(bucket, &job()).await.unwrap();
    decided.remove_rest(bucket, |_| {}).await.unwrap();
}

#[tokio::test]
async fn a_fork_that_is_promoted_and_deleted_while_a_sweep_reads_stops_nothing_and_loses_nothing() {
    for (own_prefix, trimmed) in [(false, false), (false, true), (true, false), (true, true)] {
        gone_while_a_sweep_reads(Made { own_prefix, trimmed }).await;
    }
    // And it would have gone.
    let world = new_world().await;
    job_with_a_name(&world, Made::default()).await;
    delete(&(Arc::new(Door::in_time(&world)) as SharedBucket)).await;
    sweep(&world).await.unwrap();
    assert_eq!(world.stored(), 1);
}

async fn gone_while_a_sweep_reads(made: Made) {
    let mut is_over = false;
    // It goes between any two requests of the pass.
    for requests in 0..200 {
        let world = new_world().await;
        job_with_a_name(&world, made).await;
        let sweeper = Sweeper::begin(&world);
        sweeper.gate.add_permits(requests);
        settle().await;
        is_over = sweeper.task.is_finished();
        promote_and_delete(&world).await;
        sweeper.gate.add_permits(Semaphore::MAX_PERMITS / 2);
        let report = sweeper.task.await.unwrap();
        report.unwrap_or_else(|err| panic!("{made:?}, after {requests} requests: {err}"));
        let left = Door::open(&world)
            .head(&layout::blob(&Digest::of(CONTENT)))
            .await
            .unwrap();
        assert!(
            left.is_some(),
            "{made:?}, after {requests} requests the blob is gone"
        );
        if is_over {
            break;
        }
    }
    assert!(is_over, "the pass makes more requests than that");
}

#[tokio::test]
async fn listing_again_asks_nothing_of_volumes_that_are_known() {
    let world = new_world().await;
    job_with_a_name(&world, Made::default()).await;
    // A name of a chunk list that is nowhere has everything listed again.
    let now = world.now();
    put(
        &world,
        &layout::segment(VOLUME, now, MachineId(5), 1),
        lost_list(5, 1, now),
    )
    .await;
    let is_json = |key: &str| key == layout::volume("job");
    let before = world.reads(is_json);
    let report = sweep(&world).await.unwrap();
    assert_eq!(report.lost_lists, 1);
    assert_eq!(world.reads(is_json), before + 1);
}

/// A segment with a name of a blob whose chunk list never was.
pub fn lost_list(machine: u64, seq: u64, millis: u64) -> Vec<u8> {
    let machine = MachineId(machine);
    let blob = EntryBlob {
        digest: Digest::of(&seq.to_le_bytes()),
        size: 1 << 40,
        chunks: EntryChunks::Listed {
            digest: Digest::of(&[machine.0.to_le_bytes(), seq.to_le_bytes()].concat()),
            size: 100,
        },
        places: Vec::new(),
    };
    let change = PathChange {
        path: format!("lost-{seq}").into_bytes(),
        stamp: Stamp {
            millis,
            counter: 0,
            machine,
        },
        entry: Some(Entry {
            blob: Some(blob),
            ..Entry::new(NodeKind::File, 0o644)
        }),
    };
    said(seq, millis, &change)
}

/// A segment of its machine that says one change.
fn said(seq: u64, millis: u64, change: &PathChange) -> Vec<u8> {
    let head = Head {
        machine: change.stamp.machine,
        seq,
        published_millis: millis,
        previous: None,
    };
    segment::encode(
        &head,
        &[segment::encode_change(change, change.stamp.machine).unwrap()],
    )
}

#[tokio::test]
async fn all_of_a_fork_whose_deletion_is_not_decided_is_kept() {
    let world = new_world().await;
    job_with_a_name(&world, Made::default()).await;
    let door = Door::open(&world);
    let key = layout::volume("job");
    let (json, etag) = stack::read_json(&door, &job()).await.unwrap().unwrap();
    let undecided = stack::VolumeJson {
        deleted_millis: Some(1),
        deletion_undecided: true,
        ..json
    };
    let put = door.put_if(&key, Body::raw(undecided.encode()), &etag).await;
    assert!(matches!(put, Ok(Put::Written(_))));
    for _ in 0..3 {
        world.advance(WINDOW + 1);
        sweep(&world).await.unwrap();
    }
    assert_eq!(world.stored(), 2);
    assert!(door.head(&layout::head("job")).await.unwrap().is_some());
}

#[tokio::test]
async fn a_fork_that_is_known_to_be_deleted_is_not_asked_and_one_that_is_put_back_is() {
    for own_prefix in [false, true] {
        let made = Made {
            own_prefix,
            ..Made::default()
        };
        let world = new_world().await;
        job_with_a_name(&world, made).await;
        let door: SharedBucket = Arc::new(Door::open(&world));
        let key = layout::volume("job");
        let (live, _) = stack::read_json(door.as_ref(), &job()).await.unwrap().unwrap();
        delete(&door).await;
        let listed = door.list(&key, None).await.unwrap().objects.remove(0);
        let known = DeletedVolume::new(&listed, own_prefix);
        let none = DeletedVolumes::default();
        none.add(door.as_ref(), [(job(), known)].into()).await;
        let before = world.reads(|read| read == key);
        // What is left of a volume that keeps its blobs apart stops nothing.
        if own_prefix {
            put(&world, "volumes/job/odd", b"odd".to_vec()).await;
        }
        sweep(&world).await.unwrap();
        assert_eq!(world.reads(|read| read == key), before);
        // By hand, with all that it had.
        let again = new_world().await;
        job_with_a_name(&again, Made::default()).await;
        let door = Door::open(&again);
        let none = DeletedVolumes::default();
        none.add(&door, [(job(), known)].into()).await;
        let (json, etag) = stack::read_json(&door, &job()).await.unwrap().unwrap();
        assert!(json.deleted_millis.is_none() && live.deleted_millis.is_none());
        let put = door.put_if(&key, Body::raw(json.encode()), &etag).await;
        assert!(matches!(put, Ok(Put::Written(_))));
        for _ in 0..3 {
            again.advance(WINDOW + 1);
            sweep(&again).await.unwrap();
        }
        assert_eq!(again.stored(), 2);
    }
}
