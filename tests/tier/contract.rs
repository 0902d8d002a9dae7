//! What holds for every bucket.

use bytes::Bytes;
use casmount::{
    base::digest::Digest,
    tier::{Body, Bucket, Etag, Put, SharedBucket, TierError, body},
};

use super::Fixture;

const MAX: u64 = 4 << 20;

/// Bytes that do not compress and are the same in every run.
fn noise(len: usize) -> Bytes {
    let mut bytes = Vec::with_capacity(len + 32);
    let mut block = Digest::EMPTY;
    while bytes.len() < len {
        block = Digest::of(block.as_bytes());
        bytes.extend_from_slice(block.as_bytes());
    }
    bytes.truncate(len);
    bytes.into()
}

async fn read(bucket: &dyn Bucket, key: &str) -> Option<Bytes> {
    let object = bucket.get(key, None, MAX).await.unwrap();
    object.map(|object| object.bytes)
}

async fn create(bucket: &dyn Bucket, key: &str, bytes: impl Into<Bytes>) -> Etag {
    match bucket.put_new(key, Body::raw(bytes)).await.unwrap() {
        Put::Written(etag) => etag,
        Put::Refused => panic!("{key} exists"),
    }
}

async fn keys(bucket: &dyn Bucket, prefix: &str, after: Option<&str>) -> Vec<String> {
    let page = bucket.list(prefix, after).await.unwrap();
    assert!(!page.more);
    page.objects.into_iter().map(|object| object.key).collect()
}

async fn absence_is_a_value(bucket: SharedBucket) {
    assert!(read(&*bucket, "a/b").await.is_none());
    assert!(bucket.get("a/b", Some(0..1), MAX).await.unwrap().is_none());
    assert!(bucket.head("a/b").await.unwrap().is_none());
    assert!(keys(&*bucket, "", None).await.is_empty());
    bucket.delete("a/b").await.unwrap();
    let replaced = bucket
        .put_if("a/b", Body::raw("x"), &Etag("\"none\"".into()))
        .await;
    assert_eq!(replaced.unwrap(), Put::Refused);
    // What lies on the way to an object is none, and nothing lies below one.
    create(&*bucket, "a/b/c", "x").await;
    assert!(read(&*bucket, "a/b").await.is_none());
    assert!(bucket.head("a/b").await.unwrap().is_none());
    assert!(read(&*bucket, "a/b/c/d").await.is_none());
    assert!(keys(&*bucket, "a/b/c/", None).await.is_empty());
}

async fn what_was_written_is_read_back(bucket: SharedBucket) {
    for (key, bytes) in [
        ("empty", Bytes::new()),
        ("small", Bytes::from_static(b"abc")),
        ("deep/er/big", noise(2 << 20)),
    ] {
        create(&*bucket, key, bytes.clone()).await;
        let object = bucket.get(key, None, MAX).await.unwrap().unwrap();
        assert_eq!(object.bytes, bytes, "{key}");
        assert_eq!(object.transferred_bytes, bytes.len() as u64);
        let meta = bucket.head(key).await.unwrap().unwrap();
        assert_eq!((meta.key.as_str(), meta.size), (key, bytes.len() as u64));
        let age = casmount::base::clock::local_millis().abs_diff(meta.modified_millis);
        assert!(age < 60_000, "{key} is {age} ms old");
    }
}

async fn one_of_many_creators_wins(bucket: SharedBucket) {
    for round in 0..4 {
        let key = format!("race/{round}");
        let writers: Vec<_> = (0..16)
            .map(|writer| {
                let (bucket, key) = (bucket.clone(), key.clone());
                tokio::spawn(async move {
                    let put = bucket.put_new(&key, Body::raw(format!("writer {writer}"))).await;
                    (writer, put.unwrap())
                })
            })
            .collect();
        let mut winners = Vec::new();
        for writer in writers {
            let (writer, put) = writer.await.unwrap();
            if put != Put::Refused {
                winners.push(writer);
            }
        }
        assert_eq!(winners.len(), 1, "{winners:?} won");
        let expected = format!("writer {}", winners[0]);
        assert_eq!(read(&*bucket, &key).await.unwrap(), expected);
    }
}

async fn only_the_known_version_is_replaced(bucket: SharedBucket) {
    let first = create(&*bucket, "head.json", "1").await;
    let object = bucket.get("head.json", None, MAX).await.unwrap().unwrap();
    assert_eq!(object.etag, first, "a write and a read name the same version");
    let put = bucket.put_if("head.json", Body::raw("2"), &first).await.unwrap();
    let Put::Written(second) = put else {
        panic!("the version was right")
    };
    assert_ne!(first, second);
    let stale = bucket.put_if("head.json", Body::raw("3"), &first).await;
    assert_eq!(stale.unwrap(), Put::Refused);
    assert_eq!(read(&*bucket, "head.json").await.unwrap(), "2");
    let again = bucket.put_new("head.json", Body::raw("4")).await;
    assert_eq!(again.unwrap(), Put::Refused);
    // The version of an object too large to be hashed each time.
    let large = create(&*bucket, "large", noise(200_000)).await;
    let put = bucket.put_if("large", Body::raw(noise(100_000)), &large).await;
    assert_ne!(put.unwrap(), Put::Refused);
    let stale = bucket.put_if("large", Body::raw("x"), &large).await;
    assert_eq!(stale.unwrap(), Put::Refused);
    assert_eq!(read(&*bucket, "large").await.unwrap().len(), 100_000);
}

async fn of_many_replacers_one_at_a_time_wins(bucket: SharedBucket) {
    create(&*bucket, "counter", "0").await;
    let writers: Vec<_> = (0..8)
        .map(|_| {
            let bucket = bucket.clone();
            tokio::spawn(async move {
                let mut wins = 0;
                for _ in 0..200 {
                    if wins == 5 {
                        break;
                    }
                    let object = bucket.get("counter", None, MAX).await.unwrap().unwrap();
                    let text = std::str::from_utf8(&object.bytes).unwrap();
                    let next = text.parse::<u64>().unwrap() + 1;
                    let put = bucket
                        .put_if("counter", Body::raw(next.to_string()), &object.etag)
                        .await;
                    wins += u64::from(put.unwrap() != Put::Refused);
                }
                wins
            })
        })
        .collect();
    let mut wins = 0;
    for writer in writers {
        wins += writer.await.unwrap();
    }
    assert!(wins > 0);
    let counter = read(&*bucket, "counter").await.unwrap();
    assert_eq!(counter, wins.to_string(), "each win added one");
}

async fn a_range_is_what_it_says(bucket: SharedBucket) {
    let bytes = noise(100_000);
    create(&*bucket, "ranged", bytes.clone()).await;
    for (range, expected) in [
        (0..1, 0..1),
        (10..60_000, 10..60_000),
        (0..100_000, 0..100_000),
        // Past the end there is nothing.
        (99_990..200_000, 99_990..100_000),
    ] {
        let object = bucket
            .get("ranged", Some(range.clone()), MAX)
            .await
            .unwrap()
            .unwrap();
        let expected = bytes.slice(expected);
        assert_eq!(object.bytes, expected, "{range:?}");
        assert_eq!(object.transferred_bytes, expected.len() as u64);
    }
    for range in [100_000..100_001, 5..5] {
        let error = bucket.get("ranged", Some(range), MAX).await.unwrap_err();
        assert!(matches!(error, TierError::Malformed { .. }), "{error}");
    }
}

async fn a_listing_is_in_the_order_of_bytes(bucket: SharedBucket) {
    // '-' and '.' sort before '/', digits behind it.
    let mut names = [
        "a", "b-c", "b.c", "b/1", "b/2/x", "b/2-", "b0", "c/d/e", "é", "z/é",
    ];
    for name in names {
        create(&*bucket, name, "x").await;
    }
    names.sort_unstable();
    assert_eq!(keys(&*bucket, "", None).await, names);
    assert_eq!(
        keys(&*bucket, "b", Some("b.c")).await,
        ["b/1", "b/2-", "b/2/x", "b0"]
    );
    assert_eq!(keys(&*bucket, "b/", None).await, ["b/1", "b/2-", "b/2/x"]);
    assert_eq!(keys(&*bucket, "b/2", Some("b/2-")).await, ["b/2/x"]);
    // Behind what does not exist, too.
    assert_eq!(
        keys(&*bucket, "", Some("b/zzz")).await,
        ["b0", "c/d/e", "z/é", "é"]
    );
    assert!(keys(&*bucket, "b/", Some("c")).await.is_empty());
    assert!(keys(&*bucket, "none/at/all", None).await.is_empty());
}

async fn a_long_listing_comes_in_pages(bucket: SharedBucket) {
    let mut names: Vec<_> = (0..1150)
        .map(|n| format!("log/{:02}/{n:05}", n * 7 % 13))
        .collect();
    let mut writers = tokio::task::JoinSet::new();
    for part in names.chunks(100) {
        let (bucket, part) = (bucket.clone(), part.to_vec());
        writers.spawn(async move {
            for name in part {
                create(&*bucket, &name, "x").await;
            }
        });
    }
    create(&*bucket, "logs", "x").await;
    writers.join_all().await;
    names.sort_unstable();
    let first = bucket.list("log/", None).await.unwrap();
    assert_eq!(first.objects.len(), 1000);
    assert!(first.more);
    let last = &first.objects[999].key;
    let second = bucket.list("log/", Some(last)).await.unwrap();
    assert!(!second.more);
    let listed: Vec<_> = first
        .objects
        .iter()
        .chain(&second.objects)
        .map(|object| object.key.clone())
        .collect();
    assert_eq!(listed, names);
    assert!(first.objects.iter().all(|object| object.size == 1));
}

async fn what_was_deleted_is_gone_and_can_be_made_again(bucket: SharedBucket) {
    create(&*bucket, "x/y/z", "1").await;
    create(&*bucket, "x/a", "1").await;
    bucket.delete("x/y/z").await.unwrap();
    bucket.delete("x/y/z").await.unwrap();
    // No object has this name.
    bucket.delete("x").await.unwrap();
    assert!(read(&*bucket, "x/y/z").await.is_none());
    assert_eq!(keys(&*bucket, "", None).await, ["x/a"]);
    create(&*bucket, "x/y/z", "2").await;
    assert_eq!(read(&*bucket, "x/y/z").await.unwrap(), "2");
}

async fn a_refreshed_object_is_the_same_and_young(bucket: SharedBucket) {
    let raw = Bytes::from(b"all work and no play ".repeat(2000));
    let key = "a b/+ü/packed";
    bucket
        .put_new(key, body::encode(raw.clone(), true))
        .await
        .unwrap();
    let written = bucket.head(key).await.unwrap().unwrap();
    let mut refreshed = written.clone();
    // Times of S3 have whole seconds.
    for _ in 0..400 {
        assert!(bucket.refresh(key).await.unwrap());
        refreshed = bucket.head(key).await.unwrap().unwrap();
        if refreshed.modified_millis > written.modified_millis {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(refreshed.modified_millis > written.modified_millis);
    assert_eq!(refreshed.size, written.size);
    let object = bucket.get(key, None, MAX).await.unwrap().unwrap();
    assert_eq!(
        (object.bytes, object.modified_millis),
        (raw, refreshed.modified_millis)
    );
    assert!(!bucket.refresh("absent").await.unwrap());
    assert!(bucket.head("absent").await.unwrap().is_none());
}

async fn many_are_deleted_at_once(bucket: SharedBucket) {
    let names: Vec<_> = (0..30).map(|n| format!("x/{:02}/{n}", n % 7)).collect();
    for name in &names {
        create(&*bucket, name, "1").await;
    }
    create(&*bucket, "x/kept", "1").await;
    let mut batch = names;
    batch.push("x/absent".to_owned());
    for _ in 0..2 {
        bucket.delete_many(&batch).await.unwrap();
        assert_eq!(keys(&*bucket, "", None).await, ["x/kept"]);
    }
    bucket.delete_many(&[]).await.unwrap();
}

async fn a_packed_body_is_read_unpacked_and_within_its_bound(bucket: SharedBucket) {
    let raw = Bytes::from(b"all work and no play ".repeat(20_000));
    let packed = body::encode(raw.clone(), true);
    assert!(packed.zstd);
    bucket.put_new("packed", packed.clone()).await.unwrap();
    let object = bucket.get("packed", None, MAX).await.unwrap().unwrap();
    assert_eq!(object.bytes, raw);
    if bucket.compresses() {
        assert_eq!(object.transferred_bytes, packed.bytes.len() as u64);
    }
    bucket.put_new("raw", Body::raw(raw.slice(..5000))).await.unwrap();
    for (key, bound) in [("packed", raw.len() as u64 - 1), ("raw", 4999)] {
        let error = bucket.get(key, None, bound).await.unwrap_err();
        assert!(matches!(error, TierError::Malformed { .. }), "{key}: {error}");
    }
    assert_eq!(
        bucket.get("raw", None, 5000).await.unwrap().unwrap().bytes.len(),
        5000
    );
}

async fn the_clock_is_known_after_a_write(bucket: SharedBucket) {
    create(&*bucket, "x", "x").await;
    let offset = bucket.clock().offset_millis();
    assert!(offset.abs() < 2000, "one machine has one clock, not {offset} ms");
}

macro_rules! on_every_bucket {
    ($($name:ident)*) => {
        mod s3 {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let fixture = super::Fixture::s3().await;
                super::$name(fixture.bucket.clone()).await;
            })*
        }
        mod dir {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let fixture = super::Fixture::dir().await;
                super::$name(fixture.bucket.clone()).await;
            })*
        }
    };
}

on_every_bucket! {
    absence_is_a_value
    what_was_written_is_read_back
    one_of_many_creators_wins
    only_the_known_version_is_replaced
    of_many_replacers_one_at_a_time_wins
    a_range_is_what_it_says
    a_listing_is_in_the_order_of_bytes
    a_long_listing_comes_in_pages
    what_was_deleted_is_gone_and_can_be_made_again
    many_are_deleted_at_once
    a_refreshed_object_is_the_same_and_young
    a_packed_body_is_read_unpacked_and_within_its_bound
    the_clock_is_known_after_a_write
}
