//! Catalogs: checkpoints of a volume that lets a machine begin without reading its log.

pub mod attach;
pub mod compact;
pub mod compactor;
pub mod delta;
pub mod error;
pub mod fold;
pub mod format;
pub mod head;
pub mod load;
pub mod order;
pub mod read;
pub mod write;

pub use error::CatalogError;
pub use load::{CatalogStatus, LoadError, Loader};
