//! Where things are kept when nobody says where.
//!
//! | what | root | others |
//! |---|---|---|
//! | store | `/var/lib/casmount/store` | `$XDG_DATA_HOME/casmount/store` |
//! | cache | `/var/cache/casmount/<id>` | `$XDG_CACHE_HOME/casmount/<id>` |
//! | logs | `/var/log/casmount/casmount-<id>.log` | `$XDG_STATE_HOME/casmount/casmount-<id>.log` |
//! | settings | `/etc/casmount/config.toml` | `$XDG_CONFIG_HOME/casmount/config.toml`, then root's |
//! | control sockets | `/run/casmount` | `$XDG_RUNTIME_DIR/casmount`, else `/tmp/casmount-<uid>` |
//!
//! An XDG variable counts only when it is an absolute path (the XDG base
//! directory specification); without it `~/.local/share`, `~/.cache`,
//! `~/.local/state` and `~/.config` do.

use std::{ffi::OsString, path::PathBuf};

use super::ConfigError;

/// The directories of one user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dirs {
    pub data: Option<PathBuf>,
    pub cache: Option<PathBuf>,
    pub state: Option<PathBuf>,
    /// Where a settings file may be, the first that exists counts.
    pub config_files: Vec<PathBuf>,
    /// Where control sockets may be; the first is where a daemon makes its own.
    pub sockets: Vec<PathBuf>,
}

impl Dirs {
    /// The directories of the user `uid` whose environment `variable` reads.
    pub fn new(uid: u32, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        if uid == 0 {
            return Self {
                data: Some("/var/lib/casmount".into()),
                cache: Some("/var/cache/casmount".into()),
                state: Some("/var/log/casmount".into()),
                config_files: vec!["/etc/casmount/config.toml".into()],
                sockets: vec!["/run/casmount".into()],
            };
        }
        let absolute = |name: &str| {
            variable(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let home = absolute("HOME");
        let base = |xdg: &str, below_home: &str| {
            let dir = absolute(xdg).or_else(|| Some(home.as_ref()?.join(below_home)))?;
            Some(dir.join("casmount"))
        };
        let config = base("XDG_CONFIG_HOME", ".config").map(|dir| dir.join("config.toml"));
        let mut sockets = Vec::new();
        if let Some(runtime) = absolute("XDG_RUNTIME_DIR") {
            sockets.push(runtime.join("casmount"));
        }
        // A daemon and a command of one user may run with and without a login session.
        sockets.extend(user_sockets(uid));
        sockets.dedup();
        Self {
            data: base("XDG_DATA_HOME", ".local/share"),
            cache: base("XDG_CACHE_HOME", ".cache"),
            state: base("XDG_STATE_HOME", ".local/state"),
            config_files: config
                .into_iter()
                .chain(["/etc/casmount/config.toml".into()])
                .collect(),
            sockets,
        }
    }

    /// The directories of whoever runs this process.
    pub fn of_this_process() -> Self {
        Self::new(rustix::process::geteuid().as_raw(), |name| std::env::var_os(name))
    }

    /// The store that needs nothing but this disk.
    pub fn default_store(&self) -> Result<PathBuf, ConfigError> {
        let data = self.data.as_ref().ok_or(ConfigError::NoHome {
            what: "the store",
            flag: "--store",
        })?;
        Ok(data.join("store"))
    }

    /// The cache directory of the mount called `id`.
    pub fn default_cache(&self, id: &str) -> Result<PathBuf, ConfigError> {
        let cache = self.cache.as_ref().ok_or(ConfigError::NoHome {
            what: "the cache",
            flag: "--cache-dir",
        })?;
        Ok(cache.join(id))
    }

    /// The log of the mount called `id`; `None` without a home.
    pub fn default_log(&self, id: &str) -> Option<PathBuf> {
        Some(self.state.as_ref()?.join(format!("casmount-{id}.log")))
    }
}

/// Where the sockets of a user may be whose environment is not known.
pub fn user_sockets(uid: u32) -> Vec<PathBuf> {
    vec![
        format!("/run/user/{uid}/casmount").into(),
        format!("/tmp/casmount-{uid}").into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs(uid: u32, pairs: &'static [(&str, &str)]) -> Dirs {
        Dirs::new(uid, |name| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.into())
        })
    }

    #[test]
    fn root_keeps_things_where_services_do() {
        let root = dirs(0, &[("HOME", "/root"), ("XDG_CACHE_HOME", "/elsewhere")]);
        assert_eq!(
            root.default_store().unwrap(),
            PathBuf::from("/var/lib/casmount/store")
        );
        assert_eq!(
            root.default_cache("ab").unwrap(),
            PathBuf::from("/var/cache/casmount/ab")
        );
        assert_eq!(root.sockets, [PathBuf::from("/run/casmount")]);
    }

    #[test]
    fn others_keep_things_below_home_or_where_xdg_says() {
        let user = dirs(
            1000,
            &[
                ("HOME", "/home/a"),
                ("XDG_CACHE_HOME", "/big/cache"),
                ("XDG_DATA_HOME", "relative"),
            ],
        );
        assert_eq!(
            user.default_store().unwrap(),
            PathBuf::from("/home/a/.local/share/casmount/store")
        );
        assert_eq!(
            user.default_cache("ab").unwrap(),
            PathBuf::from("/big/cache/casmount/ab")
        );
        assert_eq!(
            user.default_log("ab").unwrap(),
            PathBuf::from("/home/a/.local/state/casmount/casmount-ab.log")
        );
        assert_eq!(
            user.config_files[0],
            PathBuf::from("/home/a/.config/casmount/config.toml")
        );
    }

    #[test]
    fn a_daemon_in_a_session_is_found_from_outside_of_it() {
        let inside = dirs(1000, &[("HOME", "/h"), ("XDG_RUNTIME_DIR", "/run/user/1000")]);
        let outside = dirs(1000, &[("HOME", "/h")]);
        assert!(outside.sockets.contains(&inside.sockets[0]));
    }

    #[test]
    fn without_a_home_the_flag_is_named() {
        let err = dirs(1000, &[]).default_cache("ab").unwrap_err();
        assert!(err.to_string().contains("--cache-dir"), "{err}");
    }
}
