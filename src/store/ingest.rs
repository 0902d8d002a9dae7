//! Turning a staging file into a blob: is it quiet, and what is its name?

use std::fs::File;

use super::StoreError;
use crate::base::chunk::Sliced;

/// What looking at a staging file before sealing it found.
#[derive(Debug)]
pub enum Quiet {
    /// Nobody can write to it any more, but through this daemon.
    Yes { size: u64, mtime: i64 },
    /// A writable descriptor or mapping lives, perhaps of a program that outlived the last daemon.
    No,
}

/// Asks the kernel whether a writer of `file` (opened read-only) lives, by
/// taking a read lease for a moment (`fcntl(2)`, `F_SETLEASE`).
pub fn is_quiet(file: &File) -> Result<Quiet, StoreError> {
    let _ = file;
    todo!()
}

/// Hashes and chunks a quiet file. Does not wait for the network; burns a core.
pub fn slice_file(file: &File) -> Result<Sliced, StoreError> {
    let _ = file;
    todo!()
}
