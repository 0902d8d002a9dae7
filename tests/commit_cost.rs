//! What it costs to commit, or to make a fork, does not depend on how many names the volume has.
//!
//! Counted by the server, following apart; how long it takes `scripts/bench --only commit` measures.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;
#[path = "support/volume.rs"]
mod volume;

use std::{fs, time::Duration};

use lab::{Lab, StoreKind};
use s3server::Counts;
use support::{machine::Machine, posix::file, rng::Rng, wait};

const SMALL: u64 = 1_000;
const LARGE: u64 = 100_000;

const FILES: usize = 100;

/// Makes new files, replaces one that is in the catalog, and removes another; then all of it is published.
fn commit(machine: &Machine) {
    let mut rng = Rng::seeded(3);
    let known = machine.path("top-00000/dir-00001");
    fs::create_dir(machine.path("new")).unwrap();
    for number in 0..FILES {
        file(&machine.path(format!("new/{number}")), &rng.bytes(5000));
    }
    let mut names: Vec<_> = fs::read_dir(&known)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    names.sort();
    file(&names[0], b"replaced");
    fs::remove_file(&names[1]).unwrap();
    machine.flush();
}

/// What the commit asks of the bucket in a volume of `names`.
fn cost(names: u64) -> Counts {
    let lab = Lab::new(StoreKind::S3);
    let shape = volume::Shape {
        names,
        per_dir: 250,
        fan_out: 64,
    };
    let text =
        lab.with_bucket(async |bucket| volume::make(&bucket, "main", shape, Vec::new()).await.unwrap());
    // Nothing is uploaded before the flush, so that it is always divided in the same way.
    let a = lab.spec("a").arg("--settle=1h").start();
    // It has been there for a while: it has loaded what it is going to change, and published something.
    assert_eq!(fs::read_dir(a.path("top-00000/dir-00001")).unwrap().count(), 250);
    file(&a.path("first"), b"first");
    a.flush();
    // What is fetched behind the mount has nothing to do with it.
    wait::until(
        "the catalog is whole on the disk",
        Duration::from_secs(60),
        || {
            let parts = |name| a.counter(&format!("/catalogs/0/{name}"));
            (parts("kept_parts") == parts("parts")).then_some(())
        },
    );
    lab.server().reset_counts();
    commit(&a);
    let counts = lab.server().counts();
    eprintln!(
        "{text}: {:?}, {} bytes sent to the bucket, {} received",
        counts.requests, counts.bytes_received, counts.bytes_sent
    );
    let b = lab.machine("b");
    b.until_content("new/99", &fs::read(a.path("new/99")).unwrap());
    counts
}

#[test]
fn a_commit_costs_as_much_among_a_hundred_thousand_names_as_among_a_thousand() {
    let (small, large) = (cost(SMALL), cost(LARGE));
    for operation in ["GetObject", "HeadObject", "DeleteObject"] {
        assert_eq!(small.of(operation), large.of(operation), "{operation}");
    }
    // A pack and a segment; on a machine under load either may be cut in two.
    for counts in [&small, &large] {
        assert!((2..=4).contains(&counts.of("PutObject")), "{counts:?}");
    }
    // Times are written with as many digits as they have, and each object has a head.
    let difference = small.bytes_received.abs_diff(large.bytes_received);
    assert!(difference < 4000, "{small:?} {large:?}");
    assert!(large.bytes_received > (FILES * 5000) as u64);
    // Replies of listings apart, nothing comes back.
    assert!(large.bytes_sent < 20_000, "{large:?}");
}

/// What it asks of the bucket to make a fork of a volume of `names`, live or as of now.
fn fork_cost(names: u64, at: &str) -> Counts {
    let lab = Lab::new(StoreKind::S3);
    let shape = volume::Shape {
        names,
        per_dir: 250,
        fan_out: 64,
    };
    lab.with_bucket(async |bucket| volume::make(&bucket, "main", shape, Vec::new()).await.unwrap());
    let spec = lab.spec("forker");
    let mut command = spec.command();
    command.args(["fork", "create", "fork", "--from", "main", "--at", at]);
    command.args(&spec.args);
    lab.server().reset_counts();
    wait::run_ok(&mut command, Duration::from_secs(60));
    let counts = lab.server().counts();
    eprintln!("{names} names, {at}: {:?}", counts.requests);
    counts
}

#[test]
fn a_fork_of_a_hundred_thousand_names_costs_as_much_as_one_of_a_thousand() {
    for at in ["live", "now"] {
        let (small, large) = (fork_cost(SMALL, at), fork_cost(LARGE, at));
        assert_eq!(small.requests, large.requests, "{at}");
        let all: u64 = large.requests.values().sum();
        assert!(all <= 24, "{at}: {large:?}");
        // Names and times have as many digits as they have.
        let difference = small.bytes_received.abs_diff(large.bytes_received);
        assert!(difference < 1000, "{at}: {small:?} {large:?}");
        assert!(large.bytes_sent < 20_000, "{at}: {large:?}");
    }
}
