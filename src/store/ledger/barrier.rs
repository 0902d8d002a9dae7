//! When rows and bytes are made to survive power loss, and the threads that see to it.
//!
//! # A barrier
//!
//! 1. The journal goes on in a new file; `cut` is the last record before it.
//! 2. The index absorbs everything.
//! 3. `syncfs(2)` of the cache directory's file system: the bytes of blobs and staging files, their names,
//!    the journal and the index.
//! 4. `cut` is noted in the index, and the note synced.
//! 5. Journal files before the new one are removed, and callbacks run.
//!
//! A crash between any two of these steps costs nothing but the barrier.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use super::{Core, Ledger, LedgerOptions};
use crate::store::{StoreError, record::Redo};

/// A journal file of this size makes the barrier come early.
pub const MAX_JOURNAL_BYTES: u64 = 64 << 20;

type Callback = Box<dyn FnOnce() + Send>;

/// What waits for a barrier.
#[derive(Default)]
pub struct Callbacks {
    waiting: Mutex<Waiting>,
    /// Rung when a barrier's callbacks have run.
    run: Condvar,
}

#[derive(Default)]
struct Waiting {
    next: Vec<Callback>,
    /// How many are of a barrier that is under way.
    under_way: usize,
}

impl std::fmt::Debug for Callbacks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let waiting = self.waiting();
        write!(f, "{} and {} callbacks", waiting.next.len(), waiting.under_way)
    }
}

impl Callbacks {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting
            .lock()
            .expect("no code panics while it holds the callbacks")
    }

    fn take(&self) -> Vec<Callback> {
        let mut waiting = self.waiting();
        let taken = std::mem::take(&mut waiting.next);
        waiting.under_way += taken.len();
        taken
    }

    /// Runs what was taken, behind its barrier.
    fn run(&self, taken: Vec<Callback>) {
        let count = taken.len();
        for callback in taken {
            callback();
        }
        self.waiting().under_way -= count;
        self.run.notify_all();
    }

    /// For the next barrier, because there was none.
    fn give_back(&self, taken: Vec<Callback>) {
        let mut waiting = self.waiting();
        waiting.under_way -= taken.len();
        waiting.next.splice(0..0, taken);
        self.run.notify_all();
    }
}

/// Wakes a thread, or ends it.
#[derive(Debug, Default)]
pub struct Bell {
    state: Mutex<BellState>,
    rung: Condvar,
}

#[derive(Debug, Default)]
struct BellState {
    rung: bool,
    ended: bool,
}

impl Bell {
    fn state(&self) -> std::sync::MutexGuard<'_, BellState> {
        self.state.lock().expect("no code panics while it holds a bell")
    }

    pub fn ring(&self) {
        self.state().rung = true;
        self.rung.notify_all();
    }

    fn end(&self) {
        self.state().ended = true;
        self.rung.notify_all();
    }

    /// Waits for a ring, `timeout` at the most. False: the thread shall end.
    fn wait(&self, timeout: Duration) -> bool {
        let mut state = self
            .rung
            .wait_timeout_while(self.state(), timeout, |state| !state.rung && !state.ended)
            .expect("no code panics while it holds a bell")
            .0;
        state.rung = false;
        !state.ended
    }
}

impl Core {
    pub fn barrier(&self) -> Result<(), StoreError> {
        // One at a time. Callbacks are taken first: all that was committed
        // before they were given is then before the cut.
        let mut last = self.barrier_seq.lock().expect("no code panics in a barrier");
        let callbacks = self.callbacks.take();
        let outcome = match self.run_barrier(*last) {
            Err(StoreError::Full) if self.layers.reserve.release() => self.run_barrier(*last),
            other => other,
        };
        match outcome {
            Ok(cut) => {
                *last = cut;
                drop(last);
                self.callbacks.run(callbacks);
                Ok(())
            }
            Err(err) => {
                self.callbacks.give_back(callbacks);
                Err(err)
            }
        }
    }

    fn run_barrier(&self, last: u64) -> Result<u64, StoreError> {
        if self.journal.tail().seq() == last {
            return Ok(last);
        }
        let (number, cut) = self.journal.rotate()?;
        self.layers.absorb_all()?;
        rustix::fs::syncfs(&self.root)
            .map_err(|err| StoreError::disk("sync the file system of", &self.dir)(err.into()))?;
        match self.layers.writer().as_mut() {
            Some(writer) => writer.record_barrier(cut)?,
            None => return Err(super::closed()),
        }
        self.journal.settled(number, cut)?;
        Ok(cut)
    }

    fn run_absorber(&self, every: Duration) {
        let mut failing = false;
        while self.absorber.wait(every) {
            let outcome = self.layers.absorb();
            match &outcome {
                Err(err) if !failing => {
                    tracing::error!(
                        err = err as &dyn std::error::Error,
                        "the index takes no changes; trying on"
                    );
                }
                Ok(()) if failing => tracing::info!("the index takes changes again"),
                _ => {}
            }
            failing = outcome.is_err();
            self.layers.reserve.restore();
        }
    }

    fn run_barriers(&self, every: Duration) {
        while self.barriers.wait(every) {
            if let Err(err) = self.barrier() {
                tracing::error!(
                    err = &err as &dyn std::error::Error,
                    "no barrier: what was written lately would not survive power loss"
                );
            }
        }
    }
}

impl Ledger {
    /// Returns when everything committed before the call survives power loss;
    /// all who wait share one barrier.
    ///
    /// This covers rows. Who wants the bytes of a staging file to survive as well syncs the file first, then
    /// commits [`SyncedStaging`](crate::store::rows::Change::SyncedStaging), then calls this.
    pub fn sync(&self) -> Result<(), StoreError> {
        // After a failed sync of the journal only the way through the index is left.
        self.core
            .journal
            .sync()
            .or_else(|err| self.core.barrier().map_err(|_| err))
    }

    /// Makes all that was committed, and the bytes that it speaks of, survive
    /// power loss now. Slow: it waits for every dirty page of the file system.
    pub fn barrier(&self) -> Result<(), StoreError> {
        self.core.barrier()
    }

    /// Runs `callback` after the next barrier that covers everything committed before this call, on
    /// the barrier's thread; never when the daemon dies before. In the order they were given.
    pub fn after_barrier(&self, callback: Box<dyn FnOnce() + Send>) {
        self.core.callbacks.waiting().next.push(callback);
    }

    /// Whether something is done after the next barrier, or after one that is under way.
    pub fn is_barrier_awaited(&self) -> bool {
        let waiting = self.core.callbacks.waiting();
        !waiting.next.is_empty() || waiting.under_way > 0
    }

    /// Waits, `timeout` at the most, until what barriers so far are waited for is done. Not to be called by what is.
    pub fn wait_for_callbacks(&self, timeout: Duration) {
        let callbacks = &self.core.callbacks;
        let waited = callbacks
            .run
            .wait_timeout_while(callbacks.waiting(), timeout, |waiting| waiting.under_way > 0);
        drop(waited.expect("no code panics while it holds the callbacks"));
    }

    pub(super) fn spawn(core: &Arc<Core>, options: &LedgerOptions) -> Result<Self, StoreError> {
        let thread = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(run);
            spawned.map_err(StoreError::disk("start the threads of", &core.dir))
        };
        let (absorb_every, barrier_every) = (options.absorb_every, options.barrier_every);
        let ledger = Self {
            threads: Mutex::default(),
            core: Arc::clone(core),
        };
        let runner = Arc::clone(core);
        let absorber = thread("absorber", Box::new(move || runner.run_absorber(absorb_every)))?;
        ledger.threads().push(absorber);
        let runner = Arc::clone(core);
        let barriers = thread("barrier", Box::new(move || runner.run_barriers(barrier_every)))?;
        ledger.threads().push(barriers);
        Ok(ledger)
    }

    fn threads(&self) -> std::sync::MutexGuard<'_, Vec<std::thread::JoinHandle<()>>> {
        self.threads
            .lock()
            .expect("no code panics while it holds the threads")
    }

    /// Ends the threads, after what they are in the middle of.
    pub(super) fn stop(&self) {
        self.core.absorber.end();
        self.core.barriers.end();
        let me = std::thread::current().id();
        for thread in std::mem::take(&mut *self.threads()) {
            // A callback may hold the last reference to the ledger.
            if thread.thread().id() != me && thread.join().is_err() {
                tracing::error!("a thread of the ledger died");
            }
        }
    }

    /// Absorbs the journal and makes everything durable. Later commits fail; closing twice is harmless.
    ///
    /// # Errors
    ///
    /// The first failure; nothing is lost, the next start replays the journal.
    pub fn close(&self) -> Result<(), StoreError> {
        self.stop();
        if !self.core.journal.tail().is_closed() {
            let exact = self.core.numbers.exact();
            self.core.commit(vec![Redo::Ceilings(exact)])?;
            self.core.journal.tail().close();
        }
        // Once more for callbacks that callbacks gave.
        self.core.barrier()?;
        self.core.barrier()?;
        self.core.layers.close();
        Ok(())
    }
}

/// A ledger that is dropped without [`Ledger::close`] is left as a crash would
/// leave it: nothing is absorbed, and the next start replays the journal.
impl Drop for Ledger {
    fn drop(&mut self) {
        self.stop();
    }
}
