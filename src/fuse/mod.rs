//! The FUSE front: translates the kernel's requests, decides nothing.

use std::{io, path::PathBuf, sync::Arc};

use crate::{namespace::tree::TellKernel, vfs::Vfs};

#[derive(Clone, Debug)]
pub struct MountOptions {
    pub mountpoint: PathBuf,
    /// Other users may use the mount.
    pub allow_other: bool,
    pub read_only: bool,
    /// Shown by mount(8) as the source.
    pub source: String,
    pub threads: usize,
    /// Hand files to the kernel where it allows that.
    pub passthrough: bool,
}

/// A live mount. Dropping it does not unmount.
#[derive(Debug)]
pub struct Mounted {}

/// Mounts and starts answering; returns when the kernel has accepted the mount.
///
/// # Errors
///
/// What mount(2) or `fusermount3` reported.
pub fn mount(vfs: Arc<Vfs>, options: &MountOptions, runtime: tokio::runtime::Handle) -> io::Result<Mounted> {
    let _ = (vfs, options, runtime);
    todo!()
}

impl Mounted {
    /// Tells the kernel what is no longer so, from a thread of its own.
    pub fn tell_kernel(&self) -> TellKernel {
        todo!()
    }
    /// Whether files are handed to the kernel.
    pub fn passthrough(&self) -> bool {
        todo!()
    }
    /// Takes the mount away. `lazily`: even while programs use it.
    pub fn unmount(&self, lazily: bool) -> io::Result<()> {
        let _ = lazily;
        todo!()
    }
    /// Waits until the mount is gone, however that came.
    pub fn wait(self) -> io::Result<()> {
        todo!()
    }
}
