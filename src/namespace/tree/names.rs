//! Making and removing names.

use std::sync::Arc;

use super::{Edit, Notice, Tree, check_name};
use crate::{
    base::digest::Digest,
    namespace::TreeError,
    store::rows::{
        Content, DirState, Ino, LinkId, NameState, NodeKind, NodeRow, StagingId, TreeLayer, Unloaded,
    },
};

/// What a new file or directory starts with.
#[derive(Clone, Debug)]
pub struct NewNode {
    pub kind: NodeKind,
    pub perm: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    /// Of a symbolic link.
    pub target: Vec<u8>,
    /// The staging file of a regular file that is created open; without it a file is empty and sealed.
    pub staging: Option<StagingId>,
}

/// What became of names that were removed or replaced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Staging files that may go after the next barrier.
    pub discarded: Vec<StagingId>,
    /// Other names that came or went with these: directories that lived on for them alone.
    pub notices: Vec<Notice>,
    /// Closed files that are to be sealed now, because others are told of them.
    pub unsealed: Vec<Ino>,
    /// Files that lost their last name, see [`Tree::hold`].
    pub nameless: Vec<Ino>,
}

impl Tree {
    /// Makes a file, directory or other object.
    ///
    /// A file with a staging file is pinned as open for writing; the caller unpins it.
    pub fn create(&self, parent: Ino, name: &[u8], new: NewNode) -> Result<Arc<NodeRow>, TreeError> {
        check_name(name)?;
        let mut in_use = self.lock();
        self.need_name(parent, name)?;
        let mut edit = Edit::new(self, &mut in_use);
        let Some(above) = edit.node(parent)? else {
            return Err(TreeError::NotFound);
        };
        if above.kind != NodeKind::Dir {
            return Err(TreeError::NotDirectory);
        }
        if !edit.is_reachable(&above)? {
            return Err(TreeError::NotFound);
        }
        if edit.visible(parent, name)?.is_some() {
            return Err(TreeError::Exists);
        }
        let known = edit.name(parent, name)?.and_then(|row| row.dir);
        let ino = edit.next_ino();
        let is_dir = new.kind == NodeKind::Dir;
        let content = match (new.kind, new.staging) {
            (NodeKind::File, Some(id)) => Content::Staging(id),
            (NodeKind::File, None) => Content::Blob(Digest::EMPTY),
            _ => Content::None,
        };
        edit.put_node(NodeRow {
            // A directory with the set-group-id bit hands on its group, and to directories the bit.
            gid: if above.perm & 0o2000 == 0 {
                new.gid
            } else {
                above.gid
            },
            perm: new.perm | if is_dir { above.perm & 0o2000 } else { 0 },
            uid: new.uid,
            rdev: new.rdev,
            size: new.target.len() as u64,
            nlink: if is_dir { 2 } else { 0 },
            content,
            target: new.target,
            dir: is_dir.then(|| DirState {
                up: parent,
                name: name.to_vec(),
                visible_children: 0,
                subdirs: 0,
                unloaded: Unloaded::default(),
            }),
            ..NodeRow::new(ino, new.kind, edit.now)
        });
        if let (true, Some(known)) = (is_dir, known) {
            edit.inherit(known, ino)?;
        }
        edit.own(parent, name, NameState::Live(ino))?;
        let row = edit.node(ino)?.ok_or(TreeError::NotFound)?;
        edit.commit_and_tell()?;
        if new.staging.is_some() {
            let pin = in_use.pins.entry(ino).or_default();
            pin.opens += 1;
            pin.writers += 1;
            pin.unmade = true;
            pin.home = Some((parent, name.to_vec()));
        }
        Ok(row)
    }

    /// Gives a file another name; what else is to be done then is in the second value.
    pub fn link(&self, ino: Ino, parent: Ino, name: &[u8]) -> Result<(Arc<NodeRow>, Removed), TreeError> {
        check_name(name)?;
        let mut in_use = self.lock();
        self.need_name(parent, name)?;
        let mut edit = Edit::new(self, &mut in_use);
        let node = edit.node(ino)?.ok_or(TreeError::NotFound)?;
        if node.kind == NodeKind::Dir {
            return Err(TreeError::NotPermitted);
        }
        // A file that nothing names has no way back into the tree (only O_TMPFILE would).
        if node.nlink == 0 {
            return Err(TreeError::NotFound);
        }
        if node.nlink >= 65_000 {
            return Err(TreeError::TooManyLinks);
        }
        let above = edit.node(parent)?.ok_or(TreeError::NotFound)?;
        if !edit.is_reachable(&above)? {
            return Err(TreeError::NotFound);
        }
        if edit.visible(parent, name)?.is_some() {
            return Err(TreeError::Exists);
        }
        if node.link_id.is_none() {
            // From now on its names travel as one: the names it has are told again.
            let id = LinkId {
                machine: self.clock.machine(),
                ino: ino.0,
            };
            edit.node_mut(ino)?.link_id = Some(id);
            edit.remember_link_id(TreeLayer::TOP, id, ino)?;
            edit.restamp(ino)?;
        }
        edit.own(parent, name, NameState::Live(ino))?;
        let row = edit.node(ino)?.ok_or(TreeError::NotFound)?;
        let unsealed = std::mem::take(&mut edit.unsealed);
        let (discarded, notices) = edit.commit()?;
        let done = Removed {
            discarded,
            notices,
            unsealed,
            nameless: Vec::new(),
        };
        Ok((row, done))
    }

    /// Removes the name of a file.
    pub fn unlink(&self, parent: Ino, name: &[u8]) -> Result<Removed, TreeError> {
        check_name(name)?;
        let mut in_use = self.lock();
        self.need_name(parent, name)?;
        let mut edit = Edit::new(self, &mut in_use);
        let node = edit.visible(parent, name)?.ok_or(TreeError::NotFound)?;
        if node.kind == NodeKind::Dir {
            return Err(TreeError::IsDirectory);
        }
        edit.remove(parent, name)?;
        let nameless = std::mem::take(&mut edit.nameless);
        let (discarded, notices) = edit.commit()?;
        Ok(Removed {
            discarded,
            notices,
            unsealed: Vec::new(),
            nameless,
        })
    }

    /// Removes an empty directory. What is known of dead names below it stays.
    pub fn rmdir(&self, parent: Ino, name: &[u8]) -> Result<Removed, TreeError> {
        check_name(name)?;
        let mut in_use = self.lock();
        self.need_name(parent, name)?;
        let mut edit = Edit::new(self, &mut in_use);
        let node = edit.visible(parent, name)?.ok_or(TreeError::NotFound)?;
        self.need(node.ino)?;
        let dir = node.dir.as_ref().ok_or(TreeError::NotDirectory)?;
        self.need_to_know(&node)?;
        if dir.visible_children > 0 {
            return Err(TreeError::NotEmpty);
        }
        edit.remove(parent, name)?;
        edit.forget_tool(node.ino);
        let (discarded, notices) = edit.commit()?;
        Ok(Removed {
            discarded,
            notices,
            unsealed: Vec::new(),
            nameless: Vec::new(),
        })
    }

    /// [`Self::lose`] for the file that has this name now.
    pub fn lose_name(&self, parent: Ino, name: &[u8], read: Digest) -> Result<Vec<Notice>, TreeError> {
        match self.ledger.name(parent, name)?.map(|row| row.state) {
            Some(NameState::Live(ino)) => self.lose(ino, read),
            Some(NameState::Dead) | None => Ok(Vec::new()),
        }
    }

    /// Marks a file as gone from the bucket: its names read as "no such file"
    /// here until they are made again. Never published.
    ///
    /// `read` is the blob that was found missing; a file that has another one by now keeps it.
    pub fn lose(&self, ino: Ino, read: Digest) -> Result<Vec<Notice>, TreeError> {
        let mut in_use = self.lock();
        let mut edit = Edit::unasked(self, &mut in_use);
        let Some(node) = edit.node(ino)? else {
            return Ok(Vec::new());
        };
        if node.content != Content::Blob(read) {
            return Ok(Vec::new());
        }
        edit.lose(ino, read)?;
        let (_, notices) = edit.commit()?;
        Ok(notices)
    }
}
