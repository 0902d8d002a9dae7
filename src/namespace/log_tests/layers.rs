//! Following a volume as a layer below the mounted one.

use std::sync::Arc;

use super::{
    START,
    cases::{shows, soon, world},
    machine::Machine,
    world::Fate,
};
use crate::{
    base::id::MachineId,
    namespace::{
        follow::{self, FollowError, LogView},
        segment::{self, Head},
    },
    tier::layout,
};

/// More than a segment may be late.
const WINDOW_MILLIS: u64 = 600_000;

fn view(until_millis: Option<u64>) -> LogView {
    LogView {
        volume: "v".to_owned(),
        without: None,
        until_millis,
    }
}

#[tokio::test]
async fn a_layer_below_is_read_with_this_machines_own_segments() {
    let world = world();
    let [author, reader] = [1, 2].map(|id| Machine::new(id, 0, &world));
    author.change(b"a", Some(1), 0);
    author.writer().step().await.unwrap();
    let own = LogView {
        without: Some(author.id),
        ..view(None)
    };
    let mut follower = reader.reader_of(own);
    follower.poll(true).await.unwrap();
    assert!(!shows(&reader, b"a"));
    let mut follower = reader.reader_of(view(None));
    follower.poll(true).await.unwrap();
    assert!(shows(&reader, b"a") && !follower.is_settled());
}

#[tokio::test]
async fn what_was_published_later_than_the_layer_is_seen_is_left_out() {
    let world = world();
    let [author, other, reader] = [1, 2, 3].map(|id| Machine::new(id, 0, &world));
    let mut writer = author.writer();
    for path in [b"a", b"b", b"c", b"d", b"e", b"f"] {
        author.change(path, Some(1), 0);
        writer.step().await.unwrap();
        world.advance(10);
    }
    let mut follower = reader.reader_of(view(Some(START + 10)));
    follower.poll(true).await.unwrap();
    assert_eq!(reader.registers().len(), 2);
    // One that was published in time may appear late.
    let mut late = other.writer();
    other.change(b"late", Some(1), 0);
    world.advance(30_000);
    follower.poll(true).await.unwrap();
    late.step().await.unwrap();
    let head = Head {
        machine: MachineId(9),
        seq: 1,
        published_millis: START + 10,
        previous: None,
    };
    world.plant(
        layout::segment("v", START + 10, MachineId(9), 1),
        segment::encode(&head, &[]),
    );
    follower.take_done();
    follower.poll(true).await.unwrap();
    assert_eq!(follower.take_done().segments, 1);
    assert!(!shows(&reader, b"late"));
    assert_eq!(reader.registers().len(), 2);
}

#[tokio::test]
async fn a_layer_whose_time_is_over_is_asked_for_no_more() {
    let world = world();
    let [author, reader] = [1, 2].map(|id| Machine::new(id, 0, &world));
    author.change(b"a", Some(1), 0);
    author.writer().step().await.unwrap();
    let mut follower = reader.reader_of(view(Some(START)));
    follower.poll(true).await.unwrap();
    world.advance(WINDOW_MILLIS);
    follower.poll(true).await.unwrap();
    assert!(!follower.is_settled(), "a segment could still be late by as much");
    world.advance(1);
    follower.poll(true).await.unwrap();
    assert!(follower.is_settled());
    follower.keep().unwrap();

    // A request would fail.
    world.tell([Fate::RequestLost]);
    follower.poll(true).await.unwrap();
    let mut restarted = reader.reader_of(view(Some(START)));
    restarted.poll(true).await.unwrap();
    let machine = Arc::clone(&reader);
    let layer = follow::start(
        &tokio::runtime::Handle::current(),
        follow::Pace::default(),
        move || Ok(machine.reader_of(view(Some(START)))),
    );
    assert!(layer.caught_up(soon()).await && layer.caught_up(soon()).await);
    assert!(layer.status().settled);
    assert_eq!(layer.status().last_error, None);
    layer.shutdown().await;
    let mut unbounded = reader.reader();
    assert!(matches!(unbounded.poll(true).await, Err(FollowError::Bucket(_))));
}
