//! Pins where blobs are cut and what keys objects have: both are part of a store's format.
//!
//! Two machines that cut in other places share nothing, and a key that changes
//! loses what was stored under the old one. So a failure here is a format change, never
//! a number to be updated.

// Numbers are pinned as they are printed.
#![allow(clippy::unreadable_literal)]

use casmount::{
    base::{
        chunk::{AVG_CHUNK_BYTES, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, slice},
        digest::Digest,
        id::MachineId,
    },
    tier::layout,
};
use fastcdc::v2020::{FastCDC, Normalization};

/// Bytes that look random and are the same everywhere (xorshift64, seed 42).
fn noise(len: usize) -> Vec<u8> {
    let mut state = 42u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Lengths and the first eight digits of the digests of 16 MiB of noise.
const CHUNKS: &[(u32, &str)] = &[
    (309968, "ef5e5345"),
    (571534, "50144c55"),
    (794401, "53c4d02d"),
    (537390, "3a796513"),
    (592511, "817c822d"),
    (268362, "eb575ff1"),
    (651197, "3733a5b3"),
    (572047, "7c9b3fef"),
    (539864, "39acdfd7"),
    (662141, "1b9cdec5"),
    (633065, "20e44316"),
    (634239, "5cbedb47"),
    (541160, "507ca4ed"),
    (624180, "02ccb3ec"),
    (631106, "6d8d7e58"),
    (528115, "a382ca63"),
    (714152, "7856bd0b"),
    (538574, "fad45084"),
    (204972, "3475d8fc"),
    (530880, "f39682c5"),
    (529422, "5fc4264a"),
    (860297, "8a5636d9"),
    (931212, "2a84199c"),
    (673279, "281a1635"),
    (571558, "819b9d32"),
    (611381, "18a23024"),
    (975532, "b6128820"),
    (544677, "f1991895"),
];

#[test]
fn sixteen_mebibytes_of_noise_are_cut_where_they_always_were() {
    let bytes = noise(16 << 20);
    let sliced = slice(bytes.as_slice()).unwrap();
    let found: Vec<_> = sliced
        .chunks
        .chunks()
        .iter()
        .map(|chunk| (chunk.len, chunk.digest.to_string()[..8].to_owned()))
        .collect();
    let pinned: Vec<_> = CHUNKS
        .iter()
        .map(|(len, digest)| (*len, (*digest).to_owned()))
        .collect();
    assert_eq!(found, pinned);
    assert_eq!(sliced.digest, Digest::of(&bytes));
}

/// The same cuts, by the crate's other interface, with the parameters as numbers.
#[test]
fn the_parameters_are_those_of_the_remote_execution_api() {
    assert_eq!(
        (MIN_CHUNK_BYTES, AVG_CHUNK_BYTES, MAX_CHUNK_BYTES),
        (131_072, 524_288, 2_097_152)
    );
    let bytes = noise(16 << 20);
    let cuts = |level| {
        FastCDC::with_level_and_seed(&bytes, 131_072, 524_288, 2_097_152, level, 0)
            .map(|chunk| chunk.length as u32)
            .collect::<Vec<_>>()
    };
    let pinned: Vec<_> = CHUNKS.iter().map(|(len, _)| *len).collect();
    assert_eq!(cuts(Normalization::Level2), pinned);
    assert_ne!(
        cuts(Normalization::Level1),
        pinned,
        "the crate's default level is another"
    );
}

/// The crate itself, at a small average, so that an update of it that cuts in
/// other places is told from a mistake of ours.
#[test]
fn the_chunker_cuts_a_small_average_where_it_always_did() {
    let bytes = noise(256 << 10);
    let found: Vec<_> = FastCDC::with_level(&bytes, 4096, 16_384, 65_536, Normalization::Level2)
        .map(|chunk| (chunk.offset, chunk.length, chunk.hash))
        .collect();
    let pinned: &[(usize, usize, u64)] = &[
        (0, 9392, 0x7edc0d90c91802b6),
        (9392, 19206, 0x73820975d0516f7e),
        (28598, 20902, 0x1638045cb918ff96),
        (49500, 20700, 0x587840e5d940f79a),
        (70200, 15097, 0xdad206ec84280b50),
        (85297, 21305, 0x60d70076a8a8e93c),
        (106602, 19844, 0xa3ae4068a119ca30),
        (126446, 18278, 0xa4264ca1585958b4),
        (144724, 17102, 0xcbd2400c1851b642),
        (161826, 16392, 0x68e401088150b03a),
        (178218, 18454, 0x5e0c09c9c9418468),
        (196672, 16763, 0xf91924866424bc31),
        (213435, 18079, 0x561f06a624247944),
        (231514, 9758, 0x2acc48c8d0591bf0),
        (241272, 7607, 0x5a2b2644b8888599),
        (248879, 13265, 0xbc297c6939c823c5),
    ];
    assert_eq!(found, pinned);
}

#[test]
fn keys_of_objects_are_what_they_always_were() {
    assert_eq!(layout::FORMAT_VERSION, 1);
    assert_eq!(layout::STORE, "casmount.json");
    assert_eq!(layout::PROBE_PREFIX, "probe/");
    assert_eq!(
        layout::blob(&Digest::of(b"abc")),
        "blobs/sha256/ba/ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
    assert_eq!(layout::log_prefix("main"), "volumes/main/log/");
    assert_eq!(
        layout::segment("main", 1_767_225_600_123, MachineId(0x0123_4567_89ab_cdef), 0x2a),
        "volumes/main/log/20260101T0000/1767225600123-0123456789abcdef-000000000000002a"
    );
    // The minute of a leap day, and a time with fewer digits.
    assert_eq!(
        layout::segment("v", 1_709_251_199_999, MachineId(0), u64::MAX),
        "volumes/v/log/20240229T2359/1709251199999-0000000000000000-ffffffffffffffff"
    );
    assert_eq!(
        layout::segment("v", 7, MachineId(1), 0),
        "volumes/v/log/19700101T0000/0000000000007-0000000000000001-0000000000000000"
    );
}
