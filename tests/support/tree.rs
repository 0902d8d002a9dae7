//! What is in a directory tree, to compare two of them.

use std::{
    collections::BTreeMap,
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

/// One name of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Type and permission bits.
    pub mode: u32,
    /// Of a directory always 0: file systems count differently.
    pub size: u64,
    /// Seconds and nanoseconds of the last change of the content.
    pub mtime: (i64, i64),
    /// Of a file the digest, of a symlink the target.
    pub content: Vec<u8>,
}

pub type Tree = BTreeMap<PathBuf, Entry>;

/// Reads a whole tree. The top itself is not part of it.
#[track_caller]
pub fn read(top: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut dirs = vec![PathBuf::new()];
    while let Some(dir) = dirs.pop() {
        let listing =
            fs::read_dir(top.join(&dir)).unwrap_or_else(|err| panic!("cannot list {}: {err}", dir.display()));
        for item in listing {
            let item = item.unwrap_or_else(|err| panic!("cannot list {}: {err}", dir.display()));
            let path = dir.join(item.file_name());
            let entry =
                entry(&top.join(&path)).unwrap_or_else(|err| panic!("cannot read {}: {err}", path.display()));
            if entry.mode & libc::S_IFMT == libc::S_IFDIR {
                dirs.push(path.clone());
            }
            assert!(
                tree.insert(path.clone(), entry).is_none(),
                "listed twice: {}",
                path.display()
            );
        }
    }
    tree
}

/// Reads one name with its content.
pub fn entry(path: &Path) -> io::Result<Entry> {
    let meta = fs::symlink_metadata(path)?;
    let content = if meta.is_symlink() {
        fs::read_link(path)?.into_os_string().into_encoded_bytes()
    } else if meta.is_file() {
        digest_of(path)?.to_vec()
    } else {
        Vec::new()
    };
    Ok(Entry {
        mode: meta.mode(),
        size: if meta.is_dir() { 0 } else { meta.size() },
        mtime: mtime(&meta),
        content,
    })
}

pub fn mtime(meta: &Metadata) -> (i64, i64) {
    (meta.mtime(), meta.mtime_nsec())
}

/// The SHA-256 of a file, read in pieces.
pub fn digest_of(path: &Path) -> io::Result<[u8; 32]> {
    let mut file = fs::File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let count = io::Read::read(&mut file, &mut buffer)?;
        if count == 0 {
            return Ok(hash.finalize().into());
        }
        hash.update(&buffer[..count]);
    }
}

/// The SHA-256 of bytes.
pub fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

pub fn hex(digest: &[u8]) -> String {
    use std::fmt::Write;
    digest.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Lists how two trees differ, at most 20 lines.
pub fn differences(expected: &Tree, found: &Tree) -> Vec<String> {
    let missing = expected.keys().filter(|path| !found.contains_key(*path));
    let missing = missing.map(|path| format!("missing: {}", path.display()));
    let extra = found.keys().filter(|path| !expected.contains_key(*path));
    let extra = extra.map(|path| format!("not expected: {}", path.display()));
    let changed = expected.iter().filter_map(|(path, want)| {
        let have = found.get(path)?;
        (have != want).then(|| format!("differs: {}\n  want {want:?}\n  have {have:?}", path.display()))
    });
    missing.chain(extra).chain(changed).take(20).collect()
}

#[track_caller]
pub fn assert_same(expected: &Tree, found: &Tree) {
    let differences = differences(expected, found);
    assert!(
        differences.is_empty(),
        "the trees differ:\n{}",
        differences.join("\n")
    );
}

/// As [`assert_same`], but for the times of directories: a machine gives them those of the
/// changes it sees, which travel only when a program set them.
#[track_caller]
pub fn assert_same_but_dir_times(expected: &Tree, found: &Tree) {
    let without = |tree: &Tree| -> Tree {
        let mut tree = tree.clone();
        for entry in tree
            .values_mut()
            .filter(|entry| entry.mode & 0o170_000 == 0o040_000)
        {
            entry.mtime = (0, 0);
        }
        tree
    };
    assert_same(&without(expected), &without(found));
}
