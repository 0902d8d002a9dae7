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
//!
//! Measured (`scripts/bench`, 2 CPUs, Linux 6.18 on KVM, interleaved runs of creating 10,000 files): 4,470 files a second
//! without, 5,330 with it. By profile a request cost 25 to 40 us while both CPUs went to sleep in between, 8 us when
//! they did not. A second thread that waits undoes most of it, because the kernel wakes that one.
//!
//! # Invariants
//!
//! - Each thread is a reader, answers, or rests; when one rests, there is a reader, or the watch
//!   calls one within [`TICK`] or two.
//! - When a thread of the session ends, none rests any more: the mount is gone.

use std::{
    cell::RefCell,
    fmt, io,
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    thread::{Pid, gettid},
};

use super::follow::{Follow, Place};
use crate::base::cpus::{self, Bound};

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
    /// For the watch.
    watch: Condvar,
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
    /// Threads bound to a CPU; by a thread itself or the watch, under the lock.
    bound: Vec<Bound>,
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
        // The number of a thread that ended may be given to another.
        state.bound.retain(|bound| bound.thread() != gettid());
        drop(state);
        self.0.called.notify_all();
        self.0.watch.notify_all();
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
                follow: Follow::new(now),
                bound: Vec::new(),
            }),
            called: Condvar::new(),
            watch: Condvar::new(),
        });
        let watched = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("fuse-watch".into())
            .spawn(move || watched.watch())?;
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
            }
            is_new
        });
        let mut state = shared.state();
        state.readers -= u32::from(!is_new);
        state.requests += 1;
        state.close = if state.answered.elapsed() < LOOK {
            state.close.saturating_add(1)
        } else {
            0
        };
        if !state.watching {
            state.watching = true;
            shared.watch.notify_all();
        }
        let mut place = if work == Work::Quick {
            let now = Instant::now();
            let is_busy = now < state.not_before;
            state.follow.asked(caller, is_busy, now)
        } else {
            state.follow.leave();
            Place::Anywhere
        };
        if let Place::Find(caller) = place {
            drop(state);
            let cpu = cpus::of_thread(caller);
            state = shared.state();
            place = state.follow.found(caller, cpu, Instant::now());
        }
        state = shared.go_to(place, state);
        let alone = state.readers == 0 && state.resting > state.calls;
        let near = state.follow.is_near();
        drop(state);
        if alone && (work == Work::Long || (!near && shared.is_waiting())) {
            shared.call();
        }
        Turn(shared)
    }
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

    /// Moves this thread. Not under the lock: where it goes it may have to wait for the CPU.
    fn go_to<'a>(&'a self, place: Place, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        if place == Place::Stay || (place == Place::Anywhere && state.bound.is_empty()) {
            return state;
        }
        let mine = THREAD.with(|thread| *thread);
        let bound = state.bound.iter().position(|bound| bound.thread() == mine);
        let before = match (bound, place) {
            (Some(at), Place::On(cpu)) if state.bound[at].cpu() == cpu => return state,
            (None, Place::Anywhere | Place::Stay | Place::Find(_)) => return state,
            (bound, _) => bound.map(|at| state.bound.swap_remove(at)),
        };
        drop(state);
        if let Some(before) = before {
            before.release();
        }
        let Place::On(cpu) = place else {
            return self.state();
        };
        let bound = Bound::new(mine, cpu);
        let mut state = self.state();
        match bound {
            Ok(bound) => {
                state.bound.push(bound);
                // Who went to rest meanwhile is to let it go.
                state.watching = true;
                self.watch.notify_all();
            }
            // A CPU that this process may not use.
            Err(_) => state.follow.give_up(Instant::now()),
        }
        state
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

    /// Calls a reader when the one before takes long.
    fn watch(&self) {
        let mut state = self.state();
        loop {
            while !state.watching && !state.ended {
                state = self.watch.wait(state).expect("a panic ends the process");
            }
            let (mut seen, mut quiet) = (state.requests, 0);
            while state.watching && !state.ended {
                drop(state);
                std::thread::sleep(TICK);
                state = self.state();
                if state.requests != seen {
                    (seen, quiet) = (state.requests, 0);
                    continue;
                }
                if state.readers == 0 && state.resting > state.calls {
                    drop(state);
                    self.call();
                    state = self.state();
                }
                quiet += 1;
                // Whoever asks next may be another one, and this CPU busy.
                state.follow.leave();
                for bound in state.bound.drain(..) {
                    bound.release();
                }
                state.watching = quiet < QUIET_TICKS || (state.readers == 0 && state.resting > state.calls);
            }
            if state.ended {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
        sync::{
            atomic::{AtomicUsize, Ordering},
            mpsc,
        },
        thread::JoinHandle,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    /// Threads that read requests of one byte, as those of a session do.
    struct Session {
        turns: Turns,
        kernel: UnixStream,
        threads: Vec<JoinHandle<()>>,
    }

    impl Session {
        fn start(threads: usize, answer: impl Fn(u8) + Send + Sync + 'static) -> Self {
            Self::asked_by(0, threads, answer)
        }

        /// One whose requests are those of the thread `caller`.
        fn asked_by(caller: u32, threads: usize, answer: impl Fn(u8) + Send + Sync + 'static) -> Self {
            let (kernel, device) = UnixStream::pair().unwrap();
            let turns = Turns::start().unwrap();
            turns.read_from(device.try_clone().unwrap().into());
            let answer = Arc::new(answer);
            let threads = (0..threads)
                .map(|_| {
                    let (turns, answer) = (turns.clone(), Arc::clone(&answer));
                    let mut device = device.try_clone().unwrap();
                    std::thread::spawn(move || {
                        let mut request = [0];
                        while device.read(&mut request).unwrap() == 1 {
                            let work = if request[0] == b'l' {
                                Work::Long
                            } else {
                                Work::Quick
                            };
                            let _turn = turns.take(work, caller);
                            answer(request[0]);
                        }
                    })
                })
                .collect();
            Self {
                turns,
                kernel,
                threads,
            }
        }

        fn send(&mut self, requests: &[u8]) {
            self.kernel.write_all(requests).unwrap();
        }

        /// Takes the mount away: every thread must end, also those that rest.
        fn end(self) {
            drop(self.kernel);
            let began = Instant::now();
            for thread in self.threads {
                while !thread.is_finished() {
                    assert!(
                        began.elapsed() < LIMIT,
                        "a thread rests although the mount is gone"
                    );
                    std::thread::sleep(Duration::from_millis(1));
                }
                thread.join().unwrap();
            }
        }
    }

    #[test]
    fn every_request_is_answered_once_and_one_thread_waits_for_the_next() {
        let (done, answers) = mpsc::channel();
        let mut session = Session::start(4, move |request| done.send(request).unwrap());
        for round in 0..500 {
            session.send(&[b'q', b'l', b'q'][..=round % 3]);
            for _ in 0..=round % 3 {
                answers.recv_timeout(LIMIT).unwrap();
            }
        }
        let began = Instant::now();
        loop {
            let state = session.turns.shared.state();
            assert_eq!(state.requests, 499 + 500);
            let called = state.resting - state.calls;
            if called + state.readers == 4 && state.readers >= 1 {
                break;
            }
            drop(state);
            assert!(began.elapsed() < LIMIT, "{:?}", session.turns.shared.state());
            std::thread::yield_now();
        }
        session.end();
        assert!(answers.try_recv().is_err());
    }

    #[test]
    fn a_thread_that_takes_longer_than_was_thought_holds_up_nobody() {
        let (go, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let (done, answers) = mpsc::channel();
        let mut session = Session::start(3, move |request| {
            if request == b'h' {
                held.lock().unwrap().recv_timeout(LIMIT).unwrap();
            }
            done.send(request).unwrap();
        });
        // So that all have taken a request, and all but one rest.
        for _ in 0..50 {
            session.send(b"q");
            answers.recv_timeout(LIMIT).unwrap();
        }
        session.send(b"h");
        for _ in 0..50 {
            session.send(b"q");
            assert_eq!(answers.recv_timeout(LIMIT).unwrap(), b'q');
        }
        go.send(()).unwrap();
        assert_eq!(answers.recv_timeout(LIMIT).unwrap(), b'h');
        session.end();
    }

    #[test]
    fn requests_that_wait_are_answered_at_the_same_time() {
        let both = Arc::new(std::sync::Barrier::new(2));
        let answered = Arc::new(AtomicUsize::new(0));
        let (meet, count) = (Arc::clone(&both), Arc::clone(&answered));
        let mut session = Session::start(2, move |_| {
            meet.wait();
            count.fetch_add(1, Ordering::SeqCst);
        });
        for round in 1..=20 {
            session.send(b"qq");
            let began = Instant::now();
            while answered.load(Ordering::SeqCst) < 2 * round {
                assert!(began.elapsed() < LIMIT, "the second request waits for the first");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        session.end();
    }

    #[test]
    fn who_answers_on_busy_cpus_goes_to_the_caller_and_is_let_go_when_all_is_quiet() {
        let mine = gettid().as_raw_nonzero().get().unsigned_abs();
        let (done, answers) = mpsc::channel();
        let mut session = Session::asked_by(mine, 2, move |request| done.send(request).unwrap());
        let shared = Arc::clone(&session.turns.shared);
        let bound = |state: &State| state.bound.iter().map(Bound::cpu).collect::<Vec<_>>();
        // On idle ones it does not.
        for _ in 0..100 {
            session.send(b"q");
            answers.recv_timeout(LIMIT).unwrap();
        }
        let began = Instant::now();
        while bound(&shared.state()).is_empty() {
            assert!(began.elapsed() < LIMIT, "{:?}", shared.state());
            let mut state = shared.state();
            state.not_before = Instant::now() + LIMIT;
            drop(state);
            session.send(b"q");
            answers.recv_timeout(LIMIT).unwrap();
        }
        let began = Instant::now();
        while !bound(&shared.state()).is_empty() {
            assert!(
                began.elapsed() < LIMIT,
                "a thread stays bound: {:?}",
                shared.state()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        session.end();
    }
}
