//! Calls that few programs make: vectors with flags, pipes, rings, syncs of parts.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{fd::AsRawFd, unix::fs::FileExt},
    process::Command,
    time::Duration,
};

use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::{
    lab::{Lab, StoreKind},
    need,
    support::{
        posix::{Mapping, answer, content, file, ro, rw},
        programs,
        trial::compare,
        wait,
    },
};

#[test]
fn vectors_and_their_flags_do_the_same() {
    // The kernel has no such way to a FUSE daemon.
    let differences = [
        ("read RWF_NOWAIT", "6", "Operation not supported"),
        ("write RWF_NOWAIT", "6", "Operation not supported"),
        ("read RWF_DONTCACHE", "6", "Operation not supported"),
        ("write RWF_DONTCACHE", "6", "Operation not supported"),
    ];
    compare(&[], &differences, |t| {
        let path = file(&t.path("f"), b"0123456789");
        let open = rw(&path);
        let call = |fd: &File, write: bool, offset: i64, flags: i32| {
            let mut space = *b"vector";
            let parts = space.chunks_mut(3).map(|part| libc::iovec {
                iov_base: part.as_mut_ptr().cast(),
                iov_len: part.len(),
            });
            let parts: Vec<_> = parts.collect();
            // SAFETY: two parts of an array that lives as long as the call.
            let done = unsafe {
                if write {
                    libc::pwritev2(fd.as_raw_fd(), parts.as_ptr(), 2, offset, flags)
                } else {
                    libc::preadv2(fd.as_raw_fd(), parts.as_ptr(), 2, offset, flags)
                }
            };
            answer(done as i64)
        };
        for (what, flags) in [
            ("none", 0),
            ("RWF_HIPRI", libc::RWF_HIPRI),
            ("RWF_DSYNC", libc::RWF_DSYNC),
            ("RWF_SYNC", libc::RWF_SYNC),
            ("RWF_NOWAIT", libc::RWF_NOWAIT),
            ("RWF_APPEND", libc::RWF_APPEND),
            ("RWF_DONTCACHE", 0x80),
            ("RWF_ATOMIC", 0x40),
            ("no such", 1 << 20),
        ] {
            // Where the kernel knows no such flag, neither does.
            let _ = rw(&path).sync_all();
            drop(content(&path));
            t.ask(format!("read {what}"), call(&open, false, 2, flags));
            t.ask(format!("write {what}"), call(&open, true, 2, flags));
            t.note(format!("bytes after {what}"), content(&path));
        }
        rustix::fs::seek(&open, rustix::fs::SeekFrom::Start(4)).unwrap();
        t.ask("write at the position", call(&open, true, -1, 0));
        t.ask("append at the position", call(&open, true, -1, libc::RWF_APPEND));
        t.ask("position", rustix::fs::tell(&open));
        t.ask("before the start", call(&open, true, -2, 0));
        let reader = ro(&path);
        t.ask("write of a reader", call(&reader, true, 0, 0));
        t.note("bytes", content(&path));
    });
}

#[test]
fn what_is_made_safe_is_made_safe_alike() {
    compare(&[], &[], |t| {
        let path = file(&t.path("f"), &vec![7; 20_000]);
        let (dir, reader, writer) = (File::open(t.path("")).unwrap(), ro(&path), rw(&path));
        rustix::fs::mknodat(
            CWD,
            t.path("fifo"),
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let fifo = File::from(openat(CWD, t.path("fifo"), OFlags::RDWR, Mode::empty()).unwrap());
        for (what, open) in [
            ("directory", &dir),
            ("reader", &reader),
            ("writer", &writer),
            ("fifo", &fifo),
        ] {
            t.call(format!("fsync {what}"), open.sync_all());
            t.call(format!("fdatasync {what}"), open.sync_data());
            t.call(format!("syncfs {what}"), rustix::fs::syncfs(open));
            for (how, offset, len, flags) in [
                ("all", 0, 0, 7),
                ("part", 4_096, 4_096, libc::SYNC_FILE_RANGE_WRITE),
                ("nothing", 0, 10, 0),
                ("no such flag", 0, 10, 8),
                ("before the start", -1, 10, 2),
                ("behind all", i64::MAX, 10, 2),
            ] {
                // SAFETY: numbers alone.
                let synced = unsafe { libc::sync_file_range(open.as_raw_fd(), offset, len, flags) };
                t.call(format!("sync_file_range {what} {how}"), answer(i64::from(synced)));
            }
            for (how, advice) in [
                ("will need", libc::POSIX_FADV_WILLNEED),
                ("random", libc::POSIX_FADV_RANDOM),
                ("no such", 99),
            ] {
                // SAFETY: numbers alone.
                t.note(format!("advice {what} {how}"), unsafe {
                    libc::posix_fadvise(open.as_raw_fd(), 0, 10_000, advice)
                });
            }
            // SAFETY: numbers alone.
            t.call(
                format!("readahead {what}"),
                answer(unsafe { libc::readahead(open.as_raw_fd(), 0, 10_000) } as i64),
            );
        }
        let gone = rw(&path);
        fs::remove_file(&path).unwrap();
        t.call("fsync of what is gone", gone.sync_all());
        t.call("syncfs of what is gone", rustix::fs::syncfs(&gone));
    });
}

#[test]
fn bytes_go_through_pipes_alike() {
    compare(&[], &[], |t| {
        let bytes: Vec<u8> = (0..50_000_u32).map(|n| (n % 253) as u8).collect();
        let path = file(&t.path("from"), &bytes);
        let (from, to) = (ro(&path), File::create_new(t.path("to")).unwrap());
        let append = File::options().append(true).open(t.path("to")).unwrap();
        let (mut end, pipe) = std::io::pipe().unwrap();
        let splice = |from: i32, mut at: i64, to: i32, mut to_at: i64, len: usize, flags: u32| {
            let place = |at: &mut i64| {
                if *at < 0 {
                    std::ptr::null_mut()
                } else {
                    std::ptr::from_mut(at)
                }
            };
            // SAFETY: offsets that live as long as the call, or none.
            let moved = unsafe { libc::splice(from, place(&mut at), to, place(&mut to_at), len, flags) };
            answer(moved as i64)
        };
        let fd = File::as_raw_fd;
        t.ask(
            "into a pipe",
            splice(fd(&from), 100, pipe.as_raw_fd(), -1, 30_000, 0),
        );
        t.ask(
            "out of a pipe",
            splice(end.as_raw_fd(), -1, fd(&to), 5_000, 30_000, libc::SPLICE_F_MOVE),
        );
        t.ask(
            "the rest",
            splice(fd(&from), 40_000, pipe.as_raw_fd(), -1, 30_000, 0),
        );
        t.ask(
            "to one who appends",
            splice(end.as_raw_fd(), -1, fd(&append), -1, 10, 0),
        );
        t.ask(
            "to one who appends, at an offset",
            splice(end.as_raw_fd(), -1, fd(&append), 3, 10, 0),
        );
        t.ask(
            "at the end",
            splice(fd(&from), 50_000, pipe.as_raw_fd(), -1, 10, 0),
        );
        t.ask(
            "behind the end",
            splice(fd(&from), 90_000, pipe.as_raw_fd(), -1, 10, 0),
        );
        t.ask("without a pipe", splice(fd(&from), 0, fd(&to), 0, 10, 0));
        t.ask(
            "of one who writes",
            splice(fd(&to), 0, pipe.as_raw_fd(), -1, 10, 0),
        );
        t.ask("to a reader", splice(end.as_raw_fd(), -1, fd(&from), 0, 10, 0));
        let mut left = vec![0; 9_990];
        end.read_exact(&mut left).unwrap();
        t.note("left in the pipe", left == bytes[40_010..]);
        drop(append);
        t.note("to", crate::support::tree::digest(&content(&t.path("to"))));

        // Memory that is mapped from a file, given to a pipe as it is.
        let mapping = Mapping::new(&from, 50_000, false, true).unwrap();
        t.ask("a mapping into a pipe", mapping.send(8_192, 20_000, &pipe));
        let mut through = vec![0; 20_000];
        end.read_exact(&mut through).unwrap();
        t.note("through", through == bytes[8_192..28_192]);
        let send = |to: &File, mut at: i64, len: usize| {
            // SAFETY: an offset that lives as long as the call.
            answer(unsafe { libc::sendfile(to.as_raw_fd(), from.as_raw_fd(), &raw mut at, len) } as i64)
        };
        t.ask("send", send(&to, 10, 45_000));
        t.ask("send more than there is", send(&to, 49_000, 45_000));
        t.ask("send from behind the end", send(&to, 90_000, 10));
        t.ask("send to a reader", send(&from, 0, 10));
        t.note("sent", crate::support::tree::digest(&content(&t.path("to"))));
        // What is in a pipe is what the file had then, or has now: the kernel says neither. It ends, that is all.
        t.ask(
            "spliced and cut",
            splice(fd(&from), 0, pipe.as_raw_fd(), -1, 4_096, 0),
        );
        rw(&path).set_len(0).unwrap();
        drop(pipe);
        t.ask("comes out", end.read_to_end(&mut Vec::new()));
    });
}

/// By rings, at once and with descriptors and memory that the kernel was given before.
#[test]
fn fio_finds_its_bytes_through_rings() {
    let [fio] = need!("fio");
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    if disabled.is_ok_and(|said| said.trim() != "0") {
        skip!("this kernel lets nobody use io_uring");
    }
    let lab = Lab::new(StoreKind::File);
    for (name, more) in [("a", &[][..]), ("b", &["--no-passthrough"])] {
        let mut spec = lab.spec(name).arg("--volume").arg(name).arg("--settle").arg("0s");
        spec.args.extend(more.iter().map(Into::into));
        let machine = spec.start();
        for ways in [&[][..], &["--direct=1"], &["--fixedbufs=1", "--registerfiles=1"]] {
            let mut command: Command = programs::command(&fio, lab.dir());
            command.current_dir(lab.dir());
            command.args([
                "--name=rings",
                "--ioengine=io_uring",
                "--iodepth=8",
                "--rw=randwrite",
                "--bs=4k",
                "--size=4m",
            ]);
            command
                .args(["--verify=crc32c", "--do_verify=1", "--numjobs=2", "--thread"])
                .args(ways);
            command.arg(format!("--directory={}", machine.root().display()));
            wait::run_ok(&mut command, Duration::from_secs(120));
        }
        // The kernel lets go of the files of a ring some time after the program has ended.
        wait::until("all is in the store", Duration::from_secs(60), || {
            let flushed = machine.control("flush", &["--deadline", "30s"]);
            flushed.status.success().then_some(())
        });
        let log = machine.log();
        assert!(!log.contains("ERROR"), "{log}");
    }
}

/// Whichever call comes first, it brings the bytes.
#[test]
fn what_is_only_in_the_store_is_read_by_every_call() {
    for kind in [StoreKind::File, StoreKind::S3] {
        let lab = Lab::new(kind);
        let (a, b) = (lab.machine("a"), lab.spec("b").arg("--no-passthrough").start());
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 249) as u8).collect();
        let ways = [
            "read", "mapped", "direct", "spliced", "copied", "sent", "cut", "appended",
        ];
        for (number, way) in ways.iter().enumerate() {
            let mut own = bytes.clone();
            own[0] = number as u8;
            file(&a.path(way), &own);
        }
        a.flush();
        wait::until("b follows", Duration::from_secs(30), || {
            fs::metadata(b.path("appended")).ok()
        });
        for (number, way) in ways.iter().enumerate() {
            let mut own = bytes.clone();
            own[0] = number as u8;
            let path = b.path(way);
            let read = match *way {
                "mapped" => Mapping::new(&ro(&path), own.len(), false, true).unwrap().read(),
                "direct" => {
                    let open = openat(CWD, &path, OFlags::RDONLY | OFlags::DIRECT, Mode::empty()).unwrap();
                    let mut bytes = vec![0; own.len() + 8_192];
                    let start = bytes.as_ptr().align_offset(4_096);
                    let whole = own.len().next_multiple_of(4_096);
                    let mut filled = 0;
                    while filled < own.len() {
                        filled += File::from(open.try_clone().unwrap())
                            .read_at(&mut bytes[start + filled..start + whole], filled as u64)
                            .unwrap();
                    }
                    bytes[start..start + own.len()].to_vec()
                }
                "spliced" => {
                    let (mut end, pipe) = std::io::pipe().unwrap();
                    let source = ro(&path);
                    let reader = std::thread::spawn(move || {
                        let mut bytes = Vec::new();
                        end.read_to_end(&mut bytes).unwrap();
                        bytes
                    });
                    let mut at = 0_i64;
                    // SAFETY: an offset that lives as long as the call.
                    while unsafe {
                        libc::splice(
                            source.as_raw_fd(),
                            &raw mut at,
                            pipe.as_raw_fd(),
                            std::ptr::null_mut(),
                            1 << 16,
                            0,
                        )
                    } > 0
                    {}
                    drop(pipe);
                    reader.join().unwrap()
                }
                "copied" => {
                    let (from, to) = (ro(&path), rw(&file(&b.path("copy"), b"")));
                    let (mut at, mut to_at) = (0, 0);
                    while rustix::fs::copy_file_range(&from, Some(&mut at), &to, Some(&mut to_at), own.len())
                        .unwrap()
                        > 0
                    {}
                    drop(to);
                    content(&b.path("copy"))
                }
                "sent" => {
                    let (from, to) = (ro(&path), rw(&file(&b.path("copy-sent"), b"")));
                    while rustix::fs::sendfile(&to, &from, None, own.len()).unwrap() > 0 {}
                    content(&b.path("copy-sent"))
                }
                "cut" => {
                    rw(&path).set_len(2_000_001).unwrap();
                    own.truncate(2_000_001);
                    content(&path)
                }
                "appended" => {
                    File::options()
                        .append(true)
                        .open(&path)
                        .unwrap()
                        .write_all(b"more")
                        .unwrap();
                    own.extend_from_slice(b"more");
                    content(&path)
                }
                _ => content(&path),
            };
            assert!(read == own, "{way} on {kind:?}: {} bytes", read.len());
        }
    }
}
