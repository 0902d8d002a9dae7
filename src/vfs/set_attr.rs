//! Reading and changing attributes.

use std::{fs::File, io, sync::Arc};

use rustix::fs::{Timespec, Timestamps};

use super::{
    Attr, Lend, OpenRequest, OpenStep, Vfs, VfsError,
    handle::Serving,
    io::{note_written, writable},
    open::{ATTEMPTS, Missing, is_spare, may_block, nanos, stat},
};
use crate::{
    namespace::{
        TreeError,
        tree::{AttrChange, Notice, SetTime, wall_nanos},
    },
    store::rows::{Content, Ino, NodeRow},
};

/// What setattr is asked to change.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    pub change: AttrChange,
    pub size: Option<u64>,
    /// The open file through which it is asked, if any.
    pub handle: Option<u64>,
}

/// A file that is open for writing.
struct Written {
    /// What the disk says of its staging file.
    stat: rustix::fs::Stat,
    /// See [`OpenState::born`](super::handle::OpenState::born).
    born: Option<i64>,
    /// Since its last change was recorded. Without one, when the staging file changed says nothing: that it was made
    /// from a blob, or a name of it was dropped, is no change of the file.
    changed: bool,
}

/// The longest name and value of an extended attribute, as in xattr(7).
const XATTR_NAME_MAX: usize = 255;
const XATTR_VALUE_MAX: usize = 65_536;

impl Vfs {
    pub fn attr(&self, ino: Ino) -> Result<Attr, VfsError> {
        let node = self.tree.node(ino)?.ok_or(VfsError::Gone)?;
        self.attr_or_removed(&node)
    }

    /// As [`Self::attr_of`], also of a directory that is not there any more.
    fn attr_or_removed(&self, node: &NodeRow) -> Result<Attr, VfsError> {
        let mut attr = self.attr_of(node);
        if self.tree.is_removed(node)? {
            attr.nlink = 0;
        }
        Ok(attr)
    }

    /// The attributes of a node; of one that is being written, those of its staging file count.
    pub(super) fn attr_of(&self, node: &NodeRow) -> Attr {
        let mut attr = self.shown(node);
        if !matches!(node.content, Content::Staging(_)) {
            return attr;
        }
        if let Some(Written { stat, born, changed }) = self.stat_of_written(node.ino) {
            attr.size = stat.st_size as u64;
            attr.blocks = stat.st_blocks as u64;
            attr.mtime = nanos(stat.st_mtime, stat.st_mtime_nsec);
            if let Some(born) = born.filter(|born| is_spare((attr.size, attr.mtime), *born)) {
                attr.mtime = born;
                attr.ctime = attr.ctime.max(born);
            } else if changed {
                attr.ctime = attr.ctime.max(nanos(stat.st_ctime, stat.st_ctime_nsec));
            }
            return attr;
        }
        // The last writer may have closed it since the row was read, and told what it left.
        match self.tree.node(node.ino) {
            Ok(Some(node)) => self.shown(&node),
            Ok(None) | Err(_) => attr,
        }
    }

    /// What is known of a file that is open for writing.
    fn stat_of_written(&self, ino: Ino) -> Option<Written> {
        let open = self.nodes.get(ino)?;
        let known = {
            let mut state = open.lock();
            state.attr_given |= state.writers > 0;
            match &state.serving {
                Serving::Staging { file, .. } if state.writers > 0 => {
                    Some((Arc::clone(file), state.born, state.written, state.recorded))
                }
                _ => None,
            }
        };
        self.nodes.release(ino, &open, |open| open.lock().handles == 0);
        let (file, born, written, recorded) = known?;
        let stat = rustix::fs::fstat(&file).ok()?;
        let now = (stat.st_size as u64, nanos(stat.st_mtime, stat.st_mtime_nsec));
        Some(Written {
            stat,
            born,
            changed: written || now != recorded,
        })
    }

    /// Changes attributes, or says what must be fetched first (to cut a file short in its middle).
    pub fn set_attr(&self, ino: Ino, set: SetAttr) -> Result<Result<Attr, Missing>, VfsError> {
        self.set_attr_with(ino, set, None)
    }

    fn set_attr_with(
        &self,
        ino: Ino,
        set: SetAttr,
        brought: Option<&Missing>,
    ) -> Result<Result<Attr, Missing>, VfsError> {
        self.writable()?;
        self.used();
        self.tree.touch(ino);
        if let Some(size) = set.size
            && let Some(missing) = self.set_size(ino, size, set.handle, brought)?
        {
            return Ok(Err(missing));
        }
        let now = wall_nanos();
        self.set_times_of_staging(ino, set.change, now)?;
        let node = self.tree.node(ino)?.ok_or(VfsError::Gone)?;
        if set.change == AttrChange::default() {
            return self.attr_or_removed(&node).map(Ok);
        }
        if let Content::Blob(digest) = node.content {
            self.store.blobs.touch(&digest);
        }
        let node = self.tree.set_attributes(ino, set.change, now)?;
        self.attr_or_removed(&node).map(Ok)
    }

    /// As [`Vfs::set_attr`], bringing what is missing.
    pub async fn set_attr_fetching(
        &self,
        ino: Ino,
        set: SetAttr,
        mut missing: Missing,
    ) -> Result<Attr, VfsError> {
        for _ in 0..ATTEMPTS {
            self.bring(ino, &missing).await?;
            match may_block(|| self.set_attr_with(ino, set, Some(&missing)))? {
                Ok(attr) => return Ok(attr),
                Err(more) => missing = more,
            }
        }
        Err(missing.failure())
    }

    fn set_size(
        &self,
        ino: Ino,
        size: u64,
        handle: Option<u64>,
        brought: Option<&Missing>,
    ) -> Result<Option<Missing>, VfsError> {
        if let Some(handle) = handle
            && self.handle(handle)?.write
        {
            let handle = self.handle(handle)?;
            let file = writable(&handle)?;
            // Holes need no space, but the list of what is none may.
            self.with_room(|| 0, || file.set_len(size))?;
            note_written(&handle);
            return Ok(None);
        }
        let request = OpenRequest {
            write: true,
            truncate: size == 0,
            ..OpenRequest::default()
        };
        let no_lend: Lend<'_> = None;
        let opened = match self.open_with(ino, request, no_lend, brought)? {
            OpenStep::Ready(opened) => opened,
            OpenStep::Fetch(missing) => return Ok(Some(missing)),
        };
        let result = self.set_size(ino, size, Some(opened.handle), None);
        self.release(opened.handle)?;
        result
    }

    /// The times of a file that is not sealed are those of its staging file too:
    /// a time that differs later says that somebody wrote.
    fn set_times_of_staging(&self, ino: Ino, change: AttrChange, now: i64) -> Result<(), VfsError> {
        if change.mtime.is_none() && change.atime.is_none() {
            return Ok(());
        }
        let Some(node) = self.tree.node(ino)? else {
            return Ok(());
        };
        let Content::Staging(id) = node.content else {
            return Ok(());
        };
        let at = |time: Option<SetTime>| {
            time.map(|time| match time {
                SetTime::To(nanos) => nanos,
                SetTime::Now => now,
            })
        };
        if let Some(open) = self.nodes.get(ino) {
            let mut state = open.lock();
            if let Serving::Staging { file, .. } = &state.serving {
                let file = Arc::clone(file);
                let written = state.written || (state.writers > 0 && stat(&file)? != state.recorded);
                set_file_times(&file, at(change.atime), at(change.mtime))?;
                state.born = state.born.filter(|_| change.mtime.is_none());
                state.written = written;
                state.recorded = stat(&file)?;
                drop(state);
                self.nodes.release(ino, &open, |open| open.lock().handles == 0);
                return Ok(());
            }
            drop(state);
            self.nodes.release(ino, &open, |open| open.lock().handles == 0);
        }
        match self.store.staging.open(id, false) {
            Ok(file) => Ok(set_file_times(&file, at(change.atime), at(change.mtime))?),
            // Sealed meanwhile: the row alone has the times.
            Err(_) if self.tree.node(ino)?.is_none_or(|now| now.content != node.content) => Ok(()),
            Err(err) => Err(err.into()),
        }
    }

    /// Takes the set-id bits from a file that was emptied by its open: of all changes this one alone the kernel
    /// leaves to us.
    pub(super) fn drop_set_id(&self, ino: Ino) -> Result<(), VfsError> {
        let node = self.tree.node(ino)?.ok_or(VfsError::Gone)?;
        let Some(perm) = without_set_id(node.perm) else {
            return Ok(());
        };
        let change = AttrChange {
            perm: Some(perm),
            ..AttrChange::default()
        };
        self.tree.set_attributes(ino, change, wall_nanos())?;
        self.tell(vec![Notice::Attributes { ino }]);
        Ok(())
    }

    pub fn xattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>, VfsError> {
        self.xattrs_enabled()?;
        let node = self.tree.node(ino)?.ok_or(TreeError::NotFound)?;
        let found = node.xattrs.iter().find(|(known, _)| known == name);
        found
            .map(|(_, value)| value.clone())
            .ok_or(VfsError::Tree(TreeError::NoAttribute))
    }

    /// The names of all extended attributes, each ended by a NUL byte.
    pub fn list_xattrs(&self, ino: Ino) -> Result<Vec<u8>, VfsError> {
        self.xattrs_enabled()?;
        let node = self.tree.node(ino)?.ok_or(TreeError::NotFound)?;
        let mut names = Vec::new();
        for (name, _) in &node.xattrs {
            names.extend_from_slice(name);
            names.push(0);
        }
        Ok(names)
    }

    /// Sets an extended attribute; `flags` are those of setxattr(2).
    ///
    /// Only names that begin with `user.` are kept: the others mean something to
    /// the kernel of one machine.
    pub fn set_xattr(&self, ino: Ino, name: &[u8], value: &[u8], flags: i32) -> Result<(), VfsError> {
        self.xattrs_enabled()?;
        self.writable()?;
        if !name.starts_with(b"user.") {
            return Err(VfsError::NotSupported);
        }
        if name == b"user." {
            return Err(VfsError::Invalid);
        }
        if name.len() > XATTR_NAME_MAX || value.len() > XATTR_VALUE_MAX {
            return Err(VfsError::TooLarge);
        }
        let (create, replace) = (flags & libc::XATTR_CREATE != 0, flags & libc::XATTR_REPLACE != 0);
        Ok(self.tree.set_xattr(ino, name, Some(value), create, replace)?)
    }

    pub fn remove_xattr(&self, ino: Ino, name: &[u8]) -> Result<(), VfsError> {
        self.xattrs_enabled()?;
        self.writable()?;
        Ok(self.tree.set_xattr(ino, name, None, false, false)?)
    }

    fn xattrs_enabled(&self) -> Result<(), VfsError> {
        if self.options.xattr {
            Ok(())
        } else {
            Err(VfsError::NoXattr)
        }
    }
}

/// A mode without the set-id bits that a change of the file takes away; `None` if there are none. A set-group-ID bit
/// without the right to execute for the group is none.
fn without_set_id(perm: u32) -> Option<u32> {
    let group = libc::S_ISGID | libc::S_IXGRP;
    let mut less = perm & !libc::S_ISUID;
    if perm & group == group {
        less &= !libc::S_ISGID;
    }
    (less != perm).then_some(less)
}

/// Sets the times of a staging file, in nanoseconds since 1970; `None` leaves one as it is.
pub(super) fn set_file_times(file: &File, atime: Option<i64>, mtime: Option<i64>) -> io::Result<()> {
    let spec = |nanos: Option<i64>| match nanos {
        Some(nanos) => Timespec {
            tv_sec: nanos.div_euclid(1_000_000_000),
            tv_nsec: nanos.rem_euclid(1_000_000_000),
        },
        None => Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        },
    };
    Ok(rustix::fs::futimens(
        file,
        &Timestamps {
            last_access: spec(atime),
            last_modification: spec(mtime),
        },
    )?)
}
