//! Modes, owners, groups, and what they allow.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink},
    path::Path,
};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat, utimensat};

use super::times::{at, now};
use crate::support::{
    posix::{file, rw},
    trial::{Trial, as_user, compare, with_umask},
};

/// A user of no importance, and a group that is not theirs.
const USER: u32 = 54_321;
const GROUP: u32 = 54_400;

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
            for (how, access) in [("a writer", OFlags::WRONLY), ("a reader", OFlags::RDONLY)] {
                let path = with(&format!("{what} by {how}"), bits);
                let empty = || openat(CWD, &path, access | OFlags::TRUNC, Mode::empty()).map(drop);
                as_user(USER, &[], empty).unwrap();
                mode(t, &format!("{what}, emptied by {how}, its owner"), &path);
                let path = with(&format!("{what} by {how} 2"), bits);
                openat(CWD, &path, access | OFlags::TRUNC, Mode::empty()).unwrap();
                mode(t, &format!("{what}, emptied by {how}, root"), &path);
            }
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
