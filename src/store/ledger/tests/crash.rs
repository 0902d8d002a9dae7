//! The end of the process and of the machine, at chosen points.

use std::fs;

use super::*;

/// What the disk holds now, as a crash would find it.
fn copy(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    fs::create_dir(to.path().join("journal")).unwrap();
    for dir in ["", "journal"] {
        for entry in fs::read_dir(from.join(dir)).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() && entry.file_name() != "reserve" {
                fs::copy(entry.path(), to.path().join(dir).join(entry.file_name())).unwrap();
            }
        }
    }
    to
}

fn staged(ino: u64, size: u64) -> Change {
    Change::PutNode(NodeRow {
        size,
        ..node(ino, Content::Staging(StagingId(ino)))
    })
}

fn doubted(ledger: &Ledger) -> Vec<u64> {
    let rows = ledger.doubted_staging().unwrap();
    rows.iter().map(|row| row.ino.0).collect()
}

fn is_doubted(ledger: &Ledger, of: u64) -> bool {
    ledger.blob(&digest(of)).unwrap().unwrap().doubted
}

#[test]
fn the_end_of_the_process_loses_nothing_at_any_point() {
    let (dir, ledger) = fresh();
    let mut points = Vec::new();
    for step in 1..=12 {
        ledger
            .commit(vec![
                Change::PutBlob(blob(step, Durability::Dirty)),
                Change::PutNode(node(10 + step, Content::Blob(digest(step)))),
            ])
            .unwrap();
        points.push((step, copy(dir.path())));
        match step % 4 {
            1 => ledger.core.layers.absorb().unwrap(),
            2 => ledger.sync().unwrap(),
            3 => ledger.barrier().unwrap(),
            // As an absorb that failed leaves it.
            _ => drop(ledger.core.layers.take_batch()),
        }
        points.push((step, copy(dir.path())));
    }
    for (step, dir) in points {
        let ledger = open(dir.path(), LastStop::Crashed);
        let dirty = ledger.dirty_blobs(100).unwrap();
        let expected: Vec<_> = (1..=step).map(digest).collect();
        assert_eq!(dirty.iter().map(|row| row.digest).collect::<Vec<_>>(), expected);
        assert_eq!(ledger.totals().dirty_blobs, step);
        assert!(ledger.node(Ino(10 + step)).unwrap().is_some());
        assert!(ledger.node(Ino(11 + step)).unwrap().is_none());
    }
}

#[test]
fn numbers_are_never_given_out_twice() {
    let dir = tempfile::tempdir().unwrap();
    let mut last = (Ino(0), 0);
    for round in 0..6 {
        let ledger = open(dir.path(), LastStop::Crashed);
        for _ in 0..1000 {
            let next = (ledger.next_ino(), ledger.next_place());
            assert!(next.0 > last.0 && next.1 > last.1);
            last = next;
        }
        if round % 2 == 0 {
            ledger
                .commit(vec![Change::PutNode(node(last.0.0, Content::None))])
                .unwrap();
        }
        if round == 3 {
            ledger.barrier().unwrap();
        }
    }
}

#[test]
fn power_loss_casts_doubt_on_bytes_younger_than_the_barrier() {
    let (dir, ledger) = fresh();
    ledger
        .commit(vec![
            Change::PutBlob(blob(1, DURABLE)),
            staged(11, 5),
            staged(15, 5),
        ])
        .unwrap();
    ledger.barrier().unwrap();
    ledger
        .commit(vec![
            Change::PutBlob(blob(2, Durability::Dirty)),
            // A change of the row without new bytes.
            Change::PutBlob(BlobRow {
                used_secs: 99,
                ..blob(1, DURABLE)
            }),
            Change::PutNode(NodeRow {
                size: 5,
                perm: 0o600,
                ..node(15, Content::Staging(StagingId(15)))
            }),
            staged(12, 5),
        ])
        .unwrap();
    ledger.core.layers.absorb().unwrap();
    ledger
        .commit(vec![
            Change::PutBlob(blob(3, DURABLE)),
            staged(13, 5),
            staged(14, 5),
            Change::SyncedStaging(StagingId(14)),
        ])
        .unwrap();
    drop(ledger);

    let crashed = copy(dir.path());
    let ledger = open(crashed.path(), LastStop::Crashed);
    assert!(
        !is_doubted(&ledger, 2) && doubted(&ledger).is_empty(),
        "the kernel lived on"
    );
    drop(ledger);

    let ledger = open(dir.path(), LastStop::PowerLost);
    assert_eq!([1, 2, 3].map(|of| is_doubted(&ledger, of)), [false, true, true]);
    assert_eq!(doubted(&ledger), [12, 13]);
    // Doubts outlive restarts, and go when they were dealt with.
    ledger
        .commit(vec![
            Change::PutBlob(blob(2, Durability::Dirty)),
            Change::SyncedStaging(StagingId(12)),
        ])
        .unwrap();
    drop(ledger);
    let ledger = open(dir.path(), LastStop::Crashed);
    assert_eq!([2, 3].map(|of| is_doubted(&ledger, of)), [false, true]);
    assert_eq!(doubted(&ledger), [13]);
    ledger.commit(vec![Change::DropNode(Ino(13))]).unwrap();
    ledger.close().unwrap();
    drop(ledger);
    // And the next power loss doubts nothing that the barrier of the mending covered.
    let ledger = open(dir.path(), LastStop::PowerLost);
    assert!(!is_doubted(&ledger, 2) && doubted(&ledger).is_empty());
}

#[test]
fn bytes_that_took_the_place_of_doubted_ones_are_new_to_the_next_power_loss() {
    let (dir, ledger) = fresh();
    ledger.commit(vec![Change::PutBlob(blob(1, DURABLE))]).unwrap();
    drop(ledger);
    let ledger = open(dir.path(), LastStop::PowerLost);
    assert!(is_doubted(&ledger, 1));
    ledger.commit(vec![Change::PutBlob(blob(1, DURABLE))]).unwrap();
    drop(ledger);
    let ledger = open(dir.path(), LastStop::PowerLost);
    assert!(is_doubted(&ledger, 1), "no barrier covered what was fetched anew");
    ledger.commit(vec![Change::PutBlob(blob(1, DURABLE))]).unwrap();
    ledger.barrier().unwrap();
    drop(ledger);
    let ledger = open(dir.path(), LastStop::PowerLost);
    assert!(!is_doubted(&ledger, 1));
}

#[test]
fn a_power_loss_during_the_mending_is_mended_again() {
    let (dir, ledger) = fresh();
    ledger
        .commit(vec![Change::PutBlob(blob(1, DURABLE)), staged(11, 5)])
        .unwrap();
    drop(ledger);
    for _ in 0..3 {
        let ledger = open(dir.path(), LastStop::PowerLost);
        assert!(is_doubted(&ledger, 1));
        assert_eq!(doubted(&ledger), [11]);
    }
}

#[test]
fn index_and_journal_may_each_have_lost_their_end() {
    let (dir, ledger) = fresh();
    ledger.commit(vec![Change::PutBlob(blob(1, DURABLE))]).unwrap();
    ledger.barrier().unwrap();
    let old_index = copy(dir.path());
    ledger.commit(vec![Change::PutBlob(blob(2, DURABLE))]).unwrap();
    ledger.core.layers.absorb().unwrap();
    ledger.commit(vec![Change::PutBlob(blob(3, DURABLE))]).unwrap();
    drop(ledger);

    // The index lost what it had absorbed: the journal has it.
    let behind = copy(dir.path());
    for file in ["index.db", "index.db-wal"] {
        fs::copy(old_index.path().join(file), behind.path().join(file)).unwrap();
    }
    let _ = fs::remove_file(behind.path().join("index.db-shm"));
    let ledger = open(behind.path(), LastStop::PowerLost);
    assert_eq!([1, 2, 3].map(|of| is_doubted(&ledger, of)), [false, true, true]);
    assert_eq!(ledger.totals().resident_blobs, 3);
    drop(ledger);

    // The journal lost all: the index is ahead of it.
    let ahead = copy(dir.path());
    for entry in fs::read_dir(ahead.path().join("journal")).unwrap() {
        fs::write(entry.unwrap().path(), b"").unwrap();
    }
    let ledger = open(ahead.path(), LastStop::PowerLost);
    assert_eq!([1, 2].map(|of| is_doubted(&ledger, of)), [false, true]);
    assert_eq!(ledger.blob(&digest(3)).unwrap(), None);
    ledger.commit(vec![Change::PutBlob(blob(4, DURABLE))]).unwrap();
    drop(ledger);
    let ledger = open(ahead.path(), LastStop::Crashed);
    assert_eq!(ledger.totals().resident_blobs, 3);
    assert!(ledger.blob(&digest(4)).unwrap().is_some());
}

#[test]
fn a_failed_absorb_is_made_good_by_the_next() {
    let (dir, ledger) = fresh();
    ledger
        .commit(vec![Change::PutNode(node(7, Content::None))])
        .unwrap();
    drop(ledger.core.layers.take_batch());
    ledger
        .commit(vec![
            Change::DropNode(Ino(7)),
            Change::PutNode(node(8, Content::None)),
        ])
        .unwrap();
    assert_eq!(ledger.node(Ino(7)).unwrap(), None);
    ledger.core.layers.absorb_all().unwrap();
    assert_eq!(ledger.core.layers.memory().overlay_bytes(), 0);
    let stored = |ino| {
        ledger
            .core
            .layers
            .index
            .read(|index| index.node(Ino(ino)))
            .unwrap()
    };
    assert_eq!((stored(7), stored(8).is_some()), (None, true));
    drop(ledger);
    assert!(
        open(dir.path(), LastStop::Crashed)
            .node(Ino(8))
            .unwrap()
            .is_some()
    );
}
