//! Attributes as programs see them.

use super::{Owner, Vfs, VfsOptions};
use crate::{
    namespace::preset::Preset,
    store::rows::{Ino, NodeKind, NodeRow},
};

/// What stat(2) shows of a file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    pub ino: Ino,
    pub kind: NodeKind,
    pub perm: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub size: u64,
    /// Units of 512 bytes.
    pub blocks: u64,
    /// Nanoseconds since 1970.
    pub atime: i64,
    pub mtime: i64,
    pub ctime: i64,
}

/// What a directory shows as its size, as ext4 does.
const DIR_BYTES: u64 = 4096;

/// What files take of a disk at least, and in steps of.
const BLOCK_BYTES: u64 = 4096;

impl Attr {
    /// The attributes in a row, for a mount with these options.
    #[must_use]
    fn of(node: &NodeRow, options: &VfsOptions) -> Self {
        let (uid, gid) = match options.owner {
            Owner::Fixed { uid, gid } => (uid, gid),
            Owner::Preserve => (node.uid, node.gid),
        };
        let size = if node.kind == NodeKind::Dir {
            DIR_BYTES
        } else {
            node.size
        };
        Self {
            ino: node.ino,
            kind: node.kind,
            perm: node.perm & !options.umask,
            // How many directories are in one that is not loaded is not known; one link says so
            // to programs that count on the number (find(1) does, of file systems that it knows).
            nlink: if node.dir.as_ref().is_some_and(|dir| dir.unloaded.is_any()) {
                1
            } else {
                node.nlink
            },
            uid,
            gid,
            rdev: node.rdev,
            size,
            // As disks keep files: in blocks of 4 KiB, and the target of a link beside its attributes.
            blocks: if node.kind == NodeKind::Symlink {
                0
            } else {
                size.div_ceil(BLOCK_BYTES) * (BLOCK_BYTES / 512)
            },
            atime: node.atime,
            mtime: node.mtime,
            ctime: node.ctime,
        }
    }
}

impl Vfs {
    /// What is shown of a row, as the mount and the preset of its directory say.
    pub(super) fn shown(&self, node: &NodeRow) -> Attr {
        let mut attr = Attr::of(node, &self.options);
        if self.options.owner == Owner::Preserve
            // One whose directory cannot be looked at now belongs to who made it.
            && self.tree.preset_of(node).ok().flatten().is_some_and(Preset::owned_by_mount)
        {
            (attr.uid, attr.gid) = self.options.user;
        }
        attr
    }
}
