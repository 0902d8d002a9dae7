//! Starting over: forgetting what others said, so that catalogs can say it anew.
//!
//! A machine that was away for longer than tombstones are kept cannot know which of the names that
//! it has were removed meanwhile. It forgets every register but those of its own that
//! nobody was told of, or never will be; with them stay the directories above them and the files that they name.

use super::{Edit, Tree};
use crate::{
    base::clock::Stamp,
    namespace::TreeError,
    store::rows::{Content, Ino, NameRow, NameState, TreeLayer, Unloaded},
};

/// Registers that are forgotten as one.
const BATCH: usize = 512;

impl Tree {
    /// Forgets every register that is not an own change waiting to be published. Before
    /// anything is mounted; a crash in the middle costs a second time.
    pub fn forget(&self) -> Result<(), TreeError> {
        // What is below comes first, so that an empty directory can go with its register.
        let mut dirs = vec![(Ino::ROOT, false)];
        while let Some((dir, is_done_below)) = dirs.pop() {
            if is_done_below {
                self.forget_in(dir)?;
            } else {
                dirs.push((dir, true));
                dirs.extend(self.dirs_in(dir)?.into_iter().map(|below| (below, false)));
            }
        }
        Ok(())
    }

    fn forget_in(&self, dir: Ino) -> Result<(), TreeError> {
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.ledger.names_in(dir, after.as_deref(), BATCH)?;
            let Some(last) = page.last() else { return Ok(()) };
            after = Some(last.name.clone());
            let mut in_use = self.lock();
            let mut edit = Edit::unasked(self, &mut in_use);
            edit.is_load = true;
            for row in page {
                let is_own = row.pending.is_some() || row.layer == TreeLayer::HERE;
                if !is_own && !edit.is_written(&row)? {
                    edit.forget(&row)?;
                }
            }
            edit.commit()?;
        }
    }
}

impl Edit<'_> {
    /// Whether the file of a name has bytes that are only here.
    fn is_written(&self, row: &NameRow) -> Result<bool, TreeError> {
        let NameState::Live(ino) = row.state else {
            return Ok(false);
        };
        let node = self.node(ino)?;
        Ok(node.is_some_and(|node| matches!(node.content, Content::Staging(_))))
    }

    fn forget(&mut self, row: &NameRow) -> Result<(), TreeError> {
        self.set_name(NameRow {
            layer: TreeLayer::TOP,
            stamp: Stamp::ZERO,
            state: NameState::Dead,
            ..row.clone()
        })?;
        let below = match row.dir {
            Some(dir) if !self.names_in(dir)?.is_empty() => {
                let node = self.node_mut(dir)?;
                let state = node.dir.as_mut().ok_or(TreeError::NotDirectory)?;
                state.unloaded = Unloaded::default();
                return Ok(());
            }
            below => below,
        };
        self.drop_name(row.parent, &row.name);
        below.map_or(Ok(()), |dir| self.discard(dir))
    }
}
