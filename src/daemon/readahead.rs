//! Lets the kernel ask for more at once when it reads ahead.
//!
//! The kernel reads at most 128 KiB ahead in a file that the daemon serves, whatever the daemon offers
//! (`VM_READAHEAD_PAGES`); only root may raise that, in `/sys/class/bdi/<device>/read_ahead_kb`
//! (Documentation/ABI/testing/sysfs-class-bdi). Eight times as much costs an eighth of the requests for a first
//! sequential read. Files that were handed to the kernel are read by the rules of their own disk.

use std::{fs, io, path::Path};

use super::mountinfo;

/// As much as the daemon takes in one request, see the FUSE front.
const READ_AHEAD_KIB: u64 = 1024;

/// Raises the limit of the mount at `mountpoint`. Does not touch the mount.
///
/// # Errors
///
/// What the system reports, without the privilege for it for example. The mount works all the same.
pub fn widen(mountpoint: &Path) -> io::Result<()> {
    let mount = mountinfo::at(mountpoint)?.ok_or(io::ErrorKind::NotFound)?;
    let path = format!("/sys/class/bdi/{}/read_ahead_kb", mount.device);
    let now = fs::read_to_string(&path)?;
    if now.trim().parse().is_ok_and(|now: u64| now >= READ_AHEAD_KIB) {
        return Ok(());
    }
    fs::write(&path, READ_AHEAD_KIB.to_string())
}
