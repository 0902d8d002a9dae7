//! How rows and changes look as bytes: in the journal's records and in the `row` columns of the index.
//!
//! The bytes are Protocol Buffers (proto3 wire format), so that a field can be added without a new version:
//! an old reader never meets it, because a format written by a newer program is refused as a whole.
//! `tests/golden_journal.rs` pins them.
//!
//! ```text
//! Record   1 repeated Redo
//! Redo     one of: 1 Node  2 drop_node uint64  3 Name  4 DropName  5 Blob  6 drop_blob bytes  7 Manifest
//!          8 Chunk  9 Meta  10 synced_staging uint64  11 Ceilings  12 doubt_staging uint64  13 List
//! Node     1 ino uint64  2 kind uint32 (1 file 2 dir 3 symlink 4 fifo 5 socket 6 character 7 block device)
//!          3 perm  4 uid  5 gid  6 rdev uint32  7 size uint64  8 atime  9 mtime  10 ctime sfixed64
//!          11 nlink uint32  12 content: blob bytes  13 content: staging uint64  14 content: lost bytes
//!          15 target bytes  16 repeated Xattr  17 Dir  18 Link  19 places bytes
//! Xattr    1 name bytes  2 value bytes
//! Dir      1 up uint64  2 name bytes  3 visible_children uint64  4 subdirs uint64  5 unloaded  6 unloaded_live uint32
//! Link     1 machine fixed64  2 ino uint64
//! Name     1 parent uint64  2 name bytes  3 millis uint64  4 counter uint32  5 machine fixed64
//!          6 live uint64 (absent: dead)  7 dir uint64  8 Place  9 layer uint32 (absent: 0, the mounted volume;
//!          255: of this machine alone)
//! Place    1 seq uint64  2 first_seq uint64
//! DropName 1 parent uint64  2 name bytes
//! Blob     1 digest bytes  2 size uint64  3 residency uint32 (0 nothing 1 partial 2 whole)  4 bits bytes
//!          5 durability uint32 (0 dirty 1 durable 2 quarantined)  6 confirmed_millis uint64
//!          7 used_secs uint64  8 pinned bool  9 doubted bool
//! Manifest 1 digest bytes  2 chunks bytes: 36 for each chunk, its digest and its length (4 bytes, little endian)
//! Chunk    1 digest bytes  2 millis uint64  3 pack bytes (absent: an object of its own)  4 offset uint32
//!          5 stored_len uint32  6 zstd bool
//! List     1 blob bytes  2 digest bytes  3 size uint64
//! Meta     1 key string  2 value bytes
//! Ceilings 1 ino uint64  2 place uint64
//! ```
//!
//! A digest is its 32 bytes. Every record is *physical redo*: it holds whole rows, so that applying it
//! twice, or to rows that are newer already and will be overwritten by the records that follow, is harmless.

mod wire;

use prost::Message;

use self::wire::{BlobWire, NameWire, NodeWire};
use super::{
    pack::{self, PackPlace},
    rows::{BlobRow, Change, ChunkRow, Ino, ListObject, NameRow, NodeRow, StagingId},
};
use crate::base::{
    chunk::{Chunk, ChunkList},
    digest::Digest,
};

/// What one entry of a record does: a change that a caller committed, or one
/// that the ledger makes for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all are changes, and live for one commit"
)]
pub enum Redo {
    Change(Change),
    /// Numbers below these may have been given out.
    Ceilings(Ceilings),
    /// The bytes of a staging file may have been lost with the power.
    DoubtStaging(StagingId),
}

/// Below which numbers may have been given out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ceilings {
    pub ino: u64,
    pub place: u64,
}

/// The bytes are not a row, although their checksum was right.
#[derive(Debug, thiserror::Error)]
#[error("a stored row has {0}")]
pub struct BadRow(&'static str);

impl BadRow {
    pub(super) const fn new(what: &'static str) -> Self {
        Self(what)
    }
}

#[derive(Clone, PartialEq, Message)]
struct DropNameWire {
    #[prost(uint64, tag = "1")]
    parent: u64,
    #[prost(bytes = "vec", tag = "2")]
    name: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct ManifestWire {
    #[prost(bytes = "vec", tag = "1")]
    digest: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    chunks: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct ChunkWire {
    #[prost(bytes = "vec", tag = "1")]
    digest: Vec<u8>,
    #[prost(uint64, tag = "2")]
    millis: u64,
    #[prost(bytes = "vec", tag = "3")]
    pack: Vec<u8>,
    #[prost(uint32, tag = "4")]
    offset: u32,
    #[prost(uint32, tag = "5")]
    stored_len: u32,
    #[prost(bool, tag = "6")]
    zstd: bool,
}

#[derive(Clone, PartialEq, Message)]
struct ListWire {
    #[prost(bytes = "vec", tag = "1")]
    blob: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    digest: Vec<u8>,
    #[prost(uint64, tag = "3")]
    size: u64,
}

#[derive(Clone, PartialEq, Message)]
struct MetaWire {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct CeilingsWire {
    #[prost(uint64, tag = "1")]
    ino: u64,
    #[prost(uint64, tag = "2")]
    place: u64,
}

#[derive(Clone, PartialEq, Message)]
struct RecordWire {
    #[prost(message, repeated, tag = "1")]
    redos: Vec<RedoWire>,
}

#[derive(Clone, PartialEq, Message)]
struct RedoWire {
    #[prost(oneof = "RedoKind", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13")]
    kind: Option<RedoKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum RedoKind {
    #[prost(message, tag = "1")]
    Node(NodeWire),
    #[prost(uint64, tag = "2")]
    DropNode(u64),
    #[prost(message, tag = "3")]
    Name(NameWire),
    #[prost(message, tag = "4")]
    DropName(DropNameWire),
    #[prost(message, tag = "5")]
    Blob(BlobWire),
    #[prost(bytes, tag = "6")]
    DropBlob(Vec<u8>),
    #[prost(message, tag = "7")]
    Manifest(ManifestWire),
    #[prost(message, tag = "8")]
    Chunk(ChunkWire),
    #[prost(message, tag = "9")]
    Meta(MetaWire),
    #[prost(uint64, tag = "10")]
    SyncedStaging(u64),
    #[prost(message, tag = "11")]
    Ceilings(CeilingsWire),
    #[prost(uint64, tag = "12")]
    DoubtStaging(u64),
    #[prost(message, tag = "13")]
    List(ListWire),
}

/// Appends the record of `redos` to `out`. The record of two lists is that of
/// one behind that of the other.
pub fn encode(redos: &[Redo], out: &mut Vec<u8>) {
    let record = RecordWire {
        redos: redos
            .iter()
            .map(|redo| RedoWire {
                kind: Some(redo.into()),
            })
            .collect(),
    };
    record.encode(out).expect("a vector grows as needed");
}

/// Reads a record.
///
/// # Errors
///
/// [`BadRow`] for bytes that [`encode`] never wrote.
pub fn decode(bytes: &[u8]) -> Result<Vec<Redo>, BadRow> {
    let record = RecordWire::decode(bytes).map_err(|_| BadRow("another form than a record"))?;
    record
        .redos
        .into_iter()
        .map(|redo| redo.kind.ok_or(BadRow("no kind"))?.try_into())
        .collect()
}

macro_rules! row_codec {
    ($encode:ident, $decode:ident, $row:ty, $wire:ty) => {
        pub fn $encode(row: &$row) -> Vec<u8> {
            <$wire>::from(row).encode_to_vec()
        }

        pub fn $decode(bytes: &[u8]) -> Result<$row, BadRow> {
            <$wire>::decode(bytes)
                .map_err(|_| BadRow("another form than a row"))?
                .try_into()
        }
    };
}

row_codec!(encode_node, decode_node, NodeRow, NodeWire);
row_codec!(encode_name, decode_name, NameRow, NameWire);
row_codec!(encode_blob, decode_blob, BlobRow, BlobWire);

/// The chunks of a manifest, 36 bytes each.
pub fn encode_chunks(chunks: &ChunkList) -> Vec<u8> {
    let mut out = Vec::with_capacity(chunks.chunks().len() * 36);
    for chunk in chunks.chunks() {
        out.extend_from_slice(chunk.digest.as_bytes());
        out.extend_from_slice(&chunk.len.to_le_bytes());
    }
    out
}

pub fn decode_chunks(bytes: &[u8]) -> Result<ChunkList, BadRow> {
    let mut chunks = Vec::with_capacity(bytes.len() / 36);
    for entry in bytes.chunks(36) {
        let (digest, len) = entry.split_at_checked(32).ok_or(BadRow("half a chunk"))?;
        chunks.push(Chunk {
            digest: digest_of(digest)?,
            len: u32::from_le_bytes(len.try_into().map_err(|_| BadRow("half a chunk"))?),
        });
    }
    Ok(ChunkList::new(chunks))
}

pub fn decode_digest(bytes: &[u8]) -> Result<Digest, BadRow> {
    digest_of(bytes)
}

fn digest_of(bytes: &[u8]) -> Result<Digest, BadRow> {
    Digest::from_slice(bytes).ok_or(BadRow("a digest of another length than 32"))
}

fn vec_of(digest: &Digest) -> Vec<u8> {
    digest.as_bytes().to_vec()
}

fn chunk_wire(digest: &Digest, row: &ChunkRow) -> ChunkWire {
    let wire = ChunkWire {
        digest: vec_of(digest),
        millis: row.confirmed_millis,
        ..ChunkWire::default()
    };
    match row.place {
        None => wire,
        Some(place) => ChunkWire {
            pack: vec_of(&place.pack),
            offset: place.offset,
            stored_len: place.stored_len,
            zstd: place.zstd,
            ..wire
        },
    }
}

fn chunk_row(wire: &ChunkWire) -> Result<ChunkRow, BadRow> {
    let place = if wire.pack.is_empty() {
        None
    } else {
        Some(PackPlace {
            pack: digest_of(&wire.pack)?,
            offset: wire.offset,
            stored_len: wire.stored_len,
            zstd: wire.zstd,
        })
    };
    Ok(ChunkRow {
        confirmed_millis: wire.millis,
        place,
    })
}

/// The place of one chunk, as the index keeps it; `None`: an object of its own.
pub fn encode_place(place: Option<PackPlace>) -> Option<Vec<u8>> {
    place.map(|place| pack::encode_places(&[Some(place)]))
}

pub fn decode_place(bytes: Option<&[u8]>) -> Result<Option<PackPlace>, BadRow> {
    let places = pack::decode_places(bytes.unwrap_or_default(), 1);
    let places = places.map_err(|_| BadRow("another form than a place"))?;
    Ok(places.first().copied().flatten())
}

impl From<&Redo> for RedoKind {
    fn from(redo: &Redo) -> Self {
        match redo {
            Redo::Change(Change::PutNode(row)) => Self::Node(row.into()),
            Redo::Change(Change::DropNode(ino)) => Self::DropNode(ino.0),
            Redo::Change(Change::PutName(row)) => Self::Name(row.into()),
            Redo::Change(Change::DropName(parent, name)) => Self::DropName(DropNameWire {
                parent: parent.0,
                name: name.clone(),
            }),
            Redo::Change(Change::PutBlob(row)) => Self::Blob(row.into()),
            Redo::Change(Change::DropBlob(digest)) => Self::DropBlob(vec_of(digest)),
            Redo::Change(Change::PutManifest(digest, chunks)) => Self::Manifest(ManifestWire {
                digest: vec_of(digest),
                chunks: encode_chunks(chunks),
            }),
            Redo::Change(Change::PutChunk(digest, row)) => Self::Chunk(chunk_wire(digest, row)),
            Redo::Change(Change::PutList(blob, list)) => Self::List(ListWire {
                blob: vec_of(blob),
                digest: vec_of(&list.digest),
                size: list.size,
            }),
            Redo::Change(Change::PutMeta(key, value)) => Self::Meta(MetaWire {
                key: key.clone(),
                value: value.clone(),
            }),
            Redo::Change(Change::SyncedStaging(id)) => Self::SyncedStaging(id.0),
            Redo::Ceilings(ceilings) => Self::Ceilings(CeilingsWire {
                ino: ceilings.ino,
                place: ceilings.place,
            }),
            Redo::DoubtStaging(id) => Self::DoubtStaging(id.0),
        }
    }
}

impl TryFrom<RedoKind> for Redo {
    type Error = BadRow;

    fn try_from(kind: RedoKind) -> Result<Self, BadRow> {
        Ok(Self::Change(match kind {
            RedoKind::Node(wire) => Change::PutNode(wire.try_into()?),
            RedoKind::DropNode(ino) => Change::DropNode(Ino(ino)),
            RedoKind::Name(wire) => Change::PutName(wire.try_into()?),
            RedoKind::DropName(wire) => Change::DropName(Ino(wire.parent), wire.name),
            RedoKind::Blob(wire) => Change::PutBlob(wire.try_into()?),
            RedoKind::DropBlob(digest) => Change::DropBlob(digest_of(&digest)?),
            RedoKind::Manifest(wire) => {
                Change::PutManifest(digest_of(&wire.digest)?, decode_chunks(&wire.chunks)?)
            }
            RedoKind::Chunk(wire) => Change::PutChunk(digest_of(&wire.digest)?, chunk_row(&wire)?),
            RedoKind::List(wire) => Change::PutList(
                digest_of(&wire.blob)?,
                ListObject {
                    digest: digest_of(&wire.digest)?,
                    size: wire.size,
                },
            ),
            RedoKind::Meta(wire) => Change::PutMeta(wire.key, wire.value),
            RedoKind::SyncedStaging(id) => Change::SyncedStaging(StagingId(id)),
            RedoKind::Ceilings(CeilingsWire { ino, place }) => {
                return Ok(Self::Ceilings(Ceilings { ino, place }));
            }
            RedoKind::DoubtStaging(id) => return Ok(Self::DoubtStaging(StagingId(id))),
        }))
    }
}
