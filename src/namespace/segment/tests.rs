//! What a segment's reader must withstand, and that it reads what the writer wrote.

use proptest::prelude::*;

use super::*;
use crate::store::pack::PackPlace;

const MACHINE: MachineId = MachineId(0xab);

fn head() -> Head {
    Head {
        machine: MACHINE,
        seq: 7,
        published_millis: 1_767_225_600_000,
        previous: Some((1_767_225_500_000, 6)),
    }
}

fn written(changes: &[PathChange]) -> Vec<u8> {
    let encoded: Vec<_> = changes
        .iter()
        .map(|change| encode_change(change, MACHINE).unwrap())
        .collect();
    encode(&head(), &encoded)
}

/// Gives damaged bytes a right checksum, so that the layer below it is tried.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.len() - TRAILER_BYTES;
    let digest = Digest::of(&bytes[..end]);
    bytes[end..].copy_from_slice(digest.as_bytes());
    bytes
}

/// A segment of raw change records, whatever they are.
fn of_records(records: &[Vec<u8>]) -> Vec<u8> {
    let changes: Vec<_> = records
        .iter()
        .map(|record| {
            let mut bytes = Vec::new();
            prost::encode_length_delimiter(record.len(), &mut bytes).unwrap();
            bytes.extend_from_slice(record);
            EncodedChange(bytes)
        })
        .collect();
    encode(&head(), &changes)
}

fn any_digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest::from_bytes)
}

fn any_blob() -> impl Strategy<Value = EntryBlob> {
    let inline = prop::collection::vec((any_digest(), 1..=MAX_CHUNK_BYTES), 3..6)
        .prop_map(|pieces| {
            let chunks = pieces
                .into_iter()
                .map(|(digest, len)| Chunk { digest, len })
                .collect();
            ChunkList::new(chunks)
        })
        .prop_filter("more than one chunk", |list| {
            list.size() > u64::from(MAX_CHUNK_BYTES)
        });
    let blob = |digest, size, chunks| EntryBlob {
        digest,
        size,
        chunks,
        places: Vec::new(),
    };
    prop_oneof![
        Just(blob(Digest::EMPTY, 0, EntryChunks::Single)),
        (any_digest(), 1..=u64::from(MAX_CHUNK_BYTES), any_place()).prop_map(move |(digest, size, place)| {
            EntryBlob {
                places: place.map(|place| vec![Some(place)]).unwrap_or_default(),
                ..blob(digest, size, EntryChunks::Single)
            }
        }),
        (any_digest(), inline, prop::array::uniform3(any_place())).prop_map(move |(digest, list, some)| {
            let mut places: Vec<_> = (0..list.chunks().len()).map(|index| some[index % 3]).collect();
            if places.iter().all(Option::is_none) {
                places.clear();
            }
            EntryBlob {
                places,
                ..blob(digest, list.size(), EntryChunks::Inline(list))
            }
        }),
        (
            any_digest(),
            u64::from(MAX_CHUNK_BYTES) + 1..,
            any_digest(),
            any::<u64>()
        )
            .prop_map(move |(digest, size, list, list_size)| {
                let chunks = EntryChunks::Listed {
                    digest: list,
                    size: list_size,
                };
                blob(digest, size, chunks)
            }),
    ]
}

fn any_place() -> impl Strategy<Value = Option<PackPlace>> {
    prop::option::of(
        (any_digest(), 0u32..1 << 30, 1..=MAX_CHUNK_BYTES, any::<bool>()).prop_map(
            |(pack, offset, stored_len, zstd)| PackPlace {
                pack,
                offset,
                stored_len,
                zstd,
            },
        ),
    )
}

fn any_entry() -> impl Strategy<Value = Entry> {
    let kind = prop_oneof![
        any_blob().prop_map(|blob| (NodeKind::File, Some(blob), Vec::new())),
        Just((NodeKind::Dir, None, Vec::new())),
        Just((NodeKind::CharDevice, None, Vec::new())),
        prop::collection::vec(1u8.., 1..40).prop_map(|target| (NodeKind::Symlink, None, target)),
    ];
    let xattrs = prop::collection::btree_map(
        prop::collection::vec(1u8.., 1..20),
        prop::collection::vec(any::<u8>(), 0..40),
        0..4,
    );
    let numbers = (
        0u32..=0o7777,
        any::<u32>(),
        any::<u32>(),
        any::<u32>(),
        any::<i64>(),
    );
    let link = prop::option::of((any::<u64>(), any::<u64>()));
    (kind, numbers, xattrs, link).prop_map(
        |((kind, blob, target), (perm, uid, gid, rdev, mtime), xattrs, link)| Entry {
            kind,
            perm,
            uid,
            gid,
            rdev,
            mtime,
            blob,
            target,
            xattrs: xattrs.into_iter().collect(),
            link_id: link
                .filter(|_| kind != NodeKind::Dir)
                .map(|(machine, ino)| LinkId {
                    machine: MachineId(machine),
                    ino,
                }),
        },
    )
}

fn any_change() -> impl Strategy<Value = PathChange> {
    let machine = prop_oneof![Just(MACHINE.0), any::<u64>()];
    let stamp = (any::<u64>(), any::<u32>(), machine).prop_map(|(millis, counter, machine)| Stamp {
        millis,
        counter,
        machine: MachineId(machine),
    });
    (
        "[a-z]{1,5}(/[a-z.]{3,9}){0,3}",
        stamp,
        prop::option::of(any_entry()),
    )
        .prop_map(|(path, stamp, entry)| PathChange {
            path: path.into_bytes(),
            stamp,
            entry,
        })
}

fn dead(path: &str) -> PathChange {
    PathChange {
        path: path.into(),
        stamp: Stamp {
            millis: 5,
            counter: 0,
            machine: MACHINE,
        },
        entry: None,
    }
}

#[test]
fn a_damaged_byte_anywhere_is_found() {
    let bytes = written(&[dead("a/b"), dead("c")]);
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        assert!(decode(&damaged).is_err(), "byte {at}");
    }
    for len in 0..bytes.len() {
        assert!(decode(&bytes[..len]).is_err(), "{len} bytes");
    }
}

#[test]
fn a_newer_major_version_is_told_from_damage() {
    let mut bytes = written(&[dead("a")]);
    bytes[8] = 2;
    assert_eq!(decode(&sealed(bytes)), Err(SegmentError::Newer { major: 2 }));
}

#[test]
fn a_newer_minor_version_and_its_fields_are_read_past() {
    let mut bytes = written(&[dead("a")]);
    bytes[9] = 9;
    assert_eq!(decode(&sealed(bytes)).unwrap().changes, [dead("a")]);
    // Field 100, a string, behind the known ones.
    let mut record = to_wire(&dead("a"), MACHINE).encode_to_vec();
    record.extend_from_slice(&[0xa2, 0x06, 3, b'n', b'e', b'w']);
    assert_eq!(decode(&of_records(&[record])).unwrap().changes, [dead("a")]);
}

#[test]
fn a_change_that_says_nothing_known_is_skipped_and_the_others_stand() {
    let preset = wire::Change {
        what: None,
        ..to_wire(&dead("preset"), MACHINE)
    };
    let decoded = decode(&of_records(&[
        to_wire(&dead("a"), MACHINE).encode_to_vec(),
        preset.encode_to_vec(),
        vec![0xff; 4],
        to_wire(&dead("b"), MACHINE).encode_to_vec(),
    ]))
    .unwrap();
    assert_eq!(decoded.changes, [dead("a"), dead("b")]);
    assert_eq!(decoded.skipped.len(), 2);
    assert_eq!(decoded.skipped[0].path, b"preset");
}

#[test]
fn a_path_that_leaves_the_volume_is_never_handed_on() {
    for path in ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "a\0b"] {
        assert!(encode_change(&dead(path), MACHINE).is_err(), "{path:?}");
        let decoded = decode(&of_records(&[to_wire(&dead(path), MACHINE).encode_to_vec()])).unwrap();
        assert!(decoded.changes.is_empty(), "{path:?}");
        assert_eq!(decoded.skipped[0].path, path.as_bytes());
    }
}

#[test]
fn an_entry_that_contradicts_itself_is_skipped() {
    let blob = |size, chunks| wire::Blob {
        digest: vec![1; 32],
        size,
        chunks,
        places: Vec::new(),
    };
    let file = |blob: wire::Blob| wire::Entry {
        kind: 1,
        perm: 0o644,
        blob: Some(blob),
        ..Default::default()
    };
    let inline = |lens: &[u32]| {
        let packed = lens
            .iter()
            .flat_map(|len| [vec![2; 32], len.to_le_bytes().to_vec()].concat());
        Some(wire::Chunks::Inline(packed.collect()))
    };
    let good = file(blob(5, None));
    assert!(entry_from_wire(good.clone()).is_ok());
    assert!(entry_from_wire(file(blob(3 << 20, inline(&[2 << 20, 1 << 20])))).is_ok());
    for (bad, what) in [
        (
            wire::Entry {
                kind: 0,
                ..good.clone()
            },
            "no kind",
        ),
        (
            wire::Entry {
                kind: 2,
                ..good.clone()
            },
            "a directory with a blob",
        ),
        (
            wire::Entry {
                blob: None,
                ..good.clone()
            },
            "a file without",
        ),
        (
            wire::Entry {
                perm: 0o10_000,
                ..good.clone()
            },
            "more permission than there is",
        ),
        (
            wire::Entry {
                target: b"x".to_vec(),
                ..good.clone()
            },
            "a target on a file",
        ),
        (
            wire::Entry {
                kind: 3,
                blob: None,
                ..good
            },
            "a link to nowhere",
        ),
        (
            file(wire::Blob {
                digest: vec![1; 31],
                ..blob(5, None)
            }),
            "half a digest",
        ),
        (file(blob(0, None)), "no bytes, but not their digest"),
        (file(blob(3 << 20, None)), "a large blob without chunks"),
        (file(blob(5, inline(&[5]))), "a small blob with chunks"),
        (file(blob(3 << 20, inline(&[2 << 20]))), "a gap at the end"),
        (
            file(blob(3 << 20, inline(&[3 << 20]))),
            "a chunk over the maximum",
        ),
        (
            file(blob(3 << 20, inline(&[2 << 20, 0, 1 << 20]))),
            "an empty chunk",
        ),
        (
            file(blob(3 << 20, Some(wire::Chunks::Inline(vec![0; 37])))),
            "half a chunk",
        ),
    ] {
        assert!(entry_from_wire(bad).is_err(), "{what}");
    }
}

#[test]
fn a_lying_length_does_not_fill_memory() {
    let mut bytes = written(&[dead("a")]);
    bytes[12..20].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(
        decode(&sealed(bytes)),
        Err(SegmentError::Malformed { .. })
    ));
    // A frame of 64 MiB that calls itself 1 KiB.
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let mut bytes = written(&[dead("a")])[..HEADER_BYTES].to_vec();
    bytes[10] = ZSTD;
    bytes[12..20].copy_from_slice(&1024u64.to_le_bytes());
    bytes.extend_from_slice(&bomb);
    bytes.extend_from_slice(&[0; TRAILER_BYTES]);
    assert!(matches!(
        decode(&sealed(bytes)),
        Err(SegmentError::Malformed { .. })
    ));
}

#[test]
fn more_changes_than_a_segment_holds_are_refused() {
    let mut payload = wire::Head::default().encode_length_delimited_to_vec();
    payload.resize(payload.len() + MAX_CHANGES + 1, 0);
    let mut bytes = written(&[dead("a")])[..HEADER_BYTES].to_vec();
    bytes[10] = RAW;
    bytes[12..20].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&payload);
    bytes.extend_from_slice(&[0; TRAILER_BYTES]);
    assert_eq!(decode(&sealed(bytes)), Err(malformed("it has too many changes")));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_written_is_read(changes in prop::collection::vec(any_change(), 0..20)) {
        let decoded = decode(&written(&changes)).unwrap();
        prop_assert_eq!(decoded.head, head());
        prop_assert_eq!(decoded.changes, changes);
        prop_assert!(decoded.skipped.is_empty());
    }

    #[test]
    fn an_estimate_is_never_too_small(change in any_change()) {
        let encoded = encode_change(&change, MACHINE).unwrap();
        prop_assert!(encoded.0.len() as u64 <= estimate_bytes(&change));
    }

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode(&bytes);
    }

    #[test]
    fn no_damage_below_the_checksum_makes_the_reader_panic(
        changes in prop::collection::vec(any_change(), 1..5),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = written(&changes);
        for (at, byte) in damage {
            let at = HEADER_BYTES + at.index(bytes.len() - HEADER_BYTES - TRAILER_BYTES);
            bytes[at] = byte;
        }
        if let Ok(decoded) = decode(&sealed(bytes)) {
            for change in decoded.changes {
                prop_assert_eq!(check_path(&change.path), Ok(()));
            }
        }
    }

    #[test]
    fn no_records_make_the_reader_panic(records in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..10)) {
        let decoded = decode(&of_records(&records)).unwrap();
        prop_assert_eq!(decoded.changes.len() + decoded.skipped.len(), records.len());
    }
}
