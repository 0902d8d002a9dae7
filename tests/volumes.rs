//! Looking at volumes without a mount, and deleting forks.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;
#[path = "support/volumes.rs"]
mod volumes;

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use lab::{Lab, StoreKind};
use serde_json::{Value, json};
use support::{
    posix::{content, file},
    tree, wait,
};
use volumes::{
    SOON, assert_says, fork, is_absent, machine, objects_of, offline, offline_fails, offline_json,
    offline_ok, parent, refusal, spec, stored, until_caught_up,
};

on_both_stores!(
    volumes_are_listed_with_what_they_are_forks_of,
    the_difference_of_two_volumes_is_what_their_mounts_show,
    the_log_of_a_volume_tells_who_published_what,
    a_deleted_fork_is_gone_and_its_name_stays_taken,
    a_fork_that_others_lie_over_is_not_deleted,
    a_deletion_that_was_cut_off_is_finished_by_a_repeat,
    a_machine_with_a_deleted_fork_keeps_what_it_has_and_says_so,
);

fn volumes_are_listed_with_what_they_are_forks_of(kind: StoreKind) {
    let lab = Lab::new(kind);
    let _parent = parent(&lab);
    // Names of which one is the beginning of another, on both sides of the slash.
    for name in ["main-2", "main.3", "main0", "a"] {
        fork(&lab, name, "main", &[]);
    }
    fork(&lab, "then", "a", &["--at", "now"]);
    lab.tamper("volumes/main.3/volume.json", Some(b"rubbish".to_vec()));
    let listed = offline_json(&lab, &["volume", "list"]);
    let listed = listed.as_array().unwrap();
    let told: Vec<(&str, Option<&str>)> = listed
        .iter()
        .map(|of| (of["volume"].as_str().unwrap(), of["parent"].as_str()))
        .collect();
    let expected = [
        ("a", Some("main")),
        ("main-2", Some("main")),
        ("main.3", None),
        ("main", None),
        ("main0", Some("main")),
        ("then", Some("a")),
    ];
    assert_eq!(told, expected);
    assert!(listed[5]["until_millis"].is_u64() && listed[0]["until_millis"].is_null());
    assert_says(listed[2]["trouble"].as_str().unwrap(), &["damaged"]);
    let text = offline_ok(&lab, &["volume", "list"]);
    assert_eq!(text.lines().count(), 6);
    assert_says(
        &text,
        &[
            "main-2  fork of main (live), made 20",
            "then    fork of a (as of 20",
        ],
    );
}

fn the_difference_of_two_volumes_is_what_their_mounts_show(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    assert_eq!(offline_ok(&lab, &["volume", "diff", "main", "fork"]), "");
    let fork = machine(&lab, "fork", "fork");
    file(&fork.path("written"), b"by the fork");
    file(&fork.path("dir/new"), b"new");
    fs::remove_file(fork.path("deleted")).unwrap();
    fs::rename(fork.path("dir/deep"), fork.path("moved")).unwrap();
    fs::set_permissions(fork.path("kept"), fs::Permissions::from_mode(0o600)).unwrap();
    // Written and written back: no difference but the time.
    file(&fork.path("renamed"), b"renamed");
    fork.flush();
    file(&parent.path("later"), b"later");
    parent.flush();
    let text = offline_ok(&lab, &["volume", "diff", "main", "fork"]);
    let expected =
        "D deleted\nD dir/deep\nD dir/deep/b\nA dir/new\nm kept\nA moved\nA moved/b\nm renamed\nM written\n";
    assert_eq!(text, expected);
    let back = offline_json(&lab, &["volume", "diff", "fork", "main"]);
    assert_eq!(back[0], json!({ "path": "deleted", "what": "added" }));
    assert_eq!(back.as_array().unwrap().len(), 9);

    // The same as the mounts show.
    fork.until_content("later", b"later");
    let (a, b) = (tree::read(parent.root()), tree::read(fork.root()));
    let mut differ: Vec<String> = a
        .keys()
        .chain(b.keys())
        .filter(|path| match (a.get(*path), b.get(*path)) {
            (Some(a), Some(b)) if a.mode & 0o170_000 == 0o040_000 => a.mode != b.mode,
            (a, b) => a != b,
        })
        .map(|path| path.display().to_string())
        .collect();
    differ.sort();
    differ.dedup();
    let told: Vec<&str> = text.lines().map(|line| &line[2..]).collect();
    assert_eq!(differ, told);
    offline_fails(
        &lab,
        &["volume", "diff", "main", "mian"],
        1,
        &["no volume mian", "volume list"],
    );
    offline_fails(&lab, &["volume", "diff", "main"], 2, &["required"]);
}

fn the_log_of_a_volume_tells_who_published_what(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    assert_eq!(offline_json(&lab, &["volume", "log", "fork"]), json!([]));
    let other = machine(&lab, "other", "main");
    file(&other.path("by-other"), b"x");
    fs::remove_file(other.path("deleted")).unwrap();
    other.flush();
    let log = offline_json(&lab, &["volume", "log", "main", "--paths"]);
    let newest = &log[0];
    assert_eq!(newest["machine"], other.status()["machine"]);
    let by_parent = log
        .as_array()
        .unwrap()
        .iter()
        .filter(|of| of["machine"] == parent.status()["machine"]);
    assert!(by_parent.count() >= 1);
    // One or two segments, as it came.
    let paths: Vec<(&str, bool)> = log
        .as_array()
        .unwrap()
        .iter()
        .filter(|of| of["machine"] == newest["machine"])
        .flat_map(|of| of["paths"].as_array().unwrap())
        .map(|path| (path["path"].as_str().unwrap(), path["removed"].as_bool().unwrap()))
        .collect();
    assert!(
        paths.contains(&("by-other", false)) && paths.contains(&("deleted", true)),
        "{paths:?}"
    );
    let times: Vec<u64> = log
        .as_array()
        .unwrap()
        .iter()
        .map(|of| of["published_millis"].as_u64().unwrap())
        .collect();
    assert!(times.is_sorted_by(|newer, older| newer >= older));
    let one = offline_json(&lab, &["volume", "log", "main", "-n", "1"]);
    assert_eq!(one.as_array().unwrap().len(), 1);
    assert_eq!(one[0]["seq"], newest["seq"]);
    assert_eq!(one[0].get("paths"), None);
    let text = offline_ok(&lab, &["volume", "log", "main", "-n", "1", "--paths"]);
    assert_says(&text, &[" UTC  ", newest["machine"].as_str().unwrap()]);
    offline_fails(&lab, &["volume", "log", "mian"], 1, &["no volume mian"]);
}

fn a_deleted_fork_is_gone_and_its_name_stays_taken(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    let mut fork = machine(&lab, "fork", "fork");
    file(&fork.path("new"), b"new");
    fork.flush();
    fork.unmount();
    let main = objects_of(&lab, "main");
    // Nobody can be asked here.
    offline_fails(
        &lab,
        &["fork", "delete", "fork"],
        2,
        &["cannot be undone", "--yes"],
    );
    assert!(objects_of(&lab, "fork").len() > 1);
    assert_eq!(
        offline_ok(&lab, &["fork", "delete", "fork", "--yes"]),
        "deleted volume fork\n"
    );
    assert_eq!(
        objects_of(&lab, "fork").into_keys().collect::<Vec<_>>(),
        ["volumes/fork/volume.json"]
    );
    assert!(objects_of(&lab, "main") == main);
    let text = offline_ok(&lab, &["fork", "delete", "fork", "--yes"]);
    assert_eq!(text, "deleted volume fork (it was deleted before)\n");
    let listed = offline_json(&lab, &["volume", "list"]);
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    let listed = offline_json(&lab, &["volume", "list", "--all"]);
    assert!(listed[0]["deleted_millis"].is_u64(), "{listed}");
    for args in [
        &["fork", "create", "fork", "--from", "main"][..],
        &["fork", "create", "above", "--from", "fork"],
        &["fork", "promote", "fork", "--into", "main"],
        &["volume", "diff", "main", "fork"],
        &["volume", "log", "fork"],
    ] {
        offline_fails(&lab, args, 1, &["volume fork was deleted"]);
    }
    let cache = tree::read(&fork.spec.cache_dir);
    assert_says(&refusal(&fork.spec), &["volume fork was deleted"]);
    tree::assert_same(&cache, &tree::read(&fork.spec.cache_dir));
    assert_says(
        &refusal(&spec(&lab, "anew", "fork")),
        &["volume fork was deleted"],
    );
    for (name, words) in [
        ("main", "volume main is no fork"),
        ("missing", "no volume missing"),
    ] {
        offline_fails(&lab, &["fork", "delete", name, "--yes"], 1, &[words]);
    }
    assert_eq!(content(&parent.path("kept")), b"kept");
}

fn a_fork_that_others_lie_over_is_not_deleted(kind: StoreKind) {
    let lab = Lab::new(kind);
    let _parent = parent(&lab);
    fork(&lab, "middle", "main", &[]);
    let middle = machine(&lab, "middle", "middle");
    file(&middle.path("new"), b"new");
    middle.flush();
    fork(&lab, "top", "middle", &[]);
    let before = stored(&lab);
    offline_fails(
        &lab,
        &["fork", "delete", "middle", "--yes"],
        1,
        &["volume top lies over volume middle", "delete it first"],
    );
    assert!(before == stored(&lab), "a refused deletion changed something");
    offline_ok(&lab, &["fork", "delete", "top", "--yes"]);
    offline_ok(&lab, &["fork", "delete", "middle", "--yes"]);
    let listed = offline_json(&lab, &["volume", "list"]);
    assert_eq!(listed.as_array().unwrap().len(), 1);
}

fn a_deletion_that_was_cut_off_is_finished_by_a_repeat(kind: StoreKind) {
    let lab = Lab::new(kind);
    let _parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    let mut fork = machine(&lab, "fork", "fork");
    for name in ["a", "b", "c"] {
        file(&fork.path(name), b"new");
        fork.flush();
    }
    fork.unmount();
    let whole = objects_of(&lab, "fork");
    // Killed ever later, until it is too late: after each it is whole, or it is deleted.
    let mut was_whole = true;
    for killed_after in (0..).step_by(10) {
        let spec = lab.spec("killed");
        let mut command = spec.command();
        command.args(["fork", "delete", "fork", "--yes"]).args(&spec.args);
        command
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        let mut child = wait::ChildGuard(command.spawn().unwrap());
        let ended = wait::try_until(Duration::from_millis(killed_after), || {
            child.0.try_wait().unwrap()
        });
        if let Some(status) = ended {
            assert!(status.success());
            break;
        }
        drop(child);
        let now = objects_of(&lab, "fork");
        if now == whole {
            assert!(was_whole, "a deleted fork is back");
        } else {
            was_whole = false;
            let refused = offline(&lab, &["volume", "diff", "main", "fork"]);
            assert_says(
                &String::from_utf8_lossy(&refused.stderr),
                &["volume fork was deleted"],
            );
        }
        assert!(killed_after < 30_000, "it never ends");
    }
    assert_eq!(objects_of(&lab, "fork").len(), 1);
}

fn a_machine_with_a_deleted_fork_keeps_what_it_has_and_says_so(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    let fork = machine(&lab, "fork", "fork");
    file(&fork.path("new"), b"new");
    fork.flush();
    offline_ok(&lab, &["fork", "delete", "fork", "--yes"]);
    wait::until("the machine knows", SOON, || {
        let why = fork.status()["publish"]["last_error"].clone();
        why.as_str()
            .is_some_and(|why| why.contains("volume fork was deleted"))
            .then_some(())
    });
    assert_says(&fork.log(), &["volume fork was deleted"]);
    assert_says(
        fork.status()["last_error"].as_str().unwrap(),
        &["volume fork was deleted"],
    );
    // It works on as before, here.
    assert_eq!(content(&fork.path("new")), b"new");
    assert_eq!(content(&fork.path("kept")), b"kept");
    file(&fork.path("later"), b"later");
    let output = fork.control("flush", &["--deadline", "60s"]);
    assert_eq!(output.status.code(), Some(1));
    assert_says(
        &String::from_utf8_lossy(&output.stderr),
        &["1 change not published", "volume fork was deleted"],
    );
    assert_eq!(content(&fork.path("later")), b"later");
    assert_eq!(
        objects_of(&lab, "fork").len(),
        1,
        "something was published into a deleted volume"
    );
    let output = fork.control("commit", &[]);
    assert_eq!(output.status.code(), Some(1));
    until_caught_up(&parent);
    assert!(is_absent(&parent.path("new")) && is_absent(&parent.path("later")));
    let _: Value = fork.status();
}
