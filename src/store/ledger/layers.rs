//! Rows wherever they are: in memory, or in the index; and their way from one to the other.
//!
//! # Invariants
//!
//! - A change is in an overlay from the moment it is applied until a transaction of the index holds it, so that
//!   no reader ever misses it.
//! - What the index answered goes into the caches only when no batch was handed over between the question
//!   and the answer, or the answer might be older than what the caches forgot meanwhile.
//!
//! Locks are taken in this order: `writer`, the journal's tail, `memory`. None is
//! held while the index is asked, but for a change of a blob whose row is not in memory,
//! and for names when the disk is found full.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use super::{
    memory::{BlobStep, Memory},
    reserve::Reserve,
};
use crate::{
    base::{
        chunk::{ChunkList, MAX_CHUNK_BYTES},
        digest::Digest,
    },
    store::{
        StoreError,
        index::{Index, IndexReader, IndexWriter},
        overlay::{BlobEntry, Overlay},
        record::Redo,
        rows::{BlobRow, Change, Durability, Ino, NameRow, NodeRow, Residency},
    },
};

/// When the absorber is woken before its time.
pub const ABSORB_BYTES: usize = 16 << 20;

/// Above this, who commits waits for the absorber.
const MAX_OVERLAY_BYTES: usize = 64 << 20;

/// How long a commit waits for memory before it says that the index is stuck.
const ROOM_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Layers {
    memory: Mutex<Memory>,
    /// Told when a batch left the memory, or could not.
    absorbed: Condvar,
    pub index: Index,
    /// `None` after the ledger was closed.
    writer: Mutex<Option<IndexWriter>>,
    pub reserve: Reserve,
}

impl Layers {
    pub fn new(memory: Memory, index: Index, writer: IndexWriter, reserve: Reserve) -> Self {
        Self {
            memory: Mutex::new(memory),
            absorbed: Condvar::new(),
            index,
            writer: Mutex::new(Some(writer)),
            reserve,
        }
    }

    pub fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory
            .lock()
            .expect("no code panics while it holds the rows")
    }

    pub fn writer(&self) -> MutexGuard<'_, Option<IndexWriter>> {
        self.writer
            .lock()
            .expect("no code panics while it holds the index")
    }

    /// Looks for a row in memory, then in the index, and keeps what the index said.
    fn get<T: Clone>(
        &self,
        find: impl Fn(&mut Memory) -> Option<T>,
        ask: impl FnOnce(&IndexReader) -> Result<T, StoreError>,
        keep: impl FnOnce(&mut Memory, T),
    ) -> Result<T, StoreError> {
        let epoch = {
            let mut memory = self.memory();
            if let Some(found) = find(&mut memory) {
                return Ok(found);
            }
            memory.epoch
        };
        let answer = self.index.read(ask)?;
        let mut memory = self.memory();
        if memory.epoch == epoch && find(&mut memory).is_none() {
            keep(&mut memory, answer.clone());
        }
        Ok(answer)
    }

    pub fn node(&self, ino: Ino) -> Result<Option<Arc<NodeRow>>, StoreError> {
        self.get(
            |memory| memory.node(ino),
            |index| index.node(ino),
            |memory, row| memory.keep_node(ino, row),
        )
    }

    pub fn name(&self, parent: Ino, name: &[u8]) -> Result<Option<Arc<NameRow>>, StoreError> {
        self.get(
            |memory| memory.name(parent, name),
            |index| index.name(parent, name),
            |memory, row| memory.keep_name(parent, name, row),
        )
    }

    pub fn blob(&self, digest: &Digest) -> Result<Option<BlobEntry>, StoreError> {
        self.get(
            |memory| memory.blob(digest),
            |index| index.blob(digest),
            |memory, entry| memory.keep_blob(*digest, entry),
        )
    }

    pub fn manifest(&self, digest: &Digest, size: u64) -> Result<Option<Arc<ChunkList>>, StoreError> {
        if size <= u64::from(MAX_CHUNK_BYTES) {
            return Ok(Some(Arc::new(ChunkList::single(*digest, size))));
        }
        self.get(
            |memory| memory.manifest(digest).map(Some),
            |index| Ok(index.manifest(digest)?.map(Arc::new)),
            |memory, chunks| {
                if let Some(chunks) = chunks {
                    memory.keep_manifest(*digest, chunks);
                }
            },
        )
    }

    /// What the changes of blobs in `redos` do, when they become record `seq`.
    /// The caller holds the journal, so that no other change comes between.
    pub fn plan(&self, seq: u64, redos: &[Redo]) -> Result<Vec<BlobStep>, StoreError> {
        let mut steps: Vec<(Digest, BlobStep)> = Vec::new();
        for (at, redo) in redos.iter().enumerate() {
            let (digest, row) = match redo {
                Redo::Change(Change::PutBlob(row)) => (row.digest, Some(row)),
                Redo::Change(Change::DropBlob(digest)) => (*digest, None),
                _ => continue,
            };
            let earlier = steps.iter().rev().find(|(other, _)| *other == digest);
            let old = match earlier {
                Some((_, step)) => step.new.clone(),
                None => self.blob(&digest)?,
            };
            let new = match row {
                None => None,
                Some(row) => Some(BlobEntry {
                    resident_bytes: self.resident_bytes(row, &redos[..at], old.as_ref())?,
                    dirty_since: match (row.durability, &old) {
                        (Durability::Dirty, Some(old)) if old.is_dirty() => old.dirty_since,
                        (Durability::Dirty, _) => seq,
                        _ => 0,
                    },
                    row: Arc::new(row.clone()),
                }),
            };
            steps.push((digest, BlobStep { old, new }));
        }
        Ok(steps.into_iter().map(|(_, step)| step).collect())
    }

    /// Bytes of a blob that are here. A chunk list that is needed and not known yet is looked for in `earlier`.
    fn resident_bytes(
        &self,
        row: &BlobRow,
        earlier: &[Redo],
        old: Option<&BlobEntry>,
    ) -> Result<u64, StoreError> {
        let bits = match &row.residency {
            Residency::Nothing => return Ok(0),
            Residency::Whole => return Ok(row.size),
            Residency::Partial(bits) => bits,
        };
        if let Some(old) = old.filter(|old| old.row.residency == row.residency) {
            return Ok(old.resident_bytes);
        }
        let sum = |chunks: &ChunkList| {
            let chunks = chunks.chunks().iter().enumerate();
            chunks
                .filter(|(at, _)| bits.get(at / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1))
                .map(|(_, chunk)| u64::from(chunk.len))
                .sum()
        };
        let here = earlier.iter().find_map(|redo| match redo {
            Redo::Change(Change::PutManifest(digest, chunks)) if *digest == row.digest => Some(sum(chunks)),
            _ => None,
        });
        if let Some(bytes) = here {
            return Ok(bytes);
        }
        let known = self.manifest(&row.digest, row.size)?;
        known.map(|chunks| sum(&chunks)).ok_or_else(|| StoreError::Index {
            verb: "note which chunks are here",
            source: format!("the chunk list of blob {} is not known", row.digest).into(),
        })
    }

    /// Waits until the overlays have room for another change.
    ///
    /// # Errors
    ///
    /// When they are full and the index takes no more: [`StoreError::Full`] if its disk is full.
    pub fn make_room(&self, wake: impl Fn()) -> Result<(), StoreError> {
        let mut memory = self.memory();
        if memory.overlay_bytes() < MAX_OVERLAY_BYTES {
            return Ok(());
        }
        let deadline = Instant::now() + ROOM_TIMEOUT;
        while memory.overlay_bytes() >= MAX_OVERLAY_BYTES {
            match memory.stuck {
                Some(true) => return Err(StoreError::Full),
                Some(false) => return Err(stuck()),
                None if Instant::now() > deadline => return Err(stuck()),
                None => {}
            }
            wake();
            memory = self
                .absorbed
                .wait_timeout(memory, Duration::from_secs(1))
                .expect("no code panics while it holds the rows")
                .0;
        }
        Ok(())
    }

    /// Moves one batch of what the overlays hold into the index.
    pub fn absorb(&self) -> Result<(), StoreError> {
        let mut writer = self.writer();
        let Some(batch) = self.take_batch() else {
            return Ok(());
        };
        let written = match writer.as_mut() {
            None => Err(stuck()),
            Some(writer) => self.write(writer, &batch),
        };
        let mut memory = self.memory();
        match &written {
            Ok(()) => {
                memory.absorbing = None;
                memory.epoch += 1;
                memory.stuck = None;
            }
            Err(err) => memory.stuck = Some(matches!(err, StoreError::Full)),
        }
        drop(memory);
        self.absorbed.notify_all();
        // Freeing thousands of rows takes milliseconds; nobody waits for it here.
        drop(batch);
        written
    }

    /// The write-ahead log grows to many times the reserve before it is folded by itself: on a
    /// full disk it is cut with every batch, or it would use the reserve up within seconds.
    fn write(&self, writer: &mut IndexWriter, batch: &Overlay) -> Result<(), StoreError> {
        let written = match writer.write(batch) {
            Err(StoreError::Full) => {
                self.reserve.release();
                // That it fails too says nothing that the write does not.
                let _ = writer.fold();
                writer.write(batch)
            }
            other => other,
        };
        if written.is_ok() && self.reserve.is_used() {
            let _ = writer.fold();
        }
        written
    }

    /// The batch that failed last time, or what changed since the last one.
    pub(super) fn take_batch(&self) -> Option<Arc<Overlay>> {
        let mut memory = self.memory();
        if memory.absorbing.is_none() && memory.active.seq > 0 {
            let batch = std::mem::take(&mut memory.active);
            memory.absorbing = Some(Arc::new(batch));
            memory.epoch += 1;
        }
        memory.absorbing.clone()
    }

    /// Absorbs all that was applied before the call.
    pub fn absorb_all(&self) -> Result<(), StoreError> {
        // The first may find a batch that failed before; the rest is behind it.
        self.absorb()?;
        self.absorb()
    }

    /// Ends the writing; the last connection to close folds the write-ahead log into the database.
    pub fn close(&self) {
        let mut writer = self.writer();
        self.index.close();
        *writer = None;
    }
}

fn stuck() -> StoreError {
    StoreError::Index {
        verb: "absorb the journal",
        source: "the index takes no changes".into(),
    }
}
