//! What a store is asked when it is first used.

use std::time::Duration;

use casmount::{
    base::id::{MachineId, StoreId},
    tier::{
        Body, TierError, layout, lifetime,
        probe::{IfAbsent, ProbeMode, StoreJson, open_store, probe},
        url::{ConnectOptions, connect},
    },
};

use super::{Fixture, connect_to, s3server::Faults};

/// Written by version 0.1.0; a change needs a new format version.
const GOLDEN: &str = r#"{
  "format": 1,
  "store": "000102030405060708090a0b0c0d0e0f",
  "chunking": {
    "algorithm": "fastcdc-2020",
    "normalization": 2,
    "seed": 0,
    "min": 131072,
    "average": 524288,
    "max": 2097152
  },
  "created_by": "casmount 0.1.0"
}
"#;

const ID: StoreId = StoreId(0x0001_0203_0405_0607_0809_0a0b_0c0d_0e0f);

#[test]
fn casmount_json_is_written_as_it_always_was() {
    let mut store = StoreJson::new(ID);
    store.created_by = "casmount 0.1.0".to_owned();
    assert_eq!(String::from_utf8(store.encode()).unwrap(), GOLDEN);
    assert_eq!(StoreJson::decode(GOLDEN.as_bytes(), "s3://b").unwrap(), store);
}

#[test]
fn a_store_whose_blobs_have_a_lifetime_is_of_a_format_of_its_own() {
    let text = GOLDEN
        .replace("\"format\": 1", "\"format\": 2")
        .replace("0.1.0\"\n}", "0.1.0\",\n  \"lifetime_millis\": 2592000000\n}");
    let store = StoreJson::decode(text.as_bytes(), "s3://b").unwrap();
    assert_eq!(store.lifetime(), Some(Duration::from_secs(30 * 24 * 3600)));
    assert_eq!(String::from_utf8(store.encode()).unwrap(), text);
    assert_eq!(
        StoreJson::decode(GOLDEN.as_bytes(), "s3://b").unwrap().lifetime(),
        None
    );
    // Who said it, if that was noted.
    let text = text.replace("000\n}", "000,\n  \"lifetime_by\": \"0123456789abcdef\"\n}");
    let store = StoreJson::decode(text.as_bytes(), "s3://b").unwrap();
    assert_eq!(store.lifetime_by.as_deref(), Some("0123456789abcdef"));
    assert_eq!(String::from_utf8(store.encode()).unwrap(), text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_those_who_say_one_lifetime_at_once_each_knows_whether_the_store_has_his_words() {
    let month = Some(Duration::from_secs(30 * 24 * 3600));
    for fixture in [Fixture::s3().await, Fixture::dir().await] {
        open_store(&*fixture.bucket, IfAbsent::Create).await.unwrap();
        for _ in 0..10 {
            let sayers: Vec<_> = (0..8)
                .map(|_| {
                    let bucket = fixture.bucket.clone();
                    tokio::spawn(async move { lifetime::say(&*bucket, month).await })
                })
                .collect();
            let mut said = Vec::new();
            for sayer in sayers {
                match sayer.await.unwrap() {
                    Ok(by) => said.push(by),
                    Err(err) => assert!(err.to_string().contains(layout::STORE), "{err}"),
                }
            }
            let object = fixture.bucket.get(layout::STORE, None, 10_000).await.unwrap();
            let bytes = object.unwrap().bytes;
            let (last, others): (Vec<_>, Vec<_>) = said.iter().partition(|by| by.is_said_by(&bytes));
            assert_eq!(last.len(), 1, "{said:?}");
            for other in others {
                lifetime::take_back(&*fixture.bucket, other).await.unwrap();
                assert_eq!(lifetime::read(&*fixture.bucket).await.unwrap(), month);
            }
            lifetime::say(&*fixture.bucket, None).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_lifetime_is_set_and_taken_back() {
    for fixture in [Fixture::s3().await, Fixture::dir().await] {
        let bucket = &*fixture.bucket;
        let first = open_store(bucket, IfAbsent::Create).await.unwrap();
        let before = bucket
            .get(layout::STORE, None, 10_000)
            .await
            .unwrap()
            .unwrap()
            .bytes;
        let month = Some(Duration::from_secs(30 * 24 * 3600));
        for lifetime in [month, month, None] {
            lifetime::say(bucket, lifetime).await.unwrap();
            assert_eq!(lifetime::read(bucket).await.unwrap(), lifetime);
            let opened = open_store(bucket, IfAbsent::Refuse).await.unwrap();
            assert_eq!((opened.id, opened.lifetime), (first.id, lifetime));
        }
        let after = bucket
            .get(layout::STORE, None, 10_000)
            .await
            .unwrap()
            .unwrap()
            .bytes;
        assert_eq!(after, before);
    }
}

#[test]
fn members_that_are_not_known_are_ignored() {
    let text = GOLDEN.replace("\"format\": 1,", "\"format\": 1, \"packs\": true,");
    assert_eq!(StoreJson::decode(text.as_bytes(), "s3://b").unwrap().store, ID);
}

#[test]
fn other_stores_are_refused_with_a_clear_line() {
    let newer = "{\"format\": 3, \"store\": [\"another\", \"form\"]}".to_owned();
    let other_chunks = GOLDEN.replace("524288", "1048576");
    for (text, reason) in [
        (newer, "a newer casmount is needed"),
        (other_chunks, "cuts blobs in another way"),
        ("hello".to_owned(), "malformed"),
        ("{}".to_owned(), "format"),
    ] {
        let error = StoreJson::decode(text.as_bytes(), "s3://b").unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
        assert!(!error.is_transient());
    }
}

#[tokio::test]
async fn a_store_keeps_its_id() {
    for fixture in [Fixture::s3().await, Fixture::dir().await] {
        let first = open_store(&*fixture.bucket, IfAbsent::Create).await.unwrap();
        assert!(first.created);
        assert!(first.warnings.is_empty(), "{:?}", first.warnings);
        let second = open_store(&*fixture.bucket, IfAbsent::Refuse).await.unwrap();
        assert!(!second.created);
        assert_eq!(first.id, second.id);
        let left = fixture.bucket.list("", None).await.unwrap().objects;
        assert_eq!(left.len(), 1, "the probe leaves nothing");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_makers_of_a_store_get_one_id() {
    for fixture in [Fixture::s3().await, Fixture::dir().await] {
        let makers: Vec<_> = (0..8)
            .map(|_| {
                let bucket = fixture.bucket.clone();
                tokio::spawn(async move { open_store(&*bucket, IfAbsent::Create).await.unwrap() })
            })
            .collect();
        let mut facts = Vec::new();
        for maker in makers {
            facts.push(maker.await.unwrap());
        }
        assert!(facts.iter().all(|fact| fact.id == facts[0].id));
        assert_eq!(facts.iter().filter(|fact| fact.created).count(), 1);
    }
}

#[tokio::test]
async fn the_maker_knows_its_store_though_the_reply_was_lost() {
    let fixture = Fixture::s3().await;
    fixture.server().set_faults(Faults {
        lost_reply: 1.0,
        only: vec!["PutObject".to_owned()],
        ..Faults::default()
    });
    let lost = open_store(&*fixture.bucket, IfAbsent::Create).await;
    fixture.server().set_faults(Faults::default());
    let facts = open_store(&*fixture.bucket, IfAbsent::Create).await.unwrap();
    if let Ok(lost) = lost {
        assert_eq!(lost.id, facts.id);
    }
    assert!(!facts.created);
}

#[tokio::test]
async fn looking_does_not_make_a_store() {
    let fixture = Fixture::s3().await;
    let refused = open_store(&*fixture.bucket, IfAbsent::Refuse).await;
    assert!(matches!(refused, Err(TierError::Unsupported { .. })));
    let report = probe(&*fixture.bucket, MachineId(1), ProbeMode::ReadOnly)
        .await
        .unwrap();
    assert_eq!((report.can_write, report.conditional_create), (None, None));
    assert!(report.findings().is_empty());
    assert!(fixture.server().objects().is_empty());
    assert_eq!(fixture.server().counts().of("PutObject"), 0);
}

#[tokio::test]
async fn a_newer_store_is_refused_and_left_alone() {
    let fixture = Fixture::s3().await;
    let newer = "{\"format\":9}";
    fixture
        .bucket
        .put_new(layout::STORE, Body::raw(newer))
        .await
        .unwrap();
    let error = open_store(&*fixture.bucket, IfAbsent::Create).await.unwrap_err();
    assert!(error.to_string().contains("format 9"), "{error}");
    let kept = fixture.server().object("team/ci/casmount.json").unwrap();
    assert_eq!(kept, newer.as_bytes());
}

#[tokio::test]
async fn a_directory_is_made_with_the_store_but_not_its_parents() {
    let dir = tempfile::tempdir().unwrap();
    for (path, made) in [("store", true), ("no/such/store", false)] {
        let root = dir.path().join(path);
        let url = format!("file://{}", root.display()).parse().unwrap();
        let bucket = connect(&url, &ConnectOptions::default()).await.unwrap();
        let opened = open_store(&*bucket, IfAbsent::Create).await;
        assert_eq!(opened.is_ok(), made, "{opened:?}");
        assert_eq!(root.exists(), made);
        if let Err(error) = opened {
            assert!(matches!(error, TierError::NoBucket { .. }), "{error}");
        }
    }
}

#[tokio::test]
async fn a_good_server_has_no_findings_and_keeps_nothing() {
    for fixture in [Fixture::s3().await, Fixture::dir().await] {
        let report = probe(&*fixture.bucket, MachineId(1), ProbeMode::ReadWrite)
            .await
            .unwrap();
        assert_eq!(report.conditional_create, Some(true));
        assert_eq!(report.conditional_replace, Some(true));
        assert_eq!((report.can_write, report.can_delete), (Some(true), Some(true)));
        assert!(report.findings().is_empty(), "{:?}", report.findings());
        assert!(fixture.bucket.list("", None).await.unwrap().objects.is_empty());
    }
}

#[tokio::test]
async fn each_fault_of_a_server_is_found_and_named() {
    let faults = Faults::default;
    let forbid = |name: &str| Faults {
        forbidden: vec![name.to_owned()],
        ..faults()
    };
    for (faults, fatal, named) in [
        (
            Faults {
                ignore_conditions: true,
                ..faults()
            },
            false,
            &["If-None-Match", "If-Match"][..],
        ),
        (
            Faults {
                missing_is_403: true,
                ..faults()
            },
            true,
            &["s3:ListBucket"],
        ),
        (forbid("ListObjectsV2"), true, &["s3:ListBucket"]),
        (forbid("PutObject"), true, &["s3:PutObject"]),
        (forbid("DeleteObject"), false, &["s3:DeleteObject"]),
        (
            Faults {
                date_skew_secs: 7200,
                ..faults()
            },
            false,
            &["s behind that of s3://"],
        ),
    ] {
        let fixture = Fixture::s3().await;
        fixture.server().set_faults(faults);
        let report = probe(&*fixture.bucket, MachineId(1), ProbeMode::ReadWrite)
            .await
            .unwrap();
        let findings = report.findings();
        assert_eq!(findings.len(), named.len(), "{findings:?}");
        for (finding, name) in findings.iter().zip(named) {
            assert!(finding.text.contains(name), "{findings:?}");
            assert_eq!(finding.fatal, fatal, "{findings:?}");
        }
    }
}

#[tokio::test]
async fn without_the_permission_to_list_the_error_says_so() {
    let fixture = Fixture::s3().await;
    fixture.server().set_faults(Faults {
        missing_is_403: true,
        forbidden: vec!["ListObjectsV2".to_owned()],
        ..Faults::default()
    });
    let error = open_store(&*fixture.bucket, IfAbsent::Create).await.unwrap_err();
    assert!(error.to_string().contains("s3:ListBucket"), "{error}");
}

#[tokio::test]
async fn a_server_without_conditions_can_still_be_a_store() {
    let fixture = Fixture::s3().await;
    fixture.server().set_faults(Faults {
        ignore_conditions: true,
        ..Faults::default()
    });
    let made = open_store(&*fixture.bucket, IfAbsent::Create).await.unwrap();
    assert!(made.created);
    assert!(made.warnings[0].contains("If-None-Match"), "{:?}", made.warnings);
    let again = connect_to(fixture.server(), &fixture.bucket.url()).await.unwrap();
    let found = open_store(&*again, IfAbsent::Create).await.unwrap();
    assert_eq!(found.id, made.id);
}
