//! What is done to a file system: the operations of the model's tests, and how they are drawn.
//!
//! There are few names, and directories are shallow, so that operations meet: files are used as
//! directories, links go round, directories are moved below themselves. An operation is a value
//! that says everything, so that a sequence of them can be done again, shrunk and printed.
//!
//! Names of symbolic links have no `..`, and paths have one only behind a name, so nothing gets
//! out of the directory that the sequence runs in.

use proptest::{prelude::*, sample::select};

/// How many files a sequence can hold open at a time.
pub const SLOTS: usize = 4;

/// Names joined by `/`, from the directory that the sequence runs in.
pub type Path = String;

/// The number of an open file.
pub type Slot = usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    Both,
}

/// The flags of open(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of the call")]
pub struct How {
    pub access: Access,
    pub create: bool,
    pub exclusive: bool,
    pub truncate: bool,
    pub append: bool,
    pub nofollow: bool,
}

impl How {
    pub const NEW: Self = Self {
        access: Access::Write,
        create: true,
        exclusive: false,
        truncate: true,
        append: false,
        nofollow: false,
    };

    pub fn reads(self) -> bool {
        self.access != Access::Write
    }

    pub fn writes(self) -> bool {
        self.access != Access::Read
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Allocate,
    AllocateKeepSize,
    Punch,
    Zero,
    ZeroKeepSize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renaming {
    Replace,
    NoReplace,
    Exchange,
}

/// One system call, or in [`Op::Put`] the three with which a program writes a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Open, write from the start, close. `fill` decides the bytes, see [`bytes`].
    Put {
        path: Path,
        len: usize,
        fill: u16,
    },
    /// Opens a file; one that is open under this number is closed before.
    Open {
        slot: Slot,
        path: Path,
        how: How,
    },
    Close {
        slot: Slot,
    },
    Write {
        slot: Slot,
        at: u64,
        len: usize,
        fill: u16,
    },
    Read {
        slot: Slot,
        at: u64,
        len: usize,
    },
    SetLen {
        slot: Slot,
        len: u64,
    },
    Space {
        slot: Slot,
        how: Space,
        at: u64,
        len: u64,
    },
    Copy {
        from: Slot,
        from_at: u64,
        to: Slot,
        to_at: u64,
        len: usize,
    },
    Fsync {
        slot: Slot,
    },
    Fstat {
        slot: Slot,
    },
    Fchmod {
        slot: Slot,
        mode: u32,
    },
    SeekData {
        slot: Slot,
        at: u64,
    },
    SeekHole {
        slot: Slot,
        at: u64,
    },
    /// The whole content by its name.
    Cat {
        path: Path,
    },
    Truncate {
        path: Path,
        len: u64,
    },
    Mkdir {
        path: Path,
        mode: u32,
    },
    Rmdir {
        path: Path,
    },
    Unlink {
        path: Path,
    },
    Rename {
        from: Path,
        to: Path,
        how: Renaming,
    },
    Link {
        from: Path,
        to: Path,
    },
    Symlink {
        target: String,
        path: Path,
    },
    Readlink {
        path: Path,
    },
    Chmod {
        path: Path,
        mode: u32,
    },
    /// Sets the time of modification, in seconds since 1970; of the link itself with `nofollow`.
    Utime {
        path: Path,
        seconds: i64,
        nofollow: bool,
    },
    Stat {
        path: Path,
    },
    Lstat {
        path: Path,
    },
    List {
        path: Path,
    },
    SetXattr {
        path: Path,
        name: &'static str,
        value: u16,
    },
    RemoveXattr {
        path: Path,
        name: &'static str,
    },
}

/// The nanoseconds that [`Op::Utime`] sets besides.
pub const UTIME_NANOS: u32 = 123_456_789;

/// The bytes that a write with this `fill` writes: no two parts of them are alike.
pub fn bytes(fill: u16, len: usize) -> Vec<u8> {
    let (fill, step) = (u64::from(fill), u64::from(fill >> 8) * 2 + 1);
    let byte = |i: u64| (fill + i * step + (i >> 8) * 13 + (i >> 16) * 101) as u8;
    (0..len as u64).map(byte).collect()
}

fn path() -> impl Strategy<Value = Path> {
    let name = || select(vec!["a", "b", "c"]);
    let one = || name().prop_map(str::to_owned);
    prop_oneof![
        10 => one(),
        8 => (one(), one()).prop_map(|(above, name)| format!("{above}/{name}")),
        3 => (one(), one(), one()).prop_map(|(top, above, name)| format!("{top}/{above}/{name}")),
        1 => (one(), one()).prop_map(|(aside, name)| format!("{aside}/../{name}")),
    ]
}

fn len() -> impl Strategy<Value = usize> {
    prop_oneof![
        40 => select(vec![0, 1, 7, 100, 4_095, 4_096, 4_097, 10_000]),
        8 => select(vec![65_536, 140_000, 300_000]),
        1 => select(vec![2_500_000]),
    ]
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => select(vec![0, 1, 50, 4_095, 4_096, 8_192, 9_000]),
        2 => select(vec![65_536, 131_072, 200_000]),
    ]
}

fn slot() -> impl Strategy<Value = Slot> {
    0..SLOTS
}

fn mode() -> impl Strategy<Value = u32> {
    select(vec![0o755, 0o700, 0o644, 0o600, 0o444, 0o000])
}

fn how() -> impl Strategy<Value = How> {
    let access = prop_oneof![2 => Just(Access::Read), 1 => Just(Access::Write), 4 => Just(Access::Both)];
    let often = prop::bool::weighted(0.5);
    let rarely = || prop::bool::weighted(0.15);
    (access, often, rarely(), rarely(), rarely(), rarely()).prop_map(
        |(access, create, exclusive, truncate, append, nofollow)| How {
            access,
            create,
            // Without O_CREAT it means nothing.
            exclusive: create && exclusive,
            truncate,
            append,
            nofollow,
        },
    )
}

/// Operations on names.
fn named() -> impl Strategy<Value = Op> {
    let renaming = prop_oneof![
        5 => Just(Renaming::Replace),
        1 => Just(Renaming::NoReplace),
        2 => Just(Renaming::Exchange),
    ];
    let target = select(vec!["a", "b", "c", "a/b", "b/a", "c/a", "missing"]);
    let time = select(vec![1, 1_000_000_000, 1_600_000_000, 4_000_000_000]);
    prop_oneof![
        10 => (path(), len(), any::<u16>()).prop_map(|(path, len, fill)| Op::Put { path, len, fill }),
        6 => (path(), mode()).prop_map(|(path, mode)| Op::Mkdir { path, mode }),
        3 => path().prop_map(|path| Op::Rmdir { path }),
        5 => path().prop_map(|path| Op::Unlink { path }),
        9 => (path(), path(), renaming).prop_map(|(from, to, how)| Op::Rename { from, to, how }),
        4 => (path(), path()).prop_map(|(from, to)| Op::Link { from, to }),
        3 => (target, path()).prop_map(|(target, path)| Op::Symlink { target: target.to_owned(), path }),
        1 => path().prop_map(|path| Op::Readlink { path }),
        3 => (path(), mode()).prop_map(|(path, mode)| Op::Chmod { path, mode }),
        3 => (path(), time, any::<bool>())
            .prop_map(|(path, seconds, nofollow)| Op::Utime { path, seconds, nofollow }),
        3 => (path(), offset()).prop_map(|(path, len)| Op::Truncate { path, len }),
        4 => path().prop_map(|path| Op::Cat { path }),
        3 => path().prop_map(|path| Op::Stat { path }),
        2 => path().prop_map(|path| Op::Lstat { path }),
        3 => path().prop_map(|path| Op::List { path }),
        1 => (path(), attribute(), any::<u16>())
            .prop_map(|(path, name, value)| Op::SetXattr { path, name, value }),
        1 => (path(), attribute()).prop_map(|(path, name)| Op::RemoveXattr { path, name }),
    ]
}

fn attribute() -> impl Strategy<Value = &'static str> {
    select(vec!["user.x", "user.y"])
}

/// Operations on open files.
fn handled() -> impl Strategy<Value = Op> {
    let space = select(vec![
        Space::Allocate,
        Space::AllocateKeepSize,
        Space::Punch,
        Space::Zero,
        Space::ZeroKeepSize,
    ]);
    prop_oneof![
        10 => (slot(), path(), how()).prop_map(|(slot, path, how)| Op::Open { slot, path, how }),
        5 => slot().prop_map(|slot| Op::Close { slot }),
        10 => (slot(), offset(), len(), any::<u16>())
            .prop_map(|(slot, at, len, fill)| Op::Write { slot, at, len, fill }),
        6 => (slot(), offset(), len()).prop_map(|(slot, at, len)| Op::Read { slot, at, len }),
        3 => (slot(), offset()).prop_map(|(slot, len)| Op::SetLen { slot, len }),
        4 => (slot(), space, offset(), len())
            .prop_map(|(slot, how, at, len)| Op::Space { slot, how, at, len: len as u64 }),
        3 => (slot(), offset(), slot(), offset(), len())
            .prop_map(|(from, from_at, to, to_at, len)| Op::Copy { from, from_at, to, to_at, len }),
        1 => slot().prop_map(|slot| Op::Fsync { slot }),
        4 => slot().prop_map(|slot| Op::Fstat { slot }),
        1 => (slot(), mode()).prop_map(|(slot, mode)| Op::Fchmod { slot, mode }),
        1 => (slot(), offset()).prop_map(|(slot, at)| Op::SeekData { slot, at }),
        1 => (slot(), offset()).prop_map(|(slot, at)| Op::SeekHole { slot, at }),
    ]
}

/// One operation.
pub fn op() -> impl Strategy<Value = Op> {
    prop_oneof![3 => named(), 2 => handled()]
}

/// An operation that makes something.
pub fn making() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (path(), mode()).prop_map(|(path, mode)| Op::Mkdir { path, mode }),
        4 => (path(), len(), any::<u16>()).prop_map(|(path, len, fill)| Op::Put { path, len, fill }),
        1 => (path(), path()).prop_map(|(from, to)| Op::Link { from, to }),
    ]
}

/// A sequence of operations on one file system.
pub fn sequence(most: usize) -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(op(), 1..most)
}
