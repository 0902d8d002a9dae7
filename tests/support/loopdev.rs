//! File systems of their own on image files, through loop devices. Root only.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use super::{tempdir, wait};

const LIMIT: Duration = Duration::from_secs(60);

/// Whether this process may make loop devices; the reason if not.
pub fn available() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("loop devices need root".to_owned());
    }
    if !Path::new("/dev/loop-control").exists() {
        return Err("this kernel has no loop devices".to_owned());
    }
    Ok(())
}

/// Whether a file system can be made and mounted here; the reason if not.
pub fn supports(kind: &str) -> Result<(), String> {
    available()?;
    let mkfs = Command::new(format!("mkfs.{kind}")).arg("-V").output();
    mkfs.map_err(|err| format!("mkfs.{kind}: {err}"))?;
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let listed = known
        .lines()
        .any(|line| line.split_whitespace().last() == Some(kind));
    if listed {
        Ok(())
    } else {
        Err(format!(
            "this kernel lists no {kind} (a module may have to be loaded)"
        ))
    }
}

/// A mounted file system on an image; goes away when dropped, the image stays.
pub struct LoopFs {
    device: Option<String>,
    kind: String,
    mountpoint: PathBuf,
}

impl LoopFs {
    /// Makes a file system of `bytes` on a new image `NAME.img` below `dir` and mounts it.
    #[track_caller]
    pub fn make(kind: &str, dir: &Path, name: &str, bytes: u64) -> Self {
        let image = dir.join(format!("{name}.img"));
        File::create(&image)
            .and_then(|file| file.set_len(bytes))
            .expect("an image can be made");
        let mut mkfs = Command::new(format!("mkfs.{kind}"));
        mkfs.arg("-q")
            .args(if kind == "xfs" { &["-f"] } else { &["-F"] })
            .arg(&image);
        wait::run_ok(&mut mkfs, LIMIT);
        let mountpoint = dir.join(name);
        fs::create_dir_all(&mountpoint).expect("a mount point can be made");
        let mut losetup = Command::new("losetup");
        let device = wait::run_ok(losetup.args(["--find", "--show"]).arg(&image), LIMIT);
        let fs = Self {
            device: Some(device.trim().to_owned()),
            kind: kind.to_owned(),
            mountpoint,
        };
        fs.mount_device();
        fs
    }

    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// Cuts the power: nothing more reaches the device, not even the log of the file system.
    ///
    /// What was on the device stays; programs get EIO from here on. This is `XFS_IOC_GOINGDOWN`
    /// and `EXT4_IOC_SHUTDOWN` without a flush of the log, as xfstests does it. What a disk's own
    /// volatile cache would lose is not part of it.
    #[track_caller]
    pub fn cut_power(&self) {
        /// `_IOR('X', 125, __u32)`, the same for both.
        const GOING_DOWN: libc::c_ulong = 0x8004_587d;
        const WITHOUT_LOG_FLUSH: u32 = 2;
        let top = File::open(&self.mountpoint).expect("it is mounted");
        let how = WITHOUT_LOG_FLUSH;
        // SAFETY: the call reads one u32 through the pointer, and keeps nothing.
        let done = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&top), GOING_DOWN, &raw const how) };
        assert_eq!(
            done,
            0,
            "cannot shut {} down: {}",
            self.kind,
            std::io::Error::last_os_error()
        );
    }

    /// Unmounts and mounts again, which replays the log of the file system.
    #[track_caller]
    pub fn remount(&mut self) {
        wait::until("the file system is no longer used", LIMIT, || {
            rustix::mount::unmount(&self.mountpoint, rustix::mount::UnmountFlags::empty()).ok()
        });
        self.mount_device();
    }

    #[track_caller]
    fn mount_device(&self) {
        let device = self.device.as_deref().expect("taken in drop only");
        let mut mount = Command::new("mount");
        mount.args(["-t", &self.kind]).arg(device).arg(&self.mountpoint);
        wait::run_ok(&mut mount, LIMIT);
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        tempdir::unmount_below(&self.mountpoint);
        if let Some(device) = self.device.take() {
            // The last user of a lazily unmounted file system may end a moment later.
            wait::try_until(Duration::from_secs(10), || {
                let detached = Command::new("losetup").arg("-d").arg(&device).output();
                detached.is_ok_and(|output| output.status.success()).then_some(())
            });
        }
    }
}
