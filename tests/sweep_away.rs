//! Machines that were away for longer than the window of sweeps: what they uploaded and did not publish may be gone.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{collections::BTreeSet, fs, path::PathBuf, time::Duration};

use lab::{Lab, StoreKind};
use s3server::{Faults, RestrictedKey};
use serde_json::Value;
use support::{
    machine::Machine,
    posix::{content, file},
    rng::Rng,
    wait,
};

on_both_stores!(a_file_that_is_neither_here_nor_in_the_store_is_not_published_and_all_others_are);

const SOON: Duration = Duration::from_secs(120);

#[track_caller]
fn sweep(lab: &Lab, args: &[&str]) {
    let spec = lab.spec("sweeper");
    let mut command = spec.command();
    command.arg("sweep").args(args).args(&spec.args);
    wait::run_ok(&mut command, SOON);
}

/// The objects that have a blob alone.
fn blobs(lab: &Lab) -> BTreeSet<String> {
    let keys = lab.objects().into_iter().map(|object| object.key);
    keys.filter(|key| key.starts_with("blobs/")).collect()
}

/// One that may write everything but packs.
fn key_without_packs() -> RestrictedKey {
    let policy = r#"{ "Version": "2012-10-17", "Statement": [
        { "Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"], "Resource": "*" },
        { "Effect": "Deny", "Action": "s3:PutObject", "Resource": "*/packs/*" } ] }"#;
    RestrictedKey {
        access_key: "no-packs".to_owned(),
        secret_key: "secret".to_owned(),
        policy: policy.to_owned(),
    }
}

/// A machine with a small cache whose packs the store does not take.
fn machine_without_packs(lab: &Lab, kind: StoreKind) -> Machine {
    let spec = lab.spec("a").arg("--cache-size").arg("64M");
    let spec = match kind {
        StoreKind::S3 => spec
            .env("AWS_ACCESS_KEY_ID", "no-packs")
            .env("AWS_SECRET_ACCESS_KEY", "secret"),
        StoreKind::File => {
            fs::write(packs(lab), b"no directory").unwrap();
            spec
        }
    };
    spec.start()
}

/// Undoes what [`machine_without_packs`] did.
fn take_packs_again(machine: &mut Machine, lab: &Lab, kind: StoreKind) {
    match kind {
        StoreKind::S3 => {
            machine.kill9();
            let env = &mut machine.spec.env;
            env.retain(|(_, value)| value != "no-packs" && value != "secret");
            machine.restart();
        }
        StoreKind::File => fs::remove_file(packs(lab)).unwrap(),
    }
}

fn packs(lab: &Lab) -> PathBuf {
    PathBuf::from(lab.url().strip_prefix("file://").unwrap()).join("packs")
}

/// What is known of a file.
fn listed(machine: &Machine, path: &str) -> Value {
    let listed = machine.ls(path);
    let files = listed.as_array().or(listed["files"].as_array()).unwrap();
    files[0].clone()
}

fn a_file_that_is_neither_here_nor_in_the_store_is_not_published_and_all_others_are(kind: StoreKind) {
    let lab = Lab::with_keys(kind, vec![key_without_packs()]);
    sweep(&lab, &["--window", "4s"]);
    let mut a = machine_without_packs(&lab, kind);
    fs::create_dir(a.path("d")).unwrap();
    a.flush();
    // What is behind it is not published before it.
    for number in 0..20 {
        let bytes = format!("{number} goes into a pack");
        file(&a.path(format!("small-{number}")), bytes.as_bytes());
    }
    file(&a.path("lost"), &Rng::seeded(1).bytes(200_000));
    let uploaded = wait::until("its blob is in the store", SOON, || {
        let digest = listed(&a, "lost")["digest"].as_str()?.to_owned();
        let mut blobs = blobs(&lab).into_iter();
        blobs.find(|key| key.ends_with(&digest))
    });

    // What another machine published crowds it out of the cache, which may drop what the store has.
    let b = lab.machine("b");
    for number in 0..40 {
        let bytes = Rng::seeded(100 + number).bytes(2_000_000);
        file(&b.path(format!("filler-{number}")), &bytes);
    }
    b.flush();
    let mut number = 0;
    wait::until("it is not here any more", SOON, || {
        // One that did not arrive yet is read in the next round.
        drop(fs::read(a.path(format!("filler-{}", number % 40))));
        number += 1;
        (listed(&a, "lost")["residency"] == "remote").then_some(())
    });
    wait::until("a sweep deleted it", SOON, || {
        sweep(&lab, &[]);
        (!blobs(&lab).contains(&uploaded)).then_some(())
    });
    // Packs are taken again: nothing waits any more for what is behind the others.
    take_packs_again(&mut a, &lab, kind);
    file(&a.path("later"), &Rng::seeded(2).bytes(200_000));
    let flushed = a.control("flush", &["--deadline", "90s"]);
    let said = String::from_utf8_lossy(&flushed.stderr).into_owned();
    // Also if it was found out before the flush began; and it is told once.
    assert_eq!(flushed.status.code(), Some(1), "{said}");
    assert!(said.contains("1 file lost (see the log)"), "{said}");
    a.flush();
    a.until_gone("lost");
    assert_eq!(a.counter("/files/lost"), 1);
    assert!(
        a.control_ok("status", &[]).contains("LOST"),
        "status says nothing"
    );
    assert!(a.log().contains("a file is lost that was never published"));
    b.until_content("later", &Rng::seeded(2).bytes(200_000));
    assert!(!b.path("lost").exists(), "a name without its bytes was published");
    // It can be made again.
    file(&a.path("lost"), b"");
    fs::write(a.path("lost"), Rng::seeded(3).bytes(200_000)).unwrap();
    a.flush();
    b.until_content("lost", &Rng::seeded(3).bytes(200_000));
}

#[test]
fn what_waited_for_longer_than_deletions_are_kept_is_published_as_made_now() {
    let lab = Lab::new(StoreKind::S3);
    let a = lab.machine("a");
    file(&a.path("first"), b"1");
    a.flush();
    lab.set_down(true);
    let bytes = Rng::seeded(4).bytes(200_000);
    file(&a.path("waited"), &bytes);
    wait::until("it is sealed", SOON, || {
        (a.counter("/cache/dirty_blobs") > 0).then_some(())
    });
    // Eight days later, by the clock of the store, it is back.
    lab.server().set_faults(Faults {
        date_skew_secs: 8 * 24 * 3600,
        ..Faults::default()
    });
    let b = lab.machine("b");
    b.until_content("waited", &bytes);
    a.flush();
    assert!(a.log().contains("it counts as made now"), "{}", a.log());
    assert!(content(&a.path("waited")) == bytes);
}
