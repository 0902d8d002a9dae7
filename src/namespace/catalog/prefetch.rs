//! Fetches catalogs whole, behind the mount, so that no look-up waits for the bucket.
//!
//! # Policy
//!
//! - Of each layer whose catalog has no more bytes than the mount was told (`catalog-prefetch`): first the parts with hard
//!   links, which any first look waits for, then all others in their order; [`PARALLEL`] at once, so that files that are read
//!   have most of the link. With a part come the chunk lists that it names.
//! - A look-up that is faster fetches its part itself, and it is not fetched again. So once it is known how large a
//!   catalog is, look-ups add no request to those that are made anyway.
//! - While the bucket is away, or a part damaged, it is asked again, at least once a minute. Where the disk has no room, which is looked at again
//!   later, or the catalog is larger, directories are loaded from the bucket as they are touched.
//! - When the loader takes a newer catalog because its own is gone, that is fetched as well.
//! - Of catalogs that nothing is loaded from any more, nothing is kept.

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    task::{JoinHandle, JoinSet},
};

use super::{
    LoadError, Loader,
    fetch::{Source, bytes_of},
    format::{PartRef, Root},
    load::Layer,
    read,
};
use crate::{
    base::{retry::Backoff, units::format_size},
    namespace::background::{blocking, words},
};

/// Parts under way at once.
const PARALLEL: usize = 4;

const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(60);
/// When a full disk is looked at again: each time some parts are fetched in vain.
const NO_ROOM: Duration = Duration::from_secs(600);

/// The task that fetches; dropped, it goes on.
#[derive(Debug)]
pub struct PrefetchHandle {
    task: JoinHandle<()>,
}

/// Why not everything is on the disk.
#[derive(Debug, thiserror::Error)]
enum Short {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("the disk has no room for it")]
    NoRoom,
}

/// Starts the task.
pub fn spawn(runtime: &Handle, loader: &Arc<Loader>) -> PrefetchHandle {
    PrefetchHandle {
        task: runtime.spawn(run(Arc::clone(loader))),
    }
}

impl PrefetchHandle {
    pub async fn shutdown(self) {
        self.task.abort();
        // It was told to end.
        let _ = self.task.await;
    }
}

async fn run(loader: Arc<Loader>) {
    let mut said = None;
    let mut backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
    loop {
        let again = match loader.fetch_whole().await {
            Ok(()) => {
                said = None;
                backoff.reset();
                None
            }
            Err(short) => {
                let why = words(&short);
                if said.as_ref() != Some(&why) {
                    tracing::warn!(why, "a catalog is not fetched whole");
                    said = Some(why);
                }
                Some(match short {
                    Short::Load(_) => backoff.next_wait(),
                    Short::NoRoom => NO_ROOM,
                })
            }
        };
        match again {
            None => loader.renewed.notified().await,
            // What was renewed is seen then.
            Some(wait) => tokio::time::sleep(wait).await,
        }
    }
}

impl Loader {
    /// Puts all catalogs that are to be kept on this disk, and takes those away that are not.
    async fn fetch_whole(self: &Arc<Self>) -> Result<(), Short> {
        let mut wanted = HashSet::new();
        let mut whole = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let source = layer.source();
            let root = Arc::clone(self.root(layer, &source).await?);
            if !self.fetch.keeps(&root) {
                let bytes = format_size(bytes_of(&root));
                tracing::info!(
                    volume = layer.volume,
                    bytes,
                    "the catalog is larger than catalog-prefetch: directories are loaded from the store as they are touched"
                );
                continue;
            }
            wanted.insert(source.attached.catalog);
            wanted.extend(parts_of(&root).map(|part| part.digest));
            whole.push((number, root));
        }
        let objects = self.fetch.objects.clone();
        let cleared = blocking(move || objects.retain(&wanted)).await;
        if let Err(err) = cleared {
            tracing::warn!(error = words(&err), "objects of older catalogs stay on the disk");
        }
        for (number, root) in whole {
            let layer = &self.layers[number];
            layer.kept_parts.store(0, Ordering::Relaxed);
            let fetched = self.fetch_parts(number, &root).await?;
            if fetched > 0 {
                let bytes = format_size(fetched);
                tracing::info!(volume = layer.volume, bytes, "the catalog is whole on this disk");
            }
        }
        Ok(())
    }

    /// Returns how many bytes came from the bucket.
    async fn fetch_parts(self: &Arc<Self>, layer: usize, root: &Arc<Root>) -> Result<u64, Short> {
        let mut fetched = 0;
        // Dropped in the middle, it ends all of them.
        let mut under_way = JoinSet::new();
        for part in parts_of(root) {
            if under_way.len() >= PARALLEL
                && let Some(done) = under_way.join_next().await
            {
                fetched += done.expect("fetching does not panic")?;
            }
            let (loader, root, part) = (Arc::clone(self), Arc::clone(root), part.clone());
            under_way.spawn(async move { loader.fetch_part(&loader.layers[layer], &root, &part).await });
        }
        while let Some(done) = under_way.join_next().await {
            fetched += done.expect("fetching does not panic")?;
        }
        Ok(fetched)
    }

    async fn fetch_part(&self, layer: &Layer, root: &Root, part: &PartRef) -> Result<u64, Short> {
        let (name, len) = (part.digest, part.bytes);
        let is_here = || {
            let objects = self.fetch.objects.clone();
            blocking(move || objects.has(&name, len))
        };
        let mut fetched = 0;
        if !is_here().await {
            let got = self.part_bytes(layer, root, part).await;
            let (bytes, source) = got.map_err(|err| layer.failed(err))?;
            if source == Source::Bucket {
                fetched = len;
                let items = read::items_of(&layer.volume, part, bytes).await;
                let items = items.map_err(|err| layer.failed(err))?;
                self.fetch_lists(layer, &items).await?;
            }
            if !is_here().await {
                return Err(Short::NoRoom);
            }
        }
        layer.kept_parts.fetch_add(1, Ordering::Relaxed);
        Ok(fetched)
    }
}

fn parts_of(root: &Root) -> impl Iterator<Item = &PartRef> {
    root.linked.iter().chain(&root.parts)
}
