//! Does operations on a real directory, through the system calls of the same names.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, Stat, Timespec, Timestamps,
        XattrFlags,
    },
    io::Errno,
};

use super::{
    answer::{Answer, DIR, FILE, Kind, LINK, Meta, Nanos},
    ops::{self, Access, How, Op, Renaming, SLOTS, Space, UTIME_NANOS},
};

/// A directory, and the files that a sequence has open in it.
#[derive(Debug)]
pub struct Real {
    root: PathBuf,
    handles: [Option<OwnedFd>; SLOTS],
}

impl Real {
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            handles: [const { None }; SLOTS],
        }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn apply(&mut self, op: &Op) -> Answer {
        match self.call(op) {
            Ok(answer) => answer,
            Err(errno) => Answer::Failed(errno.raw_os_error()),
        }
    }

    pub fn close_all(&mut self) {
        self.handles = [const { None }; SLOTS];
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn call(&mut self, op: &Op) -> Result<Answer, Errno> {
        let missing = |slot: &usize| self.handles[*slot].is_none();
        if super::fs::slot_of(op).iter().any(missing) || matches!(op, Op::Copy { to, .. } if missing(to)) {
            return Ok(Answer::Skipped);
        }
        match op {
            Op::Put { path, len, fill } => self.put(path, *len, *fill)?,
            Op::Open { slot, path, how } => {
                self.handles[*slot] = None;
                self.handles[*slot] = Some(open(&self.at(path), *how)?);
            }
            Op::Close { slot } => close(self.handles[*slot].take().expect("looked at above"))?,
            Op::Write { slot, at, len, fill } => {
                let count = rustix::io::pwrite(self.fd(*slot), &ops::bytes(*fill, *len), *at)?;
                return Ok(Answer::Count(count as u64));
            }
            Op::Read { slot, at, len } => {
                let mut bytes = vec![0; *len];
                let count = rustix::io::pread(self.fd(*slot), &mut bytes, *at)?;
                bytes.truncate(count);
                return Ok(Answer::Bytes(bytes));
            }
            Op::SetLen { slot, len } => rustix::fs::ftruncate(self.fd(*slot), *len)?,
            Op::Space { slot, how, at, len } => {
                rustix::fs::fallocate(self.fd(*slot), space(*how), *at, *len)?;
            }
            Op::Copy {
                from,
                from_at,
                to,
                to_at,
                len,
            } => {
                let (mut read, mut written) = (*from_at, *to_at);
                let count = rustix::fs::copy_file_range(
                    self.fd(*from),
                    Some(&mut read),
                    self.fd(*to),
                    Some(&mut written),
                    *len,
                )?;
                return Ok(Answer::Count(count as u64));
            }
            Op::Fsync { slot } => rustix::fs::fsync(self.fd(*slot))?,
            Op::Fstat { slot } => return Ok(Answer::Meta(meta(&rustix::fs::fstat(self.fd(*slot))?))),
            Op::Fchmod { slot, mode } => rustix::fs::fchmod(self.fd(*slot), Mode::from_raw_mode(*mode))?,
            Op::SeekData { slot, at } => {
                let to = rustix::fs::SeekFrom::Data(*at);
                return Ok(Answer::Count(rustix::fs::seek(self.fd(*slot), to)?));
            }
            Op::SeekHole { slot, at } => {
                let to = rustix::fs::SeekFrom::Hole(*at);
                return Ok(Answer::Count(rustix::fs::seek(self.fd(*slot), to)?));
            }
            Op::Cat { path } => return Ok(Answer::Bytes(errno(fs::read(self.at(path)))?)),
            Op::Truncate { path, len } => truncate(&self.at(path), *len)?,
            Op::Mkdir { path, mode } => rustix::fs::mkdir(self.at(path), Mode::from_raw_mode(*mode))?,
            Op::Rmdir { path } => rustix::fs::rmdir(self.at(path))?,
            Op::Unlink { path } => rustix::fs::unlink(self.at(path))?,
            Op::Rename { from, to, how } => {
                let flags = match how {
                    Renaming::Replace => RenameFlags::empty(),
                    Renaming::NoReplace => RenameFlags::NOREPLACE,
                    Renaming::Exchange => RenameFlags::EXCHANGE,
                };
                rustix::fs::renameat_with(CWD, self.at(from), CWD, self.at(to), flags)?;
            }
            Op::Link { from, to } => rustix::fs::link(self.at(from), self.at(to))?,
            Op::Symlink { target, path } => rustix::fs::symlink(target.as_str(), self.at(path))?,
            Op::Readlink { path } => {
                let target = rustix::fs::readlink(self.at(path), Vec::new())?;
                return Ok(Answer::Target(target.to_string_lossy().into_owned()));
            }
            Op::Chmod { path, mode } => rustix::fs::chmod(self.at(path), Mode::from_raw_mode(*mode))?,
            Op::Utime {
                path,
                seconds,
                nofollow,
            } => utime(&self.at(path), *seconds, *nofollow)?,
            Op::Stat { path } => return Ok(Answer::Meta(meta(&rustix::fs::stat(self.at(path))?))),
            Op::Lstat { path } => return Ok(Answer::Meta(meta(&rustix::fs::lstat(self.at(path))?))),
            Op::List { path } => return Ok(Answer::Names(errno(list(&self.at(path)))?)),
            Op::SetXattr { path, name, value } => {
                let value = value.to_string();
                rustix::fs::setxattr(self.at(path), *name, value.as_bytes(), XattrFlags::empty())?;
            }
            Op::RemoveXattr { path, name } => rustix::fs::removexattr(self.at(path), *name)?,
        }
        Ok(Answer::Done)
    }

    fn fd(&self, slot: usize) -> &OwnedFd {
        self.handles[slot].as_ref().expect("the caller looked")
    }

    fn put(&self, path: &str, len: usize, fill: u16) -> Result<(), Errno> {
        let file = open(&self.at(path), How::NEW)?;
        let bytes = ops::bytes(fill, len);
        let mut done = 0;
        while done < bytes.len() {
            done += rustix::io::pwrite(&file, &bytes[done..], done as u64)?;
        }
        close(file)
    }
}

fn open(path: &Path, how: How) -> Result<OwnedFd, Errno> {
    let mut flags = match how.access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::WRONLY,
        Access::Both => OFlags::RDWR,
    };
    for (wanted, flag) in [
        (how.create, OFlags::CREATE),
        (how.exclusive, OFlags::EXCL),
        (how.truncate, OFlags::TRUNC),
        (how.append, OFlags::APPEND),
        (how.nofollow, OFlags::NOFOLLOW),
    ] {
        flags.set(flag, wanted);
    }
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o666))
}

/// Closes, and says what close(2) said; a drop would not.
fn close(file: OwnedFd) -> Result<(), Errno> {
    let fd = std::os::fd::IntoRawFd::into_raw_fd(file);
    // SAFETY: the descriptor was just taken out of its owner, and is not used again.
    if unsafe { libc::close(fd) } == 0 {
        Ok(())
    } else {
        errno(Err(io::Error::last_os_error()))
    }
}

fn truncate(path: &Path, len: u64) -> Result<(), Errno> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).expect("paths have no NUL");
    // SAFETY: the call reads the string through the pointer and keeps nothing.
    if unsafe { libc::truncate(path.as_ptr(), len as i64) } == 0 {
        Ok(())
    } else {
        errno(Err(io::Error::last_os_error()))
    }
}

fn utime(path: &Path, seconds: i64, nofollow: bool) -> Result<(), Errno> {
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: seconds,
            tv_nsec: i64::from(UTIME_NANOS),
        },
    };
    let flags = if nofollow {
        AtFlags::SYMLINK_NOFOLLOW
    } else {
        AtFlags::empty()
    };
    rustix::fs::utimensat(CWD, path, &times, flags)
}

fn space(how: Space) -> FallocateFlags {
    match how {
        Space::Allocate => FallocateFlags::empty(),
        Space::AllocateKeepSize => FallocateFlags::KEEP_SIZE,
        Space::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        Space::Zero => FallocateFlags::ZERO_RANGE,
        Space::ZeroKeepSize => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
    }
}

fn errno<T>(result: io::Result<T>) -> Result<T, Errno> {
    result.map_err(|err| Errno::from_io_error(&err).expect("an error of the system"))
}

fn meta(stat: &Stat) -> Meta<Nanos> {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => DIR,
        FileType::Symlink => LINK,
        FileType::RegularFile => FILE,
        _ => '?',
    };
    Meta {
        kind,
        perm: stat.st_mode & 0o7777,
        nlink: stat.st_nlink,
        size: if kind == DIR { 0 } else { stat.st_size as u64 },
        mtime: Nanos::from(stat.st_mtime) * 1_000_000_000 + Nanos::from(stat.st_mtime_nsec),
    }
}

fn list(path: &Path) -> io::Result<Vec<(String, Kind)>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let kind = if kind.is_dir() {
            DIR
        } else if kind.is_symlink() {
            LINK
        } else {
            FILE
        };
        names.push((entry.file_name().to_string_lossy().into_owned(), kind));
    }
    names.sort();
    Ok(names)
}

/// One name of a tree, as it is found.
#[derive(Debug)]
pub struct Found {
    pub meta: Meta<Nanos>,
    pub ino: u64,
    pub bytes: Vec<u8>,
    pub target: String,
    pub xattrs: Vec<(String, String)>,
}

/// Reads one name whole.
pub fn found(path: &Path) -> io::Result<Found> {
    let stat = rustix::fs::lstat(path)?;
    let meta = meta(&stat);
    let (mut bytes, mut target, mut xattrs) = (Vec::new(), String::new(), Vec::new());
    match meta.kind {
        FILE => bytes = fs::read(path)?,
        LINK => target = fs::read_link(path)?.to_string_lossy().into_owned(),
        _ => {}
    }
    if meta.kind != LINK {
        for name in ["user.x", "user.y"] {
            let mut value = [0; 64];
            match rustix::fs::getxattr(path, name, &mut value) {
                Ok(len) => {
                    let value = String::from_utf8_lossy(&value[..len]).into_owned();
                    xattrs.push((name.to_owned(), value));
                }
                Err(Errno::NODATA) => {}
                Err(err) => return Err(err.into()),
            }
        }
    }
    Ok(Found {
        meta,
        ino: fs::symlink_metadata(path)?.ino(),
        bytes,
        target,
        xattrs,
    })
}

/// The names below a directory, with their types; what cannot be listed is an error.
pub fn names_below(root: &Path) -> io::Result<Vec<String>> {
    let (mut names, mut dirs) = (Vec::new(), vec![String::new()]);
    while let Some(dir) = dirs.pop() {
        for (name, kind) in list(&root.join(&dir))? {
            let path = super::fs::join(&dir, &name);
            if kind == DIR {
                dirs.push(path.clone());
            }
            names.push(path);
        }
    }
    names.sort();
    Ok(names)
}
