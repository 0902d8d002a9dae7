//! Of what stamps and layers the names of a file are, without looking at each of them for each entry that is merged.
//!
//! Whatever changes a file of many names is told under each of them, so an edit merges as many entries of it, and
//! asks each time whether one of the others is newer. A file of 7,000 names, changed now and then, kept a machine that read
//! the log busy for minutes.

use std::collections::HashMap;

use super::{Edit, edit::live};
use crate::{
    base::clock::Stamp,
    namespace::TreeError,
    store::rows::{Ino, NameRow, NodeRow, TreeLayer},
};

/// What the names of a file have in common.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Span {
    /// `None`: it has no name.
    newest: Option<Stamp>,
    layer: Option<TreeLayer>,
    /// Its names are of several layers.
    mixed: bool,
}

impl Span {
    pub(super) fn is_up_to(&self, stamp: Stamp) -> bool {
        self.newest.is_none_or(|newest| newest <= stamp)
    }

    pub(super) fn is_of(&self, layer: TreeLayer) -> bool {
        !self.mixed && self.layer.is_none_or(|of| of == layer)
    }

    fn add(&mut self, row: &NameRow) {
        self.newest = self.newest.max(Some(row.stamp));
        self.mixed |= self.layer.is_some_and(|layer| layer != row.layer);
        self.layer = Some(row.layer);
    }

    /// Whether it is the same without `row`, if there are others, and with `after` in its place.
    fn is_without(&self, row: &NameRow, after: Option<&NameRow>) -> bool {
        let is_older = self.newest.is_some_and(|newest| row.stamp < newest);
        match after {
            Some(after) => after.layer == row.layer && (is_older || after.stamp >= row.stamp),
            None => is_older && !self.mixed,
        }
    }
}

impl Edit<'_> {
    pub(super) fn span(&mut self, file: &NodeRow) -> Result<Span, TreeError> {
        if let Some(known) = self.spans.get(&file.ino) {
            return Ok(*known);
        }
        let mut span = Span::default();
        for row in self.own_names(file)? {
            span.add(&row);
        }
        // Those of this edit the ledger does not know yet.
        let changed = self.names.values().flat_map(HashMap::values).flatten();
        for row in changed.filter(|row| row.parent != Ino::LINKS && live(row.state) == Some(file.ino)) {
            span.add(row);
        }
        self.spans.insert(file.ino, span);
        Ok(span)
    }

    /// A register is about to be another one.
    pub(super) fn note_span(&mut self, parent: Ino, name: &[u8], row: Option<&NameRow>) {
        if self.spans.is_empty() || parent == Ino::LINKS {
            return;
        }
        let Ok(old) = self.name(parent, name) else {
            return self.spans.clear();
        };
        let file_of = |row: Option<&NameRow>| row.and_then(|row| live(row.state));
        let (before, after) = (file_of(old.as_deref()), file_of(row));
        if let (Some(ino), Some(old)) = (before, &old) {
            let stays = row.filter(|_| after == before);
            if self
                .spans
                .get(&ino)
                .is_some_and(|span| !span.is_without(old, stays))
            {
                self.spans.remove(&ino);
            }
        }
        if let (Some(ino), Some(row)) = (after, row)
            && let Some(span) = self.spans.get_mut(&ino)
        {
            span.add(row);
        }
    }
}
