//! Tests of fault-in from packs: how few requests a reader costs, and what trouble with a pack does.

use std::sync::Arc;

use super::{
    StoreError,
    fetch::{Fetcher, ReadCursor},
    pack,
    rows::{Change, ChunkRow},
    testing::{Fault, READ_TIMEOUT, Rig, eventually_async, noise},
};
use crate::{
    base::{chunk::Sliced, clock::local_millis},
    tier::layout,
};

const LARGE: usize = 24 << 20;

/// Reads all of a blob as the kernel does for a sequential reader.
async fn read_through(
    fetcher: &Fetcher,
    rig: &Rig,
    sliced: &Sliced,
    step: usize,
) -> Result<Vec<u8>, StoreError> {
    let (blob, cursor) = (rig.open(sliced), ReadCursor::default());
    fetcher.ensure_first(&blob).await?;
    let mut all = Vec::new();
    let mut buffer = Vec::new();
    while (all.len() as u64) < sliced.chunks.size() {
        let offset = all.len() as u64;
        if let Some(here) = fetcher.read_resident(&blob, &cursor, offset, step, &mut buffer)? {
            all.extend_from_slice(here.as_ref());
            continue;
        }
        all.extend_from_slice(&fetcher.read(&blob, &cursor, offset, step).await?);
    }
    Ok(all)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequential_reader_gets_many_chunks_by_one_request() {
    for step in [128 << 10, 1 << 20, 5_000_000] {
        sequential_reader_with(step).await;
    }
}

async fn sequential_reader_with(step: usize) {
    let rig = Rig::new();
    let bytes = noise(LARGE, 1);
    let (sliced, packs) = rig.publish_packed(&bytes);
    let fetcher = rig.fetcher();
    assert!(read_through(&fetcher, &rig, &sliced, step).await.unwrap() == bytes);
    let (gets, chunks) = (rig.bucket.requests("get").len(), sliced.chunks.chunks().len());
    assert!(
        gets < chunks / 2,
        "{gets} requests for {chunks} chunks in {} packs",
        packs.len()
    );
    // A chunk may be asked for by itself in the moment in which a run begins that has it.
    let transferred = fetcher.status().transferred_bytes;
    assert!(transferred < LARGE as u64 + (2 << 20), "{transferred} bytes");
    // What was read may be on its way to the disk.
    eventually_async("all of it is kept", || rig.open(&sliced).is_whole()).await;
    assert!(std::fs::read(rig.path(&sliced.digest)).unwrap() == bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_blob_is_fetched_by_few_requests() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 2);
    let (sliced, packs) = rig.publish_packed(&bytes);
    let fetcher = rig.fetcher();
    let blob = rig.open(&sliced);
    fetcher.ensure_whole(&blob).await.unwrap();
    assert!(blob.is_whole());
    assert_eq!(rig.bucket.requests("get").len(), packs.len());
    assert!(blob.read(0, LARGE).unwrap() == bytes);
}

#[tokio::test]
async fn a_small_read_fetches_its_chunk_only() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 3);
    let (sliced, _) = rig.publish_packed(&bytes);
    let fetcher = rig.fetcher();
    let offset = sliced.chunks.start(7) + 100;
    let read = fetcher
        .read(&rig.open(&sliced), &ReadCursor::default(), offset, 10)
        .await
        .unwrap();
    assert_eq!(read, bytes[offset as usize..][..10]);
    let len = u64::from(sliced.chunks.chunks()[7].len);
    assert_eq!(fetcher.status().transferred_bytes, len);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_wants_a_chunk_of_a_run_under_way_waits_for_it() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 4);
    let (sliced, packs) = rig.publish_packed(&bytes);
    let fetcher = Arc::new(rig.fetcher_with(READ_TIMEOUT * 10, rig.reclaimer(u64::MAX)));
    rig.bucket.hold();
    let (whole, blob) = (Arc::clone(&fetcher), rig.open(&sliced));
    let all = tokio::spawn(async move { whole.ensure_whole(&blob).await });
    let wanted = packs.len().min(8);
    eventually_async("the runs are under way", || rig.bucket.under_way() == wanted).await;
    let (blob, cursor) = (rig.open(&sliced), ReadCursor::default());
    let mut read = std::pin::pin!(fetcher.read(&blob, &cursor, 0, 10));
    tokio::select! {
        biased;
        read = &mut read => panic!("the bucket is silent: {read:?}"),
        () = std::future::ready(()) => {}
    }
    assert_eq!(rig.bucket.under_way(), wanted, "no request of its own");
    rig.bucket.open();
    assert_eq!(read.await.unwrap(), bytes[..10]);
    all.await.unwrap().unwrap();
    assert_eq!(rig.bucket.requests("get").len(), packs.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_in_different_places_share_what_is_under_way() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 8);
    let (sliced, _) = rig.publish_packed(&bytes);
    let fetcher = Arc::new(rig.fetcher_with(READ_TIMEOUT * 10, rig.reclaimer(u64::MAX)));
    let count = sliced.chunks.chunks().len();
    let readers: Vec<_> = (0..12)
        .map(|reader| {
            let (fetcher, blob) = (Arc::clone(&fetcher), rig.open(&sliced));
            tokio::spawn(async move {
                let (cursor, mut at) = (ReadCursor::default(), blob.chunks().start(reader % 5));
                while at < blob.size() {
                    let read = fetcher.read(&blob, &cursor, at, 300_000).await.unwrap();
                    at += read.len() as u64;
                }
            })
        })
        .collect();
    for reader in readers {
        reader.await.unwrap();
    }
    let blob = rig.open(&sliced);
    assert!(blob.is_whole() && blob.read(0, LARGE).unwrap() == bytes);
    assert!(rig.bucket.requests("get").len() < count);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_with_wrong_bytes_is_brought_chunk_by_chunk() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 5);
    let (sliced, _) = rig.publish_packed(&bytes);
    let mut first = true;
    rig.bucket
        .fail(move |_, _| std::mem::take(&mut first).then_some(Fault::WrongBytes));
    let fetcher = rig.fetcher();
    let blob = rig.open(&sliced);
    fetcher.ensure_whole(&blob).await.unwrap();
    assert!(blob.read(0, LARGE).unwrap() == bytes);
    assert_eq!(fetcher.status().wrong_answers, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_its_pack_lost_is_looked_for_as_an_object() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 6);
    let (sliced, packs) = rig.publish_packed(&bytes);
    rig.bucket.fill(&bytes);
    rig.bucket.remove(&packs[1]);
    let fetcher = rig.fetcher();
    assert!(read_through(&fetcher, &rig, &sliced, 128 << 10).await.unwrap() == bytes);
    let gets = rig.bucket.requests("get");
    let own = |index: &usize| layout::blob(&sliced.chunks.chunks()[*index].digest);
    let lost = pack::group(&sliced.chunks).swap_remove(1);
    assert!(gets.contains(&packs[1]) && lost.iter().all(|index| gets.contains(&own(index))));
    assert_eq!(fetcher.status().missing, 0);
}

#[tokio::test]
async fn doubted_chunks_are_hashed_here_although_a_pack_has_them() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 10);
    let (sliced, _) = rig.publish_packed(&bytes);
    let fetcher = rig.fetcher();
    fetcher.ensure_whole(&rig.open(&sliced)).await.unwrap();
    rig.blobs.save(false).unwrap();
    rig.doubt(&sliced);
    rig.bucket.forget_requests();
    rig.bucket.fail(|_, _| Some(Fault::Unavailable));
    assert!(!rig.open(&sliced).has(0, 1));
    assert!(read_through(&fetcher, &rig, &sliced, 1 << 20).await.unwrap() == bytes);
    assert!(rig.bucket.requests("get").is_empty());
}

#[tokio::test]
async fn a_pack_found_missing_is_believed_to_hold_nothing() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 9);
    let (sliced, packs) = rig.publish_packed(&bytes);
    let chunks = sliced.chunks.chunks();
    let row_of = |index: usize| rig.ledger.chunk(&chunks[index].digest).unwrap().unwrap();
    let group = pack::group(&sliced.chunks).swap_remove(1);
    // This machine saw it itself a moment ago.
    for &index in &group {
        let seen = ChunkRow {
            confirmed_millis: local_millis(),
            ..row_of(index)
        };
        let change = Change::PutChunk(chunks[index].digest, seen);
        rig.ledger.commit(vec![change]).unwrap();
    }
    rig.bucket.remove(&packs[1]);
    let fetcher = rig.fetcher();
    let read = fetcher
        .read(
            &rig.open(&sliced),
            &ReadCursor::default(),
            sliced.chunks.start(group[0]),
            10,
        )
        .await;
    assert!(matches!(read, Err(StoreError::Missing { .. })), "{read:?}");
    for index in 0..chunks.len() {
        let row = row_of(index);
        assert_eq!(row.place.is_none(), group.contains(&index));
        assert_eq!(row.confirmed_millis, 0);
    }
}

#[tokio::test]
async fn a_place_that_lies_is_found_out() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 7);
    let (sliced, _) = rig.publish_packed(&bytes);
    let chunks = sliced.chunks.chunks();
    let other = rig.ledger.chunk(&chunks[2].digest).unwrap().unwrap();
    let lie = Change::PutChunk(chunks[1].digest, other);
    rig.ledger.commit(vec![lie]).unwrap();
    let fetcher = rig.fetcher();
    let read = fetcher
        .read(
            &rig.open(&sliced),
            &ReadCursor::default(),
            sliced.chunks.start(1),
            10,
        )
        .await;
    assert!(matches!(read, Err(StoreError::Corrupt { .. })), "{read:?}");
}
