//! What can go wrong with a name, split by the errno that a program sees.

use crate::store::{StoreError, rows::Ino};

/// What has to be loaded from catalogs before an operation can be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotLoaded {
    pub dir: Ino,
    /// And every directory below it.
    pub below: bool,
}

impl From<NotLoaded> for TreeError {
    fn from(missing: NotLoaded) -> Self {
        Self::NotLoaded(missing)
    }
}

/// An operation on the tree did not happen; nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    #[error("no such file or directory")]
    NotFound,
    #[error("the file exists already")]
    Exists,
    #[error("not a directory")]
    NotDirectory,
    #[error("is a directory")]
    IsDirectory,
    #[error("the directory is not empty")]
    NotEmpty,
    #[error("a directory cannot move below itself")]
    BelowItself,
    #[error("the name is longer than 255 bytes")]
    NameTooLong,
    #[error("not permitted")]
    NotPermitted,
    #[error("there is no such attribute")]
    NoAttribute,
    #[error("too many links")]
    TooManyLinks,
    /// What is there is in a catalog; load it and ask again.
    #[error("the directory is not loaded from its catalog yet")]
    NotLoaded(NotLoaded),
    #[error(transparent)]
    Store(#[from] StoreError),
}
