//! The index on disk: a `SQLite` database in WAL mode, one writer, many readers.
//!
//! This folder is the only one that knows `SQLite`. It stores and finds rows; what is newer than the
//! index, and when it is written, is for [`super::ledger`] to know.
//!
//! # Invariants
//!
//! - One connection writes. The rows of a batch, the sums over them and the number of the
//!   journal record up to which they reach change in one transaction.
//! - A transaction may be lost with the power (`synchronous = NORMAL`), but only together with all later
//!   ones, and never one older than [`IndexWriter::record_barrier`], which waits for the disk.
//! - No memory map: a full or failing disk must become an error, not a signal.

mod read;
mod schema;
mod write;

use std::{
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use rusqlite::{Connection, OpenFlags, ffi};

pub use read::{IndexReader, QueueKey};
pub use write::IndexWriter;

use super::{StoreError, ledger::Totals, record::Ceilings};

/// How long a connection waits for another: only ever while the other
/// recovers or truncates the write-ahead log.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Idle readers that are kept; each has a page cache.
const MAX_IDLE_READERS: usize = 4;
const READER_CACHE_KIB: i64 = 4 << 10;
const WRITER_CACHE_KIB: i64 = 16 << 10;

/// What the index knows of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexState {
    /// The newest journal record whose rows are in the index.
    pub absorbed: u64,
    /// The newest whose rows, and the bytes they speak of, survive power loss.
    pub barrier: u64,
    pub ceilings: Ceilings,
    pub totals: Totals,
}

/// The readers of an open index.
#[derive(Debug)]
pub struct Index {
    path: PathBuf,
    idle: Mutex<Vec<IndexReader>>,
}

impl Index {
    /// Opens the index at `path`, making it if there is none.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unusable`] when the file is something else, or of a newer format; it is unchanged then.
    pub fn open(path: &Path) -> Result<(Self, IndexWriter), StoreError> {
        let connection = connect(path, WRITER_CACHE_KIB)?;
        schema::prepare(&connection, path)?;
        let index = Self {
            path: path.to_owned(),
            idle: Mutex::default(),
        };
        Ok((index, IndexWriter::new(connection)))
    }

    /// Runs one question on a reader. Sees everything that was written before the call.
    pub fn read<T>(
        &self,
        question: impl FnOnce(&IndexReader) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let idle = self.idle().pop();
        let reader = match idle {
            Some(reader) => reader,
            None => IndexReader::new(connect(&self.path, READER_CACHE_KIB)?)?,
        };
        let answer = question(&reader)?;
        let mut idle = self.idle();
        if idle.len() < MAX_IDLE_READERS {
            idle.push(reader);
        }
        Ok(answer)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<IndexReader>> {
        self.idle
            .lock()
            .expect("no code panics while it holds the readers")
    }

    /// Closes the idle readers, so that closing the writer is the last close,
    /// which folds the write-ahead log into the database.
    pub fn close(&self) {
        self.idle().clear();
    }
}

fn connect(path: &Path, cache_kib: i64) -> Result<Connection, StoreError> {
    let flags =
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(failed("open"))?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(failed("set up"))?;
    connection.set_prepared_statement_cache_capacity(64);
    connection
        .pragma_update(None, "cache_size", -cache_kib)
        .map_err(failed("set up"))?;
    Ok(connection)
}

/// Says what was tried; a full disk becomes [`StoreError::Full`].
fn failed(verb: &'static str) -> impl Fn(rusqlite::Error) -> StoreError {
    move |err| match &err {
        rusqlite::Error::SqliteFailure(failure, _)
            if failure.code == rusqlite::ErrorCode::DiskFull
                // The shared memory file of the write-ahead log could not grow.
                || failure.extended_code == ffi::SQLITE_IOERR_SHMSIZE =>
        {
            StoreError::Full
        }
        _ => StoreError::Index {
            verb,
            source: err.into(),
        },
    }
}

/// A row that was found does not read back.
fn damaged(err: super::record::BadRow) -> StoreError {
    StoreError::Index {
        verb: "read a row",
        source: err.into(),
    }
}

/// Makes a database that is not ours; for tests above this folder, which may
/// not know `SQLite`.
#[cfg(test)]
pub fn make_foreign(path: &Path, pragma: &str) {
    let connection = Connection::open(path).unwrap();
    connection
        .execute_batch(&format!("PRAGMA {pragma}; CREATE TABLE IF NOT EXISTS other (x);"))
        .unwrap();
}
