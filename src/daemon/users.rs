//! Who keeps a mount busy, as far as this user may see.
//!
//! Reads links in `/proc` only: the kernel writes those paths without asking
//! the file system they lie on.

use std::{
    collections::HashSet,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::mountinfo::{self, is_within};

/// More would fill the screen and say no more.
const MOST: usize = 16;

/// A program that uses the mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub pid: u32,
    pub name: String,
    /// What of the mount it uses: an open file, or its working directory.
    pub path: String,
}

/// Finds up to 16 programs that use what is mounted at `mountpoint`.
pub fn of(mountpoint: &Path) -> Vec<User> {
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let path = used_path(&entry.path(), mountpoint)?;
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            Some(User {
                pid,
                name: name.trim_end().to_owned(),
                path,
            })
        })
        .take(MOST)
        .collect()
}

/// Finds processes in other mount namespaces, one of each, that have a copy of the mount of `device`.
pub fn elsewhere(device: &str) -> Vec<User> {
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut seen: HashSet<PathBuf> = fs::read_link("/proc/self/ns/mnt").into_iter().collect();
    processes
        .flatten()
        .filter_map(|entry| {
            let (pid, process) = (entry.file_name().to_str()?.parse().ok()?, entry.path());
            let namespace = fs::read_link(process.join("ns/mnt")).ok()?;
            if seen.contains(&namespace) {
                return None;
            }
            let table = fs::read(process.join("mountinfo")).ok()?;
            seen.insert(namespace);
            let mounts = mountinfo::parse(&table).into_iter();
            // The number of a mount that is gone may be given to one of another kind.
            let mount = mounts
                .rev()
                .find(|mount| mount.device == device && mount.is_casmount())?;
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            Some(User {
                pid,
                name: name.trim_end().to_owned(),
                path: mount.path.display().to_string(),
            })
        })
        .take(MOST)
        .collect()
}

fn used_path(process: &Path, mountpoint: &Path) -> Option<String> {
    let links = ["cwd", "root", "exe"].map(|name| process.join(name));
    let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    let linked = links
        .into_iter()
        .chain(files.map(|entry| entry.path()))
        .filter_map(|link| fs::read_link(link).ok())
        .find(|target| is_within(target.as_os_str().as_bytes(), mountpoint));
    let path = linked.map(|path| path.as_os_str().as_bytes().to_vec());
    let path = path.or_else(|| mapped_path(&fs::read(process.join("maps")).ok()?, mountpoint))?;
    Some(String::from_utf8_lossy(&path).into_owned())
}

/// The path of a mapping is everything from the first slash on (`proc_pid_maps(5)`).
fn mapped_path(maps: &[u8], mountpoint: &Path) -> Option<Vec<u8>> {
    maps.split(|&b| b == b'\n')
        .filter_map(|line| Some(&line[line.iter().position(|&b| b == b'/')?..]))
        .find(|path| is_within(path, mountpoint))
        .map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_file_betrays_its_user() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        assert_eq!(of(&root), []);
        let _open = fs::File::create(root.join("held")).unwrap();
        let users = of(&root);
        assert_eq!(users.len(), 1);
        assert_eq!(users[0].pid, std::process::id());
        assert!(users[0].path.ends_with("/held"));
    }

    #[test]
    fn a_mapping_is_a_use() {
        let maps = b"55-56 r-xp 00000000 08:02 173521 /usr/bin/x\n7f-80 rw-s 0 00:2a 9 /mnt/c/a b\n7f-80 rw-p 0 0:0 0 [heap]\n";
        assert_eq!(mapped_path(maps, Path::new("/mnt/c")).unwrap(), b"/mnt/c/a b");
        assert_eq!(mapped_path(maps, Path::new("/mnt/d")), None);
    }
}
