//! Every pair of things that can be renamed, and every way to a file of which a link is made.

use std::{
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::Path,
};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, linkat, mknodat, openat, renameat_with};

use crate::support::{
    posix::{answer, file},
    trial::compare,
};

/// Makes one of each kind of thing that a name can mean.
fn thing(dir: &Path, name: &str, kind: &str) {
    let at = dir.join(name);
    match kind {
        "nothing" => {}
        "file" => drop(file(&at, kind.as_bytes())),
        "empty" => fs::create_dir(at).unwrap(),
        "full" => fs::create_dir_all(at.join("in")).unwrap(),
        "link" => symlink("elsewhere", at).unwrap(),
        "link to full" => symlink("full", at).unwrap(),
        "fifo" => mknodat(CWD, at, rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap(),
        _ => unreachable!("no such kind"),
    }
}

#[test]
fn every_pair_of_things_is_renamed_alike() {
    const KINDS: [&str; 7] = ["nothing", "file", "empty", "full", "link", "link to full", "fifo"];
    compare(&[], &[], |t| {
        let mut number = 0;
        for (how, flags) in [
            ("plain", RenameFlags::empty()),
            ("noreplace", RenameFlags::NOREPLACE),
            ("exchange", RenameFlags::EXCHANGE),
        ] {
            for from in KINDS {
                for to in KINDS {
                    number += 1;
                    let dir = t.path(format!("d{number}"));
                    fs::create_dir(&dir).unwrap();
                    thing(&dir, "from", from);
                    thing(&dir, "to", to);
                    let what = format!("{how} {from} to {to}");
                    t.call(
                        &what,
                        renameat_with(CWD, dir.join("from"), CWD, dir.join("to"), flags),
                    );
                    let mut left: Vec<_> = fs::read_dir(&dir)
                        .unwrap()
                        .map(|entry| entry.unwrap())
                        .map(|entry| {
                            (
                                entry.file_name(),
                                entry.metadata().unwrap().mode(),
                                entry.metadata().unwrap().len(),
                            )
                        })
                        .filter(|(_, mode, _)| mode & libc::S_IFMT != libc::S_IFDIR)
                        .collect();
                    left.sort();
                    t.note(format!("{what}: left"), left);
                    let dirs: Vec<_> = ["from", "to"]
                        .iter()
                        .map(|name| fs::read_dir(dir.join(name)).map(Iterator::count).ok())
                        .collect();
                    t.note(format!("{what}: directories"), dirs);
                    t.note(format!("{what}: names"), fs::metadata(&dir).unwrap().nlink());
                }
            }
        }
        // A directory and what is in it.
        fs::create_dir_all(t.path("up/down/deep")).unwrap();
        file(&t.path("up/f"), b"x");
        for (from, to) in [
            ("up", "up/down"),
            ("up", "up/down/deep"),
            ("up", "up/new"),
            ("up/down", "up"),
            ("up/f", "up"),
            ("up/down", "up/down/deep"),
            ("up/.", "x"),
            ("up/..", "x"),
            ("x", "up/."),
            ("up/f", "up/down/.."),
            ("up/f/", "x"),
            ("up/f", "x/"),
            ("up/down", "x/"),
            ("x/", "up/down/"),
            ("up/f", "up/f/x"),
            ("", "x"),
        ] {
            for (how, flags) in [
                ("plain", RenameFlags::empty()),
                ("noreplace", RenameFlags::NOREPLACE),
                ("exchange", RenameFlags::EXCHANGE),
            ] {
                t.call(
                    format!("{how} {from:?} to {to:?}"),
                    renameat_with(CWD, t.path(from), CWD, t.path(to), flags),
                );
            }
        }
        // SAFETY: paths that end with NUL, which the call only reads.
        let odd = unsafe { libc::renameat2(libc::AT_FDCWD, c"a".as_ptr(), libc::AT_FDCWD, c"b".as_ptr(), 8) };
        t.call("no such flag", answer(i64::from(odd)));
        let other = Path::new("/dev/shm").join(format!("casmount-rename-{}", std::process::id()));
        t.call("to another file system", fs::rename(t.path("up/f"), &other));
        t.call(
            "link to another file system",
            fs::hard_link(t.path("up/f"), &other),
        );
        file(&other, b"x");
        let back = (
            fs::rename(&other, t.path("back")),
            fs::hard_link(&other, t.path("back")),
        );
        fs::remove_file(&other).unwrap();
        t.call("from another file system", back.0);
        t.call("link from another file system", back.1);
    });
}

#[test]
fn the_top_of_a_mount_stays() {
    let lab = crate::lab::Lab::new(crate::lab::StoreKind::File);
    let machine = lab.machine("a");
    crate::assert_errno!(fs::remove_dir(machine.root()), EBUSY);
    crate::assert_errno!(fs::rename(machine.root(), lab.dir().join("x")), EBUSY);
    fs::create_dir(machine.path("d")).unwrap();
    crate::assert_errno!(fs::rename(machine.path("d"), machine.root()), EXDEV | EBUSY);
    crate::assert_errno!(fs::rename(machine.path("d"), lab.dir().join("x")), EXDEV);
}

#[test]
fn links_are_made_alike_by_every_way_to_a_file() {
    compare(&[], &[], |t| {
        let path = file(&t.path("f"), b"content");
        symlink("f", t.path("l")).unwrap();
        symlink("no", t.path("dangling")).unwrap();
        fs::create_dir(t.path("d")).unwrap();
        symlink("d", t.path("dl")).unwrap();
        let link = |from: &str, to: &str, flags| linkat(CWD, t.path(from), CWD, t.path(to), flags);
        for (what, flags) in [
            ("itself", AtFlags::empty()),
            ("followed", AtFlags::SYMLINK_FOLLOW),
        ] {
            for from in ["f", "l", "dangling", "d", "dl", "no"] {
                t.call(
                    format!("{from} {what}"),
                    link(from, &format!("{from}-{what}"), flags),
                );
            }
        }
        t.note(
            "of a link",
            fs::symlink_metadata(t.path("l-itself"))
                .map(|meta| meta.is_symlink())
                .ok(),
        );
        t.call("no such flag", link("f", "g", AtFlags::REMOVEDIR));
        t.call("over a link", link("f", "dangling", AtFlags::empty()));
        t.call("over a directory", link("f", "d", AtFlags::empty()));
        t.call("below a file", link("f", "f/g", AtFlags::empty()));
        let open = openat(CWD, &path, OFlags::PATH, Mode::empty()).unwrap();
        if rustix::process::geteuid().is_root() {
            t.call(
                "a descriptor",
                linkat(&open, "", CWD, t.path("of-fd"), AtFlags::EMPTY_PATH),
            );
            t.note("names", fs::metadata(&path).unwrap().nlink());
        } else {
            t.note("a descriptor", "needs root");
            t.note("names", 0);
        }
        for name in ["f", "of-fd", "f-itself", "f-followed", "l-followed"] {
            let _ = fs::remove_file(t.path(name));
        }
        t.call(
            "a descriptor of what is gone",
            linkat(&open, "", CWD, t.path("again"), AtFlags::EMPTY_PATH),
        );

        let flags = OFlags::CREATE | OFlags::WRONLY;
        let create =
            |name: &str, more: OFlags| openat(CWD, t.path(name), flags | more, Mode::from_raw_mode(0o644));
        symlink("made", t.path("to-make")).unwrap();
        t.call("exclusively through a link", create("to-make", OFlags::EXCL));
        t.call("not following a link", create("to-make", OFlags::NOFOLLOW));
        t.call("through a link", create("to-make", OFlags::empty()));
        t.note("made", fs::metadata(t.path("made")).is_ok());
        symlink("no/made", t.path("too-far")).unwrap();
        t.call("through a link to nowhere", create("too-far", OFlags::empty()));
        t.call("a link to a directory", create("dl", OFlags::empty()));
        t.call("a link to a directory, exclusively", create("dl", OFlags::EXCL));
        t.call("a directory to be made", create("new", OFlags::DIRECTORY));
        t.call("what is there as a directory", create("d", OFlags::DIRECTORY));
        t.call(
            "O_TRUNC of a directory",
            openat(CWD, t.path("d"), OFlags::TRUNC, Mode::empty()),
        );
        t.call(
            "O_PATH of a link",
            openat(CWD, t.path("l"), OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()),
        );
        t.call(
            "O_NOFOLLOW of a link",
            openat(CWD, t.path("l"), OFlags::NOFOLLOW, Mode::empty()),
        );
        let link = openat(
            CWD,
            t.path("dangling"),
            OFlags::PATH | OFlags::NOFOLLOW,
            Mode::empty(),
        )
        .unwrap();
        t.ask("target by O_PATH", rustix::fs::readlinkat(&link, "", Vec::new()));
        t.call("read by O_PATH", rustix::io::read(&link, &mut [0; 3]));
        t.call(
            "chmod by O_PATH",
            rustix::fs::fchmod(&link, Mode::from_raw_mode(0o600)),
        );
        t.call("sync by O_PATH", rustix::fs::fsync(&link));
    });
}
