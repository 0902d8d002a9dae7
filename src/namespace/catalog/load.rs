//! Loads directories from the catalogs of their layers when they are first touched.
//!
//! # Policy
//!
//! - A directory is loaded in all of its layers, and with it those that follow it in the same
//!   part, up to `AHEAD` registers: who walks a tree wants them next.
//! - Parts that came are kept in memory, unpacked, a few of them. Where they come from, and what is kept on the disk, is
//!   `fetch`'s; that most of them are there before anybody looks, [`super::prefetch`]'s.
//! - A part that does not come is asked for again until the time of a read is over; one
//!   that is damaged fails at once. Nothing is marked as loaded then.
//! - A catalog of which something is gone was superseded long ago, and a sweep took it. The newest one takes its
//!   place: it has what the old one had, and of what came since only what the follower applies as well.
//! - When a catalog has hard links, all names of them are loaded with its first directory: a file
//!   must be known under all of its names.

use std::{
    num::NonZeroUsize,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use lru::LruCache;
use tokio::sync::{Mutex as TaskMutex, Notify, OnceCell};

use super::{
    CatalogError,
    attach::Attached,
    fetch::Fetch,
    format::{PartRef, Root},
    order, read,
};
use crate::{
    base::{
        digest::Digest,
        flight::Flights,
        volume::{Stack, StackLayer},
    },
    namespace::{
        TreeError,
        background::{blocking, words},
        change::{EntryChunks, Item},
        error::NotLoaded,
        tree::{Applied, Reach, Tree, Undecided},
    },
    store::{
        Store, StoreError,
        rows::{Ino, TreeLayer},
    },
    tier::SharedBucket,
};

/// Registers that are loaded beside those that were asked for.
const AHEAD: usize = 4096;

/// Parts in memory: some 3 MB each.
const PARTS: NonZeroUsize = NonZeroUsize::new(4).expect("not zero");

/// A directory was not loaded. Asking again may help.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LoadError {
    #[error("cannot load a directory of volume {volume} from its catalog")]
    Catalog {
        volume: String,
        source: Arc<CatalogError>,
    },
    #[error("cannot fetch a chunk list that the catalog of volume {volume} names")]
    List { volume: String, source: Arc<StoreError> },
    #[error("cannot merge what a catalog says")]
    Tree(#[source] Arc<TreeError>),
}

impl LoadError {
    /// Whether it is the bucket that is away, or refuses.
    pub(super) fn is_of_bucket(&self) -> bool {
        match self {
            Self::Catalog { source, .. } => matches!(**source, CatalogError::Bucket(_)),
            Self::List { source, .. } => matches!(**source, StoreError::Unreachable { .. }),
            Self::Tree(_) => false,
        }
    }

    /// Whether it is this disk that takes nothing.
    pub(super) fn is_of_disk(&self) -> bool {
        use StoreError::{Disk, Full, Index};
        matches!(self, Self::List { source, .. } if matches!(**source, Full | Disk { .. } | Index { .. }))
    }

    /// Whether an object of a catalog is gone.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Self::Catalog { source, .. } if matches!(**source, CatalogError::Missing { .. }))
    }
}

impl From<TreeError> for LoadError {
    fn from(err: TreeError) -> Self {
        Self::Tree(Arc::new(err))
    }
}

/// The catalogs of a tree, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CatalogStatus {
    pub volume: String,
    pub catalog: String,
    pub watermark_millis: u64,
    /// Of the whole catalog; `None`: nothing was loaded from it since the daemon started.
    pub names: Option<u64>,
    pub parts: Option<u64>,
    /// On this disk.
    pub kept_parts: u64,
    /// Since the daemon started.
    pub fetched_parts: u64,
    pub loaded_registers: u64,
    pub last_error: Option<String>,
}

#[derive(Debug)]
pub(super) struct Layer {
    number: TreeLayer,
    pub(super) volume: String,
    followed: StackLayer,
    source: Mutex<Arc<Source>>,
    pub(super) kept_parts: AtomicU64,
    pub(super) fetched_parts: AtomicU64,
    loaded: AtomicU64,
    last_error: Mutex<Option<String>>,
}

/// The catalog that a layer is loaded from.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) attached: Attached,
    root: OnceCell<Arc<Root>>,
    linked: OnceCell<()>,
}

impl Source {
    fn new(attached: Attached, root: Option<Arc<Root>>) -> Self {
        Self {
            root: root.map_or_else(OnceCell::new, |root| OnceCell::new_with(Some(root))),
            linked: OnceCell::new_with(attached.linked.then_some(())),
            attached,
        }
    }
}

type Part = Arc<Vec<Item>>;

/// How often another catalog takes the place of one that is gone, for one directory.
const RENEWALS: u32 = 3;

/// See the module.
#[derive(Debug)]
pub struct Loader {
    tree: Arc<Tree>,
    store: Arc<Store>,
    pub(super) layers: Vec<Layer>,
    pub(super) fetch: Fetch,
    /// How often the disk was cleared when the parts that are kept were counted.
    pub(super) clearings: AtomicU64,
    /// Another catalog took the place of one that is gone.
    pub(super) renewed: Notify,
    parts: Mutex<LruCache<Digest, Part>>,
    unpacking: Flights<Digest, Result<Part, Arc<CatalogError>>>,
    /// Held while a directory's registers are merged.
    merging: TaskMutex<()>,
}

impl Loader {
    /// For the catalogs that were attached to the layers of `stack`.
    ///
    /// `within` bounds how long one part is waited for. Catalogs of up to `most_kept` bytes are kept on this disk.
    /// `known` are roots that were read already.
    pub fn new(
        stack: &Stack,
        tree: &Arc<Tree>,
        store: &Arc<Store>,
        bucket: &SharedBucket,
        within: Duration,
        most_kept: u64,
        known: &[Option<read::Opened>],
    ) -> Result<Self, StoreError> {
        let mut layers = Vec::new();
        for (layer, number) in stack.layers().iter().zip((0..).map_while(TreeLayer::new)) {
            let volume = layer.volume.to_string();
            let Some(attached) = Attached::of(&store.ledger, &volume)? else {
                continue;
            };
            let known = known
                .iter()
                .flatten()
                .find(|opened| opened.digest == attached.catalog);
            let root = known.map(|opened| Arc::clone(&opened.root));
            layers.push(Layer {
                number,
                volume,
                followed: layer.clone(),
                source: Mutex::new(Arc::new(Source::new(attached, root))),
                kept_parts: AtomicU64::new(0),
                fetched_parts: AtomicU64::new(0),
                loaded: AtomicU64::new(0),
                last_error: Mutex::default(),
            });
        }
        Ok(Self {
            tree: Arc::clone(tree),
            store: Arc::clone(store),
            layers,
            fetch: Fetch::new(bucket, &store.objects, within, most_kept),
            clearings: AtomicU64::new(0),
            renewed: Notify::new(),
            parts: Mutex::new(LruCache::new(PARTS)),
            unpacking: Flights::default(),
            merging: TaskMutex::default(),
        })
    }

    pub fn status(&self) -> Vec<CatalogStatus> {
        let clearings = self.fetch.objects.clearings();
        let is_cleared = *clearings.borrow() != self.clearings.load(Ordering::Relaxed);
        let status = |layer: &Layer| {
            let source = layer.source();
            let root = source.root.get();
            CatalogStatus {
                volume: layer.volume.clone(),
                catalog: source.attached.catalog.to_string(),
                watermark_millis: source.attached.watermark_millis,
                names: root.map(|root| root.names),
                parts: root.map(|root| (root.parts.len() + root.linked.len()) as u64),
                kept_parts: if is_cleared {
                    0
                } else {
                    layer.kept_parts.load(Ordering::Relaxed)
                },
                fetched_parts: layer.fetched_parts.load(Ordering::Relaxed),
                loaded_registers: layer.loaded.load(Ordering::Relaxed),
                last_error: layer.error().clone(),
            }
        };
        self.layers.iter().map(status).collect()
    }

    /// Loads what `missing` names; returns what the kernel and the staging folder have to know.
    pub async fn load(&self, missing: NotLoaded) -> Result<Applied, LoadError> {
        let mut applied = Applied::default();
        let mut dirs = vec![missing.dir];
        while let Some(dir) = dirs.pop() {
            self.load_dir(dir, &mut applied).await?;
            if missing.below {
                let tree = Arc::clone(&self.tree);
                dirs.extend(blocking(move || tree.dirs_in(dir)).await?);
            }
        }
        Ok(applied)
    }

    async fn load_dir(&self, dir: Ino, applied: &mut Applied) -> Result<(), LoadError> {
        for layer in &self.layers {
            if !self.tree.unloaded(dir)?.is_in(layer.number) {
                continue;
            }
            let done = self.load_from(layer, dir, applied).await;
            let error = done.as_ref().err().map(|err| words(err));
            if let Some(error) = &error
                && layer.error().as_ref() != Some(error)
            {
                tracing::error!(error, volume = layer.volume, "a directory cannot be shown");
            }
            *layer.error() = error;
            done?;
        }
        Ok(())
    }

    async fn load_from(&self, layer: &Layer, dir: Ino, applied: &mut Applied) -> Result<(), LoadError> {
        for _ in 0..RENEWALS {
            let source = layer.source();
            match self.load_from_source(layer, &source, dir, applied).await {
                Err(err) if err.is_gone() => {
                    if !self.renew(layer, &source).await? {
                        return Err(err);
                    }
                }
                done => return done,
            }
        }
        self.load_from_source(layer, &layer.source(), dir, applied).await
    }

    /// Puts the newest catalog into the place of `gone`; false when there is none that could take it, as there
    /// never is for that of a snapshot.
    pub(super) async fn renew(&self, layer: &Layer, gone: &Arc<Source>) -> Result<bool, LoadError> {
        if layer.followed.frozen.is_some() {
            return Ok(false);
        }
        let read = || read::of_layer(self.fetch.bucket.as_ref(), &layer.followed);
        let opened = self.fetch.insist(read).await.map_err(|err| layer.failed(err))?;
        let old = &gone.attached;
        // An older one would lack what the follower did not need to read.
        let fits = |opened: &read::Opened| {
            opened.digest != old.catalog && opened.root.watermark_millis >= old.watermark_millis
        };
        let Some(opened) = opened.filter(fits) else {
            return Ok(!Arc::ptr_eq(gone, &layer.source()));
        };
        let attached = Attached {
            catalog: opened.digest,
            watermark_millis: opened.root.watermark_millis,
            reads_own: old.reads_own,
            linked: gone.linked.initialized(),
        };
        let note = attached.note(&layer.volume);
        self.store.ledger.commit(vec![note]).map_err(TreeError::Store)?;
        tracing::info!(
            volume = layer.volume,
            gone = %old.catalog,
            "a catalog is gone, and directories are loaded from the newest one"
        );
        *layer.current() = Arc::new(Source::new(attached, Some(opened.root)));
        self.renewed.notify_one();
        Ok(true)
    }

    async fn load_from_source(
        &self,
        layer: &Layer,
        source: &Source,
        dir: Ino,
        applied: &mut Applied,
    ) -> Result<(), LoadError> {
        let root = self.root(layer, source).await?;
        source
            .linked
            .get_or_try_init(|| self.load_linked(layer, source, root))
            .await?;
        let path = self.tree.dir_path(dir)?;
        let range = parts_of(&root.parts, &path);
        if range.is_empty() {
            // There is nothing in it, whatever its register says.
            let nothing = Slice {
                dir: Some(dir),
                range: 0..0,
                reach: Reach::End(Undecided::default()),
            };
            self.merge(layer, Arc::default(), vec![nothing], applied).await?;
            return Ok(());
        }
        let mut undecided = Undecided::default();
        for number in range.clone() {
            let part = self.part(layer, root, &root.parts[number]).await?;
            let start = part.partition_point(|item| compare_dir(item, &path).is_lt());
            let end = part.partition_point(|item| compare_dir(item, &path).is_le());
            let mut slices = vec![Slice {
                dir: Some(dir),
                range: start..end,
                reach: if number + 1 == range.end {
                    Reach::End(undecided)
                } else {
                    Reach::Middle
                },
            }];
            if number + 1 == range.end {
                let next = root.parts.get(number + 1).map(|part| part.first.as_slice());
                slices.extend(ahead(&part, end, next));
            }
            undecided = undecided.or(self.merge(layer, part, slices, applied).await?);
        }
        Ok(())
    }

    /// Loads every register that has a link id.
    async fn load_linked(&self, layer: &Layer, source: &Source, root: &Root) -> Result<(), LoadError> {
        for part in &root.linked {
            let items = self.part(layer, root, part).await?;
            self.fetch_lists(layer, &items).await?;
            let (tree, number) = (Arc::clone(&self.tree), layer.number);
            layer.loaded.fetch_add(items.len() as u64, Ordering::Relaxed);
            blocking(move || tree.load_anywhere(number, items.to_vec())).await?;
        }
        let noted = Attached {
            linked: true,
            ..source.attached.clone()
        };
        let commit = self.store.ledger.commit(vec![noted.note(&layer.volume)]);
        Ok(commit.map_err(TreeError::Store)?)
    }

    /// Merges directories of one part; returns what is to be said of the first at its end.
    async fn merge(
        &self,
        layer: &Layer,
        part: Part,
        slices: Vec<Slice>,
        applied: &mut Applied,
    ) -> Result<Undecided, LoadError> {
        for slice in &slices {
            self.fetch_lists(layer, &part[slice.range.clone()]).await?;
        }
        let count: usize = slices.iter().map(|slice| slice.range.len()).sum();
        let _merging = self.merging.lock().await;
        let (tree, number) = (Arc::clone(&self.tree), layer.number);
        let merged = blocking(move || -> Result<_, TreeError> {
            let mut merged = Applied::default();
            let mut first = Undecided::default();
            for slice in slices {
                let items = &part[slice.range];
                let dir = match (slice.dir, items.first()) {
                    (None, Some(first)) => tree.dir_at(order::split(&first.path).0)?,
                    (dir, _) => dir,
                };
                let Some(dir) = dir else { continue };
                let (done, undecided) = tree.load(number, dir, items, slice.reach)?;
                if slice.dir.is_some() {
                    first = undecided;
                }
                merged.notices.extend(done.notices);
                merged.discarded.extend(done.discarded);
            }
            Ok((merged, first))
        })
        .await?;
        let (merged, first) = merged;
        layer.loaded.fetch_add(count as u64, Ordering::Relaxed);
        applied.notices.extend(merged.notices);
        applied.discarded.extend(merged.discarded);
        Ok(first)
    }

    /// Fetches the chunk lists that entries name, so that an open never waits for them.
    pub(super) async fn fetch_lists(&self, layer: &Layer, items: &[Item]) -> Result<(), LoadError> {
        let blobs = items.iter().filter_map(|item| item.entry()?.blob.as_ref());
        for blob in blobs {
            let EntryChunks::Listed { digest, size } = blob.chunks else {
                continue;
            };
            let fetcher = &self.store.fetcher;
            match fetcher.fetch_manifest(digest, size, blob.digest, blob.size).await {
                Ok(()) => {}
                Err(StoreError::Missing { .. } | StoreError::Corrupt { .. }) => {
                    tracing::warn!(blob = %blob.digest, list = %digest, "the chunk list of a blob is lost");
                }
                Err(source) => {
                    return Err(LoadError::List {
                        volume: layer.volume.clone(),
                        source: Arc::new(source),
                    });
                }
            }
        }
        Ok(())
    }

    pub(super) async fn root<'a>(
        &self,
        layer: &Layer,
        source: &'a Source,
    ) -> Result<&'a Arc<Root>, LoadError> {
        if let Some(root) = source.root.get() {
            return Ok(root);
        }
        // Not within the cell: there one would wait after the other, each for as long as a read may take.
        let root = self.fetch.root(&layer.volume, &source.attached.catalog).await;
        let root = Arc::new(root.map_err(|err| layer.failed(err))?);
        Ok(source.root.get_or_init(|| async { root }).await)
    }

    async fn part(&self, layer: &Layer, root: &Root, part: &PartRef) -> Result<Part, LoadError> {
        if let Some(known) = self.recent().get(&part.digest) {
            return Ok(Arc::clone(known));
        }
        let unpack = async {
            let got = self
                .fetch
                .part(&layer.volume, root, part, &layer.fetched_parts)
                .await?;
            let items = Arc::new(read::items_of(&layer.volume, part, got.bytes).await?);
            self.recent().put(part.digest, Arc::clone(&items));
            Ok(items)
        };
        let unpacked = self.unpacking.run(part.digest, unpack).await;
        unpacked.map_err(|err| layer.failed(err))
    }

    fn recent(&self) -> std::sync::MutexGuard<'_, LruCache<Digest, Part>> {
        self.parts
            .lock()
            .expect("no code panics while it holds the parts")
    }
}

impl Layer {
    fn current(&self) -> std::sync::MutexGuard<'_, Arc<Source>> {
        self.source
            .lock()
            .expect("no code panics while it holds the source")
    }

    pub(super) fn source(&self) -> Arc<Source> {
        Arc::clone(&self.current())
    }

    fn error(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.last_error
            .lock()
            .expect("no code panics while it holds the words")
    }

    pub(super) fn failed(&self, err: impl Into<Arc<CatalogError>>) -> LoadError {
        LoadError::Catalog {
            volume: self.volume.clone(),
            source: err.into(),
        }
    }
}

/// Registers of one directory in a part.
#[derive(Debug)]
struct Slice {
    /// `None`: wherever their paths lead by then.
    dir: Option<Ino>,
    range: Range<usize>,
    reach: Reach,
}

/// The directories behind `start` that lie wholly in a part, up to `AHEAD` registers.
fn ahead(part: &Part, start: usize, next: Option<&[u8]>) -> Vec<Slice> {
    let mut slices = Vec::new();
    let mut at = start;
    while at < part.len() && at - start < AHEAD {
        let dir = order::split(&part[at].path).0;
        let end = at + part[at..].partition_point(|item| compare_dir(item, dir).is_le());
        if end == part.len() && next.is_some_and(|next| order::split(next).0 == dir) {
            break;
        }
        slices.push(Slice {
            dir: None,
            range: at..end,
            reach: Reach::End(Undecided::default()),
        });
        at = end;
    }
    slices
}

fn compare_dir(item: &Item, dir: &[u8]) -> std::cmp::Ordering {
    order::compare_dirs(order::split(&item.path).0, dir)
}

/// The parts that may have registers of a directory.
fn parts_of(parts: &[PartRef], dir: &[u8]) -> Range<usize> {
    let compare = |part: &PartRef| order::compare_dirs(order::split(&part.first).0, dir);
    let end = parts.partition_point(|part| compare(part).is_le());
    let start = parts.get(1..).unwrap_or_default();
    start.partition_point(|part| compare(part).is_lt())..end
}
