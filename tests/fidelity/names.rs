//! Names, paths and links.

use std::{
    ffi::OsStr,
    fs::{self, File, Permissions},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::PathBuf,
};

use rustix::fs::{AtFlags, CWD, unlinkat};

use crate::support::{
    posix::{file, ro},
    trial::{Trial, compare},
};

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
