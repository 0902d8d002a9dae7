//! Blobs on this disk: the cache directory, its index, and how bytes come and go.
//!
//! ```text
//! <cache-dir>/lock  format  machine.json  stop.json    see `cachedir`
//!             index.db             what is known (SQLite), see `index`
//!             reserve              space kept aside for the index
//!             journal/<n>          changes not yet in the index, see `journal`
//!             blobs/<2 hex>/<64 hex>   one file per blob: whole, or sparse while partial
//!             staging/<id>         files being written
//!             catalogs/<64 hex>    objects of catalogs, see `objects`
//! ```

mod bits;
mod blob_file;
mod blob_rows;
pub mod blobs;
#[cfg(test)]
mod blobs_tests;
pub mod cachedir;
pub mod error;
pub mod fetch;
mod fetch_chunk;
mod fetch_pack;
#[cfg(test)]
mod fetch_pack_tests;
mod fetch_run;
#[cfg(test)]
mod fetch_run_tests;
#[cfg(test)]
mod fetch_tests;
mod fresh;
mod index;
pub mod ingest;
pub mod inspect;
mod journal;
mod lease;
pub mod ledger;
pub mod manifest;
pub mod objects;
mod orphans;
mod overlay;
pub mod pack;
mod readahead;
pub mod reclaim;
#[cfg(test)]
mod reclaim_tests;
mod record;
pub mod rows;
pub(crate) mod seal;
pub mod staging;
#[cfg(test)]
mod stress_tests;
mod take_over;
#[cfg(test)]
pub(crate) mod testing;
pub mod victims;

use std::{path::PathBuf, sync::Arc, time::Duration};

pub use error::StoreError;

use self::{
    blobs::Blobs,
    cachedir::{CacheDir, LastStop},
    fetch::Fetcher,
    ledger::Ledger,
    objects::Objects,
    reclaim::Reclaimer,
    staging::Staging,
};
use crate::{
    base::{
        id::{MachineId, StoreId},
        volume::Stack,
    },
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
    pub ledger: Arc<Ledger>,
    pub staging: Staging,
    pub blobs: Arc<Blobs>,
    pub fetcher: Arc<Fetcher>,
    pub reclaimer: Arc<Reclaimer>,
    pub objects: Objects,
    pub machine: MachineId,
    cache_dir: CacheDir,
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
    /// The directory was last used on another machine and took a new machine id.
    pub machine_changed: bool,
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
    #[expect(clippy::needless_pass_by_value, reason = "the store keeps both")]
    pub fn open(options: StoreOptions, store_id: StoreId, bucket: SharedBucket) -> Result<Self, StoreError> {
        match Self::open_once(&options, store_id, bucket.clone()) {
            // The daemon must come up on a full disk, or nothing would ever be evicted.
            Err(StoreError::Full) if ledger::release_reserve(&options.dir) => {
                Self::open_once(&options, store_id, bucket)
            }
            opened => opened,
        }
    }

    fn open_once(
        options: &StoreOptions,
        store_id: StoreId,
        bucket: SharedBucket,
    ) -> Result<Self, StoreError> {
        let cache_dir = CacheDir::open(&options.dir, store_id)?;
        let last_stop = cache_dir.last_stop();
        // After power loss the note is the last step: a crash in the middle of
        // the mending must not make it forgotten.
        if last_stop != LastStop::PowerLost {
            cache_dir.mark_running()?;
        }
        let (ledger, replayed) = Ledger::open(&options.dir, last_stop, &ledger::LedgerOptions::default())?;
        let ledger = Arc::new(ledger);
        let (staging, blobs, fetcher, reclaimer, objects) = bytes_half(options, &ledger, bucket)?;
        if last_stop == LastStop::PowerLost {
            cache_dir.mark_running()?;
        }
        if last_stop != LastStop::Clean {
            let blobs = Arc::clone(&blobs);
            let sweep = move || {
                if let Err(err) = blobs.remove_orphans() {
                    tracing::warn!(error = %error::chain(&err), "cannot look for what the crash left");
                }
            };
            let thread = std::thread::Builder::new()
                .name("orphans".to_owned())
                .spawn(sweep);
            thread.map_err(StoreError::disk("start a thread for", &options.dir))?;
        }
        Ok(Self {
            dir: options.dir.clone(),
            ledger,
            staging,
            blobs,
            fetcher,
            reclaimer,
            objects,
            machine: cache_dir.machine(),
            recovery: Recovery {
                crashed: last_stop != LastStop::Clean,
                power_lost: last_stop == LastStop::PowerLost,
                replayed,
                machine_changed: cache_dir.machine_changed(),
            },
            cache_dir,
        })
    }

    /// The volumes that the directory belongs to; `None` when that was never noted.
    pub fn stack(&self) -> Option<&Stack> {
        self.cache_dir.stack()
    }

    /// Makes the directory belong to these volumes. For one that belongs to none.
    pub fn bind_stack(&mut self, stack: Stack) -> Result<(), StoreError> {
        self.cache_dir.bind_stack(stack)
    }

    /// Absorbs the journal, makes everything durable on this disk and marks the stop as clean.
    ///
    /// # Errors
    ///
    /// The first failure; the next start then mends as after a crash.
    pub fn close(self) -> Result<(), StoreError> {
        // Both still commit rows.
        self.blobs.stop_background_work();
        self.reclaimer.stop();
        self.ledger.close()?;
        self.cache_dir.mark_clean()
    }
}

type BytesHalf = (Staging, Arc<Blobs>, Arc<Fetcher>, Arc<Reclaimer>, Objects);

/// The half of the store that holds bytes.
fn bytes_half(
    options: &StoreOptions,
    ledger: &Arc<Ledger>,
    bucket: SharedBucket,
) -> Result<BytesHalf, StoreError> {
    let staging = Staging::open_dir(options.dir.join("staging"), Arc::clone(ledger))?;
    let blobs = Blobs::open_dir(
        options.dir.join("blobs"),
        Arc::clone(ledger),
        staging.clone(),
        Arc::clone(&bucket),
    )?;
    let blobs = Arc::new(blobs);
    let objects = Objects::open_dir(options.dir.join("catalogs"), options.min_free);
    let limits = reclaim::ReclaimOptions {
        dir: options.dir.clone(),
        cache_size: options.cache_size,
        min_free: options.min_free,
    };
    let reclaimer = Reclaimer::spawn(limits, Arc::clone(ledger), Arc::clone(&blobs), objects.clone())?;
    let fetcher = Fetcher::new(
        bucket,
        Arc::clone(ledger),
        Arc::clone(&blobs),
        Arc::clone(&reclaimer),
        options.read_timeout,
    );
    Ok((staging, blobs, Arc::new(fetcher), reclaimer, objects))
}
