//! What sweeps do to logs and catalogs, case by case.

use super::*;

/// What is in the log so far, and a catalog that has it.
async fn log_with_catalog(world: &Arc<World>, writer: &mut Writer, contents: std::ops::Range<u8>) {
    for content in contents {
        writer.write(content % 4, content);
        writer.finish().await;
    }
    world.advance(TRAIL.as_millis() as u64 + 1);
    assert!(matches!(compact(world).await, Outcome::Done(_)));
}

const LOG_AGE: u64 = MIN_LOG_AGE.as_millis() as u64;

#[tokio::test]
async fn segments_and_old_catalogs_go_when_a_catalog_that_is_old_enough_has_them() {
    let world = new_world().await;
    let mut writer = Writer::new(1, &world);
    log_with_catalog(&world, &mut writer, 1..5).await;
    // An hour of log is kept behind the floor.
    world.advance(LOG_AGE + 1);
    log_with_catalog(&world, &mut writer, 5..9).await;
    let report = sweep(&world).await.unwrap();
    assert_eq!(report.objects.of_logs.condemned.objects, 0);
    world.advance(LOG_AGE + 1);
    // The floor is the second catalog, and the first one is behind it.
    let report = sweep(&world).await.unwrap();
    let (logs, catalogs) = (report.objects.of_logs, report.objects.of_catalogs);
    assert_eq!((logs.condemned.objects, logs.used.objects), (4, 4));
    assert!(catalogs.condemned.objects >= 2, "{catalogs:?}");
    assert_eq!(logs.deleted.objects + catalogs.deleted.objects, 0);
    world.advance(WINDOW);
    let report = sweep(&world).await.unwrap();
    assert_eq!(report.objects.of_logs.deleted.objects, 4);
    assert_eq!(
        report.objects.of_catalogs.deleted.objects,
        catalogs.condemned.objects
    );
    assert_eq!((world.segments(), world.catalogs()), (4, 2));
    world.assert_all_visible().await;
    let mut late = Follower::new(&world);
    late.assert_converged().await;
}

#[tokio::test]
async fn a_machine_that_did_not_see_what_went_begins_anew() {
    let world = new_world().await;
    let mut writer = Writer::new(1, &world);
    let mut away = Follower::new(&world);
    let mut stopped = Follower::new(&world);
    writer.write(0, 1);
    writer.finish().await;
    away.poll().await;
    stopped.poll().await;
    stopped.die();
    writer.delete(0);
    writer.finish().await;
    log_with_catalog(&world, &mut writer, 5..8).await;
    for _ in 0..4 {
        world.advance(LOG_AGE + 1);
        log_with_catalog(&world, &mut writer, 8..10).await;
        sweep(&world).await.unwrap();
    }
    assert!(world.segments() < 13, "{} segments", world.segments());
    away.assert_converged().await;
    stopped.assert_converged().await;
}

#[tokio::test]
async fn a_fork_of_a_moment_keeps_the_catalog_and_the_log_that_it_sees() {
    let world = new_world().await;
    let mut writer = Writer::new(1, &world);
    log_with_catalog(&world, &mut writer, 1..3).await;
    writer.write(0, 7);
    writer.finish().await;
    world.fork().await;
    for content in 8..14 {
        world.advance(LOG_AGE + 1);
        log_with_catalog(&world, &mut writer, content..content + 1).await;
        sweep(&world).await.unwrap();
        world.assert_all_visible().await;
        world.assert_all_readable();
    }
    assert!(world.trimmed() > 0);
}

#[tokio::test]
async fn a_compaction_that_slept_while_its_parts_were_deleted_changes_nothing() {
    let world = new_world().await;
    let mut writer = Writer::new(1, &world);
    log_with_catalog(&world, &mut writer, 1..5).await;
    writer.write(1, 9);
    writer.finish().await;
    world.advance(TRAIL.as_millis() as u64 + 1);
    let before = world.watermark();
    let objects = world.catalogs();
    let compactor = Compactor::begin(&world, 1);
    while world.catalogs() < objects + 2 {
        compactor.gate.add_permits(1);
        settle().await;
        assert!(!compactor.task.is_finished(), "it did not stop before its head");
    }
    for _ in 0..6 {
        world.advance(LOG_AGE + 1);
        sweep(&world).await.unwrap();
    }
    assert!(world.trimmed() > 0);
    compactor.gate.add_permits(1000);
    assert_eq!(compactor.task.await.unwrap().unwrap(), Outcome::Lost);
    assert_eq!(world.watermark(), before);
    world.assert_all_visible().await;
}

#[tokio::test]
async fn a_writer_that_slept_for_longer_than_its_log_is_kept_publishes_nothing_that_is_gone() {
    let world = new_world().await;
    let (mut slept, mut other) = (Writer::new(1, &world), Writer::new(2, &world));
    slept.write(0, 1);
    slept.finish().await;
    // It has uploaded, and falls asleep before it looks.
    slept.write(1, 2);
    slept.upload().await;
    for content in 10..15 {
        log_with_catalog(&world, &mut other, content..content + 1).await;
        world.advance(LOG_AGE + 1);
        sweep(&world).await.unwrap();
    }
    assert!(world.trimmed() > 1, "the log that it knows is there still");
    slept.finish().await;
    world.assert_all_readable();
    world.assert_all_visible().await;
    let mut late = Follower::new(&world);
    late.assert_converged().await;
}
