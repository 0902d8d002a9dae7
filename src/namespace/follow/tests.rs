//! The loop that follows a log, where merging takes for ever.

use super::*;
use crate::{
    base::{BoxFuture, clock::Stamp, digest::Digest, id::MachineId},
    namespace::{
        TreeError,
        change::{Entry, PathChange},
        follow::reader::LogView,
        segment::{self, Head},
    },
    store::{rows::NodeKind, testing::MemoryBucket},
    tier::{Body, SharedBucket},
};

const NOW: u64 = 1_767_225_600_000;

/// It never ends to merge what it is given.
#[derive(Debug, Default)]
struct Slow {
    merging: Notify,
}

impl Sink for Slow {
    fn apply(&self, _changes: Vec<PathChange>) -> BoxFuture<'_, Result<(), TreeError>> {
        self.merging.notify_one();
        Box::pin(std::future::pending())
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

    let sink = Arc::new(Slow::default());
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
