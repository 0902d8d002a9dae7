//! Which CPUs a thread may run on.
//!
//! A thread inherits the CPUs of the one that starts it. Where a thread keeps to one CPU for a while, what it
//! starts in that time has to be let go again: see [`remember`] and [`anywhere`].

use std::{fs::File, io::Read, sync::OnceLock};

use rustix::{
    io,
    thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity},
};

static OF_THE_PROCESS: OnceLock<CpuSet> = OnceLock::new();

/// Notes which CPUs the process may use: those of this thread. To be called before any thread keeps to one.
pub fn remember() {
    if let Ok(cpus) = sched_getaffinity(None) {
        let _ = OF_THE_PROCESS.set(cpus);
    }
}

/// Lets this thread run wherever the process may; for threads that others start. Does nothing before [`remember`].
pub fn anywhere() {
    if let Some(cpus) = OF_THE_PROCESS.get() {
        // Those that were taken from the process since are left out by the kernel.
        let _ = sched_setaffinity(None, cpus);
    }
}

/// The CPU on which a thread of any process ran last; `None` if it ended. Costs some 5 us.
///
/// That is the field `processor` of `/proc/PID/stat`, see proc(5).
#[must_use]
pub fn of_thread(thread: u32) -> Option<usize> {
    let mut stat = [0; 1024];
    let len = File::open(format!("/proc/{thread}/stat"))
        .and_then(|mut file| file.read(&mut stat))
        .ok()?;
    processor(&stat[..len])
}

/// The 39th field of a line of `/proc/PID/stat`; the second one, a name in parentheses, may hold anything.
fn processor(stat: &[u8]) -> Option<usize> {
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let behind = std::str::from_utf8(&stat[name_end + 1..]).ok()?;
    behind.split_ascii_whitespace().nth(39 - 3)?.parse().ok()
}

/// A thread that was bound to one CPU.
#[derive(Debug)]
pub struct Bound {
    thread: Pid,
    cpu: usize,
    before: CpuSet,
}

impl Bound {
    /// Binds a thread of this process to a CPU that it may use.
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
        Ok(Self { thread, cpu, before })
    }

    #[must_use]
    pub fn thread(&self) -> Pid {
        self.thread
    }

    #[must_use]
    pub fn cpu(&self) -> usize {
        self.cpu
    }

    /// Lets the thread run where it could before. The caller knows that it still lives.
    pub fn release(self) {
        let _ = sched_setaffinity(Some(self.thread), &self.before);
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::{gettid, sched_getcpu};

    use super::*;

    #[test]
    fn the_processor_is_found_behind_any_name() {
        let line = b"7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 100 1000 10 18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 5 0 0 0 0 0\n";
        assert_eq!(processor(line), Some(5));
        assert_eq!(processor(b"7 (a) S 1 2"), None);
        assert_eq!(processor(b""), None);
    }

    #[test]
    fn a_thread_is_bound_seen_where_it_is_and_let_go() {
        std::thread::spawn(|| {
            let mine = gettid();
            let before = sched_getaffinity(None).unwrap();
            for cpu in (0..CpuSet::MAX_CPU).filter(|&cpu| before.is_set(cpu)).take(4) {
                let bound = Bound::new(mine, cpu).unwrap();
                assert_eq!(sched_getcpu(), cpu);
                assert_eq!(of_thread(mine.as_raw_nonzero().get() as u32), Some(cpu));
                assert_eq!((bound.thread(), bound.cpu()), (mine, cpu));
                bound.release();
                assert_eq!(sched_getaffinity(None).unwrap(), before);
            }
            assert!(Bound::new(mine, CpuSet::MAX_CPU).is_err());
        })
        .join()
        .unwrap();
        assert_eq!(of_thread(0), None);
    }
}
