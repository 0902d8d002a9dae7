//! The settings of one mount, complete.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{CommitMode, CompactWithin, ConfigError, Dirs, Layer, OwnerMode, VolumeName, file};
use crate::{
    base::{digest::Digest, snapshot::SnapshotTag},
    namespace::preset::at::PresetAt,
};

/// Long enough that a file written again and again is uploaded once, short
/// enough that other machines see a result while they still want it.
const SETTLE: Duration = Duration::from_secs(2);
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// So that mostly one machine of a fleet does it, see `namespace::catalog::compactor`.
const COMPACT_WITHIN: CompactWithin = CompactWithin::Time(Duration::from_secs(360));

/// Everything that a mount needs to know but its mountpoint.
#[derive(Clone, Debug)]
// Each is a setting of its own.
#[allow(clippy::struct_excessive_bools)]
pub struct Settings {
    /// `s3://bucket[/prefix]` or `file:///dir`; read by the tier.
    pub store: String,
    /// The directory of the store, when none was named.
    pub default_store: Option<PathBuf>,
    pub volume: VolumeName,
    /// This state of the volume, instead of the volume itself.
    pub snapshot: Option<SnapshotTag>,
    /// Made as a fork of this volume, if it is not there.
    pub fork_from: Option<VolumeName>,
    pub commit: CommitMode,
    pub cache_dir: PathBuf,
    /// `None`: a share of the disk, see [`super::Budget`].
    pub cache_size: Option<u64>,
    pub min_free: Option<u64>,
    pub endpoint_url: Option<String>,
    pub region: Option<String>,
    pub settle: Duration,
    pub read_timeout: Duration,
    pub compact_within: CompactWithin,
    /// Catalogs of no more bytes are fetched whole; `None`: see [`super::Budget`].
    pub catalog_prefetch: Option<u64>,
    pub read_only: bool,
    pub allow_other: bool,
    pub passthrough: bool,
    pub xattr: bool,
    pub owner: OwnerMode,
    /// `None`: the mounting user.
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub umask: u32,
    /// Of directories of the volume.
    pub presets: Vec<PresetAt>,
    /// When the mount counts as not in use, and how often it looks for changes then. Nobody needs others
    /// but tests: there is a hidden flag for each, no variable and no key.
    pub rests_after: Option<Duration>,
    pub rest_pace: Option<Duration>,
    /// A level or a filter.
    pub log_level: String,
    /// `None`: standard error in the foreground, else the user's state directory.
    pub log_file: Option<PathBuf>,
}

/// Where settings come from.
#[derive(Debug)]
pub struct Sources<'a> {
    pub flags: Layer,
    /// The file that `--config` names.
    pub config: Option<&'a Path>,
    pub dirs: &'a Dirs,
    pub uid: u32,
}

impl Settings {
    /// Reads the environment through `variable` and the settings file, and resolves.
    pub fn load(
        sources: Sources<'_>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, ConfigError> {
        let env = Layer::from_env(&variable)?;
        let named = sources.config.map(Path::to_owned).or_else(|| {
            variable("CASMOUNT_CONFIG")
                .filter(|name| !name.is_empty())
                .map(PathBuf::from)
        });
        let from_file = match named {
            Some(path) => file::read(&path)?,
            None => first_file(&sources.dirs.config_files)?,
        };
        Self::resolve(sources.flags.over(env).over(from_file), sources.dirs, sources.uid)
    }

    /// Fills in the defaults.
    pub fn resolve(layer: Layer, dirs: &Dirs, uid: u32) -> Result<Self, ConfigError> {
        let (store, default_store) = if let Some(url) = layer.store {
            (url, None)
        } else {
            let dir = dirs.default_store()?;
            (format!("file://{}", dir.display()), Some(dir))
        };
        let volume = layer.volume.unwrap_or_default();
        let cache_dir = match layer.cache_dir {
            Some(dir) => absolute(dir)?,
            None => dirs.default_cache(&cache_id(&store, &volume, layer.snapshot.as_ref()))?,
        };
        Ok(Self {
            store,
            default_store,
            volume,
            fork_from: layer.fork_from,
            commit: layer.commit.unwrap_or(CommitMode::Never),
            cache_dir,
            cache_size: layer.cache_size,
            min_free: layer.min_free,
            endpoint_url: layer.endpoint_url,
            region: layer.region,
            settle: layer.settle.unwrap_or(SETTLE),
            read_timeout: layer.read_timeout.unwrap_or(READ_TIMEOUT),
            compact_within: layer.compact_within.unwrap_or(COMPACT_WITHIN),
            catalog_prefetch: layer.catalog_prefetch,
            // A snapshot cannot be changed, whatever else is said.
            read_only: layer.read_only.unwrap_or(false) || layer.snapshot.is_some(),
            snapshot: layer.snapshot,
            // Root mounts for the machine; a user's mount is that user's.
            allow_other: layer.allow_other.unwrap_or(uid == 0),
            passthrough: layer.passthrough.unwrap_or(true),
            xattr: layer.xattr.unwrap_or(false),
            owner: layer.owner.unwrap_or(OwnerMode::Mount),
            uid: layer.uid,
            gid: layer.gid,
            umask: layer.umask.unwrap_or(0),
            presets: layer.preset.unwrap_or_default(),
            rests_after: None,
            rest_pace: None,
            log_level: layer.log_level.unwrap_or_else(|| "info".to_owned()),
            log_file: layer.log_file.map(absolute).transpose()?,
        })
    }
}

/// Names the cache of a volume of a store, or of a snapshot of it.
fn cache_id(store: &str, volume: &VolumeName, snapshot: Option<&SnapshotTag>) -> String {
    let snapshot = snapshot.map_or(String::new(), |tag| format!("\n{tag}"));
    let text = format!("{}\n{volume}{snapshot}", store.trim_end_matches('/'));
    Digest::of(text.as_bytes()).to_string()[..16].to_owned()
}

fn first_file(paths: &[PathBuf]) -> Result<Layer, ConfigError> {
    for path in paths {
        if let Some(layer) = file::read_if_there(path)? {
            return Ok(layer);
        }
    }
    Ok(Layer::default())
}

fn absolute(path: PathBuf) -> Result<PathBuf, ConfigError> {
    std::path::absolute(&path).map_err(|source| ConfigError::NoCurrentDir { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs() -> Dirs {
        Dirs::new(1000, |name| (name == "HOME").then(|| "/home/a".into()))
    }

    fn layer(pairs: &[(&str, &str)]) -> Layer {
        let mut layer = Layer::default();
        for (key, text) in pairs {
            layer.set(key, text).unwrap();
        }
        layer
    }

    #[test]
    fn nothing_configured_is_enough() {
        let settings = Settings::resolve(Layer::default(), &dirs(), 1000).unwrap();
        assert_eq!(settings.store, "file:///home/a/.local/share/casmount/store");
        assert_eq!(settings.volume.as_str(), "main");
        assert!(settings.cache_dir.starts_with("/home/a/.cache/casmount"));
        assert!(!settings.allow_other);
        assert!(
            Settings::resolve(Layer::default(), &dirs(), 0)
                .unwrap()
                .allow_other
        );
    }

    #[test]
    fn no_two_volumes_snapshots_or_stores_share_a_cache() {
        let cache = |pairs| Settings::resolve(layer(pairs), &dirs(), 1000).unwrap().cache_dir;
        let main = cache(&[("store", "s3://b")]);
        assert_eq!(main, cache(&[("store", "s3://b/")]));
        assert_ne!(main, cache(&[("store", "s3://b"), ("volume", "other")]));
        assert_ne!(main, cache(&[("store", "s3://c")]));
        let snapshot = cache(&[("store", "s3://b"), ("snapshot", "v=1")]);
        assert_ne!(main, snapshot);
        assert_ne!(snapshot, cache(&[("store", "s3://b"), ("snapshot", "v=2")]));
    }

    #[test]
    fn a_snapshot_is_read_only() {
        let pairs = [("snapshot", "v=1"), ("read-only", "no")];
        assert!(Settings::resolve(layer(&pairs), &dirs(), 1000).unwrap().read_only);
    }

    #[test]
    fn flag_beats_environment_beats_file_beats_default() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "volume = 'file'\nsettle = '7s'\nregion = 'file'\n").unwrap();
        let load = |flags: &[(&str, &str)], config: Option<&Path>| {
            let sources = Sources {
                flags: layer(flags),
                config,
                dirs: &dirs(),
                uid: 1000,
            };
            Settings::load(sources, |name| match name {
                "CASMOUNT_VOLUME" | "CASMOUNT_REGION" => Some("env".into()),
                _ => None,
            })
            .unwrap()
        };
        let settings = load(&[("volume", "flag")], Some(&path));
        assert_eq!(settings.volume.as_str(), "flag");
        assert_eq!(settings.region.as_deref(), Some("env"));
        assert_eq!(settings.settle, Duration::from_secs(7));
        assert_eq!(settings.read_timeout, READ_TIMEOUT);
        assert_eq!(load(&[], None).settle, SETTLE);
    }

    #[test]
    fn the_file_that_a_variable_names_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "volume = 'named'").unwrap();
        let sources = Sources {
            flags: Layer::default(),
            config: None,
            dirs: &dirs(),
            uid: 1000,
        };
        let settings = Settings::load(sources, |name| {
            (name == "CASMOUNT_CONFIG").then(|| path.clone().into_os_string())
        });
        assert_eq!(settings.unwrap().volume.as_str(), "named");
    }

    #[test]
    fn paths_are_absolute() {
        let settings =
            Settings::resolve(layer(&[("cache-dir", "c"), ("log-file", "l")]), &dirs(), 1000).unwrap();
        assert!(settings.cache_dir.is_absolute());
        assert!(settings.log_file.unwrap().is_absolute());
    }
}
