//! How much of a disk the cache may take when nobody says how much.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Half of the disk. A number that does not depend on how full the disk is
/// just now: a share of what is free would shrink as the cache fills, from one
/// start to the next. What others need of the disk is kept by the floor.
const CACHE_SHARE: f64 = 0.5;
/// The floor: 5 % of the disk, as mkfs reserves for root, but no more than
/// [`MOST_MIN_FREE`], because on a large disk nobody needs that much.
const MIN_FREE_SHARE: f64 = 0.05;
const MOST_MIN_FREE: u64 = 10 << 30;
/// Beside the blobs, catalogs take little of the disk; and a gibibyte, some 15,000,000 names, comes within seconds.
const CATALOG_SHARE: u64 = 16;
const MOST_CATALOG: u64 = 1 << 30;

/// The two limits of the cache, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    pub cache_size: u64,
    pub min_free: u64,
}

impl Budget {
    /// Fills in what the user left open, for a disk of `disk_bytes`.
    pub fn on_disk_of(disk_bytes: u64, cache_size: Option<u64>, min_free: Option<u64>) -> Self {
        Self {
            cache_size: cache_size.unwrap_or((disk_bytes as f64 * CACHE_SHARE) as u64),
            min_free: min_free.unwrap_or(((disk_bytes as f64 * MIN_FREE_SHARE) as u64).min(MOST_MIN_FREE)),
        }
    }

    /// The largest catalog that is fetched whole, when nobody says.
    #[must_use]
    pub fn catalog_prefetch(self) -> u64 {
        (self.cache_size / CATALOG_SHARE).min(MOST_CATALOG)
    }
}

/// A disk as `df` sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    pub total_bytes: u64,
    /// What this process may still take.
    pub free_bytes: u64,
    pub free_inodes: u64,
    /// Zero where the file system has no fixed number of them (btrfs).
    pub total_inodes: u64,
}

/// Looks at the disk that holds `path`, or will hold it once it is made.
pub fn disk_of(path: &Path) -> io::Result<Disk> {
    let stat = rustix::fs::statvfs(nearest_existing(path))?;
    Ok(Disk {
        total_bytes: stat.f_blocks * stat.f_frsize,
        free_bytes: stat.f_bavail * stat.f_frsize,
        free_inodes: stat.f_favail,
        total_inodes: stat.f_files,
    })
}

/// `path`, or the nearest directory above it that exists.
pub fn nearest_existing(path: &Path) -> PathBuf {
    path.ancestors()
        .find(|dir| dir.exists())
        .unwrap_or(Path::new("/"))
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_user_says_counts() {
        let budget = Budget::on_disk_of(1 << 40, Some(7), Some(9));
        assert_eq!(
            budget,
            Budget {
                cache_size: 7,
                min_free: 9
            }
        );
    }

    #[test]
    fn the_floor_is_five_percent_but_at_most_ten_gibibytes() {
        assert_eq!(Budget::on_disk_of(100 << 30, None, None).min_free, 5 << 30);
        assert_eq!(Budget::on_disk_of(4 << 40, None, None).min_free, 10 << 30);
    }

    #[test]
    fn catalogs_take_little_of_a_small_cache() {
        let budget = |cache_size| Budget::on_disk_of(1 << 40, Some(cache_size), None);
        assert_eq!(budget(64 << 20).catalog_prefetch(), 4 << 20);
        assert_eq!(budget(60 << 30).catalog_prefetch(), 1 << 30);
    }

    #[test]
    fn the_disk_of_a_directory_to_come_is_that_of_the_one_above() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("a/b/c");
        assert_eq!(nearest_existing(&missing), dir.path());
        assert_eq!(
            disk_of(&missing).unwrap().total_bytes,
            disk_of(dir.path()).unwrap().total_bytes
        );
    }
}
