//! Looking names up; an action-cache entry is shown only when every blob that it names is there.
//!
//! Bazel takes "no such file" for a miss and does the work again, but believes an entry that it finds: a
//! blob that the entry names and that is missing then fails the build. So the entries of a directory
//! with the preset `bazel` are looked at each time that they are looked up: the entry, and the tree
//! of each output directory, are read and parsed (once for each digest, see [`action`]), and every blob that they
//! name must be seen in the same cache.
//!
//! # Policy
//!
//! - A lookup of such an entry costs the request that its open would have cost; no other lookup costs one.
//! - What is no entry, cannot be read now, or is too long to be read is not shown: whether its blobs exist
//!   is not known.
//! - The kernel may not keep what it is told of such a name, because that does not depend on the name alone.
//! - An entry that is older than what this machine made of the blobs that it names is made again with them, and told again:
//!   the build that made them finds the entry and does not store it, and others may have deleted it
//!   ([`Tree::remake`](crate::namespace::tree::Tree::remake)). Then it is newer than its blobs, so that happens again only
//!   when this machine makes one of them again.
//! - A listing leaves out what is known not to be shown, and shows what could be said only after a request. That
//!   is no use of anything. A directory with nothing else in it is empty for rmdir(2), too: who deletes a cache
//!   must come to an end.

use std::{collections::HashMap, fs::File, io::Read, num::NonZeroUsize, sync::Arc, sync::atomic::Ordering};

use super::{Attr, Vfs, VfsError};
use crate::{
    base::{clock::Stamp, digest::Digest},
    namespace::{
        TreeError,
        action::{self, MAX_ACTION_BYTES, MAX_TREE_BYTES, Named},
        preset::Blobs,
        tree::Made,
    },
    store::{
        StoreError,
        blobs::Blob,
        error::chain,
        fetch::ReadCursor,
        rows::{Content, Durability, Ino, NodeKind, NodeRow},
    },
};

/// Entries whose names are remembered: a few dozen bytes for each blob that one names.
pub(super) const ENTRIES_REMEMBERED: NonZeroUsize = NonZeroUsize::new(1 << 13).expect("not zero");

/// Entries that name more than this are not remembered.
const MAX_REMEMBERED_BLOBS: usize = 256;

/// Blobs read for one lookup: an entry, and the trees that it names.
const MAX_READS: usize = 1024;

/// How long the kernel may keep the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Until it is told otherwise.
    Long,
    /// For this one time.
    Not,
}

/// What looking a name up came to.
#[derive(Debug)]
pub enum Lookup {
    /// What is there; `None` if nothing is.
    Known(Option<Attr>, Keep),
    /// It depends on bytes that are not here: go on with [`Vfs::lookup_fetching`].
    Fetch(Wanted),
}

/// A blob that is to be read before more can be said.
#[derive(Debug)]
pub struct Wanted {
    /// Who has it; for when it turns out to be gone.
    ino: Ino,
    blob: Arc<Blob>,
    is_tree: bool,
}

/// What an entry is looked at for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Use,
    List,
}

/// What could be said of an entry.
enum Verdict {
    Shown {
        /// When this machine made any of the blobs that it names, at the latest.
        made: Option<Stamp>,
    },
    Withheld,
    Wanted(Wanted),
}

/// What was read for one lookup, by digest; `None`: it is not what it should be.
type Brought = HashMap<Digest, Option<Arc<Named>>>;

impl Vfs {
    /// What is at a name.
    pub fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Lookup, VfsError> {
        self.used();
        // Asked for what a handle names that is not in the kernel's memory any more (`open_by_handle_at(2)`, NFS).
        match name {
            b"." => {
                let attr = Some(self.attr(parent)?).filter(|attr| attr.nlink > 0);
                return Ok(Lookup::Known(Some(attr.ok_or(VfsError::Gone)?), Keep::Long));
            }
            b".." => {
                let node = self.tree.node(parent)?.ok_or(TreeError::NotFound)?;
                let up = node.dir.as_ref().ok_or(TreeError::NotDirectory)?.up;
                return Ok(Lookup::Known(Some(self.attr(up)?), Keep::Long));
            }
            _ => {}
        }
        self.look(parent, name, &Brought::new())
    }

    /// As [`Vfs::lookup`], reading what is wanted; each blob for at most the read timeout.
    pub async fn lookup_fetching(
        &self,
        parent: Ino,
        name: &[u8],
        mut wanted: Wanted,
    ) -> Result<Option<Attr>, VfsError> {
        let mut brought = Brought::new();
        for _ in 0..MAX_READS {
            let (digest, size) = (wanted.blob.digest(), wanted.blob.size());
            let cursor = ReadCursor::default();
            let read = self
                .store
                .fetcher
                .read(&wanted.blob, &cursor, 0, size as usize)
                .await;
            match read {
                Ok(bytes) => {
                    brought.insert(digest, self.remember(digest, parse(&bytes, wanted.is_tree)));
                }
                Err(StoreError::Missing { .. }) => self.lose(wanted.ino, digest)?,
                Err(err) => {
                    tracing::warn!(blob = %digest, error = %chain(&err), "an action-cache entry counts as missing: what it names cannot be read now");
                    brought.insert(digest, None);
                }
            }
            match self.with_loaded(|vfs| vfs.look(parent, name, &brought)).await? {
                Lookup::Known(attr, _) => return Ok(attr),
                Lookup::Fetch(more) => wanted = more,
            }
        }
        Ok(None)
    }

    /// How long the kernel may keep what it is told of a name.
    pub(super) fn keep_of(&self, parent: Ino, name: &[u8]) -> Result<Keep, VfsError> {
        let rule = self.tree.name_rule(parent, name)?;
        Ok(if rule.action.is_some() {
            Keep::Not
        } else {
            Keep::Long
        })
    }

    /// Whether an action-cache entry at a name counts as missing; also when that cannot be said at once, because
    /// whoever makes one was told that there is none.
    pub(super) fn is_withheld(&self, parent: Ino, name: &[u8]) -> Result<bool, VfsError> {
        let Some(place) = self.tree.name_rule(parent, name)?.action else {
            return Ok(false);
        };
        let Some(node) = self.tree.lookup(parent, name)? else {
            return Ok(false);
        };
        match self.judge(parent, place, &node, &Brought::new(), Purpose::Use) {
            Ok(Verdict::Shown { .. }) => Ok(false),
            Ok(Verdict::Withheld | Verdict::Wanted(_)) => Ok(true),
            Err(err) if err.not_loaded().is_some() => Ok(true),
            Err(err) => Err(err),
        }
    }

    /// Whether what is at a name of `dir` for which `place` holds is an action-cache entry that is known not to be shown.
    ///
    /// What cannot be looked at now is shown: one bad entry must not hide the others, or keep who deletes them from its end.
    pub(super) fn is_known_withheld(&self, dir: Ino, place: Blobs, node: &NodeRow) -> bool {
        if node.kind != NodeKind::File {
            return false;
        }
        let verdict = self.judge(dir, place, node, &Brought::new(), Purpose::List);
        if let Err(err) = &verdict
            && err.not_loaded().is_none()
        {
            tracing::debug!(error = %chain(err), "an action-cache entry is listed that cannot be looked at now");
        }
        matches!(verdict, Ok(Verdict::Withheld))
    }

    fn look(&self, parent: Ino, name: &[u8], brought: &Brought) -> Result<Lookup, VfsError> {
        let Some(node) = self.tree.lookup(parent, name)? else {
            return Ok(Lookup::Known(None, Keep::Long));
        };
        let action = self.tree.name_rule(parent, name)?.action;
        let keep = if action.is_some() { Keep::Not } else { Keep::Long };
        if let Some(place) = action.filter(|_| node.kind == NodeKind::File) {
            match self.judge(parent, place, &node, brought, Purpose::Use)? {
                Verdict::Shown { made } => {
                    if let Some(made) = made {
                        self.remake(parent, name, made);
                    }
                }
                Verdict::Withheld => {
                    let withheld = &self.tree.presets().counters.withheld;
                    withheld.fetch_add(1, Ordering::Relaxed);
                    let name = String::from_utf8_lossy(name);
                    tracing::debug!(%name, "an action-cache entry is withheld: a blob that it names is missing");
                    return Ok(Lookup::Known(None, keep));
                }
                Verdict::Wanted(wanted) => return Ok(Lookup::Fetch(wanted)),
            }
        }
        if let Content::Blob(digest) = node.content {
            self.store.blobs.touch(&digest);
        }
        self.tree.touch(node.ino);
        Ok(Lookup::Known(Some(self.attr_of(&node)), keep))
    }

    /// Makes an entry again that is older than what it names. It is shown in any case.
    fn remake(&self, parent: Ino, name: &[u8], made: Stamp) {
        if self.options.read_only {
            return;
        }
        if let Err(err) = self.tree.remake(parent, name, made) {
            let name = String::from_utf8_lossy(name);
            tracing::warn!(%name, error = %chain(&err), "an action-cache entry is not told again; trying when it is used again");
        }
    }

    /// Whether every blob is there that the entry `node` in the directory `dir` names.
    fn judge(
        &self,
        dir: Ino,
        place: Blobs,
        node: &NodeRow,
        brought: &Brought,
        purpose: Purpose,
    ) -> Result<Verdict, VfsError> {
        let blobs = match place {
            Blobs::Beside => Some(dir),
            Blobs::Sharded => {
                let up = |dir| -> Result<Ino, TreeError> {
                    let node = self.tree.node(dir)?.ok_or(TreeError::NotFound)?;
                    Ok(node.dir.as_ref().ok_or(TreeError::NotDirectory)?.up)
                };
                let cas = self.tree.lookup(up(up(dir)?)?, b"cas")?;
                cas.filter(|cas| cas.kind == NodeKind::Dir).map(|cas| cas.ino)
            }
        };
        let mut last_made = None;
        let mut stored = |blob: &Digest| -> Result<_, VfsError> {
            // If nothing is there: an entry that names nothing is shown all the same.
            let Some(blobs) = blobs else { return Ok(None) };
            let found = self.stored(blobs, place, blob, purpose)?;
            Ok(found.map(|(node, made)| {
                last_made = last_made.max(made);
                node
            }))
        };
        let entry = match self.named(node, false, brought, purpose)? {
            Found::Named(entry) => entry,
            Found::Odd => return Ok(Verdict::Withheld),
            Found::Wanted(wanted) => return Ok(Verdict::Wanted(wanted)),
        };
        for blob in &entry.blobs {
            if stored(blob)?.is_none() {
                return Ok(Verdict::Withheld);
            }
        }
        for tree in &entry.trees {
            let Some(node) = stored(tree)? else {
                return Ok(Verdict::Withheld);
            };
            let tree = match self.named(&node, true, brought, purpose)? {
                Found::Named(tree) => tree,
                Found::Odd => return Ok(Verdict::Withheld),
                Found::Wanted(wanted) => return Ok(Verdict::Wanted(wanted)),
            };
            for blob in &tree.blobs {
                if stored(blob)?.is_none() {
                    return Ok(Verdict::Withheld);
                }
            }
        }
        Ok(Verdict::Shown { made: last_made })
    }

    /// The file that a blob is, below `dir`, and when this machine made it, if it did.
    fn stored(
        &self,
        dir: Ino,
        place: Blobs,
        blob: &Digest,
        purpose: Purpose,
    ) -> Result<Option<Made>, VfsError> {
        let name = blob.to_string();
        let dir = match place {
            Blobs::Beside => dir,
            Blobs::Sharded => match self.tree.lookup(dir, &name.as_bytes()[..2])? {
                Some(shard) if shard.kind == NodeKind::Dir => shard.ino,
                _ => return Ok(None),
            },
        };
        let found = self.tree.lookup_made(dir, name.as_bytes())?;
        let Some((node, made)) = found.filter(|(node, _)| node.kind == NodeKind::File) else {
            return Ok(None);
        };
        let is_there = match node.content {
            Content::Staging(_) => true,
            Content::Blob(digest) => {
                let row = self.store.ledger.blob(&digest)?;
                digest == *blob && row.is_none_or(|row| row.durability != Durability::Quarantined)
            }
            Content::None | Content::Lost(_) => false,
        };
        if is_there && purpose == Purpose::Use {
            // Whoever is shown the entry will want what it names.
            self.tree.touch(node.ino);
        }
        Ok(is_there.then_some((node, made)))
    }

    /// What an entry or a tree names, from what is known or here.
    fn named(
        &self,
        node: &NodeRow,
        is_tree: bool,
        brought: &Brought,
        purpose: Purpose,
    ) -> Result<Found, VfsError> {
        let most = if is_tree { MAX_TREE_BYTES } else { MAX_ACTION_BYTES };
        let digest = match node.content {
            Content::Staging(id) => {
                // Just made here. It may be sealed at any moment: then the next look finds the blob.
                let read = self.store.staging.open(id, false).map_err(VfsError::from);
                let bytes = read.and_then(|file| Ok(read_all(&file, most)?));
                return Ok(bytes
                    .ok()
                    .flatten()
                    .and_then(|bytes| parse(&bytes, is_tree))
                    .map_or(Found::Odd, |named| Found::Named(Arc::new(named))));
            }
            Content::Blob(digest) => digest,
            Content::None | Content::Lost(_) => return Ok(Found::Odd),
        };
        if digest == Digest::EMPTY {
            return Ok(Found::Named(Arc::default()));
        }
        if node.size > most {
            return Ok(Found::Odd);
        }
        let known = match brought.get(&digest) {
            Some(read) => Some(read.clone()),
            None => self.remembered(&digest).map(Some),
        };
        if let Some(known) = known {
            return Ok(known.map_or(Found::Odd, Found::Named));
        }
        let blob = match purpose {
            Purpose::List => self.store.blobs.lease(&digest, node.size)?,
            Purpose::Use => {
                if !node.places.is_empty() {
                    self.tree.tell_places(node.ino)?;
                }
                self.store.blobs.open(&digest, node.size)?
            }
        };
        let Some(blob) = blob else {
            return Ok(Found::Odd);
        };
        if !blob.is_whole() {
            return Ok(Found::Wanted(Wanted {
                ino: node.ino,
                blob,
                is_tree,
            }));
        }
        let bytes = blob.read(0, node.size as usize)?;
        let named = self.remember(digest, parse(&bytes, is_tree));
        Ok(named.map_or(Found::Odd, Found::Named))
    }

    fn remembered(&self, digest: &Digest) -> Option<Arc<Named>> {
        let mut named = self.named.lock().expect("a panic ends the process");
        named.get(digest).cloned()
    }

    fn remember(&self, digest: Digest, named: Option<Named>) -> Option<Arc<Named>> {
        let named = Arc::new(named?);
        if named.blobs.len() <= MAX_REMEMBERED_BLOBS {
            let mut remembered = self.named.lock().expect("a panic ends the process");
            remembered.put(digest, Arc::clone(&named));
        }
        Some(named)
    }
}

/// What could be found of an entry or a tree.
enum Found {
    Named(Arc<Named>),
    /// It is none, or too long.
    Odd,
    Wanted(Wanted),
}

fn parse(bytes: &[u8], is_tree: bool) -> Option<Named> {
    if is_tree {
        action::of_tree(bytes)
    } else {
        action::of_action(bytes)
    }
}

/// All bytes of a file; `None` if they are more than `most`.
fn read_all(file: &File, most: u64) -> std::io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= most).then_some(bytes))
}
