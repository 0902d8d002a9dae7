//! What is done to open files, and files of other kinds, in a mount beside the disk, call by call.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    ffi::CString,
    fs::{self, File},
    io::{Read, Write},
    mem::MaybeUninit,
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    process::Command,
    time::Duration,
};

use lab::{Lab, StoreKind};
use rustix::{
    fs::{
        AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, SeekFrom, XattrFlags, copy_file_range,
        fallocate, inotify, mkdirat, mknodat, openat,
    },
    io::Errno,
};
use support::{
    posix::{Code, content, file, ro, rw},
    trial::{Trial, compare},
    wait,
};

on_both_stores!(what_is_no_file_is_on_the_other_machine_too);

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
fn files_over_four_gigabytes_are_sparse_and_searched_alike() {
    const GIB: u64 = 1 << 30;
    compare(&[], &[], |t| {
        let large = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(t.path("large"))
            .unwrap();
        t.call("write behind 4 GiB", large.write_all_at(b"behind", 5 * GIB));
        t.call(
            "write across 4 GiB",
            large.write_all_at(&[7; 10_000], 4 * GIB - 5_000),
        );
        t.call("extend", large.set_len(6 * GIB + 1));
        t.note("size", fs::metadata(t.path("large")).unwrap().len());
        t.note("takes little", large.metadata().unwrap().blocks() < 1_000);
        let mut bytes = [0; 10];
        large.read_exact_at(&mut bytes, 5 * GIB - 2).unwrap();
        t.note("bytes", bytes);
        large.read_exact_at(&mut bytes, 4 * GIB - 5_005).unwrap();
        t.note("bytes before", bytes);
        t.ask("read at the end", large.read_at(&mut bytes, 6 * GIB - 1));
        let by_name = |from| rustix::fs::seek(&large, from);
        for at in [
            0,
            GIB,
            4 * GIB - 5_000,
            4 * GIB,
            5 * GIB,
            6 * GIB,
            6 * GIB + 1,
            7 * GIB,
        ] {
            t.ask(format!("data from {at}"), by_name(SeekFrom::Data(at)));
            t.ask(format!("hole from {at}"), by_name(SeekFrom::Hole(at)));
        }
        t.ask("from the end", by_name(SeekFrom::End(-1)));
        t.ask("before the start", by_name(SeekFrom::Current(i64::MIN)));
        t.ask(
            "beyond what there is",
            large.write_at(b"x", i64::MAX as u64).map(drop),
        );
        t.call("longer than can be", large.set_len(1 << 62));
        // Before anybody hashes it.
        fs::remove_file(t.path("large")).unwrap();

        let small = rw(&file(&t.path("small"), b"abc"));
        for (what, from) in [
            ("data", SeekFrom::Data(0)),
            ("hole", SeekFrom::Hole(0)),
            ("data at the end", SeekFrom::Data(3)),
            ("hole at the end", SeekFrom::Hole(3)),
        ] {
            t.ask(format!("small: {what}"), rustix::fs::seek(&small, from));
        }
        let empty = rw(&file(&t.path("empty"), b""));
        t.ask("empty: data", rustix::fs::seek(&empty, SeekFrom::Data(0)));
        t.ask("empty: hole", rustix::fs::seek(&empty, SeekFrom::Hole(0)));
    });
}

#[test]
fn space_is_given_and_taken_alike() {
    type Flags = FallocateFlags;
    // The kernel does not pass these on to any FUSE daemon.
    let differences = [
        ("collapse", "done", "Operation not supported"),
        ("collapse: bytes", "(15904, 0)", "(20000, 0)"),
        ("insert", "done", "Operation not supported"),
        ("insert: bytes", "(24096, 4096)", "(20000, 0)"),
    ];
    compare(&[], &differences, |t| {
        let cases = [
            ("allocate", Flags::empty(), 0, 50_000),
            ("allocate inside", Flags::empty(), 100, 100),
            ("allocate behind", Flags::empty(), 100_000, 1),
            ("keep size", Flags::KEEP_SIZE, 20_000, 100_000),
            ("punch", Flags::PUNCH_HOLE | Flags::KEEP_SIZE, 3_000, 9_000),
            ("punch all", Flags::PUNCH_HOLE | Flags::KEEP_SIZE, 0, 1 << 20),
            ("punch without keeping the size", Flags::PUNCH_HOLE, 0, 100),
            ("zero", Flags::ZERO_RANGE, 5_000, 10_000),
            ("zero behind", Flags::ZERO_RANGE, 15_000, 10_000),
            (
                "zero, keep size",
                Flags::ZERO_RANGE | Flags::KEEP_SIZE,
                15_000,
                10_000,
            ),
            ("collapse", Flags::COLLAPSE_RANGE, 0, 4_096),
            ("insert", Flags::INSERT_RANGE, 4_096, 4_096),
            ("nothing", Flags::empty(), 0, 0),
            ("too much", Flags::empty(), i64::MAX as u64 - 10, 20),
        ];
        for (what, flags, offset, len) in cases {
            let path = file(&t.path("f"), &[b'x'; 20_000]);
            let open = rw(&path);
            t.call(what, fallocate(&open, flags, offset, len));
            drop(open);
            let bytes = content(&path);
            let zeros = bytes.iter().filter(|byte| **byte == 0).count();
            t.note(format!("{what}: bytes"), (bytes.len(), zeros));
        }
        let path = t.path("f");
        t.call("read-only", fallocate(ro(&path), Flags::empty(), 0, 100));
        t.call(
            "directory",
            fallocate(File::open(t.path("")).unwrap(), Flags::empty(), 0, 100),
        );
    });
}

#[test]
fn ranges_are_copied_alike() {
    compare(&[], &[], |t| {
        let from = file(
            &t.path("from"),
            &(0..=255).cycle().take(300_000).collect::<Vec<u8>>(),
        );
        let to = t.path("to");
        let cases = [
            ("whole", 0, 0, 300_000),
            ("part", 1_000, 50_000, 9_999),
            ("beyond the end", 299_000, 0, 50_000),
            ("from behind the end", 400_000, 0, 100),
            ("far away", 0, 3_000_000, 100),
            ("nothing", 0, 0, 0),
        ];
        for (what, mut offset_in, mut offset_out, len) in cases {
            file(&to, b"before");
            let (a, b) = (ro(&from), rw(&to));
            t.ask(
                what,
                copy_file_range(&a, Some(&mut offset_in), &b, Some(&mut offset_out), len),
            );
            t.note(format!("{what}: offsets"), (offset_in, offset_out));
            drop((a, b));
            t.note(format!("{what}: bytes"), support::tree::digest(&content(&to)));
        }
        let both = rw(&from);
        t.ask(
            "onto itself",
            copy_file_range(&both, Some(&mut 0), &both, Some(&mut 100), 1_000),
        );
        t.ask(
            "within itself",
            copy_file_range(&both, Some(&mut 0), &both, Some(&mut 200_000), 1_000),
        );
        t.ask(
            "to a reader",
            copy_file_range(&both, Some(&mut 0), ro(&to), Some(&mut 0), 10),
        );
        let append = File::options().append(true).open(&to).unwrap();
        t.ask(
            "to one who appends",
            copy_file_range(&both, Some(&mut 0), &append, Some(&mut 0), 10),
        );
        let writer = File::options().write(true).open(&to).unwrap();
        t.ask(
            "from a writer",
            copy_file_range(&writer, Some(&mut 0), &both, Some(&mut 0), 10),
        );
        let dir = File::open(t.path("")).unwrap();
        t.ask(
            "from a directory",
            copy_file_range(&dir, Some(&mut 0), &both, Some(&mut 0), 10),
        );
        // From a file of another file system, as cp does it.
        let other = file(
            Path::new("/dev/shm")
                .join(format!("casmount-{}", std::process::id()))
                .as_path(),
            b"elsewhere",
        );
        let copied = fs::copy(&other, t.path("copied"));
        fs::remove_file(&other).unwrap();
        t.ask("from another file system", copied);
    });
}

#[test]
fn what_is_no_file_behaves_alike() {
    // Mounts of casmount have no devices, as every mount that an ordinary user may make.
    let no_devices = ("device: open", "done", "Permission denied");
    compare(&[], &[no_devices], |t| {
        let make = |name: &str, kind, mode: u32, device| {
            mknodat(CWD, t.path(name), kind, Mode::from_raw_mode(mode), device)
        };
        t.call("fifo", make("fifo", FileType::Fifo, 0o644, 0));
        t.call("fifo again", make("fifo", FileType::Fifo, 0o644, 0));
        t.call("file by mknod", make("plain", FileType::RegularFile, 0o600, 0));
        t.call("directory by mknod", make("dir", FileType::Directory, 0o600, 0));
        t.note(
            "a file by mknod takes bytes",
            content(&file(&t.path("plain"), b"bytes")),
        );
        if rustix::process::geteuid().is_root() {
            let null = rustix::fs::makedev(1, 3);
            t.call("device", make("device", FileType::CharacterDevice, 0o666, null));
            t.call(
                "block device",
                make("block", FileType::BlockDevice, 0o600, rustix::fs::makedev(7, 300)),
            );
            t.call("device: open", File::open(t.path("device")));
        } else {
            for what in ["device", "block device", "device: open"] {
                t.note(what, "needs root");
            }
        }
        t.call("socket by mknod", make("socket", FileType::Socket, 0o600, 0));
        for name in ["fifo", "plain", "device", "block", "socket"] {
            let shown = fs::symlink_metadata(t.path(name))
                .map(|meta| (meta.mode(), meta.rdev(), meta.len(), meta.nlink()));
            t.ask(format!("{name}: stat"), shown);
        }
        let mut kinds: Vec<_> = fs::read_dir(t.path(""))
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name(), entry.file_type().unwrap()))
            .collect();
        kinds.sort_by(|a, b| a.0.cmp(&b.0));
        t.note("kinds listed", kinds);

        let nonblock = |write: bool| {
            File::options()
                .read(!write)
                .write(write)
                .custom_flags(libc::O_NONBLOCK)
                .open(t.path("fifo"))
        };
        t.call("fifo: writer without a reader", nonblock(true));
        let reader = t.call("fifo: reader", nonblock(false)).unwrap();
        let mut writer = t.call("fifo: writer", nonblock(true)).unwrap();
        writer.write_all(b"through").unwrap();
        let mut through = [0; 7];
        (&reader).read_exact(&mut through).unwrap();
        t.note("fifo: bytes", through);
        t.call("fifo: seek", rustix::fs::seek(&reader, SeekFrom::Start(0)));
        t.call("fifo: truncate", writer.set_len(1));
        t.call(
            "fifo: allocate",
            fallocate(&writer, FallocateFlags::empty(), 0, 10),
        );
        t.call(
            "fifo: O_DIRECTORY",
            openat(
                CWD,
                t.path("fifo"),
                OFlags::DIRECTORY | OFlags::NONBLOCK,
                Mode::empty(),
            ),
        );
        t.call("socket: open", File::open(t.path("socket")));
        t.call("rename", fs::rename(t.path("fifo"), t.path("renamed")));
        t.call("link", fs::hard_link(t.path("renamed"), t.path("linked")));
        t.call(
            "chmod",
            fs::set_permissions(t.path("linked"), fs::Permissions::from_mode(0o600)),
        );
        t.note("linked", fs::metadata(t.path("renamed")).unwrap().mode());
        t.call("unlink", fs::remove_file(t.path("renamed")));

        // Paths of sockets are short: by a directory that is open.
        let dir = File::open(t.path("")).unwrap();
        let short = |name: &str| format!("/proc/self/fd/{}/{name}", std::os::fd::AsRawFd::as_raw_fd(&dir));
        let listener = t.call("bind", UnixListener::bind(short("bound"))).unwrap();
        t.call("bind again", UnixListener::bind(short("bound")));
        let mut there = t.call("connect", UnixStream::connect(short("bound"))).unwrap();
        let (mut here, _) = listener.accept().unwrap();
        here.write_all(b"hello").unwrap();
        let mut said = [0; 5];
        there.read_exact(&mut said).unwrap();
        t.note("said", said);
        t.note(
            "bound",
            fs::symlink_metadata(t.path("bound"))
                .unwrap()
                .file_type()
                .is_socket(),
        );
        drop(listener);
        t.call("connect to nobody", UnixStream::connect(short("bound")));
    });
}

fn what_is_no_file_is_on_the_other_machine_too(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut a = lab.machine("a");
    let made = |name: &str, kind, mode, device| {
        mknodat(CWD, a.path(name), kind, Mode::from_raw_mode(mode), device).unwrap();
    };
    made("fifo", FileType::Fifo, 0o640, 0);
    made("socket", FileType::Socket, 0o755, 0);
    made(
        "device",
        FileType::CharacterDevice,
        0o666,
        rustix::fs::makedev(1, 3),
    );
    made("block", FileType::BlockDevice, 0o660, rustix::fs::makedev(7, 300));
    let shown = |at: &Path| -> Vec<_> {
        ["fifo", "socket", "device", "block"]
            .map(|name| {
                let meta = fs::symlink_metadata(at.join(name)).unwrap();
                (name, meta.mode(), meta.rdev(), meta.mtime_nsec())
            })
            .into()
    };
    let before = shown(a.root());
    assert_eq!(before[0].1, libc::S_IFIFO | 0o640);
    let b = lab.machine("b");
    file(&a.path("last"), b"last");
    a.flush();
    b.until_content("last", b"last");
    assert_eq!(shown(b.root()), before);
    a.unmount();
    a.restart();
    assert_eq!(shown(a.root()), before);
    fs::remove_file(b.path("fifo")).unwrap();
    b.flush();
    a.until_gone("fifo");
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

fn xattr_trial(t: &Trial) {
    let path = file(&t.path("f"), b"x");
    let set = |name: &str, value: &[u8], flags| rustix::fs::setxattr(&path, name, value, flags);
    let any = XattrFlags::empty();
    t.call("set", set("user.a", b"1", any));
    t.call("create again", set("user.a", b"2", XattrFlags::CREATE));
    t.call(
        "replace what is not there",
        set("user.b", b"2", XattrFlags::REPLACE),
    );
    t.call("empty", set("user.empty", b"", any));
    t.call("3000 bytes", set("user.large", &[7; 3_000], any));
    t.call("too large", set("user.huge", &vec![7; 70_000], any));
    t.call("long name", set(&format!("user.{}", "n".repeat(250)), b"", any));
    t.call(
        "too long a name",
        set(&format!("user.{}", "n".repeat(251)), b"", any),
    );
    t.call("no namespace", set("plain", b"", any));
    t.call("no name", set("user.", b"", any));
    t.call("trusted", set("trusted.a", b"1", any));
    t.call(
        "acl",
        set(
            "system.posix_acl_access",
            &[
                2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 4, 0, 4, 0, 255, 255, 255, 255, 32, 0, 4, 0, 255,
                255, 255, 255,
            ],
            any,
        ),
    );
    let mut space = [0_u8; 100];
    let mut small = [0_u8; 2];
    t.ask("get", rustix::fs::getxattr(&path, "user.a", &mut space));
    t.ask("size", rustix::fs::getxattr(&path, "user.large", &mut [0_u8; 0]));
    t.ask(
        "too little space",
        rustix::fs::getxattr(&path, "user.large", &mut small),
    );
    t.ask(
        "get what is not there",
        rustix::fs::getxattr(&path, "user.no", &mut space),
    );
    t.ask(
        "get an acl",
        rustix::fs::getxattr(&path, "system.posix_acl_default", &mut space),
    );
    t.call("remove", rustix::fs::removexattr(&path, "user.large"));
    t.call("remove again", rustix::fs::removexattr(&path, "user.large"));
    t.call(
        "remove the long one",
        rustix::fs::removexattr(&path, format!("user.{}", "n".repeat(250))),
    );
    let mut names = [0_u8; 1_000];
    let listed = rustix::fs::listxattr(&path, &mut names).map(|len| {
        let mut names: Vec<_> = names[..len]
            .split(|byte| *byte == 0)
            .map(<[u8]>::to_vec)
            .collect();
        names.sort();
        names.retain(|name| name.starts_with(b"user."));
        names
    });
    t.ask("list", listed);
    std::os::unix::fs::symlink("f", t.path("l")).unwrap();
    t.call(
        "of a symlink",
        rustix::fs::lsetxattr(t.path("l"), "user.a", b"1", any),
    );
    let dir = CString::new(t.path("").as_os_str().as_bytes()).unwrap();
    t.call("of a directory", rustix::fs::setxattr(&*dir, "user.a", b"1", any));
}

#[test]
fn attributes_are_kept_or_refused_alike() {
    compare(
        &["--xattr"],
        &[
            ("acl", "done", "Operation not supported"),
            ("trusted", "done", "Operation not supported"),
        ],
        xattr_trial,
    );
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
