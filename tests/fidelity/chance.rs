//! Calls in any order on two files, each open several times: what a list made by hand forgets.
//!
//! The same seed makes the same calls on the disk and in every mount.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::Path,
};

use rustix::fs::{FallocateFlags, copy_file_range, fallocate, sendfile};

use crate::{
    lab::{Lab, StoreKind},
    support::{
        posix::{Mapping, file},
        rng::Rng,
        tree,
        trial::{Trial, compare_with},
    },
};

on_both_stores!(calls_in_any_order_answer_alike);

const CALLS: usize = 1_000;
const LONGEST: u64 = 400_000;

/// A file that is open several times, under the one name that it has.
struct Opened {
    name: &'static str,
    handles: Vec<File>,
    mapping: Option<Mapping>,
}

/// What is mapped of a file; it is not cut shorter while it is.
const MAPPED: usize = 70_000;

fn opened(path: &Path, how: u64) -> File {
    let mut options = File::options();
    match how {
        0 => options.read(true),
        1 => options.read(true).append(true),
        2 => options.write(true),
        3 => options.read(true).write(true).truncate(true),
        _ => options.read(true).write(true),
    };
    options.open(path).unwrap()
}

fn digest(path: &Path) -> String {
    fs::read(path).map_or_else(
        |err| err.to_string(),
        |bytes| tree::hex(&tree::digest(&bytes))[..10].to_owned(),
    )
}

fn calls(t: &Trial, seed: u64) {
    let mut rng = Rng::seeded(seed);
    let mut files = ["a", "b"].map(|name| Opened {
        name,
        handles: Vec::new(),
        mapping: None,
    });
    for number in 0..CALLS {
        let which = rng.below(2) as usize;
        let other = files[1 - which]
            .handles
            .last()
            .map(|file| file.try_clone().unwrap());
        // Two names may be of one file.
        let mapped = files.iter().any(|file| file.mapping.is_some());
        let this = &mut files[which];
        let path = t.path(this.name);
        if !path.exists() {
            file(&path, &rng.bytes(1_000));
        }
        while this.handles.len() < 3 {
            this.handles.push(opened(&path, 4 + rng.below(2)));
        }
        let at = rng.below(LONGEST);
        let len = rng.below(30_000);
        let place = rng.below(this.handles.len() as u64) as usize;
        let handle = &this.handles[place];
        let what = |call: &str| format!("{number}: {call} of {} by {place} at {at}, {len}", this.name);
        match rng.below(20) {
            0..=3 => t.ask(what("write"), handle.write_at(&rng.bytes(len as usize), at)),
            4 => {
                let mut at_its_position = handle;
                t.ask(
                    what("append"),
                    at_its_position.write(&rng.bytes(len as usize / 8)),
                );
            }
            5 | 6 => {
                let mut bytes = vec![0; len as usize];
                let read = handle.read_at(&mut bytes, at);
                t.ask(
                    what("read"),
                    read.map(|len| (len, tree::hex(&tree::digest(&bytes[..len]))[..10].to_owned())),
                );
            }
            7 if !mapped => {
                t.call(what("cut"), handle.set_len(at));
            }
            8 => {
                let flags = [
                    FallocateFlags::empty(),
                    FallocateFlags::KEEP_SIZE,
                    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    FallocateFlags::ZERO_RANGE,
                ][rng.below(4) as usize];
                t.call(what(&format!("{flags:?}")), fallocate(handle, flags, at, len));
            }
            9 | 10 => {
                let Some(other) = &other else { continue };
                let (mut from, mut to) = (at, rng.below(LONGEST));
                if len.is_multiple_of(2) {
                    let copied = copy_file_range(handle, Some(&mut from), other, Some(&mut to), len as usize);
                    t.ask(what("copy"), copied);
                } else {
                    t.ask(
                        what("send"),
                        sendfile(other, handle, Some(&mut from), len as usize),
                    );
                }
            }
            11 => {
                if this.mapping.take().is_none() && fs::metadata(&path).unwrap().len() >= MAPPED as u64 {
                    let by = opened(&path, 4);
                    this.mapping = Some(Mapping::new(&by, MAPPED, true, true).unwrap());
                }
            }
            12 | 13 => {
                if let Some(mapping) = &this.mapping {
                    let from = at as usize % (MAPPED - 200);
                    mapping.write(from, &rng.bytes(200));
                    t.note(
                        what("mapped"),
                        tree::hex(&tree::digest(&mapping.read()))[..10].to_owned(),
                    );
                }
            }
            14 if !mapped => this.handles[place] = opened(&path, rng.below(8)),
            15 => {
                let synced = if len.is_multiple_of(2) {
                    handle.sync_all()
                } else {
                    handle.sync_data()
                };
                t.call(what("sync"), synced);
            }
            16 => {
                let meta = handle.metadata().unwrap();
                t.note(what("stat"), (meta.len(), meta.nlink(), meta.mode()));
                t.call(
                    what("chmod"),
                    handle.set_permissions(fs::Permissions::from_mode(0o600 + len as u32 % 64)),
                );
            }
            17 => match rng.below(4) {
                0 => {
                    t.call(what("unlink"), fs::remove_file(&path));
                }
                1 => {
                    t.call(
                        what("replace"),
                        fs::rename(file(&t.path("new"), &rng.bytes(3_000)), &path),
                    );
                }
                2 => {
                    let _ = fs::remove_file(t.path("link"));
                    t.call(what("link"), fs::hard_link(&path, t.path("link")));
                }
                _ => {
                    t.call(what("move"), fs::rename(t.path("link"), &path));
                }
            },
            18 => {
                drop(other);
                for file in &mut files {
                    file.handles.clear();
                    file.mapping = None;
                }
                if len.is_multiple_of(4) {
                    t.seal();
                }
            }
            _ => t.note(what("bytes"), digest(&path)),
        }
    }
    for name in ["a", "b", "link"] {
        t.note(format!("{name} at last"), digest(&t.path(name)));
    }
    drop(files);
    t.seal();
    for name in ["a", "b", "link"] {
        t.note(format!("{name} sealed"), digest(&t.path(name)));
    }
}

fn calls_in_any_order_answer_alike(kind: StoreKind) {
    let mut seeds = Rng::from_environment();
    for _ in 0..2 {
        let seed = seeds.next();
        eprintln!("calls from {seed}");
        let lab = Lab::new(kind);
        let spec = |name: &str| lab.spec(name).arg("--volume").arg(name);
        compare_with(lab.dir(), spec, &["--settle", "0s"], &[], |t| calls(t, seed));
    }
}

/// Closes come from several threads of the kernel's, in any order.
#[test]
fn what_several_writers_close_at_once_is_sealed() {
    for args in [&[][..], &["--no-passthrough"]] {
        let lab = Lab::new(StoreKind::File);
        let mut spec = lab.spec("a").arg("--settle").arg("0s");
        spec.args.extend(args.iter().map(Into::into));
        let machine = spec.start();
        for round in 0..20 {
            let names: Vec<_> = (0..100).map(|n| machine.path(format!("f{n}"))).collect();
            for path in &names {
                let first = File::create(path).unwrap();
                let writers: Vec<_> = (0..6).map(|_| opened(path, 4)).collect();
                first.write_all_at(format!("{round}").as_bytes(), 0).unwrap();
                // Each by a thread of its own, as of programs that end together.
                std::thread::scope(|scope| {
                    for writer in writers.into_iter().chain([first]) {
                        scope.spawn(move || drop(writer));
                    }
                });
            }
            machine.flush();
        }
    }
}
