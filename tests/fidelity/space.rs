//! Large and sparse files, and what moves in and between files.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate};

use crate::{
    assert_errno,
    lab::{Lab, StoreKind},
    support::{
        posix::{content, file, ro, rw},
        trial::compare,
    },
};

on_both_stores!(all_data_is_found_wherever_the_file_is);

#[test]
fn files_over_four_gigabytes_are_sparse_and_searched_alike() {
    const GIB: u64 = 1 << 30;
    compare(&[], &[], |t| {
        let large = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(t.path("large"))
            .unwrap();
        t.call("write behind 4 GiB", large.write_all_at(b"behind", 5 * GIB));
        t.call(
            "write across 4 GiB",
            large.write_all_at(&[7; 10_000], 4 * GIB - 5_000),
        );
        t.call("extend", large.set_len(6 * GIB + 1));
        t.note("size", fs::metadata(t.path("large")).unwrap().len());
        t.note("takes little", large.metadata().unwrap().blocks() < 1_000);
        let mut bytes = [0; 10];
        large.read_exact_at(&mut bytes, 5 * GIB - 2).unwrap();
        t.note("bytes", bytes);
        large.read_exact_at(&mut bytes, 4 * GIB - 5_005).unwrap();
        t.note("bytes before", bytes);
        t.ask("read at the end", large.read_at(&mut bytes, 6 * GIB - 1));
        let by_name = |from| rustix::fs::seek(&large, from);
        for at in [
            0,
            GIB,
            4 * GIB - 5_000,
            4 * GIB,
            5 * GIB,
            6 * GIB,
            6 * GIB + 1,
            7 * GIB,
        ] {
            t.ask(format!("data from {at}"), by_name(SeekFrom::Data(at)));
            t.ask(format!("hole from {at}"), by_name(SeekFrom::Hole(at)));
        }
        t.ask("from the end", by_name(SeekFrom::End(-1)));
        t.ask("before the start", by_name(SeekFrom::Current(i64::MIN)));
        t.ask(
            "beyond what there is",
            large.write_at(b"x", i64::MAX as u64).map(drop),
        );
        t.call("longer than can be", large.set_len(1 << 62));
        // Before anybody hashes it.
        fs::remove_file(t.path("large")).unwrap();

        let small = rw(&file(&t.path("small"), b"abc"));
        for (what, from) in [
            ("data", SeekFrom::Data(0)),
            ("hole", SeekFrom::Hole(0)),
            ("data at the end", SeekFrom::Data(3)),
            ("hole at the end", SeekFrom::Hole(3)),
        ] {
            t.ask(format!("small: {what}"), rustix::fs::seek(&small, from));
        }
        let empty = rw(&file(&t.path("empty"), b""));
        t.ask("empty: data", rustix::fs::seek(&empty, SeekFrom::Data(0)));
        t.ask("empty: hole", rustix::fs::seek(&empty, SeekFrom::Hole(0)));
    });
}

/// Sealed, taken over by a writer, and on a machine that has to fetch it, a file says no less of its holes than POSIX
/// wants: all data is found, and the end is a hole.
fn all_data_is_found_wherever_the_file_is(kind: StoreKind) {
    const DATA: u64 = 4 << 20;
    const END: u64 = 9 << 20;
    let lab = Lab::new(kind);
    let (a, b) = (lab.machine("a"), lab.spec("b").arg("--no-passthrough").start());
    let sparse = File::create(a.path("sparse")).unwrap();
    sparse.write_all_at(b"data", DATA).unwrap();
    sparse.set_len(END).unwrap();
    drop(sparse);
    let search = |file: &File| {
        let seek = |from| rustix::fs::seek(file, from);
        assert!(seek(SeekFrom::Data(0)).unwrap() <= DATA);
        assert_eq!(seek(SeekFrom::Data(DATA + 1)).unwrap(), DATA + 1);
        assert!((DATA + 4..=END).contains(&seek(SeekFrom::Hole(DATA)).unwrap()));
        assert!((END - 1..=END).contains(&seek(SeekFrom::Hole(END - 1)).unwrap()));
        assert_errno!(seek(SeekFrom::Data(END)), ENXIO);
        assert_errno!(seek(SeekFrom::Hole(END)), ENXIO);
    };
    search(&ro(&a.path("sparse")));
    a.flush();
    search(&ro(&a.path("sparse")));
    b.until_content("sparse", &content(&a.path("sparse")));
    search(&ro(&b.path("sparse")));
    let writer = rw(&b.path("sparse"));
    writer.write_all_at(b"more", DATA - 4).unwrap();
    assert!(rustix::fs::seek(&writer, SeekFrom::Data(0)).unwrap() <= DATA - 4);
    search(&writer);
}

#[test]
fn space_is_given_and_taken_alike() {
    type Flags = FallocateFlags;
    // The kernel does not pass these on to any FUSE daemon.
    let differences = [
        ("collapse", "done", "Operation not supported"),
        ("collapse: bytes", "(15904, 0)", "(20000, 0)"),
        ("insert", "done", "Operation not supported"),
        ("insert: bytes", "(24096, 4096)", "(20000, 0)"),
    ];
    compare(&[], &differences, |t| {
        let cases = [
            ("allocate", Flags::empty(), 0, 50_000),
            ("allocate inside", Flags::empty(), 100, 100),
            ("allocate behind", Flags::empty(), 100_000, 1),
            ("keep size", Flags::KEEP_SIZE, 20_000, 100_000),
            ("punch", Flags::PUNCH_HOLE | Flags::KEEP_SIZE, 3_000, 9_000),
            ("punch all", Flags::PUNCH_HOLE | Flags::KEEP_SIZE, 0, 1 << 20),
            ("punch without keeping the size", Flags::PUNCH_HOLE, 0, 100),
            ("zero", Flags::ZERO_RANGE, 5_000, 10_000),
            ("zero behind", Flags::ZERO_RANGE, 15_000, 10_000),
            (
                "zero, keep size",
                Flags::ZERO_RANGE | Flags::KEEP_SIZE,
                15_000,
                10_000,
            ),
            ("collapse", Flags::COLLAPSE_RANGE, 0, 4_096),
            ("insert", Flags::INSERT_RANGE, 4_096, 4_096),
            ("nothing", Flags::empty(), 0, 0),
            ("too much", Flags::empty(), i64::MAX as u64 - 10, 20),
        ];
        for (what, flags, offset, len) in cases {
            let path = file(&t.path("f"), &vec![b'x'; 20_000]);
            let open = rw(&path);
            t.call(what, fallocate(&open, flags, offset, len));
            drop(open);
            let bytes = content(&path);
            let zeros = bytes.split(|byte| *byte == 0).count() - 1;
            t.note(format!("{what}: bytes"), (bytes.len(), zeros));
        }
        let path = t.path("f");
        t.call("read-only", fallocate(ro(&path), Flags::empty(), 0, 100));
        t.call(
            "directory",
            fallocate(File::open(t.path("")).unwrap(), Flags::empty(), 0, 100),
        );
    });
}

#[test]
fn ranges_are_copied_alike() {
    compare(&[], &[], |t| {
        let from = file(
            &t.path("from"),
            &(0..=255).cycle().take(300_000).collect::<Vec<u8>>(),
        );
        let to = t.path("to");
        let cases = [
            ("whole", 0, 0, 300_000),
            ("part", 1_000, 50_000, 9_999),
            ("beyond the end", 299_000, 0, 50_000),
            ("from behind the end", 400_000, 0, 100),
            ("far away", 0, 3_000_000, 100),
            ("nothing", 0, 0, 0),
        ];
        for (what, mut offset_in, mut offset_out, len) in cases {
            file(&to, b"before");
            let (a, b) = (ro(&from), rw(&to));
            t.ask(
                what,
                copy_file_range(&a, Some(&mut offset_in), &b, Some(&mut offset_out), len),
            );
            t.note(format!("{what}: offsets"), (offset_in, offset_out));
            drop((a, b));
            t.note(
                format!("{what}: bytes"),
                crate::support::tree::digest(&content(&to)),
            );
        }
        let both = rw(&from);
        t.ask(
            "onto itself",
            copy_file_range(&both, Some(&mut 0), &both, Some(&mut 100), 1_000),
        );
        t.ask(
            "within itself",
            copy_file_range(&both, Some(&mut 0), &both, Some(&mut 200_000), 1_000),
        );
        t.ask(
            "to a reader",
            copy_file_range(&both, Some(&mut 0), ro(&to), Some(&mut 0), 10),
        );
        let append = File::options().append(true).open(&to).unwrap();
        t.ask(
            "to one who appends",
            copy_file_range(&both, Some(&mut 0), &append, Some(&mut 0), 10),
        );
        let writer = File::options().write(true).open(&to).unwrap();
        t.ask(
            "from a writer",
            copy_file_range(&writer, Some(&mut 0), &both, Some(&mut 0), 10),
        );
        let dir = File::open(t.path("")).unwrap();
        t.ask(
            "from a directory",
            copy_file_range(&dir, Some(&mut 0), &both, Some(&mut 0), 10),
        );
        // From a file of another file system, as cp does it.
        let other = file(
            Path::new("/dev/shm")
                .join(format!("casmount-{}", std::process::id()))
                .as_path(),
            b"elsewhere",
        );
        let copied = fs::copy(&other, t.path("copied"));
        fs::remove_file(&other).unwrap();
        t.ask("from another file system", copied);
    });
}
