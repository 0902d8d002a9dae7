//! File system semantics, without FUSE types.

use std::{sync::Arc, time::Duration};

use crate::{namespace::tree::Tree, store::Store};

/// Who files belong to, as programs see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Everything belongs to one user (`--uid`, `--gid`, or the mounting user).
    Fixed { uid: u32, gid: u32 },
    /// As the machine that made them recorded it (`--owner preserve`).
    Preserve,
}

#[derive(Clone, Debug)]
pub struct VfsOptions {
    pub owner: Owner,
    /// Permission bits that no file shows (`--umask`).
    pub umask: u32,
    /// How long a closed file rests before it is sealed.
    pub settle: Duration,
    pub read_only: bool,
    pub xattr: bool,
}

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
    /// `durable`, `dirty`, `quarantined`, `writing`, `lost`.
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
}

#[derive(Debug)]
pub struct Vfs {}

impl Vfs {
    /// Resumes the sealing of what a stop left closed and unsealed.
    pub fn new(
        options: VfsOptions,
        store: Arc<Store>,
        tree: Arc<Tree>,
        runtime: tokio::runtime::Handle,
    ) -> Arc<Self> {
        let _ = (options, store, tree, runtime);
        todo!()
    }
    /// Seals everything whose close had returned before the call, without the settle time.
    pub async fn seal_all(&self, deadline: tokio::time::Instant) -> FlushReport {
        let _ = deadline;
        todo!()
    }
    pub fn status(&self) -> VfsStatus {
        todo!()
    }
    /// Lists what is at a path of the mount: the file itself, or the children of a directory.
    /// Errors are `NotFound` and so on.
    pub fn list(&self, path: &[u8]) -> Result<Vec<Listed>, crate::namespace::TreeError> {
        let _ = path;
        todo!()
    }
    /// When a program last used the mount; for the follower's pace.
    pub fn set_on_use(&self, on_use: Arc<dyn Fn() + Send + Sync>) {
        let _ = on_use;
        todo!()
    }
    /// Stops sealing; called after the unmount.
    pub fn shutdown(&self) {
        todo!()
    }
}
