//! How many bytes and requests cross the network, counted by the S3 server.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs::File,
    io::Write,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    time::{Duration, Instant},
};

use lab::{Lab, StoreKind};
use support::{
    posix::{content, file, ro, rw},
    rng::Rng,
    wait,
};

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(30);

/// Writes a file of `bytes` that do not compress, in pieces of a mebibyte.
fn write_random(path: &Path, bytes: u64, rng: &mut Rng) {
    let mut writer = File::create(path).unwrap();
    for _ in 0..bytes / MIB {
        writer.write_all(&rng.bytes(MIB as usize)).unwrap();
    }
}

#[test]
fn changing_a_megabyte_of_a_large_file_uploads_little() {
    let lab = Lab::new(StoreKind::S3);
    let a = lab.machine("a");
    let mut rng = Rng::from_environment();
    let path = a.path("f");
    write_random(&path, 200 * MIB, &mut rng);
    a.flush();
    let first = lab.server().counts().bytes_received;
    assert!(first > 199 * MIB, "the file itself was uploaded: {first} bytes");

    lab.server().reset_counts();
    let change = rng.bytes(1_000_000);
    rw(&path).write_all_at(&change, 100 * MIB + 12_345).unwrap();
    a.flush();
    let again = lab.server().counts().bytes_received;
    eprintln!("a change of 1,000,000 bytes uploaded {again} bytes");
    assert!(again > 1_000_000, "the change was uploaded");
    assert!(again < 6_000_000, "{again} bytes");

    // Inserting moves all that follows, and chunk borders move along.
    lab.server().reset_counts();
    let mut bytes = content(&path);
    bytes.splice(50 << 20..50 << 20, b"inserted".iter().copied());
    file(&path, &bytes);
    a.flush();
    let inserted = lab.server().counts().bytes_received;
    assert!(inserted < 6_000_000, "{inserted} bytes");

    let b = lab.machine("b");
    wait::until("B has the file", SOON, || b.path("f").exists().then_some(()));
    assert!(content(&b.path("f")) == bytes);
}

#[test]
fn small_files_cost_few_requests() {
    let lab = Lab::new(StoreKind::S3);
    let a = lab.machine("a");
    let mut rng = Rng::from_environment();
    let files: Vec<_> = (0..1500)
        .map(|n| {
            let len = 1 + rng.below(8 << 10);
            (format!("file-{n}"), rng.bytes(len as usize))
        })
        .collect();
    lab.server().reset_counts();
    for (name, bytes) in &files {
        file(&a.path(name), bytes);
    }
    a.flush();
    let puts = lab.server().counts().of("PutObject");
    eprintln!("1,500 new small files took {puts} PUTs");
    // The segment among them.
    assert!((2..=60).contains(&puts), "{puts}");

    let b = lab.machine("b");
    b.until_content("file-1499", &files[1499].1);
    lab.server().reset_counts();
    for (name, bytes) in &files {
        assert!(content(&b.path(name)) == *bytes, "{name}");
    }
    let gets = lab.server().counts().of("GetObject");
    eprintln!("reading them on a cold machine took {gets} GETs");
    assert!(gets <= 150, "{gets}");
}

#[test]
fn a_small_read_of_a_cold_gigabyte_transfers_little() {
    let lab = Lab::new(StoreKind::S3);
    let mut a = lab.machine("a");
    let mut rng = Rng::from_environment();
    let path = a.path("f");
    write_random(&path, 1024 * MIB, &mut rng);
    a.flush();

    let mut transferred = Vec::new();
    for n in 0..11 {
        if n % 3 == 2 {
            // The first chunk, which every open fetches, is large in some files and small in others.
            rw(&path).write_all_at(&rng.bytes(4 * MIB as usize), 0).unwrap();
            a.flush();
        }
        // A machine of its own, that has nothing.
        let b = lab.machine(&format!("cold{n}"));
        wait::until("the cold machine has the name", SOON, || {
            b.path("f").metadata().ok()
        });
        let at = rng.below(1024 * MIB - 4096);
        let before = lab.server().counts().bytes_sent;
        let mut found = [0; 4096];
        ro(&b.path("f")).read_exact_at(&mut found, at).unwrap();
        transferred.push(settled_bytes(&lab) - before);
        let mut expected = [0; 4096];
        ro(&path).read_exact_at(&mut expected, at).unwrap();
        assert_eq!(found, expected, "at {at}");
    }
    a.unmount();
    transferred.sort_unstable();
    eprintln!("bytes for 4 KiB of a cold GiB: {transferred:?}");
    assert!(transferred[0] > 4096, "something was transferred");
    assert!(
        transferred[transferred.len() - 1] <= 2 * MIB + MIB / 2,
        "{transferred:?}"
    );
    assert!(
        transferred[transferred.len() / 2] <= MIB + MIB / 2,
        "{transferred:?}"
    );
}

/// The bytes that the server sent, once no more follow (readahead may still run).
fn settled_bytes(lab: &Lab) -> u64 {
    let mut last = (lab.server().counts().bytes_sent, Instant::now());
    wait::until("transfers end", SOON, || {
        let now = lab.server().counts().bytes_sent;
        if now != last.0 {
            last = (now, Instant::now());
        }
        (last.1.elapsed() > Duration::from_millis(300)).then_some(now)
    })
}

#[test]
fn the_kernel_reads_a_mebibyte_ahead_where_root_may_say_so() {
    let lab = Lab::new(StoreKind::S3);
    let a = lab.machine("a");
    let device = a.root().metadata().unwrap().dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let limit = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    if File::options().write(true).open(&limit).is_err() {
        skip!("{limit} cannot be written here");
    }
    assert_eq!(std::fs::read_to_string(limit).unwrap().trim(), "1024");
}

#[test]
fn a_large_file_costs_few_requests() {
    let lab = Lab::new(StoreKind::S3);
    let mut a = lab.machine("a");
    let bytes = Rng::from_environment().bytes(64 << 20);
    file(&a.path("f"), &bytes);
    a.flush();
    // About 128 chunks of half a mebibyte.
    let sent = lab.server().counts();
    let puts = sent.of("PutObject");
    assert!((16..64).contains(&puts), "{puts} PUTs, {:?}", sent.requests);
    a.unmount();

    let b = lab.machine("b");
    wait::until("B has the file", SOON, || b.path("f").exists().then_some(()));
    let before = lab.server().counts();
    assert!(content(&b.path("f")) == bytes);
    let after = lab.server().counts();
    let gets = after.of("GetObject") - before.of("GetObject");
    assert!(gets < 64, "{gets} GETs");
    let transferred = after.bytes_sent - before.bytes_sent;
    assert!(transferred < 72 * MIB, "{transferred} bytes");

    // Another volume of the same bucket finds the packs by their names.
    lab.server().reset_counts();
    let c = lab.spec("c").arg("--volume=other").start();
    file(&c.path("g"), &bytes);
    c.flush();
    let sent = lab.server().counts().bytes_received;
    assert!(sent < MIB, "{sent} bytes");
}

#[test]
fn content_that_the_bucket_has_is_not_sent_again() {
    let lab = Lab::new(StoreKind::S3);
    let a = lab.machine("a");
    let bytes = Rng::from_environment().bytes(20 << 20);
    file(&a.path("one"), &bytes);
    a.flush();
    lab.server().reset_counts();
    file(&a.path("two"), &bytes);
    std::fs::rename(a.path("one"), a.path("three")).unwrap();
    a.flush();
    let sent = lab.server().counts().bytes_received;
    assert!(sent < 100_000, "{sent} bytes for a name and a rename");
}

#[test]
fn a_file_written_again_and_again_is_uploaded_once_it_rests() {
    let lab = Lab::new(StoreKind::S3);
    let a = lab.machine("a");
    let mut rng = Rng::from_environment();
    let start = Instant::now();
    let mut last = Vec::new();
    // 30 contents of a mebibyte, each closed well within the settle time of the one before.
    for _ in 0..30 {
        last = rng.bytes(1 << 20);
        file(&a.path("f"), &last);
    }
    let took = start.elapsed();
    a.flush();
    let sent = lab.server().counts().bytes_received;
    let rests = 2 + took.as_secs() / 2;
    assert!(
        sent < (rests + 1) * MIB,
        "{sent} bytes for 30 versions in {took:?}"
    );
    assert!(content(&a.path("f")) == last);
}

#[test]
fn many_readers_of_one_cold_chunk_fetch_it_once() {
    let lab = Lab::new(StoreKind::S3);
    let a = lab.machine("a");
    let bytes = Rng::from_environment().bytes(1 << 20);
    file(&a.path("f"), &bytes);
    a.flush();
    let b = lab.machine("b");
    wait::until("B has the name", SOON, || b.path("f").metadata().ok());
    lab.server().set_faults(s3server::Faults {
        latency_ms: 100,
        ..s3server::Faults::default()
    });
    let before = lab.server().counts().bytes_sent;
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| assert!(content(&b.path("f")) == bytes));
        }
    });
    let sent = settled_bytes(&lab) - before;
    assert!(sent < 2 * MIB, "{sent} bytes for one mebibyte");
}

#[test]
fn looking_up_names_costs_no_request_each() {
    let lab = Lab::new(StoreKind::S3);
    let a = lab.machine("a");
    for n in 0..300 {
        file(&a.path(format!("f{n}")), b"x");
    }
    a.flush();
    let b = lab.machine("b");
    wait::until("B has all names", SOON, || {
        (std::fs::read_dir(b.root()).unwrap().count() == 300).then_some(())
    });
    lab.server().reset_counts();
    let start = Instant::now();
    for n in 0..3_000 {
        let found = b.path(format!("f{n}")).metadata().is_ok();
        assert_eq!(found, n < 300);
    }
    // The follower polls once a second and lists once a minute; lookups add nothing to that.
    let polls = 10 + 4 * start.elapsed().as_secs();
    let asked = lab.server().counts();
    assert!(asked.total() < polls, "{asked:?}");
}
