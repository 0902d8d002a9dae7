//! The mount of an ordinary user, through `fusermount3`.

mod support;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use support::{
    child,
    machine::{Machine, MachineSpec},
    posix::{content, file},
    tempdir::TestDir,
    tree, wait,
};

/// A user that this machine does not know: no entry in passwd, no home, no rights.
const USER: u32 = 54_321;

/// Why an ordinary user cannot mount on this host, if that is so.
fn obstacle() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("becoming another user needs root".to_owned());
    }
    let found = Command::new("fusermount3")
        .arg("-V")
        .stdout(Stdio::null())
        .status();
    if !found.is_ok_and(|status| status.success()) {
        return Some("fusermount3 is not installed".to_owned());
    }
    // fusermount3 opens the device as the user who asks; systems give it mode 0666.
    let device = fs::metadata("/dev/fuse").map(|meta| std::os::unix::fs::MetadataExt::mode(&meta));
    if !device.is_ok_and(|mode| mode & 0o006 == 0o006) {
        return Some("/dev/fuse is closed to ordinary users on this host".to_owned());
    }
    // The directories above must let the user through.
    let root = support::tempdir::root();
    fs::create_dir_all(&root).unwrap();
    let mut look = Command::new("test");
    std::os::unix::process::CommandExt::uid(look.arg("-x").arg(&root), USER);
    if !look.status().is_ok_and(|status| status.success()) {
        return Some(format!(
            "{} is closed to other users; set CASMOUNT_TEST_DIR",
            root.display()
        ));
    }
    None
}

fn user_machine(dir: &TestDir) -> Machine {
    let store = dir.path().join("store");
    fs::create_dir(&store).unwrap();
    std::os::unix::fs::chown(&store, Some(USER), Some(USER)).unwrap();
    let spec = MachineSpec::new("user", dir.path(), &format!("file://{}", store.display()));
    spec.user(USER, USER).start()
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
    fs::create_dir(root.join("d")).unwrap();
    fs::rename(root.join("f"), root.join("d/g")).unwrap();
    std::os::unix::fs::symlink("d/g", root.join("l")).unwrap();
    assert_eq!(content(&root.join("l")), b"written by the user");
    let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(root.join("large")).unwrap());
    assert_eq!(owner, USER);
    fs::remove_file(root.join("large")).unwrap();
    assert_eq!(tree::read(&root).len(), 3);
}

#[test]
#[ignore = "a part of another test, in a process of its own"]
fn child_that_finds_what_was_kept() {
    let Some(root) = child::argument() else { return };
    assert_eq!(content(&root.join("d/g")), b"written by the user");
}

#[track_caller]
fn as_user(test: &str, root: &Path) {
    assert!(
        child::finish(child::spawn_as(test, root, USER, USER)),
        "{test} failed"
    );
}

#[test]
fn a_user_mounts_uses_and_unmounts() {
    if let Some(why) = obstacle() {
        skip!("{why}");
    }
    let dir = TestDir::new();
    let mut machine = user_machine(&dir);
    as_user("child_that_uses_the_mount", machine.root());
    machine.flush();
    assert_eq!(machine.status()["passthrough"], false);
    let said = machine.log().to_lowercase().matches("passthrough").count();
    assert!(said <= 2, "said {said} times that there is no passthrough");
    machine.unmount();
    machine.restart();
    as_user("child_that_finds_what_was_kept", machine.root());
    machine.unmount();
}

#[test]
fn the_mount_of_a_user_is_closed_to_others() {
    if let Some(why) = obstacle() {
        skip!("{why}");
    }
    let dir = TestDir::new();
    let machine = user_machine(&dir);
    as_user("child_that_uses_the_mount", machine.root());
    assert_errno!(fs::read_dir(machine.root()), EACCES);
    let mut other = Command::new("ls");
    std::os::unix::process::CommandExt::uid(other.arg(machine.root()), USER + 1);
    assert!(!wait::run(&mut other, Duration::from_secs(20)).status.success());
}

#[test]
fn a_crashed_user_mount_is_taken_over() {
    if let Some(why) = obstacle() {
        skip!("{why}");
    }
    let dir = TestDir::new();
    let mut machine = user_machine(&dir);
    as_user("child_that_uses_the_mount", machine.root());
    machine.kill9();
    machine.restart();
    as_user("child_that_finds_what_was_kept", machine.root());
    machine.unmount();
}
