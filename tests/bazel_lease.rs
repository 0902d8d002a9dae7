//! A real Bazel that builds without the bytes, beside sweeps: what it was told is in the cache is there later.
//!
//! Such a build only touches what its cache has, and reads an output when an action needs it, in another build
//! perhaps. What is gone by then ends it with exit code 39, "lost inputs". So here blobs that nobody's names
//! mention are swept all the time, and names go on another machine, between the one and the other.
//!
//! It needs a newer Bazel, see [`bazel_root`].

#[path = "support/bazel_root.rs"]
#[macro_use]
mod bazel_root;
#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    time::Duration,
};

use bazel_root::{ACTIONS, PARTS, Workspace, digest_of, large};
use lab::{Lab, StoreKind};
use serde_json::Value;
use support::{machine::Machine, posix::file, rng::Rng, wait};

on_both_stores!(
    what_a_build_without_the_bytes_relies_on_outlives_sweeps_and_the_deletes_of_others,
    a_blob_that_the_bucket_loses_is_noticed_and_made_again,
);

const SOON: Duration = Duration::from_secs(90);

/// "Lost inputs", or what else Bazel's remote cache caused.
const LOST_INPUTS: i32 = 39;

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
