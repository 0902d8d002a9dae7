//! Bringing registers of a catalog among the rows, a directory at a time.
//!
//! # Invariants
//!
//! - A directory counts as loaded in a layer only with the commit that has the last of its
//!   registers; a crash before costs a second loading, and merging is idempotent.
//! - A directory below it is marked as unloaded in the commit that has its own register.
//! - Nobody is told of names that come: of a directory that is not loaded nobody can know any.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
};

use super::{
    Applied, Edit, Notice, Tree,
    apply::{apply_one, merge_at},
    not_loaded,
};
use crate::{
    base::clock::Stamp,
    namespace::{
        TreeError,
        change::{Below, Entry, EntryChunks, Item},
        error::NotLoaded,
    },
    store::{
        pack,
        rows::{Change, Content, DirState, Ino, NameRow, NameState, NodeKind, NodeRow, TreeLayer, Unloaded},
    },
};

/// Registers that are loaded while the tree is locked once: bounds how long a program waits.
const BATCH: usize = 1024;

/// Whether what is below some dead name of a directory may be alive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Undecided(bool);

/// How far registers of a directory reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// There are more behind them.
    Middle,
    /// They are the last; with what was said of those before.
    End(Undecided),
}

impl Undecided {
    /// Of both, what came before and what comes now.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 || other.0)
    }
}

impl Tree {
    /// Fails when a directory is not loaded. One atomic read while there is no catalog.
    pub(super) fn need(&self, dir: Ino) -> Result<(), TreeError> {
        if self.has_catalogs() && self.unloaded(dir)?.is_any() {
            return Err(not_loaded(dir));
        }
        Ok(())
    }

    /// Fails when it cannot be told yet what is seen at a name.
    pub(super) fn need_name(&self, parent: Ino, name: &[u8]) -> Result<(), TreeError> {
        if !self.has_catalogs() {
            return Ok(());
        }
        self.need(parent)?;
        if let Some(row) = self.ledger.name(parent, name)? {
            self.visible(&row)?;
        }
        Ok(())
    }

    /// Fails when a catalog may have something that keeps a directory alive, or something that hides
    /// what was told of it since and keeps it alive now.
    pub(super) fn need_to_know(&self, dir: &NodeRow) -> Result<(), TreeError> {
        let Some(state) = dir.dir.as_ref().filter(|_| self.has_catalogs()) else {
            return Ok(());
        };
        if state.visible_children > 0 {
            return self.need_to_see_one(dir.ino);
        }
        if state.unloaded.live & state.unloaded.layers != 0 {
            return Err(not_loaded(dir.ino));
        }
        if state.unloaded.live != 0 {
            for below in self.dirs_in(dir.ino)? {
                if let Some(below) = self.ledger.node(below)? {
                    self.need_to_know(&below)?;
                }
            }
        }
        Ok(())
    }

    /// Fails when it cannot be told yet that one of the children which a directory counts is there.
    fn need_to_see_one(&self, dir: Ino) -> Result<(), TreeError> {
        self.need(dir)?;
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.ledger.names_in(dir, after.as_deref(), 32)?;
            for row in &page {
                if self.visible(row)?.is_some() {
                    return Ok(());
                }
            }
            match page.last() {
                Some(last) => after = Some(last.name.clone()),
                None => return Ok(()),
            }
        }
    }

    /// Fails when a directory or any below it is not loaded.
    pub(super) fn need_below(&self, top: Ino) -> Result<(), TreeError> {
        if !self.has_catalogs() {
            return Ok(());
        }
        let mut dirs = vec![top];
        while let Some(dir) = dirs.pop() {
            if self.unloaded(dir)?.is_any() {
                return Err(TreeError::NotLoaded(NotLoaded {
                    dir: top,
                    below: true,
                }));
            }
            dirs.extend(self.dirs_in(dir)?);
        }
        Ok(())
    }

    /// Whether some directory may be unloaded.
    pub fn has_catalogs(&self) -> bool {
        self.has_catalogs.load(Ordering::Relaxed)
    }

    /// Notes that directories may be unloaded, by what an earlier run of the daemon left.
    pub fn expect_catalogs(&self) {
        self.has_catalogs.store(true, Ordering::Relaxed);
    }

    /// In which layers a directory is not loaded.
    pub fn unloaded(&self, dir: Ino) -> Result<Unloaded, TreeError> {
        let node = self.ledger.node(dir)?;
        Ok(node
            .and_then(|node| Some(node.dir.as_ref()?.unloaded))
            .unwrap_or_default())
    }

    /// Directories that keep registers right below `dir`, seen or not.
    pub fn dirs_in(&self, dir: Ino) -> Result<Vec<Ino>, TreeError> {
        let mut dirs = Vec::new();
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.ledger.names_in(dir, after.as_deref(), 1000)?;
            dirs.extend(page.iter().filter_map(|row| row.dir));
            match page.last() {
                Some(last) => after = Some(last.name.clone()),
                None => return Ok(dirs),
            }
        }
    }

    /// The directory that keeps the registers below a path, seen or not.
    pub fn dir_at(&self, path: &[u8]) -> Result<Option<Ino>, TreeError> {
        let mut at = Ino::ROOT;
        for name in path.split(|&byte| byte == b'/').filter(|name| !name.is_empty()) {
            match self.ledger.name(at, name)?.and_then(|row| row.dir) {
                Some(dir) => at = dir,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// Has the catalogs of some layers say what is there, and commits `also` with that.
    pub fn attach(&self, layers: &[TreeLayer], also: Vec<Change>) -> Result<(), TreeError> {
        let mut in_use = self.lock();
        let mut edit = Edit::new(self, &mut in_use);
        let root = edit.node_mut(Ino::ROOT)?.dir.as_mut();
        let unloaded = &mut root.ok_or(TreeError::NotDirectory)?.unloaded;
        for layer in layers {
            unloaded.add(*layer, true);
        }
        edit.also(also);
        self.expect_catalogs();
        edit.commit()?;
        Ok(())
    }

    /// Merges registers of `dir` that the catalog of `layer` has, in the order of their names;
    /// with the last of them ([`Reach::End`]) the directory is loaded.
    ///
    /// Of a directory that is loaded by now nothing is merged. Returns also what to say at the end.
    pub fn load(
        &self,
        layer: TreeLayer,
        dir: Ino,
        items: &[Item],
        reach: Reach,
    ) -> Result<(Applied, Undecided), TreeError> {
        let mut undecided = match reach {
            Reach::Middle => Undecided::default(),
            Reach::End(before) => before,
        };
        let mut applied = Applied::default();
        let mut batches = items.chunks(BATCH).peekable();
        loop {
            let batch = batches.next().unwrap_or_default();
            let is_last = batches.peek().is_none();
            let mut in_use = self.lock();
            if !self.unloaded(dir)?.is_in(layer) {
                return Ok((applied, undecided));
            }
            let mut edit = Edit::unasked(self, &mut in_use);
            edit.is_load = true;
            undecided.0 |= Batch::new(&mut edit, layer, dir).merge(batch)?.0;
            if is_last && matches!(reach, Reach::End(_)) {
                let node = edit.node_mut(dir)?;
                let state = node.dir.as_mut().ok_or(TreeError::NotDirectory)?;
                state.unloaded.remove(layer, undecided.0);
            }
            let (discarded, _) = edit.commit()?;
            applied.discarded.extend(discarded);
            if is_last {
                break;
            }
        }
        // The kernel was told that the number of its links is not known.
        applied.notices.push(Notice::Attributes { ino: dir });
        Ok((applied, undecided))
    }

    /// Merges registers of a catalog wherever their directories are, loaded or not.
    pub fn load_anywhere(&self, layer: TreeLayer, items: Vec<Item>) -> Result<Applied, TreeError> {
        let mut applied = Applied::default();
        let mut items = items.into_iter().filter_map(Item::into_change).peekable();
        while items.peek().is_some() {
            let mut in_use = self.lock();
            let mut edit = Edit::unasked(self, &mut in_use);
            edit.is_load = true;
            for change in items.by_ref().take(BATCH) {
                let told = edit.places_told_by(change.entry.as_ref())?;
                edit.also(told);
                apply_one(&mut edit, layer, change)?;
            }
            let (discarded, notices) = edit.commit()?;
            applied.discarded.extend(discarded);
            applied.notices.extend(notices);
        }
        Ok(applied)
    }
}

/// Registers of one directory that are merged as one.
struct Batch<'a, 'b> {
    edit: &'a mut Edit<'b>,
    layer: TreeLayer,
    dir: Ino,
    /// What came that is seen, and how many of them are directories.
    came: u64,
    came_dirs: u64,
    first: Option<(Ino, bool)>,
    newest: Stamp,
    undecided: Undecided,
}

impl<'a, 'b> Batch<'a, 'b> {
    fn new(edit: &'a mut Edit<'b>, layer: TreeLayer, dir: Ino) -> Self {
        Self {
            edit,
            layer,
            dir,
            came: 0,
            came_dirs: 0,
            first: None,
            newest: Stamp::ZERO,
            undecided: Undecided::default(),
        }
    }

    fn merge(mut self, items: &[Item]) -> Result<Undecided, TreeError> {
        let known = self.known(items)?;
        for item in items {
            let name = name_of(item);
            if let Some(said) = &item.said {
                self.newest = self.newest.max(said.stamp);
            }
            if known.contains_key(name) || !self.put(name, item)? {
                let told = self.edit.places_told_by(item.entry())?;
                self.edit.also(told);
                self.merge_one(name, item)?;
            }
        }
        self.edit.observe(self.newest);
        let Some(first) = self.first else {
            return Ok(self.undecided);
        };
        // The first that is seen may bring a dead directory back; the others only count.
        self.edit.adjust(self.dir, None, Some(first))?;
        let node = self.edit.node_mut(self.dir)?;
        let state = node.dir.as_mut().ok_or(TreeError::NotDirectory)?;
        state.visible_children += self.came - 1;
        state.subdirs += self.came_dirs - u64::from(first.1);
        node.nlink = u32::try_from(2 + state.subdirs).unwrap_or(u32::MAX);
        Ok(self.undecided)
    }

    /// Registers that are among the rows already, from the first item to the last.
    fn known(&self, items: &[Item]) -> Result<HashMap<Vec<u8>, Arc<NameRow>>, TreeError> {
        let mut known = HashMap::new();
        let (Some(first), Some(last)) = (items.first(), items.last()) else {
            return Ok(known);
        };
        let (first, last) = (name_of(first), name_of(last));
        if let Some(row) = self.edit.name(self.dir, first)? {
            known.insert(first.to_vec(), row);
        }
        let mut after = first.to_vec();
        while after.as_slice() < last {
            let page = self.edit.names_behind(self.dir, &after)?;
            let Some(end) = page.last() else { break };
            after.clone_from(&end.name);
            known.extend(page.into_iter().map(|row| (row.name.clone(), row)));
        }
        Ok(known)
    }

    /// Merges a register by the laws, and marks what is below it.
    fn merge_one(&mut self, name: &[u8], item: &Item) -> Result<(), TreeError> {
        if let Some(said) = item.said.clone() {
            merge_at(self.edit, self.layer, (self.dir, name), said.stamp, said.entry)?;
        }
        if item.below != Below::Nothing {
            let below = self.edit.dir_below(self.dir, name)?;
            let state = self.edit.node_mut(below)?.dir.as_mut();
            let unloaded = &mut state.ok_or(TreeError::NotDirectory)?.unloaded;
            unloaded.add(self.layer, item.below == Below::Live);
            self.undecided.0 |= item.below == Below::Live;
        }
        Ok(())
    }

    /// Puts a register that nothing is known of; false when it is not of the usual kind.
    fn put(&mut self, name: &[u8], item: &Item) -> Result<bool, TreeError> {
        let Some(said) = &item.said else { return Ok(false) };
        if self.edit.is_misnamed(self.dir, name, said.entry.as_ref())? {
            return Ok(item.below == Below::Nothing);
        }
        let (state, dir) = match &said.entry {
            None if item.below == Below::Nothing => (NameState::Dead, None),
            Some(entry) if entry.kind == NodeKind::Dir => {
                let ino = self.put_node(entry, Some((name, item.below)));
                (NameState::Live(ino), Some(ino))
            }
            Some(entry) if entry.link_id.is_none() && item.below == Below::Nothing => {
                (NameState::Live(self.put_node(entry, None)), None)
            }
            None | Some(_) => return Ok(false),
        };
        if let NameState::Live(ino) = state {
            self.came += 1;
            self.came_dirs += u64::from(dir.is_some());
            self.first.get_or_insert((ino, dir.is_some()));
        }
        self.edit.also([Change::PutName(NameRow {
            parent: self.dir,
            name: name.to_vec(),
            layer: self.layer,
            stamp: said.stamp,
            state,
            dir,
            pending: None,
        })]);
        Ok(true)
    }

    fn put_node(&mut self, entry: &Entry, dir: Option<(&[u8], Below)>) -> Ino {
        let ino = self.edit.next_ino();
        let content = match &entry.blob {
            None => Content::None,
            Some(blob) => Content::Blob(blob.digest),
        };
        if let Some(blob) = &entry.blob
            && let EntryChunks::Inline(list) = &blob.chunks
        {
            self.edit.also([Change::PutManifest(blob.digest, list.clone())]);
        }
        let row = NodeRow {
            perm: entry.perm,
            uid: entry.uid,
            gid: entry.gid,
            rdev: entry.rdev,
            size: entry
                .blob
                .as_ref()
                .map_or(entry.target.len() as u64, |blob| blob.size),
            atime: entry.mtime,
            mtime: entry.mtime,
            nlink: if dir.is_some() { 2 } else { 1 },
            content,
            target: entry.target.clone(),
            xattrs: entry.xattrs.clone(),
            places: entry
                .blob
                .as_ref()
                .map_or_else(Vec::new, |blob| pack::encode_places(&blob.places)),
            dir: dir.map(|(name, below)| {
                let mut unloaded = Unloaded::default();
                if below != Below::Nothing {
                    unloaded.add(self.layer, below == Below::Live);
                }
                DirState {
                    up: self.dir,
                    name: name.to_vec(),
                    visible_children: 0,
                    subdirs: 0,
                    unloaded,
                }
            }),
            ..NodeRow::new(ino, entry.kind, self.edit.now)
        };
        self.edit.also([Change::PutNode(row)]);
        ino
    }
}

fn name_of(item: &Item) -> &[u8] {
    let at = item.path.iter().rposition(|&byte| byte == b'/');
    at.map_or(&item.path, |at| &item.path[at + 1..])
}
