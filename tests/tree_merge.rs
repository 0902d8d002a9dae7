//! The laws of the merge (`namespace::tree`), held by random histories.
//!
//! Several machines change their trees and hear of each other's changes late,
//! twice and out of order. In the end every tree must show exactly what a
//! naive reading of the laws makes of the set of all changes. So must the trees
//! of machines whose volume lies over others.

#[path = "support/publish.rs"]
mod publish;

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use casmount::{
    base::{clock::Stamp, id::MachineId},
    namespace::{
        TreeError,
        change::{Entry, PathChange},
        tree::{AttrChange, NewNode, RenameMode, Tree},
    },
    store::{
        cachedir::LastStop,
        ledger::{Ledger, LedgerOptions},
        rows::{Ino, NodeKind, NodeRow, TreeLayer},
    },
};
use proptest::prelude::*;
use publish::publish;

/// What a user sees: for each path whether it is a directory, and its mode.
type View = BTreeMap<Vec<u8>, Shown>;
/// Whether it is a directory, and its mode.
type Shown = (bool, u32);

/// A change, and the volume that it was made in.
type Told = (usize, PathChange);

/// The greater one counts (law 1).
type Rank = (Reverse<TreeLayer>, Stamp);

/// One machine: a tree over a ledger of its own.
struct Machine {
    id: MachineId,
    tree: Arc<Tree>,
    /// The volume it has mounted, and those below.
    stack: &'static [usize],
    _dir: tempfile::TempDir,
}

impl Machine {
    fn new(number: u64, stack: &'static [usize], clock: &Arc<AtomicU64>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (ledger, _) = Ledger::open(dir.path(), LastStop::Clean, &LedgerOptions::default()).unwrap();
        let ledger = Arc::new(ledger);
        let clock = Arc::clone(clock);
        // Clocks of machines differ by up to a few ticks, and stand still at times.
        let time = Arc::new(move || 1_000_000 + clock.load(Ordering::Relaxed) / 3 + number % 3);
        let id = MachineId(number);
        Self {
            id,
            tree: Tree::open(ledger, id, time).unwrap(),
            stack,
            _dir: dir,
        }
    }

    /// Hears of changes, of its volume and of those below, but not of its own.
    fn hear(&self, changes: &[Told]) {
        let mut layered = self.layered(changes);
        layered.retain(|(_, change)| change.stamp.machine != self.id);
        for batch in layered.chunk_by(|one, next| one.0 == next.0) {
            let changes = batch.iter().map(|(_, change)| change.clone());
            self.tree.apply(batch[0].0, changes.collect()).unwrap();
        }
    }

    /// The changes that concern it, each with its layer here.
    fn layered(&self, changes: &[Told]) -> Vec<(TreeLayer, PathChange)> {
        let layer = |volume| self.stack.iter().position(|below| *below == volume);
        let told = changes.iter();
        told.filter_map(|(volume, change)| Some((TreeLayer::new(layer(*volume)? as u64)?, change.clone())))
            .collect()
    }

    /// Everything it has to tell, in order.
    fn publish(&self) -> Vec<Told> {
        let changes = publish(&self.tree).into_iter();
        changes.map(|change| (self.stack[0], change)).collect()
    }

    fn view(&self) -> View {
        let mut view = View::new();
        self.view_below(Ino::ROOT, b"", &mut view);
        view
    }

    fn view_below(&self, dir: Ino, path: &[u8], view: &mut View) {
        let (names, next) = self.tree.list(dir, None, 10_000).unwrap();
        assert!(next.is_none());
        let node = self.tree.node(dir).unwrap().unwrap();
        let state = node.dir.as_ref().unwrap();
        let subdirs = names
            .iter()
            .filter(|(_, node)| node.kind == NodeKind::Dir)
            .count() as u64;
        assert_eq!(
            (state.visible_children, state.subdirs),
            (names.len() as u64, subdirs),
            "counts of {:?}",
            String::from_utf8_lossy(path)
        );
        for (name, node) in names {
            let child = join(path, &name);
            assert_eq!(self.tree.lookup(dir, &name).unwrap().as_deref(), Some(&*node));
            let is_dir = node.kind == NodeKind::Dir;
            view.insert(child.clone(), (is_dir, node.perm));
            if is_dir {
                assert_eq!(self.tree.dir_path(node.ino).unwrap(), child);
                self.view_below(node.ino, &child, view);
            } else {
                assert!(node.nlink >= 1);
            }
        }
    }

    fn parent(&self, path: &[u8]) -> Result<(Ino, Vec<u8>), TreeError> {
        let (above, name) = match path.iter().rposition(|&byte| byte == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&b""[..], path),
        };
        let dir = self.tree.resolve(above)?;
        if dir.kind != NodeKind::Dir {
            return Err(TreeError::NotDirectory);
        }
        Ok((dir.ino, name.to_vec()))
    }

    fn act(&self, step: &Step) -> Result<(), TreeError> {
        match step {
            Step::Make { path, dir, perm } => {
                let (parent, name) = self.parent(path)?;
                let kind = if *dir { NodeKind::Dir } else { NodeKind::File };
                let new = NewNode {
                    kind,
                    perm: *perm,
                    uid: 0,
                    gid: 0,
                    rdev: 0,
                    target: Vec::new(),
                    staging: None,
                };
                self.tree.create(parent, &name, new).map(drop)
            }
            Step::Remove { path } => {
                let (parent, name) = self.parent(path)?;
                match self.tree.unlink(parent, &name) {
                    Err(TreeError::IsDirectory) => self.tree.rmdir(parent, &name).map(drop),
                    other => other.map(drop),
                }
            }
            Step::Rename { from, to, exchange } => {
                let (from, to) = (self.parent(from)?, self.parent(to)?);
                let mode = if *exchange {
                    RenameMode::Exchange
                } else {
                    RenameMode::Replace
                };
                self.tree.rename((from.0, &from.1), (to.0, &to.1), mode).map(drop)
            }
            Step::Mode { path, perm } => {
                let node: Arc<NodeRow> = self.tree.resolve(path)?;
                let change = AttrChange {
                    perm: Some(*perm),
                    ..AttrChange::default()
                };
                self.tree.set_attributes(node.ino, change, 0).map(drop)
            }
        }
    }
}

/// What a program does on one machine.
#[derive(Clone, Debug)]
enum Step {
    Make {
        path: Vec<u8>,
        dir: bool,
        perm: u32,
    },
    Remove {
        path: Vec<u8>,
    },
    Rename {
        from: Vec<u8>,
        to: Vec<u8>,
        exchange: bool,
    },
    Mode {
        path: Vec<u8>,
        perm: u32,
    },
}

/// What happens next in a history.
#[derive(Clone, Debug)]
enum Event {
    Act(usize, Step),
    Publish(usize),
    /// A machine hears of some of what was published, in any order. Of another volume it hears nothing.
    Hear(usize, Vec<prop::sample::Index>),
}

/// Names in the paths of a history: few, because collisions are what is looked for.
type Names = &'static [&'static str];

/// Paths of up to three names.
fn path(names: Names) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(names), 1..4).prop_map(|names| names.join("/").into_bytes())
}

fn step(names: Names) -> impl Strategy<Value = Step> {
    // Root-owned directories that live on for their children show 0755: other modes tell them apart.
    let perm = prop::sample::select(vec![0o600, 0o640, 0o711, 0o777]);
    prop_oneof![
        4 => (path(names), any::<bool>(), perm.clone()).prop_map(|(path, dir, perm)| Step::Make { path, dir, perm }),
        2 => path(names).prop_map(|path| Step::Remove { path }),
        2 => (path(names), path(names), prop::bool::weighted(0.2)).prop_map(|(from, to, exchange)| Step::Rename { from, to, exchange }),
        1 => (path(names), perm).prop_map(|(path, perm)| Step::Mode { path, perm }),
    ]
}

fn event(machines: usize, names: Names) -> impl Strategy<Value = Event> {
    let which = prop::collection::vec(any::<prop::sample::Index>(), 1..8);
    prop_oneof![
        6 => (0..machines, step(names)).prop_map(|(machine, step)| Event::Act(machine, step)),
        2 => (0..machines).prop_map(Event::Publish),
        3 => (0..machines, which).prop_map(|(machine, which)| Event::Hear(machine, which)),
    ]
}

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() {
        name.to_vec()
    } else {
        [path, b"/", name].concat()
    }
}

/// The laws, read naively: what the set of all changes shows.
fn lawful_view(changes: &[(TreeLayer, PathChange)]) -> View {
    let mut registers: BTreeMap<&[u8], (Rank, Option<Shown>)> = BTreeMap::new();
    for (layer, change) in changes {
        let value = change
            .entry
            .as_ref()
            .map(|entry| (entry.kind == NodeKind::Dir, entry.perm));
        let rank = (Reverse(*layer), change.stamp);
        let register = registers.entry(&change.path).or_insert((rank, value));
        if rank > register.0 {
            *register = (rank, value);
        }
    }
    let mut view = View::new();
    for (path, (_, value)) in &registers {
        let Some(value) = value else { continue };
        view.entry(path.to_vec()).or_insert(*value);
        // A live child keeps its ancestors alive, as directories.
        for (at, _) in path.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
            let above = &path[..at];
            let own = registers.get(above).and_then(|(_, value)| *value);
            let shown = own.filter(|(is_dir, _)| *is_dir).unwrap_or((true, 0o755));
            view.insert(above.to_vec(), shown);
        }
    }
    view
}

/// Lets a history happen on machines with these stacks, and compares every tree with the laws.
fn assert_lawful(stacks: &[&'static [usize]], events: &[Event]) -> Result<(), TestCaseError> {
    let clock = Arc::new(AtomicU64::new(0));
    let numbered = stacks.iter().zip(1..);
    let machines: Vec<Machine> = numbered
        .map(|(stack, number)| Machine::new(number, stack, &clock))
        .collect();
    let mut log: Vec<Told> = Vec::new();
    for event in events {
        clock.fetch_add(1, Ordering::Relaxed);
        match event {
            // What a program may not do is refused; the refusals are another test's.
            Event::Act(machine, step) => drop(machines[*machine].act(step)),
            Event::Publish(machine) => log.extend(machines[*machine].publish()),
            Event::Hear(machine, which) => {
                if !log.is_empty() {
                    let heard = which.iter().map(|index| log[index.index(log.len())].clone());
                    machines[*machine].hear(&heard.collect::<Vec<_>>());
                }
            }
        }
        // Counts and paths hold at every moment.
        for machine in &machines {
            machine.view();
        }
    }
    for machine in &machines {
        log.extend(machine.publish());
    }
    for (number, machine) in machines.iter().enumerate() {
        let mut rest = log.clone();
        if number % 2 == 1 {
            rest.reverse();
        }
        machine.hear(&rest);
        prop_assert_eq!(
            machine.view(),
            lawful_view(&machine.layered(&log)),
            "machine {}",
            number
        );
    }
    Ok(())
}

fn stamped(millis: u64, machine: MachineId) -> Stamp {
    Stamp {
        millis,
        counter: 0,
        machine,
    }
}

/// `cp -a` sets the time of a directory when all below it is made; a file that is closed a moment later
/// comes with its own directory behind that.
#[test]
fn a_directory_keeps_its_time_when_a_file_of_one_below_it_comes_before_that_one() {
    let machine = Machine::new(9, &[0], &Arc::new(AtomicU64::new(0)));
    let told = |millis, path: &str, kind, mtime| PathChange {
        path: path.into(),
        stamp: stamped(millis, MachineId(1)),
        entry: Some(Entry {
            mtime,
            ..Entry::new(kind, 0o755)
        }),
    };
    let mtime = |path: &[&str]| {
        let of = |dir: Ino, name: &&str| machine.tree.lookup(dir, name.as_bytes()).unwrap().unwrap().ino;
        let ino = path.iter().fold(Ino::ROOT, of);
        machine.tree.node(ino).unwrap().unwrap().mtime
    };
    let hear = |change| machine.tree.apply(TreeLayer::TOP, vec![change]).unwrap();

    hear(told(1, "outer", NodeKind::Dir, 111));
    hear(told(2, "outer/inner/late", NodeKind::Fifo, 222));
    assert_eq!(mtime(&["outer"]), 111);
    hear(told(3, "outer/inner", NodeKind::Dir, 333));
    assert_eq!((mtime(&["outer"]), mtime(&["outer", "inner"])), (111, 333));
    // A name that nobody saw before is a change of the directory.
    hear(told(4, "outer/more", NodeKind::Fifo, 444));
    assert_eq!(mtime(&["outer"]), 4_000_000);
}

/// Registers of three layers as they may be in the buckets, and an order in which they arrive.
fn registers() -> impl Strategy<Value = Vec<(TreeLayer, PathChange)>> {
    let perm = prop::sample::select(vec![0o600, 0o640, 0o711, 0o777]);
    let register = (
        0u64..3,
        path(&["a", "b", "c"]),
        prop::option::weighted(0.7, (any::<bool>(), perm)),
    );
    prop::collection::vec(register, 1..40)
        .prop_map(|registers| {
            let told = registers.into_iter().zip(1..);
            told.map(|((layer, path, what), millis)| {
                let kind = |dir| if dir { NodeKind::Dir } else { NodeKind::Fifo };
                let entry = what.map(|(dir, perm)| Entry::new(kind(dir), perm));
                let stamp = stamped(millis, MachineId(layer + 1));
                let change = PathChange { path, stamp, entry };
                (TreeLayer::new(layer).unwrap(), change)
            })
            .collect::<Vec<_>>()
        })
        .prop_shuffle()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_machine_shows_what_the_laws_make_of_all_changes(events in prop::collection::vec(event(3, &["a", "b", "c"]), 1..60)) {
        assert_lawful(&[&[0], &[0], &[0]], &events)?;
    }

    /// Two machines on a fork of a fork, and one on each volume below, which never sees what is above it.
    #[test]
    fn every_machine_shows_what_the_laws_make_of_its_stack(events in prop::collection::vec(event(4, &["a", "b"]), 1..100)) {
        assert_lawful(&[&[0, 1, 2], &[0, 1, 2], &[1, 2], &[2]], &events)?;
    }

    #[test]
    fn registers_of_several_layers_show_the_same_in_any_order_and_in_any_batches(
        registers in registers(),
        batches in prop::collection::vec(1usize..8, 1..40),
    ) {
        let machine = Machine::new(9, &[0], &Arc::new(AtomicU64::new(0)));
        let mut rest = registers.as_slice();
        for size in batches.into_iter().chain([usize::MAX]) {
            let (batch, later) = rest.split_at(size.min(rest.len()));
            for layer in (0..3).filter_map(TreeLayer::new) {
                let of_layer = batch.iter().filter(|(of, _)| *of == layer);
                machine.tree.apply(layer, of_layer.map(|(_, change)| change.clone()).collect()).unwrap();
            }
            // Some of it comes twice.
            let (layer, change) = registers[size % registers.len()].clone();
            if !later.iter().any(|(_, to_come)| to_come.stamp == change.stamp) {
                machine.tree.apply(layer, vec![change]).unwrap();
            }
            rest = later;
            machine.view();
        }
        prop_assert_eq!(machine.view(), lawful_view(&registers));
    }
}
