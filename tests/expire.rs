//! Names that nobody uses leave a volume, beside real mounts; what is used stays, and blobs go with later sweeps.
//!
//! Times are as short as they can be told apart on a busy machine; every wait is for what passing time brings about.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs::{self, File},
    process::{Command, Output},
    time::{Duration, SystemTime},
};

use casmount::{
    base::id::MachineId,
    namespace::touch::format::{self, Told},
    tier::{Body, layout},
};
use lab::{Lab, StoreKind, as_user};
use serde_json::Value;
use support::{
    machine::Machine,
    posix::{content, file},
    rng::Rng,
    wait,
};

on_both_stores!(
    what_one_machine_uses_stays_for_all_and_the_rest_goes_with_its_blobs,
    what_is_used_is_told_when_the_mount_ends_and_only_when_somebody_wants_to_know,
    what_cannot_be_read_stops_an_expiry_before_anything_goes,
    an_expiry_that_is_killed_is_finished_by_the_next,
    what_was_told_below_a_fork_stays_when_the_fork_is_deleted,
);

/// How long names may be unused.
const UNUSED: &str = "10s";

const SOON: Duration = Duration::from_secs(180);

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

/// How many names expired now.
#[track_caller]
fn expire(lab: &Lab) -> u64 {
    let report = sweep(lab, &["--expire", UNUSED]);
    let volumes = report["expiry"].as_array().expect("there is one");
    volumes
        .iter()
        .map(|of| of["expired"]["names"].as_u64().unwrap())
        .sum()
}

fn told(lab: &Lab) -> Vec<String> {
    let keys = lab.objects().into_iter().map(|object| object.key);
    keys.filter(|key| key.contains("/touched/2")).collect()
}

/// A store with a short window and a volume, of which somebody wants to know what is used.
fn lab_with(kind: StoreKind, write: impl FnOnce(&Machine)) -> Lab {
    let lab = Lab::new(kind);
    sweep(&lab, &["--window", "4s"]);
    let mut first = lab.machine("first");
    write(&first);
    first.unmount();
    assert_eq!(expire(&lab), 0);
    lab
}

fn write_files(machine: &Machine, below: &str, count: usize, rng: &mut Rng) -> Vec<Vec<u8>> {
    fs::create_dir_all(machine.path(below)).unwrap();
    let contents: Vec<_> = (0..count).map(|number| rng.bytes(100_000 + number)).collect();
    for (number, bytes) in contents.iter().enumerate() {
        file(&machine.path(format!("{below}/{number}")), bytes);
    }
    machine.flush();
    contents
}

/// Uses files of a directory: the even ones by reading, the others as Bazel does when it has a hit.
fn use_files(machine: &Machine, below: &str, count: usize) {
    for number in 0..count {
        // One that is gone for a moment comes back.
        let Ok(file) = File::open(machine.path(format!("{below}/{number}"))) else {
            continue;
        };
        if number % 2 == 1 {
            let _ = file.set_modified(SystemTime::now());
        }
    }
}

fn what_one_machine_uses_stays_for_all_and_the_rest_goes_with_its_blobs(kind: StoreKind) {
    const FILES: usize = 20;
    let mut rng = Rng::seeded(1);
    let (mut used, mut unused) = (Vec::new(), Vec::new());
    let lab = lab_with(kind, |first| {
        used = write_files(first, "used", FILES, &mut rng);
        unused = write_files(first, "unused", FILES, &mut rng);
    });
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    for machine in [&a, &b] {
        machine.until_content("unused/0", &unused[0]);
    }
    let mut gone = 0;
    wait::until("all that is unused is gone", SOON, || {
        use_files(&b, "used", FILES);
        gone += expire(&lab);
        // Its directory was not empty when they went.
        (gone >= FILES as u64).then_some(())
    });
    for number in 0..FILES {
        a.until_gone(&format!("unused/{number}"));
        b.until_gone(&format!("unused/{number}"));
    }
    let sum: u64 = unused.iter().map(|bytes| bytes.len() as u64).sum();
    let mut deleted = 0;
    wait::until("its blobs are gone", SOON, || {
        use_files(&b, "used", FILES);
        deleted += sweep(&lab, &["--expire", UNUSED])["deleted"]["bytes"]
            .as_u64()
            .unwrap();
        (deleted >= sum).then_some(())
    });
    let late = lab.machine("late");
    for machine in [&a, &b, &late] {
        for (number, bytes) in used.iter().enumerate() {
            machine.until_content(&format!("used/{number}"), bytes);
        }
        machine.until_gone("unused/3");
    }
    assert!(!told(&lab).is_empty());
    let uses = &b.status()["uses"];
    assert_eq!(uses["expire_seconds"], 10, "{uses:#}");
    assert!(
        uses["told_until_millis"].as_u64() > uses["told_millis"].as_u64(),
        "{uses:#}"
    );
    assert!(b.control_ok("status", &[]).contains("\nuses        told "));
    lab.assert_blobs_match_their_names();
    // What went can be made again, by whoever wants it.
    fs::create_dir_all(a.path("unused")).unwrap();
    file(&a.path("unused/3"), &unused[3]);
    a.flush();
    b.until_content("unused/3", &unused[3]);
}

fn what_is_used_is_told_when_the_mount_ends_and_only_when_somebody_wants_to_know(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut a = lab.machine("a");
    write_files(&a, "d", 3, &mut Rng::seeded(2));
    a.unmount();
    let mut b = lab.machine("b");
    use_files(&b, "d", 3);
    assert!(b.status()["uses"]["expire_seconds"].is_null());
    b.unmount();
    assert!(told(&lab).is_empty(), "nobody asked");
    // So long that nobody tells before the end.
    let report = sweep(&lab, &["--expire", "30d"]);
    assert!(
        report["expiry"][0]["not_before_millis"].as_u64().is_some(),
        "{report:#}"
    );
    let mut reader = lab.spec("reader").arg("--read-only").start();
    content(&reader.path("d/1"));
    reader.unmount();
    assert!(told(&lab).is_empty(), "who only reads writes nothing");
    let mut c = lab.machine("c");
    content(&c.path("d/1"));
    // It has learned at its start that somebody wants to know, or learns it at its next.
    c.unmount();
    assert_eq!(told(&lab).len(), 1);
    let mut idle = lab.machine("idle");
    idle.unmount();
    assert_eq!(told(&lab).len(), 1, "nothing was used");
}

fn what_cannot_be_read_stops_an_expiry_before_anything_goes(kind: StoreKind) {
    let lab = lab_with(kind, |first| {
        write_files(first, "d", 2, &mut Rng::seeded(3));
    });
    let mut a = lab.machine("a");
    use_files(&a, "d", 2);
    wait::until("it is told", SOON, || (!told(&lab).is_empty()).then_some(()));
    a.unmount();
    let key = told(&lab).pop().unwrap();
    let good = lab
        .objects()
        .into_iter()
        .find(|object| object.key == key)
        .unwrap()
        .bytes;
    lab.tamper(&key, Some(good[..good.len() - 1].to_vec()));
    let err = wait::until("it would expire something", SOON, || {
        let output = try_sweep(&lab, &["--expire", UNUSED]);
        (!output.status.success()).then(|| String::from_utf8(output.stderr).unwrap())
    });
    for word in ["nothing expired in volume main", &key, "damaged"] {
        assert!(err.contains(word), "{word:?} is not in {err}");
    }
    let b = lab.machine("b");
    assert_eq!(fs::read_dir(b.path("d")).unwrap().count(), 2);
    // And what makes no sense is refused.
    for (args, word) in [
        (&["--expire", "1s"][..], "at least 4 s"),
        (&["--expire", "soon"], "not a duration"),
        (&["--volume", "main"], "--expire"),
    ] {
        let output = try_sweep(&lab, args);
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{err}");
        assert!(err.contains(word), "{word:?} is not in {err}");
    }
    let output = try_sweep(&lab, &["--expire", UNUSED, "--volume", "mian"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no volume mian"));
}

fn an_expiry_that_is_killed_is_finished_by_the_next(kind: StoreKind) {
    const FILES: usize = 300;
    let lab = lab_with(kind, |first| {
        fs::create_dir(first.path("d")).unwrap();
        for number in 0..FILES {
            file(&first.path(format!("d/{number}")), format!("{number}").as_bytes());
        }
        first.flush();
    });
    let a = lab.machine("a");
    wait::until("nothing but time keeps it", SOON, || {
        let report = sweep(&lab, &["--expire", UNUSED, "--dry-run"]);
        (report["expiry"][0]["expired"]["names"].as_u64()? >= FILES as u64).then_some(())
    });
    let mut lived = Duration::ZERO;
    let mut killed = 0;
    wait::until("a killed expiry took all", SOON, || {
        // An expiry of a store on a quick disk is done within some milliseconds.
        lived += Duration::from_millis(1);
        let mut command = sweep_command(&lab, &["--expire", UNUSED]);
        killed += u32::from(wait::kill_after(&mut command, lived));
        let left = fs::read_dir(a.path("d")).map_or(0, Iterator::count);
        (left == 0).then_some(())
    });
    assert!(killed > 0, "no kill found an expiry under way");
    // The directory may have gone as well, by a run that found it empty.
    let late = lab.machine("late");
    assert_eq!(fs::read_dir(late.path("d")).map_or(0, Iterator::count), 0);
    assert_eq!(
        sweep(&lab, &["--expire", UNUSED])["expiry"][0]["expired"]["names"],
        0
    );
}

fn make_fork(lab: &Lab) {
    let spec = lab.spec("forker");
    let mut fork = spec.command();
    fork.args(["fork", "create", "pr-1", "--from", "main", "--own-prefix"])
        .args(&spec.args);
    wait::run_ok(&mut fork, SOON);
}

fn delete_fork(lab: &Lab) {
    let spec = lab.spec("forker");
    let mut delete = spec.command();
    delete.args(["fork", "delete", "pr-1", "--yes"]).args(&spec.args);
    wait::run_ok(&mut delete, SOON);
}

fn what_was_told_below_a_fork_stays_when_the_fork_is_deleted(kind: StoreKind) {
    const FILES: usize = 4;
    let lab = lab_with(kind, |first| {
        write_files(first, "d", FILES, &mut Rng::seeded(6));
    });
    make_fork(&lab);
    // It is used for longer than names may be unused, as far as can be told.
    let marks = ["d", "d/0", "d/1"].map(|path| format::mark(path.as_bytes()));
    let good_for = format::MAX_GOOD_FOR_MILLIS;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let millis = now.as_millis() as u64;
    let told_of = Told::new(millis, good_for, marks.to_vec()).encode();
    lab.with_bucket(async |bucket| {
        let key = layout::touched("pr-1", millis, MachineId(7), 1);
        bucket.put_new(&key, Body::raw(told_of)).await.unwrap();
    });
    delete_fork(&lab);
    let keys = told(&lab);
    assert!(
        keys.len() == 1 && keys[0].starts_with("volumes/main/touched/"),
        "{keys:?}"
    );
    let mut gone = 0;
    wait::until("what nobody told of is gone", SOON, || {
        gone += expire(&lab);
        (gone >= FILES as u64 - 2).then_some(())
    });
    assert_eq!(gone, FILES as u64 - 2);
    let late = lab.machine("late");
    let mut left: Vec<_> = fs::read_dir(late.path("d"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["0", "1"]);
}

#[test]
fn what_a_pull_request_uses_of_main_is_told_where_it_may_write() {
    let lab = Lab::guarded();
    let mut first = lab.machine("first");
    write_files(&first, "d", 3, &mut Rng::seeded(5));
    first.unmount();
    sweep(&lab, &["--expire", "30d"]);
    make_fork(&lab);
    let job = |name: &str| as_user(lab.spec(name).arg("--volume=pr-1"), "pr");
    let mut job = job("job").start();
    content(&job.path("d/1"));
    job.unmount();
    let keys = told(&lab);
    assert!(
        keys.len() == 1 && keys[0].starts_with("volumes/pr-1/touched/"),
        "{keys:?}"
    );
    assert!(!job.log().contains("is not told"), "{}", job.log());
    delete_fork(&lab);
    let keys = told(&lab);
    assert!(
        keys.len() == 1 && keys[0].starts_with("volumes/main/touched/"),
        "{keys:?}"
    );
}
