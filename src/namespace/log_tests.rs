//! The whole log under proptest: writers, followers, a bucket with a clock that is
//! turned by hand, lost replies, slow uploads and restarts.

mod cases;
mod layers;
mod machine;
mod world;

use std::sync::Arc;

use proptest::prelude::*;
use tokio::{sync::Mutex, task::JoinHandle};

use self::{machine::Machine, world::World};
use super::{follow::Reader, publish::Writer, segment};

const START: u64 = 1_767_225_600_000;
const SKEWS: [i64; 3] = [0, 1500, -900];

#[derive(Clone, Debug)]
enum Action {
    Change {
        machine: usize,
        path: u8,
        value: Option<u32>,
        durable_after: u64,
    },
    OpenFile {
        machine: usize,
        path: u8,
    },
    Publish {
        machine: usize,
    },
    Poll {
        machine: usize,
        full: bool,
    },
    Keep {
        machine: usize,
    },
    Restart {
        machine: usize,
    },
    Advance {
        millis: u64,
    },
}

fn any_action() -> impl Strategy<Value = Action> {
    let machine = 0..SKEWS.len();
    let durable_after = prop_oneof![2 => Just(0), 1 => 0u64..12_000];
    prop_oneof![
        6 => (machine.clone(), 0u8..6, prop::option::weighted(0.8, any::<u32>()), durable_after).prop_map(
            |(machine, path, value, durable_after)| Action::Change { machine, path, value, durable_after }
        ),
        1 => (machine.clone(), 0u8..6).prop_map(|(machine, path)| Action::OpenFile { machine, path }),
        6 => machine.clone().prop_map(|machine| Action::Publish { machine }),
        6 => (machine.clone(), prop::bool::weighted(0.2)).prop_map(|(machine, full)| Action::Poll { machine, full }),
        2 => machine.clone().prop_map(|machine| Action::Keep { machine }),
        1 => machine.prop_map(|machine| Action::Restart { machine }),
        4 => (0u64..4000).prop_map(|millis| Action::Advance { millis }),
        2 => (0u64..30_000).prop_map(|millis| Action::Advance { millis }),
        1 => (0u64..400_000).prop_map(|millis| Action::Advance { millis }),
    ]
}

/// A running daemon; dropping it is a crash.
struct Daemon {
    machine: Arc<Machine>,
    writer: Arc<Mutex<Writer<Machine>>>,
    reader: Arc<Mutex<Reader<Machine>>>,
    tasks: [Option<JoinHandle<()>>; 2],
}

impl Daemon {
    fn start(machine: &Arc<Machine>) -> Self {
        Self {
            machine: Arc::clone(machine),
            writer: Arc::new(Mutex::new(machine.writer())),
            reader: Arc::new(Mutex::new(machine.reader())),
            tasks: [None, None],
        }
    }

    /// Lets `work` run beside, unless it runs already; a panic in it is a panic here.
    async fn run(&mut self, slot: usize, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(task) = &mut self.tasks[slot] {
            if !task.is_finished() {
                return;
            }
            task.await.unwrap();
        }
        self.tasks[slot] = Some(tokio::spawn(work));
    }

    async fn publish(&mut self) {
        let writer = Arc::clone(&self.writer);
        let work = async move {
            // What failed is tried again by a later action.
            let _ = writer.lock().await.step().await;
        };
        self.run(0, work).await;
    }

    async fn poll(&mut self, full: bool) {
        let reader = Arc::clone(&self.reader);
        let work = async move {
            let _ = reader.lock().await.poll(full).await;
        };
        self.run(1, work).await;
    }

    async fn crash(&mut self) {
        for task in self.tasks.iter_mut().filter_map(Option::take) {
            task.abort();
            if let Err(err) = task.await {
                assert!(err.is_cancelled(), "{err}");
            }
        }
    }
}

async fn play(seed: u64, actions: Vec<Action>) {
    let world = World::new(seed, START);
    let machines: Vec<_> = (1..)
        .zip(SKEWS)
        .map(|(id, skew)| Machine::new(id, skew, &world))
        .collect();
    for machine in &machines {
        machine.meet(&machines);
    }
    let mut daemons: Vec<_> = machines.iter().map(Daemon::start).collect();
    for action in actions {
        match action {
            Action::Change {
                machine,
                path,
                value,
                durable_after,
            } => {
                machines[machine].change(&[b'a' + path], value, durable_after);
            }
            Action::OpenFile { machine, path } => machines[machine].open_file(&[b'a' + path]),
            Action::Publish { machine } => daemons[machine].publish().await,
            Action::Poll { machine, full } => daemons[machine].poll(full).await,
            Action::Keep { machine } => {
                if let Ok(mut reader) = daemons[machine].reader.try_lock() {
                    reader.keep().unwrap();
                }
            }
            Action::Restart { machine } => {
                daemons[machine].crash().await;
                daemons[machine] = Daemon::start(&machines[machine]);
            }
            Action::Advance { millis } => world.advance(millis),
        }
        for _ in 0..40 {
            tokio::task::yield_now().await;
        }
    }
    converge(&world, &mut daemons).await;
    for machine in &machines {
        machine.part();
    }
}

/// Ends all faults, and checks that everyone comes to see the same.
async fn converge(world: &World, daemons: &mut [Daemon]) {
    for daemon in daemons.iter_mut() {
        daemon.crash().await;
        daemon.machine.close_all();
    }
    world.heal();
    // The slowest request has arrived then, and all is durable.
    world.advance(60_000);
    for daemon in daemons.iter() {
        daemon.writer.lock().await.step().await.unwrap();
        assert_eq!(daemon.machine.unpublished(), 0);
    }
    for daemon in daemons.iter() {
        daemon.reader.lock().await.poll(true).await.unwrap();
    }
    for daemon in &daemons[1..] {
        assert_eq!(daemon.machine.registers(), daemons[0].machine.registers());
    }
    for (key, bytes) in world.segments() {
        let decoded = segment::decode(&bytes).unwrap();
        for daemon in daemons
            .iter()
            .filter(|daemon| daemon.machine.id != decoded.head.machine)
        {
            for change in &decoded.changes {
                let name = (change.path.clone(), change.stamp);
                assert!(
                    daemon.machine.saw(&name),
                    "{:?} missed {name:?} of {key}",
                    daemon.machine.id
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn everyone_comes_to_see_the_same_and_nobody_sees_it_out_of_order(
        seed in any::<u64>(),
        actions in prop::collection::vec(any_action(), 1..150),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(play(seed, actions));
    }
}
