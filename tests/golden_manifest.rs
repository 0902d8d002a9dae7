//! Pins the bytes of a chunk list object: they are in buckets.

use casmount::{
    base::{
        chunk::{Chunk, ChunkList},
        digest::Digest,
    },
    store::manifest,
};

#[test]
fn a_chunk_list_has_these_bytes() {
    let list = ChunkList::new(vec![
        Chunk {
            digest: Digest::of(b"one"),
            len: 3,
        },
        Chunk {
            digest: Digest::of(b"two"),
            len: 2 << 20,
        },
    ]);
    let mut bytes = b"casmcl\0\x01".to_vec();
    bytes.extend_from_slice(Digest::of(b"one").as_bytes());
    bytes.extend_from_slice(&[3, 0, 0, 0]);
    bytes.extend_from_slice(Digest::of(b"two").as_bytes());
    bytes.extend_from_slice(&[0, 0, 0x20, 0]);
    assert_eq!(manifest::encode(&list), bytes);
    assert_eq!(
        Digest::of(&bytes).to_string(),
        "ddea4973b4770c9300aa687cdf28ee703e3261b1207647006a3624c602b33037"
    );
    assert_eq!(manifest::decode(&bytes), Ok(list));
}
