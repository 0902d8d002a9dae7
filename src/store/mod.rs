//! Blobs on this disk: the cache directory, its index, and how bytes come and go.
//!
//! ```text
//! <cache-dir>/lock  format  machine.json
//!             index.db             what is known (SQLite), see `index`
//!             journal/<n>          changes not yet in the index, see `journal`
//!             blobs/<2 hex>/<64 hex>   one file per blob: whole, or sparse while partial
//!             staging/<id>         files being written
//! ```

pub mod blobs;
pub mod cachedir;
pub mod error;
pub mod fetch;
pub mod index;
pub mod ingest;
pub mod journal;
pub mod ledger;
pub mod manifest;
pub mod reclaim;
pub mod rows;
pub mod staging;
pub mod victims;

use std::{path::PathBuf, sync::Arc, time::Duration};

pub use error::StoreError;

use crate::{
    base::id::{MachineId, StoreId},
    tier::SharedBucket,
};

/// How a store is opened.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    pub dir: PathBuf,
    /// Bytes of blobs that may stay resident (`--cache-size`).
    pub cache_size: u64,
    /// Bytes of the disk that stay free (`--min-free`).
    pub min_free: u64,
    /// How long a read may wait for the bucket.
    pub read_timeout: Duration,
}

/// The cache directory of one daemon, open.
#[derive(Debug)]
pub struct Store {
    pub dir: PathBuf,
    pub ledger: Arc<ledger::Ledger>,
    pub staging: staging::Staging,
    pub blobs: Arc<blobs::Blobs>,
    pub fetcher: Arc<fetch::Fetcher>,
    pub reclaimer: Arc<reclaim::Reclaimer>,
    pub machine: MachineId,
    /// What the last stop left to mend; see [`Recovery`].
    pub recovery: Recovery,
}

/// What opening found of the last stop.
#[derive(Clone, Copy, Debug, Default)]
pub struct Recovery {
    /// The daemon did not stop by itself.
    pub crashed: bool,
    /// The machine started anew since: bytes younger than the last barrier are doubted.
    pub power_lost: bool,
    /// Journal records that were not in the index yet.
    pub replayed: u64,
}

impl Store {
    /// Opens a cache directory, making it if there is none, binding it to
    /// `store_id`, and mending what a crash left.
    ///
    /// Starts the threads that absorb the journal, run barriers and keep the budget.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unusable`] when another daemon holds the directory, when
    /// it belongs to another store, or when it was written by a newer format;
    /// nothing is changed then.
    pub fn open(options: StoreOptions, store_id: StoreId, bucket: SharedBucket) -> Result<Self, StoreError> {
        let _ = (options, store_id, bucket);
        todo!()
    }

    /// Absorbs the journal, makes everything durable on this disk and marks the stop as clean.
    ///
    /// # Errors
    ///
    /// The first failure; the next start then mends as after a crash.
    pub fn close(self) -> Result<(), StoreError> {
        todo!()
    }
}
