//! Dates, and which call changes which.

use std::{
    fs::{self, File, Permissions},
    io::Write,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink},
    },
    path::Path,
    thread,
    time::Duration,
};

use rustix::fs::{AtFlags, CWD, FallocateFlags, RenameFlags, Timespec, Timestamps, renameat_with, utimensat};

use crate::support::{
    posix::{Mapping, file, rw},
    trial::{Trial, compare},
    wait,
};

pub fn at(seconds: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 123_456_789,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

pub fn now() -> Timestamps {
    let time = Timespec {
        tv_sec: 0,
        tv_nsec: rustix::fs::UTIME_NOW,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

#[test]
fn any_date_is_kept_to_the_nanosecond() {
    compare(&[], &[], |t| {
        let path = file(&t.path("f"), b"x");
        // From 1901 to 2242.
        for seconds in [
            1 - (1 << 31),
            -1_000_000_000,
            -2,
            -1,
            0,
            1,
            (1 << 31) - 1,
            1 << 31,
            1 << 32,
            1 << 33,
        ] {
            t.call(
                format!("set {seconds}"),
                utimensat(CWD, &path, &at(seconds), AtFlags::empty()),
            );
            let meta = fs::metadata(&path).unwrap();
            let times = (meta.atime(), meta.atime_nsec(), meta.mtime(), meta.mtime_nsec());
            t.note(format!("get {seconds}"), times);
        }
        let odd = Timespec {
            tv_sec: 1,
            tv_nsec: 1_000_000_000,
        };
        let odd = Timestamps {
            last_access: odd,
            last_modification: odd,
        };
        t.call(
            "too many nanoseconds",
            utimensat(CWD, &path, &odd, AtFlags::empty()),
        );
        t.call(
            "of nothing",
            utimensat(CWD, t.path("no"), &at(1), AtFlags::empty()),
        );
    });
}

/// Which times of some paths an act changed; letters for the modification and the change time.
fn changed(t: &Trial, what: &str, watched: &[&str], act: impl FnOnce(&Trial)) {
    let look = |t: &Trial| -> Vec<_> {
        let meta = |name: &&str| fs::symlink_metadata(t.path(name)).ok();
        let times = |meta: fs::Metadata| {
            (
                (meta.mtime(), meta.mtime_nsec()),
                (meta.ctime(), meta.ctime_nsec()),
            )
        };
        watched.iter().map(meta).map(|meta| meta.map(times)).collect()
    };
    // Longer than the clock of a file system takes for a step.
    thread::sleep(Duration::from_millis(12));
    let before = look(t);
    thread::sleep(Duration::from_millis(12));
    act(t);
    let after = look(t);
    let both = watched.iter().zip(before.iter().zip(&after));
    let shown: Vec<_> = both
        .filter_map(|(name, (before, after))| {
            let (before, after) = (before.as_ref()?, after.as_ref()?);
            let m = if before.0 == after.0 { "" } else { "m" };
            let c = if before.1 == after.1 { "" } else { "c" };
            Some(format!("{name}:{m}{c}"))
        })
        .collect();
    t.note(what, shown.join(" "));
}

#[test]
fn what_is_stored_to_a_mapping_is_a_change_after_all_closes() {
    compare(&[], &[], |t| {
        let path = t.path("f");
        let all = &["f"][..];
        file(&path, b"content");
        let (mapped, only) = (rw(&path), File::options().write(true).open(&path).unwrap());
        let mapping = Mapping::new(&mapped, 7, true, true).unwrap();
        drop(mapped);
        changed(t, "write by one that cannot map it", all, |_| {
            only.write_all_at(b"w", 0).unwrap();
        });
        // The kernel has these attributes now, and does not see what is stored.
        t.note("length", only.metadata().unwrap().len());
        let shown = only.metadata().unwrap().modified().unwrap();
        thread::sleep(Duration::from_millis(12));
        mapping.write(0, b"stored");
        drop((mapping, only));
        // The kernel tells of the end of an open without waiting for who is told.
        let is_later = || fs::metadata(&path).unwrap().modified().unwrap() > shown;
        let later = wait::try_until(Duration::from_secs(5), || is_later().then_some(()));
        t.note("later after the store and the close", later.is_some());
        t.note("content", fs::read(&path).unwrap());
        let only = File::create(t.path("g")).unwrap();
        only.write_all_at(b"content", 0).unwrap();
        let shown = only.metadata().unwrap();
        drop(only);
        let after = fs::metadata(t.path("g")).unwrap();
        t.note("lengths", (shown.len(), after.len()));
        t.note("same", shown.modified().unwrap() == after.modified().unwrap());
    });
}

#[test]
fn each_call_changes_the_same_times() {
    // POSIX leaves it open whether a chown that names neither user nor group is a change.
    let chown_of_nothing = (
        "chown to nobody else",
        r#""d/f:c d/g: d: e: .:""#,
        r#""d/f: d/g: d: e: .:""#,
    );
    compare(&[], &[chown_of_nothing], |t| {
        fs::create_dir(t.path("d")).unwrap();
        fs::create_dir(t.path("e")).unwrap();
        file(&t.path("d/f"), b"content");
        file(&t.path("d/g"), b"content");
        let all = &["d/f", "d/g", "d", "e", "."][..];
        let open = rw(&t.path("d/f"));
        changed(t, "read", all, |t| drop(fs::read(t.path("d/f")).unwrap()));
        changed(t, "write", all, |_| open.write_all_at(b"x", 1).unwrap());
        changed(t, "write nothing", all, |_| (&open).write_all(b"").unwrap());
        changed(t, "ftruncate to the same size", all, |_| open.set_len(7).unwrap());
        changed(t, "ftruncate", all, |_| open.set_len(9).unwrap());
        changed(t, "allocate", all, |_| {
            rustix::fs::fallocate(&open, FallocateFlags::empty(), 0, 100).unwrap();
        });
        changed(t, "punch", all, |_| {
            rustix::fs::fallocate(
                &open,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                0,
                10,
            )
            .unwrap();
        });
        changed(t, "mapped write", all, |_| {
            let mapping = Mapping::new(&open, 50, true, true).unwrap();
            mapping.write(0, b"mapped");
            mapping.sync().unwrap();
        });
        changed(t, "sync", all, |_| open.sync_all().unwrap());
        drop(open);
        changed(t, "open to write and close", all, |t| drop(rw(&t.path("d/f"))));
        changed(t, "truncate to the same size", all, |t| {
            truncate(&t.path("d/f"), 100);
        });
        changed(t, "truncate", all, |t| truncate(&t.path("d/f"), 5));
        changed(t, "open O_TRUNC", all, |t| {
            drop(File::create(t.path("d/f")).unwrap());
        });
        changed(t, "open O_TRUNC of nothing", all, |t| {
            drop(File::create(t.path("d/f")).unwrap());
        });
        changed(t, "chmod", all, |t| {
            fs::set_permissions(t.path("d/f"), Permissions::from_mode(0o600)).unwrap();
        });
        changed(t, "chmod to the same", all, |t| {
            fs::set_permissions(t.path("d/f"), Permissions::from_mode(0o600)).unwrap();
        });
        changed(t, "chmod of a directory", all, |t| {
            fs::set_permissions(t.path("d"), Permissions::from_mode(0o755)).unwrap();
        });
        changed(t, "chown to nobody else", all, |t| {
            chown(t.path("d/f"), None, None).unwrap();
        });
        changed(t, "touch", all, |t| {
            utimensat(CWD, t.path("d/f"), &now(), AtFlags::empty()).unwrap();
        });
        changed(t, "set times", all, |t| {
            utimensat(CWD, t.path("d/f"), &at(1), AtFlags::empty()).unwrap();
        });
        changed(t, "set the same times", all, |t| {
            utimensat(CWD, t.path("d/f"), &at(1), AtFlags::empty()).unwrap();
        });
        changed(t, "create", all, |t| drop(file(&t.path("d/new"), b"")));
        changed(t, "create what is there", all, |t| {
            drop(File::create_new(t.path("d/new")).unwrap_err());
        });
        changed(t, "mkdir", all, |t| fs::create_dir(t.path("d/sub")).unwrap());
        changed(t, "rmdir", all, |t| fs::remove_dir(t.path("d/sub")).unwrap());
        changed(t, "symlink", all, |t| symlink("x", t.path("d/l")).unwrap());
        changed(t, "link", all, |t| {
            fs::hard_link(t.path("d/f"), t.path("e/f")).unwrap();
        });
        changed(t, "unlink a link", all, |t| {
            fs::remove_file(t.path("e/f")).unwrap();
        });
        changed(t, "rename", &["d/new", "d", "e", "."], |t| {
            fs::rename(t.path("d/f"), t.path("d/h")).unwrap();
        });
        changed(t, "rename back", &["d/new", "d", "e", "."], |t| {
            fs::rename(t.path("d/h"), t.path("d/f")).unwrap();
        });
        changed(t, "rename over", all, |t| {
            fs::rename(t.path("d/new"), t.path("d/g")).unwrap();
        });
        changed(t, "rename across", all, |t| {
            fs::rename(t.path("d/g"), t.path("e/g")).unwrap();
        });
        changed(t, "rename a directory", &["e", "."], |t| {
            fs::rename(t.path("d"), t.path("e/d")).unwrap();
        });
        changed(t, "list", &["e", "e/d", "."], |t| {
            assert_eq!(fs::read_dir(t.path("e")).unwrap().count(), 2);
        });
        changed(t, "unlink what is not there", &["e", "e/d", "."], |t| {
            drop(fs::remove_file(t.path("e/no")).unwrap_err());
        });
        let moved = |t: &Trial| {
            let before = fs::symlink_metadata(t.path("e/g")).unwrap();
            thread::sleep(Duration::from_millis(12));
            fs::rename(t.path("e/g"), t.path("e/k")).unwrap();
            let after = fs::symlink_metadata(t.path("e/k")).unwrap();
            (
                before.mtime_nsec() == after.mtime_nsec(),
                before.ctime_nsec() == after.ctime_nsec(),
            )
        };
        let moved = moved(t);
        t.note("rename of a file keeps its times", moved);
        changed(t, "rename a directory: itself", &["e/d"], |t| {
            fs::rename(t.path("e/d"), t.path("x")).unwrap();
            fs::rename(t.path("x"), t.path("e/d")).unwrap();
        });
        changed(t, "exchange a directory and a file", &["e/d", "e/k", "e"], |t| {
            let exchange = || renameat_with(CWD, t.path("e/d"), CWD, t.path("e/k"), RenameFlags::EXCHANGE);
            exchange().unwrap();
            exchange().unwrap();
        });
    });
}

#[test]
fn the_times_that_were_shown_first_stay() {
    compare(&[], &[], |t| {
        // A daemon's clock and that of its disk differ by less than a step of the latter.
        for n in 0..20 {
            let path = file(&t.path(format!("f{n}")), b"");
            let first = fs::metadata(&path).unwrap();
            // Its answer brings what is told now.
            fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            let later = fs::metadata(&path).unwrap();
            t.note(
                format!("modified: {n}"),
                first.modified().unwrap() == later.modified().unwrap(),
            );
            t.note(
                format!("accessed: {n}"),
                first.accessed().unwrap() == later.accessed().unwrap(),
            );
        }
    });
}

fn truncate(path: &Path, len: i64) {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: a path that ends with NUL, which the call only reads.
    assert_eq!(unsafe { libc::truncate(path.as_ptr(), len) }, 0);
}
