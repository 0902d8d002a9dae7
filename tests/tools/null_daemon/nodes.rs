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

use super::by_handle::FileId;
use fuser::{
    BackingId, Errno, FileAttr, FileHandle, FileType, INodeNo, ReplyEmpty, ReplyXattr, Request, TimeOrNow,
};
use rustix::fs::{self as sys, AtFlags, Mode, OFlags};

/// How the file of a node is reached.
enum Way {
    /// By a descriptor that is held, which is quicker, and keeps the inode number from being used again.
    Held(OwnedFd),
    /// By its handle, when there are too many nodes for a descriptor each.
    Known(FileId, Arc<File>),
}

/// A path descriptor of a node's file.
pub enum PathFd<'a> {
    Held(BorrowedFd<'a>),
    Opened(OwnedFd),
}

impl AsFd for PathFd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Held(fd) => *fd,
            Self::Opened(fd) => fd.as_fd(),
        }
    }
}

pub struct Node {
    way: Way,
    key: (u64, u64),
    lookups: AtomicU64,
    /// From the first open on, until the kernel forgets the node.
    backing: Mutex<Option<Arc<BackingId>>>,
}

impl Node {
    pub fn fd(&self) -> io::Result<PathFd<'_>> {
        match &self.way {
            Way::Held(fd) => Ok(PathFd::Held(fd.as_fd())),
            Way::Known(id, root) => id.open(root).map(PathFd::Opened),
        }
    }

    /// Whether a file with the node's device and inode number is the node's.
    fn is(&self, file: BorrowedFd<'_>) -> bool {
        match &self.way {
            Way::Held(_) => true,
            Way::Known(id, _) => FileId::of(file).is_ok_and(|other| *id == other),
        }
    }
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
    root: Arc<File>,
    /// So many nodes hold a descriptor.
    most_held: usize,
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
        // The rest is for open files.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let most_held = limit.current.unwrap_or(1 << 20) / 2;
        let root = Arc::new(Node {
            way: Way::Held(path_fd),
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
            root: Arc::new(File::open(source)?),
            most_held: most_held as usize,
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
        let known = by_key.get(&key).and_then(|ino| Some((*ino, nodes.get(ino)?)));
        let (ino, node) = match known {
            Some((ino, node)) if node.is(path_fd.as_fd()) => (ino, Arc::clone(node)),
            // None, or one of a file that is gone, whose inode number is in use again.
            _ => {
                let id = (nodes.len() >= self.most_held).then(|| FileId::of(path_fd.as_fd()));
                let way = match id {
                    Some(Ok(id)) => Way::Known(id, Arc::clone(&self.root)),
                    _ => Way::Held(path_fd),
                };
                let ino = self.next.fetch_add(1, Ordering::Relaxed);
                let node = Arc::new(Node {
                    way,
                    key,
                    lookups: AtomicU64::new(0),
                    backing: Mutex::default(),
                });
                by_key.insert(key, ino);
                nodes.insert(ino, Arc::clone(&node));
                (ino, node)
            }
        };
        node.lookups.fetch_add(1, Ordering::Relaxed);
        Ok((attr(ino, &stat), node))
    }

    pub fn forget_lookups(&self, ino: u64, count: u64) {
        let mut by_key = self.by_key.lock().expect("no holder panics");
        let mut nodes = self.nodes.write().expect("no holder panics");
        let Some(node) = nodes.get(&ino) else { return };
        if node.lookups.fetch_sub(count, Ordering::Relaxed) == count && ino != 1 {
            if by_key.get(&node.key) == Some(&ino) {
                by_key.remove(&node.key);
            }
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
        let dir = sys::openat(node.fd()?, ".", flags, Mode::empty())?;
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

pub fn through_proc(fd: &PathFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
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
