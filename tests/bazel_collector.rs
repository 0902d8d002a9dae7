//! A real Bazel whose collector deletes from the disk cache on one machine, while others build with it.
//!
//! A collector keeps one machine's idea of a size. So in a directory with the preset of Bazel its deletes hide names on
//! that machine, and with `plain`, where a delete is a delete, they are for all. Both is held here.
//!
//! It needs a newer Bazel, see [`bazel_root`].

#[path = "support/bazel_root.rs"]
#[macro_use]
mod bazel_root;
#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{fs, path::Path, time::Duration};

use bazel_root::{ACTIONS, Workspace};
use lab::{Lab, StoreKind};
use support::{machine::Machine, posix::file, wait};

on_both_stores!(
    what_a_collector_deletes_is_gone_on_its_machine_alone,
    what_two_collectors_deleted_is_there_for_both_when_one_makes_it_again,
    what_a_collector_deletes_is_gone_for_all_where_the_preset_is_plain,
);

const SOON: Duration = Duration::from_secs(90);

/// Nothing is as small.
const NO_SPACE: &[&str] = &["--experimental_disk_cache_gc_max_size=1"];

/// Nothing that its build did not use is as young.
const NO_AGE: &[&str] = &["--experimental_disk_cache_gc_max_age=1s"];

/// How many entries and blobs a machine shows in its cache.
fn kept(machine: &Machine) -> usize {
    let list = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten();
    ["ac", "cas"]
        .map(|kind| {
            let shards = list(&machine.path("disk").join(kind));
            shards.map(|shard| list(&shard.path()).count()).sum::<usize>()
        })
        .iter()
        .sum()
}

/// Waits until a machine was told of all that another one did so far.
#[track_caller]
fn tell(from: &Machine, to: &[&Machine], what: &str) {
    from.flush();
    file(&from.path(what), what.as_bytes());
    from.flush();
    for machine in to {
        machine.until_content(what, what.as_bytes());
    }
}

/// Builds, and reads all that comes out; returns what came from the cache.
#[track_caller]
fn build(on: &Workspace<'_>) -> usize {
    let built = on.whole("first");
    eprintln!("{}", built.said);
    built.hits()
}

/// Builds with no memory of any build.
#[track_caller]
fn build_anew(on: &Workspace<'_>) -> usize {
    on.clean();
    build(on)
}

fn what_a_collector_deletes_is_gone_on_its_machine_alone(kind: StoreKind) {
    let root = bazel_root_or_skip!();
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    let (on_a, on_b) = (Workspace::new(&root, &lab, &a), Workspace::new(&root, &lab, &b));
    assert_eq!(build(&on_a), 0);
    let whole = kept(&a);
    assert!(whole > ACTIONS, "{whole} files are in the cache");
    tell(&a, &[&b], "built");
    assert_eq!(build(&on_b), ACTIONS);

    on_a.collect(NO_SPACE, || kept(&a) == 0);
    tell(&a, &[&b], "collected");
    assert_eq!((kept(&a), kept(&b)), (0, whole));
    // B has fetched all of it by now; C reads what is in the store.
    assert_eq!(build_anew(&on_b), ACTIONS);
    let c = lab.machine("c");
    assert_eq!(build(&Workspace::new(&root, &lab, &c)), ACTIONS);

    // A makes what it deleted, and has it then.
    assert_eq!(build_anew(&on_a), 0);
    assert_eq!(build_anew(&on_a), ACTIONS);
    assert!(lab.assert_blobs_match_their_names() > 0);
}

fn what_two_collectors_deleted_is_there_for_both_when_one_makes_it_again(kind: StoreKind) {
    let root = bazel_root_or_skip!();
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    let (on_a, on_b) = (Workspace::new(&root, &lab, &a), Workspace::new(&root, &lab, &b));
    assert_eq!(build(&on_a), 0);
    tell(&a, &[&b], "built");
    assert_eq!(build(&on_b), ACTIONS);
    on_a.collect(NO_AGE, || kept(&a) == 0);
    on_b.collect(NO_AGE, || kept(&b) == 0);
    assert_eq!(build_anew(&on_b), 0);
    tell(&b, &[&a], "by B");
    assert_eq!(build_anew(&on_a), ACTIONS);
}

fn what_a_collector_deletes_is_gone_for_all_where_the_preset_is_plain(kind: StoreKind) {
    let root = bazel_root_or_skip!();
    let lab = Lab::new(kind);
    let plain = |name: &str| lab.spec(name).arg("--preset").arg(".=plain").start();
    let (a, b) = (plain("a"), plain("b"));
    let (on_a, on_b) = (Workspace::new(&root, &lab, &a), Workspace::new(&root, &lab, &b));
    assert_eq!(build(&on_a), 0);
    tell(&a, &[&b], "built");
    assert_eq!(build(&on_b), ACTIONS);

    on_a.collect(NO_SPACE, || kept(&a) == 0);
    tell(&a, &[&b], "collected");
    wait::until("B has nothing in its cache", SOON, || {
        (kept(&b) == 0).then_some(())
    });
    assert_eq!(build_anew(&on_b), 0);
    tell(&b, &[&a], "by B");
    assert_eq!(build_anew(&on_a), ACTIONS);
}
