//! Stores whose blobs a lifecycle rule deletes by their age: what is used stays, what is not used reads as a miss.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs::{self, File},
    process::Output,
    time::Duration,
};

use lab::{Lab, StoreKind};
use s3server::Faults;
use support::{
    machine::Machine,
    posix::{content, file},
    rng::Rng,
    wait,
};

on_both_stores!(
    what_is_used_outlives_the_rule_and_the_rest_reads_as_a_miss_and_can_be_made_again,
    what_exists_already_is_young_before_a_name_says_so,
    a_store_with_a_rule_is_not_swept_and_may_be_swept_again,
    a_rule_and_a_snapshot_refuse_each_other,
    whoever_keeps_young_may_be_killed_at_any_moment,
    whoever_sets_the_retention_may_be_killed_at_any_moment,
    a_daemon_that_starts_while_its_store_is_away_keeps_young_what_is_used,
    a_job_that_begins_while_its_store_is_away_and_ends_soon_keeps_young_what_it_used,
);

const LIFETIME: Duration = Duration::from_secs(40);
const WINDOW: &str = "4s";
/// For so long a machine believes at most that what it saw in the store is there.
const BELIEVED: Duration = Duration::from_secs(2);
const SOON: Duration = Duration::from_secs(180);

fn sweep(lab: &Lab, args: &[&str]) -> Output {
    let spec = lab.spec("sweeper");
    let mut command = spec.command();
    command.arg("sweep").args(args).args(&spec.args);
    wait::run(&mut command, SOON)
}

#[track_caller]
fn sweep_says(lab: &Lab, args: &[&str], code: i32, words: &[&str]) {
    let output = sweep(lab, args);
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
}

fn write_files(machine: &Machine, below: &str, count: usize, rng: &mut Rng) -> Vec<Vec<u8>> {
    fs::create_dir_all(machine.path(below)).unwrap();
    // Large ones, ones of an object of their own, and small ones that share a pack.
    let sizes = [3_000_000, 100_000, 2000];
    let contents: Vec<_> = (0..count)
        .map(|number| rng.bytes(sizes[number % sizes.len()] + number))
        .collect();
    for (number, bytes) in contents.iter().enumerate() {
        file(&machine.path(format!("{below}/{number}")), bytes);
    }
    machine.flush();
    contents
}

/// A store with a rule, and what a first machine wrote into it.
fn lab_with(kind: StoreKind, write: impl FnOnce(&Machine)) -> Lab {
    let lab = Lab::new(kind);
    sweep_says(&lab, &["--window", WINDOW], 0, &[]);
    let mut first = lab.machine("first");
    write(&first);
    first.unmount();
    let words = match kind {
        StoreKind::S3 => [
            "put-bucket-lifecycle-configuration",
            "\"Prefix\": \"blobs/\"",
            "\"Days\": 1",
        ],
        StoreKind::File => ["find /", "/packs -type f", "-mtime +1 -delete"],
    };
    sweep_says(&lab, &["--retention", "lifecycle=40s"], 0, &words);
    lab
}

fn blob_count(lab: &Lab) -> usize {
    let all = lab.objects().into_iter();
    all.filter(|object| object.key.starts_with("blobs/") || object.key.starts_with("packs/"))
        .count()
}

fn what_is_used_outlives_the_rule_and_the_rest_reads_as_a_miss_and_can_be_made_again(kind: StoreKind) {
    const FILES: usize = 12;
    let mut rng = Rng::seeded(1);
    let (mut used, mut unused) = (Vec::new(), Vec::new());
    let lab = lab_with(kind, |first| {
        used = write_files(first, "used", FILES, &mut rng);
        unused = write_files(first, "unused", FILES, &mut rng);
    });
    let before = blob_count(&lab);
    lab.age_blobs(LIFETIME / 4);
    let b = lab.machine("b");
    for (number, bytes) in used.iter().enumerate() {
        b.until_content(&format!("used/{number}"), bytes);
    }
    // Some are read again and again, others touched as Bazel does when it has a hit: none is fetched again.
    let began = std::time::Instant::now();
    wait::until("what nobody uses is gone", SOON, || {
        for number in 0..FILES {
            let used = File::open(b.path(format!("used/{number}"))).unwrap();
            if number % 2 == 1 {
                used.set_modified(std::time::SystemTime::now()).unwrap();
            }
        }
        lab.expire_blobs(LIFETIME);
        // Long enough for everything that is not refreshed.
        (began.elapsed() > LIFETIME && blob_count(&lab) < before).then_some(())
    });
    let c = lab.machine("c");
    for (number, bytes) in used.iter().enumerate() {
        assert!(content(&c.path(format!("used/{number}"))) == *bytes, "{number}");
    }
    for number in 0..FILES {
        let path = c.path(format!("unused/{number}"));
        let read = fs::read(&path);
        let errno = read.as_ref().err().and_then(std::io::Error::raw_os_error);
        assert!(
            matches!(errno, Some(libc::ENOENT | libc::ESTALE)),
            "{number}: {read:?}"
        );
    }
    if kind == StoreKind::S3 {
        assert!(lab.server().counts().of("CopyObject") > 0);
    }
    let uses = &b.status()["uses"];
    assert_eq!(uses["lifetime_seconds"], LIFETIME.as_secs(), "{uses:#}");
    assert!(
        uses["kept_young_millis"].is_u64() && uses["kept_young_blobs"].as_u64() > Some(0),
        "{uses:#}"
    );
    assert!(b.control_ok("status", &[]).contains("\nuses        kept young "));
    file(&c.path("unused/0"), &unused[0]);
    c.flush();
    b.until_content("unused/0", &unused[0]);
    lab.assert_blobs_match_their_names();
}

fn what_exists_already_is_young_before_a_name_says_so(kind: StoreKind) {
    let mut rng = Rng::seeded(2);
    let mut contents = Vec::new();
    let lab = lab_with(kind, |first| {
        contents = write_files(first, "first", 6, &mut rng);
        fs::remove_dir_all(first.path("first")).unwrap();
        first.flush();
    });
    // Nobody names it any more, and it is nearly due.
    lab.age_blobs(LIFETIME * 3 / 4);
    let a = lab.machine("a");
    fs::create_dir(a.path("again")).unwrap();
    for (number, bytes) in contents.iter().enumerate() {
        file(&a.path(format!("again/{number}")), bytes);
    }
    a.flush();
    // What was refreshed or uploaded is younger than half of the lifetime now.
    lab.expire_blobs(LIFETIME / 2);
    let late = lab.machine("late");
    for (number, bytes) in contents.iter().enumerate() {
        assert!(
            content(&late.path(format!("again/{number}"))) == *bytes,
            "{number}"
        );
    }
}

fn a_store_with_a_rule_is_not_swept_and_may_be_swept_again(kind: StoreKind) {
    let lab = lab_with(kind, |first| {
        write_files(first, "d", 1, &mut Rng::seeded(3));
    });
    sweep_says(
        &lab,
        &[],
        2,
        &["lifecycle rule", "no sweep is needed", "--retention sweep"],
    );
    sweep_says(
        &lab,
        &["--expire", "30d"],
        0,
        &["volume main: nothing expires before"],
    );
    sweep_says(
        &lab,
        &["--retention", "lifecycle=7s"],
        2,
        &["at least two windows"],
    );
    sweep_says(&lab, &["--retention", "never"], 2, &["lifecycle=30d for example"]);
    sweep_says(
        &lab,
        &["--retention", "sweep", "--expire", "30d"],
        2,
        &["cannot be used with"],
    );
    let a = lab.machine("a");
    assert_eq!(fs::read_dir(a.path("d")).unwrap().count(), 1);
    sweep_says(&lab, &["--retention", "sweep"], 0, &["kept by sweeps"]);
    sweep_says(&lab, &[], 0, &["deleted 0 objects"]);
}

fn a_rule_and_a_snapshot_refuse_each_other(kind: StoreKind) {
    let lab = lab_with(kind, |first| {
        write_files(first, "e", 1, &mut Rng::seeded(4));
    });
    let snapshot = |args: &[&str]| {
        let spec = lab.spec("keeper");
        let mut program = spec.command();
        program.arg("snapshot").args(args).args(&spec.args);
        wait::run(&mut program, SOON)
    };
    let refused = snapshot(&["create", "--tag", "one"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("kept by a lifecycle rule"), "{said}");
    sweep_says(&lab, &["--retention", "sweep"], 0, &[]);
    let made = snapshot(&["create", "--tag", "one"]);
    assert!(made.status.success(), "{made:?}");
    sweep_says(
        &lab,
        &["--retention", "lifecycle=40s"],
        2,
        &["one of volume main"],
    );
    assert!(snapshot(&["delete", "one", "--yes"]).status.success());
    sweep_says(&lab, &["--retention", "lifecycle=40s"], 0, &[]);
}

fn whoever_keeps_young_may_be_killed_at_any_moment(kind: StoreKind) {
    const FILES: usize = 9;
    let mut rng = Rng::seeded(5);
    let (mut used, mut unused) = (Vec::new(), Vec::new());
    let lab = lab_with(kind, |first| {
        used = write_files(first, "used", FILES, &mut rng);
        unused = write_files(first, "unused", 3, &mut rng);
    });
    let before = blob_count(&lab);
    let mut b = lab.machine("b");
    let began = std::time::Instant::now();
    let mut lives = 0_u64;
    wait::until("what nobody uses is gone", SOON, || {
        // Lives end while it waits, asks, refreshes; some before the first telling.
        lives += 1;
        let until = std::time::Instant::now() + Duration::from_millis(lives * 700 % 5000);
        loop {
            for number in 0..FILES {
                drop(File::open(b.path(format!("used/{number}"))).unwrap());
            }
            lab.expire_blobs(LIFETIME);
            if std::time::Instant::now() >= until {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        b.kill9();
        b.restart();
        (began.elapsed() > LIFETIME * 2 && blob_count(&lab) < before).then_some(())
    });
    assert!(lives > 5, "{lives} lives");
    let c = lab.machine("c");
    for (number, bytes) in used.iter().enumerate() {
        assert!(content(&c.path(format!("used/{number}"))) == *bytes, "{number}");
    }
    assert!(fs::read(c.path("unused/0")).is_err());
    lab.assert_blobs_match_their_names();
}

fn whoever_sets_the_retention_may_be_killed_at_any_moment(kind: StoreKind) {
    let lab = Lab::new(kind);
    sweep_says(&lab, &["--window", "4s"], 0, &[]);
    let mut first = lab.machine("first");
    let contents = write_files(&first, "d", 3, &mut Rng::seeded(6));
    first.unmount();
    if kind == StoreKind::S3 {
        lab.server().set_faults(Faults {
            latency_ms: 15,
            ..Faults::default()
        });
    }
    let says = || {
        let object = lab
            .objects()
            .into_iter()
            .find(|object| object.key == "casmount.json");
        let json: serde_json::Value = serde_json::from_slice(&object.expect("it is a store").bytes).unwrap();
        assert_eq!(json["format"] == 2, json["lifetime_millis"] == 40_000, "{json:#}");
        json["lifetime_millis"].is_u64()
    };
    let mut seen = std::collections::BTreeSet::new();
    let mut lived = Duration::ZERO;
    let mut killed = 0;
    wait::until("kills fell before and after it was set", SOON, || {
        lived += Duration::from_millis(2);
        let is_set = says();
        let wanted = if is_set { "sweep" } else { "lifecycle=40s" };
        let spec = lab.spec("sweeper");
        let mut command = spec.command();
        command.args(["sweep", "--retention", wanted]).args(&spec.args);
        if wait::kill_after(&mut command, lived) {
            killed += 1;
            seen.insert((is_set, says()));
        } else {
            lived = Duration::ZERO;
        }
        // The smallest window that a kill must hit is between the change and the end.
        let fell = |changed: bool| seen.iter().any(|(before, after)| (before != after) == changed);
        (killed > 20 && fell(false) && fell(true)).then_some(())
    });
    if kind == StoreKind::S3 {
        lab.server().set_faults(Faults::default());
    }
    // What was broken off is done by a repeat, and either way all is there.
    for (wanted, words) in [
        ("lifecycle=40s", "kept by a lifecycle rule"),
        ("sweep", "kept by sweeps"),
    ] {
        sweep_says(&lab, &["--retention", wanted], 0, &[words]);
        assert_eq!(says(), wanted != "sweep");
        let late = lab.machine(wanted.split('=').next().unwrap());
        for (number, bytes) in contents.iter().enumerate() {
            assert!(content(&late.path(format!("d/{number}"))) == *bytes, "{number}");
        }
    }
}

#[test]
fn a_retention_whose_reply_is_lost_is_set_and_said() {
    let lab = Lab::new(StoreKind::S3);
    sweep_says(&lab, &["--window", "4s"], 0, &[]);
    lab.server().set_faults(Faults {
        only: vec!["PutObject".to_owned()],
        lost_reply: 1.0,
        ..Faults::default()
    });
    sweep_says(
        &lab,
        &["--retention", "lifecycle=40s"],
        0,
        &["put-bucket-lifecycle-configuration"],
    );
    sweep_says(&lab, &["--retention", "sweep"], 0, &["kept by sweeps"]);
    sweep_says(&lab, &["--retention", "lifecycle=40s"], 0, &[]);
    // One that was never done is not said to be.
    lab.server().set_faults(Faults {
        only: vec!["PutObject".to_owned()],
        error_500: 1.0,
        ..Faults::default()
    });
    let refused = sweep(&lab, &["--retention", "sweep"]);
    assert!(!refused.status.success());
    assert!(refused.stdout.is_empty(), "{refused:?}");
    lab.server().set_faults(Faults::default());
    sweep_says(&lab, &[], 2, &["lifecycle rule"]);
}

fn a_daemon_that_starts_while_its_store_is_away_keeps_young_what_is_used(kind: StoreKind) {
    const FILES: usize = 6;
    let mut rng = Rng::seeded(9);
    let mut used = Vec::new();
    let lab = lab_with(kind, |first| used = write_files(first, "used", FILES, &mut rng));
    let mut b = lab.machine("b");
    for (number, bytes) in used.iter().enumerate() {
        b.until_content(&format!("used/{number}"), bytes);
    }
    b.unmount();
    lab.set_down(true);
    b.restart();
    lab.set_down(false);
    let began = std::time::Instant::now();
    wait::until("a lifetime and a half is over", SOON, || {
        for number in 0..FILES {
            File::open(b.path(format!("used/{number}"))).unwrap();
        }
        lab.expire_blobs(LIFETIME);
        (began.elapsed() > LIFETIME * 3 / 2).then_some(())
    });
    let c = lab.machine("c");
    for (number, bytes) in used.iter().enumerate() {
        assert!(content(&c.path(format!("used/{number}"))) == *bytes, "{number}");
    }
}

fn a_job_that_begins_while_its_store_is_away_and_ends_soon_keeps_young_what_it_used(kind: StoreKind) {
    const FILES: usize = 6;
    let mut rng = Rng::seeded(10);
    let mut used = Vec::new();
    let lab = lab_with(kind, |first| used = write_files(first, "used", FILES, &mut rng));
    let mut job = lab.machine("job");
    for (number, bytes) in used.iter().enumerate() {
        job.until_content(&format!("used/{number}"), bytes);
    }
    job.unmount();
    // Not old enough to go.
    lab.age_blobs(LIFETIME * 3 / 4);
    let seen = std::time::Instant::now();
    wait::until("what was seen before is to be asked for again", SOON, || {
        (seen.elapsed() > BELIEVED).then_some(())
    });
    lab.set_down(true);
    job.restart();
    for number in 0..FILES {
        File::open(job.path(format!("used/{number}"))).unwrap();
    }
    lab.set_down(false);
    job.unmount();
    lab.expire_blobs(LIFETIME / 2);
    let late = lab.machine("late");
    for (number, bytes) in used.iter().enumerate() {
        assert!(
            content(&late.path(format!("used/{number}"))) == *bytes,
            "{number}"
        );
    }
}
