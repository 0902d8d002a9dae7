//! Which CPUs a thread may run on, and whether it makes way there or comes first.
//!
//! A thread inherits all of that from the one that starts it. Where a thread keeps to one CPU for a while, or comes first,
//! what it starts in that time has to be let go again: see [`remember`] and [`anywhere`].

use std::{
    fs::File,
    io::{Read, Write},
    sync::{OnceLock, mpsc},
};

use rustix::{
    io,
    process::{getpriority_process, setpriority_process},
    thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_setaffinity},
};

/// How threads run that nothing was decided for.
#[derive(Debug)]
struct Usual {
    cpus: CpuSet,
    /// See nice(2).
    nice: i32,
}

static USUAL: OnceLock<Usual> = OnceLock::new();

/// By how much the nice value of a thread that comes first is lower: it gets three times the share of another, and mostly
/// the CPU at once when it wakes.
const FIRST: i32 = 5;

/// Notes how the process runs: as this thread does. To be called before any thread keeps to one CPU or comes first.
pub fn remember() {
    if let (Ok(cpus), Ok(nice)) = (sched_getaffinity(None), getpriority_process(None)) {
        let _ = USUAL.set(Usual { cpus, nice });
    }
}

/// Lets this thread come before others when it wants to run, for one for which programs wait. Does nothing without
/// `CAP_SYS_NICE`, or before [`remember`].
pub fn come_first() {
    if let Some(usual) = USUAL.get() {
        // On Linux a nice value is that of a thread, see setpriority(2).
        let _ = setpriority_process(Some(gettid()), usual.nice - FIRST);
    }
}

/// Lets this thread run wherever the process may; for threads that others start. Does nothing before [`remember`].
pub fn anywhere() {
    if let Some(Usual { cpus, nice }) = USUAL.get() {
        if policy(None) == libc::SCHED_IDLE {
            let _ = set_policy(None, libc::SCHED_OTHER);
        }
        // Those that were taken from the process since are left out by the kernel.
        let _ = sched_setaffinity(None, cpus);
        let _ = setpriority_process(Some(gettid()), *nice);
    }
}

/// The CPU on which a thread of any process ran last; `None` if it ended. Costs some 5 us.
///
/// That is the field `processor` of `/proc/PID/stat`, see proc(5).
#[must_use]
pub fn of_thread(thread: u32) -> Option<usize> {
    stat(thread, |stat| field(stat, 39)?.parse().ok())
}

/// Whether a thread of any process runs, or waits for nothing but a CPU. Costs some 5 us.
///
/// That is the field `state` of `/proc/PID/stat`.
#[must_use]
pub fn is_runnable(thread: u32) -> bool {
    stat(thread, |stat| Some(field(stat, 3)? == "R")).unwrap_or(false)
}

fn stat<T>(thread: u32, read: impl FnOnce(&[u8]) -> Option<T>) -> Option<T> {
    // Without memory of the heap: its lock may be held by a thread that waits for who calls this.
    let (mut path, mut stat) = ([0; 32], [0; 1024]);
    let mut rest = &mut path[..];
    write!(rest, "/proc/{thread}/stat").ok()?;
    let unused = rest.len();
    let path = std::str::from_utf8(&path[..path.len() - unused]).ok()?;
    let len = File::open(path).and_then(|mut file| file.read(&mut stat)).ok()?;
    read(&stat[..len])
}

/// A field of a line of `/proc/PID/stat`, from the third one on, counted from 1; the second one, a name in parentheses, may
/// hold anything.
fn field(stat: &[u8], number: usize) -> Option<&str> {
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let behind = std::str::from_utf8(&stat[name_end + 1..]).ok()?;
    behind.split_ascii_whitespace().nth(number - 3)
}

/// Whether a thread of this process can be made one of `SCHED_IDLE`, see sched(7), and an ordinary one again: that takes
/// `CAP_SYS_NICE` or a limit of nice values, and whoever started the process with another policy wanted that one.
#[must_use]
pub fn can_make_way() -> bool {
    let (tell, told) = mpsc::channel();
    let (end, ends) = mpsc::channel::<()>();
    // It sleeps all the time, and nobody waits for its end: as one of SCHED_IDLE it may not get there soon.
    let sleeper = std::thread::Builder::new().spawn(move || {
        let _ = tell.send(gettid());
        let _ = ends.recv();
    });
    let can = sleeper.is_ok()
        && policy(None) == libc::SCHED_OTHER
        && told.recv().is_ok_and(|thread| {
            set_policy(Some(thread), libc::SCHED_IDLE).is_ok()
                && set_policy(Some(thread), libc::SCHED_OTHER).is_ok()
        });
    drop(end);
    can
}

fn raw(thread: Option<Pid>) -> libc::pid_t {
    Pid::as_raw(thread)
}

fn policy(thread: Option<Pid>) -> i32 {
    // SAFETY: it takes a number and returns one.
    unsafe { libc::sched_getscheduler(raw(thread)) }
}

fn set_policy(thread: Option<Pid>, policy: i32) -> io::Result<()> {
    // SAFETY: all zeros is a value of this struct, whatever fields a platform has.
    let param: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: it reads the struct, which lives until it returns.
    if unsafe { libc::sched_setscheduler(raw(thread), policy, &raw const param) } == -1 {
        return Err(io::Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(io::Errno::PERM));
    }
    Ok(())
}

/// How a thread shares its CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    Fair,
    /// It runs while nothing else wants to (`SCHED_IDLE`). To the scheduler such a CPU is a free one: whom this
    /// thread wakes may be put there, and runs at once.
    Idle,
}

/// Gives a thread of this process that is bound a fair share at once. [`Bound::release`] is still to come.
pub fn share_fairly(thread: Pid) {
    let _ = set_policy(Some(thread), libc::SCHED_OTHER);
}

/// A thread that was bound to one CPU.
#[derive(Debug)]
pub struct Bound {
    thread: Pid,
    cpu: usize,
    share: Share,
    before: CpuSet,
}

impl Bound {
    /// Binds a thread of this process to a CPU that it may use, with a fair share.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a CPU that it may not use; what `sched_setaffinity(2)` reports.
    pub fn new(thread: Pid, cpu: usize) -> io::Result<Self> {
        let before = sched_getaffinity(Some(thread))?;
        if cpu >= CpuSet::MAX_CPU || !before.is_set(cpu) {
            return Err(io::Errno::INVAL);
        }
        let mut only = CpuSet::new();
        only.set(cpu);
        sched_setaffinity(Some(thread), &only)?;
        Ok(Self {
            thread,
            cpu,
            share: Share::Fair,
            before,
        })
    }

    /// From now on it is [`Share::Idle`].
    ///
    /// # Errors
    ///
    /// What `sched_setscheduler(2)` reports.
    pub fn make_way(&mut self) -> io::Result<()> {
        set_policy(Some(self.thread), libc::SCHED_IDLE)?;
        self.share = Share::Idle;
        Ok(())
    }

    #[must_use]
    pub fn thread(&self) -> Pid {
        self.thread
    }

    #[must_use]
    pub fn cpu(&self) -> usize {
        self.cpu
    }

    #[must_use]
    pub fn share(&self) -> Share {
        self.share
    }

    /// Lets the thread run where and as it could before. The caller knows that it still lives.
    pub fn release(self) {
        if self.share == Share::Idle {
            let _ = set_policy(Some(self.thread), libc::SCHED_OTHER);
        }
        let _ = sched_setaffinity(Some(self.thread), &self.before);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rustix::thread::sched_getcpu;

    use super::*;

    fn number(thread: Pid) -> u32 {
        thread.as_raw_nonzero().get().unsigned_abs()
    }

    fn bind(thread: Pid, cpu: usize, share: Share) -> Bound {
        let mut bound = Bound::new(thread, cpu).unwrap();
        if share == Share::Idle {
            bound.make_way().unwrap();
        }
        bound
    }

    #[test]
    fn fields_are_found_behind_any_name() {
        let line = b"7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 100 1000 10 18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 5 0 0 0 0 0\n";
        assert_eq!(field(line, 3), Some("S"));
        assert_eq!(field(line, 39), Some("5"));
        assert_eq!(field(b"7 (a) S 1 2", 39), None);
        assert_eq!(field(b"", 3), None);
    }

    #[test]
    fn a_thread_is_bound_seen_where_it_is_and_let_go() {
        let shares = if can_make_way() {
            &[Share::Fair, Share::Idle][..]
        } else {
            &[Share::Fair]
        };
        std::thread::spawn(move || {
            let mine = gettid();
            let before = sched_getaffinity(None).unwrap();
            for cpu in (0..CpuSet::MAX_CPU).filter(|&cpu| before.is_set(cpu)).take(4) {
                for &share in shares {
                    let bound = bind(mine, cpu, share);
                    assert_eq!(sched_getcpu(), cpu);
                    assert_eq!(of_thread(number(mine)), Some(cpu));
                    assert_eq!((bound.thread(), bound.cpu(), bound.share()), (mine, cpu, share));
                    assert_eq!(policy(None) == libc::SCHED_IDLE, share == Share::Idle);
                    bound.release();
                    assert_eq!(sched_getaffinity(None).unwrap(), before);
                    assert_eq!(policy(None), libc::SCHED_OTHER);
                }
            }
            assert!(Bound::new(mine, CpuSet::MAX_CPU).is_err());
        })
        .join()
        .unwrap();
        assert_eq!(of_thread(0), None);
    }

    #[test]
    fn what_a_bound_thread_starts_is_let_go() {
        remember();
        let (before, share) = (
            sched_getaffinity(None).unwrap(),
            if can_make_way() { Share::Idle } else { Share::Fair },
        );
        std::thread::spawn(move || {
            let cpu = sched_getcpu();
            let bound = bind(gettid(), cpu, share);
            let started = std::thread::spawn(|| {
                anywhere();
                (sched_getaffinity(None).unwrap(), policy(None))
            });
            assert_eq!(started.join().unwrap(), (before, libc::SCHED_OTHER));
            bound.release();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn it_is_seen_whether_a_thread_wants_to_run() {
        assert!(is_runnable(number(gettid())));
        assert!(!is_runnable(0));
        let (tell, told) = mpsc::channel();
        let (go, waits) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(number(gettid())).unwrap();
            let _ = waits.recv();
        });
        let sleeper = told.recv().unwrap();
        let began = Instant::now();
        while is_runnable(sleeper) {
            assert!(began.elapsed() < Duration::from_secs(20));
        }
        drop(go);
        thread.join().unwrap();
    }
}
