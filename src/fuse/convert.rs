//! Types of the protocol to types of the vfs, and back.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo, OpenAccMode, OpenFlags, RenameFlags, TimeOrNow};

use crate::{
    namespace::tree::{RenameMode, SetTime},
    store::rows::{Ino, NodeKind},
    vfs::{Attr, OpenRequest, VfsError},
};

pub(super) fn ino(ino: INodeNo) -> Ino {
    Ino(ino.0)
}

pub(super) fn errno(err: &VfsError) -> Errno {
    Errno::from_i32(err.errno())
}

pub(super) fn file_type(kind: NodeKind) -> FileType {
    match kind {
        NodeKind::File => FileType::RegularFile,
        NodeKind::Dir => FileType::Directory,
        NodeKind::Symlink => FileType::Symlink,
        NodeKind::Fifo => FileType::NamedPipe,
        NodeKind::Socket => FileType::Socket,
        NodeKind::CharDevice => FileType::CharDevice,
        NodeKind::BlockDevice => FileType::BlockDevice,
    }
}

/// What mknod(2) makes, by the type bits of its mode.
pub(super) fn kind_of_mode(mode: u32) -> Option<NodeKind> {
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG => Some(NodeKind::File),
        libc::S_IFIFO => Some(NodeKind::Fifo),
        libc::S_IFSOCK => Some(NodeKind::Socket),
        libc::S_IFCHR => Some(NodeKind::CharDevice),
        libc::S_IFBLK => Some(NodeKind::BlockDevice),
        _ => None,
    }
}

pub(super) fn attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: attr.size,
        blocks: attr.blocks,
        atime: time(attr.atime),
        mtime: time(attr.mtime),
        ctime: time(attr.ctime),
        crtime: time(attr.ctime),
        kind: file_type(attr.kind),
        perm: attr.perm as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: 4096,
        flags: 0,
    }
}

/// The answer to a look-up of a name that is not there, which the kernel remembers.
pub(super) fn no_entry() -> FileAttr {
    FileAttr {
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
    }
}

fn time(nanos: i64) -> SystemTime {
    let distance = Duration::from_nanos(nanos.unsigned_abs());
    if nanos >= 0 {
        UNIX_EPOCH + distance
    } else {
        UNIX_EPOCH - distance
    }
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(at) => SetTime::To(match at.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => before_1970(before.duration()),
        }),
    }
}

/// The kernel says whole seconds before 1970 and nanoseconds after those; fuser 0.18 takes both for a
/// distance in the same direction.
fn before_1970(distance: Duration) -> i64 {
    let seconds = i64::try_from(distance.as_secs()).unwrap_or(i64::MAX);
    let after = i64::from(distance.subsec_nanos());
    seconds.saturating_mul(-1_000_000_000).saturating_add(after)
}

/// Among the flags of an open: it is part of `execve(2)` (`__FMODE_EXEC` in the kernel's `fs.h`).
const FMODE_EXEC: i32 = 0x20;

pub(super) fn open_request(flags: OpenFlags, uid: u32) -> OpenRequest {
    OpenRequest {
        read: flags.acc_mode() != OpenAccMode::O_WRONLY,
        write: flags.acc_mode() != OpenAccMode::O_RDONLY,
        truncate: flags.0 & libc::O_TRUNC != 0,
        // The right to keep them (CAP_FSETID) is root's, as far as can be told.
        drop_set_id: uid != 0,
        execute: flags.0 & FMODE_EXEC != 0,
    }
}

/// `None` for what is not supported (`RENAME_WHITEOUT`, or two modes at once).
pub(super) fn rename_mode(flags: RenameFlags) -> Option<RenameMode> {
    if flags.is_empty() {
        Some(RenameMode::Replace)
    } else if flags == RenameFlags::RENAME_NOREPLACE {
        Some(RenameMode::NoReplace)
    } else if flags == RenameFlags::RENAME_EXCHANGE {
        Some(RenameMode::Exchange)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_understood_as_the_kernel_says_them() {
        let specific = |at| set_time(TimeOrNow::SpecificTime(at));
        for nanos in [0, 1, 1_700_000_000_123_456_789, -14_182_940_000_000_000] {
            assert_eq!(specific(time(nanos)), SetTime::To(nanos));
        }
        // What fuser makes of the seconds -2 and the nanoseconds 300,000,000.
        let of_fuser = UNIX_EPOCH - Duration::new(2, 300_000_000);
        assert_eq!(specific(of_fuser), SetTime::To(-1_700_000_000));
        let long_ago = UNIX_EPOCH - Duration::from_secs(1 << 40);
        assert_eq!(specific(long_ago), SetTime::To(i64::MIN));
    }
}
