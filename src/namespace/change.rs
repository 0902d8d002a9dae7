//! What a machine tells the others about a path.

use crate::{
    base::{chunk::ChunkList, clock::Stamp, digest::Digest},
    store::rows::{LinkId, NodeKind},
};

/// The newest state of one path, as the machine in `stamp` made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathChange {
    /// Relative to the root of the volume, names joined by `/`; never empty,
    /// never with an empty, `.` or `..` name.
    pub path: Vec<u8>,
    pub stamp: Stamp,
    /// `None`: there is nothing at this path.
    pub entry: Option<Entry>,
}

/// A file, directory or other object at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub kind: NodeKind,
    /// Permission, set-id and sticky bits: `07777`.
    pub perm: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    /// Nanoseconds since 1970.
    pub mtime: i64,
    /// Of a regular file, else `None`.
    pub blob: Option<EntryBlob>,
    /// What a symbolic link points at.
    pub target: Vec<u8>,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Set when the file had several names.
    pub link_id: Option<LinkId>,
}

/// The bytes of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryBlob {
    pub digest: Digest,
    pub size: u64,
    pub chunks: EntryChunks,
}

/// How the chunks of a blob are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryChunks {
    /// The blob is one chunk, or empty.
    Single,
    Inline(ChunkList),
    /// A list too long for a segment is a blob of its own.
    Listed {
        digest: Digest,
        size: u64,
    },
}
