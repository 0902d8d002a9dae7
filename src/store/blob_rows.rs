//! Changing the rows of blobs: what became resident, durable, wrong or is evicted.
//!
//! Every change reads the row again under the lock of its shard, so that none
//! is made from a row that someone else has changed since.

use std::sync::Arc;

use tracing::{debug, error, info, warn};

use super::{
    StoreError,
    blob_file::BlobFile,
    blobs::{Blob, Blobs, Shared, now_secs},
    error::chain,
    rows::{BlobRow, Change, ChunkRow, Durability, Residency},
};
use crate::base::{digest::Digest, durable::remove_if_there};

/// A use is not written down when the row knows of one less than this before: a build
/// looks at the same files every few seconds, and eviction need not know to the second.
const USE_GRAIN_SECS: u64 = 60;

impl Blobs {
    /// Removes the bytes of a clean blob that nobody uses; returns how many
    /// came free, or `None` when it must stay.
    ///
    /// The row goes first, then the name. The file is not touched: a program may have it mapped.
    pub(crate) fn evict(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        let shard = self.shared.shard(digest);
        if shard.contains_key(digest) || self.shared.staging.is_sealing(digest) {
            return Ok(None);
        }
        let Some(row) = self.shared.ledger.blob(digest)? else {
            return Ok(None);
        };
        let may_go = match row.durability {
            Durability::Durable { .. } => !row.pinned && row.residency != Residency::Nothing,
            Durability::Dirty | Durability::Quarantined => false,
        };
        if !may_go {
            return Ok(None);
        }
        let bytes = self.shared.ledger.resident_bytes(digest)?;
        self.shared.commit_leaving(BlobRow {
            residency: Residency::Nothing,
            doubted: false,
            ..(*row).clone()
        })?;
        let path = self.shared.path(digest);
        remove_if_there(&path).map_err(StoreError::disk("remove", &path))?;
        Ok(Some(bytes))
    }

    /// Forgets dirty blobs that were never anywhere but here and that no file has any more, unless somebody reads
    /// them still; returns how many bytes they have, which come free with the next barrier.
    ///
    /// The rows go at once, and the files when those, and the bytes that took their place, survive power loss.
    pub(crate) fn forget_unwanted(&self) -> Result<u64, StoreError> {
        let (mut forgotten, mut bytes, mut outcome) = (Vec::new(), 0, Ok(()));
        for digest in self.shared.ledger.unwanted_blobs() {
            let shard = self.shared.shard(&digest);
            if shard.contains_key(&digest)
                || self.shared.staging.is_sealing(&digest)
                || !self.shared.ledger.is_unwanted(&digest)
            {
                continue;
            }
            match self.shared.drop_dirty(digest) {
                Ok(None) => {}
                Ok(Some(size)) => {
                    bytes += size;
                    forgotten.push(digest);
                }
                Err(err) => {
                    outcome = Err(err);
                    break;
                }
            }
        }
        if !forgotten.is_empty() {
            debug!(
                blobs = forgotten.len(),
                bytes, "what no file has any more is not uploaded"
            );
            self.shared.remove_after_barrier(forgotten);
        }
        outcome.map(|()| bytes)
    }

    /// Takes the doubt from a chunk that was hashed again. A wrong one of a dirty blob is the
    /// end of its only copy.
    pub(super) fn settle_doubt(&self, blob: &Blob, index: usize, right: bool) -> Result<(), StoreError> {
        if !right && self.is_dirty(&blob.digest())? {
            return self.quarantine(blob, &[index]);
        }
        blob.file.settle_doubt(index, right);
        if blob.file.wants_saving() {
            self.shared.save_residency(&blob.file)?;
        }
        Ok(())
    }

    pub(super) fn is_in_use(&self, digest: &Digest) -> bool {
        self.shared.shard(digest).contains_key(digest)
    }

    /// Notes that the bucket has all of a blob; false when it is no longer dirty.
    pub(crate) fn set_durable(&self, digest: &Digest, confirmed_millis: u64) -> Result<bool, StoreError> {
        let _shard = self.shared.shard(digest);
        let Some(row) = self.shared.ledger.blob(digest)? else {
            return Ok(false);
        };
        if row.durability != Durability::Dirty {
            return Ok(false);
        }
        self.shared.put_row(BlobRow {
            durability: Durability::Durable { confirmed_millis },
            ..(*row).clone()
        })?;
        Ok(true)
    }

    /// The bucket does not have a blob that was durable, or will not keep it: it waits to be uploaded again.
    ///
    /// False when not all of its bytes are here, right and verified.
    pub(crate) fn set_dirty(&self, digest: &Digest) -> Result<bool, StoreError> {
        let shard = self.shared.shard(digest);
        if self.shared.staging.is_sealing(digest) {
            // It is being made durable or dirty by whoever seals it.
            return Ok(true);
        }
        let Some(row) = self.shared.ledger.blob(digest)? else {
            return Ok(false);
        };
        match row.durability {
            Durability::Dirty => return Ok(true),
            Durability::Quarantined => return Ok(false),
            Durability::Durable { .. } => {}
        }
        let here = match shard.get(digest) {
            // What was fetched just now may not be in the row yet.
            Some(in_use) if in_use.file.is_frozen() => return Ok(false),
            Some(in_use) => in_use.file.residency(),
            None => (row.residency.clone(), row.doubted),
        };
        if here != (Residency::Whole, false) {
            return Ok(false);
        }
        self.shared.put_row(BlobRow {
            durability: Durability::Dirty,
            residency: Residency::Whole,
            doubted: false,
            ..(*row).clone()
        })?;
        Ok(true)
    }

    /// Whether a blob waits to be uploaded.
    pub(crate) fn is_dirty(&self, digest: &Digest) -> Result<bool, StoreError> {
        let row = self.shared.ledger.blob(digest)?;
        Ok(row.is_some_and(|row| row.durability == Durability::Dirty))
    }

    /// The bytes of chunks `wrong` differ from their names: they are not
    /// served any more, the blob is not uploaded, its file is kept for inspection.
    /// Of a clean blob the wrong chunks are merely forgotten.
    pub(crate) fn quarantine(&self, blob: &Blob, wrong: &[usize]) -> Result<(), StoreError> {
        let file = &blob.file;
        let digest = file.digest;
        let _shard = self.shared.shard(&digest);
        let Some(row) = self.shared.ledger.blob(&digest)? else {
            return Ok(());
        };
        let mut row = (*row).clone();
        file.freeze(wrong);
        if let Durability::Durable { .. } = row.durability {
            warn!(%digest, chunks = ?wrong, "a blob in the cache was damaged; it will be fetched again");
            // A frozen file takes no chunks: a new one will, when this one is gone.
            row.residency = Residency::Nothing;
            row.doubted = false;
            self.shared.commit_leaving(row)?;
            let path = &file.path;
            return file
                .leave(|| remove_if_there(path))
                .map_err(StoreError::disk("remove", path));
        }
        error!(%digest, chunks = ?wrong, path = %file.path.display(),
            "the bytes of a blob differ from its name; it is kept, but will not be uploaded");
        (row.residency, row.doubted) = file.residency();
        row.durability = Durability::Quarantined;
        self.shared.put_row(row)
    }

    /// The bucket does not have a chunk of `blob`: nothing that says otherwise is
    /// believed any more, so that whoever creates the blob again uploads it.
    pub(super) fn note_missing(&self, blob: &Blob, chunk: Digest) -> Result<(), StoreError> {
        let digest = blob.digest();
        let _shard = self.shared.shard(&digest);
        let mut changes = self.distrust(blob, chunk)?;
        let row = match self.shared.ledger.blob(&digest)? {
            Some(row) => (*row).clone(),
            // What is resident is saved later, and must not bring the word of now with it.
            None => new_row(digest, blob.size(), self.shared.bucket_millis()),
        };
        if let Durability::Durable { .. } = row.durability
            && !self.shared.staging.is_sealing(&digest)
        {
            changes.push(Change::PutBlob(BlobRow {
                durability: Durability::Durable { confirmed_millis: 0 },
                ..row
            }));
        }
        if changes.is_empty() {
            return Ok(());
        }
        self.shared.ledger.commit(changes)
    }

    /// The changes that forget where `chunk` was said to be, and what else of `blob` was in the same pack.
    fn distrust(&self, blob: &Blob, chunk: Digest) -> Result<Vec<Change>, StoreError> {
        let ledger = &self.shared.ledger;
        let pack_of = |row: ChunkRow| row.place.map(|place| place.pack);
        let known = ledger.chunk(&chunk)?;
        let gone = known.and_then(pack_of);
        if chunk == blob.digest() && known.is_none() {
            return Ok(Vec::new());
        }
        let nowhere = ChunkRow {
            confirmed_millis: 0,
            place: None,
        };
        let mut changes = vec![Change::PutChunk(chunk, nowhere)];
        if gone.is_some() {
            for other in blob.chunks().chunks() {
                if ledger.chunk(&other.digest)?.and_then(pack_of) == gone {
                    changes.push(Change::PutChunk(other.digest, nowhere));
                }
            }
        }
        Ok(changes)
    }

    /// Writes what is kept in memory to the rows: what became resident, and,
    /// with `uses`, when blobs were used. Called by a thread now and then.
    pub(super) fn save(&self, uses: bool) -> Result<(), StoreError> {
        for number in 0..=u8::MAX {
            let shard = self.shared.shard_at(number);
            for in_use in shard.values().filter(|in_use| in_use.file.is_unsaved()) {
                self.shared.save_residency_locked(&in_use.file)?;
            }
        }
        if uses { self.save_uses() } else { Ok(()) }
    }

    fn save_uses(&self) -> Result<(), StoreError> {
        let touches = std::mem::take(
            &mut *self
                .shared
                .touches
                .lock()
                .expect("no code panics while it holds the uses"),
        );
        let mut touches: Vec<_> = touches.into_iter().collect();
        touches.sort_unstable();
        for same_shard in touches.chunk_by(|a, b| a.0.as_bytes()[0] == b.0.as_bytes()[0]) {
            let _shard = self.shared.shard(&same_shard[0].0);
            let mut changes = Vec::new();
            for &(digest, used_secs) in same_shard {
                if let Some(row) = self.shared.ledger.blob(&digest)?
                    && row.used_secs + USE_GRAIN_SECS <= used_secs
                    && !self.shared.staging.is_sealing(&digest)
                {
                    changes.push(Change::PutBlob(BlobRow {
                        used_secs,
                        ..(*row).clone()
                    }));
                }
            }
            if !changes.is_empty() {
                self.shared.ledger.commit(changes)?;
            }
        }
        Ok(())
    }
}

impl Shared {
    /// Drops the row of a dirty blob that nobody asked to keep; returns its size. The shard is locked.
    fn drop_dirty(&self, digest: Digest) -> Result<Option<u64>, StoreError> {
        let row = self.ledger.blob(&digest)?;
        let Some(row) = row.filter(|row| row.durability == Durability::Dirty && !row.pinned) else {
            return Ok(None);
        };
        self.ledger.commit(vec![Change::DropBlob(digest)])?;
        self.note_leaving(digest);
        Ok(Some(row.size))
    }

    /// Removes the files of forgotten blobs after the next barrier, but of those that somebody made again.
    fn remove_after_barrier(self: &Arc<Self>, digests: Vec<Digest>) {
        let shared = Arc::downgrade(self);
        self.ledger.after_barrier(Box::new(move || {
            if let Some(shared) = shared.upgrade() {
                shared.remove_forgotten(&digests);
            }
        }));
    }

    /// Waits for no shard: who has one may wait for a barrier.
    fn remove_forgotten(self: &Arc<Self>, digests: &[Digest]) {
        let mut later = Vec::new();
        for digest in digests {
            match self.try_shard(digest) {
                None => later.push(*digest),
                Some(shard) => {
                    if let Err(err) = self.remove_nameless(&shard, digest) {
                        warn!(%digest, error = %chain(&err), "a blob that no file has any more keeps its space");
                    }
                }
            }
        }
        if !later.is_empty() {
            self.remove_after_barrier(later);
        }
    }

    /// Commits a row as it is; the shard is locked.
    pub(super) fn put_row(&self, row: BlobRow) -> Result<(), StoreError> {
        self.ledger.commit(vec![Change::PutBlob(row)])
    }

    /// Commits a row that says that nothing is here any more; the shard is locked.
    pub(super) fn commit_leaving(&self, row: BlobRow) -> Result<(), StoreError> {
        let digest = row.digest;
        self.put_row(row)?;
        self.note_leaving(digest);
        Ok(())
    }

    pub(super) fn save_residency(&self, file: &Arc<BlobFile>) -> Result<(), StoreError> {
        let _shard = self.shard(&file.digest);
        self.save_residency_locked(file)
    }

    /// Commits what is resident now; the shard is locked.
    pub(super) fn save_residency_locked(&self, file: &BlobFile) -> Result<(), StoreError> {
        if self.staging.is_sealing(&file.digest) {
            return Ok(());
        }
        file.note_saved();
        let (residency, doubted) = file.residency();
        let row = match self.ledger.blob(&file.digest)? {
            Some(row) => (*row).clone(),
            None if residency == Residency::Nothing => return Ok(()),
            None => new_row(file.digest, file.size(), self.bucket_millis()),
        };
        // A quarantined blob takes no chunks while it has a file: all of this one came from the bucket.
        let from_bucket = row.durability == Durability::Quarantined && !file.is_frozen();
        let came_back = row.durability == Durability::Quarantined && file.is_good() && !doubted;
        // A part of it would be taken for the part of the old file that is left.
        let (residency, doubted) = if from_bucket && !came_back {
            (Residency::Nothing, false)
        } else {
            (residency, doubted)
        };
        if row.residency == residency && row.doubted == doubted {
            return Ok(());
        }
        let durability = if came_back {
            info!(digest = %file.digest, "a blob whose only copy was lost came back from the bucket");
            Durability::Durable {
                confirmed_millis: self.bucket_millis(),
            }
        } else {
            row.durability
        };
        let saved = self.put_row(BlobRow {
            residency,
            durability,
            doubted,
            ..row
        });
        if saved.is_err() {
            file.note_unsaved();
        }
        saved
    }
}

/// The row of a blob that came from the bucket: it is there, and was just now.
pub(super) fn new_row(digest: Digest, size: u64, confirmed_millis: u64) -> BlobRow {
    BlobRow {
        digest,
        size,
        residency: Residency::Nothing,
        durability: Durability::Durable { confirmed_millis },
        used_secs: now_secs(),
        pinned: false,
        doubted: false,
    }
}
