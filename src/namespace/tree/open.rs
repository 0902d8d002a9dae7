//! Files in use: opening, writing, closing, sealing, as far as the tree is concerned.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Edit, Notice, Tree};
use crate::{
    base::digest::Digest,
    namespace::TreeError,
    store::StoreError,
    store::rows::{Change, Content, Ino, NameState, NodeRow, StagingId},
};

/// Whether a sealed file could be put in place of its staging file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealOutcome {
    Sealed,
    /// A writer came, or the file went, while it was hashed: its digest is worthless.
    Overtaken,
    /// All of its names promise other bytes: they are gone, and it goes with them.
    Refused,
}

impl Tree {
    /// Keeps a file alive for an open, also when its last name goes.
    pub fn pin(&self, ino: Ino, write: bool) -> Result<Arc<NodeRow>, TreeError> {
        let mut in_use = self.lock();
        let node = self.ledger.node(ino)?.ok_or(TreeError::NotFound)?;
        let pin = in_use.pins.entry(ino).or_default();
        pin.opens += 1;
        if write {
            pin.writers += 1;
            if let Some(overtaken) = in_use.sealing.get_mut(&ino) {
                *overtaken = true;
            }
        }
        Ok(node)
    }

    /// Ends an open, and returns whether nobody has the file open for writing now. One that nothing names any
    /// more goes a moment after its last open.
    pub fn unpin(&self, ino: Ino, write: bool) -> Result<bool, TreeError> {
        let mut in_use = self.lock();
        let Some(pin) = in_use.pins.get_mut(&ino) else {
            return Ok(true);
        };
        pin.opens -= 1;
        pin.writers -= u32::from(write);
        let (opens, writers) = (pin.opens, pin.writers);
        if writers == 0 {
            in_use.shadowed.retain(|_, shadowed| *shadowed != ino);
        }
        if opens > 0 {
            return Ok(writers == 0);
        }
        in_use.pins.remove(&ino);
        if self.ledger.node(ino)?.is_some_and(|node| node.nlink == 0) {
            in_use.limbo.push_back((Instant::now(), ino));
        }
        Ok(true)
    }

    /// Drops files that lost their last name, or their last open after that, at least `rest`
    /// ago; returns their staging files.
    pub fn sweep(&self, rest: Duration) -> Result<Vec<StagingId>, TreeError> {
        let mut in_use = self.lock();
        let due = in_use
            .limbo
            .iter()
            .take_while(|(since, _)| since.elapsed() >= rest)
            .count();
        let gone: Vec<Ino> = in_use.limbo.iter().take(due).map(|(_, ino)| *ino).collect();
        let mut edit = Edit::new(self, &mut in_use);
        for ino in gone {
            // One in use comes back here with its last close, or when the kernel forgets it.
            let unused = !edit.in_use.pins.contains_key(&ino) && !self.held.contains(ino);
            if unused && edit.node(ino)?.is_some_and(|node| node.nlink == 0) {
                edit.discard(ino)?;
            }
        }
        let (discarded, _) = edit.commit()?;
        // Only now: they are tried again when the disk did not take the change.
        in_use.limbo.drain(..due);
        Ok(discarded)
    }

    /// Files open for writing now.
    pub fn open_for_writing(&self) -> Vec<Ino> {
        let in_use = self.lock();
        in_use
            .pins
            .iter()
            .filter(|(_, pin)| pin.writers > 0)
            .map(|(ino, _)| *ino)
            .collect()
    }

    /// Puts a staging file under a file, in place of its blob. `also` is committed with it.
    ///
    /// Not a change to tell anybody: that is made when the file is closed.
    pub fn set_staging(
        &self,
        ino: Ino,
        id: StagingId,
        size: u64,
        also: Vec<Change>,
    ) -> Result<(), TreeError> {
        let mut in_use = self.lock();
        let mut edit = Edit::new(self, &mut in_use);
        let node = edit.node_mut(ino)?;
        node.content = Content::Staging(id);
        node.places.clear();
        node.size = size;
        edit.also(also);
        edit.commit()?;
        Ok(())
    }

    /// Notes that the bytes of a staging file reached the disk, with the row that describes them.
    pub fn synced(&self, ino: Ino, id: StagingId) -> Result<(), TreeError> {
        let mut in_use = self.lock();
        let mut edit = Edit::new(self, &mut in_use);
        let current = edit
            .node(ino)?
            .is_some_and(|node| node.content == Content::Staging(id));
        if current {
            edit.node_mut(ino)?;
            edit.also([Change::SyncedStaging(id)]);
        }
        edit.commit()?;
        Ok(())
    }

    /// Records what a close of a writer left. It is the moment at which the change of the file is
    /// made: its names get new stamps, and those that another machine took meanwhile come back
    /// (law 5). Times are in nanoseconds since 1970.
    pub fn closed(&self, ino: Ino, size: u64, mtime: i64, ctime: i64) -> Result<Vec<Notice>, TreeError> {
        let mut in_use = self.lock();
        let shadowed: Vec<_> = in_use
            .shadowed
            .extract_if(|_, shadowed| *shadowed == ino)
            .map(|(name, _)| name)
            .collect();
        let (mut first, mut dir) = (false, None);
        if let Some(pin) = in_use.pins.get_mut(&ino) {
            first = std::mem::take(&mut pin.unmade);
            let tell_dir = std::mem::take(&mut pin.tell_dir);
            dir = pin.home.as_ref().filter(|_| tell_dir).map(|(dir, _)| *dir);
        }
        let mut edit = Edit::new(self, &mut in_use);
        if first {
            edit.first_close = Some(edit.in_use.places.since(Instant::now()));
        }
        let node = edit.node_mut(ino)?;
        node.size = size;
        node.mtime = mtime;
        // What was shown while it was written stays.
        node.ctime = node.ctime.max(ctime);
        edit.restamp(ino)?;
        for (parent, name) in &shadowed {
            edit.own(*parent, name, NameState::Live(ino))?;
        }
        if let Some(dir) = dir
            && edit.node(dir)?.is_some()
        {
            edit.first_close = None;
            edit.restamp(dir)?;
        }
        let (_, mut notices) = edit.commit()?;
        // The kernel knows what was written; only names that came back are news.
        let back = shadowed.into_iter();
        notices.extend(back.map(|(parent, name)| Notice::Entry { parent, name }));
        Ok(notices)
    }

    /// Starts sealing; false when a writer has the file open, it is no longer `id`, or it is of this
    /// machine alone.
    pub fn begin_seal(&self, ino: Ino, id: StagingId) -> Result<bool, TreeError> {
        let mut in_use = self.lock();
        let node = self.ledger.node(ino)?;
        let quiet = node.is_some_and(|node| node.content == Content::Staging(id) && node.nlink > 0)
            && in_use.pins.get(&ino).is_none_or(|pin| pin.writers == 0)
            && !(self.presets.is_active() && Edit::new(self, &mut in_use).is_here(ino)?);
        in_use.unquiet.remove(&ino);
        if quiet {
            in_use.sealing.insert(ino, false);
        }
        Ok(quiet)
    }

    /// Gives sealing up. A file that is not quiet, because somebody unknown may still write to
    /// it, counts as open for writing until it is tried again.
    pub fn abort_seal(&self, ino: Ino, quiet: bool) {
        let mut in_use = self.lock();
        in_use.sealing.remove(&ino);
        if !quiet {
            in_use.unquiet.insert(ino);
        }
    }

    /// Puts a blob in place of a staging file, unless a writer came since
    /// [`Tree::begin_seal`], or its name promises other bytes. Returns also what the kernel must be told.
    ///
    /// `link` gives the file its blob name and returns what is committed with the change;
    /// `committed` is called after that. No writer can open the file from the one to the other.
    pub fn finish_seal(
        &self,
        ino: Ino,
        id: StagingId,
        blob: (Digest, u64),
        link: impl FnOnce() -> Result<Vec<Change>, StoreError>,
        committed: impl FnOnce(),
    ) -> Result<(SealOutcome, Vec<Notice>), TreeError> {
        let mut in_use = self.lock();
        let overtaken = in_use.sealing.remove(&ino).unwrap_or(true);
        let mut edit = Edit::new(self, &mut in_use);
        let current = edit
            .node(ino)?
            .is_some_and(|node| node.content == Content::Staging(id) && node.nlink > 0);
        if overtaken || !current {
            return Ok((SealOutcome::Overtaken, Vec::new()));
        }
        if self.presets.is_active() && !edit.refuse_misnamed(ino, &blob.0)? {
            let (_, notices) = edit.commit()?;
            return Ok((SealOutcome::Refused, notices));
        }
        let node = edit.node_mut(ino)?;
        node.content = Content::Blob(blob.0);
        node.places.clear();
        node.size = blob.1;
        edit.also(link()?);
        let (_, notices) = edit.commit()?;
        committed();
        Ok((SealOutcome::Sealed, notices))
    }

    /// Drops a file whose bytes a power loss took, at all of its names. Like
    /// [`Tree::lose`] it is this machine's opinion and not published. Before anything is mounted.
    pub fn lose_staging(&self, ino: Ino) -> Result<(), TreeError> {
        let mut in_use = self.lock();
        let mut edit = Edit::unasked(self, &mut in_use);
        edit.lose(ino, Digest::EMPTY)?;
        edit.commit()?;
        Ok(())
    }

    /// Drops files that no name refers to, which a crash left behind; returns their staging files.
    pub fn drop_nameless(&self) -> Result<Vec<StagingId>, TreeError> {
        let mut in_use = self.lock();
        let nodes = self.ledger.nameless_nodes()?;
        let mut edit = Edit::new(self, &mut in_use);
        for node in nodes.iter().filter(|node| node.dir.is_none()) {
            if !edit.in_use.pins.contains_key(&node.ino) {
                edit.discard(node.ino)?;
            }
        }
        Ok(edit.commit()?.0)
    }
}
