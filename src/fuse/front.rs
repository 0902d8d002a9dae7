//! One method a request: call the vfs, answer.

use std::{
    cell::RefCell,
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, INodeNo, IoctlFlags, KernelConfig,
    LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::{
    answer, convert,
    hold::Hold,
    later, lookup,
    make::NewObject,
    turns::{self, Turns, Work},
};
use crate::{
    namespace::tree::AttrChange,
    store::rows::NodeKind,
    vfs::{Created, Loan, NewFile, OpenRequest, OpenStep, Seek, SetAttr},
};

/// How long the kernel may keep names and attributes: until it is told otherwise.
pub(super) const TTL: Duration = Duration::from_secs(24 * 3600);

/// A read of more is one of a long file from start to end: the kernel asks for the next part before
/// the program wants it.
const MANY_BYTES: u32 = 128 << 10;

thread_local! {
    /// What a thread reads answers into: as long as a request, and its pages stay mapped.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Takes a turn and the vfs for a request; answers it and returns when there is no vfs any more.
macro_rules! begin {
    ($front:ident, $work:expr, $req:ident, $reply:ident) => {
        match ($front.turns.take($work, $req.pid()), $front.hold.vfs()) {
            (turn, Some(vfs)) => (turn, vfs),
            (_, None) => return $reply.error(Errno::ENOTCONN),
        }
    };
}

pub(super) struct Front {
    pub(super) hold: Arc<Hold>,
    pub(super) runtime: tokio::runtime::Handle,
    /// Asked for by the user; cleared when the kernel does not offer it.
    passthrough: Arc<AtomicBool>,
    /// What the kernel kept of directories is asked for at each open.
    opens_dirs: bool,
    turns: Turns,
}

impl Front {
    pub(super) fn new(
        hold: Arc<Hold>,
        runtime: tokio::runtime::Handle,
        passthrough: Arc<AtomicBool>,
        turns: Turns,
    ) -> Self {
        Self {
            hold,
            runtime,
            passthrough,
            opens_dirs: true,
            turns,
        }
    }

    fn passthrough(&self) -> bool {
        self.passthrough.load(Ordering::Relaxed)
    }
}

impl Filesystem for Front {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        super::negotiate::agree(config, &self.passthrough);
        self.opens_dirs = super::negotiate::must_open_dirs(config);
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        lookup::answer(self, &vfs, convert::ino(parent), name.as_bytes(), reply);
    }

    fn forget(&self, req: &Request, ino: INodeNo, _nlookup: u64) {
        let _turn = self.turns.take(Work::Quick, req.pid());
        // Numbers are never used again, and no row depends on what the kernel remembers but those without a name.
        if let Some(vfs) = self.hold.vfs() {
            vfs.forgotten(convert::ino(ino));
        }
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        answer::attr(reply, vfs.attr(convert::ino(ino)));
    }

    fn setattr(
        &self,
        req: &Request,
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
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        let change = AttrChange {
            perm: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            atime: atime.map(convert::set_time),
            mtime: mtime.map(convert::set_time),
        };
        let set = SetAttr {
            change,
            size,
            handle: fh.map(u64::from),
        };
        let ino = convert::ino(ino);
        match vfs.set_attr(ino, set) {
            Err(err) => answer::attr(reply, Err(err)),
            Ok(Ok(attr)) => answer::attr(reply, Ok(attr)),
            Ok(Err(missing)) => {
                let ending = self.hold.ending();
                self.runtime.spawn(async move {
                    let done = ending.or(vfs.set_attr_fetching(ino, set, missing)).await;
                    answer::attr(reply, done);
                });
            }
        }
    }

    fn readlink(&self, req: &Request, ino: INodeNo, reply: ReplyData) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        answer::data(reply, vfs.read_link(convert::ino(ino)));
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
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        let Some(kind) = convert::kind_of_mode(mode) else {
            return reply.error(Errno::EINVAL);
        };
        self.make(
            &vfs,
            req,
            parent,
            name,
            NewObject {
                kind,
                mode,
                rdev,
                target: b"",
            },
            reply,
        );
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        self.make(
            &vfs,
            req,
            parent,
            name,
            NewObject {
                kind: NodeKind::Dir,
                mode,
                rdev: 0,
                target: b"",
            },
            reply,
        );
    }

    fn symlink(&self, req: &Request, parent: INodeNo, link_name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        let target = target.as_os_str().as_bytes();
        let new = NewObject {
            kind: NodeKind::Symlink,
            mode: 0o777,
            rdev: 0,
            target,
        };
        self.make(&vfs, req, parent, link_name, new, reply);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        let parent = convert::ino(parent);
        let names = [name.as_bytes()];
        self.with_loaded(&vfs, reply, names, answer::empty, move |vfs, [name]| {
            vfs.unlink(parent, name)
        });
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        let parent = convert::ino(parent);
        let names = [name.as_bytes()];
        self.with_loaded(&vfs, reply, names, answer::empty, move |vfs, [name]| {
            vfs.rmdir(parent, name)
        });
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        let Some(mode) = convert::rename_mode(flags) else {
            return reply.error(Errno::EINVAL);
        };
        let (parent, newparent) = (convert::ino(parent), convert::ino(newparent));
        let names = [name.as_bytes(), newname.as_bytes()];
        self.with_loaded(&vfs, reply, names, answer::empty, move |vfs, [from, to]| {
            vfs.rename((parent, from), (newparent, to), mode)
        });
    }

    fn link(&self, req: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        let (ino, parent) = (convert::ino(ino), convert::ino(newparent));
        let names = [newname.as_bytes()];
        self.with_loaded(&vfs, reply, names, answer::entry, move |vfs, [name]| {
            vfs.link(ino, parent, name).map(Some)
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        let ino = convert::ino(ino);
        let request = convert::open_request(flags, req.uid());
        let lend = |file: &std::fs::File| reply.open_backing(file).map(|id| Arc::new(id) as Loan);
        match vfs.open(ino, request, self.passthrough().then_some(&lend)) {
            Err(err) => answer::open(reply, Err(err)),
            Ok(OpenStep::Ready(opened)) => answer::open(reply, Ok(opened)),
            Ok(OpenStep::Fetch(missing)) => {
                let (ending, passthrough) = (self.hold.ending(), self.passthrough());
                self.runtime.spawn(async move {
                    let lend = |file: &std::fs::File| reply.open_backing(file).map(|id| Arc::new(id) as Loan);
                    let opened = vfs.open_fetching(ino, request, missing, lend, passthrough);
                    let opened = ending.or(opened).await;
                    answer::open(reply, opened);
                });
            }
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
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        let new = NewFile {
            kind: NodeKind::File,
            perm: mode & 0o7777,
            uid: req.uid(),
            gid: req.gid(),
            rdev: 0,
            target: Vec::new(),
        };
        let request = OpenRequest {
            write: true,
            ..convert::open_request(OpenFlags(flags), req.uid())
        };
        let lend = |file: &std::fs::File| reply.open_backing(file).map(|id| Arc::new(id) as Loan);
        let lend = self
            .passthrough()
            .then_some(&lend as &dyn Fn(&std::fs::File) -> io::Result<Loan>);
        let exclusive = flags & libc::O_EXCL != 0;
        match vfs.create(
            convert::ino(parent),
            name.as_bytes(),
            &new,
            request,
            exclusive,
            lend,
        ) {
            Err(err) => {
                turns::answering();
                reply.error(convert::errno(&err));
            }
            Ok(Created::New(attr, opened) | Created::Existing(attr, OpenStep::Ready(opened))) => {
                answer::create(reply, &attr, &opened);
            }
            Ok(Created::Existing(attr, OpenStep::Fetch(missing))) => {
                let (ending, passthrough) = (self.hold.ending(), self.passthrough());
                self.runtime.spawn(async move {
                    let lend = |file: &std::fs::File| reply.open_backing(file).map(|id| Arc::new(id) as Loan);
                    let opened = vfs.open_fetching(attr.ino, request, missing, lend, passthrough);
                    match ending.or(opened).await {
                        Ok(opened) => answer::create(reply, &attr, &opened),
                        Err(err) => reply.error(convert::errno(&err)),
                    }
                });
            }
        }
    }

    fn read(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let work = if size > MANY_BYTES {
            Work::Bulk
        } else {
            Work::Quick
        };
        let (_turn, vfs) = begin!(self, work, req, reply);
        let unanswered = READ_BUFFER.with_borrow_mut(|buffer| {
            match vfs.read_resident(fh.into(), offset, size as usize, buffer) {
                Ok(None) => return Some(reply),
                Ok(Some(here)) => answer::data(reply, Ok(here)),
                Err(err) => answer::data(reply, Err::<&[u8], _>(err)),
            }
            None
        });
        let Some(reply) = unanswered else { return };
        let ending = self.hold.ending();
        self.runtime.spawn(async move {
            let read = vfs.read_fetching(fh.into(), offset, size as usize);
            let read = ending.or(read).await;
            answer::data(reply, read);
        });
    }

    fn write(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (_turn, vfs) = begin!(self, Work::Long, req, reply);
        answer::written(reply, vfs.write(fh.into(), offset, data));
    }

    fn flush(&self, req: &Request, _ino: INodeNo, fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        answer::empty(reply, vfs.flush(fh.into()));
    }

    fn release(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        answer::empty(reply, vfs.release(fh.into()));
    }

    fn fsync(&self, req: &Request, _ino: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        // Not by a thread that makes way for others ([`super::turns`]): what is started here would, too.
        let (_turn, vfs) = begin!(self, Work::Long, req, reply);
        // Waits for the disk: not on a thread that answers other requests.
        self.runtime
            .spawn_blocking(move || answer::empty(reply, vfs.fsync(fh.into(), datasync)));
    }

    fn fsyncdir(&self, req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let (_turn, vfs) = begin!(self, Work::Long, req, reply);
        self.runtime
            .spawn_blocking(move || answer::empty(reply, vfs.fsync_dir()));
    }

    fn opendir(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        if self.opens_dirs {
            answer::open_dir(reply, vfs.open_dir(convert::ino(ino)));
        } else {
            // The kernel opens them by itself from now on.
            reply.error(Errno::ENOSYS);
        }
    }

    fn readdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        let (_turn, vfs) = begin!(self, Work::Long, req, reply);
        let dir = convert::ino(ino);
        self.with_loaded(&vfs, reply, [], later::directory, move |vfs, []| {
            vfs.read_dir(dir, offset)
        });
    }

    fn readdirplus(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let (_turn, vfs) = begin!(self, Work::Long, req, reply);
        let (dir, shown) = (convert::ino(ino), Arc::clone(&vfs));
        let answer = move |reply, page| later::directory_plus(&shown, dir, reply, page);
        self.with_loaded(&vfs, reply, [], answer, move |vfs, []| vfs.read_dir(dir, offset));
    }

    fn releasedir(
        &self,
        req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let _turn = self.turns.take(Work::Quick, req.pid());
        reply.ok();
    }

    fn statfs(&self, req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        answer::stat_fs(reply, vfs.stat_fs());
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        answer::empty(
            reply,
            vfs.set_xattr(convert::ino(ino), name.as_bytes(), value, flags),
        );
    }

    fn getxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        answer::xattr(reply, size, vfs.xattr(convert::ino(ino), name.as_bytes()));
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        answer::xattr(reply, size, vfs.list_xattrs(convert::ino(ino)));
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (_turn, vfs) = begin!(self, Work::Quick, req, reply);
        answer::empty(reply, vfs.remove_xattr(convert::ino(ino), name.as_bytes()));
    }

    fn fallocate(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (_turn, vfs) = begin!(self, Work::Long, req, reply);
        answer::empty(reply, vfs.allocate(fh.into(), offset, length, mode));
    }

    fn lseek(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let (_turn, vfs) = begin!(self, Work::Long, req, reply);
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            // The kernel answers all others by itself.
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else {
            return reply.error(Errno::ENXIO);
        };
        answer::offset(reply, vfs.seek(fh.into(), offset, what));
    }

    fn copy_file_range(
        &self,
        req: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (_turn, vfs) = begin!(self, Work::Long, req, reply);
        let copied = vfs.copy_range(fh_in.into(), offset_in, fh_out.into(), offset_out, len);
        answer::written(reply, copied.map(|copied| copied as u32));
    }

    // These are said, because each request that is left to fuser is a warning in the log.

    fn ioctl(
        &self,
        req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        let _turn = self.turns.take(Work::Quick, req.pid());
        turns::answering();
        // Programs ask every file whether it is a terminal.
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        let _turn = self.turns.take(Work::Quick, req.pid());
        turns::answering();
        // The kernel asks once, and takes every file as ready from then on.
        reply.error(Errno::ENOSYS);
    }
}
