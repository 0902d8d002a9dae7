//! Objects of catalogs that are kept whole on this disk, so that no look-up waits for the bucket.
//!
//! # Format (version 1)
//!
//! ```text
//! <cache-dir>/catalogs/<64 hex>          an object's bytes as they are in the bucket; the name is their SHA-256
//! <cache-dir>/catalogs/<64 hex>.<n>new   the same, being written
//! ```
//!
//! # Invariants
//!
//! - Bytes that are not those of their name are never given: what is found to be so is removed.
//! - Nothing here is needed. Any of it may be gone at any time, and the bucket is asked again; so nothing is synced.
//! - It takes no space that `--min-free` or the index keeps, and leaves when the disk is short of what cannot be had again.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use tokio::sync::watch;

use super::{StoreError, error::chain, ledger::Ledger};
use crate::base::{digest::Digest, durable};

/// How much more than has to be has to stay free: a tenth.
const SLACK: u64 = 10;

/// Of what is being written: several may write the same.
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// See the module.
#[derive(Clone, Debug)]
pub struct Objects {
    dir: PathBuf,
    min_free: u64,
    clearings: Arc<watch::Sender<u64>>,
}

impl Objects {
    /// Removes what a daemon before did not write to its end. Makes nothing: the directory comes with the first object.
    #[must_use]
    pub fn open_dir(dir: PathBuf, min_free: u64) -> Self {
        let objects = Self {
            dir,
            min_free,
            clearings: Arc::new(watch::Sender::new(0)),
        };
        if let Err(err) = objects.remove(|path| path.extension().is_some()) {
            tracing::warn!(error = %chain(&err), "cannot look for what a crash left");
        }
        objects
    }

    /// The bytes of that name; `None` where they are not, or cannot be read. Reads and hashes all of them.
    pub fn read(&self, name: &Digest) -> Option<Bytes> {
        let path = self.path(name);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return None,
            Err(err) => {
                tracing::warn!(path = %path.display(), error = %err, "a kept object of a catalog cannot be read");
                return None;
            }
        };
        if Digest::of(&bytes) == *name {
            return Some(bytes.into());
        }
        tracing::warn!(path = %path.display(), "a kept object of a catalog is damaged, and fetched again");
        // Fails only where nothing can be kept either.
        let _ = durable::remove_if_there(&path);
        None
    }

    /// Keeps bytes that are those of their name.
    ///
    /// # Errors
    ///
    /// [`StoreError::Full`] where they would take of the space that is to stay free.
    pub fn keep(&self, name: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        fs::create_dir_all(&self.dir).map_err(StoreError::disk("create", &self.dir))?;
        let disk = rustix::fs::statvfs(&self.dir)
            .map_err(|err| StoreError::disk("ask for the free space of", &self.dir)(err.into()))?;
        let least = self.min_free.max(Ledger::room_on(disk.f_blocks * disk.f_frsize));
        // Somewhat more than below which it would leave again.
        let least = least.saturating_add(least / SLACK);
        if disk.f_bavail * disk.f_frsize < least.saturating_add(bytes.len() as u64) {
            return Err(StoreError::Full);
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = self.path(name);
        let new = path.with_extension(format!("{number}new"));
        let written = fs::write(&new, bytes).and_then(|()| fs::rename(&new, &path));
        written.map_err(|err| {
            let _ = durable::remove_if_there(&new);
            StoreError::disk("write", &path)(err)
        })
    }

    /// Removes all others but those that are being written.
    pub fn retain(&self, wanted: &HashSet<Digest>) -> Result<(), StoreError> {
        let is_unwanted = |path: &Path| {
            path.extension().is_none() && !named(path).is_some_and(|name| wanted.contains(&name))
        };
        self.remove(is_unwanted).map(drop)
    }

    /// Removes all, because the disk is short; returns how many bytes came free.
    pub(super) fn clear(&self) -> u64 {
        let freed = self.remove(|path| path.extension().is_none());
        let freed = freed.unwrap_or_else(|err| {
            tracing::warn!(error = %chain(&err), "kept objects of catalogs cannot leave");
            0
        });
        if freed > 0 {
            self.clearings.send_modify(|clearings| *clearings += 1);
        }
        freed
    }

    /// How many bytes all take. Costs a look at each.
    pub(super) fn bytes(&self) -> u64 {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.metadata().ok())
            .map(|meta| meta.len())
            .sum()
    }

    /// How often all was removed: what was kept before is gone when it was more often now.
    #[must_use]
    pub fn clearings(&self) -> watch::Receiver<u64> {
        self.clearings.subscribe()
    }

    /// Returns how many bytes came free.
    fn remove(&self, is_unwanted: impl Fn(&Path) -> bool) -> Result<u64, StoreError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(err) => return Err(StoreError::disk("list", &self.dir)(err)),
        };
        let mut freed = 0;
        for entry in entries {
            let entry = entry.map_err(StoreError::disk("list", &self.dir))?;
            let path = entry.path();
            if is_unwanted(&path) {
                freed += entry.metadata().map_or(0, |meta| meta.len());
                durable::remove_if_there(&path).map_err(StoreError::disk("remove", &path))?;
            }
        }
        Ok(freed)
    }

    fn path(&self, name: &Digest) -> PathBuf {
        self.dir.join(name.to_string())
    }
}

fn named(path: &Path) -> Option<Digest> {
    path.file_name()?.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(objects: &Objects) -> Vec<String> {
        let entries = fs::read_dir(&objects.dir).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_kept_has_the_name_and_the_bytes_of_the_object() {
        let home = tempfile::tempdir().unwrap();
        let objects = Objects::open_dir(home.path().join("catalogs"), 0);
        let name = Digest::of(b"part");
        assert_eq!(objects.read(&name), None);
        objects.keep(&name, b"part").unwrap();
        objects.keep(&name, b"part").unwrap();
        // Later versions find it by this.
        let hex = "37a680133bd09342f934afb8dd2c7d9e1b624da5f35e3a38adb103e37c055ed1";
        assert_eq!(names(&objects), [hex]);
        assert_eq!(fs::read(home.path().join("catalogs").join(hex)).unwrap(), b"part");
        assert_eq!(objects.read(&name).unwrap(), &b"part"[..]);
    }

    #[test]
    fn damaged_bytes_are_removed_and_not_given() {
        let home = tempfile::tempdir().unwrap();
        let objects = Objects::open_dir(home.path().join("catalogs"), 0);
        let name = Digest::of(b"part");
        for wrong in [&b"paru"[..], b"par", b""] {
            objects.keep(&name, b"part").unwrap();
            fs::write(objects.path(&name), wrong).unwrap();
            assert_eq!(objects.read(&name), None);
            assert!(names(&objects).is_empty());
        }
    }

    #[test]
    fn what_nobody_wants_goes() {
        let home = tempfile::tempdir().unwrap();
        let objects = Objects::open_dir(home.path().join("catalogs"), 0);
        objects.retain(&HashSet::new()).unwrap();
        let (kept, gone) = (Digest::of(b"kept"), Digest::of(b"gone"));
        objects.keep(&kept, b"kept").unwrap();
        objects.keep(&gone, b"gone").unwrap();
        let half = objects.path(&kept).with_extension("7new");
        fs::write(&half, b"ke").unwrap();
        objects.retain(&HashSet::from([kept])).unwrap();
        // Somebody may be writing it.
        assert_eq!(names(&objects), [kept.to_string(), format!("{kept}.7new")]);
        let objects = Objects::open_dir(objects.dir, 0);
        assert_eq!(names(&objects), [kept.to_string()]);
    }

    #[test]
    fn all_leaves_when_the_disk_is_short() {
        let home = tempfile::tempdir().unwrap();
        let objects = Objects::open_dir(home.path().join("catalogs"), 0);
        assert_eq!(objects.clear(), 0);
        let also = objects.clone();
        objects.keep(&Digest::of(b"part"), b"part").unwrap();
        objects.keep(&Digest::of(b"other"), b"other").unwrap();
        assert_eq!(objects.bytes(), 9);
        assert_eq!(also.clear(), 9);
        assert!(names(&objects).is_empty());
        assert_eq!(*objects.clearings().borrow(), 1);
    }

    #[test]
    fn the_space_that_stays_free_is_not_taken() {
        let home = tempfile::tempdir().unwrap();
        let objects = Objects::open_dir(home.path().join("catalogs"), u64::MAX / 2);
        let kept = objects.keep(&Digest::of(b"part"), b"part");
        assert!(matches!(kept, Err(StoreError::Full)), "{kept:?}");
        assert!(names(&objects).is_empty());
    }
}
