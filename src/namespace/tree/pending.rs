//! What this machine has to tell the others.

use std::sync::Arc;

use super::{Tree, join};
use crate::{
    base::{
        chunk::{ChunkList, MAX_CHUNK_BYTES},
        clock::Stamp,
        digest::Digest,
    },
    namespace::{
        TreeError,
        change::{Entry, EntryBlob, EntryChunks, PathChange},
    },
    store::{
        manifest,
        pack::{self, PackPlace},
        rows::{Content, Durability, Ino, ListObject, NameRow, NameState, NodeRow, Place},
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
                Some(Durability::Durable { .. }) | None => match self.blob_of(digest, &node)? {
                    Some(blob) => change(Some(entry(&node, Some(blob)))),
                    None => Ok(Readiness::Never),
                },
            },
        }
    }

    /// What an entry says of a blob that the bucket has; `None` when its chunks are not known.
    pub(super) fn blob_of(&self, digest: Digest, node: &NodeRow) -> Result<Option<EntryBlob>, TreeError> {
        let size = node.size;
        let Some(list) = self.ledger.manifest(&digest, size)? else {
            return Ok(None);
        };
        let (chunks, places) = if list.chunks().len() > manifest::MAX_INLINE_CHUNKS {
            (self.listed(&digest, &list)?, Vec::new())
        } else if size <= u64::from(MAX_CHUNK_BYTES) {
            (EntryChunks::Single, self.places_of(&list, node)?)
        } else {
            (EntryChunks::Inline((*list).clone()), self.places_of(&list, node)?)
        };
        Ok(Some(EntryBlob {
            digest,
            size,
            chunks,
            places,
        }))
    }

    fn listed(&self, digest: &Digest, list: &ChunkList) -> Result<EntryChunks, TreeError> {
        if let Some(ListObject { digest, size }) = self.ledger.list_of(digest)? {
            return Ok(EntryChunks::Listed { digest, size });
        }
        // It was uploaded before chunks went into packs.
        let bytes = manifest::encode(list, &[]);
        Ok(EntryChunks::Listed {
            digest: Digest::of(&bytes),
            size: bytes.len() as u64,
        })
    }

    /// Where packs have the chunks of a list.
    fn places_of(&self, list: &ChunkList, node: &NodeRow) -> Result<Vec<Option<PackPlace>>, TreeError> {
        let mut places = Vec::with_capacity(list.chunks().len());
        let told = told_places(list, node);
        for (number, chunk) in list.chunks().iter().enumerate() {
            places.push(match self.ledger.chunk(&chunk.digest)? {
                Some(row) => row.place,
                None => told.get(number).copied().flatten(),
            });
        }
        if places.iter().all(Option::is_none) {
            places.clear();
        }
        Ok(places)
    }

    /// Puts among the rows of chunks where packs have those of a file's blob, before they are needed.
    pub fn tell_places(&self, ino: Ino) -> Result<(), TreeError> {
        let mut in_use = self.lock();
        let mut edit = super::Edit::new(self, &mut in_use);
        let Some(node) = edit.node(ino)?.filter(|node| !node.places.is_empty()) else {
            return Ok(());
        };
        if let Content::Blob(digest) = node.content
            && let Some(list) = self.ledger.manifest(&digest, node.size)?
        {
            edit.also(self.ledger.told_places(&list, &told_places(&list, &node))?);
        }
        edit.node_mut(ino)?.places.clear();
        edit.commit()?;
        Ok(())
    }

    /// Makes changes again that wait to be published, as they are, unless the name changed again since; returns their
    /// paths. They keep their order, and are later than all that was heard of.
    pub fn renew(&self, old: &[(Ino, Vec<u8>, Stamp)]) -> Result<Vec<Vec<u8>>, TreeError> {
        for (parent, name, _) in old {
            self.need_name(*parent, name)?;
        }
        let mut in_use = self.lock();
        let mut edit = super::Edit::new(self, &mut in_use);
        let mut renewed = Vec::with_capacity(old.len());
        for (parent, name, stamp) in old {
            let row = edit.name(*parent, name)?;
            if let Some(row) = row.filter(|row| row.stamp == *stamp && row.pending.is_some()) {
                edit.own(*parent, name, row.state)?;
                renewed.push(join(self.dir_path(*parent)?, name));
            }
        }
        edit.commit_and_tell()?;
        Ok(renewed)
    }

    /// Marks changes as published, unless the name changed again since.
    pub fn published(&self, done: &[(Ino, Vec<u8>, Stamp)]) -> Result<(), TreeError> {
        let mut in_use = self.lock();
        let mut edit = super::Edit::new(self, &mut in_use);
        for (parent, name, stamp) in done {
            if let Some(row) = edit.name(*parent, name)?.filter(|row| row.stamp == *stamp) {
                edit.place_name(NameRow {
                    pending: None,
                    ..Arc::unwrap_or_clone(row)
                });
            }
        }
        edit.commit()?;
        Ok(())
    }
}

/// Where a catalog said that packs have the chunks of a file.
fn told_places(list: &ChunkList, node: &NodeRow) -> Vec<Option<PackPlace>> {
    // They were checked when they came.
    pack::decode_places(&node.places, list.chunks().len()).unwrap_or_default()
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
