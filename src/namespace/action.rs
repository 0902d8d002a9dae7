//! Which blobs an action-cache entry names.
//!
//! The entry is an `ActionResult` of the Remote Execution API, version 2, and names further blobs through the
//! `Tree` of each output directory. Only the fields that name blobs are read; what else is there is skipped,
//! as protocol buffers want it. Digests are those of SHA-256: an entry of another function is not one here.
//!
//! ```text
//! ActionResult     2 repeated OutputFile  3 repeated OutputDirectory  6 stdout Digest  8 stderr Digest
//! OutputFile       2 Digest
//! OutputDirectory  3 tree Digest
//! Tree             1 root Directory  2 repeated children Directory
//! Directory        1 repeated FileNode
//! FileNode         2 Digest
//! Digest           1 hash string, lowercase hexadecimal  2 size int64
//! ```
//!
//! The empty blob exists always, and is never asked for.

use prost::Message;

use crate::base::digest::Digest;

/// Longer entries are not read: the largest that are known name some ten thousand files.
pub const MAX_ACTION_BYTES: u64 = 16 << 20;

/// The same for the tree of an output directory.
pub const MAX_TREE_BYTES: u64 = 64 << 20;

/// What an entry, or a tree, names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// Each once, sorted.
    pub blobs: Vec<Digest>,
    /// Those of them that are trees, which name further blobs.
    pub trees: Vec<Digest>,
}

#[derive(Clone, PartialEq, Message)]
struct ActionResult {
    #[prost(message, repeated, tag = "2")]
    files: Vec<DigestAt2>,
    #[prost(message, repeated, tag = "3")]
    directories: Vec<OutputDirectory>,
    #[prost(message, optional, tag = "6")]
    stdout: Option<BlobDigest>,
    #[prost(message, optional, tag = "8")]
    stderr: Option<BlobDigest>,
}

/// An `OutputFile` or a `FileNode`.
#[derive(Clone, PartialEq, Message)]
struct DigestAt2 {
    #[prost(message, optional, tag = "2")]
    digest: Option<BlobDigest>,
}

#[derive(Clone, PartialEq, Message)]
struct OutputDirectory {
    #[prost(message, optional, tag = "3")]
    tree: Option<BlobDigest>,
}

#[derive(Clone, PartialEq, Message)]
struct Tree {
    #[prost(message, optional, tag = "1")]
    root: Option<Directory>,
    #[prost(message, repeated, tag = "2")]
    children: Vec<Directory>,
}

#[derive(Clone, PartialEq, Message)]
struct Directory {
    #[prost(message, repeated, tag = "1")]
    files: Vec<DigestAt2>,
}

#[derive(Clone, PartialEq, Message)]
struct BlobDigest {
    #[prost(string, tag = "1")]
    hash: String,
    #[prost(int64, tag = "2")]
    size_bytes: i64,
}

/// Reads an action-cache entry; `None` if it is none.
#[must_use]
pub fn of_action(bytes: &[u8]) -> Option<Named> {
    let action = ActionResult::decode(bytes).ok()?;
    let mut named = Named::default();
    for file in &action.files {
        // A file without a digest is no output.
        named.blobs.extend(blob(file.digest.as_ref()?)?);
    }
    for directory in &action.directories {
        let tree = blob(directory.tree.as_ref()?)?;
        named.blobs.extend(tree);
        named.trees.extend(tree);
    }
    for log in [&action.stdout, &action.stderr].into_iter().flatten() {
        named.blobs.extend(blob(log)?);
    }
    Some(named.sorted())
}

/// Reads the tree of an output directory; `None` if it is none.
#[must_use]
pub fn of_tree(bytes: &[u8]) -> Option<Named> {
    let tree = Tree::decode(bytes).ok()?;
    let mut named = Named::default();
    for directory in tree.root.iter().chain(&tree.children) {
        for file in &directory.files {
            named.blobs.extend(blob(file.digest.as_ref()?)?);
        }
    }
    Some(named.sorted())
}

/// `None`: it is no digest; `Some(None)`: that of the empty blob.
#[expect(clippy::option_option, reason = "no digest and no bytes are two things")]
fn blob(digest: &BlobDigest) -> Option<Option<Digest>> {
    if digest.hash.is_empty() && digest.size_bytes == 0 {
        return Some(None);
    }
    let parsed: Digest = digest.hash.parse().ok()?;
    Some((digest.size_bytes != 0 && parsed != Digest::EMPTY).then_some(parsed))
}

impl Named {
    fn sorted(mut self) -> Self {
        for list in [&mut self.blobs, &mut self.trees] {
            list.sort_unstable();
            list.dedup();
            list.shrink_to_fit();
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field that holds bytes.
    fn field(tag: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![tag << 3 | 2];
        prost::encoding::encode_varint(bytes.len() as u64, &mut out);
        out.extend_from_slice(bytes);
        out
    }

    fn digest(of: &Digest, size: u8) -> Vec<u8> {
        [field(1, of.to_string().as_bytes()), vec![2 << 3, size]].concat()
    }

    fn file(path: &str, of: &Digest, size: u8) -> Vec<u8> {
        // Path, digest, is_executable.
        [
            field(1, path.as_bytes()),
            field(2, &digest(of, size)),
            vec![4 << 3, 1],
        ]
        .concat()
    }

    #[test]
    fn every_blob_that_an_entry_names_is_found() {
        let blob = |text: &str| Digest::of(text.as_bytes());
        let bytes = [
            field(2, &file("out/a", &blob("a"), 1)),
            field(2, &file("out/again", &blob("a"), 1)),
            field(2, &file("out/empty", &Digest::EMPTY, 0)),
            field(
                3,
                &[field(1, b"dir"), field(3, &digest(&blob("tree"), 9))].concat(),
            ),
            vec![4 << 3, 0],
            field(6, &digest(&blob("stdout"), 3)),
            field(8, &digest(&blob("stderr"), 3)),
            field(9, b"\x0a\x06worker"),
            field(12, b"\x0a\x04link\x12\x02to"),
        ]
        .concat();
        let mut blobs = ["a", "tree", "stdout", "stderr"].map(blob).to_vec();
        blobs.sort_unstable();
        let named = of_action(&bytes).unwrap();
        assert_eq!(named.blobs, blobs);
        assert_eq!(named.trees, [blob("tree")]);
    }

    #[test]
    fn every_file_of_a_tree_is_found() {
        let blob = |text: &str| Digest::of(text.as_bytes());
        let directory = |name: &str| field(1, &file(name, &blob(name), 1));
        let bytes = [
            field(1, &directory("root")),
            field(2, &directory("child")),
            field(2, &directory("other")),
        ]
        .concat();
        let mut blobs = ["root", "child", "other"].map(blob).to_vec();
        blobs.sort_unstable();
        assert_eq!(of_tree(&bytes).unwrap().blobs, blobs);
    }

    #[test]
    fn what_is_no_entry_is_not_read_as_one() {
        assert_eq!(of_action(b""), Some(Named::default()));
        for bytes in [
            &b"some text that is none"[..],
            // A file without a digest, and one with another kind of digest.
            &field(2, &field(1, b"out/a")),
            &field(
                2,
                &field(2, &[field(1, b"da39a3ee5e6b4b0d"), vec![2 << 3, 1]].concat()),
            ),
            &field(2, &file("cut short", &Digest::of(b"x"), 1))[..20],
        ] {
            assert_eq!(of_action(bytes), None, "{bytes:?}");
        }
    }
}
