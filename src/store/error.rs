//! What can go wrong on this disk, split by what the caller does next.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{base::digest::Digest, tier::TierError};

/// A blob could not be read, kept or removed, or the index not be changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No tier has it. Retrying will not help.
    #[error("blob {blob} is in no tier")]
    Missing { blob: Digest },
    /// No tier answered in time. Retrying may help.
    #[error("blob {blob} cannot be fetched now")]
    Unreachable {
        blob: Digest,
        source: std::sync::Arc<TierError>,
    },
    /// The bytes that every tier gave are not what the name says.
    #[error("blob {blob} came with wrong bytes")]
    Corrupt { blob: Digest },
    /// The disk is full of what must not be evicted.
    #[error("the cache disk is full, and all that is left on it is dirty, open or pinned")]
    Full,
    /// The cache directory misbehaved.
    #[error("cannot {verb} {}", path.display())]
    Disk {
        verb: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// The index misbehaved; the daemon cannot go on.
    #[error("cannot {verb} in the index")]
    Index {
        verb: &'static str,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The cache directory cannot be used at all. An operator must act.
    #[error("{why}")]
    Unusable { why: String },
}

impl StoreError {
    /// Says what was tried on which path; a full disk becomes [`StoreError::Full`],
    /// because that is what the caller can act on. For `map_err`.
    pub(crate) fn disk(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full,
            _ => Self::Disk {
                verb,
                path: path.to_owned(),
                source,
            },
        }
    }
}

/// An error with all its causes, on one line.
#[must_use]
pub fn chain(err: &dyn std::error::Error) -> String {
    let mut words = err.to_string();
    let mut cause = err.source();
    while let Some(err) = cause {
        words = format!("{words}: {err}");
        cause = err.source();
    }
    words
}
