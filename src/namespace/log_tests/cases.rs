//! Single facts about the log that chance seldom meets.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    START,
    machine::Machine,
    world::{Fate, World},
};
use crate::{
    base::id::MachineId,
    namespace::{
        follow::{self, FollowError},
        publish::{self, OLD_HOLD, OLD_MILLIS, PublishError},
        segment::{self, Head},
    },
    tier::layout,
};

const HOLD_MILLIS: u64 = 10_000;

pub fn world() -> Arc<World> {
    let world = World::new(1, START);
    world.heal();
    world
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Lets tasks go on until each of them waits.
async fn settle() {
    for _ in 0..40 {
        tokio::task::yield_now().await;
    }
}

/// Whether `machine` shows `path`.
pub fn shows(machine: &Machine, path: &[u8]) -> bool {
    machine.registers().iter().any(|change| change.path == path)
}

#[tokio::test]
async fn a_segment_acknowledged_too_late_is_published_again() {
    let world = world();
    let machine = Machine::new(1, 0, &world);
    let mut writer = machine.writer();
    machine.change(b"a", Some(1), 0);
    world.tell([Fate::Slow(61_000)]);
    let (result, ()) = tokio::join!(writer.step(), async {
        settle().await;
        world.advance(61_000);
    });
    assert!(matches!(
        result,
        Err(PublishError::Late {
            off_millis: 61_000,
            ..
        })
    ));
    assert_eq!(machine.unpublished(), 1);
    assert_eq!(writer.step().await.unwrap().published, 1);
    let times: Vec<_> = world
        .segments()
        .values()
        .map(|bytes| decode(bytes).published_millis)
        .collect();
    assert_eq!(times, [START, START + 61_000]);
}

fn decode(bytes: &[u8]) -> Head {
    segment::decode(bytes).unwrap().head
}

#[tokio::test]
async fn a_segment_whose_reply_was_lost_is_published_under_another_key() {
    let world = world();
    let machine = Machine::new(1, 0, &world);
    let mut writer = machine.writer();
    machine.change(b"a", Some(1), 0);
    world.tell([Fate::ReplyLost]);
    assert!(matches!(writer.step().await, Err(PublishError::Bucket(_))));
    assert_eq!(writer.step().await.unwrap().published, 1);
    let heads: Vec<_> = world.segments().values().map(|bytes| decode(bytes)).collect();
    assert_eq!(heads.len(), 2);
    assert!(
        heads.iter().all(|head| head.previous.is_none()),
        "the first was never acknowledged"
    );
}

#[tokio::test]
async fn a_change_older_than_deletions_are_kept_is_told_as_made_now_or_not_at_all() {
    let world = world();
    let machine = Machine::new(1, 0, &world);
    let mut writer = machine.writer();
    machine.change(b"old", Some(1), 0);
    machine.knows.store(false, Ordering::Relaxed);
    world.advance(OLD_MILLIS - 1);
    machine.change(b"new", Some(2), 0);
    world.advance(1);
    // What was made after what may not be told waits for it, a while.
    let step = writer.step().await.unwrap();
    assert_eq!((step.published, step.pending), (0, 2));
    world.advance(OLD_HOLD.as_millis() as u64);
    let step = writer.step().await.unwrap();
    assert_eq!((step.published, step.pending), (1, 1));
    machine.knows.store(true, Ordering::Relaxed);
    assert_eq!(writer.step().await.unwrap().published, 1);
    let told: Vec<_> = world
        .segments()
        .values()
        .flat_map(|bytes| segment::decode(bytes).unwrap().changes)
        .map(|change| (change.path, change.stamp.millis))
        .collect();
    let made = START + OLD_MILLIS - 1;
    let now = made + 1 + OLD_HOLD.as_millis() as u64;
    assert_eq!(told, [(b"new".to_vec(), made), (b"old".to_vec(), now)]);
}

#[tokio::test]
async fn who_sleeps_before_the_segment_is_written_writes_none() {
    let world = world();
    let machine = Machine::new(1, 0, &world);
    let mut writer = machine.writer();
    machine.change(b"a", Some(1), 0);
    // Until then their blobs are sure to be kept.
    machine.vouches_until.store(START, Ordering::Relaxed);
    let slept = writer.step().await;
    assert!(matches!(slept, Err(PublishError::Slept { .. })), "{slept:?}");
    assert!(world.segments().is_empty());
    machine.vouches_until.store(u64::MAX, Ordering::Relaxed);
    assert_eq!(writer.step().await.unwrap().published, 1);
}

#[tokio::test]
async fn a_number_is_not_used_again_after_a_crash_or_a_restored_disk() {
    let world = world();
    let machine = Machine::new(1, 0, &world);
    let mut seqs = Vec::new();
    for number in 0..3 {
        machine.change(b"a", Some(number), 0);
        let mut writer = machine.writer();
        writer.step().await.unwrap();
    }
    seqs.extend(world.segments().values().map(|bytes| decode(bytes).seq));
    // The disk as it was before all of this; the time goes on.
    world.advance(1000);
    let restored = Machine::new(1, 0, &world);
    restored.change(b"a", Some(9), 0);
    restored.writer().step().await.unwrap();
    let last = world.segments();
    seqs.push(decode(last.values().next_back().unwrap()).seq);
    assert!(seqs.is_sorted_by(|a, b| a < b), "{seqs:x?}");
}

#[tokio::test]
async fn a_segment_names_the_one_acknowledged_before_it_across_restarts() {
    let world = world();
    let machine = Machine::new(1, 0, &world);
    machine.change(b"a", Some(1), 0);
    machine.writer().step().await.unwrap();
    world.advance(5000);
    machine.change(b"b", Some(1), 0);
    machine.writer().step().await.unwrap();
    let heads: Vec<_> = world.segments().values().map(|bytes| decode(bytes)).collect();
    assert_eq!(heads[1].previous, Some((heads[0].published_millis, heads[0].seq)));
}

#[tokio::test]
async fn keys_of_a_machine_stay_in_order_when_its_clock_is_set_back_a_little() {
    let world = world();
    let ahead = Machine::new(1, 20_000, &world);
    ahead.change(b"a", Some(1), 0);
    ahead.writer().step().await.unwrap();
    // The same disk, whose daemon learned the bucket's time.
    let corrected = ahead.with_skew(0);
    corrected.change(b"b", Some(1), 0);
    corrected.writer().step().await.unwrap();
    let heads: Vec<_> = world.segments().values().map(|bytes| decode(bytes)).collect();
    assert!(heads[0].seq < heads[1].seq);
    assert_eq!(heads[1].published_millis, START + 20_000);
}

#[tokio::test]
async fn what_a_name_became_while_it_was_published_holds_others_anew() {
    let world = world();
    let machine = Machine::new(1, 0, &world);
    let mut writer = machine.writer();
    machine.change(b"a", Some(1), 0);
    world.tell([Fate::Slow(30_000)]);
    let (result, ()) = tokio::join!(writer.step(), async {
        settle().await;
        machine.change(b"a", Some(2), 0);
        machine.change(b"b", Some(1), 0);
        machine.change(b"a", Some(3), u64::from(u32::MAX));
        world.advance(30_000);
    });
    assert_eq!(result.unwrap().published, 1);
    assert_eq!(
        writer.step().await.unwrap().published,
        0,
        "b may build on the second a"
    );
    world.advance(HOLD_MILLIS - 1);
    assert_eq!(writer.step().await.unwrap().published, 0);
    world.advance(1);
    assert_eq!(writer.step().await.unwrap().published, 1, "but not for ever");
}

#[tokio::test]
async fn a_change_that_no_segment_can_carry_stays_here_and_stops_nothing() {
    let world = world();
    let machine = Machine::new(1, 0, &world);
    let mut writer = machine.writer();
    machine.change(b"../a", Some(1), 0);
    machine.change(b"b", Some(1), 0);
    let step = writer.step().await.unwrap();
    assert_eq!((step.published, step.pending), (1, 0));
    assert!(step.unpublishable.unwrap().starts_with("../a cannot be shared"));
    assert_eq!(machine.unpublished(), 1);
    assert_eq!(writer.step().await.unwrap().segments, 0);
}

#[tokio::test]
async fn a_segment_whose_upload_was_slow_comes_before_its_successor() {
    let world = world();
    let [author, other, reader] = [1, 2, 3].map(|id| Machine::new(id, 0, &world));
    let mut follower = reader.reader();
    let mut writer = author.writer();
    author.change(b"first", Some(1), 0);
    world.tell([Fate::Slow(30_000)]);
    let (result, ()) = tokio::join!(writer.step(), async {
        settle().await;
        world.advance(29_000);
        // Another machine's segment takes the short listings past the slow one.
        other.change(b"other", Some(1), 0);
        other.writer().step().await.unwrap();
        follower.poll(true).await.unwrap();
        assert!(shows(&reader, b"other") && !shows(&reader, b"first"));
        world.advance(1000);
    });
    result.unwrap();
    author.change(b"second", Some(1), 0);
    writer.step().await.unwrap();
    follower.poll(false).await.unwrap();
    assert!(shows(&reader, b"second"));
    assert!(shows(&reader, b"first"), "the second names the first");
}

#[tokio::test]
async fn a_damaged_segment_is_left_out_and_the_others_are_read() {
    let world = world();
    let [author, reader] = [1, 2].map(|id| Machine::new(id, 0, &world));
    world.plant(
        layout::segment("v", START - 5, MachineId(7), 1),
        &b"casmseg\nrubbish"[..],
    );
    world.plant(format!("{}notes.txt", layout::log_prefix("v")), &b"hello"[..]);
    author.change(b"a", Some(1), 0);
    author.writer().step().await.unwrap();
    let mut follower = reader.reader();
    follower.poll(false).await.unwrap();
    assert!(shows(&reader, b"a"));
    assert_eq!(follower.take_done().segments, 1);
}

#[tokio::test]
async fn a_segment_under_the_key_of_another_machine_is_left_out() {
    let world = world();
    let [author, reader] = [1, 2].map(|id| Machine::new(id, 0, &world));
    author.change(b"a", Some(1), 0);
    author.writer().step().await.unwrap();
    let (key, bytes) = world.segments().pop_first().unwrap();
    let foreign = key.replace("-0000000000000001-", "-0000000000000009-");
    world.plant(foreign, bytes);
    let mut follower = reader.reader();
    follower.poll(false).await.unwrap();
    assert_eq!(follower.take_done().segments, 1);
}

#[tokio::test]
async fn a_segment_that_cannot_be_fetched_now_ends_the_poll_before_it() {
    let world = world();
    let [author, reader] = [1, 2].map(|id| Machine::new(id, 0, &world));
    let mut writer = author.writer();
    for path in [b"a", b"b", b"c"] {
        author.change(path, Some(1), 0);
        writer.step().await.unwrap();
        world.advance(1);
    }
    let mut follower = reader.reader();
    // The listing, then the three segments in their order.
    world.tell([Fate::Good, Fate::Good, Fate::RequestLost]);
    assert!(matches!(follower.poll(false).await, Err(FollowError::Bucket(_))));
    assert_eq!(reader.registers().len(), 1);
    follower.poll(false).await.unwrap();
    assert_eq!(reader.registers().len(), 3);
}

#[tokio::test]
async fn what_was_applied_is_not_read_again_after_a_restart() {
    let world = world();
    let [author, reader] = [1, 2].map(|id| Machine::new(id, 0, &world));
    author.change(b"a", Some(1), 0);
    author.writer().step().await.unwrap();
    let mut follower = reader.reader();
    follower.poll(false).await.unwrap();
    follower.keep().unwrap();
    let mut restarted = reader.reader();
    restarted.poll(true).await.unwrap();
    assert_eq!(restarted.take_done().segments, 0);
}

#[tokio::test]
async fn the_loops_carry_a_change_from_one_machine_to_another() {
    let world = world();
    let [author, reader] = [1, 2].map(|id| Machine::new(id, 0, &world));
    let machine = Arc::clone(&author);
    let publisher = publish::start(
        &tokio::runtime::Handle::current(),
        Arc::clone(&author),
        move || Ok(machine.writer()),
    );
    let machine = Arc::clone(&reader);
    let follower = follow::start(
        &tokio::runtime::Handle::current(),
        follow::Pace::default(),
        move || Ok(machine.reader()),
    );
    author.change(b"a", Some(1), 0);
    assert_eq!(publisher.wait_published(soon()).await, 0);
    assert!(follower.caught_up(soon()).await);
    assert!(shows(&reader, b"a"));
    let status = publisher.status();
    assert_eq!(
        (status.published_changes, status.segments, status.pending_changes),
        (1, 1, 0)
    );
    assert_eq!(follower.status().segments, 1);
    assert_eq!(follower.status().caught_up_millis, START);
    publisher.shutdown().await;
    follower.shutdown().await;
}

#[tokio::test]
async fn waiting_leaves_out_open_files_and_counts_what_is_left() {
    let world = world();
    let author = Machine::new(1, 0, &world);
    let machine = Arc::clone(&author);
    let publisher = publish::start(
        &tokio::runtime::Handle::current(),
        Arc::clone(&author),
        move || Ok(machine.writer()),
    );
    author.change(b"never durable", Some(1), u64::from(u32::MAX));
    author.change(b"behind it", Some(1), 0);
    author.change(b"open", Some(1), 0);
    author.open_file(b"open");
    let left = publisher
        .wait_published(Instant::now() + Duration::from_millis(100))
        .await;
    assert_eq!(left, 2);
    publisher.shutdown().await;
}

#[tokio::test]
async fn a_bucket_that_does_not_answer_is_told_in_words_until_it_does() {
    let world = world();
    let [author, reader] = [1, 2].map(|id| Machine::new(id, 0, &world));
    let machine = Arc::clone(&author);
    author.change(b"a", Some(1), 0);
    world.tell([Fate::RequestLost]);
    let publisher = publish::start(
        &tokio::runtime::Handle::current(),
        Arc::clone(&author),
        move || Ok(machine.writer()),
    );
    let told = wait_for(|| publisher.status().last_error).await;
    assert!(
        told.starts_with("cannot write a segment: the bucket does not answer: put volumes/v/log/"),
        "{told}"
    );
    assert!(told.ends_with("the wind took it"), "{told}");
    publisher.kick();
    assert_eq!(publisher.wait_published(soon()).await, 0);
    wait_for(|| publisher.status().last_error.is_none().then_some(())).await;

    world.tell([Fate::RequestLost]);
    let machine = Arc::clone(&reader);
    let follower = follow::start(
        &tokio::runtime::Handle::current(),
        follow::Pace::default(),
        move || Ok(machine.reader()),
    );
    let told = wait_for(|| follower.status().last_error).await;
    assert!(told.starts_with("cannot read the log: "), "{told}");
    assert!(follower.caught_up(soon()).await);
    assert_eq!(follower.status().last_error, None);
    publisher.shutdown().await;
    follower.shutdown().await;
}

async fn wait_for<T>(mut fact: impl FnMut() -> Option<T>) -> T {
    let deadline = soon();
    loop {
        if let Some(found) = fact() {
            return found;
        }
        assert!(Instant::now() < deadline, "it never came");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
