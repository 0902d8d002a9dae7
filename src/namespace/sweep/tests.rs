//! Sweeps under proptest: writers, followers, compactors, forks, snapshots and sweepers, each of which may sleep or die
//! between any two of its requests, on a bucket in memory with a clock that is turned by hand.
//!
//! The bucket checks each deletion of a blob: what an acknowledged name refers to, in any view of the volume, never goes.
//! Whenever something of the log or of the catalogs went, every view is read whole: what was acknowledged is in it.

mod follower;
mod forks;
mod lifecycle;
mod log;
mod trust;
mod world;
mod writer;

use std::{sync::Arc, time::Duration};

use proptest::prelude::*;
use tokio::{sync::Semaphore, task::JoinHandle};

use self::{
    follower::Follower,
    world::{Door, VOLUME, World, make_snapshot},
    writer::Writer,
};
use super::{Amounts, MIN_LOG_AGE, SweepError, SweepOptions, SweepReport, sweep_by};
use crate::{
    base::id::MachineId,
    namespace::{
        catalog::{
            CatalogError,
            compact::{self, CompactOptions, Outcome, TRAIL},
        },
        snapshot::SnapshotError,
    },
    tier::{
        Body, Bucket, SharedBucket, layout,
        sweeping::{self, SweepList, WindowJson},
    },
};

const START: u64 = 1_767_225_600_000;
const WINDOW: u64 = 1_000_000;
const WRITERS: usize = 3;
const SWEEPERS: usize = 2;
const COMPACTORS: usize = 2;
const FOLLOWERS: usize = 2;

#[derive(Clone, Debug)]
enum Action {
    Write { writer: usize, path: u8, content: u8 },
    Delete { writer: usize, path: u8 },
    Upload { writer: usize },
    Look { writer: usize },
    Send { writer: usize, slow: bool },
    Acknowledge { writer: usize },
    Restart { writer: usize },
    Fork,
    Snapshot,
    DeleteSnapshot,
    Begin { sweeper: usize },
    Step { sweeper: usize, requests: usize },
    Die { sweeper: usize },
    Compact { compactor: usize },
    CompactStep { compactor: usize, requests: usize },
    CompactDie { compactor: usize },
    Poll { follower: usize },
    Load { follower: usize },
    FollowerDies { follower: usize },
    Advance { millis: u64 },
}

fn any_action() -> impl Strategy<Value = Action> {
    let writer = 0..WRITERS;
    let sweeper = 0..SWEEPERS;
    let compactor = 0..COMPACTORS;
    let follower = 0..FOLLOWERS;
    prop_oneof![
        6 => (writer.clone(), 0u8..4, 0u8..4).prop_map(|(writer, path, content)| Action::Write { writer, path, content }),
        4 => (writer.clone(), 0u8..4).prop_map(|(writer, path)| Action::Delete { writer, path }),
        6 => writer.clone().prop_map(|writer| Action::Upload { writer }),
        6 => writer.clone().prop_map(|writer| Action::Look { writer }),
        6 => (writer.clone(), prop::bool::weighted(0.2)).prop_map(|(writer, slow)| Action::Send { writer, slow }),
        6 => writer.clone().prop_map(|writer| Action::Acknowledge { writer }),
        1 => writer.prop_map(|writer| Action::Restart { writer }),
        1 => Just(Action::Fork),
        1 => Just(Action::Snapshot),
        1 => Just(Action::DeleteSnapshot),
        6 => sweeper.clone().prop_map(|sweeper| Action::Begin { sweeper }),
        8 => (sweeper.clone(), 1usize..60).prop_map(|(sweeper, requests)| Action::Step { sweeper, requests }),
        1 => sweeper.prop_map(|sweeper| Action::Die { sweeper }),
        4 => compactor.clone().prop_map(|compactor| Action::Compact { compactor }),
        6 => (compactor.clone(), 1usize..40)
            .prop_map(|(compactor, requests)| Action::CompactStep { compactor, requests }),
        1 => compactor.prop_map(|compactor| Action::CompactDie { compactor }),
        3 => follower.clone().prop_map(|follower| Action::Poll { follower }),
        1 => follower.clone().prop_map(|follower| Action::Load { follower }),
        1 => follower.prop_map(|follower| Action::FollowerDies { follower }),
        3 => (0..WINDOW / 8).prop_map(|millis| Action::Advance { millis }),
        3 => (0..WINDOW / 2).prop_map(|millis| Action::Advance { millis }),
        3 => (0..WINDOW * 5 / 4).prop_map(|millis| Action::Advance { millis }),
        3 => (WINDOW..WINDOW * 5).prop_map(|millis| Action::Advance { millis }),
    ]
}

fn options() -> SweepOptions {
    SweepOptions {
        window: None,
        dry_run: false,
        wait: false,
        price: 0.0,
        untrusted: Vec::new(),
        log_age: MIN_LOG_AGE,
    }
}

type Swept = Result<SweepReport, SweepError>;

/// A sweep that makes as many requests as it is let.
struct Sweeper {
    gate: Arc<Semaphore>,
    task: JoinHandle<Swept>,
}

impl Sweeper {
    fn begin(world: &Arc<World>) -> Self {
        let gate = Arc::new(Semaphore::new(0));
        let bucket: SharedBucket = Arc::new(Door::gated(world, Arc::clone(&gate)));
        let now = world.clock();
        let task = tokio::spawn(async move { sweep_by(&bucket, now, &options(), &mut |_| {}).await });
        Self { gate, task }
    }
}

type Compacted = Result<Outcome, CatalogError>;

/// A compaction that makes as many requests as it is let.
struct Compactor {
    gate: Arc<Semaphore>,
    task: JoinHandle<Compacted>,
}

impl Compactor {
    fn begin(world: &Arc<World>, number: usize) -> Self {
        let gate = Arc::new(Semaphore::new(0));
        let bucket: SharedBucket = Arc::new(Door::gated(world, Arc::clone(&gate)));
        let task = tokio::spawn(async move { compact_in(&bucket, number).await });
        Self { gate, task }
    }
}

async fn compact_in(bucket: &SharedBucket, number: usize) -> Compacted {
    let options = CompactOptions {
        machine: MachineId(100 + number as u64),
        trail: TRAIL,
        spill_dir: std::env::temp_dir(),
    };
    compact::compact(bucket, &VOLUME.parse().unwrap(), &options, |_| {}).await
}

/// Compacts to the end.
async fn compact(world: &Arc<World>) -> Outcome {
    let bucket: SharedBucket = Arc::new(Door::open(world));
    compact_in(&bucket, 9).await.unwrap()
}

fn blobs(report: &SweepReport) -> Amounts {
    let without = |all: super::Amount, logs: super::Amount, catalogs: super::Amount| super::Amount {
        objects: all.objects - logs.objects - catalogs.objects,
        bytes: all.bytes - logs.bytes - catalogs.bytes,
    };
    let (all, logs, catalogs) = (
        report.objects.all,
        report.objects.of_logs,
        report.objects.of_catalogs,
    );
    Amounts {
        all: without(all.all, logs.all, catalogs.all),
        used: without(all.used, logs.used, catalogs.used),
        young: without(all.young, logs.young, catalogs.young),
        waiting: without(all.waiting, logs.waiting, catalogs.waiting),
        deleted: without(all.deleted, logs.deleted, catalogs.deleted),
        condemned: without(all.condemned, logs.condemned, catalogs.condemned),
        left: without(all.left, logs.left, catalogs.left),
    }
}

/// Runs a sweep to its end.
async fn sweep(world: &Arc<World>) -> Swept {
    sweep_with(world, &options()).await
}

async fn sweep_with(world: &Arc<World>, options: &SweepOptions) -> Swept {
    let bucket: SharedBucket = Arc::new(Door::open(world));
    sweep_by(&bucket, world.clock(), options, &mut |_| {}).await
}

/// Lets everyone go on who may.
async fn settle() {
    for _ in 0..12 {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        // One thread does what blocks, in the order in which it is asked.
        tokio::task::spawn_blocking(|| ()).await.unwrap();
    }
}

async fn new_world() -> Arc<World> {
    let world = World::new(START);
    let window = Duration::from_millis(WINDOW);
    let json = WindowJson::new(window, window, START);
    let door = Door::open(&world);
    door.put_new(layout::SWEEP_WINDOW, Body::raw(json.encode()))
        .await
        .unwrap();
    world
}

async fn play(actions: Vec<Action>) {
    let world = new_world().await;
    let mut writers: Vec<_> = (1..=WRITERS as u64).map(|id| Writer::new(id, &world)).collect();
    let mut sweepers: Vec<Option<Sweeper>> = (0..SWEEPERS).map(|_| None).collect();
    let mut compactors: Vec<Option<Compactor>> = (0..COMPACTORS).map(|_| None).collect();
    let mut followers: Vec<_> = (0..FOLLOWERS).map(|_| Follower::new(&world)).collect();
    let mut trimmed = 0;
    for action in actions {
        match action {
            Action::Write {
                writer,
                path,
                content,
            } => writers[writer].write(path, content),
            Action::Delete { writer, path } => writers[writer].delete(path),
            Action::Upload { writer } => writers[writer].upload().await,
            Action::Look { writer } => writers[writer].look().await,
            Action::Send { writer, slow } => writers[writer].send(slow).await,
            Action::Acknowledge { writer } => writers[writer].acknowledge().await,
            Action::Restart { writer } => writers[writer].restart(),
            Action::Fork => world.fork().await,
            Action::Snapshot => world.snapshot().await,
            Action::DeleteSnapshot => world.delete_snapshot().await,
            Action::Begin { sweeper } => {
                let slot = &mut sweepers[sweeper];
                if slot.as_ref().is_none_or(|sweeper| sweeper.task.is_finished()) {
                    *slot = Some(Sweeper::begin(&world));
                }
            }
            Action::Step { sweeper, requests } => {
                if let Some(sweeper) = &sweepers[sweeper] {
                    sweeper.gate.add_permits(requests);
                }
            }
            Action::Die { sweeper } => {
                if let Some(sweeper) = sweepers[sweeper].take() {
                    sweeper.task.abort();
                }
            }
            Action::Compact { compactor } => {
                let slot = &mut compactors[compactor];
                if slot.as_ref().is_none_or(|compactor| compactor.task.is_finished()) {
                    *slot = Some(Compactor::begin(&world, compactor));
                }
            }
            Action::CompactStep { compactor, requests } => {
                if let Some(compactor) = &compactors[compactor] {
                    compactor.gate.add_permits(requests);
                }
            }
            Action::CompactDie { compactor } => {
                if let Some(compactor) = compactors[compactor].take() {
                    compactor.task.abort();
                }
            }
            Action::Poll { follower } => followers[follower].poll().await,
            Action::Load { follower } => followers[follower].load().await,
            Action::FollowerDies { follower } => followers[follower].die(),
            Action::Advance { millis } => world.advance(millis),
        }
        settle().await;
        if let Some(wrong) = world.wrong() {
            panic!("{wrong}");
        }
        if std::mem::replace(&mut trimmed, world.trimmed()) < world.trimmed() {
            world.assert_all_visible().await;
        }
    }
    for sweeper in sweepers.into_iter().flatten() {
        sweeper.task.abort();
    }
    // These may end whenever they like.
    for compactor in compactors.iter().flatten() {
        compactor.gate.add_permits(1000);
    }
    settle().await;
    converge(&world, &mut writers, &mut followers).await;
}

/// Lets everyone finish; then every name can be read, every machine shows the same, and nothing is left that none
/// refers to.
async fn converge(world: &Arc<World>, writers: &mut [Writer], followers: &mut [Follower]) {
    for writer in writers.iter_mut() {
        writer.finish().await;
    }
    world.assert_all_readable();
    for round in 0..9 {
        world.advance(WINDOW + 1);
        compact(world).await;
        sweep(world).await.unwrap();
        assert_eq!(world.wrong(), None);
        world.assert_all_visible().await;
        for follower in followers.iter_mut().skip(round % 2) {
            follower.poll().await;
        }
    }
    world.assert_all_readable();
    world.assert_nothing_unused().await;
    let late = &mut Follower::new(world);
    for follower in followers.iter_mut().chain([late]) {
        follower.assert_converged().await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 3000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_a_name_refers_to_is_ever_deleted(actions in prop::collection::vec(any_action(), 1..120)) {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_time().max_blocking_threads(1).build().unwrap();
        runtime.block_on(play(actions));
    }
}

#[tokio::test]
async fn an_unused_object_goes_by_the_second_sweep_a_window_after_the_first() {
    let world = new_world().await;
    let mut writer = Writer::new(1, &world);
    writer.write(0, 1);
    writer.write(1, 2);
    writer.finish().await;
    writer.delete(0);
    writer.finish().await;
    // Its name was deleted just now.
    assert_eq!(blobs(&sweep(&world).await.unwrap()).used.objects, 2);
    world.advance(WINDOW + 1);
    let report = sweep(&world).await.unwrap();
    assert_eq!(
        (blobs(&report).condemned.objects, blobs(&report).deleted.objects),
        (1, 0)
    );
    let due = report.next_due_millis.unwrap();
    world.advance(WINDOW - 1);
    let report = sweep(&world).await.unwrap();
    assert_eq!(
        (blobs(&report).waiting.objects, blobs(&report).condemned.objects),
        (1, 0)
    );
    world.advance(due - world.now());
    assert_eq!(blobs(&sweep(&world).await.unwrap()).deleted.objects, 1);
    world.assert_all_readable();
    // Its list is there until no machine can have missed it.
    let lists = || async { sweeping::list(&Door::open(&world)).await.unwrap().lists.len() };
    world.advance(WINDOW / 2);
    sweep(&world).await.unwrap();
    assert_eq!(lists().await, 1);
    world.advance(WINDOW);
    sweep(&world).await.unwrap();
    assert_eq!(lists().await, 0);
}

#[tokio::test]
async fn a_list_of_another_version_stops_writers_and_sweeps() {
    let world = new_world().await;
    let mut newer = SweepList::new(START, WINDOW, vec![1]).encode();
    newer[7] = 9;
    let key = layout::sweep_list("1767225600000-0000000000000001");
    Door::open(&world).put_new(&key, Body::raw(newer)).await.unwrap();
    assert!(matches!(sweep(&world).await, Err(SweepError::Bucket(_))));
    let mut writer = Writer::new(1, &world);
    writer.write(0, 1);
    writer.upload().await;
    writer.look().await;
    writer.send(false).await;
    assert_eq!(world.segments(), 0);
}

#[tokio::test]
async fn what_a_snapshot_names_stays_until_the_snapshot_is_deleted() {
    let world = new_world().await;
    let mut writer = Writer::new(1, &world);
    writer.write(0, 1);
    writer.finish().await;
    world.snapshot().await;
    writer.delete(0);
    writer.finish().await;
    for _ in 0..4 {
        world.advance(WINDOW + 1);
        let report = sweep(&world).await.unwrap();
        let (all, logs, catalogs) = (
            &report.objects.all,
            &report.objects.of_logs,
            &report.objects.of_catalogs,
        );
        let used = all.used.objects - logs.used.objects - catalogs.used.objects;
        assert_eq!((report.snapshots, used), (1, 1));
        // A root and a part.
        assert_eq!(catalogs.used.objects, 2);
    }
    world.assert_all_readable();
    world.assert_all_visible().await;
    world.delete_snapshot().await;
    for _ in 0..2 {
        world.advance(WINDOW + 1);
        sweep(&world).await.unwrap();
    }
    assert_eq!(world.stored(), 0);
}

#[tokio::test]
async fn a_snapshot_that_slept_while_it_was_made_is_taken_back() {
    let world = new_world().await;
    let mut writer = Writer::new(1, &world);
    writer.write(0, 1);
    writer.finish().await;
    let gate = Arc::new(Semaphore::new(0));
    let door = Arc::new(Door::gated(&world, Arc::clone(&gate)));
    door.set_clock(world.now());
    let making = Arc::clone(&door);
    let task = tokio::spawn(async move { make_snapshot(making, &"v=1".parse().unwrap()).await });
    gate.add_permits(5);
    settle().await;
    world.advance(WINDOW / 2 + 1000);
    door.set_clock(world.now());
    gate.add_permits(1000);
    let err = task.await.unwrap().unwrap_err();
    assert!(matches!(err, SnapshotError::Slow { .. }), "{err}");
    let report = sweep(&world).await.unwrap();
    assert_eq!((report.snapshots, report.names), (0, 1));
}

#[tokio::test]
async fn a_sweep_that_slept_deletes_nothing() {
    let world = new_world().await;
    let mut writer = Writer::new(1, &world);
    writer.write(0, 1);
    writer.finish().await;
    writer.delete(0);
    writer.finish().await;
    for _ in 0..2 {
        world.advance(WINDOW + 1);
        if world.now() < START + 2 * WINDOW {
            sweep(&world).await.unwrap();
        }
    }
    let sweeper = Sweeper::begin(&world);
    // It has read what is in use, and looks at the objects.
    sweeper.gate.add_permits(5);
    settle().await;
    world.advance(WINDOW / 2 + 1);
    sweeper.gate.add_permits(1000);
    let err = sweeper.task.await.unwrap().unwrap_err();
    assert!(matches!(err, SweepError::Slept { .. }), "{err}");
    assert_eq!(world.stored(), 1);
    assert_eq!(blobs(&sweep(&world).await.unwrap()).deleted.objects, 1);
}
