//! Programs of every day on real mounts: git, cargo, make, tar, rsync and cp.
//!
//! Each test says that it is skipped where its program is not; `scripts/test` brings all of them.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use lab::{Lab, StoreKind};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat};
use support::{
    input,
    machine::Machine,
    posix::{content, file},
    programs::{self, LIMIT},
    rng::Rng,
    tree, wait,
};

on_both_stores!(
    git_clones_commits_and_collects,
    rsync_copies_everything_and_then_nothing,
    tar_unpacks_what_it_packed,
);

const SOON: Duration = Duration::from_secs(60);

/// What a machine shows that was told of everything on another one.
#[track_caller]
fn assert_arrived(from: &Machine, to: &Machine, name: &str) {
    from.flush();
    let sign = format!("sign-{}-{name}", from.spec.name);
    file(&from.path(&sign), name.as_bytes());
    from.flush();
    to.until_content(&sign, name.as_bytes());
    tree::assert_same_but_dir_times(&tree::read(&from.path(name)), &tree::read(&to.path(name)));
}

fn git_clones_commits_and_collects(kind: StoreKind) {
    let [git] = need!("git");
    let lab = Lab::new(kind);
    let run = |dir: &Path, args: &[&str]| {
        let mut command = programs::command(&git, lab.dir());
        command.current_dir(dir).env("GIT_CONFIG_NOSYSTEM", "1");
        command.args(["-c", "user.name=t", "-c", "user.email=t@example.org"]);
        wait::run_ok(command.args(args), LIMIT)
    };
    let origin = lab.dir().join("origin");
    fs::create_dir(&origin).unwrap();
    input::copy_into(&[input::dependency("zstd-sys").join("zstd")], &origin);
    run(&origin, &["init", "--quiet", "--initial-branch=main"]);
    run(&origin, &["add", "--all"]);
    run(&origin, &["commit", "--quiet", "-m", "first"]);

    let mut a = lab.machine("a");
    let clone = a.path("clone");
    run(
        a.root(),
        &[
            "clone",
            "--quiet",
            "--no-local",
            &format!("file://{}", origin.display()),
            "clone",
        ],
    );
    run(&clone, &["fsck", "--full", "--strict"]);
    assert_eq!(run(&clone, &["status", "--porcelain"]), "");

    run(&clone, &["switch", "--quiet", "--create", "work"]);
    for round in 0..4 {
        file(
            &clone.join(format!("new-{round}")),
            format!("in round {round}\n").repeat(999).as_bytes(),
        );
        fs::remove_file(clone.join("zstd/lib/zdict.h")).unwrap_or_default();
        let changed = clone.join("zstd/lib/zstd.h");
        let text = content(&changed);
        file(&changed, &[format!("// {round}\n").as_bytes(), &text].concat());
        run(&clone, &["add", "--all"]);
        run(&clone, &["commit", "--quiet", "-m", "more"]);
    }
    run(&clone, &["switch", "--quiet", "main"]);
    run(&clone, &["merge", "--quiet", "--no-ff", "-m", "merge", "work"]);
    run(&clone, &["rebase", "--quiet", "HEAD~1", "work"]);
    run(&clone, &["stash", "--include-untracked"]);
    run(&clone, &["gc", "--quiet", "--prune=now", "--aggressive"]);
    run(&clone, &["fsck", "--full", "--strict"]);
    assert_eq!(run(&clone, &["status", "--porcelain"]), "");
    assert_eq!(content(&clone.join("new-3")).len(), 999 * "in round 3\n".len());

    // What it remembers of each file (times, inode numbers) is as it was: nothing is even looked at.
    a.unmount();
    a.restart();
    run(&clone, &["diff-files", "--quiet"]);
    assert_eq!(run(&clone, &["status", "--porcelain"]), "");
    run(&clone, &["fsck", "--full", "--strict"]);

    let b = lab.machine("b");
    assert_arrived(&a, &b, "clone");
    let there = b.path("clone");
    run(&there, &["fsck", "--full", "--strict"]);
    assert_eq!(run(&there, &["status", "--porcelain"]), "");
    let log = |at: &Path| run(at, &["log", "--format=%H", "--all"]);
    assert_eq!(log(&clone), log(&there));
    // And the other way: what is committed there is seen here.
    file(&there.join("there"), b"made on the other machine\n");
    run(&there, &["add", "there"]);
    run(&there, &["commit", "--quiet", "-m", "there"]);
    assert_arrived(&b, &a, "clone");
    run(&clone, &["fsck", "--full", "--strict"]);
    assert_eq!(log(&clone), log(&there));
}

/// A crate with a library, a program, a build script and a test.
fn small_crate(dir: &Path) {
    fs::create_dir_all(dir.join("src/bin")).unwrap();
    fs::create_dir_all(dir.join("inner/src")).unwrap();
    let files = [
        (
            "Cargo.toml",
            "[package]\nname = \"small\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[dependencies]\ninner = { path = \"inner\" }\n[workspace]\nmembers = [\"inner\"]\n",
        ),
        (
            "inner/Cargo.toml",
            "[package]\nname = \"inner\"\nversion = \"0.1.0\"\nedition = \"2021\"\n",
        ),
        ("inner/src/lib.rs", "pub fn inner() -> u32 { 41 }\n"),
        (
            "build.rs",
            "fn main() { let out = std::env::var(\"OUT_DIR\").unwrap();\n std::fs::write(format!(\"{out}/made.rs\"), \"pub const MADE: u32 = 1;\").unwrap();\n println!(\"cargo:rerun-if-changed=build.rs\"); }\n",
        ),
        (
            "src/lib.rs",
            "include!(concat!(env!(\"OUT_DIR\"), \"/made.rs\"));\npub fn sum() -> u32 { inner::inner() + MADE }\n#[test]\nfn it_is_right() { assert_eq!(sum(), 42) }\n",
        ),
        (
            "src/bin/small.rs",
            "fn main() { println!(\"{}\", small::sum()) }\n",
        ),
    ];
    for (path, text) in files {
        file(&dir.join(path), text.as_bytes());
    }
}

#[test]
fn cargo_builds_on_the_mount_and_then_has_nothing_to_do() {
    let Some(cargo) = std::env::var_os("CARGO") else {
        skip!("no CARGO is set");
    };
    let lab = Lab::new(StoreKind::File);
    let mut machine = lab.machine("a");
    let source = lab.dir().join("small");
    small_crate(&source);
    let target = machine.path("target");
    let build = |what: &[&str]| -> Vec<String> {
        let mut command = Command::new(&cargo);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["CARGO_", "RUSTFLAGS", "RUSTC", "RUSTDOC"]
                .iter()
                .any(|prefix| text.starts_with(prefix))
                && !["CARGO_HOME"].contains(&&*text)
            {
                command.env_remove(&name);
            }
        }
        command.args(what).args(["--offline", "--workspace", "--verbose"]);
        command.arg("--target-dir").arg(&target).current_dir(&source);
        let output = wait::run(&mut command, LIMIT);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        let compiled = said
            .lines()
            .filter(|line| line.trim_start().starts_with("Compiling"));
        compiled.map(str::to_owned).collect()
    };
    let said = || wait::run_ok(&mut Command::new(target.join("debug/small")), SOON);
    assert_eq!(build(&["build"]).len(), 2);
    assert_eq!(said(), "42\n");
    assert_eq!(build(&["build"]), [""; 0]);
    build(&["test"]);
    machine.unmount();
    machine.restart();
    assert_eq!(build(&["build"]), [""; 0]);
    assert_eq!(said(), "42\n");
    file(
        &source.join("inner/src/lib.rs"),
        b"pub fn inner() -> u32 { 42 }\n",
    );
    assert_eq!(build(&["build"]).len(), 2);
    assert_eq!(said(), "43\n");

    let other = lab.machine("b");
    assert_arrived(&machine, &other, "target");
    let there = other.path("target/debug/small");
    assert_eq!(wait::run_ok(&mut Command::new(there), SOON), "43\n");
}

const MAKEFILE: &str = r"
CC = cc
CFLAGS = -O1 -w -DZSTD_DISABLE_ASM=1 -Ilib -Ilib/common -MMD
objects := $(patsubst %.c,out/%.o,$(wildcard lib/common/*.c lib/compress/*.c lib/decompress/*.c lib/dictBuilder/*.c))
all: out/round
out/round: out/round.o out/libzstd.a
	$(CC) -o $@ $^
out/libzstd.a: $(objects)
	rm -f $@ && ar rcsD $@ $^
out/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -c -o $@ $<
-include $(objects:.o=.d)
";

const ROUND: &str = r#"
#include <stdio.h>
#include <string.h>
#include "zstd.h"
int main(void) {
    static char in[100000], packed[200000], out[100000];
    for (int i = 0; i < sizeof in; i++) in[i] = (i * i) >> 7;
    size_t n = ZSTD_compress(packed, sizeof packed, in, sizeof in, 9);
    size_t m = ZSTD_decompress(out, sizeof out, packed, n);
    puts(m == sizeof in && !memcmp(in, out, m) ? "right" : "wrong");
    return 0;
}
"#;

#[test]
fn make_builds_a_c_library_in_parallel() {
    let [make, _, _] = need!("make", "cc", "ar");
    let lab = Lab::new(StoreKind::S3);
    let mut machine = lab.machine("a");
    let native = lab.dir().join("native");
    fs::create_dir(&native).unwrap();
    let here = machine.path("build");
    fs::create_dir(&here).unwrap();
    let run = |dir: &Path, args: &[&str]| {
        let mut command = programs::command(&make, lab.dir());
        wait::run_ok(command.args(args).current_dir(dir), LIMIT)
    };
    for dir in [&native, &here] {
        input::copy_into(&[input::dependency("zstd-sys").join("zstd/lib")], dir);
        file(&dir.join("Makefile"), MAKEFILE.as_bytes());
        file(&dir.join("round.c"), ROUND.as_bytes());
        run(dir, &["-j4"]);
        assert_eq!(
            wait::run_ok(&mut Command::new(dir.join("out/round")), SOON),
            "right\n"
        );
    }
    // The same bytes, object by object.
    let made = |dir: &Path| {
        let mut tree = tree::read(&dir.join("out"));
        for entry in tree.values_mut() {
            entry.mtime = (0, 0);
        }
        assert!(tree.len() > 50, "only {} files were made", tree.len());
        tree
    };
    tree::assert_same(&made(&native), &made(&here));
    run(&here, &["-q"]);
    machine.unmount();
    machine.restart();
    run(&here, &["-q"]);
    // A header that many sources include.
    File::options()
        .append(true)
        .open(here.join("lib/common/mem.h"))
        .and_then(|header| header.write_at(b"\n", header.metadata()?.len()))
        .unwrap();
    let again = run(&here, &["-j4"]);
    assert!(again.lines().count() > 20, "{again}");
    run(&here, &["-q"]);

    let other = lab.machine("b");
    assert_arrived(&machine, &other, "build");
    run(&other.path("build"), &["-q"]);
}

/// A source tree, and beside it everything that it does not have.
fn everything(dir: &Path) {
    fs::create_dir(dir).unwrap();
    input::copy_into(&[input::dependency("zstd-sys").join("zstd/lib")], dir);
    let odd = dir.join("odd");
    fs::create_dir(&odd).unwrap();
    let mut rng = Rng::seeded(11);
    file(&odd.join("large"), &rng.bytes(5_000_000));
    fs::hard_link(odd.join("large"), odd.join("linked")).unwrap();
    fs::hard_link(odd.join("large"), dir.join("linked too")).unwrap();
    let sparse = File::create(odd.join("sparse")).unwrap();
    sparse.write_all_at(b"begin", 0).unwrap();
    sparse.write_all_at(b"end", 40 << 20).unwrap();
    sparse.set_len(48 << 20).unwrap();
    file(&odd.join("empty"), b"");
    file(&odd.join("new\nline \\ and blank"), b"x");
    symlink("../odd/large", odd.join("relative")).unwrap();
    symlink("/nowhere", odd.join("dangling")).unwrap();
    fs::create_dir(odd.join("empty-dir")).unwrap();
    for (name, mode) in [("empty", 0o4711), ("large", 0o640), ("empty-dir", 0o1777)] {
        fs::set_permissions(odd.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    for (name, value) in [
        ("user.mime_type", &b"text/plain"[..]),
        ("user.bytes", b"\0\xff\n"),
    ] {
        rustix::fs::setxattr(odd.join("large"), name, value, XattrFlags::CREATE).unwrap();
        rustix::fs::setxattr(odd.join("empty-dir"), name, value, XattrFlags::CREATE).unwrap();
    }
    mknodat(
        CWD,
        odd.join("fifo"),
        FileType::Fifo,
        Mode::from_raw_mode(0o640),
        0,
    )
    .unwrap();
    mknodat(
        CWD,
        odd.join("socket"),
        FileType::Socket,
        Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    if rustix::process::geteuid().is_root() {
        // The same as /dev/null.
        let null = rustix::fs::makedev(1, 3);
        let mode = Mode::from_raw_mode(0o666);
        mknodat(CWD, odd.join("device"), FileType::CharacterDevice, mode, null).unwrap();
    }
    for (name, date) in [
        ("empty", "1969-07-20 20:17:40.123456789 UTC"),
        ("relative", "2001-09-09 01:46:40.000000001 UTC"),
        ("fifo", "2038-01-19 03:14:08.999999999 UTC"),
        ("empty-dir", "1999-12-31 23:59:59.5 UTC"),
    ] {
        let mut touch = Command::new("touch");
        wait::run_ok(touch.args(["-h", "-d", date]).arg(odd.join(name)), SOON);
    }
}

/// What [`tree`] does not compare: which names are one file, and devices.
fn links_and_devices(top: &Path) -> Vec<(PathBuf, u64, u64)> {
    let tree = tree::read(top);
    let of = |path: &PathBuf| {
        let meta = fs::symlink_metadata(top.join(path)).expect("it was listed");
        let links = if meta.is_dir() { 0 } else { meta.nlink() };
        (path.clone(), links, meta.rdev())
    };
    tree.keys().map(of).collect()
}

#[track_caller]
fn assert_same_in_all(native: &Path, copy: &Path) {
    tree::assert_same(&tree::read(native), &tree::read(copy));
    assert_eq!(links_and_devices(native), links_and_devices(copy));
}

fn rsync_copies_everything_and_then_nothing(kind: StoreKind) {
    let [rsync] = need!("rsync");
    let lab = Lab::new(kind);
    let native = lab.dir().join("native");
    everything(&native);
    let mut machine = lab.spec("a").arg("--xattr").start();
    let from = format!("{}/", native.display());
    let run = |args: &[&str], to: &Machine| {
        let mut command = programs::command(&rsync, lab.dir());
        // Times to the nanosecond; what was copied a moment ago would else be as good as the original.
        command.args(["-aHAX", "--modify-window=-1", "--itemize-changes", "--delete"]);
        command.args(args);
        wait::run_ok(command.arg(&from).arg(to.path("copy")), LIMIT)
    };
    run(&[], &machine);
    assert_same_in_all(&native, &machine.path("copy"));
    // All it knows of is right: it finds nothing to do, by itself the best comparison there is.
    assert_eq!(run(&["--checksum"], &machine), "");
    machine.unmount();
    machine.restart();
    assert_eq!(run(&["--checksum"], &machine), "");

    let large = native.join("odd/large");
    let changed = File::options().write(true).open(&large).unwrap();
    changed.write_all_at(b"changed", 2_000_000).unwrap();
    drop(changed);
    fs::remove_file(native.join("odd/dangling")).unwrap();
    fs::rename(native.join("odd/empty-dir"), native.join("moved")).unwrap();
    file(&native.join("odd/new"), b"new");
    run(&["--inplace", "--no-whole-file"], &machine);
    assert_same_in_all(&native, &machine.path("copy"));
    file(&large, b"much shorter");
    run(&["--sparse"], &machine);
    assert_same_in_all(&native, &machine.path("copy"));

    let other = lab.spec("b").arg("--xattr").start();
    assert_arrived(&machine, &other, "copy");
    assert_same_in_all(&native, &other.path("copy"));
    assert_eq!(run(&["--checksum"], &other), "");
}

fn tar_unpacks_what_it_packed(kind: StoreKind) {
    let [tar] = need!("tar");
    let lab = Lab::new(kind);
    let native = lab.dir().join("native");
    everything(&native);
    let machine = lab.spec("a").arg("--xattr").start();
    let run = |args: &[&str], archive: &Path, dir: &Path| {
        let mut command = programs::command(&tar, lab.dir());
        command.args(args).args(["--xattrs", "--sparse", "-f"]);
        wait::run_ok(command.arg(archive).arg("-C").arg(dir).arg("."), LIMIT)
    };
    // tar does not know sockets.
    fs::remove_file(native.join("odd/socket")).unwrap();
    let archive = lab.dir().join("native.tar");
    run(&["-c"], &archive, &native);
    let copy = machine.path("copy");
    fs::create_dir(&copy).unwrap();
    run(&["-xp"], &archive, &copy);
    run(&["-d"], &archive, &copy);
    assert_same_in_all(&native, &copy);
    // The archive on the mount, too, and back.
    let there = machine.path("copy.tar");
    run(&["-c"], &there, &copy);
    let back = lab.dir().join("back");
    fs::create_dir(&back).unwrap();
    run(&["-xp"], &there, &back);
    assert_same_in_all(&native, &back);
    let other = lab.spec("b").arg("--xattr").start();
    assert_arrived(&machine, &other, "copy");
    run(&["-d"], &archive, &other.path("copy"));
    assert_same_in_all(&native, &other.path("copy"));
}

#[test]
fn cp_copies_into_within_and_out_of_the_mount() {
    let [cp] = need!("cp");
    let lab = Lab::new(StoreKind::File);
    let native = lab.dir().join("native");
    everything(&native);
    for args in [&["--xattr"][..], &["--xattr", "--no-passthrough"]] {
        let mut spec = lab.spec(&format!("a{}", args.len()));
        spec.args.extend(args.iter().map(Into::into));
        let machine = spec.start();
        let run = |from: &Path, to: &Path| {
            let mut command = programs::command(&cp, lab.dir());
            command.args(["-a", "--reflink=auto", "--sparse=auto"]);
            wait::run_ok(command.arg(from).arg(to), LIMIT);
        };
        let first = machine.path(format!("first{}", args.len()));
        run(&native, &first);
        assert_same_in_all(&native, &first);
        let second = machine.path(format!("second{}", args.len()));
        run(&first, &second);
        assert_same_in_all(&native, &second);
        // What is sealed is copied from blobs.
        machine.flush();
        let third = machine.path(format!("third{}", args.len()));
        run(&first, &third);
        assert_same_in_all(&native, &third);
        let back = lab.dir().join(format!("back{}", args.len()));
        run(&third, &back);
        assert_same_in_all(&native, &back);
    }
}
