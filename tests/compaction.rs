//! Logs are compacted by daemons that do nothing else but have the volume mounted.

#[path = "support/lab.rs"]
mod lab;
#[path = "support/log.rs"]
mod log;
mod s3server;
mod support;
#[path = "support/volumes.rs"]
mod volumes;

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use casmount::{
    base::id::MachineId,
    namespace::{
        catalog::{
            compactor::{self, Compacted, CompactorHandle, LogAmount, LogSeen, Threshold},
            head, read,
        },
        change::Entry,
    },
    store::rows::NodeKind,
    tier::{
        SharedBucket,
        dir::DirBucket,
        layout,
        probe::{self, IfAbsent},
    },
};
use lab::{Lab, StoreKind};
use log::{NAMES, now_millis, put_log, put_segment};
use support::{machine::Machine, rng::Rng, wait};
use volumes::{fork, machine, objects_of, spec};

on_both_stores!(
    a_fork_that_is_only_mounted_compacts_itself_and_what_lies_below_it,
    who_leaves_it_to_others_compacts_nothing,
);

const LONG: Duration = Duration::from_secs(240);
/// How much of the log makes a catalog due.
const SEGMENTS: u64 = 2000;
const BYTES: usize = 64 << 20;
/// What is younger goes into no catalog.
const TRAIL_MILLIS: u64 = 300_000;

fn has_catalog(lab: &Lab, volume: &str) -> bool {
    objects_of(lab, volume).contains_key(&layout::head(volume))
}

fn watermark(lab: &Lab, volume: &str) -> u64 {
    lab.with_bucket(async |bucket| {
        let head = head::read(bucket.as_ref(), volume).await.unwrap();
        head.map_or(0, |(head, _)| head.watermark_millis)
    })
}

/// Logs of main and of its fork that are so long that a catalog of each is due.
fn long_logs(lab: &Lab) {
    lab.with_bucket(async |bucket| {
        probe::open_store(bucket.as_ref(), IfAbsent::Create)
            .await
            .unwrap();
        let began = now_millis(&bucket).await - 2 * TRAIL_MILLIS;
        put_log(&bucket, "main", MachineId(5), began..began + SEGMENTS).await;
    });
    fork(lab, "job", "main", &[]);
    lab.with_bucket(async |bucket| {
        let began = now_millis(&bucket).await - 2 * TRAIL_MILLIS;
        put_log(&bucket, "job", MachineId(6), began..began + SEGMENTS).await;
    });
}

#[track_caller]
fn until_compacted(machine: &Machine, catalogs: u64) {
    wait::until(&format!("{catalogs} catalogs"), LONG, || {
        (machine.counter("/compact/done") >= catalogs).then_some(())
    });
    assert!(machine.status()["compact"]["last_error"].is_null());
}

fn a_fork_that_is_only_mounted_compacts_itself_and_what_lies_below_it(kind: StoreKind) {
    let lab = Lab::new(kind);
    long_logs(&lab);
    assert!(!has_catalog(&lab, "main") && !has_catalog(&lab, "job"));
    let mounted = spec(&lab, "mounted", "job").arg("--compact-within=6s").start();
    until_compacted(&mounted, 2);
    let first = ["main", "job"].map(|volume| watermark(&lab, volume));
    assert!(first.iter().all(|watermark| *watermark > 0));

    // Now both logs grow while it is mounted: one by many segments, the other by few that are large. What was told
    // almost a trail ago is old soon, and comes into a listing of the whole window, once a minute.
    let mut rng = Rng::seeded(7);
    lab.with_bucket(async |bucket| {
        let began = now_millis(&bucket).await - TRAIL_MILLIS + 20_000;
        assert!(began > first[0].max(first[1]), "putting them took too long");
        put_log(&bucket, "main", MachineId(7), began..began + SEGMENTS).await;
        let mut told = 0;
        for seq in 1..=10 {
            let large = |number: usize| {
                let entry = Entry {
                    xattrs: vec![(b"user.large".to_vec(), rng.bytes(60_000))],
                    ..Entry::new(NodeKind::Fifo, 0o644)
                };
                (format!("large-{seq}-{number}"), entry)
            };
            let entries: Vec<_> = (0..120).map(large).collect();
            told += 120 * 60_000;
            put_segment(&bucket, "job", MachineId(8), (seq, began + seq), entries).await;
        }
        assert!(told > BYTES);
    });
    until_compacted(&mounted, 4);
    let then = ["main", "job"].map(|volume| watermark(&lab, volume));
    assert!(
        then.iter().zip(first).all(|(then, first)| *then > first),
        "{then:?}"
    );

    // All of it is in the catalogs.
    for object in lab.objects() {
        if object.key.contains("/log/") {
            lab.tamper(&object.key, None);
        }
    }
    let late = machine(&lab, "late", "job");
    let names = fs::read_dir(late.root()).unwrap().count() as u64;
    assert_eq!(names, 3 * NAMES + 1200);
}

fn who_leaves_it_to_others_compacts_nothing(kind: StoreKind) {
    let lab = Lab::new(kind);
    long_logs(&lab);
    let small = spec(&lab, "small", "job").arg("--compact-within=never").start();
    let reader = spec(&lab, "reader", "job")
        .arg("--compact-within=1s")
        .arg("--read-only")
        .start();
    let other = spec(&lab, "other", "job").arg("--compact-within=1s").start();
    until_compacted(&other, 2);
    for idle in [small, reader] {
        assert_eq!(idle.counter("/compact/done"), 0, "{}", idle.spec.name);
    }
}

const EAGER: Threshold = Threshold {
    pace: Duration::from_millis(10),
    segments: 10,
    bytes: 1 << 30,
    spread: Duration::from_millis(1),
    trail: Duration::from_millis(1),
};

fn compacting(bucket: &SharedBucket, dir: &Path, seen: LogSeen, threshold: Threshold) -> CompactorHandle {
    compactor::spawn(
        &tokio::runtime::Handle::current(),
        Compacted {
            volume: "v".parse().unwrap(),
            is_below: false,
        },
        bucket,
        MachineId(1),
        dir.to_owned(),
        seen,
        threshold,
    )
}

async fn until_done(compactor: &CompactorHandle, catalogs: u64) {
    let done = async {
        while compactor.status().done < catalogs {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LONG, done).await.unwrap();
}

async fn bucket(dir: &Path) -> (SharedBucket, u64) {
    let bucket: SharedBucket = Arc::new(DirBucket::connect(dir.to_owned()).await);
    let now = now_millis(&bucket).await;
    (bucket, now)
}

async fn names(bucket: &SharedBucket) -> u64 {
    let opened = read::newest(bucket.as_ref(), "v", None).await.unwrap();
    opened.unwrap().root.names
}

fn twelve() -> LogSeen {
    Arc::new(|| LogAmount {
        segments: 12,
        bytes: 0,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_compacted_when_it_has_grown_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let (bucket, now) = bucket(dir.path()).await;
    put_log(&bucket, "v", MachineId(5), now - 20_000..now - 20_000 + 12).await;
    let lazy = Threshold {
        segments: 13,
        ..EAGER
    };
    let lazy = compacting(&bucket, dir.path(), twelve(), lazy);
    let busy = compacting(&bucket, dir.path(), twelve(), EAGER);
    until_done(&busy, 1).await;
    assert_eq!(names(&bucket).await, 12);
    assert_eq!((lazy.status().done, busy.status().last_error), (0, None));
    lazy.shutdown().await;
    busy.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn few_segments_of_many_bytes_make_a_catalog_due() {
    let dir = tempfile::tempdir().unwrap();
    let (bucket, now) = bucket(dir.path()).await;
    put_log(&bucket, "v", MachineId(5), now - 20_000..now - 20_000 + 10).await;
    let threshold = Threshold {
        segments: 1000,
        bytes: 1000,
        ..EAGER
    };
    let bytes = Arc::new(AtomicU64::new(0));
    let read = Arc::clone(&bytes);
    let seen: LogSeen = Arc::new(move || LogAmount {
        segments: 1,
        bytes: read.load(Ordering::Relaxed),
    });
    let compactor = compacting(&bucket, dir.path(), seen, threshold);
    until_done(&compactor, 1).await;
    // The next look is due when so many bytes were seen.
    let later = bucket.clock().now_millis();
    put_log(&bucket, "v", MachineId(6), later..later + 10).await;
    bytes.store(1000, Ordering::Relaxed);
    until_done(&compactor, 2).await;
    assert_eq!(names(&bucket).await, 20);
    compactor.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_young_for_a_catalog_is_waited_for_though_nothing_more_comes() {
    let dir = tempfile::tempdir().unwrap();
    let (bucket, now) = bucket(dir.path()).await;
    put_log(&bucket, "v", MachineId(5), now..now + 12).await;
    let threshold = Threshold {
        trail: Duration::from_secs(2),
        ..EAGER
    };
    let compactor = compacting(&bucket, dir.path(), twelve(), threshold);
    until_done(&compactor, 1).await;
    assert_eq!(names(&bucket).await, 12);
    assert!(bucket.clock().now_millis() >= now + 2000);
    compactor.shutdown().await;
}
