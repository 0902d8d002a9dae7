//! What `volume.json` says, and stacks that are read from it.

use super::*;

fn name(text: &str) -> VolumeName {
    text.parse().unwrap()
}

#[test]
fn the_object_is_written_as_ever() {
    let live = VolumeJson {
        version: VERSION,
        parent: Some(StackLayer::live(name("main"))),
        own_prefix: false,
        bases: BTreeMap::new(),
        created_millis: 1_767_225_600_000,
        deleted_millis: None,
        deletion_undecided: false,
        presets: BTreeMap::new(),
    };
    let text = "{\n  \"version\": 1,\n  \"parent\": {\n    \"volume\": \"main\"\n  },\n  \
                \"created_millis\": 1767225600000\n}\n";
    assert_eq!(String::from_utf8(live.encode()).unwrap(), text);
    assert_eq!(VolumeJson::decode(&name("f"), text.as_bytes()).unwrap(), live);
    let text = text.replace("\"main\"\n", "\"main\",\n    \"until_millis\": 7\n");
    let bounded = VolumeJson::decode(&name("f"), text.as_bytes()).unwrap();
    assert_eq!(bounded.parent.as_ref().unwrap().until_millis, Some(7));
    assert_eq!(String::from_utf8(bounded.encode()).unwrap(), text);
    let text = text.replace(
        "00000\n}",
        "00000,\n  \"presets\": {\n    \"\": \"plain\",\n    \"cache\": \"bazel\"\n  }\n}",
    );
    let preset = VolumeJson::decode(&name("f"), text.as_bytes()).unwrap();
    assert_eq!(preset.presets["cache"], "bazel");
    assert_eq!(String::from_utf8(preset.encode()).unwrap(), text);
    let based = VolumeJson {
        bases: BTreeMap::from([
            (
                name("main"),
                Base {
                    catalog: Some(crate::base::digest::Digest::of(b"x")),
                    watermark_millis: 5,
                },
            ),
            (name("other"), Base::default()),
        ]),
        ..live.clone()
    };
    let text = "{\n  \"version\": 1,\n  \"parent\": {\n    \"volume\": \"main\"\n  },\n  \"bases\": {\n    \
                \"main\": {\n      \"catalog\": \
                \"2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881\",\n      \
                \"watermark_millis\": 5\n    },\n    \"other\": {}\n  },\n  \"created_millis\": \
                1767225600000\n}\n";
    assert_eq!(String::from_utf8(based.encode()).unwrap(), text);
    assert_eq!(VolumeJson::decode(&name("f"), text.as_bytes()).unwrap(), based);
    let deleted = VolumeJson {
        own_prefix: true,
        deleted_millis: Some(9),
        ..live.clone()
    };
    let text = "{\n  \"version\": 1,\n  \"parent\": {\n    \"volume\": \"main\"\n  },\n  \
                \"own_prefix\": true,\n  \"created_millis\": 1767225600000,\n  \"deleted_millis\": 9\n}\n";
    assert_eq!(String::from_utf8(deleted.encode()).unwrap(), text);
    assert_eq!(VolumeJson::decode(&name("f"), text.as_bytes()).unwrap(), deleted);
    let undecided = VolumeJson {
        deletion_undecided: true,
        ..deleted
    };
    let text = text.replace("\": 9\n", "\": 9,\n  \"deletion_undecided\": true\n");
    assert_eq!(String::from_utf8(undecided.encode()).unwrap(), text);
    assert_eq!(
        VolumeJson::decode(&name("f"), text.as_bytes()).unwrap(),
        undecided
    );
}

#[test]
fn a_newer_version_is_told_from_damage() {
    let decode = |text: &str| VolumeJson::decode(&name("f"), text.as_bytes()).unwrap_err();
    let newer = decode(r#"{"version": 2, "layers": []}"#).to_string();
    assert!(newer.contains("newer casmount (volume.json version 2"), "{newer}");
    for text in [
        "",
        "[]",
        r#"{"version": 1}"#,
        r#"{"version": 1, "created_millis": 1, "parent": {"volume": "../main"}}"#,
    ] {
        let err = decode(text);
        assert!(matches!(err, StackError::Malformed { .. }), "{text}: {err}");
        assert!(
            err.to_string().starts_with("volumes/f/volume.json is damaged ("),
            "{err}"
        );
    }
    // What a newer program of this version adds is ignored.
    VolumeJson::decode(
        &name("f"),
        br#"{"version": 1, "created_millis": 1, "preset": "bazel"}"#,
    )
    .unwrap();
}
