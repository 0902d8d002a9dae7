//! Open files and directories: one [`OpenNode`] an inode, one [`Handle`] an open.

use std::{
    any::Any,
    collections::HashMap,
    fmt,
    fs::File,
    hash::Hash,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::store::{
    blobs::{Blob, FileId},
    fetch::ReadCursor,
    rows::{Ino, StagingId},
};

/// What the front made of a file it lent to the kernel; dropped when the loan ends.
pub type Loan = Arc<dyn Any + Send + Sync>;

/// Where the bytes of an open file come from.
///
/// The kernel demands one backing file for all opens of an inode that is open
/// with passthrough, and no passthrough while it is open without: so this is
/// kept per inode, and changes of kind wait for the last close.
pub(super) enum Serving {
    Nothing,
    /// No bytes, and none to come: an empty sealed file, opened to read.
    Empty,
    Staging {
        id: StagingId,
        /// Open for writing while there are writers.
        file: Arc<File>,
        loan: Option<Loan>,
    },
    Blob {
        blob: Arc<Blob>,
        /// With the file that was lent.
        loan: Option<(Loan, FileId)>,
    },
}

impl Serving {
    pub(super) fn loan(&self) -> Option<&Loan> {
        match self {
            Self::Nothing | Self::Empty => None,
            Self::Staging { loan, .. } => loan.as_ref(),
            Self::Blob { loan, .. } => loan.as_ref().map(|(loan, _)| loan),
        }
    }
}

pub(super) struct OpenState {
    pub(super) handles: u32,
    pub(super) writers: u32,
    /// Opens by which the kernel runs the file as a program.
    pub(super) executors: u32,
    pub(super) serving: Serving,
    /// Size and modification time when the last change was recorded.
    pub(super) recorded: (u64, i64),
    /// When the file was made or emptied by an open, while nobody is known to have written to it or set its
    /// times: its staging file lay ready, and has an older time.
    pub(super) born: Option<i64>,
    /// The daemon itself wrote since; the time alone may be too coarse to tell.
    pub(super) written: bool,
    /// The kernel may have attributes from before the last change: stores to a mapping of a
    /// file that it was lent do not pass by it.
    pub(super) attr_given: bool,
    /// Programs can make such stores: who opens a file to write only cannot map it (mmap(2), EACCES).
    pub(super) mappable: bool,
}

/// An inode that is open.
pub(super) struct OpenNode {
    pub(super) ino: Ino,
    state: Mutex<OpenState>,
}

impl OpenNode {
    pub(super) fn new(ino: Ino) -> Self {
        let state = OpenState {
            handles: 0,
            writers: 0,
            executors: 0,
            serving: Serving::Nothing,
            recorded: (0, 0),
            born: None,
            written: false,
            attr_given: false,
            mappable: false,
        };
        Self {
            ino,
            state: Mutex::new(state),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, OpenState> {
        self.state.lock().expect("a panic ends the process")
    }
}

impl fmt::Debug for OpenNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenNode")
            .field("ino", &self.ino)
            .finish_non_exhaustive()
    }
}

/// One open of a file.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) node: Arc<OpenNode>,
    pub(super) write: bool,
    pub(super) execute: bool,
    pub(super) cursor: ReadCursor,
}

/// A number to value table whose numbers are never used again.
pub(super) struct Table<V> {
    next: AtomicU64,
    entries: Mutex<HashMap<u64, Arc<V>>>,
}

impl<V> Default for Table<V> {
    fn default() -> Self {
        Self {
            next: AtomicU64::new(1),
            entries: Mutex::default(),
        }
    }
}

impl<V> Table<V> {
    pub(super) fn insert(&self, value: V) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(number, Arc::new(value));
        number
    }

    pub(super) fn get(&self, number: u64) -> Option<Arc<V>> {
        self.lock().get(&number).cloned()
    }

    pub(super) fn remove(&self, number: u64) -> Option<Arc<V>> {
        self.lock().remove(&number)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<V>>> {
        self.entries.lock().expect("a panic ends the process")
    }
}

impl<V> fmt::Debug for Table<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").finish_non_exhaustive()
    }
}

/// Values that live while somebody holds one, found by key.
pub(super) struct Shared<K, V>(Mutex<HashMap<K, Arc<V>>>);

impl<K, V> Default for Shared<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash + Copy, V> Shared<K, V> {
    pub(super) fn get(&self, key: K) -> Option<Arc<V>> {
        self.lock().get(&key).cloned()
    }

    pub(super) fn get_or(&self, key: K, make: impl FnOnce() -> V) -> Arc<V> {
        Arc::clone(self.lock().entry(key).or_insert_with(|| Arc::new(make())))
    }

    pub(super) fn all(&self) -> Vec<Arc<V>> {
        self.lock().values().cloned().collect()
    }

    /// Forgets `value` if nobody else can reach it but through the table.
    pub(super) fn release(&self, key: K, value: &Arc<V>, unused: impl FnOnce(&V) -> bool) {
        let mut entries = self.lock();
        let last = entries.get(&key).is_some_and(|known| Arc::ptr_eq(known, value));
        // Two: the table's and the caller's. Nobody can take another while the table is locked.
        if last && Arc::strong_count(value) == 2 && unused(value) {
            entries.remove(&key);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, Arc<V>>> {
        self.0.lock().expect("a panic ends the process")
    }
}

impl<K, V> fmt::Debug for Shared<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Shared").finish()
    }
}
