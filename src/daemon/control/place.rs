//! Where the control socket of a mount is: a file named after the mountpoint.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use crate::{
    config::{Dirs, dirs},
    daemon::{mountinfo, mountpoint},
};

/// Where a daemon of this user makes the socket of `mountpoint` (canonical).
///
/// Makes the directory, for this user alone.
pub fn make(dirs: &Dirs, mountpoint: &Path) -> io::Result<PathBuf> {
    let mut failure = io::Error::from(io::ErrorKind::NotFound);
    for dir in &dirs.sockets {
        match fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .and_then(|()| check_owner(dir))
        {
            Ok(()) => return Ok(socket_in(dir, mountpoint)),
            // The runtime directory of a user without a session: the next one will do.
            Err(err) => failure = err,
        }
    }
    Err(failure)
}

/// Where the socket of `mountpoint` (canonical) may be, the likeliest first.
///
/// Root also finds the daemons of other users, by what the kernel's table
/// says of who mounted.
pub fn candidates(own: &Dirs, mountpoint: &Path) -> Vec<PathBuf> {
    let mut places = own.sockets.clone();
    let mount = mountinfo::at(mountpoint).ok().flatten();
    if let Some(user) = mount.and_then(|mount| mount.user_id()) {
        if user == 0 {
            places.push("/run/casmount".into());
        } else {
            places.extend(dirs::user_sockets(user));
        }
    }
    let mut sockets: Vec<_> = places.iter().map(|dir| socket_in(dir, mountpoint)).collect();
    sockets.dedup();
    sockets
}

fn socket_in(dir: &Path, mountpoint: &Path) -> PathBuf {
    dir.join(format!("{}.sock", mountpoint::id(mountpoint)))
}

/// Whether nobody but this user, or root, can put a socket into `dir`.
///
/// A directory in `/tmp` could have been made by anybody.
pub fn check_owner(dir: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(dir)?;
    let me = rustix::process::geteuid().as_raw();
    let trusted = meta.is_dir() && (meta.uid() == me || meta.uid() == 0 || me == 0);
    if !trusted || meta.permissions().mode() & 0o022 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("{} can be written by other users", dir.display()),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mountpoint_has_its_own_socket_and_always_the_same() {
        let dir = Path::new("/run/casmount");
        let a = socket_in(dir, Path::new("/mnt/a"));
        assert_eq!(a, socket_in(dir, Path::new("/mnt/a")));
        assert_ne!(a, socket_in(dir, Path::new("/mnt/b")));
        // sockaddr_un has room for 107 bytes.
        assert!(a.as_os_str().len() < 100);
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("casmount");
        let dirs = Dirs {
            sockets: vec!["/proc/nowhere".into(), place.clone()],
            ..Dirs::default()
        };
        let socket = make(&dirs, Path::new("/mnt/a")).unwrap();
        assert_eq!(socket.parent(), Some(place.as_path()));
        assert_eq!(fs::metadata(&place).unwrap().permissions().mode() & 0o777, 0o700);
        fs::set_permissions(&place, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(
            make(&dirs, Path::new("/mnt/a")).unwrap_err().kind(),
            io::ErrorKind::PermissionDenied
        );
    }
}
