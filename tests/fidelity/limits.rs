//! Where things end (paths, sizes, offsets), how a path is followed, and what is told of a file.

use std::{
    ffi::CString,
    fs::{self, File},
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt, symlink},
            process::ExitStatusExt,
        },
    },
    process::Command,
};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, Mode, OFlags, ResolveFlags, StatxFlags, fallocate, openat, openat2, statx,
    utimensat,
};

use crate::support::{
    posix::{answer, content, file, ro, rw},
    trial::{as_user, compare},
    wait,
};

#[test]
fn paths_end_at_the_same_length() {
    compare(&[], &[], |t| {
        file(&t.path("f"), b"x");
        let base = t.path("").as_os_str().len();
        for len in [4_094, 4_095, 4_096, 4_097] {
            // "./" as often as it takes, and a slash more for an odd rest.
            let fill = len - base - 1;
            let path = format!(
                "{}{}f",
                t.path("").display(),
                "./".repeat(fill / 2) + if fill % 2 == 1 { "/" } else { "" }
            );
            assert_eq!(path.len(), len);
            t.call(format!("open {len}"), File::open(&path));
            t.call(format!("rename {len}"), fs::rename(&path, &path));
            t.call(
                format!("link {len}"),
                symlink(&path, t.path(format!("link-{len}"))),
            );
            t.call(
                format!("by the link {len}"),
                fs::metadata(t.path(format!("link-{len}"))),
            );
        }
        // Deeper than any path may be, step by step.
        let mut dir = File::open(t.path("")).unwrap();
        let name = "n".repeat(250);
        for _ in 0..20 {
            rustix::fs::mkdirat(&dir, &name, Mode::from_raw_mode(0o755)).unwrap();
            dir = openat(&dir, &name, OFlags::DIRECTORY, Mode::empty())
                .unwrap()
                .into();
        }
        t.call(
            "made below",
            openat(
                &dir,
                "f",
                OFlags::CREATE | OFlags::WRONLY,
                Mode::from_raw_mode(0o644),
            ),
        );
        t.call(
            "its path",
            fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())),
        );
        fs::remove_dir_all(t.path(&name)).unwrap();
        // Letters of several bytes are cut nowhere.
        for (letter, count) in [
            ("\u{e9}", 127),
            ("\u{20ac}", 85),
            ("\u{1f600}", 63),
            ("\u{1f600}", 64),
        ] {
            t.call(
                format!("{count} letters of {}", letter.len()),
                File::create(t.path(letter.repeat(count))),
            );
        }
        let mut names: Vec<_> = fs::read_dir(t.path(""))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        t.note("names", names.iter().map(|name| name.len()).collect::<Vec<_>>());
    });
}

#[test]
fn files_end_where_the_disk_or_the_user_says() {
    // The kernel lets positions be where no disk has bytes, as XFS does.
    let position = ("seek behind all", "Invalid argument", "9223372036854775807");
    compare(&[], &[position], |t| {
        let path = file(&t.path("f"), b"content");
        let open = rw(&path);
        for at in [
            (1_u64 << 44) - 4_097,
            (1 << 44) - 4_096,
            1 << 44,
            1 << 45,
            i64::MAX as u64 - 1,
        ] {
            t.ask(format!("write at {at}"), open.write_at(b"x", at));
            t.ask(format!("read at {at}"), open.read_at(&mut [0], at));
            t.call(format!("cut at {at}"), open.set_len(at));
            t.call(format!("cut back from {at}"), open.set_len(7));
            t.call(
                format!("allocate at {at}"),
                fallocate(&open, FallocateFlags::KEEP_SIZE, at, 1),
            );
        }
        t.call("longer than numbers", open.set_len(i64::MAX as u64));
        open.set_len(7).unwrap();
        for (what, offset, whence) in [
            ("behind the end", 1 << 43, libc::SEEK_SET),
            ("behind all", i64::MAX, libc::SEEK_SET),
            ("before the start", -1, libc::SEEK_SET),
            ("before the start from the end", -8, libc::SEEK_END),
            ("at the start from the end", -7, libc::SEEK_END),
            ("too far from the end", i64::MAX, libc::SEEK_END),
            ("no way", 0, 9),
            ("data before the start", -1, libc::SEEK_DATA),
            ("hole behind the end", 8, libc::SEEK_HOLE),
        ] {
            // SAFETY: a call of numbers.
            t.ask(
                format!("seek {what}"),
                answer(unsafe { libc::lseek(open.as_raw_fd(), offset, whence) }),
            );
        }
        let mut byte = 0_u8;
        for (what, offset) in [("minus one", -1), ("the least", i64::MIN)] {
            // SAFETY: one byte is read or written, which lives as long.
            let (read, written) = unsafe {
                (
                    libc::pread(open.as_raw_fd(), (&raw mut byte).cast(), 1, offset),
                    libc::pwrite(open.as_raw_fd(), (&raw const byte).cast(), 1, offset),
                )
            };
            t.call(format!("read at {what}"), answer(read as i64));
            // Told at once: the error is that of the last call.
            t.note(format!("write at {what}"), written);
        }
        // SAFETY: numbers alone.
        t.call(
            "cut to minus one",
            answer(i64::from(unsafe { libc::ftruncate(open.as_raw_fd(), -1) })),
        );
        let parts = vec![
            libc::iovec {
                iov_base: (&raw mut byte).cast(),
                iov_len: 1
            };
            1_025
        ];
        for count in [0, 1, 1_024, 1_025, -1] {
            // SAFETY: each part is one byte that lives as long, and there are as many as the longest count.
            let read = unsafe { libc::preadv(open.as_raw_fd(), parts.as_ptr(), count, 0) };
            t.ask(format!("{count} parts"), answer(read as i64));
        }
        drop(open);
        // The user's own limit (in blocks of 512 bytes or of 1024, by shell), and its signal.
        for (what, script) in [
            (
                "write over it",
                "ulimit -f 8; exec dd if=/dev/zero of=\"$1\" bs=100000 count=1 conv=notrunc status=none",
            ),
            (
                "write behind it",
                "ulimit -f 8; exec dd if=/dev/zero of=\"$1\" bs=1000 seek=50 count=1 conv=notrunc status=none",
            ),
            (
                "append over it",
                "ulimit -f 8; for n in 1 2 3 4; do head -c 3000 /dev/zero >> \"$1\"; done",
            ),
            ("cut over it", "ulimit -f 8; exec truncate -s 100000 \"$1\""),
            ("allocate over it", "ulimit -f 8; exec fallocate -l 100000 \"$1\""),
        ] {
            for trap in ["", "trap '' XFSZ; "] {
                file(&path, b"content");
                let mut sh = Command::new("sh");
                sh.arg("-c")
                    .arg(format!("{trap}{script}"))
                    .arg("sh")
                    .arg(&path)
                    .env("LC_ALL", "C");
                let output = wait::run(&mut sh, std::time::Duration::from_secs(30));
                let said = String::from_utf8_lossy(&output.stderr).contains("File too large");
                let ended = (
                    output.status.code(),
                    output.status.signal(),
                    said,
                    content(&path).len(),
                );
                t.note(format!("{what}, {trap:?}"), ended);
            }
        }
    });
}

#[test]
fn ways_are_resolved_and_told_alike() {
    compare(&[], &[("birth", "Some(true)", "Some(false)")], |t| {
        fs::create_dir_all(t.path("d/e")).unwrap();
        file(&t.path("f"), b"x");
        file(&t.path("d/f"), b"x");
        symlink("../f", t.path("d/up")).unwrap();
        symlink("f", t.path("d/same")).unwrap();
        symlink(t.path("f"), t.path("d/absolute")).unwrap();
        let dir = File::open(t.path("d")).unwrap();
        for (what, resolve) in [
            ("beneath", ResolveFlags::BENEATH),
            ("in root", ResolveFlags::IN_ROOT),
            ("no links", ResolveFlags::NO_SYMLINKS),
            ("no magic links", ResolveFlags::NO_MAGICLINKS),
            ("no other mount", ResolveFlags::NO_XDEV),
            ("cached", ResolveFlags::CACHED),
        ] {
            for name in ["f", "e/../f", "../f", "up", "same", "absolute", "/f", "e", "no"] {
                let opened = openat2(&dir, name, OFlags::RDONLY, Mode::empty(), resolve);
                // What the kernel has at hand depends on what was asked before, and is the same here.
                if what == "cached" && name != "f" {
                    continue;
                }
                t.call(format!("{what}: {name}"), opened);
            }
        }
        let path = t.path("f");
        for (what, mask) in [
            ("nothing", StatxFlags::empty()),
            ("size", StatxFlags::SIZE),
            ("all", StatxFlags::BASIC_STATS),
        ] {
            for (how, flags) in [
                ("plain", AtFlags::empty()),
                ("synced", AtFlags::STATX_FORCE_SYNC),
                ("not synced", AtFlags::STATX_DONT_SYNC),
            ] {
                let told = statx(CWD, &path, flags, mask).unwrap();
                t.note(
                    format!("{what} {how}"),
                    (
                        told.stx_size,
                        told.stx_mode,
                        told.stx_nlink,
                        told.stx_blksize,
                        told.stx_attributes.bits(),
                    ),
                );
            }
        }
        for len in [0, 1, 512, 4_096, 4_097, 100_000] {
            let path = file(&t.path(format!("long-{len}")), &vec![7; len]);
            t.note(format!("blocks of {len}"), fs::metadata(&path).unwrap().blocks());
            t.seal();
            t.note(
                format!("blocks of {len}, sealed"),
                fs::metadata(&path).unwrap().blocks(),
            );
        }
        for name in ["d", "d/up"] {
            t.note(
                format!("blocks of {name}"),
                fs::symlink_metadata(t.path(name)).unwrap().blocks(),
            );
        }
        t.call(
            "no such mask",
            statx(
                CWD,
                &path,
                AtFlags::empty(),
                StatxFlags::from_bits_retain(1 << 31),
            ),
        );
        t.note(
            "birth",
            statx(CWD, &path, AtFlags::empty(), StatxFlags::BTIME)
                .ok()
                .map(|told| told.stx_mask & StatxFlags::BTIME.bits() != 0),
        );
        for (what, sec, nsec) in [
            ("nanoseconds below zero", 5, -1),
            ("1901", -2_145_916_800, 0),
            ("1902", -2_145_916_799, 999_999_999),
            ("2038", 1 << 31, 5),
            ("2262", 9_223_372_035, 0),
        ] {
            let time = rustix::fs::Timespec {
                tv_sec: sec,
                tv_nsec: nsec,
            };
            let times = rustix::fs::Timestamps {
                last_access: time,
                last_modification: time,
            };
            t.call(
                format!("times of {what}"),
                utimensat(CWD, &path, &times, AtFlags::empty()),
            );
            let meta = fs::metadata(&path).unwrap();
            t.note(
                format!("told of {what}"),
                (nsec >= 0).then(|| (meta.mtime(), meta.mtime_nsec(), meta.atime(), meta.atime_nsec())),
            );
        }
        if rustix::process::geteuid().is_root() {
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
            let no_atime = |access| openat(CWD, &path, access | OFlags::NOATIME, Mode::empty());
            t.call(
                "O_NOATIME by another",
                as_user(54_321, &[], || no_atime(OFlags::RDONLY)),
            );
            t.call("O_NOATIME by its owner", no_atime(OFlags::RDWR));
            let reader = as_user(54_321, &[], || ro(&path));
            t.call(
                "F_SETFL by root",
                rustix::fs::fcntl_setfl(&reader, OFlags::NOATIME),
            );
            t.call(
                "F_SETFL by another",
                as_user(54_321, &[], || {
                    rustix::fs::fcntl_setfl(ro(&path), OFlags::NOATIME)
                }),
            );
        }
        let c_path = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: a path that ends with NUL.
        let configured = unsafe { libc::pathconf(c_path.as_ptr(), libc::_PC_NAME_MAX) };
        t.note("longest name", configured);
    });
}

#[test]
fn links_have_attributes_of_their_own() {
    compare(&["--owner", "preserve"], &[], |t| {
        let path = file(&t.path("f"), b"content");
        for (name, target) in [("l", "f"), ("dangling", "no")] {
            let at = t.path(name);
            symlink(target, &at).unwrap();
            let shown = |what: &str| {
                let meta = fs::symlink_metadata(&at).unwrap();
                let times = (meta.mtime(), meta.mtime_nsec());
                t.note(
                    format!("{name}: {what}: owner"),
                    (meta.uid(), meta.gid(), meta.mode(), meta.len()),
                );
                t.note(
                    format!("{name}: {what}: times"),
                    (meta.mtime() < 1_600_000_000).then_some(times),
                );
            };
            shown("made");
            let nofollow = AtFlags::SYMLINK_NOFOLLOW;
            t.call(
                format!("{name}: times"),
                utimensat(CWD, &at, &super::times::at(1_500_000_000), nofollow),
            );
            shown("times");
            t.call(
                format!("{name}: times through it"),
                utimensat(CWD, &at, &super::times::at(1_400_000_000), AtFlags::empty()),
            );
            shown("times through it");
            if rustix::process::geteuid().is_root() {
                t.call(
                    format!("{name}: owner"),
                    std::os::unix::fs::lchown(&at, Some(54_321), Some(54_322)),
                );
                shown("owner");
            }
            let c_path = CString::new(at.as_os_str().as_bytes()).unwrap();
            // SAFETY: a path that ends with NUL, and numbers. (Of libc the call would look into /proc.)
            let changed = unsafe {
                libc::syscall(
                    libc::SYS_fchmodat2,
                    libc::AT_FDCWD,
                    c_path.as_ptr(),
                    0o600,
                    libc::AT_SYMLINK_NOFOLLOW,
                )
            };
            t.call(format!("{name}: mode"), answer(changed));
            shown("mode");
            let by_path = openat(CWD, &at, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).unwrap();
            let empty = AtFlags::EMPTY_PATH;
            t.call(
                format!("{name}: times by descriptor"),
                utimensat(&by_path, "", &super::times::at(1_300_000_000), empty),
            );
            shown("times by descriptor");
            t.call(
                format!("{name}: truncate"),
                fs::OpenOptions::new().write(true).truncate(true).open(&at),
            );
        }
        t.note("what it means", fs::metadata(&path).unwrap().len());
    });
}

#[test]
fn requests_that_a_disk_knows_answer_alike() {
    compare(&[], &[], |t| {
        let (from, to) = (
            ro(&file(&t.path("f"), &[7; 9_000])),
            rw(&file(&t.path("to"), b"to")),
        );
        let dir = File::open(t.path("")).unwrap();
        rustix::fs::seek(&from, rustix::fs::SeekFrom::Start(1_000)).unwrap();
        let ask = |open: &File, request: libc::Ioctl, value: i64| {
            let mut argument = [value, 0, 0, 0, 0, 0, 0, 0];
            // SAFETY: as many bytes as the longest of these requests reads or writes.
            let asked = unsafe { libc::ioctl(open.as_raw_fd(), request, argument.as_mut_ptr()) };
            answer(i64::from(asked)).map(|_| argument[0] as i32)
        };
        for (what, open) in [("file", &from), ("directory", &dir)] {
            t.ask(format!("{what}: FIONREAD"), ask(open, libc::FIONREAD, 0));
            t.ask(format!("{what}: FIGETBSZ"), ask(open, 2, 0));
            t.ask(
                format!("{what}: FIOQSIZE"),
                ask(open, libc::FIOQSIZE, 0).map(|size| if what == "file" { size } else { 0 }),
            );
            t.ask(format!("{what}: FIONBIO"), ask(open, libc::FIONBIO, 0).map(drop));
            t.ask(format!("{what}: TCGETS"), ask(open, libc::TCGETS, 0).map(drop));
            t.ask(
                format!("{what}: BLKGETSIZE64"),
                ask(open, 0x8008_1272, 0).map(drop),
            );
        }
        // SAFETY: a number.
        t.call(
            "FICLONE",
            answer(i64::from(unsafe {
                libc::ioctl(to.as_raw_fd(), 0x4004_9409, from.as_raw_fd())
            })),
        );
        // SAFETY: a number.
        t.call(
            "FICLONE of a directory",
            answer(i64::from(unsafe {
                libc::ioctl(to.as_raw_fd(), 0x4004_9409, dir.as_raw_fd())
            })),
        );
        t.note("to", content(&t.path("to")));
    });
}

#[test]
fn space_and_access_times_are_told_otherwise() {
    let differences = [
        ("a later time of access", "true", "false"),
        ("blocks of a hole, sealed", "0", "2048"),
    ];
    compare(&[], &differences, |t| {
        let path = t.path("f");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        t.note("blocks of a hole", fs::metadata(&path).unwrap().blocks());
        t.seal();
        // The kernel has what it was told before until there is a reason to ask.
        utimensat(CWD, &path, &super::times::at(1_000), AtFlags::empty()).unwrap();
        t.note("blocks of a hole, sealed", fs::metadata(&path).unwrap().blocks());
        drop(content(&path));
        t.note(
            "a later time of access",
            fs::metadata(&path).unwrap().atime() != 1_000,
        );
    });
}
