//! What the process of a daemon sets up for itself, before any thread starts.

use std::{io, panic};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Arenas of the allocator. By default there may be eight for each core, each
/// keeping what its threads once freed: a burst of large chunks then stays in
/// memory many times over.
const MALLOC_ARENAS: libc::c_int = 4;
/// Allocations from this size on are given back to the kernel when freed. The
/// allocator would raise the limit by itself up to the largest chunk freed.
const MMAP_THRESHOLD: libc::c_int = 1 << 20;
/// An arena grows by this much, and keeps it at its end: the buffers of the network came and went
/// with every chunk, which cost a cold read a sixth of its time in page faults.
const ARENA_STEP: libc::c_int = 4 << 20;

/// Sets up this process; call once, before threads start. What is not allowed
/// to this user is skipped: the daemon works without it.
pub fn set_up() {
    bound_allocator();
    abort_on_panic();
    if let Err(err) = raise_open_files() {
        tracing::warn!(%err, "cannot raise the limit of open files");
    }
    // The kernel must not wait for this mount's dirty pages while it serves
    // this process memory: that is a circle (PR_SET_IO_FLUSHER(2const)).
    if let Err(err) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::debug!(%err, "not marked as an I/O flusher; needs CAP_SYS_RESOURCE");
    }
}

/// Raises the soft limit to the hard one: every open file of a program is one here.
fn raise_open_files() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    )?)
}

fn bound_allocator() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [
        (libc::M_ARENA_MAX, MALLOC_ARENAS),
        (libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD),
        (libc::M_TOP_PAD, ARENA_STEP),
        (libc::M_TRIM_THRESHOLD, 2 * ARENA_STEP),
    ] {
        // SAFETY: mallopt(3) takes two integers and changes settings of the allocator under its own lock.
        unsafe { libc::mallopt(option, value) };
    }
}

/// A panic in a thread that serves the kernel would leave requests without an
/// answer for ever; a process that ends leaves a dead mount, which the next start takes over.
fn abort_on_panic() {
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        before(panic);
        tracing::error!(%panic, "the daemon ends because of an error in itself");
        std::process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_files_are_limited_by_the_hard_limit_only() {
        raise_open_files().unwrap();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
