//! Tests of the journal: what is appended, cut off, damaged and read back.

use super::*;
use crate::store::{
    record::{self, Redo},
    rows::Change,
};

fn redo(value: u8) -> Vec<Redo> {
    vec![Redo::Change(Change::PutMeta(
        format!("key {value}"),
        vec![value; 9],
    ))]
}

fn append(journal: &Journal, value: u8) -> Result<u64, StoreError> {
    let mut bytes = vec![0; RECORD_HEADER_BYTES];
    record::encode(&redo(value), &mut bytes);
    journal.tail().append(&mut bytes)
}

/// What a replay after `absorbed` gives, and how it ends.
type Records = Vec<(u64, Vec<Redo>)>;

fn replayed(dir: &Path, absorbed: u64, power_lost: bool) -> (Records, Result<Replayed, StoreError>) {
    let mut found = Vec::new();
    let end = replay(dir, absorbed, power_lost, |seq, redos| {
        found.push((seq, redos));
        Ok(())
    });
    (found, end)
}

fn seqs(dir: &Path, absorbed: u64, power_lost: bool) -> Vec<u64> {
    let (found, end) = replayed(dir, absorbed, power_lost);
    let last = found.last().map_or(absorbed, |(seq, _)| *seq);
    assert_eq!(end.unwrap().seq, last);
    found.into_iter().map(|(seq, _)| seq).collect()
}

/// A directory with one file of three records.
fn three() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), 0).unwrap();
    for value in 1..=3 {
        append(&journal, value).unwrap();
    }
    let path = journal.tail().path.clone();
    (dir, path)
}

#[test]
fn what_was_appended_is_replayed_and_what_was_absorbed_is_not() {
    let (dir, _) = three();
    let (found, end) = replayed(dir.path(), 0, false);
    assert_eq!(found, [(1, redo(1)), (2, redo(2)), (3, redo(3))]);
    assert_eq!(end.unwrap(), Replayed { records: 3, seq: 3 });
    assert_eq!(seqs(dir.path(), 2, false), [3]);
    assert_eq!(seqs(dir.path(), 9, false), [0; 0]);
}

#[test]
fn a_tail_torn_at_any_byte_costs_the_last_record_only() {
    let (dir, path) = three();
    let whole = fs::read(&path).unwrap();
    let record_bytes = (whole.len() - FILE_HEADER_BYTES as usize) / 3;
    let last = whole.len() - record_bytes;
    for len in last..whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        assert_eq!(seqs(dir.path(), 0, false), [1, 2], "cut at {len}");
        assert_eq!(
            fs::metadata(&path).unwrap().len(),
            last as u64,
            "the rest is cut off"
        );
    }
    for at in last..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x40;
        fs::write(&path, &flipped).unwrap();
        assert_eq!(seqs(dir.path(), 0, false), [1, 2], "flipped at {at}");
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(seqs(dir.path(), 0, false), [1, 2, 3]);
}

#[test]
fn a_file_cut_within_its_header_is_empty() {
    let (dir, path) = three();
    let whole = fs::read(&path).unwrap();
    let next = file_path(dir.path(), 1);
    for len in 0..FILE_HEADER_BYTES as usize {
        fs::write(&next, &whole[..len]).unwrap();
        assert_eq!(seqs(dir.path(), 0, false), [1, 2, 3]);
    }
    let journal = Journal::open(dir.path(), 3).unwrap();
    append(&journal, 4).unwrap();
    assert_eq!(seqs(dir.path(), 0, false), [1, 2, 3, 4]);
}

#[test]
fn records_go_on_behind_a_torn_tail() {
    let (dir, path) = three();
    let len = fs::metadata(&path).unwrap().len();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(len - 1)
        .unwrap();
    assert_eq!(seqs(dir.path(), 0, false), [1, 2]);
    let journal = Journal::open(dir.path(), 2).unwrap();
    append(&journal, 7).unwrap();
    drop(journal);
    let (found, _) = replayed(dir.path(), 0, false);
    assert_eq!(found[2], (3, redo(7)));
}

#[test]
fn a_full_disk_leaves_nothing_of_the_record() {
    let (dir, path) = three();
    let journal = Journal::open(dir.path(), 3).unwrap();
    let empty = fs::metadata(file_path(dir.path(), 1)).unwrap().len();
    journal.tail().full_disk = true;
    assert!(matches!(append(&journal, 4), Err(StoreError::Full)));
    assert_eq!(fs::metadata(file_path(dir.path(), 1)).unwrap().len(), empty);
    journal.tail().full_disk = false;
    assert_eq!(append(&journal, 5).unwrap(), 4);
    let (found, _) = replayed(dir.path(), 3, false);
    assert_eq!(found, [(4, redo(5))]);
    assert!(path.exists());
}

#[test]
fn a_gap_is_damage_unless_power_was_lost() {
    let (dir, path) = three();
    let journal = Journal::open(dir.path(), 3).unwrap();
    for value in 4..=5 {
        append(&journal, value).unwrap();
    }
    journal.rotate().unwrap();
    append(&journal, 6).unwrap();
    drop(journal);
    let len = fs::metadata(&path).unwrap().len();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(len - 3)
        .unwrap();
    let (_, end) = replayed(dir.path(), 0, false);
    let why = end.unwrap_err().to_string();
    assert!(why.contains("record 3 is missing"), "{why}");
    // What the index has already needs no journal.
    assert_eq!(seqs(dir.path(), 3, false), [4, 5, 6]);
    assert_eq!(seqs(dir.path(), 0, true), [1, 2]);
    // What lay behind the gap is gone for good: later records take its numbers.
    assert_eq!(seqs(dir.path(), 0, false), [1, 2]);
    assert_eq!(seqs(dir.path(), 5, false), [0; 0]);
    let journal = Journal::open(dir.path(), 2).unwrap();
    append(&journal, 9).unwrap();
    assert_eq!(seqs(dir.path(), 0, false), [1, 2, 3]);
}

#[test]
fn a_newer_format_is_refused() {
    let (dir, path) = three();
    let mut bytes = fs::read(&path).unwrap();
    bytes[8] = 2;
    fs::write(&path, &bytes).unwrap();
    let (_, end) = replayed(dir.path(), 0, false);
    assert!(end.unwrap_err().to_string().contains("newer casmount"));
    assert_eq!(fs::read(&path).unwrap(), bytes);
}

#[test]
fn settled_files_are_removed_and_later_ones_kept() {
    let (dir, _) = three();
    let journal = Journal::open(dir.path(), 3).unwrap();
    append(&journal, 4).unwrap();
    let (number, cut) = journal.rotate().unwrap();
    assert_eq!((number, cut), (2, 4));
    append(&journal, 5).unwrap();
    journal.settled(number, cut).unwrap();
    assert_eq!(file_numbers(dir.path()).unwrap(), [2]);
    assert_eq!(journal.tail().unsynced.len(), 0);
    assert_eq!(seqs(dir.path(), 4, false), [5]);
}

#[test]
fn all_who_sync_at_once_return_and_older_files_are_covered() {
    let (dir, _) = three();
    let journal = Journal::open(dir.path(), 3).unwrap();
    std::thread::scope(|scope| {
        for value in 0..8 {
            let journal = &journal;
            scope.spawn(move || {
                for _ in 0..20 {
                    let seq = append(journal, value).unwrap();
                    journal.sync().unwrap();
                    assert!(journal.sync_state().through >= seq);
                }
            });
        }
    });
    assert_eq!(journal.sync_state().through, 3 + 160);
    assert_eq!(journal.tail().unsynced.len(), 0);
}
