//! Threads that take turns at requests of one byte, through a socket.

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

/// Sends requests until the thread that answers them is near the caller with this share; returns its CPU.
fn until_near(session: &mut Session, answers: &mpsc::Receiver<u8>, share: Share) -> usize {
    let shared = Arc::clone(&session.turns.shared);
    let began = Instant::now();
    loop {
        let mut state = shared.state();
        if let Some(near) = state.near.as_ref().filter(|near| near.bound.share() == share) {
            let idle = shared.idle.load(Ordering::Relaxed);
            assert_eq!(idle != 0, share == Share::Idle);
            assert!(idle == 0 || idle == Pid::as_raw(Some(near.bound.thread())));
            return near.bound.cpu();
        }
        assert!(began.elapsed() < LIMIT, "{state:?}");
        let now = Instant::now();
        state.not_before = if share == Share::Fair { now + LIMIT } else { now };
        drop(state);
        session.send(b"q");
        answers.recv_timeout(LIMIT).unwrap();
    }
}

fn caller() -> u32 {
    gettid().as_raw_nonzero().get().unsigned_abs()
}

#[test]
fn who_answers_goes_to_the_caller_and_is_let_go_when_all_is_quiet() {
    let (done, answers) = mpsc::channel();
    let mut session = Session::asked_by(caller(), 2, move |request| done.send(request).unwrap());
    let shared = Arc::clone(&session.turns.shared);
    for share in [Share::Fair, Share::Idle] {
        if share == Share::Idle && !cpus::can_make_way() {
            continue;
        }
        until_near(&mut session, &answers, share);
        let began = Instant::now();
        while shared.state().near.is_some() {
            assert!(
                began.elapsed() < LIMIT,
                "a thread stays bound: {:?}",
                shared.state()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(shared.idle.load(Ordering::Relaxed), 0);
        // The next one begins a row of its own.
        shared.state().follow.leave();
    }
    session.end();
}

/// Takes a CPU, and does not give it back until this is dropped.
struct Taker {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Taker {
    /// Returns when it has the CPU for the first time.
    fn of(cpu: usize) -> Self {
        let (end, runs) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (ends, tells) = (Arc::clone(&end), Arc::clone(&runs));
        let thread = std::thread::spawn(move || {
            cpus::anywhere();
            let _bound = Bound::new(gettid(), cpu).unwrap();
            tells.store(true, Ordering::Relaxed);
            while !ends.load(Ordering::Relaxed) {}
        });
        let began = Instant::now();
        while !runs.load(Ordering::Relaxed) {
            assert!(began.elapsed() < LIMIT);
            std::thread::yield_now();
        }
        let thread = Some(thread);
        Self { end, thread }
    }
}

impl Drop for Taker {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What would hold up a thread that makes way for others as long as they like: while it answers.
#[test]
fn a_reader_that_makes_way_is_helped_when_others_take_its_cpu() {
    if !cpus::can_make_way() {
        return;
    }
    cpus::remember();
    let (tell, told) = mpsc::channel();
    let (done, answers) = mpsc::channel();
    let mut session = Session::asked_by(caller(), 2, move |request| {
        if request == b't' {
            tell.send(Taker::of(rustix::thread::sched_getcpu())).unwrap();
        }
        done.send(request).unwrap();
    });
    let shared = Arc::clone(&session.turns.shared);
    let began = Instant::now();
    // The thread may be let go before it has that request, if this one has to wait for a CPU.
    while !shared.state().follow.has_starved() {
        assert!(began.elapsed() < LIMIT, "{:?}", shared.state());
        until_near(&mut session, &answers, Share::Idle);
        session.send(b"t");
        let taker = told.recv_timeout(LIMIT).unwrap();
        assert_eq!(answers.recv_timeout(LIMIT).unwrap(), b't');
        drop(taker);
    }
    session.end();
}

/// While it is about to take a request.
#[test]
fn a_reader_that_makes_way_is_helped_when_it_does_not_get_to_the_next_request() {
    if !cpus::can_make_way() {
        return;
    }
    cpus::remember();
    let (done, answers) = mpsc::channel();
    let mut session = Session::asked_by(caller(), 2, move |request| done.send(request).unwrap());
    let shared = Arc::clone(&session.turns.shared);
    let began = Instant::now();
    while !shared.state().follow.has_starved() {
        assert!(began.elapsed() < LIMIT, "{:?}", shared.state());
        let cpu = until_near(&mut session, &answers, Share::Idle);
        let taker = Taker::of(cpu);
        session.send(b"q");
        assert_eq!(answers.recv_timeout(LIMIT).unwrap(), b'q');
        drop(taker);
    }
    session.end();
}

#[test]
fn the_watch_gets_the_lock_from_a_reader_that_makes_way() {
    if !cpus::can_make_way() {
        return;
    }
    let turns = Turns::start().unwrap();
    let (shared, cpu) = (Arc::clone(&turns.shared), rustix::thread::sched_getcpu());
    let (locked, is_locked) = mpsc::channel();
    let holder = {
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut bound = Bound::new(gettid(), cpu).unwrap();
            let mut state = shared.state();
            shared.idle.store(Pid::as_raw(Some(gettid())), Ordering::Release);
            bound.make_way().unwrap();
            state.near = Some(Near {
                bound,
                request: Some(1),
            });
            locked.send(()).unwrap();
            let began = Instant::now();
            while policy_is_idle() && began.elapsed() < LIMIT {}
            let helped = !policy_is_idle();
            drop(state);
            helped
        })
    };
    is_locked.recv_timeout(LIMIT).unwrap();
    let state = shared.state_for_watch();
    assert!(state.near.is_none() && state.follow.has_starved(), "{state:?}");
    drop(state);
    assert!(holder.join().unwrap());
    Member(shared);
}

#[test]
fn a_lock_that_is_held_for_long_by_who_makes_no_way_is_nobodys_fault() {
    let turns = Turns::start().unwrap();
    let shared = Arc::clone(&turns.shared);
    let state = shared.state();
    let watch = {
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || shared.state_for_watch().follow.has_starved())
    };
    std::thread::sleep(20 * LOCK_TICKS * TICK);
    drop(state);
    assert!(!watch.join().unwrap());
    Member(shared);
}

fn policy_is_idle() -> bool {
    // SAFETY: it takes a number and returns one.
    unsafe { libc::sched_getscheduler(0) == libc::SCHED_IDLE }
}
