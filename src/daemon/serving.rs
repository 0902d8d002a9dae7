//! The parts of a daemon that serves, and what can be asked of them.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use crate::{
    base::{id::StoreId, snapshot::Frozen},
    config::{Budget, Settings, budget},
    fuse::Mounted,
    namespace::TreeError,
    observe::{
        Status, memory,
        status::{
            Cache, Catalog, Compact, Files, Follow, Layer, PresetDir, Publish, State, Tier, Upload, Uses,
        },
    },
    tier::SharedBucket,
    vfs::VfsError,
};

use tokio::sync::watch;

use super::{control::protocol::ListedFile, layers::Layers};

/// Everything between the mount and the bucket.
#[derive(Debug)]
pub struct Serving {
    pub settings: Settings,
    pub budget: Budget,
    /// Canonical.
    pub mountpoint: PathBuf,
    /// Of the mount, as the kernel's table has it; `None`: it was not found there.
    pub device: Option<String>,
    pub log_file: Option<PathBuf>,
    pub started: Instant,
    pub store_id: StoreId,
    pub bucket: SharedBucket,
    /// The same, also where the blobs of the mounted volume are kept apart.
    pub whole_bucket: SharedBucket,
    pub layers: Layers,
    pub mounted: Arc<Mounted>,
    /// An unmount is under way.
    pub stopping: AtomicBool,
    /// True from the moment everything is closed: commands under way give up.
    pub ending: watch::Sender<bool>,
}

impl Serving {
    /// The newest trouble, worst first: what follows fails when the bucket is away.
    pub fn last_error(&self) -> Option<String> {
        self.layers
            .uploader
            .status()
            .last_error
            .or_else(|| self.layers.publisher.status().last_error)
            .or_else(|| self.layers.follower.status().last_error)
    }

    /// What is mounted, if it is a snapshot.
    pub fn snapshot(&self) -> Option<&Frozen> {
        self.layers.store.stack()?.snapshot()
    }

    /// Looks at all parts; asks nobody outside this process but the disk for its free space.
    pub fn status(&self) -> Status {
        let upload = Upload::from(self.layers.uploader.status());
        let publisher = self.layers.publisher.status();
        let lost = self.layers.vfs.status().lost + publisher.lost;
        let publish = Publish::from(publisher);
        let follow = Follow::from(self.layers.follower.status());
        let disk = budget::disk_of(&self.settings.cache_dir);
        let tier = Tier::new(
            self.bucket.url(),
            self.bucket.clock().offset_millis(),
            &follow,
            &upload,
            &publish,
        );
        Status {
            mountpoint: self.mountpoint.display().to_string(),
            volume: self.settings.volume.to_string(),
            snapshot: self.snapshot().map(Into::into),
            store: self.settings.store.clone(),
            store_id: self.store_id.to_string(),
            machine: self.layers.store.machine.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            state: if self.stopping.load(Ordering::Relaxed) {
                State::Stopping
            } else {
                State::Serving
            },
            uptime_seconds: self.started.elapsed().as_secs(),
            memory_bytes: memory::resident_bytes(),
            read_only: self.settings.read_only,
            passthrough: self.mounted.passthrough(),
            cache_dir: self.settings.cache_dir.display().to_string(),
            log_file: self.log_file.as_ref().map(|path| path.display().to_string()),
            cache: Cache::new(
                &self.layers.store.ledger.totals(),
                self.budget.cache_size,
                self.budget.min_free,
                disk.map_or(0, |disk| disk.free_bytes),
            ),
            files: Files {
                lost,
                last_misnamed: self.layers.vfs.last_misnamed(),
                ..self.layers.vfs.status().into()
            },
            upload,
            publish,
            follow,
            layers: self
                .layers
                .follower
                .layers()
                .into_iter()
                .map(Layer::from)
                .collect(),
            presets: self
                .layers
                .vfs
                .preset_dirs()
                .into_iter()
                .map(PresetDir::from)
                .collect(),
            catalogs: self
                .layers
                .vfs
                .catalogs()
                .into_iter()
                .map(Catalog::from)
                .collect(),
            compact: self
                .layers
                .compactors
                .iter()
                .map(|compactor| Compact::from(compactor.status()))
                .fold(Compact::default(), Compact::and),
            uses: self
                .layers
                .teller
                .as_ref()
                .map(|teller| Uses::from(teller.status()))
                .unwrap_or_default(),
            tiers: vec![tier],
            last_error: self.last_error(),
        }
    }

    /// Lists a path of the mount; the error is for the user.
    pub async fn list(&self, path: &[u8]) -> Result<Vec<ListedFile>, String> {
        let listed = self.layers.vfs.with_loaded(|vfs| vfs.list(path)).await;
        match listed {
            Ok(files) => Ok(files.into_iter().map(ListedFile::from).collect()),
            Err(VfsError::Tree(err @ (TreeError::NotFound | TreeError::NotDirectory))) => Err(format!(
                "{err}: {} in {}",
                String::from_utf8_lossy(path),
                self.mountpoint.display()
            )),
            Err(err) => Err(super::error::chain(&err)),
        }
    }
}
