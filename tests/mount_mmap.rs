//! Memory mappings of files of a mount.

mod support;

use std::{fs, os::unix::fs::FileExt};

use support::{
    place::Place,
    posix::{Mapping, content, file, ro, rw},
    rng::Rng,
};

#[test]
fn a_mapping_shows_the_content() {
    let place = Place::new();
    let bytes = Rng::from_environment().bytes(3_000_000);
    let path = file(&place.path("f"), &bytes);
    for sealed in [false, true] {
        for shared in [false, true] {
            let mapping = Mapping::new(&ro(&path), bytes.len(), false, shared).unwrap();
            assert!(mapping.read() == bytes, "sealed: {sealed}, shared: {shared}");
        }
        place.seal();
    }
}

#[test]
fn stores_through_a_shared_mapping_reach_the_file() {
    let mut place = Place::new();
    let path = file(&place.path("f"), &vec![b'.'; 100_000]);
    for (round, at) in [(0_u8, 10_usize), (1, 50_000), (2, 99_000)] {
        let opened = rw(&path);
        let mapping = Mapping::new(&opened, 100_000, true, true).unwrap();
        mapping.write(at, &[b'0' + round; 500]);
        mapping.sync().unwrap();
        let mut seen = [0; 500];
        ro(&path).read_exact_at(&mut seen, at as u64).unwrap();
        assert_eq!(seen, [b'0' + round; 500]);
        drop((mapping, opened));
        assert_eq!(&content(&path)[at..at + 500], [b'0' + round; 500]);
        place.seal();
        assert_eq!(&content(&path)[at..at + 500], [b'0' + round; 500]);
    }
    place.remount();
    let bytes = content(&path);
    assert_eq!((bytes[10], bytes[50_000], bytes[99_000]), (b'0', b'1', b'2'));
}

#[test]
fn a_mapping_outlives_its_descriptor() {
    let place = Place::new();
    let path = file(&place.path("f"), &vec![0; 50_000]);
    let mapping = Mapping::new(&rw(&path), 50_000, true, true).unwrap();
    // Closed: from here on only the mapping holds the file.
    mapping.write(100, b"after the close");
    mapping.sync().unwrap();
    drop(mapping);
    assert_eq!(&content(&path)[100..115], b"after the close");
    place.seal();
    assert_eq!(&content(&path)[100..115], b"after the close");
}

#[test]
fn nothing_is_sealed_while_a_writable_mapping_lives() {
    let mut place = Place::new();
    let path = file(&place.path("f"), &vec![1; 50_000]);
    let mapping = Mapping::new(&rw(&path), 50_000, true, true).unwrap();
    mapping.write(0, b"first");
    if let Some(machine) = place.machine() {
        // Waiting cannot end while the mapping lives; the file is named.
        let output = machine.control("flush", &["--deadline", "2s"]);
        assert!(
            !output.status.success(),
            "flush claims that a mapped file is durable"
        );
    }
    mapping.write(0, b"later");
    mapping.sync().unwrap();
    drop(mapping);
    place.seal();
    assert_eq!(&content(&path)[..5], b"later");
    place.remount();
    assert_eq!(&content(&path)[..5], b"later");
}

#[test]
fn stores_into_a_private_mapping_stay_private() {
    let place = Place::new();
    let path = file(&place.path("f"), &vec![7; 20_000]);
    for sealed in [false, true] {
        let mapping = Mapping::new(&ro(&path), 20_000, true, false).unwrap();
        mapping.write(0, b"private");
        assert_eq!(&mapping.read()[..7], b"private");
        drop(mapping);
        assert!(content(&path) == vec![7; 20_000], "sealed: {sealed}");
        place.seal();
    }
}

#[test]
fn a_mapping_sees_what_is_written_beside_it() {
    let place = Place::new();
    let path = file(&place.path("f"), &vec![b'a'; 10_000]);
    for _ in 0..2 {
        let opened = rw(&path);
        let mapping = Mapping::new(&opened, 10_000, false, true).unwrap();
        assert_eq!(mapping.read()[5_000], b'a');
        opened.write_all_at(b"written", 5_000).unwrap();
        assert_eq!(&mapping.read()[5_000..5_007], b"written");
        drop((mapping, opened));
        file(&path, &vec![b'a'; 10_000]);
        place.seal();
    }
}

#[test]
fn a_mapping_of_an_unlinked_file_works() {
    let place = Place::new();
    let path = file(&place.path("f"), &vec![3; 10_000]);
    place.seal();
    let mapping = Mapping::new(&rw(&path), 10_000, true, true).unwrap();
    fs::remove_file(&path).unwrap();
    mapping.write(1, b"x");
    assert_eq!(&mapping.read()[..3], [3, b'x', 3]);
}

#[test]
fn a_database_in_wal_mode_works() {
    // SQLite's write-ahead log: a shared mapping, byte-range locks, truncation and fsync together.
    let mut place = Place::new();
    let path = place.path("db.sqlite");
    for round in 0..3_i64 {
        let first = rusqlite::Connection::open(&path).unwrap();
        let mode: String = first
            .query_row("PRAGMA journal_mode=WAL", [], |row| row.get(0))
            .unwrap();
        assert_eq!(mode, "wal");
        first
            .execute_batch("CREATE TABLE IF NOT EXISTS t(round INTEGER, n INTEGER)")
            .unwrap();
        let second = rusqlite::Connection::open(&path).unwrap();
        for n in 0..50_i64 {
            let writer = if n % 2 == 0 { &first } else { &second };
            writer
                .execute("INSERT INTO t VALUES (?1, ?2)", [round, n])
                .unwrap();
        }
        let count: i64 = first
            .query_row("SELECT count(*) FROM t", [], |row| row.get(0))
            .unwrap();
        assert_eq!(count, (round + 1) * 50);
        let check: String = second
            .query_row("PRAGMA integrity_check", [], |row| row.get(0))
            .unwrap();
        assert_eq!(check, "ok");
        drop((first, second));
        place.remount();
    }
}
