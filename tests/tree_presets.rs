//! What presets make of changes of the tree (`namespace::tree`, law 7), among machines and across mounts.

#[path = "support/publish.rs"]
mod publish;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use casmount::{
    base::{clock::Stamp, digest::Digest, id::MachineId},
    namespace::{
        TreeError,
        change::{Entry, EntryBlob, EntryChunks, PathChange},
        preset::{Preset, at::PresetAt, table::Origin},
        tree::{AttrChange, NewNode, Notice, RenameMode, SetTime, Tree},
    },
    store::{
        cachedir::LastStop,
        ledger::{Ledger, LedgerOptions},
        rows::{Ino, NodeKind, TreeLayer},
    },
};

use publish::publish;

const TOP: TreeLayer = TreeLayer::TOP;

struct Machine {
    number: u64,
    ledger: Arc<Ledger>,
    tree: Arc<Tree>,
    path: PathBuf,
    dir: Option<tempfile::TempDir>,
}

impl Machine {
    fn new(number: u64, presets: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let machine = Self::open(number, dir.path(), presets);
        Self {
            dir: Some(dir),
            ..machine
        }
    }

    fn open(number: u64, path: &Path, presets: &str) -> Self {
        // Later mounts are later.
        static NOW: AtomicU64 = AtomicU64::new(1_000_000);
        let (ledger, _) = Ledger::open(path, LastStop::Clean, &LedgerOptions::default()).unwrap();
        let ledger = Arc::new(ledger);
        let clock = Arc::new(|| NOW.fetch_add(1, Ordering::Relaxed));
        let tree = Tree::open(Arc::clone(&ledger), MachineId(number), clock).unwrap();
        tree.set_presets(&PresetAt::list(presets).unwrap(), &[]).unwrap();
        Self {
            number,
            ledger,
            tree,
            path: path.to_owned(),
            dir: None,
        }
    }

    /// Mounts the same cache directory again, with other presets.
    fn remount(self, presets: &str) -> Self {
        let (path, dir) = (self.path.clone(), self.dir);
        drop(self.tree);
        let Ok(ledger) = Arc::try_unwrap(self.ledger) else {
            panic!("the tree is gone")
        };
        ledger.close().unwrap();
        Self {
            dir,
            ..Self::open(self.number, &path, presets)
        }
    }

    fn dir_of<'a>(&self, path: &'a str) -> (Ino, &'a [u8]) {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        (self.tree.resolve(dir.as_bytes()).unwrap().ino, name.as_bytes())
    }

    fn make(&self, path: &str, kind: NodeKind) {
        let (dir, name) = self.dir_of(path);
        let new = NewNode {
            kind,
            perm: 0o755,
            uid: 0,
            gid: 0,
            rdev: 0,
            target: Vec::new(),
            staging: None,
        };
        self.tree.create(dir, name, new).unwrap();
    }

    /// Makes directories and, at the end of each path, a symbolic link: it needs no blob.
    fn make_all(&self, paths: &[&str]) {
        for path in paths {
            for (end, _) in path.match_indices('/') {
                if !self.has(&path[..end]) {
                    self.make(&path[..end], NodeKind::Dir);
                }
            }
            self.make(path, NodeKind::Symlink);
        }
    }

    fn has(&self, path: &str) -> bool {
        match self.tree.resolve(path.as_bytes()) {
            Ok(_) => true,
            Err(TreeError::NotFound) => false,
            Err(err) => panic!("{path}: {err}"),
        }
    }

    fn remove(&self, path: &str) {
        let (dir, name) = self.dir_of(path);
        self.tree.unlink(dir, name).unwrap();
    }

    fn rename(&self, from: &str, to: &str) {
        let (from, to) = (self.dir_of(from), self.dir_of(to));
        self.tree.rename(from, to, RenameMode::Replace).unwrap();
    }

    /// What the others are told, as `+path` and `-path`, sorted.
    fn told(&self) -> Vec<String> {
        let mut told: Vec<String> = publish(&self.tree).iter().map(shown).collect();
        told.sort();
        told
    }

    fn tell(&self, other: &Self) {
        other.tree.apply(TOP, publish(&self.tree)).unwrap();
    }

    /// All registers of a directory, also those that show nothing.
    fn registers(&self, path: &str) -> usize {
        let dir = self.tree.resolve(path.as_bytes()).unwrap().ino;
        self.ledger.names_in(dir, None, 1000).unwrap().len()
    }
}

fn shown(change: &PathChange) -> String {
    let path = String::from_utf8_lossy(&change.path);
    format!("{}{path}", if change.entry.is_some() { '+' } else { '-' })
}

#[test]
fn names_that_stay_are_never_told_and_leave_nothing_behind() {
    let a = Machine::new(1, "d=bazel");
    a.make_all(&["d/cas/aa/x", "d/tmp/one", "d/gc/lock"]);
    assert_eq!(a.told(), ["+d", "+d/cas", "+d/cas/aa", "+d/cas/aa/x"]);
    for number in 0..50 {
        let name = format!("d/tmp/{number}");
        a.make_all(&[&name]);
        a.remove(&name);
    }
    assert_eq!(a.registers("d/tmp"), 1);
    assert_eq!(a.told(), Vec::<String>::new());
}

#[test]
fn a_rename_out_of_what_stays_tells_the_new_name_and_a_rename_back_that_it_is_gone() {
    let a = Machine::new(1, "d=bazel");
    a.make_all(&["d/tmp/one", "d/cas/aa/x"]);
    a.told();
    a.rename("d/tmp/one", "d/cas/aa/one");
    assert_eq!(a.told(), ["+d/cas/aa/one"]);
    assert_eq!(a.registers("d/tmp"), 0);
    a.rename("d/cas/aa/one", "d/tmp/two");
    assert_eq!(a.told(), ["-d/cas/aa/one"]);
    assert!(a.has("d/tmp/two"));
}

#[test]
fn times_of_an_entry_are_nobody_elses_business_however_they_are_set() {
    let a = Machine::new(1, "d=bazel,s=sccache");
    a.make_all(&["d/ac/aa/x", "s/a/b/x", "plain/x"]);
    a.told();
    let set = |path: &str, change: AttrChange| {
        let ino = a.tree.resolve(path.as_bytes()).unwrap().ino;
        a.tree.set_attributes(ino, change, 7).unwrap()
    };
    let to = |nanos| AttrChange {
        atime: Some(SetTime::To(nanos)),
        mtime: Some(SetTime::To(nanos)),
        ..AttrChange::default()
    };
    for path in ["d/ac/aa/x", "s/a/b/x"] {
        assert_eq!(set(path, to(1_000_000_000)).mtime, 1_000_000_000);
        assert_eq!(a.told(), Vec::<String>::new(), "{path}");
    }
    // All else of them is, as of any file.
    let readable = AttrChange {
        perm: Some(0o644),
        ..to(2_000_000_000)
    };
    set("d/ac/aa/x", readable);
    assert_eq!(a.told(), ["+d/ac/aa/x"]);
    set("plain/x", to(1_000_000_000));
    assert_eq!(a.told(), ["+plain/x"]);
}

#[test]
fn a_tree_moves_out_of_what_stays_and_back_with_all_below_it() {
    let a = Machine::new(1, "d=bazel");
    a.make_all(&["d/tmp/t/one", "d/tmp/t/deep/two", "d/cas/x"]);
    a.told();
    a.rename("d/tmp/t", "d/t");
    assert_eq!(a.told(), ["+d/t", "+d/t/deep", "+d/t/deep/two", "+d/t/one"]);
    a.rename("d/t", "d/tmp/u");
    assert_eq!(a.told(), ["-d/t", "-d/t/deep", "-d/t/deep/two", "-d/t/one"]);
    assert!(a.has("d/tmp/u/deep/two"));
    // What a directory is used for goes by its path.
    a.rename("d/tmp/u", "u");
    a.make_all(&["u/tmp/shared"]);
    assert_eq!(
        a.told(),
        [
            "+u",
            "+u/deep",
            "+u/deep/two",
            "+u/one",
            "+u/tmp",
            "+u/tmp/shared"
        ]
    );
}

/// What is in the action cache may be hidden, which the kernel has kept as a plain directory so far.
#[test]
fn what_comes_into_a_preset_is_listed_anew_and_nothing_else_is() {
    let told = Arc::new(Mutex::new(Vec::new()));
    for presets in ["", "d=bazel"] {
        let a = Machine::new(1, presets);
        let teller = Arc::clone(&told);
        a.tree
            .set_tell_kernel(Arc::new(move |notices| teller.lock().unwrap().extend(notices)));
        a.make_all(&["d/ac/00/x", "d/cas/00/x", "plain/00/y", "other/z"]);
        let sign = "1".repeat(64);
        a.make_all(&[&format!("d/cas/11/{sign}"), &format!("d/ac/11/{sign}")]);
        let ino = |path: &str| a.tree.resolve(path.as_bytes()).unwrap().ino;
        assert!(
            a.tree
                .preset_of(&a.tree.resolve(b"d").unwrap())
                .unwrap()
                .is_some()
        );
        let below = ino("plain/00");
        let rename = |from: &str, to: &str| {
            let before = a.tree.edition(below);
            let ((from_dir, from), (to_dir, to)) = (a.dir_of(from), a.dir_of(to));
            let done = a.tree.rename((from_dir, from), (to_dir, to), RenameMode::Replace);
            let told_below = done.unwrap().notices.contains(&Notice::Listing { dir: below });
            (told_below, a.tree.edition(below) != before)
        };
        assert_eq!(rename("plain", "d/ac/22"), (true, true));
        let chosen = !presets.is_empty();
        assert_eq!(rename("d/ac/22", "plain"), (chosen, chosen));
        assert_eq!(rename("other", "another"), (false, chosen));
    }
    let recognised = told.lock().unwrap();
    assert!(
        recognised
            .iter()
            .any(|notice| matches!(notice, Notice::Listing { .. })),
        "who makes the sign of a tool has it told"
    );
}

#[test]
fn what_others_say_of_a_name_that_stays_does_not_replace_it() {
    let (a, b) = (Machine::new(1, "d=ccache"), Machine::new(2, ""));
    a.make_all(&["d/0/stats.lock"]);
    let mine = a.tree.resolve(b"d/0/stats.lock").unwrap().ino;
    b.make_all(&["d/0/stats.lock", "d/0/result"]);
    b.tell(&a);
    assert_eq!(a.tree.resolve(b"d/0/stats.lock").unwrap().ino, mine);
    assert!(a.has("d/0/result"));
    b.remove("d/0/stats.lock");
    b.tell(&a);
    assert!(a.has("d/0/stats.lock"));
    // And the other way round nothing is heard of it.
    a.tell(&b);
    assert!(!b.has("d/0/stats.lock"));
}

#[test]
fn a_name_that_others_made_goes_here_alone_and_stays_away() {
    let (a, b) = (Machine::new(1, "d=ccache"), Machine::new(2, ""));
    b.make_all(&["d/0/stats.lock"]);
    let told = publish(&b.tree);
    a.tree.apply(TOP, told.clone()).unwrap();
    // As ccache does it: the lock of another machine that died is broken, taken, and given back.
    a.remove("d/0/stats.lock");
    a.make_all(&["d/0/stats.lock"]);
    a.remove("d/0/stats.lock");
    assert_eq!(a.told(), Vec::<String>::new());
    a.tree.apply(TOP, told).unwrap();
    assert!(!a.has("d/0/stats.lock"), "an old change came back");
}

#[test]
fn a_delete_is_this_machines_opinion_until_another_makes_the_name_again() {
    let (a, b) = (Machine::new(1, "d=bazel"), Machine::new(2, "d=bazel"));
    a.make_all(&["d/ac/aa/x", "d/ac/aa/y"]);
    a.tell(&b);
    b.remove("d/ac/aa/x");
    assert!(!b.has("d/ac/aa/x"));
    assert_eq!(b.told(), Vec::<String>::new());
    // Nothing new is known of it.
    a.make_all(&["d/ac/aa/z"]);
    a.tell(&b);
    assert!(!b.has("d/ac/aa/x"));
    a.rename("d/ac/aa/y", "d/ac/aa/x");
    a.tell(&b);
    assert!(b.has("d/ac/aa/x"));
    assert!(!b.has("d/ac/aa/y"), "a rename is told");
    // Made again here, it is told again.
    b.remove("d/ac/aa/x");
    b.make_all(&["d/ac/aa/x"]);
    assert_eq!(b.told(), ["+d/ac/aa/x"]);
}

#[test]
fn the_way_in_which_ccache_deletes_is_a_delete() {
    let (a, b) = (Machine::new(1, "d=ccache"), Machine::new(2, "d=ccache"));
    a.make_all(&["d/0/1/resultR"]);
    a.tell(&b);
    b.rename("d/0/1/resultR", "d/0/1/resultR.ccache.tmp.remove");
    b.remove("d/0/1/resultR.ccache.tmp.remove");
    assert!(!b.has("d/0/1/resultR"));
    assert_eq!(b.told(), Vec::<String>::new());
}

#[test]
fn a_delete_in_a_fork_hides_what_its_parent_has_and_tells_nobody() {
    let (parent, fork) = (Machine::new(1, ""), Machine::new(2, "d=bazel"));
    let below = TreeLayer::new(1).unwrap();
    parent.make_all(&["d/ac/aa/x"]);
    fork.tree.apply(below, publish(&parent.tree)).unwrap();
    fork.remove("d/ac/aa/x");
    assert_eq!(fork.told(), Vec::<String>::new());
    assert!(!fork.has("d/ac/aa/x"));
    parent.remove("d/ac/aa/x");
    parent.make_all(&["d/ac/aa/x"]);
    fork.tree.apply(below, publish(&parent.tree)).unwrap();
    assert!(fork.has("d/ac/aa/x"));
}

#[test]
fn another_machine_cannot_give_a_digest_to_other_bytes() {
    let a = Machine::new(1, "d=bazel");
    let (right, wrong) = (Digest::of(b"right"), Digest::of(b"wrong"));
    let entry = |digest, size| Entry {
        blob: Some(EntryBlob {
            digest,
            size,
            chunks: EntryChunks::Single,
            places: Vec::new(),
        }),
        ..Entry::new(NodeKind::File, 0o644)
    };
    let path = format!("d/cas/{}/{right}", right.shard());
    let change = |digest, millis| PathChange {
        path: path.clone().into_bytes(),
        stamp: Stamp {
            millis,
            counter: 0,
            machine: MachineId(9),
        },
        entry: Some(entry(digest, 5)),
    };
    let hear = |change| a.tree.apply(TOP, vec![change]).unwrap();
    hear(change(wrong, 1));
    assert!(!a.has(&path));
    hear(change(right, 2));
    hear(change(wrong, 3));
    assert_eq!(
        a.tree.resolve(path.as_bytes()).unwrap().content,
        casmount::store::rows::Content::Blob(right)
    );
    assert_eq!(a.tree.presets().counters.last_misnamed(), Some(path));
}

#[test]
fn a_tool_is_recognised_before_its_first_names_are_told() {
    let a = Machine::new(1, "");
    a.make_all(&["bazel/tmp/one", "bazel/cas/aa/x", "cc/tmp/two", "cc/stats.lock"]);
    a.make_all(&["bazel/ac/bb/y", "cc/ccache.conf"]);
    let expected = [
        "+bazel",
        "+bazel/ac",
        "+bazel/ac/bb",
        "+bazel/ac/bb/y",
        "+bazel/cas",
        "+bazel/cas/aa",
        "+bazel/cas/aa/x",
        "+cc",
        "+cc/ccache.conf",
    ];
    let dirs = |machine: &Machine| -> Vec<(Vec<u8>, Preset)> {
        let dirs = machine.tree.preset_dirs();
        assert!(dirs.iter().all(|shown| shown.origin == Origin::Recognised));
        dirs.into_iter().map(|shown| (shown.dir, shown.preset)).collect()
    };
    let recognised = [
        (b"bazel".to_vec(), Preset::Bazel),
        (b"cc".to_vec(), Preset::Ccache),
    ];
    assert_eq!(dirs(&a), recognised);
    let changes = publish(&a.tree);
    let mut told: Vec<String> = changes.iter().map(shown).collect();
    told.sort();
    assert_eq!(told, expected);
    // Whoever hears of it recognises it, too, and so does the next mount.
    let b = Machine::new(2, "");
    b.tree.apply(TOP, changes).unwrap();
    assert_eq!(dirs(&b), recognised);
    let a = a.remount("");
    assert_eq!(dirs(&a), recognised);
    a.make_all(&["bazel/tmp/three"]);
    assert_eq!(a.told(), Vec::<String>::new());
    // It moves with its directory, and goes with it.
    a.rename("cc", "ccache");
    a.told();
    a.make_all(&["ccache/x.lock"]);
    assert_eq!(a.told(), Vec::<String>::new());
}

#[test]
fn a_directory_called_plain_is_not_looked_at() {
    let a = Machine::new(1, ".=plain");
    a.make_all(&["cc/tmp/two", "cc/ccache.conf"]);
    assert_eq!(a.told(), ["+cc", "+cc/ccache.conf", "+cc/tmp", "+cc/tmp/two"]);
}

#[test]
fn names_are_told_when_the_next_mount_does_not_keep_them() {
    let a = Machine::new(1, "d=ccache");
    a.make_all(&["d/0/Cargo.lock", "d/tmp/deep/x"]);
    a.told();
    let a = a.remount("d=ccache");
    assert_eq!(a.told(), Vec::<String>::new());
    let a = a.remount("d=plain");
    assert_eq!(
        a.told(),
        ["+d/0/Cargo.lock", "+d/tmp", "+d/tmp/deep", "+d/tmp/deep/x"]
    );
    // And what was told stays told, until it is changed.
    let a = a.remount("d=ccache");
    assert!(a.has("d/0/Cargo.lock"));
    assert_eq!(a.told(), Vec::<String>::new());
    a.remove("d/0/Cargo.lock");
    assert_eq!(a.told(), Vec::<String>::new());
    assert!(!a.has("d/0/Cargo.lock"));
}

#[test]
fn the_next_mount_keeps_what_waits_to_be_told() {
    let a = Machine::new(1, "");
    a.make_all(&["d/x.lock", "d/y", "e/z.lock"]);
    let a = a.remount("d=ccache,e/z.lock=plain");
    assert_eq!(a.told(), ["+d", "+d/y", "+e", "+e/z.lock"]);
    assert!(a.has("d/x.lock"));
}

#[test]
fn a_directory_with_a_preset_within_one_with_another_has_its_own() {
    let a = Machine::new(1, "d=bazel,d/tmp/keep=plain");
    a.make_all(&["d/tmp/one", "d/tmp/keep/two"]);
    assert_eq!(a.told(), ["+d", "+d/tmp/keep/two"]);
}
