//! Fault-in: bringing chunks from the bucket, verified before a byte is served.

use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::{StoreError, blobs::Blob};

/// Where a reader is in a blob: lets the fetcher see a sequential reader and
/// fetch ahead of it.
#[derive(Debug, Default)]
pub struct ReadCursor(Mutex<CursorState>);

#[derive(Debug, Default)]
struct CursorState {}

#[derive(Debug)]
pub struct Fetcher {}

impl Fetcher {
    /// Reads bytes of a blob, fetching the chunks that are not here. Served
    /// from memory when the disk is full. Short only at the end of the blob.
    pub async fn read(
        &self,
        blob: &Arc<Blob>,
        cursor: &ReadCursor,
        offset: u64,
        len: usize,
    ) -> Result<Bytes, StoreError> {
        let _ = (blob, cursor, offset, len);
        todo!()
    }

    /// Makes the first chunk resident: what an open of a blob does, so that a
    /// blob that is gone is found out before a read.
    pub async fn ensure_first(&self, blob: &Arc<Blob>) -> Result<(), StoreError> {
        let _ = blob;
        todo!()
    }

    /// Makes every chunk resident.
    pub async fn ensure_whole(&self, blob: &Arc<Blob>) -> Result<(), StoreError> {
        let _ = blob;
        todo!()
    }

    /// Fetches the chunk list of a blob whose entry carries it as a blob of its own,
    /// verifies and commits it.
    pub async fn fetch_manifest(
        &self,
        list: crate::base::digest::Digest,
        list_size: u64,
        blob: crate::base::digest::Digest,
        size: u64,
    ) -> Result<(), StoreError> {
        let _ = (list, list_size, blob, size);
        todo!()
    }
}
