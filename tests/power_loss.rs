//! The power goes while files are written: what fsync promised is there, and nothing else is made up.
//!
//! The cache directory is on a file system of its own on a loop device, whose kernel driver can
//! be told to stop at once as if the power went. Root only.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use lab::{Lab, StoreKind};
use support::{
    loopdev::{self, LoopFs},
    machine::Machine,
    namespace,
    posix::file,
    rng::Rng,
    tree, wait,
};

const SOON: Duration = Duration::from_secs(60);

/// More than the writers write in all rounds on a quick machine; what is not written takes no space.
const DISK_BYTES: u64 = 10 << 30;

/// What a file may be found as after the power came back.
#[derive(Clone, Debug, Default)]
struct Fate {
    /// Contents that were written, by digest; the newest last.
    written: Vec<[u8; 32]>,
    /// Which of them fsync promised: this one or a later one must be there.
    promised: Option<usize>,
}

type Ledger = Mutex<BTreeMap<PathBuf, Fate>>;

/// Makes the machine look as if it had started anew: the same files, another boot id.
///
/// In a mount namespace of this thread and what it starts, so nobody else sees it.
fn start_anew(dir: &Path, number: u32) {
    let boot_id = file(
        &dir.join(format!("boot-{number}")),
        format!("00000000-0000-4000-8000-{number:012}\n").as_bytes(),
    );
    rustix::mount::mount_bind(&boot_id, "/proc/sys/kernel/random/boot_id")
        .expect("a bind mount in our own namespace");
}

/// Writes until `done`: files with fsync, files without, and files that are written twice.
fn write_files(root: &Path, thread: u64, round: u32, ledger: &Ledger, done: &AtomicBool) {
    let mut rng = Rng::seeded(thread * 1_000 + u64::from(round));
    let deadline = Instant::now() + Duration::from_secs(60);
    for n in 0..100_000 {
        if done.load(Ordering::SeqCst) || Instant::now() > deadline {
            return;
        }
        let path = root.join(format!("r{round}-t{thread}-{n}"));
        let versions = if rng.below(4) == 0 { 2 } else { 1 };
        let first_synced = rng.below(2) == 0;
        for version in 0..versions {
            let size = [300, 9_000, 150_000, 2_500_000][rng.below(4) as usize];
            let bytes = rng.bytes(size);
            {
                let mut ledger = ledger.lock().unwrap();
                ledger
                    .entry(path.clone())
                    .or_default()
                    .written
                    .push(tree::digest(&bytes));
            }
            let sync = version == 0 && first_synced;
            let Ok(mut writer) = File::create(&path) else {
                return;
            };
            if writer.write_all(&bytes).is_err() {
                return;
            }
            if sync && writer.sync_all().is_ok() && !done.load(Ordering::SeqCst) {
                let mut ledger = ledger.lock().unwrap();
                ledger.get_mut(&path).expect("written above").promised = Some(version);
            }
        }
    }
}

/// Checks every file against the ledger. Returns how many were there.
fn check(machine: &Machine, ledger: &BTreeMap<PathBuf, Fate>, only_promised: bool) -> usize {
    let mut found_count = 0;
    for (path, fate) in ledger {
        if only_promised && fate.promised.is_none() {
            continue;
        }
        let shown = path.file_name().expect("a file").to_string_lossy();
        match tree::digest_of(path) {
            Ok(digest) => {
                let version = fate.written.iter().position(|written| *written == digest);
                let Some(version) = version else {
                    panic!(
                        "{shown} has bytes that nobody wrote ({} bytes)",
                        fs::metadata(path).unwrap().len()
                    );
                };
                if let Some(promised) = fate.promised {
                    assert!(version >= promised, "{shown} is older than what fsync promised");
                }
                found_count += 1;
            }
            Err(err) => {
                // A version written over a promised one without fsync may take it along as POSIX has it.
                let replaced = fate
                    .promised
                    .is_some_and(|promised| promised + 1 < fate.written.len());
                let errno = err.raw_os_error().expect("an error of the system");
                assert!(
                    fate.promised.is_none() || replaced,
                    "fsync promised {shown}: {err}"
                );
                assert!([libc::ENOENT, libc::EIO].contains(&errno), "{shown}: {err}");
            }
        }
    }
    eprintln!(
        "{}: {found_count} of {} files are there",
        machine.spec.name,
        ledger.len()
    );
    found_count
}

fn power_cut(kind: &str) {
    if let Err(why) = loopdev::supports(kind) {
        skip!("{kind}: {why}");
    }
    namespace::enter();
    let lab = Lab::new(StoreKind::File);
    let mut disk = LoopFs::make(kind, lab.dir(), "disk", DISK_BYTES);
    let spec = lab
        .spec("a")
        .arg("--read-timeout")
        .arg("2s")
        .arg("--min-free")
        .arg("0")
        // What was promised must be found without the store, so nothing may leave.
        .arg("--cache-size")
        .arg(format!("{DISK_BYTES}"));
    let mut a = spec.cache_dir(&disk.path().join("cache")).start();
    let mut rng = Rng::from_environment();
    let ledger = Ledger::default();

    for round in 0..3 {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (ledger, done, root) = (&ledger, &done, a.root().to_owned());
                scope.spawn(move || write_files(&root, thread, round, ledger, done));
            }
            // Past the settle time, so that some are sealed, some rest, and some are being written.
            std::thread::sleep(Duration::from_millis(1_500 + rng.below(3_500)));
            done.store(true, Ordering::SeqCst);
            disk.cut_power();
            a.kill9();
        });
        support::tempdir::unmount_below(a.root());
        disk.remount();
        start_anew(lab.dir(), round);

        let ledger = ledger.lock().unwrap();
        assert!(
            ledger.values().filter(|fate| fate.promised.is_some()).count() > 20,
            "too little was synced"
        );
        // What fsync promised does not need the store.
        lab.set_down(true);
        a.restart();
        check(&a, &ledger, true);
        lab.set_down(false);
        let found = check(&a, &ledger, false);
        assert!(found > 20);
        lab.assert_blobs_match_their_names();
    }
    a.flush();
    file(&a.path("last"), b"last");
    a.flush();
    lab.assert_blobs_match_their_names();
    let b = lab.machine("b");
    wait::until("B has everything", SOON, || b.path("last").exists().then_some(()));
    let ledger = ledger.into_inner().unwrap();
    let here = check(&a, &ledger, false);
    let there: BTreeMap<_, _> = ledger
        .into_iter()
        .map(|(path, fate)| (b.path(path.file_name().expect("a file")), fate))
        .collect();
    assert_eq!(check(&b, &there, false), here);
    a.unmount();
}

#[test]
fn after_a_power_cut_on_ext4_synced_files_are_there_and_nothing_is_made_up() {
    power_cut("ext4");
}

#[test]
fn after_a_power_cut_on_xfs_synced_files_are_there_and_nothing_is_made_up() {
    power_cut("xfs");
}

/// The cut itself, without casmount: it must keep what was synced and lose what was not,
/// or the tests above would show nothing.
fn cut_of_the_file_system_alone(kind: &str) {
    if let Err(why) = loopdev::supports(kind) {
        skip!("{kind}: {why}");
    }
    namespace::enter();
    let dir = support::tempdir::TestDir::new();
    let mut disk = LoopFs::make(kind, dir.path(), "disk", 512 << 20);
    let (synced, lost) = (disk.path().join("synced"), disk.path().join("lost"));
    let mut writer = File::create(&synced).unwrap();
    writer.write_all(b"synced").unwrap();
    writer.sync_all().unwrap();
    File::open(disk.path()).unwrap().sync_all().unwrap();
    drop(writer);
    file(&lost, b"not synced");
    disk.cut_power();
    assert!(fs::write(disk.path().join("after"), b"x").is_err());
    disk.remount();
    assert_eq!(fs::read(&synced).unwrap(), b"synced");
    assert!(
        !fs::read(&lost).is_ok_and(|bytes| bytes == b"not synced"),
        "the cut loses nothing"
    );
    let before = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    start_anew(dir.path(), 7);
    assert_ne!(
        fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap(),
        before
    );
}

#[test]
fn a_cut_of_ext4_loses_what_was_not_synced() {
    cut_of_the_file_system_alone("ext4");
}

#[test]
fn a_cut_of_xfs_loses_what_was_not_synced() {
    cut_of_the_file_system_alone("xfs");
}
