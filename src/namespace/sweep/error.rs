//! Why a sweep stopped, split by what the operator does next.

use crate::{
    namespace::{catalog::CatalogError, snapshot::SnapshotError, stack::StackError},
    tier::TierError,
};

/// A sweep stopped. What it did until then stands; a sweep that runs later goes on.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    #[error(transparent)]
    Bucket(#[from] TierError),
    /// What a volume lies over cannot be read, so what it uses is not known.
    #[error("nothing was swept: it is not known what a volume uses")]
    Volume { source: StackError },
    /// What a volume uses is in a catalog that cannot be read.
    #[error("nothing was swept: a catalog cannot be read")]
    Catalog { source: CatalogError },
    /// Something refers to blobs, perhaps, in a way that this program does not know.
    #[error(
        "nothing was swept: {key} is nothing that this casmount knows, and may refer to blobs: use the newest \
         casmount, or remove it if it is not casmount's"
    )]
    Unknown { key: String },
    #[error(
        "nothing was swept: segment {key} cannot be read ({why}): use the newest casmount, or remove it if it is \
         damaged for good"
    )]
    Segment { key: String, why: String },
    /// Deleting the snapshot, or reading it with another program, goes on.
    #[error("nothing was swept: it is not known what the snapshot {key} refers to")]
    Snapshot { key: String, source: Box<SnapshotError> },
    #[error("nothing was swept: chunk list {key}, which {segment} names, cannot be read ({why})")]
    List {
        key: String,
        /// Or a snapshot.
        segment: String,
        why: String,
    },
    /// A volume was deleted meanwhile, most probably.
    #[error("nothing was swept: segment {key} was removed while the sweep read it: run it again")]
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
    pub(super) fn from_catalog(err: CatalogError) -> Self {
        match err {
            CatalogError::Bucket(err) => Self::Bucket(err),
            source => Self::Catalog { source },
        }
    }
}
