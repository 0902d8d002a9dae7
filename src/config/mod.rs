//! Settings: flag, then environment, then file, then default.
//!
//! Each source is read into a [`Layer`], where everything is optional; the
//! layers are laid over one another and resolved into [`Settings`], where
//! nothing is. Below this module nobody reads a flag, a variable or a file.
//!
//! A setting has one name: `--cache-size` on the command line is
//! `CASMOUNT_CACHE_SIZE` in the environment and `cache-size` in the file, and
//! reads the same text in all three.
//!
//! # Invariants
//!
//! - A name or value that is not understood is an error that names it and its
//!   source; it is never ignored (a misspelt limit would be no limit). Only
//!   variables are different: others than ours may start with `CASMOUNT_`.
//! - An empty variable is an unset one, as in an `EnvironmentFile` with blanks.
//! - Paths are absolute after resolving: the daemon leaves the directory it was started in.
//! - Two volumes, snapshots or stores never share a default cache directory.

pub mod budget;
pub mod dirs;
pub mod error;
pub mod file;
pub mod layer;
pub mod settings;

pub use budget::Budget;
pub use dirs::Dirs;
pub use error::ConfigError;
pub use layer::{CommitMode, CompactWithin, Layer, OwnerMode};
pub use settings::Settings;

pub use crate::base::volume::VolumeName;
