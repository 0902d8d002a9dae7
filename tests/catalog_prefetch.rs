//! Catalogs that are fetched whole behind the mount: no look-up asks the store.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;
#[path = "support/volume.rs"]
mod volume;

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
    namespace::change::{Entry, EntryBlob, EntryChunks},
    store::{
        manifest::{self, MAX_INLINE_CHUNKS},
        rows::NodeKind,
    },
    tier::{Body, layout},
};
use lab::{Lab, StoreKind};
use support::{machine::Machine, wait};

on_both_stores!(
    lookups_ask_for_nothing_once_the_catalog_is_here,
    lookups_that_come_first_add_no_request,
    what_is_damaged_or_gone_on_the_disk_is_fetched_again,
    what_does_not_fit_is_loaded_as_it_is_touched,
    a_store_that_was_away_is_asked_again,
);

const SOON: Duration = Duration::from_secs(60);
const NAMES: u64 = 40_000;
const LARGE: u64 = 3 << 30;

/// A catalog of many names without a log, and with a file whose chunk list is an object of its own.
fn generate(lab: &Lab) {
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
    lab.with_bucket(async |bucket| {
        volume::make(&bucket, "main", shape, vec![("large".to_owned(), large)])
            .await
            .unwrap();
        bucket
            .put_new(&layout::blob(&name), Body::raw(bytes))
            .await
            .unwrap();
    });
}

fn until_whole(machine: &Machine) -> u64 {
    let parts = wait::until("the catalog is whole on the disk", SOON, || {
        let catalog = machine.status()["catalogs"][0].take();
        let parts = catalog["parts"].as_u64()?;
        (catalog["kept_parts"].as_u64() == Some(parts)).then_some(parts)
    });
    assert!(parts > 10, "{parts} parts");
    parts
}

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
    let mut machine = lab.machine("machine");
    let parts = until_whole(&machine);
    assert_eq!(machine.counter("/catalogs/0/fetched_parts"), parts);
    // Nothing was imported for it.
    assert!(machine.counter("/catalogs/0/loaded_registers") < NAMES / 4);
    assert!(machine.log().contains("the catalog is whole on this disk"));
    let before = gets(&lab, kind);
    assert!(fs::symlink_metadata(machine.path("top-00001/dir-00003/x")).is_err());
    assert_eq!(gets(&lab, kind), before);
    // A machine that is killed has it, and neither needs the store for it.
    machine.kill9();
    machine.restart();
    assert_eq!(until_whole(&machine), parts);
    lab.set_down(true);
    let before = gets(&lab, kind);
    look_everywhere(&machine);
    assert_eq!(machine.counter("/catalogs/0/fetched_parts"), 0);
    assert_eq!(gets(&lab, kind), before);
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
    assert_eq!(gets(&lab, kind), before);
}

fn what_is_damaged_or_gone_on_the_disk_is_fetched_again(kind: StoreKind) {
    let lab = Lab::new(kind);
    generate(&lab);
    let mut machine = lab.machine("machine");
    until_whole(&machine);
    machine.kill9();
    let dir = machine.spec.cache_dir.join("catalogs");
    let kept = entries(&dir).unwrap();
    for (number, object) in kept.iter().enumerate() {
        let mut bytes = fs::read(object.path()).unwrap();
        match number % 4 {
            0 => fs::remove_file(object.path()).unwrap(),
            1 => {
                *bytes.last_mut().unwrap() ^= 1;
                fs::write(object.path(), bytes).unwrap();
            }
            2 => fs::write(object.path(), &bytes[1..]).unwrap(),
            _ => {}
        }
    }
    fs::write(dir.join("what nobody knows"), b"x").unwrap();
    machine.restart();
    look_everywhere(&machine);
    until_whole(&machine);
    let again = entries(&dir).unwrap();
    assert_eq!(again.len(), kept.len());
    for object in again {
        let name = object.file_name().into_string().unwrap();
        assert_eq!(name, Digest::of(&fs::read(object.path()).unwrap()).to_string());
    }
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
