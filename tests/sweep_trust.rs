//! Sweeps of a store into which machines write that are trusted less, held to the policies that are shipped.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;
#[path = "support/volumes.rs"]
mod volumes;

use std::{fs, process::Output, time::Duration};

use casmount::{
    base::id::MachineId,
    tier::{
        Body, Put, SharedBucket, TierError, layout,
        url::{AccessKey, ConnectOptions, connect},
    },
};
use lab::{Lab, as_user};
use serde_json::Value;
use support::{
    posix::{content, file},
    rng::Rng,
    wait,
};
use volumes::{fork, machine, spec};

/// How long it may take until a sweep did what is due after two windows.
const SOON: Duration = Duration::from_secs(90);

/// Runs a sweep as `id`.
fn try_sweep(lab: &Lab, id: &str, args: &[&str]) -> Output {
    let spec = as_user(lab.spec("sweeper"), id);
    let mut command = spec.command();
    command.arg("sweep").args(args).args(&spec.args);
    wait::run(&mut command, SOON)
}

#[track_caller]
fn sweep(lab: &Lab, args: &[&str]) -> Value {
    let output = try_sweep(lab, "trusted", &[&["--json"], args].concat());
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{err}");
    serde_json::from_slice(&output.stdout).expect("a report is JSON")
}

/// The store as a machine of a pull request sees it that does not use casmount for it.
async fn attacker(lab: &Lab) -> SharedBucket {
    let options = ConnectOptions {
        endpoint_url: Some(lab.server().endpoint()),
        region: Some("us-east-1".into()),
        access_key: Some(AccessKey {
            id: "pr".into(),
            secret: "secret".into(),
        }),
        ..ConnectOptions::default()
    };
    connect(&lab.url().parse().unwrap(), &options).await.unwrap()
}

#[test]
fn whatever_a_pull_request_writes_the_trusted_sweep_goes_on() {
    let lab = Lab::guarded();
    sweep(&lab, &["--window", "4s"]);
    let main = as_user(spec(&lab, "main", "main"), "trusted").start();
    let kept = Rng::seeded(1).bytes(300_000);
    file(&main.path("kept"), &kept);
    file(&main.path("gone"), &Rng::seeded(2).bytes(400_000));
    main.flush();
    fork(&lab, "pr-9", "main", &["--own-prefix"]);
    fs::remove_file(main.path("gone")).unwrap();
    main.flush();

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let attacker = runtime.block_on(attacker(&lab));
    let put = |key: &str, bytes: &[u8]| {
        let body = Body::raw(bytes.to_vec());
        let put = runtime.block_on(attacker.put_new(key, body));
        assert!(matches!(put, Ok(Put::Written(_))), "{key}: {put:?}");
    };
    let large = vec![b' '; 300 << 10];
    for volume in ["pr-9", "pr-squatted"] {
        for (key, bytes) in [
            (
                layout::segment(volume, 1_767_225_600_000, MachineId(1), 1),
                &b"garbage"[..],
            ),
            (format!("{}odd", layout::log_prefix(volume)), b"x"),
            (layout::head(volume), &large),
            (layout::trim(volume), &large),
            (layout::snapshot(volume, "x=1"), &large),
            (format!("volumes/{volume}/odd"), b"x"),
        ] {
            put(&key, bytes);
        }
    }
    put("volumes/pr-", b"x");
    put("volumes/pr-UPPER/volume.txt", b"x");
    // Nor can he take part in sweeping.
    let refused = try_sweep(&lab, "pr", &["--window", "5s"]);
    let err = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{err}");
    for word in ["s3:PutObject", "sweep/window.json"] {
        assert!(err.contains(word), "{word:?} is not in {err}");
    }
    let list = runtime.block_on(attacker.put_new(&layout::sweep_list("1767225600000-1"), Body::raw("x")));
    assert!(matches!(list, Err(TierError::Denied { .. })));
    let many = runtime.block_on(attacker.delete_many(&[layout::segment("main", 1, MachineId(1), 1)]));
    assert!(matches!(many, Err(TierError::Denied { .. })), "{many:?}");

    // Which of these names are anybody's, only the operator knows.
    let output = try_sweep(&lab, "trusted", &[]);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{err}");
    for word in [
        "nothing was swept",
        "volumes/pr-squatted/",
        "--untrusted pr-squatted",
    ] {
        assert!(err.contains(word), "{word:?} is not in {err}");
    }
    let mut deleted = 0;
    let report = wait::until("what was deleted is swept", SOON, || {
        let report = sweep(&lab, &["--untrusted", "pr-*"]);
        deleted += report["deleted"]["bytes"].as_u64().unwrap();
        (deleted >= 400_000).then_some(report)
    });
    let ignored = report["ignored"].as_array().unwrap();
    assert!(ignored.len() >= 8, "{ignored:#?}");
    let output = try_sweep(&lab, "trusted", &["--untrusted", "pr-*", "--dry-run"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("counts for nothing: "));
    // Also what expires before it. Of those, nothing expires.
    let report = sweep(&lab, &["--untrusted=pr-*", "--expire=30d"]);
    let volumes: Vec<_> = report["expiry"].as_array().unwrap().iter().collect();
    assert_eq!(volumes.len(), 1, "{report:#}");
    assert_eq!(volumes[0]["volume"], "main");

    let late = machine(&lab, "late", "main");
    assert_eq!(content(&late.path("kept")), kept);
    lab.assert_blobs_match_their_names();
}
