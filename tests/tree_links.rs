//! Names of one file (`namespace::tree`, laws 4 and 6), among machines and among layers.

#[path = "support/publish.rs"]
mod publish;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use casmount::{
    base::id::MachineId,
    namespace::{
        TreeError,
        change::PathChange,
        tree::{AttrChange, NewNode, RenameMode, Tree},
    },
    store::{
        cachedir::LastStop,
        ledger::{Ledger, LedgerOptions},
        rows::{Ino, NodeKind, NodeRow, TreeLayer},
    },
};

use publish::publish;

const TOP: TreeLayer = TreeLayer::TOP;

fn below() -> TreeLayer {
    TreeLayer::new(1).unwrap()
}

struct Machine {
    tree: Arc<Tree>,
    _dir: tempfile::TempDir,
}

impl Machine {
    fn new(number: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (ledger, _) = Ledger::open(dir.path(), LastStop::Clean, &LedgerOptions::default()).unwrap();
        let now = AtomicU64::new(1_000_000);
        let clock = Arc::new(move || now.fetch_add(1, Ordering::Relaxed));
        Self {
            tree: Tree::open(Arc::new(ledger), MachineId(number), clock).unwrap(),
            _dir: dir,
        }
    }

    fn make(&self, name: &str, perm: u32) -> Ino {
        self.make_in(Ino::ROOT, name, NodeKind::File, perm)
    }

    fn make_in(&self, parent: Ino, name: &str, kind: NodeKind, perm: u32) -> Ino {
        let new = NewNode {
            kind,
            perm,
            uid: 0,
            gid: 0,
            rdev: 0,
            target: Vec::new(),
            staging: None,
        };
        self.tree.create(parent, name.as_bytes(), new).unwrap().ino
    }

    fn link(&self, ino: Ino, name: &str) {
        self.tree.link(ino, Ino::ROOT, name.as_bytes()).unwrap();
    }

    fn chmod(&self, name: &str, perm: u32) {
        let change = AttrChange {
            perm: Some(perm),
            ..AttrChange::default()
        };
        self.tree.set_attributes(self.node(name).ino, change, 0).unwrap();
    }

    fn node(&self, path: &str) -> Arc<NodeRow> {
        self.tree.resolve(path.as_bytes()).unwrap()
    }

    fn publish(&self) -> Vec<PathChange> {
        publish(&self.tree)
    }

    fn hear(&self, layer: TreeLayer, changes: &[PathChange]) {
        self.tree.apply(layer, changes.to_vec()).unwrap();
    }

    /// Asserts that these are all names of one file, with this mode.
    #[track_caller]
    fn assert_one(&self, names: &[&str], perm: u32) {
        let first = self.node(names[0]);
        for name in names {
            let node = self.node(name);
            assert_eq!((node.ino, node.perm), (first.ino, perm), "{name}");
        }
        assert_eq!(first.nlink as usize, names.len(), "{names:?}");
    }
}

fn paths(changes: &[PathChange]) -> Vec<String> {
    let mut paths: Vec<_> = changes
        .iter()
        .map(|change| String::from_utf8(change.path.clone()).unwrap())
        .collect();
    paths.sort();
    paths
}

#[test]
fn a_link_to_a_file_that_the_other_machine_has_is_a_name_of_that_file_there() {
    let (a, b) = (Machine::new(1), Machine::new(2));
    let ino = a.make("one", 0o600);
    b.hear(TOP, &a.publish());
    let known = b.node("one").ino;
    a.link(ino, "two");
    b.hear(TOP, &a.publish());
    b.assert_one(&["one", "two"], 0o600);
    assert_eq!(b.node("one").ino, known);
}

#[test]
fn a_name_that_is_another_file_of_the_same_bytes_now_leaves_the_other_names_alone() {
    let (a, b) = (Machine::new(1), Machine::new(2));
    let ino = a.make("one", 0o600);
    a.link(ino, "two");
    b.hear(TOP, &a.publish());
    b.assert_one(&["one", "two"], 0o600);
    a.tree.unlink(Ino::ROOT, b"two").unwrap();
    a.make("two", 0o644);
    b.hear(TOP, &a.publish());
    b.assert_one(&["one"], 0o600);
    b.assert_one(&["two"], 0o644);
}

#[test]
fn a_change_of_one_name_brings_all_names_of_a_lower_file_up() {
    let (parent, fork, other) = (Machine::new(1), Machine::new(2), Machine::new(3));
    let ino = parent.make("one", 0o600);
    parent.link(ino, "two");
    let told = parent.publish();
    fork.hear(below(), &told);
    fork.assert_one(&["one", "two"], 0o600);
    fork.chmod("two", 0o640);
    let made = fork.publish();
    assert_eq!(paths(&made), ["one", "two"]);
    fork.assert_one(&["one", "two"], 0o640);
    // On another machine of the fork, whichever arrives first.
    other.hear(TOP, &made);
    other.hear(below(), &told);
    other.assert_one(&["one", "two"], 0o640);
    let late = Machine::new(4);
    late.hear(below(), &told);
    late.hear(TOP, &made);
    late.assert_one(&["one", "two"], 0o640);
    // What the parent says of them later stays unseen.
    parent.chmod("one", 0o777);
    let later = parent.publish();
    for machine in [&fork, &other, &late] {
        machine.hear(below(), &later);
        machine.assert_one(&["one", "two"], 0o640);
    }
}

#[test]
fn a_link_to_a_lower_file_and_a_rename_of_one_of_its_names_do_so_too() {
    let (parent, fork, other) = (Machine::new(1), Machine::new(2), Machine::new(3));
    let dir = parent.make_in(Ino::ROOT, "dir", NodeKind::Dir, 0o755);
    let ino = parent.make_in(dir, "one", NodeKind::File, 0o600);
    parent.link(ino, "two");
    let told = parent.publish();
    fork.hear(below(), &told);
    fork.tree
        .rename((Ino::ROOT, b"dir"), (Ino::ROOT, b"moved"), RenameMode::Replace)
        .unwrap();
    let moved = fork.publish();
    assert_eq!(paths(&moved), ["dir", "dir/one", "moved", "moved/one", "two"]);
    fork.link(fork.node("two").ino, "three");
    let linked = fork.publish();
    assert_eq!(paths(&linked), ["three"]);
    fork.assert_one(&["moved/one", "two", "three"], 0o600);
    other.hear(TOP, &moved);
    other.hear(below(), &told);
    other.hear(TOP, &linked);
    other.assert_one(&["moved/one", "two", "three"], 0o600);
    assert!(other.tree.resolve(b"dir").is_err());
}

#[test]
fn a_name_that_the_parent_gives_later_is_a_file_of_its_own() {
    let (parent, fork, other) = (Machine::new(1), Machine::new(2), Machine::new(3));
    let ino = parent.make("one", 0o600);
    parent.link(ino, "two");
    let told = parent.publish();
    fork.hear(below(), &told);
    fork.chmod("one", 0o640);
    let made = fork.publish();
    parent.link(ino, "three");
    let later = parent.publish();
    fork.hear(below(), &later);
    fork.assert_one(&["one", "two"], 0o640);
    fork.assert_one(&["three"], 0o600);
    // The same where the parent's three names were one file before.
    other.hear(below(), &told);
    other.hear(below(), &later);
    other.assert_one(&["one", "two", "three"], 0o600);
    other.hear(TOP, &made);
    other.assert_one(&["one", "two"], 0o640);
    other.assert_one(&["three"], 0o600);
}

#[test]
fn a_name_of_a_lower_file_that_goes_leaves_the_others_to_the_parent() {
    let (parent, fork) = (Machine::new(1), Machine::new(2));
    let ino = parent.make("one", 0o600);
    parent.link(ino, "two");
    fork.hear(below(), &parent.publish());
    fork.tree.unlink(Ino::ROOT, b"one").unwrap();
    assert_eq!(paths(&fork.publish()), ["one"]);
    parent.chmod("two", 0o777);
    fork.hear(below(), &parent.publish());
    fork.assert_one(&["two"], 0o777);
    assert!(fork.tree.resolve(b"one").is_err());
}

#[test]
fn the_newest_of_many_names_says_what_a_file_is_like_in_whatever_order_they_are_heard() {
    let a = Machine::new(1);
    let ino = a.make("f-0", 0o600);
    // More than are merged at once.
    let names: Vec<String> = (0..600).map(|number| format!("f-{number}")).collect();
    for name in &names[1..] {
        a.link(ino, name);
    }
    let mut told = a.publish();
    a.chmod("f-7", 0o640);
    let second = a.publish();
    a.chmod("f-599", 0o644);
    let third = a.publish();
    assert_eq!((second.len(), third.len()), (600, 600));
    a.tree.unlink(Ino::ROOT, b"f-0").unwrap();
    let gone = a.publish();
    told.extend(second);
    told.extend(third);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for turn in 0..4_u64 {
        let b = Machine::new(2 + turn);
        // The same every time, and not the order in which they were made.
        let key = |change: &PathChange| change.stamp.millis.wrapping_mul(2 * turn + 1) % 1_009;
        let mut heard = told.clone();
        match turn {
            0 => {}
            1 => heard.reverse(),
            _ => heard.sort_by_key(key),
        }
        b.hear(TOP, &heard);
        b.assert_one(&names, 0o644);
        b.hear(TOP, &gone);
        b.assert_one(&names[1..], 0o644);
    }
}

#[test]
fn a_file_has_as_many_names_as_on_ext4() {
    const MOST: u32 = 65_000;
    let machine = Machine::new(1);
    let ino = machine.make("one", 0o600);
    for n in 1..MOST {
        machine.link(ino, &n.to_string());
    }
    assert_eq!(machine.node("one").nlink, MOST);
    let link = |name: &[u8]| machine.tree.link(ino, Ino::ROOT, name);
    assert!(matches!(link(b"more"), Err(TreeError::TooManyLinks)));
    machine.tree.unlink(Ino::ROOT, b"1").unwrap();
    link(b"more").unwrap();
}
