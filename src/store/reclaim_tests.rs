//! Tests of the budget.

use std::sync::Arc;

use super::{
    StoreError,
    fetch::ReadCursor,
    objects::Objects,
    rows::{BlobRow, Change, Residency},
    testing::{READ_TIMEOUT, Rig, eventually, noise},
};
use crate::base::digest::Digest;

const BLOB: usize = 1 << 20;

#[tokio::test]
async fn the_budget_holds_after_three_times_its_size_was_read() {
    let rig = Rig::new();
    let cache_size = 8 * BLOB as u64;
    let reclaimer = rig.reclaimer(cache_size);
    let fetcher = rig.fetcher_with(READ_TIMEOUT * 10, Arc::clone(&reclaimer));
    for seed in 0..24 {
        let bytes = noise(BLOB, 100 + seed);
        let sliced = rig.publish(&bytes);
        let blob = rig.open(&sliced);
        let read = fetcher
            .read(&blob, &ReadCursor::default(), 0, BLOB)
            .await
            .unwrap();
        assert!(read == bytes);
        drop(blob);
        reclaimer.run_now();
        assert!(rig.ledger.totals().resident_bytes <= cache_size);
    }
    let status = reclaimer.status();
    assert!(status.evicted_bytes >= 16 * BLOB as u64 && !status.stuck);
    // No more left than the limit and its slack asked for.
    assert!(rig.ledger.totals().resident_bytes >= 6 * BLOB as u64);
    let mut on_disk = 0;
    for shard in std::fs::read_dir(rig.dir.path().join("blobs")).unwrap() {
        for file in std::fs::read_dir(shard.unwrap().path()).unwrap() {
            on_disk += file.unwrap().metadata().unwrap().len();
        }
    }
    assert_eq!(on_disk, rig.ledger.totals().resident_bytes);
}

#[test]
fn what_must_stay_stays_and_the_rest_goes_by_least_recent_use() {
    let rig = Rig::new();
    let seal = |seed: u64, clean: bool, used_secs: u64, pinned: bool| {
        let bytes = noise(BLOB, seed);
        let sliced = if clean {
            rig.seal_clean(&bytes)
        } else {
            rig.seal(&bytes)
        };
        let row = rig.row(&sliced).unwrap();
        let row = BlobRow {
            used_secs,
            pinned,
            ..row
        };
        rig.ledger.commit(vec![Change::PutBlob(row)]).unwrap();
        sliced
    };
    let dirty = seal(1, false, 1, false);
    let pinned = seal(2, true, 2, true);
    let open = seal(3, true, 3, false);
    let old = seal(4, true, 4, false);
    let touched = seal(5, true, 5, false);
    let recent = seal(6, true, 600, false);
    let blob = rig.blobs.lease(&open.digest, BLOB as u64).unwrap().unwrap();
    rig.blobs.touch(&touched.digest);
    let reclaimer = rig.reclaimer(11 * BLOB as u64 / 2);
    reclaimer.run_now();
    let here = |sliced| rig.residency(sliced) == Residency::Whole;
    assert!(here(&dirty) && here(&pinned) && here(&open));
    assert!(here(&touched), "a use in memory counts");
    assert!(!here(&old));
    assert_eq!(
        reclaimer.make_room(1),
        2 * BLOB as u64,
        "the room for what comes next is made at once"
    );
    assert!(!here(&recent) && !here(&touched));
    assert!(here(&dirty) && here(&pinned) && here(&open));
    drop(blob);
}

#[test]
fn nothing_leaves_for_what_would_not_fit_if_all_had_left() {
    let rig = Rig::new();
    let clean = rig.seal_clean(&noise(BLOB, 9));
    let reclaimer = rig.reclaimer(u64::MAX);
    assert!(!reclaimer.fits_on_disk(u64::MAX / 2));
    assert!(!reclaimer.make_room_for(u64::MAX / 2));
    assert_eq!(rig.residency(&clean), Residency::Whole);
    // Whoever needs little was told that the disk is full, whatever it says itself.
    assert!(reclaimer.make_room_for(1));
    assert_eq!(rig.residency(&clean), Residency::Nothing);
}

#[test]
fn a_cache_of_which_nothing_can_leave_is_reported_until_something_can() {
    let rig = Rig::new();
    let sliced = rig.seal(&noise(BLOB, 7));
    let reclaimer = rig.reclaimer(BLOB as u64 / 2);
    reclaimer.run_now();
    assert!(reclaimer.status().stuck);
    assert_eq!(rig.residency(&sliced), Residency::Whole);
    rig.blobs.set_durable(&sliced.digest, 1).unwrap();
    reclaimer.run_now();
    reclaimer.run_now();
    assert_eq!(rig.residency(&sliced), Residency::Nothing);
    assert!(!reclaimer.status().stuck);
}

#[test]
fn the_thread_keeps_the_limit_by_itself_when_it_is_told_and_ends_when_it_is_stopped() {
    let rig = Rig::new();
    let sliced = rig.seal_clean(&noise(BLOB, 8));
    let reclaimer = rig.reclaimer(1000);
    reclaimer.kick();
    eventually("it is evicted", || rig.residency(&sliced) == Residency::Nothing);
    reclaimer.stop();
    reclaimer.stop();
    let again = rig.seal_clean(&noise(BLOB, 9));
    rig.blobs.touch(&again.digest);
    drop(reclaimer);
    assert_eq!(rig.residency(&again), Residency::Whole);
}

#[test]
fn many_blobs_that_must_stay_do_not_hide_those_that_may_go() {
    let rig = Rig::new();
    let mut leases = Vec::new();
    for seed in 0..300u64 {
        let sliced = rig.seal_clean(&seed.to_le_bytes());
        let row = rig.row(&sliced).unwrap();
        let row = BlobRow {
            used_secs: seed,
            ..row
        };
        rig.ledger.commit(vec![Change::PutBlob(row)]).unwrap();
        leases.push(rig.blobs.lease(&sliced.digest, 8).unwrap());
    }
    let free = rig.seal_clean(b"the one that may go");
    let reclaimer = rig.reclaimer(2400);
    reclaimer.run_now();
    assert_eq!(rig.residency(&free), Residency::Nothing);
    assert_eq!(reclaimer.status().evicted_blobs, 1);
}

#[test]
fn free_disk_space_is_a_limit_too() {
    let rig = Rig::new();
    let sliced = rig.seal_clean(&noise(BLOB, 10));
    let options = super::reclaim::ReclaimOptions {
        dir: rig.dir.path().to_owned(),
        cache_size: u64::MAX,
        // More than there is: whatever may go goes.
        min_free: u64::MAX / 4,
    };
    let objects = Objects::open_dir(rig.dir.path().join("catalogs"), 0);
    let name = Digest::of(b"part");
    objects.keep(&name, b"part").unwrap();
    let (ledger, blobs) = (Arc::clone(&rig.ledger), Arc::clone(&rig.blobs));
    let reclaimer = super::reclaim::Reclaimer::spawn(options, ledger, blobs, objects.clone()).unwrap();
    reclaimer.run_now();
    assert_eq!(rig.residency(&sliced), Residency::Nothing);
    assert_eq!(objects.read(&name), None);
}

#[test]
fn a_full_disk_makes_clean_blobs_leave_and_then_what_is_fetched_is_served_from_memory() {
    // A thread of its own, because it leaves the mount namespace of the others.
    std::thread::spawn(full_disk).join().unwrap();
}

fn full_disk() {
    let Some(rig) = Rig::on_small_disk(10 << 20) else {
        println!("not run: making a small disk needs privileges");
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let reclaimer = rig.reclaimer(u64::MAX);
    let fetcher = rig.fetcher_with(READ_TIMEOUT * 10, Arc::clone(&reclaimer));
    let read_all = |seed: u64| {
        let bytes = noise(BLOB, seed);
        let blob = rig.open(&rig.publish(&bytes));
        let read = runtime.block_on(fetcher.read(&blob, &ReadCursor::default(), 0, BLOB));
        assert!(read.unwrap() == bytes);
    };
    (0..20).for_each(|seed| read_all(200 + seed));
    assert_eq!(fetcher.status().unkept, 0);
    assert!(reclaimer.status().evicted_blobs >= 9);

    reclaimer.make_room(u64::MAX);
    let dirty = noise(9 * BLOB + BLOB / 2, 300);
    let sealed = rig.seal(&dirty);
    (0..5).for_each(|seed| read_all(400 + seed));
    assert!(fetcher.status().unkept >= 4);
    assert_eq!(rig.residency(&sealed), Residency::Whole);
    assert_eq!(rig.open(&sealed).read(0, dirty.len()).unwrap(), dirty);
    let copy = rig.blobs.take_over(&rig.open(&sealed), None);
    assert!(matches!(copy, Err(StoreError::Full)), "{copy:?}");
    assert_eq!(rig.staged(), 0, "what was copied of it is gone again");
}
