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
    pub image: PathBuf,
    device: Option<String>,
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
        Self::mount(kind, image, &dir.join(name))
    }

    /// Mounts an image that holds a file system; a journal is replayed as after a power cut.
    #[track_caller]
    pub fn mount(kind: &str, image: PathBuf, mountpoint: &Path) -> Self {
        fs::create_dir_all(mountpoint).expect("a mount point can be made");
        let mut losetup = Command::new("losetup");
        let device = wait::run_ok(losetup.args(["--find", "--show"]).arg(&image), LIMIT);
        let fs = Self {
            image,
            device: Some(device.trim().to_owned()),
            mountpoint: mountpoint.to_owned(),
        };
        let mut mount = Command::new("mount");
        // A copy of an image has the same UUID as the image, which XFS refuses to mount beside it.
        let options = if kind == "xfs" { "nouuid" } else { "defaults" };
        mount
            .args(["-t", kind, "-o", options])
            .arg(device.trim())
            .arg(mountpoint);
        wait::run_ok(&mut mount, LIMIT);
        fs
    }

    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// Copies what the device has been given so far, as a power cut would leave it.
    ///
    /// What only the page cache of the mounted file system holds is not in the copy.
    #[track_caller]
    pub fn copy_as_cut(&self, to: &Path) {
        let mut copy = Command::new("cp");
        wait::run_ok(copy.arg("--sparse=always").arg(&self.image).arg(to), LIMIT);
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
