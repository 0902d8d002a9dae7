//! Room on the cache disk for what programs ask for: what is clean leaves before one of them hears that the disk is full.
//!
//! Only what is done here passes by: a file that the kernel was lent it writes by itself, and programs learn of a full disk
//! from it. For those the limits are looked at every second ([`crate::store::reclaim`]).

use super::{Vfs, VfsError};

/// How often the same thing is tried, at the most: others take of the room that is made.
const TRIES: u32 = 4;

impl Vfs {
    /// Does what needs so many bytes more of the disk; when that is full and something can leave, again.
    ///
    /// `needed` is asked after each failure, which may have used what was free. No lock is held but an
    /// [`OpenNode`](super::handle::OpenNode)'s: it may take as long as a barrier.
    pub(super) fn with_room<T, E>(
        &self,
        needed: impl Fn() -> u64,
        mut act: impl FnMut() -> Result<T, E>,
    ) -> Result<T, VfsError>
    where
        VfsError: From<E>,
    {
        for _ in 1..TRIES {
            match act().map_err(VfsError::from) {
                Err(err) if matches!(err.errno(), libc::ENOSPC | libc::EDQUOT) => {
                    if !self.store.reclaimer.make_room_for(needed()) {
                        return Err(err);
                    }
                }
                done => return done,
            }
        }
        Ok(act()?)
    }

    /// As [`Self::with_room`], for what takes all that is free before it fails: then nothing would be left for the
    /// index, without which nothing can be evicted.
    pub(super) fn with_room_first<T, E>(
        &self,
        needed: impl Fn() -> u64,
        act: impl FnMut() -> Result<T, E>,
    ) -> Result<T, VfsError>
    where
        VfsError: From<E>,
    {
        let bytes = needed();
        if bytes > 0 && !self.store.reclaimer.fits_on_disk(bytes) {
            // If it is not enough, the disk has the last word: it may have more of it than is known here.
            self.store.reclaimer.make_room_for(bytes);
        }
        self.with_room(needed, act)
    }
}
