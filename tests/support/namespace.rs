//! A mount namespace for the calling thread and what it starts: nobody else sees what is mounted in it, and
//! it is gone with the last process in it. The host stays as it is.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, FileType, Mode},
    mount::{
        MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive,
        mount_change, unmount,
    },
    thread::UnshareFlags,
};

use super::tempdir;

/// Enters a new one. Needs root.
pub fn enter() {
    // SAFETY: a mount namespace of its own does not touch what other threads share in memory.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.expect("root may have its own mounts");
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .expect("our own namespace");
    // Copies of what other tests have mounted would keep their daemons alive after the unmount.
    tempdir::unmount_below(&tempdir::root());
    for (point, kind) in tempdir::mounts().into_iter().rev() {
        if kind == "fuse.casmount" {
            let _ = unmount(&point, UnmountFlags::DETACH);
        }
    }
}

/// Enters a new one in which an ordinary user can mount, whatever the host is like.
///
/// There `/dev/fuse` is open to all, `uid` is a user with a name, the way to the files of tests is open,
/// `/etc/fuse.conf` has `fuse_conf`, and `/tmp` is empty.
///
/// # Errors
///
/// What this host does not allow, in words.
pub fn enter_for_user(uid: u32, fuse_conf: &str) -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("becoming another user needs root".to_owned());
    }
    enter();
    let tests = tempdir::root();
    // Keeps the directory of tests where it is.
    let held = tempdir::TestDir::new();
    let program = Path::new(env!("CARGO_BIN_EXE_casmount"));
    let kept = [program.parent().expect("a program is in a directory"), &tests]
        .map(|dir| fs::canonicalize(dir).expect("it is there"));
    for dir in &kept {
        if let Some(closed) = tempdir::closed_above(dir) {
            cover(&closed, 0o755, &kept);
        }
    }
    cover(Path::new("/tmp"), 0o1777, &kept);
    drop(held);

    let device = Path::new("/tmp/.fuse");
    rustix::fs::mknodat(
        CWD,
        device,
        FileType::CharacterDevice,
        Mode::empty(),
        rustix::fs::makedev(10, 229),
    )
    .map_err(|err| format!("making a device node: {err}"))?;
    fs::set_permissions(device, fs::Permissions::from_mode(0o666)).expect("our own device node");
    mount_bind(device, "/dev/fuse").map_err(|err| format!("/dev/fuse: {err}"))?;
    File::open("/dev/fuse").map_err(|err| format!("/dev/fuse: {err}"))?;

    let users = fs::read_to_string("/etc/passwd").expect("every system has it");
    let user = format!("casmount-test:x:{uid}:{uid}::/nonexistent:/bin/false\n");
    replace("/etc/passwd", &(users + &user));
    if Path::new("/etc/fuse.conf").exists() {
        replace("/etc/fuse.conf", fuse_conf);
    } else if !fuse_conf.is_empty() {
        return Err("there is no /etc/fuse.conf to be replaced".to_owned());
    }
    Ok(())
}

/// Puts a file of other content over one that is there.
fn replace(path: &str, text: &str) {
    let other = PathBuf::from(format!("/tmp/.{}", path.replace('/', "-")));
    fs::write(&other, text).expect("our own directory");
    fs::set_permissions(&other, fs::Permissions::from_mode(0o644)).expect("our own file");
    mount_bind(&other, path).expect("a bind mount in our own namespace");
}

/// Puts an empty directory over another one, in which only `kept` is where it was.
fn cover(dir: &Path, mode: u32, kept: &[PathBuf]) {
    let below = kept.iter().filter(|path| path.starts_with(dir) && *path != dir);
    let open = |path: &PathBuf| -> io::Result<(PathBuf, File)> {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(path)?;
        Ok((path.clone(), file))
    };
    let below: Vec<_> = below.map(|path| open(path).expect("it is there")).collect();
    let options = CString::new(format!("mode={mode:o}")).expect("no NUL");
    mount("none", dir, "tmpfs", MountFlags::empty(), &*options).expect("a mount in our own namespace");
    for (path, file) in below {
        fs::create_dir_all(&path).expect("our own directory");
        let mut above = path.parent();
        while let Some(made) = above.filter(|above| above.starts_with(dir) && *above != dir) {
            fs::set_permissions(made, fs::Permissions::from_mode(0o755)).expect("our own directory");
            above = made.parent();
        }
        mount_bind_recursive(format!("/proc/self/fd/{}", file.as_raw_fd()), &path)
            .expect("a bind mount in our own namespace");
    }
}
