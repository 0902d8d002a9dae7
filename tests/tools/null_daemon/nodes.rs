//! What the kernel knows of the source directory: nodes, open files, listings.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use fuser::{
    BackingId, Errno, FileAttr, FileHandle, FileType, INodeNo, ReplyEmpty, ReplyXattr, Request, TimeOrNow,
};
use rustix::fs::{self as sys, AtFlags, Mode, OFlags};

pub struct Node {
    pub path_fd: OwnedFd,
    key: (u64, u64),
    lookups: AtomicU64,
    /// From the first open on, until the kernel forgets the node.
    backing: Mutex<Option<Arc<BackingId>>>,
}

pub struct Handle {
    pub file: File,
}

/// The names of a directory as they were when it was read from its start.
pub type Names = Vec<(OsString, u64, FileType)>;

pub struct NullFs {
    nodes: RwLock<HashMap<u64, Arc<Node>>>,
    by_key: Mutex<HashMap<(u64, u64), u64>>,
    pub handles: RwLock<HashMap<u64, Arc<Handle>>>,
    pub listings: Mutex<HashMap<u64, Arc<Names>>>,
    pub next: AtomicU64,
    pub passthrough: AtomicBool,
    pub xattr: bool,
}

impl NullFs {
    pub fn new(source: &Path, passthrough: bool, xattr: bool) -> io::Result<Self> {
        let path_fd = sys::open(
            source,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let stat = sys::fstat(&path_fd)?;
        let key = (stat.st_dev, stat.st_ino);
        let root = Arc::new(Node {
            path_fd,
            key,
            lookups: AtomicU64::new(1),
            backing: Mutex::default(),
        });
        Ok(Self {
            nodes: RwLock::new(HashMap::from([(1, root)])),
            by_key: Mutex::new(HashMap::from([(key, 1)])),
            handles: RwLock::default(),
            listings: Mutex::default(),
            next: AtomicU64::new(2),
            passthrough: AtomicBool::new(passthrough),
            xattr,
        })
    }

    pub fn node(&self, ino: INodeNo) -> io::Result<Arc<Node>> {
        let nodes = self.nodes.read().expect("no holder panics");
        nodes
            .get(&ino.0)
            .cloned()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
    }

    pub fn handle(&self, fh: FileHandle) -> io::Result<Arc<Handle>> {
        let handles = self.handles.read().expect("no holder panics");
        handles
            .get(&fh.0)
            .cloned()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// Counts one lookup of a name, making its node if there is none.
    pub fn enter(&self, parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<(FileAttr, Arc<Node>)> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path_fd = sys::openat(parent, name, flags, Mode::empty())?;
        let stat = sys::fstat(&path_fd)?;
        let key = (stat.st_dev, stat.st_ino);
        // Both maps change together under the lock of `by_key`, so a forget cannot come between.
        let mut by_key = self.by_key.lock().expect("no holder panics");
        let mut nodes = self.nodes.write().expect("no holder panics");
        let ino = *by_key
            .entry(key)
            .or_insert_with(|| self.next.fetch_add(1, Ordering::Relaxed));
        let node = nodes.entry(ino).or_insert_with(|| {
            Arc::new(Node {
                path_fd,
                key,
                lookups: AtomicU64::new(0),
                backing: Mutex::default(),
            })
        });
        node.lookups.fetch_add(1, Ordering::Relaxed);
        Ok((attr(ino, &stat), Arc::clone(node)))
    }

    pub fn forget_lookups(&self, ino: u64, count: u64) {
        let mut by_key = self.by_key.lock().expect("no holder panics");
        let mut nodes = self.nodes.write().expect("no holder panics");
        let Some(node) = nodes.get(&ino) else { return };
        if node.lookups.fetch_sub(count, Ordering::Relaxed) == count && ino != 1 {
            by_key.remove(&node.key);
            nodes.remove(&ino);
        }
    }

    /// Returns the backing id that all opens of the node share, or none without passthrough.
    pub fn backing(
        &self,
        node: &Node,
        file: &File,
        register: impl Fn(BorrowedFd<'_>) -> io::Result<BackingId>,
    ) -> Option<Arc<BackingId>> {
        if !self.passthrough.load(Ordering::Relaxed) {
            return None;
        }
        let mut shared = node.backing.lock().expect("no holder panics");
        if shared.is_some() {
            return shared.clone();
        }
        match register(file.as_fd()) {
            Ok(id) => {
                *shared = Some(Arc::new(id));
                shared.clone()
            }
            Err(err) => {
                // Lacking privileges: from now on all opens go without, which the kernel's rule allows
                // because none of them went with.
                eprintln!("no passthrough: {err}");
                self.passthrough.store(false, Ordering::Relaxed);
                None
            }
        }
    }

    pub fn keep(&self, file: File) -> FileHandle {
        let fh = self.next.fetch_add(1, Ordering::Relaxed);
        let handle = Arc::new(Handle { file });
        self.handles.write().expect("no holder panics").insert(fh, handle);
        FileHandle(fh)
    }

    /// Gives what root made on behalf of another user to that user.
    pub fn give(parent: BorrowedFd<'_>, name: &OsStr, req: &Request) -> io::Result<()> {
        if req.uid() != 0 || req.gid() != 0 {
            let owner = Some(rustix::fs::Uid::from_raw(req.uid()));
            let group = Some(rustix::fs::Gid::from_raw(req.gid()));
            sys::chownat(parent, name, owner, group, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    /// The names of a directory, read anew when `offset` is its start.
    pub fn names(&self, ino: INodeNo, fh: FileHandle, offset: u64) -> io::Result<Arc<Names>> {
        let mut listings = self.listings.lock().expect("no holder panics");
        if offset > 0
            && let Some(names) = listings.get(&fh.0)
        {
            return Ok(Arc::clone(names));
        }
        let node = self.node(ino)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = sys::openat(&node.path_fd, ".", flags, Mode::empty())?;
        let mut names = Names::new();
        for entry in sys::Dir::read_from(dir)? {
            let entry = entry?;
            let kind = match entry.file_type() {
                sys::FileType::Directory => FileType::Directory,
                sys::FileType::Symlink => FileType::Symlink,
                sys::FileType::Fifo => FileType::NamedPipe,
                sys::FileType::Socket => FileType::Socket,
                sys::FileType::CharacterDevice => FileType::CharDevice,
                sys::FileType::BlockDevice => FileType::BlockDevice,
                _ => FileType::RegularFile,
            };
            let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
            names.push((name, entry.ino(), kind));
        }
        let names = Arc::new(names);
        listings.insert(fh.0, Arc::clone(&names));
        Ok(names)
    }
}

/// What stands for a name that is not there: an entry of no node.
pub const NO_ENTRY: FileAttr = FileAttr {
    ino: INodeNo(0),
    size: 0,
    blocks: 0,
    atime: UNIX_EPOCH,
    mtime: UNIX_EPOCH,
    ctime: UNIX_EPOCH,
    crtime: UNIX_EPOCH,
    kind: FileType::RegularFile,
    perm: 0,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    blksize: 0,
    flags: 0,
};

pub fn attr(ino: u64, stat: &sys::Stat) -> FileAttr {
    let time = |secs: i64, nanos: u64| {
        let nanos = Duration::from_nanos(nanos);
        if secs >= 0 {
            UNIX_EPOCH + Duration::from_secs(secs.unsigned_abs()) + nanos
        } else {
            UNIX_EPOCH - Duration::from_secs(secs.unsigned_abs()) + nanos
        }
    };
    let kind = match sys::FileType::from_raw_mode(stat.st_mode) {
        sys::FileType::Directory => FileType::Directory,
        sys::FileType::Symlink => FileType::Symlink,
        sys::FileType::Fifo => FileType::NamedPipe,
        sys::FileType::Socket => FileType::Socket,
        sys::FileType::CharacterDevice => FileType::CharDevice,
        sys::FileType::BlockDevice => FileType::BlockDevice,
        _ => FileType::RegularFile,
    };
    FileAttr {
        ino: INodeNo(ino),
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        crtime: UNIX_EPOCH,
        kind,
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: stat.st_rdev as u32,
        blksize: stat.st_blksize as u32,
        flags: 0,
    }
}

pub fn through_proc(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

pub fn timespec(time: Option<TimeOrNow>) -> sys::Timespec {
    let (secs, nanos) = match time {
        None => (0, libc::UTIME_OMIT),
        Some(TimeOrNow::Now) => (0, libc::UTIME_NOW),
        Some(TimeOrNow::SpecificTime(time)) => match time.duration_since(UNIX_EPOCH) {
            Ok(after) => (after.as_secs() as i64, i64::from(after.subsec_nanos())),
            Err(before) => {
                let before = before.duration();
                let up = i64::from(before.subsec_nanos() > 0);
                let nanos = (1_000_000_000 - i64::from(before.subsec_nanos())) % 1_000_000_000;
                (-(before.as_secs() as i64) - up, nanos)
            }
        },
    };
    sys::Timespec {
        tv_sec: secs,
        tv_nsec: nanos,
    }
}

/// Open flags of the request as they apply to a descriptor of the source file.
pub fn open_flags(flags: i32) -> OFlags {
    let dropped = OFlags::NOFOLLOW | OFlags::CREATE | OFlags::EXCL;
    (OFlags::from_bits_retain(flags as u32) - dropped) | OFlags::CLOEXEC
}

pub fn answer(reply: ReplyEmpty, result: Result<(), impl Into<io::Error>>) {
    match result {
        Ok(()) => reply.ok(),
        Err(err) => reply.error(err.into().into()),
    }
}

pub fn answer_xattr(reply: ReplyXattr, size: u32, value: rustix::io::Result<Vec<u8>>) {
    match value {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(err) => reply.error(io::Error::from(err).into()),
    }
}
