//! Which dirty blobs no file has any more, although they were never anywhere but here.
//!
//! A file that is deleted, or written anew, before it was uploaded leaves a blob that nobody will ever ask for. It would
//! take the time of an upload, and whoever waits for everything to be uploaded would wait for it.
//!
//! # Invariants
//!
//! - A blob is *followed* from the change that makes it known, if it is dirty then: nobody can have been told of it. One
//!   that is durable for a moment is followed no longer, nor is one that becomes dirty again because the bucket
//!   lost it: others may name it.
//! - It is *unwanted* when a file had it since then, and none has it now. A file is a row of a node, whatever its names
//!   are and are for: one without any lives until its last close.
//! - What another machine says of the same bytes is no reason to keep them: then the bucket has them.
//!
//! All of it is in memory: of what was made before the daemon was started nothing is known, and it is uploaded.

use std::collections::{HashMap, HashSet};

use super::memory::BlobStep;
use crate::{
    base::digest::Digest,
    store::{
        record::Redo,
        rows::{Change, Content, Ino},
    },
};

/// Blobs that are followed, and files that have them: some 200 bytes each. Of those beyond all are uploaded.
const MAX_FOLLOWED: usize = 64 << 10;

/// See the module.
#[derive(Debug, Default)]
pub struct Unwanted {
    followed: HashMap<Digest, HashSet<Ino>>,
    /// The same by file.
    files: HashMap<Ino, Digest>,
    /// Of those that are followed.
    left: HashSet<Digest>,
}

impl Unwanted {
    pub fn has(&self, digest: &Digest) -> bool {
        self.left.contains(digest)
    }

    pub fn all(&self) -> &HashSet<Digest> {
        &self.left
    }

    /// Takes in a record. `steps` has one for each change of a blob, in order.
    pub fn note(&mut self, redos: &[Redo], steps: &[BlobStep]) {
        let changes = || {
            redos.iter().filter_map(|redo| match redo {
                Redo::Change(change) => Some(change),
                Redo::Ceilings(_) | Redo::DoubtStaging(_) => None,
            })
        };
        // Whatever the order in the record: a file gets its blob in the same one.
        let blobs = changes().filter_map(|change| match change {
            Change::PutBlob(row) => Some(row.digest),
            Change::DropBlob(digest) => Some(*digest),
            _ => None,
        });
        for (digest, step) in blobs.zip(steps) {
            match &step.new {
                Some(new) if new.is_dirty() => {
                    if step.old.is_none() && self.followed.len() < MAX_FOLLOWED {
                        self.followed.entry(digest).or_default();
                    }
                }
                _ => self.leave(&digest),
            }
        }
        if self.followed.is_empty() {
            return;
        }
        for change in changes() {
            match change {
                Change::PutNode(row) => match row.content {
                    Content::Blob(digest) => self.put(row.ino, Some(digest)),
                    Content::None | Content::Staging(_) | Content::Lost(_) => self.put(row.ino, None),
                },
                Change::DropNode(ino) => self.put(*ino, None),
                _ => {}
            }
        }
    }

    /// Notes what a file has now.
    fn put(&mut self, ino: Ino, digest: Option<Digest>) {
        let digest = digest.filter(|digest| self.followed.contains_key(digest));
        let old = self.files.get(&ino).copied();
        if old == digest {
            return;
        }
        if let Some(old) = old {
            self.files.remove(&ino);
            if let Some(files) = self.followed.get_mut(&old) {
                files.remove(&ino);
                if files.is_empty() {
                    self.left.insert(old);
                }
            }
        }
        if let Some(digest) = digest {
            if self.files.len() >= MAX_FOLLOWED {
                self.leave(&digest);
                return;
            }
            self.files.insert(ino, digest);
            self.followed.entry(digest).or_default().insert(ino);
            self.left.remove(&digest);
        }
    }

    /// Follows a blob no longer.
    fn leave(&mut self, digest: &Digest) {
        self.left.remove(digest);
        for ino in self.followed.remove(digest).unwrap_or_default() {
            self.files.remove(&ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::{
        overlay::BlobEntry,
        rows::{BlobRow, Durability, NodeKind, NodeRow, Residency, StagingId},
    };

    const DURABLE: Durability = Durability::Durable { confirmed_millis: 7 };

    fn blob(durability: Durability) -> BlobRow {
        BlobRow {
            digest: digest(),
            size: 1,
            residency: Residency::Whole,
            durability,
            used_secs: 0,
            pinned: false,
            doubted: false,
        }
    }

    fn digest() -> Digest {
        Digest::of(b"x")
    }

    fn entry(durability: Durability) -> BlobEntry {
        BlobEntry {
            row: Arc::new(blob(durability)),
            dirty_since: 1,
            resident_bytes: 1,
        }
    }

    fn node(ino: u64, content: Content) -> Redo {
        let node = NodeRow {
            content,
            ..NodeRow::new(Ino(ino), NodeKind::File, 0)
        };
        Redo::Change(Change::PutNode(node))
    }

    fn has(ino: u64) -> Redo {
        node(ino, Content::Blob(digest()))
    }

    fn writes(ino: u64) -> Redo {
        node(ino, Content::Staging(StagingId(1)))
    }

    fn goes(ino: u64) -> Redo {
        Redo::Change(Change::DropNode(Ino(ino)))
    }

    /// Notes that the blob goes from one state to another, in a record with more.
    fn step(unwanted: &mut Unwanted, old: Option<Durability>, new: Durability, also: Vec<Redo>) {
        let step = BlobStep {
            old: old.map(entry),
            new: Some(entry(new)),
        };
        let put = Redo::Change(Change::PutBlob(blob(new)));
        unwanted.note(&[also, vec![put]].concat(), &[step]);
    }

    #[test]
    fn a_blob_is_unwanted_when_the_last_file_that_had_it_is_gone_or_has_another() {
        for last in [goes(3), writes(3)] {
            let mut unwanted = Unwanted::default();
            step(&mut unwanted, None, Durability::Dirty, vec![has(2)]);
            // The same bytes once more.
            step(
                &mut unwanted,
                Some(Durability::Dirty),
                Durability::Dirty,
                vec![has(3)],
            );
            unwanted.note(&[goes(2)], &[]);
            assert!(!unwanted.has(&digest()), "a file has it");
            unwanted.note(&[last], &[]);
            assert!(unwanted.has(&digest()));
            unwanted.note(&[has(4)], &[]);
            assert!(!unwanted.has(&digest()), "a file has it again");
        }
    }

    #[test]
    fn what_others_may_have_been_told_of_is_never_unwanted() {
        for before in [None, Some(DURABLE)] {
            let mut unwanted = Unwanted::default();
            step(&mut unwanted, before, Durability::Dirty, vec![has(2)]);
            if before.is_none() {
                step(&mut unwanted, Some(Durability::Dirty), DURABLE, Vec::new());
            }
            step(&mut unwanted, Some(DURABLE), Durability::Dirty, vec![has(3)]);
            unwanted.note(&[goes(2), goes(3)], &[]);
            assert!(!unwanted.has(&digest()));
            assert!(unwanted.followed.is_empty() && unwanted.files.is_empty());
        }
    }

    #[test]
    fn a_blob_that_no_file_had_yet_is_not_unwanted() {
        let mut unwanted = Unwanted::default();
        step(&mut unwanted, None, Durability::Dirty, Vec::new());
        unwanted.note(&[writes(2), goes(2)], &[]);
        assert!(!unwanted.has(&digest()));
    }
}
