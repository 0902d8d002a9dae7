//! Two machines and one store: what one writes, the other sees.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    },
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use lab::{Lab, StoreKind};
use support::{
    input,
    machine::Machine,
    posix::{content, file, ro, rw},
    rng::Rng,
    tree, wait,
};

on_both_stores!(
    a_copied_tree_is_on_the_other_machine_whole,
    a_closed_file_is_visible_elsewhere_in_time,
    deletes_and_renames_travel,
    metadata_alone_travels,
    what_the_kernel_cached_is_told_to_change,
    an_open_file_keeps_its_content_when_it_is_replaced_elsewhere,
    the_last_writer_wins_on_both_machines_alike,
    a_visible_name_always_has_its_bytes,
    a_read_only_machine_follows_and_refuses_writes,
    a_machine_that_stopped_catches_up,
    a_directory_that_lived_on_for_a_file_goes_with_it,
    a_file_that_is_closed_after_its_directory_was_removed_brings_both_back,
    the_times_of_a_directory_stay_when_its_last_file_is_closed_a_moment_later,
    a_file_is_told_when_its_writers_closed_it_whoever_still_reads_it,
);

/// How long another machine may take when the test does not measure it.
const SOON: Duration = Duration::from_secs(30);

/// Names, modes, links and times that a source tree does not have.
fn add_odd_things(dir: &Path) {
    let odd = dir.join("odd");
    fs::create_dir(&odd).unwrap();
    symlink("../odd/empty", odd.join("relative")).unwrap();
    symlink("/nowhere/at all", odd.join("dangling")).unwrap();
    symlink(".", odd.join("loop-dir")).unwrap();
    fs::create_dir(odd.join("empty-dir")).unwrap();
    file(&odd.join("empty"), b"");
    file(&odd.join(OsStr::from_bytes(b"not-utf8-\xff\xfe\n")), b"bytes");
    file(&odd.join("large"), &Rng::seeded(7).bytes(9_000_000));
    file(&odd.join("zeros"), &vec![0; 5_000_000]);
    file(&odd.join("same-as-zeros"), &vec![0; 5_000_000]);
    fs::hard_link(odd.join("large"), odd.join("linked")).unwrap();
    for (name, mode) in [
        ("set-uid", 0o4755),
        ("read-only", 0o444),
        ("nobody", 0o000),
        ("run", 0o711),
    ] {
        file(&odd.join(name), name.as_bytes());
        fs::set_permissions(odd.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::set_permissions(odd.join("empty-dir"), fs::Permissions::from_mode(0o1770)).unwrap();
    for (name, date) in [
        ("run", "1999-12-31 23:59:59.123456789 UTC"),
        ("empty-dir", "2010-01-02 03:04:05.000000001 UTC"),
        ("dangling", "2100-02-28 00:00:00.999999999 UTC"),
    ] {
        let mut touch = std::process::Command::new("touch");
        wait::run_ok(touch.args(["-h", "-d", date]).arg(odd.join(name)), SOON);
    }
}

fn a_copied_tree_is_on_the_other_machine_whole(kind: StoreKind) {
    let lab = Lab::new(kind);
    let source = lab.dir().join("source");
    fs::create_dir(&source).unwrap();
    input::copy_into(&input::real_tree(), &source);
    add_odd_things(&source);
    let (files, bytes) = input::measure(&source).unwrap();
    assert!(files >= input::MIN_FILES && bytes >= input::MIN_BYTES);
    let expected = tree::read(&source);

    let (a, b) = (lab.machine("a"), lab.machine("b"));
    input::copy_into(&[source], a.root());
    tree::assert_same(&expected, &tree::read(&a.path("source")));
    a.flush();
    // Changes appear in the order they were made, so this one comes last.
    file(&a.path("last"), b"last");
    a.flush();
    b.until_content("last", b"last");
    tree::assert_same(&expected, &tree::read(&b.path("source")));

    let linked = fs::metadata(b.path("source/odd/linked")).unwrap();
    assert_eq!(
        linked.ino(),
        fs::metadata(b.path("source/odd/large")).unwrap().ino()
    );
    assert_eq!(a.counter("/cache/dirty_blobs"), 0);
    assert!(lab.assert_blobs_match_their_names() > 4_000);
}

fn a_closed_file_is_visible_elsewhere_in_time(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    let mut took = Vec::new();
    for n in 0..4 {
        let name = format!("f{n}");
        file(&a.path(&name), name.as_bytes());
        let closed = Instant::now();
        b.until_content(&name, name.as_bytes());
        took.push(closed.elapsed());
    }
    took.sort();
    eprintln!("visible after {took:?}");
    // Settle time, upload, 2 s; the upload of 2 bytes is given 1 s on a busy machine.
    assert!(took[0] < Duration::from_secs(5), "{took:?}");
    assert!(took[3] < Duration::from_secs(12), "{took:?}");
}

fn deletes_and_renames_travel(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    fs::create_dir_all(a.path("tree/deep/er")).unwrap();
    for n in 0..40 {
        file(&a.path(format!("tree/deep/er/f{n}")), format!("{n}").as_bytes());
    }
    file(&a.path("plain"), b"plain");
    a.flush();
    b.until_content("plain", b"plain");
    let before = tree::read(&b.path("tree"));
    assert_eq!(before.len(), 42);

    // Alternating, so that each machine changes what the other made.
    fs::rename(b.path("tree"), b.path("moved")).unwrap();
    fs::rename(b.path("plain"), b.path("renamed")).unwrap();
    b.flush();
    a.until_content("renamed", b"plain");
    a.until_gone("plain");
    a.until_gone("tree");
    tree::assert_same(&before, &tree::read(&a.path("moved")));

    fs::remove_file(a.path("moved/deep/er/f0")).unwrap();
    fs::rename(a.path("moved/deep/er/f1"), a.path("moved/deep/er/f2")).unwrap();
    a.flush();
    b.until_gone("moved/deep/er/f0");
    b.until_gone("moved/deep/er/f1");
    b.until_content("moved/deep/er/f2", b"1");

    fs::remove_dir_all(b.path("moved")).unwrap();
    b.flush();
    a.until_gone("moved");
    // And again under the same names.
    fs::create_dir_all(a.path("moved/deep")).unwrap();
    file(&a.path("moved/deep/new"), b"new");
    a.flush();
    b.until_content("moved/deep/new", b"new");
    assert_eq!(
        tree::read(b.root()).len(),
        4,
        "renamed, moved, moved/deep, moved/deep/new"
    );
    tree::assert_same_but_dir_times(&tree::read(a.root()), &tree::read(b.root()));
}

fn metadata_alone_travels(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    file(&a.path("f"), b"x");
    fs::create_dir(a.path("d")).unwrap();
    a.flush();
    b.until_content("f", b"x");
    fs::set_permissions(a.path("f"), fs::Permissions::from_mode(0o751)).unwrap();
    fs::set_permissions(a.path("d"), fs::Permissions::from_mode(0o700)).unwrap();
    a.flush();
    let mode = |path: &str| fs::metadata(b.path(path)).unwrap().mode() & 0o7777;
    wait::until("modes arrive", SOON, || {
        (mode("f") == 0o751 && mode("d") == 0o700).then_some(())
    });
    assert_eq!(content(&b.path("f")), b"x");
}

fn what_the_kernel_cached_is_told_to_change(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    fs::create_dir(a.path("d")).unwrap();
    for version in 0..4_u8 {
        // The kernel of B has every kind of entry cached: absent, listed, stat, content.
        let bytes = vec![version; 3_000 + usize::from(version)];
        let name = format!("d/new{version}");
        assert_errno!(fs::metadata(b.path(&name)), ENOENT);
        if version > 0 {
            let _ = (
                fs::read(b.path("d/f")),
                fs::read_dir(b.path("d")).map(Iterator::count),
            );
        }
        file(&a.path("d/f"), &bytes);
        file(&a.path(&name), &bytes);
        a.flush();
        b.until_content("d/f", &bytes);
        b.until_content(&name, &bytes);
        assert_eq!(fs::metadata(b.path("d/f")).unwrap().len(), bytes.len() as u64);
        assert_eq!(
            fs::read_dir(b.path("d")).unwrap().count(),
            usize::from(version) + 2
        );
    }
}

fn an_open_file_keeps_its_content_when_it_is_replaced_elsewhere(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    let old = vec![b'o'; 6_000_000];
    file(&a.path("f"), &old);
    a.flush();
    b.until_content("f", &old);
    let mut reader = ro(&b.path("f"));
    let mut first = [0; 10];
    reader.read_exact(&mut first).unwrap();
    let new = vec![b'n'; 6_000_001];
    fs::rename(file(&a.path("f.tmp"), &new), a.path("f")).unwrap();
    a.flush();
    b.until_content("f", &new);
    let mut rest = Vec::new();
    reader.seek(SeekFrom::Start(0)).unwrap();
    reader.read_to_end(&mut rest).unwrap();
    assert!(rest == old, "another version's bytes");
}

fn the_last_writer_wins_on_both_machines_alike(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    for round in 0..3 {
        // At the same time, on names, on directories, and on both with one name.
        let write = |machine: &Machine| {
            for n in 0..10 {
                let text = format!("{} {round} {n}", machine.spec.name);
                file(&machine.path(format!("f{n}")), text.repeat(100).as_bytes());
            }
            let dir = machine.path(format!("dir{round}"));
            fs::create_dir_all(&dir).unwrap();
            file(&dir.join(&machine.spec.name), b"both are kept");
        };
        std::thread::scope(|scope| {
            scope.spawn(|| write(&a));
            scope.spawn(|| write(&b));
        });
        a.flush();
        b.flush();
        file(&a.path("mark-a"), format!("{round}").as_bytes());
        file(&b.path("mark-b"), format!("{round}").as_bytes());
        a.flush();
        b.flush();
        a.until_content("mark-b", format!("{round}").as_bytes());
        b.until_content("mark-a", format!("{round}").as_bytes());
        tree::assert_same_but_dir_times(&tree::read(a.root()), &tree::read(b.root()));
        for n in 0..10 {
            let bytes = content(&a.path(format!("f{n}")));
            let whole = |name: &str| format!("{name} {round} {n}").repeat(100).into_bytes();
            assert!(bytes == whole("a") || bytes == whole("b"), "f{n} is of neither");
        }
        assert_eq!(fs::read_dir(a.path(format!("dir{round}"))).unwrap().count(), 2);
        // Who writes after seeing the other's file wins for sure.
        let (late, early) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        file(&late.path("f0"), b"later");
        late.flush();
        early.until_content("f0", b"later");
    }
}

fn a_visible_name_always_has_its_bytes(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    if kind == StoreKind::S3 {
        // Uploads that take long and fail often would show a name that comes too early.
        lab.server().set_faults(s3server::Faults {
            seed: 11,
            only: vec!["PutObject".to_owned()],
            error_500: 0.3,
            lost_reply: 0.1,
            latency_ms: 15,
            ..s3server::Faults::default()
        });
    }
    let expected = |n: u64| {
        let size = [100, 5_000, 300_000, 3_000_000][n as usize % 4];
        Rng::seeded(n).bytes(size)
    };
    let count = 48;
    let mut seen = 0;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for n in 0..count {
                file(&a.path(format!("f{n}")), &expected(n));
            }
            a.flush();
        });
        let deadline = Instant::now() + Duration::from_secs(90);
        while seen < count && Instant::now() < deadline {
            let names = fs::read_dir(b.root())
                .unwrap()
                .map(|entry| entry.unwrap().file_name());
            let names: Vec<_> = names
                .filter_map(|name| name.to_str()?.strip_prefix('f')?.parse().ok())
                .collect();
            let visible = names.len() as u64;
            if visible > seen {
                for n in names {
                    assert!(content(&b.path(format!("f{n}"))) == expected(n), "f{n}");
                }
                seen = visible;
            }
            if writer.is_finished() && visible == seen {
                wait::try_until(Duration::from_millis(200), || None::<()>);
            }
        }
        writer.join().unwrap();
    });
    assert_eq!(seen, count);
    if kind == StoreKind::S3 {
        assert!(
            lab.server().counts().faults > 5,
            "nothing went wrong, so nothing was shown"
        );
    }
}

fn a_read_only_machine_follows_and_refuses_writes(kind: StoreKind) {
    let lab = Lab::new(kind);
    let a = lab.machine("a");
    let b = lab.spec("b").arg("--read-only").start();
    file(&a.path("f"), b"x");
    a.flush();
    b.until_content("f", b"x");
    assert_errno!(fs::write(b.path("g"), b"y"), EROFS);
    assert_errno!(fs::remove_file(b.path("f")), EROFS);
    assert_errno!(fs::create_dir(b.path("d")), EROFS);
    assert_errno!(fs::rename(b.path("f"), b.path("g")), EROFS);
    assert_errno!(fs::OpenOptions::new().write(true).open(b.path("f")), EROFS);
    assert_eq!(content(&b.path("f")), b"x");
}

fn a_machine_that_stopped_catches_up(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, mut b) = (lab.machine("a"), lab.machine("b"));
    file(&a.path("kept"), b"kept");
    file(&a.path("deleted"), b"deleted");
    file(&a.path("changed"), b"old");
    a.flush();
    b.until_content("changed", b"old");
    let ino = fs::metadata(b.path("kept")).unwrap().ino();
    file(&b.path("of-b"), b"written just before the stop");
    b.unmount();

    fs::remove_file(a.path("deleted")).unwrap();
    file(&a.path("changed"), b"new");
    fs::create_dir(a.path("dir")).unwrap();
    file(&a.path("dir/made"), b"meanwhile");
    a.flush();
    // Unmounting flushed, so this machine has the other's file without it running.
    a.until_content("of-b", b"written just before the stop");

    b.restart();
    b.until_content("dir/made", b"meanwhile");
    b.until_content("changed", b"new");
    b.until_gone("deleted");
    assert_eq!(fs::metadata(b.path("kept")).unwrap().ino(), ino);
    tree::assert_same_but_dir_times(&tree::read(a.root()), &tree::read(b.root()));
    // A machine that comes late sees the same.
    let c = lab.machine("c");
    c.until_content("dir/made", b"meanwhile");
    tree::assert_same_but_dir_times(&tree::read(a.root()), &tree::read(c.root()));
}

/// A directory that one machine removed while another made a file in it lives on for that
/// file, and goes with it, whatever the kernel has cached of it.
fn a_directory_that_lived_on_for_a_file_goes_with_it(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    fs::create_dir(a.path("dir")).unwrap();
    file(&a.path("dir/first"), b"first");
    b.until_content("dir/first", b"first");
    lab.set_down(true);
    file(&b.path("dir/second"), b"second");
    fs::remove_file(a.path("dir/first")).unwrap();
    fs::remove_dir(a.path("dir")).unwrap();
    lab.set_down(false);
    a.until_content("dir/second", b"second");
    b.until_gone("dir/first");
    for machine in [&a, &b] {
        assert!(machine.path("dir").metadata().unwrap().is_dir());
    }
    fs::remove_file(a.path("dir/second")).unwrap();
    a.until_gone("dir");
    b.until_gone("dir");
    assert_eq!(fs::read_dir(a.root()).unwrap().count(), 0);
}

/// A machine writes a file while another one removes it, and its directory: the close is later.
fn a_file_that_is_closed_after_its_directory_was_removed_brings_both_back(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    fs::create_dir(a.path("dir")).unwrap();
    file(&a.path("dir/f"), b"first");
    b.until_content("dir/f", b"first");
    let mut writer = rw(&a.path("dir/f"));
    writer.write_all(b"later").unwrap();
    fs::remove_file(b.path("dir/f")).unwrap();
    fs::remove_dir(b.path("dir")).unwrap();
    // From now on the kernel knows that there is no such directory.
    a.until_gone("dir");
    drop(writer);
    a.until_content("dir/f", b"later");
    b.until_content("dir/f", b"later");
}

/// The daemon hears late of the close of a new file, perhaps after `cp -a` has set the times of
/// its directory. Here it is closed late.
fn the_times_of_a_directory_stay_when_its_last_file_is_closed_a_moment_later(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    fs::create_dir(a.path("dir")).unwrap();
    let mut writer = File::create(a.path("dir/f")).unwrap();
    writer.write_all(b"bytes").unwrap();
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    File::open(a.path("dir")).unwrap().set_modified(then).unwrap();
    drop(writer);
    b.until_content("dir/f", b"bytes");
    wait::until("the times of the directory are told", SOON, || {
        (b.path("dir").metadata().unwrap().modified().unwrap() == then).then_some(())
    });
    assert_eq!(a.path("dir").metadata().unwrap().modified().unwrap(), then);
}

/// Small files are not lent to the kernel for a reader, large ones are; a file that is written always is.
fn a_file_is_told_when_its_writers_closed_it_whoever_still_reads_it(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    let told = |name: &str, bytes: &[u8]| {
        wait::until("a flush leaves nothing out", SOON, || {
            let said = a.control("flush", &["--deadline", "90s"]);
            said.status.success().then_some(())
        });
        b.until_content(name, bytes);
    };
    for (name, len) in [("small", 100), ("large", 300_000)] {
        let mut bytes = Rng::seeded(len).bytes(len as usize);
        // The reader comes first, then a writer, twice.
        file(&a.path(name), &bytes);
        a.flush();
        let reader = ro(&a.path(name));
        for round in 1..=2 {
            bytes[..2].copy_from_slice(&[round, 1]);
            rw(&a.path(name)).write_all_at(&bytes, 0).unwrap();
            told(name, &bytes);
        }
        // The writer comes first, and is there again after the file was told.
        let new = format!("new-{name}");
        let writer = File::create_new(a.path(&new)).unwrap();
        let second = ro(&a.path(&new));
        writer.write_all_at(&bytes, 0).unwrap();
        drop(writer);
        told(&new, &bytes);
        bytes[..2].copy_from_slice(&[3, 1]);
        rw(&a.path(&new)).write_all_at(&bytes, 0).unwrap();
        told(&new, &bytes);
        let mut found = vec![0; bytes.len()];
        second.read_exact_at(&mut found, 0).unwrap();
        assert!(found == bytes, "{new} is read as it was written");
        reader.read_exact_at(&mut found, 0).unwrap();
        assert!(
            found[..2] == [2, 1] && found[2..] == bytes[2..],
            "{name} is read as it was written"
        );
    }
}
