//! Tests of fault-in of small blobs: what comes along, and what trouble with a pack does.

use std::sync::Arc;

use super::{
    StoreError,
    fetch::{Fetcher, ReadCursor},
    rows::{Durability, Residency},
    testing::{Fault, READ_TIMEOUT, Rig, eventually_async, noise},
};
use crate::{base::chunk::Sliced, tier::layout};

fn small_blobs(count: u64) -> Vec<Vec<u8>> {
    (0..count)
        .map(|seed| noise(1000 + seed as usize * 100, seed))
        .collect()
}

async fn read(fetcher: &Fetcher, rig: &Rig, sliced: &Sliced) -> Result<Vec<u8>, StoreError> {
    let size = sliced.chunks.size() as usize;
    let (blob, cursor) = (rig.open(sliced), ReadCursor::default());
    Ok(fetcher.read(&blob, &cursor, 0, size).await?.to_vec())
}

/// Waits until no pack is being written to the disk: whoever does that holds the blobs.
async fn until_kept(rig: &Rig, at_rest: usize) {
    eventually_async("what was brought is written", || {
        Arc::strong_count(&rig.blobs) == at_rest
    })
    .await;
}

fn is_here(rig: &Rig, sliced: &Sliced) -> bool {
    rig.open(sliced).is_whole()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_miss_in_a_pack_brings_its_neighbours() {
    let rig = Rig::new();
    let blobs = small_blobs(100);
    let (sliced, key) = rig.publish_together(&blobs);
    let fetcher = rig.fetcher();
    assert!(read(&fetcher, &rig, &sliced[50]).await.unwrap() == blobs[50]);
    assert_eq!(fetcher.status().transferred_bytes, blobs[50].len() as u64);
    assert!(!is_here(&rig, &sliced[51]), "one file alone says nothing");
    for index in (0..100).rev() {
        assert!(read(&fetcher, &rig, &sliced[index]).await.unwrap() == blobs[index]);
    }
    assert_eq!(rig.bucket.requests("get"), [key.clone(), key]);
    eventually_async("all are here", || {
        sliced.iter().all(|sliced| is_here(&rig, sliced))
    })
    .await;
    for (sliced, bytes) in sliced.iter().zip(&blobs) {
        assert!(std::fs::read(rig.path(&sliced.digest)).unwrap() == *bytes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_at_the_same_time_share_the_pack() {
    let rig = Rig::new();
    let blobs = small_blobs(40);
    let (sliced, _) = rig.publish_together(&blobs);
    let fetcher = Arc::new(rig.fetcher());
    read(&fetcher, &rig, &sliced[0]).await.unwrap();
    rig.bucket.hold();
    let readers: Vec<_> = sliced[1..]
        .iter()
        .map(|sliced| {
            let (fetcher, blob, size) = (Arc::clone(&fetcher), rig.open(sliced), sliced.chunks.size());
            tokio::spawn(async move {
                fetcher
                    .read(&blob, &ReadCursor::default(), 0, size as usize)
                    .await
            })
        })
        .collect();
    eventually_async("the pack is asked for", || rig.bucket.under_way() == 1).await;
    rig.bucket.open();
    for (reader, bytes) in readers.into_iter().zip(&blobs[1..]) {
        assert!(reader.await.unwrap().unwrap() == *bytes);
    }
    assert_eq!(rig.bucket.requests("get").len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_member_is_neither_served_nor_kept_and_harms_no_other() {
    let rig = Rig::new();
    let blobs = small_blobs(10);
    let (sliced, key) = rig.publish_together(&blobs);
    let mut object = rig.bucket.object(&key).unwrap().to_vec();
    let last = object.len() - 1;
    object[last] ^= 1;
    rig.bucket.insert(key.clone(), object.into());
    let fetcher = rig.fetcher();
    for index in 0..9 {
        assert!(read(&fetcher, &rig, &sliced[index]).await.unwrap() == blobs[index]);
    }
    eventually_async("the others are here", || {
        sliced[..9].iter().all(|sliced| is_here(&rig, sliced))
    })
    .await;
    let served = read(&fetcher, &rig, &sliced[9]).await;
    assert!(matches!(served, Err(StoreError::Corrupt { .. })), "{served:?}");
    assert_eq!(rig.residency(&sliced[9]), Residency::Nothing);
    assert!(fetcher.status().wrong_answers > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_with_another_head_or_gone_is_got_along_without() {
    let rig = Rig::new();
    let blobs = small_blobs(6);
    let (sliced, key) = rig.publish_together(&blobs);
    let object = rig.bucket.object(&key).unwrap();
    let fetcher = rig.fetcher();
    // A head that names other members: the bytes are still where the entries say.
    let mut other_head = object.to_vec();
    other_head[20] ^= 1;
    rig.bucket.insert(key.clone(), other_head.into());
    for index in 0..3 {
        assert!(read(&fetcher, &rig, &sliced[index]).await.unwrap() == blobs[index]);
    }
    assert!(!is_here(&rig, &sliced[4]));
    let members: usize = blobs[..3].iter().map(Vec::len).sum();
    let transferred = fetcher.status().transferred_bytes as usize;
    assert_eq!(transferred, members + object.len(), "also what was of no use");
    // Nothing there at all, but objects of their own.
    rig.bucket.remove(&key);
    for (sliced, bytes) in sliced.iter().zip(&blobs) {
        rig.bucket
            .insert(layout::blob(&sliced.digest), bytes.clone().into());
    }
    for index in 3..6 {
        assert!(read(&fetcher, &rig, &sliced[index]).await.unwrap() == blobs[index]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_that_does_not_come_is_tried_by_its_member() {
    let rig = Rig::new();
    let blobs = small_blobs(4);
    let (sliced, _) = rig.publish_together(&blobs);
    let fetcher = rig.fetcher();
    read(&fetcher, &rig, &sliced[0]).await.unwrap();
    let mut asked = 0;
    rig.bucket.fail(move |verb, _| {
        asked += usize::from(verb == "get");
        (asked == 1).then_some(Fault::Unavailable)
    });
    assert!(read(&fetcher, &rig, &sliced[1]).await.unwrap() == blobs[1]);
    assert!(read(&fetcher, &rig, &sliced[2]).await.unwrap() == blobs[2]);
    assert_eq!(rig.bucket.requests("get").len(), 4);
    eventually_async("the rest is here", || is_here(&rig, &sliced[3])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_entry_named_here_is_not_kept() {
    let rig = Rig::new();
    let blobs = small_blobs(4);
    let (sliced, _) = rig.publish_together_but(&blobs, 2);
    let fetcher = rig.fetcher();
    let at_rest = Arc::strong_count(&rig.blobs);
    for index in 0..2 {
        assert!(read(&fetcher, &rig, &sliced[index]).await.unwrap() == blobs[index]);
    }
    until_kept(&rig, at_rest).await;
    assert!(is_here(&rig, &sliced[3]));
    assert_eq!(rig.row(&sliced[2]), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_lies_about_lengths_changes_nothing_here() {
    for (at, byte) in [
        (12 + 3 * 40 + 32, 0xff),
        (12 + 3 * 40 + 33, 0xff),
        (12 + 3 * 40 + 32, 0),
    ] {
        let rig = Rig::new();
        let blobs = small_blobs(4);
        let dirty = rig.seal(&blobs[3]);
        let (sliced, key) = rig.publish_together(&blobs);
        let mut object = rig.bucket.object(&key).unwrap().to_vec();
        object[at] = byte;
        if byte == 0 {
            // A member of no bytes at all.
            object[at..at + 4].fill(0);
        }
        rig.bucket.insert(key, object.into());
        let fetcher = rig.fetcher();
        let at_rest = Arc::strong_count(&rig.blobs);
        for index in 0..3 {
            assert!(read(&fetcher, &rig, &sliced[index]).await.unwrap() == blobs[index]);
        }
        until_kept(&rig, at_rest).await;
        let row = rig.row(&dirty).unwrap();
        assert_eq!(
            (row.durability, row.residency),
            (Durability::Dirty, Residency::Whole)
        );
        assert!(read(&fetcher, &rig, &dirty).await.unwrap() == blobs[3]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_are_not_kept_where_there_is_no_room() {
    let rig = Rig::new();
    let blobs = small_blobs(20);
    let (sliced, _) = rig.publish_together(&blobs);
    // Room for the first four of twenty.
    let fetcher = rig.fetcher_with(READ_TIMEOUT, rig.reclaimer(5000));
    let at_rest = Arc::strong_count(&rig.blobs);
    for index in [0, 1] {
        assert!(read(&fetcher, &rig, &sliced[index]).await.unwrap() == blobs[index]);
    }
    until_kept(&rig, at_rest).await;
    assert_eq!(rig.bucket.requests("get").len(), 2, "the pack was brought");
    let kept = sliced.iter().filter(|sliced| is_here(&rig, sliced)).count();
    assert!((2..=5).contains(&kept), "{kept}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_member_that_is_missed_again_and_again_brings_no_pack() {
    let rig = Rig::new();
    let blobs = small_blobs(3);
    let (sliced, _) = rig.publish_together(&blobs);
    let fetcher = rig.fetcher();
    for _ in 0..3 {
        assert!(read(&fetcher, &rig, &sliced[1]).await.unwrap() == blobs[1]);
        assert!(rig.blobs.evict(&sliced[1].digest).unwrap().is_some());
    }
    assert_eq!(fetcher.status().transferred_bytes, 3 * blobs[1].len() as u64);
}
