//! The cache directory: what it lies on, how much room there is, whose it is.

use std::{io, path::Path};

use super::finding::Finding;
use crate::{
    base::{id::StoreId, units::format_size},
    config::{
        Budget, Settings,
        budget::{self, Disk},
    },
    daemon::error::chain,
    store::{StoreError, inspect},
};

/// Fewer would soon stop new blobs: each is a file.
const FEW_INODES: u64 = 20_000;
/// Less can hardly be called a cache.
const LITTLE_ROOM: u64 = 1 << 30;

pub fn check(settings: &Settings, store: Option<StoreId>) -> Vec<Finding> {
    let dir = &settings.cache_dir;
    let place = budget::nearest_existing(dir);
    let mut findings = Vec::new();
    match rustix::fs::statfs(&place) {
        Ok(stat) => findings.push(judge_file_system(dir, stat.f_type as u64)),
        Err(err) => findings.push(unusable(dir, &err.into())),
    }
    match budget::disk_of(dir) {
        Ok(disk) => {
            let budget = Budget::on_disk_of(disk.total_bytes, settings.cache_size, settings.min_free);
            findings.extend(judge_room(dir, disk, budget));
        }
        Err(err) => findings.push(unusable(dir, &err)),
    }
    if let Err(err) = rustix::fs::access(&place, rustix::fs::Access::WRITE_OK) {
        findings.push(unusable(dir, &err.into()));
    }
    if dir.exists() {
        match look(dir) {
            Ok(found) => findings.push(judge_binding(dir, found, store)),
            Err(err) => findings.push(Finding::fail(
                "cache-binding",
                format!(
                    "the cache directory {} cannot be used: {}",
                    dir.display(),
                    chain(&err)
                ),
                "name another --cache-dir",
            )),
        }
    }
    findings
}

/// The store that the directory belongs to, and whether a daemon uses it.
fn look(dir: &Path) -> Result<Option<(StoreId, bool)>, StoreError> {
    match inspect::binding(dir)? {
        Some(binding) => Ok(Some((binding.store, inspect::is_in_use(dir)?))),
        None => Ok(None),
    }
}

fn unusable(dir: &Path, err: &io::Error) -> Finding {
    Finding::fail(
        "cache-dir",
        format!("the cache directory {} cannot be used: {err}", dir.display()),
        "name a directory that this user may write, with --cache-dir",
    )
}

/// Judges a file system by the magic number that statfs(2) gives (linux/magic.h).
fn judge_file_system(dir: &Path, magic: u64) -> Finding {
    const CHECK: &str = "cache-file-system";
    let (name, trouble, mend) = match magic {
        0x794c_7630 => (
            "overlayfs",
            "the kernel cannot be handed files from there, so reads and writes go through the daemon",
            "name a --cache-dir on a disk; in a container: a volume",
        ),
        0x0102_1994 | 0x8584_58f6 => (
            "tmpfs",
            "what is not uploaded is lost when the machine stops, and the cache takes memory",
            "name a --cache-dir on a disk",
        ),
        0x6573_5546 => (
            "a FUSE file system",
            "every read and write takes two daemons, and the kernel cannot be handed files from there",
            "name a --cache-dir on a local disk",
        ),
        0x6969 | 0xff53_4d42 | 0xfe53_4d42 | 0x0102_1997 => (
            "a network file system",
            "the index is not safe there, and a cache as slow as the network is none",
            "name a --cache-dir on a local disk",
        ),
        _ => return Finding::ok(CHECK, format!("{} is on a local disk", dir.display())),
    };
    Finding::warn(CHECK, format!("{} is on {name}: {trouble}", dir.display()), mend)
}

fn judge_room(dir: &Path, disk: Disk, budget: Budget) -> Vec<Finding> {
    const CHECK: &str = "cache-room";
    let room = disk.free_bytes.saturating_sub(budget.min_free);
    let said = format!(
        "{} free on the disk of {}, {} of it kept free, cache of at most {}",
        format_size(disk.free_bytes),
        dir.display(),
        format_size(budget.min_free),
        format_size(budget.cache_size)
    );
    let mend = "make room on the disk, lower --min-free, or name another --cache-dir";
    let mut findings = vec![if room == 0 {
        Finding::fail(CHECK, format!("no room: {said}"), mend)
    } else if room.min(budget.cache_size) < LITTLE_ROOM {
        Finding::warn(CHECK, format!("little room: {said}"), mend)
    } else {
        Finding::ok(CHECK, said)
    }];
    if disk.total_inodes > 0 && disk.free_inodes < FEW_INODES {
        findings.push(Finding::warn(
            "cache-inodes",
            format!(
                "only {} more files fit on the disk of {}",
                disk.free_inodes,
                dir.display()
            ),
            "name a --cache-dir on a file system with more inodes",
        ));
    }
    findings
}

fn judge_binding(dir: &Path, found: Option<(StoreId, bool)>, store: Option<StoreId>) -> Finding {
    const CHECK: &str = "cache-binding";
    let place = dir.display();
    let Some((bound, in_use)) = found else {
        return Finding::ok(CHECK, format!("{place} was never used"));
    };
    if store.is_some_and(|store| store != bound) {
        return Finding::fail(
            CHECK,
            format!("{place} belongs to another store, or to one that was deleted and made again"),
            "name another --cache-dir, or delete this one if nothing in it is missed",
        );
    }
    if in_use {
        return Finding::warn(
            CHECK,
            format!("another daemon uses {place}"),
            "for a second mount name another --cache-dir",
        );
    }
    Finding::ok(CHECK, format!("{place} belongs to the store and is free"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Severity;

    const DIR: &str = "/c";

    #[test]
    fn places_that_are_slow_or_forgetful_are_warned_about() {
        let severity = |magic| judge_file_system(Path::new(DIR), magic).severity;
        for magic in [0x794c_7630, 0x0102_1994, 0x6573_5546, 0x6969] {
            assert_eq!(severity(magic), Severity::Warn, "{magic:x}");
        }
        for magic in [0xef53, 0x5846_5342, 0x9123_683e] {
            assert_eq!(severity(magic), Severity::Ok, "{magic:x}");
        }
        let shm = rustix::fs::statfs("/dev/shm").map(|stat| stat.f_type as u64);
        if let Ok(magic) = shm {
            assert!(judge_file_system(Path::new(DIR), magic).what.contains("tmpfs"));
        }
    }

    #[test]
    fn room_is_what_is_free_above_the_floor() {
        let judged = |free_bytes, free_inodes, min_free| {
            let disk = Disk {
                total_bytes: 100 << 30,
                free_bytes,
                free_inodes,
                total_inodes: 1 << 20,
            };
            judge_room(
                Path::new(DIR),
                disk,
                Budget::on_disk_of(disk.total_bytes, None, Some(min_free)),
            )
        };
        assert_eq!(judged(50 << 30, 1 << 19, 5 << 30)[0].severity, Severity::Ok);
        assert_eq!(judged(5 << 30, 1 << 19, 5 << 30)[0].severity, Severity::Fail);
        assert_eq!(
            judged((5 << 30) + 1, 1 << 19, 5 << 30)[0].severity,
            Severity::Warn
        );
        assert_eq!(judged(50 << 30, 100, 0)[1].check, "cache-inodes");
    }

    #[test]
    fn a_cache_of_another_store_is_refused() {
        let store = StoreId(1);
        let severity = |found, store| judge_binding(Path::new(DIR), found, store).severity;
        assert_eq!(severity(None, Some(store)), Severity::Ok);
        assert_eq!(severity(Some((store, false)), Some(store)), Severity::Ok);
        assert_eq!(severity(Some((StoreId(2), false)), Some(store)), Severity::Fail);
        assert_eq!(severity(Some((store, true)), Some(store)), Severity::Warn);
        // While the store is away nobody can tell.
        assert_eq!(severity(Some((StoreId(2), false)), None), Severity::Ok);
    }
}
