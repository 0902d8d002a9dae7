//! A store that fails, lies, stalls or is away: nothing wrong is served, nothing is lost,
//! nothing hangs.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lab::{Lab, StoreKind};
use s3server::Faults;
use support::{
    machine::Machine,
    posix::{content, file, ro},
    rng::Rng,
    tree, wait,
};

on_both_stores!(
    while_the_store_is_away_resident_files_work_and_others_fail_in_time,
    a_restart_while_the_store_is_away_serves_what_is_here,
    a_blob_gone_from_the_store_reads_as_no_such_file,
    a_chunk_found_missing_later_loses_the_name_here,
    what_is_deleted_before_its_upload_holds_up_nothing,
    a_mount_that_began_while_the_store_was_away_ends_cleanly,
    bytes_that_do_not_match_are_never_served,
);

const SOON: Duration = Duration::from_secs(40);
const READ_TIMEOUT: Duration = Duration::from_secs(3);

/// The time limit and what a busy machine may add.
const READ_LIMIT: Duration = Duration::from_secs(3 + 4);

fn machine(lab: &Lab, name: &str) -> Machine {
    lab.spec(name).arg("--read-timeout").arg("3s").start()
}

#[track_caller]
fn until_there(machine: &Machine, name: &str) {
    let path = machine.path(name);
    wait::until(&format!("{} sees {name}", machine.spec.name), SOON, || {
        fs::symlink_metadata(&path).ok()
    });
}

/// Reads a file whole, in a thread of its own, within the limit of reads.
#[track_caller]
fn read_in_time(path: PathBuf) -> (io::Result<Vec<u8>>, Duration) {
    wait::within(
        "a read has a bound",
        READ_LIMIT + Duration::from_secs(20),
        move || {
            let start = Instant::now();
            let result = fs::read(path);
            (result, start.elapsed())
        },
    )
}

/// A file whose content its name decides, of one chunk or of several.
fn named_content(name: &str, bytes: usize) -> Vec<u8> {
    Rng::seeded(u64::from(name.bytes().map(u32::from).sum::<u32>())).bytes(bytes)
}

fn while_the_store_is_away_resident_files_work_and_others_fail_in_time(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (machine(&lab, "a"), machine(&lab, "b"));
    let bytes = named_content("cold", 200_000);
    for name in ["cold", "warm", "cold-again"] {
        // Content of its own: equal bytes would be one blob, and here as soon as one of them is.
        let mut own = bytes[..bytes.len() - name.len()].to_vec();
        own[..name.len()].copy_from_slice(name.as_bytes());
        file(&a.path(name), &own);
    }
    a.flush();
    until_there(&b, "cold-again");
    until_there(&b, "warm");
    assert_eq!(content(&b.path("warm")).len(), bytes.len() - 4);

    lab.set_down(true);
    let (result, took) = read_in_time(b.path("cold"));
    assert_errno!(result, EIO);
    assert!(took < READ_LIMIT, "after {took:?}");
    // Meanwhile: all that this machine has works, and so does what needs no bytes.
    let start = Instant::now();
    assert_eq!(content(&b.path("warm")).len(), bytes.len() - 4);
    assert_eq!(fs::read_dir(b.root()).unwrap().count(), 3);
    assert_eq!(
        fs::metadata(b.path("cold")).unwrap().len(),
        bytes.len() as u64 - 4
    );
    file(&b.path("written"), b"while the store is away");
    assert_eq!(content(&b.path("written")), b"while the store is away");
    fs::rename(b.path("written"), b.path("renamed")).unwrap();
    fs::write(b.path("warm"), b"overwritten").unwrap();
    // Emptying needs no old bytes.
    drop(File::create(b.path("cold")).unwrap());
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "resident work waited: {:?}",
        start.elapsed()
    );
    let refused = b.control("flush", &["--deadline", "2s"]);
    assert_eq!(
        refused.status.code(),
        Some(1),
        "flush claims success while the store is away"
    );

    lab.set_down(false);
    let recovered = Instant::now();
    b.flush();
    assert!(
        recovered.elapsed() < Duration::from_secs(15),
        "flush after {:?}",
        recovered.elapsed()
    );
    assert!(
        content(&b.path("cold-again"))["cold-again".len()..]
            == bytes["cold-again".len()..bytes.len() - "cold-again".len()],
        "EIO for ever"
    );
    until_there(&a, "renamed");
    assert_eq!(content(&a.path("renamed")), b"while the store is away");
    wait::until("A has the change", SOON, || {
        (content(&a.path("warm")) == b"overwritten").then_some(())
    });
    assert_eq!(content(&a.path("cold")), b"");
    let log = b.log();
    assert!(
        log.contains("cold") || log.to_lowercase().contains("unavailable") || log.contains("reach"),
        "the log names no cause"
    );
}

fn a_restart_while_the_store_is_away_serves_what_is_here(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, mut b) = (machine(&lab, "a"), machine(&lab, "b"));
    file(&a.path("shared"), b"shared");
    a.flush();
    until_there(&b, "shared");
    assert_eq!(content(&b.path("shared")), b"shared");
    lab.set_down(true);
    file(&b.path("dirty"), b"not uploaded yet");
    b.kill9();
    b.restart();
    assert_eq!(content(&b.path("shared")), b"shared");
    assert_eq!(content(&b.path("dirty")), b"not uploaded yet");
    file(&b.path("more"), b"more");
    lab.set_down(false);
    b.flush();
    until_there(&a, "more");
    assert_eq!(content(&a.path("dirty")), b"not uploaded yet");
}

/// Removes from the store the blobs whose content is given.
fn lose(lab: &Lab, bytes: &[u8]) {
    let digest = tree::hex(&tree::digest(bytes));
    let keys = lab.blob_keys();
    let key = keys
        .iter()
        .find(|key| key.ends_with(&digest))
        .expect("the blob is in the store");
    lab.tamper(key, None);
}

fn a_blob_gone_from_the_store_reads_as_no_such_file(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (mut a, b) = (machine(&lab, "a"), machine(&lab, "b"));
    let bytes = named_content("gone", 50_000);
    file(&a.path("gone"), &bytes);
    file(&a.path("kept"), b"kept");
    a.flush();
    until_there(&b, "kept");
    until_there(&b, "gone");
    lose(&lab, &bytes);

    assert_errno!(File::open(b.path("gone")), ENOENT);
    assert_errno!(fs::read(b.path("gone")), ENOENT);
    assert!(b.counter("/files/lost") >= 1, "a loss is reported");
    assert_eq!(content(&b.path("kept")), b"kept");
    // It is this machine's opinion: the other still has its bytes, and its name.
    assert!(content(&a.path("gone")) == bytes);

    // A build tool makes it again, which repairs it for all.
    file(&b.path("gone"), &bytes);
    assert!(content(&b.path("gone")) == bytes);
    b.flush();
    a.unmount();
    let c = machine(&lab, "c");
    until_there(&c, "gone");
    assert!(content(&c.path("gone")) == bytes);
}

fn a_chunk_found_missing_later_loses_the_name_here(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (machine(&lab, "a"), machine(&lab, "b"));
    let bytes = named_content("large", 24 << 20);
    file(&a.path("large"), &bytes);
    file(&a.path("kept"), b"kept");
    a.flush();
    until_there(&b, "kept");
    until_there(&b, "large");
    let reader = ro(&b.path("large"));
    let mut first = [0; 4096];
    reader.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first[..], bytes[..4096]);
    // Whatever lies beyond the readahead of the first read goes.
    let beyond = |object: &lab::StoredObject| {
        let Some(head) = object.bytes.strip_prefix(b"casmpk\0\x01") else {
            return false;
        };
        let members = u32::from_le_bytes(head[..4].try_into().unwrap()) as usize;
        // Random bytes do not compress, so a chunk is stored as it is.
        let first = &head[4 + 40 * members..][..64];
        bytes[16 << 20..].windows(64).any(|window| window == first)
    };
    let tail: Vec<_> = lab.objects().into_iter().filter(beyond).collect();
    assert!(!tail.is_empty(), "no pack begins beyond 16 MiB");
    for object in tail {
        lab.tamper(&object.key, None);
    }
    let mut found = vec![0; 8192];
    let at = 22 << 20;
    let result = reader.read_exact_at(&mut found, at);
    assert_errno!(result, EIO);
    assert!(
        found.iter().all(|byte| *byte == 0),
        "bytes came although the read failed"
    );
    drop(reader);
    wait::until("the name is lost here", SOON, || {
        File::open(b.path("large"))
            .is_err_and(|err| err.raw_os_error() == Some(libc::ENOENT))
            .then_some(())
    });
    assert!(content(&a.path("large")) == bytes, "a loss is published");
    file(&b.path("large"), &bytes);
    b.flush();
    let c = machine(&lab, "c");
    until_there(&c, "large");
    assert!(content(&c.path("large")) == bytes);
}

fn bytes_that_do_not_match_are_never_served(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (machine(&lab, "a"), machine(&lab, "b"));
    let bytes = named_content("damaged", 70_000);
    file(&a.path("damaged"), &bytes);
    file(&a.path("last"), b"last");
    a.flush();
    until_there(&b, "last");
    until_there(&b, "damaged");
    let digest = tree::hex(&tree::digest(&bytes));
    let key = lab
        .blob_keys()
        .into_iter()
        .find(|key| key.ends_with(&digest))
        .unwrap();
    for damage in [&b""[..], b"short", &vec![0; 70_000], &bytes[..69_999]] {
        lab.tamper(&key, Some(damage.to_vec()));
        let (result, _) = read_in_time(b.path("damaged"));
        let code = support::posix::Code::code(&result);
        assert!(
            [libc::EIO, libc::ENOENT].contains(&code),
            "served {:?}",
            result.map(|bytes| bytes.len())
        );
    }
    // Damage at rest is mended by whoever still has the bytes, or by making them again.
    lab.tamper(&key, Some(bytes.clone()));
    wait::until("the mended blob is served", SOON, || {
        if let Ok(found) = fs::read(b.path("damaged")) {
            assert!(found == bytes);
            Some(())
        } else {
            let _ = fs::write(b.path("damaged"), &bytes);
            None
        }
    });
}

/// Two machines work while the server does `faults`; in the end both have everything.
fn work_under(faults: Faults) {
    let lab = Lab::new(StoreKind::S3);
    let (a, b) = (machine(&lab, "a"), machine(&lab, "b"));
    lab.server().set_faults(faults);
    let expected =
        |name: &str, n: usize| named_content(&format!("{name}{n}"), [200, 40_000, 900_000, 4_000_000][n % 4]);
    let write = |machine: &Machine| {
        for n in 0..24 {
            file(
                &machine.path(format!("{}{n}", machine.spec.name)),
                &expected(&machine.spec.name, n),
            );
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| write(&a));
        scope.spawn(|| write(&b));
    });
    // Whatever is seen of the other meanwhile is right, or an error in time.
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut right = 0;
    while Instant::now() < deadline && right < 24 {
        right = 0;
        for n in 0..24 {
            let path = b.path(format!("a{n}"));
            if let (Ok(bytes), took) = read_in_time(path) {
                assert!(bytes == expected("a", n), "wrong bytes of a{n} after {took:?}");
                right += 1;
            }
        }
    }
    let counts = lab.server().counts();
    assert!(
        counts.faults > 5,
        "nothing went wrong, so nothing was shown: {counts:?}"
    );
    lab.server().set_faults(Faults::default());
    let recovered = Instant::now();
    a.flush();
    b.flush();
    assert!(
        recovered.elapsed() < Duration::from_secs(30),
        "flush after {:?}",
        recovered.elapsed()
    );
    for (writer, reader) in [(&a, &b), (&b, &a)] {
        for n in 0..24 {
            let name = format!("{}{n}", writer.spec.name);
            let bytes = expected(&writer.spec.name, n);
            wait::until(&format!("{name} is whole elsewhere"), SOON, || {
                match fs::read(reader.path(&name)) {
                    Ok(found) => {
                        assert!(found == bytes, "wrong bytes of {name}");
                        Some(())
                    }
                    Err(_) => None,
                }
            });
        }
    }
    lab.assert_blobs_match_their_names();
    assert_eq!(
        a.counter("/cache/dirty_blobs") + b.counter("/cache/dirty_blobs"),
        0
    );
    assert_eq!(
        a.counter("/files/lost") + b.counter("/files/lost"),
        0,
        "trouble was taken for a loss"
    );
}

fn share(set: impl FnOnce(&mut Faults)) -> Faults {
    let mut faults = Faults {
        seed: 5,
        ..Faults::default()
    };
    set(&mut faults);
    faults
}

#[test]
fn errors_of_the_server_are_retried() {
    work_under(share(|faults| {
        faults.error_500 = 0.3;
        faults.slow_down = 0.2;
        faults.conflict = 0.1;
    }));
}

#[test]
fn broken_connections_are_retried() {
    work_under(share(|faults| {
        faults.reset = 0.3;
        faults.lost_reply = 0.2;
    }));
}

#[test]
fn stalled_replies_are_given_up_and_retried() {
    work_under(share(|faults| faults.stall = 0.15));
}

#[test]
fn wrong_bytes_on_the_way_are_fetched_again() {
    work_under(share(|faults| faults.wrong_bytes = 0.4));
}

/// Lets no blob and no pack into the store, but segments; and lets them again.
fn refuse_blobs(lab: &Lab, kind: StoreKind, refuse: bool) {
    match kind {
        StoreKind::S3 => lab.server().set_faults(Faults {
            refused_keys: ["/blobs/", "/packs/"]
                .map(str::to_owned)
                .into_iter()
                .filter(|_| refuse)
                .collect(),
            ..Faults::default()
        }),
        StoreKind::File => {
            let store = PathBuf::from(lab.url().strip_prefix("file://").unwrap());
            for dir in ["blobs", "packs"].map(|dir| store.join(dir)) {
                if refuse {
                    // Where a folder is to be made.
                    file(&dir, b"");
                } else {
                    fs::remove_file(&dir).unwrap();
                }
            }
        }
    }
}

fn what_is_deleted_before_its_upload_holds_up_nothing(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (machine(&lab, "a"), machine(&lab, "b"));
    refuse_blobs(&lab, kind, true);
    let large = named_content("large", 9_000_000);
    let sealed = |blobs: u64| {
        wait::until(&format!("{blobs} blobs wait"), SOON, || {
            (a.counter("/cache/dirty_blobs") == blobs).then_some(())
        });
    };
    file(&a.path("large"), &large);
    file(&a.path("small"), b"small");
    file(&a.path("open"), b"open");
    file(&a.path("twice"), b"twice");
    file(&a.path("also"), b"twice");
    file(&a.path("linked"), b"linked");
    file(&a.path("renamed"), b"renamed");
    file(&a.path("written"), b"the old bytes");
    sealed(7);
    let refused = a.control("flush", &["--deadline", "1s"]);
    assert_eq!(refused.status.code(), Some(1), "blobs got into the store");

    let open = ro(&a.path("open"));
    fs::hard_link(a.path("linked"), a.path("link")).unwrap();
    fs::rename(a.path("renamed"), a.path("new name")).unwrap();
    for name in ["large", "small", "open", "twice", "linked"] {
        fs::remove_file(a.path(name)).unwrap();
    }
    fs::write(a.path("written"), b"the new bytes").unwrap();
    // Of `open`, `also`, `link`, `new name` and `written`.
    sealed(5);
    let mut bytes = [0; 4];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"open");
    drop(open);
    sealed(4);
    for (name, bytes) in [("also", "twice"), ("link", "linked"), ("new name", "renamed")] {
        assert_eq!(content(&a.path(name)), bytes.as_bytes());
    }
    for name in ["also", "link", "new name"] {
        fs::remove_file(a.path(name)).unwrap();
    }
    // The bytes of a deleted file, made again.
    file(&a.path("again"), b"small");
    fs::remove_file(a.path("written")).unwrap();
    sealed(1);
    fs::remove_file(a.path("again")).unwrap();
    // No blob goes into the store, and nobody waits for one.
    a.flush();
    sealed(0);
    let left: u64 = wait::until("their bytes leave the disk", SOON, || {
        let resident = a.counter("/cache/resident_bytes");
        (resident == 0).then_some(resident)
    });
    assert_eq!(left, 0);

    refuse_blobs(&lab, kind, false);
    file(&a.path("large"), &large);
    file(&a.path("last"), b"last");
    a.flush();
    until_there(&b, "last");
    until_there(&b, "large");
    assert!(content(&b.path("large")) == large);
    assert_eq!(fs::read_dir(b.root()).unwrap().count(), 2);
    lab.assert_blobs_match_their_names();
    for word in ["cannot be read", "differ"] {
        assert!(!a.log().contains(word), "the log says {word:?}");
    }
}

fn a_mount_that_began_while_the_store_was_away_ends_cleanly(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut a = machine(&lab, "a");
    file(&a.path("f"), b"f");
    a.unmount();
    lab.set_down(true);
    a.restart();
    assert_eq!(content(&a.path("f")), b"f");
    // Until it has tried, and waits to try again.
    wait::until("it looked for the store", SOON, || {
        a.status()["follow"]["last_error"].is_string().then_some(())
    });
    a.unmount();
    let log = a.log();
    for word in ["still in use", "still being answered", "mends"] {
        assert!(!log.contains(word), "the log says {word:?}");
    }
}

#[test]
fn a_server_that_ignores_ranges_serves_right_bytes() {
    let lab = Lab::new(StoreKind::S3);
    lab.server()
        .set_faults(share(|faults| faults.ignore_ranges = true));
    let (a, b) = (machine(&lab, "a"), machine(&lab, "b"));
    let bytes = named_content("ranges", 12 << 20);
    file(&a.path("f"), &bytes);
    a.flush();
    until_there(&b, "f");
    assert!(content(&b.path("f")) == bytes);
}

#[test]
fn credentials_that_lose_their_rights_empty_no_volume() {
    let lab = Lab::new(StoreKind::S3);
    let (a, b) = (machine(&lab, "a"), machine(&lab, "b"));
    let bytes = named_content("f", 30_000);
    file(&a.path("f"), &bytes);
    a.flush();
    until_there(&b, "f");
    lab.server()
        .set_faults(share(|faults| faults.forbidden = vec!["GetObject".to_owned()]));
    let (result, took) = read_in_time(b.path("f"));
    assert_errno!(result, EIO);
    assert!(took < READ_LIMIT, "after {took:?}");
    assert!(READ_TIMEOUT < READ_LIMIT);
    lab.server().set_faults(Faults::default());
    wait::until("the file is served again", SOON, || {
        fs::read(b.path("f")).ok().filter(|found| *found == bytes)
    });
    assert_eq!(b.counter("/files/lost"), 0);
    assert!(exists(&a.path("f")));
}

fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}
