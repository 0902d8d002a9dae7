//! What is done to open files.

use std::{
    fs::{self, File},
    io::{Read, Write},
    mem::MaybeUninit,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, MetadataExt, PermissionsExt},
    },
    process::Command,
    time::Duration,
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, inotify, mkdirat, openat},
    io::Errno,
};

use crate::support::{
    posix::{Code, content, file, ro, rw},
    programs,
    trial::compare,
    wait,
};

#[test]
fn open_files_live_on_without_and_with_other_names() {
    compare(&[], &[], |t| {
        let open = rw(&file(&t.path("f"), b"content"));
        fs::rename(t.path("f"), t.path("g")).unwrap();
        open.write_all_at(b"renamed", 0).unwrap();
        t.note("renamed", content(&t.path("g")));
        file(&t.path("over"), b"over");
        fs::rename(t.path("over"), t.path("g")).unwrap();
        t.note("replaced", open.metadata().unwrap().nlink());
        t.call("write to what was replaced", open.write_all_at(b"x", 3));
        t.call("extend what was replaced", open.set_len(50));
        let meta = open.metadata().unwrap();
        t.note("what was replaced", (meta.len(), meta.nlink(), meta.mode()));
        t.call(
            "chmod of what was replaced",
            open.set_permissions(fs::Permissions::from_mode(0o600)),
        );
        t.call("sync of what was replaced", open.sync_all());
        t.note("what replaced it", content(&t.path("g")));

        fs::create_dir(t.path("d")).unwrap();
        let dir = File::open(t.path("d")).unwrap();
        file(&t.path("d/in"), b"in");
        fs::rename(t.path("d"), t.path("e")).unwrap();
        let flags = OFlags::CREATE | OFlags::RDWR;
        t.call(
            "below a renamed directory",
            openat(&dir, "new", flags, Mode::from_raw_mode(0o600)),
        );
        t.call("by its new name", fs::metadata(t.path("e/new")));
        fs::remove_file(t.path("e/in")).unwrap();
        fs::remove_file(t.path("e/new")).unwrap();
        fs::remove_dir(t.path("e")).unwrap();
        t.call(
            "create in a removed directory",
            openat(&dir, "x", flags, Mode::from_raw_mode(0o600)),
        );
        t.call(
            "mkdir in a removed directory",
            mkdirat(&dir, "x", Mode::from_raw_mode(0o700)),
        );
        t.call(
            "look into a removed directory",
            openat(&dir, "in", OFlags::RDONLY, Mode::empty()),
        );
        t.note("links of a removed directory", dir.metadata().unwrap().nlink());
        t.call("sync of a removed directory", dir.sync_all());
    });
}

#[test]
fn unusual_flags_mean_the_same() {
    let unnamed = ("O_TMPFILE", "done", "Operation not supported");
    compare(&[], &[unnamed], |t| {
        let path = file(&t.path("f"), &[1; 8_192]);
        let open = |flags: OFlags| openat(CWD, &path, flags, Mode::empty());
        let direct: Option<OwnedFd> = t.call("O_DIRECT", open(OFlags::DIRECT | OFlags::RDWR));
        let direct = File::from(direct.unwrap());
        // Aligned as disks want it.
        let mut memory = vec![2; 3 * 4_096];
        let start = memory.as_ptr().align_offset(4_096);
        let block = &mut memory[start..start + 4_096];
        t.ask("O_DIRECT write", direct.write_at(block, 4_096));
        t.note("O_DIRECT seen by others", content(&path)[4_095..4_097].to_vec());
        t.ask("O_DIRECT read", direct.read_at(block, 0));
        t.note("O_DIRECT bytes", (block[0], block[4_095]));
        t.ask("O_DIRECT at the end", direct.read_at(block, 8_192));
        drop(direct);
        t.call(
            "O_TMPFILE",
            openat(
                CWD,
                t.path(""),
                OFlags::TMPFILE | OFlags::RDWR,
                Mode::from_raw_mode(0o600),
            ),
        );
        t.call("O_PATH", open(OFlags::PATH));
        t.call("O_NOATIME", open(OFlags::NOATIME));
        t.call("O_DIRECTORY of a file", open(OFlags::DIRECTORY));
        t.call("O_EXCL without O_CREAT", open(OFlags::EXCL | OFlags::RDWR));
        t.call(
            "O_CREAT of a directory",
            openat(CWD, t.path(""), OFlags::CREATE, Mode::empty()),
        );
        t.call(
            "O_CREAT with O_DIRECTORY",
            openat(
                CWD,
                t.path("x"),
                OFlags::CREATE | OFlags::DIRECTORY,
                Mode::from_raw_mode(0o700),
            ),
        );
        t.call("O_RDONLY with O_TRUNC", open(OFlags::TRUNC | OFlags::RDONLY));
        t.note("O_RDONLY with O_TRUNC: bytes", content(&path).len());
        let made = openat(
            CWD,
            t.path("no-rights"),
            OFlags::CREATE | OFlags::EXCL | OFlags::RDWR,
            Mode::empty(),
        );
        let made = File::from(t.call("create without rights", made).unwrap());
        t.call("write without rights", made.write_all_at(b"x", 0));
        let access =
            |flags| rustix::fs::accessat(CWD, t.path("no-rights"), rustix::fs::Access::EXEC_OK, flags);
        t.call("nobody may run it", access(AtFlags::empty()));
        let reader = ro(&path);
        t.call("write to a reader", (&reader).write_all(b"x"));
        t.call("truncate a reader", reader.set_len(0));
        t.call(
            "set times of a reader",
            reader.set_modified(std::time::UNIX_EPOCH),
        );
        t.call(
            "read a directory",
            (&File::open(t.path("")).unwrap()).read(&mut [0; 10]),
        );
    });
}

#[test]
fn programs_that_run_are_not_written_to() {
    compare(&[], &[], |t| {
        let sleep = programs::find("sleep").expect("every system has it");
        let path = file(&t.path("program"), &fs::read(sleep).unwrap());
        let length = content(&path).len();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let mut running = Command::new(&path).arg("60").spawn().unwrap();
        let open = |flags: OFlags| openat(CWD, &path, flags, Mode::empty());
        t.call("O_WRONLY", open(OFlags::WRONLY));
        t.call("O_RDWR with O_TRUNC", open(OFlags::RDWR | OFlags::TRUNC));
        t.call("O_RDONLY with O_TRUNC", open(OFlags::RDONLY | OFlags::TRUNC));
        t.note("whole", content(&path).len() == length);
        t.note("runs on", running.try_wait().unwrap().is_none());
        running.kill().unwrap();
        running.wait().unwrap();
        // The kernel tells of the end of an open without waiting for who is told.
        let emptied = || open(OFlags::RDONLY | OFlags::TRUNC).ok();
        let opened = wait::try_until(Duration::from_secs(5), emptied).ok_or(Errno::TXTBSY);
        t.call("O_RDONLY with O_TRUNC after its end", opened);
        t.note("empty", content(&path).len());
    });
}

#[test]
fn appends_of_several_processes_are_all_there() {
    compare(&[], &[], |t| {
        let path = file(&t.path("log"), b"");
        let script = r#"for n in $(seq 150); do echo "$1:$n:padding-padding-padding" >> "$2"; done"#;
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                let mut sh = Command::new("sh");
                sh.args(["-c", script, "sh", &writer.to_string()]).arg(&path);
                wait::ChildGuard(sh.spawn().unwrap())
            })
            .collect();
        for mut writer in writers {
            let ended = wait::until("a writer has ended", Duration::from_secs(120), || {
                writer.0.try_wait().unwrap()
            });
            assert!(ended.success());
        }
        let text = String::from_utf8(content(&path)).unwrap();
        let mut lines: Vec<_> = text.lines().collect();
        lines.sort_unstable();
        t.note("lines", lines);
    });
}

#[test]
fn watchers_hear_the_same() {
    compare(&[], &[], |t| {
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        fs::create_dir(t.path("d")).unwrap();
        let kinds = inotify::WatchFlags::ALL_EVENTS;
        inotify::add_watch(&watch, t.path("d"), kinds).unwrap();
        let path = t.path("d/f");
        fs::write(&path, b"content").unwrap();
        fs::read(&path).unwrap();
        File::options()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"more")
            .unwrap();
        rw(&path).set_len(3).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(&path, t.path("d/g")).unwrap();
        fs::create_dir(t.path("d/sub")).unwrap();
        fs::hard_link(t.path("d/g"), t.path("d/h")).unwrap();
        fs::remove_file(t.path("d/g")).unwrap();
        fs::rename(t.path("d/h"), t.path("away")).unwrap();
        fs::remove_dir(t.path("d/sub")).unwrap();
        fs::remove_dir(t.path("d")).unwrap();
        let mut buffer = [MaybeUninit::uninit(); 16_384];
        let mut reader = inotify::Reader::new(&watch, &mut buffer);
        let mut heard = Vec::new();
        loop {
            match reader.next() {
                Ok(event) => heard.push((event.events(), event.file_name().map(ToOwned::to_owned))),
                Err(Errno::AGAIN) => break,
                Err(err) => panic!("{err}"),
            }
        }
        t.note("heard", heard);
    });
}

#[test]
fn record_locks_of_open_files_exclude_each_other_alike() {
    let lock = |file: &File, kind: libc::c_int, start: i64, len: i64| {
        // SAFETY: plain numbers, all of whose bit patterns are valid.
        let mut range: libc::flock = unsafe { std::mem::zeroed() };
        range.l_type = kind as i16;
        range.l_whence = libc::SEEK_SET as i16;
        (range.l_start, range.l_len) = (start, len);
        // SAFETY: the call reads the structure through the pointer and keeps nothing.
        let done = unsafe {
            libc::fcntl(
                std::os::fd::AsRawFd::as_raw_fd(file),
                libc::F_OFD_SETLK,
                &raw const range,
            )
        };
        if done == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        }
    };
    compare(&[], &[], |t| {
        let path = file(&t.path("f"), &[0; 100]);
        let (a, b) = (rw(&path), rw(&path));
        t.call("a 0-10", lock(&a, libc::F_WRLCK, 0, 10));
        t.call("b 5-15", lock(&b, libc::F_WRLCK, 5, 10));
        t.call("b 10-20", lock(&b, libc::F_WRLCK, 10, 10));
        t.call("a to the end", lock(&a, libc::F_RDLCK, 50, 0));
        t.call("b shares", lock(&b, libc::F_RDLCK, 60, 5));
        t.call("b alone", lock(&b, libc::F_WRLCK, 1_000, 5));
        t.call("a lets go in the middle", lock(&a, libc::F_UNLCK, 3, 4));
        t.call("b takes the middle", lock(&b, libc::F_WRLCK, 3, 4));
        t.call("b takes more", lock(&b, libc::F_WRLCK, 2, 4));
        t.call("a reader writes", lock(&ro(&path), libc::F_WRLCK, 90, 1));
        drop(a);
        t.call("b after a closed", lock(&b, libc::F_WRLCK, 0, 0));
        t.note("code", lock(&b, 99, 0, 0).code());
    });
}
