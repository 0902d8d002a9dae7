//! One change of the tree: rows read through, rows changed, one commit.
//!
//! Whoever changes a register calls [`Edit::set_name`], which alone keeps what
//! follows from it:
//!
//! # Invariants
//!
//! - `nlink` of a file is the number of live registers that name it.
//! - `visible_children` and `subdirs` of a directory count what a user sees in it.
//! - A file that nothing names and nobody has open loses its row a moment later ([`Tree::sweep`]).

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::Instant,
};

use super::{InUse, Notice, Tree, encode_clock, seen_at, span::Span, wall_nanos};
use crate::{
    base::clock::Stamp,
    namespace::{TreeError, preset::Preset},
    store::{
        ledger::Ledger,
        rows::{
            Change, Content, DirState, Ino, LinkId, NameRow, NameState, NodeKind, NodeRow, Place, StagingId,
            TreeLayer, Unloaded,
        },
    },
};

/// What a register shows: which node, and whether it is a directory.
type Seen = Option<(Ino, bool)>;

pub(super) struct Edit<'a> {
    tree: &'a Tree,
    pub(super) in_use: &'a mut InUse,
    /// Nanoseconds since 1970: the time that changed nodes get.
    pub(super) now: i64,
    nodes: HashMap<Ino, Option<Arc<NodeRow>>>,
    /// By parent.
    pub(super) names: HashMap<Ino, HashMap<Vec<u8>, Option<Arc<NameRow>>>>,
    pub(super) spans: HashMap<Ino, Span>,
    extra: Vec<Change>,
    stamped: Option<Stamp>,
    /// The change made is the first close of a new file: it takes its place now, not at its
    /// creation, but before what was made from this place on. See [`super::places`].
    pub(super) first_close: Option<u64>,
    /// Staging files that no file needs any more.
    discarded: Vec<StagingId>,
    /// Files that lost their last name.
    pub(super) nameless: Vec<Ino>,
    /// Of what the kernel cannot know by itself: changes that no program here asked for.
    notices: Option<Vec<Notice>>,
    /// Registers come from a catalog: that they are new here is no change of a directory.
    pub(super) is_load: bool,
    /// Directories that came or went with their first or last child, whoever asked for that.
    pub(super) implied: Vec<Notice>,
    /// Files that are not sealed and got a name that others are told of.
    pub(super) unsealed: Vec<Ino>,
    /// Directories in which a tool was recognised.
    pub(super) recognised: Vec<(Ino, Preset)>,
    /// A directory has another path now.
    pub(super) moved: Vec<Ino>,
    /// Directories that list something else now.
    relisted: Vec<Ino>,
}

impl<'a> Edit<'a> {
    /// An edit that a program's request makes.
    pub(super) fn new(tree: &'a Tree, in_use: &'a mut InUse) -> Self {
        Self {
            tree,
            in_use,
            now: wall_nanos(),
            nodes: HashMap::new(),
            names: HashMap::new(),
            spans: HashMap::new(),
            extra: Vec::new(),
            stamped: None,
            first_close: None,
            discarded: Vec::new(),
            nameless: Vec::new(),
            notices: None,
            is_load: false,
            implied: Vec::new(),
            unsealed: Vec::new(),
            recognised: Vec::new(),
            moved: Vec::new(),
            relisted: Vec::new(),
        }
    }

    /// An edit behind the kernel's back: it has to be told.
    pub(super) fn unasked(tree: &'a Tree, in_use: &'a mut InUse) -> Self {
        Self {
            notices: Some(Vec::new()),
            ..Self::new(tree, in_use)
        }
    }

    /// From here on the kernel has to be told.
    pub(super) fn tell(&mut self) {
        self.notices.get_or_insert_default();
    }

    pub(super) fn notice(&mut self, notice: impl FnOnce() -> Notice) {
        if let Some(notices) = &mut self.notices {
            notices.push(notice());
        }
    }

    pub(super) fn tree(&self) -> &'a Tree {
        self.tree
    }

    pub(super) fn node(&self, ino: Ino) -> Result<Option<Arc<NodeRow>>, TreeError> {
        match self.nodes.get(&ino) {
            Some(changed) => Ok(changed.clone()),
            None => Ok(self.tree.ledger.node(ino)?),
        }
    }

    /// A node to change in place.
    pub(super) fn node_mut(&mut self, ino: Ino) -> Result<&mut NodeRow, TreeError> {
        let slot = match self.nodes.entry(ino) {
            Entry::Occupied(slot) => slot.into_mut(),
            Entry::Vacant(slot) => {
                let row = self.tree.ledger.node(ino)?.ok_or(TreeError::NotFound)?;
                slot.insert(Some(row))
            }
        };
        slot.as_mut().map(Arc::make_mut).ok_or(TreeError::NotFound)
    }

    pub(super) fn put_node(&mut self, row: NodeRow) {
        self.nodes.insert(row.ino, Some(Arc::new(row)));
    }

    pub(super) fn also(&mut self, changes: impl IntoIterator<Item = Change>) {
        self.extra.extend(changes);
    }

    pub(super) fn name(&self, parent: Ino, name: &[u8]) -> Result<Option<Arc<NameRow>>, TreeError> {
        match self.names.get(&parent).and_then(|names| names.get(name)) {
            Some(changed) => Ok(changed.clone()),
            None => Ok(self.tree.ledger.name(parent, name)?),
        }
    }

    fn put_name(&mut self, parent: Ino, name: Vec<u8>, row: Option<NameRow>) {
        self.note_span(parent, &name, row.as_ref());
        let names = self.names.entry(parent).or_default();
        names.insert(name, row.map(Arc::new));
    }

    /// All registers of a directory, dead ones too, with the changes of this edit.
    pub(super) fn names_in(&self, parent: Ino) -> Result<Vec<Arc<NameRow>>, TreeError> {
        let mut rows = Vec::new();
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.tree.ledger.names_in(parent, after.as_deref(), 1000)?;
            let Some(last) = page.last() else { break };
            after = Some(last.name.clone());
            rows.extend(page);
        }
        if let Some(changed) = self.names.get(&parent) {
            rows.retain(|row| !changed.contains_key(&row.name));
            rows.extend(changed.values().flatten().cloned());
        }
        Ok(rows)
    }

    pub(super) fn ledger(&self) -> &Ledger {
        &self.tree.ledger
    }

    /// The next registers of a directory behind a name, without the changes of this edit.
    pub(super) fn names_behind(&self, parent: Ino, after: &[u8]) -> Result<Vec<Arc<NameRow>>, TreeError> {
        Ok(self.tree.ledger.names_in(parent, Some(after), 1000)?)
    }

    pub(super) fn visible(&self, parent: Ino, name: &[u8]) -> Result<Option<Arc<NodeRow>>, TreeError> {
        match self.name(parent, name)? {
            Some(row) => self.visible_at(&row),
            None => Ok(None),
        }
    }

    fn visible_at(&self, row: &NameRow) -> Result<Option<Arc<NodeRow>>, TreeError> {
        let own = match row.state {
            NameState::Live(ino) => self.node(ino)?,
            NameState::Dead => None,
        };
        let below = row.dir.map(|dir| self.node(dir)).transpose()?.flatten();
        Ok(seen_at(own, below))
    }

    fn seen(&self, row: Option<&NameRow>) -> Result<Seen, TreeError> {
        let node = row.map(|row| self.visible_at(row)).transpose()?.flatten();
        Ok(node.map(|node| (node.ino, node.kind == NodeKind::Dir)))
    }

    /// Draws the next stamp of this machine.
    pub(super) fn stamp(&mut self) -> Stamp {
        let stamp = self.tree.stamp();
        self.stamped = Some(stamp);
        stamp
    }

    /// Notes a stamp of another machine, so that ours follow it.
    pub(super) fn observe(&mut self, stamp: Stamp) {
        if self.tree.clock.observe(stamp, (self.tree.bucket_time)()) {
            self.stamped = self.stamped.max(Some(stamp));
        }
    }

    pub(super) fn next_ino(&self) -> Ino {
        self.tree.ledger.next_ino()
    }

    /// The stamp and place of a change of a register whose last change was at `pending`.
    pub(super) fn next_change(&mut self, pending: Option<Place>) -> (Stamp, Place) {
        let seq = self.tree.ledger.next_place();
        self.in_use.places.gave(seq, Instant::now());
        let first_seq = pending.map_or(seq, |place| {
            let built_on = self.first_close.unwrap_or(0).min(seq);
            place.first_seq.max(built_on)
        });
        (self.stamp(), Place { seq, first_seq })
    }

    /// Changes a register as a write of this machine, to be published: of the uppermost layer. The
    /// preset of the directory may want it otherwise, see [`super::here`].
    pub(super) fn own(&mut self, parent: Ino, name: &[u8], state: NameState) -> Result<(), TreeError> {
        let old = self.name(parent, name)?;
        // Whoever writes the name here now is later than a writer that lost it to another machine.
        if !self.in_use.shadowed.is_empty() {
            self.in_use.shadowed.remove(&(parent, name.to_vec()));
        }
        if self.tree.presets.is_active() && self.own_by_rule(parent, name, state, old.as_deref())? {
            return Ok(());
        }
        let (stamp, place) = self.next_change(old.as_ref().and_then(|row| row.pending));
        self.set_name(NameRow {
            parent,
            name: name.to_vec(),
            layer: TreeLayer::TOP,
            stamp,
            state,
            dir: old.and_then(|row| row.dir),
            pending: Some(place),
        })?;
        match state {
            NameState::Live(ino) => self.raise(ino),
            NameState::Dead => Ok(()),
        }
    }

    /// Brings the other names of a hard-linked file to the uppermost layer, because one of them
    /// came there (law 6).
    pub(super) fn raise(&mut self, ino: Ino) -> Result<(), TreeError> {
        let Some(id) = self.link_id(ino)? else {
            return Ok(());
        };
        // Whoever is known there under its link id came there whole.
        if self.linked(TreeLayer::TOP, id)? == Some(ino) {
            return Ok(());
        }
        self.remember_link_id(TreeLayer::TOP, id, ino)?;
        let node = self.node(ino)?.ok_or(TreeError::NotFound)?;
        for row in self.own_names(&node)? {
            if row.layer != TreeLayer::TOP {
                self.own(row.parent, &row.name, row.state)?;
            }
        }
        Ok(())
    }

    fn link_id(&self, ino: Ino) -> Result<Option<LinkId>, TreeError> {
        Ok(match self.nodes.get(&ino) {
            Some(changed) => changed.as_ref().and_then(|node| node.link_id),
            None => self.tree.ledger.node(ino)?.and_then(|node| node.link_id),
        })
    }

    /// Stamps every name of a file anew: what it holds has changed (law 4).
    pub(super) fn restamp(&mut self, ino: Ino) -> Result<(), TreeError> {
        let node = self.node(ino)?.ok_or(TreeError::NotFound)?;
        if let Some(dir) = &node.dir {
            // One that was removed while a program holds it has no name to be told under.
            if ino == Ino::ROOT || !self.is_reachable(&node)? {
                return Ok(());
            }
            let (up, name) = (dir.up, dir.name.clone());
            return self.own(up, &name, NameState::Live(ino));
        }
        for row in self.own_names(&node)? {
            self.own(row.parent, &row.name, row.state)?;
        }
        Ok(())
    }

    /// Whether a directory is still part of the tree a user sees.
    pub(super) fn is_reachable(&self, dir: &NodeRow) -> Result<bool, TreeError> {
        if dir.ino == Ino::ROOT {
            return Ok(true);
        }
        let place = dir.dir.as_ref().ok_or(TreeError::NotDirectory)?;
        let row = self.name(place.up, &place.name)?;
        Ok(row.is_some_and(|row| {
            row.dir == Some(dir.ino) && (live(row.state) == Some(dir.ino) || place.visible_children > 0)
        }))
    }

    /// The registers that name a file.
    pub(super) fn own_names(&self, node: &NodeRow) -> Result<Vec<Arc<NameRow>>, TreeError> {
        let here = NameState::Live(node.ino);
        let home = self.in_use.pins.get(&node.ino).and_then(|pin| pin.home.as_ref());
        if node.nlink == 1
            && let Some((parent, name)) = home
            && let Some(row) = self.name(*parent, name)?.filter(|row| row.state == here)
        {
            return Ok(vec![row]);
        }
        let mut names = Vec::new();
        for row in self.tree.ledger.names_of(node.ino)? {
            if row.parent != Ino::LINKS {
                names.extend(self.name(row.parent, &row.name)?.filter(|row| row.state == here));
            }
        }
        Ok(names)
    }

    /// Changes a register, and what follows from it.
    pub(super) fn set_name(&mut self, mut row: NameRow) -> Result<(), TreeError> {
        let old = self.name(row.parent, &row.name)?;
        let before = self.seen(old.as_deref())?;
        let old_ino = old.as_ref().and_then(|old| live(old.state));
        if let NameState::Live(ino) = row.state
            && self.node(ino)?.is_some_and(|node| node.kind == NodeKind::Dir)
        {
            row.dir = Some(ino);
        }
        let new_ino = live(row.state);
        let (parent, name, dir) = (row.parent, row.name.clone(), row.dir);
        if parent == Ino::LINKS {
            self.put_name(parent, name, Some(row));
            return Ok(());
        }
        self.put_name(parent, name.clone(), Some(row));
        if old_ino != new_ino {
            if let Some(ino) = new_ino {
                self.link(ino)?;
                if let Some(pin) = self.in_use.pins.get_mut(&ino) {
                    pin.home = Some((parent, name.clone()));
                }
            }
            if let Some(ino) = old_ino {
                self.unlink(ino)?;
            }
        }
        // A directory that lives on only for its children has no attributes of its own.
        if let Some(dir) = dir
            && old_ino == Some(dir)
            && new_ino != Some(dir)
        {
            let node = self.node_mut(dir)?;
            (node.perm, node.uid, node.gid) = (0o755, 0, 0);
            // It is seen as before, so nothing is told of its name.
            self.implied.push(Notice::Attributes { ino: dir });
        }
        let after = {
            let row = self.name(parent, &name)?;
            self.seen(row.as_deref())?
        };
        if let (None, Some((_, is_dir))) = (before, after) {
            self.look_for_sign(parent, &name, is_dir)?;
        }
        if before != after {
            self.notice(|| Notice::Entry { parent, name });
        }
        self.adjust(parent, before, after)
    }

    /// Forgets a register altogether; only for one that nobody was ever told of.
    pub(super) fn drop_name(&mut self, parent: Ino, name: &[u8]) {
        self.put_name(parent, name.to_vec(), None);
    }

    /// Puts a register whose children and counts the caller accounts for.
    pub(super) fn place_name(&mut self, row: NameRow) {
        self.put_name(row.parent, row.name.clone(), Some(row));
    }

    /// Accounts for what a user sees at one name of `parent` now.
    pub(super) fn adjust(&mut self, parent: Ino, before: Seen, after: Seen) -> Result<(), TreeError> {
        if before == after {
            return Ok(());
        }
        if !self.is_load {
            let now = self.now;
            let node = self.node_mut(parent)?;
            (node.mtime, node.ctime) = (now, now);
        }
        self.count(parent, before, after)
    }

    /// As [`Edit::adjust`], without a change of `parent`'s times: a directory that is seen with its
    /// first child was made before, and what is told of it is on its way.
    fn count(&mut self, parent: Ino, before: Seen, after: Seen) -> Result<(), TreeError> {
        self.lists_anew(parent);
        let node = self.node_mut(parent)?;
        let dir = node.dir.as_mut().ok_or(TreeError::NotDirectory)?;
        let had_children = dir.visible_children > 0;
        dir.visible_children =
            dir.visible_children + u64::from(after.is_some()) - u64::from(before.is_some());
        let is_dir = |seen: Seen| u64::from(seen.is_some_and(|(_, is_dir)| is_dir));
        dir.subdirs = dir.subdirs + is_dir(after) - is_dir(before);
        let has_children = dir.visible_children > 0;
        let (up, name) = (dir.up, dir.name.clone());
        node.nlink = u32::try_from(2 + node.dir.as_ref().map_or(0, |dir| dir.subdirs)).unwrap_or(u32::MAX);
        if parent == Ino::ROOT || had_children == has_children {
            return Ok(());
        }
        // The first or last child decides whether a dead directory can be seen.
        let Some(row) = self.name(up, &name)? else {
            return Ok(());
        };
        if row.dir != Some(parent) || row.state == NameState::Live(parent) {
            return Ok(());
        }
        let own = live(row.state).map(|ino| self.node(ino)).transpose()?.flatten();
        let without = seen_at(own, None).map(|node| (node.ino, false));
        let with = Some((parent, true));
        self.implied.push(Notice::Entry { parent: up, name });
        if has_children {
            self.count(up, without, with)
        } else {
            self.count(up, with, without)
        }
    }

    /// What a directory lists is another when this is committed.
    pub(super) fn lists_anew(&mut self, dir: Ino) {
        self.relisted.push(dir);
    }

    fn link(&mut self, ino: Ino) -> Result<(), TreeError> {
        let now = self.now;
        let node = self.node_mut(ino)?;
        if node.kind != NodeKind::Dir {
            node.nlink += 1;
            node.ctime = now;
            self.notice(|| Notice::Attributes { ino });
        }
        Ok(())
    }

    pub(super) fn unlink(&mut self, ino: Ino) -> Result<(), TreeError> {
        let now = self.now;
        let node = self.node_mut(ino)?;
        if node.kind == NodeKind::Dir {
            return Ok(());
        }
        node.nlink = node.nlink.saturating_sub(1);
        node.ctime = now;
        let nameless = node.nlink == 0;
        self.notice(|| Notice::Attributes { ino });
        if nameless {
            self.nameless.push(ino);
            self.in_use.limbo.push_back((Instant::now(), ino));
        }
        Ok(())
    }

    /// Drops the row of a file that nothing names and nobody uses.
    pub(super) fn discard(&mut self, ino: Ino) -> Result<(), TreeError> {
        let Some(node) = self.node(ino)? else {
            return Ok(());
        };
        if let Content::Staging(id) = node.content {
            self.discarded.push(id);
        }
        self.nodes.insert(ino, None);
        Ok(())
    }

    /// The directory that keeps the registers below a name, made if there is none.
    pub(super) fn dir_below(&mut self, parent: Ino, name: &[u8]) -> Result<Ino, TreeError> {
        let row = self.name(parent, name)?;
        if let Some(dir) = row.as_ref().and_then(|row| row.dir) {
            return Ok(dir);
        }
        let dir = self.new_dir(parent, name);
        let unwritten = || NameRow {
            parent,
            name: name.to_vec(),
            layer: TreeLayer::TOP,
            stamp: Stamp::ZERO,
            state: NameState::Dead,
            dir: None,
            pending: None,
        };
        self.place_name(NameRow {
            dir: Some(dir),
            ..row.map_or_else(unwritten, Arc::unwrap_or_clone)
        });
        Ok(dir)
    }

    /// A directory node that nothing names yet.
    pub(super) fn new_dir(&mut self, up: Ino, name: &[u8]) -> Ino {
        let ino = self.next_ino();
        self.put_node(NodeRow {
            perm: 0o755,
            nlink: 2,
            dir: Some(DirState {
                up,
                name: name.to_vec(),
                visible_children: 0,
                subdirs: 0,
                unloaded: Unloaded::default(),
            }),
            ..NodeRow::new(ino, NodeKind::Dir, self.now)
        });
        ino
    }

    /// Commits everything as one; returns the staging files that may go
    /// after the next barrier, and what the kernel may have to be told.
    pub(super) fn commit(mut self) -> Result<(Vec<StagingId>, Vec<Notice>), TreeError> {
        let mut changes: Vec<Change> = self
            .nodes
            .drain()
            .map(|(ino, row)| match row {
                Some(row) => Change::PutNode(Arc::unwrap_or_clone(row)),
                None => Change::DropNode(ino),
            })
            .collect();
        for (parent, names) in self.names.drain() {
            changes.extend(names.into_iter().map(|(name, row)| match row {
                Some(row) => Change::PutName(Arc::unwrap_or_clone(row)),
                None => Change::DropName(parent, name),
            }));
        }
        changes.extend(self.stamped.map(encode_clock));
        // What callers add may speak of the rows before it.
        changes.append(&mut self.extra);
        if !changes.is_empty() {
            self.tree.ledger.commit(changes)?;
        }
        // Not before: who lists one of them in between must not take the old list for the new one.
        self.tree.editions.end(&self.relisted);
        let mut notices = self.notices.take().unwrap_or_default();
        notices.append(&mut self.implied);
        let discarded = std::mem::take(&mut self.discarded);
        if !self.moved.is_empty() {
            self.tree.presets.moved();
        }
        notices.extend(
            self.tree
                .presets_count(self.in_use, &self.recognised, &self.moved),
        );
        Ok((discarded, notices))
    }
}

pub(super) fn live(state: NameState) -> Option<Ino> {
    match state {
        NameState::Live(ino) => Some(ino),
        NameState::Dead => None,
    }
}

impl Edit<'_> {
    /// Hides a file whose blob is gone, at all of its names.
    pub(super) fn lose(&mut self, ino: Ino, digest: crate::base::digest::Digest) -> Result<(), TreeError> {
        let names = self.tree.ledger.names_of(ino)?;
        let mut before = Vec::with_capacity(names.len());
        for row in names.iter().filter(|row| row.parent != Ino::LINKS) {
            before.push((row.parent, row.name.clone(), self.seen(Some(row))?));
        }
        self.node_mut(ino)?.content = Content::Lost(digest);
        for (parent, name, seen) in before {
            let after = {
                let row = self.name(parent, &name)?;
                self.seen(row.as_deref())?
            };
            self.notice(|| Notice::Entry { parent, name });
            self.adjust(parent, seen, after)?;
        }
        Ok(())
    }
}
