//! Fifty machines follow one volume: what one closes all see, and what following costs the bucket.
//!
//! Each follower has an access key of its own, by which the server counts. Nothing here measures how long
//! it takes (`scripts/bench --only visibility` does): a machine under load polls later, never more often.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use casmount::{
    base::{
        clock::Stamp,
        id::{MachineId, StoreId},
        volume::Stack,
    },
    namespace::{
        change::{Entry, PathChange},
        follow::{self, Pace, StackFollowerHandle},
        segment::{self, Head},
        tree::Tree,
    },
    store::{Store, StoreOptions, rows::NodeKind},
    tier::{Body, SharedBucket, layout},
};
use lab::{Lab, StoreKind};
use s3server::{Counts, RestrictedKey};
use support::{posix::file, tempdir::TestDir, wait};

const FOLLOWERS: usize = 50;

/// That one writes while the others follow.
const FILES: u64 = 5;

/// For all of them, on a machine that does other things as well.
const SOON: Duration = Duration::from_secs(60);

fn key_of(follower: usize) -> RestrictedKey {
    RestrictedKey {
        access_key: format!("follower-{follower:02}"),
        secret_key: format!("secret-{follower:02}"),
        policy: r#"{"Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}"#
            .to_owned(),
    }
}

fn lab() -> Lab {
    Lab::with_keys(StoreKind::S3, (0..FOLLOWERS).map(key_of).collect())
}

/// Waits until every follower has listed the log so often since the counts were reset.
#[track_caller]
fn until_all_listed(lab: &Lab, times: u64, limit: Duration) -> Counts {
    wait::until(&format!("each lists the log {times} times"), limit, || {
        let counts = lab.server().counts();
        let listed = |follower| counts.of_key(&key_of(follower).access_key, "ListObjectsV2");
        (0..FOLLOWERS)
            .all(|follower| listed(follower) >= times)
            .then_some(counts)
    })
}

/// What each follower asked, as the most and in the mean.
fn of_each(counts: &Counts) -> (u64, f64) {
    let totals = (0..FOLLOWERS).map(|follower| counts.total_of_key(&key_of(follower).access_key));
    let (most, sum) = totals.fold((0, 0), |(most, sum), total| (total.max(most), sum + total));
    (most, sum as f64 / FOLLOWERS as f64)
}

#[test]
fn what_is_closed_on_one_machine_is_seen_by_fifty_that_ask_once_a_second() {
    let lab = lab();
    let a = lab.machine("a");
    file(&a.path("first"), b"so that there is a log");
    a.flush();
    let started = Instant::now();
    let follower = |follower: usize| {
        let key = key_of(follower);
        let spec = lab.spec(&format!("follower-{follower:02}"));
        let spec = spec
            .env("AWS_ACCESS_KEY_ID", key.access_key)
            .env("AWS_SECRET_ACCESS_KEY", key.secret_key);
        spec.start()
    };
    let followers: Vec<_> = (0..FOLLOWERS).map(follower).collect();
    eprintln!("{FOLLOWERS} machines started in {:?}", started.elapsed());

    // Nothing happens: one listing a second is all that is asked.
    lab.server().reset_counts();
    let began = Instant::now();
    let counts = until_all_listed(&lab, 10, SOON);
    let seconds = began.elapsed().as_secs_f64();
    let (most, mean) = of_each(&counts);
    eprintln!("in use: {mean:.1} requests each in {seconds:.1} s, at most {most}");
    assert!(most as f64 <= seconds + 2.0, "{most} requests in {seconds} s");

    // Something does: one more for each segment, and one for what is read.
    lab.server().reset_counts();
    let began = Instant::now();
    let mut took = Vec::new();
    for number in 0..FILES {
        let (name, bytes) = (format!("file-{number}"), format!("content {number}"));
        file(&a.path(&name), bytes.as_bytes());
        let closed = Instant::now();
        for machine in &followers {
            // The kernel has been told by now that it is not there.
            wait::until(&format!("{} has {name}", machine.spec.name), SOON, || {
                machine.path(&name).exists().then_some(())
            });
        }
        took.push(closed.elapsed());
        for machine in &followers {
            assert_eq!(fs::read(machine.path(&name)).unwrap(), bytes.as_bytes());
        }
    }
    eprintln!("a closed file was seen by all after {took:?}");
    let counts = lab.server().counts();
    let seconds = began.elapsed().as_secs_f64();
    let (most, mean) = of_each(&counts);
    eprintln!("while one writes: {mean:.1} requests each in {seconds:.1} s, at most {most}");
    // A segment is not divided, but a close and the times of its directory may fall into two.
    assert!(
        most as f64 <= seconds + 2.0 + (3 * FILES) as f64,
        "{most} requests in {seconds} s"
    );
    let status = followers[0].status();
    assert_eq!(
        status["follow"]["last_error"],
        serde_json::Value::Null,
        "{status:#}"
    );
}

/// A machine as far as following goes.
struct Follower {
    handle: StackFollowerHandle,
    tree: Arc<Tree>,
}

async fn follower(lab: &Lab, dir: &TestDir, number: usize, pace: Pace) -> Follower {
    let key = key_of(number);
    let bucket = lab.connect(&key.access_key, &key.secret_key).await;
    let options = StoreOptions {
        dir: dir.path().join(&key.access_key),
        cache_size: 1 << 20,
        min_free: 0,
        read_timeout: Duration::from_secs(5),
    };
    let store = Store::open(options, StoreId::random(), Arc::clone(&bucket)).unwrap();
    let store = Arc::new(store);
    let clock = Arc::clone(&bucket);
    let now = Arc::new(move || clock.clock().now_millis());
    let tree = Tree::open(Arc::clone(&store.ledger), store.machine, now).unwrap();
    let runtime = tokio::runtime::Handle::current();
    let stack = Stack::of("main".parse().unwrap());
    let handle = follow::spawn(
        &runtime,
        &stack,
        &tree,
        &store,
        &bucket,
        &(Arc::new(|_| {}) as _),
        pace,
    );
    Follower { handle, tree }
}

/// Puts a segment into the log that makes one name.
async fn publish(bucket: &SharedBucket, seq: u64, name: &str) {
    let machine = MachineId(7);
    let millis = bucket.clock().now_millis();
    let change = PathChange {
        path: name.as_bytes().to_vec(),
        stamp: Stamp {
            millis,
            counter: 0,
            machine,
        },
        entry: Some(Entry::new(NodeKind::Fifo, 0o644)),
    };
    let head = Head {
        machine,
        seq,
        published_millis: millis,
        previous: None,
    };
    let encoded = segment::encode_change(&change, machine).unwrap();
    let body = Body::raw(segment::encode(&head, &[encoded]));
    let key = layout::segment("main", millis, machine, seq);
    bucket.put_new(&key, body).await.unwrap();
}

#[test]
fn fifty_that_rest_ask_once_in_ten_seconds_and_the_first_use_asks_at_once() {
    let lab = lab();
    let dir = TestDir::new();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    // As ever, but that they rest when nobody used them for a moment instead of five minutes.
    let pace = Pace {
        rests_after: Duration::from_millis(500),
        ..Pace::default()
    };
    let key = (lab.server().access_key(), lab.server().secret_key());
    let (bucket, followers) = runtime.block_on(async {
        let bucket = lab.connect(key.0, key.1).await;
        // Any write: the clock of the store is known from there on.
        bucket.put_new("probe/x", Body::raw("x")).await.unwrap();
        publish(&bucket, 0, "before").await;
        let mut followers = Vec::new();
        for number in 0..FOLLOWERS {
            followers.push(follower(&lab, &dir, number, pace).await);
        }
        (bucket, followers)
    });
    let until_all_have = |name: &str| {
        wait::until(&format!("all have {name}"), SOON, || {
            let has = |follower: &Follower| follower.tree.resolve(name.as_bytes()).is_ok();
            followers.iter().all(has).then_some(())
        });
    };
    until_all_have("before");

    // The poll that has just ended may have been the last before the rest; from there on it is one in 10 s.
    until_all_listed(&lab, 2, SOON);
    lab.server().reset_counts();
    let began = Instant::now();
    let counts = until_all_listed(&lab, 3, SOON * 2);
    let seconds = began.elapsed().as_secs_f64();
    let (most, mean) = of_each(&counts);
    eprintln!("at rest: {mean:.1} requests each in {seconds:.1} s, at most {most}");
    assert!(seconds > 19.0, "three polls of each in {seconds} s");
    assert!(
        most as f64 <= seconds / 10.0 + 2.0,
        "{most} requests in {seconds} s"
    );

    // Whoever comes back does not wait for the next of these.
    runtime.block_on(publish(&bucket, 1, "meanwhile"));
    lab.server().reset_counts();
    let began = Instant::now();
    for follower in &followers {
        follower.handle.used();
    }
    until_all_have("meanwhile");
    eprintln!("all that were woken saw it after {:?}", began.elapsed());
    let counts = lab.server().counts();
    let seconds = began.elapsed().as_secs_f64();
    let (most, _) = of_each(&counts);
    // A listing and a segment for the first; then as in use for a moment.
    assert!(most as f64 <= seconds + 3.0, "{most} requests in {seconds} s");
    runtime.block_on(async {
        for follower in followers {
            follower.handle.shutdown().await;
        }
    });
}
