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
