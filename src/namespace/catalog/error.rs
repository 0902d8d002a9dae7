//! What can go wrong with a catalog, split by who can do something about it.

use std::io;

use super::format::FormatError;
use crate::{namespace::stack::StackError, tier::TierError};

/// A catalog cannot be read, or not be made. What was there before is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    #[error(transparent)]
    Bucket(#[from] TierError),
    /// Written by a newer program; an upgrade reads it.
    #[error("{key} was written by a newer casmount ({why}): use that version")]
    Newer { key: String, why: String },
    /// It will never be readable. What it holds is in older catalogs and in the log, as long as they are kept.
    #[error("{key} is damaged ({why}): restore it")]
    Damaged { key: String, why: String },
    #[error("{key} is gone: restore it")]
    Missing { key: String },
    #[error(
        "the server of {url} ignores If-None-Match, so two machines could make a catalog at once: compacting \
         needs a server that honours it"
    )]
    NoConditions { url: String },
    #[error(transparent)]
    Volume(Box<StackError>),
    #[error("catalogs of volume {volume} are made all the time while it is read: try again")]
    Moving { volume: String },
    /// The disk for what does not fit into memory.
    #[error("cannot put down changes while compacting")]
    Spill(#[source] io::Error),
}

impl CatalogError {
    pub(super) fn format(key: String, err: &FormatError) -> Self {
        let why = err.to_string();
        match err {
            FormatError::Newer { .. } => Self::Newer { key, why },
            FormatError::Malformed { .. } => Self::Damaged { key, why },
        }
    }

    /// Whether the same may succeed later without anyone acting.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Bucket(err) => err.is_transient(),
            Self::Newer { .. }
            | Self::Damaged { .. }
            | Self::Missing { .. }
            | Self::NoConditions { .. }
            | Self::Volume(_)
            | Self::Moving { .. }
            | Self::Spill(_) => false,
        }
    }
}
