//! The FUSE front: translates the kernel's requests, decides nothing.
//!
//! ```text
//! front     one method a request: call the vfs, answer
//! hold      the vfs, until the mount lets go of it
//! answer    results as answers
//! negotiate what is agreed when a mount begins
//! make      mknod, mkdir and symlink as one
//! convert   types of the protocol to types of the vfs and back
//! notify    what the kernel must forget, told from a thread of its own
//! turns     which thread takes the next request
//! follow    on which CPU it should run
//! ```

mod answer;
mod convert;
mod follow;
mod front;
mod hold;
mod later;
mod lookup;
mod make;
mod negotiate;
mod notify;
mod turns;

use std::{
    ffi::CString,
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use fuser::{BackgroundSession, BackingId, Config, MountOption, Session, SessionACL};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    ioctl::{Opcode, Setter, ioctl, opcode},
    mount::{MountFlags, UnmountFlags},
};

use crate::{namespace::tree::TellKernel, vfs::Vfs};

/// The subtype under which mount(8) and `/proc/self/mountinfo` show a mount of ours.
pub const SUBTYPE: &str = "casmount";

#[derive(Clone, Debug)]
pub struct MountOptions {
    pub mountpoint: PathBuf,
    /// Other users may use the mount.
    pub allow_other: bool,
    pub read_only: bool,
    /// Shown by mount(8) as the source.
    pub source: String,
    pub threads: usize,
    /// Hand files to the kernel if it takes this one, which lies where they do.
    pub passthrough: Option<PathBuf>,
}

/// A live mount. Dropping it does not unmount.
pub struct Mounted {
    mountpoint: PathBuf,
    session: Mutex<Option<BackgroundSession>>,
    hold: Arc<hold::Hold>,
    notices: notify::Notices,
    passthrough: Arc<AtomicBool>,
}

impl fmt::Debug for Mounted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mounted")
            .field("mountpoint", &self.mountpoint)
            .finish_non_exhaustive()
    }
}

/// Mounts and starts answering; returns when the kernel has accepted the mount.
///
/// # Errors
///
/// What mount(2) or `fusermount3` reported.
pub fn mount(vfs: Arc<Vfs>, options: &MountOptions, runtime: tokio::runtime::Handle) -> io::Result<Mounted> {
    let mut config = Config::default();
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = true;
    let passthrough = Arc::new(AtomicBool::new(options.passthrough.is_some()));
    let turns = turns::Turns::start()?;
    let hold = Arc::new(hold::Hold::new(vfs));
    let front = front::Front::new(
        Arc::clone(&hold),
        runtime,
        Arc::clone(&passthrough),
        turns.clone(),
    );
    let session = match mount_as_root(options) {
        Ok(device) => Session::from_fd(front, device, config.acl, config).inspect_err(|_| {
            // The mount answers nobody: better none.
            let _ = unmount(&options.mountpoint, true);
        }),
        // Not for ordinary users, who ask fusermount3.
        Err(Errno::PERM | Errno::ACCESS) => {
            config.mount_options = vec![
                MountOption::FSName(options.source.clone()),
                MountOption::Subtype(SUBTYPE.to_owned()),
                MountOption::DefaultPermissions,
                MountOption::NoAtime,
                MountOption::NoDev,
                MountOption::NoSuid,
                if options.read_only {
                    MountOption::RO
                } else {
                    MountOption::RW
                },
            ];
            Session::new(front, &options.mountpoint, &config)
        }
        Err(err) => Err(err.into()),
    }?;
    if let Some(sample) = options
        .passthrough
        .as_ref()
        .filter(|_| passthrough.load(Ordering::Relaxed))
        && let Err(err) = try_lending(session.as_fd(), sample)
    {
        tracing::debug!(error = %err, "the kernel takes no files");
        passthrough.store(false, Ordering::Relaxed);
    }
    turns.read_from(session.as_fd().try_clone_to_owned()?);
    let session = session.spawn()?;
    let notices = notify::Notices::start(&session.notifier())?;
    Ok(Mounted {
        mountpoint: options.mountpoint.clone(),
        session: Mutex::new(Some(session)),
        hold,
        notices,
        passthrough,
    })
}

/// Mounts with mount(2), under our own type: `fuser` knows the plain type `fuse` only, by which
/// nobody could tell a dead mount of ours from that of another program.
fn mount_as_root(options: &MountOptions) -> Result<OwnedFd, Errno> {
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let data = CString::new(data).map_err(|_| Errno::INVAL)?;
    let mut flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME;
    flags.set(MountFlags::RDONLY, options.read_only);
    let kind = format!("fuse.{SUBTYPE}");
    rustix::mount::mount(
        options.source.as_str(),
        &options.mountpoint,
        kind.as_str(),
        flags,
        data.as_c_str(),
    )?;
    Ok(device)
}

/// Hands a file to the kernel and takes it back. The kernel offers passthrough to everyone, and says
/// only here that this user may not do it (EPERM), or that it does not go through two file
/// systems that lie on others (ELOOP, of overlayfs).
fn try_lending(device: BorrowedFd<'_>, sample: &Path) -> io::Result<()> {
    /// `FUSE_DEV_IOC_BACKING_CLOSE` of linux/fuse.h.
    const CLOSE: Opcode = opcode::write::<u32>(229, 2);
    let id = BackingId::create_raw(device, File::open(sample)?)?;
    // SAFETY: the call reads one u32.
    unsafe { ioctl(device, Setter::<CLOSE, u32>::new(id)) }?;
    Ok(())
}

impl Mounted {
    /// Tells the kernel what is no longer so, from a thread of its own.
    #[must_use]
    pub fn tell_kernel(&self) -> TellKernel {
        self.notices.teller()
    }

    /// Whether files are handed to the kernel.
    #[must_use]
    pub fn passthrough(&self) -> bool {
        self.passthrough.load(Ordering::Relaxed)
    }

    /// Takes the mount away. `lazily`: even while programs use it.
    ///
    /// # Errors
    ///
    /// `EBUSY` while programs use it; what umount(2) or `fusermount3` report else.
    pub fn unmount(&self, lazily: bool) -> io::Result<()> {
        unmount(&self.mountpoint, lazily)
    }

    /// Lets go of the vfs, whoever still asks: he is answered with `ENOTCONN` from now on, and so is who waits
    /// for the network. For after the unmount: copies of the mount in other mount namespaces, and open files of
    /// one that was detached, are there until the process ends.
    pub fn let_go(&self) {
        self.hold.let_go();
    }

    /// Waits until the mount is gone, however that came.
    ///
    /// # Errors
    ///
    /// What reading requests ended with, if not with the end of the mount.
    pub fn wait(&self) -> io::Result<()> {
        let session = self.session.lock().expect("a panic ends the process").take();
        session.map_or(Ok(()), BackgroundSession::join)
    }
}

/// Takes a FUSE mount away, as root by umount2(2), else by `fusermount3`.
///
/// # Errors
///
/// `EBUSY` while programs use it and `lazily` is not set; what the system reports else.
pub fn unmount(mountpoint: &Path, lazily: bool) -> io::Result<()> {
    let flags = if lazily {
        UnmountFlags::DETACH
    } else {
        UnmountFlags::empty()
    };
    match rustix::mount::unmount(mountpoint, flags | UnmountFlags::NOFOLLOW) {
        Err(rustix::io::Errno::PERM) => {}
        done => return Ok(done?),
    }
    let mut command = Command::new("fusermount3");
    command
        .arg("-u")
        .args(lazily.then_some("-z"))
        .arg("--")
        .arg(mountpoint);
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    Err(io::Error::other(said.trim().to_owned()))
}
