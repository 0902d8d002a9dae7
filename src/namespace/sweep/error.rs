//! Why a sweep stopped, split by what the operator does next.

use crate::{
    base::volume::VolumeName,
    namespace::{background::words, catalog::CatalogError, snapshot::SnapshotError, stack::StackError},
    tier::{TierError, layout},
};

/// A sweep stopped. What it did until then stands; a sweep that runs later goes on.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    #[error(transparent)]
    Bucket(#[from] TierError),
    /// What a volume lies over cannot be read, so what it uses is not known.
    #[error(
        "nothing was swept: it is not known what a volume uses (where it lies over one that is being deleted, casmount fork \
         delete of that one, once more, takes the deletion back or says what to delete first)"
    )]
    Volume { source: StackError },
    /// What a volume uses is in a catalog that cannot be read.
    #[error(
        "nothing was swept: a catalog of volume {volume} cannot be read{}",
        or_untrusted(volume)
    )]
    Catalog { volume: String, source: CatalogError },
    /// Something refers to blobs, perhaps, in a way that this program does not know.
    #[error(
        "nothing was swept: {key} is nothing that this casmount knows, and may refer to blobs: use the newest \
         casmount, or remove it if it is not casmount's{}",
        or_untrusted_of(key)
    )]
    Unknown { key: String },
    #[error(
        "nothing was swept: segment {key} cannot be read ({why}): use the newest casmount, or remove it if it is \
         damaged for good{}",
        or_untrusted_of(key)
    )]
    Segment { key: String, why: String },
    /// Deleting the snapshot, or reading it with another program, goes on.
    #[error(
        "nothing was swept: it is not known what the snapshot {key} refers to{}",
        or_untrusted_of(key)
    )]
    Snapshot { key: String, source: Box<SnapshotError> },
    #[error(
        "nothing was swept: chunk list {key}, which {segment} names, cannot be read ({why}){}",
        or_untrusted_of(segment)
    )]
    List {
        key: String,
        /// Or a snapshot.
        segment: String,
        why: String,
    },
    /// Volumes are deleted all the time.
    #[error(
        "nothing was swept: segment {key}, and others again and again, went while the sweep read them: run it again"
    )]
    Vanished { key: String },
    /// What it read of the references is too old to delete anything by.
    #[error(
        "the sweep took longer than half the window ({} s): run it again, or with a longer --window",
        window_millis / 2000
    )]
    Slept { window_millis: u64 },
    #[error("nothing was swept: a volume is being compacted all the time: run it again")]
    Busy,
    /// Another sweep changed the window at the same time.
    #[error("the window was changed by another sweep at the same time: run it again")]
    Raced,
}

impl SweepError {
    /// What went wrong with a catalog of `volume`. An object that is none is what somebody wrote, not the bucket's fault.
    pub(super) fn from_catalog(volume: &str, err: CatalogError) -> Self {
        match err {
            CatalogError::Bucket(err) if !matches!(err, TierError::Malformed { .. }) => Self::Bucket(err),
            source => Self::Catalog {
                volume: volume.to_owned(),
                source,
            },
        }
    }

    /// Whether whoever wrote an object of the volume that was read may have brought this about. (`Busy`: by writing it
    /// all the time.)
    pub(super) fn is_of_writer(&self) -> bool {
        match self {
            Self::Bucket(err) => is_of_writer(err),
            Self::Catalog { .. }
            | Self::Segment { .. }
            | Self::Snapshot { .. }
            | Self::List { .. }
            | Self::Unknown { .. }
            | Self::Busy => true,
            Self::Volume { .. } | Self::Vanished { .. } | Self::Slept { .. } | Self::Raced => false,
        }
    }

    /// Whether something of a catalog is not there.
    pub(super) fn is_missing(&self) -> bool {
        let Self::Catalog { source, .. } = self else {
            return false;
        };
        matches!(source, CatalogError::Missing { .. })
    }

    /// What it is told as where it stops nothing.
    pub(super) fn told(&self) -> String {
        match self {
            Self::Catalog { volume, source } => format!("catalogs of volume {volume}: {}", words(source)),
            Self::Segment { key, why } => format!("segment {key}: {why}"),
            Self::Snapshot { key, source } => format!("snapshot {key}: {}", words(source.as_ref())),
            Self::List { key, segment, why } => format!("chunk list {key}, which {segment} names: {why}"),
            other => words(other),
        }
    }
}

/// The same, of one object. What is denied is not: the sweeper himself may not read, write or delete. An object that is
/// denied to who may read all beside it is malformed here ([`super::withheld`]).
pub(super) fn is_of_writer(err: &TierError) -> bool {
    match err {
        TierError::Malformed { .. } | TierError::Unsupported { .. } => true,
        TierError::Denied { .. }
        | TierError::Unavailable { .. }
        | TierError::NoBucket { .. }
        | TierError::Credentials { .. } => false,
    }
}

/// The same of the volume that an object is of.
fn or_untrusted_of(key: &str) -> String {
    layout::volume_of(key).map(or_untrusted).unwrap_or_default()
}

/// What else helps, where the name may be that of a volume whose writers are not trusted.
fn or_untrusted(volume: &str) -> String {
    match volume.parse::<VolumeName>() {
        Ok(volume) => format!(
            "; if machines that are trusted less may write to volume {volume}, say so: --untrusted {volume}, or the begin of \
             such names with a * behind it"
        ),
        Err(_) => String::new(),
    }
}
