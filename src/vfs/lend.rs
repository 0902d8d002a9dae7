//! Lending files to the kernel, which then reads and writes them by itself (FUSE passthrough).
//!
//! A file is lent by a descriptor that can only read: the kernel opens it anew for each open, as that one asks.
//! The vfs knows neither the kernel nor its numbers; it gives the front a file and keeps what that makes of it ([`Loan`]).

use std::{fs::File, io};

use super::{Vfs, VfsError, handle::Loan};
use crate::store::{
    blobs::{Blob, FileId},
    error::chain,
    rows::{Ino, StagingId},
};

/// Hands a file to the kernel; fails where the kernel does not want it.
pub type Lend<'a> = Option<&'a (dyn Fn(&File) -> io::Result<Loan> + 'a)>;

/// A sealed file of at most this length is not lent to the kernel, which keeps its pages instead (`keep_cache`).
///
/// To lend one costs opening it twice, two leases and two calls of the kernel, at each open: 14 us of 36 for open, read
/// 16 KiB and close, where nothing else is done. A first read costs one request more than of a lent file,
/// some 6 us; every later one is the kernel's alone in both cases. As long as what travels in packs.
pub(super) const KEPT_BYTES: u64 = 64 << 10;

impl Vfs {
    /// Lends a staging file to the kernel, if it takes it: by a descriptor that cannot write.
    ///
    /// The kernel opens the file anew for each open, and keeps what it was lent for as long as the loan lasts;
    /// in a dead mount for as long as a program is anywhere in that. A descriptor that can write
    /// would count as a writer and keep the file from being sealed all the time.
    pub(super) fn lend_staging(
        &self,
        id: StagingId,
        lend: &dyn Fn(&File) -> io::Result<Loan>,
    ) -> Option<Loan> {
        let file = self.store.staging.open(id, false);
        let file = file.inspect_err(|err| tracing::debug!(error = %chain(err), "a file is not lent"));
        lent(lend(&file.ok()?))
    }
}

/// Lends a blob's file to the kernel, if nobody else has it and the kernel takes it.
pub(super) fn lend_blob(
    blob: &Blob,
    ino: Ino,
    lend: &dyn Fn(&File) -> io::Result<Loan>,
) -> Result<Option<(Loan, FileId)>, VfsError> {
    let Some(file) = blob.lend(ino)? else {
        return Ok(None);
    };
    let Some(loan) = lent(lend(&file)) else {
        blob.give_back(ino);
        return Ok(None);
    };
    Ok(Some((loan, FileId::of(&file)?)))
}

/// A file that the kernel does not take is served by the daemon.
pub(super) fn lent(result: io::Result<Loan>) -> Option<Loan> {
    result
        .inspect_err(|err| tracing::debug!(error = %err, "the kernel does not take the file"))
        .ok()
}
