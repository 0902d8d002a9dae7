//! Blobs that no file has any more, before they were uploaded.

use std::fs;

use super::{LARGE, soon, uploader, uploader_with};
use crate::{
    base::chunk::Sliced,
    store::{
        rows::{Change, Content, NodeKind, NodeRow},
        testing::{Rig, eventually_async, noise},
    },
    upload::task::keep,
};

/// A file that has a blob, and then is deleted.
fn delete_the_file_of(rig: &Rig, sliced: &Sliced) {
    let node = NodeRow {
        content: Content::Blob(sliced.digest),
        ..NodeRow::new(rig.ledger.next_ino(), NodeKind::File, 0)
    };
    let ino = node.ino;
    rig.ledger.commit(vec![Change::PutNode(node)]).unwrap();
    assert!(!rig.ledger.is_unwanted(&sliced.digest));
    rig.ledger.commit(vec![Change::DropNode(ino)]).unwrap();
    assert!(rig.ledger.is_unwanted(&sliced.digest));
}

#[tokio::test]
async fn a_blob_forgotten_between_the_look_at_its_row_and_its_lease_is_not_sent() {
    let rig = Rig::new();
    for len in [3_000, LARGE] {
        let sliced = rig.seal(&noise(len, len as u64));
        let row = rig.row(&sliced).unwrap();
        let size = len as u64;
        delete_the_file_of(&rig, &sliced);
        assert!(rig.blobs.is_dirty(&sliced.digest).unwrap());
        assert_eq!(rig.blobs.forget_unwanted().unwrap(), size);
        assert!(keep(&rig.blobs, &rig.ledger, &row).unwrap().is_none());
        assert!(!rig.blobs.is_dirty(&sliced.digest).unwrap());
    }
    let uploader = uploader(&rig);
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    uploader.shutdown().await;
    assert_eq!(rig.bucket.len(), 0);
}

#[tokio::test]
async fn a_blob_that_is_leased_is_forgotten_when_the_lease_ends() {
    let rig = Rig::new();
    let sliced = rig.seal(&noise(3_000, 1));
    let row = rig.row(&sliced).unwrap();
    let kept = keep(&rig.blobs, &rig.ledger, &row).unwrap().unwrap();
    delete_the_file_of(&rig, &sliced);
    assert_eq!(rig.blobs.forget_unwanted().unwrap(), 0);
    assert!(rig.row(&sliced).is_some());
    drop(kept);
    assert_eq!(rig.blobs.forget_unwanted().unwrap(), 3_000);
    assert!(rig.row(&sliced).is_none());
    // One that has no file, and a row, is no such blob.
    let gone = rig.seal(&noise(LARGE, 2));
    let row = rig.row(&gone).unwrap();
    fs::remove_file(rig.path(&gone.digest)).unwrap();
    assert!(!matches!(keep(&rig.blobs, &rig.ledger, &row), Ok(None)));
}

/// As when a program deletes a file of which the upload is under way: its packs wait for the bucket.
#[tokio::test]
async fn a_blob_whose_file_is_deleted_during_its_upload_ends_it_and_holds_nobody_up() {
    let rig = Rig::new();
    rig.bucket.hold();
    let sliced = rig.seal(&noise(3 * LARGE, 3));
    let uploader = uploader_with(&rig, 1);
    eventually_async("its upload begins", || rig.bucket.under_way() > 0).await;
    delete_the_file_of(&rig, &sliced);
    assert_eq!(rig.blobs.forget_unwanted().unwrap(), 0, "it is being read");
    rig.bucket.open();
    assert_eq!(uploader.wait_clean(soon()).await, 0);
    uploader.shutdown().await;
    let packs = rig.bucket.requests("put").len();
    assert!(packs < 3 * LARGE / (4 << 20), "{packs} packs were sent");
    eventually_async("it is forgotten", || {
        rig.blobs.forget_unwanted().unwrap();
        rig.row(&sliced).is_none()
    })
    .await;
}
