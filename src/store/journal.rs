//! The journal: changes in the order they were made, before the index has them.
//!
//! This file appends, makes durable, rotates and reads back; what a record means is for
//! [`super::record`] to say, and when to do what for [`super::ledger`].
//!
//! # Format (version 1)
//!
//! `journal/<n>`, decimal, in the order of `n`. All integers little endian.
//!
//! ```text
//! file    magic "casmjrnl"  version u32  zero u32  record*
//! record  length u32 of the payload  crc32c u32 of length, seq and payload  seq u64  payload
//! ```
//!
//! # Invariants
//!
//! - The numbers (`seq`) of records grow by one, across files.
//! - A record whose `append` returned is whole in the page cache: it survives the end of the process.
//!   It survives power loss once [`Journal::sync`] returned.
//! - An `append` that failed leaves nothing: the file is cut back to where the record began.
//! - Every file was synced up to its end, and its name too, before a later file counts as synced.

mod replay;
#[cfg(test)]
mod tests;

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard},
};

pub use replay::{Replayed, replay};

use super::StoreError;
use crate::base::durable;

const MAGIC: [u8; 8] = *b"casmjrnl";
const VERSION: u32 = 1;
const FILE_HEADER_BYTES: u64 = 16;
/// What [`Tail::append`] wants free at the start of its buffer.
pub const RECORD_HEADER_BYTES: usize = 16;

/// The journal of an open cache directory.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    tail: Mutex<Tail>,
    sync: Mutex<SyncState>,
    synced: Condvar,
}

/// The end of the journal, where records go. Held locked while a change is
/// appended and applied, so that both happen in one order.
#[derive(Debug)]
pub struct Tail {
    file: Arc<File>,
    path: PathBuf,
    number: u64,
    len: u64,
    seq: u64,
    /// Older files that no sync covered yet.
    unsynced: Vec<(PathBuf, Arc<File>)>,
    /// A failed append could not be undone: nothing may follow it.
    broken: bool,
    closed: bool,
    /// Makes the next appends fail in the middle, as a full disk does.
    #[cfg(test)]
    pub full_disk: bool,
}

#[derive(Debug, Default)]
struct SyncState {
    /// Records up to here survive power loss.
    through: u64,
    /// Somebody is syncing for all.
    leading: bool,
    /// A sync failed: the kernel may have dropped the pages, and another sync
    /// would report success for bytes that never reached the disk.
    failed: bool,
}

fn file_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(number.to_string())
}

/// The numbers of the files in `dir`, in order.
fn file_numbers(dir: &Path) -> Result<Vec<u64>, StoreError> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir).map_err(StoreError::disk("list", dir))? {
        let entry = entry.map_err(StoreError::disk("list", dir))?;
        numbers.extend(
            entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<u64>().ok()),
        );
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn create_file(dir: &Path, number: u64) -> Result<(PathBuf, Arc<File>), StoreError> {
    let path = file_path(dir, number);
    let mut header = [0; FILE_HEADER_BYTES as usize];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        // One that a full disk kept from being finished is there already.
        .create(true)
        .truncate(true)
        .open(&path)
        .and_then(|file| {
            file.write_all_at(&header, 0)?;
            Ok(Arc::new(file))
        })
        .map_err(StoreError::disk("create", &path))?;
    durable::sync_dir(dir).map_err(StoreError::disk("sync", dir))?;
    Ok((path, file))
}

impl Journal {
    /// Starts a new file behind those that [`replay()`] read; the next record is `seq + 1`.
    pub fn open(dir: &Path, seq: u64) -> Result<Self, StoreError> {
        let numbers = file_numbers(dir)?;
        let mut unsynced = Vec::new();
        for &number in &numbers {
            let path = file_path(dir, number);
            let file = File::open(&path).map_err(StoreError::disk("open", &path))?;
            unsynced.push((path, Arc::new(file)));
        }
        let number = numbers.last().map_or(0, |last| last + 1);
        let (path, file) = create_file(dir, number)?;
        Ok(Self {
            dir: dir.to_owned(),
            tail: Mutex::new(Tail {
                file,
                path,
                number,
                len: FILE_HEADER_BYTES,
                seq,
                unsynced,
                broken: false,
                closed: false,
                #[cfg(test)]
                full_disk: false,
            }),
            sync: Mutex::default(),
            synced: Condvar::new(),
        })
    }

    pub fn tail(&self) -> MutexGuard<'_, Tail> {
        self.tail
            .lock()
            .expect("no code panics while it holds the journal")
    }

    fn sync_state(&self) -> MutexGuard<'_, SyncState> {
        self.sync
            .lock()
            .expect("no code panics while it holds the sync state")
    }

    /// Returns when every record appended before the call survives power loss.
    ///
    /// Those who call while a sync runs share the next one. After a failure
    /// every call fails until [`Journal::settled`].
    pub fn sync(&self) -> Result<(), StoreError> {
        let wanted = self.tail().seq;
        let mut state = self.sync_state();
        loop {
            if state.through >= wanted {
                return Ok(());
            }
            if state.failed {
                return Err(StoreError::disk("sync", &self.dir)(io::Error::other(
                    "an earlier sync of the journal failed",
                )));
            }
            if !state.leading {
                break;
            }
            state = self
                .synced
                .wait(state)
                .expect("no code panics while it holds the sync state");
        }
        state.leading = true;
        drop(state);
        let (files, seq) = {
            let tail = self.tail();
            let mut files = tail.unsynced.clone();
            files.push((tail.path.clone(), Arc::clone(&tail.file)));
            (files, tail.seq)
        };
        let result = files.iter().try_for_each(|(path, file)| {
            rustix::fs::fdatasync(file).map_err(|err| StoreError::disk("sync", path)(err.into()))
        });
        if result.is_ok() {
            // The newest of the files may have grown since, or have been
            // rotated into the list of old ones: it stays there.
            let done = &files[..files.len() - 1];
            self.tail()
                .unsynced
                .retain(|(_, file)| !done.iter().any(|(_, other)| Arc::ptr_eq(file, other)));
        }
        let mut state = self.sync_state();
        state.leading = false;
        match result {
            Ok(()) => state.through = state.through.max(seq),
            Err(_) => state.failed = true,
        }
        drop(state);
        self.synced.notify_all();
        result
    }

    /// Goes on in a new file. Returns its number and the last record before it.
    pub fn rotate(&self) -> Result<(u64, u64), StoreError> {
        // Made before the lock is taken: this waits for the disk. Only the
        // barrier rotates, one at a time, so the number is still free.
        let number = self.tail().number + 1;
        let (path, file) = create_file(&self.dir, number)?;
        let mut tail = self.tail();
        let old = (
            std::mem::replace(&mut tail.path, path),
            std::mem::replace(&mut tail.file, file),
        );
        tail.unsynced.push(old);
        tail.number = number;
        tail.len = FILE_HEADER_BYTES;
        tail.broken = false;
        Ok((number, tail.seq))
    }

    /// Notes that records up to `seq` are durable in the index, so that their
    /// files, those before `number`, are of no use any more; removes them.
    pub fn settled(&self, number: u64, seq: u64) -> Result<(), StoreError> {
        {
            let mut state = self.sync_state();
            state.through = state.through.max(seq);
            state.failed = false;
        }
        let keep_from = file_path(&self.dir, number);
        {
            let mut tail = self.tail();
            let kept = tail.unsynced.iter().position(|(path, _)| *path == keep_from);
            let gone = kept.unwrap_or(tail.unsynced.len());
            tail.unsynced.drain(..gone);
        }
        for old in file_numbers(&self.dir)? {
            if old < number {
                let path = file_path(&self.dir, old);
                durable::remove_if_there(&path).map_err(StoreError::disk("remove", &path))?;
            }
        }
        Ok(())
    }
}

impl Tail {
    /// The number of the newest record.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Whether [`Tail::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Lets no record follow.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Bytes in the newest file.
    pub fn file_bytes(&self) -> u64 {
        self.len
    }

    /// Appends one record by one `write(2)`. `record` begins with
    /// [`RECORD_HEADER_BYTES`] that are filled in here; the payload follows them.
    ///
    /// # Errors
    ///
    /// [`StoreError::Full`] or [`StoreError::Disk`]; the journal is as before.
    pub fn append(&mut self, record: &mut [u8]) -> Result<u64, StoreError> {
        if self.closed || self.broken {
            let why = if self.closed {
                "it is closed"
            } else {
                "an earlier write failed and could not be undone"
            };
            return Err(StoreError::disk("append to", &self.path)(io::Error::other(why)));
        }
        let seq = self.seq + 1;
        fill_header(record, seq);
        if let Err(err) = self.write(record) {
            self.broken = self.file.set_len(self.len).is_err();
            return Err(StoreError::disk("append to", &self.path)(err));
        }
        self.len += record.len() as u64;
        self.seq = seq;
        Ok(seq)
    }

    fn write(&self, record: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        if self.full_disk {
            self.file.write_all_at(&record[..record.len() / 2], self.len)?;
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.file.write_all_at(record, self.len)
    }
}

fn fill_header(record: &mut [u8], seq: u64) {
    let len = u32::try_from(record.len() - RECORD_HEADER_BYTES).expect("a record is far below 4 GiB");
    record[..4].copy_from_slice(&len.to_le_bytes());
    record[8..16].copy_from_slice(&seq.to_le_bytes());
    let crc = checksum(&record[..4], &record[8..]);
    record[4..8].copy_from_slice(&crc.to_le_bytes());
}

fn checksum(len: &[u8], seq_and_payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(len), seq_and_payload)
}
