//! How two volumes differ, as a mount of each would show it.
//!
//! Pure: [`super::view`] reads, this compares. The times of directories are left out: they follow what
//! happens in them, and are not merged.

use std::{cmp::Ordering, collections::BTreeMap};

use super::{
    change::Entry,
    view::{Seen, Stacked},
};
use crate::store::rows::NodeKind;

/// What became of a path between two volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// Only the second has it.
    Added,
    /// Only the first has it.
    Removed,
    /// Other bytes, another target or another kind.
    Content,
    /// The same content with another mode, owner, time or extended attribute.
    Attributes,
}

/// Every path that `a` and `b` show differently, in the order of the paths' bytes.
#[must_use]
pub fn diff(a: &Stacked, b: &Stacked) -> Vec<(Vec<u8>, Difference)> {
    let (a, b) = (a.visible(), b.visible());
    let mut found = Vec::new();
    let (mut left, mut right) = (Walk::new(&a), Walk::new(&b));
    loop {
        let order = match (left.next, right.next) {
            (None, None) => return found,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((a, _)), Some((b, _))) => a.cmp(b),
        };
        match order {
            Ordering::Less => found.extend(left.take().map(|(path, _)| (path.to_vec(), Difference::Removed))),
            Ordering::Greater => {
                found.extend(right.take().map(|(path, _)| (path.to_vec(), Difference::Added)));
            }
            Ordering::Equal => {
                if let (Some((path, a)), Some((_, b))) = (left.take(), right.take())
                    && let Some(difference) = compare(a, b)
                {
                    found.push((path.to_vec(), difference));
                }
            }
        }
    }
}

type Step<'a> = (&'a [u8], Seen<'a>);

/// One of two sorted sides.
struct Walk<'a, 'm> {
    rest: std::collections::btree_map::Iter<'m, &'a [u8], Seen<'a>>,
    next: Option<Step<'a>>,
}

impl<'a, 'm> Walk<'a, 'm> {
    fn new(all: &'m BTreeMap<&'a [u8], Seen<'a>>) -> Self {
        let mut walk = Self {
            rest: all.iter(),
            next: None,
        };
        walk.take();
        walk
    }

    /// Takes the next path.
    fn take(&mut self) -> Option<Step<'a>> {
        let next = self.rest.next().map(|(path, seen)| (*path, *seen));
        std::mem::replace(&mut self.next, next)
    }
}

fn compare(a: Seen<'_>, b: Seen<'_>) -> Option<Difference> {
    let (a, b) = (Told::of(a), Told::of(b));
    if a.content != b.content {
        Some(Difference::Content)
    } else if a.attributes != b.attributes {
        Some(Difference::Attributes)
    } else {
        None
    }
}

type Content<'a> = (NodeKind, Option<[u8; 32]>, &'a [u8], u32);
type Attributes<'a> = (u32, u32, u32, i64, &'a [(Vec<u8>, Vec<u8>)]);

#[derive(PartialEq, Eq)]
struct Told<'a> {
    content: Content<'a>,
    attributes: Attributes<'a>,
}

impl<'a> Told<'a> {
    fn of(seen: Seen<'a>) -> Self {
        match seen {
            // What the tree gives a directory that nobody described.
            Seen::Kept => Self {
                content: (NodeKind::Dir, None, &[], 0),
                attributes: (0o755, 0, 0, 0, &[]),
            },
            Seen::Entry(entry) => Self::of_entry(entry),
        }
    }

    fn of_entry(entry: &'a Entry) -> Self {
        let digest = entry.blob.as_ref().map(|blob| *blob.digest.as_bytes());
        let mtime = if entry.kind == NodeKind::Dir {
            0
        } else {
            entry.mtime
        };
        Self {
            content: (entry.kind, digest, &entry.target, entry.rdev),
            attributes: (entry.perm, entry.uid, entry.gid, mtime, &entry.xattrs),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        base::clock::Stamp,
        namespace::{
            change::{EntryBlob, EntryChunks},
            view::{Register, Registers},
        },
    };

    fn file(content: &[u8], perm: u32) -> Entry {
        Entry {
            mtime: 7,
            blob: Some(EntryBlob {
                digest: crate::base::digest::Digest::of(content),
                size: content.len() as u64,
                chunks: EntryChunks::Single,
                places: Vec::new(),
            }),
            ..Entry::new(NodeKind::File, perm)
        }
    }

    fn dir(mtime: i64) -> Entry {
        Entry {
            kind: NodeKind::Dir,
            mtime,
            blob: None,
            ..file(b"", 0o755)
        }
    }

    fn volume(entries: &[(&str, Entry)]) -> Stacked {
        let register = |entry: &Entry| Register {
            stamp: Stamp::ZERO,
            entry: Some(entry.clone()),
            published_millis: 0,
        };
        let registers = entries
            .iter()
            .map(|(path, entry)| (path.as_bytes().to_vec(), register(entry)));
        Stacked::from(vec![Arc::new(registers.collect::<Registers>())])
    }

    #[test]
    fn every_difference_is_told_and_nothing_else() {
        let a = volume(&[
            ("dir", dir(1)),
            ("dir/same", file(b"same", 1)),
            ("gone", file(b"gone", 1)),
            ("kind", file(b"kind", 1)),
            ("mode", file(b"mode", 1)),
            ("written", file(b"before", 1)),
        ]);
        let b = volume(&[
            // Kept by its child: with the mode that its register has in the other one.
            ("dir/same", file(b"same", 1)),
            ("kind", dir(1)),
            ("mode", file(b"mode", 2)),
            ("new", file(b"new", 1)),
            ("written", file(b"after", 1)),
        ]);
        let told = |found: Vec<(Vec<u8>, Difference)>| -> Vec<(String, Difference)> {
            let text = |path| String::from_utf8(path).unwrap();
            found.into_iter().map(|(path, what)| (text(path), what)).collect()
        };
        let expected = [
            ("gone", Difference::Removed),
            ("kind", Difference::Content),
            ("mode", Difference::Attributes),
            ("new", Difference::Added),
            ("written", Difference::Content),
        ];
        assert_eq!(
            told(diff(&a, &b)),
            expected.map(|(path, what)| (path.to_owned(), what))
        );
        let swapped: Vec<Difference> = diff(&b, &a).into_iter().map(|(_, what)| what).collect();
        assert_eq!(swapped[0], Difference::Added);
        assert_eq!(swapped[3], Difference::Removed);
        assert_eq!(diff(&a, &a), []);
    }
}
