//! Names that expire, in the trees of machines: the laws 1 and 8 of `namespace::tree`.

#[path = "support/publish.rs"]
mod publish;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use casmount::{
    base::{clock::Stamp, digest::Digest, id::MachineId},
    namespace::{
        change::{Entry, EntryBlob, EntryChunks, PathChange},
        touch::format::mark,
        tree::Tree,
    },
    store::{
        cachedir::LastStop,
        ledger::{Ledger, LedgerOptions},
        rows::{Ino, NodeKind, TreeLayer},
    },
};
use proptest::prelude::*;
use publish::publish;

const WRITER: MachineId = MachineId(7);
const NOW: u64 = 1_767_225_600_000;
const OLD: u64 = NOW - 31 * 24 * 3_600_000;

struct Machine {
    tree: Arc<Tree>,
    _dir: tempfile::TempDir,
}

impl Machine {
    fn new(number: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (ledger, _) = Ledger::open(dir.path(), LastStop::Clean, &LedgerOptions::default()).unwrap();
        let clock = AtomicU64::new(NOW);
        let time = Arc::new(move || clock.fetch_add(1, Ordering::Relaxed));
        let tree = Tree::open(Arc::new(ledger), MachineId(number), time).unwrap();
        tree.touched().turn_on();
        Self { tree, _dir: dir }
    }

    fn hear(&self, layer: TreeLayer, changes: &[PathChange]) {
        self.tree.apply(layer, changes.to_vec()).unwrap();
    }

    fn ino(&self, path: &str) -> Option<Ino> {
        self.tree.resolve(path.as_bytes()).ok().map(|node| node.ino)
    }
}

fn stamp(millis: u64, counter: u32) -> Stamp {
    Stamp {
        millis,
        counter,
        machine: WRITER,
    }
}

fn written(path: &str, stamp: Stamp) -> PathChange {
    let bytes = format!("{stamp:?}");
    let blob = EntryBlob {
        digest: Digest::of(bytes.as_bytes()),
        size: bytes.len() as u64,
        chunks: EntryChunks::Single,
        places: Vec::new(),
    };
    PathChange {
        path: path.into(),
        stamp,
        entry: Some(Entry {
            blob: Some(blob),
            ..Entry::new(NodeKind::File, 0o644)
        }),
    }
}

fn expired(change: &PathChange) -> PathChange {
    PathChange {
        stamp: change.stamp.expired((NOW / 3_600_000) as u32).unwrap(),
        entry: None,
        ..change.clone()
    }
}

const TOP: TreeLayer = TreeLayer::TOP;

#[test]
fn a_name_that_expires_goes_and_leaves_what_was_used() {
    let machine = Machine::new(1);
    let all = ["d/a", "d/b"].map(|path| written(path, stamp(OLD, 0)));
    machine.hear(TOP, &all);
    machine.tree.touch(machine.ino("d/b").unwrap());
    machine.hear(TOP, &[expired(&all[0])]);
    assert!(machine.ino("d/a").is_none() && machine.ino("d/b").is_some());
    assert!(publish(&machine.tree).is_empty());
}

#[test]
fn a_machine_that_used_a_name_writes_it_again_and_all_agree() {
    let (user, other) = (Machine::new(1), Machine::new(2));
    let file = written("d/a", stamp(OLD, 0));
    for machine in [&user, &other] {
        machine.hear(TOP, std::slice::from_ref(&file));
    }
    let ino = user.ino("d/a").unwrap();
    user.tree.touch(ino);
    // Also when it told that it did, but too late.
    assert!(!user.tree.touched().take().is_empty());
    for machine in [&user, &other] {
        machine.hear(TOP, &[expired(&file)]);
    }
    assert_eq!(user.ino("d/a"), Some(ino));
    assert!(other.ino("d/a").is_none());
    let again = publish(&user.tree);
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].entry, file.entry);
    assert!(again[0].stamp > expired(&file).stamp);
    other.hear(TOP, &again);
    assert!(other.ino("d/a").is_some());
    // The same deletion does nothing any more.
    user.hear(TOP, &[expired(&file)]);
    assert!(publish(&user.tree).is_empty() && user.ino("d/a") == Some(ino));
}

#[test]
fn a_deletion_by_a_machine_goes_through_whoever_uses_the_name() {
    let machine = Machine::new(1);
    let file = written("a", stamp(OLD, 0));
    machine.hear(TOP, std::slice::from_ref(&file));
    machine.tree.touch(machine.ino("a").unwrap());
    let deleted = PathChange {
        stamp: stamp(OLD + 1, 0),
        entry: None,
        ..file
    };
    machine.hear(TOP, &[deleted]);
    assert!(machine.ino("a").is_none());
}

#[test]
fn what_a_fork_uses_of_the_volume_below_comes_into_the_fork() {
    let machine = Machine::new(1);
    let below = TreeLayer::new(1).unwrap();
    let file = written("a", stamp(OLD, 0));
    machine.hear(below, std::slice::from_ref(&file));
    let ino = machine.ino("a").unwrap();
    machine.tree.touch(ino);
    assert_eq!(machine.tree.marks_of(&[ino], below).unwrap(), [mark(b"a")]);
    assert!(machine.tree.marks_of(&[ino], TOP).unwrap().is_empty());
    machine.hear(below, &[expired(&file)]);
    assert_eq!(machine.ino("a"), Some(ino));
    assert_eq!(publish(&machine.tree).len(), 1);
}

#[test]
fn every_name_of_a_used_file_is_told_and_none_of_what_is_gone() {
    let machine = Machine::new(1);
    machine.hear(TOP, &[written("d/e/a", stamp(OLD, 0))]);
    let ino = machine.ino("d/e/a").unwrap();
    let dir = machine.ino("d").unwrap();
    machine.tree.link(ino, dir, b"b").unwrap();
    let mut marks = machine
        .tree
        .marks_of(&[ino, Ino::ROOT, Ino(1 << 40)], TOP)
        .unwrap();
    marks.sort_unstable();
    let mut expected = [mark(b"d/e/a"), mark(b"d/b")];
    expected.sort_unstable();
    assert_eq!(marks, expected);
    // Nobody wrote the directory: it is there for what is in it.
    assert!(machine.tree.marks_of(&[dir], TOP).unwrap().is_empty());
    machine.tree.unlink(dir, b"b").unwrap();
    assert_eq!(machine.tree.marks_of(&[ino], TOP).unwrap(), [mark(b"d/e/a")]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// An expiry takes the version that it judged, and what that had won over: a later one stays, in whatever order
    /// and however often everything arrives.
    #[test]
    fn in_any_order_of_arrival_the_later_write_counts(
        millis in prop::collection::vec(0_u64..4, 1..5),
        judged in any::<prop::sample::Index>(),
        order in prop::collection::vec(any::<prop::sample::Index>(), 0..24),
    ) {
        let writes: Vec<_> = millis.iter().map(|at| written("d/a", stamp(OLD + at, 0))).collect();
        let judged = &writes[judged.index(writes.len())];
        let all: Vec<_> = writes.iter().cloned().chain([expired(judged)]).collect();
        let machine = Machine::new(1);
        let in_order = order.iter().map(|at| &all[at.index(all.len())]).chain(&all);
        for change in in_order {
            machine.hear(TOP, std::slice::from_ref(change));
        }
        let newest = writes.iter().map(|write| write.stamp).max().unwrap();
        prop_assert_eq!(machine.ino("d/a").is_some(), newest > judged.stamp);
        prop_assert!(publish(&machine.tree).is_empty());
    }
}
