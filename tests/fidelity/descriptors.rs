//! What is done to a file by other ways than its name: descriptors that no open counts, handles, flags that change.

use std::{
    ffi::CString,
    fs::{self, File, Permissions},
    io::IsTerminal,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt, PermissionsExt},
        },
    },
    path::Path,
    thread,
    time::Duration,
};

use rustix::fs::{CWD, FileType, Mode, OFlags, fcntl_setfl, fstat, mknodat, openat};

use crate::{
    assert_errno,
    lab::{Lab, StoreKind},
    support::{
        posix::{content, file, ro, rw},
        trial::compare,
    },
};

/// Longer than the daemon keeps what nobody can come back to.
const LATER: Duration = Duration::from_secs(5);

fn opened(path: &Path, flags: OFlags) -> File {
    File::from(openat(CWD, path, flags, Mode::empty()).unwrap())
}

fn again(descriptor: &impl AsRawFd) -> std::path::PathBuf {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd()).into()
}

#[test]
fn a_file_without_a_name_is_there_for_descriptors_that_no_open_counts() {
    compare(&[], &[], |t| {
        let (f, g, fifo, dir) = (t.path("f"), t.path("g"), t.path("fifo"), t.path("d"));
        file(&f, b"content");
        file(&g, b"replaced");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
        fs::create_dir(&dir).unwrap();
        let (by_f, by_g) = (opened(&f, OFlags::PATH), opened(&g, OFlags::PATH));
        let by_fifo = opened(&fifo, OFlags::RDONLY | OFlags::NONBLOCK);
        let by_dir = File::open(&dir).unwrap();
        fs::remove_file(&f).unwrap();
        fs::rename(file(&t.path("over"), b"over"), &g).unwrap();
        fs::remove_file(&fifo).unwrap();
        fs::remove_dir(&dir).unwrap();
        thread::sleep(LATER);
        t.ask("fstat", fstat(&by_f).map(|stat| (stat.st_nlink, stat.st_size)));
        t.ask("read again", fs::read(again(&by_f)));
        t.call("write again", File::options().write(true).open(again(&by_f)));
        t.ask("read what was replaced", fs::read(again(&by_g)));
        t.call(
            "chmod of a FIFO",
            by_fifo.set_permissions(Permissions::from_mode(0o600)),
        );
        t.ask(
            "fstat of a FIFO",
            fstat(&by_fifo).map(|stat| (stat.st_nlink, stat.st_mode)),
        );
        t.call(
            "chmod of a directory",
            by_dir.set_permissions(Permissions::from_mode(0o700)),
        );
        t.note("links of a directory", by_dir.metadata().unwrap().nlink());
    });
}

/// As many bytes as a handle has at most, behind its head.
#[repr(C)]
struct Handle {
    head: libc::file_handle,
    bytes: [u8; 128],
}

impl Handle {
    fn of(path: &Path) -> std::io::Result<Self> {
        let mut handle = Self {
            head: libc::file_handle {
                handle_bytes: 128,
                handle_type: 0,
                f_handle: [],
            },
            bytes: [0; 128],
        };
        let path = CString::new(path.as_os_str().as_bytes()).expect("no NUL in paths of tests");
        let mut mount = 0;
        // SAFETY: the path ends with a NUL, and the handle has room for as many bytes as it says.
        let done = unsafe {
            libc::name_to_handle_at(
                libc::AT_FDCWD,
                path.as_ptr(),
                (&raw mut handle).cast(),
                &raw mut mount,
                0,
            )
        };
        if done == 0 {
            Ok(handle)
        } else {
            Err(std::io::Error::last_os_error())
        }
    }

    fn open(&mut self, mount: &File, flags: i32) -> std::io::Result<File> {
        // SAFETY: the handle is one that the kernel wrote.
        let opened =
            unsafe { libc::open_by_handle_at(mount.as_raw_fd(), std::ptr::from_mut(self).cast(), flags) };
        if opened < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(opened) }.into())
    }
}

/// After a restart the kernel has none of the files in its memory, so it asks what a handle means.
#[test]
fn a_handle_means_its_file_also_when_the_kernel_has_forgotten_it() {
    if !rustix::process::geteuid().is_root() {
        skip!("only root opens files by handles");
    }
    let lab = Lab::new(StoreKind::File);
    let mut machine = lab.machine("a");
    fs::create_dir_all(machine.path("d/below")).unwrap();
    file(&machine.path("d/below/f"), b"content");
    file(&machine.path("gone"), b"gone");
    let [mut f, mut below, mut gone] =
        ["d/below/f", "d/below", "gone"].map(|path| Handle::of(&machine.path(path)).unwrap());
    machine.kill9();
    machine.restart();
    fs::remove_file(machine.path("gone")).unwrap();
    let root = File::open(machine.root()).unwrap();
    let found = f.open(&root, libc::O_RDWR).unwrap();
    let mut bytes = [0; 7];
    found.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"content");
    found.write_all_at(b"CON", 0).unwrap();
    drop(found);
    assert_eq!(content(&machine.path("d/below/f")), b"CONtent");
    let dir = below.open(&root, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    assert!(openat(&dir, "f", OFlags::RDONLY, Mode::empty()).is_ok());
    let parent = openat(&dir, "..", OFlags::RDONLY, Mode::empty()).unwrap();
    assert!(openat(&parent, "below", OFlags::RDONLY, Mode::empty()).is_ok());
    assert_errno!(gone.open(&root, libc::O_RDONLY), ESTALE);
}

/// With passthrough the kernel goes on appending, see the README.
#[test]
fn a_descriptor_that_appends_no_more_writes_where_it_is_told() {
    let lab = Lab::new(StoreKind::File);
    let machine = lab.spec("a").arg("--no-passthrough").start();
    let path = file(&machine.path("f"), b"0123456789");
    let open = File::options().append(true).read(true).open(&path).unwrap();
    open.write_all_at(b"end", 0).unwrap();
    fcntl_setfl(&open, OFlags::empty()).unwrap();
    open.write_all_at(b"start", 0).unwrap();
    assert_eq!(content(&path), b"start56789end");
    fcntl_setfl(&open, OFlags::APPEND).unwrap();
    open.write_all_at(b"!", 0).unwrap();
    assert_eq!(content(&path), b"start56789end!");
}

#[test]
fn opening_a_sealed_file_for_writing_changes_no_time() {
    for more in [None, Some("--no-passthrough")] {
        let lab = Lab::new(StoreKind::File);
        let mut spec = lab.spec("a");
        spec.args.extend(more.map(Into::into));
        let machine = spec.start();
        let times = |meta: fs::Metadata| (meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec());
        let path = file(&machine.path("f"), b"content");
        machine.flush();
        let before = times(fs::metadata(&path).unwrap());
        let open = rw(&path);
        assert_eq!(times(open.metadata().unwrap()), before, "{more:?}");
        drop(open);
        assert_eq!(times(fs::metadata(&path).unwrap()), before, "{more:?}: closed");
        machine.flush();
        assert_eq!(
            times(ro(&path).metadata().unwrap()),
            before,
            "{more:?}: sealed again"
        );

        let open = rw(&path);
        open.write_all_at(b"C", 0).unwrap();
        let written = times(open.metadata().unwrap());
        assert!((written.2, written.3) > (before.2, before.3), "{more:?}: written");
        drop(open);
        assert_eq!(
            times(fs::metadata(&path).unwrap()),
            written,
            "{more:?}: written and closed"
        );
        machine.flush();

        let open = opened(&path, OFlags::WRONLY | OFlags::TRUNC);
        let emptied = times(open.metadata().unwrap());
        assert_eq!(
            (emptied.0, emptied.1),
            (emptied.2, emptied.3),
            "{more:?}: emptied"
        );
        assert!(
            (emptied.2, emptied.3) > (written.2, written.3),
            "{more:?}: emptied"
        );
    }
}

/// Interpreters ask each file that they open whether it is a terminal.
#[test]
fn what_a_file_has_no_answer_for_is_not_worth_a_word_in_the_log() {
    let lab = Lab::new(StoreKind::File);
    let machine = lab.machine("a");
    let open = rw(&file(&machine.path("f"), b"content"));
    assert!(!open.is_terminal());
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOTTY));
    let mut one = [rustix::event::PollFd::new(&open, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut one, None).unwrap(), 1);
    let log = machine.log();
    assert!(!log.contains("WARN"), "{log}");
}
