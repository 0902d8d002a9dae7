//! Renaming: a register goes, another comes; of a directory, for every path below it (law 3).

use std::sync::Arc;

use super::{Edit, Notice, Removed, Tree, check_name, edit::live};
use crate::{
    namespace::TreeError,
    store::rows::{Ino, NameRow, NameState, NodeKind, TreeLayer},
};

/// What rename(2) is asked to do with an existing target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    Replace,
    /// `RENAME_NOREPLACE`: fail with [`TreeError::Exists`].
    NoReplace,
    /// `RENAME_EXCHANGE`: both must exist and trade places.
    Exchange,
}

/// A name that no user can make, for the moment of an exchange within one edit.
const BETWEEN: &[u8] = b"/exchange";

impl Tree {
    /// Renames a file or directory. The cost of a directory is that of
    /// everything below it, which is committed, and later published, as one.
    pub fn rename(
        &self,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        mode: RenameMode,
    ) -> Result<Removed, TreeError> {
        check_name(from.1)?;
        check_name(to.1)?;
        let mut in_use = self.lock();
        self.need_name(from.0, from.1)?;
        self.need_name(to.0, to.1)?;
        let mut edit = Edit::new(self, &mut in_use);
        let source = edit.visible(from.0, from.1)?.ok_or(TreeError::NotFound)?;
        let target = edit.visible(to.0, to.1)?;
        self.need_below(source.ino)?;
        if let Some(target) = &target {
            self.need_below(target.ino)?;
        }
        let above = edit.node(to.0)?.ok_or(TreeError::NotFound)?;
        if !edit.is_reachable(&above)? {
            return Err(TreeError::NotFound);
        }
        if source.kind == NodeKind::Dir && edit.is_below(to.0, source.ino)? {
            return Err(TreeError::BelowItself);
        }
        match (&target, mode) {
            (Some(_), RenameMode::NoReplace) => return Err(TreeError::Exists),
            (None, RenameMode::Exchange) => return Err(TreeError::NotFound),
            (Some(target), RenameMode::Exchange) => {
                if target.kind == NodeKind::Dir && edit.is_below(from.0, target.ino)? {
                    return Err(TreeError::BelowItself);
                }
                if target.ino != source.ino {
                    edit.relocate(to, (to.0, BETWEEN))?;
                    edit.relocate(from, to)?;
                    edit.relocate((to.0, BETWEEN), from)?;
                    edit.forget_below(to.0, BETWEEN)?;
                }
            }
            // Two names of one file: rename(2) leaves both.
            (Some(target), RenameMode::Replace) if target.ino == source.ino => {}
            (Some(target), RenameMode::Replace) => {
                match (source.kind == NodeKind::Dir, target.kind == NodeKind::Dir) {
                    (true, false) => return Err(TreeError::NotDirectory),
                    (false, true) => return Err(TreeError::IsDirectory),
                    (true, true) if target.dir.as_ref().is_some_and(|dir| dir.visible_children > 0) => {
                        return Err(TreeError::NotEmpty);
                    }
                    _ => {}
                }
                edit.relocate(from, to)?;
            }
            (None, _) => edit.relocate(from, to)?,
        }
        let unsealed = std::mem::take(&mut edit.unsealed);
        let nameless = std::mem::take(&mut edit.nameless);
        let (discarded, notices) = edit.commit()?;
        Ok(Removed {
            discarded,
            notices,
            unsealed,
            nameless,
        })
    }
}

impl Edit<'_> {
    /// Whether `dir` is `above` or lies below it.
    fn is_below(&self, dir: Ino, above: Ino) -> Result<bool, TreeError> {
        let mut at = dir;
        loop {
            if at == above {
                return Ok(true);
            }
            if at == Ino::ROOT {
                return Ok(false);
            }
            let node = self.node(at)?.ok_or(TreeError::NotFound)?;
            at = node.dir.as_ref().ok_or(TreeError::NotDirectory)?.up;
        }
    }

    /// Moves what is seen at one name to another, whatever is there.
    fn relocate(&mut self, from: (Ino, &[u8]), to: (Ino, &[u8])) -> Result<(), TreeError> {
        let source = self.visible(from.0, from.1)?.ok_or(TreeError::NotFound)?;
        if source.kind != NodeKind::Dir {
            // The new name first: a file never is without one.
            self.own(to.0, to.1, NameState::Live(source.ino))?;
            return self.leave(from, to);
        }
        let moved = source.ino;
        // What the old path knew stays below it, in a directory of its own.
        let left = self.new_dir(from.0, from.1);
        let old_target = self.name(to.0, to.1)?;
        self.own(from.0, from.1, NameState::Dead)?;
        // `own` accounted for the name while the children were still below it;
        // with the children gone it stands for the empty directory left behind.
        let row = self.name(from.0, from.1)?.ok_or(TreeError::NotFound)?;
        self.hide_if_implicit(&row, moved)?;
        self.place_name(NameRow {
            dir: Some(left),
            ..Arc::unwrap_or_clone(row)
        });
        let now = self.now;
        let place = self.node_mut(moved)?;
        let attributes = (source.perm, source.uid, source.gid, source.mtime, now);
        (place.perm, place.uid, place.gid, place.mtime, place.ctime) = attributes;
        let dir = place.dir.as_mut().ok_or(TreeError::NotDirectory)?;
        (dir.up, dir.name) = (to.0, to.1.to_vec());
        self.moved.push(moved);
        // What `..` means in it, which the kernel keeps as any entry.
        self.lists_anew(moved);
        self.implied.push(Notice::Moved { dir: moved });
        self.tree_presets().moved();
        let replaced = old_target.as_ref().and_then(|row| row.dir);
        self.own(to.0, to.1, NameState::Live(moved))?;
        self.move_below(moved, left, replaced)?;
        // Last, so that elsewhere too it has the times that it had, not those of the names that came with it.
        self.own(to.0, to.1, NameState::Live(moved))
    }

    /// Takes a dead directory that its children kept alive out of the count of
    /// its parent, because the children are about to leave it.
    fn hide_if_implicit(&mut self, row: &NameRow, dir: Ino) -> Result<(), TreeError> {
        if live(row.state).is_none()
            && self
                .node(dir)?
                .is_some_and(|node| node.dir.as_ref().is_some_and(|d| d.visible_children > 0))
        {
            self.adjust(row.parent, Some((dir, true)), None)?;
        }
        Ok(())
    }

    /// Restates every register below a directory that moved: tombstones and
    /// unseen names stay below `left`, what is seen moves, and what was known
    /// below the name that it replaced comes to it.
    fn move_below(&mut self, moved: Ino, left: Ino, replaced: Option<Ino>) -> Result<(), TreeError> {
        for row in self.names_in(moved)? {
            let seen = self.visible(moved, &row.name)?;
            let Some(seen) = seen else {
                self.drop_name(moved, &row.name);
                self.adopt(row, left)?;
                continue;
            };
            // A file that the directory of its name hid does not come along.
            if let Some(hidden) = live(row.state).filter(|&ino| ino != seen.ino) {
                self.unlink(hidden)?;
            }
            let mut stays = self.left_behind(&row, left);
            let known = match replaced {
                Some(replaced) => self.name(replaced, &row.name)?,
                None => None,
            };
            if seen.kind == NodeKind::Dir {
                let below = self.new_dir(left, &row.name);
                stays.dir = Some(below);
                self.place_name(stays);
                self.move_below(seen.ino, below, known.as_ref().and_then(|row| row.dir))?;
                let goes = self.comes_along(&row, seen.ino, known.as_deref())?;
                self.place_name(NameRow {
                    dir: Some(seen.ino),
                    ..goes
                });
            } else {
                if let Some(dir) = stays.dir {
                    self.node_mut(dir)?
                        .dir
                        .as_mut()
                        .ok_or(TreeError::NotDirectory)?
                        .up = left;
                }
                self.place_or_forget(stays);
                let dir = known.as_ref().and_then(|row| row.dir);
                if let Some(dir) = dir {
                    self.node_mut(dir)?
                        .dir
                        .as_mut()
                        .ok_or(TreeError::NotDirectory)?
                        .up = moved;
                }
                let goes = self.comes_along(&row, seen.ino, known.as_deref())?;
                self.place_name(NameRow { dir, ..goes });
                self.raise(seen.ino)?;
            }
        }
        let Some(replaced) = replaced else { return Ok(()) };
        self.hand_over_unloaded(replaced, moved)?;
        for row in self.names_in(replaced)? {
            self.drop_name(replaced, &row.name);
            if self.name(moved, &row.name)?.is_none() {
                self.adopt(row, moved)?;
            }
        }
        self.discard(replaced)
    }

    /// The tombstone of a name that moves with its directory.
    fn left_behind(&mut self, row: &NameRow, parent: Ino) -> NameRow {
        let dead = NameRow {
            parent,
            layer: TreeLayer::TOP,
            state: NameState::Dead,
            pending: None,
            ..row.clone()
        };
        if row.layer == TreeLayer::HERE {
            let stamp = self.stamp_over(Some(row));
            return NameRow { stamp, ..dead };
        }
        let (stamp, place) = self.next_change(None);
        NameRow {
            stamp,
            pending: Some(place),
            ..dead
        }
    }

    /// The register of a name that moves with its directory, over what is known where it comes to.
    fn comes_along(
        &mut self,
        row: &NameRow,
        ino: Ino,
        known: Option<&NameRow>,
    ) -> Result<NameRow, TreeError> {
        let state = NameState::Live(ino);
        if self.name_rule(row.parent, &row.name)?.stays {
            return Ok(NameRow {
                layer: TreeLayer::HERE,
                stamp: self.stamp_over(known),
                state,
                pending: None,
                ..row.clone()
            });
        }
        self.note_unsealed(ino)?;
        let (stamp, place) = self.next_change(row.pending);
        Ok(NameRow {
            layer: TreeLayer::TOP,
            state,
            stamp,
            pending: Some(place),
            ..row.clone()
        })
    }

    /// Hands what is known below a directory that nobody sees to the one that takes its
    /// place. It gets a number of its own: the kernel may still hold the old one, as deleted.
    pub(super) fn inherit(&mut self, old: Ino, new: Ino) -> Result<(), TreeError> {
        self.hand_over_unloaded(old, new)?;
        for row in self.names_in(old)? {
            self.drop_name(old, &row.name);
            self.adopt(row, new)?;
        }
        self.discard(old)
    }

    /// What a catalog has below a path goes with what else is known there.
    fn hand_over_unloaded(&mut self, old: Ino, new: Ino) -> Result<(), TreeError> {
        let old = self.node(old)?.and_then(|node| Some(node.dir.as_ref()?.unloaded));
        if let Some(unloaded) = old.filter(|unloaded| unloaded.is_any()) {
            let new = self.node_mut(new)?.dir.as_mut();
            new.ok_or(TreeError::NotDirectory)?.unloaded.add_all(unloaded);
        }
        Ok(())
    }

    /// Puts a register that shows nothing below another directory.
    fn adopt(&mut self, row: Arc<NameRow>, parent: Ino) -> Result<(), TreeError> {
        if let Some(dir) = row.dir {
            self.node_mut(dir)?
                .dir
                .as_mut()
                .ok_or(TreeError::NotDirectory)?
                .up = parent;
        }
        self.place_name(NameRow {
            parent,
            ..Arc::unwrap_or_clone(row)
        });
        Ok(())
    }

    /// Forgets a name and everything known below it, which nobody was told of.
    fn forget_below(&mut self, parent: Ino, name: &[u8]) -> Result<(), TreeError> {
        let dir = self.name(parent, name)?.and_then(|row| row.dir);
        self.drop_name(parent, name);
        let Some(dir) = dir else { return Ok(()) };
        for row in self.names_in(dir)? {
            self.forget_below(dir, &row.name)?;
        }
        self.discard(dir)
    }
}
