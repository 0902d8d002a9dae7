//! Where things are in a bucket: the keys, all relative to the store's prefix.
//!
//! ```text
//! casmount.json                                   format version, store id, chunking
//! blobs/sha256/<2 hex>/<64 hex>                   a chunk, a blob of one chunk, or a chunk list
//! packs/<2 hex>/<64 hex>                          many chunks, named by the SHA-256 of their digests
//! volumes/<name>/blobs/ packs/ probe/             the same of a fork whose writers are trusted less, see `domain`
//! volumes/<name>/volume.json                      what a fork lies over, or that it was deleted; others may have none
//! volumes/<name>/log/<yyyymmddThhmm>/<ms>-<machine>-<seq>   segments, immutable
//! sweep/window.json                               how long what nobody names is kept, see `sweeping`
//! sweep/<ms>-<random>.list                        objects that a sweep condemned
//! sweep/<ms>-<random>.done                        the sweep of that list came to its end
//! volumes/<name>/catalogs/<64 hex>                roots and parts of catalogs, named by their SHA-256; immutable
//! volumes/<name>/head.json                        the newest catalog and its watermark; If-Match
//! volumes/<name>/trim.json                        which catalogs and how much of the log sweeps keep; If-Match
//! probe/<machine>-<random>                        of the first use; removed again
//! ```
//!
//! Keys of segments sort by time: the minute and the milliseconds are those of
//! the bucket's clock when the segment was published, the milliseconds in 13
//! digits, the sequence number in 16 hexadecimal digits.
//!
//! # Stability
//!
//! Keys are part of the store's format (`casmount.json`, [`FORMAT_VERSION`]):
//! readers refuse a newer version, and `tests/golden_chunking.rs` pins these texts.

use crate::base::{digest::Digest, id::MachineId, units::civil_date};

/// The version of everything that is written to a bucket.
pub const FORMAT_VERSION: u32 = 1;

/// The settings of a store.
pub const STORE: &str = "casmount.json";

/// What all blobs start with.
pub const BLOBS_PREFIX: &str = "blobs/";

/// What all packs start with.
pub const PACKS_PREFIX: &str = "packs/";

/// What all probe objects start with.
pub const PROBE_PREFIX: &str = "probe/";

/// What all chunks, blobs of one chunk and chunk lists start with.
pub const BLOB_PREFIX: &str = "blobs/sha256/";

/// What everything that sweeps leave for others starts with.
pub const SWEEP_PREFIX: &str = "sweep/";

/// How long what nobody names is kept.
pub const SWEEP_WINDOW: &str = "sweep/window.json";

/// What a sweep condemned.
#[must_use]
pub fn sweep_list(id: &str) -> String {
    format!("{SWEEP_PREFIX}{id}.list")
}

/// That the sweep of a list came to its end.
#[must_use]
pub fn sweep_done(id: &str) -> String {
    format!("{SWEEP_PREFIX}{id}.done")
}

/// The digest in the key of a chunk, a chunk list or a pack; `None` for any other key.
#[must_use]
pub fn object_digest(key: &str) -> Option<Digest> {
    let name = key
        .strip_prefix(BLOB_PREFIX)
        .or_else(|| key.strip_prefix(PACKS_PREFIX))?;
    let (shard, digest) = name.split_once('/')?;
    let digest: Digest = digest.parse().ok()?;
    (digest.shard() == shard).then_some(digest)
}

/// The object of a chunk, or of a blob of one chunk.
#[must_use]
pub fn blob(digest: &Digest) -> String {
    format!("blobs/sha256/{}/{digest}", digest.shard())
}

/// The object of a pack.
#[must_use]
pub fn pack(name: &Digest) -> String {
    format!("packs/{}/{name}", name.shard())
}

/// What everything of all volumes starts with.
pub const VOLUMES_PREFIX: &str = "volumes/";

/// What everything of a volume starts with.
#[must_use]
pub fn volume_prefix(volume: &str) -> String {
    format!("{VOLUMES_PREFIX}{volume}/")
}

/// What a volume lies over.
#[must_use]
pub fn volume(volume: &str) -> String {
    format!("volumes/{volume}/volume.json")
}

/// What all segments of a volume start with.
#[must_use]
pub fn log_prefix(volume: &str) -> String {
    format!("volumes/{volume}/log/")
}

/// What all objects of a volume's catalogs start with.
#[must_use]
pub fn catalogs_prefix(volume: &str) -> String {
    format!("volumes/{volume}/catalogs/")
}

/// A root or a part of a catalog.
#[must_use]
pub fn catalog(volume: &str, digest: &Digest) -> String {
    format!("{}{digest}", catalogs_prefix(volume))
}

/// Which catalog of a volume is the newest.
#[must_use]
pub fn head(volume: &str) -> String {
    format!("volumes/{volume}/head.json")
}

/// How much of a volume's log sweeps keep.
#[must_use]
pub fn trim(volume: &str) -> String {
    format!("volumes/{volume}/trim.json")
}

/// The segment that `machine` published at `millis` as its number `seq`.
#[must_use]
pub fn segment(volume: &str, millis: u64, machine: MachineId, seq: u64) -> String {
    format!(
        "{}{}/{millis:013}-{machine}-{seq:016x}",
        log_prefix(volume),
        minute(millis)
    )
}

/// The folder of the log for a moment, `yyyymmddThhmm` in UTC.
#[must_use]
pub fn minute(millis: u64) -> String {
    let minutes = millis / 60_000;
    let (year, month, day) = civil_date(minutes / 1440);
    format!(
        "{year:04}{month:02}{day:02}T{:02}{:02}",
        minutes / 60 % 24,
        minutes % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minutes_are_those_of_the_calendar() {
        assert_eq!(minute(0), "19700101T0000");
        assert_eq!(minute(951_782_400_000), "20000229T0000");
        assert_eq!(minute(1_767_225_599_999), "20251231T2359");
        assert_eq!(minute(4_107_542_400_000), "21000301T0000");
    }

    #[test]
    fn the_digest_of_an_object_is_read_from_its_key() {
        let digest = Digest::of(b"x");
        assert_eq!(object_digest(&blob(&digest)), Some(digest));
        assert_eq!(object_digest(&pack(&digest)), Some(digest));
        for key in [
            "packs/00/ff",
            "blobs/sha256/x",
            &format!("blobs/sha256/zz/{digest}"),
            STORE,
        ] {
            assert_eq!(object_digest(key), None, "{key}");
        }
    }

    #[test]
    fn segments_sort_by_time() {
        let key = |millis| segment("main", millis, MachineId(9), 1);
        assert!(key(999_999_999_999) < key(1_000_000_000_000));
        assert!(key(1_767_225_599_999) < key(1_767_225_600_000));
        assert_eq!(
            segment("main", 1_767_225_600_000, MachineId(0xab), 3),
            "volumes/main/log/20260101T0000/1767225600000-00000000000000ab-0000000000000003"
        );
    }
}
