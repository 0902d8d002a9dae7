//! Pins the bytes of what machines tell of the names that they use: they are in buckets.

use casmount::{
    base::id::MachineId,
    namespace::touch::format::{ExpiryJson, Told, mark},
    tier::{TierError, layout},
};

#[test]
fn a_path_has_this_mark() {
    // The first 40 bits of what sha256sum(1) says.
    assert_eq!(mark(b"ac/00/x"), MARKS[1]);
    assert_eq!(mark(b"d"), MARKS[0]);
}

const MARKS: [u64; 2] = [0x18_ac3e_7343, 0xca_d795_4e61];

#[test]
fn what_is_told_has_these_bytes() {
    let told = Told::new(
        1_767_225_600_000,
        93_600_000,
        vec![0x18_ac3e_7343, 5, 0xff_ffff_ffff, 0x84],
    );
    let mut bytes = b"casmtch\x01".to_vec();
    bytes.extend(1_767_225_600_000_u64.to_le_bytes());
    bytes.extend(93_600_000_u64.to_le_bytes());
    bytes.extend(4_u64.to_le_bytes());
    bytes.extend([5]);
    bytes.extend([0x7f]);
    bytes.extend(varint(0x18_ac3e_7343 - 0x84));
    bytes.extend(varint(0xff_ffff_ffff - 0x18_ac3e_7343));
    let sum = casmount::base::digest::Digest::of(&bytes);
    bytes.extend(sum.as_bytes());
    assert_eq!(told.encode(), bytes);
    assert_eq!(Told::decode("k", &bytes).unwrap(), told);
    assert_eq!(told.marks(), [5, 0x84, 0x18_ac3e_7343, 0xff_ffff_ffff]);
    bytes[7] = 2;
    assert!(matches!(
        Told::decode("k", &bytes),
        Err(TierError::Unsupported { .. })
    ));
}

/// As in protobuf.
fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number > 0x7f {
        bytes.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

#[test]
fn the_settings_have_these_bytes() {
    let settings = ExpiryJson::new(1_767_225_600_000, 2_592_000_000);
    let text =
        "{\n  \"version\": 1,\n  \"since_millis\": 1767225600000,\n  \"expire_millis\": 2592000000\n}\n";
    assert_eq!(String::from_utf8(settings.encode()).unwrap(), text);
    assert_eq!(ExpiryJson::decode("main", text.as_bytes()).unwrap(), settings);
    let later = text.replace("\"since", "\"new\": 7, \"since");
    assert_eq!(ExpiryJson::decode("main", later.as_bytes()).unwrap(), settings);
    let newer = text.replace("\"version\": 1", "\"version\": 2");
    assert!(matches!(
        ExpiryJson::decode("main", newer.as_bytes()),
        Err(TierError::Unsupported { .. })
    ));
    for wrong in ["", "{}", "{\"version\": 1}", &text.replace("2592000000", "0")] {
        assert!(ExpiryJson::decode("main", wrong.as_bytes()).is_err(), "{wrong}");
    }
}

#[test]
fn the_keys_are_these() {
    assert_eq!(layout::expiry("main"), "volumes/main/touched/expire.json");
    assert_eq!(
        layout::touched("main", 1_767_225_600_000, MachineId(0xab), 0xcd),
        "volumes/main/touched/20260101/1767225600000-00000000000000ab-00000000000000cd"
    );
}
