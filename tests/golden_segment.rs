//! Pins the bytes of segments: what was written once is read for ever.
//!
//! `tests/data/segment-1.0-raw.bin` is small, so it is stored as it is, and today's
//! writer must make the same bytes. `tests/data/segment-1.0-zstd.bin` is compressed: a
//! newer zstd may compress in another way, so only its reading is pinned.
//!
//! A test that fails here means that the format changed: raise its version, keep
//! these files, and add new ones beside (`CASMOUNT_BLESS=1` writes files that are missing).

use std::path::PathBuf;

use casmount::{
    base::{
        chunk::{Chunk, ChunkList},
        clock::Stamp,
        digest::Digest,
        id::MachineId,
    },
    namespace::{
        change::{Entry, EntryBlob, EntryChunks, PathChange},
        segment::{self, Head},
    },
    store::{
        pack::PackPlace,
        rows::{LinkId, NodeKind},
    },
};

const MACHINE: MachineId = MachineId(0x0123_4567_89ab_cdef);

fn head() -> Head {
    Head {
        machine: MACHINE,
        seq: 0x0006_6ddb_6ab7_7000,
        published_millis: 1_767_225_600_123,
        previous: Some((1_767_225_599_000, 0x0006_6ddb_6ab7_6fff)),
    }
}

fn entry(kind: NodeKind) -> Entry {
    Entry {
        kind,
        perm: 0o644,
        uid: 1000,
        gid: 100,
        rdev: 0,
        mtime: 1_767_225_598_123_456_789,
        blob: None,
        target: Vec::new(),
        xattrs: Vec::new(),
        link_id: None,
    }
}

fn file(size: u64, chunks: EntryChunks) -> Entry {
    Entry {
        blob: Some(EntryBlob {
            digest: Digest::of(b"the whole"),
            size,
            chunks,
            places: Vec::new(),
        }),
        ..entry(NodeKind::File)
    }
}

fn change(path: &str, counter: u32, entry: Option<Entry>) -> PathChange {
    PathChange {
        path: path.into(),
        stamp: Stamp {
            millis: 1_767_225_598_200,
            counter,
            machine: MACHINE,
        },
        entry,
    }
}

/// One of everything that a segment can say.
fn everything() -> Vec<PathChange> {
    let chunks = ChunkList::new(vec![
        Chunk {
            digest: Digest::of(b"one"),
            len: 2 << 20,
        },
        Chunk {
            digest: Digest::of(b"two"),
            len: 524_289,
        },
    ]);
    let inherited = PathChange {
        stamp: Stamp {
            millis: 5,
            counter: 6,
            machine: MachineId(7),
        },
        ..change("src/of-another-machine", 0, None)
    };
    vec![
        change("src", 0, Some(entry(NodeKind::Dir))),
        change("src/empty", 1, {
            let mut empty = file(0, EntryChunks::Single);
            if let Some(blob) = &mut empty.blob {
                blob.digest = Digest::EMPTY;
            }
            Some(empty)
        }),
        change("src/main.c", 2, Some(file(4096, EntryChunks::Single))),
        change(
            "src/large",
            3,
            Some(file(chunks.size(), EntryChunks::Inline(chunks))),
        ),
        change(
            "src/huge",
            4,
            Some(file(
                1 << 40,
                EntryChunks::Listed {
                    digest: Digest::of(b"the list"),
                    size: 75_497_472,
                },
            )),
        ),
        change(
            "link",
            5,
            Some(Entry {
                target: b"../elsewhere".to_vec(),
                ..entry(NodeKind::Symlink)
            }),
        ),
        change(
            "dev/null",
            6,
            Some(Entry {
                perm: 0o6755,
                rdev: 0x103,
                mtime: -1,
                ..entry(NodeKind::CharDevice)
            }),
        ),
        change(
            "caf\u{e9}",
            7,
            Some(Entry {
                xattrs: vec![
                    (b"user.a".to_vec(), b"1".to_vec()),
                    (b"user.b".to_vec(), Vec::new()),
                ],
                link_id: Some(LinkId {
                    machine: MACHINE,
                    ino: 42,
                }),
                ..file(4096, EntryChunks::Single)
            }),
        ),
        change("gone", 8, None),
        inherited,
    ]
}

fn encode(changes: &[PathChange]) -> Vec<u8> {
    let encoded: Vec<_> = changes
        .iter()
        .map(|change| segment::encode_change(change, MACHINE).expect("it breaks no rule"))
        .collect();
    segment::encode(&head(), &encoded)
}

/// Decompresses what is between the header and the checksum.
fn payload(segment: &[u8]) -> Vec<u8> {
    zstd::decode_all(&segment[20..segment.len() - 32]).unwrap()
}

/// Many changes that compress well.
fn many() -> Vec<PathChange> {
    (0..500)
        .map(|number| change(&format!("obj/{number:04}.o"), number, Some(entry(NodeKind::Dir))))
        .collect()
}

fn golden(name: &str, today: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name);
    if !path.exists() && std::env::var_os("CASMOUNT_BLESS").is_some() {
        std::fs::write(&path, today).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()))
}

#[test]
fn a_small_segment_has_the_same_bytes_for_ever() {
    let today = encode(&everything()[3..4]);
    let golden = golden("segment-1.0-raw.bin", &today);
    assert_eq!(golden[10], 0, "it is stored without compression");
    assert!(golden == today, "today's writer makes other bytes");
    assert_eq!(segment::decode(&golden).unwrap().changes, everything()[3..4]);
}

#[test]
fn a_compressed_segment_is_read_for_ever() {
    let all = [everything(), many()].concat();
    let today = encode(&all);
    let golden = golden("segment-1.0-zstd.bin", &today);
    assert_eq!(golden[10], 1, "it is stored with compression");
    assert!(
        payload(&golden) == payload(&today),
        "today's writer makes another payload"
    );
    let decoded = segment::decode(&golden).unwrap();
    assert_eq!(decoded.head, head());
    assert_eq!(decoded.changes, all);
    assert!(decoded.skipped.is_empty());
}

#[test]
fn places_in_packs_have_the_same_bytes_for_ever() {
    let place = |offset, zstd| {
        Some(PackPlace {
            pack: Digest::of(b"pack"),
            offset,
            stored_len: 500_000,
            zstd,
        })
    };
    let mut changes = everything()[2..4].to_vec();
    let places = [vec![place(92, false)], vec![None, place(500_092, true)]];
    for (change, places) in changes.iter_mut().zip(places) {
        let blob = change.entry.as_mut().and_then(|entry| entry.blob.as_mut());
        blob.unwrap().places = places;
    }
    let today = encode(&changes);
    let golden = golden("segment-1.0-packed.bin", &today);
    assert!(golden == today, "today's writer makes other bytes");
    assert_eq!(segment::decode(&golden).unwrap().changes, changes);
}

/// A protobuf varint (protobuf.dev, "Encoding").
fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// A number behind its tag.
fn field(tag: u8, number: u64) -> Vec<u8> {
    [vec![tag << 3], varint(number)].concat()
}

/// Bytes behind their tag and length.
fn nested(tag: u8, bytes: &[u8]) -> Vec<u8> {
    [&[tag << 3 | 2], varint(bytes.len() as u64).as_slice(), bytes].concat()
}

/// The bytes of a segment, made from the specification without its code.
#[test]
fn a_deletion_is_what_the_specification_says() {
    let previous = [field(1, 1_767_225_599_000), field(2, 0x0006_6ddb_6ab7_6fff)].concat();
    let head = [
        vec![1 << 3 | 1],
        MACHINE.0.to_le_bytes().to_vec(),
        field(2, 0x0006_6ddb_6ab7_7000),
        field(3, 1_767_225_600_123),
        nested(4, &previous),
    ]
    .concat();
    let change_bytes = [
        nested(1, b"gone"),
        field(2, 1_767_225_598_200),
        field(3, 8),
        nested(6, b""),
    ]
    .concat();
    let payload = [
        varint(head.len() as u64),
        head,
        varint(change_bytes.len() as u64),
        change_bytes,
    ]
    .concat();
    let mut expected = b"casmseg\n\x01\0\0\0".to_vec();
    expected.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    expected.extend_from_slice(&payload);
    expected.extend_from_slice(Digest::of(&expected).as_bytes());
    assert_eq!(encode(&[change("gone", 8, None)]), expected);
}
