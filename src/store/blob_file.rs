//! The file of one blob: which of its chunks are here, reading and filling it, and to whom it is lent.
//!
//! This file knows one path and no rows; [`super::blobs`] owns the table of
//! these and keeps the rows in step.
//!
//! # Invariants
//!
//! - A chunk counts as resident only after its bytes were verified and the write of them returned.
//! - A *doubted* chunk may be in the file (a power loss came between), and is
//!   not served before its bytes were hashed again.
//! - What was found at the path without a row is never written to: it may
//!   be linked elsewhere, or mapped by a program. A new file takes its place.
//! - While bytes are resident the path leads to the file in the slot: both change together,
//!   under the slot's lock, so that nobody fills a file that is about to be replaced.
//! - A file is lent to one inode at a time, and only when nobody else has it
//!   open: mappings outlive a loan, and the daemon.
//! - A *frozen* file (quarantined) is not written to any more.
//! - A whole, clean file is opened when it is first needed: who opens a small one whose pages the kernel has needs
//!   nothing of it. When it turns out to be gone then, its bytes are missing, and will be fetched again.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use rustix::fs::FallocateFlags;

use super::{
    StoreError,
    bits::Bits,
    lease::{Lease, LeaseKind, with_lease},
    rows::{BlobRow, Durability, Ino, Residency},
};
use crate::base::{buffers, chunk::ChunkList, digest::Digest, durable::remove_if_there};

/// Residency reaches the index at most this often while a blob is being
/// filled: what a crash forgets is fetched again.
const SAVE_INTERVAL: Duration = Duration::from_millis(500);

/// A write from this length on gets its space first. On ext4 a write into a hole reserves block by
/// block: 4 MiB into allocated space take half of the CPU time (0.11 against 0.19 s a GiB; on XFS nothing changes).
const ALLOCATED_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct BlobFile {
    pub(super) digest: Digest,
    pub(super) chunks: Arc<ChunkList>,
    pub(super) path: PathBuf,
    /// Written for what replaces the file, read for everything that uses it.
    slot: RwLock<Option<Arc<File>>>,
    /// The file is there, as far as the row knows, and not in the slot yet. Changes under the slot's lock.
    unopened: AtomicBool,
    /// It turned out not to be there, and the row still says that it is.
    gone: AtomicBool,
    /// Held by whoever writes a chunk. The kernel lets one at a time write to a file too, but the
    /// others spin for it: with two cores that took a seventh of the time of all writes.
    writing: Mutex<()>,
    resident: Bits,
    doubted: Bits,
    frozen: AtomicBool,
    loan: Mutex<Loan>,
    /// Chunks became resident that no row knows of.
    unsaved: AtomicBool,
    saved_at: Mutex<Instant>,
}

#[derive(Debug, Default)]
struct Loan {
    /// Grows when the path gets another file, so that loans of the old one end unnoticed.
    generation: u64,
    holder: Option<(Ino, u32)>,
    last: Option<Ino>,
}

/// What opening the file of a row found.
pub(super) enum Found {
    AsTheRowSays,
    /// There is no such file, or not of that length.
    Gone,
}

impl BlobFile {
    /// Opens what `row` says is here; `sealed` is of a whole file whose row is about to come.
    pub(super) fn open(
        digest: Digest,
        chunks: Arc<ChunkList>,
        path: PathBuf,
        row: Option<&BlobRow>,
        sealed: bool,
    ) -> Result<(Self, Found), StoreError> {
        let count = chunks.chunks().len();
        let held = match row.map(|row| &row.residency) {
            _ if sealed => Bits::full(count),
            None | Some(Residency::Nothing) => Bits::empty(count),
            Some(Residency::Partial(bytes)) => Bits::from_bytes(count, bytes),
            Some(Residency::Whole) => Bits::full(count),
        };
        let quarantined = row.is_some_and(|row| row.durability == Durability::Quarantined) && !sealed;
        let mut found = Found::AsTheRowSays;
        let mut file = None;
        let in_doubt = row.is_some_and(|row| row.doubted) && !sealed;
        let is_clean = row.is_some_and(|row| matches!(row.durability, Durability::Durable { .. }));
        let unopened = held.is_full() && !held.is_empty() && is_clean && !in_doubt && !sealed;
        if !held.is_empty() && !unopened {
            let fillable = (in_doubt || !held.is_full()) && !quarantined;
            file = open_file(&path, chunks.size(), fillable)?;
            if file.is_none() {
                held.clear();
                found = Found::Gone;
            }
        }
        // Without a file there is nothing to keep: what the bucket has may come in its place.
        let frozen = quarantined && file.is_some();
        let (resident, doubted) = if in_doubt {
            (Bits::empty(count), held)
        } else {
            (held, Bits::empty(count))
        };
        let blob = Self {
            digest,
            chunks,
            path,
            slot: RwLock::new(file.map(Arc::new)),
            unopened: AtomicBool::new(unopened),
            gone: AtomicBool::new(false),
            writing: Mutex::default(),
            resident,
            doubted,
            frozen: AtomicBool::new(frozen),
            loan: Mutex::default(),
            unsaved: AtomicBool::new(false),
            saved_at: Mutex::new(Instant::now()),
        };
        Ok((blob, found))
    }

    pub(super) fn size(&self) -> u64 {
        self.chunks.size()
    }

    /// Whether every byte is here.
    pub(super) fn is_whole(&self) -> bool {
        self.look();
        self.resident.is_full()
    }

    /// The same as far as the row knows, for who needs no byte of it yet.
    pub(super) fn is_said_whole(&self) -> bool {
        self.resident.is_full()
    }

    pub(super) fn has(&self, offset: u64, len: u64) -> bool {
        self.look();
        self.resident.contains_all(self.chunks.covering(offset, len))
    }

    pub(super) fn has_chunk(&self, index: usize) -> bool {
        self.look();
        self.resident.contains(index)
    }

    pub(super) fn doubts_chunk(&self, index: usize) -> bool {
        self.doubted.contains(index)
    }

    /// What a row says of this file.
    pub(super) fn residency(&self) -> (Residency, bool) {
        self.look();
        let doubted = !self.doubted.is_empty();
        let mut bytes = self.resident.to_bytes();
        for (byte, more) in bytes.iter_mut().zip(self.doubted.to_bytes()) {
            *byte |= more;
        }
        let held = Bits::from_bytes(self.chunks.chunks().len(), &bytes);
        let residency = if held.is_full() {
            Residency::Whole
        } else if held.is_empty() {
            Residency::Nothing
        } else {
            Residency::Partial(bytes)
        };
        (residency, doubted)
    }

    /// Reads resident bytes into `buffer`, in place of what it holds; false when not all of
    /// them are here. Short only at the end of the blob.
    pub(super) fn read(&self, offset: u64, len: usize, buffer: &mut Vec<u8>) -> Result<bool, StoreError> {
        self.try_look()?;
        let slot = self.read_slot();
        let chunks = self.chunks.covering(offset, len as u64);
        if !self.resident.contains_all(chunks) {
            return Ok(false);
        }
        let len = self.size().saturating_sub(offset).min(len as u64) as usize;
        match slot.as_ref() {
            _ if len == 0 => {
                buffer.clear();
                Ok(true)
            }
            Some(file) => read_exact(file, offset, len, buffer)
                .map(|()| true)
                .map_err(StoreError::disk("read", &self.path)),
            None => Ok(false),
        }
    }

    /// Reads the bytes at a chunk's place, whether they are right or not; `None` without a file.
    pub(super) fn read_unverified(&self, index: usize) -> Result<Option<Bytes>, StoreError> {
        // Held while reading: the file may be given to a writer as soon as it is let go.
        let slot = self.read_slot();
        let Some(file) = slot.as_ref() else {
            return Ok(None);
        };
        let len = self.chunks.chunks()[index].len as usize;
        let mut bytes = buffers::take(len);
        read_exact(file, self.chunks.start(index), len, &mut bytes)
            .map_err(StoreError::disk("read", &self.path))?;
        Ok(Some(buffers::share(bytes)))
    }

    /// Takes the doubt from a chunk that was hashed again: it is resident, or it never was.
    pub(super) fn settle_doubt(&self, index: usize, right: bool) {
        let slot = self.read_slot();
        if !self.doubted.contains(index) {
            return;
        }
        if right {
            self.resident.insert(index);
        }
        self.doubted.remove(index);
        self.changed(slot);
    }

    /// Writes the verified bytes of adjoining chunks by one write and makes them resident, making the file if
    /// there is none, after `before_make`. Does nothing when they are resident or the file is frozen.
    pub(super) fn store_chunks(
        &self,
        chunks: Range<usize>,
        bytes: &[u8],
        before_make: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        if self.is_frozen() {
            return Ok(());
        }
        self.try_look()?;
        let mut slot = self.read_slot();
        if slot.is_none() {
            drop(slot);
            self.make_file(before_make)?;
            slot = self.read_slot();
        }
        if self.resident.contains_all(chunks.clone()) {
            return Ok(());
        }
        // Another thread may have taken the file away again: then these chunks are just not kept.
        let Some(file) = slot.as_ref() else {
            return Ok(());
        };
        {
            let start = self.chunks.start(chunks.start);
            let _writing = self.writing.lock().expect("no code panics while it writes");
            if bytes.len() >= ALLOCATED_BYTES {
                // Advice only: where it cannot, the write says what is wrong.
                let _ = rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, start, bytes.len() as u64);
            }
            file.write_all_at(bytes, start)
                .map_err(StoreError::disk("write", &self.path))?;
        }
        for index in chunks {
            self.resident.insert(index);
            self.doubted.remove(index);
        }
        self.changed(slot);
        Ok(())
    }

    /// Residency changed, under the lock that is given back: it is to be saved, and a whole blob's file is frozen.
    fn changed(&self, slot: RwLockReadGuard<'_, Option<Arc<File>>>) {
        self.unsaved.store(true, Ordering::Release);
        drop(slot);
        if self.is_whole() {
            self.reopen_read_only();
        }
    }

    fn make_file(&self, before: impl FnOnce() -> Result<(), StoreError>) -> Result<(), StoreError> {
        let mut slot = self.write_slot();
        if slot.is_some() {
            return Ok(());
        }
        before()?;
        remove_if_there(&self.path).map_err(StoreError::disk("remove", &self.path))?;
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.path)
            .map_err(StoreError::disk("create", &self.path))?;
        if let Err(err) = file.set_len(self.size()) {
            // Nothing refers to it; what stays is an orphan that the next one replaces.
            let _ = remove_if_there(&self.path);
            return Err(StoreError::disk("extend", &self.path)(err));
        }
        *slot = Some(Arc::new(file));
        Ok(())
    }

    /// A whole file is never written to again, and a writable descriptor would forbid a lease.
    fn reopen_read_only(&self) {
        let mut slot = self.write_slot();
        if slot.is_some()
            && self.resident.is_full()
            && let Ok(Some(file)) = open_file(&self.path, self.size(), false)
        {
            *slot = Some(Arc::new(file));
        }
    }

    /// Gives the path another, whole file, by `replace`, while nobody can make one.
    pub(super) fn replace_with(
        &self,
        replace: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut slot = self.write_slot();
        replace()?;
        let file = File::open(&self.path).map_err(StoreError::disk("open", &self.path))?;
        *slot = Some(Arc::new(file));
        self.is_there_again();
        self.resident.fill();
        self.doubted.clear();
        self.frozen.store(false, Ordering::Release);
        self.end_loans();
        Ok(())
    }

    /// The file left, nothing is resident any more. `unlink` runs while nobody can make a new one.
    pub(super) fn leave<T>(&self, unlink: impl FnOnce() -> T) -> T {
        let mut slot = self.write_slot();
        self.resident.clear();
        self.doubted.clear();
        self.unsaved.store(false, Ordering::Release);
        self.frozen.store(false, Ordering::Release);
        self.is_there_again();
        *slot = None;
        self.end_loans();
        unlink()
    }

    /// Runs `unlink` while nobody can make a new file.
    pub(super) fn unlink_with<T>(&self, unlink: impl FnOnce() -> T) -> T {
        let _slot = self.write_slot();
        unlink()
    }

    /// Chunks turned out to be wrong: they are not served, and nothing is written any more.
    pub(super) fn freeze(&self, wrong: &[usize]) {
        let _slot = self.write_slot();
        self.frozen.store(true, Ordering::Release);
        for &index in wrong {
            self.resident.remove(index);
            self.doubted.remove(index);
        }
    }

    /// Runs `look` on the whole file, which is given to no writer meanwhile.
    pub(super) fn with_file<T>(
        &self,
        look: impl FnOnce(&File) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        match self.read_slot().as_ref() {
            Some(file) if self.resident.is_full() => look(file),
            _ => Err(StoreError::disk("open", &self.path)(
                io::ErrorKind::NotFound.into(),
            )),
        }
    }

    /// Opens the whole file anew, read-only.
    pub(super) fn file(&self) -> Result<File, StoreError> {
        self.with_file(|_| File::open(&self.path).map_err(StoreError::disk("open", &self.path)))
    }

    /// Opens the file to lend it to `ino`; returns what [`Self::give_back`] wants with it.
    pub(super) fn lend(&self, ino: Ino) -> Result<Option<(File, u64)>, StoreError> {
        let slot = self.read_slot();
        let Some(file) = slot.as_ref().filter(|_| self.resident.is_full()) else {
            return Ok(None);
        };
        let mut loan = self.loan();
        let count = match loan.holder {
            Some((holder, count)) if holder == ino => count,
            Some(_) => return Ok(None),
            None if loan.last != Some(ino) && !nobody_else_has_it_open(file) => return Ok(None),
            None => 0,
        };
        let lent = File::open(&self.path).map_err(StoreError::disk("open", &self.path))?;
        loan.holder = Some((ino, count + 1));
        loan.last = Some(ino);
        Ok(Some((lent, loan.generation)))
    }

    pub(super) fn give_back(&self, ino: Ino, generation: u64) {
        let mut loan = self.loan();
        if loan.generation != generation {
            return;
        }
        if let Some((holder, count)) = &mut loan.holder
            && *holder == ino
        {
            *count -= 1;
            if *count == 0 {
                loan.holder = None;
            }
        }
    }

    pub(super) fn is_lent(&self) -> bool {
        self.loan().holder.is_some()
    }

    fn end_loans(&self) {
        let mut loan = self.loan();
        *loan = Loan {
            generation: loan.generation + 1,
            ..Loan::default()
        };
    }

    /// Whether nobody but this table has the file open or mapped.
    pub(super) fn is_exclusive(&self) -> bool {
        self.read_slot()
            .as_ref()
            .is_some_and(|file| nobody_else_has_it_open(file))
    }

    /// Whether every byte is here, and not known to be wrong.
    pub(super) fn is_good(&self) -> bool {
        self.is_whole() && !self.is_frozen()
    }

    /// Whether the file turned out to be gone, which its row is to be told before another one is made.
    pub(super) fn is_gone(&self) -> bool {
        self.look();
        self.was_found_gone()
    }

    /// The same of a file that nobody may have needed yet.
    pub(super) fn was_found_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// The row was told.
    pub(super) fn note_told_gone(&self) {
        self.gone.store(false, Ordering::Release);
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Acquire)
    }

    /// Whether it is time to tell the index what became resident.
    pub(super) fn wants_saving(&self) -> bool {
        self.is_unsaved() && (self.is_whole() || self.saved_at().elapsed() >= SAVE_INTERVAL)
    }

    pub(super) fn is_unsaved(&self) -> bool {
        self.unsaved.load(Ordering::Acquire)
    }

    /// Called before the bits are read for a row, so that a later one is not missed.
    pub(super) fn note_saved(&self) {
        self.unsaved.store(false, Ordering::Release);
        *self.saved_at() = Instant::now();
    }

    /// The row was not committed after all.
    pub(super) fn note_unsaved(&self) {
        self.unsaved.store(true, Ordering::Release);
    }

    fn saved_at(&self) -> MutexGuard<'_, Instant> {
        self.saved_at
            .lock()
            .expect("no code panics while it holds the time")
    }

    /// Taken after the slot, never before it.
    fn loan(&self) -> MutexGuard<'_, Loan> {
        self.loan.lock().expect("no code panics while it holds the loan")
    }

    fn read_slot(&self) -> RwLockReadGuard<'_, Option<Arc<File>>> {
        self.look();
        self.slot.read().expect("no code panics while it holds the slot")
    }

    /// Makes what is said of the file true. Never called while the slot is held.
    fn look(&self) {
        // Who needs the bytes meets the error.
        let _ = self.try_look();
    }

    fn try_look(&self) -> Result<(), StoreError> {
        if self.unopened.load(Ordering::Acquire) {
            self.open_now()
        } else {
            Ok(())
        }
    }

    /// Another file is, or none is said to be, where the one was that was not looked at or found gone; under the slot's lock.
    fn is_there_again(&self) {
        self.unopened.store(false, Ordering::Release);
        self.gone.store(false, Ordering::Release);
    }

    /// Puts the file in the slot that the row says is there.
    ///
    /// # Errors
    ///
    /// When it cannot be opened for another reason than that it is gone, as too many open files: its bytes stay
    /// resident.
    fn open_now(&self) -> Result<(), StoreError> {
        let mut slot = self.write_slot();
        if !self.unopened.load(Ordering::Acquire) {
            return Ok(());
        }
        if let Some(file) = open_file(&self.path, self.size(), false)? {
            *slot = Some(Arc::new(file));
        } else {
            tracing::warn!(digest = %self.digest, "a blob is gone from the cache directory; it will be fetched again");
            self.resident.clear();
            self.gone.store(true, Ordering::Release);
        }
        self.unopened.store(false, Ordering::Release);
        Ok(())
    }

    fn write_slot(&self) -> RwLockWriteGuard<'_, Option<Arc<File>>> {
        self.slot.write().expect("no code panics while it holds the slot")
    }
}

fn nobody_else_has_it_open(file: &File) -> bool {
    // Where leases are not known, nothing is lent or taken over.
    matches!(
        with_lease(file, LeaseKind::NobodyElse, || Ok(())),
        Ok(Lease::Granted(()))
    )
}

/// Opens a blob's file; `None` if there is none of that length.
fn open_file(path: &Path, size: u64, write: bool) -> Result<Option<File>, StoreError> {
    match File::options().read(true).write(write).open(path) {
        Ok(file) => {
            let len = file.metadata().map_err(StoreError::disk("examine", path))?.len();
            Ok((len == size).then_some(file))
        }
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(StoreError::disk("open", path)(err)),
    }
}

/// Reads `len` bytes in place of what `bytes` holds; of a buffer used before, no more is
/// cleared than it grows.
fn read_exact(file: &File, offset: u64, len: usize, bytes: &mut Vec<u8>) -> io::Result<()> {
    bytes.resize(len, 0);
    file.read_exact_at(bytes, offset)
}
