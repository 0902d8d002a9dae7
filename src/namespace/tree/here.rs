//! What the presets of directories make of a change: names of this machine alone, deletes that are
//! its own opinion, names that prove their content, and tools that are recognised.
//!
//! A name of this machine alone is a register of [`TreeLayer::HERE`]; its file keeps its staging file
//! and is never sealed, so its bytes are never a blob, never uploaded and never evicted. A file that
//! also has a name that others are told of is sealed like any other.
//!
//! # Invariants
//!
//! - A register of [`TreeLayer::HERE`] is live and not pending. Its stamp is [`Stamp::ZERO`] if nobody
//!   else ever said anything of the name here: then it leaves nothing behind when it goes, or a
//!   build's thousands of temporary names would stay as tombstones.
//! - What a mount finds of names is in accord with its presets ([`Tree::set_presets`]), also when they
//!   were others at the last mount.

use std::{sync::Arc, time::Duration};

use super::{Edit, InUse, Notice, Tree, edit::live, join};
use crate::{
    base::{clock::Stamp, digest::Digest},
    namespace::{
        TreeError,
        change::Entry,
        preset::{
            self, NameRule, Preset,
            at::PresetAt,
            table::{Origin, Presets, Shown, Step},
        },
    },
    store::rows::{Change, Content, Ino, NameRow, NameState, NodeKind, NodeRow, TreeLayer},
};

/// Where the recognised presets are kept: 9 bytes each, the number of the directory (little-endian) and the
/// place of the preset in [`Preset::ALL`].
const META_RECOGNISED: &str = "presets/recognised";
/// Where the presets that the last mount chose are kept, as text: a change of them is looked for here.
const META_CHOSEN: &str = "presets/chosen";

/// Pending names that are looked at once more when a preset comes to count.
const RECONSIDERED: usize = 1 << 17;
/// Names changed in one commit then.
const BATCH: usize = 256;

impl Tree {
    /// Takes the presets of the mount and of the volume, and brings the names of this machine into
    /// accord with them. Before anything else uses the tree.
    ///
    /// Costs a walk over all names here when the presets are not those of the last mount.
    pub fn set_presets(&self, by_mount: &[PresetAt], by_volume: &[PresetAt]) -> Result<(), TreeError> {
        let kept = self.ledger.meta(META_RECOGNISED)?.unwrap_or_default();
        for (ino, preset) in decode(&kept) {
            self.presets.recognise(ino, preset);
        }
        self.presets.choose(by_mount, by_volume);
        let (chosen, _) = self.presets.all();
        let chosen: Vec<String> = chosen.iter().map(Shown::to_string).collect();
        let chosen = chosen.join("\n").into_bytes();
        if chosen != self.ledger.meta(META_CHOSEN)?.unwrap_or_default() {
            let mut in_use = self.lock();
            self.reconsider_pending(&mut in_use)?;
            self.release(&mut in_use, Ino::ROOT)?;
            self.ledger
                .commit(vec![Change::PutMeta(META_CHOSEN.to_owned(), chosen)])?;
        }
        Ok(())
    }

    #[must_use]
    pub fn presets(&self) -> &Presets {
        &self.presets
    }

    /// All directories with a preset, to be shown; recognised ones that are gone are left out.
    pub fn preset_dirs(&self) -> Vec<Shown> {
        let (mut shown, recognised) = self.presets.all();
        for (ino, preset) in recognised {
            if let Ok(dir) = self.dir_path(ino) {
                shown.push(Shown {
                    dir,
                    preset,
                    origin: Origin::Recognised,
                });
            }
        }
        shown.sort_by(|a, b| a.dir.cmp(&b.dir));
        shown
    }

    /// What the preset of a directory says of a name in it.
    pub fn name_rule(&self, parent: Ino, name: &[u8]) -> Result<NameRule, TreeError> {
        let way = || way_to(parent, |ino| Ok(self.ledger.node(ino)?));
        self.presets.name_rule(parent, name, way)
    }

    /// The preset that counts for a file or directory, by one of its names.
    pub fn preset_of(&self, node: &NodeRow) -> Result<Option<Preset>, TreeError> {
        if !self.presets.is_active() {
            return Ok(None);
        }
        let dir = if node.dir.is_some() {
            Some(node.ino)
        } else {
            let names = self.ledger.names_of(node.ino)?;
            let parents = names.iter().map(|row| row.parent);
            parents.filter(|parent| *parent != Ino::LINKS).min()
        };
        let Some(dir) = dir else { return Ok(None) };
        let way = || way_to(dir, |ino| Ok(self.ledger.node(ino)?));
        Ok(self.presets.rule(dir, way)?.map(|rule| rule.preset))
    }

    /// How long a closed file rests before it is sealed, if a preset says so.
    pub fn settle_of(&self, ino: Ino) -> Result<Option<Duration>, TreeError> {
        if !self.presets.is_active() {
            return Ok(None);
        }
        let Some(node) = self.ledger.node(ino)? else {
            return Ok(None);
        };
        Ok(self.preset_of(&node)?.and_then(Preset::settle))
    }

    /// Files open for writing now that have a name which others will be told of, or none at all.
    pub fn shared_open_for_writing(&self) -> Result<Vec<Ino>, TreeError> {
        let writing = self.open_for_writing();
        if !self.presets.is_active() {
            return Ok(writing);
        }
        let mut in_use = self.lock();
        let edit = Edit::new(self, &mut in_use);
        let mut shared = Vec::with_capacity(writing.len());
        for ino in writing {
            if !edit.is_here(ino)? {
                shared.push(ino);
            }
        }
        Ok(shared)
    }

    /// Whether a file is of this machine alone.
    pub fn stays_here(&self, ino: Ino) -> Result<bool, TreeError> {
        if !self.presets.is_active() {
            return Ok(false);
        }
        let mut in_use = self.lock();
        Edit::new(self, &mut in_use).is_here(ino)
    }

    /// Notes that tools were recognised, and keeps here what was about to be told.
    pub(super) fn recognised(&self, in_use: &mut InUse, found: &[(Ino, Preset)]) -> Result<(), TreeError> {
        for (ino, preset) in found {
            if self.presets.recognise(*ino, *preset) {
                let path = self.dir_path(*ino).unwrap_or_default();
                let path = String::from_utf8_lossy(&path);
                tracing::info!(%path, %preset, "recognised the cache of a tool");
            }
        }
        self.ledger.commit(vec![self.recognised_now()])?;
        self.reconsider_pending(in_use)
    }

    fn recognised_now(&self) -> Change {
        let (_, recognised) = self.presets.all();
        Change::PutMeta(META_RECOGNISED.to_owned(), encode(&recognised))
    }

    /// Takes pending names that stay here out of the line: a preset came to count after they were made.
    fn reconsider_pending(&self, in_use: &mut InUse) -> Result<(), TreeError> {
        let mut staying = Vec::new();
        for row in self.ledger.pending_names(RECONSIDERED)? {
            if self.name_rule(row.parent, &row.name)?.stays {
                staying.push(row);
            }
        }
        for rows in staying.chunks(BATCH) {
            let mut edit = Edit::new(self, in_use);
            for row in rows {
                match row.state {
                    NameState::Live(ino) => edit.keep_here(row.parent, &row.name, ino, Some(row))?,
                    NameState::Dead => edit.hide(row)?,
                }
            }
            edit.commit()?;
        }
        Ok(())
    }

    /// Tells of names below `dir` that were of this machine alone and are not any more.
    fn release(&self, in_use: &mut InUse, dir: Ino) -> Result<(), TreeError> {
        let mut dirs = vec![dir];
        while let Some(dir) = dirs.pop() {
            let rows = Edit::new(self, in_use).names_in(dir)?;
            dirs.extend(rows.iter().filter_map(|row| row.dir));
            let here = |row: &&Arc<NameRow>| row.layer == TreeLayer::HERE;
            let here: Vec<_> = rows.iter().filter(here).collect();
            for rows in here.chunks(BATCH) {
                let mut edit = Edit::new(self, in_use);
                for row in rows {
                    if !edit.name_rule(dir, &row.name)?.stays {
                        edit.own(dir, &row.name, row.state)?;
                    }
                }
                edit.commit()?;
            }
        }
        Ok(())
    }
}

impl<'a> Edit<'a> {
    pub(super) fn tree_presets(&self) -> &'a Presets {
        &self.tree().presets
    }

    pub(super) fn name_rule(&self, parent: Ino, name: &[u8]) -> Result<NameRule, TreeError> {
        let way = || way_to(parent, |ino| self.node(ino));
        self.tree_presets().name_rule(parent, name, way)
    }

    /// Makes a change of this machine as the preset of the directory wants it; false when it is one
    /// like any other.
    pub(super) fn own_by_rule(
        &mut self,
        parent: Ino,
        name: &[u8],
        state: NameState,
        old: Option<&NameRow>,
    ) -> Result<bool, TreeError> {
        let rule = self.name_rule(parent, name)?;
        let ino = match (state, old) {
            (NameState::Live(ino), _) => ino,
            (NameState::Dead, Some(old)) if old.layer == TreeLayer::HERE => {
                self.drop_here(old)?;
                return Ok(true);
            }
            (NameState::Dead, Some(old)) if rule.stays => {
                self.hide(old)?;
                return Ok(true);
            }
            (NameState::Dead, _) => return Ok(false),
        };
        if rule.stays {
            self.keep_here(parent, name, ino, old)?;
            return Ok(true);
        }
        if rule.action.is_some() {
            // The kernel may have kept the file under its old name for long; how long this
            // name is shown is not for it to know.
            let name = name.to_vec();
            self.implied.push(Notice::Entry { parent, name });
        }
        if old.is_none_or(|old| old.state != state) {
            self.note_unsealed(ino)?;
        }
        match (rule.proves, self.node(ino)?.map(|node| node.content)) {
            (Some(expected), Some(Content::Blob(found))) if found != expected => {
                self.refuse(parent, name, (&expected, &found), old)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Leaves the old name of a file that was renamed.
    pub(super) fn leave(&mut self, from: (Ino, &[u8]), to: (Ino, &[u8])) -> Result<(), TreeError> {
        if self.name_rule(to.0, to.1)?.scrap {
            return self.remove(from.0, from.1);
        }
        self.own(from.0, from.1, NameState::Dead)
    }

    /// Removes a name, here or for all.
    pub(super) fn remove(&mut self, parent: Ino, name: &[u8]) -> Result<(), TreeError> {
        if self.name_rule(parent, name)?.deletes_here
            && let Some(old) = self.name(parent, name)?
            && old.layer != TreeLayer::HERE
        {
            return self.hide(&old);
        }
        self.own(parent, name, NameState::Dead)
    }

    /// Forgets that a tool was recognised in a directory that is removed.
    pub(super) fn forget_tool(&mut self, dir: Ino) {
        if self.tree_presets().forget(dir) {
            let now = self.tree().recognised_now();
            self.also([now]);
        }
    }

    /// The stamp of a change that is told to nobody, over what is known of the name.
    pub(super) fn stamp_over(&mut self, known: Option<&NameRow>) -> Stamp {
        if known.is_some_and(|known| known.stamp != Stamp::ZERO) {
            self.stamp()
        } else {
            Stamp::ZERO
        }
    }

    /// Makes a name one of this machine alone.
    pub(super) fn keep_here(
        &mut self,
        parent: Ino,
        name: &[u8],
        ino: Ino,
        old: Option<&NameRow>,
    ) -> Result<(), TreeError> {
        let state = NameState::Live(ino);
        if old.is_some_and(|old| old.layer == TreeLayer::HERE && old.state == state) {
            return Ok(());
        }
        let stamp = self.stamp_over(old);
        self.set_name(NameRow {
            parent,
            name: name.to_vec(),
            layer: TreeLayer::HERE,
            stamp,
            state,
            dir: old.and_then(|old| old.dir),
            pending: None,
        })
    }

    /// Removes a name of this machine alone.
    fn drop_here(&mut self, old: &NameRow) -> Result<(), TreeError> {
        let stamp = self.stamp_over(Some(old));
        let dead = NameRow {
            layer: TreeLayer::TOP,
            stamp,
            state: NameState::Dead,
            ..old.clone()
        };
        self.set_name(dead)?;
        if stamp == Stamp::ZERO && old.dir.is_none() {
            self.drop_name(old.parent, &old.name);
        }
        Ok(())
    }

    /// Puts the register of a name that moved away, unless it says nothing.
    pub(super) fn place_or_forget(&mut self, row: NameRow) {
        if row.stamp == Stamp::ZERO && row.state == NameState::Dead && row.dir.is_none() {
            self.drop_name(row.parent, &row.name);
        } else {
            self.place_name(row);
        }
    }

    /// Hides a name on this machine, until somebody changes it again.
    pub(super) fn hide(&mut self, old: &NameRow) -> Result<(), TreeError> {
        let stamp = self.stamp();
        self.set_name(NameRow {
            stamp,
            state: NameState::Dead,
            pending: None,
            ..old.clone()
        })
    }

    /// Notes that a file whose name others are told of is to be sealed.
    pub(super) fn note_unsealed(&mut self, ino: Ino) -> Result<(), TreeError> {
        if self.tree_presets().is_active()
            && let Some(Content::Staging(_)) = self.node(ino)?.map(|node| node.content)
        {
            self.unsealed.push(ino);
        }
        Ok(())
    }

    /// Whether a file has names, and all of them are of this machine alone.
    pub(super) fn is_here(&self, ino: Ino) -> Result<bool, TreeError> {
        let Some(node) = self.node(ino)? else {
            return Ok(false);
        };
        let names = self.own_names(&node)?;
        Ok(!names.is_empty() && names.iter().all(|row| row.layer == TreeLayer::HERE))
    }

    /// Hides the names of a file whose bytes have the digest `found` that promise others; they were
    /// told to nobody. Returns whether it has a name left.
    pub(super) fn refuse_misnamed(&mut self, ino: Ino, found: &Digest) -> Result<bool, TreeError> {
        let node = self.node(ino)?.ok_or(TreeError::NotFound)?;
        let mut left = false;
        for row in self.own_names(&node)? {
            match self.name_rule(row.parent, &row.name)?.proves {
                Some(expected) if expected != *found => {
                    self.tell();
                    self.refuse(row.parent, &row.name, (&expected, found), Some(&row))?;
                }
                _ => left = true,
            }
        }
        Ok(left)
    }

    /// Does not give a name to bytes that it does not promise: `old`, what it is so far, is kept if it
    /// is right, else hidden.
    fn refuse(
        &mut self,
        parent: Ino,
        name: &[u8],
        (expected, found): (&Digest, &Digest),
        old: Option<&NameRow>,
    ) -> Result<(), TreeError> {
        let path = join(self.tree().dir_path(parent).unwrap_or_default(), name);
        self.tree_presets().counters.misnamed(&path, expected, found);
        self.implied.push(Notice::Entry {
            parent,
            name: name.to_vec(),
        });
        let Some(old) = old else { return Ok(()) };
        let shown = live(old.state).map(|ino| self.node(ino)).transpose()?.flatten();
        if shown.is_some_and(|node| node.content == Content::Blob(*expected)) {
            return Ok(());
        }
        self.hide(old)
    }

    /// Whether another machine gives a name to bytes that it does not promise; such a change counts as not made.
    pub(super) fn is_misnamed(
        &self,
        parent: Ino,
        name: &[u8],
        entry: Option<&Entry>,
    ) -> Result<bool, TreeError> {
        if !self.tree_presets().is_active() {
            return Ok(false);
        }
        let blob = entry.and_then(|entry| entry.blob.as_ref());
        let Some((expected, blob)) = self.name_rule(parent, name)?.proves.zip(blob) else {
            return Ok(false);
        };
        let wrong = blob.digest != expected;
        if wrong {
            let counters = &self.tree_presets().counters;
            let path = self.path_in(parent, name)?;
            counters.misnamed(&path, &expected, &blob.digest);
        }
        Ok(wrong)
    }

    /// The path of a name, for people.
    fn path_in(&self, mut dir: Ino, name: &[u8]) -> Result<Vec<u8>, TreeError> {
        let mut names = vec![name.to_vec()];
        while let Some(place) = self
            .node(dir)?
            .and_then(|node| node.dir.clone())
            .filter(|_| dir != Ino::ROOT)
        {
            names.push(place.name);
            dir = place.up;
        }
        names.reverse();
        Ok(names.join(&b'/'))
    }

    /// Recognises a tool by a name that was made.
    pub(super) fn look_for_sign(&mut self, dir: Ino, name: &[u8], is_dir: bool) -> Result<(), TreeError> {
        let place = |ino| Ok::<_, TreeError>(self.node(ino)?.and_then(|node| node.dir.clone()));
        let above = |levels: usize| {
            let mut at = dir;
            for _ in 0..levels {
                at = place(at)?.map_or(at, |place| place.up);
            }
            Ok::<_, TreeError>(at)
        };
        // The root is a directory above itself here; it has no name.
        let dir_name = |levels| {
            let place = above(levels).and_then(place).ok().flatten();
            place.map(|place| place.name).unwrap_or_default()
        };
        let Some(sign) = preset::sign(name, is_dir, dir_name) else {
            return Ok(());
        };
        let cache = above(sign.above)?;
        if let Some(needed) = sign.needs
            && self
                .visible(cache, needed)?
                .is_none_or(|node| node.kind != NodeKind::Dir)
        {
            return Ok(());
        }
        let way = || way_to(cache, |ino| self.node(ino));
        let known = self.tree_presets().rule(cache, way)?.is_some();
        if !known && !self.recognised.iter().any(|(ino, _)| *ino == cache) {
            self.recognised.push((cache, sign.preset));
        }
        Ok(())
    }
}

/// The way from the root to a directory.
fn way_to(
    dir: Ino,
    node: impl Fn(Ino) -> Result<Option<Arc<NodeRow>>, TreeError>,
) -> Result<Vec<Step>, TreeError> {
    let mut way = Vec::new();
    let mut at = dir;
    while at != Ino::ROOT {
        let node = node(at)?.ok_or(TreeError::NotFound)?;
        let place = node.dir.as_ref().ok_or(TreeError::NotDirectory)?;
        way.push(Step {
            ino: at,
            name: place.name.clone(),
        });
        at = place.up;
    }
    way.push(Step {
        ino: Ino::ROOT,
        name: Vec::new(),
    });
    way.reverse();
    Ok(way)
}

fn encode(recognised: &[(Ino, Preset)]) -> Vec<u8> {
    let number = |preset| Preset::ALL.iter().position(|known| *known == preset);
    recognised
        .iter()
        .filter_map(|(ino, preset)| Some((ino, number(*preset)? as u8)))
        .flat_map(|(ino, number)| ino.0.to_le_bytes().into_iter().chain([number]))
        .collect()
}

/// What cannot be read is left out: it is recognised again.
fn decode(bytes: &[u8]) -> Vec<(Ino, Preset)> {
    let read = |entry: &[u8]| {
        let (ino, number) = entry.split_first_chunk::<8>()?;
        let preset = Preset::ALL.get(usize::from(*number.first()?))?;
        Some((Ino(u64::from_le_bytes(*ino)), *preset))
    };
    bytes.chunks_exact(9).filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognised_presets_are_kept_as_ever() {
        let recognised = [(Ino(0x0102), Preset::Ccache), (Ino(7), Preset::Bazel)];
        let bytes = encode(&recognised);
        assert_eq!(bytes, [2, 1, 0, 0, 0, 0, 0, 0, 1, 7, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(decode(&bytes), recognised);
        assert_eq!(decode(&[0, 0, 0, 0, 0, 0, 0, 0, 99, 1]), []);
    }
}
