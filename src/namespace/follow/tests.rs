//! The loop that follows a log, where merging takes for ever; and what is fetched at once.

use super::*;
use crate::{
    base::{BoxFuture, clock::Stamp, digest::Digest, id::MachineId},
    namespace::{
        TreeError,
        change::{Entry, PathChange},
        follow::reader::LogView,
        segment::{self, Head},
    },
    store::{
        rows::NodeKind,
        testing::{MemoryBucket, eventually_async, noise},
    },
    tier::{Body, Bucket, SharedBucket},
};

const NOW: u64 = 1_767_225_600_000;

/// It notes the paths that it is given.
#[derive(Debug, Default)]
struct Taker {
    /// It never ends to merge them.
    is_slow: bool,
    merging: Notify,
    paths: Mutex<Vec<Vec<u8>>>,
}

impl Sink for Taker {
    fn apply(&self, changes: Vec<PathChange>) -> BoxFuture<'_, Result<(), TreeError>> {
        let paths = changes.into_iter().map(|change| change.path);
        self.paths.lock().unwrap().extend(paths);
        self.merging.notify_one();
        if self.is_slow {
            Box::pin(std::future::pending())
        } else {
            Box::pin(std::future::ready(Ok(())))
        }
    }

    fn fetch_list(
        &self,
        _list: (Digest, u64),
        _blob: (Digest, u64),
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn note(&self, _key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(None)
    }

    fn keep_note(&self, _key: &str, _value: Vec<u8>) -> Result<(), StoreError> {
        Ok(())
    }
}

#[tokio::test]
async fn who_waits_for_a_poll_or_its_end_does_not_wait_for_what_is_being_merged() {
    let bucket: SharedBucket = MemoryBucket::new();
    let (name, machine) = (
        SegmentKey {
            millis: NOW,
            machine: MachineId(7),
            seq: 1,
        },
        MachineId(7),
    );
    let change = PathChange {
        path: b"a".to_vec(),
        stamp: Stamp {
            millis: NOW,
            counter: 0,
            machine,
        },
        entry: Some(Entry::new(NodeKind::Fifo, 0o644)),
    };
    let head = Head {
        machine,
        seq: 1,
        published_millis: NOW,
        previous: None,
    };
    let object = segment::encode(&head, &[segment::encode_change(&change, machine).unwrap()]);
    bucket
        .put_new(&name.to_key("v"), Body::raw(object))
        .await
        .unwrap();

    let sink = Arc::new(Taker {
        is_slow: true,
        ..Taker::default()
    });
    let read_by = Arc::clone(&sink);
    let open = move || {
        let view = LogView {
            volume: "v".to_owned(),
            without: None,
            until_millis: None,
        };
        Reader::open(view, Arc::clone(&read_by), Arc::clone(&bucket), Arc::new(|| NOW))
    };
    let follower = start(&tokio::runtime::Handle::current(), Pace::default(), open);
    let limit = Duration::from_secs(20);
    tokio::time::timeout(limit, sink.merging.notified())
        .await
        .unwrap();
    let deadline = Instant::now() + Duration::from_millis(50);
    let waits = tokio::time::timeout(limit, follower.caught_up(deadline));
    assert!(!waits.await.unwrap(), "it is being merged still");
    tokio::time::timeout(limit, follower.shutdown()).await.unwrap();
}

/// How many segments are fetched at once of a log with `count` of them, each of a name with attributes of so many bytes.
async fn fetched_at_once(count: u64, bytes: usize) -> usize {
    let bucket = MemoryBucket::new();
    let machine = MachineId(7);
    let name = |seq: u64| format!("name-{seq:04}").into_bytes();
    for seq in 1..=count {
        let change = |part: usize| {
            let value = |at: usize| noise(bytes / 32, seq << 16 | (part << 8 | at) as u64);
            let xattrs = (0..8).map(|at| (format!("user.{at}").into_bytes(), value(at)));
            PathChange {
                path: [name(seq), part.to_string().into_bytes()].concat(),
                stamp: Stamp {
                    millis: NOW,
                    counter: 0,
                    machine,
                },
                entry: Some(Entry {
                    xattrs: xattrs.collect(),
                    ..Entry::new(NodeKind::Fifo, 0o644)
                }),
            }
        };
        let encoded: Vec<_> = (0..4)
            .map(|part| segment::encode_change(&change(part), machine).unwrap())
            .collect();
        let head = Head {
            machine,
            seq,
            published_millis: NOW,
            previous: None,
        };
        let key = SegmentKey {
            millis: NOW,
            machine,
            seq,
        };
        let object = segment::encode(&head, &encoded);
        bucket.put_new(&key.to_key("v"), Body::raw(object)).await.unwrap();
    }
    let view = LogView {
        volume: "v".to_owned(),
        without: None,
        until_millis: None,
    };
    let sink = Arc::new(Taker::default());
    let shared = Arc::clone(&bucket) as SharedBucket;
    let mut reader = Reader::open(view, Arc::clone(&sink), shared, Arc::new(|| NOW)).unwrap();
    bucket.hold();
    let poll = tokio::spawn(async move { reader.poll(true).await });
    // All that are started at once wait for the bucket, one after the other from then on.
    eventually_async("fetches begin", || bucket.under_way() > 0).await;
    let mut asked = 0;
    while asked < bucket.under_way() {
        asked = bucket.under_way();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bucket.open();
    poll.await.unwrap().unwrap();
    let most = bucket.most_under_way.load(std::sync::atomic::Ordering::SeqCst);
    assert!(most >= asked);
    let expected = (1..=count).flat_map(|seq| {
        let name = name(seq);
        (0..4).map(move |part: usize| [name.clone(), part.to_string().into_bytes()].concat())
    });
    assert!(sink.paths.lock().unwrap().iter().cloned().eq(expected));
    most
}

#[tokio::test]
async fn what_is_fetched_at_once_has_a_limit_in_number_and_in_bytes() {
    assert_eq!(fetched_at_once(40, 1_000).await, 16);
    // Each takes some 6 times 1.5 MiB.
    assert_eq!(fetched_at_once(20, 3 << 19).await, 7);
}
