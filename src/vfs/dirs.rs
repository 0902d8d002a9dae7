//! Listing directories.
//!
//! A directory handle remembers the entries it has given, in order, so that a
//! reader may go back to any of them; it asks the tree for more, a page at a
//! time, from the last name it has. A name that is made or removed meanwhile
//! may or may not be seen, all others are seen exactly once, as readdir(3) wants it.

use std::sync::Mutex;

use super::{Attr, Keep, Vfs, VfsError};
use crate::{
    namespace::TreeError,
    store::rows::{Ino, NodeKind},
};

/// One entry of a directory.
#[derive(Clone, Debug)]
pub struct DirEntry {
    pub name: Vec<u8>,
    pub ino: Ino,
    pub kind: NodeKind,
    /// Where to go on behind this entry.
    pub next_offset: u64,
}

/// Entries from an offset on; empty at the end.
pub type DirPage = Vec<DirEntry>;

#[derive(Debug)]
pub(super) struct DirHandle {
    ino: Ino,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    entries: Vec<(Vec<u8>, Ino, NodeKind)>,
    /// The last name asked for, and whether there may be more behind it.
    after: Option<Vec<u8>>,
    complete: bool,
}

/// Names asked for at once.
const PAGE: usize = 512;

impl Vfs {
    pub fn open_dir(&self, ino: Ino) -> Result<u64, VfsError> {
        self.used();
        self.tree.touch(ino);
        Ok(self.dirs.insert(DirHandle {
            ino,
            seen: Mutex::default(),
        }))
    }

    pub fn release_dir(&self, handle: u64) {
        self.dirs.remove(handle);
    }

    /// Entries from `offset` on, `.` and `..` first. Offset 0 looks at the directory anew.
    pub fn read_dir(&self, handle: u64, offset: u64) -> Result<DirPage, VfsError> {
        let dir = self.dirs.get(handle).ok_or(VfsError::BadHandle)?;
        let node = self.tree.node(dir.ino)?.ok_or(TreeError::NotFound)?;
        let up = node.dir.as_ref().ok_or(TreeError::NotDirectory)?.up;
        let mut seen = dir.seen.lock().expect("a panic ends the process");
        if offset == 0 {
            *seen = Seen::default();
            seen.entries.push((b".".to_vec(), dir.ino, NodeKind::Dir));
            seen.entries.push((b"..".to_vec(), up, NodeKind::Dir));
        }
        let start = usize::try_from(offset).map_err(|_| VfsError::Invalid)?;
        while seen.entries.len() <= start + 2 && !seen.complete {
            let (names, next) = self.tree.list(dir.ino, seen.after.as_deref(), PAGE)?;
            for (name, node) in names {
                if !self.is_known_withheld(dir.ino, &name, &node)? {
                    seen.entries.push((name, node.ino, node.kind));
                }
            }
            seen.complete = next.is_none();
            seen.after = next;
        }
        let entries = seen.entries.iter().enumerate().skip(start).take(PAGE);
        Ok(entries
            .map(|(index, (name, ino, kind))| DirEntry {
                name: name.clone(),
                ino: *ino,
                kind: *kind,
                next_offset: index as u64 + 1,
            })
            .collect())
    }

    /// Attributes for an entry that was listed; `None` if the name means something else by
    /// now: the kernel will remember what it is told, unless it is told not to.
    pub fn entry_attr(&self, handle: u64, entry: &DirEntry) -> Result<Option<(Attr, Keep)>, VfsError> {
        let dir = self.dirs.get(handle).ok_or(VfsError::BadHandle)?;
        let (node, keep) = if matches!(entry.name.as_slice(), b"." | b"..") {
            (self.tree.node(entry.ino)?, Keep::Long)
        } else {
            let node = self.tree.lookup(dir.ino, &entry.name)?;
            (node, self.keep_of(dir.ino, &entry.name)?)
        };
        Ok(node
            .filter(|node| node.ino == entry.ino)
            .map(|node| (self.attr_of(&node), keep)))
    }
}
