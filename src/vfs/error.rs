//! What a program is told when something fails.

use std::io;

use crate::{
    namespace::{TreeError, catalog::LoadError, error::NotLoaded},
    store::StoreError,
};

/// A request of a program failed.
#[derive(Debug, thiserror::Error)]
pub enum VfsError {
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The catalog that has a directory's names does not come.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The blob is gone from the bucket: the kernel should look the name up again.
    #[error("the blob of the file is gone from the bucket")]
    Gone,
    /// The mount, or the request, only reads.
    #[error("the file system is read-only")]
    ReadOnly,
    /// The kernel keeps writers away by itself, but finds out that an open with `O_RDONLY | O_TRUNC` writes only
    /// when the file is empty (`FUSE_ATOMIC_O_TRUNC`).
    #[error("the file is a program that runs")]
    Executed,
    #[error("the handle is not open for this")]
    BadHandle,
    #[error("invalid argument")]
    Invalid,
    #[error("not supported here")]
    NotSupported,
    #[error("the mount was made without --xattr")]
    NoXattr,
    #[error("the value is larger than the buffer or the limit")]
    TooLarge,
    #[error("no data or hole behind this offset")]
    NoSuchOffset,
    /// The mount was taken away, and what still asks is a copy of it.
    #[error("the mount is gone")]
    Unmounted,
    /// The disk said this about a staging file.
    #[error("the cache disk failed")]
    Io(#[from] io::Error),
}

impl VfsError {
    /// The error number that programs get, as the man pages of the calls name them.
    #[must_use]
    pub fn errno(&self) -> i32 {
        // No `_` arm: adding a variant must force a choice here.
        match self {
            Self::Tree(err) => tree_errno(err),
            Self::Store(err) => store_errno(err),
            Self::Load(err) => load_errno(err),
            Self::Gone => libc::ESTALE,
            Self::ReadOnly => libc::EROFS,
            Self::Executed => libc::ETXTBSY,
            Self::BadHandle => libc::EBADF,
            Self::Invalid => libc::EINVAL,
            Self::NotSupported => libc::EOPNOTSUPP,
            Self::NoXattr => libc::ENOSYS,
            Self::TooLarge => libc::ERANGE,
            Self::NoSuchOffset => libc::ENXIO,
            Self::Unmounted => libc::ENOTCONN,
            Self::Io(err) => err.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

impl VfsError {
    /// What has to be loaded before the request can be answered.
    #[must_use]
    pub fn not_loaded(&self) -> Option<NotLoaded> {
        match self {
            Self::Tree(TreeError::NotLoaded(missing)) => Some(*missing),
            _ => None,
        }
    }
}

fn load_errno(err: &LoadError) -> i32 {
    match err {
        LoadError::Tree(err) => tree_errno(err),
        LoadError::Catalog { .. } | LoadError::List { .. } => libc::EIO,
    }
}

fn tree_errno(err: &TreeError) -> i32 {
    match err {
        TreeError::NotFound => libc::ENOENT,
        TreeError::Exists => libc::EEXIST,
        TreeError::NotDirectory => libc::ENOTDIR,
        TreeError::IsDirectory => libc::EISDIR,
        TreeError::NotEmpty => libc::ENOTEMPTY,
        TreeError::BelowItself => libc::EINVAL,
        TreeError::NameTooLong => libc::ENAMETOOLONG,
        TreeError::NotPermitted => libc::EPERM,
        TreeError::NoAttribute => libc::ENODATA,
        TreeError::TooManyLinks => libc::EMLINK,
        // Nobody loaded it who could have: the kernel looks the name up again, which does.
        TreeError::NotLoaded(_) => libc::ESTALE,
        TreeError::Store(err) => store_errno(err),
    }
}

fn store_errno(err: &StoreError) -> i32 {
    match err {
        StoreError::Full => libc::ENOSPC,
        StoreError::Disk { source, .. } => match source.raw_os_error() {
            Some(errno @ (libc::ENOSPC | libc::EDQUOT | libc::EMFILE | libc::ENFILE)) => errno,
            _ => libc::EIO,
        },
        StoreError::Missing { .. }
        | StoreError::Unreachable { .. }
        | StoreError::Corrupt { .. }
        | StoreError::Index { .. }
        | StoreError::Unusable { .. } => libc::EIO,
    }
}
