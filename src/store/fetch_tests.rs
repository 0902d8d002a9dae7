//! Tests of fault-in: what is fetched, how often, and what is never served.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    StoreError,
    fetch::ReadCursor,
    manifest,
    rows::{ChunkRow, Durability, Residency},
    testing::{Fault, READ_TIMEOUT, Rig, eventually_async, noise},
};
use crate::{
    base::{chunk::Sliced, digest::Digest},
    tier::layout,
};

const LARGE: usize = 12 << 20;

fn chunk_key(sliced: &Sliced, index: usize) -> String {
    layout::blob(&sliced.chunks.chunks()[index].digest)
}

#[tokio::test]
async fn a_whole_read_gives_the_bytes_and_fetches_each_chunk_once() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 1);
    let sliced = rig.publish(&bytes);
    let fetcher = rig.fetcher();
    let blob = rig.open(&sliced);
    let read = fetcher
        .read(&blob, &ReadCursor::default(), 0, LARGE + 5)
        .await
        .unwrap();
    assert!(read == bytes, "these are not the bytes");
    let mut gets = rig.bucket.requests("get");
    assert_eq!(gets.len(), sliced.chunks.chunks().len());
    gets.sort();
    gets.dedup();
    assert_eq!(gets.len(), sliced.chunks.chunks().len());
    eventually_async("all is resident", || blob.is_whole()).await;
    assert!(fs::read(rig.path(&sliced.digest)).unwrap() == bytes);
    assert_eq!(rig.residency(&sliced), Residency::Whole);
    assert!(matches!(
        rig.durability(&sliced),
        Some(Durability::Durable { .. })
    ));
}

#[tokio::test]
async fn a_small_read_in_a_cold_blob_fetches_exactly_the_chunks_it_needs() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 2);
    let sliced = rig.publish(&bytes);
    let fetcher = rig.fetcher();
    let blob = rig.open(&sliced);
    let cursor = ReadCursor::default();
    let border = sliced.chunks.start(5);
    for (offset, chunks) in [
        (border + 100, vec![5]),
        (border - 4, vec![4]),
        (sliced.chunks.start(15) - 1, vec![14, 15]),
    ] {
        rig.bucket.forget_requests();
        let read = fetcher.read(&blob, &cursor, offset, 8).await.unwrap();
        assert_eq!(read, bytes[offset as usize..offset as usize + 8]);
        let mut gets = rig.bucket.requests("get");
        gets.sort();
        let mut wanted: Vec<_> = chunks.iter().map(|&index| chunk_key(&sliced, index)).collect();
        wanted.sort();
        assert_eq!(gets, wanted);
    }
    rig.bucket.forget_requests();
    fetcher.read(&blob, &cursor, border - 4, 8).await.unwrap();
    assert!(rig.bucket.requests("get").is_empty(), "both are resident");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_is_fetched_once_however_many_readers_wait() {
    let rig = Rig::new();
    let bytes = noise(1 << 20, 3);
    let sliced = rig.publish(&bytes);
    let fetcher = Arc::new(rig.fetcher());
    rig.bucket.hold();
    let readers: Vec<_> = (0..20u64)
        .map(|reader| {
            let (fetcher, blob) = (Arc::clone(&fetcher), rig.open(&sliced));
            tokio::spawn(async move {
                fetcher
                    .read(&blob, &ReadCursor::default(), reader * 1000, 1000)
                    .await
            })
        })
        .collect();
    eventually_async("the request is made", || rig.bucket.under_way() == 1).await;
    rig.bucket.open();
    for (reader, task) in readers.into_iter().enumerate() {
        let read = task.await.unwrap().unwrap();
        assert_eq!(read, bytes[reader * 1000..reader * 1000 + 1000]);
    }
    assert_eq!(rig.bucket.requests("get").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequential_reader_is_fetched_ahead_of_in_parallel() {
    let rig = Rig::new();
    let bytes = noise(2 * LARGE, 4);
    let sliced = rig.publish(&bytes);
    let fetcher = Arc::new(rig.fetcher_with(READ_TIMEOUT * 10, rig.reclaimer(u64::MAX)));
    let blob = rig.open(&sliced);
    fetcher.ensure_first(&blob).await.unwrap();
    rig.bucket.hold();
    let reader = tokio::spawn(async move {
        let cursor = ReadCursor::default();
        let mut all = Vec::new();
        while all.len() < 2 * LARGE {
            let offset = all.len() as u64;
            let mut buffer = Vec::new();
            let here = fetcher.read_resident(&blob, &cursor, offset, 128 << 10, &mut buffer);
            if let Some(here) = here.unwrap() {
                all.extend_from_slice(here.as_ref());
                continue;
            }
            let read = fetcher.read(&blob, &cursor, offset, 128 << 10).await;
            all.extend_from_slice(&read.unwrap());
        }
        all
    });
    eventually_async("it asks for more than it needs", || rig.bucket.under_way() >= 3).await;
    rig.bucket.open();
    assert!(reader.await.unwrap() == bytes);
    assert_eq!(rig.bucket.requests("get").len(), sliced.chunks.chunks().len());
}

#[tokio::test]
async fn wrong_bytes_from_the_bucket_are_never_served() {
    let rig = Rig::new();
    let sliced = rig.publish(&noise(5000, 5));
    rig.bucket.fail(|_, _| Some(Fault::WrongBytes));
    let fetcher = rig.fetcher();
    let blob = rig.open(&sliced);
    let read = fetcher.read(&blob, &ReadCursor::default(), 0, 10).await;
    assert!(matches!(read, Err(StoreError::Corrupt { blob }) if blob == sliced.digest));
    assert_eq!(fetcher.status().wrong_answers, 3);
    assert!(!blob.has(0, 1) && !rig.path(&sliced.digest).exists());
    assert_eq!(rig.row(&sliced), None);
}

#[tokio::test]
async fn an_object_of_another_length_is_never_served() {
    let rig = Rig::new();
    let sliced = rig.publish(&noise(5000, 6));
    let fetcher = rig.fetcher();
    for bytes in [vec![0; 4999], vec![0; 5001], vec![]] {
        rig.bucket.insert(chunk_key(&sliced, 0), bytes.into());
        let read = fetcher
            .read(&rig.open(&sliced), &ReadCursor::default(), 0, 10)
            .await;
        assert!(matches!(read, Err(StoreError::Corrupt { .. })));
    }
}

#[tokio::test]
async fn wrong_bytes_once_are_asked_for_again() {
    let rig = Rig::new();
    let bytes = noise(5000, 7);
    let sliced = rig.publish(&bytes);
    let mut first = true;
    rig.bucket
        .fail(move |_, _| std::mem::take(&mut first).then_some(Fault::WrongBytes));
    let fetcher = rig.fetcher();
    let read = fetcher
        .read(&rig.open(&sliced), &ReadCursor::default(), 0, 5000)
        .await
        .unwrap();
    assert!(read == bytes);
    assert_eq!((fetcher.status().wrong_answers, fetcher.status().retries), (1, 1));
}

#[tokio::test]
async fn a_blob_gone_from_the_bucket_is_missing_and_is_uploaded_when_it_is_created_again() {
    gone_and_created_again(true).await;
}

#[tokio::test]
async fn so_is_one_that_no_row_tells_of_yet() {
    gone_and_created_again(false).await;
}

async fn gone_and_created_again(saved: bool) {
    let rig = Rig::new();
    let bytes = noise(LARGE, 8);
    let sliced = rig.publish(&bytes);
    rig.bucket.remove(&chunk_key(&sliced, 3));
    let fetcher = rig.fetcher();
    let blob = rig.open(&sliced);
    fetcher.ensure_first(&blob).await.unwrap();
    assert!(blob.has(0, 1));
    if saved {
        rig.blobs.save(false).unwrap();
    }
    assert_eq!(rig.row(&sliced).is_some(), saved);
    let read = fetcher
        .read(&blob, &ReadCursor::default(), sliced.chunks.start(3), 10)
        .await;
    assert!(matches!(read, Err(StoreError::Missing { blob }) if blob == sliced.digest));
    assert_eq!(
        rig.bucket.requests("get").len(),
        2,
        "an absent object is asked for once"
    );
    drop(blob);
    rig.seal(&bytes);
    assert_eq!(rig.durability(&sliced), Some(Durability::Dirty));
    assert_eq!(
        rig.ledger.chunk(&sliced.chunks.chunks()[3].digest).unwrap(),
        Some(ChunkRow {
            confirmed_millis: 0,
            place: None
        })
    );
}

#[tokio::test]
async fn a_read_that_needs_a_bucket_in_trouble_ends_within_its_bound_and_resident_ones_go_on() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 9);
    let sliced = rig.publish(&bytes);
    let fetcher = rig.fetcher();
    let blob = rig.open(&sliced);
    let cursor = ReadCursor::default();
    fetcher.ensure_first(&blob).await.unwrap();
    rig.bucket.fail(|_, _| Some(Fault::Unavailable));
    let began = Instant::now();
    let read = fetcher.read(&blob, &cursor, sliced.chunks.start(9), 10).await;
    assert!(matches!(read, Err(StoreError::Unreachable { .. })), "{read:?}");
    assert!(began.elapsed() <= READ_TIMEOUT + Duration::from_secs(5));
    assert!(fetcher.status().last_error.unwrap().contains("503"));
    assert_eq!(fetcher.read(&blob, &cursor, 0, 10).await.unwrap(), bytes[..10]);
    rig.bucket.heal();
    let read = fetcher
        .read(&blob, &cursor, sliced.chunks.start(9), 10)
        .await
        .unwrap();
    assert_eq!(read, bytes[sliced.chunks.start(9) as usize..][..10]);
    assert_eq!(fetcher.status().last_error, None);
}

#[tokio::test]
async fn a_read_from_a_stalled_bucket_ends_within_its_bound() {
    let rig = Rig::new();
    let sliced = rig.publish(&noise(5000, 10));
    let fetcher = rig.fetcher();
    rig.bucket.hold();
    let began = Instant::now();
    let read = fetcher
        .read(&rig.open(&sliced), &ReadCursor::default(), 0, 10)
        .await;
    assert!(matches!(read, Err(StoreError::Unreachable { .. })), "{read:?}");
    assert!(began.elapsed() <= READ_TIMEOUT + Duration::from_secs(5));
    rig.bucket.open();
}

#[tokio::test]
async fn a_refusal_is_not_tried_again() {
    let rig = Rig::new();
    let sliced = rig.publish(&noise(5000, 11));
    rig.bucket.fail(|_, _| Some(Fault::Denied));
    let read = rig
        .fetcher()
        .read(&rig.open(&sliced), &ReadCursor::default(), 0, 10)
        .await;
    assert!(matches!(read, Err(StoreError::Unreachable { source, .. }) if !source.is_transient()));
    assert_eq!(rig.bucket.requests("get").len(), 1);
}

#[tokio::test]
async fn what_is_resident_survives_a_restart_and_is_not_fetched_again() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 12);
    let sliced = rig.publish(&bytes);
    let fetcher = rig.fetcher();
    let blob = rig.open(&sliced);
    for index in [2, 7, 8] {
        fetcher
            .read(&blob, &ReadCursor::default(), sliced.chunks.start(index), 1)
            .await
            .unwrap();
    }
    drop(blob);
    assert!(matches!(rig.residency(&sliced), Residency::Partial(_)));
    let resident: u64 = [2, 7, 8]
        .iter()
        .map(|&index: &usize| u64::from(sliced.chunks.chunks()[index].len))
        .sum();
    assert_eq!(rig.ledger.totals().resident_bytes, resident);
    drop(fetcher);
    let rig = rig.killed();
    rig.bucket.forget_requests();
    let fetcher = rig.fetcher();
    let blob = rig.open(&sliced);
    let start = sliced.chunks.start(7) as usize;
    let len = (sliced.chunks.start(9) as usize) - start;
    let read = fetcher
        .read(&blob, &ReadCursor::default(), start as u64, len)
        .await
        .unwrap();
    assert!(read == bytes[start..start + len]);
    assert!(rig.bucket.requests("get").is_empty());
    fetcher.ensure_whole(&blob).await.unwrap();
    assert_eq!(rig.bucket.requests("get").len(), sliced.chunks.chunks().len() - 3);
    assert!(blob.is_whole() && blob.file().is_ok());
    assert!(fs::read(rig.path(&sliced.digest)).unwrap() == bytes);
}

#[tokio::test]
async fn a_file_that_a_crash_left_is_not_taken_for_fetched_chunks() {
    let rig = Rig::new();
    let bytes = noise(5000, 13);
    let sliced = rig.publish(&bytes);
    fs::write(rig.path(&sliced.digest), vec![0; 5000]).unwrap();
    let blob = rig.open(&sliced);
    assert!(!blob.has(0, 1));
    let read = rig
        .fetcher()
        .read(&blob, &ReadCursor::default(), 0, 5000)
        .await
        .unwrap();
    assert!(read == bytes);
    assert_eq!(blob.read(0, 5000).unwrap(), bytes);
}

#[tokio::test]
async fn doubted_bytes_are_hashed_before_use_and_only_the_wrong_are_fetched() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 14);
    let sliced = rig.publish(&bytes);
    rig.seal_clean(&bytes);
    rig.doubt(&sliced);
    let mut damaged = bytes.clone();
    let lost = sliced.chunks.start(4) as usize;
    damaged[lost..lost + 4096].fill(0);
    fs::write(rig.path(&sliced.digest), damaged).unwrap();
    let blob = rig.open(&sliced);
    assert!(!blob.has(0, 1) && !blob.is_whole() && blob.file().is_err());
    let fetcher = rig.fetcher();
    let read = fetcher
        .read(&blob, &ReadCursor::default(), lost as u64, 10)
        .await
        .unwrap();
    assert_eq!(read, bytes[lost..lost + 10]);
    fetcher.ensure_whole(&blob).await.unwrap();
    assert_eq!(rig.bucket.requests("get"), [chunk_key(&sliced, 4)]);
    assert_eq!(blob.read(0, LARGE).unwrap(), bytes);
    drop(blob);
    assert!(!rig.row(&sliced).unwrap().doubted);
}

#[tokio::test]
async fn a_doubt_not_settled_is_kept_for_the_next_start() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 15);
    let sliced = rig.seal_clean(&bytes);
    rig.doubt(&sliced);
    let blob = rig.open(&sliced);
    rig.fetcher()
        .read(&blob, &ReadCursor::default(), 0, 10)
        .await
        .unwrap();
    drop(blob);
    let row = rig.row(&sliced).unwrap();
    assert!(row.doubted && row.residency == Residency::Whole);
    assert!(rig.bucket.requests("get").is_empty());
}

#[tokio::test]
async fn a_doubted_dirty_blob_that_is_wrong_is_quarantined_and_its_right_chunks_still_read() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 16);
    let sliced = rig.seal(&bytes);
    rig.doubt(&sliced);
    let mut damaged = bytes.clone();
    damaged[0] ^= 1;
    fs::write(rig.path(&sliced.digest), damaged).unwrap();
    let blob = rig.open(&sliced);
    let fetcher = rig.fetcher();
    let read = fetcher.read(&blob, &ReadCursor::default(), 0, 10).await;
    assert!(
        matches!(read, Err(StoreError::Missing { .. })),
        "no other copy exists"
    );
    assert_eq!(rig.durability(&sliced), Some(Durability::Quarantined));
    let start = sliced.chunks.start(1);
    let read = fetcher
        .read(&blob, &ReadCursor::default(), start, 10)
        .await
        .unwrap();
    assert_eq!(read, bytes[start as usize..][..10]);
    assert!(rig.path(&sliced.digest).exists(), "it is kept for inspection");
}

#[tokio::test]
async fn a_chunk_list_is_verified_and_makes_its_blob_known() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 17);
    let sliced = rig.bucket.fill(&bytes);
    let size = sliced.chunks.size();
    let list = manifest::encode(&sliced.chunks, &[]);
    let (name, len) = (Digest::of(&list), list.len() as u64);
    let fetcher = rig.fetcher();
    let fetch = |size| fetcher.fetch_manifest(name, len, sliced.digest, size);
    assert!(rig.blobs.open(&sliced.digest, size).unwrap().is_none());
    assert!(matches!(fetch(size).await, Err(StoreError::Missing { .. })));
    rig.bucket.insert(layout::blob(&name), vec![7; list.len()].into());
    assert!(matches!(fetch(size).await, Err(StoreError::Corrupt { .. })));
    rig.bucket.insert(layout::blob(&name), list);
    assert!(matches!(fetch(size + 1).await, Err(StoreError::Corrupt { .. })));
    fetch(size).await.unwrap();
    let read = fetcher
        .read(&rig.open(&sliced), &ReadCursor::default(), 0, LARGE)
        .await
        .unwrap();
    assert!(read == bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_gives_up_does_not_stop_the_others() {
    let rig = Rig::new();
    let bytes = noise(5000, 18);
    let sliced = rig.publish(&bytes);
    let fetcher = Arc::new(rig.fetcher());
    rig.bucket.hold();
    let read = |fetcher: Arc<super::fetch::Fetcher>, blob| async move {
        fetcher.read(&blob, &ReadCursor::default(), 0, 10).await
    };
    let first = tokio::spawn(read(Arc::clone(&fetcher), rig.open(&sliced)));
    eventually_async("the request is made", || rig.bucket.under_way() == 1).await;
    let second = tokio::spawn(read(Arc::clone(&fetcher), rig.open(&sliced)));
    first.abort();
    eventually_async("the second takes over", || rig.bucket.requests("get").len() == 2).await;
    rig.bucket.open();
    assert_eq!(second.await.unwrap().unwrap(), bytes[..10]);
}

#[tokio::test]
async fn blobs_that_share_a_chunk_are_each_filled() {
    let rig = Rig::new();
    let mut bytes = noise(LARGE, 19);
    let one = rig.publish(&bytes);
    bytes[LARGE - 1] ^= 1;
    let two = rig.publish(&bytes);
    let fetcher = rig.fetcher();
    let (one, two) = (rig.open(&one), rig.open(&two));
    tokio::try_join!(fetcher.ensure_whole(&one), fetcher.ensure_whole(&two)).unwrap();
    assert_eq!(two.read(0, LARGE).unwrap(), bytes);
    bytes[LARGE - 1] ^= 1;
    assert_eq!(one.read(0, LARGE).unwrap(), bytes);
}

#[tokio::test]
async fn what_the_disk_does_not_take_is_served_from_memory() {
    let rig = Rig::new();
    let bytes = noise(5000, 20);
    let sliced = rig.publish(&bytes);
    // A folder in the file's place: no file can be made there.
    fs::create_dir(rig.path(&sliced.digest)).unwrap();
    let fetcher = rig.fetcher();
    let blob = rig.open(&sliced);
    for _ in 0..3 {
        let read = fetcher
            .read(&blob, &ReadCursor::default(), 0, 5000)
            .await
            .unwrap();
        assert!(read == bytes);
    }
    assert!(!blob.has(0, 1), "never mark resident what was only attempted");
    assert_eq!(rig.bucket.requests("get").len(), 1);
    assert_eq!(fetcher.status().unkept, 1);
}

#[test]
fn a_name_gets_a_new_file_only_after_the_row_that_gave_up_the_last_one_is_on_the_disk() {
    let rig = Rig::new();
    let bytes = noise(5000, 21);
    let sliced = rig.seal_clean(&bytes);
    rig.ledger.barrier().unwrap();
    assert!(!rig.blobs.shared.is_leaving(&sliced.digest));
    rig.blobs.evict(&sliced.digest).unwrap().unwrap();
    assert!(
        rig.blobs.shared.is_leaving(&sliced.digest),
        "power loss could bring the old row back"
    );
    let blob = rig.open(&sliced);
    let failed = blob.file.store_chunks(0..1, &bytes, || Err(StoreError::Full));
    assert!(failed.is_err() && !rig.path(&sliced.digest).exists());
    rig.blobs.store_chunks(&blob, 0..1, &bytes).unwrap();
    assert!(blob.is_whole());
    rig.ledger.barrier().unwrap();
    assert!(!rig.blobs.shared.is_leaving(&sliced.digest));
}

#[tokio::test]
async fn a_quarantined_file_is_not_written_to_and_its_lost_chunks_are_read_from_the_bucket() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 22);
    let sliced = rig.seal(&bytes);
    rig.bucket.fill(&bytes);
    let mut damaged = bytes.clone();
    damaged[0] ^= 1;
    fs::write(rig.path(&sliced.digest), &damaged).unwrap();
    let blob = rig.open(&sliced);
    rig.blobs.quarantine(&blob, &[0]).unwrap();
    drop(blob);
    let blob = rig.open(&sliced);
    let fetcher = rig.fetcher();
    for _ in 0..3 {
        let read = fetcher
            .read(&blob, &ReadCursor::default(), 0, LARGE)
            .await
            .unwrap();
        assert!(read == bytes);
    }
    assert_eq!(rig.bucket.requests("get"), [chunk_key(&sliced, 0)]);
    assert!(fs::read(rig.path(&sliced.digest)).unwrap() == damaged);
    assert_eq!(rig.durability(&sliced), Some(Durability::Quarantined));
}

#[tokio::test]
async fn a_blob_whose_only_copy_was_lost_comes_back_when_the_bucket_has_it_after_all() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 23);
    let sliced = rig.seal(&bytes);
    // Uploaded, and the power went before that was written down.
    rig.bucket.fill(&bytes);
    fs::remove_file(rig.path(&sliced.digest)).unwrap();
    let blob = rig.open(&sliced);
    assert_eq!(rig.durability(&sliced), Some(Durability::Quarantined));
    // A part of it, and closed: that does not make it another damaged file.
    rig.fetcher().ensure_first(&blob).await.unwrap();
    drop(blob);
    assert_eq!(rig.residency(&sliced), Residency::Nothing);
    let blob = rig.open(&sliced);
    rig.fetcher().ensure_whole(&blob).await.unwrap();
    assert!(blob.is_whole() && blob.read(0, LARGE).unwrap() == bytes);
    assert_eq!(rig.residency(&sliced), Residency::Whole);
    assert!(matches!(
        rig.durability(&sliced),
        Some(Durability::Durable { .. })
    ));
}
