//! Keeps the budget: acts on what `victims` chooses.
//!
//! Two limits: blobs take at most `cache_size`, and `min_free` of the disk stays free, and never less
//! than the index needs to set its reserve aside. When
//! one is broken, blobs leave until it holds with `SLACK` to spare, so that
//! not every new blob costs an eviction, nor an eviction much of the cache.
//!
//! The same thread writes down, now and then, what the blobs keep in memory: uses and residency; and has blobs forgotten
//! that no file has any more and nobody ever will have (see `super::blob_rows`), which is also the first way to make room.
//! The last are objects of catalogs, which lookups want sooner than reads want most blobs.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use tracing::{debug, error, warn};

use super::{
    StoreError,
    blobs::Blobs,
    error::chain,
    ledger::Ledger,
    objects::Objects,
    victims::{Candidate, choose_victims},
};

/// How much more than needed leaves at once: 5 %. Caches that made much
/// room at once were seen to fetch it all again.
const SLACK: u64 = 20;

/// How often the limits are looked at: the kernel writes to staging files without us.
const TICK: Duration = Duration::from_secs(1);

/// How many ticks pass between two times that uses are written down.
const TICKS_PER_SAVE: u32 = 5;

/// How long what leaves the disk behind a barrier is waited for.
const CALLBACKS_WITHIN: Duration = Duration::from_secs(10);

/// Rows looked at in one go.
const BATCH: usize = 256;

/// The least that is made room for when the disk is full: several chunks come at once.
const MIN_ROOM: u64 = 32 << 20;

#[derive(Clone, Debug)]
pub struct ReclaimOptions {
    /// A folder on the disk whose free space is kept.
    pub dir: PathBuf,
    /// Bytes of blobs that may stay resident.
    pub cache_size: u64,
    /// Bytes of the disk that stay free.
    pub min_free: u64,
}

/// What left so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReclaimStatus {
    pub evicted_bytes: u64,
    pub evicted_blobs: u64,
    /// A limit is broken, and nothing can leave.
    pub stuck: bool,
}

#[derive(Debug)]
pub struct Reclaimer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    options: ReclaimOptions,
    ledger: Arc<Ledger>,
    blobs: Arc<Blobs>,
    objects: Objects,
    /// One eviction at a time: two would evict twice as much as needed.
    running: Mutex<()>,
    call: Mutex<Call>,
    called: Condvar,
    evicted_bytes: AtomicU64,
    evicted_blobs: AtomicU64,
    stuck: AtomicBool,
}

#[derive(Debug, Default)]
struct Call {
    run: bool,
    stop: bool,
}

/// How many bytes must leave, for each limit.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    /// Of blobs, because they are more than the cache may take.
    over: u64,
    /// Of anything, because the disk has less free than it shall.
    short: u64,
}

/// The disk of the cache, in bytes.
struct Disk {
    free: u64,
    /// To be free for the index's reserve to be set aside.
    room_of_index: u64,
}

impl Reclaimer {
    /// Starts the thread. It ends with [`Self::stop`], or when this is dropped.
    pub fn spawn(
        options: ReclaimOptions,
        ledger: Arc<Ledger>,
        blobs: Arc<Blobs>,
        objects: Objects,
    ) -> Result<Arc<Self>, StoreError> {
        let shared = Arc::new(Shared {
            options,
            ledger,
            blobs,
            objects,
            running: Mutex::default(),
            call: Mutex::default(),
            called: Condvar::new(),
            evicted_bytes: AtomicU64::new(0),
            evicted_blobs: AtomicU64::new(0),
            stuck: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("reclaim".to_owned())
            .spawn(move || of_thread.keep_limits())
            .map_err(StoreError::disk("start a thread for", &shared.options.dir))?;
        Ok(Arc::new(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// Evicts until both limits hold again; called when the disk is full and by its own thread.
    pub fn run_now(&self) {
        self.shared.run();
    }

    /// Evicts at least `bytes`, whatever the limits are; returns how much came free. For
    /// whoever was told that the disk is full.
    pub fn make_room(&self, bytes: u64) -> u64 {
        let _running = self.shared.lock_running();
        let evicted = self.shared.evict_for_disk(bytes);
        // What left may have a staging name until then.
        if evicted > 0 {
            self.shared.ledger.ring_barrier();
            self.shared.ledger.restore_reserve();
        }
        evicted
    }

    /// Makes so much room that `bytes` more fit on the disk, for whoever was told that it is full or will be; whether there
    /// is sense in trying.
    ///
    /// Evicts nothing for what would not fit if all that is clean had left. What left may have a staging name and keep
    /// its space until the next barrier: that is waited for if it takes that, and before much is evicted.
    pub fn make_room_for(&self, bytes: u64) -> bool {
        let shared = &self.shared;
        let _running = shared.lock_running();
        let fits = || shared.disk().is_some_and(|disk| disk.free >= bytes);
        let much = bytes > MIN_ROOM;
        let made = if much && shared.run_awaited_barrier() && self.fits_on_disk(bytes) {
            true
        } else if shared.evict_for(bytes) > 0 && fits() {
            shared.ledger.ring_barrier();
            true
        } else {
            shared.run_awaited_barrier() && fits()
        };
        if made {
            shared.ledger.restore_reserve();
        }
        made
    }

    /// Whether `bytes` fit on the disk beside what the index wants free.
    pub fn fits_on_disk(&self, bytes: u64) -> bool {
        let disk = self.shared.disk();
        disk.is_some_and(|disk| disk.free >= bytes.saturating_add(disk.room_of_index))
    }

    /// Whether so many bytes more would be within the limit of the cache's size. Costs nothing.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        let resident = self.shared.ledger.totals().resident_bytes;
        resident.saturating_add(bytes) <= self.shared.options.cache_size
    }

    /// Has the thread look at the limits now. Never waits.
    pub fn kick(&self) {
        self.shared.call().run = true;
        self.shared.called.notify_one();
    }

    pub fn status(&self) -> ReclaimStatus {
        ReclaimStatus {
            evicted_bytes: self.shared.evicted_bytes.load(Ordering::Relaxed),
            evicted_blobs: self.shared.evicted_blobs.load(Ordering::Relaxed),
            stuck: self.shared.stuck.load(Ordering::Relaxed),
        }
    }

    /// Writes down what is kept in memory and ends the thread. The second call does nothing.
    pub fn stop(&self) {
        self.shared.call().stop = true;
        self.shared.called.notify_one();
        let thread = self
            .thread
            .lock()
            .expect("no code panics while it holds the thread")
            .take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            error!("the thread that keeps the cache within its limits had panicked");
        }
    }
}

impl Drop for Reclaimer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn keep_limits(&self) {
        let mut ticks = 0;
        while self.wait() {
            ticks += 1;
            let is_due = ticks % TICKS_PER_SAVE == 0;
            self.save(is_due);
            if is_due {
                self.forget_unwanted();
            }
            self.run();
        }
        self.save(true);
    }

    /// Returns at the next tick or call; false when it is time to stop.
    fn wait(&self) -> bool {
        let call = self.call();
        let (mut call, _) = self
            .called
            .wait_timeout_while(call, TICK, |call| !call.run && !call.stop)
            .expect("no code panics while it holds the call");
        call.run = false;
        !call.stop
    }

    fn call(&self) -> MutexGuard<'_, Call> {
        self.call.lock().expect("no code panics while it holds the call")
    }

    fn lock_running(&self) -> MutexGuard<'_, ()> {
        self.running.lock().expect("no code panics while it evicts")
    }

    fn save(&self, uses: bool) {
        if let Err(err) = self.blobs.save(uses) {
            error!(error = %chain(&err), "cannot write down what is resident and when it was used");
        }
    }

    /// Returns how many bytes come free with the next barrier.
    fn forget_unwanted(&self) -> u64 {
        self.blobs.forget_unwanted().unwrap_or_else(|err| {
            error!(error = %chain(&err), "cannot forget blobs that no file has any more");
            0
        })
    }

    fn run(&self) {
        let _running = self.lock_running();
        let wanted = match self.wanted_bytes() {
            Ok(Wanted { over: 0, short: 0 }) => {
                self.stuck.store(false, Ordering::Relaxed);
                return;
            }
            Ok(wanted) => wanted,
            Err(err) => {
                error!(error = %chain(&err), "cannot tell how full the cache disk is");
                return;
            }
        };
        let mut evicted = self.evict(wanted.over.max(wanted.short));
        // What the cache may take is a limit of blobs alone.
        if evicted < wanted.short {
            evicted += self.objects.clear();
        }
        debug!(?wanted, evicted, "made room in the cache");
        if evicted == 0 && !self.stuck.swap(true, Ordering::Relaxed) {
            warn!(
                wanted = wanted.over.max(wanted.short),
                "the cache is over its limits, and all that is left is dirty, open or pinned"
            );
        }
    }

    /// How many bytes must leave; 0 while a limit holds.
    fn wanted_bytes(&self) -> Result<Wanted, StoreError> {
        let ReclaimOptions {
            dir,
            cache_size,
            min_free,
        } = &self.options;
        let resident = self.ledger.totals().resident_bytes;
        let over = if resident > *cache_size {
            resident - (cache_size - cache_size / SLACK)
        } else {
            0
        };
        let found =
            rustix::fs::statvfs(dir).map_err(|err| StoreError::disk("examine", dir)(io::Error::from(err)))?;
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        // The index's own room is kept whatever was asked for: the kernel writes to staging files
        // by itself, so nobody comes to ask for it.
        let disk = found.f_blocks.saturating_mul(found.f_frsize);
        let least = (*min_free).max(Ledger::room_on(disk));
        let short = if free < least {
            // What is evicted may have a staging name until the next barrier.
            if self.ledger.is_disk_full() {
                self.ledger.ring_barrier();
            }
            least + least / SLACK - free
        } else {
            0
        };
        Ok(Wanted { over, short })
    }

    /// Evicts for [`Reclaimer::make_room_for`]; returns how many bytes.
    fn evict_for(&self, bytes: u64) -> u64 {
        let unwanted = self.evict(0);
        let Some(disk) = self.disk() else { return unwanted };
        let totals = self.ledger.totals();
        let clean = totals.resident_bytes.saturating_sub(totals.dirty_bytes);
        let may_leave = clean.saturating_add(self.objects.bytes());
        if bytes.saturating_sub(disk.free) > may_leave {
            return unwanted;
        }
        // Beside the index's own room: what it needs for the eviction would be taken from it, and names are refused while
        // it has none.
        let wanted = bytes.saturating_add(disk.room_of_index);
        unwanted + self.evict_for_disk(wanted.saturating_sub(disk.free))
    }

    fn disk(&self) -> Option<Disk> {
        match rustix::fs::statvfs(&self.options.dir) {
            Ok(found) => {
                // Only root may use what is kept for root.
                let is_root = rustix::process::geteuid().is_root();
                let blocks = if is_root { found.f_bfree } else { found.f_bavail };
                Some(Disk {
                    free: blocks.saturating_mul(found.f_frsize),
                    room_of_index: Ledger::room_on(found.f_blocks.saturating_mul(found.f_frsize)),
                })
            }
            Err(err) => {
                error!(error = %err, "cannot tell how full the cache disk is");
                None
            }
        }
    }

    /// Runs a barrier if something leaves the disk behind it; whether it did.
    fn run_awaited_barrier(&self) -> bool {
        if !self.ledger.is_barrier_awaited() {
            return false;
        }
        let done = self.ledger.barrier();
        // Those of one that was under way run behind its end.
        self.ledger.wait_for_callbacks(CALLBACKS_WITHIN);
        if let Err(err) = &done {
            // The barrier's own thread tells, once.
            debug!(error = %chain(err), "what nobody needs any more cannot leave the disk yet");
        }
        done.is_ok()
    }

    /// Evicts at least `wanted` bytes if it can, and what no file has any more in any case; returns how many.
    fn evict(&self, wanted: u64) -> u64 {
        // The rows decide who was used least recently.
        self.save(true);
        let mut evicted = self.forget_unwanted();
        if evicted > 0
            && let Err(err) = self.ledger.barrier()
        {
            // Without it they keep their room.
            warn!(error = %chain(&err), "what no file has any more cannot leave the disk yet");
            evicted = 0;
        }
        let mut limit = BATCH;
        while evicted < wanted {
            match self.evict_batch(limit, wanted - evicted) {
                // Those at the head of the list must stay: look further behind.
                Ok((0, true)) => limit = limit.saturating_mul(4),
                Ok((bytes, more)) => {
                    evicted += bytes;
                    if !more {
                        break;
                    }
                }
                Err(err) => {
                    error!(error = %chain(&err), "cannot evict");
                    break;
                }
            }
        }
        evicted
    }

    /// Evicts for a disk that lacks `missing` bytes, and somewhat more. When blobs are not enough, what is kept of catalogs
    /// goes as well.
    fn evict_for_disk(&self, missing: u64) -> u64 {
        let evicted = self.evict(missing.max(MIN_ROOM));
        if evicted < missing.max(1) {
            evicted + self.objects.clear()
        } else {
            evicted
        }
    }

    /// Evicts among the `limit` least recently used; also tells whether there are more.
    fn evict_batch(&self, limit: usize, wanted: u64) -> Result<(u64, bool), StoreError> {
        let rows = self.ledger.victims(limit)?;
        let more = rows.len() == limit;
        let mut candidates = Vec::with_capacity(rows.len());
        for row in rows {
            let bytes = self.ledger.resident_bytes(&row.digest)?;
            candidates.push(Candidate::new(&row, bytes, self.blobs.is_in_use(&row.digest)));
        }
        let mut evicted = 0;
        for victim in choose_victims(candidates, wanted) {
            if let Some(bytes) = self.blobs.evict(&victim.digest)? {
                evicted += bytes;
                self.evicted_bytes.fetch_add(bytes, Ordering::Relaxed);
                self.evicted_blobs.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok((evicted, more))
    }
}
