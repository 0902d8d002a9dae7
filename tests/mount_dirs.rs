//! Directories of a mount: mkdir, rmdir, listing large ones and ones that change meanwhile.

mod support;

use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsString,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    },
    path::Path,
    time::Duration,
};

use rustix::fs::{AtFlags, Mode, OFlags};
use support::{
    place::Place,
    posix::{content, file},
};

fn names(dir: &Path) -> BTreeSet<OsString> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(names.insert(name.clone()), "listed twice: {}", name.display());
    }
    names
}

#[test]
fn directories_are_made_and_removed_as_posix_says() {
    let place = Place::new();
    let dir = place.path("dir");
    fs::create_dir(&dir).unwrap();
    let plain = file(&place.path("plain"), b"");
    assert_errno!(fs::create_dir(&dir), EEXIST);
    assert_errno!(fs::create_dir(&plain), EEXIST);
    assert_errno!(fs::create_dir(place.path("missing/dir")), ENOENT);
    assert_errno!(fs::create_dir(plain.join("dir")), ENOTDIR);
    assert_errno!(fs::create_dir(place.path("n".repeat(256))), ENAMETOOLONG);
    assert_errno!(fs::remove_dir(place.path("missing")), ENOENT);
    assert_errno!(fs::remove_dir(&plain), ENOTDIR);
    assert_errno!(fs::remove_dir(dir.join(".")), EINVAL);
    assert_errno!(fs::remove_dir(dir.join("..")), ENOTEMPTY);

    file(&dir.join("child"), b"");
    assert_errno!(fs::remove_dir(&dir), ENOTEMPTY | EEXIST);
    fs::remove_file(dir.join("child")).unwrap();
    fs::create_dir(dir.join("sub")).unwrap();
    assert_errno!(fs::remove_dir(&dir), ENOTEMPTY | EEXIST);
    fs::remove_dir(dir.join("sub")).unwrap();
    fs::remove_dir(&dir).unwrap();
    assert_errno!(fs::metadata(&dir), ENOENT);
    assert_errno!(fs::read_dir(&dir), ENOENT);
    assert_errno!(fs::read_dir(&plain), ENOTDIR);
}

#[test]
fn modes_of_directories_follow_umask_and_chmod() {
    let mut place = Place::new();
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let dir = place.path("dir");
    fs::DirBuilder::new().mode(0o777).create(&dir).unwrap();
    let mode = |dir: &Path| fs::metadata(dir).unwrap().mode() & 0o7777;
    assert_eq!(mode(&dir), 0o755);
    for wanted in [0o1777, 0o700, 0o2755] {
        fs::set_permissions(&dir, fs::Permissions::from_mode(wanted)).unwrap();
        assert_eq!(mode(&dir), wanted);
    }
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o750)).unwrap();
    place.remount();
    assert_eq!(mode(&dir), 0o750);
}

#[test]
fn a_large_directory_lists_each_name_once() {
    let mut place = Place::new();
    let dir = place.path("large");
    fs::create_dir(&dir).unwrap();
    let expected: BTreeSet<OsString> = (0..12_000)
        .map(|n| format!("entry-with-a-long-name-{n:06}").into())
        .collect();
    for name in &expected {
        File::create(dir.join(name)).unwrap();
    }
    assert!(names(&dir) == expected);
    assert!(names(&dir) == expected, "second listing");
    place.remount();
    assert!(names(&dir) == expected, "after a restart");
}

#[test]
fn listings_tell_types_and_inode_numbers() {
    let place = Place::new();
    file(&place.path("file"), b"x");
    fs::create_dir(place.path("dir")).unwrap();
    std::os::unix::fs::symlink("x", place.path("link")).unwrap();
    let mut kinds = HashMap::new();
    for entry in fs::read_dir(place.root()).unwrap() {
        let entry = entry.unwrap();
        let meta = fs::symlink_metadata(entry.path()).unwrap();
        assert_eq!(entry.file_type().unwrap(), meta.file_type());
        assert_eq!(
            std::os::unix::fs::DirEntryExt::ino(&entry),
            meta.ino(),
            "{entry:?}"
        );
        kinds.insert(entry.file_name(), meta.file_type());
    }
    assert!(kinds[&OsString::from("file")].is_file());
    assert!(kinds[&OsString::from("dir")].is_dir());
    assert!(kinds[&OsString::from("link")].is_symlink());
    assert_eq!(kinds.len(), 3);
}

#[test]
fn dot_and_dot_dot_are_listed() {
    let place = Place::new();
    fs::create_dir(place.path("dir")).unwrap();
    for dir in [place.root().to_owned(), place.path("dir")] {
        let opened = rustix::fs::open(&dir, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let listed: Vec<_> = rustix::fs::Dir::read_from(opened)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_bytes().to_vec())
            .collect();
        assert!(
            listed.contains(&b".".to_vec()) && listed.contains(&b"..".to_vec()),
            "{listed:?}"
        );
    }
    assert_eq!(
        fs::metadata(place.path("dir/..")).unwrap().ino(),
        fs::metadata(place.root()).unwrap().ino()
    );
}

#[test]
fn the_directory_above_is_listed_as_it_is_after_a_move() {
    let place = Place::new();
    fs::create_dir_all(place.path("a/moved")).unwrap();
    fs::create_dir(place.path("b")).unwrap();
    file(&place.path("a/moved/file"), b"");
    // As raw entries: the library leaves these two out.
    let above = |path: &str| {
        let dir = File::open(place.path(path)).unwrap();
        let entries = rustix::fs::Dir::read_from(&dir).unwrap();
        // To the end, so that the kernel keeps them.
        let entries: Vec<_> = entries.map(Result::unwrap).collect();
        let up = entries.iter().find(|entry| entry.file_name() == c"..").unwrap();
        up.ino()
    };
    let ino = |path: &str| fs::metadata(place.path(path)).unwrap().ino();
    for _ in 0..2 {
        assert_eq!(above("a/moved"), ino("a"));
    }
    fs::rename(place.path("a/moved"), place.path("b/moved")).unwrap();
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while above("b/moved") != ino("b") {
        assert!(
            std::time::Instant::now() < until,
            "it lists the directory where it was"
        );
    }
}

#[test]
fn rewinding_shows_what_changed() {
    let place = Place::new();
    file(&place.path("old"), b"");
    let opened = rustix::fs::open(place.root(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let mut dir = rustix::fs::Dir::read_from(opened).unwrap();
    let mut list = || -> BTreeSet<Vec<u8>> {
        dir.rewind();
        let mut names = BTreeSet::new();
        while let Some(entry) = dir.read() {
            names.insert(entry.unwrap().file_name().to_bytes().to_vec());
        }
        names
    };
    assert!(list().contains(b"old".as_slice()));
    file(&place.path("new"), b"");
    fs::remove_file(place.path("old")).unwrap();
    let second = list();
    assert!(
        second.contains(b"new".as_slice()) && !second.contains(b"old".as_slice()),
        "{second:?}"
    );
}

#[test]
fn removing_while_listing_leaves_nothing() {
    let place = Place::new();
    let dir = place.path("dir");
    fs::create_dir(&dir).unwrap();
    for n in 0..3_000 {
        File::create(dir.join(format!("f{n}"))).unwrap();
    }
    // As rm -r does it: unlink each name as it comes, until a listing is empty.
    for _ in 0..10 {
        let mut found = false;
        for entry in fs::read_dir(&dir).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
            found = true;
        }
        if !found {
            break;
        }
    }
    fs::remove_dir(&dir).unwrap();
}

#[test]
fn names_that_stay_are_listed_once_while_others_come_and_go() {
    let place = Place::new();
    let dir = place.path("dir");
    fs::create_dir(&dir).unwrap();
    for n in 0..800 {
        File::create(dir.join(format!("stays-{n}"))).unwrap();
    }
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 0_u64;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let path = dir.join(format!("comes-and-goes-{}", n % 64));
                File::create(&path).unwrap();
                fs::remove_file(&path).unwrap();
                n += 1;
            }
        });
        let lists = || {
            for _ in 0..40 {
                let stay = names(&dir)
                    .into_iter()
                    .filter(|name| name.as_bytes().starts_with(b"stays"))
                    .count();
                assert_eq!(stay, 800);
            }
        };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(lists));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn a_removed_directory_that_is_open_takes_no_files() {
    let place = Place::new();
    let dir = place.path("dir");
    fs::create_dir(&dir).unwrap();
    let opened = rustix::fs::open(&dir, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    fs::remove_dir(&dir).unwrap();
    let create = OFlags::CREATE | OFlags::WRONLY;
    assert_errno!(
        rustix::fs::openat(&opened, "new", create, Mode::from_raw_mode(0o600)),
        ENOENT
    );
    assert_errno!(
        rustix::fs::mkdirat(&opened, "new", Mode::from_raw_mode(0o700)),
        ENOENT
    );
    // The name is free at once.
    fs::create_dir(&dir).unwrap();
    assert_eq!(names(&dir).len(), 0);
}

#[test]
fn paths_are_relative_to_open_directories() {
    let place = Place::new();
    fs::create_dir(place.path("dir")).unwrap();
    let dir = rustix::fs::open(
        place.path("dir"),
        OFlags::RDONLY | OFlags::DIRECTORY,
        Mode::empty(),
    )
    .unwrap();
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
    rustix::fs::openat(&dir, "f", flags, Mode::from_raw_mode(0o600)).unwrap();
    fs::rename(place.path("dir"), place.path("moved")).unwrap();
    rustix::fs::openat(&dir, "g", flags, Mode::from_raw_mode(0o600)).unwrap();
    rustix::fs::unlinkat(&dir, "f", AtFlags::empty()).unwrap();
    assert_eq!(names(&place.path("moved")), BTreeSet::from(["g".into()]));
}

#[test]
fn deep_trees_are_made_walked_and_removed() {
    let mut place = Place::new();
    let mut deep = place.root().to_owned();
    for level in 0..100 {
        deep.push(format!("level-{level}"));
    }
    fs::create_dir_all(&deep).unwrap();
    file(&deep.join("leaf"), b"deep");
    place.remount();
    assert_eq!(content(&deep.join("leaf")), b"deep");
    fs::remove_dir_all(place.path("level-0")).unwrap();
    assert_eq!(names(place.root()).len(), 0);
    place.remount();
    assert_eq!(names(place.root()).len(), 0);
}

#[test]
fn a_name_can_be_file_and_directory_in_turn() {
    let place = Place::new();
    let path = place.path("name");
    for round in 0..3 {
        file(&path, b"file");
        place.seal();
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        file(&path.join(format!("child{round}")), b"c");
        fs::remove_dir_all(&path).unwrap();
    }
    assert_eq!(names(place.root()).len(), 0);
}

#[test]
fn syncing_a_directory_succeeds() {
    let place = Place::new();
    fs::create_dir(place.path("dir")).unwrap();
    file(&place.path("dir/f"), b"x");
    let dir = File::open(place.path("dir")).unwrap();
    dir.sync_all().unwrap();
    dir.sync_data().unwrap();
}
