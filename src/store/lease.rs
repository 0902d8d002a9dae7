//! Asking the kernel who else has a file open, by taking a lease for a moment (`fcntl(2)`).
//!
//! - [`LeaseKind::NoWriter`] (`F_RDLCK`, on a read-only descriptor) is granted
//!   exactly while no descriptor and no mapping can write to the file.
//! - [`LeaseKind::NobodyElse`] (`F_WRLCK`) is granted exactly while this is the
//!   only open file description, mappings included.
//!
//! Both count what outlives us: a mapping made through the kernel's
//! passthrough, a descriptor of a program that survived the last daemon.
//!
//! Whoever opens the file while the lease is held waits until it is given up,
//! some microseconds later, and the kernel sends the holder a signal, by default
//! `SIGIO`, which would end the daemon. So the signal of each such
//! descriptor is set to `SIGURG` first, whose default is to be ignored.

use std::{fs::File, io, os::fd::AsRawFd};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LeaseKind {
    NoWriter,
    NobodyElse,
}

/// What became of asking for a lease.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lease<T> {
    /// It was granted, and this was found while it was held.
    Granted(T),
    /// Someone has the file open.
    Refused,
    /// The file system knows no leases.
    Unsupported,
}

/// `linux/fcntl.h`; the `libc` crate leaves it out for most targets.
const F_SETSIG: libc::c_int = 10;

/// Takes a lease on `file`, runs `look`, and gives the lease up.
pub(super) fn with_lease<T>(
    file: &File,
    kind: LeaseKind,
    look: impl FnOnce() -> io::Result<T>,
) -> io::Result<Lease<T>> {
    fcntl(file, F_SETSIG, libc::SIGURG)?;
    let kind = match kind {
        LeaseKind::NoWriter => libc::F_RDLCK,
        LeaseKind::NobodyElse => libc::F_WRLCK,
    };
    if let Err(err) = fcntl(file, libc::F_SETLEASE, kind) {
        return match err.raw_os_error() {
            Some(libc::EAGAIN) => Ok(Lease::Refused),
            Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS) => Ok(Lease::Unsupported),
            _ => Err(err),
        };
    }
    let found = look();
    fcntl(file, libc::F_SETLEASE, libc::F_UNLCK)?;
    found.map(Lease::Granted)
}

fn fcntl(file: &File, command: libc::c_int, argument: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as `file` is borrowed; both
    // commands take an integer and touch no memory of ours.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::*;

    #[test]
    fn another_descriptor_refuses_the_lease_of_the_only_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"bytes").unwrap();
        let file = File::open(&path).unwrap();
        let ask = || with_lease(&file, LeaseKind::NobodyElse, || Ok(())).unwrap();
        assert_eq!(ask(), Lease::Granted(()));
        let other = File::open(&path).unwrap();
        assert_eq!(ask(), Lease::Refused);
        drop(other);
        assert_eq!(ask(), Lease::Granted(()));
    }

    #[test]
    fn an_open_during_the_lease_waits_and_does_not_end_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"bytes").unwrap();
        let file = File::open(&path).unwrap();
        let opener = with_lease(&file, LeaseKind::NoWriter, || {
            let path = path.clone();
            let opener = thread::spawn(move || File::options().write(true).open(path).is_ok());
            // The open has been told to wait once the kernel wants the lease back.
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while !breaking(&file) && std::time::Instant::now() < deadline {
                thread::yield_now();
            }
            assert!(breaking(&file) && !opener.is_finished());
            Ok(opener)
        });
        let Lease::Granted(opener) = opener.unwrap() else {
            panic!("nobody else has it open");
        };
        assert!(opener.join().unwrap());
    }

    /// `F_GETLEASE` answers what the lease is being broken down to.
    fn breaking(file: &File) -> bool {
        // SAFETY: the descriptor is open; the command takes no argument.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) == libc::F_UNLCK }
    }
}
