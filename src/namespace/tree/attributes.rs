//! Attributes: mode, owner, times, extended attributes.

use std::sync::Arc;

use super::{Edit, Tree};
use crate::{
    namespace::{TreeError, preset::Preset},
    store::rows::{Content, Ino, NodeRow},
};

/// A time to set, as utimensat(2) has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// Nanoseconds since 1970.
    To(i64),
    Now,
}

/// Which attributes to change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttrChange {
    pub perm: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
}

impl AttrChange {
    /// Whether other machines are told. Setting the times of a published file to *now* is a
    /// touch, the sign of use that caches give: it stays on this machine.
    fn is_told(&self) -> bool {
        self.sets_more_than_times() || matches!(self.mtime, Some(SetTime::To(_)))
    }

    fn sets_more_than_times(&self) -> bool {
        self.perm.is_some() || self.uid.is_some() || self.gid.is_some()
    }
}

impl Tree {
    /// Changes attributes of a file or directory.
    ///
    /// `now` is what [`SetTime::Now`] means, in nanoseconds since 1970.
    pub fn set_attributes(&self, ino: Ino, change: AttrChange, now: i64) -> Result<Arc<NodeRow>, TreeError> {
        let mut in_use = self.lock();
        let mut edit = Edit::new(self, &mut in_use);
        edit.now = now;
        let at = |time: SetTime| match time {
            SetTime::To(nanos) => nanos,
            SetTime::Now => now,
        };
        let node = edit.node_mut(ino)?;
        node.perm = change.perm.map_or(node.perm, |perm| perm & 0o7777);
        node.uid = change.uid.unwrap_or(node.uid);
        node.gid = change.gid.unwrap_or(node.gid);
        node.atime = change.atime.map_or(node.atime, at);
        node.mtime = change.mtime.map_or(node.mtime, at);
        node.ctime = now;
        let row = edit.node(ino)?.ok_or(TreeError::NotFound)?;
        // Some tools read the clock themselves: any time that they set on an entry is a touch.
        let is_touch = !change.sets_more_than_times()
            && row.dir.is_none()
            && change.is_told()
            && self.preset_of(&row)?.is_some_and(Preset::times_tell_use);
        if change.is_told() && !is_touch && !edit.is_told_later(&row)? {
            edit.restamp(ino)?;
            // Who sets the times of a directory when its last file is closed (`cp -a` does) shall have
            // the last word, also when that close is recorded later.
            if row.dir.is_some() {
                for pin in edit.in_use.pins.values_mut() {
                    pin.tell_dir |= pin.writers > 0 && pin.home.as_ref().is_some_and(|(dir, _)| *dir == ino);
                }
            }
        }
        let row = edit.node(ino)?.ok_or(TreeError::NotFound)?;
        edit.commit_and_tell()?;
        Ok(row)
    }

    /// Sets an extended attribute, or removes it (`None`).
    ///
    /// `create` and `replace` are `XATTR_CREATE` and `XATTR_REPLACE` of setxattr(2).
    pub fn set_xattr(
        &self,
        ino: Ino,
        name: &[u8],
        value: Option<&[u8]>,
        create: bool,
        replace: bool,
    ) -> Result<(), TreeError> {
        let mut in_use = self.lock();
        let mut edit = Edit::new(self, &mut in_use);
        let now = edit.now;
        let node = edit.node_mut(ino)?;
        let found = node
            .xattrs
            .binary_search_by(|(known, _)| known.as_slice().cmp(name));
        match (found, value) {
            (Ok(_), Some(_)) if create => return Err(TreeError::Exists),
            (Err(_), Some(_)) if replace => return Err(TreeError::NoAttribute),
            (Err(_), None) => return Err(TreeError::NoAttribute),
            (Ok(at), Some(value)) => node.xattrs[at].1 = value.to_vec(),
            (Err(at), Some(value)) => node.xattrs.insert(at, (name.to_vec(), value.to_vec())),
            (Ok(at), None) => {
                node.xattrs.remove(at);
            }
        }
        node.ctime = now;
        let row = edit.node(ino)?.ok_or(TreeError::NotFound)?;
        if !edit.is_told_later(&row)? {
            edit.restamp(ino)?;
        }
        edit.commit_and_tell()?;
        Ok(())
    }
}

impl Edit<'_> {
    /// [`Edit::commit`] where there are no staging files to remove, and the caller tells nobody.
    pub(super) fn commit_and_tell(self) -> Result<(), TreeError> {
        let tree = self.tree();
        let (_, notices) = self.commit()?;
        tree.tell(notices);
        Ok(())
    }

    /// Whether a file that is not sealed will be told with its attributes anyway.
    fn is_told_later(&self, node: &NodeRow) -> Result<bool, TreeError> {
        let unsealed = matches!(node.content, Content::Staging(_));
        Ok(unsealed && self.own_names(node)?.iter().all(|row| row.pending.is_some()))
    }
}
