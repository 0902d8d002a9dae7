//! Pins the bytes of snapshots: they are in buckets, for ever.

use std::collections::BTreeMap;

use casmount::{
    base::{digest::Digest, snapshot::SnapshotTag, volume::VolumeName},
    namespace::snapshot::{Snapshot, SnapshotLayer},
    tier::layout,
};

const TEXT: &str = r#"{
  "version": 1,
  "as_of_millis": 1767225600000,
  "created_millis": 1767225600123,
  "created_by": "release@builder",
  "names": 42,
  "layers": [
    {
      "volume": "pr-1",
      "catalog": "28720365c5e7476a011e4f43ac003ee5f16247a263b9d623aa85ed311d73bf39",
      "own_prefix": true
    },
    {
      "volume": "main",
      "catalog": "8ada24bf6bf3139273899fed85010be710367bbd1f8a176f19da97a62bc3bc65"
    }
  ],
  "presets": {
    "bazel": "bazel"
  }
}
"#;

fn names() -> (VolumeName, SnapshotTag) {
    ("pr-1".parse().unwrap(), "release=1.2".parse().unwrap())
}

fn snapshot() -> Snapshot {
    let layer = |volume: &str, catalog: &[u8], own_prefix| SnapshotLayer {
        volume: volume.parse().unwrap(),
        catalog: Digest::of(catalog),
        own_prefix,
    };
    Snapshot {
        version: 1,
        as_of_millis: 1_767_225_600_000,
        created_millis: 1_767_225_600_123,
        created_by: "release@builder".to_owned(),
        names: 42,
        layers: vec![layer("pr-1", b"top", true), layer("main", b"below", false)],
        presets: BTreeMap::from([("bazel".to_owned(), "bazel".to_owned())]),
    }
}

#[test]
fn a_snapshot_has_these_bytes_under_this_key() {
    let (volume, tag) = names();
    assert_eq!(
        layout::snapshot(volume.as_str(), tag.as_str()),
        "volumes/pr-1/snapshots/release=1.2.json"
    );
    assert_eq!(String::from_utf8(snapshot().encode()).unwrap(), TEXT);
    assert_eq!(
        Snapshot::decode(&volume, &tag, TEXT.as_bytes()).unwrap(),
        snapshot()
    );
}

#[test]
fn what_need_not_be_said_is_not() {
    let (_, tag) = names();
    let volume: VolumeName = "main".parse().unwrap();
    let mut plain = snapshot();
    plain.layers.remove(0);
    plain.presets.clear();
    let text = String::from_utf8(plain.encode()).unwrap();
    assert!(
        !text.contains("own_prefix") && !text.contains("presets"),
        "{text}"
    );
    assert_eq!(Snapshot::decode(&volume, &tag, text.as_bytes()).unwrap(), plain);
    // What a newer program of this version adds is ignored.
    let more = text.replacen("\"names\"", "\"signature\": [1],\n  \"names\"", 1);
    assert_eq!(Snapshot::decode(&volume, &tag, more.as_bytes()).unwrap(), plain);
}
