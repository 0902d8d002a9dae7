//! Packs: many chunks in one object of the bucket.
//!
//! One request then carries what would be eight, or hundreds. Chunks of a large blob that are
//! neighbours in the blob are neighbours in their pack, so that a sequential reader gets
//! them by one ranged request. A chunk keeps its name: its [`PackPlace`] travels with
//! whatever names the blob (an entry of a segment, a chunk list), and is an address only: the
//! bytes are checked against the chunk's digest as ever.
//!
//! # Format of a pack, version 1
//!
//! Integers are little-endian.
//!
//! ```text
//! 8 bytes   "casmpk\0\x01"      the last byte is the version
//! 4 bytes   number of members n
//! n times 40 bytes, in the order of the members:
//!     32 bytes  SHA-256 of the member
//!      4 bytes  its length
//!      4 bytes  its stored length; the highest bit says that it is a zstd frame
//! the members as stored, back to back
//! ```
//!
//! The name of a pack is the SHA-256 of its members' digests, in order: a machine that has the same chunks
//! finds out by the name that the bucket has them, and by the head where. (How they are
//! compressed may differ from machine to machine, and with it the offsets: the first to write
//! the object decides.) Whoever has a place needs nothing of the head.
//!
//! # What goes into a pack
//!
//! [`group`] cuts the chunks of a blob into packs by content, as chunks themselves are cut: behind a
//! chunk whose digest says so, or when the pack is full. So a change in the middle of a blob
//! changes the packs around it only, and the others are found by their names.
//!
//! Blobs of at most [`MAX_SMALL_BYTES`] go into packs in the order in which they were made, as many as wait to be
//! uploaded: what is made together is mostly read together.
//!
//! # Format of places
//!
//! ```text
//! 4 bytes   number of packs p
//! p times 32 bytes: their names
//! 12 bytes for each chunk, in order:
//!      4 bytes  number of its pack, from 0; 0xffffffff: an object of its own
//!      4 bytes  offset of the member in the pack's object
//!      4 bytes  its stored length; the highest bit says that it is a zstd frame
//! ```
//!
//! No bytes at all: every chunk is an object of its own. `tests/golden_manifest.rs` pins both.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use crate::base::{
    buffers,
    chunk::{Chunk, ChunkList, MAX_CHUNK_BYTES},
    digest::{Digest, Hasher},
};

/// Bytes of chunks that go into one pack: as much as one request should carry, so that neither a stalled
/// request nor a damaged answer costs much, and what a plain parallel reader asks for at once.
pub const MAX_PACKED_BYTES: u64 = 4 << 20;

/// The longest blob of one chunk that travels with others.
///
/// A request costs a bucket, and whoever waits for it, as much as some hundred kilobytes do. The limit was chosen
/// by measurement, see `upload::small`.
pub const MAX_SMALL_BYTES: u64 = 64 << 10;

/// [`MAX_SMALL_BYTES`]; in a development build what `CASMOUNT_MEASURE_SMALL_BYTES` says, for
/// the measurement of other limits.
#[must_use]
pub fn small_bytes() -> u64 {
    #[cfg(debug_assertions)]
    {
        static MEASURED: std::sync::LazyLock<Option<u64>> = std::sync::LazyLock::new(|| {
            let limit = std::env::var("CASMOUNT_MEASURE_SMALL_BYTES").ok()?;
            limit.parse().ok().filter(|limit| *limit <= MAX_PACKED_BYTES)
        });
        MEASURED.unwrap_or(MAX_SMALL_BYTES)
    }
    #[cfg(not(debug_assertions))]
    MAX_SMALL_BYTES
}

/// Small blobs in one pack: as many as make a request worth it even when they are tiny. Whoever sends
/// them has all of their files open.
pub const MAX_MEMBERS: usize = 256;

/// The longest object of a pack.
pub const MAX_OBJECT_BYTES: u64 = MAX_PACKED_BYTES + head_bytes(MAX_MEMBERS);

const MAGIC: &[u8; 8] = b"casmpk\0\x01";
/// One chunk in so many is the last of its pack.
const CUT_ONE_IN: u8 = 16;
const HEAD_BYTES: usize = 12;
const MEMBER_BYTES: usize = 40;
const PLACE_BYTES: usize = 12;
const ZSTD: u32 = 1 << 31;
const OWN_OBJECT: u32 = u32::MAX;

/// Where a pack has a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackPlace {
    pub pack: Digest,
    /// From the start of the pack's object.
    pub offset: u32,
    pub stored_len: u32,
    /// The stored bytes are a zstd frame.
    pub zstd: bool,
}

impl PackPlace {
    /// The bytes of the object.
    #[must_use]
    pub fn range(&self) -> std::ops::Range<u64> {
        let start = u64::from(self.offset);
        start..start + u64::from(self.stored_len)
    }

    /// Whether `next` lies directly behind this in one pack.
    #[must_use]
    pub fn touches(&self, next: &Self) -> bool {
        self.pack == next.pack && self.range().end == u64::from(next.offset)
    }

    fn coded_len(&self) -> u32 {
        self.stored_len | if self.zstd { ZSTD } else { 0 }
    }
}

/// Bytes are not places that this program can read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("its places in packs {0}")]
pub struct BadPlaces(&'static str);

/// Members of a pack, with their places.
pub type Members = Vec<(Digest, PackPlace)>;

/// A pack that is ready to be stored.
#[derive(Clone, Debug)]
pub struct Pack {
    pub name: Digest,
    pub object: Bytes,
    /// In their order.
    pub members: Members,
}

/// The name of the pack that has these members in this order.
#[must_use]
pub fn name_of(members: impl IntoIterator<Item = Digest>) -> Digest {
    let mut hasher = Hasher::default();
    for digest in members {
        hasher.update(digest.as_bytes());
    }
    hasher.finish()
}

/// Cuts the chunks of a blob into packs: the indexes of each, in order. A chunk that comes twice is in one pack, once.
#[must_use]
pub fn group(list: &ChunkList) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    let mut seen = HashSet::new();
    for (index, chunk) in list.chunks().iter().enumerate() {
        if !seen.insert(chunk.digest) {
            continue;
        }
        let len = u64::from(chunk.len);
        match groups.last_mut() {
            Some(group) if len <= room => group.push(index),
            _ => {
                groups.push(vec![index]);
                room = MAX_PACKED_BYTES;
            }
        }
        let is_last = chunk.digest.as_bytes()[31].is_multiple_of(CUT_ONE_IN);
        room = if is_last { 0 } else { room - len };
    }
    groups
}

/// Bytes of the head of a pack of `count` members.
#[must_use]
pub const fn head_bytes(count: usize) -> u64 {
    (HEAD_BYTES + count * MEMBER_BYTES) as u64
}

/// Reads where the members lie from the head of the pack that has `chunks`, and no others, in this
/// order; `None` for any other bytes.
#[must_use]
pub fn read_head(head: &[u8], chunks: &[Chunk]) -> Option<Members> {
    let pack = name_of(chunks.iter().map(|chunk| chunk.digest));
    let members = read_records(head, &pack)?;
    let as_told = members.len() == chunks.len()
        && head.len() as u64 == head_bytes(chunks.len())
        && members
            .iter()
            .zip(chunks)
            .all(|((found, _), chunk)| found == chunk);
    as_told.then(|| {
        let members = members.into_iter();
        members.map(|(chunk, place)| (chunk.digest, place)).collect()
    })
}

/// Reads from the whole object of the pack `name` what it has, and where; `None` when the object is
/// not that pack, or was cut off. Their bytes are still to be checked, each against its digest.
#[must_use]
pub fn read_members(object: &[u8], name: &Digest) -> Option<Vec<(Chunk, PackPlace)>> {
    let members = read_records(object, name)?;
    let end = members.last()?.1.range().end;
    let right = end == object.len() as u64 && name_of(members.iter().map(|(chunk, _)| chunk.digest)) == *name;
    right.then_some(members)
}

/// How many members the head of an object tells; `None` when it is not the head of a pack.
///
/// # Errors
///
/// The version, when it is one that this program does not know.
pub fn read_count(head: &[u8]) -> Result<Option<usize>, u8> {
    let Some((magic, rest)) = head.split_first_chunk::<8>() else {
        return Ok(None);
    };
    if magic[..7] != MAGIC[..7] {
        return Ok(None);
    }
    if magic[7] != MAGIC[7] {
        return Err(magic[7]);
    }
    let count = rest
        .first_chunk::<4>()
        .map(|count| u32::from_le_bytes(*count) as usize);
    Ok(count)
}

/// The names of the members by the head of the pack `name`; `None` when it is not that pack, or cut off.
#[must_use]
pub fn read_names(head: &[u8], name: &Digest) -> Option<Vec<Digest>> {
    let members = read_records(head, name)?;
    let names: Vec<_> = members.into_iter().map(|(chunk, _)| chunk.digest).collect();
    (name_of(names.iter().copied()) == *name).then_some(names)
}

/// What the head of an object says, as far as it is possible at all.
fn read_records(object: &[u8], pack: &Digest) -> Option<Vec<(Chunk, PackPlace)>> {
    let (count, records) = object.strip_prefix(MAGIC)?.split_first_chunk::<4>()?;
    let count = u32::from_le_bytes(*count) as usize;
    let (records, _) = records.as_chunks::<MEMBER_BYTES>();
    let mut offset = u32::try_from(head_bytes(count)).ok()?;
    let mut members = Vec::with_capacity(count.min(records.len()));
    for record in records.get(..count)? {
        let (digest, lens) = record.split_first_chunk::<32>()?;
        let (len, stored) = lens.split_first_chunk::<4>()?;
        let coded = u32::from_le_bytes(stored.try_into().ok()?);
        let chunk = Chunk {
            digest: Digest::from_bytes(*digest),
            len: u32::from_le_bytes(*len),
        };
        let place = PackPlace {
            pack: *pack,
            offset,
            stored_len: coded & !ZSTD,
            zstd: coded & ZSTD != 0,
        };
        let possible = 1..=MAX_CHUNK_BYTES;
        if !possible.contains(&place.stored_len) || !possible.contains(&chunk.len) {
            return None;
        }
        offset = offset.checked_add(place.stored_len)?;
        members.push((chunk, place));
    }
    Some(members)
}

/// Makes the object of a pack, member by member.
#[derive(Debug)]
pub struct Builder {
    object: Vec<u8>,
    count: usize,
    members: Members,
}

impl Builder {
    /// Begins a pack of `count` members that take at most `bytes` as they are stored.
    #[must_use]
    pub fn new(count: usize, bytes: usize) -> Self {
        let head = HEAD_BYTES + count * MEMBER_BYTES;
        let mut object = buffers::take(head + bytes);
        object.extend_from_slice(MAGIC);
        object.extend_from_slice(&(count as u32).to_le_bytes());
        object.resize(head, 0);
        Self {
            object,
            count,
            members: Vec::with_capacity(count),
        }
    }

    /// Adds a chunk whose stored bytes are `stored`, a zstd frame if `zstd` says so.
    ///
    /// # Panics
    ///
    /// When it is one more than was announced, or the pack grows over 2 GiB.
    pub fn add(&mut self, chunk: Chunk, stored: &[u8], zstd: bool) {
        assert!(
            self.members.len() < self.count,
            "a pack of {} members",
            self.count
        );
        let place = PackPlace {
            pack: Digest::EMPTY,
            offset: self.object.len() as u32,
            stored_len: stored.len() as u32,
            zstd,
        };
        let head = HEAD_BYTES + self.members.len() * MEMBER_BYTES;
        let (digest, lens) = self.object[head..head + MEMBER_BYTES].split_at_mut(32);
        digest.copy_from_slice(chunk.digest.as_bytes());
        lens[..4].copy_from_slice(&chunk.len.to_le_bytes());
        lens[4..].copy_from_slice(&place.coded_len().to_le_bytes());
        self.object.extend_from_slice(stored);
        assert!(self.object.len() < ZSTD as usize, "a pack of over 2 GiB");
        self.members.push((chunk.digest, place));
    }

    /// # Panics
    ///
    /// When members are missing.
    #[must_use]
    pub fn finish(mut self) -> Pack {
        assert!(self.members.len() == self.count, "a pack without all its members");
        let name = name_of(self.members.iter().map(|(digest, _)| *digest));
        for (_, place) in &mut self.members {
            place.pack = name;
        }
        Pack {
            name,
            object: buffers::share(self.object),
            members: self.members,
        }
    }
}

/// What [`encode_places`] makes of the places of `count` chunks at most, in bytes.
#[must_use]
pub const fn max_places_bytes(count: usize) -> usize {
    if count == 0 {
        0
    } else {
        4 + count * (32 + PLACE_BYTES)
    }
}

/// Writes the places of chunks, in their order; nothing when all are objects of their own.
#[must_use]
pub fn encode_places(places: &[Option<PackPlace>]) -> Vec<u8> {
    let mut numbers = HashMap::new();
    let mut names = Vec::new();
    for place in places.iter().flatten() {
        numbers.entry(place.pack).or_insert_with(|| {
            names.push(place.pack);
            names.len() as u32 - 1
        });
    }
    if names.is_empty() {
        return Vec::new();
    }
    let mut bytes = Vec::with_capacity(4 + names.len() * 32 + places.len() * PLACE_BYTES);
    bytes.extend_from_slice(&(names.len() as u32).to_le_bytes());
    for name in &names {
        bytes.extend_from_slice(name.as_bytes());
    }
    for place in places {
        let words = match place {
            Some(place) => [numbers[&place.pack], place.offset, place.coded_len()],
            None => [OWN_OBJECT, 0, 0],
        };
        for word in words {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    bytes
}

/// Reads the places of `count` chunks; empty when all are objects of their own.
///
/// # Errors
///
/// [`BadPlaces`] for anything that [`encode_places`] does not write.
pub fn decode_places(bytes: &[u8], count: usize) -> Result<Vec<Option<PackPlace>>, BadPlaces> {
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let (packs, rest) = bytes.split_first_chunk::<4>().ok_or(BadPlaces("are cut off"))?;
    let packs = u32::from_le_bytes(*packs) as usize;
    let (names, places) = packs
        .checked_mul(32)
        .and_then(|len| rest.split_at_checked(len))
        .ok_or(BadPlaces("are cut off"))?;
    let (places, rest) = places.as_chunks::<PLACE_BYTES>();
    if !rest.is_empty() || places.len() != count {
        return Err(BadPlaces("are not as many as its chunks"));
    }
    let names: Vec<_> = names.chunks(32).filter_map(Digest::from_slice).collect();
    let read = |place: &[u8; PLACE_BYTES]| {
        let word = |at: usize| {
            let word = place[at..at + 4].try_into().expect("four bytes of twelve");
            u32::from_le_bytes(word)
        };
        if word(0) == OWN_OBJECT {
            return Ok(None);
        }
        let pack = *names.get(word(0) as usize).ok_or(BadPlaces("name no pack"))?;
        let (offset, stored_len) = (word(4), word(8) & !ZSTD);
        let fits = offset.checked_add(stored_len).is_some();
        if !fits || stored_len == 0 || stored_len > MAX_CHUNK_BYTES {
            return Err(BadPlaces("have an impossible length"));
        }
        Ok(Some(PackPlace {
            pack,
            offset,
            stored_len,
            zstd: word(8) & ZSTD != 0,
        }))
    };
    places.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packed(members: &[&[u8]]) -> Pack {
        let mut builder = Builder::new(members.len(), 100);
        for bytes in members {
            let chunk = Chunk {
                digest: Digest::of(bytes),
                len: bytes.len() as u32,
            };
            builder.add(chunk, bytes, false);
        }
        builder.finish()
    }

    #[test]
    fn places_take_no_more_than_is_reckoned_with() {
        for count in 0..5 {
            let places: Vec<_> = (0..count as u8)
                .map(|number| Some(packed(&[&[number]]).members[0].1))
                .collect();
            assert_eq!(encode_places(&places).len(), max_places_bytes(count));
        }
    }

    #[test]
    fn every_member_lies_at_its_place() {
        let members: [&[u8]; 3] = [b"first", b"second", b"third"];
        let pack = packed(&members);
        for (member, (digest, place)) in members.iter().zip(&pack.members) {
            let range = place.range();
            assert_eq!(*digest, Digest::of(member));
            assert_eq!(&pack.object[range.start as usize..range.end as usize], *member);
        }
        assert!(pack.members[0].1.touches(&pack.members[1].1));
        assert!(!pack.members[0].1.touches(&pack.members[2].1));
    }

    #[test]
    fn the_head_tells_where_the_members_are() {
        let members: [&[u8]; 2] = [b"first", b"second"];
        let pack = packed(&members);
        let chunks = members.map(|bytes| Chunk {
            digest: Digest::of(bytes),
            len: bytes.len() as u32,
        });
        let head = &pack.object[..head_bytes(2) as usize];
        assert_eq!(read_head(head, &chunks), Some(pack.members.clone()));
        assert_eq!(pack.name, name_of(chunks.map(|chunk| chunk.digest)));
        assert_eq!(read_head(head, &chunks[..1]), None);
        assert_eq!(read_head(&pack.object, &chunks), None);
        assert_eq!(read_head(&head[..50], &chunks), None);
        for at in [0, 8, 12, 44, 51] {
            let mut bad = head.to_vec();
            bad[at] ^= 0x40;
            assert_eq!(read_head(&bad, &chunks), None, "{at}");
        }
    }

    fn list(lens: &[u32]) -> ChunkList {
        let chunk = |(index, &len): (usize, &u32)| {
            let mut digest = *Digest::of(&index.to_le_bytes()).as_bytes();
            digest[31] |= 1;
            Chunk {
                digest: Digest::from_bytes(digest),
                len,
            }
        };
        ChunkList::new(lens.iter().enumerate().map(chunk).collect())
    }

    #[test]
    fn a_pack_ends_when_it_is_full_or_behind_a_chunk_that_says_so() {
        const MIB: u32 = 1 << 20;
        let full = list(&[MIB, MIB, 2 * MIB, MIB, 2 * MIB, 2 * MIB, 1]);
        assert_eq!(group(&full), [vec![0, 1, 2], vec![3, 4], vec![5, 6]]);
        let mut chunks = list(&[5, 6, 7, 8]).chunks().to_vec();
        let mut last = *chunks[1].digest.as_bytes();
        last[31] = 2 * CUT_ONE_IN;
        chunks[1].digest = Digest::from_bytes(last);
        assert_eq!(group(&ChunkList::new(chunks)), [vec![0, 1], vec![2, 3]]);
    }

    #[test]
    fn a_chunk_that_comes_twice_is_packed_once() {
        let mut chunks = list(&[5, 6]).chunks().to_vec();
        chunks.push(chunks[0]);
        assert_eq!(group(&ChunkList::new(chunks)), [vec![0, 1]]);
    }

    #[test]
    fn broken_places_are_refused() {
        let pack = packed(&[b"first", b"second"]);
        let places: Vec<_> = pack.members.iter().map(|(_, place)| Some(*place)).collect();
        let good = encode_places(&places);
        assert_eq!(decode_places(&good, 2), Ok(places));
        assert!(decode_places(&good, 1).is_err());
        assert!(decode_places(&good[..good.len() - 1], 2).is_err());
        for (at, byte) in [(0, 0), (3, 0xff), (36, 7), (44, 0), (47, 0x7f)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert!(decode_places(&bad, 2).is_err(), "{at}");
        }
        assert_eq!(encode_places(&[None, None]), b"");
    }

    proptest! {
        #[test]
        fn places_come_back(places in proptest::collection::vec(
            proptest::option::of((0u8..4, 0u32..1 << 30, 1..=MAX_CHUNK_BYTES, any::<bool>())), 0..20,
        )) {
            let places: Vec<_> = places.into_iter().map(|place| place.map(|(pack, offset, stored_len, zstd)| {
                PackPlace { pack: Digest::of(&[pack]), offset, stored_len, zstd }
            })).collect();
            let bytes = encode_places(&places);
            let found = decode_places(&bytes, places.len()).unwrap();
            if places.iter().all(Option::is_none) {
                prop_assert!(found.is_empty());
            } else {
                prop_assert_eq!(found, places);
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>, count in 0usize..8) {
            let _ = decode_places(&bytes, count);
        }
    }
}
