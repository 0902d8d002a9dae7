//! Sweeps under proptest: writers, forks, snapshots and sweepers, each of which may sleep or die between any two of its requests,
//! on a bucket in memory with a clock that is turned by hand.
//!
//! The bucket checks each deletion: what an acknowledged name refers to, in any view of the volume, never goes.

mod world;
mod writer;

use std::{sync::Arc, time::Duration};

use proptest::prelude::*;
use tokio::{sync::Semaphore, task::JoinHandle};

use self::{
    world::{Door, World, make_snapshot},
    writer::Writer,
};
use super::{SweepError, SweepOptions, SweepReport, sweep_by};
use crate::{
    namespace::snapshot::SnapshotError,
    tier::{
        Body, Bucket, SharedBucket, layout,
        sweeping::{self, SweepList, WindowJson},
    },
};

const START: u64 = 1_767_225_600_000;
const WINDOW: u64 = 1_000_000;
const WRITERS: usize = 3;
const SWEEPERS: usize = 2;

#[derive(Clone, Debug)]
enum Action {
    Write { writer: usize, path: u8, content: u8 },
    Delete { writer: usize, path: u8 },
    Upload { writer: usize },
    Look { writer: usize },
    Send { writer: usize },
    Acknowledge { writer: usize },
    Restart { writer: usize },
    Fork,
    Snapshot,
    DeleteSnapshot,
    Begin { sweeper: usize },
    Step { sweeper: usize, requests: usize },
    Die { sweeper: usize },
    Advance { millis: u64 },
}

fn any_action() -> impl Strategy<Value = Action> {
    let writer = 0..WRITERS;
    let sweeper = 0..SWEEPERS;
    prop_oneof![
        6 => (writer.clone(), 0u8..4, 0u8..4).prop_map(|(writer, path, content)| Action::Write { writer, path, content }),
        4 => (writer.clone(), 0u8..4).prop_map(|(writer, path)| Action::Delete { writer, path }),
        6 => writer.clone().prop_map(|writer| Action::Upload { writer }),
        6 => writer.clone().prop_map(|writer| Action::Look { writer }),
        6 => writer.clone().prop_map(|writer| Action::Send { writer }),
        6 => writer.clone().prop_map(|writer| Action::Acknowledge { writer }),
        1 => writer.prop_map(|writer| Action::Restart { writer }),
        1 => Just(Action::Fork),
        1 => Just(Action::Snapshot),
        1 => Just(Action::DeleteSnapshot),
        6 => sweeper.clone().prop_map(|sweeper| Action::Begin { sweeper }),
        8 => (sweeper.clone(), 1usize..60).prop_map(|(sweeper, requests)| Action::Step { sweeper, requests }),
        1 => sweeper.prop_map(|sweeper| Action::Die { sweeper }),
        3 => (0..WINDOW / 8).prop_map(|millis| Action::Advance { millis }),
        3 => (0..WINDOW / 2).prop_map(|millis| Action::Advance { millis }),
        3 => (0..WINDOW * 5 / 4).prop_map(|millis| Action::Advance { millis }),
    ]
}

fn options() -> SweepOptions {
    SweepOptions {
        window: None,
        dry_run: false,
        wait: false,
        price: 0.0,
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

/// Runs a sweep to its end.
async fn sweep(world: &Arc<World>) -> Swept {
    let bucket: SharedBucket = Arc::new(Door::open(world));
    sweep_by(&bucket, world.clock(), &options(), &mut |_| {}).await
}

async fn settle() {
    for _ in 0..60 {
        tokio::task::yield_now().await;
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
            Action::Send { writer } => writers[writer].send().await,
            Action::Acknowledge { writer } => writers[writer].acknowledge(),
            Action::Restart { writer } => writers[writer].restart(),
            Action::Fork => world.fork(),
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
            Action::Advance { millis } => world.advance(millis),
        }
        settle().await;
        if let Some(wrong) = world.wrong() {
            panic!("{wrong}");
        }
    }
    for sweeper in sweepers.into_iter().flatten() {
        sweeper.task.abort();
    }
    converge(&world, &mut writers).await;
}

/// Lets everyone finish; then every name can be read, and nothing is left that none refers to.
async fn converge(world: &Arc<World>, writers: &mut [Writer]) {
    for writer in writers.iter_mut() {
        writer.finish().await;
    }
    world.assert_all_readable();
    for _ in 0..6 {
        world.advance(WINDOW + 1);
        sweep(world).await.unwrap();
        assert_eq!(world.wrong(), None);
    }
    world.assert_all_readable();
    world.assert_nothing_unused();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 3000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_a_name_refers_to_is_ever_deleted(actions in prop::collection::vec(any_action(), 1..120)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
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
    assert_eq!(sweep(&world).await.unwrap().used.objects, 2);
    world.advance(WINDOW + 1);
    let report = sweep(&world).await.unwrap();
    assert_eq!((report.condemned.objects, report.deleted.objects), (1, 0));
    let due = report.next_due_millis.unwrap();
    world.advance(WINDOW - 1);
    let report = sweep(&world).await.unwrap();
    assert_eq!((report.waiting.objects, report.condemned.objects), (1, 0));
    world.advance(due - world.now());
    assert_eq!(sweep(&world).await.unwrap().deleted.objects, 1);
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
    writer.send().await;
    assert_eq!(world.segments(), 0);
}

#[tokio::test]
async fn what_is_not_known_below_volumes_stops_a_sweep() {
    for key in [
        "volumes/v/odd",
        "volumes/v/log/20260101T0000/odd",
        "volumes/odd",
        "volumes/V/volume.json",
    ] {
        let world = new_world().await;
        Door::open(&world).put_new(key, Body::raw("x")).await.unwrap();
        let err = sweep(&world).await.unwrap_err();
        assert!(
            matches!(&err, SweepError::Unknown { key: told } if told == key),
            "{err}"
        );
    }
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
        assert_eq!((report.snapshots, report.used.objects), (1, 1));
    }
    world.assert_all_readable();
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
    assert_eq!(sweep(&world).await.unwrap().deleted.objects, 1);
}
