//! What the parts of the ledger promise together. `model` compares it with plain maps.

mod crash;
mod full;
mod model;
mod speed;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use super::*;
use crate::{
    base::{clock::Stamp, id::MachineId},
    store::{
        cachedir::LastStop,
        rows::{Content, Durability, NameState, NodeKind, Place, Residency, StagingId, TreeLayer},
    },
};

/// Threads that do nothing by themselves: the test says when.
const BY_HAND: LedgerOptions = LedgerOptions {
    absorb_every: Duration::from_secs(3600),
    barrier_every: Duration::from_secs(3600),
};

fn open(dir: &Path, stop: LastStop) -> Ledger {
    Ledger::open(dir, stop, &BY_HAND).unwrap().0
}

fn fresh() -> (tempfile::TempDir, Ledger) {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path(), LastStop::Clean);
    (dir, ledger)
}

fn node(ino: u64, content: Content) -> NodeRow {
    NodeRow {
        ino: Ino(ino),
        kind: NodeKind::File,
        perm: 0o644,
        uid: 0,
        gid: 0,
        rdev: 0,
        size: 0,
        atime: 0,
        mtime: 0,
        ctime: 0,
        nlink: 1,
        content,
        target: Vec::new(),
        xattrs: Vec::new(),
        dir: None,
        link_id: None,
        places: Vec::new(),
    }
}

fn name(parent: u64, name: &str, state: NameState, place: Option<u64>) -> NameRow {
    NameRow {
        parent: Ino(parent),
        name: name.into(),
        layer: TreeLayer::TOP,
        stamp: Stamp {
            millis: 5,
            counter: 1,
            machine: MachineId(9),
        },
        state,
        dir: None,
        pending: place.map(|seq| Place { seq, first_seq: seq }),
    }
}

fn digest(of: u64) -> Digest {
    Digest::of(&of.to_le_bytes())
}

fn blob(of: u64, durability: Durability) -> BlobRow {
    BlobRow {
        digest: digest(of),
        size: 100 + of,
        residency: Residency::Whole,
        durability,
        used_secs: of,
        pinned: false,
        doubted: false,
    }
}

const DURABLE: Durability = Durability::Durable { confirmed_millis: 1 };

#[test]
fn a_row_that_changes_often_is_written_once() {
    let (_dir, ledger) = fresh();
    for size in 0..1000 {
        let row = NodeRow {
            size,
            ..node(7, Content::None)
        };
        ledger.commit(vec![Change::PutNode(row)]).unwrap();
    }
    assert_eq!(ledger.core.layers.memory().active.nodes.len(), 1);
    ledger.core.layers.absorb().unwrap();
    assert_eq!(ledger.core.layers.memory().overlay_bytes(), 0);
    let stored = ledger.core.layers.index.read(|index| index.node(Ino(7))).unwrap();
    assert_eq!(stored.unwrap().size, 999);
}

#[test]
fn a_commit_that_failed_changed_nothing() {
    let (dir, ledger) = fresh();
    ledger
        .commit(vec![Change::PutBlob(blob(1, Durability::Dirty))])
        .unwrap();
    let before = ledger.totals();
    ledger.core.journal.tail().full_disk = true;
    let refused = ledger.commit(vec![
        Change::PutNode(node(7, Content::None)),
        Change::DropBlob(digest(1)),
    ]);
    assert!(matches!(refused, Err(StoreError::Full)), "{refused:?}");
    assert!(!dir.path().join("reserve").exists(), "the reserve was tried");
    assert_eq!(ledger.node(Ino(7)).unwrap(), None);
    assert!(ledger.blob(&digest(1)).unwrap().is_some());
    assert_eq!(ledger.totals(), before);

    ledger.core.journal.tail().full_disk = false;
    ledger
        .commit(vec![Change::PutNode(node(8, Content::None))])
        .unwrap();
    drop(ledger);
    let ledger = open(dir.path(), LastStop::Crashed);
    assert_eq!(ledger.node(Ino(7)).unwrap(), None);
    assert!(ledger.node(Ino(8)).unwrap().is_some());
    assert!(dir.path().join("reserve").exists(), "the reserve is back");
}

#[test]
fn a_full_disk_refuses_new_names_first() {
    let (dir, ledger) = fresh();
    let reserve = dir.path().join("reserve");
    let create = || {
        ledger.commit(vec![Change::PutName(name(
            1,
            "a",
            NameState::Live(Ino(7)),
            Some(1),
        ))])
    };
    let remove = || ledger.commit(vec![Change::PutName(name(1, "b", NameState::Dead, Some(2)))]);
    ledger.core.journal.tail().full_disk = true;
    assert!(matches!(create(), Err(StoreError::Full)));
    assert!(reserve.exists(), "a new name is not worth the reserve");
    assert!(matches!(remove(), Err(StoreError::Full)));
    assert!(!reserve.exists(), "a removal is");
    // What the reserve gave is for changes that free space.
    ledger.core.journal.tail().full_disk = false;
    assert!(matches!(create(), Err(StoreError::Full)));
    remove().unwrap();
    ledger.core.layers.reserve.restore();
    create().unwrap();
}

#[test]
fn callbacks_run_in_order_after_a_barrier_that_covers_them() {
    let (_dir, ledger) = fresh();
    let ledger = Arc::new(ledger);
    let seen = Arc::new(Mutex::new(Vec::new()));
    ledger.commit(vec![Change::PutMeta("k".into(), vec![])]).unwrap();
    for number in 0..3 {
        let (seen, ledger_then) = (Arc::clone(&seen), Arc::clone(&ledger));
        let covered = ledger.core.journal.tail().seq();
        ledger.after_barrier(Box::new(move || {
            let state = ledger_then
                .core
                .layers
                .index
                .read(crate::store::index::IndexReader::state)
                .unwrap();
            assert!(state.barrier >= covered);
            seen.lock().unwrap().push(number);
            if number == 2 {
                let seen = Arc::clone(&seen);
                ledger_then.after_barrier(Box::new(move || seen.lock().unwrap().push(9)));
            }
        }));
    }
    assert!(seen.lock().unwrap().is_empty());
    ledger.barrier().unwrap();
    assert_eq!(*seen.lock().unwrap(), [0, 1, 2]);
    ledger.close().unwrap();
    assert_eq!(*seen.lock().unwrap(), [0, 1, 2, 9]);
}

#[test]
fn the_threads_absorb_and_run_barriers_by_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let often = LedgerOptions {
        absorb_every: Duration::from_millis(1),
        barrier_every: Duration::from_millis(5),
    };
    let (ledger, _) = Ledger::open(dir.path(), LastStop::Clean, &often).unwrap();
    let (done, wait) = std::sync::mpsc::channel();
    ledger
        .commit(vec![Change::PutNode(node(7, Content::None))])
        .unwrap();
    ledger.after_barrier(Box::new(move || done.send(()).unwrap()));
    wait.recv_timeout(Duration::from_secs(60))
        .expect("a barrier came");
    assert!(
        ledger
            .core
            .layers
            .index
            .read(|index| index.node(Ino(7)))
            .unwrap()
            .is_some()
    );
}

#[test]
fn a_closed_ledger_takes_no_change_and_leaves_nothing_to_replay() {
    let (dir, ledger) = fresh();
    let ino = ledger.next_ino();
    ledger
        .commit(vec![Change::PutNode(node(ino.0, Content::None))])
        .unwrap();
    ledger.close().unwrap();
    ledger.close().unwrap();
    assert!(ledger.commit(vec![Change::DropNode(ino)]).is_err());
    drop(ledger);
    assert!(
        !dir.path().join("index.db-wal").exists(),
        "the write-ahead log was folded in"
    );
    let (ledger, replayed) = Ledger::open(dir.path(), LastStop::Clean, &BY_HAND).unwrap();
    assert_eq!(replayed, 0);
    assert!(ledger.node(ino).unwrap().is_some());
    assert_eq!(
        ledger.next_ino(),
        Ino(ino.0 + 1),
        "a clean stop wastes no numbers"
    );
}

#[test]
fn a_database_of_something_else_is_refused_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index.db");
    for (pragma, why) in [
        ("application_id = 77", "another program"),
        (
            "application_id = 1667330925; PRAGMA user_version = 3",
            "newer casmount",
        ),
    ] {
        // Only the index knows SQLite.
        crate::store::index::make_foreign(&path, pragma);
        let other = std::fs::read(&path).unwrap();
        let refused = Ledger::open(dir.path(), LastStop::Clean, &BY_HAND).unwrap_err();
        assert!(matches!(refused, StoreError::Unusable { .. }));
        assert!(refused.to_string().contains(why), "{refused}");
        assert_eq!(std::fs::read(&path).unwrap(), other);
    }
}

/// A reader never sees the middle of a commit, nor a row missing while it moves into the index.
#[test]
fn a_listing_during_absorbs_shows_one_moment() {
    const PAIRS: u64 = 16;
    let dir = tempfile::tempdir().unwrap();
    let often = LedgerOptions {
        absorb_every: Duration::from_micros(200),
        ..BY_HAND
    };
    let (ledger, _) = Ledger::open(dir.path(), LastStop::Clean, &often).unwrap();
    let swap = |pair: u64, round: u64| {
        let (live, dead) = if round.is_multiple_of(2) {
            ("a", "b")
        } else {
            ("b", "a")
        };
        let ino = Ino(100 + pair);
        vec![
            Change::PutName(name(1, &format!("{live}{pair}"), NameState::Live(ino), None)),
            Change::PutName(name(1, &format!("{dead}{pair}"), NameState::Dead, None)),
        ]
    };
    for pair in 0..PAIRS {
        ledger.commit(swap(pair, 0)).unwrap();
    }
    let listings = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut round = 0;
            while round < 20_000 && listings.load(Ordering::Relaxed) < 300 {
                round += 1;
                ledger.commit(swap(round % PAIRS, round / PAIRS)).unwrap();
            }
            round
        });
        while !writer.is_finished() {
            let rows = ledger.names_in(Ino::ROOT, None, 1000).unwrap();
            let live = rows.iter().filter(|row| row.state != NameState::Dead).count() as u64;
            assert_eq!((rows.len() as u64, live), (2 * PAIRS, PAIRS));
            for pair in 0..PAIRS {
                assert_eq!(ledger.names_of(Ino(100 + pair)).unwrap().len(), 1);
            }
            listings.fetch_add(1, Ordering::Relaxed);
        }
        assert!(writer.join().unwrap() > 100);
    });
    assert!(listings.load(Ordering::Relaxed) > 10);
}

#[test]
fn a_full_overlay_waits_for_the_absorber_and_fails_when_the_index_is_stuck() {
    let dir = tempfile::tempdir().unwrap();
    let (ledger, _) = Ledger::open(dir.path(), LastStop::Clean, &LedgerOptions::default()).unwrap();
    // More than fits: goes through because the absorber is woken by the amount.
    for key in 0..40 {
        let value = vec![1; 4 << 20];
        ledger
            .commit(vec![Change::PutMeta(format!("k{key}"), value)])
            .unwrap();
    }
    assert_eq!(ledger.meta("k0").unwrap().unwrap().len(), 4 << 20);
    ledger.stop();
    ledger.core.layers.memory().stuck = Some(true);
    let refused = (0..40).find_map(|key| {
        let value = vec![2; 4 << 20];
        ledger
            .commit(vec![Change::PutMeta(format!("k{key}"), value)])
            .err()
    });
    assert!(matches!(refused, Some(StoreError::Full)), "{refused:?}");
}
