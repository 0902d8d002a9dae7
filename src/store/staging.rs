//! Staging files: private files being written, not yet blobs.

use std::{fs::File, path::PathBuf};

use super::{StoreError, rows::StagingId};

#[derive(Debug)]
pub struct Staging {}

impl Staging {
    /// Makes an empty staging file, open for reading and writing.
    pub fn create(&self) -> Result<(StagingId, File), StoreError> {
        todo!()
    }
    pub fn open(&self, id: StagingId, write: bool) -> Result<File, StoreError> {
        let _ = (id, write);
        todo!()
    }
    pub fn path(&self, id: StagingId) -> PathBuf {
        let _ = id;
        todo!()
    }
    /// Removes the name after the next barrier (the rows that make it useless may not be on the disk yet).
    pub fn remove_after_barrier(&self, id: StagingId) {
        let _ = id;
        todo!()
    }
    /// Removes the name at once: nothing ever referred to it.
    pub fn remove(&self, id: StagingId) {
        let _ = id;
        todo!()
    }
}
