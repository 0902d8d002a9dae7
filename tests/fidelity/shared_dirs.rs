//! Directories that several users share: sticky ones as `/tmp` is, and such as give their group to what is made in them.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::Path,
    time::Duration,
};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, openat, renameat_with, unlinkat};

use crate::{
    need,
    support::{
        machine::MachineSpec,
        posix::{content, file},
        programs,
        tempdir::TestDir,
        trial::{Trial, as_user, compare, with_umask},
        wait,
    },
};

/// Whose the directory is, whose what is in it is, and one who is neither.
const KEEPER: u32 = 54_500;
const MAKER: u32 = 54_501;
const OTHER: u32 = 54_502;
const GROUP: u32 = 54_600;

fn owned(path: &Path, uid: u32, gid: u32, bits: u32) {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
    if !path.is_symlink() {
        fs::set_permissions(path, Permissions::from_mode(bits)).unwrap();
    }
}

/// A directory of `KEEPER` with one thing of each kind of `MAKER` and one of `OTHER`.
fn shared(t: &Trial, name: &str, bits: u32) -> std::path::PathBuf {
    let dir = t.path(name);
    fs::create_dir(&dir).unwrap();
    for (of, uid) in [("maker", MAKER), ("other", OTHER)] {
        let at = |kind: &str| dir.join(format!("{of}-{kind}"));
        owned(&file(&at("file"), b"x"), uid, uid, 0o666);
        fs::create_dir(at("dir")).unwrap();
        owned(&at("dir"), uid, uid, 0o777);
        symlink("x", at("link")).unwrap();
        owned(&at("link"), uid, uid, 0);
    }
    owned(&dir, KEEPER, GROUP, bits);
    dir
}

#[test]
fn who_may_take_names_from_a_sticky_directory() {
    if !rustix::process::geteuid().is_root() {
        skip!("becoming another user needs root");
    }
    compare(&["--owner", "preserve"], &[], |t| {
        let away = t.path("away");
        fs::create_dir(&away).unwrap();
        fs::set_permissions(&away, Permissions::from_mode(0o777)).unwrap();
        let mut number = 0;
        for bits in [0o1777, 0o777, 0o1770, 0o1755] {
            for (who, uid, groups) in [
                ("keeper", KEEPER, &[][..]),
                ("maker", MAKER, &[]),
                ("other", OTHER, &[]),
                ("member", OTHER + 1, &[GROUP]),
                ("root", 0, &[]),
            ] {
                for kind in ["file", "dir", "link"] {
                    number += 1;
                    let dir = shared(t, &format!("d{number}"), bits);
                    let (maker, other) = (
                        dir.join(format!("maker-{kind}")),
                        dir.join(format!("other-{kind}")),
                    );
                    let said = |what: &str| format!("{bits:o}: {what} of a {kind} of the maker by {who}");
                    let by = |act: &(dyn Fn() -> rustix::io::Result<()> + Sync)| as_user(uid, groups, act);
                    let rename = |from: &Path, to: &Path, flags| renameat_with(CWD, from, CWD, to, flags);
                    let none = RenameFlags::empty();
                    t.call(
                        said("exchange"),
                        by(&|| rename(&maker, &other, RenameFlags::EXCHANGE)),
                    );
                    t.call(said("rename"), by(&|| rename(&maker, &dir.join("renamed"), none)));
                    let _ = fs::rename(dir.join("renamed"), &maker);
                    t.call(
                        said("rename over another's"),
                        by(&|| rename(&maker, &other, none)),
                    );
                    if !maker.is_symlink() && !maker.exists() {
                        fs::rename(&other, &maker).unwrap();
                    }
                    let out = away.join(format!("{number}"));
                    t.call(said("move away"), by(&|| rename(&maker, &out, none)));
                    if maker.symlink_metadata().is_err() {
                        fs::rename(&out, &maker).unwrap();
                    }
                    let mine = away.join(format!("mine-{number}"));
                    if kind == "dir" {
                        fs::create_dir(&mine).unwrap();
                    } else {
                        file(&mine, b"mine");
                    }
                    owned(&mine, uid, uid, 0o777);
                    t.call(said("move over"), by(&|| rename(&mine, &maker, none)));
                    let flags = if kind == "dir" {
                        AtFlags::REMOVEDIR
                    } else {
                        AtFlags::empty()
                    };
                    t.call(said("removal"), by(&|| unlinkat(CWD, &maker, flags)));
                    let mut left: Vec<_> = fs::read_dir(&dir)
                        .unwrap()
                        .map(|entry| entry.unwrap().file_name())
                        .collect();
                    left.sort();
                    t.note(said("what is left"), left);
                }
            }
        }
        // A sticky directory protects what is made in it from being opened by O_CREAT as well, where the kernel is told to.
        let dir = shared(t, "create", 0o1777);
        let flags = OFlags::CREATE | OFlags::WRONLY;
        t.call(
            "create over another's",
            as_user(OTHER, &[], || {
                openat(CWD, dir.join("maker-file"), flags, Mode::from_raw_mode(0o600))
            }),
        );
        t.call(
            "follow another's link",
            as_user(OTHER, &[], || {
                let link = dir.join("maker-to-file");
                symlink("maker-file", &link).unwrap();
                File::open(link)
            }),
        );
        t.call(
            "link of another's",
            as_user(OTHER, &[], || {
                fs::hard_link(dir.join("maker-file"), dir.join("linked"))
            }),
        );
    });
}

#[test]
fn a_directory_gives_its_group_and_who_is_outside_of_it_no_set_group_id_bit() {
    if !rustix::process::geteuid().is_root() {
        skip!("becoming another user needs root");
    }
    // The kernel leaves a FUSE daemon's files this bit where it is no right to execute.
    let differences = [
        (
            "1 2745: after chgrp of a file by owner outside",
            r#""100745 54501:54600""#,
            r#""102745 54501:54600""#,
        ),
        (
            "1 2745: after chgrp to their own of a file by owner outside",
            r#""100745 54501:54501""#,
            r#""102745 54501:54501""#,
        ),
        (
            "1 2745: after chown to the same of a file by owner outside",
            r#""100745 54501:54600""#,
            r#""102745 54501:54600""#,
        ),
    ];
    compare(&["--owner", "preserve"], &differences, |t| {
        let shown = |what: String, path: &Path| {
            let meta = fs::symlink_metadata(path).unwrap();
            t.note(what, format!("{:o} {}:{}", meta.mode(), meta.uid(), meta.gid()));
        };
        for (bits, mask) in [(0o2777, 0o0), (0o2777, 0o27), (0o777, 0), (0o3777, 0o77)] {
            for (who, uid, groups) in [
                ("member", MAKER, &[GROUP][..]),
                ("outsider", OTHER, &[]),
                ("root", 0, &[]),
            ] {
                let dir = t.path(format!("d{bits:o}-{mask:o}-{who}"));
                fs::create_dir(&dir).unwrap();
                owned(&dir, KEEPER, GROUP, bits);
                as_user(uid, groups, || {
                    with_umask(mask, || {
                        let mode = Mode::from_raw_mode(0o2775);
                        openat(CWD, dir.join("file"), OFlags::CREATE | OFlags::WRONLY, mode).unwrap();
                        openat(
                            CWD,
                            dir.join("plain"),
                            OFlags::CREATE | OFlags::WRONLY,
                            Mode::from_raw_mode(0o666),
                        )
                        .unwrap();
                        rustix::fs::mkdir(dir.join("dir"), Mode::from_raw_mode(0o777)).unwrap();
                        rustix::fs::mkdir(dir.join("dir/dir"), Mode::from_raw_mode(0o2755)).unwrap();
                        let fifo = rustix::fs::FileType::Fifo;
                        rustix::fs::mknodat(CWD, dir.join("fifo"), fifo, mode, 0).unwrap();
                        symlink("x", dir.join("link")).unwrap();
                    });
                });
                for name in ["file", "plain", "dir", "dir/dir", "fifo", "link"] {
                    shown(
                        format!("{bits:o} with umask {mask:o} by {who}: {name}"),
                        &dir.join(name),
                    );
                }
                // What moves in keeps what it has.
                file(&t.path(format!("moves-{bits:o}-{mask:o}-{who}")), b"x");
                fs::rename(
                    t.path(format!("moves-{bits:o}-{mask:o}-{who}")),
                    dir.join("moved"),
                )
                .unwrap();
                shown(
                    format!("{bits:o} with umask {mask:o} by {who}: moved"),
                    &dir.join("moved"),
                );
            }
        }
        for (number, (bits, group)) in [(0o2755, GROUP), (0o2745, GROUP), (0o6777, GROUP), (0o2755, MAKER)]
            .into_iter()
            .enumerate()
        {
            for (who, uid, groups) in [
                ("owner in the group", MAKER, &[GROUP][..]),
                ("owner outside", MAKER, &[]),
                ("member", OTHER, &[GROUP]),
            ] {
                let said = |what: &str| format!("{number} {bits:o}: {what} by {who}");
                for directory in [false, true] {
                    let path = t.path(format!("f{number}-{directory}-{who}"));
                    if directory {
                        fs::create_dir(&path).unwrap();
                    } else {
                        file(&path, b"x");
                    }
                    let said = |what: &str| {
                        said(&format!(
                            "{what} of a {}",
                            if directory { "directory" } else { "file" }
                        ))
                    };
                    owned(&path, MAKER, group, 0o755);
                    t.call(
                        said("chmod"),
                        as_user(uid, groups, || {
                            fs::set_permissions(&path, Permissions::from_mode(bits))
                        }),
                    );
                    shown(said("after chmod"), &path);
                    owned(&path, MAKER, group, bits);
                    t.call(
                        said("chgrp"),
                        as_user(uid, groups, || chown(&path, None, Some(GROUP))),
                    );
                    shown(said("after chgrp"), &path);
                    owned(&path, MAKER, group, bits);
                    t.call(
                        said("chgrp to their own"),
                        as_user(uid, groups, || chown(&path, None, Some(uid))),
                    );
                    shown(said("after chgrp to their own"), &path);
                    owned(&path, MAKER, group, bits);
                    t.call(
                        said("chown to the same"),
                        as_user(uid, groups, || chown(&path, Some(MAKER), None)),
                    );
                    shown(said("after chown to the same"), &path);
                    t.call(
                        said("chown"),
                        as_user(uid, groups, || chown(&path, Some(OTHER), None)),
                    );
                }
            }
        }
    });
}

/// `ramfs` has no access lists either.
#[test]
fn programs_that_copy_access_lists_do_as_where_there_are_none() {
    let [setfacl, getfacl, rsync, tar] = need!("setfacl", "getfacl", "rsync", "tar");
    if !rustix::process::geteuid().is_root() {
        skip!("mounting needs root");
    }
    let dir = TestDir::new();
    // Taken away with the directory.
    let bare = dir.path().join("bare");
    fs::create_dir(&bare).unwrap();
    let none = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", &bare, "ramfs", none, c"mode=755").unwrap();
    let store = dir.path().join("store");
    fs::create_dir(&store).unwrap();
    let spec = MachineSpec::new("a", dir.path(), &format!("file://{}", store.display()));
    let machine = spec.start();
    // One with lists, one without.
    let (with, without) = (dir.path().join("with"), dir.path().join("without"));
    for top in [&with, &without] {
        fs::create_dir(top).unwrap();
        file(&top.join("f"), b"content");
        fs::create_dir(top.join("d")).unwrap();
        file(&top.join("d/in"), b"in");
    }
    let set = |args: &[&str], path: &Path| {
        wait::run(
            programs::command(&setfacl, dir.path()).args(args).arg(path),
            Duration::from_secs(20),
        )
    };
    if !set(&["-m", "u:1234:r"], &with.join("f")).status.success() {
        skip!("the disk of the tests has no access lists");
    }
    assert!(set(&["-d", "-m", "u:1234:rwx"], &with.join("d")).status.success());
    let run = |root: &Path, what: &str, from: &Path| {
        let to = root.join("copy");
        let _ = fs::remove_dir_all(&to);
        let packed = dir.path().join("packed.tar");
        let mut command = match what {
            "cp -a" => programs::command("/bin/cp", dir.path()),
            "rsync -aA" => programs::command(&rsync, dir.path()),
            _ => programs::command(&tar, dir.path()),
        };
        match what {
            "cp -a" => command.arg("-a").arg(from).arg(&to),
            "rsync -aA" => command
                .args(["-aA", "--inplace"])
                .arg(format!("{}/", from.display()))
                .arg(&to),
            _ => {
                let mut pack = programs::command(&tar, dir.path());
                wait::run_ok(
                    pack.args(["--acls", "-cf"])
                        .arg(&packed)
                        .arg("-C")
                        .arg(from)
                        .arg("."),
                    Duration::from_secs(20),
                );
                fs::create_dir(&to).unwrap();
                command.args(["--acls", "-xf"]).arg(&packed).arg("-C").arg(&to)
            }
        };
        let output = wait::run(&mut command, Duration::from_secs(60));
        let said = String::from_utf8_lossy(&output.stderr).replace(&root.display().to_string(), "ROOT");
        // By processes that run beside each other.
        let mut said: Vec<_> = said.lines().map(ToOwned::to_owned).collect();
        said.sort();
        let copied = ["f", "d/in"].map(|name| fs::read(to.join(name)).ok());
        let mode = fs::metadata(to.join("f")).map(|meta| meta.mode()).ok();
        (what.to_owned(), output.status.code(), said, copied, mode)
    };
    for what in ["cp -a", "rsync -aA", "tar --acls"] {
        for from in [&with, &without] {
            let found = run(machine.root(), what, from);
            assert_eq!(found, run(&bare, what, from));
            assert_eq!(
                found.3,
                [Some(b"content".to_vec()), Some(b"in".to_vec())],
                "{found:?}"
            );
            if from == &without {
                // Of tar they are warnings, and there are some for files without lists, too.
                assert_eq!(found.1, Some(0), "{found:?}");
                assert!(found.2.is_empty() || what == "tar --acls", "{found:?}");
            }
        }
    }
    for root in [machine.root(), &bare] {
        fs::create_dir(root.join("lists")).unwrap();
        for args in [
            &["-m", "u:1234:r"][..],
            &["-d", "-m", "u:1234:r"],
            &["-m", "g::r"],
            &["-b"],
            &["-k"],
        ] {
            let output = set(args, &root.join("lists"));
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let refused = args.contains(&"u:1234:r");
            assert_eq!(
                said.contains("Operation not supported"),
                refused,
                "{args:?} in {}: {said}",
                root.display()
            );
            assert_eq!(
                output.status.success(),
                !refused,
                "{args:?} in {}: {said}",
                root.display()
            );
        }
        let mut get = programs::command(&getfacl, dir.path());
        let listed = wait::run_ok(
            get.args(["--omit-header", "--absolute-names", "-d"])
                .arg(root.join("lists")),
            Duration::from_secs(20),
        );
        assert_eq!(listed.trim(), "", "{}", root.display());
    }
    assert_eq!(content(&machine.path("copy/f")), b"content");
}
