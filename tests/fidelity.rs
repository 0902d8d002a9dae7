//! Names, links, modes and times of a mount beside those of the disk, call by call.

mod support;

use std::{
    ffi::OsStr,
    fs::{self, File, Permissions},
    io::Write,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink},
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, Mode, OFlags, Timespec, Timestamps, openat, unlinkat, utimensat,
};
use support::{
    posix::{Mapping, file, ro, rw},
    trial::{Trial, as_user, compare, with_umask},
};

/// A user of no importance, and a group that is not theirs.
const USER: u32 = 54_321;
const GROUP: u32 = 54_400;

#[test]
fn names_and_paths_have_the_same_limits() {
    compare(&[], &[], |t| {
        for len in [1, 254, 255, 256, 300] {
            let name = "n".repeat(len);
            t.call(format!("create {len}"), File::create(t.path(&name)));
            t.call(
                format!("mkdir d{len}"),
                fs::create_dir(t.path(format!("{}d", &name[1..]))),
            );
            t.call(
                format!("symlink {len}"),
                symlink("x", t.path(format!("{}l", &name[1..]))),
            );
            t.call(format!("stat {len}"), fs::symlink_metadata(t.path(&name)));
            t.call(format!("unlink {len}"), fs::remove_file(t.path(&name)));
            t.call(
                format!("rmdir {len}"),
                fs::remove_dir(t.path(format!("{}d", &name[1..]))),
            );
        }
        // 255 bytes are fewer letters.
        let letters = "\u{fc}".repeat(128);
        t.call("256 bytes of 128 letters", File::create(t.path(letters)));
        let deep = |bytes: usize| t.path("").join("./".repeat(bytes / 2));
        t.call("long path", fs::metadata(deep(3_000)));
        t.call("longest path", fs::metadata(deep(6_000)));
        for len in [1, 4_094, 4_095, 4_096] {
            let at = t.path(format!("to-{len}"));
            t.call(format!("target of {len}"), symlink("t".repeat(len), &at));
            t.ask(
                format!("read target of {len}"),
                fs::read_link(&at).map(|target| target.as_os_str().len()),
            );
        }
        t.call("empty target", symlink("", t.path("empty")));
        file(&t.path("f"), b"x");
        fs::create_dir(t.path("d")).unwrap();
        file(&t.path("d/in"), b"x");
        for (what, path) in [
            ("file/", "f/"),
            ("file/.", "f/."),
            ("file/x", "f/x"),
            ("no/x", "no/x"),
        ] {
            t.call(format!("stat {what}"), fs::metadata(t.path(path)));
            t.call(format!("create {what}"), File::create(t.path(path)));
            t.call(format!("mkdir {what}"), fs::create_dir(t.path(path)));
            t.call(format!("unlink {what}"), fs::remove_file(t.path(path)));
            t.call(format!("rename {what}"), fs::rename(t.path(path), t.path("to")));
        }
        for path in ["d/.", "d/..", "d/"] {
            t.call(format!("mkdir {path}"), fs::create_dir(t.path(path)));
            t.call(format!("rmdir {path}"), fs::remove_dir(t.path(path)));
            t.call(
                format!("unlink {path}"),
                unlinkat(CWD, t.path(path), AtFlags::empty()),
            );
            t.call(format!("rename {path}"), fs::rename(t.path(path), t.path("e")));
            t.call(format!("create {path}"), File::create(t.path(path)));
        }
        t.call("newline", File::create(t.path("new\nline")));
        t.call("not UTF-8", File::create(t.path(OsStr::from_bytes(b"\xff\xfe"))));
    });
}

#[test]
fn links_that_go_round_end_the_same_way() {
    compare(&[], &[], |t| {
        symlink("b", t.path("a")).unwrap();
        symlink("a", t.path("b")).unwrap();
        symlink("self", t.path("self")).unwrap();
        for name in ["a", "self"] {
            t.call(format!("open {name}"), File::open(t.path(name)));
            t.call(format!("create {name}"), File::create(t.path(name)));
            t.call(format!("stat {name}"), fs::metadata(t.path(name)));
            t.call(format!("below {name}"), fs::metadata(t.path(name).join("x")));
            t.call(
                format!("chmod {name}"),
                fs::set_permissions(t.path(name), Permissions::from_mode(0o600)),
            );
            t.call(format!("mkdir {name}"), fs::create_dir(t.path(name)));
            t.call(format!("list {name}"), fs::read_dir(t.path(name)).map(drop));
            t.call(
                format!("rename {name}"),
                fs::rename(t.path(name), t.path(format!("{name}2"))),
            );
            t.call(
                format!("unlink {name}"),
                fs::remove_file(t.path(format!("{name}2"))),
            );
        }
        file(&t.path("end"), b"x");
        symlink("end", t.path("chain-0")).unwrap();
        for n in 1..=42 {
            symlink(format!("chain-{}", n - 1), t.path(format!("chain-{n}"))).unwrap();
        }
        for n in [10, 38, 39, 40, 41] {
            t.call(format!("{n} links"), fs::metadata(t.path(format!("chain-{n}"))));
        }
    });
}

#[test]
fn link_counts_are_the_same() {
    let count = |t: &Trial, what: &str, path: &str| {
        let at = t.path(path);
        t.ask(
            format!("{what}: {path}"),
            fs::symlink_metadata(at).map(|meta| meta.nlink()),
        );
    };
    compare(&[], &[], |t| {
        fs::create_dir(t.path("d")).unwrap();
        count(t, "empty", "d");
        for name in ["d/a", "d/b", "d/b/c", "e"] {
            fs::create_dir(t.path(name)).unwrap();
        }
        file(&t.path("d/f"), b"x");
        symlink("f", t.path("d/l")).unwrap();
        count(t, "filled", "d");
        count(t, "filled", "d/b");
        count(t, "filled", ".");
        fs::rename(t.path("d/b"), t.path("e/b")).unwrap();
        count(t, "moved", "d");
        count(t, "moved", "e");
        fs::remove_dir(t.path("d/a")).unwrap();
        count(t, "removed", "d");
        fs::create_dir(t.path("x")).unwrap();
        fs::rename(t.path("x"), t.path("e/b/c")).unwrap();
        count(t, "replaced", "e/b");
        count(t, "replaced", ".");

        let f = t.path("d/f");
        t.call("link", fs::hard_link(&f, t.path("g")));
        t.call("link of a link", fs::hard_link(t.path("g"), t.path("h")));
        count(t, "linked", "d/f");
        t.call("link over", fs::hard_link(&f, t.path("h")));
        t.call("link of a directory", fs::hard_link(t.path("d"), t.path("dd")));
        t.call("link of a symlink", fs::hard_link(t.path("d/l"), t.path("ll")));
        count(t, "linked", "ll");
        t.call("rename onto itself", fs::rename(t.path("g"), t.path("h")));
        count(t, "renamed onto itself", "g");
        file(&t.path("other"), b"y");
        fs::rename(t.path("other"), t.path("g")).unwrap();
        count(t, "replaced", "d/f");
        let open = ro(&f);
        fs::remove_file(&f).unwrap();
        t.note("open: unlinked once", open.metadata().unwrap().nlink());
        fs::remove_file(t.path("h")).unwrap();
        t.note("open: unlinked", open.metadata().unwrap().nlink());
        let by_descriptor = PathBuf::from(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&open)
        ));
        let linked = rustix::fs::linkat(CWD, &by_descriptor, CWD, t.path("again"), AtFlags::SYMLINK_FOLLOW);
        t.call("link of what has no name", linked);
    });
}

#[test]
fn modes_are_set_kept_and_dropped_by_the_same_calls() {
    if !rustix::process::geteuid().is_root() {
        skip!("becoming another user needs root");
    }
    let mode = |t: &Trial, what: &str, path: &Path| {
        let meta = fs::symlink_metadata(path).unwrap();
        t.note(what, format!("{:o} {}:{}", meta.mode(), meta.uid(), meta.gid()));
    };
    compare(&["--owner", "preserve"], &[], |t| {
        for mask in [0, 0o22, 0o77, 0o777] {
            let (f, d, p) = (
                t.path(format!("f{mask}")),
                t.path(format!("d{mask}")),
                t.path(format!("p{mask}")),
            );
            with_umask(mask, || {
                openat(
                    CWD,
                    &f,
                    OFlags::CREATE | OFlags::WRONLY,
                    Mode::from_raw_mode(0o6777),
                )
                .unwrap();
                rustix::fs::mkdir(&d, Mode::from_raw_mode(0o1777)).unwrap();
                rustix::fs::mknodat(CWD, &p, rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o666), 0)
                    .unwrap();
            });
            mode(t, &format!("file with umask {mask:o}"), &f);
            mode(t, &format!("directory with umask {mask:o}"), &d);
            mode(t, &format!("fifo with umask {mask:o}"), &p);
        }
        let with = |name: &str, bits: u32| {
            let path = file(&t.path(name), b"content");
            chown(&path, Some(USER), Some(USER)).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(bits)).unwrap();
            path
        };
        let path = with("every-bit", 0o7777);
        mode(t, "every bit", &path);
        chown(&path, Some(USER + 1), None).unwrap();
        mode(t, "chown by root", &path);
        let path = with("no-exec", 0o6666);
        chown(&path, None, Some(GROUP)).unwrap();
        mode(t, "chgrp by root, not executable", &path);
        for (what, bits) in [
            ("written", 0o6777),
            ("written without x", 0o6666),
            ("group only", 0o2770),
        ] {
            let path = with(what, bits);
            as_user(USER, &[], || rw(&path).write_all_at(b"!", 0).unwrap());
            mode(t, &format!("{what} by its owner"), &path);
            let path = with(&format!("{what} 2"), bits);
            rw(&path).write_all_at(b"!", 0).unwrap();
            mode(t, &format!("{what} by root"), &path);
            let path = with(&format!("{what} 3"), bits);
            as_user(USER, &[], || rw(&path).set_len(2).unwrap());
            mode(t, &format!("{what}, cut by its owner"), &path);
        }
        let path = with("chgrp", 0o2777);
        let changed = as_user(USER, &[GROUP], || chown(&path, None, Some(GROUP)));
        t.call("chgrp to a group of mine", changed);
        mode(t, "chgrp to a group of mine: mode", &path);
        let changed = as_user(USER, &[GROUP], || chown(&path, None, Some(GROUP + 1)));
        t.call("chgrp to a group of others", changed);
        t.call(
            "chown by its owner",
            as_user(USER, &[], || chown(&path, Some(USER + 1), None)),
        );
        let foreign = with("foreign", 0o644);
        chown(&foreign, None, Some(GROUP)).unwrap();
        let changed = as_user(USER, &[], || {
            fs::set_permissions(&foreign, Permissions::from_mode(0o2755))
        });
        t.call("chmod g+s of a foreign group", changed);
        mode(t, "chmod g+s of a foreign group: mode", &foreign);
        t.call(
            "chmod by another user",
            as_user(USER + 1, &[], || {
                fs::set_permissions(&foreign, Permissions::from_mode(0o777))
            }),
        );

        // What is made in a directory with a set-group-id bit is of its group.
        let shared = t.path("shared");
        fs::create_dir(&shared).unwrap();
        chown(&shared, None, Some(GROUP)).unwrap();
        fs::set_permissions(&shared, Permissions::from_mode(0o2777)).unwrap();
        as_user(USER, &[], || {
            file(&shared.join("f"), b"x");
            fs::create_dir(shared.join("d")).unwrap();
            symlink("f", shared.join("l")).unwrap();
            openat(
                CWD,
                shared.join("g"),
                OFlags::CREATE | OFlags::WRONLY,
                Mode::from_raw_mode(0o2775),
            )
            .unwrap();
        });
        for name in ["f", "d", "g"] {
            mode(
                t,
                &format!("in a set-group-id directory: {name}"),
                &shared.join(name),
            );
        }
    });
}

#[test]
fn users_and_groups_have_the_same_rights() {
    if !rustix::process::geteuid().is_root() {
        skip!("becoming another user needs root");
    }
    compare(&["--owner", "preserve"], &[], |t| {
        let path = file(&t.path("f"), b"content");
        chown(&path, Some(USER + 9), Some(GROUP)).unwrap();
        let sticky = t.path("sticky");
        fs::create_dir(&sticky).unwrap();
        fs::set_permissions(&sticky, Permissions::from_mode(0o1777)).unwrap();
        let closed = t.path("closed");
        fs::create_dir(&closed).unwrap();
        file(&closed.join("f"), b"x");
        for bits in [0o640, 0o604, 0o060, 0o006, 0o020, 0o000] {
            fs::set_permissions(&path, Permissions::from_mode(bits)).unwrap();
            for (who, uid, groups) in [
                ("owner", USER + 9, &[][..]),
                ("member", USER, &[GROUP]),
                ("other", USER, &[]),
            ] {
                let what = format!("{bits:o} by {who}");
                t.call(format!("read {what}"), as_user(uid, groups, || File::open(&path)));
                t.call(
                    format!("write {what}"),
                    as_user(uid, groups, || File::options().append(true).open(&path)),
                );
                t.call(
                    format!("access {what}"),
                    as_user(uid, groups, || {
                        rustix::fs::access(&path, rustix::fs::Access::READ_OK)
                    }),
                );
                t.call(
                    format!("touch {what}"),
                    as_user(uid, groups, || utimensat(CWD, &path, &now(), AtFlags::empty())),
                );
                t.call(
                    format!("set time {what}"),
                    as_user(uid, groups, || utimensat(CWD, &path, &at(1), AtFlags::empty())),
                );
                fs::set_permissions(&closed, Permissions::from_mode(bits)).unwrap();
                chown(&closed, Some(USER + 9), Some(GROUP)).unwrap();
                t.call(
                    format!("list {what}"),
                    as_user(uid, groups, || fs::read_dir(&closed).map(drop)),
                );
                t.call(
                    format!("enter {what}"),
                    as_user(uid, groups, || fs::metadata(closed.join("f"))),
                );
                t.call(
                    format!("create {what}"),
                    as_user(uid, groups, || File::create(closed.join("g"))),
                );
            }
        }
        as_user(USER, &[], || {
            file(&sticky.join("mine"), b"x");
            file(&sticky.join("mine-2"), b"x");
        });
        t.call(
            "sticky: unlink by another",
            as_user(USER + 1, &[], || fs::remove_file(sticky.join("mine"))),
        );
        t.call(
            "sticky: rename by another",
            as_user(USER + 1, &[], || {
                fs::rename(sticky.join("mine"), sticky.join("x"))
            }),
        );
        t.call(
            "sticky: replaced by another",
            as_user(USER + 1, &[], || {
                file(&sticky.join("theirs"), b"x");
                fs::rename(sticky.join("theirs"), sticky.join("mine"))
            }),
        );
        t.call(
            "sticky: rename by the owner",
            as_user(USER, &[], || fs::rename(sticky.join("mine"), sticky.join("y"))),
        );
        t.call(
            "sticky: unlink by the owner",
            as_user(USER, &[], || fs::remove_file(sticky.join("y"))),
        );
        t.call("sticky: unlink by root", fs::remove_file(sticky.join("mine-2")));
        t.call(
            "device by a user",
            as_user(USER, &[], || {
                rustix::fs::mknodat(
                    CWD,
                    t.path("dev"),
                    rustix::fs::FileType::CharacterDevice,
                    Mode::from_raw_mode(0o600),
                    rustix::fs::makedev(1, 3),
                )
            }),
        );
        let linked = as_user(USER, &[], || fs::hard_link(&path, t.path("linked")));
        t.call("link of another's file", linked);
    });
}

fn at(seconds: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 123_456_789,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

fn now() -> Timestamps {
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
    let mut shown = String::new();
    for ((name, before), after) in watched.iter().zip(&before).zip(&after) {
        let (Some(before), Some(after)) = (before, after) else {
            continue;
        };
        let m = if before.0 == after.0 { "" } else { "m" };
        let c = if before.1 == after.1 { "" } else { "c" };
        shown += &format!("{name}:{m}{c} ");
    }
    t.note(what, shown.trim_end());
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
            rustix::fs::fallocate(&open, FallocateFlags::empty(), 0, 100).unwrap()
        });
        changed(t, "punch", all, |_| {
            rustix::fs::fallocate(
                &open,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                0,
                10,
            )
            .unwrap()
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
            truncate(&t.path("d/f"), 100)
        });
        changed(t, "truncate", all, |t| truncate(&t.path("d/f"), 5));
        changed(t, "open O_TRUNC", all, |t| {
            drop(File::create(t.path("d/f")).unwrap())
        });
        changed(t, "open O_TRUNC of nothing", all, |t| {
            drop(File::create(t.path("d/f")).unwrap())
        });
        changed(t, "chmod", all, |t| {
            fs::set_permissions(t.path("d/f"), Permissions::from_mode(0o600)).unwrap()
        });
        changed(t, "chmod to the same", all, |t| {
            fs::set_permissions(t.path("d/f"), Permissions::from_mode(0o600)).unwrap()
        });
        changed(t, "chmod of a directory", all, |t| {
            fs::set_permissions(t.path("d"), Permissions::from_mode(0o755)).unwrap()
        });
        changed(t, "chown to nobody else", all, |t| {
            chown(t.path("d/f"), None, None).unwrap()
        });
        changed(t, "touch", all, |t| {
            utimensat(CWD, t.path("d/f"), &now(), AtFlags::empty()).unwrap()
        });
        changed(t, "set times", all, |t| {
            utimensat(CWD, t.path("d/f"), &at(1), AtFlags::empty()).unwrap()
        });
        changed(t, "set the same times", all, |t| {
            utimensat(CWD, t.path("d/f"), &at(1), AtFlags::empty()).unwrap()
        });
        changed(t, "create", all, |t| drop(file(&t.path("d/new"), b"")));
        changed(t, "create what is there", all, |t| {
            drop(File::create_new(t.path("d/new")).unwrap_err())
        });
        changed(t, "mkdir", all, |t| fs::create_dir(t.path("d/sub")).unwrap());
        changed(t, "rmdir", all, |t| fs::remove_dir(t.path("d/sub")).unwrap());
        changed(t, "symlink", all, |t| symlink("x", t.path("d/l")).unwrap());
        changed(t, "link", all, |t| {
            fs::hard_link(t.path("d/f"), t.path("e/f")).unwrap()
        });
        changed(t, "unlink a link", all, |t| {
            fs::remove_file(t.path("e/f")).unwrap()
        });
        changed(t, "rename", &["d/new", "d", "e", "."], |t| {
            fs::rename(t.path("d/f"), t.path("d/h")).unwrap()
        });
        changed(t, "rename back", &["d/new", "d", "e", "."], |t| {
            fs::rename(t.path("d/h"), t.path("d/f")).unwrap()
        });
        changed(t, "rename over", all, |t| {
            fs::rename(t.path("d/new"), t.path("d/g")).unwrap()
        });
        changed(t, "rename across", all, |t| {
            fs::rename(t.path("d/g"), t.path("e/g")).unwrap()
        });
        changed(t, "rename a directory", &["e", "."], |t| {
            fs::rename(t.path("d"), t.path("e/d")).unwrap()
        });
        changed(t, "list", &["e", "e/d", "."], |t| {
            assert_eq!(fs::read_dir(t.path("e")).unwrap().count(), 2)
        });
        changed(t, "unlink what is not there", &["e", "e/d", "."], |t| {
            drop(fs::remove_file(t.path("e/no")).unwrap_err())
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
    });
}

fn truncate(path: &Path, len: i64) {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: a path that ends with NUL, which the call only reads.
    assert_eq!(unsafe { libc::truncate(path.as_ptr(), len) }, 0);
}
