//! A file that is known by the handle its file system gives it, and opened by that: it takes no descriptor.

use std::{
    ffi::c_int,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// `MAX_HANDLE_SZ` of the kernel.
const MOST_BYTES: usize = 128;

#[repr(C)]
struct Buffer {
    head: libc::file_handle,
    bytes: [u8; MOST_BYTES],
}

/// Names one file for ever: it says, too, how often its inode number was in use before.
pub struct FileId(Box<Buffer>);

impl PartialEq for FileId {
    fn eq(&self, other: &Self) -> bool {
        (self.0.head.handle_type, self.0.head.handle_bytes, &self.0.bytes)
            == (
                other.0.head.handle_type,
                other.0.head.handle_bytes,
                &other.0.bytes,
            )
    }
}

impl FileId {
    pub fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let mut buffer = Box::new(Buffer {
            head: libc::file_handle {
                handle_bytes: MOST_BYTES as u32,
                handle_type: 0,
                f_handle: [],
            },
            bytes: [0; MOST_BYTES],
        });
        let mut mount_id: c_int = 0;
        // SAFETY: the handle is written behind its head, at most the bytes that the head says are there.
        let result = unsafe {
            libc::name_to_handle_at(
                fd.as_raw_fd(),
                c"".as_ptr(),
                (&raw mut *buffer).cast(),
                &raw mut mount_id,
                libc::AT_EMPTY_PATH,
            )
        };
        match result {
            0 => Ok(Self(buffer)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Opens a path descriptor; `root` is a directory of the same file system. Needs root.
    pub fn open(&self, root: impl AsFd) -> io::Result<OwnedFd> {
        let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let handle = (&raw const *self.0).cast_mut().cast();
        // SAFETY: the kernel only reads the handle, which is as long as its head says.
        let fd = unsafe { libc::open_by_handle_at(root.as_fd().as_raw_fd(), handle, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}
