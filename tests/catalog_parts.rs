//! What folding changes into a catalog reads, writes and keeps.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use casmount::{
    base::{
        clock::Stamp,
        id::{MachineId, StoreId},
        volume::Stack,
    },
    namespace::{
        catalog::{
            attach,
            compact::{Checkpoint, Old, TOMBSTONE_MILLIS},
            delta::Delta,
            format::Root,
            read::{self, Items},
            write::Sent,
        },
        change::{Below, Entry, Item, PathChange},
        tree::{NewNode, Reach, Tree, Undecided},
    },
    store::{
        Store, StoreOptions,
        rows::{Change, Ino, NodeKind, NodeRow, TreeLayer, Unloaded},
    },
    tier::{SharedBucket, dir::DirBucket},
};

const T: u64 = 1_767_225_600_000;
const PART_BYTES: usize = 8_000;

async fn bucket(dir: &Path) -> SharedBucket {
    let root = dir.join("bucket");
    std::fs::create_dir_all(&root).unwrap();
    Arc::new(DirBucket::connect(root).await)
}

fn fifo() -> Entry {
    Entry::new(NodeKind::Fifo, 0o600)
}

fn change(path: &str, millis: u64, entry: Option<Entry>) -> PathChange {
    PathChange {
        path: path.as_bytes().to_vec(),
        stamp: Stamp {
            millis,
            counter: 0,
            machine: MachineId(7),
        },
        entry,
    }
}

fn at(watermark_millis: u64) -> Checkpoint {
    Checkpoint {
        watermark_millis,
        machine: MachineId(1),
        keeps_tombstones: false,
        part_bytes: PART_BYTES,
    }
}

async fn fold(bucket: &SharedBucket, checkpoint: Checkpoint, changes: Vec<PathChange>) -> Sent {
    let mut delta = Delta::new(std::env::temp_dir());
    for change in changes {
        delta.insert(change).unwrap();
    }
    let old = Old::read(bucket, "v").await.unwrap();
    let written = checkpoint.write(bucket, "v", old, delta).await.unwrap();
    written.unwrap().1
}

async fn root(bucket: &SharedBucket) -> Root {
    let opened = read::newest(bucket.as_ref(), "v", None).await.unwrap().unwrap();
    Root::clone(&opened.root)
}

async fn items(bucket: &SharedBucket) -> Vec<Item> {
    let root = root(bucket).await;
    let mut parts = Items::of(bucket.as_ref(), "v", &root);
    let mut items = Vec::new();
    while let Some(part) = parts.next().await.unwrap() {
        items.extend(part);
    }
    items
}

fn shown(items: &[Item]) -> Vec<(String, bool, Below)> {
    let show = |item: &Item| {
        let path = String::from_utf8(item.path.clone()).unwrap();
        (path, item.is_live(), item.below)
    };
    items.iter().map(show).collect()
}

fn digests(root: &Root) -> BTreeSet<String> {
    root.parts.iter().map(|part| part.digest.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_parts_in_which_something_changed_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket(dir.path()).await;
    let names = (0..8000).map(|n| change(&format!("d{:02}/f{n:05}", n % 40), T, Some(fifo())));
    let sent = fold(&bucket, at(T), names.collect()).await;
    let before = root(&bucket).await;
    assert_eq!(sent.parts, before.parts.len() as u64);
    assert!(before.parts.len() > 30, "{} parts", before.parts.len());
    assert_eq!(before.names, 8000);

    let one = vec![change("d17/new", T + 5, Some(fifo()))];
    let sent = fold(&bucket, at(T + 10), one).await;
    let after = root(&bucket).await;
    assert_eq!(after.names, 8001);
    assert!(sent.parts <= 2, "{} parts for one name", sent.parts);
    let kept = digests(&before).intersection(&digests(&after)).count();
    assert!(kept + 2 >= before.parts.len(), "{kept} of {}", before.parts.len());
    assert_eq!(after.earlier[0].watermark_millis, T);

    // Nothing is cut into crumbs, however often something comes to the same place.
    for number in 0..40 {
        let one = change(&format!("d17/new{number}"), T + 20 + number, Some(fifo()));
        fold(&bucket, at(T + 30 + number), vec![one]).await;
    }
    let last = root(&bucket).await;
    assert!(
        last.parts.len() <= after.parts.len() + 2,
        "{} parts",
        last.parts.len()
    );
    assert!(last.earlier.len() < 42);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_register_says_what_is_below_it() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket(dir.path()).await;
    let dead = |path| change(path, T + 1, None);
    let live = |path| change(path, T, Some(fifo()));
    fold(
        &bucket,
        at(T),
        vec![live("a/b/c"), live("x"), dead("gone/one"), dead("gone")],
    )
    .await;
    let expected = [
        ("a", false, Below::Live),
        ("gone", false, Below::Dead),
        ("x", true, Below::Nothing),
        ("a/b", false, Below::Live),
        ("a/b/c", true, Below::Nothing),
        ("gone/one", false, Below::Nothing),
    ];
    let expected = expected.map(|(path, live, below)| (path.to_owned(), live, below));
    assert_eq!(shown(&items(&bucket).await), expected);

    fold(&bucket, at(T + 10), vec![change("a/b/c", T + 2, None)]).await;
    let below: Vec<_> = items(&bucket)
        .await
        .into_iter()
        .take(1)
        .map(|item| item.below)
        .collect();
    assert_eq!(below, [Below::Dead]);
}

#[tokio::test(flavor = "multi_thread")]
async fn tombstones_stay_for_their_time_and_in_a_fork_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket(dir.path()).await;
    let changes = vec![
        change("kept", T, Some(fifo())),
        change("d/gone", T, None),
        change("d", T, None),
    ];
    fold(&bucket, at(T + 1), changes).await;
    let touch = |number| vec![change("kept", T + number, Some(fifo()))];
    fold(&bucket, at(T + TOMBSTONE_MILLIS), touch(2)).await;
    assert_eq!(items(&bucket).await.len(), 3);
    let fork = Checkpoint {
        keeps_tombstones: true,
        ..at(T + 9 * TOMBSTONE_MILLIS)
    };
    fold(&bucket, fork, touch(3)).await;
    assert_eq!(items(&bucket).await.len(), 3);
    fold(&bucket, at(T + 9 * TOMBSTONE_MILLIS + 1), touch(4)).await;
    assert_eq!(
        shown(&items(&bucket).await),
        [("kept".to_owned(), true, Below::Nothing)]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_sees_a_volume_up_to_a_moment_gets_a_catalog_of_that_time() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket(dir.path()).await;
    for number in 0..5 {
        let name = change(&format!("f{number}"), T + number, Some(fifo()));
        fold(&bucket, at(T + 100 * number), vec![name]).await;
    }
    for (until, expected) in [(T - 1, None), (T + 250, Some(T + 200)), (T + 999, Some(T + 400))] {
        let opened = read::newest(bucket.as_ref(), "v", Some(until)).await.unwrap();
        assert_eq!(opened.map(|opened| opened.root.watermark_millis), expected);
    }
}

fn machine(dir: &Path, bucket: &SharedBucket) -> (Store, Arc<Tree>) {
    let options = StoreOptions {
        dir: dir.to_owned(),
        cache_size: 1 << 20,
        min_free: 0,
        read_timeout: Duration::from_secs(5),
    };
    let store = Store::open(options, StoreId::random(), Arc::clone(bucket)).unwrap();
    let tree = Tree::open(Arc::clone(&store.ledger), store.machine, Arc::new(|| T)).unwrap();
    (store, tree)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_was_away_too_long_starts_over_and_loses_nothing_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket(dir.path()).await;
    let (store, tree) = machine(&dir.path().join("cache"), &bucket);
    let stack = Stack::of("v".parse().unwrap());
    let names = ["stays", "d/removed", "e/f/removed", "e/own is below"];
    let early: Vec<_> = names.map(|name| change(name, T, Some(fifo()))).into();
    fold(&bucket, at(T), early.clone()).await;
    let newest = async || vec![read::newest(bucket.as_ref(), "v", None).await.unwrap()];
    // It read the whole log, long ago.
    attach::settle(&tree, &store.ledger, &stack, &newest().await).unwrap();
    tree.load_anywhere(TreeLayer::TOP, items(&bucket).await).unwrap();
    let mut root_row = NodeRow::clone(&tree.node(Ino::ROOT).unwrap().unwrap());
    root_row.dir.as_mut().unwrap().unloaded = Unloaded::default();
    store.ledger.commit(vec![Change::PutNode(root_row)]).unwrap();
    let new = NewNode {
        kind: NodeKind::Fifo,
        perm: 0o600,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: Vec::new(),
        staging: None,
    };
    let e = tree.resolve(b"e").unwrap().ino;
    tree.create(e, b"own", new).unwrap();
    assert_eq!(tree.list(Ino::ROOT, None, 10).unwrap().0.len(), 3);

    let gone = ["d/removed", "e/f/removed", "e/own is below"];
    let gone = gone.map(|name| change(name, T + 5, None));
    let later = T + 3 * TOMBSTONE_MILLIS;
    fold(&bucket, at(later), gone.into()).await;
    let decided = attach::settle(&tree, &store.ledger, &stack, &newest().await).unwrap();
    assert!(decided.started_over);
    let pending = tree.pending(10).unwrap();
    assert_eq!(pending.len(), 1);
    assert_eq!(tree.dir_path(pending[0].parent).unwrap(), b"e");
    // Nothing is shown that may be gone: the root has to be loaded first.
    assert!(tree.list(Ino::ROOT, None, 10).is_err());
    let whole = Reach::End(Undecided::default());
    tree.load(TreeLayer::TOP, Ino::ROOT, &items(&bucket).await, whole)
        .unwrap();
    let (names, _) = tree.list(Ino::ROOT, None, 10).unwrap();
    let names: Vec<_> = names
        .into_iter()
        .map(|(name, _)| String::from_utf8(name).unwrap())
        .collect();
    assert_eq!(names, ["e", "stays"]);
    let (own, _) = tree.list(e, None, 10).unwrap();
    assert_eq!(own.len(), 1);
    let again = attach::settle(&tree, &store.ledger, &stack, &newest().await).unwrap();
    assert_eq!(again, attach::Decided::default());
    store.close().unwrap();
}
