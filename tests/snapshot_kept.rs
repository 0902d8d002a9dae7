//! What snapshots keep: beside sweeps, over forks, and when something of them cannot be read.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
#[path = "support/snapshots.rs"]
mod snapshots;
mod support;
#[path = "support/volumes.rs"]
mod volumes;

use std::{
    fs,
    time::{Duration, SystemTime},
};

use casmount::tier::{Body, Put};
use lab::{Lab, StoreKind};
use serde_json::{Value, json};
use snapshots::{SOON, TAG, compact, create, fill, remove, snapshot, snapshot_spec, sweep};
use support::{
    machine::Machine,
    posix::{content, file},
    rng::Rng,
    tree, wait,
};
use volumes::{
    assert_says, fork, machine, objects_of, offline_fails, offline_json, offline_ok, parent, refusal, stored,
    until_caught_up,
};

on_both_stores!(
    what_a_snapshot_names_is_not_swept_until_it_is_deleted,
    a_snapshot_of_a_fork_keeps_what_lies_below_it,
    a_snapshot_of_a_fork_of_a_moment_is_of_that_moment,
    one_that_is_killed_while_it_is_made_leaves_none_or_a_whole_one,
    a_snapshot_that_cannot_be_read_stops_a_sweep_and_can_be_deleted,
    a_snapshot_whose_catalog_is_gone_never_shows_another,
);

/// Puts an object where there may be one.
fn put(lab: &Lab, key: &str, bytes: &[u8]) {
    lab.with_bucket(async |bucket| {
        bucket.delete(key).await.unwrap();
        let put = bucket.put_new(key, Body::raw(bytes.to_vec())).await.unwrap();
        assert!(matches!(put, Put::Written(_)), "{key}");
    });
}

/// A store with the shortest window there is.
fn short_lab(kind: StoreKind) -> Lab {
    let lab = Lab::new(kind);
    sweep(&lab, &["--window", "4s"]);
    lab
}

/// Sweeps until at least so many bytes of `what` ("condemned", "deleted") are told in all.
#[track_caller]
fn sweep_until(lab: &Lab, what: &str, least: u64) -> u64 {
    let mut all = 0;
    wait::until(&format!("{least} bytes are {what}"), SOON, || {
        all += sweep(lab, &[])[what]["bytes"].as_u64().unwrap();
        (all >= least).then_some(all)
    })
}

/// Makes and removes something of no snapshot, and sweeps until it has gone: all that is as old would have, too.
#[track_caller]
fn sweep_all(lab: &Lab, live: &Machine, seed: u64) {
    let bait = live.path("bait");
    file(&bait, &Rng::seeded(seed).bytes(3_000_000));
    live.flush();
    fs::remove_file(&bait).unwrap();
    live.flush();
    sweep_until(lab, "deleted", 3_000_000);
}

fn what_a_snapshot_names_is_not_swept_until_it_is_deleted(kind: StoreKind) {
    let lab = short_lab(kind);
    let live = lab.machine("live");
    fill(live.root());
    // So long that its chunk list is an object of its own: only the list says what is in use.
    file(&live.path("huge"), &Rng::seeded(7).bytes(20_000_000));
    live.flush();
    let expected = tree::read(live.root());
    create(&lab, "main", TAG);
    create(&lab, "main", "again");
    for name in fs::read_dir(live.root()).unwrap() {
        let path = name.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }
    live.flush();
    compact(&lab, "main");
    sweep_all(&lab, &live, 2);
    let report = sweep(&lab, &["--dry-run"]);
    assert_eq!(report["snapshots"], 2);

    remove(&lab, "/log/");
    let late = snapshot(&lab, "late", "main", TAG);
    tree::assert_same_but_dir_times(&expected, &tree::read(late.root()));
    lab.assert_blobs_match_their_names();
    // One of two is enough.
    assert_eq!(
        offline_ok(&lab, &["snapshot", "delete", TAG, "--yes"]),
        "deleted snapshot release=1.2 of volume main\n"
    );
    sweep_all(&lab, &live, 3);
    let late = snapshot(&lab, "later", "main", "again");
    tree::assert_same_but_dir_times(&expected, &tree::read(late.root()));
    // And of none, all of it goes.
    let deleted = offline_json(&lab, &["snapshot", "delete", "again", "-y"]);
    assert_eq!(deleted, json!({"volume": "main", "tag": "again"}));
    sweep_until(&lab, "deleted", 25_000_000);
    assert_eq!(sweep(&lab, &["--dry-run"])["snapshots"], 0);
}

fn a_snapshot_of_a_fork_keeps_what_lies_below_it(kind: StoreKind) {
    let lab = short_lab(kind);
    let parent = parent(&lab);
    for (name, more) in [("pr-1", &["--own-prefix"][..]), ("pr-2", &[])] {
        fork(&lab, name, "main", more);
        let mut machine = machine(&lab, name, name);
        file(&machine.path("written"), b"by the fork");
        file(&machine.path("large of the fork"), &Rng::seeded(8).bytes(900_000));
        fs::remove_file(machine.path("deleted")).unwrap();
        fs::rename(machine.path("renamed"), machine.path("dir/moved")).unwrap();
        fs::remove_dir_all(machine.path("dir/deep")).unwrap();
        machine.flush();
        let expected = tree::read(machine.root());
        let made = create(&lab, name, TAG);
        assert_eq!(made["layers"][0]["volume"], name);
        assert_eq!(made["layers"][0]["own_prefix"], more.len() == 1);
        assert_eq!(made["layers"][1]["volume"], "main");

        // What was hidden stays hidden, whatever the parent makes there later.
        file(&parent.path("deleted"), b"again");
        fs::create_dir_all(parent.path("dir/deep")).unwrap();
        file(&parent.path("dir/deep/b"), b"again");
        file(&parent.path("written"), b"by the parent");
        let _ = fs::remove_file(parent.path("large"));
        parent.flush();
        file(&machine.path("written"), b"later");
        fs::remove_file(machine.path("large of the fork")).unwrap();
        machine.flush();
        compact(&lab, "main");
        compact(&lab, name);
        sweep_all(&lab, &parent, 4);
        let late = snapshot(&lab, &format!("late-{name}"), name, TAG);
        tree::assert_same_but_dir_times(&expected, &tree::read(late.root()));
        assert_says(&late.control_ok("status", &[]), &["\nover        main\n"]);

        // A volume with snapshots is not deleted.
        machine.unmount();
        let before = stored(&lab);
        let words = [name, "has snapshot release=1.2: delete it first"];
        offline_fails(&lab, &["fork", "delete", name, "--yes"], 1, &words);
        assert!(stored(&lab) == before);
        tree::assert_same_but_dir_times(&expected, &tree::read(late.root()));
        offline_ok(&lab, &["snapshot", "delete", TAG, "--volume", name, "--yes"]);
        offline_ok(&lab, &["fork", "delete", name, "--yes"]);
        let words = [name, "was deleted"];
        offline_fails(
            &lab,
            &["snapshot", "create", "--tag", "x", "--volume", name],
            1,
            &words,
        );
        file(&parent.path("large"), &vec![b'l'; 5_000_000]);
        parent.flush();
    }
}

fn a_snapshot_of_a_fork_of_a_moment_is_of_that_moment(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "then", "main", &["--at", "now"]);
    let expected = tree::read(parent.root());
    change_parent(&parent);
    compact(&lab, "main");
    create(&lab, "then", TAG);
    change_parent(&parent);
    let late = snapshot(&lab, "late", "then", TAG);
    tree::assert_same_but_dir_times(&expected, &tree::read(late.root()));
    // The fork itself is mounted as ever.
    let fork = machine(&lab, "fork", "then");
    tree::assert_same_but_dir_times(&expected, &tree::read(fork.root()));
}

fn change_parent(parent: &Machine) {
    let _ = fs::remove_file(parent.path("kept"));
    file(
        &parent.path("written"),
        format!("{:?}", SystemTime::now()).as_bytes(),
    );
    file(&parent.path("dir/new"), b"new");
    parent.flush();
}

fn one_that_is_killed_while_it_is_made_leaves_none_or_a_whole_one(kind: StoreKind) {
    let lab = Lab::new(kind);
    let live = lab.machine("live");
    fill(live.root());
    live.flush();
    let expected = tree::read(live.root());
    let maker = lab.spec("maker");
    let mut lived = Duration::ZERO;
    let mut killed = 0;
    // Each lives a little longer than the one before.
    wait::until("a snapshot is there", SOON, || {
        lived += Duration::from_millis(1);
        let mut command = maker.command();
        command
            .args(["snapshot", "create", "--tag", TAG])
            .args(&maker.args);
        killed += u32::from(wait::kill_after(&mut command, lived));
        let mut objects = lab.objects().into_iter();
        objects
            .any(|object| object.key.contains("/snapshots/"))
            .then_some(())
    });
    assert!(killed > 0);
    let late = snapshot(&lab, "late", "main", TAG);
    tree::assert_same_but_dir_times(&expected, &tree::read(late.root()));
    assert_eq!(sweep(&lab, &["--dry-run"])["snapshots"], 1);
}

fn a_snapshot_that_cannot_be_read_stops_a_sweep_and_can_be_deleted(kind: StoreKind) {
    let lab = short_lab(kind);
    let live = lab.machine("live");
    file(&live.path("file"), b"1");
    live.flush();
    let made = create(&lab, "main", TAG);
    let key = format!("volumes/main/snapshots/{TAG}.json");
    let root = format!(
        "volumes/main/catalogs/{}",
        made["layers"][0]["catalog"].as_str().unwrap()
    );
    let good = stored(&lab);
    let part = good
        .keys()
        .find(|key| key.contains("/catalogs/") && **key != root);
    let part = part.expect("it has a part").clone();
    let newer = String::from_utf8(good[&key].clone())
        .unwrap()
        .replace("\"version\": 1", "\"version\": 2");
    for (at, bytes, words) in [
        (
            &key,
            Some(newer.into_bytes()),
            "was made by a newer casmount (version 2",
        ),
        (&key, Some(b"{".to_vec()), "is damaged ("),
        (&root, None, "is gone: restore it"),
        (&root, Some(b"x".to_vec()), "is damaged ("),
        (&part, None, "is gone: restore it"),
        (&part, Some(b"x".to_vec()), "is damaged ("),
    ] {
        lab.tamper(at, bytes);
        let before = stored(&lab);
        let words = ["nothing was swept", &key, at.as_str(), words];
        offline_fails(&lab, &["sweep"], 1, &words);
        assert!(stored(&lab) == before, "a sweep that stopped did something");
        if *at != part {
            assert_says(&refusal(&snapshot_spec(&lab, "late", "main", TAG)), &words[2..]);
        }
        if *at == key {
            let listed = offline_json(&lab, &["snapshot", "list"]);
            assert_says(listed[0]["trouble"].as_str().unwrap(), &words[2..]);
            assert_eq!(listed[0]["as_of_millis"], Value::Null);
            assert_says(&offline_ok(&lab, &["snapshot", "list"]), &words[2..]);
        }
        put(&lab, at, &good[at]);
    }
    sweep(&lab, &[]);
    // Something else at such a place is nothing that is known.
    let odd = "volumes/main/snapshots/readme";
    put(&lab, odd, b"x");
    offline_fails(&lab, &["sweep"], 1, &["nothing was swept", odd]);
    lab.tamper(odd, None);
    // Deleting one that cannot be read lets sweeps go on.
    lab.tamper(&key, Some(b"{".to_vec()));
    offline_ok(&lab, &["snapshot", "delete", TAG, "--yes"]);
    sweep(&lab, &[]);

    // Whoever may write below a fork's own prefix alone cannot end sweeps, nor have a part count as read that was not.
    let made = create(&lab, "main", "good");
    let root = made["layers"][0]["catalog"].as_str().unwrap();
    fork(&lab, "pr-1", "main", &["--own-prefix"]);
    for (key, bytes) in objects_of(&lab, "main") {
        let lie = key.replace("volumes/main/", "volumes/pr-1/");
        if key.ends_with(root) {
            put(&lab, &lie, &bytes);
        } else if key.contains("/catalogs/") {
            put(&lab, &lie, b"garbage");
        } else if key.contains("/snapshots/") {
            let text = String::from_utf8(bytes).unwrap();
            let text = text.replace("\"volume\": \"main\"", "\"volume\": \"pr-1\"");
            put(&lab, &lie, text.as_bytes());
        }
    }
    put(&lab, "volumes/pr-1/snapshots/newer.json", b"{\"version\": 7}");
    fs::remove_file(live.path("file")).unwrap();
    live.flush();
    until_caught_up(&live);
    sweep_all(&lab, &live, 9);
    let late = snapshot(&lab, "late", "main", "good");
    assert_eq!(content(&late.path("file")), b"1");
}

fn a_snapshot_whose_catalog_is_gone_never_shows_another(kind: StoreKind) {
    let lab = Lab::new(kind);
    let live = lab.machine("live");
    // More names than a part has, so that the last directory is in another one than the root.
    for dir in ["a", "b", "z"] {
        fs::create_dir(live.path(dir)).unwrap();
    }
    for number in 0..4000 {
        let name = format!("{}/{number:0200}", ["a", "b"][number % 2]);
        fs::File::create(live.path(name)).unwrap();
    }
    file(&live.path("z/file"), b"then");
    live.flush();
    create(&lab, "main", TAG);
    let of_then: Vec<String> = stored(&lab)
        .into_keys()
        .filter(|key| key.contains("/catalogs/"))
        .collect();
    assert!(of_then.len() > 2, "one part: {of_then:?}");
    let shown = snapshot_spec(&lab, "shown", "main", TAG)
        .arg("--catalog-prefetch=0")
        .start();
    file(&live.path("z/file"), b"now");
    file(&live.path("a/new"), b"now");
    live.flush();
    compact(&lab, "main");
    for key in &of_then {
        lab.tamper(key, None);
    }
    let found = fs::read(shown.path("z/file"));
    assert!(found.is_err(), "{found:?}");
}
