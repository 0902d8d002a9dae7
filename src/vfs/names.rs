//! Requests about names.

use std::sync::Arc;

use super::{
    Attr, Lend, OpenRequest, OpenStep, Opened, Vfs, VfsError, count,
    handle::{Handle, OpenNode, Serving},
};
use crate::{
    namespace::{
        TreeError,
        tree::{NewNode, Removed, RenameMode},
    },
    store::{
        fetch::ReadCursor,
        rows::{Ino, NodeKind, StagingId},
    },
};

/// Names looked at at once in a directory that is to be removed; mostly the first one is seen.
const WITHHELD_PAGE: usize = 64;

/// What a new file, directory or other object starts with.
#[derive(Clone, Debug)]
pub struct NewFile {
    pub kind: NodeKind,
    /// Permission, set-id and sticky bits, the caller's umask applied.
    pub perm: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    /// Of a symbolic link.
    pub target: Vec<u8>,
}

/// What creating and opening a file came to.
#[derive(Debug)]
pub enum Created {
    New(Attr, Opened),
    /// Another program was quicker: the file is there, and is to be opened.
    Existing(Attr, OpenStep),
}

impl Vfs {
    /// Makes anything but an open file.
    pub fn make(&self, parent: Ino, name: &[u8], new: &NewFile) -> Result<Attr, VfsError> {
        self.writable()?;
        self.used();
        self.tree.touch(parent);
        let make = || self.tree.create(parent, name, new.to_node(None));
        let node = self.with_room(|| 0, make)?;
        Ok(self.shown(&node))
    }

    /// Makes a file and opens it for writing.
    pub fn create(
        &self,
        parent: Ino,
        name: &[u8],
        new: &NewFile,
        request: OpenRequest,
        exclusive: bool,
        lend: Lend<'_>,
    ) -> Result<Created, VfsError> {
        self.writable()?;
        self.used();
        self.tree.touch(parent);
        let (id, file) = self.with_room(|| 0, || self.store.staging.create())?;
        let make = || self.tree.create(parent, name, new.to_node(Some(id)));
        let mut made = self.with_room(|| 0, make);
        let exists = |made: &Result<_, VfsError>| matches!(made, Err(VfsError::Tree(TreeError::Exists)));
        if exists(&made) && self.is_withheld(parent, name).unwrap_or(false) {
            // Nobody sees what is there.
            made = self
                .tree
                .unlink(parent, name)
                .map_err(VfsError::from)
                .and_then(|removed| {
                    self.removed(removed);
                    self.with_room(|| 0, make)
                });
        }
        let node = match made {
            Ok(node) => node,
            Err(err) => {
                self.store.staging.remove(id);
                return match (err, exclusive) {
                    (VfsError::Tree(TreeError::Exists), false) => {
                        self.open_existing(parent, name, request, lend)
                    }
                    (err, _) => Err(err),
                };
            }
        };
        let open = self.nodes.get_or(node.ino, || OpenNode::new(node.ino));
        let loan = {
            let mut state = open.lock();
            // An open for reading alone is counted as a writer too: the file was just made by it.
            state.handles += 1;
            state.writers += 1;
            state.recorded = (0, node.mtime);
            state.born = Some(node.mtime);
            state.written = true;
            state.mappable = request.read;
            let loan = lend.and_then(|lend| self.lend_staging(id, lend));
            state.serving = Serving::Staging {
                id,
                file: Arc::new(file),
                loan: loan.clone(),
            };
            loan
        };
        if loan.is_some() {
            count(&self.counters.passthrough_opens);
        }
        let handle = Handle {
            node: open,
            write: true,
            execute: false,
            cursor: ReadCursor::default(),
        };
        let opened = Opened {
            handle: self.handles.insert(handle),
            loan,
            keep_cache: false,
            write: true,
            // Whoever closes it on a full disk waits for the answer, which may be an error.
            created: !self.store.ledger.is_disk_full(),
        };
        Ok(Created::New(self.shown(&node), opened))
    }

    fn open_existing(
        &self,
        parent: Ino,
        name: &[u8],
        request: OpenRequest,
        lend: Lend<'_>,
    ) -> Result<Created, VfsError> {
        let node = self.tree.lookup(parent, name)?.ok_or(TreeError::NotFound)?;
        if node.kind == NodeKind::Dir {
            return Err(TreeError::IsDirectory.into());
        }
        let step = self.open(node.ino, request, lend)?;
        Ok(Created::Existing(self.attr_of(&node), step))
    }

    pub fn link(&self, ino: Ino, parent: Ino, name: &[u8]) -> Result<Attr, VfsError> {
        self.writable()?;
        self.used();
        let (node, done) = self.with_room(|| 0, || self.tree.link(ino, parent, name))?;
        self.removed(done);
        Ok(self.attr_of(&node))
    }

    pub fn unlink(&self, parent: Ino, name: &[u8]) -> Result<(), VfsError> {
        self.writable()?;
        self.used();
        let removed = self.tree.unlink(parent, name)?;
        self.tree.hold(&removed.nameless);
        self.removed(removed);
        Ok(())
    }

    pub fn rmdir(&self, parent: Ino, name: &[u8]) -> Result<(), VfsError> {
        self.writable()?;
        self.used();
        let mut removed = self.tree.rmdir(parent, name);
        if matches!(removed, Err(TreeError::NotEmpty)) && self.remove_withheld(parent, name)? {
            removed = self.tree.rmdir(parent, name);
        }
        self.removed(removed?);
        Ok(())
    }

    /// Removes from a directory the entries that nobody sees; false, and nothing is removed, if there is more in it.
    fn remove_withheld(&self, parent: Ino, name: &[u8]) -> Result<bool, VfsError> {
        let Some(dir) = self.tree.lookup(parent, name)? else {
            return Ok(false);
        };
        let (mut withheld, mut after) = (Vec::new(), None);
        loop {
            let (names, next) = self.tree.list(dir.ino, after.as_deref(), WITHHELD_PAGE)?;
            for (name, node) in names {
                let place = self.tree.name_rule(dir.ino, &name)?.action;
                if !place.is_some_and(|place| self.is_known_withheld(dir.ino, place, &node)) {
                    return Ok(false);
                }
                withheld.push(name);
            }
            after = next;
            if after.is_none() {
                break;
            }
        }
        for name in withheld {
            match self.tree.unlink(dir.ino, &name) {
                Err(TreeError::NotFound) => {}
                removed => self.removed(removed?),
            }
        }
        Ok(true)
    }

    pub fn rename(&self, from: (Ino, &[u8]), to: (Ino, &[u8]), mode: RenameMode) -> Result<(), VfsError> {
        self.writable()?;
        self.used();
        let removed = self.with_room(|| 0, || self.tree.rename(from, to, mode))?;
        self.tree.hold(&removed.nameless);
        self.removed(removed);
        Ok(())
    }

    /// The kernel knows a file no more.
    pub fn forgotten(&self, ino: Ino) {
        self.tree.forgotten(ino);
    }

    fn removed(&self, removed: Removed) {
        self.discard(removed.discarded);
        for ino in removed.unsealed {
            self.settling.rest(ino, self.settle_of(ino));
        }
        self.tell(removed.notices);
    }

    /// What a symbolic link points at.
    pub fn read_link(&self, ino: Ino) -> Result<Vec<u8>, VfsError> {
        let node = self.tree.node(ino)?.ok_or(TreeError::NotFound)?;
        if node.kind != NodeKind::Symlink {
            return Err(VfsError::Invalid);
        }
        Ok(node.target.clone())
    }
}

impl NewFile {
    fn to_node(&self, staging: Option<StagingId>) -> NewNode {
        NewNode {
            kind: self.kind,
            perm: self.perm & 0o7777,
            uid: self.uid,
            gid: self.gid,
            rdev: self.rdev,
            target: self.target.clone(),
            staging,
        }
    }
}
