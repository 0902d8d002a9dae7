//! What the kernel keeps of directories and small files is right, whoever changes them.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::Path,
    time::{Duration, Instant},
};

use casmount::base::digest::Digest;
use lab::{Lab, StoreKind};
use rustix::fs::RawDir;
use support::{
    machine::Machine,
    posix::{content, file},
    wait,
};

on_both_stores!(
    a_listing_is_asked_for_once_and_never_old,
    who_waits_by_listing_alone_keeps_the_mount_in_use,
    a_reader_in_the_middle_of_a_listing_sees_every_name_that_stays_once,
    a_small_file_is_read_again_only_when_it_is_another,
    a_small_file_whose_bytes_left_this_disk_is_fetched_again,
);

const SOON: Duration = Duration::from_secs(30);

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(ToString::to_string).collect()
}

/// Waits until `machine` was told of all that `from` published.
fn catch_up(from: &Machine, machine: &Machine, sign: &str) {
    from.flush();
    file(&from.path(sign), sign.as_bytes());
    from.flush();
    machine.until_content(sign, sign.as_bytes());
}

/// A machine whose log has each request of the kernel, as fuser tells it.
fn telling(lab: &Lab, name: &str) -> Machine {
    lab.spec(name).arg("--log-level").arg("info,fuser=debug").start()
}

/// How many requests of a kind there were.
fn asked(machine: &Machine, request: &str) -> usize {
    machine.log().matches(request).count()
}

fn a_listing_is_asked_for_once_and_never_old(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), telling(&lab, "b"));
    fs::create_dir(a.path("dir")).unwrap();
    file(&a.path("dir/one"), b"1");
    file(&a.path("dir/two"), b"2");
    catch_up(&a, &b, "sign-1");
    assert_eq!(names(&b.path("dir")), set(&["one", "two"]));
    let before = asked(&b, "READDIR");
    assert!(before > 0, "{}", b.log());
    let opened = asked(&b, " OPENDIR");
    for _ in 0..3 {
        assert_eq!(names(&b.path("dir")), set(&["one", "two"]));
    }
    assert_eq!(asked(&b, "READDIR"), before, "the kernel lists by itself");
    assert_eq!(asked(&b, " OPENDIR"), opened, "and opens by itself");
    // By a program here.
    file(&b.path("dir/three"), b"3");
    fs::rename(b.path("dir/one"), b.path("dir/four")).unwrap();
    for _ in 0..2 {
        assert_eq!(names(&b.path("dir")), set(&["four", "three", "two"]));
    }
    fs::remove_file(b.path("dir/two")).unwrap();
    assert_eq!(names(&b.path("dir")), set(&["four", "three"]));
    // By another machine: names that the kernel here never heard of, and one that it knows.
    catch_up(&b, &a, "sign-2");
    fs::remove_file(a.path("dir/four")).unwrap();
    file(&a.path("dir/five"), b"5");
    fs::create_dir(a.path("dir/six")).unwrap();
    a.flush();
    wait::until("the listing follows the other machine", SOON, || {
        (names(&b.path("dir")) == set(&["five", "six", "three"])).then_some(())
    });
    assert_eq!(names(&b.path("dir")), names(&a.path("dir")));
}

/// A mount that rests looks for changes of others every hour here: they come in time only to one that is in use.
fn who_waits_by_listing_alone_keeps_the_mount_in_use(kind: StoreKind) {
    const RESTS_AFTER: Duration = Duration::from_secs(5);
    let lab = Lab::new(kind);
    let a = lab.machine("a");
    let resting = |name: &str| {
        let spec = lab
            .spec(name)
            .arg("--rests-after")
            .arg(format!("{}s", RESTS_AFTER.as_secs()));
        let spec = spec.arg("--rest-pace").arg("1h");
        spec.arg("--log-level").arg("info,fuser=debug").start()
    };
    let (b, unused) = (resting("b"), resting("unused"));
    fs::create_dir(a.path("dir")).unwrap();
    catch_up(&a, &b, "sign");
    unused.until_content("sign", b"sign");
    assert!(names(&unused.path("dir")).is_empty());
    let segments = |machine: &Machine| machine.counter("/follow/segments");
    let dir = b.path("dir");
    let mut there = BTreeSet::new();
    for round in 0..2 {
        // From here on it lists, and does nothing else, for longer than it takes until a mount rests; and is heard of then.
        let (began, mut before) = (Instant::now(), asked(&b, "READDIR"));
        wait::until("the daemon hears of who lists", SOON, || {
            assert_eq!(names(&dir), there);
            let is_heard = asked(&b, "READDIR") > std::mem::replace(&mut before, asked(&b, "READDIR"));
            (is_heard && began.elapsed() > RESTS_AFTER + Duration::from_secs(1)).then_some(())
        });
        let rests = segments(&unused);
        there.insert(format!("file-{round}"));
        file(&a.path(format!("dir/file-{round}")), b"");
        a.flush();
        wait::until("who lists sees it", SOON, || (names(&dir) == there).then_some(()));
        assert_eq!(segments(&unused), rests, "a mount that nobody uses rests");
    }
    // And that one is in use again with the first look at what the kernel was told to drop.
    wait::until("the first who looks sees it soon", SOON, || {
        (names(&unused.path("dir")) == there).then_some(())
    });
}

/// Entries of a directory through one descriptor, some at a time.
struct Reader {
    dir: File,
    seen: Vec<String>,
}

impl Reader {
    fn open(dir: &Path) -> Self {
        Self {
            dir: File::open(dir).unwrap(),
            seen: Vec::new(),
        }
    }

    /// One getdents(2) of few bytes; false at the end.
    fn read_some(&mut self) -> bool {
        let mut buffer = Vec::with_capacity(512);
        let mut raw = RawDir::new(&self.dir, buffer.spare_capacity_mut());
        let before = self.seen.len();
        loop {
            let Some(entry) = raw.next() else {
                return self.seen.len() > before;
            };
            let entry = entry.unwrap();
            self.seen.push(entry.file_name().to_str().unwrap().to_owned());
            if raw.is_buffer_empty() {
                return true;
            }
        }
    }

    fn rest(mut self) -> Vec<String> {
        while self.read_some() {}
        self.seen
    }
}

fn a_reader_in_the_middle_of_a_listing_sees_every_name_that_stays_once(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    fs::create_dir(a.path("dir")).unwrap();
    let stay: Vec<String> = (0..2000).map(|n| format!("stay-{n:04}")).collect();
    for name in &stay {
        file(&a.path("dir").join(name), b"");
    }
    for n in 0..100 {
        file(&a.path(format!("dir/go-{n:04}")), b"");
    }
    catch_up(&a, &b, "sign");
    let dir = b.path("dir");
    // So that all are kept.
    assert_eq!(names(&dir).len(), 2100);
    let mut readers = Vec::new();
    for round in 0..4 {
        let mut reader = Reader::open(&dir);
        for _ in 0..=round * 7 {
            assert!(reader.read_some());
        }
        readers.push(reader);
        // What the kernel kept is dropped, and filled with other places by the next one.
        match round {
            0 => (0..50).for_each(|n| fs::remove_file(dir.join(format!("go-{n:04}"))).unwrap()),
            1 => {
                (50..100).for_each(|n| fs::remove_file(a.path(format!("dir/go-{n:04}"))).unwrap());
                (0..70).for_each(|n| drop(file(&a.path(format!("dir/come-{n:04}")), b"")));
                catch_up(&a, &b, "sign-2");
            }
            2 => (0..30).for_each(|n| drop(file(&dir.join(format!("a-first-{n}")), b""))),
            _ => {}
        }
        fs::write("/proc/sys/vm/drop_caches", if round == 3 { "1" } else { "2" }).unwrap();
        assert!(names(&dir).is_superset(&stay.iter().cloned().collect()));
    }
    for (number, reader) in readers.into_iter().enumerate() {
        let mut seen = reader.rest();
        seen.retain(|name| name.starts_with("stay-"));
        assert!(
            seen == stay,
            "reader {number} saw {} of {}",
            seen.len(),
            stay.len()
        );
    }
}

fn a_small_file_is_read_again_only_when_it_is_another(kind: StoreKind) {
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), telling(&lab, "b"));
    let long = vec![b'x'; 200_000];
    file(&a.path("small"), b"first");
    file(&a.path("long"), &long);
    catch_up(&a, &b, "sign-1");
    assert_eq!(content(&b.path("small")), b"first");
    let before = asked(&b, "READ fh");
    assert!(before > 0, "{}", b.log());
    for _ in 0..3 {
        assert_eq!(content(&b.path("small")), b"first");
    }
    assert_eq!(asked(&b, "READ fh"), before, "the kernel reads by itself");
    assert_eq!(content(&b.path("long")), long);
    // Replaced and changed, by the other machine and by this one.
    file(&a.path("next"), b"second!");
    fs::rename(a.path("next"), a.path("small")).unwrap();
    a.flush();
    b.until_content("small", b"second!");
    let open = File::open(b.path("small")).unwrap();
    fs::write(b.path("small"), b"3rd").unwrap();
    assert_eq!(content(&b.path("small")), b"3rd");
    b.flush();
    assert_eq!(content(&b.path("small")), b"3rd");
    assert_eq!(open.metadata().unwrap().len(), 3);
    drop(open);
    assert_eq!(content(&b.path("small")), b"3rd");
    a.until_content("small", b"3rd");
    fs::write(a.path("small"), b"fourth, and longer").unwrap();
    a.flush();
    b.until_content("small", b"fourth, and longer");
    assert_eq!(content(&b.path("long")), long);
}

fn a_small_file_whose_bytes_left_this_disk_is_fetched_again(kind: StoreKind) {
    let lab = Lab::new(kind);
    let a = lab.machine("a");
    let bytes = b"small enough that the kernel keeps it";
    file(&a.path("small"), bytes);
    a.flush();
    assert_eq!(content(&a.path("small")), bytes);
    let digest = Digest::of(bytes).to_string();
    let blob = a.spec.cache_dir.join("blobs").join(&digest[..2]).join(&digest);
    assert!(blob.exists());
    fs::remove_file(&blob).unwrap();
    // Not even a reader that asks the daemon gets zeros, or an error.
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    assert_eq!(content(&a.path("small")), bytes);
    wait::until("it is here again", SOON, || blob.exists().then_some(()));
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    assert_eq!(content(&a.path("small")), bytes);
    // One that is to be written needs all of them.
    fs::remove_file(&blob).unwrap();
    let mut more = bytes.to_vec();
    more.extend_from_slice(b", and more");
    std::io::Write::write_all(
        &mut File::options().append(true).open(a.path("small")).unwrap(),
        b", and more",
    )
    .unwrap();
    assert_eq!(content(&a.path("small")), more);
}
