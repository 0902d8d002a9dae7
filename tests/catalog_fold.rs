//! A tree that is loaded from catalogs shows what one shows that read the whole log.
//!
//! Random changes of a volume and of those below it are folded in random portions, some of them
//! into several catalogs one after the other, some of them come with the log before or after
//! directories are loaded; parts are tiny, so that directories lie across many of them.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use casmount::{
    base::{
        clock::Stamp,
        id::{MachineId, StoreId},
        volume::{Stack, StackLayer},
    },
    namespace::{
        TreeError,
        catalog::{
            Loader, attach,
            compact::{Checkpoint, Old},
            delta::Delta,
            read,
        },
        change::{Entry, PathChange},
        tree::{NewNode, RenameMode, Tree},
    },
    store::{
        Store, StoreOptions,
        rows::{Ino, LinkId, NodeKind, TreeLayer},
    },
    tier::{SharedBucket, dir::DirBucket},
};
use proptest::prelude::*;

/// A change, the layer of its volume, and how it reaches the machine with catalogs.
#[derive(Clone, Debug)]
struct Told {
    layer: u64,
    way: Way,
    change: PathChange,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// In the catalog of that number.
    Folded(u8),
    LogBefore,
    LogAfter,
}

#[derive(Clone, Debug)]
enum Step {
    Make(Vec<u8>, bool),
    Remove(Vec<u8>),
    Rename(Vec<u8>, Vec<u8>),
}

/// For each path its kind, its mode, what a link points at, and how many names a file has.
type View = BTreeMap<Vec<u8>, (NodeKind, u32, Vec<u8>, u32)>;

fn path() -> impl Strategy<Value = Vec<u8>> {
    let name = prop::sample::select(vec!["a", "b", "b!", "c"]);
    prop::collection::vec(name, 1..5).prop_map(|names| names.join("/").into_bytes())
}

fn entry() -> impl Strategy<Value = Option<Entry>> {
    let perm = prop::sample::select(vec![0o600, 0o640, 0o711, 0o777]);
    let of = |kind, perm, target: &str, link: Option<u64>| Entry {
        mtime: 7,
        target: target.as_bytes().to_vec(),
        link_id: link.map(|ino| LinkId {
            machine: MachineId(3),
            ino,
        }),
        ..Entry::new(kind, perm)
    };
    prop_oneof![
        3 => Just(None),
        3 => perm.clone().prop_map(move |perm| Some(of(NodeKind::Dir, perm, "", None))),
        3 => perm.clone().prop_map(move |perm| Some(of(NodeKind::Fifo, perm, "", None))),
        2 => prop::sample::select(vec!["x", "y"]).prop_map(move |to| Some(of(NodeKind::Symlink, 0o777, to, None))),
        1 => (1u64..3).prop_map(move |id| Some(of(NodeKind::Fifo, 0o600 + id as u32, "", Some(id)))),
    ]
}

fn told(layers: u64) -> impl Strategy<Value = Vec<Told>> {
    let way = prop_oneof![
        6 => (0u8..3).prop_map(Way::Folded),
        1 => Just(Way::LogBefore),
        1 => Just(Way::LogAfter),
    ];
    let one = (0..layers, way, path(), 0u64..50, entry());
    prop::collection::vec(one, 1..80).prop_map(|all| {
        let numbered = all.into_iter().zip(0..);
        numbered
            .map(|((layer, way, path, millis, entry), counter)| Told {
                layer,
                way,
                change: PathChange {
                    path,
                    stamp: Stamp {
                        millis: 1000 + millis,
                        counter,
                        machine: MachineId(2),
                    },
                    entry,
                },
            })
            .collect()
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (path(), any::<bool>()).prop_map(|(path, dir)| Step::Make(path, dir)),
        path().prop_map(Step::Remove),
        (path(), path()).prop_map(|(from, to)| Step::Rename(from, to)),
    ];
    prop::collection::vec(step, 0..12)
}

/// A machine: a tree over a store, and who loads its directories.
struct Machine {
    tree: Arc<Tree>,
    loader: Option<Loader>,
    store: Arc<Store>,
}

fn stack(layers: u64) -> Stack {
    let mut stack = Stack::of("v0".parse().unwrap());
    for number in 1..layers {
        stack.push(StackLayer::live(format!("v{number}").parse().unwrap()));
    }
    stack
}

impl Machine {
    fn new(dir: &Path, bucket: &SharedBucket) -> Self {
        let options = StoreOptions {
            dir: dir.to_owned(),
            cache_size: 1 << 20,
            min_free: 0,
            read_timeout: Duration::from_secs(5),
        };
        let id = StoreId::random();
        let store = Arc::new(Store::open(options, id, Arc::clone(bucket)).unwrap());
        let clock = AtomicU64::new(1_000_000);
        let time = Arc::new(move || clock.fetch_add(1, Ordering::Relaxed));
        Self {
            tree: Tree::open(Arc::clone(&store.ledger), MachineId(9), time).unwrap(),
            loader: None,
            store,
        }
    }

    /// Begins with the newest catalogs.
    async fn attach(&mut self, stack: &Stack, bucket: &SharedBucket) {
        let mut newest = Vec::new();
        for layer in stack.layers() {
            let opened = read::newest(bucket.as_ref(), layer.volume.as_str(), None).await;
            newest.push(opened.unwrap());
        }
        attach::settle(&self.tree, &self.store.ledger, stack, &newest).unwrap();
        let within = Duration::from_secs(5);
        let loader = Loader::new(stack, &self.tree, &self.store, bucket, within, 0, &newest);
        self.loader = Some(loader.unwrap());
    }

    fn hear(&self, told: &[&Told]) {
        for told in told {
            let layer = TreeLayer::new(told.layer).unwrap();
            self.tree.apply(layer, vec![told.change.clone()]).unwrap();
        }
    }

    /// Does something, loading what it needs.
    async fn with_loaded<T>(&self, act: impl Fn(&Tree) -> Result<T, TreeError>) -> Result<T, TreeError> {
        for _ in 0..1000 {
            match (act(&self.tree), &self.loader) {
                (Err(TreeError::NotLoaded(missing)), Some(loader)) => {
                    loader.load(missing).await.unwrap();
                }
                (done, _) => return done,
            }
        }
        panic!("loading makes no progress");
    }

    async fn view(&self) -> View {
        let mut view = View::new();
        let mut dirs = vec![(Ino::ROOT, Vec::new())];
        while let Some((dir, path)) = dirs.pop() {
            let (names, more) = self
                .with_loaded(|tree| tree.list(dir, None, 10_000))
                .await
                .unwrap();
            assert_eq!(more, None);
            let node = self.tree.node(dir).unwrap().unwrap();
            let state = node.dir.as_ref().unwrap();
            let subdirs = names
                .iter()
                .filter(|(_, node)| node.kind == NodeKind::Dir)
                .count() as u64;
            assert_eq!(
                (state.visible_children, state.subdirs),
                (names.len() as u64, subdirs)
            );
            for (name, node) in names {
                let child = [path.as_slice(), &name].join(&b'/');
                let child = child.strip_prefix(b"/").unwrap_or(&child).to_vec();
                let nlink = if node.kind == NodeKind::Dir { 0 } else { node.nlink };
                let shown = (node.kind, node.perm, node.target.clone(), nlink);
                view.insert(child.clone(), shown);
                if node.kind == NodeKind::Dir {
                    dirs.push((node.ino, child));
                }
            }
        }
        view
    }

    async fn parent(&self, path: &[u8]) -> Result<(Ino, Vec<u8>), TreeError> {
        let mut names: Vec<&[u8]> = path.split(|&byte| byte == b'/').collect();
        let name = names.pop().unwrap().to_vec();
        let above = names.join(&b'/');
        let dir = self.with_loaded(|tree| tree.resolve(&above)).await?;
        if dir.kind != NodeKind::Dir {
            return Err(TreeError::NotDirectory);
        }
        Ok((dir.ino, name))
    }

    async fn act(&self, step: &Step) -> Result<(), TreeError> {
        match step {
            Step::Make(path, dir) => {
                let (parent, name) = self.parent(path).await?;
                let new = NewNode {
                    kind: if *dir { NodeKind::Dir } else { NodeKind::Fifo },
                    perm: 0o700,
                    uid: 0,
                    gid: 0,
                    rdev: 0,
                    target: Vec::new(),
                    staging: None,
                };
                let make = |tree: &Tree| tree.create(parent, &name, new.clone()).map(drop);
                self.with_loaded(make).await
            }
            Step::Remove(path) => {
                let (parent, name) = self.parent(path).await?;
                match self
                    .with_loaded(|tree| tree.unlink(parent, &name).map(drop))
                    .await
                {
                    Err(TreeError::IsDirectory) => {
                        self.with_loaded(|tree| tree.rmdir(parent, &name).map(drop)).await
                    }
                    done => done,
                }
            }
            Step::Rename(from, to) => {
                let (from, to) = (self.parent(from).await?, self.parent(to).await?);
                let rename = |tree: &Tree| {
                    tree.rename((from.0, &from.1), (to.0, &to.1), RenameMode::Replace)
                        .map(drop)
                };
                self.with_loaded(rename).await
            }
        }
    }
}

/// Folds what is meant for the catalogs, one after the other.
async fn fold(told: &[Told], layers: u64, part_bytes: usize, bucket: &SharedBucket, spill: &Path) {
    for layer in 0..layers {
        for number in 0..3 {
            let mut delta = Delta::new(spill.to_owned());
            let mine = |told: &&Told| told.layer == layer && told.way == Way::Folded(number);
            for told in told.iter().filter(mine) {
                delta.insert(told.change.clone()).unwrap();
            }
            let volume = format!("v{layer}");
            let checkpoint = Checkpoint {
                watermark_millis: 2000 + u64::from(number),
                machine: MachineId(1),
                keeps_tombstones: true,
                part_bytes,
            };
            let old = Old::read(bucket, &volume).await.unwrap();
            assert!(
                checkpoint
                    .write(bucket, &volume, old, delta)
                    .await
                    .unwrap()
                    .is_some()
            );
        }
    }
}

async fn compare(told: &[Told], layers: u64, part_bytes: usize, steps: &[Step]) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("bucket");
    std::fs::create_dir(&root).unwrap();
    let bucket: SharedBucket = Arc::new(DirBucket::connect(root).await);
    fold(told, layers, part_bytes, &bucket, dir.path()).await;

    let plain = Machine::new(&dir.path().join("plain"), &bucket);
    let mut sorted: Vec<&Told> = told.iter().collect();
    sorted.sort_by_key(|told| told.change.stamp);
    plain.hear(&sorted);

    let mut opened = Machine::new(&dir.path().join("opened"), &bucket);
    let of = |way: Way| -> Vec<&Told> { told.iter().filter(|told| told.way == way).collect() };
    opened.attach(&stack(layers), &bucket).await;
    opened.hear(&of(Way::LogBefore));
    for told in told.iter().step_by(7) {
        // Somebody looks here and there.
        let _ = opened
            .with_loaded(|tree| tree.resolve(&told.change.path).map(drop))
            .await;
    }
    opened.hear(&of(Way::LogAfter));
    for step in steps {
        let (one, other) = (plain.act(step).await, opened.act(step).await);
        assert_eq!(
            one.map_err(|err| err.to_string()),
            other.map_err(|err| err.to_string()),
            "{step:?}"
        );
    }
    assert_eq!(plain.view().await, opened.view().await);
}

/// A machine follows the log of a volume below, and its own one again, while the catalog that has their
/// tombstones is not loaded: what they hide keeps no directory alive.
#[test]
fn what_a_tombstone_hides_that_is_not_loaded_keeps_no_directory_alive() {
    let dir = Entry {
        mtime: 7,
        ..Entry::new(NodeKind::Dir, 0o700)
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    for below in 0..2 {
        let told = |layer, counter, way, path: &str, entry: Option<&Entry>| Told {
            layer,
            way,
            change: PathChange {
                path: path.into(),
                stamp: Stamp {
                    millis: 1000,
                    counter,
                    machine: MachineId(2),
                },
                entry: entry.cloned(),
            },
        };
        let told = [
            told(below, 0, Way::LogAfter, "b/c/b/d", Some(&dir)),
            told(0, 1, Way::Folded(0), "b/c/b/d", None),
            told(0, 2, Way::Folded(0), "a", Some(&dir)),
        ];
        let touch = [Step::Remove(b"b".to_vec()), Step::Make(b"b".to_vec(), false)];
        for steps in [&touch[..0], &touch[..]] {
            runtime.block_on(compare(&told, 2, 40, steps));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_volume_opened_from_catalogs_is_the_one_that_its_log_tells(
        told in told(1),
        part_bytes in prop::sample::select(vec![40usize, 200, 600, 1 << 20]),
        steps in steps(),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(compare(&told, 1, part_bytes, &steps));
    }

    #[test]
    fn so_is_a_fork_over_others(
        told in told(3),
        part_bytes in prop::sample::select(vec![40usize, 200, 1 << 20]),
        steps in steps(),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(compare(&told, 3, part_bytes, &steps));
    }
}
