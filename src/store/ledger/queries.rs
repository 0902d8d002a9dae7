//! Questions for many rows: the overlays and the index, merged.
//!
//! # Invariants
//!
//! - An answer holds every change that was committed before the question, and no row twice.
//! - Where an overlay says anything of a row, the index is not believed about it.
//!
//! A batch that is handed over to the index in the middle of a question would show rows of two
//! moments; the question is then asked again ([`Layers::consistent`]).

use std::{collections::BTreeMap, sync::Arc};

use super::{
    layers::Layers,
    memory::{Known, Memory},
};
use crate::{
    base::digest::Digest,
    store::{
        StoreError,
        index::{IndexReader, QueueKey},
        overlay::{BlobEntry, Overlay},
        rows::{BlobRow, Content, Ino, NameRow, NodeKind, NodeRow},
    },
};

/// Rows that are read from the index at once, at the least.
const MIN_PAGE: usize = 64;

/// How often a question is asked before it holds the absorber up.
const ATTEMPTS: usize = 3;

/// Names, and where their page ended unless it was the last.
type NamePage = (Vec<Arc<NameRow>>, Option<Vec<u8>>);

impl Layers {
    fn consistent<T>(&self, question: impl Fn() -> Result<T, StoreError>) -> Result<T, StoreError> {
        for _ in 0..ATTEMPTS {
            let epoch = self.memory().epoch;
            let answer = question()?;
            if self.memory().epoch == epoch {
                return Ok(answer);
            }
        }
        let _no_absorb = self.writer();
        question()
    }

    pub fn names_in(
        &self,
        parent: Ino,
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Arc<NameRow>>, StoreError> {
        self.consistent(|| {
            let mut found: Vec<Arc<NameRow>> = Vec::new();
            let mut cursor = after.map(<[u8]>::to_vec);
            while found.len() < limit {
                let page = (limit - found.len()).max(MIN_PAGE);
                let (merged, end) = self.name_page(parent, cursor.as_deref(), page)?;
                found.extend(merged);
                match end {
                    Some(end) => cursor = Some(end),
                    None => break,
                }
            }
            found.truncate(limit);
            Ok(found)
        })
    }

    /// The names behind `after` up to where the shortest page ends, and that end;
    /// without an end there are no more.
    fn name_page(&self, parent: Ino, after: Option<&[u8]>, page: usize) -> Result<NamePage, StoreError> {
        let mut pages: Vec<Vec<(Vec<u8>, Known<NameRow>)>> = {
            let memory = self.memory();
            let overlaid = memory.overlays().map(|overlay| {
                let names = overlay.names_behind(parent, after, page).into_iter();
                names.map(|(name, row)| (name.to_vec(), row.cloned())).collect()
            });
            overlaid.collect()
        };
        let stored = self.index.read(|index| index.names_behind(parent, after, page))?;
        if pages.iter().all(Vec::is_empty) {
            // As in most directories: nothing to merge.
            let end = (stored.len() >= page).then(|| stored.last().map(|row| row.name.clone()));
            return Ok((stored, end.flatten()));
        }
        pages.push(
            stored
                .into_iter()
                .map(|row| (row.name.clone(), Some(row)))
                .collect(),
        );
        let full = pages.iter().filter(|names| names.len() >= page);
        let end = full
            .filter_map(|names| names.last().map(|(name, _)| name.clone()))
            .min();
        let mut merged = BTreeMap::new();
        // The newest comes first, and what comes later does not replace it.
        for (name, row) in pages.into_iter().flatten() {
            if end.as_ref().is_none_or(|end| name <= *end) {
                merged.entry(name).or_insert(row);
            }
        }
        Ok((merged.into_values().flatten().collect(), end))
    }

    pub fn names_of(&self, ino: Ino) -> Result<Vec<Arc<NameRow>>, StoreError> {
        self.consistent(|| {
            let stored = self.index.read(|index| index.names_of(ino))?;
            let memory = self.memory();
            let mut found: Vec<_> = stored
                .into_iter()
                .filter(|row| memory.overlaid_name(row.parent, &row.name).is_none())
                .collect();
            for overlay in memory.overlays() {
                let live = overlay.live_names(ino).iter();
                found.extend(live.filter(|row| is_newest(&memory, row)).cloned());
            }
            found.sort_unstable_by(|a, b| (a.parent, &a.name).cmp(&(b.parent, &b.name)));
            Ok(found)
        })
    }

    pub fn pending_names(&self, limit: usize) -> Result<Vec<Arc<NameRow>>, StoreError> {
        let key = |row: &Arc<NameRow>| QueueKey {
            order: row.pending.map_or(0, |place| place.seq),
            key: (row.parent, row.name.clone()),
        };
        let first = QueueKey {
            order: 0,
            key: (Ino(0), Vec::new()),
        };
        self.queue(
            &first,
            limit,
            key,
            |memory| {
                let newest = |overlay: &Overlay| -> Vec<_> {
                    let rows = overlay.pending_names().filter(|row| is_newest(memory, row));
                    rows.take(limit).cloned().collect()
                };
                memory.overlays().flat_map(newest).collect()
            },
            |memory, row| memory.overlaid_name(row.parent, &row.name).is_some(),
            IndexReader::pending_names,
        )
    }

    pub fn dirty_blobs(&self, limit: usize) -> Result<Vec<Arc<BlobRow>>, StoreError> {
        self.blob_queue(
            limit,
            |entry| entry.dirty_since,
            |memory| {
                let newest = |overlay: &Overlay| -> Vec<_> {
                    let entries = overlay
                        .dirty_blobs()
                        .filter(|entry| is_newest_blob(memory, entry));
                    entries.take(limit).cloned().collect()
                };
                memory.overlays().flat_map(newest).collect()
            },
            IndexReader::dirty_blobs,
        )
    }

    pub fn victims(&self, limit: usize) -> Result<Vec<Arc<BlobRow>>, StoreError> {
        self.blob_queue(
            limit,
            |entry| entry.row.used_secs,
            |memory| {
                let entries = memory
                    .overlays()
                    .flat_map(|overlay| overlay.blobs.values().flatten());
                let victims = entries.filter(|entry| entry.is_victim() && is_newest_blob(memory, entry));
                victims.cloned().collect()
            },
            IndexReader::victims,
        )
    }

    fn blob_queue(
        &self,
        limit: usize,
        order: impl Fn(&BlobEntry) -> u64,
        overlaid: impl Fn(&Memory) -> Vec<BlobEntry>,
        stored: impl Fn(&IndexReader, &QueueKey<Digest>, usize) -> Result<Vec<BlobEntry>, StoreError>,
    ) -> Result<Vec<Arc<BlobRow>>, StoreError> {
        let first = QueueKey {
            order: 0,
            key: Digest::from_bytes([0; 32]),
        };
        let key = |entry: &BlobEntry| QueueKey {
            order: order(entry),
            key: entry.row.digest,
        };
        let shadowed = |memory: &Memory, entry: &BlobEntry| memory.overlays_blob(&entry.row.digest);
        let entries = self.queue(&first, limit, key, overlaid, shadowed, stored)?;
        Ok(entries.into_iter().map(|entry| entry.row).collect())
    }

    /// The first `limit` rows in the order of `key`: all that `overlaid` finds in memory,
    /// and those that `stored` finds in the index and of which memory says nothing.
    fn queue<K: Ord, T>(
        &self,
        first: &QueueKey<K>,
        limit: usize,
        key: impl Fn(&T) -> QueueKey<K>,
        overlaid: impl Fn(&Memory) -> Vec<T>,
        shadowed: impl Fn(&Memory, &T) -> bool,
        stored: impl Fn(&IndexReader, &QueueKey<K>, usize) -> Result<Vec<T>, StoreError>,
    ) -> Result<Vec<T>, StoreError> {
        self.consistent(|| {
            let mut found = overlaid(&self.memory());
            let mut cursor = None;
            let (mut taken, page) = (0, limit.max(MIN_PAGE));
            while taken < limit {
                let rows = self
                    .index
                    .read(|index| stored(index, cursor.as_ref().unwrap_or(first), page))?;
                let full = rows.len() == page;
                cursor = rows.last().map(&key);
                let memory = self.memory();
                let fresh = rows.into_iter().filter(|row| !shadowed(&memory, row));
                let before = found.len();
                found.extend(fresh);
                taken += found.len() - before;
                if !full {
                    break;
                }
            }
            found.sort_by_cached_key(&key);
            found.truncate(limit);
            Ok(found)
        })
    }

    pub fn staging_nodes(&self) -> Result<Vec<Arc<NodeRow>>, StoreError> {
        self.nodes_where(
            |row| matches!(row.content, Content::Staging(_)),
            IndexReader::staging_nodes,
        )
    }

    pub fn nameless_nodes(&self) -> Result<Vec<Arc<NodeRow>>, StoreError> {
        self.nodes_where(
            |row| row.kind != NodeKind::Dir && row.nlink == 0,
            IndexReader::nameless_nodes,
        )
    }

    fn nodes_where(
        &self,
        wanted: impl Fn(&NodeRow) -> bool,
        stored: impl Fn(&IndexReader) -> Result<Vec<Arc<NodeRow>>, StoreError>,
    ) -> Result<Vec<Arc<NodeRow>>, StoreError> {
        self.consistent(|| {
            let mut found: BTreeMap<Ino, Option<Arc<NodeRow>>> = BTreeMap::new();
            for overlay in self.memory().overlays() {
                for (ino, row) in &overlay.nodes {
                    found.entry(*ino).or_insert_with(|| row.clone());
                }
            }
            for row in self.index.read(&stored)? {
                found.entry(row.ino).or_insert(Some(row));
            }
            Ok(found.into_values().flatten().filter(|row| wanted(row)).collect())
        })
    }
}

/// Whether a row of an overlay is not replaced by a newer overlay.
fn is_newest(memory: &Memory, row: &Arc<NameRow>) -> bool {
    let newest = memory.overlaid_name(row.parent, &row.name);
    newest.is_some_and(|newest| newest.as_ref().is_some_and(|newest| Arc::ptr_eq(newest, row)))
}

fn is_newest_blob(memory: &Memory, entry: &BlobEntry) -> bool {
    let newest = memory
        .overlays()
        .find_map(|overlay| overlay.blobs.get(&entry.row.digest));
    newest.is_some_and(|newest| {
        newest
            .as_ref()
            .is_some_and(|newest| Arc::ptr_eq(&newest.row, &entry.row))
    })
}
