//! Folds changes into a catalog: the last writer of each register wins, what is the same is kept.
//!
//! # How
//!
//! The old parts and the changes are merged from the last register to the first. So what a
//! directory holds is known before its own register is written, which says what is below it
//! ([`Below`]). A part in whose range nothing changed is kept unread; of one directory that
//! lies in such a part as well it is not known what is there, and the old answer stays.
//!
//! # Invariants
//!
//! - The result is a function of the set of registers, but for where it is cut into parts.
//! - Of every register with something below it there is an item, written or not.
//! - A tombstone goes only when it is older than asked for.
//!
//! # Cost
//!
//! One GET for each part in whose range something changed, one PUT for each that is new. Memory: a few
//! parts, directories whose own registers are not reached yet, and changed registers of hard links.

use std::collections::BTreeMap;

use super::{
    CatalogError,
    delta::Sorted,
    format::PartRef,
    order::{self, Key},
    read,
    write::{PartWriter, Sent},
};
use crate::{
    namespace::change::{Below, Item, Said},
    tier::SharedBucket,
};

/// Where and how is folded.
#[derive(Debug)]
pub struct FoldOptions<'a> {
    pub bucket: &'a SharedBucket,
    pub volume: &'a str,
    /// Tombstones that were written before go.
    pub keep_dead_from_millis: u64,
    /// A part with one that was written before this is read to rid it of them.
    pub stale_dead_millis: u64,
    /// About what a part has before compression.
    pub part_bytes: usize,
}

/// The parts of the new catalog.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Folded {
    pub parts: Vec<PartRef>,
    pub linked: Vec<PartRef>,
    pub sent: Sent,
}

/// Merges `changes` into the parts of an older catalog.
pub async fn fold(
    old: (&[PartRef], &[PartRef]),
    changes: Sorted,
    options: &FoldOptions<'_>,
) -> Result<Folded, CatalogError> {
    let mut fold = Fold::new(options, false);
    let mut changes = changes;
    fold.run(old.0, &mut Source::Changes(&mut changes)).await?;
    let links = std::mem::take(&mut fold.links);
    let (parts, sent) = fold.writer.finish().await?;
    let mut copies = Fold::new(options, true);
    copies.run(old.1, &mut Source::Links(links)).await?;
    let (linked, more) = copies.writer.finish().await?;
    Ok(Folded {
        parts,
        linked,
        sent: Sent {
            parts: sent.parts + more.parts,
            bytes: sent.bytes + more.bytes,
        },
    })
}

/// What is merged into the old parts.
enum Source<'a> {
    Changes(&'a mut Sorted),
    /// Copies of registers with a link id; `None`: it has none any more.
    Links(BTreeMap<Key, Option<Said>>),
}

impl Source<'_> {
    fn peek(&self) -> Option<&Key> {
        match self {
            Self::Changes(sorted) => sorted.peek(),
            Self::Links(links) => links.last_key_value().map(|(key, _)| key),
        }
    }

    fn has(&self, from: Option<&[u8]>) -> bool {
        self.peek().is_some_and(|key| is_from(key, from))
    }
}

fn is_from(key: &Key, from: Option<&[u8]>) -> bool {
    from.is_none_or(|from| order::compare(&key.0, from).is_ge())
}

/// What is known of the items of one directory.
#[derive(Debug)]
struct Dir {
    path: Vec<u8>,
    below: Below,
    changed: bool,
    /// All of its items were seen.
    whole: bool,
}

/// What a directory holds, for its own register.
#[derive(Clone, Copy, Debug)]
struct Mark {
    below: Below,
    whole: bool,
}

struct Fold<'a> {
    options: &'a FoldOptions<'a>,
    writer: PartWriter,
    /// Of directories whose own registers were not reached yet.
    marks: BTreeMap<Key, Mark>,
    dir: Option<Dir>,
    /// A directory of which a part was kept unread.
    unread: Option<Vec<u8>>,
    /// Changed registers that have a link id, or had one.
    links: BTreeMap<Key, Option<Said>>,
    /// It is the second list that is folded, which says nothing of what is below a path.
    copies: bool,
}

impl<'a> Fold<'a> {
    fn new(options: &'a FoldOptions<'a>, copies: bool) -> Self {
        Self {
            options,
            copies,
            writer: PartWriter::new(options.bucket, options.volume, options.part_bytes),
            marks: BTreeMap::new(),
            dir: None,
            unread: None,
            links: BTreeMap::new(),
        }
    }

    async fn run(&mut self, old: &[PartRef], source: &mut Source<'_>) -> Result<(), CatalogError> {
        for (number, part) in old.iter().enumerate().rev() {
            // What sorts before the first part belongs to it, and behind the last to that.
            let from = (number > 0).then_some(part.first.as_slice());
            let open = self.dir.as_ref().filter(|dir| dir.changed);
            let touched = source.has(from)
                || self
                    .marks
                    .last_key_value()
                    .is_some_and(|(key, _)| is_from(key, from))
                || open.is_some_and(|dir| from.is_none_or(|from| order::compare(&dir.path, from).is_ge()))
                || self.writer.is_small()
                || self.is_stale(part);
            if touched {
                let items = read::part(self.options.bucket.as_ref(), self.options.volume, part).await?;
                self.writer.note(part, &items);
                self.merge(items, source, from).await?;
            } else {
                self.leave_dir(false);
                self.unread = Some(order::split(&part.first).0.to_vec());
                self.writer.keep(part).await?;
            }
        }
        self.merge(Vec::new(), source, None).await
    }

    /// Whether a part has tombstones that are to go although nothing else in it changed.
    fn is_stale(&self, part: &PartRef) -> bool {
        part.oldest_dead_millis > 0 && part.oldest_dead_millis < self.options.stale_dead_millis
    }

    /// Merges the items of one part with all that sorts from `from` on.
    async fn merge(
        &mut self,
        mut items: Vec<Item>,
        source: &mut Source<'_>,
        from: Option<&[u8]>,
    ) -> Result<(), CatalogError> {
        loop {
            let next = items.last().map(|item| item.path.as_slice());
            let change = source.peek().filter(|key| is_from(key, from));
            let next = greater(next, change.map(|key| key.0.as_slice())).map(<[u8]>::to_vec);
            let mark = self.marks.last_key_value().map(|(key, _)| key);
            let mark = mark
                .filter(|mark| is_from(mark, from))
                .map(|key| key.0.as_slice());
            let path = greater(next.as_deref(), mark).map(<[u8]>::to_vec);
            if let Some(dir) = &self.dir {
                let is_over = match &path {
                    Some(path) => order::split(path).0 != dir.path,
                    // What it holds sorts behind its own register, so none of it lies further before.
                    None => from.is_none_or(|from| order::compare(&dir.path, from).is_ge()),
                };
                if is_over {
                    // Its own register may be what comes next.
                    self.leave_dir(true);
                    continue;
                }
            }
            let Some(path) = path else { return Ok(()) };
            self.enter(order::split(&path).0);
            let old = items.pop_if(|item| item.path == path);
            let mark = self.marks.remove(&Key(path.clone()));
            self.one(path, old, mark, source).await?;
        }
    }

    /// Merges what is known of one path.
    async fn one(
        &mut self,
        path: Vec<u8>,
        old: Option<Item>,
        mark: Option<Mark>,
        source: &mut Source<'_>,
    ) -> Result<(), CatalogError> {
        let key = Key(path);
        let here = source.peek() == Some(&key);
        let mut said = old.as_ref().and_then(|old| old.said.clone());
        match source {
            Source::Changes(sorted) if here => {
                if let Some((_, fresh)) = sorted.take().map_err(CatalogError::Spill)?
                    && said.as_ref().is_none_or(|said| said.stamp <= fresh.stamp)
                {
                    said = Some(fresh);
                }
            }
            Source::Links(links) if here => said = links.pop_last().and_then(|(_, said)| said),
            _ => {}
        }
        let keep_from = self.options.keep_dead_from_millis;
        said = said.filter(|said| said.entry.is_some() || said.stamp.made_millis() >= keep_from);
        let known = old.as_ref().map_or(Below::Nothing, |old| old.below);
        let below = match mark {
            None => known,
            Some(mark) if mark.whole => mark.below,
            Some(mark) => mark.below.max(known),
        };
        let new = (said.is_some() || below != Below::Nothing).then_some(Item {
            path: key.0.clone(),
            said,
            below,
        });
        if new != old {
            if let Some(dir) = &mut self.dir {
                dir.changed = true;
            }
            let is_linked = |item: &Option<Item>| {
                let entry = item.as_ref().and_then(Item::entry);
                entry.is_some_and(|entry| entry.link_id.is_some())
            };
            if matches!(source, Source::Changes(_)) && (is_linked(&old) || is_linked(&new)) {
                let said = new.as_ref().filter(|_| is_linked(&new));
                self.links.insert(key, said.and_then(|new| new.said.clone()));
            }
        }
        let Some(new) = new else { return Ok(()) };
        if let Some(dir) = &mut self.dir {
            let shown = if new.is_live() {
                Below::Live
            } else if new.said.is_some() {
                Below::Dead
            } else {
                Below::Nothing
            };
            dir.below = dir.below.max(shown).max(new.below);
        }
        self.writer.push(&new).await
    }

    /// Comes to the items of a directory.
    fn enter(&mut self, path: &[u8]) {
        if self.dir.as_ref().is_some_and(|dir| dir.path == path) {
            return;
        }
        let whole = self.unread.take().is_none_or(|unread| unread != path);
        self.dir = Some(Dir {
            path: path.to_vec(),
            below: Below::Nothing,
            changed: false,
            whole,
        });
    }

    /// Notes what a directory holds for its own register, if that may have changed.
    fn leave_dir(&mut self, whole: bool) {
        let Some(dir) = self.dir.take() else { return };
        if dir.changed && !dir.path.is_empty() && !self.copies {
            let mark = Mark {
                below: dir.below,
                whole: whole && dir.whole,
            };
            self.marks.insert(Key(dir.path), mark);
        }
    }
}

fn greater<'a>(a: Option<&'a [u8]>, b: Option<&'a [u8]>) -> Option<&'a [u8]> {
    match (a, b) {
        (Some(a), Some(b)) if order::compare(a, b).is_lt() => Some(b),
        (Some(a), _) => Some(a),
        (None, b) => b,
    }
}
