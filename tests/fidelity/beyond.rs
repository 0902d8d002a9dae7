//! What a local disk has besides, and what a mount answers then: each line is one of the README's table, or none.

use std::{
    fs::{self, File, Permissions},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, PermissionsExt},
    },
    process::Command,
    time::Duration,
};

use rustix::fs::{
    AtFlags, CWD, RenameFlags, StatxFlags, Timespec, Timestamps, renameat_with, statx, utimensat,
};

use crate::{
    need,
    support::{
        place::Place,
        posix::{Mapping, content, file, ro, rw},
        trial::{Trial, compare},
        wait,
    },
};

const SOON: Duration = Duration::from_secs(20);

/// An `ioctl` with an argument that it may write to.
fn control(file: &File, request: libc::Ioctl, argument: &mut [u64; 32]) -> std::io::Result<()> {
    // SAFETY: the argument is longer than what any request of this file reads or writes.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), request, argument.as_mut_ptr()) };
    if done == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

#[test]
fn what_only_some_disks_have_is_refused_cleanly() {
    let differences = [
        ("flags of a file", "done", "Inappropriate ioctl for device"),
        ("set flags of a file", "done", "Inappropriate ioctl for device"),
        ("extents of a file", "done", "Operation not supported"),
        ("time of birth", "true", "false"),
        ("whiteout", "done", "Invalid argument"),
    ];
    compare(&[], &differences, |t| {
        let path = file(&t.path("f"), b"content");
        let open = rw(&path);
        let mut flags = [0; 32];
        t.call(
            "flags of a file",
            control(&open, libc::FS_IOC_GETFLAGS, &mut flags),
        );
        t.call(
            "set flags of a file",
            control(&open, libc::FS_IOC_SETFLAGS, &mut flags),
        );
        // From 0 to the end, without room for an extent.
        let mut extents = [0; 32];
        extents[1] = u64::MAX;
        t.call("extents of a file", control(&open, FS_IOC_FIEMAP, &mut extents));
        t.call("no ioctl", control(&open, 0x1234, &mut [0; 32]));
        let told = statx(CWD, &path, AtFlags::empty(), StatxFlags::ALL).unwrap();
        t.note("time of birth", told.stx_mask & StatxFlags::BTIME.bits() != 0);
        t.note("basic stats", told.stx_mask & StatxFlags::BASIC_STATS.bits());
        let to = t.path("to");
        let rename = |flags| renameat_with(CWD, &path, CWD, &to, flags);
        t.call(
            "two modes",
            rename(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE),
        );
        t.call("exchange with nothing", rename(RenameFlags::EXCHANGE));
        if rustix::process::geteuid().is_root() {
            t.call("whiteout", rename(RenameFlags::WHITEOUT));
        }
        t.call("sync", rustix::fs::syncfs(&open));
        t.call(
            "advice",
            rustix::fs::fadvise(&open, 0, None, rustix::fs::Advice::DontNeed),
        );
    });
}

/// Of `linux/fiemap.h`.
const FS_IOC_FIEMAP: libc::Ioctl = 0xc020_660b;

#[test]
fn access_lists_are_refused_by_the_programs_that_set_them() {
    let [setfacl, getfacl] = need!("setfacl", "getfacl");
    for args in [&[][..], &["--xattr"]] {
        let place = Place::with(args);
        if !place.is_casmount() {
            skip!("a disk has them");
        }
        let path = file(&place.path("f"), b"x");
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let run = |program, args: &[&str]| wait::run(Command::new(program).args(args).arg(&path), SOON);
        let refused = run(&setfacl, &["-m", "u:1234:r"]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && said.contains("Operation not supported"),
            "{said}"
        );
        // Of what has one on a disk that knows them, all else is copied.
        let (from, to) = (place.path("../with-list"), place.path("copy"));
        file(&from, b"copied all the same");
        let listed = Command::new(&setfacl)
            .args(["-m", "u:1234:r"])
            .arg(&from)
            .status();
        if listed.unwrap().success() {
            let copied = wait::run(Command::new("cp").arg("-a").arg(&from).arg(&to), SOON);
            let said = String::from_utf8_lossy(&copied.stderr).into_owned();
            assert!(
                !copied.status.success() && said.contains("Operation not supported"),
                "{said}"
            );
            assert_eq!(content(&to), b"copied all the same");
        }
        // What the mode bits say is there to be read.
        let shown = run(&getfacl, &["--omit-header", "--absolute-names"]);
        assert_eq!(
            String::from_utf8_lossy(&shown.stdout),
            "user::rw-\ngroup::r--\nother::r--\n\n"
        );
    }
}

#[test]
fn dates_that_cannot_be_kept_become_the_nearest() {
    let mut place = Place::new();
    if !place.is_casmount() {
        skip!("disks differ in what they keep");
    }
    let (early, late) = (file(&place.path("early"), b"x"), file(&place.path("late"), b"x"));
    for (path, year) in [(&early, 1600), (&late, 2300)] {
        let time = Timespec {
            tv_sec: (year - 1970) * 31_556_952,
            tv_nsec: 5,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        utimensat(CWD, path, &times, AtFlags::empty()).unwrap();
    }
    for _ in 0..2 {
        let nanos = |path| {
            let meta = fs::metadata(path).unwrap();
            i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec())
        };
        // What the disk of the cache can keep counts as well: from the end of 1901 on, mostly.
        assert!(nanos(&early) <= -(1 << 31) * 1_000_000_000 + 1_000_000_000);
        assert!(i128::from(i64::MAX) - nanos(&late) < 1_000_000_000);
        place.remount();
    }
}

#[test]
fn mappings_show_and_keep_the_same() {
    compare(&[], &[], |t: &Trial| {
        let path = file(&t.path("f"), &vec![b'.'; 20_000]);
        let open = rw(&path);
        let shared = Mapping::new(&open, 20_000, true, true).unwrap();
        let private = Mapping::new(&ro(&path), 20_000, true, false).unwrap();
        let watched = Mapping::new(&ro(&path), 20_000, false, true).unwrap();
        shared.write(4_000, b"shared");
        private.write(9_000, b"private");
        t.note("a reader beside", content(&path)[3_999..4_007].to_vec());
        t.note(
            "a reader of what is private",
            content(&path)[8_999..9_007].to_vec(),
        );
        t.note("another mapping", watched.read()[3_999..4_007].to_vec());
        t.note("what is private there", watched.read()[8_999..9_007].to_vec());
        t.note("what is private here", private.read()[8_999..9_007].to_vec());
        open.write_all_at(b"written", 15_000).unwrap();
        t.note("written beside", watched.read()[14_999..15_008].to_vec());
        shared.sync().unwrap();
        drop(open);
        shared.write(0, b"after the close");
        drop(shared);
        t.note("after all", crate::support::tree::digest(&content(&path)));
        // Behind the end, in the page of the end: seen by mappings, never by the file.
        let path = file(&t.path("short"), b"short");
        let mapping = Mapping::new(&rw(&path), 4_096, true, true).unwrap();
        mapping.write(5, b"behind");
        mapping.sync().unwrap();
        drop(mapping);
        t.note("behind the end", content(&path));
        rw(&path).set_len(12).unwrap();
        t.note("extended over it", content(&path));

        let reader = ro(&path);
        t.call(
            "a writer of a reader",
            Mapping::new(&reader, 10, true, true).map(drop),
        );
        t.call(
            "a private one of a reader",
            Mapping::new(&reader, 10, true, false).map(drop),
        );
        let writer = File::options().write(true).open(&path).unwrap();
        t.call(
            "one of a mere writer",
            Mapping::new(&writer, 10, false, true).map(drop),
        );
        let dir = File::open(t.path("")).unwrap();
        t.call(
            "one of a directory",
            Mapping::new(&dir, 10, false, true).map(drop),
        );
        t.call("one of nothing", Mapping::new(&reader, 0, false, true).map(drop));
    });
}
