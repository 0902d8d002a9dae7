//! What a sweep leaves in the bucket for the writers: the window of the store, and which objects are condemned.
//!
//! # Format of `sweep/window.json` (version 1)
//!
//! JSON, one object, replaced only with the condition that it is the version that was read:
//!
//! ```text
//! version         1; read first and alone, so that a newer one can change all the rest
//! window_millis   how long what nobody names is kept: the same for all machines
//! before_millis   the longest window that a machine may still go by which has not read this yet
//! changed_millis  when it was changed, by the bucket's clock
//! ```
//!
//! Members that are not known are ignored. A store without it has a window of [`DEFAULT_WINDOW`].
//!
//! # Format of `sweep/<id>.list` (version 1)
//!
//! Integers are little-endian.
//!
//! ```text
//! offset  bytes
//!      0      8  magic "casmsw\0\x01"; the last byte is the version
//!      8      8  when the sweep began, milliseconds since 1970 of the bucket's clock
//!     16      8  the window of that sweep in milliseconds
//!     24      8  number n of condemned objects, at most 2,000,000
//!     32    8*n  a mark of each object, ascending: the first 8 bytes of a digest as a number (big-endian in the digest)
//! 32+8*n     32  SHA-256 of everything before
//! ```
//!
//! The digest is the one in the key of a chunk, a chunk list or a pack that all share. Of everything below
//! `volumes/` (segments, catalogs, and the chunks and packs of a volume that keeps its own) it is the SHA-256 of the key.
//!
//! All share one list: digests are random. Eight bytes are enough: one more
//! object that counts as condemned costs an upload, and is not deleted unless it is unused as well.
//!
//! `sweep/<id>.done` is JSON, `{"version": 1, "finished_millis": ...}`. The id is
//! `<13 digits: milliseconds>-<16 hexadecimal digits: random>`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Bucket, Etag, ObjectMeta, TierError, layout};
use crate::base::digest::Digest;

/// The window of a store that says nothing of it.
pub const DEFAULT_WINDOW: Duration = Duration::from_secs(7 * 24 * 3600);

/// Objects that one list condemns at most: 16 MB in the memory of every writer.
pub const MAX_CONDEMNED: usize = 2_000_000;

const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"casmsw\0\x01";
const HEADER_BYTES: usize = 32;
const TRAILER_BYTES: usize = 32;

/// Bytes of the longest list.
const MAX_LIST_BYTES: u64 = (HEADER_BYTES + 8 * MAX_CONDEMNED + TRAILER_BYTES) as u64;

/// JSON objects are far below this.
const MAX_JSON_BYTES: u64 = 64 << 10;

/// The content of `sweep/window.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowJson {
    pub version: u32,
    pub window_millis: u64,
    pub before_millis: u64,
    pub changed_millis: u64,
}

impl WindowJson {
    /// A window that machines which go by `before` at most learn from now on.
    #[must_use]
    pub fn new(window: Duration, before: Duration, now_millis: u64) -> Self {
        Self {
            version: VERSION,
            window_millis: window.as_millis() as u64,
            before_millis: before.as_millis() as u64,
            changed_millis: now_millis,
        }
    }

    /// The longest window that any machine may go by at `now_millis`.
    #[must_use]
    pub fn longest_millis(&self, now_millis: u64) -> u64 {
        // Nobody publishes by what was read half a window ago.
        if now_millis < self.changed_millis.saturating_add(self.before_millis) {
            self.window_millis.max(self.before_millis)
        } else {
            self.window_millis
        }
    }

    /// The bytes of the object.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        json(self)
    }

    /// Reads the object.
    ///
    /// # Errors
    ///
    /// [`TierError::Unsupported`] for a newer version, [`TierError::Malformed`] for other bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, TierError> {
        let window: Self = read_json(layout::SWEEP_WINDOW, bytes)?;
        if window.window_millis == 0 {
            return Err(malformed(layout::SWEEP_WINDOW, "a window of nothing"));
        }
        Ok(window)
    }
}

/// The content of `sweep/<id>.done`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoneJson {
    version: u32,
    pub finished_millis: u64,
}

impl DoneJson {
    #[must_use]
    pub fn new(finished_millis: u64) -> Self {
        Self {
            version: VERSION,
            finished_millis,
        }
    }

    /// The bytes of the object.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        json(self)
    }

    /// Reads the object `key`.
    pub fn decode(key: &str, bytes: &[u8]) -> Result<Self, TierError> {
        read_json(key, bytes)
    }
}

/// The bytes of a small object that people may read, too.
pub fn json(value: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("no member can fail to be written");
    bytes.push(b'\n');
    bytes
}

fn read_json<T: for<'de> Deserialize<'de>>(key: &str, bytes: &[u8]) -> Result<T, TierError> {
    read_versioned(key, bytes, VERSION)
}

/// Reads such an object, of a version up to `newest`. Its member `version` is read first and alone, so that a newer
/// one can change all the rest.
///
/// # Errors
///
/// [`TierError::Unsupported`] for a newer version, [`TierError::Malformed`] for other bytes.
pub fn read_versioned<T: for<'de> Deserialize<'de>>(
    key: &str,
    bytes: &[u8],
    newest: u32,
) -> Result<T, TierError> {
    #[derive(Deserialize)]
    struct VersionOnly {
        version: u32,
    }
    let wrong = |err: serde_json::Error| malformed(key, &err.to_string());
    let VersionOnly { version } = serde_json::from_slice(bytes).map_err(wrong)?;
    if version > newest {
        return Err(newer_than(newest, key, version));
    }
    serde_json::from_slice(bytes).map_err(wrong)
}

fn newer(key: &str, version: u32) -> TierError {
    newer_than(VERSION, key, version)
}

/// An object has a version that this program does not know.
#[must_use]
pub fn newer_than(newest: u32, key: &str, version: u32) -> TierError {
    TierError::Unsupported {
        why: format!(
            "{key} has version {version}, this casmount knows versions up to {newest}: a newer casmount is needed"
        ),
    }
}

fn malformed(key: &str, why: &str) -> TierError {
    TierError::Malformed {
        key: key.to_owned(),
        why: why.to_owned(),
    }
}

/// What stands for an object in a list: the first 8 bytes of the digest in its key.
#[must_use]
pub fn mark(digest: &Digest) -> u64 {
    let (first, _) = digest
        .as_bytes()
        .split_first_chunk::<8>()
        .expect("a digest has 32 bytes");
    u64::from_be_bytes(*first)
}

/// What stands for an object below `volumes/` in a list.
#[must_use]
pub fn mark_of_key(key: &str) -> u64 {
    mark(&Digest::of(key.as_bytes()))
}

/// Objects that a sweep condemned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SweepList {
    /// When the sweep began: what was written less than a window before is not meant.
    pub began_millis: u64,
    pub window_millis: u64,
    /// Ascending, each once.
    marks: Vec<u64>,
}

impl SweepList {
    /// # Panics
    ///
    /// When there are more than [`MAX_CONDEMNED`].
    #[must_use]
    pub fn new(began_millis: u64, window_millis: u64, mut marks: Vec<u64>) -> Self {
        marks.sort_unstable();
        marks.dedup();
        assert!(marks.len() <= MAX_CONDEMNED, "a list of {} objects", marks.len());
        Self {
            began_millis,
            window_millis,
            marks,
        }
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.marks.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.marks.is_empty()
    }

    /// Whether an object of this digest is condemned.
    #[must_use]
    pub fn has(&self, object: &Digest) -> bool {
        self.has_mark(mark(object))
    }

    /// The same by its mark.
    #[must_use]
    pub fn has_mark(&self, mark: u64) -> bool {
        self.marks.binary_search(&mark).is_ok()
    }

    /// The bytes of the object.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + 8 * self.marks.len() + TRAILER_BYTES);
        bytes.extend_from_slice(MAGIC);
        for number in [self.began_millis, self.window_millis, self.marks.len() as u64] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for mark in &self.marks {
            bytes.extend_from_slice(&mark.to_le_bytes());
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
        let wrong = |why| malformed(key, why);
        let (magic, _) = bytes.split_first_chunk::<8>().ok_or(wrong("it is too short"))?;
        if magic[..7] != MAGIC[..7] {
            return Err(wrong("it does not begin as a list of a sweep"));
        }
        if magic[7] != MAGIC[7] {
            return Err(newer(key, u32::from(magic[7])));
        }
        let (content, trailer) = bytes
            .split_last_chunk::<TRAILER_BYTES>()
            .ok_or(wrong("it is too short"))?;
        if Digest::of(content).as_bytes() != trailer {
            return Err(wrong("its bytes are damaged (checksum)"));
        }
        let (numbers, rest) = content[8..].as_chunks::<8>();
        let numbers: Vec<u64> = numbers.iter().copied().map(u64::from_le_bytes).collect();
        let [began_millis, window_millis, count, marks @ ..] = &numbers[..] else {
            return Err(wrong("it is too short"));
        };
        let right = rest.is_empty() && *count == marks.len() as u64 && marks.len() <= MAX_CONDEMNED;
        if !right || !marks.is_sorted_by(|a, b| a < b) {
            return Err(wrong("it does not have what it tells"));
        }
        Ok(Self {
            began_millis: *began_millis,
            window_millis: *window_millis,
            marks: marks.to_vec(),
        })
    }
}

/// What `sweep/` has, by its keys.
#[derive(Clone, Debug, Default)]
pub struct SweepObjects {
    pub has_window: bool,
    /// Ids of lists, in the order of their time; with what the bucket says of each.
    pub lists: Vec<(String, ObjectMeta)>,
    /// Ids of what is done.
    pub done: Vec<String>,
}

/// Lists `sweep/`: one request for a thousand objects, of which there are a few.
pub async fn list(bucket: &dyn Bucket) -> Result<SweepObjects, TierError> {
    let mut found = SweepObjects::default();
    let mut after: Option<String> = None;
    loop {
        let page = bucket.list(layout::SWEEP_PREFIX, after.as_deref()).await?;
        after = page.objects.last().map(|object| object.key.clone());
        for object in page.objects {
            let name = object.key.strip_prefix(layout::SWEEP_PREFIX).unwrap_or_default();
            if object.key == layout::SWEEP_WINDOW {
                found.has_window = true;
            } else if let Some(id) = name.strip_suffix(".list") {
                found.lists.push((id.to_owned(), object));
            } else if let Some(id) = name.strip_suffix(".done") {
                found.done.push(id.to_owned());
            }
        }
        if !page.more || after.is_none() {
            return Ok(found);
        }
    }
}

/// Reads the window of the store; `None` if it says nothing of it.
pub async fn read_window(bucket: &dyn Bucket) -> Result<Option<(WindowJson, Etag)>, TierError> {
    let object = bucket.get(layout::SWEEP_WINDOW, None, MAX_JSON_BYTES).await?;
    let read = object.map(|object| Ok((WindowJson::decode(&object.bytes)?, object.etag)));
    read.transpose()
}

/// Reads a list; `None` when it was removed meanwhile.
pub async fn read_list(bucket: &dyn Bucket, id: &str) -> Result<Option<SweepList>, TierError> {
    let key = layout::sweep_list(id);
    let object = bucket.get(&key, None, MAX_LIST_BYTES).await?;
    object
        .map(|object| SweepList::decode(&key, &object.bytes))
        .transpose()
}

/// Reads when a list was done with; `None` when that is not so.
pub async fn read_done(bucket: &dyn Bucket, id: &str) -> Result<Option<DoneJson>, TierError> {
    let key = layout::sweep_done(id);
    let object = bucket.get(&key, None, MAX_JSON_BYTES).await?;
    object
        .map(|object| DoneJson::decode(&key, &object.bytes))
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_written_as_ever() {
        let marks = ["a", "b"].map(|text| mark(&Digest::of(text.as_bytes())));
        let list = SweepList::new(1_767_225_600_000, 604_800_000, marks.to_vec());
        let bytes = list.encode();
        let hex = bytes
            .iter()
            .fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
        assert_eq!(
            hex,
            concat!(
                "6361736d73770001",
                "00a8da769b010000",
                "00840c2400000000",
                "0200000000000000",
                "4a59390016e8233e",
                "cabd1bca128197ca",
                "18cf6e91ab5cd61ca338bdca6a5a4c2566551d7033b789732a739651ba1c195b",
            )
        );
        assert_eq!(SweepList::decode("k", &bytes).unwrap(), list);
        assert!(list.has(&Digest::of(b"a")) && !list.has(&Digest::of(b"c")));
    }

    #[test]
    fn the_json_is_written_as_ever() {
        let hour = Duration::from_secs(3600);
        let window = WindowJson::new(hour, DEFAULT_WINDOW, 1_767_225_600_000);
        let text = "{\n  \"version\": 1,\n  \"window_millis\": 3600000,\n  \"before_millis\": 604800000,\n  \
                    \"changed_millis\": 1767225600000\n}\n";
        assert_eq!(String::from_utf8(window.encode()).unwrap(), text);
        assert_eq!(WindowJson::decode(text.as_bytes()).unwrap(), window);
        let done = DoneJson::new(7).encode();
        assert_eq!(
            String::from_utf8(done.clone()).unwrap(),
            "{\n  \"version\": 1,\n  \"finished_millis\": 7\n}\n"
        );
        assert_eq!(DoneJson::decode("k", &done).unwrap().finished_millis, 7);
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let list = SweepList::new(1, 2, vec![3]).encode();
        let mut newer = list.clone();
        newer[7] = 2;
        assert!(matches!(
            SweepList::decode("k", &newer),
            Err(TierError::Unsupported { .. })
        ));
        for at in [0, 9, 33, list.len() - 1] {
            let mut wrong = list.clone();
            wrong[at] ^= 1;
            assert!(matches!(
                SweepList::decode("k", &wrong),
                Err(TierError::Malformed { .. })
            ));
        }
        assert!(SweepList::decode("k", &list[..20]).is_err());
        assert!(matches!(
            WindowJson::decode(b"{\"version\": 2}"),
            Err(TierError::Unsupported { .. })
        ));
        assert!(WindowJson::decode(b"{\"version\": 1}").is_err());
    }

    #[test]
    fn a_shorter_window_counts_when_every_machine_must_have_read_it() {
        let hour = Duration::from_secs(3600);
        let window = WindowJson::new(hour, DEFAULT_WINDOW, 1000);
        let week = DEFAULT_WINDOW.as_millis() as u64;
        assert_eq!(window.longest_millis(1000), week);
        assert_eq!(window.longest_millis(999 + week), week);
        assert_eq!(window.longest_millis(1000 + week), 3_600_000);
    }
}
