//! Sweeps of logs, catalogs and the blobs of forks that keep their own, beside real mounts.
//!
//! The window is as short as it can be, and no log is kept for longer; nothing here waits for it to pass but for what
//! passing it brings about.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;
#[path = "support/volumes.rs"]
mod volumes;

use std::{collections::BTreeMap, fs, os::unix::fs::symlink, path::Path, time::Duration};

use lab::{Lab, StoreKind};
use s3server::Faults;
use serde_json::Value;
use support::{
    machine::Machine,
    posix::{content, file},
    rng::Rng,
    tree, wait,
};
use volumes::{fork, machine, objects_of, offline, offline_json, offline_ok, until_caught_up};

on_both_stores!(
    what_a_catalog_has_leaves_the_log_and_every_machine_shows_the_same,
    a_mount_goes_on_when_the_catalog_that_it_was_opened_with_is_gone,
    a_fork_of_now_keeps_the_catalog_that_it_begins_with,
    what_a_fork_keeps_apart_is_swept_as_well,
);

/// How long it may take until a sweep did what is due after two windows.
const SOON: Duration = Duration::from_secs(120);

fn sweep(lab: &Lab, args: &[&str]) -> Value {
    offline_json(lab, &[&["sweep", "--log-age=0s"], args].concat())
}

fn lab(kind: StoreKind) -> Lab {
    let lab = Lab::new(kind);
    assert_eq!(sweep(&lab, &["--window", "4s"])["window_seconds"], 4);
    lab
}

/// Makes a catalog of all that is in the log.
fn compact(lab: &Lab, volume: &str) -> Value {
    offline_json(lab, &["compact", "--trail=0s", "--volume", volume])
}

fn keys(lab: &Lab, volume: &str, folder: &str) -> Vec<String> {
    let keys = objects_of(lab, volume).into_keys();
    keys.filter(|key| key.contains(folder)).collect()
}

fn log(lab: &Lab, volume: &str) -> Vec<String> {
    keys(lab, volume, "/log/")
}

/// Sweeps until `done`; returns all that was deleted: objects, segments, parts of catalogs.
#[track_caller]
fn sweep_until(lab: &Lab, what: &str, mut done: impl FnMut() -> bool) -> [u64; 3] {
    let mut sums = [0; 3];
    wait::until(what, SOON, || {
        let report = sweep(lab, &[]);
        let deleted = ["/deleted", "/of_logs/deleted", "/of_catalogs/deleted"];
        for (sum, pointer) in sums.iter_mut().zip(deleted) {
            let objects = report.pointer(&format!("{pointer}/objects"));
            *sum += objects.and_then(Value::as_u64).unwrap();
        }
        done().then_some(())
    });
    sums
}

fn some_files(root: &Path, below: &str, rng: &mut Rng) {
    fs::create_dir_all(root.join(below)).unwrap();
    for (name, len) in [("large", 3_000_000), ("middle", 200_000)] {
        file(&root.join(format!("{below}/{name}")), &rng.bytes(len));
    }
    for number in 0..10 {
        file(&root.join(format!("{below}/{number}")), &rng.bytes(3000));
    }
}

fn what_a_catalog_has_leaves_the_log_and_every_machine_shows_the_same(kind: StoreKind) {
    let lab = lab(kind);
    let mut rng = Rng::seeded(1);
    let a = machine(&lab, "a", "main");
    some_files(a.root(), "kept", &mut rng);
    some_files(a.root(), "gone", &mut rng);
    a.flush();
    let mut away = machine(&lab, "away", "main");
    let before = tree::read(away.root());
    tree::assert_same_but_dir_times(&tree::read(a.root()), &before);
    // Nobody hears of this but itself, until it is back.
    away.unmount();

    fork(&lab, "job", "main", &[]);
    let mut job = machine(&lab, "job", "job");
    some_files(job.root(), "of the job", &mut rng);
    fs::remove_file(job.path("kept/0")).unwrap();
    fs::rename(job.path("kept/1"), job.path("renamed")).unwrap();
    job.flush();
    job.unmount();
    compact(&lab, "main");
    fs::remove_dir_all(a.path("gone")).unwrap();
    fs::rename(a.path("kept/2"), a.path("moved")).unwrap();
    file(&a.path("kept/3"), b"changed");
    a.flush();
    let expected = tree::read(a.root());
    let differs = offline_ok(&lab, &["volume", "diff", "main", "job"]);
    assert!(
        differs.contains("D kept/0\n") && differs.contains("A renamed\n"),
        "{differs}"
    );
    for volume in ["main", "job"] {
        assert_eq!(compact(&lab, volume)["outcome"], "compacted");
    }
    let (segments, catalogs) = (log(&lab, "main").len() + log(&lab, "job").len(), 2);
    let [all, logs, parts] = sweep_until(&lab, "both logs are gone", || {
        log(&lab, "main").is_empty()
            && log(&lab, "job").is_empty()
            && keys(&lab, "main", "/catalogs/").len() == catalogs
    });
    assert_eq!(logs, segments as u64);
    assert!(parts >= 2 && all >= logs + parts, "{all} {logs} {parts}");

    // Without a mount.
    assert_eq!(offline_ok(&lab, &["volume", "diff", "main", "job"]), differs);
    let told = offline_ok(&lab, &["volume", "log", "main"]);
    assert!(
        told.starts_with("what was published up to ") && told.lines().count() == 1,
        "{told}"
    );
    // A machine that begins, and one that knows what it saw long ago.
    let cold = machine(&lab, "cold", "main");
    tree::assert_same_but_dir_times(&expected, &tree::read(cold.root()));
    away.restart();
    tree::assert_same_but_dir_times(&expected, &tree::read(away.root()));
    assert!(
        !away.path("gone").exists(),
        "what was deleted meanwhile came back"
    );
    // A fork from catalogs alone, and what it said in its parent.
    let again = machine(&lab, "job again", "job");
    assert!(content(&again.path("renamed")) == content(&a.path("kept/1")));
    let of_the_job = tree::read(&again.path("of the job"));
    assert_eq!(of_the_job.len(), 12);
    offline_ok(&lab, &["fork", "promote", "job", "--into", "main"]);
    for machine in [&a, &cold, &away] {
        machine.until_gone("kept/0");
        until_caught_up(machine);
        tree::assert_same_but_dir_times(&of_the_job, &tree::read(&machine.path("of the job")));
        assert!(!machine.path("kept/1").exists() && machine.path("renamed").exists());
    }
    // The log goes on behind the catalogs.
    file(&cold.path("later"), b"later");
    cold.flush();
    for machine in [&a, &away] {
        machine.until_content("later", b"later");
    }
    let now = tree::read(a.root());
    tree::assert_same_but_dir_times(&now, &tree::read(cold.root()));
    tree::assert_same_but_dir_times(&now, &tree::read(away.root()));
    lab.assert_blobs_match_their_names();
}

fn a_mount_goes_on_when_the_catalog_that_it_was_opened_with_is_gone(kind: StoreKind) {
    let lab = lab(kind);
    let mut rng = Rng::seeded(2);
    let a = machine(&lab, "a", "main");
    // So many that the last directories are in another part than the first.
    fs::create_dir(a.path("many")).unwrap();
    for number in 0..6000 {
        symlink("x".repeat(250), a.path(format!("many/{number}"))).unwrap();
    }
    some_files(a.root(), "one", &mut rng);
    some_files(a.root(), "two/deep", &mut rng);
    fs::hard_link(a.path("one/0"), a.path("two/same")).unwrap();
    a.flush();
    compact(&lab, "main");
    // It knows the root directory's catalog, and has looked at nothing.
    let mut lazy = lab.spec("lazy").arg("--catalog-prefetch=0").start();
    let before = keys(&lab, "main", "/catalogs/");
    fs::remove_file(a.path("one/1")).unwrap();
    file(&a.path("two/deep/2"), b"changed");
    file(&a.path("three"), b"3");
    a.flush();
    compact(&lab, "main");
    let expected = tree::read(a.root());
    sweep_until(&lab, "the first catalog is gone", || {
        let now = keys(&lab, "main", "/catalogs/");
        // Its root, and the parts in which something changed.
        before.iter().filter(|key| !now.contains(*key)).count() >= 3
    });
    until_caught_up(&lazy);
    tree::assert_same_but_dir_times(&expected, &tree::read(lazy.root()));
    assert!(
        lazy.log().contains("directories are loaded from the newest one"),
        "it did not need to"
    );
    lazy.kill9();
    lazy.restart();
    tree::assert_same_but_dir_times(&expected, &tree::read(lazy.root()));
}

fn a_fork_of_now_keeps_the_catalog_that_it_begins_with(kind: StoreKind) {
    let lab = lab(kind);
    let mut rng = Rng::seeded(3);
    let a = machine(&lab, "a", "main");
    some_files(a.root(), "old", &mut rng);
    a.flush();
    compact(&lab, "main");
    file(&a.path("since"), b"since the catalog");
    a.flush();
    fork(&lab, "then", "main", &["--at", "now"]);
    fork(&lab, "over", "then", &[]);
    let before = tree::read(a.root());
    let pinned = keys(&lab, "main", "/catalogs/");
    fs::remove_dir_all(a.path("old")).unwrap();
    fs::remove_file(a.path("since")).unwrap();
    some_files(a.root(), "other", &mut rng);
    a.flush();
    let seen = log(&lab, "main");
    compact(&lab, "main");
    let differs = offline_ok(&lab, &["volume", "diff", "then", "main"]);
    let mut last = 0;
    sweep_until(&lab, "what the fork does not see is gone from the log", || {
        let now = log(&lab, "main");
        last = now.len();
        now.len() < seen.len()
    });
    assert!(last > 0, "the fork sees segments that are gone");
    // Two more rounds, each of which may delete what the one before condemned.
    for number in 0..2 {
        file(&a.path("other/0"), format!("{number}").as_bytes());
        a.flush();
        compact(&lab, "main");
        let newest = log(&lab, "main");
        sweep_until(&lab, "the newest segment is gone", || {
            let now = log(&lab, "main");
            newest.last().is_some_and(|key| !now.contains(key))
        });
    }
    let now = keys(&lab, "main", "/catalogs/");
    assert!(
        pinned.iter().all(|key| now.contains(key)),
        "{pinned:?} of {now:?}"
    );
    for volume in ["then", "over"] {
        let fork = machine(&lab, volume, volume);
        tree::assert_same_but_dir_times(&before, &tree::read(fork.root()));
    }
    let after: Vec<_> = differs.lines().collect();
    let found = offline_ok(&lab, &["volume", "diff", "then", "main"]);
    assert_eq!(found.lines().collect::<Vec<_>>(), after);
    // When the fork is deleted, all that it kept goes.
    for volume in ["over", "then"] {
        offline_ok(&lab, &["fork", "delete", volume, "--yes"]);
    }
    sweep_until(&lab, "what the fork kept is gone", || {
        let now = keys(&lab, "main", "/catalogs/");
        pinned.iter().all(|key| !now.contains(key)) && log(&lab, "main").is_empty()
    });
    let cold = machine(&lab, "cold", "main");
    tree::assert_same_but_dir_times(&tree::read(a.root()), &tree::read(cold.root()));
}

/// What a fork has of its own, by key.
fn apart(lab: &Lab, volume: &str) -> BTreeMap<String, Vec<u8>> {
    let prefix = format!("volumes/{volume}/");
    let mut objects = objects_of(lab, volume);
    objects.retain(|key, _| {
        let rest = &key[prefix.len()..];
        rest.starts_with("blobs/") || rest.starts_with("packs/")
    });
    objects
}

fn what_a_fork_keeps_apart_is_swept_as_well(kind: StoreKind) {
    let lab = lab(kind);
    let a: Machine = machine(&lab, "a", "main");
    some_files(a.root(), "of main", &mut Rng::seeded(4));
    a.flush();
    fork(&lab, "pr", "main", &["--own-prefix"]);
    let mut pr = machine(&lab, "pr", "pr");
    some_files(pr.root(), "kept", &mut Rng::seeded(5));
    pr.flush();
    let kept = apart(&lab, "pr");
    some_files(pr.root(), "gone", &mut Rng::seeded(6));
    pr.flush();
    let both = apart(&lab, "pr");
    assert!(both.len() > kept.len() && !kept.is_empty());
    fs::remove_dir_all(pr.path("gone")).unwrap();
    pr.flush();
    sweep_until(&lab, "what was deleted in the fork is gone", || {
        apart(&lab, "pr").len() == kept.len()
    });
    assert_eq!(apart(&lab, "pr"), kept);
    // The same content again is stored again.
    some_files(pr.root(), "again", &mut Rng::seeded(6));
    pr.flush();
    let expected = tree::read(pr.root());
    let other = machine(&lab, "other", "pr");
    tree::assert_same_but_dir_times(&expected, &tree::read(other.root()));
    drop(other);
    pr.unmount();

    let delete = ["fork", "delete", "pr", "--yes"];
    match kind {
        // A machine that comes back late writes what nobody reads any more.
        StoreKind::File => {
            offline_ok(&lab, &delete);
            for (key, bytes) in both {
                lab.tamper(&key, Some(bytes));
            }
        }
        // The deletion is broken off when the fork is marked as deleted.
        StoreKind::S3 => {
            lab.server().set_faults(Faults {
                forbidden: vec!["DeleteObject".to_owned(), "DeleteObjects".to_owned()],
                ..Faults::default()
            });
            assert!(!offline(&lab, &delete).status.success());
            lab.server().set_faults(Faults::default());
            assert!(objects_of(&lab, "pr").len() > both.len());
        }
    }
    sweep_until(&lab, "only the settings of the deleted fork are left", || {
        objects_of(&lab, "pr").len() == 1
    });
    assert_eq!(
        objects_of(&lab, "pr").into_keys().collect::<Vec<_>>(),
        ["volumes/pr/volume.json"]
    );
    let cold = machine(&lab, "cold", "main");
    tree::assert_same_but_dir_times(&tree::read(a.root()), &tree::read(cold.root()));
}
