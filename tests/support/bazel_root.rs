//! A Bazel in a root directory of its own, and a workspace that it builds on the machines of a lab.
//!
//! It needs a Bazel that uses a disk cache without the bytes and collects what is old in it, from version 7.4 on:
//! `scripts/test.d/bazel-root` makes a root directory with one below `target/tools`, where this may be made.
//! Without it, and without root, the tests say that they are skipped.

// Each test program uses a part of this.
#![allow(dead_code)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use crate::{
    lab::Lab,
    support::{
        machine::Machine,
        posix::file,
        tree,
        wait::{self, ChildGuard},
    },
};

pub const PARTS: usize = 12;

/// Parts, the large one, and the whole.
pub const ACTIONS: usize = PARTS + 2;

const BUILD_LIMIT: Duration = Duration::from_secs(240);

/// Enters a Bazel's own root, with the lab at `/lab`, and everything that is mounted there for it alone; goes on
/// with a script.
const ENTER: &str = r#"
root=$0 lab=$1 script=$2
shift 2
mount --rbind "$lab" "$root/lab"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
exec chroot "$root" /usr/bin/env -i USER=root HOME=/tmp LANG=C.UTF-8 PATH=/usr/bin /usr/bin/bash -c "$script" "$@"
"#;

/// Runs one command.
const RUN: &str = r#"cd "$1" && exec bazel "${@:2}""#;

/// Runs one command with a server, which collects when it has nothing else to do, until it is told to end. The
/// shell stays: as the first process it also has to take note of the server's end.
const SERVE: &str = r#"cd "$1" && bazel "${@:2}" && read -r; bazel "${@:2:3}" shutdown; exit $?"#;

/// Of both: the package says where the rest of Bazel is.
const STARTUP: [&str; 2] = ["--nohome_rc", "--server_javabase=/java"];

/// The root directory of a Bazel, where there is one and it can be entered.
pub fn bazel_root() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bazel-root");
    (root.join("usr/bin/bazel").exists() && rustix::process::geteuid().is_root()).then_some(root)
}

macro_rules! bazel_root_or_skip {
    () => {
        match $crate::bazel_root::bazel_root() {
            Some(root) => root,
            None => skip!("there is no newer Bazel (scripts/test.d/bazel-root), or no root"),
        }
    };
}

/// A workspace on one machine, with Bazel's own memory of what it built there.
pub struct Workspace<'a> {
    root: &'a Path,
    lab: &'a Lab,
    name: String,
}

/// How a build ended, and what Bazel said.
pub struct Built {
    pub code: Option<i32>,
    pub said: String,
}

impl Built {
    /// Outputs that were taken from the cache.
    pub fn hits(&self) -> usize {
        let before = self.said.split(" disk cache hit").next().unwrap_or_default();
        let number = before.rsplit([' ', ',']).next().unwrap_or_default();
        number.parse().unwrap_or(0)
    }

    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.said);
        self
    }
}

impl<'a> Workspace<'a> {
    pub fn new(root: &'a Path, lab: &'a Lab, machine: &Machine) -> Self {
        let workspace = Self {
            root,
            lab,
            name: machine.spec.name.clone(),
        };
        fs::create_dir_all(workspace.dir()).unwrap();
        file(&workspace.dir().join("WORKSPACE"), b"");
        workspace.ask_for("first");
        workspace
    }

    fn dir(&self) -> PathBuf {
        self.lab.dir().join(format!("workspace-{}", self.name))
    }

    /// Changes the last action, so that it has to run, with all outputs of the others.
    pub fn ask_for(&self, title: &str) {
        let rules = format!(
            r#"
[genrule(
    name = "part%d" % n,
    outs = ["part%d.txt" % n],
    cmd = "echo part %d > $@" % n,
) for n in range({PARTS})]

# Too large for a pack.
genrule(
    name = "large",
    outs = ["large.txt"],
    cmd = "i=0; while [ $$i -lt 20000 ]; do echo line $$i; i=$$((i + 1)); done > $@",
)

genrule(
    name = "whole",
    srcs = [":large"] + [":part%d" % n for n in range({PARTS})],
    outs = ["whole.txt"],
    cmd = "echo {title} > $@; cat $(SRCS) >> $@",
)
"#
        );
        file(&self.dir().join("BUILD"), rules.as_bytes());
    }

    /// A command that goes on with a script in the root of this Bazel, and has the workspace as its first argument.
    fn enter(&self, unshare: &[&str], script: &str) -> Command {
        let mut command = Command::new("unshare");
        command
            .args(unshare)
            .args(["--mount", "--propagation", "private"]);
        command.args(["bash", "-c", ENTER]);
        command.arg(self.root).arg(self.lab.dir()).arg(script);
        command.arg("bash").arg(format!("/lab/workspace-{}", self.name));
        command
    }

    fn output_root(&self) -> String {
        format!("--output_user_root=/lab/output-{}", self.name)
    }

    fn build_args(&self) -> Vec<String> {
        let args = [
            "build",
            "--noenable_bzlmod",
            "--enable_workspace",
            &format!("--disk_cache=/lab/{}/mnt/disk", self.name),
            "--spawn_strategy=local",
            "--color=no",
            "--curses=no",
            "--remote_download_minimal",
            // What is lost is to be told, not mended by another try.
            "--experimental_remote_cache_eviction_retries=0",
        ];
        args.map(str::to_owned).into()
    }

    pub fn build(&self, more: &[&str]) -> Built {
        let mut command = self.enter(&[], RUN);
        // No server is left behind.
        command.arg("--batch").args(STARTUP).arg(self.output_root());
        command.args(self.build_args()).args(more).arg("//:whole");
        let done = wait::run(&mut command, BUILD_LIMIT);
        self.open_output();
        Built {
            code: done.status.code(),
            said: String::from_utf8_lossy(&done.stderr).into_owned(),
        }
    }

    /// Forgets everything that was ever built here.
    #[track_caller]
    pub fn clean(&self) {
        let mut command = self.enter(&[], RUN);
        command.arg("--batch").args(STARTUP).arg(self.output_root());
        command.args(["clean", "--noenable_bzlmod", "--enable_workspace", "--expunge"]);
        wait::run_ok(&mut command, BUILD_LIMIT);
        self.open_output();
    }

    /// Builds, and lets Bazel's own collector delete from its cache afterwards until `over`.
    #[track_caller]
    pub fn collect(&self, limits: &[&str], over: impl Fn() -> bool) {
        // With a number space for processes of its own: its server ends with it, whatever happens.
        let mut command = self.enter(&["--pid", "--fork", "--kill-child"], SERVE);
        command.args(STARTUP).arg(self.output_root());
        command.args(self.build_args()).args(limits);
        command.args(["--experimental_disk_cache_gc_idle_delay=1s", "//:whole"]);
        let log = self.lab.dir().join(format!("collector-{}.log", self.name));
        let said = fs::File::create(&log).unwrap();
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(said);
        let mut bazel = ChildGuard(command.spawn().expect("unshare can be started"));
        let ended = wait::try_until(BUILD_LIMIT, || {
            let ended = bazel.0.try_wait().expect("our own child").is_some();
            (ended || over()).then_some(ended)
        });
        let said = || fs::read_to_string(&log).unwrap_or_default();
        assert_eq!(ended, Some(false), "whether it ended first: {}", said());
        drop(bazel.0.stdin.take());
        let status = wait::until("Bazel's server has ended", BUILD_LIMIT, || {
            bazel.0.try_wait().expect("our own child")
        });
        assert!(status.success(), "{status}: {}", said());
        self.open_output();
    }

    /// Opens read-only trees, which the directory of the test could not remove.
    fn open_output(&self) {
        let output = self.lab.dir().join(format!("output-{}", self.name));
        let mut chmod = Command::new("chmod");
        wait::run_ok(chmod.args(["-R", "u+w"]).arg(output), BUILD_LIMIT);
    }

    /// Builds with the bytes of the last output, and looks at them.
    #[track_caller]
    pub fn whole(&self, title: &str) -> Built {
        self.ask_for(title);
        let built = self.build(&["--remote_download_toplevel"]).succeeded();
        let output = format!("output-{}", self.name);
        let mut find = Command::new("find");
        find.arg(self.lab.dir().join(output));
        find.args([
            "-path",
            "*/bin/whole.txt",
            "-type",
            "f",
            "-exec",
            "cat",
            "{}",
            "+",
        ]);
        let text = wait::run_ok(&mut find, BUILD_LIMIT);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 1 + 20_000 + PARTS, "{}", built.said);
        assert_eq!((lines[0], lines[20_001]), (title, "part 0"));
        built
    }
}

/// The digest of what an action of the workspace makes.
pub fn digest_of(bytes: &[u8]) -> String {
    tree::hex(&tree::digest(bytes))
}

pub fn large() -> Vec<u8> {
    let lines = (0..20_000).map(|number| format!("line {number}\n"));
    lines.collect::<String>().into_bytes()
}
