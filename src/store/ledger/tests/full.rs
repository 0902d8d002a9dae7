//! A disk that is really full; run by hand on a small file system that is
//! mounted for it: `CASMOUNT_SMALL_FS=/mnt/small cargo test --lib ledger::tests::full -- --ignored`.

use std::fs;

use super::*;

#[test]
#[ignore = "needs a small file system"]
fn a_full_disk_refuses_changes_and_lets_them_in_again() {
    let small = std::env::var("CASMOUNT_SMALL_FS").expect("CASMOUNT_SMALL_FS names a small file system");
    let dir = tempfile::tempdir_in(small).unwrap();
    let (ledger, _) = Ledger::open(dir.path(), LastStop::Clean, &LedgerOptions::default()).unwrap();
    let filler = dir.path().join("filler");
    {
        let mut file = fs::File::options()
            .append(true)
            .create(true)
            .open(&filler)
            .unwrap();
        for bytes in [1 << 16, 1 << 10, 1] {
            while std::io::Write::write_all(&mut file, &vec![7; bytes]).is_ok() {}
        }
    }
    // Room for some names.
    let filler_bytes = fs::metadata(&filler).unwrap().len();
    let file = fs::File::options().write(true).open(&filler).unwrap();
    file.set_len(filler_bytes - (64 << 10)).unwrap();
    drop(file);
    let name_of = |number: u64| format!("{number}-{}", "x".repeat(200));
    let mut committed = 0;
    let full = loop {
        let row = name(1, &name_of(committed), NameState::Live(Ino(7)), Some(committed));
        match ledger.commit(vec![Change::PutName(row)]) {
            Ok(()) => committed += 1,
            Err(err) => break err,
        }
        assert!(committed < 1 << 20, "the disk never became full");
    };
    assert!(matches!(full, StoreError::Full), "{full:?}");
    println!("{committed} names before the disk was full");
    // What frees space goes through, and the index takes it.
    let dead = |number| Change::PutName(name(1, &name_of(number), NameState::Dead, Some(number)));
    for number in 0..committed {
        ledger.commit(vec![dead(number)]).unwrap();
    }
    ledger.core.layers.absorb_all().unwrap();
    let all_dead = |ledger: &Ledger| {
        let names = ledger.names_in(Ino(1), None, 1 << 20).unwrap();
        assert_eq!(names.len() as u64, committed);
        assert!(names.iter().all(|row| row.state == NameState::Dead));
    };
    all_dead(&ledger);
    drop(ledger);

    fs::remove_file(&filler).unwrap();
    let (ledger, _) = Ledger::open(dir.path(), LastStop::Crashed, &BY_HAND).unwrap();
    all_dead(&ledger);
    let row = name(1, "again", NameState::Live(Ino(7)), Some(1));
    ledger.commit(vec![Change::PutName(row)]).unwrap();
    ledger.close().unwrap();
}
