//! Sweeps beside real mounts: what goes, what stays, and what a machine that was away does.
//!
//! The window is as short as it can be; nothing here waits for it to pass but for what passing it brings about.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    collections::BTreeMap,
    fs,
    process::{Command, Output},
    time::Duration,
};

use lab::{Lab, StoreKind};
use rustix::process::{Pid, Signal, kill_process};
use s3server::Faults;
use serde_json::Value;
use support::{
    machine::Machine,
    posix::{content, file},
    rng::Rng,
    tree, wait,
};

on_both_stores!(
    what_all_deleted_goes_after_the_window_and_all_else_stays,
    what_was_condemned_is_stored_again_by_whoever_writes_it,
    a_dry_run_tells_and_does_nothing,
    a_fork_of_now_keeps_what_its_parent_deleted,
    what_cannot_be_read_stops_a_sweep_before_it_begins,
    a_sweep_that_is_killed_is_finished_by_the_next,
);

const WINDOW: &str = "4s";

/// How long it may take until a sweep did what is due after two windows.
const SOON: Duration = Duration::from_secs(90);

fn sweep_command(lab: &Lab, args: &[&str]) -> Command {
    let spec = lab.spec("sweeper");
    let mut command = spec.command();
    command.arg("sweep").args(args).args(&spec.args);
    command
}

fn try_sweep(lab: &Lab, args: &[&str]) -> Output {
    wait::run(&mut sweep_command(lab, args), SOON)
}

#[track_caller]
fn sweep(lab: &Lab, args: &[&str]) -> Value {
    let output = try_sweep(lab, &[&["--json"], args].concat());
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{err}");
    serde_json::from_slice(&output.stdout).expect("a report is JSON")
}

/// A store with the shortest window there is.
fn lab(kind: StoreKind) -> Lab {
    let lab = Lab::new(kind);
    let report = sweep(&lab, &["--window", WINDOW]);
    assert_eq!(report["window_seconds"], 4);
    assert_eq!(report["all"]["objects"], 0);
    lab
}

fn objects(report: &Value, what: &str) -> u64 {
    report[what]["objects"].as_u64().unwrap()
}

fn bytes(report: &Value, what: &str) -> u64 {
    report[what]["bytes"].as_u64().unwrap()
}

/// Sweeps until at least so many bytes of `what` ("condemned", "deleted") are told in all.
#[track_caller]
fn sweep_until(lab: &Lab, what: &str, least: u64) -> u64 {
    let mut all = 0;
    wait::until(&format!("{least} bytes are {what}"), SOON, || {
        all += bytes(&sweep(lab, &[]), what);
        (all >= least).then_some(all)
    })
}

/// Every chunk, chunk list and pack of the store.
fn stored(lab: &Lab) -> BTreeMap<String, usize> {
    let all = lab.objects().into_iter();
    let blobs = all.filter(|object| object.key.starts_with("blobs/") || object.key.starts_with("packs/"));
    blobs.map(|object| (object.key, object.bytes.len())).collect()
}

fn a_few_files(machine: &Machine, below: &str, rng: &mut Rng) -> u64 {
    fs::create_dir_all(machine.path(below)).unwrap();
    let mut sum = 0;
    for (name, len) in [("large", 6_000_000), ("middle", 300_000)] {
        file(&machine.path(format!("{below}/{name}")), &rng.bytes(len));
        sum += len as u64;
    }
    for number in 0..20 {
        file(&machine.path(format!("{below}/{number}")), &rng.bytes(5000));
        sum += 5000;
    }
    sum
}

fn what_all_deleted_goes_after_the_window_and_all_else_stays(kind: StoreKind) {
    let lab = lab(kind);
    let mut rng = Rng::seeded(1);
    let a = lab.machine("a");
    a_few_files(&a, "kept", &mut rng);
    a.flush();
    let gone = a_few_files(&a, "gone", &mut rng);
    // Two names of one content: one of them is enough.
    fs::copy(a.path("gone/middle"), a.path("kept/copy")).unwrap();
    a.flush();
    fs::remove_dir_all(a.path("gone")).unwrap();
    fs::rename(a.path("kept/large"), a.path("kept/renamed")).unwrap();
    a.flush();
    let before = tree::read(a.root());

    let report = sweep(&lab, &[]);
    assert_eq!(
        objects(&report, "deleted") + objects(&report, "condemned"),
        0,
        "{report:#}"
    );
    let condemned = sweep_until(&lab, "condemned", gone - 300_000);
    let deleted = sweep_until(&lab, "deleted", gone - 300_000);
    assert_eq!(condemned, deleted);
    assert!(deleted < gone, "what has another name went, too");

    let late = lab.machine("late");
    tree::assert_same_but_dir_times(&before, &tree::read(late.root()));
    tree::assert_same(&before, &tree::read(a.root()));
    lab.assert_blobs_match_their_names();
    // And nothing more goes, whoever looks.
    let report = sweep(&lab, &["--dry-run"]);
    assert_eq!(
        objects(&report, "deleted") + objects(&report, "condemned"),
        0,
        "{report:#}"
    );
    assert_eq!(report["used"], report["all"]);
}

fn what_was_condemned_is_stored_again_by_whoever_writes_it(kind: StoreKind) {
    let lab = lab(kind);
    let contents: Vec<_> = [6_000_000, 200_000, 900, 901, 902, 903, 904]
        .into_iter()
        .map(|len| Rng::seeded(len as u64).bytes(len))
        .collect();
    let sum: usize = contents.iter().map(Vec::len).sum();
    let mut a = lab.machine("a");
    let write = |machine: &Machine, below: &str| {
        fs::create_dir(machine.path(below)).unwrap();
        for (number, bytes) in contents.iter().enumerate() {
            file(&machine.path(format!("{below}/{number}")), bytes);
        }
    };
    write(&a, "first");
    a.flush();
    fs::remove_dir_all(a.path("first")).unwrap();
    a.flush();
    sweep_until(&lab, "condemned", sum as u64);
    let condemned = stored(&lab);
    // One that knows the content, and one that never had it.
    let b = lab.machine("b");
    write(&a, "second");
    write(&b, "third");
    a.flush();
    b.flush();
    // It is in use again, so that sweeps leave it. But they might have deleted it just before.
    wait::until("the sweep of the list is done", SOON, || {
        sweep(&lab, &[]);
        lab.objects()
            .iter()
            .any(|object| object.key.strip_suffix(".done").is_some())
            .then_some(())
    });
    for key in condemned.keys() {
        lab.tamper(key, None);
    }
    a.unmount();
    for machine in [&lab.machine("c"), &b] {
        for below in ["second", "third"] {
            machine.until_content(&format!("{below}/0"), &contents[0]);
            for (number, bytes) in contents.iter().enumerate() {
                let path = format!("{below}/{number}");
                assert!(content(&machine.path(&path)) == *bytes, "{path}");
            }
        }
    }
    lab.assert_blobs_match_their_names();
}

fn a_dry_run_tells_and_does_nothing(kind: StoreKind) {
    let lab = lab(kind);
    let a = lab.machine("a");
    let sum = a_few_files(&a, "gone", &mut Rng::seeded(3));
    a.flush();
    fs::remove_dir_all(a.path("gone")).unwrap();
    a.flush();
    let everything = || -> Vec<_> { lab.objects().into_iter().map(|object| object.key).collect() };
    let mut before = everything();
    let report = wait::until("all is unused and old", SOON, || {
        let report = sweep(&lab, &["--dry-run"]);
        (bytes(&report, "condemned") >= sum).then_some(report)
    });
    assert_eq!(report["dry_run"], true);
    assert!(report["condemned_dollars_per_month"].as_f64().unwrap() > 0.0);
    before.sort();
    let mut after = everything();
    after.sort();
    assert_eq!(before, after);
    // What is due is told as well.
    sweep_until(&lab, "condemned", sum);
    wait::until("all is due", SOON, || {
        (bytes(&sweep(&lab, &["--dry-run"]), "deleted") >= sum).then_some(())
    });
    assert!(stored(&lab).values().sum::<usize>() as u64 >= sum);
    let output = try_sweep(&lab, &["--dry-run"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("would delete"), "{text}");
}

fn a_fork_of_now_keeps_what_its_parent_deleted(kind: StoreKind) {
    let lab = lab(kind);
    let a = lab.machine("a");
    a_few_files(&a, "old", &mut Rng::seeded(4));
    a.flush();
    let spec = lab.spec("forker");
    let mut fork = spec.command();
    fork.args(["fork", "create", "then", "--from", "main", "--at", "now"])
        .args(&spec.args);
    wait::run_ok(&mut fork, SOON);
    let before = tree::read(a.root());
    fs::remove_dir_all(a.path("old")).unwrap();
    let sum = a_few_files(&a, "other", &mut Rng::seeded(5));
    a.flush();
    fs::remove_dir_all(a.path("other")).unwrap();
    a.flush();
    // When this has gone, what the fork sees would have, too.
    sweep_until(&lab, "deleted", sum);
    let fork = lab.spec("fork").arg("--volume=then").start();
    tree::assert_same_but_dir_times(&before, &tree::read(fork.root()));
}

fn what_cannot_be_read_stops_a_sweep_before_it_begins(kind: StoreKind) {
    let lab = lab(kind);
    let mut a = lab.machine("a");
    let sum = a_few_files(&a, "gone", &mut Rng::seeded(6));
    a.flush();
    fs::remove_dir_all(a.path("gone")).unwrap();
    a.unmount();
    sweep_until(&lab, "condemned", sum);
    let before = stored(&lab);
    let segment = lab
        .objects()
        .into_iter()
        .rfind(|object| object.key.contains("/log/"))
        .unwrap();
    let mut newer = segment.bytes.clone();
    newer[8] = 9;
    let damaged = segment.bytes[..segment.bytes.len() / 2].to_vec();
    for (bytes, words) in [(newer, "newer casmount"), (damaged, "damaged (checksum)")] {
        lab.tamper(&segment.key, Some(bytes));
        // Also when what was condemned is due long since.
        for _ in 0..3 {
            let output = try_sweep(&lab, &[]);
            let err = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(1), "{err}");
            let line = err.lines().last().unwrap_or_default();
            for word in ["nothing was swept", &segment.key, words] {
                assert!(line.contains(word), "{word:?} is not in {line}");
            }
        }
        assert_eq!(stored(&lab), before);
    }
    lab.tamper(&segment.key, Some(segment.bytes));
    sweep_until(&lab, "deleted", sum);
}

fn a_sweep_that_is_killed_is_finished_by_the_next(kind: StoreKind) {
    let lab = lab(kind);
    let a = lab.machine("a");
    let mut rng = Rng::seeded(7);
    a_few_files(&a, "kept", &mut rng);
    let sum = a_few_files(&a, "gone", &mut rng);
    a.flush();
    fs::remove_dir_all(a.path("gone")).unwrap();
    a.flush();
    let before = tree::read(a.root());
    if kind == StoreKind::S3 {
        lab.server().set_faults(Faults {
            latency_ms: 15,
            ..Faults::default()
        });
    }
    // Kills fall into every phase: each is a little later than the one before, until two windows are over.
    let mut lived = Duration::ZERO;
    let mut killed = 0;
    wait::until("a killed sweep deleted all", SOON, || {
        lived += Duration::from_millis(1);
        if wait::kill_after(&mut sweep_command(&lab, &[]), lived) {
            killed += 1;
        } else {
            lived = Duration::ZERO;
        }
        let left: usize = stored(&lab).values().sum();
        (left as u64 + sum < 14_000_000 && (left as u64) < 8_000_000).then_some(())
    });
    assert!(killed > 5, "{killed} sweeps were killed");
    if kind == StoreKind::S3 {
        lab.server().set_faults(Faults::default());
    }
    sweep(&lab, &[]);
    let late = lab.machine("late");
    tree::assert_same_but_dir_times(&before, &tree::read(late.root()));
}

#[test]
fn without_permission_to_delete_a_sweep_says_so_and_nothing_is_lost() {
    let lab = lab(StoreKind::S3);
    let a = lab.machine("a");
    let sum = a_few_files(&a, "gone", &mut Rng::seeded(8));
    // Small files that are written together share a pack, which dies whole.
    a.flush();
    a_few_files(&a, "kept", &mut Rng::seeded(9));
    a.flush();
    fs::remove_dir_all(a.path("gone")).unwrap();
    a.flush();
    lab.server().set_faults(Faults {
        forbidden: vec!["DeleteObject".to_owned(), "DeleteObjects".to_owned()],
        ..Faults::default()
    });
    let before = stored(&lab);
    let err = wait::until("a sweep would delete", SOON, || {
        let output = try_sweep(&lab, &[]);
        (!output.status.success()).then(|| String::from_utf8(output.stderr).unwrap())
    });
    for word in ["s3:DeleteObject", "grant it"] {
        assert!(err.contains(word), "{word:?} is not in {err}");
    }
    assert_eq!(stored(&lab), before);
    lab.server().set_faults(Faults::default());
    sweep_until(&lab, "deleted", sum);
    let late = lab.machine("late");
    tree::assert_same_but_dir_times(&tree::read(a.root()), &tree::read(late.root()));
}

#[test]
fn a_machine_that_slept_for_longer_than_the_window_publishes_nothing_that_is_gone() {
    let lab = lab(StoreKind::S3);
    let a = lab.machine("a");
    file(&a.path("first"), b"so that all connections are made");
    a.flush();
    let b = lab.machine("b");
    let before = stored(&lab);
    let log = || {
        lab.objects()
            .iter()
            .filter(|object| object.key.contains("/log/"))
            .count()
    };
    let segments = log();
    // What it does next, it does slowly: it falls asleep between the upload and the segment.
    lab.server().set_faults(Faults {
        latency_ms: 1500,
        ..Faults::default()
    });
    let bytes = Rng::seeded(10).bytes(200_000);
    file(&a.path("slept"), &bytes);
    let uploaded = wait::until("the blob is in the bucket", SOON, || {
        stored(&lab).into_keys().find(|key| !before.contains_key(key))
    });
    let pid = Pid::from_raw(a.id() as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    assert_eq!(log(), segments, "it was published already");
    lab.server().set_faults(Faults::default());
    wait::until("its blob is deleted", SOON, || {
        sweep(&lab, &[]);
        (!stored(&lab).contains_key(&uploaded)).then_some(())
    });
    kill_process(pid, Signal::CONT).unwrap();
    b.until_content("slept", &bytes);
    a.flush();
    let late = lab.machine("late");
    assert!(content(&late.path("slept")) == bytes);
    assert!(
        a.log().contains("it is uploaded again"),
        "it did not notice that the blob is gone"
    );
    lab.assert_blobs_match_their_names();
}

#[test]
fn a_sweep_that_waits_deletes_what_it_condemned() {
    let lab = lab(StoreKind::File);
    let a = lab.machine("a");
    let sum = a_few_files(&a, "gone", &mut Rng::seeded(11));
    a.flush();
    fs::remove_dir_all(a.path("gone")).unwrap();
    a.flush();
    wait::until("all is unused and old", SOON, || {
        (bytes(&sweep(&lab, &["--dry-run"]), "condemned") >= sum).then_some(())
    });
    let report = sweep(&lab, &["--wait"]);
    assert!(
        bytes(&report, "condemned") >= sum && bytes(&report, "deleted") >= sum,
        "{report:#}"
    );
    assert!(stored(&lab).is_empty());
}

#[test]
fn a_window_of_a_store_in_use_counts_when_all_machines_know_it() {
    let lab = Lab::new(StoreKind::File);
    let a = lab.machine("a");
    a_few_files(&a, "gone", &mut Rng::seeded(12));
    a.flush();
    fs::remove_dir_all(a.path("gone")).unwrap();
    a.flush();
    // Machines may still go by a week.
    let report = sweep(&lab, &["--window", "1h"]);
    assert_eq!(report["window_seconds"], 7 * 24 * 3600);
    assert_eq!(report["used"], report["all"], "its names were deleted just now");
    let output = try_sweep(&lab, &["--window", "3s"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("at least 4 s"));
    let absent = Lab::new(StoreKind::File);
    let output = try_sweep(&absent, &["--dry-run", "--window", "1d"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no casmount store yet"));
}
