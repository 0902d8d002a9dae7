//! Where things are in a bucket: the keys, all relative to the store's prefix.
//!
//! ```text
//! casmount.json                                   format version, store id, chunking
//! blobs/sha256/<2 hex>/<64 hex>                   a chunk, a blob of one chunk, or a chunk list
//! packs/<2 hex>/<64 hex>                          many chunks, named by the SHA-256 of their digests
//! deleted.json                                    which volumes are deleted for good, see `namespace::deleted`; If-Match
//! volumes/<name>/blobs/ packs/ probe/             the same of a fork whose writers are trusted less, see `domain`
//! volumes/<name>/volume.json                      what a fork lies over, or that it was deleted; others may have none
//! volumes/<name>/log/<yyyymmddThhmm>/<ms>-<machine>-<seq>   segments, immutable
//! sweep/window.json                               how long what nobody names is kept, see `sweeping`
//! sweep/<ms>-<random>.list                        objects that a sweep condemned
//! sweep/<ms>-<random>.done                        the sweep of that list came to its end
//! volumes/<name>/touched/expire.json              how long a name may be unused, see `namespace::touch`; If-Match
//! volumes/<name>/touched/<yyyymmdd>/<ms>-<machine>-<random>   names that a machine used, immutable
//! volumes/<name>/catalogs/<64 hex>                roots and parts of catalogs, named by their SHA-256; immutable
//! volumes/<name>/head.json                        the newest catalog and its watermark; If-Match
//! volumes/<name>/snapshots/<tag>.json             catalogs that stay: a state of the volume; immutable
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
//! What is below `volumes/` and not below `volumes/<name of a volume>/` is of no volume, and no version of the format puts
//! anything there. A volume has `volume.json`, `head.json`, a snapshot or something in its log, or it does not exist.
//!
//! Keys are part of the store's format (`casmount.json`, [`FORMAT_VERSION`]):
//! readers refuse a newer version, and `tests/golden_chunking.rs` pins these texts.

use crate::base::{digest::Digest, id::MachineId, units::civil_date};

/// The version of everything that is written to a bucket.
pub const FORMAT_VERSION: u32 = 1;

/// The version of a store whose blobs and packs a lifecycle rule of its bucket deletes by their age. Whoever does not know
/// of that would name what is about to go.
pub const LIFECYCLE_FORMAT_VERSION: u32 = 2;

/// The settings of a store.
pub const STORE: &str = "casmount.json";

/// Which volumes are deleted for good.
pub const DELETED: &str = "deleted.json";

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

/// The folder below [`VOLUMES_PREFIX`] that an object is in, which is a volume if it is the name of one; `None`: in none.
#[must_use]
pub fn volume_of(key: &str) -> Option<&str> {
    let (folder, _) = key.strip_prefix(VOLUMES_PREFIX)?.split_once('/')?;
    Some(folder)
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

/// What all snapshots of a volume start with.
#[must_use]
pub fn snapshots_prefix(volume: &str) -> String {
    format!("volumes/{volume}/snapshots/")
}

/// A snapshot of a volume.
#[must_use]
pub fn snapshot(volume: &str, tag: &str) -> String {
    format!("{}{tag}.json", snapshots_prefix(volume))
}

/// The tag in the key of a snapshot of `volume`; `None` for any other key.
#[must_use]
pub fn snapshot_tag<'a>(volume: &str, key: &'a str) -> Option<&'a str> {
    let rest = key.strip_prefix(VOLUMES_PREFIX)?.strip_prefix(volume)?;
    rest.strip_prefix("/snapshots/")?.strip_suffix(".json")
}

/// What all that machines tell of the names that they use starts with.
#[must_use]
pub fn touched_prefix(volume: &str) -> String {
    format!("volumes/{volume}/touched/")
}

/// How long a name of a volume may be unused.
#[must_use]
pub fn expiry(volume: &str) -> String {
    format!("{}expire.json", touched_prefix(volume))
}

/// What `machine` told at `millis` of the names that it used.
#[must_use]
pub fn touched(volume: &str, millis: u64, machine: MachineId, random: u64) -> String {
    let (year, month, day) = civil_date(millis / DAY_MILLIS);
    format!(
        "{}{year:04}{month:02}{day:02}/{millis:013}-{machine}-{random:016x}",
        touched_prefix(volume)
    )
}

/// When what is under a key of [`touched`] was told; `None` for any other key.
#[must_use]
pub fn touched_millis(volume: &str, key: &str) -> Option<u64> {
    let name = key.strip_prefix(&touched_prefix(volume))?;
    let (_, name) = name.split_once('/')?;
    let [millis, machine, random] = name.split('-').collect::<Vec<_>>()[..] else {
        return None;
    };
    let (millis, machine) = (millis.parse().ok()?, machine.parse().ok()?);
    let random = u64::from_str_radix(random, 16).ok()?;
    (touched(volume, millis, machine, random) == key).then_some(millis)
}

const DAY_MILLIS: u64 = 24 * 3_600_000;

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
    fn the_volume_of_an_object_is_read_from_its_key() {
        assert_eq!(volume_of(&head("main")), Some("main"));
        assert_eq!(volume_of("volumes/UPPER/x/y"), Some("UPPER"));
        for none in ["volumes/main", "volumes", "blobs/main/x", "xvolumes/main/x"] {
            assert_eq!(volume_of(none), None, "{none}");
        }
    }

    #[test]
    fn the_tag_of_a_snapshot_is_read_from_its_key() {
        let key = snapshot("main", "v=1.json");
        assert_eq!(key, "volumes/main/snapshots/v=1.json.json");
        assert_eq!(snapshot_tag("main", &key), Some("v=1.json"));
        for (volume, key) in [
            ("mai", key.as_str()),
            ("main", "volumes/main/snapshots/v=1"),
            ("main", "volumes/main/head.json"),
        ] {
            assert_eq!(snapshot_tag(volume, key), None, "{key}");
        }
    }

    #[test]
    fn what_was_told_of_uses_is_under_its_day() {
        let key = touched("main", 1_767_225_600_000, MachineId(0xab), 7);
        assert_eq!(
            key,
            "volumes/main/touched/20260101/1767225600000-00000000000000ab-0000000000000007"
        );
        assert_eq!(touched_millis("main", &key), Some(1_767_225_600_000));
        for odd in [
            expiry("main"),
            key.replace("20260101", "20260102"),
            key.replace("-0000000000000007", "-7"),
            key.replace("-0000000000000007", ""),
            format!("{key}-7"),
        ] {
            assert_eq!(touched_millis("main", &odd), None, "{odd}");
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
