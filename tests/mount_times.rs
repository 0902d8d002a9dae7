//! Times of files of a mount: what sets them, and that they stay.

mod support;

use std::{
    fs::{self, FileTimes},
    io::{Read, Write},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, utimensat};
use support::{
    place::Place,
    posix::{file, ro, rw},
    wait,
};

fn times(path: &Path) -> [(i64, i64); 3] {
    let meta = fs::symlink_metadata(path).unwrap();
    [
        (meta.atime(), meta.atime_nsec()),
        (meta.mtime(), meta.mtime_nsec()),
        (meta.ctime(), meta.ctime_nsec()),
    ]
}

fn set(path: &Path, atime: (i64, i64), mtime: (i64, i64)) -> rustix::io::Result<()> {
    let spec = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec };
    let times = Timestamps {
        last_access: spec(atime),
        last_modification: spec(mtime),
    };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
}

/// Waits until the clock of file systems, which ticks slower than that of programs, has moved.
fn tick(place: &Place) {
    let probe = place.path("tick");
    file(&probe, b"");
    let start = times(&probe)[1];
    wait::until(
        "the clock of the file system moves",
        Duration::from_secs(5),
        || {
            file(&probe, b"");
            rw(&probe)
                .set_times(FileTimes::new().set_modified(SystemTime::now()))
                .unwrap();
            (times(&probe)[1] > start).then_some(())
        },
    );
    fs::remove_file(&probe).unwrap();
    std::thread::yield_now();
}

#[test]
fn times_are_kept_to_the_nanosecond() {
    let mut place = Place::new();
    let path = file(&place.path("f"), b"x");
    fs::create_dir(place.path("d")).unwrap();
    symlink("x", place.path("l")).unwrap();
    file(&place.path("before"), b"x");
    let wanted = [
        ("f", 1_234_567_890),
        ("d", 86_400),
        ("l", 4_000_000_000),
        ("before", -14_182_940),
    ];
    for (name, secs) in wanted {
        set(&place.path(name), (secs + 1, 987_654_321), (secs, 123_456_789)).unwrap();
    }
    for round in 0..3 {
        for (name, secs) in wanted {
            let [_, mtime, _] = times(&place.path(name));
            assert_eq!(mtime, (secs, 123_456_789), "{name}, round {round}");
        }
        if round == 0 {
            assert_eq!(times(&path)[0], (1_234_567_891, 987_654_321));
            place.seal();
        } else {
            place.remount();
        }
    }
}

#[test]
fn now_and_omit_are_understood() {
    let place = Place::new();
    let path = file(&place.path("f"), b"x");
    set(&path, (100, 1), (200, 2)).unwrap();
    set(&path, (0, UTIME_OMIT), (300, 3)).unwrap();
    assert_eq!(times(&path)[..2], [(100, 1), (300, 3)]);
    set(&path, (400, 4), (0, UTIME_OMIT)).unwrap();
    assert_eq!(times(&path)[..2], [(400, 4), (300, 3)]);
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64 - 1;
    set(&path, (0, UTIME_NOW), (0, UTIME_NOW)).unwrap();
    let [atime, mtime, _] = times(&path);
    assert!(atime.0 >= before && mtime.0 >= before, "{atime:?} {mtime:?}");
    assert_errno!(
        set(&place.path("missing"), (0, UTIME_NOW), (0, UTIME_NOW)),
        ENOENT
    );
}

#[test]
fn a_time_set_through_a_descriptor_outlives_its_close() {
    // As tar and cp -p do it: write, set the time, close.
    let mut place = Place::new();
    let path = place.path("f");
    let mut writer = fs::File::create(&path).unwrap();
    writer.write_all(b"content").unwrap();
    let wanted = UNIX_EPOCH + Duration::new(1_000_000_000, 42);
    writer.set_times(FileTimes::new().set_modified(wanted)).unwrap();
    drop(writer);
    let [_, mtime, _] = times(&path);
    assert_eq!(mtime, (1_000_000_000, 42));
    place.seal();
    assert_eq!(times(&path)[1], (1_000_000_000, 42));
    place.remount();
    assert_eq!(times(&path)[1], (1_000_000_000, 42));
}

#[test]
fn writing_changes_the_time_and_reading_does_not() {
    let place = Place::new();
    let path = file(&place.path("f"), b"content");
    for sealed in [false, true] {
        set(&path, (1000, 0), (1000, 0)).unwrap();
        let mut all = Vec::new();
        ro(&path).read_to_end(&mut all).unwrap();
        assert_eq!(times(&path)[1], (1000, 0), "read, sealed: {sealed}");
        drop(rw(&path));
        assert_eq!(times(&path)[1], (1000, 0), "opened for writing, sealed: {sealed}");
        rw(&path).write_all_at(b"C", 0).unwrap();
        assert!(times(&path)[1].0 > 1000, "written, sealed: {sealed}");
        set(&path, (1000, 0), (1000, 0)).unwrap();
        rw(&path).set_len(3).unwrap();
        assert!(times(&path)[1].0 > 1000, "truncated, sealed: {sealed}");
        file(&path, b"content");
        place.seal();
    }
}

#[test]
fn sealing_changes_no_time() {
    let mut place = Place::new();
    let path = file(&place.path("f"), b"content");
    let before = times(&path);
    place.seal();
    assert_eq!(times(&path)[1..], before[1..]);
    place.remount();
    assert_eq!(times(&path)[1..], before[1..]);
}

/// The daemon hears of the last close after `close(2)` has returned.
#[test]
fn a_file_looks_the_same_right_after_its_close_and_later() {
    let place = Place::new();
    for round in 0..50 {
        let path = file(&place.path(format!("f{round}")), b"written");
        let (first, size) = (times(&path), fs::metadata(&path).unwrap().len());
        assert_eq!(size, 7);
        if round % 10 == 0 {
            // The daemon has heard of it by now.
            place.seal();
        }
        assert_eq!(times(&path), first, "round {round}");
    }
}

#[test]
fn changes_of_metadata_move_the_change_time_only() {
    let place = Place::new();
    let path = file(&place.path("f"), b"x");
    let [_, mtime, ctime] = times(&path);
    tick(&place);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let [_, after, changed] = times(&path);
    assert_eq!(after, mtime);
    assert!(changed > ctime);
    tick(&place);
    fs::hard_link(&path, place.path("g")).unwrap();
    assert!(times(&path)[2] > changed, "link");
    assert_eq!(times(&path)[1], mtime);
}

#[test]
fn changing_names_moves_the_time_of_the_directory() {
    let place = Place::new();
    let (dir, other) = (place.path("dir"), place.path("other"));
    fs::create_dir(&dir).unwrap();
    fs::create_dir(&other).unwrap();
    let moved = |what: &str, act: &dyn Fn()| {
        set(&dir, (1000, 0), (1000, 0)).unwrap();
        act();
        assert!(times(&dir)[1].0 > 1000, "{what}");
    };
    moved("create", &|| drop(file(&dir.join("f"), b"")));
    moved("mkdir", &|| fs::create_dir(dir.join("d")).unwrap());
    moved("symlink", &|| symlink("x", dir.join("l")).unwrap());
    moved("link", &|| fs::hard_link(dir.join("f"), dir.join("h")).unwrap());
    moved("rename within", &|| {
        fs::rename(dir.join("h"), dir.join("i")).unwrap();
    });
    moved("rename away", &|| {
        fs::rename(dir.join("i"), other.join("i")).unwrap();
    });
    moved("rename here", &|| {
        fs::rename(other.join("i"), dir.join("i")).unwrap();
    });
    moved("unlink", &|| fs::remove_file(dir.join("i")).unwrap());
    moved("rmdir", &|| fs::remove_dir(dir.join("d")).unwrap());
    set(&dir, (1000, 0), (1000, 0)).unwrap();
    file(&dir.join("f"), b"written, not renamed");
    assert_eq!(
        times(&dir)[1],
        (1000, 0),
        "writing a file is no change of its directory"
    );
}

#[test]
fn renaming_keeps_the_time_of_the_file() {
    let mut place = Place::new();
    let path = file(&place.path("f"), b"x");
    set(&path, (1, 1), (2, 2)).unwrap();
    fs::rename(&path, place.path("g")).unwrap();
    assert_eq!(times(&place.path("g"))[1], (2, 2));
    place.remount();
    assert_eq!(times(&place.path("g"))[1], (2, 2));
}

#[test]
fn touching_does_not_change_content_or_inode() {
    let mut place = Place::new();
    let path = file(&place.path("f"), b"content");
    place.seal();
    let ino = fs::metadata(&path).unwrap().ino();
    set(&path, (0, UTIME_NOW), (5000, 5)).unwrap();
    place.remount();
    assert_eq!(times(&path)[1], (5000, 5));
    assert_eq!(fs::metadata(&path).unwrap().ino(), ino);
    assert_eq!(fs::read(&path).unwrap(), b"content");
}

/// Waits so long that a time from before is told from one of now.
fn a_moment_later() -> SystemTime {
    let start = SystemTime::now();
    wait::until("the clock moves", Duration::from_secs(5), || {
        (start.elapsed().ok()? > Duration::from_millis(300)).then_some(())
    });
    SystemTime::now()
}

#[test]
fn an_empty_file_that_is_opened_for_writing_and_not_written_keeps_its_time() {
    let mut place = Place::new();
    let path = file(&place.path("f"), b"");
    for sealed in [false, true] {
        set(&path, (1000, 1), (1000, 1)).unwrap();
        if sealed {
            place.seal();
        }
        let open = rw(&path);
        assert_eq!(times(&path)[1], (1000, 1), "open, sealed: {sealed}");
        drop(open);
        assert_eq!(times(&path)[1], (1000, 1), "closed, sealed: {sealed}");
    }
    place.remount();
    assert_eq!(times(&path)[1], (1000, 1));
}

/// Files to write to are kept ready; their times are no file's.
#[test]
fn an_empty_file_has_the_time_at_which_it_was_made_or_emptied() {
    let mut place = Place::new();
    let is_new = |path: &Path, since: SystemTime| {
        let modified = fs::metadata(path).unwrap().modified().unwrap();
        // The clock of file systems goes in steps.
        modified >= since - Duration::from_millis(50)
    };
    let (made, full) = (place.path("made"), file(&place.path("full"), b"full"));
    let since = a_moment_later();
    let open = fs::File::create(&made).unwrap();
    assert!(is_new(&made, since), "made and open");
    drop(open);
    assert!(is_new(&made, since), "made");

    let since = a_moment_later();
    let open = fs::File::create(&full).unwrap();
    assert!(is_new(&full, since), "emptied and open");
    drop(open);
    assert!(is_new(&full, since), "emptied");

    let before = times(&made);
    let since = a_moment_later();
    let killed = fs::File::create(place.path("killed")).unwrap();
    if let Some(machine) = place.machine() {
        machine.kill9();
        machine.restart();
    }
    drop(killed);
    assert!(is_new(&place.path("killed"), since), "made before a kill");
    place.remount();
    assert!(is_new(&place.path("killed"), since), "and a stop");
    assert_eq!(times(&made)[1], before[1]);
}
