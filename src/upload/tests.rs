//! Tests of uploading: what is sent, what is not, and what survives trouble.

mod forgotten;

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant as Clock},
};

use bytes::Bytes;
use tokio::{runtime::Handle, time::Instant};

use super::{UploadOptions, UploaderHandle, spawn_over};
use crate::{
    base::{
        chunk::{Chunk, ChunkList, Sliced},
        digest::Digest,
    },
    store::{
        blobs::FileId,
        manifest, pack,
        rows::{BlobRow, Change, Durability, Residency},
        testing::{Fault, Rig, eventually_async, noise},
    },
    tier::{SharedBucket, layout},
};

const LARGE: usize = 12 << 20;

fn uploader(rig: &Rig) -> UploaderHandle {
    uploader_with(rig, 4)
}

fn uploader_with(rig: &Rig, parallel: usize) -> UploaderHandle {
    let options = UploadOptions {
        activity: Arc::default(),
        parallel,
        max_backoff: Duration::from_millis(400),
    };
    let (ledger, blobs) = (Arc::clone(&rig.ledger), Arc::clone(&rig.blobs));
    let bucket = Arc::clone(&rig.bucket) as SharedBucket;
    spawn_over(&Handle::current(), ledger, blobs, bucket, options)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn is_durable(rig: &Rig, sliced: &Sliced) -> bool {
    matches!(rig.durability(sliced), Some(Durability::Durable { .. }))
}

/// The bytes of a chunk where its row says that the bucket has them.
fn chunk_in_bucket(rig: &Rig, chunk: &Digest) -> Option<Bytes> {
    let place = rig.ledger.chunk(chunk).unwrap().and_then(|row| row.place);
    let Some(place) = place else {
        return rig.bucket.object(&layout::blob(chunk));
    };
    let pack = rig.bucket.object(&layout::pack(&place.pack))?;
    Some(pack.slice(place.range().start as usize..place.range().end as usize))
}

fn assert_in_bucket(rig: &Rig, sliced: &Sliced, bytes: &[u8]) {
    for (index, chunk) in sliced.chunks.chunks().iter().enumerate() {
        let start = sliced.chunks.start(index) as usize;
        let object = chunk_in_bucket(rig, &chunk.digest).unwrap();
        assert!(
            object == bytes[start..start + chunk.len as usize],
            "chunk {index}"
        );
    }
}

#[tokio::test]
async fn dirty_blobs_become_durable_and_their_bytes_are_in_the_bucket() {
    let rig = Rig::new();
    let (small, large) = (noise(3000, 1), noise(LARGE, 2));
    let uploader = uploader(&rig);
    let sealed = [rig.seal(&small), rig.seal(&large)];
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    assert!(sealed.iter().all(|sliced| is_durable(&rig, sliced)));
    assert_in_bucket(&rig, &sealed[0], &small);
    assert_in_bucket(&rig, &sealed[1], &large);
    assert_eq!(rig.residency(&sealed[1]), Residency::Whole);
    let status = uploader.status();
    assert_eq!(
        (status.uploaded_blobs, status.uploading_blobs, status.retries),
        (2, 0, 0)
    );
    assert_eq!(status.uploaded_bytes, 3000 + LARGE as u64);
    let packs = pack::group(&sealed[1].chunks).len();
    assert!(packs < sealed[1].chunks.chunks().len());
    assert_eq!(rig.bucket.requests("put").len(), 1 + packs);
    let asked = rig.bucket.requests("head").len() + rig.bucket.requests("get").len();
    assert_eq!(asked, packs, "whether another machine made the pack");
    uploader.shutdown().await;
}

#[tokio::test]
async fn small_blobs_travel_together() {
    let rig = Rig::new();
    let bytes: Vec<_> = (0..100u64).map(|seed| noise(1000, seed)).collect();
    let sealed: Vec<_> = bytes.iter().map(|bytes| rig.seal(bytes)).collect();
    let uploader = uploader(&rig);
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    assert_eq!(rig.bucket.requests("put").len(), 1);
    for (sliced, bytes) in sealed.iter().zip(&bytes) {
        assert!(is_durable(&rig, sliced));
        assert_in_bucket(&rig, sliced, bytes);
    }
    assert_eq!(uploader.status().uploaded_blobs, 100);
    assert_eq!(uploader.status().uploaded_bytes, 100_000);
    // A few find their like under their own names.
    for seed in 200..203u64 {
        rig.seal(&noise(1000, seed));
    }
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    assert_eq!(rig.bucket.requests("put").len(), 4);
}

#[tokio::test]
async fn more_small_blobs_than_a_pack_holds_do_not_wait_for_others() {
    let rig = Rig::new();
    let count = 3 * pack::MAX_MEMBERS as u64;
    let sealed: Vec<_> = (0..count).map(|seed| rig.seal(&noise(100, seed))).collect();
    let uploader = uploader(&rig);
    // Nobody waits for them with a flush, which would hurry them.
    eventually_async("all are durable", || {
        sealed.iter().all(|sliced| is_durable(&rig, sliced))
    })
    .await;
    assert_eq!(rig.bucket.requests("put").len(), 3);
    uploader.shutdown().await;
}

#[tokio::test]
async fn small_blobs_that_are_wrong_or_gone_hold_up_no_other() {
    let rig = Rig::new();
    rig.bucket.fail(|_, _| Some(Fault::Unavailable));
    let sealed: Vec<_> = (0..8u64).map(|seed| rig.seal(&noise(500, seed))).collect();
    fs::write(rig.path(&sealed[2].digest), b"changed behind our back").unwrap();
    fs::write(rig.path(&sealed[3].digest), b"").unwrap();
    rig.ledger
        .commit(vec![Change::DropBlob(sealed[4].digest)])
        .unwrap();
    let uploader = uploader(&rig);
    eventually_async("the bucket is away", || uploader.status().last_error.is_some()).await;
    rig.bucket.heal();
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    for index in [0, 1, 5, 6, 7] {
        assert!(is_durable(&rig, &sealed[index]), "{index}");
    }
    for index in [2, 3] {
        assert_eq!(rig.durability(&sealed[index]), Some(Durability::Quarantined));
        assert_eq!(chunk_in_bucket(&rig, &sealed[index].digest), None);
    }
    assert_eq!(rig.row(&sealed[4]), None);
    assert_eq!(uploader.status().quarantined_blobs, 2);
    assert_eq!(uploader.status().uploading_blobs, 0);
}

#[tokio::test]
async fn small_blobs_whose_reply_was_lost_or_whose_pack_is_none_become_durable() {
    let rig = Rig::new();
    let mut lost = false;
    rig.bucket.fail(move |verb, _| {
        let first = verb == "put" && !std::mem::replace(&mut lost, true);
        first.then_some(Fault::LostReply)
    });
    let bytes: Vec<_> = (0..10u64).map(|seed| noise(700, seed)).collect();
    let sealed: Vec<_> = bytes.iter().map(|bytes| rig.seal(bytes)).collect();
    let uploader = uploader(&rig);
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    assert_eq!(rig.bucket.len(), 1, "the pack that it had sent");
    for (sliced, bytes) in sealed.iter().zip(&bytes) {
        assert!(is_durable(&rig, sliced));
        assert_in_bucket(&rig, sliced, bytes);
    }
    uploader.shutdown().await;
    let other = beside(&rig);
    other
        .bucket
        .insert(other.bucket.requests("put")[0].clone(), vec![7; 5000].into());
    for bytes in &bytes {
        other.seal(bytes);
    }
    // The only place is given back before they go one by one.
    let second = uploader_with(&other, 1);
    assert_eq!(second.wait_clean(soon()).await, 0);
    for (sliced, bytes) in sealed.iter().zip(&bytes) {
        assert!(is_durable(&other, sliced));
        assert_in_bucket(&other, sliced, bytes);
    }
}

#[tokio::test]
async fn small_blobs_that_another_machine_sent_are_not_sent_again() {
    let first = Rig::new();
    let bytes: Vec<_> = (0..10u64).map(|seed| noise(700, seed)).collect();
    let sealed: Vec<_> = bytes.iter().map(|bytes| first.seal(bytes)).collect();
    assert_eq!(uploader(&first).wait_clean(soon()).await, 0);
    first.bucket.forget_requests();
    // It learned from their entries where they are.
    let second = beside(&first);
    for sliced in &sealed {
        let place = first.ledger.chunk(&sliced.digest).unwrap().unwrap().place;
        assert!(place.is_some());
        let told = second.ledger.told_places(&sliced.chunks, &[place]).unwrap();
        second.ledger.commit(told).unwrap();
    }
    for bytes in &bytes {
        second.seal(bytes);
    }
    assert_eq!(uploader(&second).wait_clean(soon()).await, 0);
    assert!(sealed.iter().all(|sliced| is_durable(&second, sliced)));
    assert!(second.bucket.requests("put").is_empty());
    assert_eq!(second.bucket.requests("head").len(), 1);

    // Nor are they forgotten when what they travel with cannot be sent together.
    let third = beside(&first);
    for sliced in &sealed {
        let place = first.ledger.chunk(&sliced.digest).unwrap().unwrap().place;
        let told = third.ledger.told_places(&sliced.chunks, &[place]).unwrap();
        third.ledger.commit(told).unwrap();
    }
    for bytes in &bytes {
        third.seal(bytes);
    }
    let new: Vec<_> = (50..55u64).map(|seed| third.seal(&noise(700, seed))).collect();
    let name = pack::name_of(new.iter().map(|sliced| sliced.digest));
    third.bucket.insert(layout::pack(&name), vec![7; 5000].into());
    assert_eq!(uploader(&third).wait_clean(soon()).await, 0);
    assert!(sealed.iter().chain(&new).all(|sliced| is_durable(&third, sliced)));
    assert_eq!(
        third.bucket.requests("put").len(),
        6,
        "the pack, and five by themselves"
    );
}

#[tokio::test]
async fn chunks_that_the_bucket_has_are_not_sent_again() {
    let rig = Rig::new();
    let uploader = uploader(&rig);
    let mut bytes = noise(LARGE, 3);
    rig.seal(&bytes);
    uploader.wait_clean(soon()).await;
    rig.bucket.forget_requests();
    bytes[LARGE / 2] ^= 1;
    let changed = rig.seal(&bytes);
    uploader.wait_clean(soon()).await;
    assert!(is_durable(&rig, &changed));
    let sent = rig.bucket.requests("put").len();
    assert!((1..=2).contains(&sent), "{sent} objects were sent");
    let asked = rig.bucket.requests("head").len() + rig.bucket.requests("get").len();
    assert!(asked <= sent, "confirmed chunks are not asked for");
    assert_in_bucket(&rig, &changed, &bytes);
}

/// Another machine over the bucket of `rig`.
fn beside(rig: &Rig) -> Rig {
    Rig {
        bucket: Arc::clone(&rig.bucket),
        ..Rig::new()
    }
}

#[tokio::test]
async fn chunks_that_another_machine_uploaded_are_not_sent() {
    let first = Rig::new();
    let second = beside(&first);
    let mut bytes = noise(LARGE, 4);
    first.seal(&bytes);
    assert_eq!(uploader(&first).wait_clean(soon()).await, 0);
    first.bucket.forget_requests();
    let sliced = second.seal(&bytes);
    let other = uploader(&second);
    assert_eq!(other.wait_clean(soon()).await, 0);
    assert!(is_durable(&second, &sliced));
    assert!(second.bucket.requests("put").is_empty());
    assert_eq!(other.status().skipped_chunks, sliced.chunks.chunks().len() as u64);
    assert_in_bucket(&second, &sliced, &bytes);
    // Of a version of its own it sends the packs around the change.
    bytes[LARGE / 2] ^= 1;
    let third = beside(&first);
    let changed = third.seal(&bytes);
    let third_uploader = uploader(&third);
    assert_eq!(third_uploader.wait_clean(soon()).await, 0);
    assert!(is_durable(&third, &changed));
    assert!(third.bucket.requests("put").len() <= 2);
    assert_in_bucket(&third, &changed, &bytes);
}

#[tokio::test]
async fn a_pack_that_is_none_does_not_stop_its_chunks() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 40);
    let sliced = rig.seal(&bytes);
    let groups = pack::group(&sliced.chunks);
    let group = groups.iter().find(|group| group.len() > 1).unwrap();
    let digests = group.iter().map(|&index| sliced.chunks.chunks()[index].digest);
    let key = layout::pack(&pack::name_of(digests));
    rig.bucket.insert(key, vec![7; 5000].into());
    let uploader = uploader(&rig);
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    assert!(is_durable(&rig, &sliced));
    assert_in_bucket(&rig, &sliced, &bytes);
}

#[tokio::test]
async fn a_small_blob_that_exists_is_durable() {
    let rig = Rig::new();
    rig.bucket.fill(b"somebody else's");
    let sliced = rig.seal(b"somebody else's");
    let uploader = uploader(&rig);
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    assert!(is_durable(&rig, &sliced));
}

#[tokio::test]
async fn a_blob_whose_bytes_were_changed_is_quarantined_and_never_sent() {
    let rig = Rig::new();
    let large = noise(LARGE, 5);
    let (small, large) = (rig.seal(b"small"), rig.seal(&large));
    let short = rig.seal(b"short");
    fs::write(rig.path(&small.digest), b"SMALL").unwrap();
    let blob = rig.open(&short);
    fs::write(rig.path(&short.digest), b"sho").unwrap();
    let mut damaged = fs::read(rig.path(&large.digest)).unwrap();
    damaged[LARGE - 1] ^= 1;
    fs::write(rig.path(&large.digest), damaged).unwrap();
    let good = rig.seal(b"good");
    let uploader = uploader(&rig);
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    for sliced in [&small, &large, &short] {
        assert_eq!(rig.durability(sliced), Some(Durability::Quarantined));
        let last = sliced.chunks.chunks().last().unwrap();
        assert_eq!(chunk_in_bucket(&rig, &last.digest), None);
        assert!(rig.path(&sliced.digest).exists(), "kept for inspection");
    }
    assert!(is_durable(&rig, &good));
    assert!(!blob.has(0, 1), "nor are its bytes served any more");
    assert!(!rig.open(&small).has(0, 1));
    let large_blob = rig.open(&large);
    assert!(large_blob.has(0, 1) && !large_blob.has(LARGE as u64 - 1, 1));
    assert_eq!(uploader.status().quarantined_blobs, 3);
    // Creating it again repairs it.
    rig.seal(b"small");
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    assert!(is_durable(&rig, &small));
    assert_eq!(rig.open(&small).read(0, 9).unwrap(), b"small");
}

#[tokio::test]
async fn uploads_survive_lost_replies_and_refusals_of_a_busy_server() {
    let rig = Rig::new();
    let mut request = 0;
    rig.bucket.fail(move |verb, _| {
        request += 1;
        match request % 3 {
            0 => Some(Fault::Unavailable),
            1 if verb == "put" => Some(Fault::LostReply),
            _ => None,
        }
    });
    let bytes = noise(LARGE, 6);
    let large = rig.seal(&bytes);
    let small: Vec<_> = (0..20u64).map(|seed| rig.seal(&noise(100, 50 + seed))).collect();
    let uploader = uploader(&rig);
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    assert!(is_durable(&rig, &large) && small.iter().all(|sliced| is_durable(&rig, sliced)));
    assert_in_bucket(&rig, &large, &bytes);
    assert!(uploader.status().retries > 0);
    assert_eq!(uploader.status().last_error, None);
}

#[tokio::test]
async fn a_flush_during_an_outage_says_what_is_left_and_ends_when_the_bucket_is_back() {
    let rig = Rig::new();
    rig.bucket.fail(|_, _| Some(Fault::Unavailable));
    let sealed: Vec<_> = (0..3u64).map(|seed| rig.seal(&noise(100, seed))).collect();
    let uploader = uploader(&rig);
    let left = uploader
        .wait_clean(Instant::now() + Duration::from_millis(300))
        .await;
    assert_eq!(left, 3);
    eventually_async("the failure is told", || {
        uploader
            .status()
            .last_error
            .is_some_and(|error| error.contains("503"))
    })
    .await;
    rig.bucket.heal();
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    assert!(sealed.iter().all(|sliced| is_durable(&rig, sliced)));
    assert_eq!(uploader.status().last_error, None);
}

#[tokio::test]
async fn a_kick_ends_the_wait_after_a_refusal() {
    let rig = Rig::new();
    rig.bucket.fail(|_, _| Some(Fault::Denied));
    let sliced = rig.seal(b"refused");
    let uploader = uploader(&rig);
    eventually_async("it is refused", || uploader.status().last_error.is_some()).await;
    let refused = rig.bucket.requests("put").len();
    assert_eq!(refused, 1, "a refusal is not tried again at once");
    rig.bucket.heal();
    let began = Clock::now();
    uploader.kick();
    eventually_async("it is uploaded", || is_durable(&rig, &sliced)).await;
    assert!(began.elapsed() < super::OPERATOR_WAIT);
}

#[tokio::test]
async fn the_queue_survives_a_restart_and_what_was_confirmed_is_not_sent_again() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 7);
    let sliced = rig.seal(&bytes);
    let mut sent = 0;
    rig.bucket.fail(move |verb, _| {
        sent += usize::from(verb == "put");
        (sent > 2).then_some(Fault::Unavailable)
    });
    let first = uploader(&rig);
    eventually_async("it fails", || first.status().last_error.is_some()).await;
    first.shutdown().await;
    let confirmed = rig.bucket.len();
    assert!(confirmed >= 2);
    rig.bucket.heal();
    rig.bucket.forget_requests();
    let rig = rig.killed();
    let second = uploader(&rig);
    assert_eq!(second.wait_clean(soon()).await, 0);
    assert!(is_durable(&rig, &sliced));
    let packs = pack::group(&sliced.chunks).len();
    assert!(rig.bucket.requests("put").len() <= packs - 2);
    assert_in_bucket(&rig, &sliced, &bytes);
}

#[tokio::test]
async fn no_more_requests_are_under_way_than_asked_for() {
    let rig = Rig::new();
    rig.bucket.hold();
    rig.seal(&noise(LARGE, 8));
    for seed in 0..10u64 {
        rig.seal(&noise(pack::MAX_SMALL_BYTES as usize + 1, 80 + seed));
    }
    let uploader = uploader(&rig);
    // A pack takes two of the four.
    eventually_async("all places are taken", || rig.bucket.under_way() >= 2).await;
    assert!(uploader.status().uploading_blobs <= 4);
    rig.bucket.let_through(7);
    eventually_async("others follow", || rig.bucket.under_way() >= 2).await;
    rig.bucket.open();
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    let most = rig
        .bucket
        .most_under_way
        .load(std::sync::atomic::Ordering::SeqCst);
    assert!((2..=4).contains(&most), "{most}");
}

#[tokio::test]
async fn a_long_blob_has_its_chunk_list_in_the_bucket_before_it_is_durable() {
    let rig = Rig::new();
    // Many chunks of little content: what counts is their number.
    let pieces: Vec<Vec<u8>> = (0..=manifest::MAX_INLINE_CHUNKS as u64)
        .map(|index| noise(2048 + index as usize, index))
        .collect();
    let chunk = |piece: &Vec<u8>| Chunk {
        digest: Digest::of(piece),
        len: piece.len() as u32,
    };
    let bytes = pieces.concat();
    assert!(bytes.len() > 2 << 20);
    let (id, _) = rig.stage(&bytes);
    let sliced = Sliced {
        digest: Digest::of(&bytes),
        chunks: ChunkList::new(pieces.iter().map(chunk).collect()),
    };
    rig.ledger.commit(rig.blobs.seal(id, &sliced).unwrap()).unwrap();
    rig.bucket
        .fail(|_, key| key.starts_with("blobs/").then_some(Fault::Unavailable));
    let uploader = uploader(&rig);
    eventually_async("only the list is left", || uploader.status().last_error.is_some()).await;
    assert_eq!(rig.durability(&sliced), Some(Durability::Dirty));
    rig.bucket.heal();
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    let list = rig.ledger.list_of(&sliced.digest).unwrap().unwrap();
    let object = rig.bucket.object(&layout::blob(&list.digest)).unwrap();
    assert_eq!(
        (Digest::of(&object), object.len() as u64),
        (list.digest, list.size)
    );
    let (chunks, places) = manifest::decode(&object).unwrap();
    assert_eq!(chunks, sliced.chunks);
    for (chunk, place) in chunks.chunks().iter().zip(&places) {
        assert_eq!(rig.ledger.chunk(&chunk.digest).unwrap().unwrap().place, *place);
    }
    assert_in_bucket(&rig, &sliced, &bytes);
}

#[tokio::test]
async fn a_blob_dropped_while_it_waits_is_not_sent() {
    let rig = Rig::new();
    rig.bucket.hold();
    let sliced = rig.seal(&noise(LARGE, 9));
    let uploader = uploader(&rig);
    eventually_async("it begins", || rig.bucket.under_way() >= 2).await;
    rig.ledger.commit(vec![Change::DropBlob(sliced.digest)]).unwrap();
    rig.bucket.open();
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    eventually_async("it ends", || uploader.status().uploading_blobs == 0).await;
    assert!(rig.bucket.len() < pack::group(&sliced.chunks).len());
    assert_eq!(rig.row(&sliced), None, "an upload brings no row back");
}

#[tokio::test]
async fn an_upload_that_ends_changes_nothing_but_durability() {
    let rig = Rig::new();
    rig.bucket.hold();
    let sliced = rig.seal(b"pinned meanwhile");
    let uploader = uploader(&rig);
    eventually_async("it begins", || rig.bucket.under_way() == 1).await;
    let row = rig.row(&sliced).unwrap();
    let pinned = BlobRow {
        pinned: true,
        used_secs: 1,
        ..row
    };
    rig.ledger.commit(vec![Change::PutBlob(pinned)]).unwrap();
    assert_eq!(rig.blobs.evict(&sliced.digest).unwrap(), None);
    rig.bucket.open();
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    let row = rig.row(&sliced).unwrap();
    assert!(row.pinned && row.used_secs == 1 && is_durable(&rig, &sliced));
}

#[tokio::test]
async fn a_file_taken_over_during_its_upload_is_uploaded_as_it_was() {
    let rig = Rig::new();
    rig.bucket.hold();
    let bytes = noise(LARGE, 10);
    let sliced = rig.seal(&bytes);
    let uploader = uploader(&rig);
    eventually_async("it begins", || rig.bucket.under_way() >= 2).await;
    let blob = rig.open(&sliced);
    let lent = FileId::of(&blob.file().unwrap()).unwrap();
    let taken = rig.blobs.take_over(&blob, Some(lent)).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&taken.file, &vec![0; LARGE], 0).unwrap();
    rig.blobs.finish_take_over(taken);
    rig.bucket.open();
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    assert!(is_durable(&rig, &sliced));
    assert_in_bucket(&rig, &sliced, &bytes);
}

#[tokio::test]
async fn a_shutdown_ends_during_an_outage() {
    let rig = Rig::new();
    rig.bucket.fail(|_, _| Some(Fault::Unavailable));
    let sliced = rig.seal(b"left for the next start");
    let uploader = uploader(&rig);
    eventually_async("it fails", || uploader.status().retries > 0).await;
    tokio::time::timeout(Duration::from_secs(20), uploader.shutdown())
        .await
        .expect("it ends");
    assert_eq!(rig.durability(&sliced), Some(Durability::Dirty));
}
