//! Turning a staging file into a blob: is it quiet, and what is its name?

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::PathBuf,
};

use rustix::fs::Advice;

use super::{
    StoreError,
    lease::{Lease, LeaseKind, with_lease},
};
use crate::base::chunk::{self, Sliced};

/// What looking at a staging file before sealing it found.
#[derive(Debug, PartialEq, Eq)]
pub enum Quiet {
    /// Nobody can write to it any more, but through this daemon.
    Yes { size: u64, mtime: i64 },
    /// A writable descriptor or mapping lives, perhaps of a program that outlived the last daemon.
    No,
}

/// Asks the kernel whether a writer of `file` (opened read-only) lives, by
/// taking a read lease for a moment (`fcntl(2)`, `F_SETLEASE`).
///
/// A file system without leases (some network file systems) answers neither yes nor no. There the answer
/// is `Yes`, because nobody else can have the file open: a file is lent to the
/// kernel only where [`knows_leases`], so every writer is a handle of the caller.
pub fn is_quiet(file: &File) -> Result<Quiet, StoreError> {
    let look = || file.metadata();
    let found = match with_lease(file, LeaseKind::NoWriter, look) {
        Ok(Lease::Granted(found)) => Ok(found),
        Ok(Lease::Refused) => return Ok(Quiet::No),
        Ok(Lease::Unsupported) => file.metadata(),
        Err(err) => Err(err),
    };
    let found = found.map_err(|err| StoreError::disk("examine", &path_of(file))(err))?;
    Ok(Quiet::Yes {
        size: found.len(),
        mtime: found.mtime() * 1_000_000_000 + found.mtime_nsec(),
    })
}

/// Whether the file system of `file` (opened read-only) tells who has a file open: where it does not, no
/// staging file may be lent to the kernel.
pub fn knows_leases(file: &File) -> bool {
    matches!(
        with_lease(file, LeaseKind::NoWriter, || Ok(())),
        Ok(Lease::Granted(()) | Lease::Refused)
    )
}

/// Hashes and chunks a quiet file. Does not wait for the network; burns a core.
///
/// Reads from the start whatever the position of `file` is, and leaves that alone.
pub fn slice_file(file: &File) -> Result<Sliced, StoreError> {
    // Advice only: without it the kernel reads ahead less.
    let _ = rustix::fs::fadvise(file, 0, None, Advice::Sequential);
    chunk::slice(FromStart { file, at: 0 }).map_err(|err| StoreError::disk("read", &path_of(file))(err))
}

struct FromStart<'a> {
    file: &'a File,
    at: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// The path of an open file, for an error; a place in `/proc` when the kernel does not say.
fn path_of(file: &File) -> PathBuf {
    let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    std::fs::read_link(&link).unwrap_or(link)
}
