//! Renames of a mount: replace, never replace, exchange, across directories, of whole trees.

mod support;

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt, symlink},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use support::{
    place::Place,
    posix::{content, file, ro},
    tree,
};

fn rename_with(from: &Path, to: &Path, flags: RenameFlags) -> rustix::io::Result<()> {
    renameat_with(CWD, from, CWD, to, flags)
}

#[test]
fn a_rename_replaces_and_keeps_the_inode() {
    let mut place = Place::new();
    let (from, to) = (place.path("from"), place.path("to"));
    for sealed in [false, true] {
        file(&from, b"new");
        file(&to, b"old");
        if sealed {
            place.seal();
        }
        let ino = fs::metadata(&from).unwrap().ino();
        let reader = ro(&to);
        fs::rename(&from, &to).unwrap();
        assert_errno!(fs::metadata(&from), ENOENT);
        assert_eq!(content(&to), b"new");
        assert_eq!(fs::metadata(&to).unwrap().ino(), ino);
        // Whoever had the old file open goes on reading it.
        let mut seen = [0; 3];
        reader.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(&seen, b"old");
        assert_eq!(reader.metadata().unwrap().nlink(), 0);
        drop(reader);
        place.remount();
        assert_eq!(content(&to), b"new");
        assert_eq!(fs::metadata(&to).unwrap().ino(), ino);
        assert_errno!(fs::metadata(&from), ENOENT);
    }
}

#[test]
fn renames_that_cannot_be_fail_as_posix_says() {
    let place = Place::new();
    let plain = file(&place.path("file"), b"x");
    let (dir, full) = (place.path("dir"), place.path("full"));
    fs::create_dir(&dir).unwrap();
    fs::create_dir(&full).unwrap();
    file(&full.join("child"), b"c");
    assert_errno!(fs::rename(place.path("missing"), place.path("x")), ENOENT);
    assert_errno!(fs::rename(&plain, place.path("missing/x")), ENOENT);
    assert_errno!(fs::rename(&plain, place.path("file/x")), ENOTDIR);
    assert_errno!(fs::rename(&plain, &dir), EISDIR);
    assert_errno!(fs::rename(&dir, &plain), ENOTDIR);
    assert_errno!(fs::rename(&dir, &full), ENOTEMPTY | EEXIST);
    assert_errno!(fs::rename(&full, full.join("below")), EINVAL);
    assert_errno!(fs::rename(&full, &plain), ENOTDIR);
    assert_errno!(fs::rename(full.join("child"), &full), ENOTEMPTY | EISDIR | EEXIST);
    assert_errno!(fs::rename(dir.join("."), place.path("x")), EBUSY | EINVAL);
    assert_errno!(fs::rename(&plain, place.path("n".repeat(256))), ENAMETOOLONG);
    assert_eq!(content(&plain), b"x");
    assert_eq!(content(&full.join("child")), b"c");
    // Onto itself: nothing happens.
    fs::rename(&plain, &plain).unwrap();
    fs::rename(&full, &full).unwrap();
    assert_eq!(content(&full.join("child")), b"c");
}

#[test]
fn noreplace_never_replaces() {
    let place = Place::new();
    let (from, to) = (file(&place.path("from"), b"from"), file(&place.path("to"), b"to"));
    assert_errno!(rename_with(&from, &to, RenameFlags::NOREPLACE), EEXIST);
    assert_eq!((content(&from), content(&to)), (b"from".to_vec(), b"to".to_vec()));
    fs::create_dir(place.path("dir")).unwrap();
    assert_errno!(
        rename_with(&from, &place.path("dir"), RenameFlags::NOREPLACE),
        EEXIST
    );
    fs::remove_file(&to).unwrap();
    rename_with(&from, &to, RenameFlags::NOREPLACE).unwrap();
    assert_eq!(content(&to), b"from");
}

#[test]
fn exchange_swaps_names_of_any_kind() {
    let mut place = Place::new();
    let (a, b) = (file(&place.path("a"), b"A"), file(&place.path("b"), b"B"));
    let dir = place.path("dir");
    fs::create_dir(&dir).unwrap();
    file(&dir.join("child"), b"c");
    symlink("target", place.path("link")).unwrap();
    let inos = (fs::metadata(&a).unwrap().ino(), fs::metadata(&b).unwrap().ino());
    rename_with(&a, &b, RenameFlags::EXCHANGE).unwrap();
    assert_eq!((content(&a), content(&b)), (b"B".to_vec(), b"A".to_vec()));
    assert_eq!(
        (fs::metadata(&b).unwrap().ino(), fs::metadata(&a).unwrap().ino()),
        inos
    );
    rename_with(&a, &dir, RenameFlags::EXCHANGE).unwrap();
    assert_eq!(
        (content(&a.join("child")), content(&dir)),
        (b"c".to_vec(), b"B".to_vec())
    );
    rename_with(&a, &place.path("link"), RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read_link(&a).unwrap().as_os_str(), "target");
    assert_eq!(content(&place.path("link/child")), b"c");
    assert_errno!(
        rename_with(&b, &place.path("missing"), RenameFlags::EXCHANGE),
        ENOENT
    );
    let inside = place.path("link/child");
    assert_errno!(
        rename_with(&place.path("link"), &inside, RenameFlags::EXCHANGE),
        EINVAL
    );
    place.remount();
    assert_eq!(content(&b), b"A");
    assert_eq!(content(&place.path("link/child")), b"c");
    assert_eq!(content(&dir), b"B");
}

#[test]
fn files_move_across_directories() {
    let mut place = Place::new();
    fs::create_dir_all(place.path("one/tmp")).unwrap();
    fs::create_dir_all(place.path("two/cas/ab")).unwrap();
    // As Bazel stores: write a temporary file, rename it into place.
    for n in 0..50 {
        let from = file(
            &place.path(format!("one/tmp/{n}")),
            format!("content {n}").as_bytes(),
        );
        fs::rename(&from, place.path(format!("two/cas/ab/{n}"))).unwrap();
    }
    place.remount();
    assert_eq!(fs::read_dir(place.path("one/tmp")).unwrap().count(), 0);
    for n in 0..50 {
        assert_eq!(
            content(&place.path(format!("two/cas/ab/{n}"))),
            format!("content {n}").as_bytes()
        );
    }
}

#[test]
fn a_directory_replaces_an_empty_one() {
    let mut place = Place::new();
    let (from, to) = (place.path("from"), place.path("to"));
    fs::create_dir(&from).unwrap();
    file(&from.join("child"), b"c");
    fs::create_dir(&to).unwrap();
    let ino = fs::metadata(&from).unwrap().ino();
    fs::rename(&from, &to).unwrap();
    place.remount();
    assert_eq!(fs::metadata(&to).unwrap().ino(), ino);
    assert_eq!(content(&to.join("child")), b"c");
    assert_errno!(fs::metadata(&from), ENOENT);
}

#[test]
fn whole_trees_move_with_everything_in_them() {
    let mut place = Place::new();
    let top = place.path("top");
    for dir in 0..10 {
        fs::create_dir_all(top.join(format!("d{dir}/deeper"))).unwrap();
        for n in 0..20 {
            file(&top.join(format!("d{dir}/f{n}")), format!("{dir}/{n}").as_bytes());
        }
        symlink("../f1", top.join(format!("d{dir}/deeper/link"))).unwrap();
    }
    let before = tree::read(&top);
    fs::create_dir(place.path("other")).unwrap();
    let open = ro(&top.join("d3/f3"));
    fs::rename(&top, place.path("other/moved")).unwrap();
    let mut seen = [0; 3];
    open.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"3/3");
    drop(open);
    assert_errno!(fs::metadata(&top), ENOENT);
    tree::assert_same(&before, &tree::read(&place.path("other/moved")));
    // Moved on before and after anything was sealed, and back to its old name.
    place.seal();
    fs::rename(place.path("other/moved"), &top).unwrap();
    tree::assert_same(&before, &tree::read(&top));
    place.remount();
    tree::assert_same(&before, &tree::read(&top));
    assert_eq!(fs::read_dir(place.path("other")).unwrap().count(), 0);
}

#[test]
fn a_file_is_renamed_while_it_is_written() {
    let mut place = Place::new();
    let writer = File::create(place.path("a")).unwrap();
    writer.write_all_at(b"before ", 0).unwrap();
    fs::rename(place.path("a"), place.path("b")).unwrap();
    writer.write_all_at(b"after", 7).unwrap();
    drop(writer);
    assert_eq!(content(&place.path("b")), b"before after");
    place.seal();
    place.remount();
    assert_eq!(content(&place.path("b")), b"before after");
    assert_errno!(fs::metadata(place.path("a")), ENOENT);
}

#[test]
fn readers_never_miss_a_name_that_is_replaced() {
    let place = Place::new();
    let path = file(&place.path("f"), &[0; 5000]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut reads = 0_u32;
            while !done.load(Ordering::Relaxed) || reads == 0 {
                let bytes = content(&path);
                assert_eq!(bytes.len(), 5000);
                assert!(bytes.iter().all(|byte| *byte == bytes[0]), "torn");
                reads += 1;
            }
        });
        for n in 0..1500_u32 {
            let new = file(&place.path("new"), &[(n % 250) as u8; 5000]);
            fs::rename(&new, &path).unwrap();
            if reader.is_finished() {
                break;
            }
        }
        done.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
}

#[test]
fn renames_of_many_threads_lose_nothing() {
    let mut place = Place::new();
    let dirs: Vec<_> = (0..4).map(|n| place.path(format!("d{n}"))).collect();
    for dir in &dirs {
        fs::create_dir(dir).unwrap();
    }
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let dirs = &dirs;
            scope.spawn(move || {
                for n in 0..60_usize {
                    let name = format!("{thread}-{n}");
                    let mut at = file(&dirs[thread].join(&name), name.as_bytes());
                    for step in 1..5 {
                        let to = dirs[(thread + step) % 4].join(&name);
                        fs::rename(&at, &to).unwrap();
                        at = to;
                    }
                }
            });
        }
    });
    for _ in 0..2 {
        for (thread, dir) in dirs.iter().enumerate() {
            for n in 0..60 {
                let name = format!("{thread}-{n}");
                assert_eq!(content(&dir.join(&name)), name.as_bytes());
            }
        }
        place.remount();
    }
}
