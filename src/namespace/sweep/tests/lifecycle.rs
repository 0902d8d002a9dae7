//! A lifecycle rule in the place of sweeps, under proptest: writers, followers, compactors and machines that keep young
//! what they use, each of which may sleep or die between any two of its requests. The rule deletes each blob and
//! pack the moment it is as old as the lifetime, which is the shortest that a store may have: two windows.
//!
//! The bucket checks each of these deletions: what was named or used less than a quarter of the lifetime ago never
//! goes. And when some machine of the fleet looks at all names as often as it is documented, no name ever loses its bytes.

use std::{sync::Arc, time::Duration};

use proptest::prelude::*;
use tokio::{sync::Semaphore, task::JoinHandle};

use super::{
    COMPACTORS, Compactor, FOLLOWERS, START, WINDOW, WRITERS,
    follower::Follower,
    new_world, settle,
    world::{Door, World},
    writer::Writer,
};
use crate::{
    namespace::touch::Pace,
    tier::{SharedBucket, retaining::RetainingBucket},
};

const LIFETIME: u64 = 2 * WINDOW;
const KEEPERS: usize = 2;

#[derive(Clone, Debug)]
enum Action {
    Write { writer: usize, path: u8, content: u8 },
    Delete { writer: usize, path: u8 },
    Upload { writer: usize },
    Look { writer: usize },
    Send { writer: usize, slow: bool },
    Acknowledge { writer: usize },
    Restart { writer: usize },
    Keep { keeper: usize },
    KeepStep { keeper: usize, requests: usize },
    KeeperDies { keeper: usize },
    Compact { compactor: usize, requests: usize },
    CompactorDies { compactor: usize },
    Poll { follower: usize },
    FollowerDies { follower: usize },
    Advance { millis: u64 },
}

fn any_action() -> impl Strategy<Value = Action> {
    let writer = 0..WRITERS;
    let keeper = 0..KEEPERS;
    let compactor = 0..COMPACTORS;
    let follower = 0..FOLLOWERS;
    prop_oneof![
        6 => (writer.clone(), 0u8..4, 0u8..4).prop_map(|(writer, path, content)| Action::Write { writer, path, content }),
        2 => (writer.clone(), 0u8..4).prop_map(|(writer, path)| Action::Delete { writer, path }),
        6 => writer.clone().prop_map(|writer| Action::Upload { writer }),
        6 => writer.clone().prop_map(|writer| Action::Look { writer }),
        6 => (writer.clone(), prop::bool::weighted(0.2)).prop_map(|(writer, slow)| Action::Send { writer, slow }),
        6 => writer.clone().prop_map(|writer| Action::Acknowledge { writer }),
        1 => writer.prop_map(|writer| Action::Restart { writer }),
        4 => keeper.clone().prop_map(|keeper| Action::Keep { keeper }),
        6 => (keeper.clone(), 1usize..8).prop_map(|(keeper, requests)| Action::KeepStep { keeper, requests }),
        1 => keeper.prop_map(|keeper| Action::KeeperDies { keeper }),
        2 => (compactor.clone(), 1usize..40)
            .prop_map(|(compactor, requests)| Action::Compact { compactor, requests }),
        1 => compactor.prop_map(|compactor| Action::CompactorDies { compactor }),
        2 => follower.clone().prop_map(|follower| Action::Poll { follower }),
        1 => follower.prop_map(|follower| Action::FollowerDies { follower }),
        4 => (0..LIFETIME / 16).prop_map(|millis| Action::Advance { millis }),
        4 => (0..LIFETIME / 2).prop_map(|millis| Action::Advance { millis }),
        2 => (0..LIFETIME * 2).prop_map(|millis| Action::Advance { millis }),
    ]
}

/// The bucket as every machine of a store with a rule sees it.
fn kept(door: Door) -> SharedBucket {
    let lifetime = Duration::from_millis(LIFETIME);
    Arc::new(RetainingBucket::new(Arc::new(door), Some(Some(lifetime))))
}

/// Looks at the blobs of all names that are there now, as a machine that uses all of them.
async fn keep_all(world: Arc<World>, bucket: SharedBucket) {
    for key in world.objects_in_use() {
        let asked = world.now();
        if bucket.head(&key).await.unwrap().is_some() {
            world.promise(&key, asked);
        }
    }
}

/// A machine that keeps young what it uses, and makes as many requests as it is let.
struct Keeper {
    gate: Arc<Semaphore>,
    task: JoinHandle<()>,
}

impl Keeper {
    fn begin(world: &Arc<World>) -> Self {
        let gate = Arc::new(Semaphore::new(0));
        let bucket = kept(Door::gated(world, Arc::clone(&gate)));
        let task = tokio::spawn(keep_all(Arc::clone(world), bucket));
        Self { gate, task }
    }
}

/// How long it takes at most until a name that is used on and on is looked at again.
fn looked_at_within() -> u64 {
    Pace::of(Duration::from_millis(LIFETIME)).good_for().as_millis() as u64
}

/// `is_used`: some machine uses all names.
async fn play(actions: Vec<Action>, is_used: bool) {
    let world = new_world().await;
    let mut writers: Vec<_> = (1..=WRITERS as u64)
        .map(|id| Writer::through(id, &world, kept(Door::open(&world))))
        .collect();
    let mut keepers: Vec<Option<Keeper>> = (0..KEEPERS).map(|_| None).collect();
    let mut compactors: Vec<Option<Compactor>> = (0..COMPACTORS).map(|_| None).collect();
    let mut followers: Vec<_> = (0..FOLLOWERS).map(|_| Follower::new(&world)).collect();
    let mut used = START;
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
            Action::Keep { keeper } => {
                let slot = &mut keepers[keeper];
                if slot.as_ref().is_none_or(|keeper| keeper.task.is_finished()) {
                    *slot = Some(Keeper::begin(&world));
                }
            }
            Action::KeepStep { keeper, requests } => {
                if let Some(keeper) = &keepers[keeper] {
                    keeper.gate.add_permits(requests);
                }
            }
            Action::KeeperDies { keeper } => {
                if let Some(keeper) = keepers[keeper].take() {
                    keeper.task.abort();
                }
            }
            Action::Compact { compactor, requests } => {
                let slot = &mut compactors[compactor];
                if slot.as_ref().is_none_or(|compactor| compactor.task.is_finished()) {
                    *slot = Some(Compactor::begin(&world, compactor));
                }
                slot.as_ref().expect("it was begun").gate.add_permits(requests);
            }
            Action::CompactorDies { compactor } => {
                if let Some(compactor) = compactors[compactor].take() {
                    compactor.task.abort();
                }
            }
            Action::Poll { follower } => followers[follower].poll().await,
            Action::FollowerDies { follower } => followers[follower].die(),
            Action::Advance { mut millis } => {
                while is_used && world.now() + millis > used + looked_at_within() {
                    let until = (used + looked_at_within()).saturating_sub(world.now());
                    world.advance(until);
                    world.age_out(LIFETIME);
                    keep_all(Arc::clone(&world), kept(Door::open(&world))).await;
                    used = world.now();
                    millis -= until;
                }
                world.advance(millis);
                world.age_out(LIFETIME);
            }
        }
        settle().await;
        if let Some(wrong) = world.wrong() {
            panic!("{wrong}");
        }
        if is_used {
            world.assert_all_readable();
        }
    }
    for keeper in keepers.into_iter().flatten() {
        keeper.task.abort();
    }
    for compactor in compactors.into_iter().flatten() {
        compactor.gate.add_permits(1000);
    }
    settle().await;
    for writer in &mut writers {
        writer.finish().await;
    }
    // The log and the catalogs are not the rule's to delete.
    world.assert_all_visible().await;
    let late = &mut Follower::new(&world);
    for follower in followers.iter_mut().chain([late]) {
        follower.poll().await;
        follower.assert_converged().await;
    }
    if is_used {
        world.assert_all_readable();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 3000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_is_named_or_used_ages_out(
        actions in prop::collection::vec(any_action(), 1..120),
        is_used in any::<bool>(),
    ) {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_time().max_blocking_threads(1).build().unwrap();
        runtime.block_on(play(actions, is_used));
    }
}

#[tokio::test]
async fn what_nobody_uses_ages_out_and_can_be_made_again() {
    let world = new_world().await;
    let mut writer = Writer::through(1, &world, kept(Door::open(&world)));
    writer.write(0, 1);
    writer.finish().await;
    assert_eq!(world.stored(), 1);
    world.advance(LIFETIME - 1);
    world.age_out(LIFETIME);
    assert_eq!(world.stored(), 1);
    world.advance(1);
    world.age_out(LIFETIME);
    assert_eq!((world.stored(), world.wrong()), (0, None));
    writer.write(1, 1);
    writer.finish().await;
    assert_eq!(world.stored(), 1);
    world.assert_all_readable();
}
