//! Sealing: a staging file becomes a blob, by a second name for the same file.
//!
//! # Order
//!
//! 1. [`Blobs::seal`] links the file to its blob name and returns the rows.
//! 2. The caller commits them together with the row of the file.
//! 3. The caller calls `Staging::remove_after_barrier`.
//!
//! From 1 to 3 the caller keeps writers away from the file. A crash
//! between 1 and 2 leaves a blob file without a row, which whoever needs the
//! name replaces, and a staging file that is sealed again; a crash after 2
//! leaves a staging name that the next start removes. Nothing is renamed, so
//! there is never a row without its file.
//!
//! From 1 on this process serves the blob; the row belongs to the caller until 3
//! (the digest is *sealing*), so nothing else commits it.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use super::{
    StoreError,
    blobs::{Blobs, Shard, Shared, now_secs},
    rows::{BlobRow, Change, Durability, Residency, StagingId},
};
use crate::base::{chunk::Sliced, digest::Digest, durable::remove_if_there};

/// How long "the bucket has it" is believed, in milliseconds: a quarter of a
/// day. After it, an upload asks the bucket again, which costs one request an object.
/// Before a name is published, what sweeps need is looked at by itself, see `upload::vouch`.
const TRUST_MILLIS: u64 = 6 * 3600 * 1000;

impl Blobs {
    /// Links a staging file to its blob name, unless the blob is resident already.
    ///
    /// Returns the changes that make it known (blob row, dirty unless the
    /// bucket has it; manifest); the caller commits them *together with* the row
    /// of the file, and then calls `staging.remove_after_barrier`, with writers kept
    /// away from the file in between. No changes are returned for an empty file,
    /// which has no blob. Sealing the same file again under another digest forgets the first.
    pub fn seal(&self, id: StagingId, sliced: &Sliced) -> Result<Vec<Change>, StoreError> {
        let digest = sliced.digest;
        let size = sliced.chunks.size();
        if size == 0 {
            return Ok(Vec::new());
        }
        let shared = &self.shared;
        if let Some(before) = shared.staging.end_sealing_as_other(id, digest) {
            self.forget_seal(&before)?;
        }
        let mut changes = Vec::new();
        if sliced.chunks.chunks().len() > 1 && shared.ledger.manifest(&digest, size)?.is_none() {
            changes.push(Change::PutManifest(digest, sliced.chunks.clone()));
        }
        // The mark says that a whole file has the name: it comes and goes with the link, under one lock.
        let shard = shared.shard(&digest);
        shared.staging.begin_sealing(id, digest);
        match self.link(&shard, id, &digest, size) {
            Ok(row) => {
                changes.push(Change::PutBlob(row));
                Ok(changes)
            }
            Err(err) => {
                // Nothing was promised to anyone.
                shared.staging.end_sealing(id);
                Err(err)
            }
        }
    }

    /// Links the file unless the blob is here; returns the blob's row.
    fn link(&self, shard: &Shard, id: StagingId, digest: &Digest, size: u64) -> Result<BlobRow, StoreError> {
        let shared = &self.shared;
        let digest = *digest;
        let row = shared.ledger.blob(&digest)?;
        let path = shared.path(&digest);
        let good = row.as_ref().is_some_and(|row| {
            row.residency == Residency::Whole && !row.doubted && row.durability != Durability::Quarantined
        });
        let in_use = shard.get(&digest).map(|in_use| &in_use.file);
        // What was fetched just now may not be in the row yet.
        let good = good || in_use.is_some_and(|file| file.is_good());
        if !(good && is_there(&path, size)?) {
            // The row of some chunks may be on the disk, and would then speak of this file.
            let replaces_bytes = row
                .as_ref()
                .is_some_and(|row| row.residency != Residency::Nothing);
            let put = || shared.put_at(id, &digest, replaces_bytes || shared.is_leaving(&digest));
            match in_use {
                Some(file) => file.replace_with(put)?,
                None => put()?,
            }
        }
        let durability = match row.as_ref().map(|row| row.durability) {
            Some(Durability::Durable { confirmed_millis })
                if is_trusted(confirmed_millis, shared.bucket_millis()) =>
            {
                Durability::Durable { confirmed_millis }
            }
            Some(Durability::Durable { .. } | Durability::Dirty | Durability::Quarantined) | None => {
                Durability::Dirty
            }
        };
        Ok(BlobRow {
            digest,
            size,
            residency: Residency::Whole,
            durability,
            used_secs: now_secs(),
            pinned: row.is_some_and(|row| row.pinned),
            doubted: false,
        })
    }

    /// Removes a blob name that was linked for rows that were never committed.
    fn forget_seal(&self, digest: &Digest) -> Result<(), StoreError> {
        self.shared.remove_nameless(&self.shared.shard(digest), digest)
    }
}

impl Shared {
    /// Removes the file of a blob that no row says is here, unless one will.
    pub(super) fn remove_nameless(&self, shard: &Shard, digest: &Digest) -> Result<(), StoreError> {
        let row = self.ledger.blob(digest)?;
        let has_row = row.is_some_and(|row| row.residency != Residency::Nothing);
        if has_row || self.staging.is_sealing(digest) {
            return Ok(());
        }
        let path = self.path(digest);
        let unlink = || remove_if_there(&path).map_err(StoreError::disk("remove", &path));
        match shard.get(digest) {
            Some(in_use) => in_use.file.leave(unlink),
            None => unlink(),
        }
    }

    /// Gives a staging file its blob name, in the place of whatever has it. The shard is locked.
    fn put_at(&self, id: StagingId, digest: &Digest, sync: bool) -> Result<(), StoreError> {
        let staged = self.staging.path(id);
        let path = self.path(digest);
        if sync {
            let file = File::open(&staged).map_err(StoreError::disk("open", &staged))?;
            file.sync_data().map_err(StoreError::disk("sync", &staged))?;
        }
        match fs::hard_link(&staged, &path) {
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {}
            linked => return linked.map_err(StoreError::disk("link", &path)),
        }
        let temp = path.with_extension(id.0.to_string());
        remove_if_there(&temp).map_err(StoreError::disk("remove", &temp))?;
        fs::hard_link(&staged, &temp).map_err(StoreError::disk("link", &temp))?;
        fs::rename(&temp, &path).map_err(StoreError::disk("rename", &path))?;
        // Renaming between two names of one file does nothing: it was there already.
        remove_if_there(&temp).map_err(StoreError::disk("remove", &temp))
    }
}

/// Whether "the bucket has it", confirmed at that time of its clock, is still believed.
pub(crate) fn is_trusted(confirmed_millis: u64, now_millis: u64) -> bool {
    confirmed_millis.saturating_add(TRUST_MILLIS) > now_millis
}

fn is_there(path: &Path, size: u64) -> Result<bool, StoreError> {
    match fs::metadata(path) {
        Ok(found) => Ok(found.len() == size),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(err) => Err(StoreError::disk("examine", path)(err)),
    }
}
