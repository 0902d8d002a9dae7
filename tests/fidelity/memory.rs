//! Bytes between files and memory that is not as it should be, or much; mappings and what is done to them.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    thread,
};

use crate::support::{
    machine::Machine,
    posix::{Mapping, answer, content, file, ro, rw},
    tree,
    trial::compare,
};

/// Two pages of memory, the second of which nobody may touch.
struct Fence(*mut u8);

impl Fence {
    fn new() -> Self {
        use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};
        let both = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no other memory is replaced; the second page is the mapping's own.
        let at = unsafe {
            let at = mmap_anonymous(std::ptr::null_mut(), 8_192, both, MapFlags::PRIVATE).unwrap();
            mprotect(at.add(4_096), 4_096, MprotectFlags::empty()).unwrap();
            at
        };
        Self(at.cast())
    }

    /// So many bytes before the fence.
    fn before(&self, bytes: usize) -> *mut u8 {
        // SAFETY: inside of the first page.
        unsafe { self.0.add(4_096 - bytes) }
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping, which nobody can use any more.
        let _ = unsafe { rustix::mm::munmap(self.0.cast(), 8_192) };
    }
}

#[test]
fn memory_that_is_not_there_is_an_error_or_a_short_count() {
    compare(&[], &[], |t| {
        let path = file(&t.path("f"), &vec![b'f'; 20_000]);
        for (how, flags) in [("plain", 0), ("append", libc::O_APPEND), ("sync", libc::O_SYNC)] {
            let open = File::options()
                .read(true)
                .write(true)
                .custom_flags(flags)
                .open(&path)
                .unwrap();
            let fence = Fence::new();
            for before in [0, 10, 4_096] {
                for len in [0, 10, 5_000] {
                    let memory = fence.before(before);
                    // SAFETY: the kernel looks itself whether the memory may be touched; what may be is ours.
                    let (read, written) = unsafe {
                        (
                            answer(libc::pread(open.as_raw_fd(), memory.cast(), len, 100) as i64),
                            answer(libc::pwrite(open.as_raw_fd(), memory.cast(), len, 200) as i64),
                        )
                    };
                    t.ask(format!("{how}: read {len} to {before}"), read);
                    t.ask(format!("{how}: write {len} of {before}"), written);
                    t.note(
                        format!("{how}: length after {len} of {before}"),
                        open.metadata().unwrap().len(),
                    );
                }
            }
        }
        t.note("bytes", content(&path).len());
        // A file that is written from its own pages.
        let open = rw(&path);
        let mapping = Mapping::new(&open, 16_384, true, true).unwrap();
        mapping.write(0, b"from its own pages");
        rustix::fs::seek(&open, rustix::fs::SeekFrom::Start(8_192)).unwrap();
        t.ask("of its own pages", mapping.send(0, 4_096, &open));
        rustix::fs::seek(&open, rustix::fs::SeekFrom::Start(100)).unwrap();
        t.ask("of the same page", mapping.send(0, 18, &open));
        drop(mapping);
        t.note("bytes after all", tree::digest(&content(&path)[..16_384]));
    });
}

#[test]
fn long_reads_and_writes_are_done_whole() {
    compare(&[], &[], |t| {
        let bytes: Vec<u8> = (0..9_000_001_u32).map(|n| (n % 239) as u8).collect();
        let path = t.path("f");
        let open = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        t.ask("write", open.write_at(&bytes, 3));
        let mut back = vec![0; bytes.len()];
        t.ask("read", open.read_at(&mut back, 3));
        t.note("same", back == bytes);
        t.ask("read more than there is", open.read_at(&mut back, 1_000_003));
        drop(open);
        t.seal();
        let reader = ro(&path);
        t.ask("read what is sealed", reader.read_at(&mut back, 3));
        t.note("the same", back == bytes);
        let append = File::options().append(true).open(&path).unwrap();
        t.ask("append", (&append).write(&bytes[..4_000_000]));
        t.note("length", append.metadata().unwrap().len());
    });
}

#[test]
fn long_appends_are_not_mixed() {
    const RECORD: usize = 700_000;
    for args in [&[][..], &["--settle", "0s"]] {
        compare(args, &[], |t| {
            let path = file(&t.path("log"), b"");
            thread::scope(|scope| {
                for writer in 0..3_u8 {
                    let path = &path;
                    scope.spawn(move || {
                        for _ in 0..6 {
                            let mut open = File::options().append(true).open(path).unwrap();
                            // At once, or the next write is an append of its own.
                            assert_eq!(open.write(&vec![b'a' + writer; RECORD]).unwrap(), RECORD);
                        }
                    });
                }
            });
            let bytes = content(&path);
            let mut counts = [0; 3];
            let whole = bytes
                .chunks(RECORD)
                .filter(|record| record.iter().all(|byte| *byte == record[0]));
            for record in whole {
                counts[usize::from(record[0] - b'a')] += 1;
            }
            t.note("whole records", counts);
        });
    }
}

/// The daemon takes any; what is lent is the disk's, see the README.
#[test]
fn direct_reads_and_writes_that_are_not_aligned() {
    compare(&[], &[], |t| {
        let path = file(&t.path("f"), &vec![b'f'; 20_000]);
        let direct = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path)
            .unwrap();
        let by_daemon = |machine: &Machine| machine.spec.args.iter().any(|arg| arg == "--no-passthrough");
        let takes_any = t.machine().is_some_and(by_daemon);
        let mut memory = vec![b'd'; 4 * 4_096];
        let start = memory.as_ptr().align_offset(4_096);
        for (what, aligned, shift, len, at) in [
            ("aligned", true, 0, 4_096, 0),
            ("half a block", true, 0, 512, 512),
            ("odd length", false, 0, 100, 4_096),
            ("odd place", false, 0, 4_096, 100),
            ("odd memory", false, 3, 4_096, 0),
            ("over the end", true, 0, 8_192, 16_384),
        ] {
            let block = &mut memory[start + shift..start + shift + len];
            let (read, written) = (direct.read_at(block, at), direct.write_at(block, at));
            if takes_any && !aligned {
                assert_eq!(
                    (read.as_ref().ok(), written.as_ref().ok()),
                    (Some(&len), Some(&len)),
                    "{what}"
                );
            }
            let told = |result: std::io::Result<usize>| {
                if takes_any && !aligned {
                    Err(std::io::Error::from_raw_os_error(libc::EINVAL))
                } else {
                    result
                }
            };
            t.ask(format!("read {what}"), told(read));
            t.ask(format!("write {what}"), told(written));
        }
        t.note("length", direct.metadata().unwrap().len());
    });
}

#[test]
fn mappings_are_advised_protected_and_synced_alike() {
    compare(&[], &[], |t| {
        let path = file(&t.path("f"), &vec![b'f'; 32_768]);
        let open = rw(&path);
        let advise = |mapping: &Mapping, at: usize, len: usize, advice: i32| mapping.advise(at, len, advice);
        for (what, shared) in [("shared", true), ("private", false)] {
            let mapping = Mapping::new(&open, 32_768, true, shared).unwrap();
            for (name, advice) in [
                ("MADV_DONTNEED", libc::MADV_DONTNEED),
                ("MADV_WILLNEED", libc::MADV_WILLNEED),
                ("MADV_REMOVE", libc::MADV_REMOVE),
                ("MADV_FREE", libc::MADV_FREE),
                ("MADV_COLD", libc::MADV_COLD),
                ("MADV_POPULATE_WRITE", libc::MADV_POPULATE_WRITE),
                ("MADV_POPULATE_READ", libc::MADV_POPULATE_READ),
            ] {
                mapping.write(8_192, b"stored");
                t.ask(format!("{what} {name}"), advise(&mapping, 8_192, 8_192, advice));
                t.note(
                    format!("{what} {name}: mapped"),
                    mapping.read()[8_192..8_198].to_vec(),
                );
                t.note(
                    format!("{what} {name}: file"),
                    content(&path)[8_192..8_198].to_vec(),
                );
            }
            for (name, flags) in [
                ("sync", libc::MS_SYNC),
                ("async", libc::MS_ASYNC),
                ("invalidate", libc::MS_INVALIDATE),
                ("both", libc::MS_SYNC | libc::MS_ASYNC),
            ] {
                t.ask(format!("{what} msync {name}"), mapping.sync_with(flags));
            }
            t.ask(format!("{what} locked"), mapping.lock());
        }
        let reader = ro(&path);
        for (what, shared) in [("shared", true), ("private", false)] {
            let mapping = Mapping::new(&reader, 4_096, false, shared).unwrap();
            t.ask(
                format!("{what}: made writable"),
                mapping.protect(libc::PROT_READ | libc::PROT_WRITE),
            );
            t.ask(
                format!("{what}: made executable"),
                mapping.protect(libc::PROT_READ | libc::PROT_EXEC),
            );
        }
        // A private mapping that nobody stored to shows what is written later, and what was stored to stays.
        let private = Mapping::new(&open, 32_768, true, false).unwrap();
        private.write(100, b"mine");
        open.write_all_at(b"written", 20_000).unwrap();
        open.write_all_at(b"written", 200).unwrap();
        t.note("written beside", private.read()[20_000..20_007].to_vec());
        t.note("in a page of its own", private.read()[200..207].to_vec());
        fs::remove_file(&path).unwrap();
        drop(open);
        t.note("without a name", private.read()[20_000..20_007].to_vec());
        drop((private, reader));
        let fresh = rw(&file(&t.path("g"), b""));
        t.call("of nothing", Mapping::new(&fresh, 4_096, true, true).map(drop));
        let mapping = Mapping::new(&fresh, 8_192, true, true).unwrap();
        let (_end, pipe) = std::io::pipe().unwrap();
        t.ask("behind an empty file", mapping.send(0, 1, &pipe));
        fresh.set_len(10).unwrap();
        t.ask("once it is longer", mapping.send(0, 1, &pipe));
        mapping.write(5, b"mapped");
        t.ask("behind its page", mapping.send(4_096, 1, &pipe));
        t.note("blocks", fresh.metadata().unwrap().blocks() <= 8);
        let mut text = String::new();
        (&fresh).read_to_string(&mut text).unwrap();
        t.note("text", text);
    });
}
