//! Making what is no regular file that is opened at once: one way for mknod, mkdir and symlink.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, sync::Arc};

use fuser::{INodeNo, ReplyEntry, Request};

use super::{answer, convert, front::Front};
use crate::{
    store::rows::NodeKind,
    vfs::{NewFile, Vfs},
};

/// What the kernel asks for, as far as the request does not say who asks.
#[derive(Clone, Copy)]
pub(super) struct NewObject<'a> {
    pub(super) kind: NodeKind,
    pub(super) mode: u32,
    pub(super) rdev: u32,
    pub(super) target: &'a [u8],
}

impl Front {
    pub(super) fn make(
        &self,
        vfs: &Arc<Vfs>,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        new: NewObject<'_>,
        reply: ReplyEntry,
    ) {
        let new = NewFile {
            kind: new.kind,
            perm: new.mode & 0o7777,
            uid: req.uid(),
            gid: req.gid(),
            rdev: new.rdev,
            target: new.target.to_vec(),
        };
        let parent = convert::ino(parent);
        self.with_loaded(
            vfs,
            reply,
            [name.as_bytes()],
            answer::entry,
            move |vfs, [name]| vfs.make(parent, name, &new).map(Some),
        );
    }
}
