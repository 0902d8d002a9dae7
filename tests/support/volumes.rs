//! What the tests of forks share: machines on volumes, commands, and what is in the store.
//!
//! Included by test programs that also have `crate::lab`.

// Each test program uses a part of this.
#![allow(dead_code)]

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Output,
    time::{Duration, SystemTime},
};

use serde_json::Value;

use crate::{
    lab::Lab,
    support::{
        machine::{Machine, MachineSpec},
        posix::file,
        tempdir, wait,
    },
};

/// How long another machine may take when the test does not measure it.
pub const SOON: Duration = Duration::from_secs(30);

pub fn is_absent(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|err| err.raw_os_error() == Some(libc::ENOENT))
}

/// Waits until `machine` has read everything that is published now, of all of its layers.
#[track_caller]
pub fn until_caught_up(machine: &Machine) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    wait::until(&format!("{} has read all logs", machine.spec.name), SOON, || {
        let layers = machine.status()["layers"].clone();
        let caught_up =
            |layer: &Value| u128::from(layer["caught_up_millis"].as_u64().unwrap()) > now.as_millis();
        layers.as_array().unwrap().iter().all(caught_up).then_some(())
    });
}

pub fn spec(lab: &Lab, name: &str, volume: &str) -> MachineSpec {
    lab.spec(name).arg(format!("--volume={volume}"))
}

pub fn machine(lab: &Lab, name: &str, volume: &str) -> Machine {
    spec(lab, name, volume).start()
}

/// How long a command may take that works on the store alone.
const COMMAND: Duration = Duration::from_secs(120);

/// Runs a command that needs no mount.
pub fn offline(lab: &Lab, args: &[&str]) -> Output {
    let spec = lab.spec("offline");
    let mut command = spec.command();
    command.args(args).args(&spec.args);
    wait::run(&mut command, COMMAND)
}

/// Runs one that must succeed; returns what it printed.
#[track_caller]
pub fn offline_ok(lab: &Lab, args: &[&str]) -> String {
    let output = offline(lab, args);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {err}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs one that must succeed and prints JSON.
#[track_caller]
pub fn offline_json(lab: &Lab, args: &[&str]) -> Value {
    let text = offline_ok(lab, &[args, &["--json"]].concat());
    serde_json::from_str(&text).unwrap_or_else(|err| panic!("{args:?}: {err}: {text}"))
}

/// Runs one that must fail with `code` and say why in one line, with all of `words` in it.
#[track_caller]
pub fn offline_fails(lab: &Lab, args: &[&str], code: i32, words: &[&str]) {
    let output = offline(lab, args);
    let err = String::from_utf8(output.stderr).expect("messages are text");
    assert_eq!(output.status.code(), Some(code), "{args:?}: {err}");
    let last = err.lines().last().unwrap_or_default();
    assert!(last.starts_with("casmount: ") || code == 2, "{args:?}: {err}");
    assert_says(&err, words);
    assert!(output.stdout.is_empty(), "{args:?}");
}

pub fn try_fork(lab: &Lab, args: &[&str]) -> Output {
    offline(lab, &[&["fork", "create"], args].concat())
}

#[track_caller]
pub fn fork(lab: &Lab, name: &str, from: &str, more: &[&str]) -> String {
    offline_ok(lab, &[&["fork", "create", name, "--from", from], more].concat())
}

/// What is in the store of a volume.
pub fn objects_of(lab: &Lab, volume: &str) -> BTreeMap<String, Vec<u8>> {
    let prefix = format!("volumes/{volume}/");
    lab.objects()
        .into_iter()
        .filter(|object| object.key.starts_with(&prefix))
        .map(|object| (object.key, object.bytes))
        .collect()
}

/// A parent with a file of some chunks, a directory and a few small files.
pub fn parent(lab: &Lab) -> Machine {
    let parent = machine(lab, "parent", "main");
    fs::create_dir_all(parent.path("dir/deep")).unwrap();
    file(&parent.path("large"), &vec![b'l'; 5_000_000]);
    for name in ["kept", "deleted", "written", "renamed", "dir/a", "dir/deep/b"] {
        file(&parent.path(name), name.as_bytes());
    }
    parent.flush();
    parent
}

/// Runs a mount that must be refused; returns the one line that says why.
#[track_caller]
pub fn refusal(spec: &MachineSpec) -> String {
    let mut command = spec.mount_command();
    command
        .env("CASMOUNT_LOG_FILE", spec.dir.join("log"))
        .arg("--foreground")
        .arg(&spec.mountpoint);
    let output = wait::run(&mut command, Duration::from_secs(60));
    assert_eq!(output.status.code(), Some(1), "{}", output.status);
    let err = String::from_utf8(output.stderr).expect("messages are text");
    assert_eq!(err.lines().count(), 1, "not one line:\n{err}");
    assert!(!tempdir::mountpoints().contains(&spec.mountpoint));
    err
}

#[track_caller]
pub fn assert_says(line: &str, words: &[&str]) {
    for word in words {
        assert!(line.contains(word), "{line:?} does not say {word:?}");
    }
}

pub fn stored(lab: &Lab) -> BTreeMap<String, Vec<u8>> {
    let objects = lab.objects().into_iter();
    objects.map(|object| (object.key, object.bytes)).collect()
}
