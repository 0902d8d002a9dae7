//! What an operation answers, and what the model lets it answer.

use std::fmt;

/// The type of a file, as `ls -l` shows it.
pub type Kind = char;

pub const FILE: Kind = '-';
pub const DIR: Kind = 'd';
pub const LINK: Kind = 'l';

/// Nanoseconds since 1970.
pub type Nanos = i128;

/// What stat(2) says, as far as the model knows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Meta<T> {
    pub kind: Kind,
    pub perm: u32,
    pub nlink: u64,
    /// Of a directory 0: file systems count differently.
    pub size: u64,
    pub mtime: T,
}

impl<T: fmt::Debug> fmt::Debug for Meta<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            perm,
            nlink,
            size,
            mtime,
        } = self;
        write!(
            f,
            "{kind} {perm:04o}, {nlink} links, {size} bytes, mtime {mtime:?}"
        )
    }
}

/// What is known of a time of modification.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Time {
    /// It was set, or seen and not changed since.
    At(Nanos),
    /// Something changed the file then or later.
    Since(Nanos),
    /// POSIX leaves it open, or nobody promises it.
    Any,
}

/// How much behind the clock the times of files may be: a file system's clock goes in steps.
const STEP: Nanos = 50_000_000;

impl Time {
    pub fn admits(self, found: Nanos) -> bool {
        match self {
            Self::At(at) => found == at,
            Self::Since(since) => found >= since - STEP,
            Self::Any => true,
        }
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(at) => write!(f, "{at}"),
            Self::Since(since) => write!(f, "{since} or later"),
            Self::Any => f.write_str("any"),
        }
    }
}

/// What a system call answered.
#[derive(Clone, PartialEq, Eq)]
pub enum Answer {
    Done,
    Failed(i32),
    Count(u64),
    Bytes(Vec<u8>),
    Target(String),
    Meta(Meta<Nanos>),
    /// Sorted, without `.` and `..`.
    Names(Vec<(String, Kind)>),
    /// The file is not open; nothing was asked.
    Skipped,
}

/// What it may answer.
#[derive(Clone, PartialEq, Eq)]
pub enum Expected {
    Exactly(Answer),
    Meta(Meta<Time>),
    /// The standard says nothing.
    Anything,
    /// An offset in a range, or that there is none.
    Offset {
        least: u64,
        most: u64,
        or_none: bool,
    },
}

impl Expected {
    pub fn admits(&self, answer: &Answer) -> bool {
        match (self, answer) {
            (Self::Exactly(expected), answer) => expected == answer,
            (Self::Meta(want), Answer::Meta(have)) => {
                let without = |kind, perm, nlink, size| (kind, perm, nlink, size);
                without(want.kind, want.perm, want.nlink, want.size)
                    == without(have.kind, have.perm, have.nlink, have.size)
                    && want.mtime.admits(have.mtime)
            }
            (Self::Offset { least, most, .. }, Answer::Count(at)) => least <= at && at <= most,
            (Self::Offset { or_none, .. }, Answer::Failed(libc::ENXIO)) => *or_none,
            (Self::Anything, _) => true,
            (Self::Meta(_) | Self::Offset { .. }, _) => false,
        }
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Failed(errno) => f.write_str(&errno_name(*errno)),
            Self::Count(count) => write!(f, "{count}"),
            Self::Bytes(bytes) => write!(f, "{}", Brief(bytes)),
            Self::Target(target) => write!(f, "{target}"),
            Self::Meta(meta) => write!(f, "{meta:?}"),
            Self::Names(names) => {
                let names: Vec<_> = names.iter().map(|(name, kind)| format!("{kind}{name}")).collect();
                write!(f, "[{}]", names.join(" "))
            }
            Self::Skipped => f.write_str("not open"),
        }
    }
}

impl fmt::Debug for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(answer) => write!(f, "{answer:?}"),
            Self::Meta(meta) => write!(f, "{meta:?}"),
            Self::Anything => f.write_str("anything"),
            Self::Offset { least, most, or_none } => {
                write!(f, "{least} to {most}{}", if *or_none { ", or ENXIO" } else { "" })
            }
        }
    }
}

/// Bytes in a line: their number, the first ones and a checksum.
pub struct Brief<'a>(pub &'a [u8]);

impl fmt::Display for Brief<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = self.0.iter().take(6).map(|byte| format!("{byte:02x}"));
        let sum = self.0.iter().fold(0_u32, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u32::from(*byte))
        });
        write!(
            f,
            "{} bytes ({}.., sum {sum:08x})",
            self.0.len(),
            first.collect::<String>()
        )
    }
}

/// The name of an error number, as the man pages have it.
pub fn errno_name(errno: i32) -> String {
    let known = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::EIO, "EIO"),
        (libc::ENXIO, "ENXIO"),
        (libc::EBADF, "EBADF"),
        (libc::EBUSY, "EBUSY"),
        (libc::EEXIST, "EEXIST"),
        (libc::EXDEV, "EXDEV"),
        (libc::ENOTDIR, "ENOTDIR"),
        (libc::EISDIR, "EISDIR"),
        (libc::EINVAL, "EINVAL"),
        (libc::ENOSPC, "ENOSPC"),
        (libc::ENODATA, "ENODATA"),
        (libc::ELOOP, "ELOOP"),
        (libc::ENOTEMPTY, "ENOTEMPTY"),
        (libc::ENOTCONN, "ENOTCONN"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::ESTALE, "ESTALE"),
    ];
    let found = known.iter().find(|(known, _)| *known == errno);
    found.map_or_else(|| format!("errno {errno}"), |(_, name)| (*name).to_owned())
}
