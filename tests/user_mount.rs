//! The mount of an ordinary user, through `fusermount3`.
//!
//! Each test has a mount namespace of its own, in which a user may mount, see [`namespace`]: systems
//! differ in who may open `/dev/fuse`, and only root can become another user.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs::{self, File},
    os::unix::{
        fs::{FileExt, MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use lab::{Lab, StoreKind};
use support::{
    child,
    machine::{Machine, MachineSpec},
    namespace,
    posix::{content, file, rw},
    posix_suite, tree, wait,
};

on_both_stores!(
    a_user_mounts_uses_and_unmounts,
    a_crashed_mount_of_a_user_is_taken_over,
);

/// A user without rights anywhere.
const USER: u32 = 54_321;

const SOON: Duration = Duration::from_secs(30);

/// Enters a namespace in which [`USER`] can mount; says why, if that cannot be had here.
fn obstacle(fuse_conf: &str) -> Option<String> {
    let found = Command::new("fusermount3")
        .arg("-V")
        .stdout(Stdio::null())
        .status();
    if !found.is_ok_and(|status| status.success()) {
        return Some("fusermount3 is not installed".to_owned());
    }
    namespace::enter_for_user(USER, fuse_conf).err()
}

fn user_spec(lab: &Lab, kind: StoreKind) -> MachineSpec {
    if kind == StoreKind::File {
        let store = lab.dir().join("store");
        std::os::unix::fs::chown(&store, Some(USER), Some(USER)).unwrap();
    }
    lab.spec("user").user(USER, USER)
}

#[test]
#[ignore = "a part of another test, in a process of its own"]
fn child_that_uses_the_mount() {
    let Some(root) = child::argument() else { return };
    file(&root.join("f"), b"written by the user");
    assert_eq!(content(&root.join("f")), b"written by the user");
    let large: Vec<u8> = (0..5_000_000_u32).map(|n| (n >> 7) as u8).collect();
    file(&root.join("large"), &large);
    assert!(content(&root.join("large")) == large);
    let part = rw(&root.join("large"));
    part.write_all_at(b"in the middle", 2_500_000).unwrap();
    part.sync_all().unwrap();
    part.set_len(4_000_000).unwrap();
    drop(part);
    let changed = content(&root.join("large"));
    assert_eq!(changed.len(), 4_000_000);
    assert_eq!(&changed[2_500_000..2_500_013], b"in the middle");
    fs::create_dir(root.join("d")).unwrap();
    fs::rename(root.join("f"), root.join("d/g")).unwrap();
    std::os::unix::fs::symlink("d/g", root.join("l")).unwrap();
    assert_eq!(content(&root.join("l")), b"written by the user");
    assert_eq!(fs::metadata(root.join("large")).unwrap().uid(), USER);
    fs::remove_file(root.join("large")).unwrap();
    assert_eq!(tree::read(&root).len(), 3);
}

#[test]
#[ignore = "a part of another test, in a process of its own"]
fn child_that_finds_what_was_kept() {
    let Some(root) = child::argument() else { return };
    assert_eq!(content(&root.join("d/g")), b"written by the user");
    assert_eq!(content(&root.join("l")), b"written by the user");
}

#[test]
#[ignore = "a part of another test, in a process of its own"]
fn child_that_has_a_file_open() {
    let Some(root) = child::argument() else { return };
    let open = File::create(root.join("open")).unwrap();
    open.write_all_at(b"half", 0).unwrap();
    file(&root.join("closed"), b"closed before the crash");
    file(&root.join("ready"), b"");
    child::wait_for_parent();
}

#[track_caller]
fn as_user(test: &str, root: &Path) {
    assert!(
        child::finish(child::spawn_as(test, root, USER, USER)),
        "{test} failed"
    );
}

/// What the user reads at a path of the mount, which is closed to root.
fn user_reads(path: &Path) -> Option<Vec<u8>> {
    let mut cat = Command::new("cat");
    let output = wait::run(cat.arg(path).uid(USER).gid(USER), SOON);
    output.status.success().then_some(output.stdout)
}

fn a_user_mounts_uses_and_unmounts(kind: StoreKind) {
    if let Some(why) = obstacle("") {
        skip!("{why}");
    }
    let lab = Lab::new(kind);
    let mut machine = user_spec(&lab, kind).start();
    as_user("child_that_uses_the_mount", machine.root());
    machine.flush();
    assert_eq!(machine.status()["passthrough"], false);
    let said = machine.log().matches("no passthrough").count();
    assert_eq!(said, 1, "said {said} times that there is no passthrough");
    // Root finds the daemons of other users.
    let mut status = MachineSpec::new("root", lab.dir(), &lab.url()).command();
    let shown = wait::run_ok(status.arg("status").arg(machine.root()), SOON);
    assert!(shown.contains("no passthrough"), "{shown}");
    machine.unmount();
    machine.restart();
    as_user("child_that_finds_what_was_kept", machine.root());
    machine.unmount();
    // It reached the store, too.
    let other = lab.machine("other");
    other.until_content("d/g", b"written by the user");
    assert!(lab.assert_blobs_match_their_names() > 0);
}

fn a_crashed_mount_of_a_user_is_taken_over(kind: StoreKind) {
    if let Some(why) = obstacle("") {
        skip!("{why}");
    }
    let lab = Lab::new(kind);
    let mut machine = user_spec(&lab, kind).start();
    as_user("child_that_uses_the_mount", machine.root());
    let writer = child::spawn_as("child_that_has_a_file_open", machine.root(), USER, USER);
    wait::until("a file is open", SOON, || user_reads(&machine.path("ready")));
    machine.kill9();
    // While a program still has a descriptor of the dead mount.
    machine.restart();
    drop(writer);
    as_user("child_that_finds_what_was_kept", machine.root());
    assert_eq!(
        user_reads(&machine.path("closed")).as_deref(),
        Some(&b"closed before the crash"[..])
    );
    machine.flush();
    // And once more over a mount that nobody uses.
    machine.kill9();
    machine.restart();
    as_user("child_that_finds_what_was_kept", machine.root());
    machine.unmount();
}

#[test]
fn the_suite_of_posix_finds_no_fault_in_the_mount_of_a_user() {
    let [program] = need!("pjdfstest");
    // Where it is, the user need not be able to go.
    let program = fs::read(program).unwrap();
    if let Some(why) = obstacle("") {
        skip!("{why}");
    }
    let lab = Lab::new(StoreKind::File);
    let machine = user_spec(&lab, StoreKind::File).start();
    let copy = file(&lab.dir().join("pjdfstest"), &program);
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    let found = posix_suite::run(&copy, machine.root(), lab.dir(), Some(USER));
    assert!(found.failed.is_empty(), "{}", found.said);
    // Half of it becomes other users, which only root may.
    assert!(found.passed.len() > 180, "{}", found.said);
    assert!(found.said.contains("requires root privileges"), "{}", found.said);
}

#[test]
fn the_mount_of_a_user_is_closed_to_others() {
    if let Some(why) = obstacle("") {
        skip!("{why}");
    }
    let lab = Lab::new(StoreKind::File);
    let machine = user_spec(&lab, StoreKind::File).start();
    as_user("child_that_uses_the_mount", machine.root());
    assert_errno!(fs::read_dir(machine.root()), EACCES);
    let mut other = Command::new("ls");
    other.arg(machine.root()).uid(USER + 1).gid(USER + 1);
    assert!(!wait::run(&mut other, SOON).status.success());
}

#[test]
fn sharing_is_refused_where_the_machine_does_not_allow_it() {
    if let Some(why) = obstacle("# user_allow_other\n") {
        skip!("{why}");
    }
    let lab = Lab::new(StoreKind::File);
    let spec = user_spec(&lab, StoreKind::File).arg("--allow-other");
    for foreground in [true, false] {
        let mut mount = spec.mount_command();
        mount.args(foreground.then_some("--foreground"));
        let output = wait::run(mount.arg(&spec.mountpoint), SOON);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let failures: Vec<_> = said
            .lines()
            .filter(|line| line.starts_with("casmount:"))
            .collect();
        assert_eq!(failures.len(), 1, "{said}");
        let advice = "give --no-allow-other, or add the line user_allow_other to /etc/fuse.conf";
        assert!(failures[0].contains(advice), "{said}");
        assert!(!support::tempdir::mountpoints().contains(&spec.mountpoint));
    }
    // Without the wish it works at once, with the same cache directory.
    let mut spec = spec;
    spec.args.pop();
    let machine = spec.arg("--no-allow-other").start();
    as_user("child_that_uses_the_mount", machine.root());
}

#[test]
fn a_user_shares_a_mount_where_the_machine_allows_it() {
    if let Some(why) = obstacle("user_allow_other\n") {
        skip!("{why}");
    }
    let lab = Lab::new(StoreKind::File);
    let spec = user_spec(&lab, StoreKind::File).arg("--allow-other");
    let machine: Machine = spec.start();
    as_user("child_that_uses_the_mount", machine.root());
    assert_eq!(content(&machine.path("d/g")), b"written by the user");
    let as_other = |program: &str, path: &Path| {
        let mut command = Command::new(program);
        command.arg(path).uid(USER + 1).gid(USER + 1);
        wait::run(&mut command, SOON).status.success()
    };
    assert!(as_other("cat", &machine.path("d/g")));
    // The mode bits hold: the directories belong to the user.
    assert!(!as_other("touch", &machine.path("new")));
}
