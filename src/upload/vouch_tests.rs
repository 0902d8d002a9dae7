//! Tests of vouching: what costs nothing, what comes back, what is lost.

use std::{sync::Arc, time::Duration};

use tokio::{runtime::Handle, time::Instant};

use super::{
    UploadOptions, UploaderHandle, spawn_over,
    vouch::{Named, NamedChunks, Vouch, Voucher},
};
use crate::{
    base::{chunk::Sliced, clock::local_millis},
    store::{
        manifest,
        pack::PackPlace,
        rows::{BlobRow, Change, Durability},
        testing::{Rig, noise},
    },
    tier::{
        SharedBucket, layout,
        sweeping::{SweepList, mark},
    },
};

/// A blob of one chunk, and one of several packs.
const SIZES: [usize; 2] = [100_000, 12 << 20];

fn daemon(rig: &Rig) -> (UploaderHandle, Voucher) {
    let bucket = Arc::clone(&rig.bucket) as SharedBucket;
    let (ledger, blobs) = (Arc::clone(&rig.ledger), Arc::clone(&rig.blobs));
    let uploader = spawn_over(
        &Handle::current(),
        ledger,
        blobs,
        bucket,
        UploadOptions::default(),
    );
    let voucher = uploader.voucher(Arc::new(rig.fetcher()));
    (uploader, voucher)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn places(rig: &Rig, sliced: &Sliced) -> Vec<Option<PackPlace>> {
    let row = |digest| rig.ledger.chunk(digest).unwrap();
    let chunks = sliced.chunks.chunks().iter();
    chunks
        .map(|chunk| row(&chunk.digest).and_then(|row| row.place))
        .collect()
}

fn named(rig: &Rig, sliced: &Sliced) -> Vec<Named> {
    vec![Named {
        digest: sliced.digest,
        size: sliced.chunks.size(),
        chunks: NamedChunks::Told(sliced.chunks.clone(), places(rig, sliced)),
    }]
}

/// The keys of the objects that a blob is in.
fn objects(rig: &Rig, sliced: &Sliced) -> Vec<String> {
    let chunks = sliced.chunks.chunks().iter().zip(places(rig, sliced));
    let mut keys: Vec<_> = chunks
        .map(|(chunk, place)| match place {
            Some(place) => layout::pack(&place.pack),
            None => layout::blob(&chunk.digest),
        })
        .collect();
    keys.dedup();
    keys
}

/// Forgets when the bucket was last seen to have a blob.
fn grow_old(rig: &Rig, sliced: &Sliced) {
    let row = rig.row(sliced).unwrap();
    let mut changes = vec![Change::PutBlob(BlobRow {
        durability: Durability::Durable { confirmed_millis: 1 },
        ..row
    })];
    for chunk in sliced.chunks.chunks() {
        if let Some(mut row) = rig.ledger.chunk(&chunk.digest).unwrap() {
            row.confirmed_millis = 1;
            changes.push(Change::PutChunk(chunk.digest, row));
        }
    }
    rig.ledger.commit(changes).unwrap();
}

#[tokio::test]
async fn what_was_uploaded_just_now_costs_no_request() {
    for size in SIZES {
        let rig = Rig::new();
        let sliced = rig.seal(&noise(size, 1));
        let (uploader, voucher) = daemon(&rig);
        assert_eq!(uploader.wait_clean(soon()).await, 0);
        rig.bucket.forget_requests();
        let vouched = voucher.vouch(named(&rig, &sliced)).await.unwrap();
        assert!(
            matches!(vouched, Vouch::Until(until) if until > local_millis()),
            "{vouched:?}"
        );
        assert!(rig.bucket.requests("head").is_empty());
        // What was seen long ago is asked for, an object at a time, and then it is known.
        grow_old(&rig, &sliced);
        for _ in 0..2 {
            let vouched = voucher.vouch(named(&rig, &sliced)).await.unwrap();
            assert!(matches!(vouched, Vouch::Until(_)), "{vouched:?}");
        }
        let mut asked = rig.bucket.requests("head");
        asked.sort();
        let mut expected = objects(&rig, &sliced);
        expected.sort();
        assert_eq!(asked, expected);
    }
}

#[tokio::test]
async fn what_is_gone_is_uploaded_again() {
    for size in SIZES {
        let rig = Rig::new();
        let sliced = rig.seal(&noise(size, 2));
        let (uploader, voucher) = daemon(&rig);
        assert_eq!(uploader.wait_clean(soon()).await, 0);
        let gone = objects(&rig, &sliced);
        rig.bucket.remove(&gone[0]);
        grow_old(&rig, &sliced);
        let vouched = voucher.vouch(named(&rig, &sliced)).await.unwrap();
        assert_eq!(vouched, Vouch::Later);
        assert_eq!(uploader.wait_clean(soon()).await, 0);
        for key in objects(&rig, &sliced) {
            assert!(rig.bucket.object(&key).is_some(), "{key}");
        }
        let vouched = voucher.vouch(named(&rig, &sliced)).await.unwrap();
        assert!(matches!(vouched, Vouch::Until(_)), "{vouched:?}");
    }
}

#[tokio::test]
async fn what_is_condemned_gets_another_key_also_when_it_is_not_here() {
    for size in SIZES {
        for is_here in [true, false] {
            let rig = Rig::new();
            let sliced = rig.seal(&noise(size, 3));
            let (uploader, _) = daemon(&rig);
            assert_eq!(uploader.wait_clean(soon()).await, 0);
            uploader.shutdown().await;
            let before = objects(&rig, &sliced);
            let digests = before.iter().map(|key| layout::object_digest(key).unwrap());
            let list = SweepList::new(local_millis(), 1, digests.map(|digest| mark(&digest)).collect());
            rig.bucket.insert(layout::sweep_list("x"), list.encode().into());
            if !is_here {
                assert!(rig.blobs.evict(&sliced.digest).unwrap().is_some());
            }
            let (uploader, voucher) = daemon(&rig);
            let vouched = voucher.vouch(named(&rig, &sliced)).await.unwrap();
            assert_eq!(vouched, Vouch::Later);
            assert_eq!(uploader.wait_clean(soon()).await, 0);
            let after = objects(&rig, &sliced);
            assert!(after.iter().all(|key| !before.contains(key)), "{after:?}");
            let vouched = voucher.vouch(named(&rig, &sliced)).await.unwrap();
            assert!(matches!(vouched, Vouch::Until(_)), "{vouched:?}");
        }
    }
}

#[tokio::test]
async fn what_is_neither_here_nor_there_is_lost() {
    let rig = Rig::new();
    let sliced = rig.seal(&noise(100_000, 4));
    let (uploader, voucher) = daemon(&rig);
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    uploader.shutdown().await;
    assert!(rig.blobs.evict(&sliced.digest).unwrap().is_some());
    rig.bucket.remove(&layout::blob(&sliced.digest));
    grow_old(&rig, &sliced);
    let vouched = voucher.vouch(named(&rig, &sliced)).await.unwrap();
    assert_eq!(vouched, Vouch::Lost(vec![sliced.digest]));
}

#[tokio::test]
async fn a_chunk_list_of_another_time_is_read_for_what_it_says() {
    let rig = Rig::new();
    let sliced = rig.seal(&noise(12 << 20, 5));
    let (uploader, voucher) = daemon(&rig);
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    // One that says that each chunk is an object of its own, of which there is none.
    let list = manifest::encode(&sliced.chunks, &[]);
    let digest = crate::base::digest::Digest::of(&list);
    let listed = |digest| {
        vec![Named {
            digest: sliced.digest,
            size: sliced.chunks.size(),
            chunks: NamedChunks::Listed(digest, list.len() as u64),
        }]
    };
    rig.bucket.insert(layout::blob(&digest), list.clone());
    assert_eq!(voucher.vouch(listed(digest)).await.unwrap(), Vouch::Later);
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    // One that says where they are.
    let placed = manifest::encode(&sliced.chunks, &places(&rig, &sliced));
    let digest = crate::base::digest::Digest::of(&placed);
    rig.bucket.insert(layout::blob(&digest), placed);
    let vouched = voucher.vouch(listed(digest)).await.unwrap();
    assert!(matches!(vouched, Vouch::Until(_)), "{vouched:?}");
}
