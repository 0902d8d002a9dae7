//! Space kept aside, so that a full disk does not stop the index: without the
//! index nothing could be evicted or removed, and the disk would stay full.
//!
//! The file `reserve` is allocated and never written. It is removed when a change that may not be refused, or the
//! index itself, finds the disk full. From then on until there is room to set the space aside again,
//! changes that make the tree grow are refused, so that they do not use it up.

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use rustix::fs::FallocateFlags;

/// Holds the rows of some 100,000 files.
const MAX_BYTES: u64 = 64 << 20;

/// The part of the whole disk that is kept aside at the most.
const SHARE: u64 = 64;

/// How many reserves have to be free before one is taken.
const ROOM: u64 = 2;

#[derive(Debug)]
pub struct Reserve {
    path: PathBuf,
    held: AtomicBool,
    /// It was given back, and there was no room for another one since.
    used: AtomicBool,
    /// One at a time makes the file.
    restoring: Mutex<()>,
}

impl Reserve {
    /// Takes over what is there, or sets space aside. Without room for it there is none for now.
    pub fn open(dir: &Path) -> Self {
        let path = dir.join("reserve");
        let held = AtomicBool::new(path.exists());
        let used = AtomicBool::new(false);
        let reserve = Self {
            path,
            held,
            used,
            restoring: Mutex::default(),
        };
        reserve.restore();
        reserve
    }

    /// Gives the space back. False when there was none.
    pub fn release(&self) -> bool {
        let held = self.held.swap(false, Relaxed);
        if held {
            self.used.store(true, Relaxed);
            tracing::warn!("the cache disk is full; using the index's reserve");
        }
        held && fs::remove_file(&self.path).is_ok()
    }

    /// Whether the disk was found full, and has no room for the reserve yet.
    pub fn is_used(&self) -> bool {
        self.used.load(Relaxed)
    }

    /// Sets space aside again, when there is room.
    pub fn restore(&self) {
        let _restoring = self.restoring.lock().expect("no code panics while it restores");
        if self.held.load(Relaxed) {
            return;
        }
        match self.allocate() {
            Ok(true) => {
                self.held.store(true, Relaxed);
                self.used.store(false, Relaxed);
            }
            Ok(false) => {}
            Err(err) => {
                // A file system that cannot allocate has no reserve; that is all.
                tracing::debug!(path = %self.path.display(), %err, "no reserve for the index");
                let _ = fs::remove_file(&self.path);
            }
        }
    }

    /// How much of a disk of so many bytes has to be free for the reserve to be set aside.
    pub fn room_on(disk_bytes: u64) -> u64 {
        ROOM * bytes_on(disk_bytes)
    }

    fn allocate(&self) -> std::io::Result<bool> {
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let disk = rustix::fs::statvfs(dir)?;
        let bytes = bytes_on(disk.f_blocks * disk.f_frsize);
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

fn bytes_on(disk_bytes: u64) -> u64 {
    MAX_BYTES.min(disk_bytes / SHARE)
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
        assert!(!reserve.release() && reserve.is_used());
        reserve.restore();
        assert!(!reserve.is_used());
        assert!(path.exists());
        assert!(reserve.release());
    }
}
