//! Catalogs that are fetched whole behind the mount: no look-up asks the store.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
#[path = "support/snapshots.rs"]
mod snapshots;
mod support;
#[path = "support/volume.rs"]
mod volume;
#[path = "support/volumes.rs"]
mod volumes;

use std::{
    fs::{self, DirEntry},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    time::Duration,
};

use casmount::{
    base::{
        chunk::{Chunk, ChunkList},
        digest::Digest,
    },
    namespace::{
        catalog::read,
        change::{Entry, EntryBlob, EntryChunks},
    },
    store::{
        manifest::{self, MAX_INLINE_CHUNKS},
        rows::NodeKind,
    },
    tier::{Body, layout},
};
use lab::{Lab, StoreKind};
use s3server::Faults;
use serde_json::Value;
use support::{
    machine::Machine,
    posix::{content, file},
    tree, wait,
};

on_both_stores!(
    a_fork_and_a_snapshot_need_no_store_once_their_catalogs_are_here,
    a_catalog_that_is_gone_is_replaced_before_anybody_looks,
    chunk_lists_that_were_missed_are_fetched_at_the_next_start,
    a_mount_that_ends_meanwhile_ends_cleanly,
    what_is_damaged_hinders_nothing_else,
    lookups_ask_for_nothing_once_the_catalog_is_here,
    lookups_that_come_first_add_no_request,
    what_is_damaged_or_gone_on_the_disk_is_fetched_again,
    what_does_not_fit_is_loaded_as_it_is_touched,
    a_store_that_was_away_is_asked_again,
);

const SOON: Duration = Duration::from_secs(60);
const NAMES: u64 = 40_000;
const LARGE: u64 = 3 << 30;

/// A catalog of many names without a log, and with a file whose chunk list is an object of its own, which is named.
fn generate(lab: &Lab) -> String {
    let shape = volume::Shape {
        names: NAMES,
        per_dir: 250,
        fan_out: 64,
    };
    let count = MAX_INLINE_CHUNKS as u64 + 512;
    let chunk = |number: u64| Chunk {
        digest: Digest::of(&number.to_be_bytes()),
        len: (LARGE / count) as u32,
    };
    let list = ChunkList::new((0..count).map(chunk).collect());
    let bytes = manifest::encode(&list, &vec![None; list.chunks().len()]);
    let name = Digest::of(&bytes);
    let blob = EntryBlob {
        digest: Digest::of(b"large"),
        size: list.size(),
        chunks: EntryChunks::Listed {
            digest: name,
            size: bytes.len() as u64,
        },
        places: Vec::new(),
    };
    let large = Entry {
        blob: Some(blob),
        ..Entry::new(NodeKind::File, 0o644)
    };
    let list = layout::blob(&name);
    lab.with_bucket(async |bucket| {
        volume::make(&bucket, "main", shape, vec![("large".to_owned(), large)])
            .await
            .unwrap();
        bucket.put_new(&list, Body::raw(bytes)).await.unwrap();
    });
    list
}

/// Waits until all catalogs are; returns how many parts the first has.
fn until_whole(machine: &Machine) -> u64 {
    wait::until("the catalog is whole on the disk", SOON, || {
        let catalogs = machine.status()["catalogs"].take();
        let parts = |catalog: &Value| catalog["parts"].as_u64();
        let catalogs = catalogs.as_array().unwrap();
        let is_whole = |catalog| parts(catalog).is_some() && catalog["kept_parts"].as_u64() == parts(catalog);
        catalogs
            .iter()
            .all(is_whole)
            .then(|| parts(&catalogs[0]))
            .flatten()
    })
}

/// What a mount asks meanwhile that has nothing to do with names: settings, what expires.
const OTHERS: u64 = 3;

/// How often objects were read; a directory does not count.
fn gets(lab: &Lab, kind: StoreKind) -> u64 {
    match kind {
        StoreKind::S3 => lab.server().counts().of("GetObject"),
        StoreKind::File => 0,
    }
}

fn entries(dir: &Path) -> io::Result<Vec<DirEntry>> {
    fs::read_dir(dir)?.collect()
}

/// Looks at everything, and for what is not there.
fn look_everywhere(machine: &Machine) {
    let mut files = 0;
    for top in entries(machine.root()).unwrap() {
        if top.file_name() == "large" {
            assert!(top.metadata().unwrap().len() > LARGE / 2);
            continue;
        }
        assert!(fs::symlink_metadata(top.path().join("missing")).is_err());
        for dir in entries(&top.path()).unwrap() {
            let missing = fs::symlink_metadata(dir.path().join("missing"));
            assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
            let found = entries(&dir.path()).unwrap();
            assert_eq!(found[0].metadata().unwrap().size(), 20_000);
            files += found.len() as u64;
        }
    }
    assert_eq!(files, NAMES);
}

fn lookups_ask_for_nothing_once_the_catalog_is_here(kind: StoreKind) {
    let lab = Lab::new(kind);
    generate(&lab);
    let began = gets(&lab, kind);
    let mut machine = lab.machine("machine");
    let parts = until_whole(&machine);
    assert!(parts > 10, "{parts} parts");
    assert_eq!(machine.counter("/catalogs/0/fetched_parts"), parts);
    // Nothing was imported for it.
    assert!(machine.counter("/catalogs/0/loaded_registers") < NAMES / 4);
    assert!(machine.log().contains("the catalog is whole on this disk"));
    let before = gets(&lab, kind);
    // Beside the parts: what a mount asks, the root once more, and the list.
    assert!(
        before - began <= 14 + parts + 2,
        "{before} - {began} for {parts} parts"
    );
    look_everywhere(&machine);
    assert_eq!(machine.counter("/catalogs/0/fetched_parts"), parts);
    assert!(gets(&lab, kind) - before <= OTHERS);
    // A machine that is killed has it, and neither needs the store for it.
    let mut cold = lab.machine("cold");
    until_whole(&cold);
    for machine in [&mut machine, &mut cold] {
        machine.kill9();
    }
    lab.set_down(true);
    for machine in [&mut machine, &mut cold] {
        machine.restart();
        assert_eq!(until_whole(machine), parts);
        look_everywhere(machine);
        assert_eq!(machine.counter("/catalogs/0/fetched_parts"), 0);
    }
    assert!(machine.rss_bytes() < 250_000_000, "{}", machine.rss_bytes());
    lab.set_down(false);
}

fn lookups_that_come_first_add_no_request(kind: StoreKind) {
    let lab = Lab::new(kind);
    generate(&lab);
    let machine = lab.machine("machine");
    look_everywhere(&machine);
    let parts = until_whole(&machine);
    assert_eq!(machine.counter("/catalogs/0/fetched_parts"), parts);
    let before = gets(&lab, kind);
    look_everywhere(&machine);
    assert!(gets(&lab, kind) - before <= OTHERS);
}

fn what_is_damaged_or_gone_on_the_disk_is_fetched_again(kind: StoreKind) {
    let lab = Lab::new(kind);
    generate(&lab);
    let mut machine = lab.machine("machine");
    until_whole(&machine);
    machine.kill9();
    let dir = machine.spec.cache_dir.join("catalogs");
    let kept = entries(&dir).unwrap();
    for damage in 0..3 {
        for object in &kept {
            let mut bytes = fs::read(object.path()).unwrap();
            match damage {
                0 => fs::remove_file(object.path()).unwrap(),
                1 => {
                    *bytes.last_mut().unwrap() ^= 1;
                    fs::write(object.path(), bytes).unwrap();
                }
                _ => fs::write(object.path(), &bytes[1..]).unwrap(),
            }
        }
        fs::write(dir.join("what nobody knows"), b"x").unwrap();
        fs::write(kept[0].path().with_extension("0new"), b"x").unwrap();
        machine.restart();
        // Nobody had to look.
        until_whole(&machine);
        let again = entries(&dir).unwrap();
        assert_eq!(again.len(), kept.len());
        for object in again {
            let name = object.file_name().into_string().unwrap();
            assert_eq!(name, Digest::of(&fs::read(object.path()).unwrap()).to_string());
        }
        machine.kill9();
    }
    lab.set_down(true);
    machine.restart();
    look_everywhere(&machine);
    lab.set_down(false);
}

fn what_does_not_fit_is_loaded_as_it_is_touched(kind: StoreKind) {
    let lab = Lab::new(kind);
    generate(&lab);
    for (arg, why) in [
        ("--catalog-prefetch=100K", "larger than catalog-prefetch"),
        ("--min-free=1000000G", "the disk has no room for it"),
    ] {
        let machine = lab.spec(arg).arg(arg).start();
        wait::until("it is said", SOON, || machine.log().contains(why).then_some(()));
        look_everywhere(&machine);
        assert_eq!(machine.counter("/catalogs/0/kept_parts"), 0);
        let dir = machine.spec.cache_dir.join("catalogs");
        assert!(entries(&dir).unwrap_or_default().is_empty());
    }
}

fn a_store_that_was_away_is_asked_again(kind: StoreKind) {
    let lab = Lab::new(kind);
    generate(&lab);
    let small = lab.spec("machine").arg("--read-timeout=1s");
    let mut machine = small.clone().arg("--catalog-prefetch=0").start();
    machine.kill9();
    lab.set_down(true);
    machine.spec = small;
    machine.restart();
    wait::until("it is said", SOON, || {
        machine
            .log()
            .contains("a catalog is not fetched whole")
            .then_some(())
    });
    lab.set_down(false);
    until_whole(&machine);
    look_everywhere(&machine);
}

fn a_fork_and_a_snapshot_need_no_store_once_their_catalogs_are_here(kind: StoreKind) {
    let lab = Lab::new(kind);
    let main = lab.machine("main");
    snapshots::fill(main.root());
    main.flush();
    snapshots::compact(&lab, "main");
    volumes::fork(&lab, "fork", "main", &[]);
    let fork = volumes::machine(&lab, "fork", "fork");
    file(&fork.path("of the fork"), b"fork");
    fork.flush();
    snapshots::compact(&lab, "fork");
    snapshots::create(&lab, "fork", snapshots::TAG);
    let expected = tree::read(fork.root());

    let live = volumes::machine(&lab, "live", "fork");
    let shown = snapshots::snapshot(&lab, "shown", "fork", snapshots::TAG);
    for machine in [&live, &shown] {
        until_whole(machine);
        assert_eq!(machine.status()["catalogs"].as_array().unwrap().len(), 2);
        // What files have is read from the store, now.
        assert_eq!(content(&machine.path("of the fork")), b"fork");
    }
    lab.set_down(true);
    let paths = |machine: &Machine| {
        let mut found = Vec::new();
        let mut dirs = vec![machine.root().to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in entries(&dir).unwrap() {
                if entry.file_type().unwrap().is_dir() {
                    dirs.push(entry.path());
                }
                found.push(entry.path().strip_prefix(machine.root()).unwrap().to_owned());
            }
        }
        found.sort();
        found
    };
    let of_fork = paths(&fork);
    assert_eq!(of_fork.len(), expected.len());
    assert_eq!(paths(&live), of_fork);
    assert_eq!(paths(&shown), of_fork);
    lab.set_down(false);
}

fn a_catalog_that_is_gone_is_replaced_before_anybody_looks(kind: StoreKind) {
    let lab = Lab::new(kind);
    let main = lab.machine("main");
    snapshots::fill(main.root());
    main.flush();
    snapshots::compact(&lab, "main");
    // Parts in which nothing changes are the next one's, too.
    let of_then: Vec<_> = volumes::objects_of(&lab, "main")
        .into_iter()
        .filter(|(key, bytes)| key.contains("/catalogs/") && !bytes.starts_with(b"casmpart"))
        .map(|(key, _)| key)
        .collect();
    assert_eq!(of_then.len(), 1, "{of_then:?}");
    let small = lab.spec("machine");
    let mut machine = small.clone().arg("--catalog-prefetch=0").start();
    machine.kill9();
    file(&main.path("new"), b"new");
    main.flush();
    snapshots::compact(&lab, "main");
    for key in &of_then {
        lab.tamper(key, None);
    }
    machine.spec = small;
    machine.restart();
    until_whole(&machine);
    assert!(
        machine
            .log()
            .contains("directories are loaded from the newest one")
    );
    machine.until_content("new", b"new");
    tree::assert_same_but_dir_times(&tree::read(main.root()), &tree::read(machine.root()));
}

fn chunk_lists_that_were_missed_are_fetched_at_the_next_start(kind: StoreKind) {
    let lab = Lab::new(kind);
    let list = generate(&lab);
    let objects = lab.objects();
    let bytes = objects
        .iter()
        .find(|object| object.key == list)
        .unwrap()
        .bytes
        .clone();
    lab.tamper(&list, None);
    let mut machine = lab.machine("machine");
    until_whole(&machine);
    assert!(machine.log().contains("the chunk list of a blob is lost"));
    machine.kill9();
    lab.with_bucket(async |bucket| {
        bucket.put_new(&list, Body::raw(bytes)).await.unwrap();
    });
    machine.restart();
    until_whole(&machine);
    lab.set_down(true);
    look_everywhere(&machine);
    lab.set_down(false);
}

fn a_mount_that_ends_meanwhile_ends_cleanly(kind: StoreKind) {
    let lab = Lab::new(kind);
    generate(&lab);
    let mut machine = lab.machine("machine");
    for _ in 0..3 {
        machine.unmount();
        // There is none when it ended before anything came.
        let _ = fs::remove_dir_all(machine.spec.cache_dir.join("catalogs"));
        if kind == StoreKind::S3 {
            lab.server().set_faults(Faults {
                latency_ms: 200,
                ..Faults::default()
            });
        }
        machine.restart();
        let log = machine.log();
        let last = log.rsplit("opened the cache directory").next().unwrap();
        assert!(last.contains("crashed: false"), "{last}");
    }
    if kind == StoreKind::S3 {
        lab.server().set_faults(Faults::default());
    }
    until_whole(&machine);
}

fn what_is_damaged_hinders_nothing_else(kind: StoreKind) {
    let lab = Lab::new(kind);
    generate(&lab);
    let newest = lab.with_bucket(async |bucket| read::newest(bucket.as_ref(), "main", None).await);
    let root = newest.unwrap().expect("it was made").root;
    // That of the top is the first, and a mount looks into it.
    let second = layout::catalog("main", &root.parts[1].digest);
    lab.tamper(&second, Some(b"casmpart, or what is left of it".to_vec()));
    let machine = lab.machine("machine");
    wait::until("all others are here", SOON, || {
        let kept = machine.counter("/catalogs/0/kept_parts");
        let log = machine.log();
        let is_said = log.contains("a catalog is not fetched whole") && log.contains("is damaged");
        (is_said && kept + 1 == root.parts.len() as u64).then_some(())
    });
}
