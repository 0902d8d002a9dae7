//! Parts and roots of a catalog, byte by byte.
//!
//! This file is the format's specification; `tests/golden_catalog.rs` pins it. An object is named by
//! the SHA-256 of its bytes, so whoever reads it by that name needs no checksum in it.
//!
//! # Frame
//!
//! Integers are little-endian.
//!
//! ```text
//! offset  bytes
//!      0      8  magic: "casmpart" of a part, "casmroot" of a root
//!      8      1  major version: 1
//!      9      1  minor version: 0
//!     10      1  codec of the payload: 0 as it is, 1 one zstd frame
//!     11      1  0
//!     12      8  length of the payload before compression, at most 8 MiB of a part, 256 MiB of a root
//!     20      n  payload
//! ```
//!
//! # Payload
//!
//! Protobuf messages, each behind its length as a varint. Of a part: at most 65,536 `Item`s, sorted
//! as [`super::order`] says, no path twice. Of a root: one `Root`, then a `Part` for each part in
//! the order of their first items.
//!
//! ```text
//! message Item { Change change = 1;   // of a segment; without entry and dead when nobody wrote the path
//!                uint32 below = 2;    // what this volume has below the path: 0 nothing,
//!                                     // 1 tombstones alone, 2 something alive, or that was not known
//!                fixed64 salt = 3; }  // of a part's first item: random, so that no part ever has the name
//!                                     // of another one, which a sweep may be about to delete
//! message Root { uint64 watermark_millis = 1;  // of segments up to this time of their keys nothing is missing
//!                uint64 written_millis = 2; fixed64 machine = 3;
//!                repeated Earlier earlier = 4; // older catalogs of the volume, the newest first
//!                uint64 names = 5; }           // live registers
//! message Earlier { bytes digest = 1; uint64 watermark_millis = 2; }
//! message Part { bytes digest = 1; uint64 bytes = 2; uint64 items = 3; uint64 names = 4;
//!                bytes first = 5;              // path of the first item
//!                uint64 oldest_dead_millis = 6; // stamp of the oldest tombstone, 0: there is none
//!                bool linked = 7; }            // a part of the second list: a copy of every
//!                                              // register that has a link id, sorted the same way
//! ```
//!
//! The machine of a stamp is always there.
//!
//! # Versions
//!
//! As with segments: a greater major version is refused with an error of its own, fields that are
//! not known are ignored.

use prost::Message;

use super::order;
use crate::{
    base::{digest::Digest, id::MachineId},
    namespace::{
        change::{Below, Item, Said, check_path},
        segment::{self, wire::Change},
    },
};

const PART: [u8; 8] = *b"casmpart";
const ROOT: [u8; 8] = *b"casmroot";
const MAJOR: u8 = 1;
const MINOR: u8 = 0;
const RAW: u8 = 0;
const ZSTD: u8 = 1;
const HEADER_BYTES: usize = 20;

/// Bytes of a part's payload; what is written is far below, but for one huge item.
const MAX_PART_PAYLOAD: u64 = 8 << 20;
const MAX_ROOT_PAYLOAD: u64 = 256 << 20;
pub const MAX_PART_BYTES: u64 = MAX_PART_PAYLOAD + HEADER_BYTES as u64;
pub const MAX_ROOT_BYTES: u64 = MAX_ROOT_PAYLOAD + HEADER_BYTES as u64;
pub const MAX_ITEMS: usize = 65_536;

/// What a root says of one of its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartRef {
    pub digest: Digest,
    /// As stored.
    pub bytes: u64,
    pub items: u64,
    /// Live registers.
    pub names: u64,
    /// The path of the first item.
    pub first: Vec<u8>,
    /// When the oldest tombstone was written; 0: there is none.
    pub oldest_dead_millis: u64,
}

/// An older catalog of the same volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Earlier {
    pub digest: Digest,
    pub watermark_millis: u64,
}

/// The root of a catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    pub watermark_millis: u64,
    pub written_millis: u64,
    pub machine: MachineId,
    /// The newest first.
    pub earlier: Vec<Earlier>,
    /// Live registers.
    pub names: u64,
    pub parts: Vec<PartRef>,
    /// Parts that have a copy of every register with a link id.
    pub linked: Vec<PartRef>,
}

/// Bytes are not what their name in a catalog promises.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FormatError {
    /// An operator must upgrade; the same bytes are good then.
    #[error("it was written by a newer casmount (catalog format {major}; this one reads up to {MAJOR})")]
    Newer { major: u8 },
    /// It will never be readable.
    #[error("{why}")]
    Malformed { why: &'static str },
}

const fn malformed(why: &'static str) -> FormatError {
    FormatError::Malformed { why }
}

#[derive(Clone, PartialEq, Message)]
struct WireItem {
    #[prost(message, optional, tag = "1")]
    change: Option<Change>,
    #[prost(uint32, tag = "2")]
    below: u32,
}

#[derive(Clone, PartialEq, Message)]
struct WireRoot {
    #[prost(uint64, tag = "1")]
    watermark_millis: u64,
    #[prost(uint64, tag = "2")]
    written_millis: u64,
    #[prost(fixed64, tag = "3")]
    machine: u64,
    #[prost(message, repeated, tag = "4")]
    earlier: Vec<WireEarlier>,
    #[prost(uint64, tag = "5")]
    names: u64,
}

#[derive(Clone, PartialEq, Message)]
struct WireEarlier {
    #[prost(bytes = "vec", tag = "1")]
    digest: Vec<u8>,
    #[prost(uint64, tag = "2")]
    watermark_millis: u64,
}

#[derive(Clone, PartialEq, Message)]
struct WirePart {
    #[prost(bytes = "vec", tag = "1")]
    digest: Vec<u8>,
    #[prost(uint64, tag = "2")]
    bytes: u64,
    #[prost(uint64, tag = "3")]
    items: u64,
    #[prost(uint64, tag = "4")]
    names: u64,
    #[prost(bytes = "vec", tag = "5")]
    first: Vec<u8>,
    #[prost(uint64, tag = "6")]
    oldest_dead_millis: u64,
    #[prost(bool, tag = "7")]
    linked: bool,
}

/// An item as it goes into a part, behind its length.
#[must_use]
pub fn encode_item(item: &Item) -> Vec<u8> {
    let change = match &item.said {
        // No stamp is of machine 0, so its machine is always written.
        Some(said) => segment::said_to_wire(&item.path, said.stamp, said.entry.as_ref(), MachineId(0)),
        None => Change {
            path: item.path.clone(),
            ..Change::default()
        },
    };
    WireItem {
        change: Some(change),
        below: match item.below {
            Below::Nothing => 0,
            Below::Dead => 1,
            Below::Live => 2,
        },
    }
    .encode_length_delimited_to_vec()
}

/// Builds a part's object out of items that [`encode_item`] made, in their order.
///
/// # Panics
///
/// When they are more than a part holds; the writer sees to that.
#[must_use]
pub fn encode_part<'a>(items: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut payload = Vec::new();
    for item in items {
        payload.extend_from_slice(item);
    }
    assert!(
        payload.len() as u64 <= MAX_PART_PAYLOAD,
        "a part of {} bytes",
        payload.len()
    );
    frame(PART, &payload)
}

/// The same, with a salt in its first item.
///
/// # Panics
///
/// As [`encode_part`] does.
#[must_use]
pub fn encode_salted_part<'a>(mut items: impl Iterator<Item = &'a [u8]>, salt: u64) -> Vec<u8> {
    let salted = items.next().map(|item| {
        let mut rest = item;
        let message = record(&mut rest).expect("encode_item made it");
        let mut salted = Vec::with_capacity(item.len() + 12);
        prost::encoding::encode_varint(message.len() as u64 + 9, &mut salted);
        salted.extend_from_slice(message);
        // Field 3, eight bytes.
        salted.push(3 << 3 | 1);
        salted.extend_from_slice(&salt.to_le_bytes());
        salted
    });
    let salted: Vec<u8> = salted
        .into_iter()
        .chain(items.map(<[u8]>::to_vec))
        .flatten()
        .collect();
    encode_part(std::iter::once(salted.as_slice()))
}

/// Reads a part's object. What it says of each register was checked.
///
/// # Errors
///
/// [`FormatError`]; a part is wholly good or not at all.
pub fn decode_part(bytes: &[u8]) -> Result<Vec<Item>, FormatError> {
    let payload = open(bytes, PART, MAX_PART_PAYLOAD)?;
    let mut rest = payload.as_slice();
    let mut items: Vec<Item> = Vec::new();
    while !rest.is_empty() {
        if items.len() == MAX_ITEMS {
            return Err(malformed("it has too many items"));
        }
        let item = decode_item(record(&mut rest)?)?;
        if items
            .last()
            .is_some_and(|last| order::compare(&last.path, &item.path).is_ge())
        {
            return Err(malformed("its items are not in order"));
        }
        items.push(item);
    }
    Ok(items)
}

pub(super) fn decode_item(record: &[u8]) -> Result<Item, FormatError> {
    let wire = WireItem::decode(record).map_err(|_| malformed("an item is not readable"))?;
    let below = match wire.below {
        0 => Below::Nothing,
        1 => Below::Dead,
        _ => Below::Live,
    };
    let change = wire.change.ok_or(malformed("an item has no path"))?;
    if change.what.is_none() {
        check_path(&change.path).map_err(malformed)?;
        return Ok(Item {
            path: change.path,
            said: None,
            below,
        });
    }
    let change = segment::from_wire(change, MachineId(0)).map_err(malformed)?;
    Ok(Item {
        path: change.path,
        said: Some(Said {
            stamp: change.stamp,
            entry: change.entry,
        }),
        below,
    })
}

impl Root {
    /// Builds the root's object.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = WireRoot {
            watermark_millis: self.watermark_millis,
            written_millis: self.written_millis,
            machine: self.machine.0,
            earlier: self
                .earlier
                .iter()
                .map(|earlier| WireEarlier {
                    digest: earlier.digest.as_bytes().to_vec(),
                    watermark_millis: earlier.watermark_millis,
                })
                .collect(),
            names: self.names,
        }
        .encode_length_delimited_to_vec();
        let parts = self.parts.iter().map(|part| (part, false));
        for (part, linked) in parts.chain(self.linked.iter().map(|part| (part, true))) {
            let wire = WirePart {
                digest: part.digest.as_bytes().to_vec(),
                bytes: part.bytes,
                items: part.items,
                names: part.names,
                first: part.first.clone(),
                oldest_dead_millis: part.oldest_dead_millis,
                linked,
            };
            payload.extend_from_slice(&wire.encode_length_delimited_to_vec());
        }
        frame(ROOT, &payload)
    }

    /// Reads a root's object.
    ///
    /// # Errors
    ///
    /// [`FormatError`]; a root is wholly good or not at all.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let payload = open(bytes, ROOT, MAX_ROOT_PAYLOAD)?;
        let mut rest = payload.as_slice();
        let wire = WireRoot::decode(record(&mut rest)?).map_err(|_| malformed("its head is not readable"))?;
        let mut root = Self {
            watermark_millis: wire.watermark_millis,
            written_millis: wire.written_millis,
            machine: MachineId(wire.machine),
            earlier: Vec::with_capacity(wire.earlier.len()),
            names: wire.names,
            parts: Vec::new(),
            linked: Vec::new(),
        };
        for earlier in wire.earlier {
            root.earlier.push(Earlier {
                digest: digest(&earlier.digest)?,
                watermark_millis: earlier.watermark_millis,
            });
        }
        while !rest.is_empty() {
            let part =
                WirePart::decode(record(&mut rest)?).map_err(|_| malformed("a part is not readable"))?;
            check_path(&part.first).map_err(malformed)?;
            let list = if part.linked {
                &mut root.linked
            } else {
                &mut root.parts
            };
            if list
                .last()
                .is_some_and(|last| order::compare(&last.first, &part.first).is_ge())
            {
                return Err(malformed("its parts are not in order"));
            }
            list.push(PartRef {
                digest: digest(&part.digest)?,
                bytes: part.bytes,
                items: part.items,
                names: part.names,
                first: part.first,
                oldest_dead_millis: part.oldest_dead_millis,
            });
        }
        Ok(root)
    }
}

fn digest(bytes: &[u8]) -> Result<Digest, FormatError> {
    Digest::from_slice(bytes).ok_or(malformed("a digest is not of 32 bytes"))
}

fn frame(magic: [u8; 8], payload: &[u8]) -> Vec<u8> {
    // Compression fails only for want of memory; the payload as it is will do.
    let packed = zstd::bulk::compress(payload, zstd::DEFAULT_COMPRESSION_LEVEL)
        .ok()
        .filter(|packed| packed.len() < payload.len());
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(&magic);
    bytes.extend_from_slice(&[MAJOR, MINOR, if packed.is_some() { ZSTD } else { RAW }, 0]);
    bytes.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    bytes.extend_from_slice(packed.as_deref().unwrap_or(payload));
    bytes
}

fn open(bytes: &[u8], magic: [u8; 8], max: u64) -> Result<Vec<u8>, FormatError> {
    let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(malformed("it is too short"));
    };
    if header[..8] != magic {
        return Err(malformed("it does not begin as one"));
    }
    if header[8] > MAJOR {
        return Err(FormatError::Newer { major: header[8] });
    }
    let (_, len) = header
        .split_last_chunk::<8>()
        .expect("a header has more than 8 bytes");
    let len = u64::from_le_bytes(*len);
    if len > max {
        return Err(malformed("its payload is larger than any"));
    }
    let payload = match header[10] {
        RAW => body.to_vec(),
        // The output never outgrows the capacity.
        ZSTD => zstd::bulk::decompress(body, len as usize)
            .map_err(|_| malformed("its payload does not decompress to the length it tells"))?,
        _ => return Err(malformed("its payload is coded in an unknown way")),
    };
    if payload.len() as u64 != len {
        return Err(malformed("its payload is not as long as it tells"));
    }
    Ok(payload)
}

/// Takes the next record off `rest`.
fn record<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], FormatError> {
    let len = prost::decode_length_delimiter(&mut *rest).map_err(|_| malformed("a record has no length"))?;
    let (record, behind) = rest
        .split_at_checked(len)
        .ok_or(malformed("a record ends behind the object"))?;
    *rest = behind;
    Ok(record)
}
