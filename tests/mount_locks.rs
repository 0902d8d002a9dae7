//! Locks of files of a mount, between the processes of one machine.

mod support;

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
    time::Duration,
};

use rustix::fs::{FlockOperation, fcntl_lock, flock};
use support::{
    child,
    place::Place,
    posix::{file, rw},
    wait,
};

/// Whether flock(1), another process, gets an exclusive lock at once.
fn other_process_can_lock(path: &Path) -> bool {
    let mut command = Command::new("flock");
    command.arg("-n").arg(path).arg("true");
    wait::run(&mut command, Duration::from_secs(20)).status.success()
}

#[test]
fn an_exclusive_flock_keeps_others_out_until_it_goes() {
    let place = Place::new();
    let path = file(&place.path("f"), b"x");
    for sealed in [false, true] {
        let (a, b) = (rw(&path), rw(&path));
        flock(&a, FlockOperation::NonBlockingLockExclusive).unwrap();
        assert_errno!(flock(&b, FlockOperation::NonBlockingLockExclusive), EWOULDBLOCK);
        assert_errno!(flock(&b, FlockOperation::NonBlockingLockShared), EWOULDBLOCK);
        assert!(!other_process_can_lock(&path));
        flock(&a, FlockOperation::Unlock).unwrap();
        flock(&b, FlockOperation::NonBlockingLockExclusive).unwrap();
        drop((a, b));
        assert!(other_process_can_lock(&path), "closing lets go, sealed: {sealed}");
        place.seal();
    }
}

#[test]
fn shared_flocks_go_together() {
    let place = Place::new();
    let path = file(&place.path("f"), b"x");
    let (a, b, c) = (rw(&path), rw(&path), rw(&path));
    flock(&a, FlockOperation::NonBlockingLockShared).unwrap();
    flock(&b, FlockOperation::NonBlockingLockShared).unwrap();
    assert_errno!(flock(&c, FlockOperation::NonBlockingLockExclusive), EWOULDBLOCK);
    drop((a, b));
    flock(&c, FlockOperation::NonBlockingLockExclusive).unwrap();
}

#[test]
fn a_waiting_flock_is_woken() {
    let place = Place::new();
    let path = file(&place.path("f"), b"x");
    let holder = rw(&path);
    flock(&holder, FlockOperation::LockExclusive).unwrap();
    let waiting = {
        let path = path.clone();
        std::thread::spawn(move || flock(rw(&path), FlockOperation::LockExclusive))
    };
    assert!(!waiting.is_finished());
    flock(&holder, FlockOperation::Unlock).unwrap();
    wait::until("the waiter has the lock", Duration::from_secs(10), || {
        waiting.is_finished().then_some(())
    });
    waiting.join().unwrap().unwrap();
}

#[test]
#[ignore = "a part of another test, in a process of its own"]
fn child_that_holds_a_record_lock() {
    let Some(path) = child::argument() else { return };
    let opened = rw(&path);
    fcntl_lock(&opened, FlockOperation::NonBlockingLockExclusive).unwrap();
    fs::write(path.with_extension("locked"), b"").unwrap();
    child::wait_for_parent();
}

#[test]
fn record_locks_hold_between_processes_and_end_with_them() {
    let place = Place::new();
    let path = file(&place.path("f"), b"0123456789");
    let opened = rw(&path);
    let holder = child::spawn("child_that_holds_a_record_lock", &path);
    wait::until("the child holds its lock", Duration::from_secs(20), || {
        path.with_extension("locked").exists().then_some(())
    });
    assert_errno!(
        fcntl_lock(&opened, FlockOperation::NonBlockingLockExclusive),
        EAGAIN | EACCES
    );
    assert_errno!(
        fcntl_lock(&opened, FlockOperation::NonBlockingLockShared),
        EAGAIN | EACCES
    );
    // Locks of the two kinds do not see each other on Linux.
    flock(&opened, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert!(child::finish(holder));
    fcntl_lock(&opened, FlockOperation::NonBlockingLockExclusive).unwrap();
    fcntl_lock(&opened, FlockOperation::Unlock).unwrap();
}

#[test]
fn a_killed_holder_lets_go() {
    let place = Place::new();
    let path = file(&place.path("f"), b"0123456789");
    let opened = rw(&path);
    let holder = child::spawn("child_that_holds_a_record_lock", &path);
    wait::until("the child holds its lock", Duration::from_secs(20), || {
        path.with_extension("locked").exists().then_some(())
    });
    drop(holder);
    fcntl_lock(&opened, FlockOperation::NonBlockingLockExclusive).unwrap();
}

#[test]
fn locked_counters_lose_no_step() {
    let place = Place::new();
    let path = file(&place.path("counter"), b"0");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let lock = File::open(&path).unwrap();
                    flock(&lock, FlockOperation::LockExclusive).unwrap();
                    let count: u32 = fs::read_to_string(&path).unwrap().parse().unwrap();
                    fs::write(&path, (count + 1).to_string()).unwrap();
                }
            });
        }
    });
    assert_eq!(fs::read_to_string(&path).unwrap(), "200");
}
