//! What can be wrong with the settings; all of it is the user's to mend.

use std::{io, path::PathBuf};

/// The settings cannot be used. Nothing was started.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{origin} has no setting {key:?}; known are {known}")]
    UnknownKey {
        origin: String,
        key: String,
        known: String,
    },
    #[error("{origin}: {why}")]
    BadValue { origin: String, why: String },
    #[error("cannot read the settings file {}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{} is not valid TOML at line {line}: {why}", path.display())]
    Syntax { path: PathBuf, line: usize, why: String },
    #[error("there is no home directory to keep {what} in; set HOME, or give {flag}")]
    NoHome { what: &'static str, flag: &'static str },
    #[error("cannot find the current directory, which {} is relative to", path.display())]
    NoCurrentDir { path: PathBuf, source: io::Error },
}
