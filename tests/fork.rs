//! Forks: a volume that shows what its parent has, and keeps its changes to itself.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;
#[path = "support/volumes.rs"]
mod volumes;

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use lab::{Lab, StoreKind};
use serde_json::Value;
use support::{
    machine::Machine,
    posix::{content, file, rw},
    tempdir, tree,
};
use volumes::{
    assert_says, fork, is_absent, machine, objects_of, parent, refusal, spec, stored, try_fork,
    until_caught_up,
};

on_both_stores!(
    a_fork_shows_what_its_parent_has_and_the_parent_nothing_of_it,
    what_the_parent_changes_later_shows_where_the_fork_said_nothing,
    a_tree_of_the_parent_is_renamed_and_removed_in_the_fork_alone,
    names_of_one_file_stay_one_in_the_fork,
    a_file_that_is_written_in_the_fork_while_the_parent_replaces_it_is_the_forks,
    a_fork_of_now_stays_as_it_was,
    a_fork_of_a_fork_shows_all_below_it,
    a_second_machine_on_the_fork_sees_what_the_first_one_did,
    a_killed_daemon_comes_back_with_the_same_tree_and_numbers,
    a_fork_is_mounted_while_its_store_is_away,
    a_cache_directory_of_another_volume_is_refused_and_unchanged,
    a_cache_directory_without_a_note_belongs_to_the_volume_that_it_followed,
    a_volume_that_lies_over_something_odd_is_refused,
    a_fork_that_cannot_be_made_is_refused_and_nothing_is_made,
);

fn a_fork_shows_what_its_parent_has_and_the_parent_nothing_of_it(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    let text = fork(&lab, "fork", "main", &[]);
    assert_eq!(text, "made volume fork, a fork of main (live)\n");
    let fork = machine(&lab, "fork", "fork");
    let before = tree::read(parent.root());
    tree::assert_same_but_dir_times(&before, &tree::read(fork.root()));
    let in_store = objects_of(&lab, "main");

    file(&fork.path("written"), b"by the fork");
    file(&fork.path("new"), b"new");
    file(&fork.path("dir/deep/new"), b"new below");
    fs::remove_file(fork.path("deleted")).unwrap();
    fs::rename(fork.path("renamed"), fork.path("dir/moved")).unwrap();
    fs::rename(fork.path("kept"), fork.path("large")).unwrap();
    fs::set_permissions(fork.path("dir"), fs::Permissions::from_mode(0o700)).unwrap();
    fork.flush();
    let changed = tree::read(fork.root());
    assert_eq!(content(&fork.path("written")), b"by the fork");
    assert_eq!(content(&fork.path("large")), b"kept");
    assert_eq!(content(&fork.path("dir/moved")), b"renamed");
    assert_eq!(content(&fork.path("dir/a")), b"dir/a");
    for gone in ["deleted", "renamed", "kept"] {
        assert!(is_absent(&fork.path(gone)), "{gone}");
    }

    until_caught_up(&parent);
    tree::assert_same(&before, &tree::read(parent.root()));
    assert!(
        objects_of(&lab, "main") == in_store,
        "the fork wrote to its parent"
    );
    assert!(objects_of(&lab, "fork").len() >= 2);
    // Nor does anyone who mounts either of them anew.
    let late = machine(&lab, "late", "main");
    tree::assert_same_but_dir_times(&before, &tree::read(late.root()));
    let late = machine(&lab, "late-fork", "fork");
    tree::assert_same_but_dir_times(&changed, &tree::read(late.root()));

    let status = fork.status();
    assert_eq!(status["volume"], "fork");
    assert_eq!(status["layers"][0]["volume"], "fork");
    assert_eq!(status["layers"][1]["volume"], "main");
    assert_eq!(status["layers"][1]["until_millis"], Value::Null);
    assert_eq!(status["layers"].as_array().unwrap().len(), 2);
    assert!(
        fork.control_ok("status", &[])
            .contains("\nover        main, live, ")
    );
}

fn what_the_parent_changes_later_shows_where_the_fork_said_nothing(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    let fork = machine(&lab, "fork", "fork");
    file(&fork.path("written"), b"by the fork");
    fs::remove_file(fork.path("deleted")).unwrap();
    fs::rename(fork.path("renamed"), fork.path("elsewhere")).unwrap();
    fork.flush();

    file(&parent.path("written"), b"by the parent");
    file(&parent.path("deleted"), b"written again");
    file(&parent.path("renamed"), b"written again");
    file(&parent.path("elsewhere"), b"in the way");
    file(&parent.path("dir/new"), b"new");
    fs::remove_file(parent.path("dir/a")).unwrap();
    fs::rename(parent.path("large"), parent.path("dir/large")).unwrap();
    file(&parent.path("kept"), b"changed");
    parent.flush();
    fork.until_content("kept", b"changed");
    until_caught_up(&fork);
    assert_eq!(content(&fork.path("dir/new")), b"new");
    assert_eq!(content(&fork.path("dir/large")).len(), 5_000_000);
    assert!(is_absent(&fork.path("dir/a")) && is_absent(&fork.path("large")));
    assert_eq!(content(&fork.path("written")), b"by the fork");
    assert_eq!(content(&fork.path("elsewhere")), b"renamed");
    assert!(is_absent(&fork.path("deleted")) && is_absent(&fork.path("renamed")));
    // What the fork deleted, it can make again.
    file(&fork.path("deleted"), b"made in the fork");
    fork.flush();
    file(&parent.path("deleted"), b"and once more");
    parent.flush();
    until_caught_up(&fork);
    assert_eq!(content(&fork.path("deleted")), b"made in the fork");
    assert_eq!(content(&parent.path("deleted")), b"and once more");
}

fn a_tree_of_the_parent_is_renamed_and_removed_in_the_fork_alone(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fs::create_dir_all(parent.path("build/out")).unwrap();
    file(&parent.path("build/out/old"), b"old");
    parent.flush();
    let before = tree::read(parent.root());
    fork(&lab, "fork", "main", &[]);
    let (fork, other) = (machine(&lab, "fork", "fork"), machine(&lab, "other", "fork"));
    fs::rename(fork.path("dir"), fork.path("moved")).unwrap();
    fs::remove_dir_all(fork.path("build")).unwrap();
    fork.flush();
    other.until_content("moved/deep/b", b"dir/deep/b");
    for machine in [&fork, &other] {
        machine.until_gone("build");
        assert!(is_absent(&machine.path("dir")));
        assert_eq!(content(&machine.path("moved/a")), b"dir/a");
    }
    until_caught_up(&parent);
    tree::assert_same(&before, &tree::read(parent.root()));
    // What was there stays away; what comes later below the old names is seen.
    file(&parent.path("build/out/old"), b"again");
    file(&parent.path("dir/a"), b"again");
    file(&parent.path("dir/later"), b"later");
    parent.flush();
    for machine in [&fork, &other] {
        machine.until_content("dir/later", b"later");
        until_caught_up(machine);
        assert!(is_absent(&machine.path("build")) && is_absent(&machine.path("dir/a")));
        assert_eq!(content(&machine.path("moved/a")), b"dir/a");
        let names = fs::read_dir(machine.path("dir")).unwrap();
        assert_eq!(names.count(), 1, "dir is there for its later file alone");
    }
}

fn names_of_one_file_stay_one_in_the_fork(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fs::hard_link(parent.path("kept"), parent.path("linked")).unwrap();
    parent.flush();
    fork(&lab, "fork", "main", &[]);
    let (fork, other) = (machine(&lab, "fork", "fork"), machine(&lab, "other", "fork"));
    for machine in [&fork, &other] {
        machine.until_content("linked", b"kept");
    }
    let ino = |machine: &Machine, path: &str| fs::metadata(machine.path(path)).unwrap().ino();
    assert_eq!(ino(&fork, "linked"), ino(&fork, "kept"));
    fs::write(fork.path("linked"), b"written in the fork").unwrap();
    fs::hard_link(fork.path("kept"), fork.path("third")).unwrap();
    fork.flush();
    other.until_content("third", b"written in the fork");
    for machine in [&fork, &other] {
        for name in ["kept", "linked", "third"] {
            assert_eq!(content(&machine.path(name)), b"written in the fork", "{name}");
            assert_eq!(ino(machine, name), ino(machine, "kept"), "{name}");
        }
        assert_eq!(fs::metadata(machine.path("kept")).unwrap().nlink(), 3);
    }
    until_caught_up(&parent);
    assert_eq!(content(&parent.path("kept")), b"kept");
    assert_eq!(fs::metadata(parent.path("kept")).unwrap().nlink(), 2);
}

fn a_file_that_is_written_in_the_fork_while_the_parent_replaces_it_is_the_forks(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    let fork = machine(&lab, "fork", "fork");
    // Written late: a process that is started meanwhile closes its copy of the descriptor, which tells of a change.
    let mut writer = rw(&fork.path("kept"));
    file(&parent.path("kept"), b"of the parent");
    parent.flush();
    fork.until_content("kept", b"of the parent");
    writer.write_all(b"mine").unwrap();
    drop(writer);
    fork.until_content("kept", b"mine");
    fork.flush();
    file(&parent.path("kept"), b"once more");
    parent.flush();
    until_caught_up(&fork);
    assert_eq!(content(&fork.path("kept")), b"mine");
    assert_eq!(content(&parent.path("kept")), b"once more");
}

fn a_fork_of_now_stays_as_it_was(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    let before = tree::read(parent.root());
    let json: Value = serde_json::from_str(&fork(&lab, "then", "main", &["--at", "now", "--json"])).unwrap();
    assert_eq!(json["volume"], "then");
    assert_eq!(json["parent"], "main");
    let until = json["until_millis"].as_u64().unwrap();
    assert!(json["created_millis"].as_u64().unwrap() <= until);
    fork(&lab, "live", "main", &["--at", "live"]);

    file(&parent.path("kept"), b"changed");
    file(&parent.path("new"), b"new");
    fs::remove_file(parent.path("deleted")).unwrap();
    fs::rename(parent.path("dir"), parent.path("moved")).unwrap();
    parent.flush();
    let (then, live) = (machine(&lab, "then", "then"), machine(&lab, "live", "live"));
    live.until_content("new", b"new");
    until_caught_up(&then);
    tree::assert_same_but_dir_times(&before, &tree::read(then.root()));
    assert_eq!(then.status()["layers"][1]["until_millis"].as_u64(), Some(until));
    assert!(
        then.control_ok("status", &[])
            .contains("\nover        main as of 20")
    );

    file(&then.path("kept"), b"changed in the fork");
    file(&parent.path("later"), b"later");
    then.flush();
    parent.flush();
    live.until_content("later", b"later");
    until_caught_up(&then);
    assert!(is_absent(&then.path("later")) && is_absent(&then.path("new")));
    assert_eq!(content(&then.path("kept")), b"changed in the fork");
    assert_eq!(content(&parent.path("kept")), b"changed");
    // A fork of it sees no more of the volume at the bottom than it does.
    fork(&lab, "above", "then", &[]);
    let above = machine(&lab, "above", "above");
    assert_eq!(content(&above.path("kept")), b"changed in the fork");
    tree::assert_same_but_dir_times(&tree::read(then.root()), &tree::read(above.root()));
}

fn a_fork_of_a_fork_shows_all_below_it(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "middle", "main", &[]);
    let middle = machine(&lab, "middle", "middle");
    file(&middle.path("written"), b"in the middle");
    fs::remove_file(middle.path("deleted")).unwrap();
    file(&middle.path("dir/middle"), b"middle");
    middle.flush();
    fork(&lab, "top", "middle", &[]);
    let top = machine(&lab, "top", "top");
    tree::assert_same_but_dir_times(&tree::read(middle.root()), &tree::read(top.root()));

    file(&top.path("written"), b"at the top");
    file(&top.path("deleted"), b"back at the top");
    fs::remove_file(top.path("dir/middle")).unwrap();
    top.flush();
    file(&parent.path("kept"), b"from the bottom");
    file(&parent.path("dir/middle"), b"from the bottom");
    parent.flush();
    file(&middle.path("renamed"), b"from the middle");
    middle.flush();
    top.until_content("kept", b"from the bottom");
    top.until_content("renamed", b"from the middle");
    for machine in [&top, &middle, &parent] {
        until_caught_up(machine);
    }
    let read = |machine: &Machine, path: &str| fs::read_to_string(machine.path(path)).unwrap_or_default();
    let seen = |path: &str| [&top, &middle, &parent].map(|machine| read(machine, path));
    assert_eq!(seen("written"), ["at the top", "in the middle", "written"]);
    assert_eq!(seen("deleted"), ["back at the top", "", "deleted"]);
    assert_eq!(seen("dir/middle"), ["", "middle", "from the bottom"]);
    assert_eq!(seen("kept"), ["from the bottom"; 3]);
    assert_eq!(seen("renamed"), ["from the middle", "from the middle", "renamed"]);
    let late = machine(&lab, "late", "top");
    tree::assert_same_but_dir_times(&tree::read(top.root()), &tree::read(late.root()));
}

fn a_second_machine_on_the_fork_sees_what_the_first_one_did(kind: StoreKind) {
    let lab = Lab::new(kind);
    let _parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    let (a, b) = (machine(&lab, "a", "fork"), machine(&lab, "b", "fork"));
    file(&a.path("written"), b"by a");
    fs::remove_file(a.path("deleted")).unwrap();
    fs::rename(a.path("dir"), a.path("moved")).unwrap();
    a.flush();
    b.until_content("written", b"by a");
    b.until_content("moved/deep/b", b"dir/deep/b");
    b.until_gone("deleted");
    b.until_gone("dir");
    file(&b.path("moved/deep/b"), b"by b");
    fs::remove_file(b.path("written")).unwrap();
    b.flush();
    a.until_content("moved/deep/b", b"by b");
    a.until_gone("written");
    tree::assert_same_but_dir_times(&tree::read(a.root()), &tree::read(b.root()));
}

fn inode_numbers(root: &Path) -> BTreeMap<PathBuf, u64> {
    let mut numbers = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            numbers.insert(path.clone(), meta.ino());
            if meta.is_dir() {
                pending.push(path);
            }
        }
    }
    numbers
}

fn a_killed_daemon_comes_back_with_the_same_tree_and_numbers(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    let mut fork = machine(&lab, "fork", "fork");
    file(&fork.path("written"), b"by the fork");
    fs::remove_file(fork.path("deleted")).unwrap();
    fork.flush();
    file(&fork.path("unpublished"), b"closed just before the end");
    fs::rename(fork.path("dir"), fork.path("moved")).unwrap();
    let (before, numbers) = (tree::read(fork.root()), inode_numbers(fork.root()));
    fork.kill9();
    fork.restart();
    tree::assert_same(&before, &tree::read(fork.root()));
    assert_eq!(inode_numbers(fork.root()), numbers);
    assert_eq!(content(&fork.path("large")).len(), 5_000_000);
    // And it goes on where it was.
    fork.flush();
    file(&parent.path("kept"), b"changed");
    parent.flush();
    fork.until_content("kept", b"changed");
    fork.unmount();
    fork.restart();
    assert_eq!(content(&fork.path("moved/a")), b"dir/a");
    let late = machine(&lab, "late", "fork");
    tree::assert_same_but_dir_times(&tree::read(fork.root()), &tree::read(late.root()));
}

fn a_fork_is_mounted_while_its_store_is_away(kind: StoreKind) {
    let lab = Lab::new(kind);
    let _parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    let mut fork = machine(&lab, "fork", "fork");
    assert_eq!(content(&fork.path("kept")), b"kept");
    file(&fork.path("written"), b"by the fork");
    fork.flush();
    let before = tree::read(fork.root());
    fork.unmount();
    lab.set_down(true);
    fork.restart();
    tree::assert_same(&before, &tree::read(fork.root()));
    assert_eq!(fork.status()["layers"][1]["volume"], "main");
    file(&fork.path("new"), b"made meanwhile");
    lab.set_down(false);
    fork.flush();
    let late = machine(&lab, "late", "fork");
    late.until_content("new", b"made meanwhile");
    tree::assert_same_but_dir_times(&tree::read(fork.root()), &tree::read(late.root()));
}

fn a_cache_directory_of_another_volume_is_refused_and_unchanged(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut parent = parent(&lab);
    fork(&lab, "fork", "main", &[]);
    parent.unmount();
    // One that was closed, and one whose daemon was killed: nothing of it is mended for another volume.
    let mut killed = machine(&lab, "killed", "fork");
    file(&killed.path("f"), b"by the fork");
    killed.kill9();
    tempdir::unmount_below(&killed.spec.mountpoint);
    for (owner, of, others) in [
        (&parent, "main", ["other", "fork"]),
        (&killed, "fork over main", ["main", "other"]),
    ] {
        let cache = &owner.spec.cache_dir;
        let before = (tree::read(cache), stored(&lab));
        for volume in others {
            let other = spec(&lab, "mixed", volume).cache_dir(cache);
            let line = refusal(&other);
            let cache = cache.display().to_string();
            assert_says(
                &line,
                &[&cache, &format!("belongs to volume {of},"), volume, "--cache-dir"],
            );
        }
        assert!(
            before == (tree::read(cache), stored(&lab)),
            "a refused mount changed something"
        );
    }
    // Nor may the volume lie over something else than before.
    let key = "volumes/fork/volume.json";
    let json = lab
        .objects()
        .into_iter()
        .find(|object| object.key == key)
        .unwrap()
        .bytes;
    let over = String::from_utf8(json.clone()).unwrap();
    lab.tamper(
        key,
        Some(
            over.replace("\"main\"", "\"main\", \"until_millis\": 7")
                .into_bytes(),
        ),
    );
    let before = (tree::read(&killed.spec.cache_dir), stored(&lab));
    let line = refusal(&killed.spec);
    assert_says(
        &line,
        &[
            "belongs to volume fork over main,",
            "not to volume fork over main as of 1970-01-01",
        ],
    );
    assert!(before == (tree::read(&killed.spec.cache_dir), stored(&lab)));
    lab.tamper(key, Some(json));
    killed.restart();
    parent.restart();
    assert_eq!(content(&killed.path("f")), b"by the fork");
    assert_eq!(content(&parent.path("dir/a")), b"dir/a");
}

fn a_cache_directory_without_a_note_belongs_to_the_volume_that_it_followed(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut old = parent(&lab);
    old.unmount();
    let path = old.spec.cache_dir.join("machine.json");
    let text = fs::read_to_string(&path).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let noted = json.as_object_mut().unwrap().remove("stack");
    assert_eq!(noted, Some(serde_json::json!([{"volume": "main"}])));
    let without = json.to_string();
    fs::write(&path, &without).unwrap();
    let other = spec(&lab, "other", "other").cache_dir(&old.spec.cache_dir);
    assert_says(
        &refusal(&other),
        &["belongs to volume main,", "not to volume other", "--cache-dir"],
    );
    assert_eq!(fs::read_to_string(&path).unwrap(), without);
    assert!(objects_of(&lab, "other").is_empty());
    old.restart();
    assert_eq!(content(&old.path("dir/a")), b"dir/a");
    let json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(json.get("stack"), noted.as_ref());
}

fn a_volume_that_lies_over_something_odd_is_refused(kind: StoreKind) {
    let lab = Lab::new(kind);
    let _parent = parent(&lab);
    let key = |volume: &str| format!("volumes/{volume}/volume.json");
    for volume in ["a", "b", "newer", "orphan", "odd"] {
        fork(&lab, volume, "main", &[]);
    }
    let over = |volume: &str, parent: &str| {
        let json = format!(r#"{{"version": 1, "parent": {{"volume": "{parent}"}}, "created_millis": 1}}"#);
        lab.tamper(&key(volume), Some(json.into_bytes()));
    };
    over("a", "b");
    over("b", "a");
    over("orphan", "missing");
    lab.tamper(&key("newer"), Some(br#"{"version": 2, "layers": []}"#.to_vec()));
    lab.tamper(&key("odd"), Some(b"rubbish".to_vec()));
    let before = stored(&lab);
    for (volume, words) in [
        ("a", &["volume a lies below itself", "a over b over a"][..]),
        ("newer", &["volume newer", "newer casmount", "version 2"]),
        (
            "orphan",
            &["volume orphan is a fork of volume missing", "does not exist"],
        ),
        ("odd", &["volumes/odd/volume.json is damaged"]),
    ] {
        let spec = spec(&lab, volume, volume);
        assert_says(&refusal(&spec), words);
        assert!(!spec.cache_dir.exists(), "{volume}: a cache directory was made");
    }
    assert!(before == stored(&lab), "a refused mount changed the store");
}

fn a_fork_that_cannot_be_made_is_refused_and_nothing_is_made(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut parent = parent(&lab);
    parent.unmount();
    fork(&lab, "taken", "main", &[]);
    let before = stored(&lab);
    for (name, from, code, words) in [
        ("new", "missing", 1, &["no volume missing", "fork"][..]),
        ("taken", "main", 1, &["volume taken exists already"]),
        ("main", "taken", 1, &["volume main exists already"]),
        ("../x", "main", 2, &["not a volume name"]),
        ("new", "Main", 2, &["not a volume name"]),
        ("", "main", 2, &["not a volume name"]),
    ] {
        let output = try_fork(&lab, &[name, "--from", from]);
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{name} {from}: {err}");
        assert_says(&err, words);
        assert!(output.stdout.is_empty());
        assert!(code == 2 || err.lines().count() == 1, "{err}");
    }
    for args in [&["new"][..], &["new", "--from", "main", "--at", "then"]] {
        assert_eq!(try_fork(&lab, args).status.code(), Some(2), "{args:?}");
    }
    assert!(
        before == stored(&lab),
        "a refused fork left something in the store"
    );
}

#[test]
fn a_store_that_is_not_there_has_nothing_to_fork() {
    let lab = Lab::new(StoreKind::File);
    let output = try_fork(&lab, &["new", "--from", "main"]);
    assert_eq!(output.status.code(), Some(1));
    assert_says(
        &String::from_utf8_lossy(&output.stderr),
        &["no casmount store yet"],
    );
    assert!(lab.objects().is_empty());
}

#[test]
fn a_server_without_conditional_writes_makes_no_forks() {
    let lab = Lab::new(StoreKind::S3);
    let _parent = parent(&lab);
    lab.server().set_faults(s3server::Faults {
        ignore_conditions: true,
        ..s3server::Faults::default()
    });
    let before = objects_of(&lab, "fork");
    let output = try_fork(&lab, &["fork", "--from", "main"]);
    assert_eq!(output.status.code(), Some(1));
    let err = String::from_utf8(output.stderr).unwrap();
    assert_says(&err, &["ignores If-None-Match", "forks"]);
    assert_eq!(err.lines().count(), 1, "{err}");
    assert_eq!(objects_of(&lab, "fork"), before);
}
