//! What is no regular file, and extended attributes.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::Path,
};

use rustix::fs::{
    CWD, FallocateFlags, FileType, Mode, OFlags, SeekFrom, XattrFlags, fallocate, mknodat, openat,
};

use crate::{
    lab::{Lab, StoreKind},
    support::{
        posix::{content, file},
        trial::{Trial, compare},
    },
};

on_both_stores!(what_is_no_file_is_on_the_other_machine_too);

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
