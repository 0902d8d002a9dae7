//! Opening: what the last stop left is replayed, and what power loss may have taken is doubted.
//!
//! After power loss the index, the journal and the bytes of files each survived up to a point of their own.
//! Rows are what index and journal together say. Bytes written after the last barrier are not believed:
//! blobs are marked as [`doubted`](crate::store::rows::BlobRow::doubted), staging files, which have no digest to be
//! checked against, are listed ([`Ledger::doubted_staging`]) unless they were synced. A barrier then makes
//! this state the one that the next power loss falls back to.

use std::{
    fs::{DirBuilder, File},
    os::unix::fs::DirBuilderExt,
    path::Path,
    sync::{Arc, Mutex},
};

use super::{
    Core, Ledger, LedgerOptions,
    barrier::{Bell, Callbacks},
    layers::{ABSORB_BYTES, Layers},
    memory::Memory,
    numbers::Numbers,
    reserve::Reserve,
};
use crate::store::{
    StoreError,
    cachedir::LastStop,
    index::{Index, IndexReader},
    journal::{self, Journal, Replayed},
    overlay::Unsettled,
    record::Redo,
    rows::{BlobRow, Change, Content, NodeRow, Residency},
};

/// Doubts that are committed at once.
const DOUBTS_PER_COMMIT: usize = 500;

impl Ledger {
    /// Opens the ledger of the cache directory `dir`, replays what the index lacks, and starts its threads.
    ///
    /// Returns how many journal records were replayed, too. Costs nothing in
    /// proportion to what the index holds.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unusable`] when index or journal are damaged or of a newer format.
    pub fn open(dir: &Path, stop: LastStop, options: &LedgerOptions) -> Result<(Self, u64), StoreError> {
        let journal_dir = dir.join("journal");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&journal_dir)
            .map_err(StoreError::disk("create", &journal_dir))?;
        let root = File::open(dir).map_err(StoreError::disk("open", dir))?;
        let (index, writer) = Index::open(&dir.join("index.db"))?;
        let state = index.read(IndexReader::state)?;
        let mut memory = Memory::new(state.absorbed, state.totals, state.ceilings);
        // Before the replay, which may settle some of them.
        for what in index.read(IndexReader::unsettled)? {
            if let Unsettled::DoubtedStaging(id) = what {
                memory.doubted.insert(id);
            }
        }
        let layers = Layers::new(memory, index, writer, Reserve::open(dir));
        let power_lost = stop == LastStop::PowerLost;
        let Replayed { records, seq } =
            journal::replay(&journal_dir, state.absorbed, power_lost, |seq, redos| {
                let steps = layers.plan(seq, &redos)?;
                let mut memory = layers.memory();
                memory.apply(seq, redos, steps);
                let many = memory.overlay_bytes() > ABSORB_BYTES;
                drop(memory);
                if many { layers.absorb() } else { Ok(()) }
            })?;
        let ceilings = layers.memory().ceilings;
        let core = Core {
            dir: dir.to_owned(),
            root,
            layers,
            journal: Journal::open(&journal_dir, seq)?,
            numbers: Numbers::new(ceilings),
            barrier_seq: Mutex::new(state.barrier),
            callbacks: Callbacks::default(),
            absorber: Bell::default(),
            barriers: Bell::default(),
        };
        if power_lost {
            core.doubt()?;
            core.barrier()?;
        }
        if let Some(ceilings) = core.numbers.due() {
            core.commit(vec![Redo::Ceilings(ceilings)])?;
        }
        Ok((Self::spawn(&Arc::new(core), options)?, records))
    }

    /// Files whose bytes in their staging file may have been lost with the power: they were changed after
    /// the last barrier and never synced. Listed until their row gets another content or is dropped, or
    /// [`SyncedStaging`](Change::SyncedStaging) is committed.
    pub fn doubted_staging(&self) -> Result<Vec<Arc<NodeRow>>, StoreError> {
        let mut nodes = self.core.layers.staging_nodes()?;
        let memory = self.core.layers.memory();
        nodes.retain(|row| matches!(row.content, Content::Staging(id) if memory.doubted.contains(&id)));
        Ok(nodes)
    }
}

impl Core {
    /// Doubts all bytes that no barrier and no sync covered.
    fn doubt(&self) -> Result<(), StoreError> {
        self.layers.absorb_all()?;
        let unsettled = self.layers.index.read(IndexReader::unsettled)?;
        let (mut blobs, mut staging_files) = (0, 0);
        for some in unsettled.chunks(DOUBTS_PER_COMMIT) {
            let mut redos = Vec::new();
            for what in some {
                match what {
                    Unsettled::Blob(digest) => {
                        let entry = self.layers.blob(digest)?;
                        let Some(entry) = entry.filter(|entry| entry.row.residency != Residency::Nothing)
                        else {
                            continue;
                        };
                        blobs += 1;
                        redos.push(Redo::Change(Change::PutBlob(BlobRow {
                            doubted: true,
                            ..BlobRow::clone(&entry.row)
                        })));
                    }
                    Unsettled::Staging(id) => {
                        staging_files += 1;
                        redos.push(Redo::DoubtStaging(*id));
                    }
                    Unsettled::DoubtedStaging(_) => {}
                }
            }
            self.commit(redos)?;
        }
        tracing::warn!(
            blobs,
            staging_files,
            "the machine lost power; bytes younger than the last barrier are doubted"
        );
        Ok(())
    }
}
