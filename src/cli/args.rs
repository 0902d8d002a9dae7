//! Arguments that several commands share.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;

use crate::{
    base::units,
    cli::failure::Failure,
    config::{Dirs, Layer, Settings, VolumeName, settings::Sources},
    daemon::mountpoint,
};

/// Which store, and how it is reached.
#[derive(Clone, Debug, Default, Args)]
pub struct BucketArgs {
    /// Where blobs are kept for all machines: s3://bucket[/prefix] or file:///dir [default: a directory of this user]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// The S3 server, when it is not AWS: http://host:port
    #[arg(long, value_name = "URL")]
    pub endpoint_url: Option<String>,
    /// The region of the bucket
    #[arg(long, value_name = "NAME")]
    pub region: Option<String>,
    /// The settings file [default: ~/.config/casmount/config.toml, then /etc/casmount/config.toml]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl BucketArgs {
    /// What these flags say, as the uppermost layer of settings.
    pub fn layer(&self) -> Layer {
        Layer {
            store: self.store.clone(),
            endpoint_url: self.endpoint_url.clone(),
            region: self.region.clone(),
            ..Layer::default()
        }
    }
}

/// Which store, which volume, which cache.
#[derive(Clone, Debug, Default, Args)]
pub struct StoreArgs {
    #[command(flatten)]
    pub bucket: BucketArgs,
    /// The shared tree in the store [default: main]
    #[arg(long, value_name = "NAME")]
    pub volume: Option<VolumeName>,
    /// Where blobs are kept on this machine; for one volume and one daemon [default: one for each volume, below
    /// the user's cache directory]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
}

impl StoreArgs {
    /// What these flags say, as the uppermost layer of settings.
    pub fn layer(&self) -> Layer {
        Layer {
            volume: self.volume.clone(),
            cache_dir: self.cache_dir.clone(),
            ..self.bucket.layer()
        }
    }
}

/// Reads the other sources of settings below these flags.
pub fn settings(flags: Layer, config: Option<&Path>, dirs: &Dirs) -> Result<Settings, Failure> {
    let sources = Sources {
        flags,
        config,
        dirs,
        uid: rustix::process::geteuid().as_raw(),
    };
    Ok(Settings::load(sources, |name| std::env::var_os(name))?)
}

/// Runs the work of a command that needs no daemon.
pub fn block_on<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|err| Failure::because(1, format!("cannot start the runtime: {err}")))?;
    Ok(runtime.block_on(work))
}

/// A mount, and how the output is wanted.
#[derive(Clone, Debug, Args)]
pub struct MountedArgs {
    /// Where it is mounted
    pub mountpoint: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl MountedArgs {
    pub fn canonical(&self) -> Result<PathBuf, Failure> {
        Ok(mountpoint::canonical(&self.mountpoint)?)
    }
}

pub fn size(text: &str) -> Result<u64, String> {
    units::parse_size(text).map_err(|err| err.to_string())
}

pub fn duration(text: &str) -> Result<Duration, String> {
    units::parse_duration(text).map_err(|err| err.to_string())
}

/// Turns what the user calls a path of the mount into one relative to its
/// root, by names alone: the mount is not touched.
pub fn path_in_mount(path: &OsStr, spelling: &Path, canonical: &Path) -> Result<Vec<u8>, Failure> {
    use std::os::unix::ffi::OsStrExt;
    let path = Path::new(path);
    let relative = if path.is_absolute() {
        let spelled = std::path::absolute(spelling).unwrap_or_else(|_| spelling.to_owned());
        path.strip_prefix(canonical)
            .or_else(|_| path.strip_prefix(spelled))
            .map_err(|_| Failure::usage(format!("{} is not in {}", path.display(), canonical.display())))?
    } else {
        path
    };
    let mut names: Vec<&[u8]> = Vec::new();
    for part in relative.components() {
        match part {
            std::path::Component::Normal(name) => names.push(name.as_bytes()),
            std::path::Component::CurDir => {}
            _ => {
                return Err(Failure::usage(format!(
                    "{} has a '..' in it; name the path from the root of the mount",
                    path.display()
                )));
            }
        }
    }
    Ok(names.join(&b'/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_the_mount_has_many_spellings() {
        let relative = |path: &str| path_in_mount(OsStr::new(path), Path::new("/link"), Path::new("/mnt/c"));
        for path in ["a/b", "./a//b/", "/mnt/c/a/b", "/link/a/b"] {
            assert_eq!(relative(path).unwrap(), b"a/b", "{path}");
        }
        for path in ["", ".", "/mnt/c", "/mnt/c/"] {
            assert_eq!(relative(path).unwrap(), b"", "{path}");
        }
        for path in ["/mnt/cc/a", "/etc", "../a", "a/../b"] {
            assert_eq!(relative(path).unwrap_err().code(), 2, "{path}");
        }
    }
}
