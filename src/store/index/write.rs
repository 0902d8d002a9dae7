//! Changes of the index: batches of rows, and barriers.

use rusqlite::{Connection, Transaction, params};

use super::{IndexState, failed};
use crate::{
    base::digest::Digest,
    store::{
        StoreError,
        overlay::{Overlay, Unsettled},
        record,
        rows::{Content, NameState, NodeKind},
    },
};

/// The one connection that writes.
#[derive(Debug)]
pub struct IndexWriter {
    connection: Connection,
}

impl IndexWriter {
    pub(super) fn new(connection: Connection) -> Self {
        Self { connection }
    }

    /// Writes every row of `batch`, in one transaction; nothing on an error.
    pub fn write(&mut self, batch: &Overlay) -> Result<(), StoreError> {
        let state = IndexState {
            absorbed: batch.seq,
            ceilings: batch.ceilings,
            totals: batch.totals,
            barrier: 0,
        };
        self.transaction(|transaction| {
            put_nodes(transaction, batch)?;
            put_names(transaction, batch)?;
            put_blobs(transaction, batch)?;
            put_others(transaction, batch)?;
            put_unsettled(transaction, batch)?;
            put_state(transaction, state, |key| key != "barrier")
        })
    }

    /// Notes that all up to record `seq` survives power loss, and returns when
    /// the note does.
    pub fn record_barrier(&mut self, seq: u64) -> Result<(), StoreError> {
        self.synchronous("full")?;
        let state = IndexState {
            barrier: seq,
            ..IndexState::default()
        };
        let recorded = self.transaction(|transaction| {
            transaction.execute("DELETE FROM unsettled WHERE kind < 2 AND seq <= ?", [seq as i64])?;
            put_state(transaction, state, |key| key == "barrier")
        });
        self.synchronous("normal")?;
        recorded
    }

    /// Folds the write-ahead log into the database and cuts it to nothing. As much of it as
    /// readers let go; the rest is for the next time.
    pub fn fold(&self) -> Result<(), StoreError> {
        self.connection
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            .map_err(failed("fold the log of"))
    }

    fn synchronous(&self, level: &str) -> Result<(), StoreError> {
        self.connection
            .pragma_update(None, "synchronous", level)
            .map_err(failed("set up"))
    }

    fn transaction(
        &mut self,
        change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()>,
    ) -> Result<(), StoreError> {
        let transaction = self
            .connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
            .map_err(failed("write to"))?;
        change(&transaction).map_err(failed("write to"))?;
        transaction.commit().map_err(failed("write to"))
    }
}

/// The entries of a table in the order of the database's pages.
fn sorted<K: Ord + Copy, V>(map: &std::collections::HashMap<K, V>) -> Vec<(K, &V)> {
    let mut entries: Vec<_> = map.iter().map(|(key, value)| (*key, value)).collect();
    entries.sort_unstable_by_key(|(key, _)| *key);
    entries
}

fn put_nodes(transaction: &Transaction<'_>, batch: &Overlay) -> rusqlite::Result<()> {
    let mut put = transaction.prepare_cached(
        "INSERT INTO node (ino, staging, nameless, row) VALUES (?, ?, ?, ?) ON CONFLICT (ino) DO UPDATE \
         SET staging = excluded.staging, nameless = excluded.nameless, row = excluded.row",
    )?;
    let mut drop = transaction.prepare_cached("DELETE FROM node WHERE ino = ?")?;
    for (ino, row) in sorted(&batch.nodes) {
        let Some(row) = row else {
            drop.execute([ino.0 as i64])?;
            continue;
        };
        let staging = match row.content {
            Content::Staging(id) => Some(id.0 as i64),
            _ => None,
        };
        let nameless = (row.kind != NodeKind::Dir && row.nlink == 0).then_some(1);
        put.execute(params![ino.0 as i64, staging, nameless, record::encode_node(row)])?;
    }
    Ok(())
}

fn put_names(transaction: &Transaction<'_>, batch: &Overlay) -> rusqlite::Result<()> {
    let mut put = transaction.prepare_cached(
        "INSERT INTO name (parent, name, ino, place, row) VALUES (?, ?, ?, ?, ?) ON CONFLICT (parent, name) \
         DO UPDATE SET ino = excluded.ino, place = excluded.place, row = excluded.row",
    )?;
    let mut drop = transaction.prepare_cached("DELETE FROM name WHERE parent = ? AND name = ?")?;
    for (parent, names) in sorted(&batch.names) {
        for (name, row) in names {
            let Some(row) = row else {
                drop.execute(params![parent.0 as i64, &**name])?;
                continue;
            };
            let ino = match row.state {
                NameState::Live(ino) => Some(ino.0 as i64),
                NameState::Dead => None,
            };
            let place = row.pending.map(|place| place.seq as i64);
            put.execute(params![
                parent.0 as i64,
                &**name,
                ino,
                place,
                record::encode_name(row)
            ])?;
        }
    }
    Ok(())
}

fn put_blobs(transaction: &Transaction<'_>, batch: &Overlay) -> rusqlite::Result<()> {
    let mut put = transaction.prepare_cached(
        "INSERT INTO blob (digest, dirty_since, victim_used, resident_bytes, row) VALUES (?, ?, ?, ?, ?) \
         ON CONFLICT (digest) DO UPDATE SET dirty_since = excluded.dirty_since, \
         victim_used = excluded.victim_used, resident_bytes = excluded.resident_bytes, row = excluded.row",
    )?;
    let mut drop = transaction.prepare_cached("DELETE FROM blob WHERE digest = ?")?;
    for (digest, entry) in sorted(&batch.blobs) {
        let Some(entry) = entry else {
            drop.execute([bytes(&digest)])?;
            continue;
        };
        put.execute(params![
            bytes(&digest),
            entry.is_dirty().then_some(entry.dirty_since as i64),
            entry.is_victim().then_some(entry.row.used_secs as i64),
            entry.resident_bytes as i64,
            record::encode_blob(&entry.row),
        ])?;
    }
    Ok(())
}

fn put_others(transaction: &Transaction<'_>, batch: &Overlay) -> rusqlite::Result<()> {
    let mut manifest =
        transaction.prepare_cached("INSERT OR REPLACE INTO manifest (digest, chunks) VALUES (?, ?)")?;
    for (digest, chunks) in sorted(&batch.manifests) {
        manifest.execute(params![bytes(&digest), record::encode_chunks(chunks)])?;
    }
    let mut list =
        transaction.prepare_cached("INSERT OR REPLACE INTO list (blob, digest, size) VALUES (?, ?, ?)")?;
    for (blob, object) in sorted(&batch.lists) {
        list.execute(params![bytes(&blob), bytes(&object.digest), object.size as i64])?;
    }
    let mut chunk = transaction
        .prepare_cached("INSERT OR REPLACE INTO chunk (digest, confirmed, place) VALUES (?, ?, ?)")?;
    for (digest, row) in sorted(&batch.chunks) {
        chunk.execute(params![
            bytes(&digest),
            row.confirmed_millis as i64,
            record::encode_place(row.place)
        ])?;
    }
    let mut meta = transaction.prepare_cached("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)")?;
    for (key, value) in &batch.meta {
        meta.execute(params![key, value])?;
    }
    Ok(())
}

fn put_unsettled(transaction: &Transaction<'_>, batch: &Overlay) -> rusqlite::Result<()> {
    let mut put =
        transaction.prepare_cached("INSERT OR REPLACE INTO unsettled (kind, id, seq) VALUES (?, ?, ?)")?;
    let mut drop = transaction.prepare_cached("DELETE FROM unsettled WHERE kind = ? AND id = ?")?;
    for (what, seq) in &batch.unsettled {
        let (kind, id) = match what {
            Unsettled::Blob(digest) => (0, bytes(digest).to_vec()),
            Unsettled::Staging(id) => (1, id.0.to_be_bytes().to_vec()),
            Unsettled::DoubtedStaging(id) => (2, id.0.to_be_bytes().to_vec()),
        };
        match seq {
            Some(seq) => put.execute(params![kind, id, *seq as i64])?,
            None => drop.execute(params![kind, id])?,
        };
    }
    Ok(())
}

fn put_state(
    transaction: &Transaction<'_>,
    mut state: IndexState,
    wanted: impl Fn(&str) -> bool,
) -> rusqlite::Result<()> {
    let mut put = transaction.prepare_cached("INSERT OR REPLACE INTO ledger (key, value) VALUES (?, ?)")?;
    for (key, value) in state.fields() {
        if wanted(key) {
            put.execute(params![key, *value as i64])?;
        }
    }
    Ok(())
}

fn bytes(digest: &Digest) -> &[u8] {
    digest.as_bytes()
}
