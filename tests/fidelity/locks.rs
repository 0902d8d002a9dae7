//! Locks of all kinds, leases, and what is told of changes.

use std::{
    ffi::CString,
    fs::{self, File},
    io::Read,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, openat};

use crate::support::{
    posix::{answer, file, ro, rw},
    trial::compare,
};

/// A record lock of a process, or of an open file; says who is in the way when it only asks.
fn record(
    file: &File,
    command: i32,
    kind: i32,
    start: i64,
    len: i64,
) -> std::io::Result<(i32, i64, i64, bool)> {
    // SAFETY: plain numbers, all of whose bit patterns are valid.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = kind as i16;
    range.l_whence = libc::SEEK_SET as i16;
    (range.l_start, range.l_len) = (start, len);
    // SAFETY: the call reads and writes the structure through the pointer and keeps nothing.
    answer(i64::from(unsafe {
        libc::fcntl(file.as_raw_fd(), command, &raw mut range)
    }))?;
    let mine = range.l_pid == std::process::id() as i32;
    Ok((i32::from(range.l_type), range.l_start, range.l_len, mine))
}

#[test]
fn locks_of_three_kinds_see_each_other_alike() {
    compare(&[], &[], |t| {
        let path = file(&t.path("f"), &[0; 100]);
        let (a, b, reader) = (rw(&path), rw(&path), ro(&path));
        t.ask("of the process", record(&a, libc::F_SETLK, libc::F_WRLCK, 0, 10));
        t.ask(
            "of the process by another open",
            record(&b, libc::F_SETLK, libc::F_WRLCK, 5, 10),
        );
        t.ask(
            "of an open over that of the process",
            record(&b, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 5),
        );
        t.ask(
            "who is in the way",
            record(&b, libc::F_OFD_GETLK, libc::F_WRLCK, 0, 5),
        );
        t.ask(
            "whole files are another matter",
            flock(&a, FlockOperation::NonBlockingLockExclusive),
        );
        t.ask(
            "a second of the whole",
            flock(&b, FlockOperation::NonBlockingLockExclusive),
        );
        t.ask(
            "a shared one of the whole",
            flock(&reader, FlockOperation::NonBlockingLockShared),
        );
        t.ask(
            "not for a reader",
            record(&reader, libc::F_SETLK, libc::F_WRLCK, 50, 1),
        );
        t.ask("of an open", record(&b, libc::F_OFD_SETLK, libc::F_RDLCK, 20, 5));
        t.ask(
            "of the process over that of an open",
            record(&a, libc::F_SETLK, libc::F_WRLCK, 0, 50),
        );
        t.ask("who has it", record(&a, libc::F_GETLK, libc::F_WRLCK, 0, 50));
        drop(reader);
        // Closing any descriptor of a file lets go of what the process has locked.
        t.ask(
            "after a close",
            record(&b, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 5),
        );
        t.ask("to the end", record(&b, libc::F_OFD_SETLK, libc::F_WRLCK, 90, 0));
        t.ask(
            "behind the end",
            record(&a, libc::F_SETLK, libc::F_WRLCK, 1_000, 1),
        );
        t.ask(
            "before the start",
            record(&a, libc::F_SETLK, libc::F_WRLCK, 10, -20),
        );
        t.ask("backwards", record(&a, libc::F_SETLK, libc::F_WRLCK, 70, -10));
        drop(a);
        t.ask(
            "the whole is free",
            flock(&b, FlockOperation::NonBlockingLockExclusive),
        );
        fs::remove_file(&path).unwrap();
        t.ask(
            "without a name",
            record(&b, libc::F_OFD_SETLK, libc::F_WRLCK, 30, 5),
        );
        let dir = File::open(t.path("")).unwrap();
        t.ask(
            "a directory",
            flock(&dir, FlockOperation::NonBlockingLockExclusive),
        );
        t.ask(
            "a directory again",
            flock(
                File::open(t.path("")).unwrap(),
                FlockOperation::NonBlockingLockShared,
            ),
        );
        t.ask(
            "a range of a directory",
            record(&dir, libc::F_SETLK, libc::F_RDLCK, 0, 1),
        );
    });
}

/// Of `linux/fcntl.h`, for x86 and ARM.
const F_SETSIG: i32 = 10;
const DN_CREATE: i32 = 4;

#[test]
fn leases_and_watches_are_had_alike() {
    compare(&[], &[], |t| {
        let path = file(&t.path("f"), b"content");
        let lease = |file: &File, kind: i32| {
            // SAFETY: numbers alone.
            answer(i64::from(unsafe {
                libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind)
            }))
        };
        // The signal of a broken lease, and of a notice, is one that does nothing by itself.
        let quiet = |file: &File| {
            // SAFETY: numbers alone.
            unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) };
        };
        let kind = |file: &File| {
            // SAFETY: numbers alone.
            answer(i64::from(unsafe {
                libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE)
            }))
        };
        {
            let writer = rw(&path);
            quiet(&writer);
            t.ask("read lease of a writer", lease(&writer, libc::F_RDLCK));
            t.ask("write lease of the only one", lease(&writer, libc::F_WRLCK));
            t.ask("kind of lease", kind(&writer));
            let now = openat(CWD, &path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty());
            t.call("open beside a write lease", now);
            t.ask("let go", lease(&writer, libc::F_UNLCK));
            let reader = ro(&path);
            quiet(&reader);
            t.ask("write lease of one of two", lease(&writer, libc::F_WRLCK));
            t.ask("read lease beside a writer", lease(&reader, libc::F_RDLCK));
            drop(writer);
            t.ask("read lease", lease(&reader, libc::F_RDLCK));
            t.call(
                "read beside it",
                openat(CWD, &path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()),
            );
            t.call(
                "write beside it",
                openat(CWD, &path, OFlags::RDWR | OFlags::NONBLOCK, Mode::empty()),
            );
            t.ask("let go of it", lease(&reader, libc::F_UNLCK));
            t.ask(
                "of a directory",
                lease(&File::open(t.path("")).unwrap(), libc::F_RDLCK),
            );
        }
        t.note("of nobody", kind(&ro(&path)).ok());
        let dir = File::open(t.path("")).unwrap();
        quiet(&dir);
        // SAFETY: numbers alone.
        let noticed = unsafe { libc::fcntl(dir.as_raw_fd(), libc::F_NOTIFY, DN_CREATE) };
        t.ask("F_NOTIFY of a directory", answer(i64::from(noticed)));
        // SAFETY: numbers alone.
        let noticed = unsafe { libc::fcntl(ro(&path).as_raw_fd(), libc::F_NOTIFY, DN_CREATE) };
        t.ask("F_NOTIFY of a file", answer(i64::from(noticed)));
        if !rustix::process::geteuid().is_root() {
            return;
        }
        // Watches of a mount or directory by fanotify: which events come, with descriptors; and with ids of files.
        let init = |flags: u32| {
            // SAFETY: numbers alone.
            let watch = answer(i64::from(unsafe {
                libc::fanotify_init(
                    libc::FAN_NONBLOCK | libc::FAN_CLOEXEC | flags,
                    (libc::O_RDONLY | libc::O_CLOEXEC) as u32,
                )
            }));
            // SAFETY: the descriptor is new, and nobody else's.
            watch.map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
        };
        let Ok(watch) = init(libc::FAN_CLASS_NOTIF) else {
            return;
        };
        let at = CString::new(t.path("").as_os_str().as_bytes()).unwrap();
        let mark = |watch: &File, kinds: u64| {
            // SAFETY: a path that ends with NUL.
            answer(i64::from(unsafe {
                libc::fanotify_mark(
                    watch.as_raw_fd(),
                    libc::FAN_MARK_ADD,
                    kinds,
                    libc::AT_FDCWD,
                    at.as_ptr(),
                )
            }))
        };
        let kinds = libc::FAN_OPEN
            | libc::FAN_MODIFY
            | libc::FAN_CLOSE_WRITE
            | libc::FAN_ACCESS
            | libc::FAN_EVENT_ON_CHILD;
        t.call("watch", mark(&watch, kinds));
        fs::write(&path, b"changed").unwrap();
        fs::read(&path).unwrap();
        let mut heard = Vec::new();
        let mut buffer = [0_u8; 4_096];
        while let Ok(len) = (&watch).read(&mut buffer) {
            for event in buffer[..len].chunks(size_of::<libc::fanotify_event_metadata>()) {
                // SAFETY: the kernel wrote whole records, which hold numbers alone.
                let event: libc::fanotify_event_metadata =
                    unsafe { std::ptr::read_unaligned(event.as_ptr().cast()) };
                // SAFETY: a descriptor that came with the event is ours.
                let of = File::from(unsafe { OwnedFd::from_raw_fd(event.fd) });
                let name = fs::read_link(format!("/proc/self/fd/{}", of.as_raw_fd())).unwrap();
                heard.push((event.mask, name.file_name().unwrap().to_owned()));
            }
        }
        t.note("heard", heard);
        if let Ok(by_id) = init(libc::FAN_CLASS_NOTIF | libc::FAN_REPORT_FID) {
            t.call(
                "ids of files",
                mark(&by_id, libc::FAN_CREATE | libc::FAN_DELETE | libc::FAN_ONDIR),
            );
        }
        if let Ok(guard) = init(libc::FAN_CLASS_CONTENT) {
            t.call(
                "leave to open",
                mark(&guard, libc::FAN_OPEN_PERM | libc::FAN_EVENT_ON_CHILD),
            );
        }
    });
}
