//! One thread waits for the next request while the others rest, and it does not go to sleep at once.
//!
//! A program that asks one thing after the other waits for each answer. When all threads wait in `read(2)`, each
//! request wakes another one, mostly on a CPU that went to sleep as well; on a virtual machine that takes
//! longer than most answers. So a request is taken by the thread that gave the last answer:
//!
//! - It becomes the reader again, unless there is one; who finds one rests until it is called.
//! - While requests follow each other closely the reader looks for the next a little before it goes to sleep, as
//!   hypervisors do before they halt; not while another program wants its CPU.
//! - A thread that begins to answer calls another one as reader when more requests wait already, or
//!   when what it begins may take long. A watch calls one when a thread took longer than anybody thought.
//! - While the requests are those of one thread that waits for each answer, the reader runs on that one's CPU (see
//!   [`super::follow`]), does not look before it sleeps, and calls nobody for a request that waits: it is
//!   the next one of the same program, and the one before was a RELEASE.
//! - Such a reader makes way for whatever else runs there. Should that be not the program that waits for it, but another
//!   one, the watch gives it its share back within [`TICK`] or two, or three when it holds the lock.
//!
//! - Threads that answer come before others ([`cpus::come_first`]): a program that waits for an answer while the CPUs are
//!   busy with compilers would otherwise wait for their time slices, too (a millisecond or more of some requests in a hundred).
//!
//! Measured (`scripts/bench`, 2 CPUs, Linux 6.18 on KVM, interleaved runs of creating 10,000 files): 4,470 files a second
//! without, 5,330 with it. By profile a request cost 25 to 40 us while both CPUs went to sleep in between, 8 us when
//! they did not. A second thread that waits undoes most of it, because the kernel wakes that one.
//! Builds with ccache, all hits, two at a time: 121 ms, 115 when threads that answer come first (94 on ext4; medians of 15 rounds,
//! interleaved); no difference for one that creates files. At a nice value of -20 eight threads that create files are a third
//! slower: each is answered before the next one asks, and so is each wake-up.
//!
//! # Invariants
//!
//! - Each thread is a reader, answers, or rests; when one rests, there is a reader, or the watch
//!   calls one within [`TICK`] or two.
//! - When a thread of the session ends, none rests any more: the mount is gone.
//! - A thread that makes way is named where the watch finds it without the lock, from before it does until it is let go. It
//!   starts no threads, which would make way as well and be found by nobody.

use std::{
    cell::RefCell,
    fmt, io,
    os::fd::OwnedFd,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, TryLockError,
        atomic::{AtomicBool, AtomicI32, Ordering},
    },
    thread::Thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    thread::{Pid, gettid},
};

use super::follow::{Follow, Place, Spot};
use crate::base::cpus::{self, Bound, Share};

/// How long a reader looks for the next request before it sleeps.
const LOOK: Duration = Duration::from_micros(50);

/// How many requests in a row must have come within [`LOOK`] of the answer before them.
const CLOSE: u32 = 8;

/// A yield that takes longer gave the CPU to another program.
const TAKEN: Duration = Duration::from_micros(10);

/// How long no reader looks after the CPU was taken.
const RESPECT: Duration = Duration::from_millis(10);

/// How often the watch looks whether somebody reads, while requests come.
const TICK: Duration = Duration::from_millis(1);

/// So many ticks the watch waits for the lock, which is held for less than a microsecond by who runs.
const LOCK_TICKS: u32 = 2;

/// After so many ticks without a request the watch rests, too.
const QUIET_TICKS: u32 = 20;

/// How the threads of one session take turns.
#[derive(Clone, Debug)]
pub(super) struct Turns {
    shared: Arc<Shared>,
}

struct Shared {
    /// Readable when a request waits; known once the mount is there.
    device: OnceLock<OwnedFd>,
    state: Mutex<State>,
    /// For those who rest.
    called: Condvar,
    /// Unparked when there is something to watch.
    watch: OnceLock<Thread>,
    /// The thread that is [`Share::Idle`], or 0. For the watch when that one may hold the lock.
    idle: AtomicI32,
    /// A program waits for an answer of the thread that is near it, which has not begun to give it.
    owes: AtomicBool,
}

#[derive(Debug)]
struct State {
    /// Threads in `read(2)`, or on their way, that were here before.
    readers: u32,
    resting: u32,
    /// Those who rest and were called; they are readers already.
    calls: u32,
    /// Requests so far.
    requests: u64,
    /// When the last answer was given.
    answered: Instant,
    /// Requests in a row that came closely after the answer before them.
    close: u32,
    /// No reader looks before this: another program wants its CPU.
    not_before: Instant,
    watching: bool,
    ended: bool,
    follow: Follow,
    near: Option<Near>,
}

/// The thread that is bound to the CPU of a program. It binds itself; the lock is held where anybody lets it go.
#[derive(Debug)]
struct Near {
    bound: Bound,
    /// The request that it has, by its number.
    request: Option<u64>,
}

/// Whether a request may take long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Quick,
    /// Quick, but for its many bytes, which the program may use while more are brought.
    Bulk,
    Long,
}

thread_local! {
    /// Of a thread that took a request before.
    static MEMBER: RefCell<Option<Member>> = const { RefCell::new(None) };
}

/// Tells the others when its thread ends.
struct Member(Arc<Shared>);

thread_local! {
    /// This thread, without a system call for each request.
    static THREAD: Pid = gettid();
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.ended = true;
        // It must not wait for the CPU to end, and its number may be given to another thread.
        if state.mine().is_some() {
            self.0.let_go(&mut state);
        }
        drop(state);
        self.0.called.notify_all();
        self.0.wake_watch();
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Turns {
    /// For the threads of one session.
    pub(super) fn start() -> io::Result<Self> {
        cpus::remember();
        let now = Instant::now();
        let shared = Arc::new(Shared {
            device: OnceLock::new(),
            state: Mutex::new(State {
                readers: 0,
                resting: 0,
                calls: 0,
                requests: 0,
                answered: now,
                close: 0,
                not_before: now,
                watching: false,
                ended: false,
                follow: Follow::new(cpus::can_make_way(), now),
                near: None,
            }),
            called: Condvar::new(),
            watch: OnceLock::new(),
            idle: AtomicI32::new(0),
            owes: AtomicBool::new(false),
        });
        let watched = Arc::clone(&shared);
        let watch = std::thread::Builder::new()
            .name("fuse-watch".into())
            .spawn(move || watched.watch())?;
        let _ = shared.watch.set(watch.thread().clone());
        Ok(Self { shared })
    }

    /// Sets where requests come from: only then does a reader look for the next one.
    pub(super) fn read_from(&self, device: OwnedFd) {
        let _ = self.shared.device.set(device);
    }

    /// To be held while a request is answered, for which the thread `caller` waits (0: nobody).
    pub(super) fn take(&self, work: Work, caller: u32) -> Turn<'_> {
        let shared = &*self.shared;
        let is_new = MEMBER.with_borrow_mut(|member| {
            let is_new = member.is_none();
            if is_new {
                *member = Some(Member(Arc::clone(&self.shared)));
                cpus::come_first();
            }
            is_new
        });
        let mut state = shared.state();
        state.readers -= u32::from(!is_new);
        state.requests += 1;
        let now = Instant::now();
        let gap = now.saturating_duration_since(state.answered);
        state.close = if gap < LOOK {
            state.close.saturating_add(1)
        } else {
            0
        };
        if !state.watching {
            state.watching = true;
            shared.wake_watch();
        }
        let request = state.requests;
        if let Some(near) = state.mine() {
            near.request = Some(request);
            shared.owes.store(caller != 0, Ordering::Relaxed);
        }
        let is_busy = now < state.not_before;
        let mut place = if work == Work::Quick {
            state.follow.asked(caller, is_busy, gap, now)
        } else {
            state.follow.leave();
            Place::Anywhere
        };
        if let Place::Find(caller) = place {
            drop(state);
            let cpu = cpus::of_thread(caller);
            state = shared.state();
            place = state.follow.found(caller, cpu, is_busy, Instant::now());
        }
        state = shared.go_to(place, request, state);
        let alone = state.readers == 0 && state.resting > state.calls;
        let near = state.follow.is_near();
        drop(state);
        if alone && (work == Work::Long || (!near && shared.is_waiting())) {
            shared.call();
        }
        Turn(shared)
    }
}

/// The thread begins to answer its request: from now on the program may run that waits for it.
pub(super) fn answering() {
    MEMBER.with_borrow(|member| {
        if let Some(Member(shared)) = member
            && shared.idle.load(Ordering::Relaxed) == Pid::as_raw(Some(THREAD.with(|thread| *thread)))
        {
            shared.owes.store(false, Ordering::Relaxed);
        }
    });
}

/// A request that is being answered; dropped after the answer.
#[derive(Debug)]
pub(super) struct Turn<'a>(&'a Shared);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.done();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a panic ends the process")
    }

    /// Moves this thread, which has the request of this number. Not under the lock: where it goes it may have to wait for the
    /// CPU.
    fn go_to<'a>(
        &'a self,
        place: Place,
        request: u64,
        mut state: MutexGuard<'a, State>,
    ) -> MutexGuard<'a, State> {
        if place == Place::Stay || (place == Place::Anywhere && state.near.is_none()) {
            return state;
        }
        let near = state.mine().map(|near| Spot {
            cpu: near.bound.cpu(),
            share: near.bound.share(),
        });
        let Place::On(spot) = place else {
            if near.is_some() {
                self.let_go(&mut state);
            }
            return state;
        };
        if near == Some(spot) {
            return state;
        }
        self.let_go(&mut state);
        drop(state);
        let mine = THREAD.with(|thread| *thread);
        let bound = Bound::new(mine, spot.cpu);
        let mut state = self.state();
        // Another thread that did the same meanwhile.
        self.let_go(&mut state);
        let bound = match bound {
            Ok(bound) if !state.ended => bound,
            Ok(bound) => {
                bound.release();
                return state;
            }
            // A CPU that this process may not use.
            Err(_) => {
                state.follow.give_up(Instant::now());
                return state;
            }
        };
        // All is known to the watch before this thread makes way.
        self.owes.store(true, Ordering::Relaxed);
        if spot.share == Share::Idle {
            self.idle.store(Pid::as_raw(Some(mine)), Ordering::Release);
        }
        let near = state.near.insert(Near {
            bound,
            request: Some(request),
        });
        if spot.share == Share::Idle && near.bound.make_way().is_err() {
            self.let_go(&mut state);
            state.follow.give_up(Instant::now());
        }
        // Who went to rest meanwhile is to let it go.
        state.watching = true;
        self.wake_watch();
        state
    }

    fn wake_watch(&self) {
        if let Some(watch) = self.watch.get() {
            watch.unpark();
        }
    }

    /// Lets go of the thread that is near somebody.
    fn let_go(&self, state: &mut State) {
        if let Some(near) = state.near.take() {
            self.idle.store(0, Ordering::Release);
            near.bound.release();
        }
    }

    /// Whether a request waits, or the mount is gone.
    fn is_waiting(&self) -> bool {
        let Some(device) = self.device.get() else {
            return true;
        };
        let mut device = [PollFd::new(device, PollFlags::IN)];
        // An error, too, is for the next read to tell.
        poll(&mut device, Some(&Timespec::default())) != Ok(0)
    }

    /// Makes one who rests a reader, if there is none.
    fn call(&self) {
        let mut state = self.state();
        if state.readers == 0 && state.resting > state.calls {
            state.calls += 1;
            state.readers += 1;
            drop(state);
            self.called.notify_one();
        }
    }

    fn done(&self) {
        let mut state = self.state();
        let now = Instant::now();
        state.answered = now;
        if let Some(near) = state.mine() {
            near.request = None;
        }
        if state.readers > 0 && !state.ended {
            state.resting += 1;
            while state.calls == 0 && !state.ended {
                state = self.called.wait(state).expect("a panic ends the process");
            }
            state.resting -= 1;
            if state.calls > 0 {
                state.calls -= 1;
            } else {
                state.readers += 1;
            }
            return;
        }
        state.readers += 1;
        let look = state.close >= CLOSE && now >= state.not_before && !state.follow.is_near();
        drop(state);
        if look {
            self.look(now);
        }
    }

    /// Looks for the next request for a moment.
    fn look(&self, began: Instant) {
        while !self.is_waiting() {
            let before = Instant::now();
            if before - began >= LOOK {
                return;
            }
            std::thread::yield_now();
            let now = Instant::now();
            if now - before >= TAKEN {
                self.state().not_before = now + RESPECT;
                return;
            }
        }
    }

    /// Calls a reader when the one before takes long, and helps one that made way for others for too long.
    fn watch(&self) {
        // Before those that wait for its help.
        cpus::come_first();
        loop {
            let mut state = self.state_for_watch();
            if state.ended {
                self.let_go(&mut state);
                return;
            }
            if !state.watching {
                drop(state);
                std::thread::park();
                continue;
            }
            let (mut seen, mut quiet, mut held) = (state.requests, 0, None);
            while state.watching && !state.ended {
                drop(state);
                std::thread::sleep(TICK);
                state = self.state_for_watch();
                let request = state.near.as_ref().and_then(|near| near.request);
                let before = std::mem::replace(&mut held, request);
                if request.is_some() && request == before {
                    self.help(&mut state);
                }
                if state.requests != seen {
                    (seen, quiet) = (state.requests, 0);
                    continue;
                }
                // Whoever asks next may be another one, and this CPU busy.
                self.help(&mut state);
                if state.readers == 0 && state.resting > state.calls {
                    state.calls += 1;
                    state.readers += 1;
                    self.called.notify_one();
                }
                quiet += 1;
                state.watching = quiet < QUIET_TICKS || (state.readers == 0 && state.resting > state.calls);
            }
        }
    }

    /// Lets go of the thread that is near somebody, if there is one. It may wait for the CPU because the program that it gave
    /// the answer uses it, which is as it should be; or because another one does, or itself: then the program waits, too.
    fn help(&self, state: &mut State) {
        let caller = state.follow.caller();
        state.follow.leave();
        let Some(near) = &state.near else { return };
        let thread = near.bound.thread().as_raw_nonzero().get().unsigned_abs();
        let starves = near.bound.share() == Share::Idle
            && cpus::is_runnable(thread)
            && (self.owes.load(Ordering::Relaxed) || (self.is_waiting() && !cpus::is_runnable(caller)));
        self.let_go(state);
        if starves {
            let now = Instant::now();
            state.follow.starved(now);
            state.not_before = now + RESPECT;
        }
    }

    /// The state, also if the thread that has it locked waits for the CPU because it makes way for others.
    fn state_for_watch(&self) -> MutexGuard<'_, State> {
        for _ in 0..LOCK_TICKS {
            match self.state.try_lock() {
                Ok(state) => return state,
                Err(TryLockError::WouldBlock) => std::thread::sleep(TICK),
                Err(TryLockError::Poisoned(_)) => break,
            }
        }
        let Some(thread) = Pid::from_raw(self.idle.load(Ordering::Acquire)) else {
            // Who has it makes no way: he is only slow.
            return self.state();
        };
        cpus::share_fairly(thread);
        let mut state = self.state();
        self.let_go(&mut state);
        state.follow.starved(Instant::now());
        state
    }
}

impl State {
    /// If this thread is the one that is near somebody.
    fn mine(&mut self) -> Option<&mut Near> {
        let near = self.near.as_mut()?;
        (near.bound.thread() == THREAD.with(|thread| *thread)).then_some(near)
    }
}

#[cfg(test)]
#[path = "turns_tests.rs"]
mod tests;
