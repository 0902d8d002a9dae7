//! What cannot be mounted is refused: one clear line, an exit code that is not 0, nothing changed.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use lab::{Lab, StoreKind};
use s3server::Faults;
use support::{
    machine::{Machine, MachineSpec},
    posix::{content, file},
    tempdir, tree, wait,
};

on_both_stores!(
    a_second_daemon_on_one_cache_directory,
    a_store_of_a_newer_format,
    a_cache_directory_of_a_newer_format,
    a_cache_directory_of_another_store,
    a_mountpoint_that_cannot_be,
    settings_that_mean_nothing,
);

type State = (Vec<(String, Vec<u8>)>, tree::Tree, Vec<std::path::PathBuf>);

/// Everything that a refused mount could have changed.
fn state(lab: &Lab) -> State {
    let mut objects: Vec<_> = lab
        .objects()
        .into_iter()
        .map(|object| (object.key, object.bytes))
        .collect();
    objects.sort();
    let mounted = tempdir::mountpoints()
        .into_iter()
        .filter(|point| point.starts_with(lab.dir()));
    // Only what no living daemon works in.
    let caches = lab.dir().join("still");
    let still = if caches.exists() {
        tree::read(&caches)
    } else {
        tree::Tree::new()
    };
    (objects, still, mounted.collect())
}

/// Runs a mount that must be refused; returns the one line that says why.
#[track_caller]
fn refusal(lab: &Lab, spec: &MachineSpec, mountpoint: &Path) -> String {
    let before = state(lab);
    let mut command = spec.mount_command();
    command
        .env("CASMOUNT_LOG_FILE", spec.dir.join("log"))
        .arg("--foreground")
        .arg(mountpoint);
    let start = Instant::now();
    let output = wait::run(&mut command, Duration::from_secs(60));
    assert!(!output.status.success(), "the mount succeeded");
    assert!(output.status.code().is_some(), "it was killed: {}", output.status);
    let err = String::from_utf8(output.stderr).expect("messages are text");
    let lines: Vec<_> = err.lines().filter(|line| !line.trim().is_empty()).collect();
    assert_eq!(lines.len(), 1, "not one line:\n{err}");
    assert!(
        !err.contains("panicked") && !err.contains("{ "),
        "not for people: {err}"
    );
    assert!(state(lab) == before, "a refused mount changed something: {err}");
    eprintln!("after {:?}: {}", start.elapsed(), lines[0]);
    lines[0].to_owned()
}

#[track_caller]
fn assert_says(line: &str, words: &[&str]) {
    let lower = line.to_lowercase();
    assert!(
        words.iter().any(|word| lower.contains(&word.to_lowercase())),
        "{line:?} says none of {words:?}"
    );
}

/// A machine that was used once and stopped; its cache directory is below `still`.
fn used_machine(lab: &Lab) -> Machine {
    let mut machine = lab.spec("used").cache_dir(&lab.dir().join("still/cache")).start();
    file(&machine.path("f"), b"kept");
    machine.unmount();
    machine
}

fn a_second_daemon_on_one_cache_directory(kind: StoreKind) {
    let lab = Lab::new(kind);
    let first = lab.machine("first");
    file(&first.path("f"), b"x");
    first.flush();
    let second = lab.spec("second").cache_dir(&first.spec.cache_dir);
    let line = refusal(&lab, &second, &second.mountpoint);
    assert_says(&line, &[&first.spec.cache_dir.display().to_string()]);
    assert_says(&line, &[&first.id().to_string(), "another", "in use"]);
    // A second mount over the living one is refused as well.
    let third = lab.spec("third");
    refusal(&lab, &third, first.root());
    assert_eq!(content(&first.path("f")), b"x");
}

fn a_store_of_a_newer_format(kind: StoreKind) {
    let lab = Lab::new(kind);
    let used = used_machine(&lab);
    let settings = lab
        .objects()
        .into_iter()
        .find(|object| object.key == "casmount.json");
    let settings = settings.expect("a store has its settings");
    let mut json: serde_json::Value = serde_json::from_slice(&settings.bytes).unwrap();
    json["format"] = 999.into();
    lab.tamper("casmount.json", Some(serde_json::to_vec(&json).unwrap()));
    for spec in [lab.spec("fresh"), used.spec.clone()] {
        let line = refusal(&lab, &spec, &spec.mountpoint);
        assert_says(&line, &["999", "newer"]);
    }
    lab.tamper("casmount.json", Some(b"not json".to_vec()));
    refusal(&lab, &used.spec, &used.spec.mountpoint);
    lab.tamper("casmount.json", Some(settings.bytes));
    let mut used = used;
    used.restart();
    assert_eq!(content(&used.path("f")), b"kept");
}

fn a_cache_directory_of_a_newer_format(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut used = used_machine(&lab);
    let format = used.spec.cache_dir.join("format");
    let text = fs::read_to_string(&format).unwrap();
    let newer = text.replace('1', "999");
    assert_ne!(newer, text);
    fs::write(&format, newer).unwrap();
    let line = refusal(&lab, &used.spec, &used.spec.mountpoint);
    assert_says(&line, &["newer", "999"]);
    fs::write(&format, text).unwrap();
    used.restart();
    assert_eq!(content(&used.path("f")), b"kept");
}

fn a_cache_directory_of_another_store(kind: StoreKind) {
    let (lab, other) = (Lab::new(kind), Lab::new(kind));
    let used = used_machine(&lab);
    let mut elsewhere = other.machine("elsewhere");
    file(&elsewhere.path("f"), b"other");
    elsewhere.unmount();
    let spec = other.spec("mixed").cache_dir(&used.spec.cache_dir);
    let cache_before = tree::read(&used.spec.cache_dir);
    let line = refusal(&other, &spec, &spec.mountpoint);
    assert_says(&line, &["another store", "other store", "belongs to"]);
    assert!(tree::read(&used.spec.cache_dir) == cache_before);
}

fn a_mountpoint_that_cannot_be(kind: StoreKind) {
    let lab = Lab::new(kind);
    let spec = lab.spec("a");
    let missing = lab.dir().join("missing");
    assert_says(&refusal(&lab, &spec, &missing), &["missing"]);
    assert!(!missing.exists());
    let plain = file(&lab.dir().join("plain"), b"x");
    assert_says(&refusal(&lab, &spec, &plain), &["not a directory", "plain"]);
    let full = lab.dir().join("full");
    fs::create_dir(&full).unwrap();
    file(&full.join("precious"), b"x");
    assert_says(&refusal(&lab, &spec, &full), &["not empty"]);
    assert_eq!(content(&full.join("precious")), b"x");
    // Its own cache directory would be hidden below the mount, and waited for.
    let inside = spec.clone().cache_dir(&spec.mountpoint.join("cache"));
    refusal(&lab, &inside, &spec.mountpoint);
}

fn settings_that_mean_nothing(kind: StoreKind) {
    let lab = Lab::new(kind);
    for (flag, value) in [
        ("--cache-size", "lots"),
        ("--store", "ftp://host/dir"),
        ("--store", "file://relative/dir"),
        ("--volume", "../escape"),
        ("--settle", "soon"),
    ] {
        let spec = lab.spec("a").arg(format!("{flag}={value}"));
        let mut command = spec.mount_command();
        command.arg("--foreground").arg(&spec.mountpoint);
        let output = wait::run(&mut command, Duration::from_secs(30));
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{flag} {value}: {err}");
        assert!(
            err.lines().next().is_some_and(|line| !line.is_empty()),
            "{flag} {value}: nothing said"
        );
    }
}

#[test]
fn commands_without_a_mount_say_so() {
    let lab = Lab::new(StoreKind::File);
    let spec = lab.spec("a");
    for command in ["status", "flush", "unmount"] {
        let output = wait::run(
            spec.command().arg(command).arg(&spec.mountpoint),
            Duration::from_secs(30),
        );
        assert_eq!(output.status.code(), Some(1), "{command}");
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(err.lines().count(), 1, "{command}: {err}");
        assert_says(&err, &[&spec.mountpoint.display().to_string()]);
    }
}

#[test]
fn a_bucket_that_does_not_exist() {
    let lab = Lab::new(StoreKind::S3);
    let spec = lab.spec_at("a", "s3://no-such-bucket-here");
    assert_says(&refusal(&lab, &spec, &spec.mountpoint), &["no-such-bucket-here"]);
    assert!(
        !spec.cache_dir.join("format").exists(),
        "a cache was bound to a store that is not there"
    );
}

#[test]
fn a_directory_that_cannot_be_a_store() {
    let lab = Lab::new(StoreKind::File);
    let plain = file(&lab.dir().join("plain"), b"x");
    let spec = lab.spec_at("a", &format!("file://{}/below", plain.display()));
    assert_says(&refusal(&lab, &spec, &spec.mountpoint), &["plain"]);
}

#[test]
fn a_server_that_is_not_there() {
    let lab = Lab::new(StoreKind::S3);
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let endpoint = format!("http://127.0.0.1:{port}");
    let spec = lab.spec("a").env("AWS_ENDPOINT_URL", &endpoint);
    let line = refusal(&lab, &spec, &spec.mountpoint);
    assert_says(&line, &["reach", "connect", "unavailable"]);
}

#[test]
fn credentials_without_permission() {
    let lab = Lab::new(StoreKind::S3);
    let mut used = lab.machine("used");
    file(&used.path("f"), b"x");
    used.unmount();
    for (operation, permission) in [
        ("GetObject", "s3:GetObject"),
        ("ListObjectsV2", "s3:ListBucket"),
        ("PutObject", "s3:PutObject"),
    ] {
        lab.server().set_faults(Faults {
            forbidden: vec![operation.to_owned()],
            ..Faults::default()
        });
        let spec = lab.spec(&format!("without-{operation}"));
        assert_says(&refusal(&lab, &spec, &spec.mountpoint), &[permission]);
    }
    // Absence must be knowable: 403 for a missing key means ListBucket is lacking.
    lab.server().set_faults(Faults {
        missing_is_403: true,
        ..Faults::default()
    });
    let spec = lab.spec("403");
    assert_says(&refusal(&lab, &spec, &spec.mountpoint), &["s3:ListBucket"]);
    lab.server().set_faults(Faults::default());

    let wrong = lab
        .spec("wrong-secret")
        .env("AWS_SECRET_ACCESS_KEY", "not the secret");
    assert_says(
        &refusal(&lab, &wrong, &wrong.mountpoint),
        &["credentials", "denied", "signature"],
    );
}

#[test]
fn a_server_without_conditional_writes_is_used_and_said() {
    let lab = Lab::new(StoreKind::S3);
    lab.server().set_faults(Faults {
        ignore_conditions: true,
        ..Faults::default()
    });
    let mut machine = lab.machine("a");
    file(&machine.path("f"), b"x");
    machine.flush();
    assert_says(&machine.log(), &["conditional"]);
    machine.unmount();
}
