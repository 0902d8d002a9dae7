//! Pins the bytes of chunk lists and packs: they are in buckets.

use casmount::{
    base::{
        chunk::{Chunk, ChunkList},
        digest::Digest,
    },
    store::{manifest, pack},
};

fn list() -> ChunkList {
    ChunkList::new(vec![
        Chunk {
            digest: Digest::of(b"one"),
            len: 3,
        },
        Chunk {
            digest: Digest::of(b"two"),
            len: 2 << 20,
        },
    ])
}

/// The records of [`list`].
fn records() -> Vec<u8> {
    let mut bytes = Digest::of(b"one").as_bytes().to_vec();
    bytes.extend_from_slice(&[3, 0, 0, 0]);
    bytes.extend_from_slice(Digest::of(b"two").as_bytes());
    bytes.extend_from_slice(&[0, 0, 0x20, 0]);
    bytes
}

#[test]
fn a_chunk_list_has_these_bytes() {
    let bytes = [b"casmcl\0\x01".to_vec(), records()].concat();
    assert_eq!(manifest::encode(&list(), &[]), bytes);
    assert_eq!(
        Digest::of(&bytes).to_string(),
        "ddea4973b4770c9300aa687cdf28ee703e3261b1207647006a3624c602b33037"
    );
    assert_eq!(manifest::decode(&bytes), Ok((list(), Vec::new())));
}

/// A pack of "one", as it is, and of two megabytes, which compressed to "two packed".
fn pack() -> pack::Pack {
    let list = list();
    let mut builder = pack::Builder::new(2, 0);
    builder.add(list.chunks()[0], b"one", false);
    builder.add(list.chunks()[1], b"two packed", true);
    builder.finish()
}

#[test]
fn a_pack_has_these_bytes() {
    let mut bytes = b"casmpk\0\x01\x02\0\0\0".to_vec();
    bytes.extend_from_slice(Digest::of(b"one").as_bytes());
    bytes.extend_from_slice(&[3, 0, 0, 0, 3, 0, 0, 0]);
    bytes.extend_from_slice(Digest::of(b"two").as_bytes());
    bytes.extend_from_slice(&[0, 0, 0x20, 0, 10, 0, 0, 0x80]);
    bytes.extend_from_slice(b"onetwo packed");
    let pack = pack();
    assert_eq!(pack.object, bytes);
    let names = [Digest::of(b"one"), Digest::of(b"two")].map(|digest| *digest.as_bytes());
    assert_eq!(pack.name, Digest::of(&names.concat()));
    let head = &bytes[..pack::head_bytes(2) as usize];
    assert_eq!(pack::read_head(head, list().chunks()), Some(pack.members));
}

#[test]
fn a_chunk_list_with_places_has_these_bytes() {
    let pack = pack();
    let places = [None, Some(pack.members[1].1)];
    let mut bytes = b"casmcl\0\x02\x02\0\0\0".to_vec();
    bytes.extend(records());
    bytes.extend_from_slice(&[1, 0, 0, 0]);
    bytes.extend_from_slice(pack.name.as_bytes());
    bytes.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend_from_slice(&[0, 0, 0, 0, 95, 0, 0, 0, 10, 0, 0, 0x80]);
    assert_eq!(manifest::encode(&list(), &places), bytes);
    assert_eq!(manifest::decode(&bytes), Ok((list(), places.to_vec())));
}
