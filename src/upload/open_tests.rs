//! Tests of a whole store: opened, used, closed and opened again.

use std::{fs::File, io::Write, time::Duration};

use crate::{
    base::{chunk::Chunk, id::StoreId},
    store::{
        Store, StoreOptions,
        fetch::ReadCursor,
        ingest::slice_file,
        rows::Durability,
        testing::{MemoryBucket, noise},
    },
    upload::{self, UploadOptions},
};

#[tokio::test]
async fn what_is_sealed_is_uploaded_and_is_here_after_a_restart_and_there_for_another_machine() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let bucket = MemoryBucket::new();
    let open = |dir: &tempfile::TempDir| {
        let options = StoreOptions {
            dir: dir.path().join("cache"),
            cache_size: 1 << 30,
            min_free: 0,
            read_timeout: Duration::from_secs(30),
        };
        Store::open(options, StoreId(7), bucket.clone()).unwrap()
    };
    let bytes = noise(9 << 20, 1);
    let store = std::sync::Arc::new(open(&here));
    let runtime = tokio::runtime::Handle::current();
    let uploader = upload::spawn(&runtime, store.clone(), bucket.clone(), UploadOptions::default());
    let (id, mut file) = store.staging.create().unwrap();
    file.write_all(&bytes).unwrap();
    drop(file);
    let sliced = slice_file(&File::open(store.staging.path(id)).unwrap()).unwrap();
    let mut changes = store.blobs.seal(id, &sliced).unwrap();
    let manifest = changes.remove(0);
    store
        .ledger
        .commit([vec![manifest.clone()], changes].concat())
        .unwrap();
    store.staging.remove_after_barrier(id);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    assert_eq!(uploader.wait_clean(deadline).await, 0);
    uploader.shutdown().await;
    let place = |chunk: &Chunk| store.ledger.chunk(&chunk.digest).unwrap().unwrap().place;
    let places: Vec<_> = sliced.chunks.chunks().iter().map(place).collect();
    assert!(places.iter().any(Option::is_some));
    std::sync::Arc::into_inner(store)
        .expect("nothing else holds it")
        .close()
        .unwrap();

    let store = open(&here);
    assert!(!store.recovery.crashed);
    let row = store.ledger.blob(&sliced.digest).unwrap().unwrap();
    assert!(matches!(row.durability, Durability::Durable { .. }));
    let blob = store
        .blobs
        .open(&sliced.digest, sliced.chunks.size())
        .unwrap()
        .unwrap();
    assert_eq!(blob.read(0, bytes.len()).unwrap(), bytes);
    drop(blob);
    store.close().unwrap();
    assert_eq!(
        std::fs::read_dir(here.path().join("cache/staging"))
            .unwrap()
            .count(),
        0
    );

    let store = open(&there);
    let mut told = store.ledger.told_places(&sliced.chunks, &places).unwrap();
    told.push(manifest);
    store.ledger.commit(told).unwrap();
    let blob = store
        .blobs
        .open(&sliced.digest, sliced.chunks.size())
        .unwrap()
        .unwrap();
    let read = store
        .fetcher
        .read(&blob, &ReadCursor::default(), 0, bytes.len())
        .await
        .unwrap();
    assert!(read == bytes);
    drop(blob);
    store.close().unwrap();
}
