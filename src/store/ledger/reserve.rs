//! Space kept aside, so that a full disk does not stop the index at once: without
//! the index nothing could be evicted, and the disk would stay full.
//!
//! The file `reserve` is allocated and never written. It is removed when the journal or the index finds
//! the disk full, and made again, by a barrier, when there is room.

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::fs::FallocateFlags;

/// Holds the rows of some 100,000 files.
const MAX_BYTES: u64 = 64 << 20;

/// The part of the whole disk that is kept aside at the most.
const SHARE: u64 = 128;

/// How many reserves have to be free before one is taken.
const ROOM: u64 = 4;

#[derive(Debug)]
pub struct Reserve {
    path: PathBuf,
    held: AtomicBool,
}

impl Reserve {
    /// Takes over what is there, or sets space aside. Without room for it there is none for now.
    pub fn open(dir: &Path) -> Self {
        let path = dir.join("reserve");
        let held = AtomicBool::new(path.exists());
        let reserve = Self { path, held };
        reserve.restore();
        reserve
    }

    /// Gives the space back. False when there was none.
    pub fn release(&self) -> bool {
        let held = self.held.swap(false, Ordering::Relaxed);
        if held {
            tracing::warn!("the cache disk is full; using the index's reserve");
        }
        held && fs::remove_file(&self.path).is_ok()
    }

    /// Sets space aside again, when there is room.
    pub fn restore(&self) {
        if self.held.load(Ordering::Relaxed) {
            return;
        }
        match self.allocate() {
            Ok(done) => self.held.store(done, Ordering::Relaxed),
            Err(err) => {
                // A file system that cannot allocate has no reserve; that is all.
                tracing::debug!(path = %self.path.display(), %err, "no reserve for the index");
                let _ = fs::remove_file(&self.path);
            }
        }
    }

    fn allocate(&self) -> std::io::Result<bool> {
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let disk = rustix::fs::statvfs(dir)?;
        let bytes = MAX_BYTES.min(disk.f_blocks * disk.f_frsize / SHARE);
        if disk.f_bavail * disk.f_frsize < ROOM * bytes || bytes == 0 {
            return Ok(false);
        }
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&self.path)?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_space_is_given_once_and_set_aside_again() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::open(dir.path());
        let path = dir.path().join("reserve");
        assert!(fs::metadata(&path).unwrap().len() > 0);
        assert!(Reserve::open(dir.path()).release());
        assert!(!path.exists());
        reserve.release();
        assert!(!reserve.release());
        reserve.restore();
        assert!(path.exists());
        assert!(reserve.release());
    }
}
