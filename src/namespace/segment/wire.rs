//! The protobuf messages of a segment, field by field as `segment` specifies them.
//!
//! Only shapes are here; what a field must hold is checked in `segment`.
//! A field is never renumbered, and its number never used again.

/// The first record of a payload.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Head {
    #[prost(fixed64, tag = "1")]
    pub machine: u64,
    #[prost(uint64, tag = "2")]
    pub seq: u64,
    #[prost(uint64, tag = "3")]
    pub published_millis: u64,
    #[prost(message, optional, tag = "4")]
    pub previous: Option<Previous>,
}

/// The segment that its machine published before this one.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Previous {
    #[prost(uint64, tag = "1")]
    pub millis: u64,
    #[prost(uint64, tag = "2")]
    pub seq: u64,
}

/// Every record behind the head.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Change {
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub millis: u64,
    #[prost(uint32, tag = "3")]
    pub counter: u32,
    #[prost(fixed64, optional, tag = "4")]
    pub machine: Option<u64>,
    #[prost(oneof = "What", tags = "5, 6")]
    pub what: Option<What>,
}

/// What is at the path now.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum What {
    #[prost(message, tag = "5")]
    Entry(Entry),
    #[prost(message, tag = "6")]
    Dead(Dead),
}

/// Nothing.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Dead {}

/// A file, directory or other object.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Entry {
    #[prost(uint32, tag = "1")]
    pub kind: u32,
    #[prost(uint32, tag = "2")]
    pub perm: u32,
    #[prost(uint32, tag = "3")]
    pub uid: u32,
    #[prost(uint32, tag = "4")]
    pub gid: u32,
    #[prost(uint32, tag = "5")]
    pub rdev: u32,
    #[prost(sint64, tag = "6")]
    pub mtime: i64,
    #[prost(message, optional, tag = "7")]
    pub blob: Option<Blob>,
    #[prost(bytes = "vec", tag = "8")]
    pub target: Vec<u8>,
    #[prost(message, repeated, tag = "9")]
    pub xattrs: Vec<Xattr>,
    #[prost(message, optional, tag = "10")]
    pub link_id: Option<LinkId>,
}

/// The bytes of a regular file.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Blob {
    #[prost(bytes = "vec", tag = "1")]
    pub digest: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub size: u64,
    #[prost(oneof = "Chunks", tags = "3, 4")]
    pub chunks: Option<Chunks>,
    #[prost(bytes = "vec", tag = "5")]
    pub places: Vec<u8>,
}

/// The chunks of a blob of more than one.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Chunks {
    #[prost(bytes, tag = "3")]
    Inline(Vec<u8>),
    #[prost(message, tag = "4")]
    Listed(Listed),
}

/// A chunk list that is a blob of its own.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Listed {
    #[prost(bytes = "vec", tag = "1")]
    pub digest: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub size: u64,
}

/// One extended attribute.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Xattr {
    #[prost(bytes = "vec", tag = "1")]
    pub name: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// Names that carry the same id are names of one file.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct LinkId {
    #[prost(fixed64, tag = "1")]
    pub machine: u64,
    #[prost(uint64, tag = "2")]
    pub ino: u64,
}
