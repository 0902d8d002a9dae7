//! Pins the bytes of catalogs: what was written once is read for ever.
//!
//! `tests/data/catalog-1.0-part.bin` and `-root.bin` are small, so they are stored as they are, and
//! today's writer must make the same bytes. The head is text, and stands here.
//!
//! A test that fails here means that the format changed: raise its version, keep these files, and
//! add new ones beside (`CASMOUNT_BLESS=1` writes files that are missing).

use std::path::PathBuf;

use casmount::{
    base::{clock::Stamp, digest::Digest, id::MachineId},
    namespace::{
        catalog::{
            format::{self, Earlier, FormatError, PartRef, Root},
            head::{self, Head},
        },
        change::{Below, Entry, EntryBlob, EntryChunks, Item, Said},
    },
    store::rows::{LinkId, NodeKind},
};

const MACHINE: MachineId = MachineId(0x0123_4567_89ab_cdef);

fn stamp(counter: u32) -> Stamp {
    Stamp {
        millis: 1_767_225_598_000,
        counter,
        machine: MACHINE,
    }
}

fn entry(kind: NodeKind) -> Entry {
    Entry {
        kind,
        perm: 0o755,
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

fn items() -> Vec<Item> {
    let item = |path: &[u8], said, below| Item {
        path: path.to_vec(),
        said,
        below,
    };
    let says = |counter, entry| {
        Some(Said {
            stamp: stamp(counter),
            entry,
        })
    };
    let file = Entry {
        blob: Some(EntryBlob {
            digest: Digest::of(b"bytes"),
            size: 5,
            chunks: EntryChunks::Single,
            places: Vec::new(),
        }),
        link_id: Some(LinkId {
            machine: MACHINE,
            ino: 77,
        }),
        ..entry(NodeKind::File)
    };
    vec![
        item(b"dir", says(1, Some(entry(NodeKind::Dir))), Below::Live),
        item(b"implied", None, Below::Live),
        item(b"removed", says(2, None), Below::Dead),
        item(b"dir/\xff\xfe", says(3, Some(file)), Below::Nothing),
    ]
}

fn root() -> Root {
    let part = |first: &[u8], dead| PartRef {
        digest: Digest::of(first),
        bytes: 1234,
        items: 4,
        names: 2,
        first: first.to_vec(),
        oldest_dead_millis: dead,
    };
    Root {
        watermark_millis: 1_767_225_600_000,
        written_millis: 1_767_225_900_000,
        machine: MACHINE,
        earlier: vec![Earlier {
            digest: Digest::of(b"before"),
            watermark_millis: 1_767_225_000_000,
        }],
        names: 4,
        parts: vec![part(b"dir", 1_767_225_598_000), part(b"dir/sub/x", 0)],
        linked: vec![part(b"dir/\xff\xfe", 0)],
    }
}

/// The bytes of a file of `tests/data`.
fn pinned(name: &str, made: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name);
    if std::env::var_os("CASMOUNT_BLESS").is_some() && !path.exists() {
        std::fs::write(&path, made).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()))
}

#[test]
fn a_salt_gives_a_part_another_name_and_changes_nothing_that_it_says() {
    let encoded: Vec<_> = items().iter().map(format::encode_item).collect();
    let salted = |salt| format::encode_salted_part(encoded.iter().map(Vec::as_slice), salt);
    let plain = format::encode_part(encoded.iter().map(Vec::as_slice));
    let (one, other) = (salted(0x0102_0304_0506_0708), salted(1));
    assert!(one != other && one != plain);
    for part in [&one, &other] {
        assert_eq!(format::decode_part(part).unwrap(), items());
    }
    // Field 3 at the end of the first item, eight bytes, the lowest first.
    let raw = zstd::decode_all(&one[20..]).unwrap_or(one[20..].to_vec());
    let end = 1 + usize::from(raw[0]);
    assert_eq!(raw[end - 9..end], [0x19, 8, 7, 6, 5, 4, 3, 2, 1]);
}

#[test]
fn a_part_is_written_as_ever_and_reads_back() {
    let encoded: Vec<_> = items().iter().map(format::encode_item).collect();
    let made = format::encode_part(encoded.iter().map(Vec::as_slice));
    let pinned = pinned("catalog-1.0-part.bin", &made);
    assert_eq!(made, pinned);
    assert_eq!(format::decode_part(&pinned).unwrap(), items());
}

#[test]
fn a_root_is_written_as_ever_and_reads_back() {
    let made = root().encode();
    let pinned = pinned("catalog-1.0-root.bin", &made);
    assert_eq!(made, pinned);
    assert_eq!(Root::decode(&pinned).unwrap(), root());
}

#[test]
fn a_head_is_written_as_ever_and_reads_back() {
    let head = Head {
        version: head::VERSION,
        catalog: Digest::of(b"root"),
        watermark_millis: 1_767_225_600_000,
        names: 4,
        parts: 3,
        written_millis: 1_767_225_900_000,
        machine: MACHINE,
    };
    let text = "{\n  \"version\": 1,\n  \"catalog\": \
                \"4813494d137e1631bba301d5acab6e7bb7aa74ce1185d456565ef51d737677b2\",\n  \
                \"watermark_millis\": 1767225600000,\n  \"names\": 4,\n  \"parts\": 3,\n  \
                \"written_millis\": 1767225900000,\n  \"machine\": \"0123456789abcdef\"\n}\n";
    assert_eq!(String::from_utf8(head.encode()).unwrap(), text);
    assert_eq!(Head::decode("main", text.as_bytes()).unwrap(), head);
    // What a newer program of this version adds is ignored.
    let more = text.replace("\"names\"", "\"colour\": 3,\n  \"names\"");
    assert_eq!(Head::decode("main", more.as_bytes()).unwrap(), head);
}

#[test]
fn a_newer_version_is_told_from_damage() {
    let newer = |mut bytes: Vec<u8>| {
        bytes[8] = 2;
        bytes
    };
    let encoded: Vec<_> = items().iter().map(format::encode_item).collect();
    let part = format::encode_part(encoded.iter().map(Vec::as_slice));
    let refused = format::decode_part(&newer(part.clone())).unwrap_err();
    assert_eq!(refused, FormatError::Newer { major: 2 });
    let refused = Root::decode(&newer(root().encode())).unwrap_err();
    assert_eq!(refused, FormatError::Newer { major: 2 });
    for bytes in [&b""[..], &part[..19], &part[..part.len() - 1], &root().encode()] {
        let err = format::decode_part(bytes).unwrap_err();
        assert!(matches!(err, FormatError::Malformed { .. }), "{err}");
    }
    let err = Head::decode("main", b"{\"version\": 2}").unwrap_err().to_string();
    assert!(
        err.starts_with("volumes/main/head.json was written by a newer casmount"),
        "{err}"
    );
    let err = Head::decode("main", b"{\"version\": 1}").unwrap_err().to_string();
    assert!(err.starts_with("volumes/main/head.json is damaged ("), "{err}");
}

#[test]
fn items_out_of_order_or_twice_are_damage() {
    for order in [[1, 0], [0, 0]] {
        let items = items();
        let encoded: Vec<_> = order.iter().map(|at| format::encode_item(&items[*at])).collect();
        let part = format::encode_part(encoded.iter().map(Vec::as_slice));
        let err = format::decode_part(&part).unwrap_err().to_string();
        assert_eq!(err, "its items are not in order");
    }
}
