//! What is used of the tree on this machine, for [`crate::namespace::touch`].

use std::collections::{HashMap, hash_map::Entry};

use super::{Edit, Tree, join};
use crate::{
    base::clock::Stamp,
    namespace::{
        TreeError,
        change::EntryBlob,
        touch::{Touched, format::mark},
    },
    store::rows::{Content, Durability, Ino, NameRow, NameState, TreeLayer},
};

impl Tree {
    /// Notes that a file or directory is used.
    pub fn touch(&self, ino: Ino) {
        self.touched.note(ino);
    }

    /// What is used here.
    pub fn touched(&self) -> &Touched {
        &self.touched
    }

    /// The marks of all paths of files and directories that are registers of `layer`. What is gone has none.
    pub fn marks_of(&self, inos: &[Ino], layer: TreeLayer) -> Result<Vec<u64>, TreeError> {
        let mut dirs: HashMap<Ino, Vec<u8>> = HashMap::new();
        let mut marks = Vec::with_capacity(inos.len());
        for ino in inos {
            let Some(node) = self.ledger.node(*ino)? else {
                continue;
            };
            let rows = match &node.dir {
                Some(_) if *ino == Ino::ROOT => continue,
                Some(dir) => self.ledger.name(dir.up, &dir.name)?.into_iter().collect(),
                None => self.ledger.names_of(*ino)?,
            };
            let is_told = |row: &NameRow| {
                row.layer == layer && row.state == NameState::Live(*ino) && row.parent != Ino::LINKS
            };
            for row in rows.into_iter().filter(|row| is_told(row)) {
                let above = match dirs.entry(row.parent) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(unknown) => match self.dir_path(row.parent) {
                        Ok(path) => unknown.insert(path),
                        // It was removed meanwhile.
                        Err(TreeError::NotFound | TreeError::NotDirectory) => continue,
                        Err(err) => return Err(err),
                    },
                };
                marks.push(mark(&join(above.clone(), &row.name)));
            }
        }
        Ok(marks)
    }
}

impl Tree {
    /// The blobs of files that the bucket has, as far as it is known what they consist of.
    pub fn blobs_of(&self, inos: &[Ino]) -> Result<Vec<EntryBlob>, TreeError> {
        let mut blobs = Vec::with_capacity(inos.len());
        for ino in inos {
            let Some(node) = self.ledger.node(*ino)? else {
                continue;
            };
            let Content::Blob(digest) = node.content else {
                continue;
            };
            match self.ledger.blob(&digest)?.map(|row| row.durability) {
                Some(Durability::Dirty | Durability::Quarantined) => {}
                Some(Durability::Durable { .. }) | None => blobs.extend(self.blob_of(digest, &node)?),
            }
        }
        Ok(blobs)
    }
}

impl Edit<'_> {
    /// Writes a name again that expired although it was used here (law 8); false when it was not.
    pub(super) fn keeps_used(
        &mut self,
        layer: TreeLayer,
        (parent, name): (Ino, &[u8]),
        stamp: Stamp,
    ) -> Result<bool, TreeError> {
        if !stamp.is_expired() || self.is_load {
            return Ok(false);
        }
        let Some(row) = self.name(parent, name)? else {
            return Ok(false);
        };
        let NameState::Live(ino) = row.state else {
            return Ok(false);
        };
        if !row.yields_to(layer, stamp) || row.layer != layer || !self.tree().touched.is_recent(ino) {
            return Ok(false);
        }
        let Some(node) = self.node(ino)? else {
            return Ok(false);
        };
        let can_be_told = match node.content {
            Content::Blob(digest) => self.ledger().manifest(&digest, node.size)?.is_some(),
            Content::None | Content::Staging(_) => true,
            Content::Lost(_) => false,
        };
        if !can_be_told {
            return Ok(false);
        }
        self.own(parent, name, row.state)?;
        Ok(true)
    }
}
