//! A real Bazel that builds without the bytes, beside sweeps: what it was told is in the cache is there later.
//!
//! Such a build only touches what its cache has, and reads an output when an action needs it, in another build
//! perhaps. What is gone by then ends it with exit code 39, "lost inputs". So here blobs that nobody's names
//! mention are swept all the time, and names go on another machine, between the one and the other.
//!
//! It needs a Bazel that can do that with a disk cache alone, from version 7 on: `scripts/test.d/bazel-root`
//! makes a root directory with one below `target/tools`, where this may be made. Without it, and without
//! root, the tests say that they are skipped.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    time::Duration,
};

use lab::{Lab, StoreKind};
use serde_json::Value;
use support::{machine::Machine, posix::file, rng::Rng, tree, wait};

on_both_stores!(
    what_a_build_without_the_bytes_relies_on_outlives_sweeps_and_the_deletes_of_others,
    a_blob_that_the_bucket_loses_is_noticed_and_made_again,
);

const PARTS: usize = 12;

/// Parts, the large one, and the whole.
const ACTIONS: usize = PARTS + 2;

const BUILD_LIMIT: Duration = Duration::from_secs(240);

const SOON: Duration = Duration::from_secs(90);

/// "Lost inputs", or what else Bazel's remote cache caused.
const LOST_INPUTS: i32 = 39;

/// Runs a Bazel in its own root, with the lab at `/lab`, and everything that is mounted there for it alone.
const ENTER: &str = r#"
root=$0 lab=$1 work=$2
shift 2
mount --rbind "$lab" "$root/lab"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
exec chroot "$root" /usr/bin/env -i USER=root HOME=/tmp LANG=C.UTF-8 PATH=/usr/bin /usr/bin/bash -c \
    'cd "$0" && exec bazel "$@"' "$work" "$@"
"#;

/// The root directory of a Bazel, where there is one and it can be entered.
fn bazel_root() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bazel-root");
    (root.join("usr/bin/bazel").exists() && rustix::process::geteuid().is_root()).then_some(root)
}

macro_rules! bazel_root_or_skip {
    () => {
        match bazel_root() {
            Some(root) => root,
            None => skip!(
                "there is no Bazel that builds without the bytes (scripts/test.d/bazel-root), or no root"
            ),
        }
    };
}

/// A workspace on one machine, with Bazel's own memory of what it built there.
struct Workspace<'a> {
    root: &'a Path,
    lab: &'a Lab,
    name: String,
}

/// How a build ended, and what Bazel said.
struct Built {
    code: Option<i32>,
    said: String,
}

impl Built {
    /// Outputs that were taken from the cache.
    fn hits(&self) -> usize {
        let before = self.said.split(" disk cache hit").next().unwrap_or_default();
        let number = before.rsplit([' ', ',']).next().unwrap_or_default();
        number.parse().unwrap_or(0)
    }

    #[track_caller]
    fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.said);
        self
    }
}

impl<'a> Workspace<'a> {
    fn new(root: &'a Path, lab: &'a Lab, machine: &Machine) -> Self {
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
    fn ask_for(&self, title: &str) {
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

    fn build(&self, more: &[&str]) -> Built {
        let work = format!("/lab/workspace-{}", self.name);
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "bash", "-c", ENTER]);
        command.arg(self.root).arg(self.lab.dir()).arg(&work);
        // No server is left behind; the package says where the rest of Bazel is.
        command.args(["--batch", "--nohome_rc", "--server_javabase=/java"]);
        command.arg(format!("--output_user_root=/lab/output-{}", self.name));
        command.args(["build", "--noenable_bzlmod", "--enable_workspace"]);
        command.arg(format!("--disk_cache=/lab/{}/mnt/disk", self.name));
        command.args([
            "--spawn_strategy=local",
            "--color=no",
            "--curses=no",
            "--remote_download_minimal",
            // What is lost is to be told, not mended by another try.
            "--experimental_remote_cache_eviction_retries=0",
        ]);
        let done = wait::run(command.args(more).arg("//:whole"), BUILD_LIMIT);
        // Read-only trees that the directory of the test could not remove.
        let mut chmod = Command::new("chmod");
        chmod.args(["-R", "u+w"]);
        chmod.arg(self.lab.dir().join(format!("output-{}", self.name)));
        wait::run_ok(&mut chmod, BUILD_LIMIT);
        Built {
            code: done.status.code(),
            said: String::from_utf8_lossy(&done.stderr).into_owned(),
        }
    }

    /// Builds with the bytes of the last output, and looks at them.
    #[track_caller]
    fn whole(&self, title: &str) -> Built {
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
fn digest_of(bytes: &[u8]) -> String {
    tree::hex(&tree::digest(bytes))
}

fn large() -> Vec<u8> {
    let lines = (0..20_000).map(|number| format!("line {number}\n"));
    lines.collect::<String>().into_bytes()
}

fn in_cas(machine: &Machine, digest: &str) -> PathBuf {
    machine.path("disk/cas").join(&digest[..2]).join(digest)
}

/// Where the bytes of a blob of the cache are, as a machine tells.
fn residency(machine: &Machine, digest: &str) -> String {
    let listed = machine.ls(&format!("disk/cas/{}/{digest}", &digest[..2]));
    let files = listed.as_array().or(listed["files"].as_array()).unwrap();
    files[0]["residency"].as_str().unwrap().to_owned()
}

/// Sweeps the store once; returns how many bytes it condemned and deleted.
fn sweep(lab: &Lab, args: &[&str]) -> (u64, u64) {
    let spec = lab.spec("sweeper");
    let mut command = spec.command();
    command.args(["sweep", "--json"]).args(args).args(&spec.args);
    let report: Value = serde_json::from_str(&wait::run_ok(&mut command, SOON)).unwrap();
    let bytes = |what: &str| report[what]["bytes"].as_u64().unwrap();
    (bytes("condemned"), bytes("deleted"))
}

fn compact(lab: &Lab) {
    let spec = lab.spec("compactor");
    let mut command = spec.command();
    // As if all of it were old enough.
    command.args(["compact", "--trail=0s"]).args(&spec.args);
    wait::run_ok(&mut command, SOON);
}

/// What goes on beside the builds: a machine makes files that all lose again, some of them with the content of
/// the cache, hides names of the cache, and the store is swept.
struct Unrest {
    over: AtomicBool,
    /// Rounds that began after what they delete was published.
    rounds: AtomicU64,
    deleted: AtomicU64,
}

impl Unrest {
    fn new() -> Self {
        Self {
            over: AtomicBool::new(false),
            rounds: AtomicU64::new(0),
            deleted: AtomicU64::new(0),
        }
    }

    fn run(&self, lab: &Lab, machine: &Machine) {
        let mut rng = Rng::seeded(39);
        let large = large();
        while !self.over.load(SeqCst) {
            let round = self.rounds.load(SeqCst);
            let old = machine.path(format!("old-{round}"));
            fs::create_dir(&old).unwrap();
            file(&old.join("large"), &large);
            file(&old.join("noise"), &rng.bytes(300_000));
            for number in 0..PARTS {
                // In a pack with others, and in that of the cache, if that was not uploaded yet.
                file(
                    &old.join(format!("part{number}")),
                    format!("part {number}\n").as_bytes(),
                );
                file(&old.join(number.to_string()), &rng.bytes(3000));
            }
            machine.flush();
            fs::remove_dir_all(&old).unwrap();
            // As the collector of Bazel does on that machine.
            let part = digest_of(format!("part {}\n", round as usize % PARTS).as_bytes());
            let _ = fs::remove_file(in_cas(machine, &part));
            let _ = fs::remove_file(in_cas(machine, &digest_of(&large)));
            machine.flush();
            compact(lab);
            self.deleted.fetch_add(sweep(lab, &[]).1, SeqCst);
            self.rounds.fetch_add(1, SeqCst);
        }
    }

    /// Waits until what was deleted when this was called has been swept.
    fn until_swept(&self) {
        let (round, deleted) = (self.rounds.load(SeqCst), self.deleted.load(SeqCst));
        wait::until("the store was swept", SOON * 2, || {
            let swept = self.deleted.load(SeqCst) >= deleted + 2 * 300_000;
            (swept && self.rounds.load(SeqCst) > round + 2).then_some(())
        });
    }
}

/// Ends the unrest when a test is done with it, or fails.
struct Calm<'a>(&'a Unrest);

impl Drop for Calm<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, SeqCst);
    }
}

fn what_a_build_without_the_bytes_relies_on_outlives_sweeps_and_the_deletes_of_others(kind: StoreKind) {
    let root = bazel_root_or_skip!();
    let lab = Lab::new(kind);
    sweep(&lab, &["--window", "4s"]);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    let (on_a, on_b) = (Workspace::new(&root, &lab, &a), Workspace::new(&root, &lab, &b));
    let first = on_a.build(&[]).succeeded();
    assert_eq!(first.hits(), 0, "{}", first.said);
    file(&a.path("last"), b"last");
    a.flush();
    b.until_content("last", b"last");

    let unrest = Unrest::new();
    std::thread::scope(|scope| {
        scope.spawn(|| unrest.run(&lab, &a));
        let _calm = Calm(&unrest);
        // It learns what is in the cache, and reads nothing of it.
        let second = on_b.build(&[]).succeeded();
        assert_eq!(second.hits(), ACTIONS, "{}", second.said);
        assert_eq!(residency(&b, &digest_of(&large())), "remote");
        // That it touched all of it is for nobody else.
        b.flush();
        assert_eq!(b.counter("/publish/published_changes"), 0);
        unrest.until_swept();
        // Now it needs all of it.
        let third = on_b.whole("second");
        assert_eq!(third.hits(), 0, "{}", third.said);

        // The same on a machine that comes now.
        let c = lab.machine("c");
        let on_c = Workspace::new(&root, &lab, &c);
        let first = on_c.build(&[]).succeeded();
        assert_eq!(first.hits(), ACTIONS, "{}", first.said);
        unrest.until_swept();
        on_c.whole("third");
    });
    // Who removed names builds what it removed, and no more.
    let again = on_a.build(&[]).succeeded();
    assert!(again.hits() < ACTIONS, "{}", again.said);
    on_a.whole("fourth");
    lab.assert_blobs_match_their_names();
}

fn a_blob_that_the_bucket_loses_is_noticed_and_made_again(kind: StoreKind) {
    let root = bazel_root_or_skip!();
    let lab = Lab::new(kind);
    let a = lab.machine("a");
    Workspace::new(&root, &lab, &a).build(&[]).succeeded();
    a.flush();
    let b = lab.machine("b");
    let on_b = Workspace::new(&root, &lab, &b);
    let first = on_b.build(&[]).succeeded();
    assert_eq!(first.hits(), ACTIONS, "{}", first.said);
    let digest = digest_of(&large());
    lab.tamper(&format!("blobs/sha256/{}/{digest}", &digest[..2]), None);
    on_b.ask_for("second");
    // Nothing can bring it back for the build that finds out: it is what the test above would see. Bazel
    // may go on to believe what it remembers of its cache, until it is told that the name is not there.
    let codes: Vec<_> = (0..3).map(|_| on_b.build(&[]).code).collect();
    assert_eq!((codes[0], codes[2]), (Some(LOST_INPUTS), Some(0)), "{codes:?}");
    assert!(matches!(codes[1], Some(0 | LOST_INPUTS)), "{codes:?}");
    assert!(
        !b.log().contains("is lost that was never published"),
        "{}",
        b.log()
    );
    // Made again for all.
    b.flush();
    let c = lab.machine("c");
    let on_c = Workspace::new(&root, &lab, &c);
    on_c.ask_for("second");
    let all = on_c.build(&[]).succeeded();
    assert_eq!(all.hits(), ACTIONS, "{}", all.said);
    on_c.whole("third");
}
