//! Directories of tests, on the disk: a cache on tmpfs or overlayfs would test other code.
//!
//! A test that was killed cannot unmount. Its directory carries its process id, so the
//! next test that starts finds dead mounts of processes that are gone, and takes them away.
//!
//! They lie in the target directory. Where root runs the tests, some of them become another user, who has to get there:
//! a clone in a directory that is closed to others (below `/root`, or made by `mktemp -d`) has its directories in
//! `/var/tmp`, if that is a disk, and leaves nothing there.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use rustix::mount::{UnmountFlags, unmount};

/// Where other users get to, and what is written stays on a disk.
const OPEN_TO_ALL: &str = "/var/tmp";

/// From `linux/magic.h`.
const TMPFS_MAGIC: i64 = 0x0102_1994;
const OVERLAYFS_MAGIC: i64 = 0x794c_7630;

/// A directory that goes away with everything that is mounted below it.
pub struct TestDir(Option<tempfile::TempDir>);

impl TestDir {
    pub fn new() -> Self {
        let root = root();
        // Another test may take the way there away between the two steps, with the last directory in it.
        let mut tries = (0..100).map(|_| Self::made_in(&root));
        let made = tries.find(|made| !matches!(made, Err(err) if err.kind() == io::ErrorKind::NotFound));
        let dir = made.expect("it is tried").expect("a directory can be made");
        // Some tests use it as another user.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("our own directory");
        Self(Some(dir))
    }

    fn made_in(root: &Path) -> io::Result<tempfile::TempDir> {
        if !root.exists() {
            fs::create_dir_all(root)?;
            fs::set_permissions(root, fs::Permissions::from_mode(0o755))?;
        }
        sweep(root);
        let prefix = format!("{}-", std::process::id());
        tempfile::Builder::new().prefix(&prefix).tempdir_in(root)
    }

    pub fn path(&self) -> &Path {
        self.0.as_ref().expect("taken in drop only").path()
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        unmount_below(self.path());
        let dir = self.0.take().expect("taken here only");
        if std::env::var_os("CASMOUNT_TEST_KEEP").is_some() {
            eprintln!("kept: {}", dir.keep().display());
            return;
        }
        drop(dir);
        let root = root();
        if root.parent() == Some(Path::new(OPEN_TO_ALL)) {
            // The last one out; another test may have files there.
            let _ = fs::remove_dir(root);
        }
    }
}

/// Where tests keep their files: `CASMOUNT_TEST_DIR`, or the target directory, or what is open to all instead. Always
/// the same in one process, whatever it mounts.
pub fn root() -> PathBuf {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    let root = ROOT.get_or_init(|| {
        if let Some(dir) = std::env::var_os("CASMOUNT_TEST_DIR") {
            return PathBuf::from(dir);
        }
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("m");
        let is_root = rustix::process::geteuid().is_root();
        // The directory itself may not be there yet; the way to it is.
        let is_closed = fs::canonicalize(env!("CARGO_TARGET_TMPDIR"))
            .is_ok_and(|way| closed_above(&way.join("m")).is_some());
        if is_root && is_closed {
            open_to_all().unwrap_or(target)
        } else {
            target
        }
    });
    root.clone()
}

/// A directory for tests to which every user gets, if this host has one on a disk.
fn open_to_all() -> Option<PathBuf> {
    let kind = rustix::fs::statfs(OPEN_TO_ALL).ok()?.f_type;
    let root = Path::new(OPEN_TO_ALL).join("casmount-tests");
    if matches!(kind, TMPFS_MAGIC | OVERLAYFS_MAGIC) || closed_above(&root).is_some() {
        return None;
    }
    // Everybody may make names there.
    let is_ours = |meta: fs::Metadata| meta.is_dir() && meta.uid() == 0;
    fs::symlink_metadata(&root).map_or(true, is_ours).then_some(root)
}

/// The uppermost directory on the way to `path` through which other users may not go.
pub fn closed_above(path: &Path) -> Option<PathBuf> {
    let above: Vec<_> = path.ancestors().skip(1).collect();
    let closed = above.into_iter().rev().find(|dir| {
        let mode = fs::metadata(dir).map_or(0, |meta| meta.permissions().mode());
        mode & 0o001 == 0
    });
    closed.map(Path::to_owned)
}

/// Every mount point of this mount namespace, in the order of mounting.
pub fn mountpoints() -> Vec<PathBuf> {
    mounts().into_iter().map(|(point, _)| point).collect()
}

/// Every mount of this mount namespace with its type, in the order of mounting.
pub fn mounts() -> Vec<(PathBuf, String)> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").expect("/proc is there");
    let mount = |line: &str| {
        let point = unescape(line.split(' ').nth(4)?);
        let kind = line.split_once(" - ")?.1.split(' ').next()?;
        Some((point, kind.to_owned()))
    };
    table.lines().filter_map(mount).collect()
}

/// Takes away whatever is mounted at or below a directory, even while it is used.
pub fn unmount_below(dir: &Path) {
    // Bounded: something else might mount as fast as this unmounts.
    for _ in 0..100 {
        let below = mountpoints()
            .into_iter()
            .rev()
            .find(|point| point.starts_with(dir));
        let Some(point) = below else { return };
        if unmount(&point, UnmountFlags::DETACH).is_err() {
            let mut fusermount = std::process::Command::new("fusermount3");
            let _ = fusermount.arg("-uz").arg(&point).status();
        }
    }
}

/// Mount points in mountinfo write blanks and the like as three octal digits.
fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = field.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(
        bytes,
    ))
}

/// Removes what tests left that were killed.
fn sweep(root: &Path) {
    let Ok(entries) = fs::read_dir(root) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.split_once('-')?.0.parse::<u32>().ok());
        let Some(owner) = owner else { continue };
        if !Path::new(&format!("/proc/{owner}")).exists() {
            unmount_below(&entry.path());
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
