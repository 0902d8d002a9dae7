//! The one door to the index: rows in memory, backed by a journal and by SQLite.
//!
//! (to be completed by the implementation)

use std::sync::Arc;

use super::{StoreError, rows::*};
use crate::base::{chunk::ChunkList, digest::Digest};

/// Sums over all blobs, kept as rows change; reading them costs nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub resident_bytes: u64,
    pub resident_blobs: u64,
    pub dirty_bytes: u64,
    pub dirty_blobs: u64,
    pub quarantined_blobs: u64,
    pub evicted_bytes: u64,
    pub evicted_blobs: u64,
}

#[derive(Debug)]
pub struct Ledger {}

impl Ledger {
    /// Applies `changes` as one: all of them survive a crash of the daemon, or none.
    /// Visible to every reader when this returns. One `write(2)`, no barrier.
    pub fn commit(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        let _ = changes;
        todo!()
    }

    /// Returns when everything committed before the call survives power loss;
    /// all who wait share one barrier.
    pub fn sync(&self) -> Result<(), StoreError> {
        todo!()
    }

    pub fn node(&self, ino: Ino) -> Result<Option<Arc<NodeRow>>, StoreError> {
        let _ = ino;
        todo!()
    }
    pub fn name(&self, parent: Ino, name: &[u8]) -> Result<Option<Arc<NameRow>>, StoreError> {
        let _ = (parent, name);
        todo!()
    }
    /// Names below `parent` that sort behind `after`, dead ones too, in the order of their bytes.
    pub fn names_in(
        &self,
        parent: Ino,
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Arc<NameRow>>, StoreError> {
        let _ = (parent, after, limit);
        todo!()
    }
    /// Live names of a node (its hard links).
    pub fn names_of(&self, ino: Ino) -> Result<Vec<Arc<NameRow>>, StoreError> {
        let _ = ino;
        todo!()
    }
    /// Own changes that are not published, in the order of `pending.seq`.
    pub fn pending_names(&self, limit: usize) -> Result<Vec<Arc<NameRow>>, StoreError> {
        let _ = limit;
        todo!()
    }
    /// Nodes whose content is a staging file; read at the start to resume sealing.
    pub fn staging_nodes(&self) -> Result<Vec<Arc<NodeRow>>, StoreError> {
        todo!()
    }
    /// Files without a name; read at the start to drop what a crash left open.
    pub fn nameless_nodes(&self) -> Result<Vec<Arc<NodeRow>>, StoreError> {
        todo!()
    }
    pub fn next_ino(&self) -> Ino {
        todo!()
    }
    /// Places grow for ever, across restarts.
    pub fn is_staging_doubted(&self, id: StagingId) -> bool {
        let _ = id;
        todo!()
    }
    pub fn next_place(&self) -> u64 {
        todo!()
    }

    pub fn blob(&self, digest: &Digest) -> Result<Option<Arc<BlobRow>>, StoreError> {
        let _ = digest;
        todo!()
    }
    /// The chunks of a blob of `size` bytes: known at once for a blob of one chunk.
    pub fn manifest(&self, digest: &Digest, size: u64) -> Result<Option<Arc<ChunkList>>, StoreError> {
        let _ = (digest, size);
        todo!()
    }
    /// The upload queue: dirty blobs, oldest first.
    pub fn dirty_blobs(&self, limit: usize) -> Result<Vec<Arc<BlobRow>>, StoreError> {
        let _ = limit;
        todo!()
    }
    /// When the bucket was last known to hold a chunk, by its clock.
    pub fn chunk_confirmed(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        let _ = digest;
        todo!()
    }
    pub fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let _ = key;
        todo!()
    }
    pub fn totals(&self) -> Totals {
        todo!()
    }
}
