//! Blob files: opening, sealing, taking over, and which of them are in use.

use std::{fs::File, sync::Arc};

use super::{StoreError, rows::*};
use crate::base::{
    chunk::{ChunkList, Sliced},
    digest::Digest,
};

/// A blob in use: while one of these lives, its bytes are not evicted (a lease).
#[derive(Debug)]
pub struct Blob {
    digest: Digest,
    chunks: Arc<ChunkList>,
}

impl Blob {
    pub fn digest(&self) -> Digest {
        self.digest
    }
    pub fn chunks(&self) -> &Arc<ChunkList> {
        &self.chunks
    }
    pub fn size(&self) -> u64 {
        self.chunks.size()
    }
    /// Every byte is here and verified.
    pub fn is_whole(&self) -> bool {
        todo!()
    }
    /// Whether `len` bytes from `offset` are here and verified.
    pub fn has(&self, offset: u64, len: u64) -> bool {
        let _ = (offset, len);
        todo!()
    }
    /// Reads resident bytes; the caller asked `has` first. Short only at the end of the blob.
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, StoreError> {
        let _ = (offset, len);
        todo!()
    }
    /// Opens the file read-only, to lend it to the kernel or to copy it. Only when whole.
    pub fn file(&self) -> Result<File, StoreError> {
        todo!()
    }
    /// Lends the file to one inode: true when it is free or `ino` has it already.
    pub fn lend(&self, ino: Ino) -> bool {
        let _ = ino;
        todo!()
    }
    /// Ends the loan of `ino`. A file that was ever lent is only ever unlinked.
    pub fn give_back(&self, ino: Ino) {
        let _ = ino;
        todo!()
    }
}

#[derive(Debug)]
pub struct Blobs {}

impl Blobs {
    /// Takes a blob into use; counts as a use for eviction. `None` when it is
    /// of more than one chunk and its manifest is not known.
    pub fn open(&self, digest: &Digest, size: u64) -> Result<Option<Arc<Blob>>, StoreError> {
        let _ = (digest, size);
        todo!()
    }

    /// Notes a use (lookup, touch) in memory; written in batches. Never blocks on the disk.
    pub fn touch(&self, digest: &Digest) {
        let _ = digest;
        todo!()
    }

    /// Links a staging file to its blob name, unless the blob is resident already.
    ///
    /// Returns the changes that make it known (blob row, dirty unless the
    /// bucket has it; manifest); the caller commits them *together with* the row
    /// of the file, and then calls `staging.remove_after_barrier`. Until the commit
    /// a crash leaves a file without a row, which recovery removes.
    pub fn seal(&self, id: StagingId, sliced: &Sliced) -> Result<Vec<Change>, StoreError> {
        let _ = (id, sliced);
        todo!()
    }

    /// Makes a staging file with the bytes of a whole blob, for a writer.
    ///
    /// With `same_file` (the caller lent this very file to readers of the inode
    /// that is now opened for writing, so the kernel demands one backing file)
    /// the blob's own file becomes the staging file and the blob keeps a copy,
    /// or leaves this disk if it is clean; without it a clean blob that nobody
    /// else uses is taken over likewise, anything else is copied (reflink where the file
    /// system can). Returns the changes that the caller commits with the row of the file;
    /// the blob's name is unlinked only by `finish_take_over` after that commit.
    pub fn take_over(&self, blob: &Arc<Blob>, same_file: bool) -> Result<TakeOver, StoreError> {
        let _ = (blob, same_file);
        todo!()
    }

    pub fn finish_take_over(&self, done: TakeOver) {
        let _ = done;
        todo!()
    }
}

/// A staging file made from a blob.
#[derive(Debug)]
pub struct TakeOver {
    pub id: StagingId,
    pub file: File,
    pub changes: Vec<Change>,
}
