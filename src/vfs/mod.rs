//! File system semantics, without FUSE types: what each request of a program
//! does to the tree, the staging files and the blobs.
//!
//! Requests that need only this disk are answered in place by plain functions.
//! Those that may need the network exist twice: a step that answers in place or
//! says what is missing ([`OpenStep::Fetch`], `None` of [`Vfs::read_resident`]), and
//! an `async` function that the front runs in a task.
//!
//! # Locks
//!
//! Of the locks here one is held at a time, and the tree's may be taken under
//! an `handle::OpenNode`'s, never the other way round.

mod attr;
mod close;
mod dirs;
mod error;
mod handle;
mod io;
mod lend;
mod load;
mod lookup;
mod names;
mod open;
mod report;
mod resume;
mod room;
mod seal;
mod set_attr;

use std::{
    fmt,
    num::NonZeroUsize,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

pub use attr::Attr;
pub use dirs::{DirEntry, DirPage};
pub use error::VfsError;
pub use handle::Loan;
pub use io::Seek;
pub use lend::Lend;
pub use lookup::{Keep, Lookup, Wanted};
pub use names::{Created, NewFile};
pub use open::{Missing, OpenRequest, OpenStep, Opened};
pub use report::{FlushReport, FsStat, Listed, VfsStatus};
pub use set_attr::SetAttr;

use lru::LruCache;

use crate::{
    base::{activity::Activity, digest::Digest},
    namespace::{
        action::Named,
        catalog::Loader,
        tree::{Notice, Tree},
    },
    store::{
        Store,
        rows::{Ino, StagingId},
    },
};
use handle::{Handle, OpenNode, Shared, Table};

/// Who files belong to, as programs see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Everything belongs to one user (`--uid`, `--gid`, or the mounting user).
    Fixed { uid: u32, gid: u32 },
    /// As the machine that made them recorded it (`--owner preserve`).
    Preserve,
}

#[derive(Clone, Debug)]
pub struct VfsOptions {
    pub owner: Owner,
    /// The user and group who mounted: who files belong to where a preset says so.
    pub user: (u32, u32),
    /// Permission bits that no file shows (`--umask`).
    pub umask: u32,
    /// How long a closed file rests before it is sealed.
    pub settle: Duration,
    pub read_only: bool,
    pub xattr: bool,
    /// Told of requests that use names; sealing gives way to a stream of them.
    pub activity: Arc<Activity>,
    /// When the mount counts as not in use (`namespace::follow`).
    pub rests_after: Duration,
}

/// What the counters of [`VfsStatus`] count.
#[derive(Debug, Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    passthrough_opens: AtomicU64,
    lost: AtomicU64,
    sealed: AtomicU64,
}

/// Inodes whose pages are remembered; one that is forgotten is read again.
const PAGES_REMEMBERED: NonZeroUsize = NonZeroUsize::new(1 << 16).expect("not zero");

/// What the wiring wants to be called for.
pub type Hook = Arc<dyn Fn() + Send + Sync>;

/// The file system of one mount.
pub struct Vfs {
    options: VfsOptions,
    store: Arc<Store>,
    tree: Arc<Tree>,
    nodes: Shared<Ino, OpenNode>,
    handles: Table<Handle>,
    listings: Mutex<dirs::Listings>,
    settling: seal::Settling,
    /// Which blob filled the pages that the kernel may have of an inode that the daemon served.
    pages: Mutex<LruCache<Ino, Digest>>,
    counters: Counters,
    /// What action-cache entries and trees name.
    named: Mutex<LruCache<Digest, Arc<Named>>>,
    on_use: OnceLock<Hook>,
    on_seal: OnceLock<Hook>,
    /// Of catalogs; none without.
    loader: OnceLock<Arc<Loader>>,
}

impl fmt::Debug for Vfs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vfs")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Vfs {
    /// Makes the file system of `tree` and resumes the sealing of what a stop
    /// left closed and unsealed.
    pub fn new(options: VfsOptions, store: Arc<Store>, tree: Arc<Tree>) -> Result<Arc<Self>, VfsError> {
        let vfs = Arc::new(Self {
            options,
            store,
            tree,
            nodes: Shared::default(),
            handles: Table::default(),
            listings: Mutex::new(dirs::Listings::new()),
            settling: seal::Settling::default(),
            pages: Mutex::new(LruCache::new(PAGES_REMEMBERED)),
            counters: Counters::default(),
            named: Mutex::new(LruCache::new(lookup::ENTRIES_REMEMBERED)),
            on_use: OnceLock::new(),
            on_seal: OnceLock::new(),
            loader: OnceLock::new(),
        });
        vfs.resume()?;
        vfs.start_sealing();
        vfs.start_sweeping();
        Ok(vfs)
    }

    /// Whom to call when a program uses the mount; for the follower's pace.
    pub fn set_on_use(&self, on_use: Hook) {
        // Set once, by the wiring; a second call would be a mistake there and changes nothing.
        let _ = self.on_use.set(on_use);
    }

    /// Whom to call when a file became a dirty blob; for the uploader.
    pub fn set_on_seal(&self, on_seal: Hook) {
        let _ = self.on_seal.set(on_seal);
    }

    fn on_seal(&self) {
        if let Some(on_seal) = self.on_seal.get() {
            on_seal();
        }
    }

    #[must_use]
    pub fn options(&self) -> &VfsOptions {
        &self.options
    }

    fn used(&self) {
        self.options.activity.note();
        if let Some(on_use) = self.on_use.get() {
            on_use();
        }
    }

    /// Tells the kernel of what changed by itself.
    fn tell(&self, notices: Vec<Notice>) {
        self.tree.tell(notices);
    }

    /// How long a closed file rests before it is sealed.
    fn settle_of(&self, ino: Ino) -> Duration {
        // A file that cannot be looked at now rests as any other.
        let by_preset = self.tree.settle_of(ino).ok().flatten();
        by_preset.unwrap_or(self.options.settle)
    }

    fn writable(&self) -> Result<(), VfsError> {
        if self.options.read_only {
            Err(VfsError::ReadOnly)
        } else {
            Ok(())
        }
    }

    fn discard(&self, staging: Vec<StagingId>) {
        for id in staging {
            self.store.staging.remove_after_barrier(id);
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
