//! Error numbers of results, and the few calls that neither std nor rustix has.

use std::{fs::File, io, path::Path};

/// What went wrong, as an errno; 0 when nothing did.
pub trait Code {
    fn code(&self) -> i32;
}

impl<T> Code for io::Result<T> {
    fn code(&self) -> i32 {
        match self {
            Ok(_) => 0,
            Err(err) => err.raw_os_error().expect("an error of the system"),
        }
    }
}

impl<T> Code for rustix::io::Result<T> {
    fn code(&self) -> i32 {
        match self {
            Ok(_) => 0,
            Err(err) => err.raw_os_error(),
        }
    }
}

/// Asserts that a call fails with an error number, naming both in words.
#[macro_export]
macro_rules! assert_errno {
    ($call:expr, $($errno:ident)|+) => {{
        let code = $crate::support::posix::Code::code(&$call);
        let expected = [$(libc::$errno),+];
        assert!(
            expected.contains(&code),
            "{}: {}, expected {}",
            stringify!($call),
            if code == 0 { "succeeded".to_owned() } else { std::io::Error::from_raw_os_error(code).to_string() },
            stringify!($($errno)|+),
        );
    }};
}

/// What a call of libc returned, or the error that it left.
pub fn answer(returned: i64) -> io::Result<i64> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(returned)
    }
}

pub fn file(path: &Path, bytes: &[u8]) -> std::path::PathBuf {
    std::fs::write(path, bytes).unwrap_or_else(|err| panic!("cannot write {}: {err}", path.display()));
    path.to_owned()
}

pub fn rw(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap_or_else(|err| panic!("cannot open {}: {err}", path.display()))
}

pub fn ro(path: &Path) -> File {
    File::open(path).unwrap_or_else(|err| panic!("cannot open {}: {err}", path.display()))
}

/// The whole content of a file.
#[track_caller]
pub fn content(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|err| panic!("cannot read {}: {err}", path.display()))
}

/// A shared mapping of a file, unmapped when dropped.
pub struct Mapping {
    at: *mut u8,
    len: usize,
}

// SAFETY: the mapping is plain memory that stays until the drop; accesses are volatile copies.
unsafe impl Send for Mapping {}

impl Mapping {
    pub fn new(file: &File, len: usize, writable: bool, shared: bool) -> io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let protection = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        let flags = if shared {
            MapFlags::SHARED
        } else {
            MapFlags::PRIVATE
        };
        // SAFETY: the kernel chooses the address, so no other memory is replaced.
        let at = unsafe { mmap(std::ptr::null_mut(), len, protection, flags, file, 0)? };
        Ok(Self { at: at.cast(), len })
    }

    pub fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: `len` bytes are mapped for reading until the drop.
        unsafe { std::ptr::copy_nonoverlapping(self.at, bytes.as_mut_ptr(), self.len) };
        bytes
    }

    /// Stores bytes into a writable mapping.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len);
        // SAFETY: checked to be inside of the mapping, which stays until the drop.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.add(at), bytes.len()) };
    }

    /// Has the kernel read from the mapping and write to `to`: `EFAULT` where a load would be a bus error.
    pub fn send(&self, at: usize, len: usize, to: &impl std::os::fd::AsRawFd) -> io::Result<i64> {
        assert!(at + len <= self.len);
        // SAFETY: checked to be inside of the mapping, which stays until the drop; the kernel only reads.
        let sent = unsafe { libc::write(to.as_raw_fd(), self.at.add(at).cast(), len) };
        answer(sent as i64)
    }

    /// `madvise` of a part.
    pub fn advise(&self, at: usize, len: usize, advice: i32) -> io::Result<i64> {
        assert!(at + len <= self.len);
        // SAFETY: checked to be inside of the mapping, whose bytes nobody holds a reference to.
        answer(i64::from(unsafe {
            libc::madvise(self.at.add(at).cast(), len, advice)
        }))
    }

    /// `msync` of the whole.
    pub fn sync_with(&self, flags: i32) -> io::Result<i64> {
        // SAFETY: exactly the mapping.
        answer(i64::from(unsafe { libc::msync(self.at.cast(), self.len, flags) }))
    }

    /// Keeps it in memory until it goes.
    pub fn lock(&self) -> io::Result<i64> {
        // SAFETY: exactly the mapping.
        answer(i64::from(unsafe { libc::mlock(self.at.cast(), self.len) }))
    }

    /// `mprotect` of the whole, which stays readable.
    pub fn protect(&self, protection: i32) -> io::Result<i64> {
        assert!(protection & libc::PROT_READ != 0);
        // SAFETY: exactly the mapping.
        answer(i64::from(unsafe {
            libc::mprotect(self.at.cast(), self.len, protection)
        }))
    }

    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: exactly the mapping.
        let synced = unsafe { rustix::mm::msync(self.at.cast(), self.len, rustix::mm::MsyncFlags::SYNC) };
        synced.map_err(io::Error::from)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping, which nobody can use any more.
        let _ = unsafe { rustix::mm::munmap(self.at.cast(), self.len) };
    }
}
