//! What this machine has to tell the others.

use super::{Tree, join};
use crate::{
    base::{chunk::MAX_CHUNK_BYTES, clock::Stamp, digest::Digest},
    namespace::{
        TreeError,
        change::{Entry, EntryBlob, EntryChunks, PathChange},
    },
    store::{
        manifest,
        rows::{Content, Durability, Ino, NameRow, NameState, NodeRow, Place},
    },
};

/// An own change that is not published.
#[derive(Clone, Debug)]
pub struct Pending {
    pub parent: Ino,
    pub name: Vec<u8>,
    pub place: Place,
    pub stamp: Stamp,
    pub readiness: Readiness,
}

/// Whether a pending change could be published.
#[derive(Clone, Debug)]
pub enum Readiness {
    /// Open for writing: its change is made when it is closed, and takes its place then.
    Writing,
    /// The same, but it was closed before: what was made since then may build on that.
    Rewriting,
    /// Closed, not sealed or not durable yet: everything behind it waits.
    Waiting,
    /// It never will be published (its blob was quarantined); nothing waits for it.
    Never,
    Ready(Box<PathChange>),
}

impl Tree {
    /// Own changes that are not published, in the order of their places.
    pub fn pending(&self, limit: usize) -> Result<Vec<Pending>, TreeError> {
        self.ledger
            .pending_names(limit)?
            .into_iter()
            .filter_map(|row| row.pending.map(|place| (row, place)))
            .map(|(row, place)| {
                Ok(Pending {
                    parent: row.parent,
                    name: row.name.clone(),
                    place,
                    stamp: row.stamp,
                    readiness: self.readiness(&row)?,
                })
            })
            .collect()
    }

    fn readiness(&self, row: &NameRow) -> Result<Readiness, TreeError> {
        let change = |entry| -> Result<Readiness, TreeError> {
            let path = join(self.dir_path(row.parent)?, &row.name);
            Ok(Readiness::Ready(Box::new(PathChange {
                path,
                stamp: row.stamp,
                entry,
            })))
        };
        let ino = match row.state {
            NameState::Dead => return change(None),
            NameState::Live(ino) => ino,
        };
        let Some(node) = self.ledger.node(ino)? else {
            return Ok(Readiness::Never);
        };
        match node.content {
            Content::Lost(_) => Ok(Readiness::Never),
            Content::Staging(_) => {
                let in_use = self.lock();
                let pin = in_use.pins.get(&ino).filter(|pin| pin.writers > 0);
                Ok(match pin {
                    Some(pin) if pin.unmade => Readiness::Writing,
                    Some(_) => Readiness::Rewriting,
                    None if in_use.unquiet.contains(&ino) => Readiness::Rewriting,
                    None => Readiness::Waiting,
                })
            }
            Content::None => change(Some(entry(&node, None))),
            Content::Blob(digest) => match self.ledger.blob(&digest)?.map(|blob| blob.durability) {
                Some(Durability::Dirty) => Ok(Readiness::Waiting),
                Some(Durability::Quarantined) => Ok(Readiness::Never),
                Some(Durability::Durable { .. }) | None => match self.chunks_of(digest, node.size)? {
                    Some(chunks) => change(Some(entry(
                        &node,
                        Some(EntryBlob {
                            digest,
                            size: node.size,
                            chunks,
                        }),
                    ))),
                    None => Ok(Readiness::Never),
                },
            },
        }
    }

    fn chunks_of(&self, digest: Digest, size: u64) -> Result<Option<EntryChunks>, TreeError> {
        if size <= u64::from(MAX_CHUNK_BYTES) {
            return Ok(Some(EntryChunks::Single));
        }
        let Some(list) = self.ledger.manifest(&digest, size)? else {
            return Ok(None);
        };
        if list.chunks().len() <= manifest::MAX_INLINE_CHUNKS {
            return Ok(Some(EntryChunks::Inline((*list).clone())));
        }
        let bytes = manifest::encode(&list);
        Ok(Some(EntryChunks::Listed {
            digest: Digest::of(&bytes),
            size: bytes.len() as u64,
        }))
    }

    /// Marks changes as published, unless the name changed again since.
    pub fn published(&self, done: &[(Ino, Vec<u8>, Stamp)]) -> Result<(), TreeError> {
        let mut in_use = self.lock();
        let mut edit = super::Edit::new(self, &mut in_use);
        for (parent, name, stamp) in done {
            if let Some(row) = edit.name(*parent, name)?.filter(|row| row.stamp == *stamp) {
                edit.place_name(NameRow { pending: None, ..row });
            }
        }
        edit.commit()?;
        Ok(())
    }
}

fn entry(node: &NodeRow, blob: Option<EntryBlob>) -> Entry {
    Entry {
        kind: node.kind,
        perm: node.perm,
        uid: node.uid,
        gid: node.gid,
        rdev: node.rdev,
        mtime: node.mtime,
        blob,
        target: node.target.clone(),
        xattrs: node.xattrs.clone(),
        link_id: node.link_id,
    }
}
