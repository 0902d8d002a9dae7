//! What the mount is doing, and flushing it.

use std::{collections::HashSet, sync::atomic::Ordering, time::Duration};

use tokio::time::Instant;

use super::{Vfs, VfsError};
use crate::{
    namespace::{TreeError, preset},
    store::rows::{Content, Durability, Ino, NodeKind, NodeRow, Residency},
};

/// What a flush left undone.
#[derive(Clone, Debug, Default)]
pub struct FlushReport {
    /// Paths still open for writing; they are not part of the flush.
    pub still_open: Vec<String>,
    /// Closed files that are not sealed.
    pub unsealed: u64,
}

/// One line of `casmount ls`.
#[derive(Clone, Debug)]
pub struct Listed {
    pub path: String,
    /// `file`, `dir`, `symlink`, ...
    pub kind: &'static str,
    pub size: u64,
    /// Of a sealed file.
    pub digest: Option<String>,
    /// `resident`, `partial` or `remote`; for a file that is not sealed `staging`.
    pub residency: &'static str,
    /// `durable`, `dirty`, `quarantined`, `writing`, `lost`, or `local` for what stays on this machine.
    pub durability: &'static str,
}

/// Counters of what programs did to the mount.
#[derive(Clone, Copy, Debug, Default)]
pub struct VfsStatus {
    pub open_files: u64,
    pub open_for_writing: u64,
    /// Closed files that wait to be sealed.
    pub settling: u64,
    /// Opens of files whose bytes were all here.
    pub hits: u64,
    /// Opens of files that needed the bucket.
    pub misses: u64,
    /// Opens that the kernel serves by itself.
    pub passthrough_opens: u64,
    /// Blobs found missing in the bucket.
    pub lost: u64,
    pub sealed: u64,
    /// Files that were not what their names promise, and are not shared.
    pub misnamed: u64,
    /// Lookups of action-cache entries that name a blob which is missing.
    pub withheld: u64,
}

/// What statfs(2) shows: the disk of the cache, which bounds what may be written.
#[derive(Clone, Copy, Debug)]
pub struct FsStat {
    pub blocks: u64,
    pub free: u64,
    pub available: u64,
    pub files: u64,
    pub free_files: u64,
    pub block_bytes: u32,
    pub name_max: u32,
}

/// How long a flush waits for files to be closed: RELEASE comes after close(2) has returned.
const RELEASE_GRACE: Duration = Duration::from_secs(1);

/// How often what a flush waits for is looked at when nobody reports it.
const LOOK: Duration = Duration::from_millis(20);

impl Vfs {
    /// Seals everything whose close had returned before the call, without the settle time.
    pub async fn seal_all(&self, deadline: Instant) -> FlushReport {
        // What stays on this machine anyway is nobody's to wait for.
        let open_now = || self.tree.shared_open_for_writing().unwrap_or_default();
        let writing: HashSet<Ino> = open_now().into_iter().collect();
        let grace = deadline.min(Instant::now() + RELEASE_GRACE);
        let still_open = loop {
            let open: HashSet<Ino> = open_now()
                .into_iter()
                .filter(|ino| writing.contains(ino))
                .collect();
            if (open.is_empty() && self.settling.all_at_rest()) || Instant::now() >= grace {
                break open;
            }
            tokio::time::sleep(LOOK).await;
        };
        self.settling.hurry();
        let awaited = self.settling.waiting();
        let left = loop {
            let progress = self.settling.progress.notified();
            let unquiet = self.settling.unquiet();
            let waiting: HashSet<Ino> = self.settling.waiting().intersection(&awaited).copied().collect();
            if waiting.is_subset(&unquiet) || Instant::now() >= deadline {
                break waiting;
            }
            // What was not quiet a moment ago is asked again at the wait's end.
            let _ = tokio::time::timeout_at(deadline.min(Instant::now() + LOOK * 10), progress).await;
        };
        let unquiet = self.settling.unquiet();
        let writers = still_open.iter().chain(left.intersection(&unquiet));
        FlushReport {
            still_open: writers.map(|&ino| self.shown_path(ino)).collect(),
            unsealed: left.difference(&unquiet).count() as u64,
        }
    }

    fn shown_path(&self, ino: Ino) -> String {
        match self.tree.path_of(ino) {
            Ok(path) if !path.is_empty() => String::from_utf8_lossy(&path).into_owned(),
            _ => format!("(deleted file, inode {})", ino.0),
        }
    }

    pub fn stat_fs(&self) -> Result<FsStat, VfsError> {
        let disk = rustix::fs::statvfs(&self.store.dir).map_err(std::io::Error::from)?;
        Ok(FsStat {
            blocks: disk.f_blocks,
            free: disk.f_bfree,
            available: disk.f_bavail,
            files: disk.f_files,
            free_files: disk.f_ffree,
            block_bytes: u32::try_from(disk.f_frsize).unwrap_or(4096),
            name_max: 255,
        })
    }

    #[must_use]
    pub fn status(&self) -> VfsStatus {
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        VfsStatus {
            open_files: self
                .nodes
                .all()
                .iter()
                .filter(|node| node.lock().handles > 0)
                .count() as u64,
            open_for_writing: self.tree.open_for_writing().len() as u64,
            settling: self.settling.waiting().len() as u64,
            hits: load(&self.counters.hits),
            misses: load(&self.counters.misses),
            passthrough_opens: load(&self.counters.passthrough_opens),
            lost: load(&self.counters.lost),
            sealed: load(&self.counters.sealed),
            misnamed: load(&self.tree.presets().counters.misnamed),
            withheld: load(&self.tree.presets().counters.withheld),
        }
    }

    /// All directories with a preset.
    #[must_use]
    pub fn preset_dirs(&self) -> Vec<preset::table::Shown> {
        self.tree.preset_dirs()
    }

    /// The file found last that is not what its name promises.
    #[must_use]
    pub fn last_misnamed(&self) -> Option<String> {
        self.tree.presets().counters.last_misnamed()
    }

    /// Lists what is at a path of the mount: the file itself, or the children of a directory.
    pub fn list(&self, path: &[u8]) -> Result<Vec<Listed>, VfsError> {
        let node = self.tree.resolve(path)?;
        let shown = String::from_utf8_lossy(path).trim_matches('/').to_owned();
        if node.kind != NodeKind::Dir {
            return Ok(vec![self.listed(shown, &node)?]);
        }
        let mut listed = Vec::new();
        let mut after: Option<Vec<u8>> = None;
        loop {
            let (names, next) = self.tree.list(node.ino, after.as_deref(), 1000)?;
            for (name, child) in names {
                let name = String::from_utf8_lossy(&name);
                let path = if shown.is_empty() {
                    name.into_owned()
                } else {
                    format!("{shown}/{name}")
                };
                listed.push(self.listed(path, &child)?);
            }
            match next {
                None => return Ok(listed),
                next => after = next,
            }
        }
    }

    fn listed(&self, path: String, node: &NodeRow) -> Result<Listed, TreeError> {
        let (digest, residency, durability) = match node.content {
            Content::None => (None, "", ""),
            Content::Lost(digest) => (Some(digest), "remote", "lost"),
            Content::Staging(_) if self.tree.stays_here(node.ino)? => (None, "staging", "local"),
            Content::Staging(_) => (None, "staging", "writing"),
            Content::Blob(digest) => {
                let row = self.store.ledger.blob(&digest)?;
                let residency = match row.as_ref().map(|row| &row.residency) {
                    _ if node.size == 0 => "resident",
                    Some(Residency::Whole) => "resident",
                    Some(Residency::Partial(_)) => "partial",
                    Some(Residency::Nothing) | None => "remote",
                };
                let durability = match row.map(|row| row.durability) {
                    Some(Durability::Dirty) => "dirty",
                    Some(Durability::Quarantined) => "quarantined",
                    Some(Durability::Durable { .. }) | None => "durable",
                };
                (Some(digest), residency, durability)
            }
        };
        let kind = match node.kind {
            NodeKind::File => "file",
            NodeKind::Dir => "dir",
            NodeKind::Symlink => "symlink",
            NodeKind::Fifo => "fifo",
            NodeKind::Socket => "socket",
            NodeKind::CharDevice => "chardev",
            NodeKind::BlockDevice => "blockdev",
        };
        let digest = digest.map(|digest| digest.to_string());
        Ok(Listed {
            path,
            kind,
            size: node.size,
            digest,
            residency,
            durability,
        })
    }
}
