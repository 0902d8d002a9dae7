//! Forks whose writers are trusted less: their blobs are apart, and nothing of them is believed unseen.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;
#[path = "support/volumes.rs"]
mod volumes;

use std::collections::BTreeMap;

use casmount::{
    base::{
        chunk::{Chunk, ChunkList},
        clock::Stamp,
        digest::Digest,
        id::MachineId,
    },
    namespace::{
        change::{Entry, EntryBlob, EntryChunks, PathChange},
        segment::{self, Head},
    },
    store::{pack::PackPlace, rows::NodeKind},
    tier::{
        Body, Put, SharedBucket, TierError, layout,
        url::{AccessKey, ConnectOptions, connect},
    },
};
use lab::{Lab, StoreKind, as_user};
use serde_json::json;
use support::{
    posix::{content, file},
    rng::Rng,
    tree, wait,
};
use volumes::{
    SOON, assert_says, fork, is_absent, machine, objects_of, offline_fails, offline_json, offline_ok, parent,
    refusal, spec, stored, until_caught_up,
};

on_both_stores!(
    the_blobs_of_such_a_fork_are_apart_until_it_is_promoted,
    a_job_with_such_a_fork_commits_what_it_did,
    a_fork_of_such_a_fork_is_one_too,
    garbage_below_the_own_prefix_is_not_promoted,
    a_log_that_lies_about_blobs_is_not_promoted,
);

/// Blobs and packs that all believe in.
fn shared_blobs(lab: &Lab) -> BTreeMap<String, Vec<u8>> {
    let is_blob = |key: &String| key.starts_with("blobs/") || key.starts_with("packs/");
    stored(lab).into_iter().filter(|(key, _)| is_blob(key)).collect()
}

fn blobs_of(lab: &Lab, volume: &str) -> Vec<String> {
    let is_blob = |key: &String| key.contains("/blobs/") || key.contains("/packs/");
    objects_of(lab, volume).into_keys().filter(is_blob).collect()
}

fn large() -> Vec<u8> {
    Rng::seeded(21).bytes(9_000_000)
}

/// A fork of main with its own prefix, and something of each size in it.
fn written_fork(lab: &Lab, name: &str) -> support::machine::Machine {
    fork(lab, name, "main", &["--own-prefix"]);
    let fork = machine(lab, name, name);
    file(&fork.path("large-new"), &large());
    file(&fork.path("middle"), &Rng::seeded(22).bytes(300_000));
    for number in 0..20 {
        file(
            &fork.path(format!("small{number}")),
            format!("small {number}").as_bytes(),
        );
    }
    file(&fork.path("empty"), b"");
    // Bytes that the parent has already.
    file(&fork.path("copy"), &vec![b'l'; 5_000_000]);
    std::fs::remove_file(fork.path("deleted")).unwrap();
    fork.flush();
    fork
}

fn the_blobs_of_such_a_fork_are_apart_until_it_is_promoted(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    let before = shared_blobs(&lab);
    let mut fork = written_fork(&lab, "pr-1");
    assert!(
        shared_blobs(&lab) == before,
        "the fork wrote blobs where all believe them"
    );
    assert!(blobs_of(&lab, "pr-1").len() >= 3);
    assert!(offline_ok(&lab, &["volume", "list"]).contains("its blobs apart"));
    let expected = tree::read(fork.root());
    let late = machine(&lab, "late-fork", "pr-1");
    tree::assert_same_but_dir_times(&expected, &tree::read(late.root()));
    // A machine that starts without its store knows where its blobs go.
    fork.unmount();
    lab.set_down(true);
    fork.restart();
    file(&fork.path("offline"), &Rng::seeded(23).bytes(200_000));
    lab.set_down(false);
    fork.flush();
    assert!(shared_blobs(&lab) == before);

    let report = offline_json(&lab, &["fork", "promote", "pr-1", "--into", "main"]);
    assert_eq!(report["error"], json!(null));
    parent.until_content("offline", &Rng::seeded(23).bytes(200_000));
    parent.until_gone("deleted");
    assert!(lab.assert_blobs_match_their_names() > before.len());
    offline_ok(&lab, &["fork", "promote", "pr-1", "--into", "main"]);
    // Nothing of main rests on the fork.
    fork.unmount();
    drop(late);
    offline_ok(&lab, &["fork", "delete", "pr-1", "--yes"]);
    assert_eq!(objects_of(&lab, "pr-1").len(), 1);
    let late = machine(&lab, "late", "main");
    let mut now = tree::read(late.root());
    now.remove(std::path::Path::new("offline")).unwrap();
    tree::assert_same_but_dir_times(&expected, &now);
    assert_eq!(content(&late.path("large-new")), large());
}

fn a_job_with_such_a_fork_commits_what_it_did(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    fork(&lab, "pr-1", "main", &["--own-prefix"]);
    let mut job = spec(&lab, "job", "pr-1")
        .arg("--fork-from=main")
        .arg("--commit=on-success")
        .start();
    file(&job.path("new"), b"new");
    job.control_ok("commit", &[]);
    parent.until_content("new", b"new");
    file(&job.path("written"), b"by the job");
    job.unmount_with(&["--success"]);
    parent.until_content("written", b"by the job");
    lab.assert_blobs_match_their_names();
}

fn a_fork_of_such_a_fork_is_one_too(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    let below = written_fork(&lab, "pr-1");
    let made = offline_json(&lab, &["fork", "create", "pr-1-b", "--from", "pr-1"]);
    assert_eq!(made["own_prefix"], true);
    let before = shared_blobs(&lab);
    let above = machine(&lab, "above", "pr-1-b");
    tree::assert_same_but_dir_times(&tree::read(below.root()), &tree::read(above.root()));
    file(&above.path("above"), &Rng::seeded(24).bytes(2_500_000));
    above.flush();
    offline_ok(&lab, &["fork", "promote", "pr-1-b", "--into", "pr-1"]);
    below.until_content("above", &Rng::seeded(24).bytes(2_500_000));
    assert!(shared_blobs(&lab) == before);
    drop(above);
    offline_ok(&lab, &["fork", "delete", "pr-1-b", "--yes"]);
    offline_ok(&lab, &["fork", "promote", "pr-1", "--into", "main"]);
    parent.until_content("above", &Rng::seeded(24).bytes(2_500_000));
    until_caught_up(&parent);
    tree::assert_same_but_dir_times(&tree::read(below.root()), &tree::read(parent.root()));
}

fn garbage_below_the_own_prefix_is_not_promoted(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    let mut fork = written_fork(&lab, "pr-1");
    fork.unmount();
    let before = (shared_blobs(&lab), objects_of(&lab, "main"));
    let objects = objects_of(&lab, "pr-1");
    let blobs = blobs_of(&lab, "pr-1");
    let refused = || {
        offline_fails(
            &lab,
            &["fork", "promote", "pr-1", "--into", "main"],
            1,
            &["of volume pr-1", "not in the store as", "promoted"],
        );
        assert_eq!(objects_of(&lab, "main"), before.1);
    };
    for key in &blobs {
        let mut garbage = objects[key].clone();
        *garbage.last_mut().unwrap() ^= 1;
        lab.tamper(key, Some(garbage));
    }
    refused();
    assert!(shared_blobs(&lab) == before.0, "garbage was copied");
    // One by one they are right again; until all are, nothing is promoted.
    for key in &blobs {
        refused();
        lab.tamper(key, Some(objects[key].clone()));
    }
    // What was copied of the rest is right, and what was wrong is not among it.
    lab.assert_blobs_match_their_names();
    offline_ok(&lab, &["fork", "promote", "pr-1", "--into", "main"]);
    parent.until_content("large-new", &large());
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// The store as somebody sees it who does not use casmount for it.
async fn by_hand(lab: &Lab, access_key: Option<AccessKey>) -> SharedBucket {
    let mut options = ConnectOptions::default();
    if lab.url().starts_with("s3:") {
        let server = lab.server();
        options.endpoint_url = Some(server.endpoint());
        options.region = Some("us-east-1".into());
        options.access_key = access_key.or_else(|| {
            Some(AccessKey {
                id: server.access_key().into(),
                secret: server.secret_key().into(),
            })
        });
    }
    connect(&lab.url().parse().unwrap(), &options).await.unwrap()
}

fn a_log_that_lies_about_blobs_is_not_promoted(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    // Bytes that main has, of several chunks, and its right list is not what will be told.
    file(&parent.path("tool"), &large());
    parent.flush();
    let whole = Digest::of(&large());
    let chunk = |bytes: &[u8]| Chunk {
        digest: Digest::of(bytes),
        len: bytes.len() as u32,
    };
    let half = vec![7_u8; 2_000_000];
    let half_list = ChunkList::new(vec![chunk(&half); 4]);
    let one = b"bytes of one chunk";
    let entry = |blob: EntryBlob| Entry {
        blob: Some(blob),
        ..Entry::new(NodeKind::File, 0o755)
    };
    let place = PackPlace {
        pack: Digest::of(b"no pack"),
        offset: 52,
        stored_len: 18,
        zstd: false,
    };
    let lies = [
        // Chunks that are right, of a blob that they do not make.
        EntryBlob {
            digest: whole,
            size: half_list.size(),
            chunks: EntryChunks::Inline(half_list),
            places: Vec::new(),
        },
        // Another size than the bytes have.
        EntryBlob {
            digest: Digest::of(one),
            size: 17,
            chunks: EntryChunks::Single,
            places: Vec::new(),
        },
        // A place where nothing is, of bytes that are there.
        EntryBlob {
            digest: Digest::of(one),
            size: 18,
            chunks: EntryChunks::Single,
            places: vec![Some(place)],
        },
        // Nothing at all.
        EntryBlob {
            digest: Digest::of(b"never stored"),
            size: 12,
            chunks: EntryChunks::Single,
            places: Vec::new(),
        },
    ];
    let before = objects_of(&lab, "main");
    let runtime = runtime();
    let bucket = runtime.block_on(by_hand(&lab, None));
    let put = |key: String, bytes: Vec<u8>| {
        let put = runtime.block_on(bucket.put_new(&key, Body::raw(bytes))).unwrap();
        assert!(matches!(put, Put::Written(_)), "{key}");
    };
    for (number, blob) in (1..).zip(lies) {
        let name = format!("pr-{number}");
        fork(&lab, &name, "main", &["--own-prefix"]);
        for bytes in [&half[..], one] {
            let key = format!("volumes/{name}/{}", layout::blob(&Digest::of(bytes)));
            put(key, bytes.to_vec());
        }
        let machine = MachineId(number);
        let now = bucket.clock().now_millis();
        let change = PathChange {
            path: b"lie".to_vec(),
            stamp: Stamp {
                millis: now,
                counter: 0,
                machine,
            },
            entry: Some(entry(blob)),
        };
        let head = Head {
            machine,
            seq: 1,
            published_millis: now,
            previous: None,
        };
        let bytes = segment::encode(&head, &[segment::encode_change(&change, machine).unwrap()]);
        put(layout::segment(&name, now, machine, 1), bytes);
        offline_fails(
            &lab,
            &["fork", "promote", &name, "--into", "main"],
            1,
            &[
                "the bytes of 1 file of",
                "not in the store as its name says, lie first",
            ],
        );
    }
    assert_eq!(objects_of(&lab, "main"), before);
    let late = machine(&lab, "late", "main");
    assert_eq!(content(&late.path("tool")), large());
    assert!(is_absent(&late.path("lie")));
}

#[test]
fn who_may_write_below_pr_only_changes_nothing_that_main_shows_or_believes() {
    let lab = Lab::guarded();
    let main = as_user(spec(&lab, "main", "main"), "trusted").start();
    file(&main.path("kept"), b"kept");
    main.flush();
    fork(&lab, "pr-9", "main", &["--own-prefix"]);
    let before = objects_of(&lab, "main");

    // What main will write next, each as an object of its own: longer than what goes into packs with others.
    let next: Vec<Vec<u8>> = (31..34).map(|seed| Rng::seeded(seed).bytes(400_000)).collect();
    let runtime = runtime();
    let attacker = AccessKey {
        id: "pr".into(),
        secret: "secret".into(),
    };
    let attacker = runtime.block_on(by_hand(&lab, Some(attacker)));
    let put = |key: &str| runtime.block_on(attacker.put_new(key, Body::raw("garbage")));
    let denied = |key: &str| assert!(matches!(put(key), Err(TierError::Denied { .. })), "{key}");
    for bytes in &next {
        let key = layout::blob(&Digest::of(bytes));
        denied(&key);
        assert!(matches!(put(&format!("volumes/pr-9/{key}")), Ok(Put::Written(_))));
    }
    denied(&layout::pack(&Digest::of(b"a pack")));
    denied(&layout::segment("main", 1_767_225_600_000, MachineId(1), 1));
    denied("volumes/main/volume.json");
    denied("volumes/pr-9/volume.json");
    denied("volumes/pr-10/volume.json");
    denied("casmount.json");
    let removed = runtime.block_on(attacker.delete(before.keys().next().unwrap()));
    assert!(matches!(removed, Err(TierError::Denied { .. })));

    // Main writes exactly that.
    for (number, bytes) in next.iter().enumerate() {
        file(&main.path(format!("next{number}")), bytes);
    }
    main.flush();
    let late = as_user(spec(&lab, "late", "main"), "trusted").start();
    let by_pull_request = as_user(spec(&lab, "reader", "pr-9"), "pr").start();
    for (number, bytes) in next.iter().enumerate() {
        for machine in [&late, &by_pull_request] {
            assert_eq!(content(&machine.path(format!("next{number}"))), *bytes);
        }
    }
    // And the fork's own log cannot make the garbage main's.
    let names = objects_of(&lab, "main");
    file(&by_pull_request.path("good"), b"good");
    by_pull_request.flush();
    let output = by_pull_request.control("commit", &[]);
    assert_eq!(output.status.code(), Some(1));
    assert_says(
        &String::from_utf8_lossy(&output.stderr),
        &["s3:PutObject", "not promoted into main"],
    );
    assert_eq!(objects_of(&lab, "main"), names);
    offline_ok(&lab, &["fork", "promote", "pr-9", "--into", "main"]);
    late.until_content("good", b"good");
    lab.assert_blobs_match_their_names();
}

#[test]
fn a_machine_of_a_pull_request_mounts_its_fork_and_nothing_else() {
    let lab = Lab::guarded();
    let main = as_user(spec(&lab, "main", "main"), "trusted").start();
    file(&main.path("kept"), b"kept");
    main.flush();
    fork(&lab, "pr-1", "main", &["--own-prefix"]);
    let pull_request = as_user(spec(&lab, "a", "pr-1"), "pr").start();
    assert_eq!(content(&pull_request.path("kept")), b"kept");
    file(&pull_request.path("large"), &large());
    file(&pull_request.path("small"), b"small");
    pull_request.flush();
    let other = as_user(spec(&lab, "b", "pr-1"), "pr").start();
    assert_eq!(content(&other.path("large")), large());
    assert_eq!(content(&other.path("small")), b"small");
    assert!(
        stored(&lab).keys().all(|key| !key.contains("probe/")),
        "a probe was left"
    );

    // Main can be read with these credentials, and not written.
    let line = refusal(&as_user(spec(&lab, "c", "main"), "pr"));
    assert_says(&line, &["cannot be written to", "s3:PutObject"]);
    let reader = as_user(spec(&lab, "d", "main"), "pr").arg("--read-only").start();
    assert_eq!(content(&reader.path("kept")), b"kept");
    // Nor can such a machine make a fork.
    let job = as_user(spec(&lab, "e", "pr-2"), "pr").arg("--fork-from=main");
    assert_says(&refusal(&job), &["no permission for s3:PutObject"]);

    for (volume, code) in [("pr-1", 0), ("main", 1)] {
        let doctor = as_user(lab.spec("doctor"), "pr");
        let mut command = doctor.command();
        command
            .args(["doctor", "--json", "--volume", volume])
            .args(&doctor.args);
        command.arg("--cache-dir").arg(&doctor.cache_dir);
        let output = wait::run(&mut command, SOON);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let found: serde_json::Value = serde_json::from_str(&text).unwrap();
        let permitted = found["findings"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|finding| finding["check"] == "store-permissions")
            .all(|finding| finding["severity"] == "ok");
        assert_eq!(permitted, code == 0, "{volume}: {text}");
    }
}
