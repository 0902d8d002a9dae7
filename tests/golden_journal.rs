//! The journal's format, version 1, byte for byte.
//!
//! A daemon that was upgraded replays what the old one wrote. When this fails, the format changed: give it
//! a new version, keep this file's bytes readable, and add a golden of the new one.
//!
//! `journal-1-layer.hex` has the one field that version 1 got later: the layer of a name.

use std::{fmt::Write, fs, path::Path};

use casmount::{
    base::{
        chunk::{Chunk, ChunkList},
        clock::Stamp,
        digest::Digest,
        id::MachineId,
    },
    store::{
        cachedir::LastStop,
        ledger::{Ledger, LedgerOptions},
        pack::PackPlace,
        rows::{
            BlobRow, Change, ChunkRow, Content, DirState, Durability, Ino, LinkId, ListObject, NameRow,
            NameState, NodeKind, NodeRow, Place, Residency, StagingId, TreeLayer, Unloaded,
        },
    },
};

const GOLDEN: &str = include_str!("golden/journal-1.hex");
const GOLDEN_PACKED: &str = include_str!("golden/journal-1-packed.hex");
const GOLDEN_LAYER: &str = include_str!("golden/journal-1-layer.hex");

/// The size of a blob of two chunks.
const LARGE: u64 = 3 << 20;

fn open(dir: &Path) -> Ledger {
    Ledger::open(dir, LastStop::Crashed, &LedgerOptions::default())
        .unwrap()
        .0
}

fn nodes() -> [NodeRow; 3] {
    let file = NodeRow {
        ino: Ino(7),
        kind: NodeKind::File,
        perm: 0o4755,
        uid: 1000,
        gid: 100,
        rdev: 0,
        size: 5,
        atime: -1,
        mtime: 1_700_000_000_123_456_789,
        ctime: 3,
        nlink: 2,
        content: Content::Blob(Digest::of(b"blob")),
        target: Vec::new(),
        xattrs: vec![
            (b"user.a".to_vec(), b"1".to_vec()),
            (b"user.b".to_vec(), Vec::new()),
        ],
        dir: None,
        link_id: Some(LinkId {
            machine: MachineId(0x0123_4567_89ab_cdef),
            ino: 6,
        }),
        places: Vec::new(),
    };
    let dir = NodeRow {
        ino: Ino::ROOT,
        kind: NodeKind::Dir,
        nlink: 0,
        content: Content::None,
        xattrs: Vec::new(),
        dir: Some(DirState {
            up: Ino::ROOT,
            name: b"\xffdir".to_vec(),
            visible_children: 300,
            subdirs: 2,
            unloaded: Unloaded::default(),
        }),
        link_id: None,
        ..file.clone()
    };
    let symlink = NodeRow {
        ino: Ino(u64::from(u32::MAX) + 1),
        kind: NodeKind::Symlink,
        content: Content::None,
        target: b"../target".to_vec(),
        xattrs: Vec::new(),
        link_id: None,
        ..file.clone()
    };
    [file, dir, symlink]
}

fn names() -> [NameRow; 2] {
    let live = NameRow {
        parent: Ino::ROOT,
        name: b"name".to_vec(),
        layer: TreeLayer::TOP,
        stamp: Stamp {
            millis: 1_700_000_000_000,
            counter: 9,
            machine: MachineId(0xfedc_ba98_7654_3210),
        },
        state: NameState::Live(Ino(7)),
        dir: None,
        pending: Some(Place {
            seq: 12,
            first_seq: 11,
        }),
    };
    let dead = NameRow {
        name: b"dead".to_vec(),
        state: NameState::Dead,
        dir: Some(Ino(9)),
        pending: None,
        ..live.clone()
    };
    [live, dead]
}

fn blobs() -> [BlobRow; 3] {
    let dirty = BlobRow {
        digest: Digest::of(b"blob"),
        size: 5,
        residency: Residency::Whole,
        durability: Durability::Dirty,
        used_secs: 1_700_000_000,
        pinned: true,
        doubted: false,
    };
    let partial = BlobRow {
        digest: Digest::of(b"large"),
        size: LARGE,
        residency: Residency::Partial(vec![0b10]),
        durability: Durability::Durable {
            confirmed_millis: 1_700_000_000_001,
        },
        pinned: false,
        doubted: true,
        ..dirty.clone()
    };
    let quarantined = BlobRow {
        digest: Digest::of(b"bad"),
        residency: Residency::Nothing,
        durability: Durability::Quarantined,
        ..dirty.clone()
    };
    [dirty, partial, quarantined]
}

fn manifest() -> ChunkList {
    ChunkList::new(vec![
        Chunk {
            digest: Digest::of(b"first"),
            len: 2 << 20,
        },
        Chunk {
            digest: Digest::of(b"second"),
            len: 1 << 20,
        },
    ])
}

fn seen(place: Option<PackPlace>) -> ChunkRow {
    ChunkRow {
        confirmed_millis: 77,
        place,
    }
}

/// Every kind of change once, and every form of a row; without packs, which came later.
fn commits() -> Vec<Vec<Change>> {
    let [file, dir, symlink] = nodes();
    let [live, dead] = names();
    let [dirty, partial, quarantined] = blobs();
    let gone = NodeRow {
        ino: Ino(8),
        content: Content::Lost(Digest::of(b"lost")),
        ..file.clone()
    };
    let staged = NodeRow {
        ino: Ino(10),
        content: Content::Staging(StagingId(5)),
        ..file.clone()
    };
    vec![
        vec![Change::PutNode(file), Change::PutName(live), Change::PutNode(dir)],
        vec![
            Change::PutManifest(Digest::of(b"large"), manifest()),
            Change::PutBlob(dirty),
            Change::PutBlob(partial),
            Change::PutBlob(quarantined),
        ],
        vec![
            Change::PutNode(symlink),
            Change::PutNode(gone),
            Change::DropNode(Ino(8)),
            Change::PutName(dead),
            Change::DropName(Ino::ROOT, b"nothing".to_vec()),
            Change::DropBlob(Digest::of(b"nothing")),
            Change::PutChunk(Digest::of(b"first"), seen(None)),
            Change::PutMeta("cursor".to_owned(), b"\x00\x01".to_vec()),
            Change::PutNode(staged),
            Change::SyncedStaging(StagingId(5)),
        ],
    ]
}

/// What chunks in packs added.
fn packed_commits() -> Vec<Vec<Change>> {
    let place = PackPlace {
        pack: Digest::of(b"pack"),
        offset: 92,
        stored_len: 300,
        zstd: true,
    };
    let list = ListObject {
        digest: Digest::of(b"list"),
        size: 80,
    };
    vec![vec![
        Change::PutChunk(Digest::of(b"first"), seen(Some(place))),
        Change::PutList(Digest::of(b"large"), list),
    ]]
}

/// A name that comes from the lowest layer that there can be.
fn name_of_a_layer_below() -> NameRow {
    let [_, dead] = names();
    NameRow {
        layer: TreeLayer::new(TreeLayer::MAX_BELOW.into()).unwrap(),
        ..dead
    }
}

fn assert_written_as(commits: Vec<Vec<Change>>, golden: &str) {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    for changes in commits {
        ledger.commit(changes).unwrap();
    }
    drop(ledger);
    let mut hex = String::new();
    for (at, byte) in fs::read(dir.path().join("journal/0")).unwrap().iter().enumerate() {
        let end = if at % 40 == 39 { "\n" } else { "" };
        write!(hex, "{byte:02x}{end}").unwrap();
    }
    assert!(hex.trim() == golden.trim(), "the journal is now\n{hex}");
}

/// Opens a ledger over a journal that is there already.
fn replayed(golden: &str) -> (tempfile::TempDir, Ledger) {
    let dir = tempfile::tempdir().unwrap();
    let digits: Vec<u8> = golden.bytes().filter(u8::is_ascii_hexdigit).collect();
    let bytes = digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap());
    fs::create_dir(dir.path().join("journal")).unwrap();
    fs::write(dir.path().join("journal/0"), bytes.collect::<Vec<u8>>()).unwrap();
    let ledger = open(dir.path());
    (dir, ledger)
}

#[test]
fn the_journal_is_written_as_ever() {
    assert_written_as(commits(), GOLDEN);
    assert_written_as(packed_commits(), GOLDEN_PACKED);
    let layer = vec![vec![Change::PutName(name_of_a_layer_below())]];
    assert_written_as(layer, GOLDEN_LAYER);
}

#[test]
fn a_journal_with_packs_is_replayed() {
    let (_dir, ledger) = replayed(GOLDEN_PACKED);
    for change in packed_commits().concat() {
        match change {
            Change::PutChunk(digest, row) => assert_eq!(ledger.chunk(&digest).unwrap(), Some(row)),
            Change::PutList(blob, list) => assert_eq!(ledger.list_of(&blob).unwrap(), Some(list)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_layer_of_a_name_is_replayed() {
    let (_dir, ledger) = replayed(GOLDEN_LAYER);
    let row = name_of_a_layer_below();
    assert_eq!(ledger.name(row.parent, &row.name).unwrap().as_deref(), Some(&row));
}

#[test]
fn a_journal_of_version_1_is_replayed() {
    let (_dir, ledger) = replayed(GOLDEN);
    for row in nodes() {
        assert_eq!(ledger.node(row.ino).unwrap().as_deref(), Some(&row));
    }
    for row in names() {
        assert_eq!(ledger.name(row.parent, &row.name).unwrap().as_deref(), Some(&row));
    }
    for row in blobs() {
        assert_eq!(ledger.blob(&row.digest).unwrap().as_deref(), Some(&row));
    }
    let found = ledger.manifest(&Digest::of(b"large"), LARGE).unwrap();
    assert_eq!(found.as_deref(), Some(&manifest()));
    assert_eq!(ledger.node(Ino(8)).unwrap(), None);
    assert_eq!(
        ledger.node(Ino(10)).unwrap().unwrap().content,
        Content::Staging(StagingId(5))
    );
    assert_eq!(ledger.chunk(&Digest::of(b"first")).unwrap(), Some(seen(None)));
    assert_eq!(ledger.meta("cursor").unwrap().as_deref(), Some(&b"\x00\x01"[..]));
    // The ceilings of the first record: numbers given out by then are not given out again.
    assert!(ledger.next_ino() > Ino(1 << 16) && ledger.next_place() > 1 << 16);
}
