//! What a machine tells the others about a path, and what a catalog keeps of it.

use crate::{
    base::{chunk::ChunkList, clock::Stamp, digest::Digest},
    store::{
        pack::PackPlace,
        rows::{LinkId, NodeKind},
    },
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

/// What a volume has below a path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Below {
    #[default]
    Nothing,
    /// Tombstones alone.
    Dead,
    /// A live register; or it is not known that there is none.
    Live,
}

/// What the last writer of a path said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    pub stamp: Stamp,
    /// `None`: a tombstone.
    pub entry: Option<Entry>,
}

/// One register of a catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub path: Vec<u8>,
    /// `None`: nobody wrote the path, it is there for what is below it.
    pub said: Option<Said>,
    pub below: Below,
}

impl Item {
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.entry().is_some()
    }

    #[must_use]
    pub fn entry(&self) -> Option<&Entry> {
        self.said.as_ref().and_then(|said| said.entry.as_ref())
    }

    /// The register as a change, to be merged; `None` when nobody wrote the path.
    #[must_use]
    pub fn into_change(self) -> Option<PathChange> {
        let path = self.path;
        self.said.map(|said| PathChange {
            path,
            stamp: said.stamp,
            entry: said.entry,
        })
    }
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

impl Entry {
    /// An entry of root's, from 1970, of which nothing else is to be said.
    #[must_use]
    pub fn new(kind: NodeKind, perm: u32) -> Self {
        Self {
            kind,
            perm,
            uid: 0,
            gid: 0,
            rdev: 0,
            mtime: 0,
            blob: None,
            target: Vec::new(),
            xattrs: Vec::new(),
            link_id: None,
        }
    }
}

/// The bytes of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryBlob {
    pub digest: Digest,
    pub size: u64,
    pub chunks: EntryChunks,
    /// Where packs have the chunks, in their order; empty: each is an object of its own. Those of
    /// a listed blob are in its list.
    pub places: Vec<Option<PackPlace>>,
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

/// Chunks of the longest list that an entry carries itself; a longer one is
/// [`EntryChunks::Listed`].
pub const MAX_INLINE_CHUNKS: usize = 1024;

/// Bytes of the longest name (`NAME_MAX`) and path (`PATH_MAX`).
pub const MAX_NAME_BYTES: usize = 255;
pub const MAX_PATH_BYTES: usize = 4096;

/// Checks that `path` names something below the root of a volume and nothing else.
///
/// # Errors
///
/// The rule that it breaks.
pub fn check_path(path: &[u8]) -> Result<(), &'static str> {
    if path.is_empty() {
        return Err("its path is empty");
    }
    if path.len() > MAX_PATH_BYTES {
        return Err("its path is over 4,096 bytes");
    }
    if path.contains(&0) {
        return Err("its path has a zero byte");
    }
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" => return Err("its path is absolute or has an empty name"),
            b"." | b".." => return Err("its path has a name that is a direction"),
            _ if name.len() > MAX_NAME_BYTES => return Err("its path has a name over 255 bytes"),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_path_that_stays_below_the_root_is_good() {
        let long = [b'x'; 256];
        for path in [&b"a"[..], b"a/b", b"...", b"a/..b", &long[1..], b"\xff\xfe"] {
            assert_eq!(check_path(path), Ok(()), "{path:?}");
        }
        let deep = b"x/".repeat(2049);
        for path in [
            &b""[..],
            b"/",
            b"/a",
            b"a/",
            b"a//b",
            b".",
            b"..",
            b"a/../b",
            b"a/.",
            b"a\0b",
            &long,
            &deep,
        ] {
            assert!(check_path(path).is_err(), "{path:?}");
        }
    }
}
