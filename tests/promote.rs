//! Promoting a fork: what it says becomes a part of its parent, and nothing else does.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;
#[path = "support/volumes.rs"]
mod volumes;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    process::Stdio,
    time::Duration,
};

use casmount::{
    base::{digest::Digest, id::MachineId},
    namespace::{
        change::{Entry, EntryBlob, EntryChunks, PathChange},
        segment::{self, Head},
    },
    store::rows::NodeKind,
    tier::{Body, layout},
};
use lab::{Lab, StoreKind};
use serde_json::json;
use support::{
    posix::{content, file},
    rng::Rng,
    tree, wait,
};
use volumes::{
    assert_says, fork, is_absent, machine, objects_of, offline, offline_fails, offline_json, offline_ok,
    parent, stored, until_caught_up,
};

on_both_stores!(
    promoting_makes_the_forks_changes_the_parents_and_no_others,
    of_two_changes_of_a_path_the_later_one_stays,
    promoting_again_changes_nothing_and_takes_what_came_since,
    two_promotions_at_once_and_one_that_is_killed_do_no_harm,
    a_fork_of_a_fork_is_promoted_one_step_at_a_time,
    a_promotion_waits_for_nothing_and_loses_nothing_while_the_store_is_away,
    what_cannot_be_promoted_is_refused_and_nothing_is_written,
    a_name_whose_bytes_are_gone_is_not_promoted,
    a_stamp_that_a_fork_copied_from_its_parent_divides_no_machines,
);

fn promote(lab: &Lab, name: &str) -> String {
    offline_ok(lab, &["fork", "promote", name, "--into", "main"])
}

fn promoting_makes_the_forks_changes_the_parents_and_no_others(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    let fork = machine(&lab, "fork", "fork");
    let large = Rng::seeded(11).bytes(7_000_000);
    file(&fork.path("written"), b"by the fork");
    file(&fork.path("large"), &large);
    file(&fork.path("dir/deep/new"), b"new below");
    file(&fork.path("empty"), b"");
    fs::remove_file(fork.path("deleted")).unwrap();
    fs::rename(fork.path("renamed"), fork.path("dir/moved")).unwrap();
    fs::hard_link(fork.path("kept"), fork.path("linked")).unwrap();
    symlink("dir/moved", fork.path("link")).unwrap();
    fs::set_permissions(fork.path("dir"), fs::Permissions::from_mode(0o700)).unwrap();
    fork.flush();
    // What the parent changes elsewhere meanwhile is its own.
    file(&parent.path("dir/a"), b"of the parent");
    parent.flush();
    fork.until_content("dir/a", b"of the parent");
    let expected = tree::read(fork.root());
    let in_fork = objects_of(&lab, "fork");
    let before = objects_of(&lab, "main").len();

    let report = offline_json(&lab, &["fork", "promote", "fork", "--into", "main"]);
    assert_eq!(report["into"], "main");
    assert_eq!(report["removed"], 2, "{report}");
    assert_eq!(report["segments"], 1);
    assert_eq!(report["error"], json!(null));
    assert_eq!(objects_of(&lab, "main").len(), before + 1);
    assert!(objects_of(&lab, "fork") == in_fork, "promoting changed the fork");

    parent.until_content("dir/moved", b"renamed");
    until_caught_up(&parent);
    tree::assert_same_but_dir_times(&expected, &tree::read(parent.root()));
    let ino = |path: &str| fs::metadata(parent.path(path)).unwrap().ino();
    assert_eq!(ino("linked"), ino("kept"));
    until_caught_up(&fork);
    tree::assert_same_but_dir_times(&expected, &tree::read(fork.root()));
    let late = machine(&lab, "late", "main");
    tree::assert_same_but_dir_times(&expected, &tree::read(late.root()));
    assert_eq!(offline_json(&lab, &["volume", "diff", "main", "fork"]), json!([]));
    // And the parent goes on with what it got.
    file(&parent.path("written"), b"once more");
    parent.flush();
    late.until_content("written", b"once more");
}

fn of_two_changes_of_a_path_the_later_one_stays(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    let fork = machine(&lab, "fork", "fork");
    for name in ["kept", "written", "renamed"] {
        file(&fork.path(name), b"by the fork");
    }
    fs::remove_file(fork.path("deleted")).unwrap();
    fs::remove_file(fork.path("dir/a")).unwrap();
    fork.flush();
    file(&parent.path("kept"), b"later, by the parent");
    file(&parent.path("deleted"), b"later, by the parent");
    fs::remove_file(parent.path("renamed")).unwrap();
    parent.flush();
    fork.until_content("dir/deep/b", b"dir/deep/b");
    until_caught_up(&fork);
    // Later than what the parent did, because this machine has seen it.
    file(&fork.path("renamed"), b"later still, by the fork");
    fork.flush();

    promote(&lab, "fork");
    parent.until_content("written", b"by the fork");
    parent.until_content("renamed", b"later still, by the fork");
    parent.until_gone("dir/a");
    until_caught_up(&parent);
    let late = machine(&lab, "late", "main");
    for machine in [&parent, &late] {
        assert_eq!(content(&machine.path("kept")), b"later, by the parent");
        assert_eq!(content(&machine.path("deleted")), b"later, by the parent");
    }
    // In the fork, the fork's word goes on to count.
    assert_eq!(content(&fork.path("kept")), b"by the fork");
    assert!(is_absent(&fork.path("deleted")));
}

fn promoting_again_changes_nothing_and_takes_what_came_since(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    assert_eq!(
        promote(&lab, "fork"),
        "promoted 0 paths of volume fork into main\n"
    );
    let fork = machine(&lab, "fork", "fork");
    file(&fork.path("written"), b"by the fork");
    fork.flush();
    assert_eq!(
        promote(&lab, "fork"),
        "promoted 1 path of volume fork into main\n"
    );
    parent.until_content("written", b"by the fork");
    file(&parent.path("written"), b"changed since");
    parent.flush();
    promote(&lab, "fork");
    until_caught_up(&parent);
    assert_eq!(content(&parent.path("written")), b"changed since");
    file(&fork.path("second"), b"second");
    fs::remove_file(fork.path("kept")).unwrap();
    fork.flush();
    assert_eq!(
        promote(&lab, "fork"),
        "promoted 3 paths of volume fork into main, 1 of them removed\n"
    );
    parent.until_content("second", b"second");
    parent.until_gone("kept");
    assert_eq!(content(&parent.path("written")), b"changed since");
}

fn two_promotions_at_once_and_one_that_is_killed_do_no_harm(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    for name in ["a", "b"] {
        fork(&lab, name, "main", &[]);
        let fork = machine(&lab, name, name);
        file(&fork.path(name), name.as_bytes());
        file(&fork.path("written"), name.as_bytes());
        fs::remove_file(fork.path("deleted")).unwrap();
        fork.flush();
    }
    if let StoreKind::S3 = kind {
        // So that there is a moment between any two requests.
        lab.server().set_faults(s3server::Faults {
            latency_ms: 10,
            ..s3server::Faults::default()
        });
    }
    // Killed ever later, until it is too late.
    let mut whole = false;
    for killed_after in (0..).step_by(15) {
        let spec = lab.spec("killed");
        let mut command = spec.command();
        command
            .args(["fork", "promote", "a", "--into", "main"])
            .args(&spec.args);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = wait::ChildGuard(command.spawn().unwrap());
        let limit = Duration::from_millis(killed_after);
        let ended = wait::try_until(limit, || child.0.try_wait().unwrap());
        if let Some(status) = ended {
            assert!(status.success());
            whole = true;
            break;
        }
        assert!(killed_after < 30_000, "it never ends");
    }
    assert!(whole);
    std::thread::scope(|scope| {
        for name in ["a", "b", "a", "b"] {
            let lab = &lab;
            scope.spawn(move || promote(lab, name));
        }
    });
    for name in ["a", "b"] {
        parent.until_content(name, name.as_bytes());
    }
    parent.until_gone("deleted");
    // Of two forks, the one that wrote later.
    parent.until_content("written", b"b");
    let late = machine(&lab, "late", "main");
    until_caught_up(&parent);
    tree::assert_same_but_dir_times(&tree::read(parent.root()), &tree::read(late.root()));
    lab.assert_blobs_match_their_names();
}

fn a_fork_of_a_fork_is_promoted_one_step_at_a_time(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "middle", "main", &[]);
    fork(&lab, "top", "middle", &["--at", "now"]);
    let (middle, top) = (machine(&lab, "middle", "middle"), machine(&lab, "top", "top"));
    file(&middle.path("kept"), b"in the middle");
    middle.flush();
    file(&top.path("written"), b"at the top");
    top.flush();
    offline_fails(
        &lab,
        &["fork", "promote", "top", "--into", "main"],
        1,
        &[
            "volume top is a fork of volume middle, not of volume main",
            "promote it into middle",
        ],
    );
    offline_ok(&lab, &["fork", "promote", "top", "--into", "middle"]);
    middle.until_content("written", b"at the top");
    until_caught_up(&parent);
    assert_eq!(content(&parent.path("written")), b"written");
    promote(&lab, "middle");
    parent.until_content("written", b"at the top");
    parent.until_content("kept", b"in the middle");
}

fn a_promotion_waits_for_nothing_and_loses_nothing_while_the_store_is_away(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    let fork = machine(&lab, "fork", "fork");
    file(&fork.path("new"), b"new");
    fork.flush();
    lab.set_down(true);
    let output = offline(&lab, &["fork", "promote", "fork", "--into", "main"]);
    assert_eq!(output.status.code(), Some(1));
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(err.lines().count(), 1, "{err}");
    let output = fork.control("commit", &["--deadline", "3s"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    lab.set_down(false);
    let faulty = matches!(kind, StoreKind::S3);
    if faulty {
        // Most writes are done, and their replies are lost.
        lab.server().set_faults(s3server::Faults {
            seed: 3,
            lost_reply: 0.5,
            error_500: 0.2,
            ..s3server::Faults::default()
        });
    }
    let done = wait::try_until(Duration::from_secs(60), || {
        let output = offline(&lab, &["fork", "promote", "fork", "--into", "main"]);
        output.status.success().then_some(())
    });
    assert!(done.is_some());
    if faulty {
        lab.set_down(false);
    }
    parent.until_content("new", b"new");
    assert_eq!(content(&parent.path("kept")), b"kept");
}

fn what_cannot_be_promoted_is_refused_and_nothing_is_written(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut parent = parent(&lab);
    for name in ["fork", "other", "newer", "odd", "newer-segment", "damaged"] {
        fork(&lab, name, "main", &[]);
    }
    for name in ["newer-segment", "damaged"] {
        let mut machine = machine(&lab, name, name);
        file(&machine.path("f"), name.as_bytes());
        machine.flush();
        machine.unmount();
    }
    parent.unmount();
    lab.tamper(
        "volumes/newer/volume.json",
        Some(br#"{"version": 2, "layers": []}"#.to_vec()),
    );
    lab.tamper("volumes/odd/volume.json", Some(b"rubbish".to_vec()));
    for (name, at, byte) in [("newer-segment", 8, 2), ("damaged", 30, 0xff)] {
        let objects = objects_of(&lab, name);
        let (key, bytes) = objects.iter().find(|(key, _)| key.contains("/log/")).unwrap();
        let mut bytes = bytes.clone();
        bytes[at] ^= byte;
        lab.tamper(key, Some(bytes));
    }
    let before = stored(&lab);
    for (name, into, code, words) in [
        ("missing", "main", 1, &["no volume missing"][..]),
        ("main", "main", 1, &["volume main is no fork"]),
        ("fork", "fork", 1, &["a fork of volume main, not of volume fork"]),
        (
            "fork",
            "other",
            1,
            &["a fork of volume main, not of volume other"],
        ),
        ("fork", "missing", 1, &["not of volume missing"]),
        (
            "newer",
            "main",
            1,
            &["volume newer", "newer casmount", "version 2"],
        ),
        ("odd", "main", 1, &["volumes/odd/volume.json is damaged"]),
        (
            "newer-segment",
            "main",
            1,
            &["was written by a newer casmount (format 3)"],
        ),
        (
            "damaged",
            "main",
            1,
            &["segment volumes/damaged/log/", "is damaged"],
        ),
        ("../x", "main", 2, &["not a volume name"]),
    ] {
        offline_fails(&lab, &["fork", "promote", name, "--into", into], code, words);
    }
    offline_fails(&lab, &["fork", "promote", "fork"], 2, &["--into"]);
    assert!(before == stored(&lab), "a refused promotion wrote something");
}

fn a_name_whose_bytes_are_gone_is_not_promoted(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    let had: BTreeSet<String> = stored(&lab).into_keys().collect();
    fork(&lab, "fork", "main", &[]);
    let fork = machine(&lab, "fork", "fork");
    file(&fork.path("large"), &Rng::seeded(6).bytes(6_000_000));
    fork.flush();
    let bytes = |key: &String| key.starts_with("packs/") || key.starts_with("blobs/");
    let new = stored(&lab)
        .into_keys()
        .filter(|key| bytes(key) && !had.contains(key));
    let new: Vec<String> = new.collect();
    assert!(new.len() >= 2, "{new:?}");
    for name in ["a", "b"] {
        file(&fork.path(name), &Rng::seeded(5).bytes(3_000));
    }
    fork.flush();
    let before = objects_of(&lab, "main");
    lab.tamper(&new[1], None);
    let promote_it = ["fork", "promote", "fork", "--into", "main"];
    let output = offline(&lab, &promote_it);
    assert_eq!(output.status.code(), Some(1));
    let err = String::from_utf8(output.stderr).unwrap();
    assert_says(
        &err,
        &["the bytes of 1 file of volume fork are gone from the store, large first"],
    );
    assert_eq!(objects_of(&lab, "main"), before);
    // As the message says: without the name, the rest goes.
    fs::remove_file(fork.path("large")).unwrap();
    file(&fork.path("large"), b"made again");
    fork.flush();
    promote(&lab, "fork");
    parent.until_content("b", &Rng::seeded(5).bytes(3_000));
    parent.until_content("large", b"made again");
}

#[test]
fn the_cost_of_a_promotion_is_that_of_the_fork_alone() {
    let lab = Lab::new(StoreKind::S3);
    let parent = machine(&lab, "parent", "main");
    for round in 0..8 {
        for number in 0..40 {
            file(
                &parent.path(format!("f{round}-{number}")),
                format!("{round}-{number}").as_bytes(),
            );
        }
        parent.flush();
    }
    fork(&lab, "fork", "main", &[]);
    let mut fork = machine(&lab, "fork", "fork");
    for number in 0..200 {
        file(
            &fork.path(format!("new{number}")),
            format!("new {number}").as_bytes(),
        );
    }
    fork.flush();
    fork.unmount();
    drop(parent);
    let segments = objects_of(&lab, "fork").len() as u64 - 1;
    lab.server().reset_counts();
    promote(&lab, "fork");
    let counts = lab.server().counts();
    // The store, the volumes twice, the log, its segments, the packs, and one segment.
    assert!(counts.total() <= 16 + segments + 8, "{counts:?}");
    assert_eq!(counts.of("PutObject"), 1, "{counts:?}");
}

/// What the log of main says of `path`.
fn said_of(lab: &Lab, path: &str) -> PathChange {
    let log = objects_of(lab, "main").into_iter();
    let segments = log.filter(|(key, _)| key.starts_with(&layout::log_prefix("main")));
    let mut changes = segments.flat_map(|(_, bytes)| segment::decode(&bytes).unwrap().changes);
    let is_it = |change: &PathChange| change.path == path.as_bytes();
    changes.find(is_it).expect("it was published")
}

fn a_stamp_that_a_fork_copied_from_its_parent_divides_no_machines(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "pr-1", "main", &["--own-prefix"]);
    let (machine_of_fork, forged) = (MachineId(7), b"forged");
    let digest = Digest::of(forged);
    let changes: Vec<PathChange> = ["kept", "written"]
        .into_iter()
        .map(|path| PathChange {
            entry: Some(Entry {
                blob: Some(EntryBlob {
                    digest,
                    size: forged.len() as u64,
                    chunks: EntryChunks::Single,
                    places: Vec::new(),
                }),
                ..Entry::new(NodeKind::File, 0o644)
            }),
            ..said_of(&lab, path)
        })
        .collect();
    lab.with_bucket(async |bucket| {
        let own = format!("{}{}", layout::volume_prefix("pr-1"), layout::blob(&digest));
        bucket.put_new(&own, Body::raw(forged.to_vec())).await.unwrap();
        let head = Head {
            machine: machine_of_fork,
            seq: 1,
            published_millis: bucket.clock().now_millis(),
            previous: None,
        };
        let encode = |change| segment::encode_change(change, machine_of_fork).unwrap();
        let encoded: Vec<_> = changes.iter().map(encode).collect();
        let key = layout::segment("pr-1", head.published_millis, machine_of_fork, 1);
        let body = Body::raw(segment::encode(&head, &encoded));
        bucket.put_new(&key, body).await.unwrap();
    });
    promote(&lab, "pr-1");
    // Whoever had the one, and who reads both, in one order or from a catalog.
    until_caught_up(&parent);
    let late = machine(&lab, "late", "main");
    for path in ["kept", "written"] {
        assert_eq!(content(&parent.path(path)), content(&late.path(path)), "{path}");
    }
    let stamps: Vec<_> = changes.iter().map(|change| change.stamp).collect();
    let log = objects_of(&lab, "main").into_values();
    let decoded = log.filter_map(|bytes| segment::decode(&bytes).ok());
    let copied = decoded.flat_map(|decoded| decoded.changes);
    let copied = copied.filter(|change| stamps.contains(&change.stamp) && change.entry.is_some());
    for change in copied {
        let blob = change.entry.unwrap().blob;
        assert_ne!(
            blob.map(|blob| blob.digest),
            Some(digest),
            "one stamp, two contents"
        );
    }
}
