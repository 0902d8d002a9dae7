//! Segments: sealed runs of one machine's changes, each one object of a volume's log.
//!
//! This file is the format's specification; `tests/golden_segment.rs` pins it.
//!
//! # Frame
//!
//! Integers are little-endian.
//!
//! ```text
//! offset  bytes
//!      0      8  magic "casmseg\n"
//!      8      1  major version: 1
//!      9      1  minor version: 0
//!     10      1  codec of the payload: 0 as it is, 1 one zstd frame
//!     11      1  0
//!     12      8  length of the payload before compression, at most 8 MiB
//!     20      n  payload
//! 20 + n     32  SHA-256 of everything before
//! ```
//!
//! # Payload
//!
//! Protobuf messages, each behind its length as a varint: one `Head`, then at
//! most 65,536 `Change`s of at most 1 MiB each.
//!
//! ```text
//! message Head     { fixed64 machine = 1; uint64 seq = 2; uint64 published_millis = 3; Previous previous = 4; }
//! message Previous { uint64 millis = 1; uint64 seq = 2; }
//! message Change   { bytes path = 1;
//!                    uint64 millis = 2; uint32 counter = 3;  // the stamp
//!                    optional fixed64 machine = 4;           // its machine, when it is not the segment's
//!                    oneof what { Entry entry = 5; Dead dead = 6; } }
//! message Dead     { }
//! message Entry    { uint32 kind = 1;   // 1 file, 2 directory, 3 symbolic link, 4 fifo, 5 socket,
//!                                       // 6 character device, 7 block device
//!                    uint32 perm = 2; uint32 uid = 3; uint32 gid = 4; uint32 rdev = 5;
//!                    sint64 mtime = 6;  // nanoseconds since 1970
//!                    Blob blob = 7;     // of a file, and of nothing else
//!                    bytes target = 8;  // of a symbolic link, and of nothing else
//!                    repeated Xattr xattrs = 9; LinkId link_id = 10; }
//! message Blob     { bytes digest = 1; uint64 size = 2;
//!                    oneof chunks { bytes inline = 3; Listed listed = 4; }    // none: one chunk, or empty
//!                    bytes places = 5; }  // in packs, see `store::pack`; not of a listed blob
//! message Listed   { bytes digest = 1; uint64 size = 2; }
//! message Xattr    { bytes name = 1; bytes value = 2; }
//! message LinkId   { fixed64 machine = 1; uint64 ino = 2; }
//! ```
//!
//! `inline` is 36 bytes a chunk: its digest, then its length in 4 bytes. Lists
//! of more than [`MAX_INLINE_CHUNKS`] chunks are `listed`.
//!
//! `previous` names the segment of the same machine that was acknowledged
//! before this one was written: whoever has not seen it lists again before it
//! applies this one, so that a machine's changes appear in its order even when
//! a segment was slow to arrive.
//!
//! # Versions
//!
//! A reader refuses a greater major version with an error of its own (the
//! operator upgrades), and ignores fields it does not know. So a minor version
//! may add what an old reader can leave out and still see the same tree: when
//! an entry expires, say. New numbers in `what` (a
//! preset, say) read as a change that says nothing, and are skipped.
//!
//! # Damage
//!
//! A segment is wholly good or [`SegmentError::Malformed`]; memory is bounded
//! whatever the bytes are. One *change* that breaks a rule (a path that could
//! leave the mount, a chunk list that does not add up) is left out and
//! reported in [`Decoded::skipped`]; the others stand.

pub(super) mod wire;

use prost::Message;

pub use super::change::MAX_INLINE_CHUNKS;
use super::change::{Entry, EntryBlob, EntryChunks, PathChange, check_path};
use crate::{
    base::{
        chunk::{Chunk, ChunkList, MAX_CHUNK_BYTES},
        clock::Stamp,
        digest::Digest,
        id::MachineId,
    },
    store::{
        pack,
        rows::{LinkId, NodeKind},
    },
};

const MAGIC: [u8; 8] = *b"casmseg\n";
const MAJOR: u8 = 1;
const MINOR: u8 = 0;
const RAW: u8 = 0;
const ZSTD: u8 = 1;
const HEADER_BYTES: usize = 20;
const TRAILER_BYTES: usize = 32;

/// Bytes of a payload before compression.
pub const MAX_PAYLOAD_BYTES: u64 = 8 << 20;
/// Bytes of a segment as stored: compression is left out when it does not pay.
pub const MAX_SEGMENT_BYTES: u64 = MAX_PAYLOAD_BYTES + (HEADER_BYTES + TRAILER_BYTES) as u64;
pub const MAX_CHANGES: usize = 65_536;
/// Bytes of one encoded change.
pub const MAX_CHANGE_BYTES: usize = 1 << 20;
/// Limits of xattr(7) and symlink(7).
const MAX_XATTR_NAME_BYTES: usize = 255;
const MAX_XATTR_VALUE_BYTES: usize = 64 << 10;
const MAX_TARGET_BYTES: usize = 4095;
/// Why a change of a newer version is left out: whoever keeps what it says must not take it for damage.
pub(super) const SAYS_NOTHING: &str = "it says nothing that this version understands";
/// Bytes of a packed chunk.
const PACKED_BYTES: usize = 36;

/// Who published a segment, when, and after which other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub machine: MachineId,
    /// Grows with every segment of a machine; never used twice.
    pub seq: u64,
    /// Milliseconds since 1970 of the bucket's clock, as in the key.
    pub published_millis: u64,
    /// Time and number of the machine's segment before this one.
    pub previous: Option<(u64, u64)>,
}

/// A segment that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    pub head: Head,
    pub changes: Vec<PathChange>,
    pub skipped: Vec<Skipped>,
    /// How long the object is.
    pub stored_bytes: u64,
}

/// A change that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// As far as it could be read.
    pub path: Vec<u8>,
    pub why: &'static str,
}

/// Bytes are not a segment that this program can read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SegmentError {
    /// An operator must upgrade; the same bytes are good then.
    #[error("it was written by a newer casmount (segment format {major}; this one reads up to {MAJOR})")]
    Newer { major: u8 },
    /// It will never be readable.
    #[error("{why}")]
    Malformed { why: &'static str },
}

const fn malformed(why: &'static str) -> SegmentError {
    SegmentError::Malformed { why }
}

/// A change as it goes into a segment.
#[derive(Clone, Debug)]
pub struct EncodedChange(Vec<u8>);

impl EncodedChange {
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Encodes one change of a segment that `machine` publishes.
///
/// # Errors
///
/// The rule that it breaks: every reader would leave it out.
pub fn encode_change(change: &PathChange, machine: MachineId) -> Result<EncodedChange, &'static str> {
    let message = to_wire(change, machine);
    from_wire(message.clone(), machine)?;
    if message.encoded_len() > MAX_CHANGE_BYTES {
        return Err("it is larger than 1 MiB, extended attributes included");
    }
    Ok(EncodedChange(message.encode_length_delimited_to_vec()))
}

/// What [`encode_change`] will take at most, in bytes; costs next to nothing.
#[must_use]
pub fn estimate_bytes(change: &PathChange) -> u64 {
    // Numbers, tags and lengths of all messages at their longest.
    const FIXED: usize = 256;
    let entry = change.entry.as_ref().map_or(0, |entry| {
        let chunks = match entry.blob.as_ref().map(|blob| &blob.chunks) {
            Some(EntryChunks::Inline(list)) => list.chunks().len() * PACKED_BYTES,
            Some(EntryChunks::Single | EntryChunks::Listed { .. }) | None => 0,
        };
        let places = entry
            .blob
            .as_ref()
            .map_or(0, |blob| pack::max_places_bytes(blob.places.len()));
        let xattrs = entry
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len() + 32)
            .sum::<usize>();
        chunks + places + xattrs + entry.target.len()
    });
    (FIXED + change.path.len() + entry) as u64
}

/// Builds a segment's object.
///
/// # Panics
///
/// When the changes are more than a segment holds; the cut sees to that.
#[must_use]
pub fn encode(head: &Head, changes: &[EncodedChange]) -> Vec<u8> {
    let mut payload = wire::Head {
        machine: head.machine.0,
        seq: head.seq,
        published_millis: head.published_millis,
        previous: head.previous.map(|(millis, seq)| wire::Previous { millis, seq }),
    }
    .encode_length_delimited_to_vec();
    for change in changes {
        payload.extend_from_slice(&change.0);
    }
    assert!(
        payload.len() as u64 <= MAX_PAYLOAD_BYTES && changes.len() <= MAX_CHANGES,
        "{} changes in {} bytes do not fit a segment",
        changes.len(),
        payload.len()
    );
    // Compression fails only for want of memory; the payload as it is will do.
    let packed = zstd::bulk::compress(&payload, zstd::DEFAULT_COMPRESSION_LEVEL)
        .ok()
        .filter(|packed| packed.len() < payload.len());
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len() + TRAILER_BYTES);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&[MAJOR, MINOR, if packed.is_some() { ZSTD } else { RAW }, 0]);
    bytes.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    bytes.extend_from_slice(packed.as_ref().unwrap_or(&payload));
    let digest = Digest::of(&bytes);
    bytes.extend_from_slice(digest.as_bytes());
    bytes
}

/// Reads a segment's object.
///
/// # Errors
///
/// [`SegmentError`]; a single bad change is not an error, see [`Decoded::skipped`].
pub fn decode(bytes: &[u8]) -> Result<Decoded, SegmentError> {
    let payload = open(bytes)?;
    let mut rest = payload.as_slice();
    let head = wire::Head::decode(record(&mut rest)?).map_err(|_| malformed("its head is not readable"))?;
    let head = Head {
        machine: MachineId(head.machine),
        seq: head.seq,
        published_millis: head.published_millis,
        previous: head.previous.map(|previous| (previous.millis, previous.seq)),
    };
    let mut decoded = Decoded {
        head,
        changes: Vec::new(),
        skipped: Vec::new(),
        stored_bytes: bytes.len() as u64,
    };
    while !rest.is_empty() {
        if decoded.changes.len() + decoded.skipped.len() == MAX_CHANGES {
            return Err(malformed("it has too many changes"));
        }
        let record = record(&mut rest)?;
        match read_change(record, head.machine) {
            Ok(change) => decoded.changes.push(change),
            Err(skipped) => decoded.skipped.push(skipped),
        }
    }
    Ok(decoded)
}

/// Checks the frame and returns the payload.
fn open(bytes: &[u8]) -> Result<Vec<u8>, SegmentError> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(malformed("it is too short"));
    };
    if header[..8] != MAGIC {
        return Err(malformed("it does not begin as a segment"));
    }
    // A newer major version may frame everything behind this byte in another way.
    if header[8] > MAJOR {
        return Err(SegmentError::Newer { major: header[8] });
    }
    let Some((body, trailer)) = rest.split_last_chunk::<TRAILER_BYTES>() else {
        return Err(malformed("it is too short"));
    };
    if Digest::of(&bytes[..HEADER_BYTES + body.len()]).as_bytes() != trailer {
        return Err(malformed("its bytes are damaged (checksum)"));
    }
    let (_, len) = header
        .split_last_chunk::<8>()
        .expect("a header has more than 8 bytes");
    let len = u64::from_le_bytes(*len);
    if len > MAX_PAYLOAD_BYTES {
        return Err(malformed("its payload is larger than any segment's"));
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
fn record<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], SegmentError> {
    let len = prost::decode_length_delimiter(&mut *rest).map_err(|_| malformed("a record has no length"))?;
    let (record, behind) = rest
        .split_at_checked(len)
        .ok_or(malformed("a record ends behind the segment"))?;
    *rest = behind;
    Ok(record)
}

fn read_change(record: &[u8], machine: MachineId) -> Result<PathChange, Skipped> {
    let skipped = |path, why| Skipped { path, why };
    // Also bounds the memory of many empty attributes.
    if record.len() > MAX_CHANGE_BYTES {
        return Err(skipped(Vec::new(), "it is larger than 1 MiB"));
    }
    let message =
        wire::Change::decode(record).map_err(|_| skipped(Vec::new(), "it is not readable as a change"))?;
    let path = message.path.clone();
    from_wire(message, machine).map_err(|why| skipped(path, why))
}

fn to_wire(change: &PathChange, machine: MachineId) -> wire::Change {
    said_to_wire(&change.path, change.stamp, change.entry.as_ref(), machine)
}

/// What `stamp`'s machine said of a path, in an object of `machine`.
pub(super) fn said_to_wire(
    path: &[u8],
    stamp: Stamp,
    entry: Option<&Entry>,
    machine: MachineId,
) -> wire::Change {
    let what = match entry {
        None => wire::What::Dead(wire::Dead {}),
        Some(entry) => wire::What::Entry(wire::Entry {
            kind: kind_number(entry.kind),
            perm: entry.perm,
            uid: entry.uid,
            gid: entry.gid,
            rdev: entry.rdev,
            mtime: entry.mtime,
            blob: entry.blob.as_ref().map(blob_to_wire),
            target: entry.target.clone(),
            xattrs: entry
                .xattrs
                .iter()
                .map(|(name, value)| wire::Xattr {
                    name: name.clone(),
                    value: value.clone(),
                })
                .collect(),
            link_id: entry.link_id.map(|id| wire::LinkId {
                machine: id.machine.0,
                ino: id.ino,
            }),
        }),
    };
    wire::Change {
        path: path.to_vec(),
        millis: stamp.millis,
        counter: stamp.counter,
        machine: (stamp.machine != machine).then_some(stamp.machine.0),
        what: Some(what),
    }
}

fn blob_to_wire(blob: &EntryBlob) -> wire::Blob {
    let chunks = match &blob.chunks {
        EntryChunks::Single => None,
        EntryChunks::Inline(list) => Some(wire::Chunks::Inline(packed(list))),
        EntryChunks::Listed { digest, size } => Some(wire::Chunks::Listed(wire::Listed {
            digest: digest.as_bytes().to_vec(),
            size: *size,
        })),
    };
    wire::Blob {
        digest: blob.digest.as_bytes().to_vec(),
        size: blob.size,
        chunks,
        places: pack::encode_places(&blob.places),
    }
}

fn packed(list: &ChunkList) -> Vec<u8> {
    let mut packed = Vec::with_capacity(list.chunks().len() * PACKED_BYTES);
    for chunk in list.chunks() {
        packed.extend_from_slice(chunk.digest.as_bytes());
        packed.extend_from_slice(&chunk.len.to_le_bytes());
    }
    packed
}

/// Checks every rule that a change must keep.
pub(super) fn from_wire(change: wire::Change, machine: MachineId) -> Result<PathChange, &'static str> {
    check_path(&change.path)?;
    let entry = match change.what.ok_or(SAYS_NOTHING)? {
        wire::What::Dead(_) => None,
        wire::What::Entry(entry) => Some(entry_from_wire(entry)?),
    };
    Ok(PathChange {
        path: change.path,
        stamp: Stamp {
            millis: change.millis,
            counter: change.counter,
            machine: change.machine.map_or(machine, MachineId),
        },
        entry,
    })
}

fn entry_from_wire(entry: wire::Entry) -> Result<Entry, &'static str> {
    let kind = kind_of_number(entry.kind).ok_or("it is of a kind that this version does not know")?;
    if entry.blob.is_some() != (kind == NodeKind::File) {
        return Err("a file without a blob, or a blob on what is not a file");
    }
    if entry.target.is_empty() == (kind == NodeKind::Symlink) {
        return Err("a symbolic link without a target, or a target on what is none");
    }
    if entry.target.len() > MAX_TARGET_BYTES || entry.target.contains(&0) {
        return Err("its target is not a path");
    }
    if entry.perm > 0o7777 {
        return Err("its permission has unknown bits");
    }
    if kind == NodeKind::Dir && entry.link_id.is_some() {
        return Err("a directory with several names");
    }
    let xattrs: Vec<_> = entry
        .xattrs
        .into_iter()
        .map(|xattr| (xattr.name, xattr.value))
        .collect();
    for (name, value) in &xattrs {
        if name.is_empty() || name.len() > MAX_XATTR_NAME_BYTES || name.contains(&0) {
            return Err("the name of an extended attribute is none");
        }
        if value.len() > MAX_XATTR_VALUE_BYTES {
            return Err("an extended attribute is over 64 KiB");
        }
    }
    if !xattrs.is_sorted_by(|(a, _), (b, _)| a < b) {
        return Err("its extended attributes are not in order");
    }
    Ok(Entry {
        kind,
        perm: entry.perm,
        uid: entry.uid,
        gid: entry.gid,
        rdev: entry.rdev,
        mtime: entry.mtime,
        blob: entry.blob.map(blob_from_wire).transpose()?,
        target: entry.target,
        xattrs,
        link_id: entry.link_id.map(|id| LinkId {
            machine: MachineId(id.machine),
            ino: id.ino,
        }),
    })
}

fn blob_from_wire(blob: wire::Blob) -> Result<EntryBlob, &'static str> {
    let digest = Digest::from_slice(&blob.digest).ok_or("its digest is not of 32 bytes")?;
    let chunks = match blob.chunks {
        None => EntryChunks::Single,
        Some(wire::Chunks::Inline(packed)) => EntryChunks::Inline(unpack(&packed)?),
        Some(wire::Chunks::Listed(list)) => EntryChunks::Listed {
            digest: Digest::from_slice(&list.digest)
                .ok_or("the digest of its chunk list is not of 32 bytes")?,
            size: list.size,
        },
    };
    let one_chunk = blob.size <= u64::from(MAX_CHUNK_BYTES);
    if one_chunk != (chunks == EntryChunks::Single) {
        return Err("its chunks are not told in the way of its size");
    }
    if (blob.size == 0) != (digest == Digest::EMPTY) {
        return Err("its size is not that of its digest");
    }
    if let EntryChunks::Inline(list) = &chunks
        && list.size() != blob.size
    {
        return Err("its chunks do not add up to its size");
    }
    let count = match &chunks {
        EntryChunks::Single => usize::from(blob.size > 0),
        EntryChunks::Inline(list) => list.chunks().len(),
        EntryChunks::Listed { .. } => 0,
    };
    let places =
        pack::decode_places(&blob.places, count).map_err(|_| "its places in packs are not readable")?;
    Ok(EntryBlob {
        digest,
        size: blob.size,
        chunks,
        places,
    })
}

fn unpack(packed: &[u8]) -> Result<ChunkList, &'static str> {
    let (entries, rest) = packed.as_chunks::<PACKED_BYTES>();
    if !rest.is_empty() || entries.len() > MAX_INLINE_CHUNKS {
        return Err("its chunk list is cut off or too long");
    }
    let mut chunks = Vec::with_capacity(entries.len());
    for entry in entries {
        let (digest, len) = entry
            .split_last_chunk::<4>()
            .expect("an entry has more than 4 bytes");
        let digest = Digest::from_slice(digest).expect("32 bytes are left of 36");
        let len = u32::from_le_bytes(*len);
        if !(1..=MAX_CHUNK_BYTES).contains(&len) {
            return Err("the length of a chunk is impossible");
        }
        chunks.push(Chunk { digest, len });
    }
    Ok(ChunkList::new(chunks))
}

fn kind_number(kind: NodeKind) -> u32 {
    match kind {
        NodeKind::File => 1,
        NodeKind::Dir => 2,
        NodeKind::Symlink => 3,
        NodeKind::Fifo => 4,
        NodeKind::Socket => 5,
        NodeKind::CharDevice => 6,
        NodeKind::BlockDevice => 7,
    }
}

fn kind_of_number(number: u32) -> Option<NodeKind> {
    Some(match number {
        1 => NodeKind::File,
        2 => NodeKind::Dir,
        3 => NodeKind::Symlink,
        4 => NodeKind::Fifo,
        5 => NodeKind::Socket,
        6 => NodeKind::CharDevice,
        7 => NodeKind::BlockDevice,
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
