//! The place where the mount goes: naming it, checking it, taking it over.
//!
//! # Invariants
//!
//! - A mountpoint is named without asking the file system that is mounted on
//!   it: its parent is resolved, its own name is kept. A daemon that is
//!   dead or stuck there cannot make this hang or fail.
//! - Only a *dead* mount of *ours* is taken away.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
    process::Command,
};

use rustix::{io::Errno, mount::UnmountFlags};

use super::mountinfo::{self, Mount};
use crate::base::digest::Digest;

/// A mountpoint cannot be used; nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum MountpointError {
    #[error("there is no directory {}; create it with: mkdir -p {}", path.display(), path.display())]
    Missing { path: PathBuf },
    #[error("{} is not a directory; name an empty directory", path.display())]
    NotDirectory { path: PathBuf },
    #[error("mountpoint is not empty: {}; name an empty directory", path.display())]
    NotEmpty { path: PathBuf },
    #[error(
        "casmount serves {} already; see it with: casmount status {}, or end it with: casmount unmount {}",
        path.display(), path.display(), path.display()
    )]
    Served { path: PathBuf },
    #[error(
        "a dead {fs_type} mount of another program covers {}; take it away with: umount -l {}",
        path.display(), path.display()
    )]
    DeadForeign { path: PathBuf, fs_type: String },
    #[error("cannot use {} as a mountpoint", path.display())]
    Unusable { path: PathBuf, source: io::Error },
}

/// Names a mountpoint absolutely, without touching what is mounted there.
///
/// Symbolic links are followed, also a last one, because reading a link does
/// not reach the file system mounted at the end.
pub fn canonical(path: &Path) -> Result<PathBuf, MountpointError> {
    let unusable = |source: io::Error| MountpointError::Unusable {
        path: path.to_owned(),
        source,
    };
    let mut current = std::path::absolute(path).map_err(unusable)?;
    // As many links as the kernel follows (path_resolution(7)).
    for _ in 0..40 {
        if current.components().any(|part| part == Component::ParentDir) {
            return fs::canonicalize(&current).map_err(|err| at_missing(&current, err));
        }
        let Some(parent) = current.parent() else {
            return Ok(current);
        };
        let parent = fs::canonicalize(parent).map_err(|err| at_missing(&current, err))?;
        let name = current
            .file_name()
            .expect("a path with a parent and no '..' has a name");
        match fs::read_link(parent.join(name)) {
            Ok(target) => current = std::path::absolute(parent.join(target)).map_err(unusable)?,
            Err(_) => return Ok(parent.join(name)),
        }
    }
    Err(unusable(Errno::LOOP.into()))
}

fn at_missing(path: &Path, source: io::Error) -> MountpointError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => MountpointError::Missing { path },
        io::ErrorKind::NotADirectory => MountpointError::NotDirectory { path },
        _ => MountpointError::Unusable { path, source },
    }
}

/// The id of a mount on this machine, from its canonical path: names its
/// control socket and its log.
pub fn id(canonical: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    Digest::of(canonical.as_os_str().as_bytes()).to_string()[..16].to_owned()
}

/// Makes sure that a mount can go to `path` (canonical); takes away a dead mount of ours.
///
/// Returns whether there was one.
pub fn prepare(path: &Path) -> Result<bool, MountpointError> {
    let mut taken_over = false;
    // Mounts can lie on top of each other, when a daemon died more than once.
    for _ in 0..8 {
        let mount = mountinfo::at(path).map_err(|source| unusable(path, source))?;
        match judge(path, mount.as_ref(), look(path))? {
            Verdict::Free => {
                check_empty(path)?;
                return Ok(taken_over);
            }
            Verdict::DeadOurs => {
                unmount_lazily(path).map_err(|source| unusable(path, source))?;
                taken_over = true;
            }
        }
    }
    Err(unusable(path, Errno::BUSY.into()))
}

/// Whether `path` is a directory, asked of whoever serves it: the attributes alone may come from
/// the kernel's cache long after the daemon died, statfs(2) never does.
fn look(path: &Path) -> io::Result<bool> {
    let meta = fs::metadata(path)?;
    rustix::fs::statfs(path)?;
    Ok(meta.is_dir())
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Free,
    DeadOurs,
}

/// What a mountpoint is good for, from what covers it and what asking for it answered.
fn judge(path: &Path, mount: Option<&Mount>, is_dir: io::Result<bool>) -> Result<Verdict, MountpointError> {
    let path_buf = || path.to_owned();
    match (mount, is_dir) {
        (Some(mount), Err(err)) if is_dead(&err) => {
            if mount.is_casmount() {
                Ok(Verdict::DeadOurs)
            } else {
                Err(MountpointError::DeadForeign {
                    path: path_buf(),
                    fs_type: mount.fs_type.clone(),
                })
            }
        }
        // Also when its root cannot be looked at by this user.
        (Some(mount), _) if mount.is_casmount() => Err(MountpointError::Served { path: path_buf() }),
        (_, Ok(true)) => Ok(Verdict::Free),
        (_, Ok(false)) => Err(MountpointError::NotDirectory { path: path_buf() }),
        (_, Err(source)) => Err(at_missing(path, source)),
    }
}

/// Whether an error is what a FUSE mount answers whose daemon died.
pub fn is_dead(err: &io::Error) -> bool {
    // ECONNABORTED: the connection was aborted while the request was under way.
    matches!(
        Errno::from_io_error(err),
        Some(Errno::NOTCONN | Errno::CONNABORTED)
    )
}

fn check_empty(path: &Path) -> Result<(), MountpointError> {
    let mut entries = fs::read_dir(path).map_err(|source| unusable(path, source))?;
    match entries.next() {
        None => Ok(()),
        Some(Ok(_)) => Err(MountpointError::NotEmpty {
            path: path.to_owned(),
        }),
        Some(Err(source)) => Err(unusable(path, source)),
    }
}

fn unusable(path: &Path, source: io::Error) -> MountpointError {
    MountpointError::Unusable {
        path: path.to_owned(),
        source,
    }
}

/// Detaches whatever is mounted at `path`, as root or through `fusermount3`.
pub fn unmount_lazily(path: &Path) -> io::Result<()> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH) {
        Err(Errno::PERM) => {}
        other => return Ok(other?),
    }
    let output = Command::new("fusermount3")
        .args(["-u", "-z", "--"])
        .arg(path)
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(
        String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(fs_type: &str) -> Mount {
        Mount {
            device: "0:50".into(),
            path: "/m".into(),
            fs_type: fs_type.into(),
            source: String::new(),
            options: String::new(),
        }
    }

    fn judged(mount: Option<&Mount>, is_dir: io::Result<bool>) -> Result<Verdict, MountpointError> {
        judge(Path::new("/m"), mount, is_dir)
    }

    #[test]
    fn only_a_dead_mount_of_ours_is_taken_over() {
        let dead = || Err(io::Error::from(Errno::NOTCONN));
        let ours = mount("fuse.casmount");
        assert_eq!(judged(Some(&ours), dead()).unwrap(), Verdict::DeadOurs);
        assert!(matches!(
            judged(Some(&ours), Ok(true)),
            Err(MountpointError::Served { .. })
        ));
        assert!(matches!(
            judged(Some(&mount("fuse.sshfs")), dead()),
            Err(MountpointError::DeadForeign { .. })
        ));
        // A fresh disk mounted there is a fine place.
        assert_eq!(judged(Some(&mount("ext4")), Ok(true)).unwrap(), Verdict::Free);
    }

    #[test]
    fn what_is_no_empty_directory_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(matches!(
            prepare(&file),
            Err(MountpointError::NotDirectory { .. })
        ));
        assert!(matches!(
            prepare(dir.path()),
            Err(MountpointError::NotEmpty { .. })
        ));
        assert!(matches!(
            prepare(&dir.path().join("no")),
            Err(MountpointError::Missing { .. })
        ));
        assert_eq!(fs::read(&file).unwrap(), b"x");
        fs::create_dir(dir.path().join("empty")).unwrap();
        assert!(!prepare(&dir.path().join("empty")).unwrap());
    }

    #[test]
    fn every_spelling_names_the_same_mountpoint() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let target = root.join("a/m");
        fs::create_dir_all(&target).unwrap();
        std::os::unix::fs::symlink("a/m", root.join("link")).unwrap();
        std::os::unix::fs::symlink(root.join("link"), root.join("link2")).unwrap();
        for spelling in ["a/m", "a/m/", "./a/./m", "a/../a/m", "link", "link2"] {
            assert_eq!(canonical(&root.join(spelling)).unwrap(), target, "{spelling}");
        }
        assert_eq!(canonical(Path::new("/")).unwrap(), Path::new("/"));
        // A mountpoint that is not there has a name all the same, if its parent is.
        assert_eq!(canonical(&root.join("no")).unwrap(), root.join("no"));
        assert!(matches!(
            canonical(&root.join("no/no")),
            Err(MountpointError::Missing { .. })
        ));
    }

    #[test]
    fn a_circle_of_links_ends() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("b", dir.path().join("a")).unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("b")).unwrap();
        assert!(matches!(
            canonical(&dir.path().join("a")),
            Err(MountpointError::Unusable { .. })
        ));
    }
}
