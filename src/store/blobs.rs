//! Blob files: opening, sealing, taking over, and which of them are in use.
//!
//! This file has the table of blobs in use; `blob_file` is one file,
//! `blob_rows` changes rows, `seal` and `take_over` turn staging files into
//! blobs and back, `orphans` removes what a crash left.
//!
//! # Invariants
//!
//! - However often a blob is open, there is one `BlobFile` of it.
//! - A row is read, changed and committed under the lock of its shard. The
//!   one row that others commit, that of a blob being sealed, nobody else changes meanwhile.
//! - A row never says more than the file holds: it is committed after the bytes
//!   were written, and taken back before the file leaves.
//! - A file does not come back to a name before the row that gave up the last
//!   one is on the disk (`Shared::leaving`): power loss could otherwise
//!   marry the old row to the new file.

use std::{
    collections::HashMap,
    fs::{self, File},
    ops::Range,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, TryLockError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use tracing::{error, warn};

use super::{
    StoreError,
    blob_file::{BlobFile, Found},
    error::chain,
    ledger::Ledger,
    rows::{Durability, Ino, Residency},
    staging::Staging,
};
use crate::{
    base::{chunk::ChunkList, clock::local_millis, digest::Digest},
    tier::SharedBucket,
};

pub use super::take_over::{FileId, TakeOver};

/// A blob in use: while one of these lives, its bytes are not evicted (a lease).
///
/// Keeps a descriptor open while any of its bytes are here; of a whole, clean file from when it is first needed.
#[derive(Debug)]
pub struct Blob {
    pub(super) file: Arc<BlobFile>,
    shared: Arc<Shared>,
    /// What this lease lent and did not take back, with the file's generation.
    loans: Mutex<Vec<(Ino, u64)>>,
}

impl Blob {
    pub fn digest(&self) -> Digest {
        self.file.digest
    }

    pub fn chunks(&self) -> &Arc<ChunkList> {
        &self.file.chunks
    }

    pub fn size(&self) -> u64 {
        self.file.size()
    }

    /// Every byte is here and verified.
    pub fn is_whole(&self) -> bool {
        self.file.is_whole()
    }

    /// The same as far as the index says: for who needs no byte of it yet, and spares opening the file.
    pub fn is_said_whole(&self) -> bool {
        self.file.is_said_whole()
    }

    /// Some of its bytes turned out to be wrong: it takes no more of them.
    pub fn is_damaged(&self) -> bool {
        self.file.is_frozen()
    }

    /// Whether `len` bytes from `offset` are here and verified.
    pub fn has(&self, offset: u64, len: u64) -> bool {
        self.file.has(offset, len)
    }

    /// Reads bytes that are here; `None` when not all of them are. Short only at the end of the blob.
    pub fn try_read(&self, offset: u64, len: usize) -> Result<Option<Vec<u8>>, StoreError> {
        let mut bytes = Vec::new();
        Ok(self.try_read_into(offset, len, &mut bytes)?.then_some(bytes))
    }

    /// The same in place of what `buffer` holds; false instead of `None`.
    pub fn try_read_into(&self, offset: u64, len: usize, buffer: &mut Vec<u8>) -> Result<bool, StoreError> {
        self.file.read(offset, len, buffer)
    }

    /// Reads resident bytes; the caller asked `has` first. Short only at the end of the blob.
    ///
    /// A write-open may take the file over in between; that is an error here, and `None` from
    /// [`Self::try_read`].
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, StoreError> {
        self.try_read(offset, len)?
            .ok_or_else(|| StoreError::disk("read", &self.file.path)(std::io::ErrorKind::WouldBlock.into()))
    }

    /// Opens the file read-only, to lend it to the kernel or to copy it. Only when whole,
    /// and never of an empty blob, which has no file.
    pub fn file(&self) -> Result<File, StoreError> {
        self.file.file()
    }

    /// Lends the file to one inode: opens it read-only when it is free or `ino` has it already.
    ///
    /// `None` as well when someone may still have it mapped from an earlier loan,
    /// and for an empty blob. Ends with [`Self::give_back`], or with this lease.
    pub fn lend(&self, ino: Ino) -> Result<Option<File>, StoreError> {
        Ok(self.file.lend(ino)?.map(|(file, generation)| {
            self.loans().push((ino, generation));
            file
        }))
    }

    /// Ends the loan of `ino`. A file that was ever lent is only ever unlinked.
    pub fn give_back(&self, ino: Ino) {
        let mut loans = self.loans();
        if let Some(place) = loans.iter().position(|loan| loan.0 == ino) {
            let (ino, generation) = loans.swap_remove(place);
            self.file.give_back(ino, generation);
        }
    }

    fn loans(&self) -> MutexGuard<'_, Vec<(Ino, u64)>> {
        self.loans
            .lock()
            .expect("no code panics while it holds the loans")
    }

    pub(super) fn has_chunk(&self, index: usize) -> bool {
        self.file.has_chunk(index)
    }

    /// Reads a chunk's place in the file, right or wrong; `None` when there is no file.
    pub(crate) fn read_unverified(&self, index: usize) -> Result<Option<Bytes>, StoreError> {
        self.file.read_unverified(index)
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        for (ino, generation) in self.loans().drain(..) {
            self.file.give_back(ino, generation);
        }
        self.shared.release(&self.file);
    }
}

/// The folder of blob files.
#[derive(Debug)]
pub struct Blobs {
    pub(super) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) dir: PathBuf,
    pub(super) ledger: Arc<Ledger>,
    pub(super) staging: Staging,
    /// Asked for the time only, in which it is noted when it was seen to have a blob.
    bucket: SharedBucket,
    /// Blobs in use, by the first byte of their digest, as the folders are.
    shards: Box<[Mutex<Shard>]>,
    /// When blobs were used, not yet in their rows.
    pub(super) touches: Mutex<HashMap<Digest, u64>>,
    /// Blobs whose file left and whose row that says so may not be on the disk yet.
    leaving: Arc<Mutex<HashMap<Digest, u64>>>,
    pub(super) closing: AtomicBool,
}

pub(super) type Shard = HashMap<Digest, InUse>;

#[derive(Debug)]
pub(super) struct InUse {
    pub(super) file: Arc<BlobFile>,
    pub(super) leases: usize,
}

impl Blobs {
    /// Opens the folder, making it and its 256 shards if they are not there. Looks at no blob.
    pub fn open_dir(
        dir: PathBuf,
        ledger: Arc<Ledger>,
        staging: Staging,
        bucket: SharedBucket,
    ) -> Result<Self, StoreError> {
        for shard in 0..=u8::MAX {
            let path = dir.join(format!("{shard:02x}"));
            fs::create_dir_all(&path).map_err(StoreError::disk("create", &path))?;
        }
        Ok(Self {
            shared: Arc::new(Shared {
                dir,
                ledger,
                staging,
                bucket,
                shards: (0..=u8::MAX).map(|_| Mutex::default()).collect(),
                touches: Mutex::default(),
                leaving: Arc::default(),
                closing: AtomicBool::new(false),
            }),
        })
    }

    /// Takes a blob into use; counts as a use for eviction. `None` when it is
    /// of more than one chunk and its manifest is not known.
    ///
    /// Opens and examines the file when nobody else has it in use, unless the index says that it is whole and clean.
    pub fn open(&self, digest: &Digest, size: u64) -> Result<Option<Arc<Blob>>, StoreError> {
        let blob = self.lease(digest, size)?;
        if blob.is_some() {
            self.touch(digest);
        }
        Ok(blob)
    }

    /// Notes a use (lookup, touch) in memory; written in batches. Never blocks on the disk.
    pub fn touch(&self, digest: &Digest) {
        self.shared
            .touches
            .lock()
            .expect("no code panics while it holds the uses")
            .insert(*digest, now_secs());
    }

    /// Like [`Self::open`], but not a use for eviction.
    pub(crate) fn lease(&self, digest: &Digest, size: u64) -> Result<Option<Arc<Blob>>, StoreError> {
        let Some(chunks) = self.shared.ledger.manifest(digest, size)? else {
            return Ok(None);
        };
        let mut shard = self.shared.shard(digest);
        if !shard.contains_key(digest) {
            let file = Arc::new(self.shared.open_file(*digest, chunks)?);
            shard.insert(*digest, InUse { file, leases: 0 });
        }
        let in_use = shard.get_mut(digest).expect("it was put there if it was not");
        in_use.leases += 1;
        let file = Arc::clone(&in_use.file);
        drop(shard);
        Ok(Some(Arc::new(Blob {
            file,
            shared: Arc::clone(&self.shared),
            loans: Mutex::default(),
        })))
    }

    /// Writes verified, adjoining chunks to the file of `blob` and makes them resident. Blocks on the disk.
    pub(super) fn store_chunks(
        &self,
        blob: &Blob,
        chunks: Range<usize>,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        let file = &blob.file;
        if file.is_gone() {
            let _shard = self.shared.shard(&file.digest);
            self.shared.tell_gone(file)?;
        }
        file.store_chunks(chunks, bytes, || {
            if self.shared.is_leaving(&file.digest) {
                self.shared.ledger.sync()?;
            }
            Ok(())
        })?;
        if file.wants_saving() {
            self.shared.save_residency(file)?;
        }
        Ok(())
    }

    /// Whether the index lives on its reserve, see [`Ledger::is_disk_full`].
    pub(super) fn is_disk_full(&self) -> bool {
        self.shared.ledger.is_disk_full()
    }

    /// Tells whatever walks the folder in the background to end.
    pub fn stop_background_work(&self) {
        self.shared.closing.store(true, Ordering::Release);
    }
}

impl Shared {
    /// The bucket's time.
    pub(super) fn bucket_millis(&self) -> u64 {
        self.bucket.clock().now_millis()
    }

    pub(super) fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.shard()).join(digest.to_string())
    }

    /// Locks the rows and the table of the digests that share a folder.
    pub(super) fn shard(&self, digest: &Digest) -> MutexGuard<'_, Shard> {
        self.shard_at(digest.as_bytes()[0])
    }

    /// The same, if nobody has it just now.
    pub(super) fn try_shard(&self, digest: &Digest) -> Option<MutexGuard<'_, Shard>> {
        match self.shards[usize::from(digest.as_bytes()[0])].try_lock() {
            Ok(shard) => Some(shard),
            Err(TryLockError::WouldBlock) => None,
            Err(TryLockError::Poisoned(_)) => panic!("no code panics while it holds a shard"),
        }
    }

    pub(super) fn shard_at(&self, number: u8) -> MutexGuard<'_, Shard> {
        self.shards[usize::from(number)]
            .lock()
            .expect("no code panics while it holds a shard")
    }

    /// Opens the file as its row says, mending the row when the file is gone. The shard is locked.
    fn open_file(&self, digest: Digest, chunks: Arc<ChunkList>) -> Result<BlobFile, StoreError> {
        let row = self.ledger.blob(&digest)?;
        let sealed = self.staging.is_sealing(&digest);
        let (file, found) = BlobFile::open(digest, chunks, self.path(&digest), row.as_deref(), sealed)?;
        if let (Found::Gone, Some(row)) = (found, row) {
            let mut row = (*row).clone();
            row.residency = Residency::Nothing;
            row.doubted = false;
            if row.durability == Durability::Dirty {
                error!(%digest, size = row.size, "the only copy of a blob is gone from the cache directory");
                row.durability = Durability::Quarantined;
            } else {
                warn!(%digest, "a blob is gone from the cache directory; it will be fetched again");
            }
            self.commit_leaving(row)?;
        }
        Ok(file)
    }

    /// Tells the row of a clean blob that its file is gone; the shard is locked.
    fn tell_gone(&self, file: &BlobFile) -> Result<(), StoreError> {
        // One that is being sealed has a file again; its row is not ours.
        if let Some(row) = self.ledger.blob(&file.digest)?
            && let Durability::Durable { .. } = row.durability
            && file.was_found_gone()
            && !self.staging.is_sealing(&file.digest)
        {
            let mut row = (*row).clone();
            row.residency = Residency::Nothing;
            row.doubted = false;
            self.commit_leaving(row)?;
        }
        file.note_told_gone();
        Ok(())
    }

    fn release(&self, file: &Arc<BlobFile>) {
        let mut shard = self.shard(&file.digest);
        let Some(in_use) = shard.get_mut(&file.digest) else {
            return;
        };
        in_use.leases -= 1;
        if in_use.leases > 0 {
            return;
        }
        shard.remove(&file.digest);
        if file.was_found_gone()
            && let Err(err) = self.tell_gone(file)
        {
            error!(digest = %file.digest, error = %chain(&err), "cannot note that a blob is gone; it will be found out again");
        }
        if file.is_unsaved()
            && let Err(err) = self.save_residency_locked(file)
        {
            error!(digest = %file.digest, error = %chain(&err), "cannot note what is resident; it will be fetched again");
        }
    }

    pub(super) fn is_leaving(&self, digest: &Digest) -> bool {
        lock_leaving(&self.leaving).contains_key(digest)
    }

    /// Remembers until the next barrier that the row of `digest` says less than the one on the disk may.
    pub(super) fn note_leaving(&self, digest: Digest) {
        let mut leaving = lock_leaving(&self.leaving);
        let count = leaving.entry(digest).or_default();
        *count += 1;
        let mine = *count;
        drop(leaving);
        let leaving = Arc::clone(&self.leaving);
        self.ledger.after_barrier(Box::new(move || {
            let mut leaving = lock_leaving(&leaving);
            if leaving.get(&digest) == Some(&mine) {
                leaving.remove(&digest);
            }
        }));
    }
}

fn lock_leaving(leaving: &Mutex<HashMap<Digest, u64>>) -> MutexGuard<'_, HashMap<Digest, u64>> {
    leaving.lock().expect("no code panics while it holds the set")
}

/// Seconds since 1970 of this machine's clock.
pub(super) fn now_secs() -> u64 {
    local_millis() / 1000
}
