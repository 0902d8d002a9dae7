//! Snapshots: a state of a volume under a tag, whatever becomes of the volume.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
#[path = "support/snapshots.rs"]
mod snapshots;
mod support;
#[path = "support/volumes.rs"]
mod volumes;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    process::Command,
    time::SystemTime,
};

use lab::{Lab, StoreKind};
use serde_json::{Value, json};
use snapshots::{SOON, TAG, compact, create, fill, remove, set_mtime, snapshot, snapshot_spec};
use support::{
    machine::{Machine, MachineSpec},
    posix::{content, file},
    tempdir, tree, wait,
};
use volumes::{
    assert_says, fork, is_absent, objects_of, offline_fails, offline_json, offline_ok, refusal, spec, stored,
};

on_both_stores!(
    a_snapshot_shows_what_was_there_whatever_comes_later,
    what_was_published_before_is_in_it_and_what_came_later_is_not,
    nothing_can_be_changed_in_a_snapshot,
    a_killed_daemon_comes_back_with_the_same_tree_and_numbers_also_without_its_store,
    a_cache_directory_belongs_to_one_snapshot,
    a_tag_is_made_once,
    what_is_wrong_is_refused_in_a_line,
    presets_are_those_of_the_moment,
);

/// Changes most of what [`fill`] made.
fn change(root: &Path) {
    fs::remove_dir_all(root.join("gone")).unwrap();
    fs::rename(root.join("moved"), root.join("a/moved")).unwrap();
    fs::remove_file(root.join("large")).unwrap();
    file(&root.join("a/one"), b"changed");
    file(&root.join("a/new"), b"new");
    for number in 0..100 {
        fs::remove_file(root.join(format!("b/{number:03}"))).unwrap();
    }
    fs::remove_file(root.join("dangling")).unwrap();
    fs::set_permissions(root.join("a/deep"), fs::Permissions::from_mode(0o755)).unwrap();
    set_mtime(&root.join("a/deep/two"), 1_500_000_000);
}

fn a_snapshot_shows_what_was_there_whatever_comes_later(kind: StoreKind) {
    let lab = Lab::new(kind);
    let live = lab.machine("live");
    fill(live.root());
    live.flush();
    // Some of it is in a catalog, some in the log alone.
    compact(&lab, "main");
    fs::create_dir(live.path("late")).unwrap();
    file(&live.path("late/file"), b"in the log alone");
    file(&live.path("b/150"), b"changed since the catalog");
    fs::remove_file(live.path("b/151")).unwrap();
    live.flush();
    let expected = tree::read(live.root());

    let made = create(&lab, "main", TAG);
    assert_eq!(made["tag"], TAG);
    assert_eq!(made["volume"], "main");
    assert_eq!(made["names"], expected.len() as u64, "{made:#}");
    assert_eq!(made["layers"].as_array().unwrap().len(), 1);
    assert!(made["created_by"].as_str().unwrap().contains('@'));
    let before = snapshot(&lab, "before", "main", TAG);
    tree::assert_same_but_dir_times(&expected, &tree::read(before.root()));

    change(live.root());
    live.flush();
    compact(&lab, "main");
    change_more(&live);
    compact(&lab, "main");
    assert_ne!(expected, tree::read(live.root()));
    // Not the log, nor what is newest in the volume.
    remove(&lab, "/log/");
    remove(&lab, "/head.json");

    tree::assert_same_but_dir_times(&expected, &tree::read(before.root()));
    let late = snapshot(&lab, "late", "main", TAG);
    tree::assert_same_but_dir_times(&expected, &tree::read(late.root()));
    let ino = |path: &str| fs::metadata(late.path(path)).unwrap().ino();
    assert_eq!(ino("a/one"), ino("b/same as one"));
    let status = late.status();
    assert_eq!(status["snapshot"]["tag"], TAG);
    assert_eq!(status["snapshot"]["as_of_millis"], made["as_of_millis"]);
    assert_eq!(status["read_only"], true);
    assert_eq!(status["layers"][0]["settled"], true);
    assert_eq!(status["layers"][0]["until_millis"], made["as_of_millis"]);
    assert_eq!(status["catalogs"][0]["catalog"], made["layers"][0]["catalog"]);
    let text = late.control_ok("status", &[]);
    assert_says(&text, &["\nsnapshot    release=1.2, as of 2", "read-only"]);
    assert_eq!(live.status()["snapshot"], Value::Null);

    let listed = offline_json(&lab, &["snapshot", "list"]);
    let expected = json!([{
        "volume": "main", "tag": TAG, "as_of_millis": made["as_of_millis"], "created_millis": made["created_millis"],
        "created_by": made["created_by"], "names": made["names"], "layers": made["layers"], "trouble": null,
    }]);
    assert_eq!(listed, expected);
    let text = offline_ok(&lab, &["snapshot", "list", "--volume", "main"]);
    assert_says(&text, &["main  release=1.2  as of 2", " names, made by "]);
}

fn change_more(live: &Machine) {
    fs::remove_dir_all(live.path("b")).unwrap();
    fs::remove_dir_all(live.path("late")).unwrap();
    live.flush();
}

fn what_was_published_before_is_in_it_and_what_came_later_is_not(kind: StoreKind) {
    let lab = Lab::new(kind);
    let machines = [lab.machine("a"), lab.machine("b")];
    for number in 0..6 {
        let machine = &machines[number % 2];
        file(&machine.path(format!("file {number}")), b"x");
        machine.flush();
        // Also while the newest catalog is replaced.
        std::thread::scope(|scope| {
            let compacting = (number >= 3).then(|| scope.spawn(|| compact(&lab, "main")));
            create(&lab, "main", &format!("v{number}"));
            if let Some(compacting) = compacting {
                compacting.join().unwrap();
            }
        });
    }
    let listed = offline_json(&lab, &["snapshot", "list"]);
    let tags: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["tag"].clone())
        .collect();
    assert_eq!(tags, ["v0", "v1", "v2", "v3", "v4", "v5"]);
    for number in [0, 3, 4] {
        let name = format!("late {number}");
        let late = snapshot(&lab, &name, "main", &format!("v{number}"));
        for file in 0..6 {
            let there = !is_absent(&late.path(format!("file {file}")));
            assert_eq!(there, file <= number, "file {file} in snapshot v{number}");
        }
    }
}

fn nothing_can_be_changed_in_a_snapshot(kind: StoreKind) {
    let lab = Lab::new(kind);
    let live = lab.machine("live");
    fill(live.root());
    live.flush();
    create(&lab, "main", TAG);
    let before = stored(&lab);
    let mut mounted = snapshot(&lab, "mounted", "main", TAG);
    let tree = tree::read(mounted.root());
    let at = |path: &str| mounted.path(path);
    assert_errno!(fs::write(at("new"), b"x"), EROFS);
    assert_errno!(fs::File::options().write(true).open(at("large")), EROFS);
    assert_errno!(fs::File::options().append(true).open(at("a/one")), EROFS);
    assert_errno!(fs::create_dir(at("dir")), EROFS);
    assert_errno!(fs::remove_file(at("a/one")), EROFS);
    assert_errno!(fs::remove_dir(at("empty")), EROFS);
    assert_errno!(fs::rename(at("a/one"), at("a/other")), EROFS);
    assert_errno!(fs::hard_link(at("a/one"), at("a/other")), EROFS);
    assert_errno!(symlink("x", at("a/other")), EROFS);
    assert_errno!(
        fs::set_permissions(at("large"), fs::Permissions::from_mode(0o600)),
        EROFS
    );
    assert_errno!(std::os::unix::fs::chown(at("large"), Some(1), Some(1)), EROFS);
    let now = SystemTime::now();
    assert_errno!(fs::File::open(at("large")).unwrap().set_modified(now), EROFS);
    let refused = mounted.control("commit", &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert_says(
        &String::from_utf8(refused.stderr).unwrap(),
        &["snapshot release=1.2", "nothing to commit"],
    );
    mounted.flush();
    tree::assert_same(&tree, &tree::read(mounted.root()));
    mounted.unmount_with(&["--success"]);
    assert!(stored(&lab) == before, "a mount of a snapshot wrote to the store");
}

fn a_killed_daemon_comes_back_with_the_same_tree_and_numbers_also_without_its_store(kind: StoreKind) {
    let lab = Lab::new(kind);
    let live = lab.machine("live");
    fill(live.root());
    live.flush();
    create(&lab, "main", TAG);
    let late = snapshot_spec(&lab, "late", "main", TAG).arg("--read-timeout=2s");
    let mut late = late.start();
    // Something is loaded and something is not.
    assert_eq!(content(&late.path("a/deep/two")), b"a/deep/two");
    let ino = fs::metadata(late.path("a/deep/two")).unwrap().ino();
    late.kill9();
    late.restart();
    assert_eq!(fs::metadata(late.path("a/deep/two")).unwrap().ino(), ino);
    let expected = tree::read(live.root());
    tree::assert_same_but_dir_times(&expected, &tree::read(late.root()));
    late.unmount();
    drop(live);

    lab.set_down(true);
    late.restart();
    assert_eq!(late.status()["snapshot"]["tag"], TAG);
    tree::assert_same_but_dir_times(&expected, &tree::read(late.root()));
    late.kill9();
    late.restart();
    assert_eq!(fs::metadata(late.path("a/deep/two")).unwrap().ino(), ino);
    tree::assert_same_but_dir_times(&expected, &tree::read(late.root()));
    lab.set_down(false);
    // A machine that was never here cannot know.
    lab.set_down(true);
    let cold = snapshot_spec(&lab, "cold", "main", TAG);
    refusal(&cold);
    lab.set_down(false);
    // What is not resident fails while the store is away, and is read when it is back.
    let half = snapshot_spec(&lab, "half", "main", TAG)
        .arg("--read-timeout=2s")
        .start();
    assert_eq!(fs::read_dir(half.path("a/deep/er")).unwrap().count(), 1);
    lab.set_down(true);
    assert_errno!(fs::read(half.path("a/deep/er/three")), EIO);
    lab.set_down(false);
    half.until_content("a/deep/er/three", b"a/deep/er/three");
}

fn a_cache_directory_belongs_to_one_snapshot(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut live = lab.machine("live");
    file(&live.path("file"), b"1");
    live.flush();
    create(&lab, "main", "v=1");
    file(&live.path("file"), b"2");
    live.flush();
    create(&lab, "main", "v=2");
    live.unmount();
    let mut first = snapshot(&lab, "first", "main", "v=1");
    assert_eq!(content(&first.path("file")), b"1");
    first.unmount();
    let binding = |cache: &Path| content(&cache.join("machine.json"));
    let cache = first.spec.cache_dir.clone();
    let before = binding(&cache);
    let refused = |spec: MachineSpec, words: &[&str]| {
        let cache = spec.cache_dir.clone();
        let before = binding(&cache);
        assert_says(&refusal(&spec), words);
        assert!(binding(&cache) == before);
    };
    let belongs = "belongs to volume main at snapshot v=1 (2";
    refused(
        spec(&lab, "as-volume", "main").cache_dir(&cache),
        &[belongs, "not to volume main: use another --cache-dir"],
    );
    refused(
        snapshot_spec(&lab, "as-other", "main", "v=2").cache_dir(&cache),
        &[belongs, "not to volume main at snapshot v=2"],
    );
    refused(
        snapshot_spec(&lab, "of-volume", "main", "v=1").cache_dir(&live.spec.cache_dir),
        &["belongs to volume main, not to volume main at snapshot v=1"],
    );
    // The same tag, made again, is another snapshot.
    offline_ok(&lab, &["snapshot", "delete", "v=1", "--yes"]);
    let gone = refusal(&first.spec);
    assert_says(&gone, &["volume main has no snapshot v=1"]);
    create(&lab, "main", "v=1");
    assert_says(
        &refusal(&first.spec),
        &[belongs, "not to volume main at snapshot v=1 (2"],
    );
    assert!(binding(&cache) == before);
    let again = snapshot(&lab, "again", "main", "v=1");
    assert_eq!(content(&again.path("file")), b"2");
}

fn a_tag_is_made_once(kind: StoreKind) {
    let lab = Lab::new(kind);
    let live = lab.machine("live");
    file(&live.path("file"), b"1");
    live.flush();
    // Many at once: one of them makes it.
    let spec = lab.spec("maker");
    let children: Vec<_> = (0..4)
        .map(|_| {
            let mut command: Command = spec.command();
            command
                .args(["snapshot", "create", "--tag", TAG])
                .args(&spec.args);
            std::thread::spawn(move || wait::run(&mut command, SOON))
        })
        .collect();
    let outputs: Vec<_> = children.into_iter().map(|child| child.join().unwrap()).collect();
    let made = outputs.iter().filter(|output| output.status.success()).count();
    assert_eq!(made, 1);
    let exists = "volume main has a snapshot release=1.2 already, and a tag is made once";
    for output in outputs.iter().filter(|output| !output.status.success()) {
        assert_eq!(output.status.code(), Some(1));
        assert_says(&String::from_utf8_lossy(&output.stderr), &[exists]);
    }
    let before = objects_of(&lab, "main");
    file(&live.path("file"), b"2");
    live.flush();
    offline_fails(&lab, &["snapshot", "create", "--tag", TAG], 1, &[exists]);
    let after = objects_of(&lab, "main");
    let tag =
        |objects: &BTreeMap<String, Vec<u8>>| objects[&format!("volumes/main/snapshots/{TAG}.json")].clone();
    assert!(tag(&before) == tag(&after));
    let late = snapshot(&lab, "late", "main", TAG);
    assert_eq!(content(&late.path("file")), b"1");
    // Another volume has tags of its own.
    fork(&lab, "pr-1", "main", &[]);
    create(&lab, "pr-1", TAG);
    let listed = offline_json(&lab, &["snapshot", "list"]);
    let volumes: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["volume"].clone())
        .collect();
    assert_eq!(volumes, ["main", "pr-1"]);
}

fn what_is_wrong_is_refused_in_a_line(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut live = lab.machine("live");
    file(&live.path("file"), b"1");
    live.flush();
    for bad in ["", "a/b", "../x", "a b", "=1", &"x".repeat(101)] {
        let words = ["is not a snapshot tag (a-z, A-Z, 0-9, '.', '_', '=' and '-'"];
        offline_fails(&lab, &["snapshot", "create", "--tag", bad], 2, &words);
    }
    offline_fails(&lab, &["snapshot", "create"], 2, &["--tag"]);
    let words = ["there is no volume other in this store"];
    offline_fails(
        &lab,
        &["snapshot", "create", "--tag", TAG, "--volume", "other"],
        1,
        &words,
    );
    let absent = ["volume main has no snapshot v=9; see which there are with: casmount snapshot list"];
    offline_fails(&lab, &["snapshot", "delete", "v=9", "--yes"], 1, &absent);
    assert_says(&refusal(&snapshot_spec(&lab, "absent", "main", "v=9")), &absent);
    create(&lab, "main", TAG);
    let words = ["deleting snapshot release=1.2 of volume main cannot be undone: say --yes"];
    offline_fails(&lab, &["snapshot", "delete", TAG], 2, &words);

    // What changes something means nothing in a snapshot.
    let usage = |spec: &MachineSpec, words: &[&str]| {
        let mut command = spec.mount_command();
        let output = wait::run(command.arg(&spec.mountpoint), SOON);
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
        assert_says(&err, words);
        assert!(!tempdir::mountpoints().contains(&spec.mountpoint));
    };
    let odd = snapshot_spec(&lab, "odd", "pr-1", TAG).arg("--fork-from=main");
    usage(&odd, &["--fork-from means nothing with snapshot release=1.2"]);
    let odd = snapshot_spec(&lab, "odd", "main", TAG).env("CASMOUNT_COMMIT", "on-success");
    usage(
        &odd,
        &["--commit on-success means nothing with snapshot release=1.2"],
    );
    let odd = spec(&lab, "odd", "main").env("CASMOUNT_SNAPSHOT", "a/b");
    usage(&odd, &["CASMOUNT_SNAPSHOT", "is not a snapshot tag"]);
    assert!(!odd.cache_dir.exists());

    // The setting has its other two sources, as all have.
    file(&live.path("file"), b"2");
    live.unmount();
    let by_variable = spec(&lab, "variable", "main")
        .env("CASMOUNT_SNAPSHOT", TAG)
        .start();
    assert_eq!(content(&by_variable.path("file")), b"1");
    let by_file = spec(&lab, "file", "main");
    file(
        &by_file.dir.join("config.toml"),
        format!("min-free = 0\nsnapshot = \"{TAG}\"\nread-only = false\n").as_bytes(),
    );
    let by_file = by_file.start();
    assert_eq!(content(&by_file.path("file")), b"1");
    assert_errno!(fs::write(by_file.path("new"), b"x"), EROFS);
}

fn presets_are_those_of_the_moment(kind: StoreKind) {
    let lab = Lab::new(kind);
    let live = lab.machine("live");
    fs::create_dir(live.path("cc")).unwrap();
    file(&live.path("cc/file"), b"1");
    live.flush();
    offline_ok(&lab, &["preset", "set", "cc=plain"]);
    create(&lab, "main", TAG);
    offline_ok(&lab, &["preset", "set", "cc=ccache"]);
    let mut late = snapshot(&lab, "late", "main", TAG);
    let shown = |machine: &Machine| machine.status()["presets"].clone();
    let expected = json!([{"dir": "cc", "preset": "plain", "origin": "volume"}]);
    assert_eq!(shown(&late), expected);
    late.unmount();
    lab.set_down(true);
    late.restart();
    assert_eq!(shown(&late), expected);
    lab.set_down(false);
}

/// Following asks every second while a mount is used and every ten seconds while it rests; this is longer than both.
const LONGER_THAN_A_POLL: u64 = 12;

#[test]
fn a_mount_of_a_snapshot_asks_for_what_is_read_and_for_nothing_else() {
    let lab = Lab::new(StoreKind::S3);
    let mut live = lab.machine("live");
    fill(live.root());
    live.flush();
    fork(&lab, "pr-1", "main", &[]);
    create(&lab, "main", TAG);
    create(&lab, "pr-1", TAG);
    live.unmount();
    let used = snapshot(&lab, "used", "main", TAG);
    let idle = snapshot(&lab, "idle", "pr-1", TAG);
    let expected = tree::read(used.root());
    lab.server().reset_counts();
    let since = idle.counter("/uptime_seconds");
    wait::until("the mounts were there for a while", SOON, || {
        tree::assert_same(&expected, &tree::read(used.root()));
        assert!(is_absent(&used.path("nothing")));
        used.flush();
        (idle.counter("/uptime_seconds") > since + LONGER_THAN_A_POLL).then_some(())
    });
    let counts = lab.server().counts();
    assert_eq!(counts.total(), 0, "{counts:?}");
    // What was not read yet is asked for, by GETs alone: directories and bytes.
    assert_eq!(content(&idle.path("a/deep/er/three")), b"a/deep/er/three");
    let counts = lab.server().counts();
    assert!((1..10).contains(&counts.total()), "{counts:?}");
    assert_eq!(counts.of("GetObject"), counts.total(), "{counts:?}");
}
