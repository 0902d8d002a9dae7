//! Why an expiry stopped, split by what the operator does next.

use crate::{
    base::volume::VolumeName,
    namespace::{catalog::CatalogError, promote::PromoteError, stack::StackError, view::ViewError},
    tier::TierError,
};

/// An expiry stopped. What it deleted until then stays deleted; one that runs later goes on.
#[derive(Debug, thiserror::Error)]
pub enum ExpireError {
    #[error(transparent)]
    Bucket(#[from] TierError),
    #[error(transparent)]
    Volume(#[from] StackError),
    #[error("there is no volume {volume} in this store: correct the name")]
    Absent { volume: VolumeName },
    #[error(
        "volume {volume} is a fork, and names of forks do not expire: a deletion there would hide what the volume below \
         it has; delete the fork with: casmount fork delete {volume}"
    )]
    Fork { volume: VolumeName },
    /// A fork may lie over any volume, and tell what it uses of it.
    #[error("nothing expired: the settings of volume {volume} cannot be read ({why})")]
    Settings { volume: VolumeName, why: String },
    /// What a volume has is not known.
    #[error("nothing expired in volume {volume}")]
    Log { volume: VolumeName, source: ViewError },
    #[error("nothing expired in volume {volume}")]
    Catalog {
        volume: VolumeName,
        source: CatalogError,
    },
    #[error(
        "nothing expired in volume {volume}: segment {key} says something of {path} that cannot be read ({why}): use the \
         newest casmount"
    )]
    Change {
        volume: VolumeName,
        key: String,
        path: String,
        why: &'static str,
    },
    /// What is used is not known.
    #[error(
        "nothing expired in volume {volume}: {key}, which says what a machine uses, cannot be read ({why}): use the \
         newest casmount, or remove it if it is damaged for good and what that machine used may go"
    )]
    Touched {
        volume: VolumeName,
        key: String,
        why: String,
    },
    /// Another expiry runs.
    #[error("another expiry of volume {volume} runs at the same time: run it again when it is done")]
    Raced { volume: VolumeName },
    #[error("the store took too long to write what expired in volume {volume}: run it again")]
    Late { volume: VolumeName },
    #[error("what expired in volume {volume} cannot be written ({why})")]
    Write { volume: VolumeName, why: String },
}

impl ExpireError {
    pub(super) fn view(volume: &VolumeName, err: ViewError) -> Self {
        match err {
            ViewError::Bucket(err) => err.into(),
            source => Self::Log {
                volume: volume.clone(),
                source,
            },
        }
    }

    pub(super) fn catalog(volume: &VolumeName, err: CatalogError) -> Self {
        match err {
            CatalogError::Bucket(err) => err.into(),
            source => Self::Catalog {
                volume: volume.clone(),
                source,
            },
        }
    }

    pub(super) fn write(volume: &VolumeName, err: PromoteError) -> Self {
        let volume = volume.clone();
        match err {
            PromoteError::Stack(err) => err.into(),
            PromoteError::Late => Self::Late { volume },
            other => Self::Write {
                volume,
                why: other.to_string(),
            },
        }
    }
}
