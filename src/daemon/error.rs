//! Why a daemon did not start. All of it is for whoever typed the command:
//! one line that says what happened, to what, and what to do.

use std::{error::Error, io, path::PathBuf};

use super::mountpoint::MountpointError;
use crate::{
    config::ConfigError,
    namespace::{
        TreeError, catalog::CatalogError, expire::ExpireError, promote::PromoteError,
        snapshot::SnapshotError, stack::StackError, sweep::SweepError, view::ViewError, volumes::DeleteError,
    },
    store::StoreError,
    tier::TierError,
};

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{why}")]
    Usage { why: String },
    #[error(transparent)]
    Mountpoint(#[from] MountpointError),
    /// Not a source: the words have the cause in them, before the advice.
    #[error("{}", in_words(store, cause))]
    Bucket { store: String, cause: TierError },
    /// The store answers, but not as it must.
    #[error("cannot use the store {store}: {why}; casmount doctor says more")]
    Refused { store: String, why: String },
    #[error("cannot use the cache directory {}", path.display())]
    Cache { path: PathBuf, source: StoreError },
    #[error(
        "the cache directory {} belongs to volume {bound}, not to volume {wanted}: use another --cache-dir",
        dir.display()
    )]
    OtherVolume {
        dir: PathBuf,
        bound: String,
        wanted: String,
    },
    /// What the volume lies over cannot be known.
    #[error(transparent)]
    Volume { source: StackError },
    #[error(
        "there is no volume {volume} in the store {store}; see which there are with: casmount volume list"
    )]
    NoVolume { volume: String, store: String },
    /// A volume cannot be read as a whole.
    #[error(transparent)]
    View { source: ViewError },
    #[error(transparent)]
    Promote { source: PromoteError },
    #[error(transparent)]
    Delete { source: DeleteError },
    #[error(transparent)]
    Sweep { source: SweepError },
    #[error(transparent)]
    Snapshot { source: SnapshotError },
    #[error(transparent)]
    Expire { source: ExpireError },
    /// A catalog cannot be read, or not be made.
    #[error(transparent)]
    Catalog { source: CatalogError },
    #[error("cannot read the tree of the volume from the index")]
    Tree { source: TreeError },
    #[error("cannot go on with the files that the last stop left unsealed")]
    Files { source: crate::vfs::VfsError },
    #[error("cannot mount at {}{}", path.display(), mount_hint(source))]
    Mount { path: PathBuf, source: io::Error },
    #[error("the mount at {} does not answer; see the log", path.display())]
    NotAnswering { path: PathBuf, source: io::Error },
    #[error("interrupted before the mount was ready")]
    Interrupted,
    #[error("cannot {verb} {}", path.display())]
    Disk {
        verb: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl StartError {
    /// The exit code: 2 where the command itself is wrong, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Usage { .. } => 2,
            Self::Mountpoint(_)
            | Self::Bucket { .. }
            | Self::Refused { .. }
            | Self::Cache { .. }
            | Self::OtherVolume { .. }
            | Self::Volume { .. }
            | Self::NoVolume { .. }
            | Self::View { .. }
            | Self::Promote { .. }
            | Self::Delete { .. }
            | Self::Sweep { .. }
            | Self::Snapshot { .. }
            | Self::Expire { .. }
            | Self::Catalog { .. }
            | Self::Tree { .. }
            | Self::Files { .. }
            | Self::Mount { .. }
            | Self::NotAnswering { .. }
            | Self::Interrupted
            | Self::Disk { .. } => 1,
        }
    }
}

/// What a failure of the bucket means and what to do about it.
pub fn in_words(store: &str, err: &TierError) -> String {
    format!("{}; {}", what_happened(store, err), advice(store, err))
}

/// What a failure of the bucket means, with its first cause.
pub fn what_happened(store: &str, err: &TierError) -> String {
    let mut cause = err.source();
    while let Some(deeper) = cause.and_then(Error::source) {
        cause = Some(deeper);
    }
    let cause = cause
        .map(|cause| format!(": {cause}").replace('\n', " "))
        .unwrap_or_default();
    match err {
        TierError::Unavailable { .. } => format!("cannot reach the store {store}{cause}"),
        TierError::Denied { permission, key, .. } => {
            format!("no permission for {permission} in the store {store} (asked for {key}){cause}")
        }
        TierError::NoBucket { bucket } => format!("there is no bucket {bucket}"),
        TierError::Credentials { .. } => {
            format!("there are no usable credentials for the store {store}{cause}")
        }
        TierError::Malformed { .. } | TierError::Unsupported { .. } => {
            format!("cannot use the store {store}: {err}")
        }
    }
}

/// What to do about a failure of the bucket.
pub fn advice(store: &str, err: &TierError) -> &'static str {
    let directory = store.starts_with("file:");
    match err {
        TierError::Unavailable { .. } if directory => "check that its file system is mounted and healthy",
        TierError::Unavailable { .. } => "check the network, --endpoint-url and --region",
        TierError::Denied { .. } if directory => "give this user read and write access to it",
        TierError::Denied { .. } => "grant it, as the policy in the README does",
        TierError::NoBucket { .. } if directory => "create it, or correct --store",
        TierError::NoBucket { .. } => "create it, or correct --store, --region or --endpoint-url",
        TierError::Credentials { .. } => {
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role"
        }
        TierError::Malformed { .. } => {
            "see whether something else writes to this store, or name another with --store"
        }
        TierError::Unsupported { .. } => "correct the settings, use a newer casmount, or name another store",
    }
}

fn mount_hint(err: &io::Error) -> &'static str {
    match err.kind() {
        // What fusermount3 says is there as its words alone.
        _ if err.to_string().contains("allow_other") => {
            "; give --no-allow-other, or add the line user_allow_other to /etc/fuse.conf"
        }
        io::ErrorKind::PermissionDenied => {
            "; as an ordinary user you need write access to it, and /dev/fuse; casmount doctor says more"
        }
        io::ErrorKind::NotFound => {
            "; fusermount3 or /dev/fuse is missing: apt-get install fuse3; casmount doctor says more"
        }
        _ => "",
    }
}

/// An error and its causes in one line; a cause that repeats what was said is left out.
pub fn chain(err: &dyn Error) -> String {
    let mut text = err.to_string();
    let mut source = err.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text.trim_end().replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once_and_on_one_line() {
        let err = StartError::Cache {
            path: "/c".into(),
            source: StoreError::Unusable {
                why: "another daemon\nholds it".into(),
            },
        };
        assert_eq!(
            chain(&err),
            "cannot use the cache directory /c: another daemon holds it"
        );
        let transparent = StartError::Config(ConfigError::NoHome {
            what: "the cache",
            flag: "--cache-dir",
        });
        assert_eq!(chain(&transparent), transparent.to_string());
        assert_eq!((err.exit_code(), transparent.exit_code()), (1, 2));
    }

    #[test]
    fn the_missing_permission_is_named() {
        let err = TierError::Denied {
            permission: "s3:ListBucket",
            key: "casmount.json".into(),
            source: "403".into(),
        };
        let words = in_words("s3://b", &err);
        assert!(
            words.contains("s3:ListBucket") && words.contains("s3://b"),
            "{words}"
        );
    }
}
