//! The order of registers in a catalog: directory by directory, depth first.
//!
//! Registers are sorted by the path of their directory, name by name, then by their own name. So
//! those of one directory lie together, those below it follow it, and whoever walks the tree in
//! the order of the names meets the directories in this order.

use std::cmp::Ordering;

/// The directory of a path and the name in it; the root's path is empty.
#[must_use]
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// Compares paths of directories name by name: what is below a directory comes right behind it.
#[must_use]
pub fn compare_dirs(a: &[u8], b: &[u8]) -> Ordering {
    // No name has a zero byte, so a `/` that counts as one ends a name before any longer one.
    let ranked = |byte: &u8| if *byte == b'/' { 0 } else { *byte };
    let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    a[same..].iter().map(ranked).cmp(b[same..].iter().map(ranked))
}

/// Compares registers by their paths.
#[must_use]
pub fn compare(a: &[u8], b: &[u8]) -> Ordering {
    let ((a_dir, a_name), (b_dir, b_name)) = (split(a), split(b));
    compare_dirs(a_dir, b_dir).then_with(|| a_name.cmp(b_name))
}

/// A path that sorts as registers do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key(pub Vec<u8>);

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        compare(&self.0, &other.0)
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_lie_together_and_before_what_is_below_them() {
        let sorted: Vec<&[u8]> = vec![
            b"a", b"a!", b"b", b"a/x", b"a/y", b"a/x/1", b"a/x/1/2", b"a/x!/1", b"a!/x", b"b/a",
        ];
        let mut keys: Vec<Key> = sorted.iter().rev().map(|path| Key(path.to_vec())).collect();
        keys.sort();
        let keys: Vec<_> = keys.iter().map(|key| key.0.as_slice()).collect();
        assert_eq!(keys, sorted);
        assert_eq!(split(b"a/b/c"), (&b"a/b"[..], &b"c"[..]));
        assert_eq!(split(b"c"), (&b""[..], &b"c"[..]));
    }
}
