//! A bare FUSE daemon over a directory: what FUSE itself costs.
//!
//! `null-daemon [--no-passthrough] [--xattr] [--threads N] SOURCE MOUNTPOINT` shows SOURCE
//! at MOUNTPOINT until it is unmounted from outside. There is no store, no log and no
//! journal: each request is the one system call that it stands for. The tests of the mount
//! also run on it.
//!
//! It takes whatever makes FUSE quick, so that the difference to another daemon is what that
//! one costs itself, not what it does not know of FUSE:
//!
//! - passthrough for opens and creates; a node keeps its backing id, so that only its first
//!   open registers one
//! - names, names that are not there, and attributes are remembered for an hour
//! - listings bring the attributes along (readdirplus), and stay in the kernel's page cache
//!   until the directory changes through the mount
//! - no FLUSH at a close, because nothing waits for one; no GETXATTR before a first write:
//!   without `--xattr` the first one is answered with ENOSYS, and the kernel asks no more
//! - several threads with their own descriptors; large requests and readahead
//!
//! # Invariants
//!
//! - A node keeps an `O_PATH` descriptor, so its inode number cannot be used again
//!   while the kernel remembers it. Above half of the descriptors that it may have, nodes keep
//!   what their file system knows them by instead, which is another after such a reuse. That costs
//!   an `open_by_handle_at(2)` for each request, and a file that was unlinked is not found any more.
//! - All opens of a node share one backing id, as the kernel asks (fs/fuse/iomode.c).

#[path = "null_daemon/by_handle.rs"]
mod by_handle;
#[path = "null_daemon/nodes.rs"]
mod nodes;

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, SessionACL, TimeOrNow, WriteFlags,
};
use rustix::fs::{self as sys, AtFlags, Mode, OFlags, XattrFlags};

use nodes::{Handle, NO_ENTRY, Node, NullFs, answer, answer_xattr, attr, open_flags, through_proc, timespec};

/// Long, as casmount's: nobody changes SOURCE behind the mount.
const TTL: Duration = Duration::from_secs(3600);

const REQUEST_BYTES: u32 = 1 << 20;

/// Makes an entry with `act` and answers with it.
fn make(
    fs: &NullFs,
    req: &Request,
    parent: INodeNo,
    name: &OsStr,
    act: impl FnOnce(BorrowedFd<'_>) -> rustix::io::Result<()>,
    reply: ReplyEntry,
) {
    let made = fs.node(parent).and_then(|dir| {
        let dir = dir.fd()?;
        act(dir.as_fd())?;
        NullFs::give(dir.as_fd(), name, req)?;
        fs.enter(dir.as_fd(), name)
    });
    match made {
        Ok((attr, _)) => reply.entry(&TTL, &attr, Generation(0)),
        Err(err) => reply.error(err.into()),
    }
}

impl Filesystem for NullFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_BIG_WRITES
            | InitFlags::FUSE_MAX_PAGES
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_ATOMIC_O_TRUNC;
        let _ = config.add_capabilities(wanted & config.capabilities());
        if self.passthrough.load(Ordering::Relaxed) {
            let with = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
                && config.set_max_stack_depth(1).is_ok();
            self.passthrough.store(with, Ordering::Relaxed);
        }
        let _ = config.set_max_background(1024);
        let _ = config.set_max_readahead(REQUEST_BYTES);
        let _ = config.set_max_write(REQUEST_BYTES);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self
            .node(parent)
            .and_then(|dir| self.enter(dir.fd()?.as_fd(), name))
        {
            Ok((attr, _)) => reply.entry(&TTL, &attr, Generation(0)),
            // An entry of no node is one that is not there, and remembered as such.
            Err(err) if err.raw_os_error() == Some(libc::ENOENT) => {
                reply.entry(&TTL, &NO_ENTRY, Generation(0));
            }
            Err(err) => reply.error(err.into()),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.forget_lookups(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.node(ino).and_then(|node| Ok(sys::fstat(node.fd()?)?)) {
            Ok(stat) => reply.attr(&TTL, &attr(ino.0, &stat)),
            Err(err) => reply.error(err.into()),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = || -> io::Result<FileAttr> {
            let node = self.node(ino)?;
            let path_fd = node.fd()?;
            if uid.is_some() || gid.is_some() {
                let (owner, group) = (uid.map(sys::Uid::from_raw), gid.map(sys::Gid::from_raw));
                sys::chownat(&path_fd, "", owner, group, AtFlags::EMPTY_PATH)?;
            }
            if let Some(mode) = mode {
                sys::chmod(through_proc(&path_fd), Mode::from_raw_mode(mode & 0o7777))?;
            }
            if let Some(size) = size {
                match fh.and_then(|fh| self.handle(fh).ok()) {
                    Some(handle) => sys::ftruncate(&handle.file, size)?,
                    None => File::options()
                        .write(true)
                        .open(through_proc(&path_fd))?
                        .set_len(size)?,
                }
            }
            if atime.is_some() || mtime.is_some() {
                let times = sys::Timestamps {
                    last_access: timespec(atime),
                    last_modification: timespec(mtime),
                };
                sys::utimensat(&path_fd, "", &times, AtFlags::EMPTY_PATH)?;
            }
            Ok(attr(ino.0, &sys::fstat(&path_fd)?))
        };
        match set() {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(err) => reply.error(err.into()),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self
            .node(ino)
            .and_then(|node| Ok(sys::readlinkat(node.fd()?, "", Vec::new())?))
        {
            Ok(target) => reply.data(target.as_bytes()),
            Err(err) => reply.error(err.into()),
        }
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let kind = sys::FileType::from_raw_mode(mode);
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let act = |dir: BorrowedFd<'_>| sys::mknodat(dir, name, kind, mode, u64::from(rdev));
        make(self, req, parent, name, act, reply);
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        make(
            self,
            req,
            parent,
            name,
            |dir| sys::mkdirat(dir, name, mode),
            reply,
        );
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        make(
            self,
            req,
            parent,
            name,
            |dir| sys::symlinkat(target, dir, name),
            reply,
        );
    }

    fn link(&self, _req: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let made = self.node(ino).and_then(|node| {
            let parent = self.node(newparent)?;
            let dir = parent.fd()?;
            sys::linkat(node.fd()?, "", &dir, newname, AtFlags::EMPTY_PATH)?;
            self.enter(dir.as_fd(), newname)
        });
        match made {
            Ok((attr, _)) => reply.entry(&TTL, &attr, Generation(0)),
            Err(err) => reply.error(err.into()),
        }
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let act = |dir: Arc<Node>| Ok(sys::unlinkat(dir.fd()?, name, AtFlags::empty())?);
        answer(reply, self.node(parent).and_then(act));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let act = |dir: Arc<Node>| Ok(sys::unlinkat(dir.fd()?, name, AtFlags::REMOVEDIR)?);
        answer(reply, self.node(parent).and_then(act));
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let flags = sys::RenameFlags::from_bits_retain(flags.bits());
        let renamed = self.node(parent).and_then(|from| {
            let to = self.node(newparent)?;
            Ok(sys::renameat_with(from.fd()?, name, to.fd()?, newname, flags)?)
        });
        answer(reply, renamed);
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.node(ino).and_then(|node| {
            let file = sys::open(through_proc(&node.fd()?), open_flags(flags.0), Mode::empty())?;
            Ok((node, File::from(file)))
        });
        match opened {
            Ok((node, file)) => match self.backing(&node, &file, |fd| reply.open_backing(fd)) {
                Some(id) => reply.opened_passthrough(self.keep(file), FopenFlags::FOPEN_NOFLUSH, &id),
                None => reply.opened(
                    self.keep(file),
                    FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
                ),
            },
            Err(err) => reply.error(err.into()),
        }
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let create = || -> io::Result<_> {
            let parent = self.node(parent)?;
            let dir = parent.fd()?;
            let excl = OFlags::from_bits_retain(flags as u32) & OFlags::EXCL;
            let flags = open_flags(flags) | OFlags::CREATE | OFlags::NOFOLLOW | excl;
            let file = sys::openat(&dir, name, flags, Mode::from_raw_mode(mode & 0o7777))?;
            Self::give(dir.as_fd(), name, req)?;
            let (attr, node) = self.enter(dir.as_fd(), name)?;
            Ok((attr, node, File::from(file)))
        };
        match create() {
            Ok((attr, node, file)) => {
                if let Some(id) = self.backing(&node, &file, |fd| reply.open_backing(fd)) {
                    let (fh, flags) = (self.keep(file), FopenFlags::FOPEN_NOFLUSH);
                    reply.created_passthrough(&TTL, &attr, Generation(0), fh, flags, &id);
                } else {
                    let (fh, flags) = (self.keep(file), FopenFlags::FOPEN_NOFLUSH);
                    reply.created(&TTL, &attr, Generation(0), fh, flags);
                }
            }
            Err(err) => reply.error(err.into()),
        }
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buffer = vec![0; size as usize];
        match self
            .handle(fh)
            .and_then(|handle| handle.file.read_at(&mut buffer, offset))
        {
            Ok(count) => reply.data(&buffer[..count]),
            Err(err) => reply.error(err.into()),
        }
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self
            .handle(fh)
            .and_then(|handle| handle.file.write_at(data, offset))
        {
            Ok(count) => reply.written(count as u32),
            Err(err) => reply.error(err.into()),
        }
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.handles.write().expect("no holder panics").remove(&fh.0);
        reply.ok();
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let sync = |handle: Arc<Handle>| handle.file.sync_all();
        answer(reply, self.handle(fh).and_then(sync));
    }

    fn fsyncdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let sync = |node: Arc<Node>| File::open(through_proc(&node.fd()?))?.sync_all();
        answer(reply, self.node(ino).and_then(sync));
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let fh = self.next.fetch_add(1, Ordering::Relaxed);
        let flags = FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE;
        reply.opened(FileHandle(fh), flags);
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        match self.names(ino, fh, offset) {
            Ok(names) => {
                for (at, (name, ino, kind)) in names.iter().enumerate().skip(offset as usize) {
                    if reply.add(INodeNo(*ino), at as u64 + 1, *kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(err) => reply.error(err.into()),
        }
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let listed = self
            .node(ino)
            .and_then(|dir| Ok((self.names(ino, fh, offset)?, dir)));
        let (names, node) = match listed {
            Ok(listed) => listed,
            Err(err) => return reply.error(err.into()),
        };
        let dir = match node.fd() {
            Ok(dir) => dir,
            Err(err) => return reply.error(err.into()),
        };
        for (at, (name, _, _)) in names.iter().enumerate().skip(offset as usize) {
            let next = at as u64 + 1;
            if name == "." || name == ".." {
                // The kernel counts no lookup for these two.
                let Ok(stat) = sys::fstat(&dir) else {
                    continue;
                };
                if reply.add(ino, next, name, &TTL, &attr(ino.0, &stat), Generation(0)) {
                    break;
                }
                continue;
            }
            // A name that went away since the listing is left out.
            let Ok((attr, _)) = self.enter(dir.as_fd(), name) else {
                continue;
            };
            if reply.add(attr.ino, next, name, &TTL, &attr, Generation(0)) {
                self.forget_lookups(attr.ino.0, 1);
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.listings.lock().expect("no holder panics").remove(&fh.0);
        reply.ok();
    }

    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        match self.node(ino).and_then(|node| Ok(sys::fstatvfs(node.fd()?)?)) {
            Ok(v) => reply.statfs(
                v.f_blocks,
                v.f_bfree,
                v.f_bavail,
                v.f_files,
                v.f_ffree,
                v.f_bsize as u32,
                v.f_namemax as u32,
                v.f_frsize as u32,
            ),
            Err(err) => reply.error(err.into()),
        }
    }

    fn setxattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        if !self.xattr {
            return reply.error(Errno::ENOSYS);
        }
        let flags = XattrFlags::from_bits_retain(flags as u32);
        let set = |node: Arc<Node>| Ok(sys::setxattr(through_proc(&node.fd()?), name, value, flags)?);
        answer(reply, self.node(ino).and_then(set));
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if !self.xattr {
            return reply.error(Errno::ENOSYS);
        }
        let Ok(node) = self.node(ino) else {
            return reply.error(Errno::ESTALE);
        };
        let Ok(path_fd) = node.fd() else {
            return reply.error(Errno::ESTALE);
        };
        let mut value = vec![0; 65536];
        let count = sys::getxattr(through_proc(&path_fd), name, &mut value[..]);
        let value = count.map(|count| value[..count].to_vec());
        answer_xattr(reply, size, value);
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        if !self.xattr {
            return reply.error(Errno::ENOSYS);
        }
        let Ok(node) = self.node(ino) else {
            return reply.error(Errno::ESTALE);
        };
        let Ok(path_fd) = node.fd() else {
            return reply.error(Errno::ESTALE);
        };
        let mut names = vec![0; 65536];
        let count = sys::listxattr(through_proc(&path_fd), &mut names[..]);
        let names = count.map(|count| names[..count].to_vec());
        answer_xattr(reply, size, names);
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if !self.xattr {
            return reply.error(Errno::ENOSYS);
        }
        let remove = |node: Arc<Node>| Ok(sys::removexattr(through_proc(&node.fd()?), name)?);
        answer(reply, self.node(ino).and_then(remove));
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = sys::FallocateFlags::from_bits_retain(mode as u32);
        let allocate = |handle: Arc<Handle>| Ok(sys::fallocate(&handle.file, mode, offset, length)?);
        answer(reply, self.handle(fh).and_then(allocate));
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let from = match whence {
            libc::SEEK_DATA => sys::SeekFrom::Data(offset as u64),
            libc::SEEK_HOLE => sys::SeekFrom::Hole(offset as u64),
            _ => return reply.error(Errno::EINVAL),
        };
        match self
            .handle(fh)
            .and_then(|handle| Ok(sys::seek(&handle.file, from)?))
        {
            Ok(offset) => reply.offset(offset as i64),
            Err(err) => reply.error(err.into()),
        }
    }
}

fn main() -> io::Result<()> {
    let usage = || {
        io::Error::other("usage: null-daemon [--no-passthrough] [--xattr] [--threads N] SOURCE MOUNTPOINT")
    };
    let (mut passthrough, mut xattr) = (true, false);
    let mut threads = 4;
    let mut paths = Vec::new();
    let mut args = std::env::args_os().skip(1);
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("--no-passthrough") => passthrough = false,
            Some("--xattr") => xattr = true,
            Some("--threads") => {
                let count = args.next().and_then(|count| count.to_str()?.parse().ok());
                threads = count.ok_or_else(usage)?;
            }
            _ => paths.push(arg),
        }
    }
    let [source, mountpoint] = <[OsString; 2]>::try_from(paths).map_err(|_| usage())?;

    // One descriptor for each node that the kernel remembers, as far as it goes.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    for most in [Some(1 << 20), limit.maximum] {
        let wanted = rustix::process::Rlimit {
            current: most,
            maximum: most,
        };
        if rustix::process::setrlimit(rustix::process::Resource::Nofile, wanted).is_ok() {
            break;
        }
    }
    rustix::process::umask(Mode::empty());

    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("null-daemon".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoDev,
        MountOption::NoSuid,
    ];
    if rustix::process::geteuid().is_root() {
        config.acl = SessionACL::All;
    }
    config.n_threads = Some(threads);
    config.clone_fd = rustix::process::geteuid().is_root();
    fuser::mount(
        NullFs::new(Path::new(&source), passthrough, xattr)?,
        Path::new(&mountpoint),
        &config,
    )
}
