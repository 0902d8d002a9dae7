//! The part of the rows that is in memory: what the index lacks, and what was used last.
//!
//! # Invariants
//!
//! - A cached row is the newest: every change goes through the caches, so they are looked at first.
//!   A cached `None` says that there is no such row.
//! - A row that is in neither the caches nor an overlay is in the index as it was last committed.

use std::{collections::HashSet, num::NonZeroUsize, sync::Arc};

use lru::LruCache;

use super::{Totals, unwanted::Unwanted, young::Young};
use crate::{
    base::{chunk::ChunkList, digest::Digest},
    store::{
        overlay::{BlobEntry, Overlay, Unsettled},
        record::{Ceilings, Redo},
        rows::{
            BlobRow, Change, ChunkRow, Content, Durability, Ino, ListObject, NameRow, NodeRow, Residency,
            StagingId,
        },
    },
};

// About 300 bytes each: 60 MB at the most, of the daemon's 300.
const CACHED_NODES: usize = 64 << 10;
const CACHED_NAMES: usize = 96 << 10;
const CACHED_BLOBS: usize = 32 << 10;
/// A manifest of a 1 GiB blob takes 100 KB.
const CACHED_MANIFESTS: usize = 128;

/// What is known of a row: it, or that there is none.
pub type Known<T> = Option<Arc<T>>;

type NameKey = (Ino, Box<[u8]>);

#[derive(Debug)]
pub struct Memory {
    /// What changes go into.
    pub active: Overlay,
    /// What is being written to the index; does not change.
    pub absorbing: Option<Arc<Overlay>>,
    nodes: LruCache<Ino, Known<NodeRow>>,
    names: LruCache<NameKey, Known<NameRow>>,
    young: Young,
    blobs: LruCache<Digest, Option<BlobEntry>>,
    manifests: LruCache<Digest, Arc<ChunkList>>,
    pub unwanted: Unwanted,
    pub totals: Totals,
    pub ceilings: Ceilings,
    /// The newest change in here.
    pub seq: u64,
    /// Staging files whose bytes may have been lost with the power.
    pub doubted: HashSet<StagingId>,
    /// Counts hand-overs between the overlays and the index: one when a batch
    /// stops changing, one when the index has it.
    pub epoch: u64,
    /// Why the last absorb failed, if it did: whether the disk was full.
    pub stuck: Option<bool>,
}

/// What a change does to a blob's row.
#[derive(Debug)]
pub struct BlobStep {
    pub old: Option<BlobEntry>,
    pub new: Option<BlobEntry>,
}

/// Looks a row up where it can be, newest place first.
macro_rules! find {
    ($self:ident, $cache:ident, $table:ident, $key:expr) => {{
        if let Some(row) = $self.$cache.get($key) {
            return Some(row.clone());
        }
        let absorbing = $self.absorbing.as_ref();
        let row = $self
            .active
            .$table
            .get($key)
            .or_else(|| absorbing.and_then(|overlay| overlay.$table.get($key)))?
            .clone();
        $self.$cache.put(*$key, row.clone());
        Some(row)
    }};
}

impl Memory {
    pub fn new(seq: u64, totals: Totals, ceilings: Ceilings) -> Self {
        let capacity = |rows| NonZeroUsize::new(rows).expect("not zero");
        Self {
            active: Overlay::default(),
            absorbing: None,
            nodes: LruCache::sparse(capacity(CACHED_NODES)),
            names: LruCache::sparse(capacity(CACHED_NAMES)),
            young: Young::new(Ino(ceilings.ino)),
            blobs: LruCache::sparse(capacity(CACHED_BLOBS)),
            manifests: LruCache::sparse(capacity(CACHED_MANIFESTS)),
            unwanted: Unwanted::default(),
            totals,
            ceilings,
            seq,
            doubted: HashSet::new(),
            epoch: 0,
            stuck: None,
        }
    }

    /// `None`: not in memory. `Some(None)`: there is no such row.
    pub fn node(&mut self, ino: Ino) -> Option<Known<NodeRow>> {
        find!(self, nodes, nodes, &ino)
    }

    pub fn name(&mut self, parent: Ino, name: &[u8]) -> Option<Known<NameRow>> {
        let key = (parent, Box::from(name));
        if let Some(row) = self.names.get(&key) {
            return Some(row.clone());
        }
        match self.overlaid_name(parent, name) {
            Some(row) => {
                let row = row.clone();
                self.names.put(key, row.clone());
                Some(row)
            }
            None if self.young.may_have(parent, name) => None,
            None => Some(None),
        }
    }

    /// What the overlays say of a name.
    pub fn overlaid_name(&self, parent: Ino, name: &[u8]) -> Option<&Option<Arc<NameRow>>> {
        let absorbing = self.absorbing.as_ref();
        self.active
            .name(parent, name)
            .or_else(|| absorbing.and_then(|overlay| overlay.name(parent, name)))
    }

    #[expect(
        clippy::option_option,
        reason = "not in memory, or known to be nowhere, or the row"
    )]
    pub fn blob(&mut self, digest: &Digest) -> Option<Option<BlobEntry>> {
        find!(self, blobs, blobs, digest)
    }

    /// Whether an overlay says anything of a blob.
    pub fn overlays_blob(&self, digest: &Digest) -> bool {
        self.overlays().any(|overlay| overlay.blobs.contains_key(digest))
    }

    pub fn manifest(&mut self, digest: &Digest) -> Option<Arc<ChunkList>> {
        find!(self, manifests, manifests, digest)
    }

    pub fn chunk(&self, digest: &Digest) -> Option<ChunkRow> {
        self.overlays()
            .find_map(|overlay| overlay.chunks.get(digest).copied())
    }

    pub fn list(&self, blob: &Digest) -> Option<ListObject> {
        self.overlays()
            .find_map(|overlay| overlay.lists.get(blob).copied())
    }

    pub fn meta(&self, key: &str) -> Option<Vec<u8>> {
        self.overlays().find_map(|overlay| overlay.meta.get(key).cloned())
    }

    pub fn meta_keys(&self, prefix: &str) -> Vec<String> {
        let keys = self.overlays().flat_map(|overlay| overlay.meta.keys());
        keys.filter(|key| key.starts_with(prefix)).cloned().collect()
    }

    /// The newest first.
    pub fn overlays(&self) -> impl Iterator<Item = &Overlay> {
        std::iter::once(&self.active).chain(self.absorbing.as_deref())
    }

    // What the index answered. The caller knows that no hand-over came between.

    pub fn keep_node(&mut self, ino: Ino, row: Option<Arc<NodeRow>>) {
        self.nodes.put(ino, row);
    }

    pub fn keep_name(&mut self, parent: Ino, name: &[u8], row: Option<Arc<NameRow>>) {
        self.names.put((parent, Box::from(name)), row);
    }

    pub fn keep_blob(&mut self, digest: Digest, entry: Option<BlobEntry>) {
        self.blobs.put(digest, entry);
    }

    pub fn keep_manifest(&mut self, digest: Digest, chunks: Arc<ChunkList>) {
        self.manifests.put(digest, chunks);
    }

    pub fn overlay_bytes(&self) -> usize {
        self.overlays().map(|overlay| overlay.bytes).sum()
    }

    /// Takes in the record `seq`. `steps` has one for each change of a blob, in order.
    pub fn apply(&mut self, seq: u64, redos: Vec<Redo>, steps: Vec<BlobStep>) {
        debug_assert_eq!(seq, self.seq + 1, "records are applied in order");
        self.unwanted.note(&redos, &steps);
        let mut steps = steps.into_iter();
        for redo in redos {
            match redo {
                Redo::Change(change) => self.apply_change(seq, change, &mut steps),
                Redo::Ceilings(ceilings) => self.ceilings = ceilings,
                Redo::DoubtStaging(id) => {
                    self.active.put_unsettled(Unsettled::Staging(id), None);
                    self.active
                        .put_unsettled(Unsettled::DoubtedStaging(id), Some(seq));
                    self.doubted.insert(id);
                }
            }
        }
        self.seq = seq;
        self.active.seq = seq;
        self.active.totals = self.totals;
        self.active.ceilings = self.ceilings;
    }

    fn apply_change(&mut self, seq: u64, change: Change, steps: &mut impl Iterator<Item = BlobStep>) {
        match change {
            Change::PutNode(row) => self.put_node(seq, row),
            Change::DropNode(ino) => {
                if let Some(Some(old)) = self.node(ino) {
                    self.leave_staging(&old.content);
                }
                self.active.put_node(ino, None);
                self.nodes.put(ino, None);
            }
            Change::PutName(row) => {
                let row = Arc::new(row);
                self.young.note(row.parent, &row.name);
                self.active
                    .put_name(row.parent, &row.name, Some(Arc::clone(&row)));
                self.keep_name(row.parent, &row.name, Some(Arc::clone(&row)));
            }
            Change::DropName(parent, name) => {
                self.active.put_name(parent, &name, None);
                self.keep_name(parent, &name, None);
            }
            Change::PutBlob(BlobRow { digest, .. }) | Change::DropBlob(digest) => {
                let step = steps.next().expect("there is a step for each change of a blob");
                self.put_blob(seq, digest, step);
            }
            Change::PutManifest(digest, chunks) => {
                let chunks = Arc::new(chunks);
                self.active.put_manifest(digest, Arc::clone(&chunks));
                self.manifests.put(digest, chunks);
            }
            Change::PutChunk(digest, row) => self.active.put_chunk(digest, row),
            Change::PutList(blob, list) => self.active.put_list(blob, list),
            Change::PutMeta(key, value) => self.active.put_meta(key, value),
            Change::SyncedStaging(id) => self.settle_staging(id),
        }
    }

    fn put_node(&mut self, seq: u64, row: NodeRow) {
        let row = Arc::new(row);
        let old = self.node(row.ino).flatten();
        if let Some(old) = &old
            && old.content != row.content
        {
            self.leave_staging(&old.content);
        }
        if let Content::Staging(id) = row.content {
            // A change of the mode says nothing about bytes. When the old row is not in
            // memory the bytes are taken for new, which can only cost a doubt too many.
            let written = old
                .is_none_or(|old| (&old.content, old.size, old.mtime) != (&row.content, row.size, row.mtime));
            if written {
                self.active.put_unsettled(Unsettled::Staging(id), Some(seq));
            }
        }
        self.active.put_node(row.ino, Some(Arc::clone(&row)));
        self.nodes.put(row.ino, Some(row));
    }

    fn leave_staging(&mut self, content: &Content) {
        if let Content::Staging(id) = *content {
            self.settle_staging(id);
        }
    }

    fn settle_staging(&mut self, id: StagingId) {
        self.active.put_unsettled(Unsettled::Staging(id), None);
        if self.doubted.remove(&id) {
            self.active.put_unsettled(Unsettled::DoubtedStaging(id), None);
        }
    }

    fn put_blob(&mut self, seq: u64, digest: Digest, BlobStep { old, new }: BlobStep) {
        self.totals.account(old.as_ref(), new.as_ref());
        let has_bytes = |entry: &BlobEntry| entry.row.residency != Residency::Nothing;
        match &new {
            Some(new) if gained(old.as_ref(), new) => {
                self.active.put_unsettled(Unsettled::Blob(digest), Some(seq));
            }
            Some(new) if has_bytes(new) => {}
            // No bytes, no doubt.
            _ if old.as_ref().is_some_and(has_bytes) => {
                self.active.put_unsettled(Unsettled::Blob(digest), None);
            }
            _ => {}
        }
        self.active.put_blob(digest, new.clone());
        self.blobs.put(digest, new);
    }
}

/// Whether the new row speaks of bytes that the old one did not.
///
/// Where the old one doubted them, wrong ones may have been fetched anew.
fn gained(old: Option<&BlobEntry>, new: &BlobEntry) -> bool {
    if old.is_some_and(|old| old.row.doubted) && !new.row.doubted {
        return new.row.residency != Residency::Nothing;
    }
    let old = old.map_or(&Residency::Nothing, |old| &old.row.residency);
    match (old, &new.row.residency) {
        (_, Residency::Nothing) | (Residency::Whole, _) => false,
        (Residency::Partial(old), Residency::Partial(new)) => new
            .iter()
            .enumerate()
            .any(|(at, bits)| bits & !old.get(at).copied().unwrap_or(0) != 0),
        _ => true,
    }
}

impl Totals {
    /// Moves the sums from one state of a blob to the next.
    fn account(&mut self, old: Option<&BlobEntry>, new: Option<&BlobEntry>) {
        if let Some(old) = old {
            let (resident_blobs, dirty_blobs, quarantined) = shares(old);
            self.resident_bytes -= old.resident_bytes;
            self.resident_blobs -= resident_blobs;
            self.dirty_bytes -= dirty_blobs * old.row.size;
            self.dirty_blobs -= dirty_blobs;
            self.quarantined_blobs -= quarantined;
        }
        if let Some(new) = new {
            let (resident_blobs, dirty_blobs, quarantined) = shares(new);
            self.resident_bytes += new.resident_bytes;
            self.resident_blobs += resident_blobs;
            self.dirty_bytes += dirty_blobs * new.row.size;
            self.dirty_blobs += dirty_blobs;
            self.quarantined_blobs += quarantined;
        }
        if let Some(old) = old
            && matches!(old.row.durability, Durability::Durable { .. })
            && old.row.residency != Residency::Nothing
            && new.is_none_or(|new| new.row.residency == Residency::Nothing)
        {
            self.evicted_bytes += old.resident_bytes;
            self.evicted_blobs += 1;
        }
    }
}

/// What a blob adds to the sums: 0 or 1 each.
fn shares(entry: &BlobEntry) -> (u64, u64, u64) {
    (
        u64::from(entry.row.residency != Residency::Nothing),
        u64::from(entry.is_dirty()),
        u64::from(entry.row.durability == Durability::Quarantined),
    )
}
