//! What the tests of snapshots share: making and mounting them, sweeping, and a volume with some of everything.
//!
//! Included by test programs that also have `crate::lab` and `crate::volumes`.

// Each test program uses a part of this.
#![allow(dead_code)]

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    time::{Duration, SystemTime},
};

use serde_json::Value;

use crate::{
    lab::Lab,
    support::{
        machine::{Machine, MachineSpec},
        posix::file,
        rng::Rng,
        wait,
    },
    volumes::{offline, offline_json, spec},
};

/// How long something may take that is waited for.
pub const SOON: Duration = Duration::from_secs(90);

pub const TAG: &str = "release=1.2";

/// Makes a snapshot.
#[track_caller]
pub fn create(lab: &Lab, volume: &str, tag: &str) -> Value {
    within_window(
        lab,
        &["snapshot", "create", "--tag", tag, "--volume", volume, "--json"],
    )
}

/// Runs a command that must end within half the window of the store, which a busy machine may need some tries for
/// when that is the shortest there is.
#[track_caller]
pub fn within_window(lab: &Lab, args: &[&str]) -> Value {
    wait::until(&format!("{args:?} ends in time"), SOON, || {
        let output = offline(lab, args);
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        if err.contains("took longer than half the window") {
            return None;
        }
        assert_eq!(output.status.code(), Some(0), "{args:?}: {err}");
        Some(serde_json::from_slice(&output.stdout).expect("it is JSON"))
    })
}

pub fn snapshot_spec(lab: &Lab, name: &str, volume: &str, tag: &str) -> MachineSpec {
    spec(lab, name, volume).arg(format!("--snapshot={tag}"))
}

pub fn snapshot(lab: &Lab, name: &str, volume: &str, tag: &str) -> Machine {
    snapshot_spec(lab, name, volume, tag).start()
}

#[track_caller]
pub fn compact(lab: &Lab, volume: &str) -> Value {
    offline_json(lab, &["compact", "--trail=0s", "--volume", volume])
}

pub fn remove(lab: &Lab, part: &str) {
    for object in lab.objects() {
        if object.key.contains(part) {
            lab.tamper(&object.key, None);
        }
    }
}

pub fn set_mtime(path: &Path, seconds: u64) {
    let time = SystemTime::UNIX_EPOCH + Duration::new(seconds, 123_456_789);
    fs::File::open(path).unwrap().set_modified(time).unwrap();
}

/// Some of everything.
pub fn fill(root: &Path) {
    for dir in ["empty", "a/deep/er", "b", "gone", "moved"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    for number in 0..200 {
        file(
            &root.join(format!("b/{number:03}")),
            format!("{number}").as_bytes(),
        );
    }
    file(&root.join("large"), &Rng::seeded(1).bytes(5_000_000));
    for name in ["a/one", "a/deep/two", "a/deep/er/three", "gone/x", "moved/y"] {
        file(&root.join(name), name.as_bytes());
    }
    symlink("../large", root.join("a/link")).unwrap();
    symlink("nowhere at all", root.join("dangling")).unwrap();
    fs::hard_link(root.join("a/one"), root.join("b/same as one")).unwrap();
    fs::set_permissions(root.join("a/deep"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(root.join("a/deep/two"), fs::Permissions::from_mode(0o4755)).unwrap();
    set_mtime(&root.join("a/deep/two"), 1_000_000_000);
}

/// Sweeps; a busy machine may need some tries within the shortest window.
#[track_caller]
pub fn sweep(lab: &Lab, args: &[&str]) -> Value {
    within_window(lab, &[&["sweep", "--json"], args].concat())
}
