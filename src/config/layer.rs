//! One source of settings, in which everything is optional.

use std::{ffi::OsString, path::PathBuf, str::FromStr, time::Duration};

use super::{ConfigError, VolumeName};
use crate::{
    base::{
        snapshot::SnapshotTag,
        units::{parse_duration, parse_size},
    },
    namespace::preset::at::PresetAt,
};

/// Who files belong to (`--owner`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OwnerMode {
    /// The mounting user, or `--uid` and `--gid`.
    Mount,
    /// As the machine that made them recorded it.
    Preserve,
}

/// When what was done in a fork becomes a part of its parent (`--commit`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum CommitMode {
    /// When it is unmounted with success: casmount unmount --success
    OnSuccess,
    /// Only when asked for: casmount commit, casmount fork promote
    Never,
}

/// How soon a log that has grown is compacted (`--compact-within`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompactWithin {
    Time(Duration),
    /// That is left to others.
    Never,
}

impl FromStr for CompactWithin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "never" {
            return Ok(Self::Never);
        }
        parse_duration(text)
            .map(Self::Time)
            .map_err(|err| format!("{err}, or never"))
    }
}

/// What one source says; `None` where it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    pub store: Option<String>,
    pub volume: Option<VolumeName>,
    pub snapshot: Option<SnapshotTag>,
    pub fork_from: Option<VolumeName>,
    pub commit: Option<CommitMode>,
    pub cache_dir: Option<PathBuf>,
    pub cache_size: Option<u64>,
    pub min_free: Option<u64>,
    pub endpoint_url: Option<String>,
    pub region: Option<String>,
    pub settle: Option<Duration>,
    pub read_timeout: Option<Duration>,
    pub compact_within: Option<CompactWithin>,
    pub catalog_prefetch: Option<u64>,
    pub read_only: Option<bool>,
    pub allow_other: Option<bool>,
    pub passthrough: Option<bool>,
    pub xattr: Option<bool>,
    pub owner: Option<OwnerMode>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub umask: Option<u32>,
    pub preset: Option<Vec<PresetAt>>,
    pub log_level: Option<String>,
    pub log_file: Option<PathBuf>,
}

/// A setting was not taken.
#[derive(Debug, PartialEq, Eq)]
pub enum SetError {
    UnknownKey,
    BadValue(String),
}

impl Layer {
    /// The names of all settings, as in the file.
    pub const KEYS: [&'static str; 25] = [
        "store",
        "volume",
        "snapshot",
        "fork-from",
        "commit",
        "cache-dir",
        "cache-size",
        "min-free",
        "endpoint-url",
        "region",
        "settle",
        "read-timeout",
        "compact-within",
        "catalog-prefetch",
        "read-only",
        "allow-other",
        "passthrough",
        "xattr",
        "owner",
        "uid",
        "gid",
        "umask",
        "preset",
        "log-level",
        "log-file",
    ];

    /// Sets one setting from text.
    pub fn set(&mut self, key: &str, text: &str) -> Result<(), SetError> {
        let bad = SetError::BadValue;
        match key {
            "store" => self.store = Some(text.to_owned()),
            "volume" => self.volume = Some(text.parse().map_err(bad)?),
            "snapshot" => self.snapshot = Some(text.parse().map_err(bad)?),
            "fork-from" => self.fork_from = Some(text.parse().map_err(bad)?),
            "commit" => self.commit = Some(parse_commit(text).map_err(bad)?),
            "cache-dir" => self.cache_dir = Some(text.into()),
            "cache-size" => self.cache_size = Some(parse_size(text).map_err(|err| bad(err.to_string()))?),
            "min-free" => self.min_free = Some(parse_size(text).map_err(|err| bad(err.to_string()))?),
            "endpoint-url" => self.endpoint_url = Some(text.to_owned()),
            "region" => self.region = Some(text.to_owned()),
            "settle" => self.settle = Some(parse_duration(text).map_err(|err| bad(err.to_string()))?),
            "read-timeout" => {
                self.read_timeout = Some(parse_duration(text).map_err(|err| bad(err.to_string()))?);
            }
            "compact-within" => self.compact_within = Some(text.parse().map_err(bad)?),
            "catalog-prefetch" => {
                self.catalog_prefetch = Some(parse_size(text).map_err(|err| bad(err.to_string()))?);
            }
            "read-only" => self.read_only = Some(parse_bool(text).map_err(bad)?),
            "allow-other" => self.allow_other = Some(parse_bool(text).map_err(bad)?),
            "passthrough" => self.passthrough = Some(parse_bool(text).map_err(bad)?),
            "xattr" => self.xattr = Some(parse_bool(text).map_err(bad)?),
            "owner" => self.owner = Some(parse_owner(text).map_err(bad)?),
            "uid" => self.uid = Some(parse_id(text).map_err(bad)?),
            "gid" => self.gid = Some(parse_id(text).map_err(bad)?),
            "umask" => self.umask = Some(parse_umask(text).map_err(bad)?),
            "preset" => self.preset = Some(PresetAt::list(text).map_err(bad)?),
            "log-level" => self.log_level = Some(parse_log_level(text).map_err(bad)?),
            "log-file" => self.log_file = Some(text.into()),
            _ => return Err(SetError::UnknownKey),
        }
        Ok(())
    }

    /// Reads the `CASMOUNT_*` variables through `variable`.
    pub fn from_env(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, ConfigError> {
        let mut layer = Self::default();
        for key in Self::KEYS {
            let name = variable_name(key);
            let Some(value) = variable(&name).filter(|value| !value.is_empty()) else {
                continue;
            };
            let bad = |why| ConfigError::BadValue {
                origin: format!("the environment variable {name}"),
                why,
            };
            let text = value
                .to_str()
                .ok_or_else(|| bad(format!("{} is not UTF-8", value.to_string_lossy())))?;
            match layer.set(key, text) {
                Ok(()) => {}
                Err(SetError::BadValue(why)) => return Err(bad(why)),
                Err(SetError::UnknownKey) => unreachable!("KEYS holds what `set` knows, as a test proves"),
            }
        }
        Ok(layer)
    }

    /// Lays this layer over `lower`: what both say, this one decides.
    #[must_use]
    pub fn over(self, lower: Self) -> Self {
        Self {
            store: self.store.or(lower.store),
            volume: self.volume.or(lower.volume),
            snapshot: self.snapshot.or(lower.snapshot),
            fork_from: self.fork_from.or(lower.fork_from),
            commit: self.commit.or(lower.commit),
            cache_dir: self.cache_dir.or(lower.cache_dir),
            cache_size: self.cache_size.or(lower.cache_size),
            min_free: self.min_free.or(lower.min_free),
            endpoint_url: self.endpoint_url.or(lower.endpoint_url),
            region: self.region.or(lower.region),
            settle: self.settle.or(lower.settle),
            read_timeout: self.read_timeout.or(lower.read_timeout),
            compact_within: self.compact_within.or(lower.compact_within),
            catalog_prefetch: self.catalog_prefetch.or(lower.catalog_prefetch),
            read_only: self.read_only.or(lower.read_only),
            allow_other: self.allow_other.or(lower.allow_other),
            passthrough: self.passthrough.or(lower.passthrough),
            xattr: self.xattr.or(lower.xattr),
            owner: self.owner.or(lower.owner),
            uid: self.uid.or(lower.uid),
            gid: self.gid.or(lower.gid),
            umask: self.umask.or(lower.umask),
            preset: self.preset.or(lower.preset),
            log_level: self.log_level.or(lower.log_level),
            log_file: self.log_file.or(lower.log_file),
        }
    }
}

/// `cache-size` is `CASMOUNT_CACHE_SIZE` in the environment.
pub fn variable_name(key: &str) -> String {
    format!("CASMOUNT_{}", key.replace('-', "_").to_ascii_uppercase())
}

/// Reads a switch as people write it in an environment file.
pub fn parse_bool(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(format!("{text:?} is neither true nor false")),
    }
}

/// Reads octal permission bits: `022`.
pub fn parse_umask(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    u32::from_str_radix(digits, 8)
        .ok()
        .filter(|bits| *bits <= 0o777)
        .ok_or_else(|| format!("{text:?} is not a umask (octal, 000 to 777)"))
}

/// Reads a level (`info`) or a filter of levels (`info,casmount::upload=debug`).
pub fn parse_log_level(text: &str) -> Result<String, String> {
    match tracing_subscriber::EnvFilter::from_str(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err(format!(
            "{text:?} is not a log level (error, warn, info, debug, trace, or a filter such as info,casmount::upload=debug)"
        )),
    }
}

fn parse_owner(text: &str) -> Result<OwnerMode, String> {
    <OwnerMode as clap::ValueEnum>::from_str(text, false)
        .map_err(|_| format!("{text:?} is not an owner (mount or preserve)"))
}

fn parse_commit(text: &str) -> Result<CommitMode, String> {
    <CommitMode as clap::ValueEnum>::from_str(text, false)
        .map_err(|_| format!("{text:?} is not a time to commit (on-success or never)"))
}

fn parse_id(text: &str) -> Result<u32, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is not a numeric user or group id"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_pairs(pairs: &[(&str, &str)]) -> Result<Layer, ConfigError> {
        let pairs: Vec<_> = pairs
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect();
        Layer::from_env(move |name| {
            pairs
                .iter()
                .find(|(key, _)| key == name)
                .map(|(_, value)| OsString::from(value))
        })
    }

    /// A text that each setting takes.
    fn sample(key: &str) -> &'static str {
        match key {
            "cache-size" | "min-free" | "catalog-prefetch" => "60G",
            "settle" | "read-timeout" | "compact-within" => "3s",
            "read-only" | "allow-other" | "passthrough" | "xattr" => "yes",
            "owner" => "preserve",
            "commit" => "on-success",
            "uid" | "gid" => "1000",
            "umask" => "022",
            "preset" => "cache=bazel,.=plain",
            "log-level" => "debug",
            _ => "text",
        }
    }

    #[test]
    fn every_known_key_is_taken_and_reaches_the_result() {
        for key in Layer::KEYS {
            let mut layer = Layer::default();
            layer.set(key, sample(key)).unwrap();
            assert_ne!(layer, Layer::default(), "{key}");
            assert_eq!(
                Layer::default().over(layer.clone()),
                layer,
                "{key} is lost by `over`"
            );
            let from_env = from_pairs(&[(&variable_name(key), sample(key))]).unwrap();
            assert_eq!(from_env, layer, "{key}");
        }
        assert_eq!(Layer::default().set("cachesize", "1"), Err(SetError::UnknownKey));
    }

    #[test]
    fn the_upper_layer_decides() {
        let upper = from_pairs(&[("CASMOUNT_VOLUME", "up"), ("CASMOUNT_READ_ONLY", "no")]).unwrap();
        let lower = from_pairs(&[
            ("CASMOUNT_VOLUME", "low"),
            ("CASMOUNT_READ_ONLY", "yes"),
            ("CASMOUNT_UID", "7"),
        ]);
        let both = upper.over(lower.unwrap());
        assert_eq!(both.volume.unwrap().as_str(), "up");
        assert_eq!(both.read_only, Some(false));
        assert_eq!(both.uid, Some(7));
    }

    #[test]
    fn a_bad_variable_is_named() {
        let err = from_pairs(&[("CASMOUNT_CACHE_SIZE", "lots")]).unwrap_err();
        assert!(err.to_string().contains("CASMOUNT_CACHE_SIZE"), "{err}");
        assert!(err.to_string().contains("lots"), "{err}");
    }

    #[test]
    fn an_empty_variable_is_unset() {
        let layer = from_pairs(&[("CASMOUNT_CACHE_SIZE", ""), ("CASMOUNT_STORE", "")]).unwrap();
        assert_eq!(layer, Layer::default());
    }

    #[test]
    fn values_that_mean_nothing_are_refused() {
        for (key, text) in [
            ("umask", "888"),
            ("umask", "1777"),
            ("preset", "cache=make"),
            ("preset", "a=bazel,a/=ccache"),
            ("owner", "root"),
            ("uid", "alice"),
            ("read-only", "maybe"),
            ("volume", "../x"),
            ("snapshot", "../x"),
            ("fork-from", "../x"),
            ("commit", "always"),
            ("compact-within", "soon"),
            ("log-level", "a=b=c"),
        ] {
            let got = Layer::default().set(key, text);
            assert!(matches!(got, Err(SetError::BadValue(_))), "{key}={text}: {got:?}");
        }
    }
}
