//! Waiting for conditions, never for time: each wait has a deadline and says what it waited for.

use std::{
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// How often a condition is looked at.
const PACE: Duration = Duration::from_millis(10);

/// Waits until `probe` finds what it looks for.
///
/// Panics with `what` when `limit` is over first.
#[track_caller]
pub fn until<T>(what: &str, limit: Duration, probe: impl FnMut() -> Option<T>) -> T {
    let found = try_until(limit, probe);
    found.unwrap_or_else(|| panic!("still not so after {limit:?}: {what}"))
}

/// Waits until `probe` finds what it looks for, or until `limit` is over.
pub fn try_until<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(PACE);
    }
}

/// Runs something that might hang, in a thread of its own.
///
/// Panics with `what` when it has not ended after `limit`; the thread is left behind then,
/// and ends when the guard of its mount ends the daemon.
#[track_caller]
pub fn within<T: Send + 'static>(what: &str, limit: Duration, act: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    let worker = thread::spawn(move || {
        let _ = sender.send(act());
    });
    match receiver.recv_timeout(limit) {
        Ok(value) => value,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("hangs for more than {limit:?}: {what}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => match worker.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("the worker sends before it ends"),
        },
    }
}

/// Runs a program to its end and returns what it said; kills it and panics after `limit`.
#[track_caller]
pub fn run(command: &mut Command, limit: Duration) -> Output {
    let shown = format!("{command:?}");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command
        .spawn()
        .unwrap_or_else(|err| panic!("cannot start {shown}: {err}"));
    let id = child.id();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(child.wait_with_output()));
    if let Ok(output) = receiver.recv_timeout(limit) {
        output.unwrap_or_else(|err| panic!("cannot wait for {shown}: {err}"))
    } else {
        kill(id);
        panic!("still running after {limit:?}: {shown}");
    }
}

/// Runs a program that must succeed; returns what it wrote to its standard output.
#[track_caller]
pub fn run_ok(command: &mut Command, limit: Duration) -> String {
    let output = run(command, limit);
    let err = String::from_utf8_lossy(&output.stderr);
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{err}{out}",
        output.status
    );
    out
}

/// Kills one process by its id.
pub fn kill(id: u32) {
    if let Some(pid) = rustix::process::Pid::from_raw(id as i32) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Starts a program and kills it when it has run for `lived`; false when it had ended by then.
///
/// A sleep: the moment is the point, and where it falls is for chance and the caller's many attempts.
pub fn kill_after(command: &mut Command, lived: Duration) -> bool {
    let command = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = ChildGuard(command.spawn().expect("a program starts"));
    std::thread::sleep(lived);
    let lives = child.0.try_wait().expect("it is our child").is_none();
    if lives {
        kill(child.0.id());
        child.0.wait().expect("it was killed");
    }
    lives
}

/// Kills a child when the test ends.
pub struct ChildGuard(pub Child);

impl Drop for ChildGuard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
