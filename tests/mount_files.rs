//! Regular files of a mount: create, open with every flag, read, write, append, truncate, unlink.

mod support;

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
        process::CommandExt,
    },
    process::Command,
    time::Duration,
};

use rustix::fs::{FallocateFlags, Mode, OFlags};
use support::{
    place::Place,
    posix::{content, file, ro, rw},
    rng::Rng,
    wait,
};

#[test]
fn what_was_written_reads_back_at_once_and_after_sealing() {
    let place = Place::new();
    let mut rng = Rng::from_environment();
    let sizes = [0, 1, 4095, 4096, 4097, 131_072, 2_097_152, 2_097_153, 9_000_000];
    let files: Vec<_> = sizes
        .map(|size| (place.path(format!("f{size}")), rng.bytes(size)))
        .into();
    for (path, bytes) in &files {
        file(path, bytes);
        assert!(content(path) == *bytes, "{}", path.display());
    }
    place.seal();
    for (path, bytes) in &files {
        assert!(content(path) == *bytes, "sealed: {}", path.display());
        assert_eq!(fs::metadata(path).unwrap().len(), bytes.len() as u64);
    }
}

#[test]
fn opens_that_cannot_be_fail_as_posix_says() {
    let place = Place::new();
    let plain = file(&place.path("plain"), b"x");
    let dir = place.path("dir");
    fs::create_dir(&dir).unwrap();
    std::os::unix::fs::symlink("nowhere", place.path("dangling")).unwrap();
    std::os::unix::fs::symlink("plain", place.path("link")).unwrap();

    assert_errno!(File::open(place.path("missing")), ENOENT);
    assert_errno!(File::create(place.path("missing/file")), ENOENT);
    assert_errno!(File::open(place.path("plain/below")), ENOTDIR);
    assert_errno!(File::create(place.path("plain/below")), ENOTDIR);
    assert_errno!(File::create(&dir), EISDIR);
    assert_errno!(File::options().write(true).open(&dir), EISDIR);
    assert_errno!(File::create_new(&plain), EEXIST);
    assert_errno!(File::create_new(&dir), EEXIST);
    assert_errno!(File::create_new(place.path("dangling")), EEXIST);
    assert_errno!(File::open(place.path("dangling")), ENOENT);
    let nofollow = |path| {
        File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
    };
    assert_errno!(nofollow(place.path("link")), ELOOP);
    let directory = |path| {
        File::options()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(path)
    };
    assert_errno!(directory(&plain), ENOTDIR);
    assert_errno!(File::create(place.path("")), EISDIR);
    assert_errno!(File::create(place.path("plain/")), ENOTDIR | EISDIR);
    assert_eq!(content(&plain), b"x");
}

#[test]
fn names_are_any_bytes_up_to_255() {
    let place = Place::new();
    let names: [&[u8]; 7] = [
        &[b'n'; 255],
        b"\xff\xfe not utf-8 \x80",
        b"new\nline",
        b" blank ",
        b"..hidden",
        "\u{fc}ml\u{e4}ut".as_bytes(),
        b"back\\slash\x01",
    ];
    for name in names {
        let path = place.path(OsStr::from_bytes(name));
        file(&path, name);
        assert_eq!(content(&path), name);
    }
    let long = [b'n'; 256];
    assert_errno!(File::create(place.path(OsStr::from_bytes(&long))), ENAMETOOLONG);
    assert_errno!(fs::metadata(place.path(OsStr::from_bytes(&long))), ENAMETOOLONG);
    let mut listed: Vec<_> = fs::read_dir(place.root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().as_bytes().to_vec())
        .collect();
    let mut expected = names.map(<[u8]>::to_vec);
    listed.sort();
    expected.sort();
    assert_eq!(listed, expected);
    place.seal();
    for name in names {
        assert_eq!(content(&place.path(OsStr::from_bytes(name))), name);
    }
}

#[test]
fn descriptors_do_only_what_they_were_opened_for() {
    let place = Place::new();
    let path = file(&place.path("f"), b"abc");
    for sealed in [false, true] {
        let reader = ro(&path);
        assert_errno!((&reader).write(b"x"), EBADF);
        assert_errno!(reader.set_len(0), EINVAL | EBADF);
        let writer = File::options().write(true).open(&path).unwrap();
        assert_errno!((&writer).read(&mut [0; 4]), EBADF);
        drop((reader, writer));
        assert_eq!(content(&path), b"abc", "sealed: {sealed}");
        place.seal();
    }
}

#[test]
fn truncating_open_empties_the_file() {
    let place = Place::new();
    let path = file(&place.path("f"), b"long content");
    for _ in 0..2 {
        let mut writer = File::options().write(true).truncate(true).open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
        writer.write_all(b"new").unwrap();
        drop(writer);
        assert_eq!(content(&path), b"new");
        place.seal();
        assert_eq!(content(&path), b"new");
    }
}

#[test]
fn appends_go_to_the_end_whoever_wrote_last() {
    let place = Place::new();
    let path = place.path("log");
    let open = || File::options().append(true).create(true).open(&path).unwrap();
    let (mut a, mut b) = (open(), open());
    a.write_all(b"1").unwrap();
    b.write_all(b"2").unwrap();
    a.seek(SeekFrom::Start(0)).unwrap();
    a.write_all(b"3").unwrap();
    drop((a, b));
    place.seal();
    open().write_all(b"4").unwrap();
    assert_eq!(content(&path), b"1234");
    place.seal();
    assert_eq!(content(&path), b"1234");
}

#[test]
fn appends_of_many_threads_are_all_there() {
    let place = Place::new();
    let path = file(&place.path("log"), b"");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let path = &path;
            scope.spawn(move || {
                let mut log = File::options().append(true).open(path).unwrap();
                for line in 0..200 {
                    log.write_all(format!("{thread}:{line:04}\n").as_bytes()).unwrap();
                }
            });
        }
    });
    let text = String::from_utf8(content(&path)).unwrap();
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.sort();
    let expected: Vec<_> = (0..4)
        .flat_map(|t| (0..200).map(move |n| format!("{t}:{n:04}")))
        .collect();
    assert_eq!(lines, expected);
}

#[test]
fn holes_read_as_zeros() {
    let place = Place::new();
    let path = place.path("sparse");
    let sparse = File::create(&path).unwrap();
    sparse.write_all_at(b"end", 10 << 20).unwrap();
    drop(sparse);
    for _ in 0..2 {
        let bytes = content(&path);
        assert_eq!(bytes.len(), (10 << 20) + 3);
        assert!(bytes[..10 << 20].iter().all(|byte| *byte == 0));
        assert_eq!(&bytes[10 << 20..], b"end");
        place.seal();
    }
}

#[test]
fn truncate_shrinks_grows_and_zeroes() {
    let place = Place::new();
    for sealed in [false, true] {
        let path = file(&place.path(format!("f{sealed}")), &[7; 10_000]);
        if sealed {
            place.seal();
        }
        let writer = rw(&path);
        writer.set_len(5_000).unwrap();
        writer.set_len(12_000).unwrap();
        let bytes = content(&path);
        assert_eq!(bytes.len(), 12_000);
        assert!(bytes[..5_000].iter().all(|byte| *byte == 7));
        assert!(bytes[5_000..].iter().all(|byte| *byte == 0));
        drop(writer);
        // By name, with no descriptor.
        let by_name = Command::new("truncate")
            .arg("-s")
            .arg("3")
            .arg(&path)
            .status()
            .unwrap();
        assert!(by_name.success());
        assert_eq!(content(&path), [7; 3]);
        place.seal();
        assert_eq!(content(&path), [7; 3]);
    }
    let missing = Command::new("truncate")
        .args(["-c", "-s", "3"])
        .arg(place.path("missing"))
        .status();
    assert!(missing.unwrap().success() && !place.path("missing").exists());
}

#[test]
fn writing_into_the_middle_keeps_the_rest() {
    let place = Place::new();
    let mut rng = Rng::from_environment();
    let mut model = rng.bytes(5 << 20);
    let path = file(&place.path("f"), &model);
    for round in 0..3 {
        place.seal();
        let writer = rw(&path);
        for _ in 0..20 {
            let at = rng.below(model.len() as u64 - 10_000) as usize;
            let count = 1 + rng.below(9_999) as usize;
            let bytes = rng.bytes(count);
            writer.write_all_at(&bytes, at as u64).unwrap();
            model[at..at + count].copy_from_slice(&bytes);
        }
        drop(writer);
        assert!(content(&path) == model, "round {round}");
    }
    place.seal();
    assert!(content(&path) == model);
}

#[test]
fn a_reader_sees_what_a_writer_wrote_before() {
    let place = Place::new();
    for sealed in [false, true] {
        let path = file(&place.path(format!("f{sealed}")), b"old old old");
        if sealed {
            place.seal();
        }
        let reader = ro(&path);
        let mut seen = [0; 3];
        reader.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(&seen, b"old");
        let writer = rw(&path);
        writer.write_all_at(b"new", 0).unwrap();
        reader.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(&seen, b"new", "sealed: {sealed}");
        writer.write_all_at(b"tail", 11).unwrap();
        assert_eq!(reader.metadata().unwrap().len(), 15);
        let mut tail = [0; 4];
        reader.read_exact_at(&mut tail, 11).unwrap();
        assert_eq!(&tail, b"tail");
    }
}

#[test]
fn an_unlinked_file_lives_until_its_last_close() {
    let place = Place::new();
    for sealed in [false, true] {
        let path = file(&place.path("f"), b"still here");
        if sealed {
            place.seal();
        }
        let both = rw(&path);
        fs::remove_file(&path).unwrap();
        assert_errno!(fs::metadata(&path), ENOENT);
        assert_eq!(both.metadata().unwrap().nlink(), 0);
        both.write_all_at(b"STILL", 0).unwrap();
        let mut bytes = [0; 10];
        both.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"STILL here");
        both.set_len(5).unwrap();
        assert_eq!(both.metadata().unwrap().len(), 5);
        // The name is free at once, and what takes it is another file.
        file(&path, b"other");
        assert_ne!(fs::metadata(&path).unwrap().ino(), both.metadata().unwrap().ino());
        drop(both);
        assert_eq!(content(&path), b"other");
    }
    assert_errno!(fs::remove_file(place.path("missing")), ENOENT);
    fs::create_dir(place.path("dir")).unwrap();
    assert_errno!(fs::remove_file(place.path("dir")), EISDIR);
}

#[test]
fn inode_number_stays_while_content_is_sealed_and_rewritten() {
    let mut place = Place::new();
    let path = file(&place.path("f"), b"one");
    let ino = fs::metadata(&path).unwrap().ino();
    place.seal();
    assert_eq!(fs::metadata(&path).unwrap().ino(), ino);
    rw(&path).write_all_at(b"two", 0).unwrap();
    place.seal();
    assert_eq!(fs::metadata(&path).unwrap().ino(), ino);
    place.remount();
    assert_eq!(fs::metadata(&path).unwrap().ino(), ino);
    assert_eq!(content(&path), b"two");
}

#[test]
fn files_of_equal_content_stay_files_of_their_own() {
    let place = Place::new();
    let paths: Vec<_> = (0..3)
        .map(|n| file(&place.path(format!("f{n}")), &vec![9; 300_000]))
        .collect();
    place.seal();
    // All open at once, as the kernel lends files to inodes one by one.
    let open: Vec<_> = paths.iter().map(|path| rw(path)).collect();
    open[1].write_all_at(b"changed", 100).unwrap();
    let mut seen = [0; 7];
    for (n, file) in open.iter().enumerate() {
        file.read_exact_at(&mut seen, 100).unwrap();
        assert_eq!(&seen == b"changed", n == 1, "file {n}");
    }
    drop(open);
    place.seal();
    for (n, path) in paths.iter().enumerate() {
        assert_eq!(&content(path)[100..107] == b"changed", n == 1, "file {n}");
    }
}

#[test]
fn modes_follow_the_umask_and_chmod() {
    let mut place = Place::new();
    rustix::process::umask(Mode::from_raw_mode(0o027));
    let path = place.path("f");
    File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o666)
        .open(&path)
        .unwrap();
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!(mode(&path), 0o640);
    for wanted in [0o755, 0o000, 0o4755, 0o2711, 0o1644, 0o600] {
        fs::set_permissions(&path, fs::Permissions::from_mode(wanted)).unwrap();
        assert_eq!(mode(&path), wanted);
    }
    place.seal();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o711)).unwrap();
    place.remount();
    assert_eq!(mode(&path), 0o711);
    assert_errno!(
        fs::set_permissions(place.path("missing"), fs::Permissions::from_mode(0o600)),
        ENOENT
    );
}

#[test]
fn other_users_are_held_to_the_mode_bits() {
    if !rustix::process::geteuid().is_root() {
        skip!("becoming another user needs root");
    }
    let place = Place::with(&["--owner", "preserve"]);
    fs::set_permissions(place.root(), fs::Permissions::from_mode(0o755)).unwrap();
    let (secret, public) = (
        file(&place.path("secret"), b"s"),
        file(&place.path("public"), b"p"),
    );
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(&public, fs::Permissions::from_mode(0o644)).unwrap();
    let as_nobody = |program: &str, path: &std::path::Path| {
        let mut command = Command::new(program);
        command.arg(path).uid(65_534).gid(65_534);
        wait::run(&mut command, Duration::from_secs(20)).status.success()
    };
    assert!(as_nobody("cat", &public));
    assert!(!as_nobody("cat", &secret));
    assert!(!as_nobody("touch", &place.path("new")));
    assert!(!as_nobody("rm", &place.path("public")));
    fs::set_permissions(place.root(), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(as_nobody("touch", &place.path("new")));
}

#[test]
fn owners_are_kept_when_asked_for() {
    if !rustix::process::geteuid().is_root() {
        skip!("giving files away needs root");
    }
    let mut place = Place::with(&["--owner", "preserve"]);
    let path = file(&place.path("f"), b"x");
    std::os::unix::fs::chown(&path, Some(1234), Some(4321)).unwrap();
    place.seal();
    place.remount();
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (1234, 4321));
}

#[test]
fn syncs_succeed_on_every_descriptor() {
    let place = Place::new();
    let path = file(&place.path("f"), b"x");
    let writer = rw(&path);
    writer.write_all_at(b"y", 0).unwrap();
    writer.sync_data().unwrap();
    writer.sync_all().unwrap();
    drop(writer);
    ro(&path).sync_all().unwrap();
    File::open(place.root()).unwrap().sync_all().unwrap();
    place.seal();
    ro(&path).sync_all().unwrap();
    for flag in [libc::O_SYNC, libc::O_DSYNC] {
        let mut synced = File::options()
            .append(true)
            .custom_flags(flag)
            .open(&path)
            .unwrap();
        synced.write_all(b"z").unwrap();
    }
    assert_eq!(content(&path), b"yzz");
}

#[test]
fn kernel_copies_are_exact() {
    let place = Place::new();
    let bytes = Rng::from_environment().bytes(3 << 20);
    let from = file(&place.path("from"), &bytes);
    for sealed in [false, true] {
        if sealed {
            place.seal();
        }
        // std copies by copy_file_range, and by sendfile or splice where that is not to be had.
        let to = place.path(format!("to{sealed}"));
        assert_eq!(fs::copy(&from, &to).unwrap(), bytes.len() as u64);
        assert!(content(&to) == bytes, "sealed: {sealed}");
        let mut cp = Command::new("cp");
        wait::run_ok(
            cp.arg("--reflink=auto").arg(&from).arg(&to),
            Duration::from_secs(20),
        );
        assert!(content(&to) == bytes);
    }
}

#[test]
fn allocated_space_reads_as_zeros() {
    let place = Place::new();
    let path = file(&place.path("f"), b"abc");
    let writer = rw(&path);
    match rustix::fs::fallocate(&writer, FallocateFlags::empty(), 0, 100_000) {
        Ok(()) => {
            assert_eq!(writer.metadata().unwrap().len(), 100_000);
            let bytes = content(&path);
            assert_eq!(&bytes[..3], b"abc");
            assert!(bytes[3..].iter().all(|byte| *byte == 0));
        }
        Err(err) => assert_eq!(err, rustix::io::Errno::OPNOTSUPP),
    }
}

#[test]
fn seeking_for_data_finds_all_of_it() {
    let place = Place::new();
    let path = place.path("sparse");
    let both = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    both.write_all_at(b"data", 4 << 20).unwrap();
    both.set_len(8 << 20).unwrap();
    let data = rustix::fs::seek(&both, rustix::fs::SeekFrom::Data(0)).unwrap();
    assert!(data <= 4 << 20);
    let hole = rustix::fs::seek(&both, rustix::fs::SeekFrom::Hole(4 << 20)).unwrap();
    assert!(((4 << 20) + 4..=8 << 20).contains(&hole));
    assert_errno!(
        rustix::fs::seek(&both, rustix::fs::SeekFrom::Data(8 << 20)),
        ENXIO
    );
}

#[test]
fn unusual_open_flags_work_or_are_refused_in_time() {
    let place = Place::new();
    let path = file(&place.path("f"), &[1; 8192]);
    match File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path)
    {
        Ok(_) => {}
        Err(err) => assert_eq!(err.raw_os_error(), Some(libc::EINVAL)),
    }
    let read = File::options()
        .read(true)
        .custom_flags(libc::O_NOATIME)
        .open(&path)
        .unwrap();
    assert_eq!(read.metadata().unwrap().len(), 8192);
    let unnamed = rustix::fs::open(
        place.root(),
        OFlags::TMPFILE | OFlags::RDWR,
        Mode::from_raw_mode(0o600),
    );
    if place.is_casmount() {
        assert_errno!(unnamed, EOPNOTSUPP);
    }
    let path_only = rustix::fs::open(&path, OFlags::PATH, Mode::empty()).unwrap();
    assert_eq!(rustix::fs::fstat(&path_only).unwrap().st_size, 8192);
    let nonblock = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .unwrap();
    assert_eq!((&nonblock).read(&mut [0; 10_000]).unwrap(), 8192);
}

#[test]
fn statfs_tells_of_space() {
    let place = Place::new();
    let stat = rustix::fs::statvfs(place.root()).unwrap();
    assert!(stat.f_blocks > 0 && stat.f_bavail > 0 && stat.f_bavail <= stat.f_blocks);
    assert!(stat.f_bsize >= 512 && stat.f_namemax >= 255);
}

#[test]
fn a_program_runs_from_the_mount() {
    let place = Place::new();
    let program = place.path("true");
    fs::copy("/bin/true", &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    for _ in 0..2 {
        wait::run_ok(&mut Command::new(&program), Duration::from_secs(20));
        place.seal();
    }
}

#[test]
fn many_threads_create_and_read_without_mixing() {
    let place = Place::new();
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let place = &place;
            scope.spawn(move || {
                for n in 0..150_usize {
                    let path = place.path(format!("{thread}-{n}"));
                    let bytes = vec![thread as u8 * 50 + (n % 50) as u8; 1000 + n * 37];
                    file(&path, &bytes);
                    assert!(content(&path) == bytes, "{}", path.display());
                    if n % 3 == 0 {
                        fs::remove_file(&path).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(fs::read_dir(place.root()).unwrap().count(), 4 * 100);
}
