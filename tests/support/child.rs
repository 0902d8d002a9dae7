//! A part of a test in a process of its own: the test program runs itself again.
//!
//! A child is a test that is marked `#[ignore]` and returns at once unless [`argument`]
//! says that it was started by [`spawn`]. It ends when its standard input closes, so a
//! test that dies takes its children along.

use std::{
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use super::wait::ChildGuard;

const ARGUMENT: &str = "CASMOUNT_TEST_CHILD_ARGUMENT";

/// Starts the ignored test `name` of this program with a path to work on.
pub fn spawn(name: &str, argument: &Path) -> ChildGuard {
    let mut command = command(name, argument);
    ChildGuard(command.spawn().expect("the test program can be started"))
}

/// Like [`spawn`], as another user.
pub fn spawn_as(name: &str, argument: &Path, uid: u32, gid: u32) -> ChildGuard {
    let mut command = command(name, argument);
    command.uid(uid).gid(gid);
    ChildGuard(command.spawn().expect("the test program can be started"))
}

fn command(name: &str, argument: &Path) -> Command {
    let program = std::env::current_exe().expect("a running program has a path");
    let mut command = Command::new(program);
    command.args(["--exact", name, "--ignored", "--nocapture", "--test-threads=1"]);
    command
        .env(ARGUMENT, argument)
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    command
}

/// The path that a child was started with; `None` in a test run.
pub fn argument() -> Option<PathBuf> {
    std::env::var_os(ARGUMENT).map(PathBuf::from)
}

/// Waits until whoever started this child lets go of it.
pub fn wait_for_parent() {
    let _ = std::io::stdin().read(&mut [0]);
}

/// Lets a child end by itself, and returns whether it succeeded.
pub fn finish(mut child: ChildGuard) -> bool {
    let inner: &mut Child = &mut child.0;
    drop(inner.stdin.take());
    let ended = super::wait::try_until(std::time::Duration::from_secs(30), || {
        inner.try_wait().expect("our own child")
    });
    ended.is_some_and(|status| status.success())
}
