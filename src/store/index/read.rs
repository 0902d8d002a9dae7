//! Questions to the index.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Params, Row};

use super::{IndexState, damaged, failed};
use crate::{
    base::{chunk::ChunkList, digest::Digest},
    store::{
        StoreError,
        overlay::{BlobEntry, Unsettled},
        record::{self, BadRow},
        rows::{ChunkRow, Ino, ListObject, NameRow, NodeRow, StagingId},
    },
};

/// One connection that only reads.
#[derive(Debug)]
pub struct IndexReader {
    connection: Connection,
}

/// Where a page of a queue ended: the number it is sorted by, and the key that
/// orders rows of one number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QueueKey<K> {
    pub order: u64,
    pub key: K,
}

const BLOB_COLUMNS: &str = "dirty_since, resident_bytes, row";

impl IndexReader {
    pub fn new(connection: Connection) -> Result<Self, StoreError> {
        connection
            .pragma_update(None, "query_only", true)
            .map_err(failed("set up"))?;
        Ok(Self { connection })
    }

    fn one<T>(
        &self,
        sql: &str,
        params: impl Params,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<Result<T, BadRow>>,
    ) -> Result<Option<T>, StoreError> {
        let mut statement = self.connection.prepare_cached(sql).map_err(failed("read"))?;
        statement
            .query_row(params, read)
            .optional()
            .map_err(failed("read"))?
            .transpose()
            .map_err(damaged)
    }

    fn all<T>(
        &self,
        sql: &str,
        params: impl Params,
        mut read: impl FnMut(&Row<'_>) -> rusqlite::Result<Result<T, BadRow>>,
    ) -> Result<Vec<T>, StoreError> {
        let mut statement = self.connection.prepare_cached(sql).map_err(failed("read"))?;
        let mut rows = statement.query(params).map_err(failed("read"))?;
        let mut found = Vec::new();
        while let Some(row) = rows.next().map_err(failed("read"))? {
            found.push(read(row).map_err(failed("read"))?.map_err(damaged)?);
        }
        Ok(found)
    }

    pub fn node(&self, ino: Ino) -> Result<Option<Arc<NodeRow>>, StoreError> {
        self.one("SELECT row FROM node WHERE ino = ?", [ino.0 as i64], node_at_0)
    }

    pub fn name(&self, parent: Ino, name: &[u8]) -> Result<Option<Arc<NameRow>>, StoreError> {
        let sql = "SELECT row FROM name WHERE parent = ? AND name = ?";
        self.one(sql, (parent.0 as i64, name), name_at_0)
    }

    pub fn blob(&self, digest: &Digest) -> Result<Option<BlobEntry>, StoreError> {
        let sql = format!("SELECT {BLOB_COLUMNS} FROM blob WHERE digest = ?");
        self.one(&sql, [&digest.as_bytes()[..]], blob_at_0)
    }

    pub fn manifest(&self, digest: &Digest) -> Result<Option<ChunkList>, StoreError> {
        let sql = "SELECT chunks FROM manifest WHERE digest = ?";
        self.one(sql, [&digest.as_bytes()[..]], |row| {
            Ok(record::decode_chunks(row.get_ref(0)?.as_blob()?))
        })
    }

    pub fn chunk(&self, digest: &Digest) -> Result<Option<ChunkRow>, StoreError> {
        let sql = "SELECT confirmed, place FROM chunk WHERE digest = ?";
        self.one(sql, [&digest.as_bytes()[..]], |row| {
            let confirmed_millis = row.get::<_, i64>(0)? as u64;
            let place = record::decode_place(row.get_ref(1)?.as_blob_or_null()?);
            Ok(place.map(|place| ChunkRow {
                confirmed_millis,
                place,
            }))
        })
    }

    pub fn list(&self, blob: &Digest) -> Result<Option<ListObject>, StoreError> {
        let sql = "SELECT digest, size FROM list WHERE blob = ?";
        self.one(sql, [&blob.as_bytes()[..]], |row| {
            let size = row.get::<_, i64>(1)? as u64;
            let digest = record::decode_digest(row.get_ref(0)?.as_blob()?);
            Ok(digest.map(|digest| ListObject { digest, size }))
        })
    }

    pub fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.one("SELECT value FROM meta WHERE key = ?", [key], |row| {
            Ok(Ok(row.get(0)?))
        })
    }

    pub fn meta_keys(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let sql = "SELECT key FROM meta WHERE substr(key, 1, length(?1)) = ?1";
        self.all(sql, [prefix], |row| Ok(Ok(row.get(0)?)))
    }

    pub fn names_behind(
        &self,
        parent: Ino,
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Arc<NameRow>>, StoreError> {
        let (parent, limit) = (parent.0 as i64, limit as i64);
        match after {
            Some(after) => self.all(
                "SELECT row FROM name WHERE parent = ? AND name > ? ORDER BY name LIMIT ?",
                (parent, after, limit),
                name_at_0,
            ),
            None => self.all(
                "SELECT row FROM name WHERE parent = ? ORDER BY name LIMIT ?",
                (parent, limit),
                name_at_0,
            ),
        }
    }

    pub fn names_of(&self, ino: Ino) -> Result<Vec<Arc<NameRow>>, StoreError> {
        self.all("SELECT row FROM name WHERE ino = ?", [ino.0 as i64], name_at_0)
    }

    /// Names that are not published, by place and then by parent and name, behind `after`.
    pub fn pending_names(
        &self,
        after: &QueueKey<(Ino, Vec<u8>)>,
        limit: usize,
    ) -> Result<Vec<Arc<NameRow>>, StoreError> {
        let (parent, name) = &after.key;
        self.all(
            "SELECT row FROM name WHERE place IS NOT NULL AND (place, parent, name) > (?, ?, ?) \
             ORDER BY place, parent, name LIMIT ?",
            (after.order as i64, parent.0 as i64, name, limit as i64),
            name_at_0,
        )
    }

    /// Dirty blobs, oldest first, behind `after`.
    pub fn dirty_blobs(&self, after: &QueueKey<Digest>, limit: usize) -> Result<Vec<BlobEntry>, StoreError> {
        self.blob_queue("dirty_since", after, limit)
    }

    /// Blobs that may be evicted, oldest use first, behind `after`.
    pub fn victims(&self, after: &QueueKey<Digest>, limit: usize) -> Result<Vec<BlobEntry>, StoreError> {
        self.blob_queue("victim_used", after, limit)
    }

    fn blob_queue(
        &self,
        column: &str,
        after: &QueueKey<Digest>,
        limit: usize,
    ) -> Result<Vec<BlobEntry>, StoreError> {
        let sql = format!(
            "SELECT {BLOB_COLUMNS} FROM blob WHERE {column} IS NOT NULL AND ({column}, digest) > (?, ?) \
             ORDER BY {column}, digest LIMIT ?"
        );
        let key = &after.key.as_bytes()[..];
        self.all(&sql, (after.order as i64, key, limit as i64), blob_at_0)
    }

    pub fn staging_nodes(&self) -> Result<Vec<Arc<NodeRow>>, StoreError> {
        self.all("SELECT row FROM node WHERE staging IS NOT NULL", (), node_at_0)
    }

    pub fn nameless_nodes(&self) -> Result<Vec<Arc<NodeRow>>, StoreError> {
        self.all("SELECT row FROM node WHERE nameless IS NOT NULL", (), node_at_0)
    }

    pub fn unsettled(&self) -> Result<Vec<Unsettled>, StoreError> {
        self.all("SELECT kind, id FROM unsettled", (), |row| {
            Ok(unsettled(row.get(0)?, row.get_ref(1)?.as_blob()?))
        })
    }

    pub fn state(&self) -> Result<IndexState, StoreError> {
        let mut state = IndexState::default();
        self.all("SELECT key, value FROM ledger", (), |row| {
            let key = row.get::<_, String>(0)?;
            if let Some((_, field)) = state.fields().into_iter().find(|(name, _)| *name == key) {
                *field = row.get::<_, i64>(1)? as u64;
            }
            Ok(Ok(()))
        })?;
        Ok(state)
    }
}

impl IndexState {
    /// The rows of the table `ledger`.
    pub(super) fn fields(&mut self) -> [(&'static str, &mut u64); 11] {
        let totals = &mut self.totals;
        [
            ("absorbed", &mut self.absorbed),
            ("barrier", &mut self.barrier),
            ("ceiling_ino", &mut self.ceilings.ino),
            ("ceiling_place", &mut self.ceilings.place),
            ("resident_bytes", &mut totals.resident_bytes),
            ("resident_blobs", &mut totals.resident_blobs),
            ("dirty_bytes", &mut totals.dirty_bytes),
            ("dirty_blobs", &mut totals.dirty_blobs),
            ("quarantined_blobs", &mut totals.quarantined_blobs),
            ("evicted_bytes", &mut totals.evicted_bytes),
            ("evicted_blobs", &mut totals.evicted_blobs),
        ]
    }
}

fn node_at_0(row: &Row<'_>) -> rusqlite::Result<Result<Arc<NodeRow>, BadRow>> {
    Ok(record::decode_node(row.get_ref(0)?.as_blob()?).map(Arc::new))
}

fn name_at_0(row: &Row<'_>) -> rusqlite::Result<Result<Arc<NameRow>, BadRow>> {
    Ok(record::decode_name(row.get_ref(0)?.as_blob()?).map(Arc::new))
}

/// Reads [`BLOB_COLUMNS`].
fn blob_at_0(row: &Row<'_>) -> rusqlite::Result<Result<BlobEntry, BadRow>> {
    let dirty_since = row.get::<_, Option<i64>>(0)?.unwrap_or(0) as u64;
    let resident_bytes = row.get::<_, i64>(1)? as u64;
    Ok(
        record::decode_blob(row.get_ref(2)?.as_blob()?).map(|row| BlobEntry {
            row: Arc::new(row),
            dirty_since,
            resident_bytes,
        }),
    )
}

fn unsettled(kind: i64, id: &[u8]) -> Result<Unsettled, BadRow> {
    let number = || id.try_into().ok().map(|id| StagingId(u64::from_be_bytes(id)));
    match kind {
        0 => Digest::from_slice(id).map(Unsettled::Blob),
        1 => number().map(Unsettled::Staging),
        2 => number().map(Unsettled::DoubtedStaging),
        _ => None,
    }
    .ok_or(BadRow::new("an unknown kind of doubt"))
}
