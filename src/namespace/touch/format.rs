//! The bytes of what machines tell of the names that they use, and of how long a name may be unused.
//!
//! `tests/golden_touch.rs` pins them.
//!
//! # Format of `volumes/<name>/touched/<yyyymmdd>/<ms>-<machine>-<random>` (version 1)
//!
//! The day and the milliseconds are those of the bucket's clock when it was written. Integers are little-endian.
//!
//! ```text
//! offset  bytes
//!      0      8  magic "casmtch\x01"; the last byte is the version
//!      8      8  when it was written, milliseconds since 1970 of the bucket's clock
//!     16      8  for how long after that these names may have been used without being told again, milliseconds; at
//!                most 2 days
//!     24      8  number n of names, at most 4,194,304
//!     32      m  n numbers, ascending, each as what it is more than the one before (the first: than 0), as a varint
//!                (seven bits a byte, the lowest first; the highest bit of a byte: there is another)
//!   32+m     32  SHA-256 of everything before
//! ```
//!
//! A number is the first 40 bits of the SHA-256 of a path, relative to the root of the volume, as a number (the first
//! byte is the highest).
//!
//! # Format of `volumes/<name>/touched/expire.json` (version 1)
//!
//! JSON, one object, made with the condition that there is none and replaced with the condition that it is the
//! version that was read. Members that are not known are ignored.
//!
//! ```text
//! version         1; read first and alone, so that a newer one can change all the rest
//! since_millis    since when what machines use is known: what they told later is here, or went into another object
//! expire_millis   the longest time that a name may be unused which was ever asked for: what machines told is kept for
//!                 as long, and they go by it
//! ```

use serde::{Deserialize, Serialize};

use crate::{
    base::digest::Digest,
    tier::{TierError, layout, sweeping},
};

const VERSION: u8 = 1;
const MAGIC: &[u8; 8] = b"casmtch\x01";
const HEADER_BYTES: usize = 32;
const TRAILER_BYTES: usize = 32;

/// Names of one object: some 12 MB.
pub const MAX_NAMES: usize = 1 << 22;

/// The longest time for which an object is good after it was written.
pub const MAX_GOOD_FOR_MILLIS: u64 = 2 * 24 * 3_600_000;

/// Bits of a path's digest that stand for it.
const MARK_BITS: u32 = 40;

/// A difference has at most so many bytes.
const MAX_VARINT_BYTES: usize = MARK_BITS.div_ceil(7) as usize;

/// Bytes of the longest object.
pub const MAX_BYTES: u64 = (HEADER_BYTES + MAX_VARINT_BYTES * MAX_NAMES + TRAILER_BYTES) as u64;

const JSON_VERSION: u32 = 1;
/// The JSON object is far below this.
pub const MAX_JSON_BYTES: u64 = 64 << 10;

/// What stands for a path, see the module.
#[must_use]
pub fn mark(path: &[u8]) -> u64 {
    let digest = Digest::of(path);
    let (first, _) = digest
        .as_bytes()
        .split_first_chunk::<8>()
        .expect("a digest has 32 bytes");
    u64::from_be_bytes(*first) >> (u64::BITS - MARK_BITS)
}

/// Names that a machine used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    pub written_millis: u64,
    pub good_for_millis: u64,
    /// Ascending, each once.
    marks: Vec<u64>,
}

impl Told {
    /// # Panics
    ///
    /// When there are more than [`MAX_NAMES`].
    #[must_use]
    pub fn new(written_millis: u64, good_for_millis: u64, mut marks: Vec<u64>) -> Self {
        marks.sort_unstable();
        marks.dedup();
        assert!(marks.len() <= MAX_NAMES, "{} names in one object", marks.len());
        Self {
            written_millis,
            good_for_millis: good_for_millis.min(MAX_GOOD_FOR_MILLIS),
            marks,
        }
    }

    #[must_use]
    pub fn marks(&self) -> &[u64] {
        &self.marks
    }

    /// Until when these names may have been used, as far as anybody can tell.
    #[must_use]
    pub fn until_millis(&self) -> u64 {
        self.written_millis.saturating_add(self.good_for_millis)
    }

    /// The bytes of the object.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + 4 * self.marks.len() + TRAILER_BYTES);
        bytes.extend_from_slice(MAGIC);
        for number in [self.written_millis, self.good_for_millis, self.marks.len() as u64] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let mut before = 0;
        for mark in &self.marks {
            put_varint(&mut bytes, mark - before);
            before = *mark;
        }
        let digest = Digest::of(&bytes);
        bytes.extend_from_slice(digest.as_bytes());
        bytes
    }

    /// Reads the object `key`.
    ///
    /// # Errors
    ///
    /// [`TierError::Unsupported`] for a newer version, [`TierError::Malformed`] for other bytes.
    pub fn decode(key: &str, bytes: &[u8]) -> Result<Self, TierError> {
        let wrong = |why: &str| TierError::Malformed {
            key: key.to_owned(),
            why: why.to_owned(),
        };
        let (magic, _) = bytes.split_first_chunk::<8>().ok_or(wrong("it is too short"))?;
        if magic[..7] != MAGIC[..7] {
            return Err(wrong("it does not begin as a list of used names"));
        }
        if magic[7] > VERSION {
            return Err(sweeping::newer_than(u32::from(VERSION), key, u32::from(magic[7])));
        }
        let (content, trailer) = bytes
            .split_last_chunk::<TRAILER_BYTES>()
            .filter(|(content, _)| content.len() >= HEADER_BYTES)
            .ok_or(wrong("it is too short"))?;
        if Digest::of(content).as_bytes() != trailer {
            return Err(wrong("its bytes are damaged (checksum)"));
        }
        let (header, mut rest) = content.split_at(HEADER_BYTES);
        let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        let (written_millis, good_for_millis, count) = (number(8), number(16), number(24));
        if count > MAX_NAMES as u64 || good_for_millis > MAX_GOOD_FOR_MILLIS {
            return Err(wrong("it does not have what it tells"));
        }
        let mut marks = Vec::with_capacity(count as usize);
        let mut before = 0_u64;
        for _ in 0..count {
            let more = take_varint(&mut rest).ok_or(wrong("it ends in the middle of a number"))?;
            // The same twice would be nothing but a waste.
            let is_right = more > 0 || marks.is_empty();
            let mark = before
                .checked_add(more)
                .filter(|mark| is_right && mark >> MARK_BITS == 0);
            before = mark.ok_or(wrong("its numbers do not ascend"))?;
            marks.push(before);
        }
        if !rest.is_empty() {
            return Err(wrong("it does not have what it tells"));
        }
        Ok(Self {
            written_millis,
            good_for_millis,
            marks,
        })
    }
}

fn put_varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for at in 0..MAX_VARINT_BYTES {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// The content of `expire.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpiryJson {
    version: u32,
    pub since_millis: u64,
    pub expire_millis: u64,
}

impl ExpiryJson {
    #[must_use]
    pub fn new(since_millis: u64, expire_millis: u64) -> Self {
        Self {
            version: JSON_VERSION,
            since_millis,
            expire_millis,
        }
    }

    /// The bytes of the object.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        sweeping::json(self)
    }

    /// Reads the object of `volume`.
    pub fn decode(volume: &str, bytes: &[u8]) -> Result<Self, TierError> {
        let key = layout::expiry(volume);
        let read: Self = sweeping::read_versioned(&key, bytes, JSON_VERSION)?;
        if read.expire_millis == 0 {
            return Err(TierError::Malformed {
                key,
                why: "names that may be unused for no time at all".to_owned(),
            });
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_told_is_read_back(
            written in any::<u64>(),
            good_for in 0..=MAX_GOOD_FOR_MILLIS,
            marks in prop::collection::vec(0_u64..1 << MARK_BITS, 0..200),
        ) {
            let told = Told::new(written, good_for, marks);
            prop_assert_eq!(&Told::decode("k", &told.encode()).unwrap(), &told);
        }

        #[test]
        fn no_bytes_are_read_as_something_else(at in 0_usize..100, to in any::<u8>()) {
            let told = Told::new(1, 2, vec![3, 1 << 39, 77, 78]);
            let mut bytes = told.encode();
            let at = at % bytes.len();
            prop_assume!(bytes[at] != to);
            bytes[at] = to;
            prop_assert!(Told::decode("k", &bytes).is_err());
            prop_assert!(Told::decode("k", &bytes[..at]).is_err());
        }
    }

    #[test]
    fn a_name_takes_three_bytes_when_there_are_many() {
        let marks: Vec<u64> = (0..100_000_u64).map(|name| mark(&name.to_le_bytes())).collect();
        let told = Told::new(1, 2, marks);
        assert_eq!(told.marks().len(), 100_000);
        let bytes = told.encode().len();
        assert!((300_000..400_000).contains(&bytes), "{bytes} bytes");
    }

    #[test]
    fn numbers_that_do_not_ascend_are_refused() {
        let sealed = |numbers: &[u8], count: u64| {
            let mut bytes = MAGIC.to_vec();
            for number in [1, 2, count] {
                bytes.extend_from_slice(&u64::to_le_bytes(number));
            }
            bytes.extend_from_slice(numbers);
            let digest = Digest::of(&bytes);
            bytes.extend_from_slice(digest.as_bytes());
            Told::decode("k", &bytes)
        };
        assert_eq!(sealed(&[0, 5], 2).unwrap().marks(), [0, 5]);
        for (numbers, count) in [
            (&[5, 0][..], 2),
            (&[5], 2),
            (&[5, 6], 1),
            (&[0xff, 0xff, 0xff, 0xff, 0xff, 0x7f], 1),
            (&[0x85], 1),
            (&[], u64::MAX),
        ] {
            assert!(sealed(numbers, count).is_err(), "{numbers:?}");
        }
    }
}
