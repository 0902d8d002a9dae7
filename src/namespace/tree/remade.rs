//! What this machine made, and what it made again by that.
//!
//! An action-cache entry is shown only while all that it names is there. So one that was withheld is back as soon as a
//! build makes again what was missing, and the build, which does not store an entry that it finds, says nothing of it.
//! But others may have deleted the entry itself, each for itself (law 7), and wait for somebody who makes it again.
//! Whoever makes what it names has done so, and says it with [`Tree::remake`] in place of the build.

use std::sync::Arc;

use super::{Edit, Tree};
use crate::{
    base::clock::Stamp,
    namespace::TreeError,
    store::rows::{Ino, NameRow, NameState, NodeRow, TreeLayer},
};

/// What a user sees at a name, and when this machine said so.
pub type Made = (Arc<NodeRow>, Option<Stamp>);

impl Tree {
    /// What a user sees at a name, and when this machine said so, if it was this one that said it last.
    pub fn lookup_made(&self, parent: Ino, name: &[u8]) -> Result<Option<Made>, TreeError> {
        let made = |row: &NameRow| {
            let is_own = row.layer == TreeLayer::TOP && row.stamp.machine == self.clock.machine();
            is_own.then_some(row.stamp)
        };
        let found = self.lookup_row(parent, name)?;
        Ok(found.map(|(node, row)| (node, made(&row))))
    }

    /// Makes what is at a name again as it is, a change like any other, unless that was made after `made`: then it costs
    /// a row.
    pub fn remake(&self, parent: Ino, name: &[u8], made: Stamp) -> Result<(), TreeError> {
        let is_older = |row: &NameRow| {
            row.layer != TreeLayer::HERE && matches!(row.state, NameState::Live(_)) && row.stamp < made
        };
        if self.ledger.name(parent, name)?.is_none_or(|row| !is_older(&row)) {
            return Ok(());
        }
        let mut in_use = self.lock();
        let mut edit = Edit::new(self, &mut in_use);
        if let Some(row) = edit.name(parent, name)?.filter(|row| is_older(row)) {
            edit.own(parent, name, row.state)?;
        }
        edit.commit()?;
        Ok(())
    }
}
