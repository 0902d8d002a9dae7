//! Rows that the index does not have yet, in memory.
//!
//! The ledger has at most two: one that changes go into, and one that is being written to the index
//! and does not change any more. `None` says that a row was dropped.
//!
//! # Invariants
//!
//! - `live`, `pending` and `dirty` are exactly the rows of `names` and `blobs` that they speak of.
//! - Nothing here knows the index: an answer "not here" says nothing about the row.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
    sync::Arc,
};

use super::{
    ledger::Totals,
    record::Ceilings,
    rows::{
        BlobRow, ChunkRow, Durability, Ino, ListObject, NameRow, NameState, NodeRow, Residency, StagingId,
    },
};
use crate::base::{chunk::ChunkList, digest::Digest};

/// A blob's row, and what the ledger knows of it besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobEntry {
    pub row: Arc<BlobRow>,
    /// The journal record that made it dirty, if it is: the upload queue's order.
    pub dirty_since: u64,
    pub resident_bytes: u64,
}

impl BlobEntry {
    pub fn is_dirty(&self) -> bool {
        self.row.durability == Durability::Dirty
    }

    /// Whether eviction may choose it.
    pub fn is_victim(&self) -> bool {
        matches!(self.row.durability, Durability::Durable { .. })
            && !self.row.pinned
            && self.row.residency != Residency::Nothing
    }
}

/// Bytes that power loss could take, although a row speaks of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unsettled {
    Blob(Digest),
    Staging(StagingId),
    /// Power loss did come; stays until the doubt was dealt with.
    DoubtedStaging(StagingId),
}

/// What the row of a directory's name says, by the bytes of the name.
type Names = BTreeMap<Box<[u8]>, Option<Arc<NameRow>>>;

#[derive(Debug, Default)]
pub struct Overlay {
    pub nodes: HashMap<Ino, Option<Arc<NodeRow>>>,
    pub names: HashMap<Ino, Names>,
    live: HashMap<Ino, Vec<Arc<NameRow>>>,
    pending: BTreeMap<u64, Vec<Arc<NameRow>>>,
    pub blobs: HashMap<Digest, Option<BlobEntry>>,
    dirty: BTreeSet<(u64, Digest)>,
    pub manifests: HashMap<Digest, Arc<ChunkList>>,
    pub lists: HashMap<Digest, ListObject>,
    pub chunks: HashMap<Digest, ChunkRow>,
    pub meta: HashMap<String, Vec<u8>>,
    /// The record that made them so, or `None` when they are settled.
    pub unsettled: BTreeMap<Unsettled, Option<u64>>,
    /// The newest record in here; 0 when there is none.
    pub seq: u64,
    /// As of `seq`.
    pub totals: Totals,
    /// As of `seq`.
    pub ceilings: Ceilings,
    /// About how much memory this takes. Counts what was put in, also when it replaced something.
    pub bytes: usize,
}

/// What a row costs beside the bytes that it points at: the row, its entry in
/// a table and its share of the sums.
const ROW_BYTES: usize = 400;

impl Overlay {
    pub fn put_node(&mut self, ino: Ino, row: Option<Arc<NodeRow>>) {
        self.bytes += ROW_BYTES
            + row.as_ref().map_or(0, |row| {
                let xattrs = row
                    .xattrs
                    .iter()
                    .map(|(name, value)| name.len() + value.len() + 48);
                row.target.len() + xattrs.sum::<usize>() + row.dir.as_ref().map_or(0, |dir| dir.name.len())
            });
        self.nodes.insert(ino, row);
    }

    pub fn put_name(&mut self, parent: Ino, name: &[u8], row: Option<Arc<NameRow>>) {
        self.bytes += ROW_BYTES + 2 * name.len();
        if let Some(row) = &row {
            if let NameState::Live(ino) = row.state {
                self.live.entry(ino).or_default().push(Arc::clone(row));
            }
            if let Some(place) = row.pending {
                let rows = self.pending.entry(place.seq).or_default();
                let key = |row: &NameRow| (row.parent, row.name.clone());
                let at = rows.partition_point(|other| key(other) < key(row));
                rows.insert(at, Arc::clone(row));
            }
        }
        let old = self.names.entry(parent).or_default().insert(name.into(), row);
        let Some(Some(old)) = old else { return };
        if let NameState::Live(ino) = old.state {
            forget(&mut self.live, ino, &old);
        }
        if let Some(place) = old.pending
            && let Some(rows) = self.pending.get_mut(&place.seq)
        {
            rows.retain(|row| !Arc::ptr_eq(row, &old));
            if rows.is_empty() {
                self.pending.remove(&place.seq);
            }
        }
    }

    pub fn put_blob(&mut self, digest: Digest, entry: Option<BlobEntry>) {
        self.bytes += ROW_BYTES;
        if let Some(entry) = entry.as_ref().filter(|entry| entry.is_dirty()) {
            self.dirty.insert((entry.dirty_since, digest));
        }
        let since = entry
            .as_ref()
            .filter(|entry| entry.is_dirty())
            .map(|entry| entry.dirty_since);
        let old = self.blobs.insert(digest, entry);
        if let Some(Some(old)) = old
            && old.is_dirty()
            && Some(old.dirty_since) != since
        {
            self.dirty.remove(&(old.dirty_since, digest));
        }
    }

    pub fn put_manifest(&mut self, digest: Digest, chunks: Arc<ChunkList>) {
        self.bytes += ROW_BYTES + 48 * chunks.chunks().len();
        self.manifests.insert(digest, chunks);
    }

    pub fn put_list(&mut self, blob: Digest, list: ListObject) {
        self.bytes += ROW_BYTES / 2;
        self.lists.insert(blob, list);
    }

    pub fn put_chunk(&mut self, digest: Digest, row: ChunkRow) {
        self.bytes += ROW_BYTES / 2;
        self.chunks.insert(digest, row);
    }

    pub fn put_meta(&mut self, key: String, value: Vec<u8>) {
        self.bytes += ROW_BYTES + key.len() + value.len();
        self.meta.insert(key, value);
    }

    pub fn put_unsettled(&mut self, what: Unsettled, seq: Option<u64>) {
        self.bytes += ROW_BYTES / 4;
        self.unsettled.insert(what, seq);
    }

    pub fn name(&self, parent: Ino, name: &[u8]) -> Option<&Option<Arc<NameRow>>> {
        self.names.get(&parent)?.get(name)
    }

    /// Up to `limit` names of `parent` behind `after`, dropped ones too, in order.
    pub fn names_behind(
        &self,
        parent: Ino,
        after: Option<&[u8]>,
        limit: usize,
    ) -> Vec<(&[u8], Option<&Arc<NameRow>>)> {
        let Some(names) = self.names.get(&parent) else {
            return Vec::new();
        };
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        names
            .range::<[u8], _>((from, Bound::Unbounded))
            .take(limit)
            .map(|(name, row)| (&**name, row.as_ref()))
            .collect()
    }

    /// Names in here that say that they are `ino`.
    pub fn live_names(&self, ino: Ino) -> &[Arc<NameRow>] {
        self.live.get(&ino).map_or(&[], Vec::as_slice)
    }

    /// Names in here that are not published, by place, parent and name.
    pub fn pending_names(&self) -> impl Iterator<Item = &Arc<NameRow>> {
        self.pending.values().flatten()
    }

    /// Dirty blobs in here, oldest first.
    pub fn dirty_blobs(&self) -> impl Iterator<Item = &BlobEntry> {
        self.dirty
            .iter()
            .filter_map(|(_, digest)| self.blobs.get(digest)?.as_ref())
    }
}

fn forget(live: &mut HashMap<Ino, Vec<Arc<NameRow>>>, ino: Ino, old: &Arc<NameRow>) {
    if let Some(rows) = live.get_mut(&ino) {
        rows.retain(|row| !Arc::ptr_eq(row, old));
        if rows.is_empty() {
            live.remove(&ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::clock::Stamp,
        store::rows::{NameState, Place, TreeLayer},
    };

    #[expect(clippy::unnecessary_wraps, reason = "as an overlay takes it")]
    fn name(name: &[u8], state: NameState, place: Option<u64>) -> Option<Arc<NameRow>> {
        Some(Arc::new(NameRow {
            parent: Ino::ROOT,
            name: name.to_vec(),
            layer: TreeLayer::TOP,
            stamp: Stamp::ZERO,
            state,
            dir: None,
            pending: place.map(|seq| Place { seq, first_seq: seq }),
        }))
    }

    #[test]
    fn a_row_that_was_replaced_is_in_no_queue() {
        let mut overlay = Overlay::default();
        overlay.put_name(Ino::ROOT, b"a", name(b"a", NameState::Live(Ino(5)), Some(1)));
        overlay.put_name(Ino::ROOT, b"b", name(b"b", NameState::Live(Ino(5)), Some(1)));
        overlay.put_name(Ino::ROOT, b"a", name(b"a", NameState::Dead, None));
        let pending: Vec<_> = overlay.pending_names().map(|row| row.name.clone()).collect();
        assert_eq!(pending, [b"b".to_vec()]);
        assert_eq!(overlay.live_names(Ino(5)).len(), 1);
        overlay.put_name(Ino::ROOT, b"b", None);
        assert_eq!(overlay.pending_names().count(), 0);
        assert!(overlay.live.is_empty() && overlay.pending.is_empty());
    }

    #[test]
    fn names_come_in_the_order_of_their_bytes() {
        let mut overlay = Overlay::default();
        for bytes in [&b"b"[..], b"\xff", b"a", b"ab"] {
            overlay.put_name(Ino::ROOT, bytes, None);
        }
        overlay.put_name(Ino(9), b"aa", None);
        let found: Vec<_> = overlay
            .names_behind(Ino::ROOT, Some(b"a"), 2)
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(found, [&b"ab"[..], b"b"]);
    }
}
