//! The file operations of the benchmark, timed without an interpreter in the way.
//!
//! ```text
//! bench-io write FILE BYTES                writes FILE in pieces of 1 MiB, close included
//! bench-io fill FILE BYTES SEED            writes bytes that are unlike those of any other seed; not to be timed
//! bench-io check FILE SEED                 reads what `fill` wrote and compares all of it
//! bench-io read FILE [BYTES [THREADS]]     reads FILE from start to end, open included; each thread a part of its own
//! bench-io random-read FILE COUNT [SEED]   COUNT reads of 4 KiB, no place twice
//! bench-io fill-tree DIR N [BYTES]         makes N files in directories of 100 each; not to be timed
//! bench-io stat DIR N [BYTES]              lstat of each file of such a tree
//! bench-io stat-missing DIR N              lstat of N names in its directories that are not there
//! bench-io open-read DIR N [BYTES]         opens each file, reads all of it at once, closes it
//! bench-io utimens DIR N                   utimensat(file, now) of each: what Bazel asks whether it has an entry
//! bench-io rename DIR N                    renames each file, and back again
//! bench-io find DIR [N]                    lists every directory and does an lstat of every name, see below
//! bench-io create DIR COUNT [THREADS]      COUNT times: create, write 4 KiB, close, rename; each thread in a directory of its own
//! bench-io check-created DIR COUNT [THREADS]  compares what `create` made
//! ```
//!
//! Prints one JSON object with the seconds it took, and the number of operations in them. Whatever is not as
//! it was made (a name that is not there, another length, other bytes, an error of close) is an error, and
//! ends it with another exit code than 0: an answer that is wrong never counts as a quick one.
//!
//! `find` asks for the attributes of every name, as `find -newer`, `du`, `git status` and the collectors of caches do.
//! A plain `find` is content with what the listing says and does not reach the files.
//! BYTES are 16384 unless given. The files of a tree are `DIR/<n/100>/f-<n>`, filled from the seed n.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::IntoRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
    thread,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, utimensat};

const PIECE: usize = 1 << 20;
const FILE_BYTES: usize = 4096;
const PAGE: u64 = 4096;
const TREE_FILE_BYTES: u64 = 16384;
const FILES_OF_DIR: u64 = 100;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// What was timed: seconds, and how many operations.
type Timed = io::Result<(f64, u64)>;

fn mix(state: u64) -> u64 {
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Bytes that neither compress nor repeat: `SplitMix64` from a seed.
fn fill_piece(piece: &mut [u8], state: &mut u64) {
    for word in piece.chunks_exact_mut(8) {
        *state = state.wrapping_add(STEP);
        word.copy_from_slice(&mix(*state).to_le_bytes());
    }
}

/// Seeds that are far apart on the sequence of the generator.
fn start_of(seed: u64) -> u64 {
    seed.wrapping_mul(0xd134_2543_de82_ef95) ^ 0x5851_f42d_4c95_7f2d
}

/// The eight bytes that are at an offset of what was filled from a seed.
fn word_at(seed: u64, offset: u64) -> [u8; 8] {
    let number = offset / 8 + 1;
    mix(start_of(seed).wrapping_add(STEP.wrapping_mul(number))).to_le_bytes()
}

fn wrong(path: &Path, what: &str) -> io::Error {
    io::Error::other(format!("{}: {what}", path.display()))
}

/// Names the path in the error of a call.
fn at<T>(path: &Path, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|err| io::Error::new(err.kind(), format!("{}: {err}", path.display())))
}

/// Closes a file and tells its error, which dropping it does not.
fn close(path: &Path, file: File) -> io::Result<()> {
    let fd = file.into_raw_fd();
    // SAFETY: the descriptor was owned by `file`, which gave it up; nothing else uses it.
    match unsafe { libc::close(fd) } {
        0 => Ok(()),
        _ => at(path, Err(io::Error::last_os_error())),
    }
}

fn write(path: &Path, bytes: u64) -> Timed {
    let mut piece = vec![0; PIECE];
    fill_piece(&mut piece, &mut start_of(u64::from(std::process::id())));
    let start = Instant::now();
    let mut file = File::create(path)?;
    for n in 0..bytes / PIECE as u64 {
        // Unlike its neighbours, at no cost that would be measured.
        piece[..8].copy_from_slice(&n.to_le_bytes());
        file.write_all(&piece)?;
    }
    close(path, file)?;
    Ok((start.elapsed().as_secs_f64(), 1))
}

fn read(path: &Path, bytes: Option<u64>, threads: u64) -> Timed {
    let start = Instant::now();
    let file = at(path, File::open(path))?;
    let length = file.metadata()?.len();
    if bytes.is_some_and(|bytes| bytes != length) {
        return Err(wrong(path, &format!("{length} bytes")));
    }
    let part = |number: u64| -> io::Result<u64> {
        // One stands for the whole file, also for what is behind its length of a moment ago.
        let (from, to) = match threads {
            1 => (0, u64::MAX),
            _ => (length * number / threads, length * (number + 1) / threads),
        };
        let file = at(path, File::open(path))?;
        let mut piece = vec![0; PIECE];
        let mut offset = from;
        while offset < to {
            let most = usize::try_from(to - offset).map_or(PIECE, |left| left.min(PIECE));
            match at(path, file.read_at(&mut piece[..most], offset))? {
                0 => break,
                count => offset += count as u64,
            }
        }
        Ok(offset - from)
    };
    let total = thread::scope(|scope| -> io::Result<u64> {
        let others: Vec<_> = (1..threads)
            .map(|number| scope.spawn(move || part(number)))
            .collect();
        let mut total = part(0)?;
        for other in others {
            total += other.join().expect("a reader does not panic")?;
        }
        Ok(total)
    })?;
    let seconds = start.elapsed().as_secs_f64();
    if total != length {
        return Err(wrong(path, &format!("{total} of {length} bytes were read")));
    }
    Ok((seconds, 1))
}

fn random_read(path: &Path, count: u64, seed: Option<u64>) -> Timed {
    let pages = at(path, fs::metadata(path))?.len() / PAGE;
    if count > pages {
        return Err(wrong(path, "shorter than so many reads"));
    }
    let mut order: Vec<u64> = (0..pages).collect();
    let mut state = start_of(count);
    for from in 0..count as usize {
        state = state.wrapping_add(STEP);
        let other = from + (mix(state) % (pages - from as u64)) as usize;
        order.swap(from, other);
    }
    order.truncate(count as usize);
    let mut piece = [0; PAGE as usize];
    let start = Instant::now();
    let file = at(path, File::open(path))?;
    for page in &order {
        at(path, file.read_exact_at(&mut piece, page * PAGE))?;
        if seed.is_some_and(|seed| piece[..8] != word_at(seed, page * PAGE)) {
            return Err(wrong(path, "other bytes than were written"));
        }
    }
    close(path, file)?;
    Ok((start.elapsed().as_secs_f64(), count))
}

/// The paths of a tree: what is made of them is not timed.
fn tree(dir: &Path, count: u64, name: &str) -> Vec<PathBuf> {
    (0..count)
        .map(|n| dir.join(format!("{:04}/{name}-{n}", n / FILES_OF_DIR)))
        .collect()
}

fn fill_tree(dir: &Path, count: u64, bytes: u64) -> Timed {
    let start = Instant::now();
    let mut piece = vec![0; bytes as usize];
    for (n, path) in (0..).zip(tree(dir, count, "f")) {
        if n % FILES_OF_DIR == 0 {
            let parent = path.parent().expect("it is in a directory");
            at(parent, fs::create_dir_all(parent))?;
        }
        fill_piece(&mut piece, &mut start_of(n));
        let mut file = at(&path, File::create(&path))?;
        at(&path, file.write_all(&piece))?;
        close(&path, file)?;
    }
    Ok((start.elapsed().as_secs_f64(), count))
}

fn stat(dir: &Path, count: u64, bytes: u64) -> Timed {
    let paths = tree(dir, count, "f");
    let start = Instant::now();
    for path in &paths {
        let found = at(path, fs::symlink_metadata(path))?;
        if !found.is_file() || found.len() != bytes {
            return Err(wrong(path, "another kind or length"));
        }
    }
    Ok((start.elapsed().as_secs_f64(), count))
}

fn stat_missing(dir: &Path, count: u64) -> Timed {
    let paths = tree(dir, count, "missing");
    let start = Instant::now();
    for path in &paths {
        match fs::symlink_metadata(path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            Err(err) => return at(path, Err(err)),
            Ok(_) => return Err(wrong(path, "nobody made it")),
        }
    }
    Ok((start.elapsed().as_secs_f64(), count))
}

fn open_read(dir: &Path, count: u64, bytes: u64) -> Timed {
    let paths = tree(dir, count, "f");
    let mut content = vec![0; bytes as usize];
    let start = Instant::now();
    for (n, path) in (0..).zip(&paths) {
        let mut file = at(path, File::open(path))?;
        if at(path, file.read(&mut content))? != content.len() {
            return Err(wrong(path, "another length"));
        }
        close(path, file)?;
        let last = content.len() - 8;
        if content[..8] != word_at(n, 0) || content[last..] != word_at(n, last as u64) {
            return Err(wrong(path, "other bytes than were written"));
        }
    }
    Ok((start.elapsed().as_secs_f64(), count))
}

fn utimens(dir: &Path, count: u64) -> Timed {
    let paths = tree(dir, count, "f");
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_NOW,
    };
    let times = Timestamps {
        last_access: now,
        last_modification: now,
    };
    let since = SystemTime::now();
    let start = Instant::now();
    for path in &paths {
        at(
            path,
            utimensat(CWD, path, &times, AtFlags::empty()).map_err(Into::into),
        )?;
    }
    let seconds = start.elapsed().as_secs_f64();
    // Whole seconds are good enough: some keep no more.
    let least = since
        .duration_since(UNIX_EPOCH)
        .map_err(io::Error::other)?
        .as_secs() as i64;
    for path in &paths {
        if at(path, fs::symlink_metadata(path))?.mtime() < least {
            return Err(wrong(path, "the time is as before"));
        }
    }
    Ok((seconds, count))
}

fn rename(dir: &Path, count: u64) -> Timed {
    let (paths, others) = (tree(dir, count, "f"), tree(dir, count, "renamed"));
    let start = Instant::now();
    for (from, to) in paths.iter().zip(&others) {
        at(from, fs::rename(from, to))?;
    }
    for (from, to) in others.iter().zip(&paths) {
        at(from, fs::rename(from, to))?;
    }
    Ok((start.elapsed().as_secs_f64(), 2 * count))
}

/// Counts the files below a directory.
fn walk(dir: &Path) -> io::Result<u64> {
    let mut files = 0;
    for entry in at(dir, fs::read_dir(dir))? {
        let entry = at(dir, entry)?;
        // An fstatat below the directory, as find does.
        let found = entry.metadata()?;
        if found.is_dir() {
            files += walk(&entry.path())?;
        } else {
            files += 1;
        }
    }
    Ok(files)
}

fn find(dir: &Path, count: Option<u64>) -> Timed {
    let start = Instant::now();
    let files = walk(dir)?;
    let seconds = start.elapsed().as_secs_f64();
    if count.is_some_and(|count| count != files) {
        return Err(wrong(dir, &format!("{files} files")));
    }
    Ok((seconds, files))
}

/// The directory and the numbers of the files of one thread of `create`.
fn share(dir: &Path, count: u64, threads: u64, thread: u64) -> (PathBuf, std::ops::Range<u64>) {
    let own = match threads {
        1 => dir.to_owned(),
        _ => dir.join(format!("{thread}")),
    };
    (own, count * thread / threads..count * (thread + 1) / threads)
}

fn create_some(names: &[(u64, PathBuf, PathBuf)]) -> io::Result<()> {
    let mut bytes = vec![0; FILE_BYTES];
    let mut state = start_of(u64::from(std::process::id()));
    fill_piece(&mut bytes, &mut state);
    for (n, from, to) in names {
        bytes[..8].copy_from_slice(&word_at(*n, 0));
        let mut file = at(from, File::create(from))?;
        at(from, file.write_all(&bytes))?;
        close(from, file)?;
        at(to, fs::rename(from, to))?;
    }
    Ok(())
}

fn create(dir: &Path, count: u64, threads: u64) -> Timed {
    let mut shares = Vec::new();
    for thread in 0..threads {
        let (own, numbers) = share(dir, count, threads, thread);
        fs::create_dir_all(&own)?;
        let names = numbers.map(|n| (n, own.join(format!("tmp-{n}")), own.join(format!("file-{n}"))));
        shares.push(names.collect::<Vec<_>>());
    }
    let start = Instant::now();
    thread::scope(|scope| -> io::Result<()> {
        let (first, rest) = shares.split_first().expect("at least one thread");
        let others: Vec<_> = rest
            .iter()
            .map(|names| scope.spawn(|| create_some(names)))
            .collect();
        let own = create_some(first);
        for other in others {
            other.join().expect("a creator does not panic")?;
        }
        own
    })?;
    Ok((start.elapsed().as_secs_f64(), count))
}

fn check_created(dir: &Path, count: u64, threads: u64) -> Timed {
    let start = Instant::now();
    for thread in 0..threads {
        let (own, numbers) = share(dir, count, threads, thread);
        let made = numbers.end - numbers.start;
        for n in numbers {
            let path = own.join(format!("file-{n}"));
            let content = at(&path, fs::read(&path))?;
            if content.len() != FILE_BYTES || content[..8] != word_at(n, 0) {
                return Err(wrong(&path, "other bytes than were written"));
            }
        }
        if fs::read_dir(&own)?.count() as u64 != made {
            return Err(wrong(&own, "more names than were made"));
        }
    }
    Ok((start.elapsed().as_secs_f64(), count))
}

fn fill(path: &Path, bytes: u64, seed: u64) -> Timed {
    let mut piece = vec![0; PIECE];
    let mut state = start_of(seed);
    let start = Instant::now();
    let mut file = File::create(path)?;
    for _ in 0..bytes / PIECE as u64 {
        fill_piece(&mut piece, &mut state);
        file.write_all(&piece)?;
    }
    close(path, file)?;
    Ok((start.elapsed().as_secs_f64(), 1))
}

fn check(path: &Path, seed: u64) -> Timed {
    let (mut piece, mut expected) = (vec![0; PIECE], vec![0; PIECE]);
    let mut state = start_of(seed);
    let start = Instant::now();
    let mut file = File::open(path)?;
    for _ in 0..file.metadata()?.len() / PIECE as u64 {
        file.read_exact(&mut piece)?;
        fill_piece(&mut expected, &mut state);
        if piece != expected {
            return Err(wrong(path, "other bytes than were written"));
        }
    }
    Ok((start.elapsed().as_secs_f64(), 1))
}

fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage =
        || io::Error::other("usage: bench-io OPERATION PATH [NUMBERS...], see tests/tools/bench_io.rs");
    let [operation, path, numbers @ ..] = &args[..] else {
        return Err(usage());
    };
    let path = Path::new(path);
    let numbers: Result<Vec<u64>, _> = numbers.iter().map(|text| text.parse()).collect();
    let numbers = numbers.map_err(io::Error::other)?;
    let (seconds, operations) = match (operation.as_str(), &numbers[..]) {
        ("write", &[bytes]) => write(path, bytes)?,
        ("fill", &[bytes, seed]) => fill(path, bytes, seed)?,
        ("check", &[seed]) => check(path, seed)?,
        ("read", &[]) => read(path, None, 1)?,
        ("read", &[bytes]) => read(path, Some(bytes), 1)?,
        ("read", &[bytes, threads]) if threads > 0 => read(path, Some(bytes), threads)?,
        ("random-read", &[count]) => random_read(path, count, None)?,
        ("random-read", &[count, seed]) => random_read(path, count, Some(seed))?,
        ("fill-tree", &[count]) => fill_tree(path, count, TREE_FILE_BYTES)?,
        ("fill-tree", &[count, bytes]) => fill_tree(path, count, bytes)?,
        ("stat", &[count]) => stat(path, count, TREE_FILE_BYTES)?,
        ("stat", &[count, bytes]) => stat(path, count, bytes)?,
        ("stat-missing", &[count]) => stat_missing(path, count)?,
        ("open-read", &[count]) => open_read(path, count, TREE_FILE_BYTES)?,
        ("open-read", &[count, bytes]) if bytes >= 8 => open_read(path, count, bytes)?,
        ("utimens", &[count]) => utimens(path, count)?,
        ("rename", &[count]) => rename(path, count)?,
        ("find", &[]) => find(path, None)?,
        ("find", &[count]) => find(path, Some(count))?,
        ("create", &[count]) => create(path, count, 1)?,
        ("create", &[count, threads]) if threads > 0 => create(path, count, threads)?,
        ("check-created", &[count]) => check_created(path, count, 1)?,
        ("check-created", &[count, threads]) if threads > 0 => check_created(path, count, threads)?,
        _ => return Err(usage()),
    };
    println!("{{\"seconds\": {seconds:.9}, \"operations\": {operations}}}");
    Ok(())
}
