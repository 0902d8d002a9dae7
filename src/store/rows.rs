//! The rows of the index: what is known about names, files and blobs.
//!
//! A row is a value. Whoever changes one commits the whole new row to the
//! ledger ([`super::ledger`]); nothing is ever changed in place.

use super::pack::PackPlace;
use crate::base::{chunk::ChunkList, clock::Stamp, digest::Digest, id::MachineId};

/// The number of a file or directory on this machine, kept across restarts and never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(pub u64);

impl Ino {
    pub const ROOT: Self = Self(1);
    /// Not a directory that anyone sees: its names are link ids, see [`LinkId`].
    pub const LINKS: Self = Self(0);
}

/// The number of a staging file, never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StagingId(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    File,
    Dir,
    Symlink,
    Fifo,
    Socket,
    CharDevice,
    BlockDevice,
}

/// Where the bytes of a file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Not a regular file.
    None,
    /// Sealed, under this digest; resident or not.
    Blob(Digest),
    /// Being written, or waiting to be sealed.
    Staging(StagingId),
    /// The bucket does not have this blob: the name reads as "no such file"
    /// until it is created again. One machine's opinion, never published.
    Lost(Digest),
}

/// The first path that a hard-linked file had, on the machine that made it:
/// names that carry the same id are names of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinkId {
    pub machine: MachineId,
    pub ino: u64,
}

/// What a directory's row knows besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirState {
    /// The directory above; the root is its own.
    pub up: Ino,
    /// The name in `up`.
    pub name: Vec<u8>,
    /// How many names in it a user sees. Zero is what `rmdir` wants.
    pub visible_children: u64,
    /// How many of those are directories.
    pub subdirs: u64,
    pub unloaded: Unloaded,
}

/// In which layers a directory has registers that are not among the rows yet, but in a catalog: a
/// bit for each layer, the uppermost the lowest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unloaded {
    pub layers: u16,
    /// Where something below that is not loaded may be alive: in it, or in what is dead in it.
    pub live: u16,
}

impl Unloaded {
    #[must_use]
    pub fn is_any(self) -> bool {
        self.layers != 0
    }

    #[must_use]
    pub fn is_in(self, layer: TreeLayer) -> bool {
        self.layers & layer.bit() != 0
    }

    /// Notes registers in the catalog of a layer.
    pub fn add(&mut self, layer: TreeLayer, live: bool) {
        self.layers |= layer.bit();
        if live {
            self.live |= layer.bit();
        }
    }

    /// Notes that those of a layer are among the rows. `undecided`: some of them are dead, and what is
    /// below them may be alive.
    pub fn remove(&mut self, layer: TreeLayer, undecided: bool) {
        self.layers &= !layer.bit();
        if !undecided {
            self.live &= !layer.bit();
        }
    }

    pub fn add_all(&mut self, other: Self) {
        self.layers |= other.layers;
        self.live |= other.live;
    }
}

/// A file, directory or other object of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRow {
    pub ino: Ino,
    pub kind: NodeKind,
    /// Permission, set-id and sticky bits: `07777`.
    pub perm: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub size: u64,
    /// Nanoseconds since 1970, negative before.
    pub atime: i64,
    pub mtime: i64,
    pub ctime: i64,
    /// Names of a file. A file without any lives until its last close.
    pub nlink: u32,
    pub content: Content,
    /// What a symbolic link points at.
    pub target: Vec<u8>,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub dir: Option<DirState>,
    pub link_id: Option<LinkId>,
    /// Where packs have the chunks of its blob, as a catalog said it and `store::pack` encodes it;
    /// empty when that is among the rows of chunks, or not known.
    pub places: Vec<u8>,
}

impl NodeRow {
    /// A node without content, made at `now` (nanoseconds since 1970).
    #[must_use]
    pub fn new(ino: Ino, kind: NodeKind, now: i64) -> Self {
        Self {
            ino,
            kind,
            perm: 0,
            uid: 0,
            gid: 0,
            rdev: 0,
            size: 0,
            atime: now,
            mtime: now,
            ctime: now,
            nlink: 0,
            content: Content::None,
            target: Vec::new(),
            xattrs: Vec::new(),
            dir: None,
            link_id: None,
            places: Vec::new(),
        }
    }
}

/// What the newest change says of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameState {
    /// Deleted: kept as a tombstone, so that older changes that arrive later lose.
    Dead,
    Live(Ino),
}

/// The place of an own change in the order of this machine's changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Of the newest change of the name.
    pub seq: u64,
    /// Of the oldest change of the name that is not published.
    pub first_seq: u64,
}

/// Which volume of the mounted stack a register comes from, counted from the top.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TreeLayer(u8);

impl TreeLayer {
    /// The mounted volume, with this machine's own changes.
    pub const TOP: Self = Self(0);

    /// How many volumes may lie below the mounted one.
    pub const MAX_BELOW: u8 = 8;

    /// What is of this machine alone, above all volumes: names that it makes anew elsewhere, and never
    /// tells of. Such a register is live; when it goes, it leaves none or one of another layer.
    pub const HERE: Self = Self(u8::MAX);

    /// The layer that has `above` others above it; `None` when that is too many.
    #[must_use]
    pub fn new(above: u64) -> Option<Self> {
        u8::try_from(above)
            .ok()
            .filter(|above| *above <= Self::MAX_BELOW)
            .map(Self)
    }

    /// How it is kept: how many volumes are above it, or 255 for [`TreeLayer::HERE`].
    #[must_use]
    pub fn from_number(number: u64) -> Option<Self> {
        if number == u64::from(Self::HERE.0) {
            Some(Self::HERE)
        } else {
            Self::new(number)
        }
    }

    /// What is of this machine alone is in no catalog.
    fn bit(self) -> u16 {
        1_u16.checked_shl(u32::from(self.0)).unwrap_or(0)
    }

    /// How many layers are above it.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }
}

/// One name: a register of the uppermost layer that says anything of it, there of the last writer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameRow {
    pub parent: Ino,
    pub name: Vec<u8>,
    pub layer: TreeLayer,
    /// [`Stamp::ZERO`]: nobody said anything of this name yet, only of names below it, or (in
    /// [`TreeLayer::HERE`]) only this machine to itself.
    pub stamp: Stamp,
    pub state: NameState,
    /// The directory that holds what is known below this name, live or not;
    /// equal to `state`'s while the name is a live directory.
    pub dir: Option<Ino>,
    /// Set while this machine made the newest change and has not published it; then the
    /// layer is [`TreeLayer::TOP`].
    pub pending: Option<Place>,
}

impl NameRow {
    /// Whether a change of `layer` with `stamp` takes the place of this one (law 1 of the merge).
    #[must_use]
    pub fn yields_to(&self, layer: TreeLayer, stamp: Stamp) -> bool {
        if self.layer == TreeLayer::HERE {
            return false;
        }
        self.stamp == Stamp::ZERO || layer < self.layer || (layer == self.layer && stamp > self.stamp)
    }
}

/// Which bytes of a blob are on this disk and verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Residency {
    Nothing,
    /// A bit for each chunk, the lowest bit of the first byte first.
    Partial(Vec<u8>),
    Whole,
}

/// Whether the bucket has a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Only here; must not leave this disk.
    Dirty,
    /// The bucket acknowledged it, or another machine published it.
    Durable { confirmed_millis: u64 },
    /// Its bytes were found to differ from its name; never uploaded, kept for inspection.
    Quarantined,
}

/// A blob that this machine holds bytes of, or has written.
///
/// A blob without a row is durable as far as anyone knows, and not resident.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobRow {
    pub digest: Digest,
    pub size: u64,
    pub residency: Residency,
    pub durability: Durability,
    /// Seconds since 1970 of this machine's clock: last open, lookup or touch.
    pub used_secs: u64,
    pub pinned: bool,
    /// Power was lost before a barrier covered the bytes that `residency` speaks of: they
    /// are hashed again before use. Set by recovery only; who hashed commits the row without it.
    pub doubted: bool,
}

/// What is known of a chunk in the bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRow {
    /// When the bucket was last seen to hold it, by its clock; 0: told by others only, or found missing.
    pub confirmed_millis: u64,
    /// `None`: an object of its own.
    pub place: Option<PackPlace>,
}

/// The chunk list of a long blob, as an object of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListObject {
    pub digest: Digest,
    pub size: u64,
}

/// One change of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    PutNode(NodeRow),
    DropNode(Ino),
    PutName(NameRow),
    DropName(Ino, Vec<u8>),
    PutBlob(BlobRow),
    DropBlob(Digest),
    /// The chunks of a blob of more than one; immutable.
    PutManifest(Digest, ChunkList),
    PutChunk(Digest, ChunkRow),
    /// The bucket has the chunk list of this blob as that object.
    PutList(Digest, ListObject),
    PutMeta(String, Vec<u8>),
    /// The bytes of this staging file reached the disk (`fdatasync` returned before the
    /// commit), or their doubt was dealt with. Place it behind the `PutNode` of one commit.
    SyncedStaging(StagingId),
}
