//! Expiries of volumes in a directory, with a clock that is turned by hand.

use std::{path::PathBuf, sync::Arc, time::Duration};

use super::*;
use crate::{
    base::{clock::Stamp, digest::Digest, id::MachineId, volume::StackLayer},
    namespace::{
        catalog::{
            compact::{self, CompactOptions},
            read,
        },
        change::{Entry, EntryBlob, EntryChunks, Item},
        stack::{self, ForkPoint},
        touch::format::Told,
        view,
    },
    store::rows::NodeKind,
    tier::url::{ConnectOptions, connect},
};

const HOUR: u64 = 3_600_000;
const DAY: u64 = 24 * HOUR;
const MONTH: u64 = 30 * DAY;

struct Store {
    dir: tempfile::TempDir,
    bucket: SharedBucket,
    volume: VolumeName,
    now: u64,
}

fn entry(kind: NodeKind) -> Entry {
    let blob = (kind == NodeKind::File).then(|| EntryBlob {
        digest: Digest::of(b"x"),
        size: 1000,
        chunks: EntryChunks::Single,
        places: Vec::new(),
    });
    Entry {
        blob,
        ..Entry::new(kind, 0o644)
    }
}

fn change(path: &str, millis: u64, entry: Option<Entry>) -> PathChange {
    PathChange {
        path: path.into(),
        stamp: Stamp {
            millis,
            counter: 0,
            machine: MachineId(7),
        },
        entry,
    }
}

impl Store {
    /// A store in which it is known for two months what is used.
    async fn new() -> Self {
        let store = Self::unasked().await;
        store.put(
            &layout::expiry("main"),
            &ExpiryJson::new(store.now - 2 * MONTH, MONTH).encode(),
        );
        store
    }

    async fn unasked() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}", dir.path().display());
        let bucket = connect(&url.parse().unwrap(), &ConnectOptions::default())
            .await
            .unwrap();
        let now = bucket.clock().now_millis();
        Self {
            dir,
            bucket,
            volume: "main".parse().unwrap(),
            now,
        }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.path().join(key)
    }

    fn put(&self, key: &str, bytes: &[u8]) {
        let path = self.path(key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    async fn write(&self, changes: &[PathChange]) {
        promote::write::write(&self.bucket, &self.volume, changes, &|_| {})
            .await
            .unwrap();
    }

    /// Files that were written at a time.
    async fn files(&self, millis: u64, paths: &[&str]) {
        let files: Vec<_> = paths
            .iter()
            .map(|path| change(path, millis, Some(entry(NodeKind::File))))
            .collect();
        self.write(&files).await;
    }

    /// A machine tells that it used names.
    fn told(&self, volume: &str, millis: u64, paths: &[&str]) -> String {
        let marks = paths
            .iter()
            .map(|path| super::super::touch::format::mark(path.as_bytes()));
        let told = Told::new(millis, DAY, marks.collect());
        let key = layout::touched(volume, millis, MachineId(9), millis);
        self.put(&key, &told.encode());
        key
    }

    fn options() -> ExpireOptions {
        ExpireOptions {
            unused_for: Duration::from_millis(MONTH),
            volumes: Vec::new(),
            untrusted: Vec::new(),
            dry_run: false,
        }
    }

    async fn try_expire(&self, options: &ExpireOptions) -> Result<Vec<VolumeExpiry>, ExpireError> {
        let now = self.now;
        expire_by(&self.bucket, Arc::new(move || now), options, &mut |_| {}).await
    }

    async fn expire(&self) -> VolumeExpiry {
        let mut done = self.try_expire(&Self::options()).await.unwrap();
        assert_eq!(done.len(), 1);
        done.remove(0)
    }

    /// What lives in the volume.
    async fn names(&self) -> Vec<String> {
        let layer = StackLayer::live(self.volume.clone());
        let registers = view::registers(&self.bucket, &layer, &|_, _| {}).await.unwrap();
        let live = registers
            .into_iter()
            .filter(|(_, register)| register.entry.is_some());
        live.map(|(path, _)| String::from_utf8(path).unwrap()).collect()
    }

    async fn compact(&self) {
        let options = CompactOptions {
            machine: MachineId(1),
            trail: Duration::ZERO,
            spill_dir: self.dir.path().to_owned(),
        };
        // The watermark must lie behind the segments.
        tokio::time::sleep(Duration::from_millis(5)).await;
        let done = compact::compact(&self.bucket, &self.volume, &options, |_| {})
            .await
            .unwrap();
        assert!(matches!(done, compact::Outcome::Done(_)), "{done:?}");
    }

    async fn catalog(&self) -> Vec<Item> {
        let opened = read::newest(self.bucket.as_ref(), "main", None)
            .await
            .unwrap()
            .unwrap();
        let mut items = read::Items::of(self.bucket.as_ref(), "main", &opened.root);
        let mut all = Vec::new();
        while let Some(more) = items.next().await.unwrap() {
            all.extend(more);
        }
        all
    }
}

#[tokio::test]
async fn what_nobody_used_or_wrote_for_the_time_goes() {
    let mut store = Store::new().await;
    let old = store.now - MONTH - DAY;
    store.files(old, &["a/unused", "a/used", "a/used-long-ago"]).await;
    store.files(store.now - MONTH + 1, &["a/young"]).await;
    store.told("main", store.now - 5 * DAY, &["a/used", "a/nothing"]);
    store.told("main", store.now - MONTH - DAY - 1, &["a/used-long-ago"]);

    let dry = ExpireOptions {
        dry_run: true,
        ..Store::options()
    };
    let told = store.try_expire(&dry).await.unwrap().remove(0);
    assert_eq!(store.names().await.len(), 4);
    let report = store.expire().await;
    assert_eq!(report, told);
    let amount = |names: u64| NameAmount {
        names,
        bytes: names * 1000,
    };
    assert_eq!(
        (report.all, report.young, report.used),
        (amount(4), amount(1), amount(1))
    );
    assert_eq!((report.expired, report.told_objects), (amount(2), 2));
    assert_eq!(store.names().await, ["a/used", "a/young"]);
    // Nothing more, but when time goes on.
    assert_eq!(store.expire().await.expired, amount(0));
    store.now += 2 * DAY;
    store.expire().await;
    assert_eq!(store.names().await, ["a/used"]);
}

#[tokio::test]
async fn a_telling_keeps_a_name_for_as_long_as_it_speaks() {
    let store = Store::new().await;
    store.files(1, &["a", "b"]).await;
    // Each speaks of the day after it.
    store.told("main", store.now - MONTH - DAY + 1, &["a"]);
    store.told("main", store.now - MONTH - DAY, &["b"]);
    store.expire().await;
    assert_eq!(store.names().await, ["a"]);
}

#[tokio::test]
async fn nothing_goes_before_it_was_known_for_the_time_what_is_used() {
    let mut store = Store::unasked().await;
    store.files(1, &["a"]).await;
    let dry = ExpireOptions {
        dry_run: true,
        ..Store::options()
    };
    store.try_expire(&dry).await.unwrap();
    assert!(!store.path(&layout::expiry("main")).exists());
    let begun = store.now;
    let ready = begun + MONTH + HOUR;
    for now in [begun, begun + DAY, ready - 1] {
        store.now = now;
        assert_eq!(store.expire().await.not_before_millis, Some(ready));
        assert_eq!(store.names().await, ["a"]);
    }
    store.now = ready;
    assert_eq!(store.expire().await.expired.names, 1);
}

#[tokio::test]
async fn what_cannot_be_read_stops_it_before_anything_goes() {
    let store = Store::new().await;
    store.files(1, &["a"]).await;
    let key = store.told("main", store.now - DAY, &["b"]);
    let good = std::fs::read(store.path(&key)).unwrap();
    let mut newer = good.clone();
    newer[7] = 2;
    for (bytes, words) in [(newer, "newer casmount"), (good[..40].to_vec(), "damaged")] {
        store.put(&key, &bytes);
        let err = store.try_expire(&Store::options()).await.unwrap_err();
        let text = err.to_string();
        assert!(text.contains(&key) && text.contains(words), "{text}");
        assert!(matches!(err, ExpireError::Touched { .. }));
    }
    store.put(&key, &good);
    let odd = format!("{}tomorrow", layout::touched_prefix("main"));
    store.put(&odd, b"?");
    let text = store.try_expire(&Store::options()).await.unwrap_err().to_string();
    assert!(text.contains(&odd), "{text}");
    std::fs::remove_file(store.path(&odd)).unwrap();
    store.put(&layout::expiry("main"), b"{\"version\": 2}");
    assert!(store.try_expire(&Store::options()).await.is_err());
    assert_eq!(store.names().await, ["a"]);
}

#[tokio::test]
async fn forks_tell_what_they_use_of_what_lies_below_and_do_not_expire_themselves() {
    let store = Store::new().await;
    store.files(1, &["a", "b", "c"]).await;
    for (name, apart) in [("trusted", false), ("pr-1", true)] {
        let bucket = store.bucket.as_ref();
        let name = name.parse().unwrap();
        stack::create_fork(bucket, &name, &store.volume, ForkPoint::Live, apart)
            .await
            .unwrap();
    }
    store.told("trusted", store.now - DAY, &["a"]);
    store.told("pr-1", store.now - DAY, &["b"]);
    // Whoever is not trusted cannot stop it.
    let damaged = store.told("pr-1", store.now - 2 * DAY, &["c"]);
    store.put(&damaged, b"damaged");
    let report = store.expire().await;
    assert_eq!((report.volume.as_str(), report.expired.names), ("main", 1));
    assert_eq!(store.names().await, ["a", "b"]);
    for (name, words) in [("trusted", "is a fork"), ("nothing", "no volume nothing")] {
        let options = ExpireOptions {
            volumes: vec![name.parse().unwrap()],
            ..Store::options()
        };
        let text = store.try_expire(&options).await.unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
    }
    let damaged = store.told("trusted", store.now - 2 * DAY, &["c"]);
    store.put(&damaged, b"damaged");
    assert!(store.try_expire(&Store::options()).await.is_err());
}

#[tokio::test]
async fn a_fork_whose_deletion_may_be_taken_back_keeps_what_it_uses() {
    let store = Store::new().await;
    store.files(1, &["a", "b"]).await;
    let fork = store.fork("pr-1").await;
    store.told("pr-1", store.now - DAY, &["a"]);
    let (json, _) = stack::read_json(store.bucket.as_ref(), &fork)
        .await
        .unwrap()
        .unwrap();
    let broken_off = stack::VolumeJson {
        deleted_millis: Some(store.now),
        deletion_undecided: true,
        ..json
    };
    store.put(&layout::volume("pr-1"), &broken_off.encode());
    assert_eq!(store.expire().await.expired.names, 1);
    assert_eq!(store.names().await, ["a"]);
}

#[tokio::test]
async fn a_catalog_and_the_log_since_are_read_as_one() {
    let store = Store::new().await;
    store.files(10, &["a", "b", "d/c", "d/e"]).await;
    store.write(&[change("d", 5, Some(entry(NodeKind::Dir)))]).await;
    store.compact().await;
    store.write(&[change("a", 20, None)]).await;
    store.files(store.now - DAY, &["b", "d/f"]).await;
    let report = store.expire().await;
    assert_eq!((report.all.names, report.expired.names), (5, 2));
    assert_eq!(store.names().await, ["b", "d", "d/f"]);
}

#[tokio::test]
async fn an_empty_directory_goes_with_the_next_catalog_and_never_with_what_was_in_it() {
    let store = Store::new().await;
    let dir = |path| change(path, 5, Some(entry(NodeKind::Dir)));
    store.write(&[dir("d"), dir("d/e"), dir("used")]).await;
    store.files(10, &["d/e/f"]).await;
    store.told("main", store.now - DAY, &["used"]);
    assert_eq!(store.expire().await.expired.names, 1);
    assert_eq!(store.names().await, ["d", "d/e", "used"]);
    store.compact().await;
    // The inner one is in the outer one, as far as this reading of the log can tell.
    store.expire().await;
    assert_eq!(store.names().await, ["d", "used"]);
    store.compact().await;
    store.expire().await;
    assert_eq!(store.names().await, ["used"]);
}

#[tokio::test]
async fn a_catalog_keeps_the_deletion_for_as_long_as_any_other() {
    let store = Store::new().await;
    store.files(10, &["a", "b"]).await;
    store.told("main", store.now - DAY, &["b"]);
    store.compact().await;
    store.expire().await;
    store.compact().await;
    let said = |items: Vec<Item>| {
        let of = items.into_iter().find(|item| item.path == b"a");
        of.and_then(|item| item.said)
    };
    // The entry was older than deletions are kept.
    let deleted = said(store.catalog().await).expect("the deletion is there");
    assert!(deleted.entry.is_none() && deleted.stamp.is_expired());
    assert!(deleted.stamp.made_millis() + HOUR > store.now);
    assert_eq!(deleted.stamp.millis, 10);
}

#[tokio::test]
async fn what_was_told_is_put_together_and_goes_after_the_longest_time() {
    let mut store = Store::new().await;
    store.files(1, &["a", "b", "c"]).await;
    let start = store.now / DAY * DAY - 40 * DAY;
    let old = store.told("main", start, &["x"]);
    let days = [30, 30, 30, 40].map(|day| (day - 1) * DAY);
    let keys: Vec<_> = ["a", "b", "c", "c"]
        .into_iter()
        .zip(days)
        .enumerate()
        .map(|(number, (path, day))| store.told("main", start + day + number as u64 * HOUR, &[path]))
        .collect();
    store.expire().await;
    assert_eq!(store.names().await, ["a", "b", "c"]);
    let left = |store: &Store| {
        let store_bucket = Arc::clone(&store.bucket);
        async move {
            uses::list(&store_bucket, &"main".parse().unwrap(), 0)
                .await
                .unwrap()
                .keys
        }
    };
    let found = left(&store).await;
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(!store.path(&old).exists() && store.path(&keys[3]).exists());
    // Nothing changes by that.
    store.expire().await;
    assert_eq!(store.names().await, ["a", "b", "c"]);
    assert_eq!(left(&store).await, found);
    // A longer time cannot go by what was removed.
    let longer = ExpireOptions {
        unused_for: Duration::from_millis(MONTH + 5 * DAY),
        ..Store::options()
    };
    let waits = store.try_expire(&longer).await.unwrap().remove(0);
    assert_eq!(waits.not_before_millis, Some(store.now + 5 * DAY + HOUR));
    store.now += 6 * DAY;
    let report = store.try_expire(&longer).await.unwrap().remove(0);
    assert_eq!((report.not_before_millis, report.expired.names), (None, 0));
}

#[tokio::test]
async fn two_that_run_at_once_and_one_that_is_repeated_say_the_same() {
    let store = Store::new().await;
    let paths: Vec<String> = (0..500).map(|number| format!("d/{number}")).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    store.files(1, &paths).await;
    let (one, other) = tokio::join!(store.expire(), store.expire());
    assert!(one.expired.names == 500 || other.expired.names == 500);
    assert!(store.names().await.is_empty());
    // What a writer says later counts, also when it is read first.
    store.files(2, &["d/7"]).await;
    assert_eq!(store.names().await, ["d/7"]);
}

impl Store {
    async fn fork(&self, name: &str) -> VolumeName {
        let name = name.parse().unwrap();
        let bucket = self.bucket.as_ref();
        stack::create_fork(bucket, &name, &self.volume, ForkPoint::Live, true)
            .await
            .unwrap();
        name
    }

    /// What was told in a volume, in the order of that.
    async fn all_told(&self, volume: &str) -> Vec<Told> {
        let found = uses::list(&self.bucket, &volume.parse().unwrap(), 0)
            .await
            .unwrap();
        let keys = found.keys.into_iter().map(|(key, _)| key);
        keys.map(|key| Told::decode(&key, &std::fs::read(self.path(&key)).unwrap()).unwrap())
            .collect()
    }
}

fn marks(paths: &[&str]) -> Vec<u64> {
    let mut marks: Vec<_> = paths
        .iter()
        .map(|path| super::super::touch::format::mark(path.as_bytes()))
        .collect();
    marks.sort_unstable();
    marks
}

async fn inherit_first(bucket: &SharedBucket, fork: &VolumeName) -> u64 {
    inherit(bucket, fork, &mut Inherited::new()).await.unwrap()
}

async fn delete(bucket: &SharedBucket, fork: &VolumeName) {
    let decided = volumes::decide(bucket, fork).await.unwrap();
    decided.remove_rest(bucket, |_| {}).await.unwrap();
}

#[tokio::test]
async fn what_a_deleted_fork_used_stays_in_use() {
    let store = Store::new().await;
    store.files(1, &["a", "b", "c", "d"]).await;
    let fork = store.fork("pr-1").await;
    let noon = (store.now / DAY - 9) * DAY + DAY / 2;
    store.told("pr-1", noon, &["a", "b"]);
    store.told("pr-1", noon + HOUR, &["b"]);
    store.told("pr-1", noon + 2 * DAY, &["b", "x"]);
    // Too long ago to matter to anybody.
    store.told("pr-1", noon - 2 * MONTH, &["d"]);
    // Damaged, and a lie of what is to come.
    let damaged = store.told("pr-1", noon + 3 * DAY, &["d"]);
    store.put(&damaged, b"damaged");
    let lie = Told::new(u64::MAX, DAY, marks(&["c"]));
    let key = layout::touched("pr-1", noon, MachineId(8), 1);
    store.put(&key, &lie.encode());

    assert_eq!(inherit_first(&store.bucket, &fork).await, 4);
    delete(&store.bucket, &fork).await;
    assert!(store.all_told("pr-1").await.is_empty());
    let told = store.all_told("main").await;
    let seen: Vec<_> = told.iter().map(|told| told.marks().to_vec()).collect();
    assert_eq!(seen, [marks(&["a"]), marks(&["b", "x"]), marks(&["c"])]);
    assert_eq!(told[0].written_millis, noon + HOUR);
    assert_eq!(told[1].written_millis, noon + 2 * DAY);
    assert!(told[2].written_millis < store.now + DAY, "{told:?}");
    let report = store.expire().await;
    assert_eq!((report.used.names, report.expired.names), (3, 1));
    assert_eq!(store.names().await, ["a", "b", "c"]);
    // And again, after a deletion that was broken off.
    assert_eq!(inherit_first(&store.bucket, &fork).await, 0);
}

#[tokio::test]
async fn what_is_told_until_a_deletion_is_decided_stays_in_use_and_nothing_is_told_twice() {
    let store = Store::new().await;
    store.files(1, &["a", "b", "c"]).await;
    let fork = store.fork("pr-1").await;
    store.told("pr-1", store.now - DAY, &["a"]);
    let mut inherited = Inherited::new();
    let told = inherit(&store.bucket, &fork, &mut inherited).await;
    assert_eq!(told.unwrap(), 1);
    store.told("pr-1", store.now - HOUR, &["b"]);
    let decided = volumes::decide(&store.bucket, &fork).await.unwrap();
    let told = inherit(&store.bucket, &fork, &mut inherited).await;
    assert_eq!(told.unwrap(), 1);
    decided.remove_rest(&store.bucket, |_| {}).await.unwrap();
    assert_eq!(store.all_told("main").await.len(), 2);
    store.expire().await;
    assert_eq!(store.names().await, ["a", "b"]);
}

#[tokio::test]
async fn a_fork_is_deleted_also_where_nothing_can_be_kept() {
    let store = Store::unasked().await;
    store.files(1, &["a"]).await;
    let fork = store.fork("pr-1").await;
    store.told("pr-1", store.now, &["a"]);
    assert_eq!(
        inherit_first(&store.bucket, &fork).await,
        0,
        "nobody wants to know"
    );
    assert!(store.all_told("main").await.is_empty());
    store.put(&layout::expiry("main"), b"{\"version\": 2}");
    assert_eq!(inherit_first(&store.bucket, &fork).await, 0);
    std::fs::remove_file(store.path(&layout::expiry("main"))).unwrap();
    store.put(
        &layout::expiry("main"),
        &ExpiryJson::new(store.now - 2 * MONTH, MONTH).encode(),
    );
    store.put(&format!("{}tomorrow", layout::touched_prefix("pr-1")), b"?");
    assert_eq!(inherit_first(&store.bucket, &fork).await, 0);
    assert_eq!(
        inherit_first(&store.bucket, &store.volume).await,
        0,
        "it is no fork"
    );
}

#[tokio::test]
async fn a_fork_that_is_deleted_while_an_expiry_reads_it_ends_nothing() {
    let store = Store::new().await;
    let paths: Vec<String> = (0..100).map(|number| format!("d/{number}")).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    store.files(1, &paths).await;
    let fork = store.fork("pr-1").await;
    // More than are read at once.
    for (number, path) in (1..).zip(&paths[..60]) {
        store.told("pr-1", store.now - number * HOUR, &[path]);
    }
    let mut is_deleted = false;
    let mut deletes = |_: &Progress| {
        if !std::mem::replace(&mut is_deleted, true) {
            let (bucket, fork) = (Arc::clone(&store.bucket), fork.clone());
            let deletion = std::thread::spawn(move || {
                let runtime = tokio::runtime::Runtime::new().unwrap();
                runtime.block_on(async {
                    inherit_first(&bucket, &fork).await;
                    delete(&bucket, &fork).await;
                });
            });
            deletion.join().unwrap();
        }
    };
    let now = store.now;
    let clock: BucketTime = Arc::new(move || now);
    let done = expire_by(&store.bucket, clock, &Store::options(), &mut deletes).await;
    let report = done.unwrap().remove(0);
    assert!(store.all_told("pr-1").await.is_empty());
    assert_eq!((report.used.names, report.expired.names), (60, 40));
    assert_eq!(store.names().await.len(), 60);
}
