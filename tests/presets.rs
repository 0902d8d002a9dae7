//! Presets of directories on real mounts: what Bazel and ccache do, by the same system calls.

#[path = "support/disk_cache.rs"]
mod disk_cache;
#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs,
    io::{ErrorKind, Write},
    os::unix::fs::{MetadataExt, chown, symlink},
    path::Path,
    process::Output,
    time::Duration,
};

use disk_cache::{Disk, action_result, key, tree_of};
use lab::{Lab, StoreKind};
use serde_json::Value;
use support::{
    machine::{Machine, MachineSpec},
    posix::{content, file},
    tree, wait,
};

on_both_stores!(
    what_bazel_stores_on_one_machine_is_a_hit_on_the_other,
    an_entry_is_shown_when_all_that_it_names_is_there_and_no_longer,
    an_entry_that_two_machines_deleted_differently_is_back_on_both_when_one_makes_it_again,
    a_cache_with_entries_that_nobody_sees_is_listed_and_deleted_as_any_tree,
    the_tree_of_an_output_directory_counts_with_all_its_files,
    a_blob_that_the_bucket_lost_makes_its_entries_misses,
    bytes_that_their_name_does_not_promise_never_leave_the_machine,
    names_of_this_machine_survive_a_crash_and_never_leave,
    names_of_this_machine_outlive_an_unmount_and_are_told_without_the_preset,
    a_volume_says_what_its_directories_are_used_for,
);

const SOON: Duration = Duration::from_secs(30);

fn spec(lab: &Lab, name: &str) -> MachineSpec {
    // Nothing that a preset lets go at once waits for the settle time of the mount.
    lab.spec(name).arg("--preset=disk=bazel")
}

fn what_bazel_stores_on_one_machine_is_a_hit_on_the_other(kind: StoreKind) {
    let lab = Lab::new(kind);
    // The settle time is not waited for where a preset says that names are complete.
    let start = |name: &str| spec(&lab, name).arg("--settle=1h").start();
    let (a, b) = (start("a"), start("b"));
    let (on_a, on_b) = (Disk::of(&a), Disk::of(&b));
    on_a.start();
    let blobs = [vec![1; 10], vec![2; 100_000], vec![3; 3_000_000]];
    let names: Vec<String> = blobs.iter().map(|bytes| on_a.blob(bytes)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    on_a.put("ac", &key("action"), &action_result(&names, &[]));
    // A file that is being written, and one that was left behind, hold nobody up.
    let mut open = fs::File::create(a.path("disk/tmp/open")).unwrap();
    open.write_all(b"being written").unwrap();
    file(&a.path("disk/tmp/left"), &vec![7; 50_000]);

    on_b.until("B has the entry", true, "ac", &key("action"));
    assert!(on_b.hit(&key("action"), &names));
    assert!(on_a.hit(&key("action"), &names));
    a.flush();
    assert_eq!(a.counter("/upload/uploaded_blobs"), 4, "three blobs and an entry");
    assert_eq!(a.counter("/publish/pending_changes"), 0);
    assert!(!b.path("disk/tmp").exists());
    let local = a.ls("disk/tmp");
    let files = local.as_array().or(local["files"].as_array()).unwrap();
    assert_eq!(files.len(), 2, "{local}");
    assert!(files.iter().all(|file| file["durability"] == "local"), "{local}");

    // Each machine's own collection of old files, under its own lock.
    for machine in [&a, &b] {
        fs::create_dir_all(machine.path("disk/gc")).unwrap();
        file(&machine.path("disk/gc/lock"), machine.spec.name.as_bytes());
    }
    fs::remove_file(on_b.place("cas", names[0])).unwrap();
    assert!(
        !on_b.touch("ac", &key("action")),
        "an entry of a blob that was removed here"
    );
    b.flush();
    file(&b.path("told"), b"");
    b.flush();
    a.until_content("told", b"");
    assert!(
        on_a.hit(&key("action"), &names),
        "a delete of B's collector came to A"
    );
    assert_eq!(content(&a.path("disk/gc/lock")), b"a");
    // Made again on B, it is a hit there again.
    on_b.start();
    assert_eq!(on_b.blob(&blobs[0]), names[0]);
    assert!(on_b.hit(&key("action"), &names));
}

fn an_entry_is_shown_when_all_that_it_names_is_there_and_no_longer(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (spec(&lab, "a").start(), spec(&lab, "b").start());
    let (on_a, on_b) = (Disk::of(&a), Disk::of(&b));
    on_a.start();
    let (here, late) = (on_a.blob(b"here"), key("late"));
    on_a.put("ac", &key("whole"), &action_result(&[&here], &[]));
    on_a.put("ac", &key("part"), &action_result(&[&here, &late], &[]));
    on_a.put("ac", &key("odd"), b"text that is no entry");
    on_a.put("ac", &key("empty"), b"");
    on_b.until("B has the entry", true, "ac", &key("empty"));
    for disk in [&on_a, &on_b] {
        assert!(disk.hit(&key("whole"), &[&here]));
        // Who made an entry may see it for a moment: until the kernel forgets that it renamed it.
        disk.until("the entry is withheld", false, "ac", &key("part"));
        disk.until("what is no entry is withheld", false, "ac", &key("odd"));
        // Again, now that the kernel has been told something.
        assert!(!disk.touch("ac", &key("part")));
    }
    assert!(b.counter("/files/withheld") >= 2);
    assert_eq!(on_a.blob(b"late"), late);
    for disk in [&on_a, &on_b] {
        disk.until("the entry is whole", true, "ac", &key("part"));
        assert!(disk.hit(&key("part"), &[&here, &late]));
    }
    fs::remove_file(on_a.place("cas", &here)).unwrap();
    assert!(!on_a.touch("ac", &key("whole")));
    assert!(!on_a.touch("ac", &key("part")));
    // A listing makes no difference.
    let listed = fs::read_dir(on_a.0.join("ac")).unwrap().count();
    assert!(listed > 0);
    assert!(!on_a.touch("ac", &key("part")));
}

/// Bazel does not store an entry that it finds. So it says nothing of one that was only withheld, and is there again
/// with the blob: without more, who deleted the entry itself would go without it.
fn an_entry_that_two_machines_deleted_differently_is_back_on_both_when_one_makes_it_again(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (spec(&lab, "a").start(), spec(&lab, "b").start());
    let (on_a, on_b) = (Disk::of(&a), Disk::of(&b));
    on_a.start();
    let blob = on_a.blob(b"output");
    for entry in ["first", "second"] {
        on_a.put("ac", &key(entry), &action_result(&[&blob], &[]));
        on_b.until("B has the entry", true, "ac", &key(entry));
    }
    // A's collector comes to the entries first, that of B to the blob, and finds no entry then.
    for entry in ["first", "second"] {
        fs::remove_file(on_a.place("ac", &key(entry))).unwrap();
    }
    fs::remove_file(on_a.place("cas", &blob)).unwrap();
    fs::remove_file(on_b.place("cas", &blob)).unwrap();
    for entry in ["first", "second"] {
        let gone = fs::remove_file(on_b.place("ac", &key(entry))).unwrap_err();
        assert_eq!(gone.kind(), ErrorKind::NotFound);
    }

    // B runs the action again, and finds its entry when it would store it.
    on_b.start();
    assert_eq!(on_b.blob(b"output"), blob);
    for entry in ["first", "second"] {
        on_b.until("the entry is whole", true, "ac", &key(entry));
    }
    for entry in ["first", "second"] {
        on_a.until("A has the entry", true, "ac", &key(entry));
        assert!(on_a.hit(&key(entry), &[&blob]));
    }

    // That was told once: who uses an entry tells nobody.
    b.flush();
    let told = b.counter("/publish/published_changes");
    for entry in ["first", "second"] {
        assert!(on_b.hit(&key(entry), &[&blob]));
    }
    b.flush();
    assert_eq!(b.counter("/publish/published_changes"), told);
    // A delete of A is its own again.
    fs::remove_file(on_a.place("ac", &key("first"))).unwrap();
    assert!(on_b.hit(&key("first"), &[&blob]));
    b.flush();
    assert_eq!(b.counter("/publish/published_changes"), told);
    assert!(!on_a.touch("ac", &key("first")));
}

fn a_cache_with_entries_that_nobody_sees_is_listed_and_deleted_as_any_tree(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (spec(&lab, "a").start(), spec(&lab, "b").start());
    let (on_a, on_b) = (Disk::of(&a), Disk::of(&b));
    on_a.start();
    let (one, two) = (on_a.blob(b"one"), on_a.blob(b"two"));
    on_a.put("ac", &key("of one"), &action_result(&[&one], &[]));
    on_a.put("ac", &key("of both"), &action_result(&[&one, &two], &[]));
    on_b.until("B has the entry", true, "ac", &key("of both"));
    // As a collector does, oldest first.
    fs::remove_file(on_a.place("cas", &two)).unwrap();
    on_a.until("the entry is withheld", false, "ac", &key("of both"));
    let find = |disk: &Disk, args: &[&str]| {
        let mut find = std::process::Command::new("find");
        wait::run_ok(find.arg(&disk.0).args(args), SOON).lines().count()
    };
    // It says nothing of what it cannot look at, which it finds in no listing.
    assert_eq!(find(&on_a, &["-path", "*/ac/*", "-type", "f"]), 1);
    assert_eq!(find(&on_b, &["-path", "*/ac/*", "-type", "f"]), 2);
    let shard = on_a.place("ac", &key("of one"));
    assert_errno!(fs::remove_dir(shard.parent().unwrap()), ENOTEMPTY);
    // The blobs first: after that no entry is seen, and each is in the way.
    fs::remove_dir_all(on_a.0.join("cas")).unwrap();
    assert_eq!(find(&on_a, &["-type", "f", "-path", "*/ac/*"]), 0);
    fs::remove_dir_all(&on_a.0).unwrap();
    assert_errno!(fs::metadata(&on_a.0), ENOENT);
    assert!(on_b.hit(&key("of both"), &[&one, &two]));
}

fn the_tree_of_an_output_directory_counts_with_all_its_files(kind: StoreKind) {
    let lab = Lab::new(kind);
    let a = spec(&lab, "a").start();
    let on_a = Disk::of(&a);
    on_a.start();
    let (one, two) = (on_a.blob(b"one"), key("two"));
    let tree = on_a.blob(&tree_of(&[&one], &[&two]));
    on_a.put("ac", &key("dir"), &action_result(&[], &[&tree]));
    on_a.until("the entry is withheld", false, "ac", &key("dir"));
    on_a.blob(b"two");
    assert!(on_a.touch("ac", &key("dir")));
    a.flush();
    // A machine that has none of the bytes fetches the entry and the tree, to know.
    let b = spec(&lab, "b").start();
    let on_b = Disk::of(&b);
    on_b.until("B has the entry", true, "ac", &key("dir"));
    fs::remove_file(on_b.place("cas", &two)).unwrap();
    assert!(!on_b.touch("ac", &key("dir")));
}

fn a_blob_that_the_bucket_lost_makes_its_entries_misses(kind: StoreKind) {
    let lab = Lab::new(kind);
    let a = spec(&lab, "a").start();
    let on_a = Disk::of(&a);
    on_a.start();
    // Too large for a pack: an object of its own, under its digest.
    let bytes = support::rng::Rng::seeded(5).bytes(300_000);
    let blob = on_a.blob(&bytes);
    on_a.put("ac", &key("action"), &action_result(&[&blob], &[]));
    a.flush();
    let b = spec(&lab, "b").start();
    let on_b = Disk::of(&b);
    on_b.until("B has the entry", true, "ac", &key("action"));
    lab.tamper(&format!("blobs/sha256/{}/{blob}", &blob[..2]), None);
    assert!(fs::read(on_b.place("cas", &blob)).is_err());
    on_b.until("the blob is known to be lost", false, "cas", &blob);
    assert!(!on_b.touch("ac", &key("action")));
    // The build does the work again, which mends it.
    on_b.start();
    on_b.blob(&bytes);
    assert!(on_b.hit(&key("action"), &[&blob]));
}

fn bytes_that_their_name_does_not_promise_never_leave_the_machine(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (spec(&lab, "a").start(), spec(&lab, "b").start());
    let (on_a, on_b) = (Disk::of(&a), Disk::of(&b));
    on_a.start();
    let right = b"the right bytes";
    let name = key("the right bytes");
    on_a.put("cas", &name, b"other bytes");
    on_a.until("the name is gone", false, "cas", &name);
    assert_eq!(a.counter("/files/misnamed"), 1);
    let path = format!("disk/cas/{}/{name}", &name[..2]);
    assert_eq!(a.status()["files"]["last_misnamed"], path.as_str());
    assert!(
        a.log().contains("not those that its name promises"),
        "{}",
        a.log()
    );
    assert!(a.control_ok("status", &[]).contains("MISNAMED"));
    a.flush();
    assert_eq!(a.counter("/upload/uploaded_blobs"), 0);
    // Also one that is sealed already when it gets the name.
    file(&a.path("sealed"), b"some other bytes");
    a.flush();
    assert_eq!(on_a.blob(right), name);
    b_has(&on_b, &name, right);
    fs::rename(a.path("sealed"), on_a.place("cas", &name)).unwrap();
    wait::until("the right bytes are shown again", SOON, || {
        (fs::read(on_a.place("cas", &name)).ok()? == right).then_some(())
    });
    assert_eq!(a.counter("/files/misnamed"), 2);
    file(&a.path("told"), b"");
    a.flush();
    b.until_content("told", b"");
    b_has(&on_b, &name, right);
    assert!(!b.path("sealed").exists());
}

#[track_caller]
fn b_has(on_b: &Disk, name: &str, bytes: &[u8]) {
    wait::until("B has the right bytes", SOON, || {
        (fs::read(on_b.place("cas", name)).ok()? == bytes).then_some(())
    });
}

fn names_of_this_machine_survive_a_crash_and_never_leave(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut a = lab
        .spec("a")
        .arg("--preset=disk=bazel")
        .arg("--preset=cc=ccache")
        .start();
    let on_a = Disk::of(&a);
    on_a.start();
    fs::create_dir_all(a.path("cc/0/1")).unwrap();
    let bytes = support::rng::Rng::seeded(9).bytes(200_000);
    file(&a.path("disk/tmp/one"), &bytes);
    file(&a.path("cc/0/stats"), b"12\n");
    symlink("host-1-2-3", a.path("cc/0/stats.lock")).unwrap();
    file(&a.path("cc/0/1/abcR"), b"result");
    a.flush();
    let ino = fs::metadata(a.path("cc/0/stats")).unwrap().ino();
    a.kill9();
    a.restart();
    assert!(content(&a.path("disk/tmp/one")) == bytes);
    assert_eq!(content(&a.path("cc/0/stats")), b"12\n");
    assert_eq!(fs::metadata(a.path("cc/0/stats")).unwrap().ino(), ino);
    assert_eq!(
        fs::read_link(a.path("cc/0/stats.lock")).unwrap(),
        Path::new("host-1-2-3")
    );
    a.flush();
    assert_eq!(a.counter("/cache/dirty_blobs"), 0);
    assert_eq!(a.counter("/upload/uploaded_blobs"), 0, "after the restart");
    let b = lab.spec("b").arg("--preset=cc=ccache").start();
    b.until_content("cc/0/1/abcR", b"result");
    let names = |dir: &str| -> Vec<String> {
        let entries = fs::read_dir(b.path(dir)).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    };
    assert_eq!(names("cc/0"), ["1"]);
    assert!(!b.path("disk/tmp").exists());
    // What was left behind can still be put in its place.
    let name = tree::hex(&tree::digest(&bytes));
    let to = on_a.place("cas", &name);
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::rename(a.path("disk/tmp/one"), &to).unwrap();
    a.flush();
    b.until_content(&format!("disk/cas/{}/{name}", &name[..2]), &bytes);
    // And back: it is gone for the others.
    fs::rename(&to, a.path("disk/tmp/two")).unwrap();
    a.flush();
    b.until_gone(&format!("disk/cas/{}/{name}", &name[..2]));
    assert!(content(&a.path("disk/tmp/two")) == bytes);
}

fn names_of_this_machine_outlive_an_unmount_and_are_told_without_the_preset(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut a = lab.spec("a").arg("--preset=d=ccache").start();
    fs::create_dir_all(a.path("d/tmp/deep")).unwrap();
    file(&a.path("d/Cargo.lock"), b"not what it looked like");
    file(&a.path("d/tmp/deep/file"), b"deep");
    a.unmount();
    a.restart();
    assert_eq!(content(&a.path("d/Cargo.lock")), b"not what it looked like");
    a.unmount();
    a.spec.args.retain(|arg| arg != "--preset=d=ccache");
    a.restart();
    a.flush();
    let b = lab.machine("b");
    b.until_content("d/Cargo.lock", b"not what it looked like");
    b.until_content("d/tmp/deep/file", b"deep");
}

fn preset(lab: &Lab, args: &[&str]) -> Output {
    let spec = lab.spec("command");
    let mut command = spec.command();
    command.arg("preset").args(args).args(&spec.args);
    wait::run(&mut command, SOON)
}

#[track_caller]
fn preset_ok(lab: &Lab, args: &[&str]) -> String {
    let output = preset(lab, args);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{err}");
    String::from_utf8(output.stdout).unwrap()
}

/// The presets that a status shows, as `DIR=NAME by ORIGIN`.
fn shown(machine: &Machine) -> Vec<String> {
    let status = machine.status();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let presets = status["presets"].as_array().unwrap().iter();
    presets
        .map(|at| {
            format!(
                "{}={} by {}",
                text(&at["dir"]),
                text(&at["preset"]),
                text(&at["origin"])
            )
        })
        .collect()
}

fn a_volume_says_what_its_directories_are_used_for(kind: StoreKind) {
    let lab = Lab::new(kind);
    // A store is made by its first mount.
    let mut a = lab.machine("a");
    assert_eq!(shown(&a), Vec::<String>::new());
    assert_eq!(preset_ok(&lab, &["list"]), "volume main has no presets\n");
    let text = preset_ok(&lab, &["set", "disk=bazel", "./cc/=ccache"]);
    assert_eq!(text, "ccache   cc\nbazel    disk\n");
    a.unmount();
    a.restart();
    assert_eq!(shown(&a), ["cc=ccache by volume", "disk=bazel by volume"]);
    let on_a = Disk::of(&a);
    on_a.start();
    file(&a.path("disk/tmp/stays"), b"");
    let blob = on_a.blob(b"blob");
    a.flush();

    let b = lab.spec("b").arg("--preset=cc=plain").start();
    assert_eq!(shown(&b), ["cc=plain by mount", "disk=bazel by volume"]);
    assert!(
        b.control_ok("status", &[])
            .contains("bazel for disk (said by the volume)")
    );
    Disk::of(&b).until("B has the blob", true, "cas", &blob);
    assert!(!b.path("disk/tmp").exists());

    // A fork has what its parent says, and may say otherwise.
    let fork = lab.spec("fork");
    let mut create = fork.command();
    create
        .args(["fork", "create", "fork", "--from", "main"])
        .args(&fork.args);
    wait::run_ok(&mut create, SOON);
    preset_ok(&lab, &["set", "cc=sccache", "--volume", "fork"]);
    let fork = fork.arg("--volume=fork").start();
    assert_eq!(shown(&fork), ["cc=sccache by volume", "disk=bazel by volume"]);

    // While the store is away, what it said last counts.
    a.unmount();
    lab.set_down(true);
    a.restart();
    assert_eq!(shown(&a), ["cc=ccache by volume", "disk=bazel by volume"]);
    lab.set_down(false);
    a.unmount();
    let json = preset_ok(&lab, &["remove", "cc", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        json,
        serde_json::json!({"volume": "main", "presets": {"disk": "bazel"}})
    );
    a.restart();
    assert_eq!(shown(&a), ["disk=bazel by volume"]);
}

#[test]
fn what_cannot_be_a_preset_is_refused_before_anything_is_made() {
    let lab = Lab::new(StoreKind::File);
    for (args, why) in [
        (
            &["--preset", "disk=make"][..],
            "known: bazel, ccache, sccache, plain",
        ),
        (&["--preset", "/disk=bazel"], "is absolute"),
        (&["--preset", "a/../disk=bazel"], "has a '..' in it"),
        (&["--preset", "disk"], "is not DIR=NAME"),
        (
            &["--preset", "a=bazel", "--preset", "./a/=ccache"],
            "a has two presets, bazel and ccache",
        ),
    ] {
        let spec = lab.spec("bad");
        let mut mount = spec.mount_command();
        mount.args(args).arg("--foreground").arg(&spec.mountpoint);
        let output = wait::run(&mut mount, SOON);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {err}");
        assert!(err.contains(why), "{args:?}: {err}");
    }
    let spec = lab.spec("bad").env("CASMOUNT_PRESET", "disk=bazel,cc=make");
    let mut mount = spec.mount_command();
    mount.arg("--foreground").arg(&spec.mountpoint);
    let output = wait::run(&mut mount, SOON);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(
        err.contains("CASMOUNT_PRESET") && err.contains("\"make\" is not a preset"),
        "{err}"
    );
    assert_eq!(lab.objects().len(), 0);
}

#[test]
fn an_entry_of_a_tools_cache_belongs_to_the_mounting_user_also_where_owners_are_kept() {
    let lab = Lab::new(StoreKind::File);
    let spec = lab.spec("a").arg("--owner=preserve").arg("--preset=cc=ccache");
    let a = spec.start();
    let me = rustix::process::geteuid().as_raw();
    if me != 0 {
        eprintln!("skipped: only root may give files away");
        return;
    }
    for dir in ["cc", "other"] {
        fs::create_dir(a.path(dir)).unwrap();
        file(&a.path(dir).join("file"), b"");
        for path in [a.path(dir).join("file"), a.path(dir)] {
            chown(&path, Some(1234), Some(1234)).unwrap();
        }
    }
    let owner = |path: &str| {
        fs::metadata(a.path(path))
            .map(|meta| (meta.uid(), meta.gid()))
            .unwrap()
    };
    wait::until("the owners are those of the presets", SOON, || {
        let owners = [owner("cc"), owner("cc/file"), owner("other"), owner("other/file")];
        (owners == [(0, 0), (0, 0), (1234, 1234), (1234, 1234)]).then_some(())
    });
}
