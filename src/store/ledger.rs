//! The one door to the index: rows in memory, backed by a journal and by a database.
//!
//! A change is one append to the journal and an entry in memory; then it is committed. A thread absorbs
//! what changed into the index, the newest state of each row once, however often it changed. Questions
//! are answered from memory where it knows, else by the index.
//!
//! ```text
//! commit -> journal (one write) -> overlay -> ... absorber, every second ... -> index
//! question -> caches -> overlay -> index
//! ```
//!
//! # Invariants
//!
//! - What [`Ledger::commit`] took survives the end of the process at any instant, all of it or nothing of it.
//! - A committed change is seen by every question asked after `commit` returned.
//! - What was committed before a [`Ledger::sync`] or a barrier survives power loss.
//! - Journal records are applied in the order of their numbers, live and in a replay alike, so that both
//!   end with the same rows and the same sums.
//!
//! # Policy
//!
//! The absorber waits a second between batches, because most rows of a build change several times within
//! one (a temporary name, its rename, the seal); memory, not time, bounds what may wait.

mod barrier;
mod layers;
mod memory;
mod numbers;
mod queries;
mod recover;
mod reserve;
#[cfg(test)]
mod tests;
mod unwanted;
mod young;

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Duration,
};

use self::{
    barrier::{Bell, Callbacks, MAX_JOURNAL_BYTES},
    layers::{ABSORB_BYTES, Layers},
    numbers::Numbers,
    reserve::Reserve,
};
use super::{
    StoreError,
    journal::{Journal, RECORD_HEADER_BYTES},
    pack::PackPlace,
    record::{self, Redo},
    rows::{BlobRow, Change, ChunkRow, Ino, ListObject, NameRow, NameState, NodeRow},
};
use crate::base::{chunk::ChunkList, digest::Digest};

/// As long as the record of a change of one file: longer ones grow.
const USUAL_RECORD_BYTES: usize = 512;

/// Sums over all blobs, kept as rows change; reading them costs nothing.
///
/// What was evicted is counted since the cache directory was made: clean blobs
/// whose bytes left this disk, to make room or because a writer took them over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub resident_bytes: u64,
    pub resident_blobs: u64,
    pub dirty_bytes: u64,
    pub dirty_blobs: u64,
    pub quarantined_blobs: u64,
    pub evicted_bytes: u64,
    pub evicted_blobs: u64,
}

/// How often the ledger's threads act by themselves.
#[derive(Clone, Copy, Debug)]
pub struct LedgerOptions {
    pub absorb_every: Duration,
    pub barrier_every: Duration,
}

impl Default for LedgerOptions {
    fn default() -> Self {
        Self {
            absorb_every: Duration::from_secs(1),
            barrier_every: Duration::from_secs(30),
        }
    }
}

#[derive(Debug)]
pub struct Ledger {
    core: Arc<Core>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the ledger shares with its threads.
#[derive(Debug)]
struct Core {
    dir: PathBuf,
    /// `dir`, for `syncfs(2)`.
    root: File,
    layers: Layers,
    journal: Journal,
    numbers: Numbers,
    /// The newest record that survives power loss; held while a barrier runs.
    barrier_seq: Mutex<u64>,
    callbacks: Callbacks,
    absorber: Bell,
    barriers: Bell,
}

impl Core {
    fn commit(&self, mut redos: Vec<Redo>) -> Result<(), StoreError> {
        if redos.is_empty() {
            return Ok(());
        }
        if self.layers.reserve.is_used() && self.grows(&redos)? {
            return Err(StoreError::Full);
        }
        self.layers.make_room(|| self.absorber.ring())?;
        let mut record = Vec::with_capacity(USUAL_RECORD_BYTES);
        record.resize(RECORD_HEADER_BYTES, 0);
        record::encode(&redos, &mut record);

        let mut tail = self.journal.tail();
        let carried = redos.iter().any(|redo| matches!(redo, Redo::Ceilings(_)));
        if let Some(ceilings) = self.numbers.due().filter(|_| !carried) {
            redos.push(Redo::Ceilings(ceilings));
            record::encode(&redos[redos.len() - 1..], &mut record);
        }
        let steps = self.layers.plan(tail.seq() + 1, &redos)?;
        let seq = match tail.append(&mut record) {
            Err(StoreError::Full) if !self.grows(&redos)? && self.layers.reserve.release() => {
                // Journal files and staging files go with a barrier: now is the time.
                self.barriers.ring();
                tail.append(&mut record)?
            }
            other => other?,
        };
        for redo in &redos {
            if let Redo::Ceilings(ceilings) = redo {
                self.numbers.raised(*ceilings);
            }
        }
        let journal_full = tail.file_bytes() >= MAX_JOURNAL_BYTES
            && tail.file_bytes() - (record.len() as u64) < MAX_JOURNAL_BYTES;
        let mut memory = self.layers.memory();
        let before = memory.active.bytes;
        memory.apply(seq, redos, steps);
        let many = before < ABSORB_BYTES && memory.active.bytes >= ABSORB_BYTES;
        drop(memory);
        drop(tail);
        if many {
            self.absorber.ring();
        }
        if journal_full {
            self.barriers.ring();
        }
        Ok(())
    }

    /// Whether changes give the tree another name, which a full disk may refuse. What frees
    /// space, removes names or notes what became of a file is let through; so is a new stamp of
    /// a name that is there: without it a file whose close was refused would never be sealed.
    fn grows(&self, redos: &[Redo]) -> Result<bool, StoreError> {
        for redo in redos {
            if let Redo::Change(Change::PutName(row)) = redo
                && row.state != NameState::Dead
                && row.pending.is_some()
                && self
                    .layers
                    .name(row.parent, &row.name)?
                    .is_none_or(|old| old.state == NameState::Dead)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Ledger {
    /// Applies `changes` as one: all of them survive a crash of the daemon, or none.
    /// Visible to every reader when this returns. One `write(2)`, no barrier.
    ///
    /// A blob row that is partly resident needs its manifest known, committed
    /// before or earlier in the same commit.
    ///
    /// # Errors
    ///
    /// [`StoreError::Full`] when the disk is full; nothing is applied then, nor by any other error. A change
    /// that gives this machine another live name is refused first: all others may use the index's reserve.
    /// Waits when the index is far behind.
    pub fn commit(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        self.core.commit(changes.into_iter().map(Redo::Change).collect())
    }

    pub fn node(&self, ino: Ino) -> Result<Option<Arc<NodeRow>>, StoreError> {
        self.core.layers.node(ino)
    }

    pub fn name(&self, parent: Ino, name: &[u8]) -> Result<Option<Arc<NameRow>>, StoreError> {
        self.core.layers.name(parent, name)
    }

    /// Names below `parent` that sort behind `after`, dead ones too, in the order of their bytes.
    pub fn names_in(
        &self,
        parent: Ino,
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Arc<NameRow>>, StoreError> {
        self.core.layers.names_in(parent, after, limit)
    }

    /// Live names of a node (its hard links), by parent and name.
    pub fn names_of(&self, ino: Ino) -> Result<Vec<Arc<NameRow>>, StoreError> {
        self.core.layers.names_of(ino)
    }

    /// Own changes that are not published, in the order of `pending.seq`.
    pub fn pending_names(&self, limit: usize) -> Result<Vec<Arc<NameRow>>, StoreError> {
        self.core.layers.pending_names(limit)
    }

    /// Nodes whose content is a staging file; read at the start to resume sealing.
    pub fn staging_nodes(&self) -> Result<Vec<Arc<NodeRow>>, StoreError> {
        self.core.layers.staging_nodes()
    }

    /// Files without a name (directories are never meant); read at the start
    /// to drop what a crash left open.
    pub fn nameless_nodes(&self) -> Result<Vec<Arc<NodeRow>>, StoreError> {
        self.core.layers.nameless_nodes()
    }

    /// A number that no node had; 2 is the first. Costs no write.
    pub fn next_ino(&self) -> Ino {
        Ino(self.core.numbers.next_ino())
    }

    /// Places grow for ever, across restarts; 1 is the first. Costs no write.
    pub fn next_place(&self) -> u64 {
        self.core.numbers.next_place()
    }

    pub fn blob(&self, digest: &Digest) -> Result<Option<Arc<BlobRow>>, StoreError> {
        Ok(self.core.layers.blob(digest)?.map(|entry| entry.row))
    }

    /// How many bytes of a blob are on this disk; 0 for one without a row.
    pub fn resident_bytes(&self, digest: &Digest) -> Result<u64, StoreError> {
        let entry = self.core.layers.blob(digest)?;
        Ok(entry.map_or(0, |entry| entry.resident_bytes))
    }

    /// The chunks of a blob of `size` bytes: known at once for a blob of one chunk.
    pub fn manifest(&self, digest: &Digest, size: u64) -> Result<Option<Arc<ChunkList>>, StoreError> {
        self.core.layers.manifest(digest, size)
    }

    /// The upload queue: dirty blobs, in the order in which they became dirty.
    pub fn dirty_blobs(&self, limit: usize) -> Result<Vec<Arc<BlobRow>>, StoreError> {
        self.core.layers.dirty_blobs(limit)
    }

    /// Whether a dirty blob was never anywhere but here, and no file has it any more.
    pub fn is_unwanted(&self, digest: &Digest) -> bool {
        self.core.layers.memory().unwanted.has(digest)
    }

    /// How many there are.
    pub fn unwanted_count(&self) -> usize {
        self.core.layers.memory().unwanted.all().len()
    }

    /// All such blobs, in no order.
    pub fn unwanted_blobs(&self) -> Vec<Digest> {
        self.core.layers.memory().unwanted.all().iter().copied().collect()
    }

    /// Blobs that may be evicted (durable, not pinned, with bytes here), oldest use first.
    /// Whether one is open is for the caller to know.
    pub fn victims(&self, limit: usize) -> Result<Vec<Arc<BlobRow>>, StoreError> {
        self.core.layers.victims(limit)
    }

    /// Where the bucket has a chunk, and when it was last seen to.
    pub fn chunk(&self, digest: &Digest) -> Result<Option<ChunkRow>, StoreError> {
        let known = self.core.layers.memory().chunk(digest);
        match known {
            Some(row) => Ok(Some(row)),
            None => self.core.layers.index.read(|index| index.chunk(digest)),
        }
    }

    /// The changes that take over where another machine says that packs have the chunks of `list`.
    ///
    /// What this machine knew of another place gives way: a sweep may have taken that.
    pub fn told_places(
        &self,
        list: &ChunkList,
        places: &[Option<PackPlace>],
    ) -> Result<Vec<Change>, StoreError> {
        let mut changes = Vec::with_capacity(places.len());
        for (chunk, place) in list.chunks().iter().zip(places) {
            let known = self.chunk(&chunk.digest)?;
            if place.is_some() && known.is_none_or(|row| row.place != *place) {
                let row = ChunkRow {
                    confirmed_millis: 0,
                    place: *place,
                };
                changes.push(Change::PutChunk(chunk.digest, row));
            }
        }
        Ok(changes)
    }

    /// The object that carries the chunk list of a blob.
    pub fn list_of(&self, blob: &Digest) -> Result<Option<ListObject>, StoreError> {
        let known = self.core.layers.memory().list(blob);
        match known {
            Some(list) => Ok(Some(list)),
            None => self.core.layers.index.read(|index| index.list(blob)),
        }
    }

    pub fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let known = self.core.layers.memory().meta(key);
        match known {
            Some(value) => Ok(Some(value)),
            None => self.core.layers.index.read(|index| index.meta(key)),
        }
    }

    /// Keys of [`Self::meta`] that begin with `prefix`, in their order.
    pub fn meta_keys(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        // Memory first: what leaves it in between is in the index by then.
        let mut keys = self.core.layers.memory().meta_keys(prefix);
        keys.extend(self.core.layers.index.read(|index| index.meta_keys(prefix))?);
        keys.sort_unstable();
        keys.dedup();
        Ok(keys)
    }

    pub fn totals(&self) -> Totals {
        self.core.layers.memory().totals
    }
}

impl Ledger {
    /// Whether the index lives on its reserve: nothing that can be left out may take space now.
    pub fn is_disk_full(&self) -> bool {
        self.core.layers.reserve.is_used()
    }

    /// How much of a disk of so many bytes has to be free for the reserve to be set aside.
    pub fn room_on(disk_bytes: u64) -> u64 {
        Reserve::room_on(disk_bytes)
    }

    /// Sets the reserve aside again, when there is room; whoever made room need not wait for a thread to do it.
    pub fn restore_reserve(&self) {
        self.core.layers.reserve.restore();
    }

    /// Has a barrier run now, without waiting for it: what is removed after one goes early.
    pub fn ring_barrier(&self) {
        self.core.barriers.ring();
    }
}

/// Gives the space back that the index of `dir` keeps aside, so that it can be
/// opened on a full disk. False when there was none.
pub fn release_reserve(dir: &Path) -> bool {
    Reserve::open(dir).release()
}

fn closed() -> StoreError {
    StoreError::Index {
        verb: "write",
        source: "it is closed".into(),
    }
}
