//! Sealing: files that were closed and have rested become blobs.
//!
//! A file is hashed without any lock; a writer that comes meanwhile makes the
//! result worthless, and the tree says so ([`Tree::finish_seal`]). The kernel is asked
//! first whether a writer lives that this daemon does not know of
//! ([`ingest::is_quiet`]): a mapping that outlived its descriptor, or a program that outlived
//! the daemon before this one. Such a file is looked at again later.
//!
//! [`Tree::finish_seal`]: crate::namespace::tree::Tree::finish_seal

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, HashSet},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{Vfs, VfsError, close::is_left_over, count, handle::Serving, open::change_time};
use crate::{
    namespace::{
        TreeError,
        tree::{Notice, SealOutcome},
    },
    store::{
        StoreError,
        error::chain,
        ingest::{self, Quiet},
        rows::{Content, Ino, NodeRow, Residency, StagingId},
    },
};

/// How long a file that is not quiet, or could not be sealed, is left alone.
const RETRY: Duration = Duration::from_secs(2);

/// Between two files of a thread while programs keep the daemon busy: many small ones would
/// otherwise take a core from them.
const BUSY_PAUSE: Duration = Duration::from_millis(4);
/// How much later than asked for a file may be sealed because of that.
const MAX_LATE: Duration = Duration::from_secs(3);

/// How long a deleted file can still be opened by a program that looked it up before.
const LIMBO: Duration = Duration::from_secs(2);

/// How often deleted files are looked at.
const SWEEP: Duration = Duration::from_secs(1);

/// Files hashed at once. Hashing keeps a core busy; more than a few would take
/// the machine from the build that it is there for.
const MAX_THREADS: usize = 4;

/// Files that wait to be sealed.
#[derive(Debug, Default)]
pub(super) struct Settling {
    state: Mutex<State>,
    /// Something is due earlier than it was, or the end has come.
    wake: Condvar,
    end: Condvar,
    /// A file was sealed or given up.
    pub(super) progress: tokio::sync::Notify,
    /// Closes between the end of their writer and the begin of their rest.
    closing: AtomicUsize,
}

/// A close that will put its file to rest in a moment.
pub(super) struct ClosingGuard<'a>(&'a AtomicUsize);

impl Drop for ClosingGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Debug, Default)]
struct State {
    due: HashMap<Ino, Instant>,
    /// The same in order of time; entries that `due` does not confirm are stale.
    order: BinaryHeap<Reverse<(Instant, Ino)>>,
    sealing: HashSet<Ino>,
    /// Files found to have a writer that this daemon does not know of.
    unquiet: HashSet<Ino>,
    /// Somebody waits for these to be sealed.
    hurried: HashSet<Ino>,
    stopped: bool,
}

impl Settling {
    /// Seals `ino` when `rest` has passed, and not before.
    pub(super) fn rest(&self, ino: Ino, rest: Duration) {
        self.put(ino, Instant::now() + rest);
    }

    fn put(&self, ino: Ino, due: Instant) {
        let mut state = self.lock();
        let is_first = state.order.peek().is_none_or(|Reverse((first, _))| due < *first);
        state.unquiet.remove(&ino);
        state.due.insert(ino, due);
        state.order.push(Reverse((due, ino)));
        // Whoever waits for the first looks at the others then: a wake-up for each close would cost
        // as much as the close.
        if is_first {
            self.wake.notify_all();
        }
    }

    pub(super) fn closing(&self) -> ClosingGuard<'_> {
        self.closing.fetch_add(1, Ordering::SeqCst);
        ClosingGuard(&self.closing)
    }

    /// Whether every close that ended its writer has put its file to rest.
    pub(super) fn all_at_rest(&self) -> bool {
        self.closing.load(Ordering::SeqCst) == 0
    }

    /// Ends the rest of every file.
    pub(super) fn hurry(&self) {
        let mut state = self.lock();
        let now = Instant::now();
        let inos: Vec<Ino> = state.due.keys().copied().collect();
        // Each is asked anew.
        state.unquiet.clear();
        state.hurried.extend(&inos);
        for ino in inos {
            state.due.insert(ino, now);
            state.order.push(Reverse((now, ino)));
        }
        self.wake.notify_all();
    }

    /// Whether there is time: nobody waits for a file, and none has waited long.
    fn has_time(&self) -> bool {
        let state = self.lock();
        let late = state
            .order
            .peek()
            .is_some_and(|Reverse((due, _))| due.elapsed() > MAX_LATE);
        state.hurried.is_empty() && !late
    }

    /// Files that are not sealed yet.
    pub(super) fn waiting(&self) -> HashSet<Ino> {
        let state = self.lock();
        state.due.keys().chain(&state.sealing).copied().collect()
    }

    /// Those of them that somebody unknown may still write to.
    pub(super) fn unquiet(&self) -> HashSet<Ino> {
        self.lock().unquiet.clone()
    }

    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.wake.notify_all();
        self.end.notify_all();
    }

    /// Waits for the end, for at most `within`; whether it has come.
    fn stopped_within(&self, within: Duration) -> bool {
        let state = self.lock();
        let (state, _) = self
            .end
            .wait_timeout_while(state, within, |state| !state.stopped)
            .expect("a panic ends the process");
        state.stopped
    }

    /// Waits for the next file whose rest is over; `None` at the end.
    fn next(&self) -> Option<Ino> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return None;
            }
            let now = Instant::now();
            let wait = match state.order.peek() {
                None => None,
                Some(&Reverse((due, ino)))
                    if state.due.get(&ino) != Some(&due) || state.sealing.contains(&ino) =>
                {
                    state.order.pop();
                    // Closed again while it is sealed: that sealing will be overtaken and put it back.
                    continue;
                }
                Some(&Reverse((due, ino))) if due <= now => {
                    state.order.pop();
                    state.due.remove(&ino);
                    state.sealing.insert(ino);
                    return Some(ino);
                }
                Some(&Reverse((due, _))) => Some(due - now),
            };
            state = match wait {
                None => self.wake.wait(state).expect("a panic ends the process"),
                Some(wait) => {
                    self.wake
                        .wait_timeout(state, wait)
                        .expect("a panic ends the process")
                        .0
                }
            };
        }
    }

    fn done(&self, ino: Ino, end: End) {
        let mut state = self.lock();
        state.sealing.remove(&ino);
        state.hurried.remove(&ino);
        if end == End::Unquiet {
            state.unquiet.insert(ino);
        } else {
            state.unquiet.remove(&ino);
        }
        let again = match end {
            End::Sealed | End::NotNeeded => state.due.get(&ino).copied(),
            // Not before the rest that a close since then began.
            End::Unquiet | End::Failed => {
                let retry = Instant::now() + RETRY;
                Some(state.due.get(&ino).map_or(retry, |&due| due.max(retry)))
            }
        };
        if let Some(due) = again {
            state.due.insert(ino, due);
            state.order.push(Reverse((due, ino)));
            self.wake.notify_all();
        }
        drop(state);
        self.progress.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a panic ends the process")
    }
}

/// What an attempt to seal a file came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Sealed,
    /// It is gone, open for writing (its close asks again), or sealed already.
    NotNeeded,
    /// Somebody unknown may write to it.
    Unquiet,
    /// To be tried again.
    Failed,
}

impl Vfs {
    /// Starts the threads that seal; they end with [`Vfs::shutdown`].
    pub(super) fn start_sealing(self: &Arc<Self>) {
        let threads = thread::available_parallelism()
            .map_or(1, usize::from)
            .min(MAX_THREADS);
        for number in 0..threads {
            let vfs = Arc::clone(self);
            thread::Builder::new()
                .name(format!("seal-{number}"))
                .spawn(move || {
                    while let Some(ino) = vfs.settling.next() {
                        let end = vfs.seal(ino).unwrap_or_else(|err| {
                            if matches!(&err, VfsError::Tree(TreeError::Store(StoreError::Full))) {
                                // Whatever the limits are: without room nothing is ever sealed.
                                vfs.store.reclaimer.make_room(0);
                            }
                            tracing::warn!(ino = ino.0, error = %chain(&err), "cannot seal a file, trying again");
                            End::Failed
                        });
                        vfs.settling.done(ino, end);
                        if vfs.options.activity.is_busy()
                            && vfs.settling.has_time()
                            && !vfs.store.ledger.is_disk_full()
                        {
                            vfs.settling.stopped_within(BUSY_PAUSE);
                        }
                    }
                })
                .expect("a thread can be started while the daemon starts");
        }
    }

    /// Starts the thread that drops what lost its last name.
    pub(super) fn start_sweeping(self: &Arc<Self>) {
        let vfs = Arc::clone(self);
        let sweep = move || {
            let mut asked = false;
            while !vfs.settling.stopped_within(SWEEP) {
                vfs.ask_who_lists(&mut asked);
                match vfs.tree.sweep(LIMBO) {
                    Ok(staging) => vfs.discard(staging),
                    Err(err) => {
                        tracing::warn!(error = %chain(&err), "cannot drop deleted files, trying again");
                    }
                }
            }
        };
        thread::Builder::new()
            .name("sweep".to_owned())
            .spawn(sweep)
            .expect("a thread can be started while the daemon starts");
    }

    /// Ends sealing; what is unsealed is resumed by the next start.
    pub fn shutdown(&self) {
        self.settling.stop();
    }

    fn seal(&self, ino: Ino) -> Result<End, VfsError> {
        let Some(node) = self.tree.node(ino)? else {
            return Ok(End::NotNeeded);
        };
        let Content::Staging(id) = node.content else {
            return Ok(End::NotNeeded);
        };
        if !self.tree.begin_seal(ino, id)? {
            return Ok(End::NotNeeded);
        }
        let end = self.seal_begun(&node, id);
        if !matches!(end, Ok(End::Sealed)) {
            self.tree.abort_seal(ino, !matches!(end, Ok(End::Unquiet)));
        }
        end
    }

    fn seal_begun(&self, node: &NodeRow, id: StagingId) -> Result<End, VfsError> {
        let file = self.store.staging.open(id, false)?;
        let Quiet::Yes { size, mtime } = ingest::is_quiet(&file)? else {
            return Ok(End::Unquiet);
        };
        if (size, mtime) != (node.size, node.mtime) {
            // Somebody wrote after the last close, through a mapping for example: a change of its own.
            let mut notices = self.tree.closed(node.ino, size, mtime, change_time(&file)?)?;
            notices.push(Notice::Attributes { ino: node.ino });
            self.tell(notices);
        }
        let sliced = ingest::slice_file(&file)?;
        let blob = (sliced.digest, sliced.chunks.size());
        // Bytes that take the place of others must be on the disk first; better waited for here
        // than by everyone, with the tree locked.
        if self
            .store
            .ledger
            .blob(&sliced.digest)?
            .is_some_and(|row| row.residency != Residency::Nothing)
        {
            file.sync_data()?;
        }
        let finish = || {
            let link = || self.store.blobs.seal(id, &sliced);
            self.tree
                .finish_seal(node.ino, id, blob, link, || self.store.staging.sealed(id))
        };
        let (outcome, notices) = finish()?;
        self.tell(notices);
        match outcome {
            // A file that lost its last name goes with its staging file like any other.
            SealOutcome::Overtaken | SealOutcome::Refused => Ok(End::NotNeeded),
            SealOutcome::Sealed => {
                count(&self.counters.sealed);
                self.drop_name_unless_open(node.ino, id);
                self.on_seal();
                Ok(End::Sealed)
            }
        }
    }

    /// Readers who have the staging file open keep its name for a writer to come, see
    /// [`super::close`]; else it goes.
    fn drop_name_unless_open(&self, ino: Ino, id: StagingId) {
        let open = self.nodes.get(ino);
        let kept = open.as_ref().is_some_and(
            |open| matches!(open.lock().serving, Serving::Staging { id: served, .. } if served == id),
        );
        if let Some(open) = open {
            self.nodes.release(ino, &open, |open| open.lock().handles == 0);
        }
        // A writer that came at once may have made it the file's own again.
        if !kept && is_left_over(id, &self.tree.node(ino)) {
            self.store.staging.remove_after_barrier(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEALED: Ino = Ino(7);

    #[test]
    fn what_is_closed_again_while_it_is_sealed_rests_as_long_as_any_other() {
        for end in [End::Unquiet, End::Failed, End::NotNeeded] {
            let settling = Settling::default();
            settling.rest(SEALED, Duration::ZERO);
            assert_eq!(settling.next(), Some(SEALED));
            let rest = RETRY * 100;
            let closed = Instant::now();
            settling.rest(SEALED, rest);
            settling.done(SEALED, end);
            let due = settling.lock().due[&SEALED];
            assert!(due >= closed + rest, "{end:?}: its rest was cut short");
        }
    }

    #[test]
    fn what_cannot_be_sealed_is_tried_again_soon() {
        for end in [End::Unquiet, End::Failed] {
            let settling = Settling::default();
            settling.rest(SEALED, Duration::ZERO);
            assert_eq!(settling.next(), Some(SEALED));
            settling.done(SEALED, end);
            let due = settling.lock().due[&SEALED];
            assert!(due <= Instant::now() + RETRY);
        }
    }
}
