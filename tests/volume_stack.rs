//! What lies below a volume, as `volume.json` says it: read, made, refused.

use casmount::{
    base::{
        id::MachineId,
        volume::{StackLayer, VolumeName},
    },
    namespace::{
        stack::{self, ForkPoint, StackError, Standing, VolumeJson},
        volumes::{self, DeleteError},
    },
    tier::{
        Body, SharedBucket, layout,
        probe::{self, IfAbsent},
        url::{ConnectOptions, connect},
    },
};

struct Store {
    bucket: SharedBucket,
    _dir: tempfile::TempDir,
}

impl Store {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}", dir.path().display()).parse().unwrap();
        let bucket = connect(&url, &ConnectOptions::default()).await.unwrap();
        // So that its clock is known.
        probe::open_store(bucket.as_ref(), IfAbsent::Create)
            .await
            .unwrap();
        Self { bucket, _dir: dir }
    }

    async fn put(&self, key: &str, bytes: impl Into<Vec<u8>>) {
        self.bucket.put_new(key, Body::raw(bytes.into())).await.unwrap();
    }

    /// Makes a volume that is no fork.
    async fn plain(&self, volume: &str, millis: u64) {
        self.put(
            &layout::segment(volume, millis, MachineId(1), 1),
            *b"not read here",
        )
        .await;
    }

    /// Makes `volume.json` by hand.
    async fn over(&self, volume: &str, parent: &str, until_millis: Option<u64>) {
        let json = VolumeJson {
            presets: std::collections::BTreeMap::new(),
            version: 1,
            parent: Some(StackLayer {
                until_millis,
                ..StackLayer::live(name(parent))
            }),
            own_prefix: false,
            bases: std::collections::BTreeMap::new(),
            created_millis: 1,
            deleted_millis: None,
            deletion_undecided: false,
        };
        self.put(&layout::volume(volume), json.encode()).await;
    }

    async fn read(&self, volume: &str) -> Result<Vec<(String, Option<u64>)>, StackError> {
        let stack = stack::read(self.bucket.as_ref(), &name(volume)).await?;
        let layers = stack.layers().iter();
        Ok(layers
            .map(|layer| (layer.volume.to_string(), layer.until_millis))
            .collect())
    }

    async fn fork(&self, volume: &str, from: &str, point: ForkPoint) -> Result<VolumeJson, StackError> {
        stack::create_fork(self.bucket.as_ref(), &name(volume), &name(from), point, false).await
    }
}

fn name(text: &str) -> VolumeName {
    text.parse().unwrap()
}

fn layers(layers: &[(&str, Option<u64>)]) -> Vec<(String, Option<u64>)> {
    layers
        .iter()
        .map(|(volume, until)| ((*volume).to_owned(), *until))
        .collect()
}

#[tokio::test]
async fn a_volume_lies_over_its_parent_and_over_all_below_that() {
    let store = Store::new().await;
    assert_eq!(store.read("new").await.unwrap(), layers(&[("new", None)]));
    store.plain("main", 1000).await;
    assert_eq!(store.read("main").await.unwrap(), layers(&[("main", None)]));
    store.fork("a", "main", ForkPoint::Live).await.unwrap();
    store.fork("b", "a", ForkPoint::Live).await.unwrap();
    assert_eq!(
        store.read("b").await.unwrap(),
        layers(&[("b", None), ("a", None), ("main", None)])
    );
}

#[tokio::test]
async fn no_layer_is_seen_for_longer_than_the_one_that_leads_to_it() {
    let store = Store::new().await;
    store.plain("main", 1000).await;
    store.over("a", "main", None).await;
    store.over("b", "a", Some(700)).await;
    store.over("c", "b", Some(900)).await;
    let expected = [
        ("c", None),
        ("b", Some(900)),
        ("a", Some(700)),
        ("main", Some(700)),
    ];
    assert_eq!(store.read("c").await.unwrap(), layers(&expected));
}

#[tokio::test]
async fn a_fork_of_now_sees_all_that_was_published_whatever_the_clocks_say() {
    let store = Store::new().await;
    let now = store.bucket.clock().now_millis();
    // A machine whose clock is ahead by 30 s, and one that is odd.
    let ahead = now + 30_000;
    store.plain("main", ahead).await;
    store.over("mid", "main", None).await;
    store.plain("mid", now + 3_600_000).await;
    let made = store.fork("f", "mid", ForkPoint::Now).await.unwrap();
    assert_eq!(made.parent.unwrap().until_millis, Some(ahead));
    let live = store.fork("l", "mid", ForkPoint::Live).await.unwrap();
    assert_eq!(live.parent.unwrap().until_millis, None);
    assert!(live.created_millis.abs_diff(now) < 20_000);
}

#[tokio::test]
async fn a_name_that_exists_is_not_made_a_fork() {
    let store = Store::new().await;
    store.plain("main", 1000).await;
    store.plain("other", 1000).await;
    store.fork("fork", "main", ForkPoint::Live).await.unwrap();
    for taken in ["fork", "other", "main"] {
        let err = store.fork(taken, "main", ForkPoint::Live).await.unwrap_err();
        assert!(matches!(err, StackError::Exists { .. }), "{taken}: {err}");
        assert!(err.to_string().contains(taken), "{err}");
    }
    assert_eq!(
        store.read("fork").await.unwrap(),
        layers(&[("fork", None), ("main", None)])
    );
}

#[tokio::test]
async fn a_parent_that_does_not_exist_is_refused() {
    let store = Store::new().await;
    let err = store.fork("f", "missing", ForkPoint::Live).await.unwrap_err();
    assert!(matches!(err, StackError::NothingToFork { .. }), "{err}");
    assert!(err.to_string().contains("missing"), "{err}");
    assert_eq!(store.read("f").await.unwrap(), layers(&[("f", None)]));
    // One that was removed later.
    store.over("f", "gone", None).await;
    store.over("g", "f", None).await;
    let err = store.read("g").await.unwrap_err().to_string();
    assert!(
        err.starts_with("volume f is a fork of volume gone, which does not exist"),
        "{err}"
    );
}

#[tokio::test]
async fn a_circle_is_refused_in_words() {
    let store = Store::new().await;
    store.over("a", "b", None).await;
    store.over("b", "c", None).await;
    store.over("c", "b", None).await;
    let err = store.read("a").await.unwrap_err().to_string();
    assert!(
        err.starts_with("volume b lies below itself (a over b over c over b): correct volumes/c/volume.json"),
        "{err}"
    );
    store.over("self", "self", None).await;
    assert!(matches!(
        store.read("self").await.unwrap_err(),
        StackError::Cycle { .. }
    ));
}

#[tokio::test]
async fn a_stack_has_its_most_layers_and_no_more() {
    let store = Store::new().await;
    store.plain("v0", 1000).await;
    for above in 1..=8 {
        let (volume, below) = (format!("v{above}"), format!("v{}", above - 1));
        store.fork(&volume, &below, ForkPoint::Live).await.unwrap();
    }
    assert_eq!(store.read("v8").await.unwrap().len(), 9);
    let err = store.fork("v9", "v8", ForkPoint::Live).await.unwrap_err();
    assert!(matches!(err, StackError::TooDeep { .. }), "{err}");
    store.over("v9", "v8", None).await;
    let err = store.read("v9").await.unwrap_err();
    assert!(matches!(err, StackError::TooDeep { .. }), "{err}");
}

#[tokio::test]
async fn an_object_of_a_newer_version_and_a_damaged_one_are_refused_wherever_they_lie() {
    let store = Store::new().await;
    store.over("f", "new", None).await;
    store
        .put(&layout::volume("new"), *br#"{"version": 9, "parents": []}"#)
        .await;
    store.over("g", "odd", None).await;
    store.put(&layout::volume("odd"), *b"rubbish").await;
    for volume in ["f", "new"] {
        let err = store.read(volume).await.unwrap_err().to_string();
        assert!(
            err.contains("volume new was made by a newer casmount (volume.json version 9"),
            "{err}"
        );
    }
    let err = store.read("g").await.unwrap_err().to_string();
    assert!(err.contains("volumes/odd/volume.json is damaged"), "{err}");
    assert!(store.fork("h", "new", ForkPoint::Live).await.is_err());
    assert!(store.fork("h", "odd", ForkPoint::Live).await.is_err());
    assert_eq!(store.read("h").await.unwrap(), layers(&[("h", None)]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_never_deleted_below_a_fork_that_is_made_at_the_same_time() {
    let store = Store::new().await;
    store.plain("main", 1000).await;
    let (mut made_it, mut deleted_it) = (0, 0);
    for round in 0..60 {
        let (below, above) = (name(&format!("below{round}")), name(&format!("above{round}")));
        store.fork(below.as_str(), "main", ForkPoint::Live).await.unwrap();
        let making = {
            let (bucket, below, above) = (store.bucket.clone(), below.clone(), above.clone());
            tokio::spawn(async move {
                stack::create_fork(bucket.as_ref(), &above, &below, ForkPoint::Live, false).await
            })
        };
        let deleting = {
            let (bucket, below) = (store.bucket.clone(), below.clone());
            tokio::spawn(async move {
                // Later by a part of what the other one takes, so that they meet in every order.
                for _ in 0..round * 20 {
                    tokio::task::yield_now().await;
                }
                volumes::decide(&bucket, &below).await
            })
        };
        let (made, deleted) = (making.await.unwrap(), deleting.await.unwrap());
        let standing =
            async |volume: &VolumeName| stack::standing(store.bucket.as_ref(), volume).await.unwrap();
        match (made, deleted) {
            (Ok(_), Err(DeleteError::Covered { .. })) => {
                made_it += 1;
                assert_eq!(store.read(above.as_str()).await.unwrap().len(), 3);
            }
            (Err(_), Ok(_)) => {
                deleted_it += 1;
                assert_eq!(standing(&below).await, Standing::Deleted);
                assert_eq!(standing(&above).await, Standing::Absent);
            }
            // Both gave way.
            (Err(_), Err(DeleteError::Covered { .. })) => {
                assert!(matches!(standing(&below).await, Standing::Fork(..)));
                assert_eq!(standing(&above).await, Standing::Absent);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(made_it + deleted_it > 0);
}
