//! Requests about directories that are in a catalog and not loaded yet.

use std::sync::Arc;

use super::{Vfs, VfsError};
use crate::namespace::{
    catalog::{CatalogStatus, Loader},
    error::NotLoaded,
};

/// How often one request may find something not loaded: each time it is at least one directory less.
const ATTEMPTS: u32 = 100_000;

impl Vfs {
    /// Who loads directories from catalogs.
    pub fn set_loader(&self, loader: Arc<Loader>) {
        // Set once, by the wiring.
        let _ = self.loader.set(loader);
    }

    /// Loads what a request found missing.
    pub async fn load(&self, missing: NotLoaded) -> Result<(), VfsError> {
        let loader = self.loader.get().ok_or(VfsError::Tree(missing.into()))?;
        let applied = loader.load(missing).await?;
        self.discard(applied.discarded);
        self.tell(applied.notices);
        Ok(())
    }

    /// Does what needs directories, loading those that it finds missing.
    pub async fn with_loaded<T>(&self, act: impl Fn(&Self) -> Result<T, VfsError>) -> Result<T, VfsError> {
        for _ in 0..ATTEMPTS {
            let result = super::open::may_block(|| act(self));
            match result.as_ref().err().and_then(VfsError::not_loaded) {
                Some(missing) => self.load(missing).await?,
                None => return result,
            }
        }
        act(self)
    }

    /// The catalogs of the layers, from the top.
    #[must_use]
    pub fn catalogs(&self) -> Vec<CatalogStatus> {
        self.loader
            .get()
            .map(|loader| loader.status())
            .unwrap_or_default()
    }
}
