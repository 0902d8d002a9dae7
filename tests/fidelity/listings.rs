//! Listing directories by hand: small buffers, places to come back to, and what changes meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt},
        },
    },
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::{
    lab::{Lab, StoreKind},
    support::{
        posix::{answer, file},
        trial::{Trial, compare},
        wait,
    },
};

on_both_stores!(
    what_another_machine_does_ends_no_listing,
    a_reader_whose_listing_is_forgotten_goes_on_where_it_was,
);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    ino: u64,
    /// Where to go on behind it.
    offset: i64,
    kind: u8,
    name: Vec<u8>,
}

/// One `getdents64` with so much room.
fn some(dir: &File, room: usize) -> std::io::Result<Vec<Entry>> {
    let mut buffer = vec![0_u8; room];
    // SAFETY: the buffer has as many bytes as the call may write.
    let got = unsafe { libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), buffer.as_mut_ptr(), room) };
    let mut rest = &buffer[..answer(got)? as usize];
    let mut entries = Vec::new();
    // As in `linux/dirent.h`: two numbers, the length of the record, the kind and the name.
    while !rest.is_empty() {
        let number = |at: usize| u64::from_ne_bytes(rest[at..at + 8].try_into().unwrap());
        let len = usize::from(u16::from_ne_bytes([rest[16], rest[17]]));
        let name = rest[19..len].split(|byte| *byte == 0).next().unwrap();
        entries.push(Entry {
            ino: number(0),
            offset: number(8) as i64,
            kind: rest[18],
            name: name.to_vec(),
        });
        rest = &rest[len..];
    }
    Ok(entries)
}

/// All entries from here on.
fn rest(dir: &File, room: usize) -> Vec<Entry> {
    let mut entries = Vec::new();
    loop {
        let more = some(dir, room).unwrap();
        if more.is_empty() {
            return entries;
        }
        entries.extend(more);
    }
}

fn go(dir: &File, offset: i64, whence: i32) -> std::io::Result<i64> {
    // SAFETY: a call of numbers.
    answer(unsafe { libc::lseek(dir.as_raw_fd(), offset, whence) })
}

/// The names among entries, and that none is there twice.
#[track_caller]
fn names<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> BTreeSet<Vec<u8>> {
    let mut names = BTreeSet::new();
    for entry in entries {
        assert!(
            names.insert(entry.name.clone()),
            "twice: {}",
            entry.name.escape_ascii()
        );
    }
    names
}

fn filled(t: &Trial, name: &str, count: usize) -> (std::path::PathBuf, File) {
    let dir = t.path(name);
    fs::create_dir(&dir).unwrap();
    for n in 0..count {
        File::create(dir.join(format!("name-{n:05}"))).unwrap();
    }
    let open = File::open(&dir).unwrap();
    (dir, open)
}

#[test]
fn buffers_and_places_mean_the_same() {
    compare(&[], &[], |t| {
        let (path, dir) = filled(t, "d", 300);
        file(&path.join("n".repeat(255)), b"");
        for room in [0, 1, 23] {
            t.ask(format!("room of {room}"), some(&dir, room));
        }
        let first = some(&dir, 24).unwrap();
        t.note("first in room of 24", first[0].name.clone());
        let all = {
            go(&dir, 0, libc::SEEK_SET).unwrap();
            rest(&dir, 1 << 16)
        };
        t.note("names", names(&all));
        for room in [280, 296, 1_000, 4_096] {
            go(&dir, 0, libc::SEEK_SET).unwrap();
            t.note(format!("the same in room of {room}"), rest(&dir, room) == all);
        }
        let long = all.iter().position(|entry| entry.name.len() == 255).unwrap();
        go(&dir, all[long - 1].offset, libc::SEEK_SET).unwrap();
        t.ask("too little room for this name", some(&dir, 279));
        t.note("it comes with more", some(&dir, 280).unwrap()[0].name.len());
        let wrong: Vec<_> = (0..all.len())
            .rev()
            .filter(|place| {
                go(&dir, all[*place].offset, libc::SEEK_SET).unwrap();
                rest(&dir, 4_096) != all[place + 1..]
            })
            .collect();
        t.note("places that were not found again", wrong);
        go(&dir, all[100].offset, libc::SEEK_SET).unwrap();
        t.note(
            "position",
            go(&dir, 0, libc::SEEK_CUR).unwrap() == all[100].offset,
        );
        t.note("no place before the start", go(&dir, -1, libc::SEEK_SET).is_err());
        t.ask("no such way", go(&dir, 0, 17));
        let twin = dir.try_clone().unwrap();
        go(&twin, all[5].offset, libc::SEEK_SET).unwrap();
        t.note(
            "the position is that of the open",
            some(&dir, 280).unwrap()[0] == all[6],
        );
        let other = File::open(&path).unwrap();
        t.note(
            "another open begins at the start",
            some(&other, 280).unwrap()[0] == all[0],
        );

        // Places stay while names come and go.
        go(&dir, all[200].offset, libc::SEEK_SET).unwrap();
        let text = |entry: &Entry| path.join(std::ffi::OsStr::from_bytes(&entry.name));
        for entry in all[150..250]
            .iter()
            .filter(|entry| entry.name.starts_with(b"name"))
        {
            fs::remove_file(text(entry)).unwrap();
        }
        for n in 0..100 {
            file(&path.join(format!("new-{n}")), b"");
        }
        let stay = names(&all[250..]);
        let seen = names(&rest(&dir, 1_000));
        t.note("what stays behind the place", stay.difference(&seen).count());
        go(&dir, 0, libc::SEEK_SET).unwrap();
        let mut now: BTreeSet<_> = fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().as_bytes().to_vec())
            .collect();
        now.extend([b".".to_vec(), b"..".to_vec()]);
        t.note("anew", names(&rest(&dir, 1_000)) == now);
        let is_new = |name: &&Vec<u8>| name.starts_with(b"new");
        t.note("anew: new", now.iter().filter(is_new).count());

        t.ask("a file", some(&File::open(path.join("new-1")).unwrap(), 1_000));
        let only_path = openat(CWD, &path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        t.ask("O_PATH", some(&File::from(only_path), 1_000));
        go(&dir, 0, libc::SEEK_SET).unwrap();
        t.call("read", (&dir).read(&mut [0; 10]));
        t.call("read at", dir.read_at(&mut [0; 10], 0));
        t.call("write", (&dir).write(b"x"));
        t.call("cut", dir.set_len(0));
        // SAFETY: the call is told of no memory at all.
        let nowhere = unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                dir.as_raw_fd(),
                std::ptr::null_mut::<u8>(),
                1_000,
            )
        };
        t.ask("nowhere", answer(nowhere));
    });
}

#[test]
fn kinds_and_numbers_are_those_of_stat() {
    compare(&[], &[], |t| {
        let dir = t.path("d");
        fs::create_dir_all(dir.join("sub")).unwrap();
        file(&dir.join("file"), b"x");
        fs::hard_link(dir.join("file"), dir.join("twin")).unwrap();
        std::os::unix::fs::symlink("x", dir.join("link")).unwrap();
        for (name, kind) in [
            ("fifo", rustix::fs::FileType::Fifo),
            ("socket", rustix::fs::FileType::Socket),
        ] {
            rustix::fs::mknodat(CWD, dir.join(name), kind, Mode::from_raw_mode(0o600), 0).unwrap();
        }
        for (what, path) in [
            ("above", t.path(".")),
            ("here", dir.clone()),
            ("below", dir.join("sub")),
        ] {
            // Twice: the second time the kernel may answer by itself.
            for time in 0..2 {
                let entries = rest(&File::open(&path).unwrap(), 4_096);
                let shown: BTreeMap<_, _> = entries
                    .iter()
                    .map(|entry| {
                        let meta = fs::symlink_metadata(path.join(std::ffi::OsStr::from_bytes(&entry.name)));
                        // What is mounted there hides the number of what it is mounted on.
                        let same = meta.unwrap().ino() == entry.ino;
                        (entry.name.escape_ascii().to_string(), (entry.kind, same))
                    })
                    .collect();
                t.note(format!("{what} {time}"), shown);
            }
        }
        fs::create_dir(t.path("e")).unwrap();
        fs::rename(dir.join("sub"), t.path("e/sub")).unwrap();
        let up = rest(&File::open(t.path("e/sub")).unwrap(), 4_096);
        let up = up.iter().find(|entry| entry.name == b"..").unwrap().ino;
        t.note(
            "above after a move",
            up == fs::metadata(t.path("e")).unwrap().ino(),
        );
    });
    let lab = Lab::new(StoreKind::File);
    let machine = lab.machine("a");
    let root = fs::metadata(machine.root()).unwrap().ino();
    for entry in rest(&File::open(machine.root()).unwrap(), 4_096) {
        assert_eq!(entry.ino, root, "{}", entry.name.escape_ascii());
    }
}

#[test]
fn a_directory_that_is_gone_lists_nothing() {
    compare(&[], &[], |t| {
        let (path, dir) = filled(t, "empty", 0);
        let (half_path, half) = filled(t, "half", 100);
        let mut seen = names(&some(&half, 500).unwrap());
        for n in 0..100 {
            fs::remove_file(half_path.join(format!("name-{n:05}"))).unwrap();
        }
        // Whether the names that are gone are seen is open; it ends, and that without an error.
        seen.extend(names(&rest(&half, 500)));
        t.note(
            "nothing else",
            seen.iter()
                .all(|name| name.starts_with(b"name") || name.starts_with(b".")),
        );
        for (what, path, dir) in [("empty", &path, &dir), ("half", &half_path, &half)] {
            fs::remove_dir(path).unwrap();
            t.ask(format!("{what}: list"), some(dir, 1_000));
            t.ask(format!("{what}: go to the start"), go(dir, 0, libc::SEEK_SET));
            t.ask(format!("{what}: list again"), some(dir, 1_000));
            let up = openat(dir, "..", OFlags::DIRECTORY, Mode::empty());
            t.call(format!("{what}: above"), up);
            let here = openat(dir, ".", OFlags::DIRECTORY, Mode::empty());
            let here = t.call(format!("{what}: here"), here);
            t.ask(
                format!("{what}: here lists"),
                some(&File::from(here.unwrap()), 1_000),
            );
            t.note(format!("{what}: names"), dir.metadata().unwrap().nlink());
            fs::create_dir(path).unwrap();
            file(&path.join("other"), b"");
            t.ask(format!("{what}: not that of the same name"), some(dir, 1_000));
        }
    });
}

/// Reads some names of a directory that is listed to its end by another open, takes a long run of names away that
/// were not reached yet, and goes on; without what the kernel had kept.
#[test]
fn what_is_removed_ends_no_listing() {
    compare(&[], &[], |t| {
        let (path, dir) = filled(t, "d", 4_000);
        let all = rest(&File::open(&path).unwrap(), 1 << 16);
        let mut seen = names(&some(&dir, 2_000).unwrap());
        let (gone, stay) = all[2..].split_at(3_000);
        let gone: Vec<_> = gone.iter().filter(|entry| !seen.contains(&entry.name)).collect();
        for entry in gone {
            fs::remove_file(path.join(std::ffi::OsStr::from_bytes(&entry.name))).unwrap();
        }
        // With a look at the start the kernel forgets what it had kept for all.
        drop(some(&File::open(&path).unwrap(), 280).unwrap());
        for entry in rest(&dir, 2_000) {
            assert!(
                seen.insert(entry.name.clone()),
                "twice: {}",
                entry.name.escape_ascii()
            );
        }
        t.note(
            "missed",
            stay.iter().filter(|entry| !seen.contains(&entry.name)).count(),
        );
    });
}

#[test]
fn a_hundred_thousand_names_are_each_seen_once_while_others_come() {
    const NAMES: usize = 100_000;
    let lab = Lab::new(StoreKind::File);
    let machine = lab.machine("a");
    let path = machine.path("d");
    fs::create_dir(&path).unwrap();
    std::thread::scope(|scope| {
        for half in 0..2 {
            let path = &path;
            scope.spawn(move || {
                for n in (half..NAMES).step_by(2) {
                    let name = path.join(format!("stays-{n:06}"));
                    rustix::fs::mknodat(
                        CWD,
                        name,
                        rustix::fs::FileType::RegularFile,
                        Mode::from_raw_mode(0o644),
                        0,
                    )
                    .unwrap();
                }
            });
        }
    });
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 0_u64;
            while !done.load(Ordering::Relaxed) {
                let name = path.join(format!("name-{:06}-comes-and-goes", n % 90_000));
                file(&name, b"");
                if !n.is_multiple_of(3) {
                    fs::remove_file(&name).unwrap();
                }
                n += 977;
            }
        });
        let lists = || {
            for room in [1 << 15, 1 << 12, 1 << 20] {
                let entries = rest(&File::open(&path).unwrap(), room);
                let seen = names(&entries);
                let stay = seen.iter().filter(|name| name.starts_with(b"stays")).count();
                assert_eq!(stay, NAMES, "room of {room}");
            }
        };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(lists));
        done.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

fn what_another_machine_does_ends_no_listing(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    let path = a.path("d");
    fs::create_dir(&path).unwrap();
    for n in 0..2_000 {
        file(&path.join(format!("name-{n:05}")), b"");
    }
    file(&path.join("last"), b"last");
    a.flush();
    b.until_content("d/last", b"last");
    let there = b.path("d");
    // Half of a listing, by one that stays open, and a whole one.
    let dir = File::open(&there).unwrap();
    let all = rest(&File::open(&there).unwrap(), 1 << 16);
    assert_eq!(all.len(), 2_003);
    let mut seen = names(&some(&dir, 4_000).unwrap());
    let at = go(&dir, 0, libc::SEEK_CUR).unwrap();
    let text = |dir: &Path, entry: &Entry| dir.join(std::ffi::OsStr::from_bytes(&entry.name));
    let (gone, stay) = all[2..].split_at(1_500);
    let is_last = |entry: &&Entry| entry.name == b"last";
    for entry in gone
        .iter()
        .filter(|entry| !is_last(entry) && !seen.contains(&entry.name))
    {
        fs::remove_file(text(&path, entry)).unwrap();
    }
    for n in 0..500 {
        file(&path.join(format!("came-{n}")), b"");
    }
    fs::write(path.join("last"), b"changed").unwrap();
    a.flush();
    b.until_content("d/last", b"changed");
    for entry in rest(&dir, 4_000) {
        assert!(
            seen.insert(entry.name.clone()),
            "twice: {}",
            entry.name.escape_ascii()
        );
    }
    let missed: Vec<_> = stay.iter().filter(|entry| !seen.contains(&entry.name)).collect();
    assert!(
        missed.is_empty(),
        "{} missed: {:?}",
        missed.len(),
        &missed[..3.min(missed.len())]
    );
    // From the same place once more, and from the start.
    go(&dir, at, libc::SEEK_SET).unwrap();
    let again = names(&rest(&dir, 4_000));
    let missed = stay.iter().filter(|entry| !again.contains(&entry.name)).count();
    assert_eq!(missed, 0, "from the place again");
    go(&dir, 0, libc::SEEK_SET).unwrap();
    let now = names(&rest(&dir, 4_000));
    assert_eq!(now.iter().filter(|name| name.starts_with(b"came")).count(), 500);
    assert!(
        gone.iter()
            .filter(|entry| !is_last(entry))
            .skip(1_000)
            .all(|entry| !now.contains(&entry.name))
    );

    // A directory that the other one removes while it is open here.
    for entry in fs::read_dir(&path).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    fs::remove_dir(&path).unwrap();
    a.flush();
    b.until_gone("d");
    let after = wait::within(
        "a listing of what is gone ends",
        Duration::from_secs(30),
        move || some(&dir, 4_000),
    );
    assert!(
        after
            .as_ref()
            .map_or_else(|err| err.raw_os_error() == Some(libc::ENOENT), Vec::is_empty),
        "{after:?}"
    );
    fs::create_dir(&there).unwrap();
    assert_eq!(rest(&File::open(&there).unwrap(), 4_096).len(), 2);
}

/// More than the daemon keeps.
const LISTINGS: usize = 8_500;

/// One reads what the kernel kept, while so many others are listed that the daemon forgets the listing, and while
/// what the kernel kept is dropped, because names come and go here and elsewhere.
fn a_reader_whose_listing_is_forgotten_goes_on_where_it_was(kind: StoreKind) {
    const NAMES: usize = 3_000;
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    let (path, there) = (a.path("d"), b.path("d"));
    fs::create_dir(&path).unwrap();
    for n in 0..NAMES {
        file(&path.join(format!("name-{n:05}")), b"");
    }
    a.flush();
    file(&a.path("sign"), b"1");
    a.flush();
    b.until_content("sign", b"1");
    let all = rest(&File::open(&there).unwrap(), 1 << 16);
    assert_eq!(all.len(), NAMES + 2);
    let mut readers: Vec<_> = [1, 20, 1_000, 2_500]
        .into_iter()
        .map(|count| {
            let dir = File::open(&there).unwrap();
            let mut seen = Vec::new();
            while seen.len() < count {
                seen.extend(some(&dir, 500).unwrap());
            }
            (dir, seen)
        })
        .collect();
    let at: Vec<_> = readers
        .iter()
        .map(|(_, seen)| seen.last().unwrap().name.clone())
        .collect();
    let many = b.path("many");
    fs::create_dir(&many).unwrap();
    for n in 0..LISTINGS {
        let other = many.join(n.to_string());
        fs::create_dir(&other).unwrap();
        assert_eq!(rest(&File::open(&other).unwrap(), 4_096).len(), 2);
    }
    // On this machine, behind whom each reader stands among them, and on the other one.
    let text = |dir: &Path, name: &[u8]| dir.join(std::ffi::OsStr::from_bytes(name));
    let mut gone = BTreeSet::new();
    for name in at.iter().filter(|name| name.starts_with(b"name")) {
        fs::remove_file(text(&there, name)).unwrap();
        gone.insert(name.clone());
    }
    for entry in all[2..].iter().step_by(7) {
        if gone.insert(entry.name.clone()) {
            fs::remove_file(text(&path, &entry.name)).unwrap();
        }
    }
    for n in (0..NAMES).step_by(9) {
        file(&path.join(format!("name-{n:05}-came")), b"");
    }
    a.flush();
    file(&a.path("sign"), b"2");
    a.flush();
    b.until_content("sign", b"2");
    for (dir, seen) in &mut readers {
        seen.extend(rest(dir, 500));
        let seen = names(seen.iter());
        let stay = all.iter().filter(|entry| !gone.contains(&entry.name));
        let missed = stay.filter(|entry| !seen.contains(&entry.name)).count();
        assert_eq!(missed, 0);
    }
}
