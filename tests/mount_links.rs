//! Symbolic and hard links of a mount.

mod support;

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    },
};

use support::{
    place::Place,
    posix::{content, file, rw},
};

#[test]
fn symlinks_keep_any_target() {
    let mut place = Place::new();
    let long = [b'x'; 4095];
    let targets: [&[u8]; 5] = [
        b"plain",
        b"/absolute/../odd//path",
        b"\xff not utf-8 \x01",
        &long,
        b".",
    ];
    for (n, target) in targets.iter().enumerate() {
        symlink(OsStr::from_bytes(target), place.path(format!("l{n}"))).unwrap();
    }
    for _ in 0..2 {
        for (n, target) in targets.iter().enumerate() {
            let path = place.path(format!("l{n}"));
            assert_eq!(fs::read_link(&path).unwrap().as_os_str().as_bytes(), *target);
            let meta = fs::symlink_metadata(&path).unwrap();
            assert!(meta.is_symlink());
            assert_eq!(meta.len(), target.len() as u64);
        }
        place.remount();
    }
}

#[test]
fn symlinks_fail_as_posix_says() {
    let place = Place::new();
    file(&place.path("file"), b"x");
    symlink("file", place.path("link")).unwrap();
    assert_errno!(symlink("other", place.path("link")), EEXIST);
    assert_errno!(symlink("other", place.path("file")), EEXIST);
    assert_errno!(symlink("", place.path("empty")), ENOENT);
    assert_errno!(symlink("x", place.path("missing/link")), ENOENT);
    assert_errno!(
        symlink(OsStr::from_bytes(&[b'x'; 4096]), place.path("long")),
        ENAMETOOLONG
    );
    assert_errno!(fs::read_link(place.path("file")), EINVAL);
    symlink("b", place.path("a")).unwrap();
    symlink("a", place.path("b")).unwrap();
    assert_errno!(File::open(place.path("a")), ELOOP);
    assert_eq!(fs::read_link(place.path("link")).unwrap().as_os_str(), "file");
}

#[test]
fn symlinks_are_followed_and_removed_by_themselves() {
    let place = Place::new();
    fs::create_dir(place.path("dir")).unwrap();
    file(&place.path("dir/file"), b"through");
    symlink("dir", place.path("link")).unwrap();
    assert_eq!(content(&place.path("link/file")), b"through");
    symlink("dir/new", place.path("made")).unwrap();
    file(&place.path("made"), b"created through a dangling link");
    assert_eq!(
        content(&place.path("dir/new")),
        b"created through a dangling link"
    );
    fs::remove_file(place.path("link")).unwrap();
    assert_eq!(content(&place.path("dir/file")), b"through");
}

#[test]
fn a_symlink_serves_as_a_lock() {
    // As ccache does it: whoever makes the link holds the lock.
    let place = Place::new();
    let lock = place.path("x.lock");
    let holders: usize = std::thread::scope(|scope| {
        let tries: Vec<_> = (0..8)
            .map(|n| {
                let lock = &lock;
                scope.spawn(move || usize::from(symlink(format!("holder-{n}"), lock).is_ok()))
            })
            .collect();
        tries.into_iter().map(|one| one.join().unwrap()).sum()
    });
    assert_eq!(holders, 1);
    fs::remove_file(&lock).unwrap();
    symlink("next", &lock).unwrap();
}

#[test]
fn hard_links_are_one_file() {
    let mut place = Place::new();
    let (a, b) = (place.path("a"), place.path("b"));
    file(&a, b"content");
    fs::hard_link(&a, &b).unwrap();
    let same = |place: &Place, links: u64| {
        let (a, b) = (
            fs::metadata(place.path("a")).unwrap(),
            fs::metadata(place.path("b")).unwrap(),
        );
        assert_eq!(a.ino(), b.ino());
        assert_eq!((a.nlink(), b.nlink()), (links, links));
    };
    same(&place, 2);
    place.seal();
    same(&place, 2);
    rw(&b).write_all_at(b"CON", 0).unwrap();
    assert_eq!(content(&a), b"CONtent");
    fs::set_permissions(&a, fs::Permissions::from_mode(0o640)).unwrap();
    assert_eq!(fs::metadata(&b).unwrap().mode() & 0o7777, 0o640);
    place.seal();
    assert_eq!(content(&a), b"CONtent");
    place.remount();
    same(&place, 2);
    rw(&a).write_all_at(b"xyz", 0).unwrap();
    assert_eq!(content(&b), b"xyztent");

    fs::remove_file(&a).unwrap();
    assert_eq!(fs::metadata(&b).unwrap().nlink(), 1);
    assert_eq!(content(&b), b"xyztent");
    place.remount();
    assert_eq!(content(&b), b"xyztent");
}

#[test]
fn hard_links_fail_as_posix_says() {
    let place = Place::new();
    let plain = file(&place.path("file"), b"x");
    fs::create_dir(place.path("dir")).unwrap();
    assert_errno!(fs::hard_link(place.path("dir"), place.path("link")), EPERM);
    assert_errno!(fs::hard_link(place.path("missing"), place.path("link")), ENOENT);
    assert_errno!(fs::hard_link(&plain, place.path("dir")), EEXIST);
    assert_errno!(fs::hard_link(&plain, &plain), EEXIST);
    assert_errno!(fs::hard_link(&plain, place.path("missing/link")), ENOENT);
    assert_errno!(fs::hard_link(&plain, "/sys/link"), EXDEV);
    assert_eq!(fs::metadata(&plain).unwrap().nlink(), 1);
}

#[test]
fn renaming_a_hard_link_over_itself_changes_nothing() {
    let place = Place::new();
    let (a, b) = (place.path("a"), place.path("b"));
    file(&a, b"x");
    fs::hard_link(&a, &b).unwrap();
    fs::rename(&a, &b).unwrap();
    assert_eq!(fs::metadata(&a).unwrap().nlink(), 2);
    assert_eq!(content(&a), b"x");
}

#[test]
fn replacing_one_link_leaves_the_other() {
    let mut place = Place::new();
    let (a, b) = (place.path("a"), place.path("b"));
    file(&a, b"linked");
    fs::hard_link(&a, &b).unwrap();
    fs::rename(file(&place.path("new"), b"replaced"), &a).unwrap();
    for _ in 0..2 {
        assert_eq!(
            (content(&a), content(&b)),
            (b"replaced".to_vec(), b"linked".to_vec())
        );
        assert_eq!(fs::metadata(&b).unwrap().nlink(), 1);
        place.remount();
    }
}

#[test]
fn links_survive_a_rename_of_their_directory() {
    let mut place = Place::new();
    fs::create_dir_all(place.path("one/two")).unwrap();
    file(&place.path("one/two/a"), b"x");
    fs::hard_link(place.path("one/two/a"), place.path("one/b")).unwrap();
    fs::rename(place.path("one"), place.path("moved")).unwrap();
    place.remount();
    let (a, b) = (
        fs::metadata(place.path("moved/two/a")).unwrap(),
        fs::metadata(place.path("moved/b")).unwrap(),
    );
    assert_eq!((a.ino(), a.nlink()), (b.ino(), 2));
}
