//! The cache keeps to its size, never drops what only this machine has, and survives a full disk.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    time::Duration,
};

use lab::{Lab, StoreKind};
use rustix::fs::{FallocateFlags, copy_file_range, fallocate};
use s3server::Faults;
use support::{
    loopdev::{self, LoopFs},
    machine::Machine,
    posix::{content, file, ro},
    rng::Rng,
    wait,
};

on_both_stores!(
    the_cache_keeps_to_its_size_while_three_times_of_it_pass,
    dirty_files_are_never_evicted,
    open_files_stay_readable_while_others_are_evicted,
    what_programs_ask_for_finds_room_on_a_disk_full_of_clean_files,
);

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(60);
const CACHE: u64 = 64 * MIB;

/// Eviction runs behind the writers, by a file or two.
const SLACK: u64 = 10 * MIB;

fn bytes_of(n: u64) -> Vec<u8> {
    Rng::seeded(n).bytes(4 << 20)
}

/// What files take on the disk.
fn disk_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => disk_bytes(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

#[track_caller]
fn until_within_size(machine: &Machine) {
    wait::until("the cache is within its size", SOON, || {
        let resident = machine.counter("/cache/resident_bytes");
        let on_disk = disk_bytes(&machine.spec.cache_dir.join("blobs"));
        (resident <= CACHE + MIB && on_disk <= CACHE + SLACK).then_some(())
    });
}

fn small_machine(lab: &Lab, name: &str) -> Machine {
    lab.spec(name)
        .arg("--cache-size")
        .arg("64M")
        .arg("--read-timeout")
        .arg("5s")
        .start()
}

fn the_cache_keeps_to_its_size_while_three_times_of_it_pass(kind: StoreKind) {
    let lab = Lab::new(kind);
    let a = small_machine(&lab, "a");
    for n in 0..48 {
        file(&a.path(format!("f{n}")), &bytes_of(n));
        if n % 8 == 7 {
            a.flush();
            until_within_size(&a);
        }
    }
    assert!(a.counter("/cache/evicted_bytes") >= 100 * MIB);
    // All are there to be read again, by this machine and by another small one.
    let b = small_machine(&lab, "b");
    wait::until("B has all names", SOON, || {
        (fs::read_dir(b.root()).unwrap().count() == 48).then_some(())
    });
    for machine in [&a, &b] {
        for n in 0..48 {
            assert!(content(&machine.path(format!("f{n}"))) == bytes_of(n), "f{n}");
        }
        until_within_size(machine);
        assert!(
            machine.counter("/cache/resident_bytes") >= CACHE / 2,
            "more was dropped than needed"
        );
    }
    assert_eq!(a.counter("/files/lost"), 0);
}

fn dirty_files_are_never_evicted(kind: StoreKind) {
    let lab = Lab::new(kind);
    let a = small_machine(&lab, "a");
    lab.set_down(true);
    for n in 0..40 {
        file(&a.path(format!("f{n}")), &bytes_of(n));
    }
    wait::until("all is sealed", SOON, || {
        (a.counter("/cache/dirty_bytes") >= 160 * MIB).then_some(())
    });
    for n in 0..40 {
        assert!(
            content(&a.path(format!("f{n}"))) == bytes_of(n),
            "f{n}: the only copy is gone"
        );
    }
    lab.set_down(false);
    a.flush();
    until_within_size(&a);
    for n in 0..40 {
        assert!(content(&a.path(format!("f{n}"))) == bytes_of(n), "f{n}");
    }
}

fn open_files_stay_readable_while_others_are_evicted(kind: StoreKind) {
    let lab = Lab::new(kind);
    let a = small_machine(&lab, "a");
    file(&a.path("held"), &bytes_of(0));
    a.flush();
    let held = ro(&a.path("held"));
    for n in 1..30 {
        file(&a.path(format!("f{n}")), &bytes_of(n));
        if n % 8 == 0 {
            a.flush();
        }
    }
    a.flush();
    until_within_size(&a);
    // Whatever was evicted: this one needs no store.
    lab.set_down(true);
    let mut bytes = vec![0; 4 << 20];
    held.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == bytes_of(0));
    lab.set_down(false);
}

fn free_bytes(disk: &LoopFs) -> u64 {
    let stat = rustix::fs::statvfs(disk.path()).unwrap();
    stat.f_bavail * stat.f_frsize
}

/// Whatever takes more than is free: the clean files go for it, and are fetched again.
fn what_programs_ask_for_finds_room_on_a_disk_full_of_clean_files(kind: StoreKind) {
    if let Err(why) = loopdev::supports("ext4") {
        skip!("{why}");
    }
    let lab = Lab::new(kind);
    let disk = LoopFs::make("ext4", lab.dir(), "disk", 256 * MIB);
    let spec = lab.spec("a").arg("--min-free").arg("0");
    let spec = spec.arg("--cache-size").arg("10G").arg("--no-passthrough");
    let a = spec.cache_dir(&disk.path().join("cache")).start();
    let mut whole = 0;
    let mut fill = || {
        while free_bytes(&disk) > 40 * MIB {
            file(&a.path(format!("f{whole}")), &bytes_of(whole));
            whole += 1;
            if whole % 4 == 0 {
                a.flush();
            }
        }
        a.flush();
        whole
    };
    let make = |name: &str| {
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        options.open(a.path(name)).unwrap()
    };
    // What is deleted keeps its space for a while, what is cut off does not.
    let remove = |file: File, name: &str| {
        file.set_len(0).unwrap();
        drop(file);
        fs::remove_file(a.path(name)).unwrap();
    };
    let evicted = || a.counter("/cache/evicted_bytes");
    let none = FallocateFlags::empty();

    fill();
    let before = evicted();
    let allocated = make("allocated");
    fallocate(&allocated, none, 0, 100 * MIB).unwrap();
    assert_eq!(allocated.metadata().unwrap().len(), 100 * MIB);
    assert!(allocated.metadata().unwrap().blocks() * 512 >= 100 * MIB);
    assert!(evicted() - before >= 40 * MIB, "there was room for it anyway");
    remove(allocated, "allocated");

    fill();
    let allocated = make("allocated");
    fallocate(&allocated, FallocateFlags::KEEP_SIZE, 0, 100 * MIB).unwrap();
    assert_eq!(allocated.metadata().unwrap().len(), 0);
    remove(allocated, "allocated");

    fill();
    let source = make("source");
    for n in 0..8 {
        source.write_all_at(&bytes_of(1_000 + n), n * 4 * MIB).unwrap();
    }
    let copy = make("copy");
    for _ in 0..2 {
        let (mut from, mut to) = (0, copy.metadata().unwrap().len());
        while from < 32 * MIB {
            let left = (32 * MIB - from) as usize;
            let copied = copy_file_range(&source, Some(&mut from), &copy, Some(&mut to), left).unwrap();
            assert!(copied > 0, "the source ends early");
        }
    }
    let mut half = vec![0; 4 << 20];
    for n in 0..16 {
        copy.read_exact_at(&mut half, n * 4 * MIB).unwrap();
        assert!(half == bytes_of(1_000 + n % 8), "part {n} of the copy");
    }
    remove(source, "source");
    remove(copy, "copy");

    // Nothing goes for what would not fit anyway.
    let whole = fill();
    let before = evicted();
    let huge = make("huge");
    assert_errno!(fallocate(&huge, none, 0, 4096 * MIB), ENOSPC);
    remove(huge, "huge");
    assert!(evicted() - before <= 40 * MIB, "much was evicted in vain");
    for n in 0..whole {
        assert!(content(&a.path(format!("f{n}"))) == bytes_of(n), "f{n}");
    }
    assert_eq!(a.counter("/files/lost"), 0);
}

/// Writes files until the disk is full; returns how many were whole.
fn fill(machine: &Machine, prefix: &str) -> u64 {
    for n in 0..1_000 {
        let path = machine.path(format!("{prefix}{n}"));
        let written = File::create(&path).and_then(|mut writer| {
            writer.write_all(&bytes_of(n))?;
            // A full disk may show only here.
            writer.sync_all()
        });
        if let Err(err) = written {
            assert_eq!(err.kind(), ErrorKind::StorageFull, "{err}");
            let _ = fs::remove_file(&path);
            return n;
        }
    }
    panic!("4 GB fit on a small disk");
}

#[test]
fn a_full_disk_gives_enospc_and_the_daemon_recovers() {
    if let Err(why) = loopdev::supports("ext4") {
        skip!("{why}");
    }
    let lab = Lab::new(StoreKind::S3);
    let disk = LoopFs::make("ext4", lab.dir(), "disk", 256 * MIB);
    let spec = lab
        .spec("a")
        .arg("--min-free")
        .arg("0")
        .arg("--read-timeout")
        .arg("5s");
    let mut a = spec.cache_dir(&disk.path().join("cache")).start();
    let remote = bytes_of(99_999);
    {
        let b = lab.machine("b");
        file(&b.path("remote"), &remote);
        b.flush();
        wait::until("A has the name", SOON, || a.path("remote").metadata().ok());
    }
    lab.set_down(true);
    let whole = fill(&a, "f");
    assert!(whole > 20, "only {whole} files of 4 MiB fit in 256 MiB");
    // Everything that was taken is there, names and all, and asking costs no wait.
    for n in 0..whole {
        assert!(content(&a.path(format!("f{n}"))) == bytes_of(n), "f{n}");
    }
    assert_eq!(a.status()["state"], "serving");
    lab.set_down(false);
    // Nothing can be uploaded, so there is no room: a file of the store is served without being kept.
    lab.server().set_faults(Faults {
        only: vec!["PutObject".to_owned()],
        slow_down: 1.0,
        ..Faults::default()
    });
    assert!(content(&a.path("remote")) == remote);
    // A writer needs all of it here.
    for (size, open) in [(3 * MIB, false), (0, true)] {
        let refused = if open {
            File::options().append(true).open(a.path("remote")).map(drop)
        } else {
            let path = std::ffi::CString::new(a.path("remote").as_os_str().as_encoded_bytes()).unwrap();
            // SAFETY: the path is a string that ends in a zero byte, for the time of the call.
            match unsafe { libc::truncate(path.as_ptr(), size as i64) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::StorageFull);
    }
    assert!(content(&a.path("remote")) == remote);
    lab.server().set_faults(Faults::default());
    a.flush();
    // Now the clean ones can go: as much again can be written.
    wait::until("there is room again", SOON, || {
        File::create(a.path("probe"))
            .and_then(|mut probe| probe.write_all(&bytes_of(1)))
            .ok()
    });
    for n in 0..8 {
        file(&a.path(format!("g{n}")), &bytes_of(n));
        a.flush();
    }
    a.kill9();
    a.restart();
    for n in 0..whole {
        assert!(content(&a.path(format!("f{n}"))) == bytes_of(n), "f{n}");
    }
}

#[test]
fn deleting_makes_room_on_a_full_disk() {
    if let Err(why) = loopdev::supports("ext4") {
        skip!("{why}");
    }
    let lab = Lab::new(StoreKind::S3);
    let disk = LoopFs::make("ext4", lab.dir(), "disk", 128 * MIB);
    let spec = lab.spec("a").arg("--min-free").arg("0");
    // What is sealed stays until it is uploaded, whether it has a name or not: however long
    // writing takes here, nothing is.
    let spec = spec.arg("--settle").arg("1h");
    let a = spec.cache_dir(&disk.path().join("cache")).start();
    lab.set_down(true);
    let whole = fill(&a, "f");
    for n in 0..whole / 2 {
        fs::remove_file(a.path(format!("f{n}"))).unwrap();
    }
    wait::until("there is room again", SOON, || {
        let written = File::create(a.path("new")).and_then(|mut new| new.write_all(&bytes_of(7)));
        written.ok()
    });
    assert!(content(&a.path("new")) == bytes_of(7));
    lab.set_down(false);
    a.flush();
}

#[test]
fn free_space_stays_above_its_floor() {
    if let Err(why) = loopdev::supports("ext4") {
        skip!("{why}");
    }
    let lab = Lab::new(StoreKind::File);
    let disk = LoopFs::make("ext4", lab.dir(), "disk", 512 * MIB);
    let spec = lab
        .spec("a")
        .arg("--min-free")
        .arg("300M")
        .arg("--cache-size")
        .arg("10G");
    let a = spec.cache_dir(&disk.path().join("cache")).start();
    for n in 0..60 {
        file(&a.path(format!("f{n}")), &bytes_of(n));
        if n % 6 == 5 {
            a.flush();
        }
    }
    wait::until("the floor is kept", SOON, || {
        let stat = rustix::fs::statvfs(disk.path()).unwrap();
        (stat.f_bavail * stat.f_frsize >= 290 * MIB).then_some(())
    });
    for n in 0..60 {
        assert!(content(&a.path(format!("f{n}"))) == bytes_of(n), "f{n}");
    }
}
