//! What writers that are not trusted can bring about: their own loss, and nothing else.

use std::sync::Arc;

use super::{
    START, SweepError, SweepOptions, SweepReport, Sweeper, WINDOW, blobs,
    forks::lost_list,
    new_world, options, settle, sweep, sweep_with,
    world::{Door, World},
    writer::Writer,
};
use crate::{
    base::{
        id::MachineId,
        volume::{StackLayer, VolumeName},
    },
    namespace::{
        segment::{self, Head},
        stack::VolumeJson,
    },
    tier::{Body, Bucket, TierError, layout},
};

async fn put(world: &Arc<World>, key: &str, bytes: impl Into<Vec<u8>>) {
    let put = Door::open(world).put_new(key, Body::raw(bytes.into())).await;
    put.unwrap();
}

/// A volume with a name that is in use and one that is not any more.
async fn in_use() -> Arc<World> {
    let world = new_world().await;
    let mut writer = Writer::new(1, &world);
    writer.write(0, 1);
    writer.write(1, 2);
    writer.finish().await;
    writer.delete(1);
    writer.finish().await;
    world
}

/// Sweeps until what is unused is gone; what is used stays.
async fn assert_swept(world: &Arc<World>, options: &SweepOptions) -> SweepReport {
    let mut deleted = 0;
    let mut last = SweepReport::default();
    for _ in 0..4 {
        world.advance(WINDOW + 1);
        last = sweep_with(world, options).await.unwrap();
        deleted += blobs(&last).deleted.objects;
    }
    assert_eq!((deleted, blobs(&last).used.objects), (1, 1));
    world.assert_all_readable();
    last
}

fn untrusted(patterns: &[&str]) -> SweepOptions {
    SweepOptions {
        untrusted: patterns.iter().map(|pattern| pattern.parse().unwrap()).collect(),
        ..options()
    }
}

/// What a fork consists of that somebody trusted made for writers that are not.
async fn own_prefix_fork(world: &Arc<World>, name: &str) {
    let json = VolumeJson {
        version: 1,
        parent: Some(StackLayer::live("v".parse::<VolumeName>().unwrap())),
        own_prefix: true,
        bases: std::collections::BTreeMap::new(),
        created_millis: START,
        deleted_millis: None,
        deletion_undecided: false,
        presets: std::collections::BTreeMap::new(),
    };
    put(world, &layout::volume(name), json.encode()).await;
}

#[tokio::test]
async fn what_is_not_known_of_a_volume_stops_a_sweep() {
    for key in [
        "volumes/v/odd",
        "volumes/v/log/20260101T0000/odd",
        // It may be a volume by that alone.
        "volumes/w/log/odd",
    ] {
        let world = in_use().await;
        put(&world, key, "x").await;
        let err = sweep(&world).await.unwrap_err();
        assert!(
            matches!(&err, SweepError::Unknown { key: told } if told == key),
            "{err}"
        );
        assert!(err.to_string().contains("--untrusted"), "{err}");
    }
}

#[tokio::test]
async fn what_is_of_no_volume_stops_nothing_and_is_told() {
    let world = in_use().await;
    let odd = [
        "volumes/pr-1",
        "volumes/pr-1\u{1b}[2J",
        "volumes/pr-UPPER/volume.json",
        "volumes/pr-2/junk",
        "volumes/pr-3/volume.json/x",
    ];
    for key in odd {
        put(&world, key, "x").await;
    }
    let report = assert_swept(&world, &options()).await;
    assert_eq!(report.ignored.len(), odd.len(), "{:?}", report.ignored);
    for what in &report.ignored {
        assert!(
            what.starts_with("volumes/pr-") && !what.contains('\u{1b}'),
            "{what}"
        );
    }
}

/// What may lie in a volume and cannot be read.
fn unreadable(volume: &str) -> Vec<(String, Vec<u8>)> {
    vec![
        (
            layout::segment(volume, START, MachineId(7), 1),
            b"garbage".to_vec(),
        ),
        (format!("{}odd", layout::log_prefix(volume)), b"x".to_vec()),
        (layout::head(volume), b"garbage".to_vec()),
        (layout::head(volume), vec![b' '; 100 << 10]),
        (layout::trim(volume), vec![b' '; 100 << 10]),
        (layout::snapshot(volume, "x=1"), b"garbage".to_vec()),
        (layout::snapshot(volume, "x=1"), vec![b' '; 300 << 10]),
    ]
}

#[tokio::test]
async fn what_writers_that_are_not_trusted_got_wrong_stops_nothing() {
    // A name that somebody took, and a fork of theirs.
    for name in ["pr-1", "pr-2"] {
        for (key, bytes) in unreadable(name) {
            let world = in_use().await;
            own_prefix_fork(&world, "pr-2").await;
            put(&world, &key, bytes).await;
            let stops = sweep(&world).await.is_err();
            assert_eq!(stops, name == "pr-1", "{key}");
            let report = assert_swept(&world, &untrusted(&["other", "pr-*"])).await;
            assert_eq!(report.ignored.len(), 1, "{key}: {:?}", report.ignored);
            assert!(report.ignored[0].contains(name), "{:?}", report.ignored);
        }
    }
}

#[tokio::test]
async fn what_cannot_be_read_of_a_trusted_volume_stops_a_sweep_whatever_else_is_untrusted() {
    for (key, bytes) in unreadable("v") {
        let world = in_use().await;
        put(&world, &key, bytes).await;
        let err = sweep_with(&world, &untrusted(&["pr-*"])).await.unwrap_err();
        assert!(err.to_string().starts_with("nothing was swept"), "{key}: {err}");
    }
}

/// A fork of writers that are not trusted, with a segment, and its key.
async fn fork_with_a_segment(world: &Arc<World>) -> String {
    own_prefix_fork(world, "pr-2").await;
    let head = Head {
        machine: MachineId(7),
        seq: 1,
        published_millis: START,
        previous: None,
    };
    let key = layout::segment("pr-2", START, MachineId(7), 1);
    put(world, &key, segment::encode(&head, &[])).await;
    key
}

#[tokio::test]
async fn what_the_sweeper_may_not_read_stops_a_sweep_whosever_it_is() {
    let world = in_use().await;
    fork_with_a_segment(&world).await;
    world.deny(&format!("{}*", layout::log_prefix("pr-2")));
    for options in [options(), untrusted(&["pr-*"])] {
        let err = sweep_with(&world, &options).await.unwrap_err();
        assert!(
            matches!(&err, SweepError::Bucket(TierError::Denied { key, .. }) if key.starts_with("volumes/pr-2/log/")),
            "{err}"
        );
    }
}

#[tokio::test]
async fn an_object_that_nobody_may_read_though_he_may_all_beside_it_stops_only_where_its_writers_are_trusted()
{
    let world = in_use().await;
    let key = fork_with_a_segment(&world).await;
    world.deny(&key);
    let report = assert_swept(&world, &options()).await;
    assert_eq!(report.ignored.len(), 1, "{:?}", report.ignored);
    assert!(report.ignored[0].contains(&key), "{:?}", report.ignored);

    let world = in_use().await;
    let key = layout::segment("v", START, MachineId(7), 1);
    put(&world, &key, "x").await;
    world.deny(&key);
    let err = sweep(&world).await.unwrap_err();
    assert!(
        matches!(&err, SweepError::Segment { key: told, why } if *told == key && why.contains("403")),
        "{err}"
    );
}

#[tokio::test]
async fn who_is_not_trusted_and_names_what_never_was_all_the_time_stops_nothing() {
    let world = in_use().await;
    let gone = fork_with_a_segment(&world).await;
    world.advance(WINDOW + 1);
    let sweeper = Sweeper::begin(&world);
    // Something else goes while it reads, once.
    while world.reads(|key| key == layout::volume("pr-2")) == 0 {
        sweeper.gate.add_permits(1);
        settle().await;
    }
    Door::open(&world).delete(&gone).await.unwrap();
    for seq in 1..1000 {
        let now = world.now();
        let key = layout::segment("pr-2", now, MachineId(7), seq);
        put(&world, &key, lost_list(7, seq, now)).await;
        for _ in 0..8 {
            sweeper.gate.add_permits(1);
            settle().await;
        }
        if sweeper.task.is_finished() {
            break;
        }
    }
    assert!(sweeper.task.is_finished(), "it never ends");
    sweeper.task.await.unwrap().unwrap();
}
