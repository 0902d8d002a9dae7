//! What can go wrong outside this machine, split by what the caller does next.

/// A bucket did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum TierError {
    /// The bucket cannot be reached or answers that it is in trouble. Retry later.
    #[error("the bucket does not answer: {verb} {key}")]
    Unavailable {
        verb: &'static str,
        key: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The credentials do not permit this. An operator must act.
    #[error("permission {permission} is missing for {key}")]
    Denied {
        permission: &'static str,
        key: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is no such bucket. An operator must act.
    #[error("there is no bucket {bucket}")]
    NoBucket { bucket: String },
    /// No credentials were found, or they are not valid. An operator must act.
    #[error("there are no usable credentials")]
    Credentials {
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An object is there, but is not what its key says. Retrying will not help.
    #[error("object {key} is malformed: {why}")]
    Malformed { key: String, why: String },
    /// The store does not carry what this program needs. An operator must act.
    #[error("{why}")]
    Unsupported { why: String },
}

impl TierError {
    /// Whether the same request may succeed later without anyone acting.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable { .. } => true,
            Self::Denied { .. }
            | Self::NoBucket { .. }
            | Self::Credentials { .. }
            | Self::Malformed { .. }
            | Self::Unsupported { .. } => false,
        }
    }
}
