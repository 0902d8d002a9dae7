//! The tree of this machine: own changes and those of others, merged.

use std::sync::Arc;

use super::{TreeError, change::PathChange};
use crate::{base::clock::Stamp, store::rows::*};

/// Something the kernel may hold in its caches and that is no longer so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The name means something else now, or nothing.
    Entry { parent: Ino, name: Vec<u8> },
    /// The attributes changed, the bytes did not.
    Attributes { ino: Ino },
}

/// An own change that is not published.
#[derive(Clone, Debug)]
pub struct Pending {
    pub parent: Ino,
    pub name: Vec<u8>,
    pub place: Place,
    pub stamp: Stamp,
    pub readiness: Readiness,
}

/// Whether a pending change could be published.
#[derive(Clone, Debug)]
pub enum Readiness {
    /// Open for writing: its change is made when it is closed, and takes its place then.
    Writing,
    /// Closed, not sealed or not durable yet: everything behind it waits.
    Waiting,
    /// It never will be published (its blob was quarantined); nothing waits for it.
    Never,
    Ready(PathChange),
}

#[derive(Debug)]
pub struct Tree {}

impl Tree {
    /// Own changes that are not published, in the order of their places.
    pub fn pending(&self, limit: usize) -> Result<Vec<Pending>, TreeError> {
        let _ = limit;
        todo!()
    }

    /// Marks changes as published, unless the name changed again since.
    pub fn published(&self, done: &[(Ino, Vec<u8>, Stamp)]) -> Result<(), TreeError> {
        let _ = done;
        todo!()
    }

    /// Merges changes of other machines; idempotent, in any order. Returns
    /// what the kernel must be told, which the caller does from a thread of its own.
    pub fn apply(&self, changes: Vec<PathChange>) -> Result<Vec<Notice>, TreeError> {
        let _ = changes;
        todo!()
    }
}

/// Whoever tells the kernel; implemented by the FUSE front.
pub type TellKernel = Arc<dyn Fn(Vec<Notice>) + Send + Sync>;
