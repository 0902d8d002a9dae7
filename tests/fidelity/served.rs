//! One list of calls on files in every state: new, sealed, of several names, empty, only in the store. Each is served by
//! the daemon or lent to the kernel, on a store of either kind.

use std::{
    fs::{self, File},
    io::Write,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate};

use super::times::at;
use crate::{
    lab::{Lab, StoreKind},
    support::{
        machine::Machine,
        posix::{Mapping, answer, content, file, ro, rw},
        tree,
        trial::{Trial, compare_with},
        wait,
    },
};

on_both_stores!(
    files_in_every_state_answer_alike,
    files_in_every_state_answer_alike_while_they_are_sealed
);

fn files_in_every_state_answer_alike(kind: StoreKind) {
    in_every_state(kind, &[]);
}

/// What is closed is sealed at once, also between two calls.
fn files_in_every_state_answer_alike_while_they_are_sealed(kind: StoreKind) {
    in_every_state(kind, &["--settle", "0s"]);
}

fn in_every_state(kind: StoreKind, args: &[&str]) {
    let lab = Lab::new(kind);
    let on_volume = |name: &str, volume: &str| lab.spec(name).arg("--volume").arg(volume);
    let spec = |name: &str| on_volume(name, name);
    compare_with(lab.dir(), spec, args, &[], |t| {
        let elsewhere = t.machine().map(|machine| {
            let name = &machine.spec.name;
            on_volume(&format!("{name}-elsewhere"), name).start()
        });
        for state in ["new", "sealed", "linked", "alike", "empty", "fetched"] {
            calls(t, state, &made(t, state, elsewhere.as_ref()));
        }
    });
}

fn pattern(seed: u8) -> Vec<u8> {
    (0..100_000_u32).map(|n| (n % 251) as u8 ^ seed).collect()
}

/// Makes a file and brings it into a state. `elsewhere` is another machine of the mount's volume.
fn made(t: &Trial, state: &str, elsewhere: Option<&Machine>) -> PathBuf {
    let path = t.path(state);
    let bytes = pattern(state.len() as u8);
    match (state, t.machine().zip(elsewhere)) {
        ("empty", _) => drop(file(&path, b"")),
        ("fetched", Some((machine, elsewhere))) => {
            machine.flush();
            let below = path.strip_prefix(machine.root()).unwrap();
            let there = elsewhere.path(below);
            wait::until("the other machine follows", Duration::from_secs(30), || {
                fs::write(&there, &bytes).ok()
            });
            elsewhere.flush();
            wait::until("the mount follows", Duration::from_secs(30), || {
                fs::metadata(&path)
                    .ok()
                    .filter(|meta| meta.len() == bytes.len() as u64)
            });
        }
        _ => drop(file(&path, &bytes)),
    }
    match state {
        "linked" => fs::hard_link(&path, t.path("linked-too")).unwrap(),
        "alike" => drop(file(&t.path("alike-too"), &bytes)),
        _ => {}
    }
    if state != "new" {
        t.seal();
    }
    path
}

/// The descriptors of one file.
struct Open {
    reader: File,
    both: File,
    append: File,
    writer: File,
    direct: File,
}

impl Open {
    fn new(path: &Path) -> Self {
        Self {
            reader: ro(path),
            both: rw(path),
            append: File::options().append(true).read(true).open(path).unwrap(),
            writer: File::options().write(true).open(path).unwrap(),
            direct: File::options()
                .read(true)
                .write(true)
                .custom_flags(libc::O_DIRECT)
                .open(path)
                .unwrap(),
        }
    }

    /// What every one of them shows, and which times an act changed.
    fn after<T>(&self, t: &Trial, what: &str, act: impl FnOnce() -> T) -> T {
        let times = || {
            let meta = self.reader.metadata().unwrap();
            (
                (meta.mtime(), meta.mtime_nsec()),
                (meta.ctime(), meta.ctime_nsec()),
            )
        };
        let before = times();
        // Longer than the clock of a file system takes for a step.
        thread::sleep(Duration::from_millis(12));
        let done = act();
        let after = times();
        // A new file of ours is younger by the step of the disk's clock than its bytes.
        let equal = after.0 == after.1 || before == after;
        let changed = (before.0 != after.0, before.1 != after.1, equal);
        let all = [&self.reader, &self.both, &self.append, &self.writer, &self.direct];
        let lengths: Vec<_> = all.iter().map(|open| open.metadata().unwrap().len()).collect();
        let read = |open: &File| {
            let mut bytes = vec![0; 300_000];
            let len = open.read_at(&mut bytes, 0).unwrap();
            tree::hex(&tree::digest(&bytes[..len]))[..8].to_owned()
        };
        t.note(format!("{what}: modified, changed, equal"), changed);
        t.note(format!("{what}: lengths"), lengths);
        t.note(
            format!("{what}: bytes"),
            [read(&self.reader), read(&self.both), read(&self.append)],
        );
        done
    }
}

fn calls(t: &Trial, state: &str, path: &Path) {
    let said = |what: &str| format!("{state}: {what}");
    let open = Open::new(path);
    open.after(t, &said("opened"), || {});
    let step = |what: &str, act: &dyn Fn(&str)| {
        let what = said(what);
        open.after(t, &what, || act(&format!("{what}: call")));
    };
    step("write", &|what| {
        t.ask(what, open.both.write_at(b"written", 50_000));
    });
    step("append", &|what| {
        t.call(what, (&open.append).write_all(b"appended"));
    });
    step("append at an offset", &|what| {
        t.ask(what, open.append.write_at(b"at 3", 3));
    });
    step("write behind the end", &|what| {
        t.ask(what, open.writer.write_at(b"far", 150_001));
    });
    step("write nothing behind the end", &|what| {
        t.ask(what, open.writer.write_at(b"", 250_000));
    });

    // As disks want it: whole blocks of aligned memory.
    let mut memory = vec![b'd'; 3 * 4_096];
    let start = memory.as_ptr().align_offset(4_096);
    let block = std::cell::RefCell::new(&mut memory[start..start + 4_096]);
    step("direct write", &|what| {
        t.ask(what, open.direct.write_at(&block.borrow(), 8_192));
    });
    step("write beside it", &|_| {
        open.both.write_at(b"beside", 8_190).unwrap();
    });
    t.ask(
        said("direct read"),
        open.direct.read_at(&mut block.borrow_mut(), 8_192),
    );
    t.note(said("direct read: bytes"), block.borrow()[..6].to_vec());
    t.ask(
        said("direct read behind the end"),
        open.direct.read_at(&mut block.borrow_mut(), 1 << 20),
    );

    let shared = Mapping::new(&open.both, 90_000, true, true).unwrap();
    let private = Mapping::new(&open.reader, 90_000, true, false).unwrap();
    let watched = Mapping::new(&open.reader, 90_000, false, true).unwrap();
    shared.write(20_000, b"stored");
    open.both.sync_data().unwrap();
    t.ask(
        said("a direct reader of what is mapped"),
        open.direct.read_at(&mut block.borrow_mut(), 16_384),
    );
    t.note(
        said("a direct reader of what is mapped: bytes"),
        block.borrow()[3_616..3_622].to_vec(),
    );
    step("store to a private mapping", &|_| {
        private.write(30_000, b"private");
    });
    step("write under the mappings", &|_| {
        open.append.write_at(b"!", 0).unwrap();
    });
    t.note(
        said("mappings"),
        (
            watched.read()[19_999..20_007].to_vec(),
            private.read()[29_999..30_008].to_vec(),
        ),
    );

    step("cut", &|what| {
        t.call(what, open.append.set_len(60_001));
    });
    // A system call tells what a load would be killed for.
    let (_end, pipe) = std::io::pipe().unwrap();
    for (what, from) in [
        ("inside", 60_000),
        ("in the last page", 61_000),
        ("behind it", 70_000),
    ] {
        t.ask(said(&format!("mapping {what}")), watched.send(from, 1, &pipe));
    }
    step("extend", &|what| {
        t.call(what, open.writer.set_len(90_000));
    });
    t.note(
        said("mapped over the extension"),
        watched.read()[60_000..90_000]
            .iter()
            .filter(|byte| **byte != 0)
            .count(),
    );
    drop((shared, private, watched));

    for (what, flags, offset, len) in [
        ("allocate", FallocateFlags::empty(), 80_000, 20_000),
        ("keep size", FallocateFlags::KEEP_SIZE, 90_000, 100_000),
        (
            "punch",
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            4_096,
            8_192,
        ),
        ("zero", FallocateFlags::ZERO_RANGE, 50_000, 100),
        ("too far", FallocateFlags::empty(), 1 << 45, 1),
    ] {
        step(what, &|call| {
            for (how, descriptor) in [
                ("both", &open.both),
                ("append", &open.append),
                ("reader", &open.reader),
            ] {
                t.call(format!("{call} {how}"), fallocate(descriptor, flags, offset, len));
            }
        });
    }
    if state != "empty" && state != "fetched" {
        for from in [0, 4_000, 4_096, 5_000, 12_288, 90_000] {
            for (how, descriptor) in [("reader", &open.reader), ("writer", &open.writer)] {
                t.ask(
                    said(&format!("data from {from} by {how}")),
                    rustix::fs::seek(descriptor, SeekFrom::Data(from)),
                );
                t.ask(
                    said(&format!("hole from {from} by {how}")),
                    rustix::fs::seek(descriptor, SeekFrom::Hole(from)),
                );
            }
        }
    }
    step("copy a range", &|what| {
        t.ask(
            what,
            copy_file_range(
                &open.reader,
                Some(&mut 100),
                &open.writer,
                Some(&mut 70_000),
                5_000,
            ),
        );
    });
    step("copy nothing", &|what| {
        t.ask(
            what,
            copy_file_range(
                &open.reader,
                Some(&mut (1 << 30)),
                &open.writer,
                Some(&mut 0),
                5_000,
            ),
        );
    });
    step("send", &|what| {
        let mut from = 200;
        rustix::fs::seek(&open.both, SeekFrom::Start(40_000)).unwrap();
        t.ask(
            what,
            rustix::fs::sendfile(&open.both, &open.reader, Some(&mut from), 3_000),
        );
    });

    t.ask(said("read of a writer"), open.writer.read_at(&mut [0; 3], 0));
    t.ask(said("write of a reader"), open.reader.write_at(b"x", 0));
    t.call(said("cut of a reader"), open.reader.set_len(0));
    t.ask(
        said("copy to a reader"),
        copy_file_range(&open.both, Some(&mut 0), &open.reader, Some(&mut 0), 5),
    );
    t.ask(
        said("read behind the end"),
        open.reader.read_at(&mut [0; 3], 1 << 40),
    );
    t.ask(said("write too far"), open.both.write_at(b"x", 1 << 45));
    t.call(said("too long"), open.both.set_len(1 << 45));

    step("set times", &|what| {
        let times = at(1_000_000_000);
        t.call(what, rustix::fs::futimens(&open.reader, &times));
    });
    step("write after it", &|_| {
        open.writer.write_at(b"after", 10).unwrap();
    });
    step("rename", &|what| {
        t.call(what, fs::rename(path, path.with_extension("renamed")));
    });
    let renamed = path.with_extension("renamed");
    step("replace", &|what| {
        file(&path.with_extension("over"), b"over");
        t.call(what, fs::rename(path.with_extension("over"), &renamed));
    });
    t.note(said("names"), open.reader.metadata().unwrap().nlink());
    step("write without that name", &|what| {
        t.ask(what, open.both.write_at(b"nameless", 77));
    });
    step("append without that name", &|what| {
        t.call(what, (&open.append).write_all(b"nameless"));
    });
    step("cut without that name", &|what| {
        t.call(what, open.both.set_len(9_000));
    });
    step("punch without that name", &|what| {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        t.call(what, fallocate(&open.writer, flags, 0, 5_000));
    });
    let mapping = Mapping::new(&open.both, 9_000, true, true).unwrap();
    mapping.write(8_000, b"nameless");
    t.call(said("msync without that name"), mapping.sync());
    drop(mapping);
    let mut bytes = [0; 8];
    open.reader.read_exact_at(&mut bytes, 8_000).unwrap();
    t.note(said("stored without that name"), bytes);
    t.call(said("sync without that name"), open.both.sync_all());
    let by_descriptor = format!("/proc/self/fd/{}", open.writer.as_raw_fd());
    t.ask(
        said("opened again"),
        fs::read(by_descriptor).map(|bytes| tree::digest(&bytes)),
    );
    t.note(said("what replaced it"), content(&renamed));

    drop(open);
    // The same file under the names that it has left, after all closes and once it is sealed.
    for when in ["closed", "sealed"] {
        if state == "linked" {
            let left = t.path("linked-too");
            t.note(said(&format!("{when}: bytes")), tree::digest(&content(&left)));
            t.note(
                said(&format!("{when}: names")),
                fs::metadata(&left).unwrap().nlink(),
            );
        }
        if state == "alike" {
            t.note(
                said(&format!("{when}: its twin")),
                content(&t.path("alike-too")) == pattern(5),
            );
        }
        t.seal();
    }
}

#[test]
fn times_stay_from_the_close_on() {
    let lab = Lab::new(StoreKind::File);
    let spec = |name: &str| lab.spec(name).arg("--volume").arg(name);
    compare_with(lab.dir(), spec, &["--settle", "0s"], &[], |t| {
        let path = file(&t.path("f"), &pattern(1));
        t.seal();
        for (what, act) in [
            (
                "written",
                (|path: &Path| rw(path).write_all_at(b"x", 5).unwrap()) as fn(&Path),
            ),
            ("appended", |path| {
                File::options()
                    .append(true)
                    .open(path)
                    .unwrap()
                    .write_all(b"x")
                    .unwrap();
            }),
            ("cut", |path| rw(path).set_len(50_000).unwrap()),
            ("emptied", |path| drop(File::create(path).unwrap())),
            ("allocated", |path| {
                fallocate(rw(path), FallocateFlags::empty(), 0, 10_000).unwrap();
            }),
            ("stored", |path| {
                Mapping::new(&rw(path), 100, true, true)
                    .unwrap()
                    .write(0, b"stored");
            }),
        ] {
            let times = || {
                let meta = fs::metadata(&path).unwrap();
                [
                    (meta.mtime(), meta.mtime_nsec()),
                    (meta.ctime(), meta.ctime_nsec()),
                ]
            };
            let before = times();
            thread::sleep(Duration::from_millis(12));
            act(&path);
            let later = || Some(times()).filter(|now| now[0] > before[0] && now[1] > before[1]);
            // The kernel tells of the end of an open without waiting for who is told.
            let after = wait::try_until(Duration::from_secs(5), later);
            t.note(format!("{what}: later"), after.is_some());
            t.seal();
            t.note(format!("{what}: and stays so"), Some(times()) == after);
        }
    });
}

#[test]
fn programs_run_from_files_in_every_state() {
    let lab = Lab::new(StoreKind::File);
    let spec = |name: &str| lab.spec(name).arg("--volume").arg(name);
    let sleep = crate::support::programs::find("sleep").expect("every system has it");
    let program = fs::read(sleep).unwrap();
    compare_with(lab.dir(), spec, &["--settle", "0s"], &[], |t| {
        for state in ["new", "sealed", "linked"] {
            let said = |what: &str| format!("{state}: {what}");
            let path = file(&t.path(state), &program);
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            let other = t.path(format!("{state}-too"));
            if state == "linked" {
                fs::hard_link(&path, &other).unwrap();
            } else {
                fs::copy(&path, &other).unwrap();
            }
            if state != "new" {
                t.seal();
            }
            let start = || std::process::Command::new(&path).arg("60").spawn();
            // Forks of other tests' threads may hold a descriptor for a moment, so a writer is held here only.
            let writer = rw(&path);
            t.call(said("run what is written"), start());
            drop(writer);
            let run = || start().ok();
            let running = wait::try_until(Duration::from_secs(5), run).expect("a program can be started");
            let mut running = wait::ChildGuard(running);
            t.call(said("write"), File::options().write(true).open(&path));
            t.call(said("append"), File::options().append(true).open(&path));
            t.call(said("create over it"), File::create(&path));
            t.call(said("the other name"), File::options().write(true).open(&other));
            let cut = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
            // SAFETY: a path that ends with NUL, which the call only reads.
            t.call(
                said("truncate"),
                answer(i64::from(unsafe { libc::truncate(cut.as_ptr(), 0) })),
            );
            t.call(said("read"), fs::read(&path));
            t.call(
                said("chmod"),
                fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o700)),
            );
            t.call(
                said("rename"),
                fs::rename(&path, t.path(format!("{state}-moved"))),
            );
            t.call(
                said("replace"),
                fs::rename(file(&path, b"new"), t.path(format!("{state}-moved"))),
            );
            t.note(said("runs on"), running.0.try_wait().unwrap().is_none());
        }
    });
}
