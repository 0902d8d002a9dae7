//! Catalogs: a machine with an empty cache begins with a checkpoint, and loads what it touches.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;
#[path = "support/volume.rs"]
mod volume;

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use casmount::tier::Body;
use lab::{Lab, StoreKind};
use s3server::Faults;
use serde_json::Value;
use support::{
    machine::{Machine, MachineSpec},
    posix::{content, file},
    tree, wait,
};

on_both_stores!(
    a_new_machine_begins_with_the_catalog_and_goes_on_with_the_log,
    a_fork_is_opened_from_the_catalogs_of_its_layers,
    what_is_unloaded_can_be_changed_like_anything_else,
    a_hundred_thousand_names_are_opened_in_a_moment,
    a_daemon_that_is_killed_while_it_loads_comes_back_with_the_same_tree,
    two_compactors_at_once_make_one_catalog,
    a_compaction_that_is_killed_costs_nothing,
    a_damaged_part_is_an_error_and_not_an_empty_directory,
    a_store_that_is_away_fails_what_is_not_loaded_in_time,
    a_segment_that_comes_late_is_seen_and_folded_the_next_time,
    a_catalog_of_a_newer_version_is_refused,
);

const SOON: Duration = Duration::from_secs(60);

fn compact_command(spec: &MachineSpec) -> Command {
    let mut command = spec.command();
    // As if all of it were old enough.
    command.args(["compact", "--json", "--trail=0s"]).args(&spec.args);
    command
}

fn try_compact(spec: &MachineSpec) -> Output {
    wait::run(&mut compact_command(spec), SOON)
}

#[track_caller]
fn compact(spec: &MachineSpec) -> Value {
    let output = try_compact(spec);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{err}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What a sweep will do: the catalog must do without.
fn remove_log(lab: &Lab) {
    for object in lab.objects() {
        if object.key.contains("/log/") {
            lab.tamper(&object.key, None);
        }
    }
}

fn keys(lab: &Lab, part: &str) -> Vec<String> {
    let keys = lab.objects().into_iter().map(|object| object.key);
    keys.filter(|key| key.contains(part)).collect()
}

/// Makes some of everything, and a few changes of it.
fn fill(root: &Path) {
    for dir in ["empty", "a/deep/er", "b", "gone", "moved"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    for number in 0..300 {
        file(
            &root.join(format!("b/{number:03}")),
            format!("{number}").as_bytes(),
        );
    }
    file(&root.join("large"), &vec![b'l'; 5_000_000]);
    for name in ["a/one", "a/deep/two", "a/deep/er/three", "gone/x", "moved/y"] {
        file(&root.join(name), name.as_bytes());
    }
    symlink("../large", root.join("a/link")).unwrap();
    fs::hard_link(root.join("a/one"), root.join("b/same as one")).unwrap();
    fs::set_permissions(root.join("a/deep"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::remove_dir_all(root.join("gone")).unwrap();
    fs::rename(root.join("moved"), root.join("a/moved")).unwrap();
}

fn a_new_machine_begins_with_the_catalog_and_goes_on_with_the_log(kind: StoreKind) {
    let lab = Lab::new(kind);
    let first = lab.machine("first");
    fill(first.root());
    first.flush();
    let report = compact(&first.spec);
    assert_eq!(report["outcome"], "compacted", "{report:#}");
    let expected = tree::read(first.root());
    assert_eq!(report["names"], expected.len() as u64, "{report:#}");
    remove_log(&lab);

    let second = lab.machine("second");
    tree::assert_same_but_dir_times(&expected, &tree::read(second.root()));
    let status = second.status();
    assert_eq!(status["catalogs"][0]["volume"], "main");
    assert_eq!(status["catalogs"][0]["names"], report["names"]);
    assert!(
        second
            .control_ok("status", &[])
            .contains("\ncatalog     of main as of ")
    );
    let same = |name: &str| std::os::unix::fs::MetadataExt::ino(&fs::metadata(second.path(name)).unwrap());
    assert_eq!(same("a/one"), same("b/same as one"));

    // Both ways, before and behind the catalog.
    file(&first.path("a/one"), b"changed");
    fs::remove_file(first.path("b/000")).unwrap();
    file(&second.path("b/by the second"), b"2");
    first.flush();
    second.flush();
    second.until_content("a/one", b"changed");
    second.until_gone("b/000");
    first.until_content("b/by the second", b"2");
    let now = tree::read(first.root());
    tree::assert_same_but_dir_times(&now, &tree::read(second.root()));

    let again = compact(&first.spec);
    assert_eq!(again["outcome"], "compacted", "{again:#}");
    remove_log(&lab);
    let third = lab.machine("third");
    tree::assert_same_but_dir_times(&now, &tree::read(third.root()));
    let nothing = compact(&first.spec);
    assert_eq!(nothing["outcome"], "nothing_new", "{nothing:#}");
}

fn fork(lab: &Lab, name: &str, more: &[&str]) {
    let spec = lab.spec("forker");
    let mut command = spec.command();
    command
        .args(["fork", "create", name, "--from", "main"])
        .args(more)
        .args(&spec.args);
    let made = wait::run(&mut command, SOON);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

fn on(lab: &Lab, name: &str, volume: &str) -> Machine {
    lab.spec(name).arg(format!("--volume={volume}")).start()
}

fn a_fork_is_opened_from_the_catalogs_of_its_layers(kind: StoreKind) {
    let lab = Lab::new(kind);
    let main = on(&lab, "main", "main");
    fill(main.root());
    main.flush();
    compact(&main.spec);
    fork(&lab, "now", &["--at", "now"]);
    fork(&lab, "live", &[]);
    let before = tree::read(main.root());

    let live = on(&lab, "live", "live");
    fs::remove_dir_all(live.path("b")).unwrap();
    fs::rename(live.path("a/deep"), live.path("elsewhere")).unwrap();
    file(&live.path("a/one"), b"of the fork");
    live.flush();
    compact(&live.spec);
    file(&main.path("new"), b"new");
    fs::remove_file(main.path("large")).unwrap();
    main.flush();
    compact(&main.spec);
    live.until_content("new", b"new");
    live.until_gone("large");
    let expected = tree::read(live.root());
    remove_log(&lab);

    let other = on(&lab, "other", "live");
    tree::assert_same_but_dir_times(&expected, &tree::read(other.root()));
    assert_eq!(other.status()["catalogs"].as_array().unwrap().len(), 2);
    // An older catalog of the parent: the newest has what came later.
    let now = on(&lab, "as it was", "now");
    tree::assert_same_but_dir_times(&before, &tree::read(now.root()));
}

fn what_is_unloaded_can_be_changed_like_anything_else(kind: StoreKind) {
    let lab = Lab::new(kind);
    let first = lab.machine("first");
    fill(first.root());
    first.flush();
    compact(&first.spec);
    let second = lab.machine("second");
    // None of these was looked at before.
    let refused = fs::remove_dir(second.path("a/deep")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::DirectoryNotEmpty);
    fs::rename(second.path("a"), second.path("z")).unwrap();
    fs::remove_dir_all(second.path("b")).unwrap();
    fs::remove_dir(second.path("empty")).unwrap();
    file(&second.path("gone"), b"again");
    second.flush();
    first.until_content("gone", b"again");
    let expected = tree::read(second.root());
    tree::assert_same_but_dir_times(&expected, &tree::read(first.root()));
    assert_eq!(content(&first.path("z/deep/er/three")), b"a/deep/er/three");
    assert!(!second.path("b").exists() && !second.path("a").exists());
}

/// Makes a catalog of many names without a log.
fn generate(lab: &Lab, names: u64) {
    let shape = volume::Shape {
        names,
        per_dir: 250,
        fan_out: 64,
    };
    lab.with_bucket(async |bucket| volume::make(&bucket, "main", shape, Vec::new()).await.unwrap());
}

fn count_names(root: &Path) -> (u64, u64) {
    let (mut files, mut dirs) = (0, vec![root.to_owned()]);
    let mut seen = 0;
    while let Some(dir) = dirs.pop() {
        seen += 1;
        for entry in fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                dirs.push(entry.path());
            } else {
                files += 1;
            }
        }
    }
    (files, seen - 1)
}

const MANY: u64 = 100_000;

fn a_hundred_thousand_names_are_opened_in_a_moment(kind: StoreKind) {
    let lab = Lab::new(kind);
    generate(&lab, MANY);
    let gets = || match kind {
        StoreKind::S3 => lab.server().counts().of("GetObject"),
        StoreKind::File => 0,
    };
    let began = Instant::now();
    let machine = lab.spec("machine").arg("--catalog-prefetch=0").start();
    let mounted = gets();
    let first = fs::read_dir(machine.path("top-00003/dir-00017")).unwrap().count();
    let took = began.elapsed();
    assert_eq!(first, 250);
    let looked = gets();
    // The head and the root, what sweeps keep and what expires, and parts of three directories; the tree's first part
    // has the first two. One more may fall behind the mounting.
    assert!(
        mounted <= 14 && looked <= 17,
        "{mounted} to mount, {looked} with a stat"
    );
    assert!(took < Duration::from_secs(20), "{took:?}");
    let loaded = machine.counter("/catalogs/0/loaded_registers");
    assert!(loaded < MANY / 4, "{loaded} registers for one directory");

    let (files, dirs) = count_names(machine.root());
    assert_eq!((files, dirs), (MANY, 407));
    let parts = machine.counter("/catalogs/0/parts");
    assert!(
        gets() - looked <= 2 * parts,
        "{} GETs of {parts} parts",
        gets() - looked
    );
    assert!(
        machine.rss_bytes() < 250_000_000,
        "{} bytes of memory",
        machine.rss_bytes()
    );
}

fn a_daemon_that_is_killed_while_it_loads_comes_back_with_the_same_tree(kind: StoreKind) {
    let lab = Lab::new(kind);
    generate(&lab, 40_000);
    let mut machine = lab.machine("machine");
    file(&machine.path("top-00001/dir-00003/own"), b"own");
    for _ in 0..3 {
        let root = machine.root().to_owned();
        let walker = std::thread::spawn(move || {
            // Ends with an error when the daemon is gone.
            std::panic::catch_unwind(|| count_names(&root)).is_ok()
        });
        let before = machine.counter("/catalogs/0/loaded_registers");
        wait::until("some more is loaded", SOON, || {
            let now = machine.counter("/catalogs/0/loaded_registers");
            (now > before + 2000 || walker.is_finished()).then_some(())
        });
        machine.kill9();
        let _ = walker.join();
        machine.restart();
    }
    assert_eq!(count_names(machine.root()), (40_001, 163));
    assert_eq!(content(&machine.path("top-00001/dir-00003/own")), b"own");
}

fn spawn_compact(spec: &MachineSpec) -> Child {
    let mut command = compact_command(spec);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn two_compactors_at_once_make_one_catalog(kind: StoreKind) {
    let lab = Lab::new(kind);
    let first = lab.machine("first");
    fill(first.root());
    first.flush();
    let compactors: Vec<Child> = (0..3).map(|_| spawn_compact(&first.spec)).collect();
    let mut outcomes = Vec::new();
    for compactor in compactors {
        let output = compactor.wait_with_output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        outcomes.push(report["outcome"].as_str().unwrap().to_owned());
    }
    assert!(
        outcomes.iter().any(|outcome| outcome == "compacted"),
        "{outcomes:?}"
    );
    let expected = tree::read(first.root());
    remove_log(&lab);
    let second = lab.machine("second");
    tree::assert_same_but_dir_times(&expected, &tree::read(second.root()));
}

fn a_compaction_that_is_killed_costs_nothing(kind: StoreKind) {
    let lab = Lab::new(kind);
    let first = lab.machine("first");
    fill(first.root());
    first.flush();
    compact(&first.spec);
    for number in 0..5 {
        file(&first.path(format!("later {number}")), b"later");
        first.flush();
        let head = lab
            .objects()
            .into_iter()
            .find(|object| object.key.ends_with("head.json"));
        let head = head.unwrap().bytes;
        if kind == StoreKind::S3 {
            lab.server().set_faults(Faults {
                latency_ms: 20 * number,
                ..Faults::default()
            });
        }
        let mut killed = spawn_compact(&first.spec);
        let objects = keys(&lab, "/catalogs/").len();
        let _ = wait::try_until(Duration::from_millis(40 * number), || {
            (keys(&lab, "/catalogs/").len() > objects).then_some(())
        });
        killed.kill().unwrap();
        killed.wait().unwrap();
        if kind == StoreKind::S3 {
            lab.server().set_faults(Faults::default());
        }
        let now = lab
            .objects()
            .into_iter()
            .find(|object| object.key.ends_with("head.json"));
        // Wholly the old one, or wholly a new one.
        let now = now.unwrap().bytes;
        assert!(now == head || serde_json::from_slice::<Value>(&now).is_ok());
        let second = lab.machine(&format!("second {number}"));
        tree::assert_same_but_dir_times(&tree::read(first.root()), &tree::read(second.root()));
    }
    let done = compact(&first.spec)["outcome"].as_str().unwrap().to_owned();
    assert!(done == "compacted" || done == "nothing_new", "{done}");
}

fn a_damaged_part_is_an_error_and_not_an_empty_directory(kind: StoreKind) {
    let lab = Lab::new(kind);
    let first = lab.machine("first");
    fill(first.root());
    first.flush();
    compact(&first.spec);
    let expected = tree::read(first.root());
    remove_log(&lab);
    let objects = lab.objects().into_iter();
    let parts: Vec<_> = objects
        .filter(|object| object.bytes.starts_with(b"casmpart"))
        .collect();
    assert!(!parts.is_empty());
    for damage in [true, false] {
        for part in &parts {
            let mut bytes = part.bytes.clone();
            *bytes.last_mut().unwrap() ^= 1;
            lab.tamper(&part.key, damage.then_some(bytes));
        }
        let machine = lab.machine(if damage { "damaged" } else { "missing" });
        let began = Instant::now();
        let err = fs::read_dir(machine.root())
            .and_then(|mut dir| dir.next().unwrap_or(Err(ErrorKind::NotFound.into())))
            .unwrap_err();
        assert_eq!(err.raw_os_error(), Some(libc::EIO), "{err}");
        let err = fs::metadata(machine.path("b/001")).unwrap_err();
        assert_eq!(err.raw_os_error(), Some(libc::EIO), "{err}");
        assert!(fs::write(machine.path("new"), b"x").is_err());
        assert!(began.elapsed() < Duration::from_secs(10));
        let words = machine.status()["catalogs"][0]["last_error"].to_string();
        let why = if damage { "is damaged" } else { "is gone" };
        assert!(words.contains(why), "{words}");
        assert!(parts.iter().any(|part| words.contains(&part.key)), "{words}");
        lab.with_bucket(async |bucket| {
            for part in &parts {
                if damage {
                    bucket.delete(&part.key).await.unwrap();
                }
                let body = Body::raw(part.bytes.clone());
                bucket.put_new(&part.key, body).await.unwrap();
            }
        });
        tree::assert_same_but_dir_times(&expected, &tree::read(machine.root()));
        assert_eq!(machine.status()["catalogs"][0]["last_error"], Value::Null);
    }
}

fn a_store_that_is_away_fails_what_is_not_loaded_in_time(kind: StoreKind) {
    let lab = Lab::new(kind);
    generate(&lab, 40_000);
    let spec = lab.spec("machine").arg("--read-timeout=2s");
    let mut machine = spec.arg("--catalog-prefetch=0").start();
    let loaded = fs::read_dir(machine.path("top-00000/dir-00002")).unwrap().count();
    lab.set_down(true);
    let began = Instant::now();
    let err = fs::read_dir(machine.path("top-00002/dir-00005"))
        .map(|_| ())
        .unwrap_err();
    assert_eq!(err.raw_os_error(), Some(libc::EIO), "{err}");
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    // What was loaded is there, also after a restart.
    machine.kill9();
    machine.restart();
    assert_eq!(
        fs::read_dir(machine.path("top-00000/dir-00002")).unwrap().count(),
        loaded
    );
    assert!(fs::metadata(machine.path("top-00002/dir-00005/x")).is_err());
    lab.set_down(false);
    wait::until("the store is back", SOON, || {
        fs::read_dir(machine.path("top-00002/dir-00005")).ok()
    });
    assert_eq!(count_names(machine.root()), (40_000, 163));
}

fn a_segment_that_comes_late_is_seen_and_folded_the_next_time(kind: StoreKind) {
    let lab = Lab::new(kind);
    let first = lab.machine("first");
    file(&first.path("early"), b"early");
    first.flush();
    let known = keys(&lab, "/log/");
    file(&first.path("late"), b"late");
    first.flush();
    let objects = lab.objects().into_iter();
    let late: Vec<_> = objects
        .filter(|object| object.key.contains("/log/") && !known.contains(&object.key))
        .collect();
    assert!(!late.is_empty());
    for segment in &late {
        lab.tamper(&segment.key, None);
    }
    file(&first.path("later"), b"later");
    first.flush();
    compact(&first.spec);
    // Their PUTs land now, behind the watermark.
    lab.with_bucket(async |bucket| {
        for segment in &late {
            let body = Body::raw(segment.bytes.clone());
            bucket.put_new(&segment.key, body).await.unwrap();
        }
    });
    let second = lab.machine("second");
    second.until_content("late", b"late");
    assert_eq!(content(&second.path("later")), b"later");
    file(&first.path("last"), b"last");
    first.flush();
    let report = compact(&first.spec);
    assert_eq!(report["names"], 4, "{report:#}");
}

fn a_catalog_of_a_newer_version_is_refused(kind: StoreKind) {
    let lab = Lab::new(kind);
    let first = lab.machine("first");
    file(&first.path("file"), b"x");
    first.flush();
    compact(&first.spec);
    let head = keys(&lab, "head.json").remove(0);
    let bytes = lab
        .objects()
        .into_iter()
        .find(|object| object.key == head)
        .unwrap()
        .bytes;
    let newer = String::from_utf8(bytes)
        .unwrap()
        .replace("\"version\": 1", "\"version\": 2");
    lab.tamper(&head, Some(newer.into_bytes()));
    let spec = lab.spec("second");
    let mut command = spec.mount_command();
    command.arg("--foreground").arg(&spec.mountpoint);
    let output = wait::run(&mut command, SOON);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("head.json was written by a newer casmount"), "{err}");
    let output = try_compact(&first.spec);
    assert_eq!(output.status.code(), Some(1));
    // Whoever followed the log goes on with it.
    file(&first.path("more"), b"more");
    first.flush();
}

#[test]
fn on_a_server_without_conditions_nothing_is_compacted() {
    let lab = Lab::new(StoreKind::S3);
    let first = lab.machine("first");
    file(&first.path("file"), b"x");
    first.flush();
    lab.server().set_faults(Faults {
        ignore_conditions: true,
        ..Faults::default()
    });
    let output = try_compact(&first.spec);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("ignores If-None-Match"), "{err}");
    assert_eq!(
        err.lines().filter(|line| line.contains("If-None-Match")).count(),
        1
    );
    assert!(keys(&lab, "head.json").is_empty());
}
