//! The tables of the index (version 2), and how a database is recognised.
//!
//! `row` columns hold whole rows as [`crate::store::record`] encodes them; the columns beside them are
//! only what queries select and sort by, derived from the row when it is written.
//!
//! | table | holds |
//! |---|---|
//! | `node` | files and directories; `staging` while being written, `nameless` without a name |
//! | `name` | names, dead ones too; `ino` while live, `place` while not published |
//! | `blob` | blobs; `dirty_since` while dirty, `victim_used` while it may be evicted |
//! | `manifest` | chunk lists, 36 bytes for each chunk |
//! | `list` | the object of a chunk list that is one |
//! | `chunk` | when the bucket was last seen to hold a chunk; its `place` in a pack, if it is in one |
//! | `meta` | what callers keep |
//! | `unsettled` | bytes that the next power loss could take: 0 blob, 1 staging file; 2 staging file doubted since the last one |
//! | `ledger` | numbers: `absorbed`, `barrier`, ceilings, sums |
//!
//! Version 1 had no packs: neither `list` nor `place`. It is brought up to date when it is opened.

use std::path::Path;

use rusqlite::Connection;

use super::{StoreError, failed};

/// `casm`, so that `file(1)` and a wrong path are told apart.
const APPLICATION_ID: i64 = 0x6361_736d;
const VERSION: i64 = 2;

const TABLES: &str = "
CREATE TABLE node (ino INTEGER PRIMARY KEY, staging INTEGER, nameless INTEGER, row BLOB NOT NULL);
CREATE INDEX node_staging ON node(staging) WHERE staging IS NOT NULL;
CREATE INDEX node_nameless ON node(nameless) WHERE nameless IS NOT NULL;
CREATE TABLE name (parent INTEGER NOT NULL, name BLOB NOT NULL, ino INTEGER, place INTEGER, row BLOB NOT NULL,
    PRIMARY KEY (parent, name)) WITHOUT ROWID;
CREATE INDEX name_live ON name(ino) WHERE ino IS NOT NULL;
CREATE INDEX name_pending ON name(place) WHERE place IS NOT NULL;
CREATE TABLE blob (digest BLOB PRIMARY KEY, dirty_since INTEGER, victim_used INTEGER,
    resident_bytes INTEGER NOT NULL, row BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX blob_dirty ON blob(dirty_since) WHERE dirty_since IS NOT NULL;
CREATE INDEX blob_victim ON blob(victim_used) WHERE victim_used IS NOT NULL;
CREATE TABLE manifest (digest BLOB PRIMARY KEY, chunks BLOB NOT NULL);
CREATE TABLE list (blob BLOB PRIMARY KEY, digest BLOB NOT NULL, size INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE chunk (digest BLOB PRIMARY KEY, confirmed INTEGER NOT NULL, place BLOB) WITHOUT ROWID;
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE unsettled (kind INTEGER NOT NULL, id BLOB NOT NULL, seq INTEGER NOT NULL,
    PRIMARY KEY (kind, id)) WITHOUT ROWID;
CREATE TABLE ledger (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
";

/// What version 2 added.
const FROM_1: &str = "
CREATE TABLE list (blob BLOB PRIMARY KEY, digest BLOB NOT NULL, size INTEGER NOT NULL) WITHOUT ROWID;
ALTER TABLE chunk ADD COLUMN place BLOB;
";

/// Pages of the write-ahead log (4 KiB each) after which a commit folds it
/// into the database: 64 MiB, so that a busy minute rewrites a page once, not often.
const CHECKPOINT_PAGES: i64 = 16 << 10;

/// Recognises the database, makes its tables if it is new, and sets it up for the writer.
pub fn prepare(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    let pragma = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let application = pragma("application_id").map_err(failed("open"))?;
    let version = pragma("user_version").map_err(failed("open"))?;
    if application != APPLICATION_ID && (application, version) != (0, 0) {
        return Err(StoreError::Unusable {
            why: format!("{} is a database of another program", path.display()),
        });
    }
    if version > VERSION {
        return Err(StoreError::Unusable {
            why: format!(
                "{} was written by a newer casmount (index format {version}, this program knows {VERSION}): \
                 use that version, or another cache directory",
                path.display()
            ),
        });
    }
    let mode: String = connection
        .pragma_update_and_check(None, "journal_mode", "wal", |row| row.get(0))
        .map_err(failed("set up"))?;
    if mode != "wal" {
        return Err(StoreError::Unusable {
            why: format!(
                "the file system of {} cannot hold a SQLite write-ahead log (mode {mode})",
                path.display()
            ),
        });
    }
    for (pragma, value) in [
        ("wal_autocheckpoint", CHECKPOINT_PAGES),
        ("journal_size_limit", CHECKPOINT_PAGES * 4096),
    ] {
        connection
            .pragma_update_and_check(None, pragma, value, |_| Ok(()))
            .map_err(failed("set up"))?;
    }
    connection
        .pragma_update(None, "synchronous", "normal")
        .map_err(failed("set up"))?;
    let change = match version {
        0 => TABLES,
        1 => FROM_1,
        _ => return Ok(()),
    };
    let version = format!("PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION};");
    connection
        .execute_batch(&format!("BEGIN IMMEDIATE; {change} {version} COMMIT;"))
        .map_err(failed("make the tables of"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_of_version_1_is_brought_up_to_date() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.db");
        let connection = Connection::open(&path).unwrap();
        prepare(&connection, &path).unwrap();
        connection
            .execute_batch(
                "DROP TABLE list; ALTER TABLE chunk DROP COLUMN place; PRAGMA user_version = 1;
                 INSERT INTO chunk (digest, confirmed) VALUES (x'01', 77);",
            )
            .unwrap();
        drop(connection);
        let connection = Connection::open(&path).unwrap();
        prepare(&connection, &path).unwrap();
        prepare(&connection, &path).unwrap();
        let kept = connection.query_row("SELECT confirmed, place FROM chunk", [], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, Option<Vec<u8>>>(1)?))
        });
        assert_eq!(kept.unwrap(), (77, None));
        let lists = connection.query_row("SELECT count(*) FROM list", [], |row| row.get::<_, i64>(0));
        assert_eq!(lists.unwrap(), 0);
    }
}
