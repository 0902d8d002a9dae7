//! Logs of many segments, put into a store without a machine that publishes them.

// Each test program uses a part of this.
#![allow(dead_code)]

use std::ops::Range;

use casmount::{
    base::{clock::Stamp, id::MachineId},
    namespace::{
        change::{Entry, PathChange},
        segment::{self, Head},
    },
    store::rows::NodeKind,
    tier::{Body, SharedBucket, layout},
};

/// How many names the changes of [`put_log`] are spread over.
pub const NAMES: u64 = 100;

/// The store's time.
pub async fn now_millis(bucket: &SharedBucket) -> u64 {
    // Any write: the clock of the store is known from there on.
    bucket.put_new("probe/clock", Body::raw("x")).await.unwrap();
    bucket.delete("probe/clock").await.unwrap();
    bucket.clock().now_millis()
}

/// Puts a segment of one change into the log of `volume` for each of these times.
pub async fn put_log(bucket: &SharedBucket, volume: &str, machine: MachineId, times: Range<u64>) {
    for (seq, millis) in (1..).zip(times) {
        let path = format!("of-{machine}-{}", seq % NAMES);
        let fifo = Entry::new(NodeKind::Fifo, 0o644);
        put_segment(bucket, volume, machine, (seq, millis), [(path, fifo)]).await;
    }
}

/// Puts one segment into the log of `volume`, with its number and its time.
pub async fn put_segment(
    bucket: &SharedBucket,
    volume: &str,
    machine: MachineId,
    (seq, millis): (u64, u64),
    entries: impl IntoIterator<Item = (String, Entry)>,
) {
    let head = Head {
        machine,
        seq,
        published_millis: millis,
        previous: None,
    };
    let encode = |(counter, (path, entry)): (u32, (String, Entry))| {
        let change = PathChange {
            path: path.into_bytes(),
            stamp: Stamp {
                millis,
                counter,
                machine,
            },
            entry: Some(entry),
        };
        segment::encode_change(&change, machine).unwrap()
    };
    let encoded: Vec<_> = (0..).zip(entries).map(encode).collect();
    let key = layout::segment(volume, millis, machine, seq);
    let body = Body::raw(segment::encode(&head, &encoded));
    bucket.put_new(&key, body).await.unwrap();
}
