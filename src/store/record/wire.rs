//! The messages of nodes, names and blobs; the parent module specifies them.

use prost::Message;

use super::{BadRow, digest_of, vec_of};
use crate::{
    base::{clock::Stamp, id::MachineId},
    store::rows::{
        BlobRow, Content, DirState, Durability, Ino, LinkId, NameRow, NameState, NodeKind, NodeRow, Place,
        Residency, StagingId, TreeLayer, Unloaded,
    },
};

#[derive(Clone, PartialEq, Message)]
pub(super) struct NodeWire {
    #[prost(uint64, tag = "1")]
    ino: u64,
    #[prost(uint32, tag = "2")]
    kind: u32,
    #[prost(uint32, tag = "3")]
    perm: u32,
    #[prost(uint32, tag = "4")]
    uid: u32,
    #[prost(uint32, tag = "5")]
    gid: u32,
    #[prost(uint32, tag = "6")]
    rdev: u32,
    #[prost(uint64, tag = "7")]
    size: u64,
    #[prost(sfixed64, tag = "8")]
    atime: i64,
    #[prost(sfixed64, tag = "9")]
    mtime: i64,
    #[prost(sfixed64, tag = "10")]
    ctime: i64,
    #[prost(uint32, tag = "11")]
    nlink: u32,
    #[prost(oneof = "ContentWire", tags = "12, 13, 14")]
    content: Option<ContentWire>,
    #[prost(bytes = "vec", tag = "15")]
    target: Vec<u8>,
    #[prost(message, repeated, tag = "16")]
    xattrs: Vec<XattrWire>,
    #[prost(message, optional, tag = "17")]
    dir: Option<DirWire>,
    #[prost(message, optional, tag = "18")]
    link_id: Option<LinkWire>,
    #[prost(bytes = "vec", tag = "19")]
    places: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum ContentWire {
    #[prost(bytes, tag = "12")]
    Blob(Vec<u8>),
    #[prost(uint64, tag = "13")]
    Staging(u64),
    #[prost(bytes, tag = "14")]
    Lost(Vec<u8>),
}

#[derive(Clone, PartialEq, Message)]
struct XattrWire {
    #[prost(bytes = "vec", tag = "1")]
    name: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct DirWire {
    #[prost(uint64, tag = "1")]
    up: u64,
    #[prost(bytes = "vec", tag = "2")]
    name: Vec<u8>,
    #[prost(uint64, tag = "3")]
    visible_children: u64,
    #[prost(uint64, tag = "4")]
    subdirs: u64,
    #[prost(uint32, tag = "5")]
    unloaded: u32,
    #[prost(uint32, tag = "6")]
    unloaded_live: u32,
}

#[derive(Clone, PartialEq, Message)]
struct LinkWire {
    #[prost(fixed64, tag = "1")]
    machine: u64,
    #[prost(uint64, tag = "2")]
    ino: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct NameWire {
    #[prost(uint64, tag = "1")]
    parent: u64,
    #[prost(bytes = "vec", tag = "2")]
    name: Vec<u8>,
    #[prost(uint64, tag = "3")]
    millis: u64,
    #[prost(uint32, tag = "4")]
    counter: u32,
    #[prost(fixed64, tag = "5")]
    machine: u64,
    #[prost(uint64, optional, tag = "6")]
    live: Option<u64>,
    #[prost(uint64, optional, tag = "7")]
    dir: Option<u64>,
    #[prost(message, optional, tag = "8")]
    pending: Option<PlaceWire>,
    #[prost(uint32, tag = "9")]
    layer: u32,
}

#[derive(Clone, PartialEq, Message)]
struct PlaceWire {
    #[prost(uint64, tag = "1")]
    seq: u64,
    #[prost(uint64, tag = "2")]
    first_seq: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct BlobWire {
    #[prost(bytes = "vec", tag = "1")]
    digest: Vec<u8>,
    #[prost(uint64, tag = "2")]
    size: u64,
    #[prost(uint32, tag = "3")]
    residency: u32,
    #[prost(bytes = "vec", tag = "4")]
    bits: Vec<u8>,
    #[prost(uint32, tag = "5")]
    durability: u32,
    #[prost(uint64, tag = "6")]
    confirmed_millis: u64,
    #[prost(uint64, tag = "7")]
    used_secs: u64,
    #[prost(bool, tag = "8")]
    pinned: bool,
    #[prost(bool, tag = "9")]
    doubted: bool,
}

impl From<&NodeRow> for NodeWire {
    fn from(row: &NodeRow) -> Self {
        Self {
            ino: row.ino.0,
            kind: match row.kind {
                NodeKind::File => 1,
                NodeKind::Dir => 2,
                NodeKind::Symlink => 3,
                NodeKind::Fifo => 4,
                NodeKind::Socket => 5,
                NodeKind::CharDevice => 6,
                NodeKind::BlockDevice => 7,
            },
            perm: row.perm,
            uid: row.uid,
            gid: row.gid,
            rdev: row.rdev,
            size: row.size,
            atime: row.atime,
            mtime: row.mtime,
            ctime: row.ctime,
            nlink: row.nlink,
            content: match &row.content {
                Content::None => None,
                Content::Blob(digest) => Some(ContentWire::Blob(vec_of(digest))),
                Content::Staging(id) => Some(ContentWire::Staging(id.0)),
                Content::Lost(digest) => Some(ContentWire::Lost(vec_of(digest))),
            },
            target: row.target.clone(),
            xattrs: row
                .xattrs
                .iter()
                .map(|(name, value)| XattrWire {
                    name: name.clone(),
                    value: value.clone(),
                })
                .collect(),
            dir: row.dir.as_ref().map(|dir| DirWire {
                up: dir.up.0,
                name: dir.name.clone(),
                visible_children: dir.visible_children,
                subdirs: dir.subdirs,
                unloaded: dir.unloaded.layers.into(),
                unloaded_live: dir.unloaded.live.into(),
            }),
            link_id: row.link_id.map(|link| LinkWire {
                machine: link.machine.0,
                ino: link.ino,
            }),
            places: row.places.clone(),
        }
    }
}

impl TryFrom<NodeWire> for NodeRow {
    type Error = BadRow;

    fn try_from(wire: NodeWire) -> Result<Self, BadRow> {
        Ok(Self {
            ino: Ino(wire.ino),
            kind: match wire.kind {
                1 => NodeKind::File,
                2 => NodeKind::Dir,
                3 => NodeKind::Symlink,
                4 => NodeKind::Fifo,
                5 => NodeKind::Socket,
                6 => NodeKind::CharDevice,
                7 => NodeKind::BlockDevice,
                _ => return Err(BadRow("an unknown kind of node")),
            },
            perm: wire.perm,
            uid: wire.uid,
            gid: wire.gid,
            rdev: wire.rdev,
            size: wire.size,
            atime: wire.atime,
            mtime: wire.mtime,
            ctime: wire.ctime,
            nlink: wire.nlink,
            content: match wire.content {
                None => Content::None,
                Some(ContentWire::Blob(digest)) => Content::Blob(digest_of(&digest)?),
                Some(ContentWire::Staging(id)) => Content::Staging(StagingId(id)),
                Some(ContentWire::Lost(digest)) => Content::Lost(digest_of(&digest)?),
            },
            target: wire.target,
            xattrs: wire
                .xattrs
                .into_iter()
                .map(|xattr| (xattr.name, xattr.value))
                .collect(),
            dir: wire.dir.map(|dir| DirState {
                up: Ino(dir.up),
                name: dir.name,
                visible_children: dir.visible_children,
                subdirs: dir.subdirs,
                unloaded: Unloaded {
                    layers: dir.unloaded as u16,
                    live: dir.unloaded_live as u16,
                },
            }),
            link_id: wire.link_id.map(|link| LinkId {
                machine: MachineId(link.machine),
                ino: link.ino,
            }),
            places: wire.places,
        })
    }
}

impl From<&NameRow> for NameWire {
    fn from(row: &NameRow) -> Self {
        Self {
            parent: row.parent.0,
            name: row.name.clone(),
            millis: row.stamp.millis,
            counter: row.stamp.counter,
            machine: row.stamp.machine.0,
            live: match row.state {
                NameState::Dead => None,
                NameState::Live(ino) => Some(ino.0),
            },
            dir: row.dir.map(|ino| ino.0),
            pending: row.pending.map(|place| PlaceWire {
                seq: place.seq,
                first_seq: place.first_seq,
            }),
            layer: row.layer.number().into(),
        }
    }
}

impl TryFrom<NameWire> for NameRow {
    type Error = BadRow;

    fn try_from(wire: NameWire) -> Result<Self, BadRow> {
        Ok(Self {
            parent: Ino(wire.parent),
            name: wire.name,
            layer: TreeLayer::from_number(wire.layer.into()).ok_or(BadRow("a layer below the lowest"))?,
            stamp: Stamp {
                millis: wire.millis,
                counter: wire.counter,
                machine: MachineId(wire.machine),
            },
            state: wire.live.map_or(NameState::Dead, |ino| NameState::Live(Ino(ino))),
            dir: wire.dir.map(Ino),
            pending: wire.pending.map(|place| Place {
                seq: place.seq,
                first_seq: place.first_seq,
            }),
        })
    }
}

impl From<&BlobRow> for BlobWire {
    fn from(row: &BlobRow) -> Self {
        let (residency, bits) = match &row.residency {
            Residency::Nothing => (0, Vec::new()),
            Residency::Partial(bits) => (1, bits.clone()),
            Residency::Whole => (2, Vec::new()),
        };
        let (durability, confirmed_millis) = match row.durability {
            Durability::Dirty => (0, 0),
            Durability::Durable { confirmed_millis } => (1, confirmed_millis),
            Durability::Quarantined => (2, 0),
        };
        Self {
            digest: vec_of(&row.digest),
            size: row.size,
            residency,
            bits,
            durability,
            confirmed_millis,
            used_secs: row.used_secs,
            pinned: row.pinned,
            doubted: row.doubted,
        }
    }
}

impl TryFrom<BlobWire> for BlobRow {
    type Error = BadRow;

    fn try_from(wire: BlobWire) -> Result<Self, BadRow> {
        Ok(Self {
            digest: digest_of(&wire.digest)?,
            size: wire.size,
            residency: match wire.residency {
                0 => Residency::Nothing,
                1 => Residency::Partial(wire.bits),
                2 => Residency::Whole,
                _ => return Err(BadRow("an unknown residency")),
            },
            durability: match wire.durability {
                0 => Durability::Dirty,
                1 => Durability::Durable {
                    confirmed_millis: wire.confirmed_millis,
                },
                2 => Durability::Quarantined,
                _ => return Err(BadRow("an unknown durability")),
            },
            used_secs: wire.used_secs,
            pinned: wire.pinned,
            doubted: wire.doubted,
        })
    }
}
