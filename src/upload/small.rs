//! Sends small blobs together, as the members of one pack.
//!
//! Each keeps its name; where its bytes are travels with the entries that name it.
//!
//! What another machine sends at the same time is stored twice then, where single objects would have
//! met under one name.
//!
//! # The limit
//!
//! By `scripts/bench.d/limits.py`: 9,000 files of the sizes that caches of builds have (median 5 kB, mean 49 kB; 72, 81, 88, 94
//! and 97 % are no longer than the limits below), read over a link of 30 ms by a machine with an empty cache. A
//! *dense* build reads six files in ten of half of the earlier jobs, 118 MB; a *sparse* one three in a hundred of all,
//! 13 MB. The PUTs are those of 1,500 new files, 40 MB. Seconds are of a development build on a busy machine.
//!
//! | limit | GETs, dense | MB received | s | GETs, sparse | MB received | PUTs |
//! |---|---|---|---|---|---|---|
//! | 16 KiB | 846 | 88 | 6.1 | 132 | 32 | 463 |
//! | 32 KiB | 605 | 89 | 5.3 | 147 | 43 | 336 |
//! | 64 KiB | 382 | 94 | 2.7 | 124 | 63 | 210 |
//! | 128 KiB | 245 | 100 | 2.3 | 112 | 90 | 128 |
//! | 256 KiB | 167 | 104 | 1.8 | 105 | 117 | 53 |
//!
//! Each doubling saves a third of the requests of whoever wants the neighbours. From 64 KiB on it saves a tenth at
//! most for whoever does not, who then receives seven to nine times what it reads; and more of what machines
//! make alike is stored twice.

use std::{collections::HashSet, sync::Arc};

use bytes::Bytes;
use tokio::task::JoinSet;
use tracing::warn;

use super::{
    Shared,
    chunks::{confirm_members, find_pack, places_for, present, read_checked},
    status::UploadingGuard,
    task::{Outcome, UploadError, aside, keep, put, upload_blob},
};
use crate::{
    base::{
        chunk::{Chunk, ChunkList},
        digest::Digest,
    },
    store::{
        blobs::Blob,
        pack::{self, MAX_MEMBERS, MAX_PACKED_BYTES, Pack},
        rows::BlobRow,
    },
    tier::{Body, Put, body, layout},
};

/// Fewer are sent one by one, under their own names, where they meet those of other machines.
const MIN_TOGETHER: usize = 4;

/// How the upload of one of several blobs ended.
pub(super) type Ended = (Digest, Result<Outcome, UploadError>);

/// Whether another blob of `size` goes into a pack that has `count` of `bytes` in all.
pub(super) fn fits(count: usize, bytes: u64, size: u64) -> bool {
    size <= pack::small_bytes() && count < MAX_MEMBERS && bytes + size <= MAX_PACKED_BYTES
}

/// Uploads small blobs by one request, if nothing is wrong with any of them.
pub(super) async fn upload_together(shared: Arc<Shared>, rows: Vec<Arc<BlobRow>>) -> Vec<Ended> {
    if rows.len() < MIN_TOGETHER {
        return one_by_one(&shared, rows).await;
    }
    let digests: Vec<_> = rows.iter().map(|row| row.digest).collect();
    upload_rows(&shared, rows).await.unwrap_or_else(|err| {
        let others = match err {
            UploadError::Store(_) => || Err(UploadError::TogetherLater),
            _ => || Err(UploadError::Together),
        };
        // What failed is told once.
        let results = std::iter::once(Err(err)).chain(std::iter::repeat_with(others));
        digests.into_iter().zip(results).collect()
    })
}

/// A dirty blob that is kept here while it is sent.
struct Member {
    row: Arc<BlobRow>,
    _blob: Arc<Blob>,
    _uploading: UploadingGuard,
}

/// What was found of a blob that is to be uploaded.
enum Found {
    /// Nothing is to be sent.
    Ended(Ended),
    /// The bucket has it.
    Known(Arc<BlobRow>),
    Read(Member, Bytes),
}

impl Member {
    /// Reads a blob, unless the bucket has it, as `known` says.
    fn find(shared: &Arc<Shared>, row: &Arc<BlobRow>, known: &HashSet<Digest>) -> Found {
        let ended = |outcome| Found::Ended((row.digest, outcome));
        match shared.blobs.is_dirty(&row.digest) {
            Ok(true) if known.contains(&row.digest) => return Found::Known(Arc::clone(row)),
            Ok(true) => {}
            Ok(false) => return ended(Ok(Outcome::Gone)),
            Err(err) => return ended(Err(err.into())),
        }
        let blob = match keep(&shared.blobs, &shared.ledger, row) {
            Ok(Some(blob)) => blob,
            Ok(None) => return ended(Ok(Outcome::Gone)),
            Err(err) => return ended(Err(err.into())),
        };
        let uploading = shared.uploading(row.size);
        match read_checked(&blob, 0) {
            Ok(Some((_, bytes))) => {
                let member = Self {
                    row: Arc::clone(row),
                    _blob: blob,
                    _uploading: uploading,
                };
                Found::Read(member, bytes)
            }
            Ok(None) => {
                let outcome = shared.blobs.quarantine(&blob, &[0]);
                shared.counters.quarantined_blob();
                ended(outcome.map(|()| Outcome::Quarantined).map_err(Into::into))
            }
            Err(err) => ended(Err(err.into())),
        }
    }
}

async fn upload_rows(shared: &Arc<Shared>, rows: Vec<Arc<BlobRow>>) -> Result<Vec<Ended>, UploadError> {
    let began_millis = shared.bucket.clock().now_millis();
    // Some may have come with the entries of other machines.
    let single = |row: &Arc<BlobRow>| Chunk {
        digest: row.digest,
        len: row.size as u32,
    };
    let list = ChunkList::new(rows.iter().map(single).collect());
    let known = present(shared, &list).await?;
    let unknown: Vec<_> = (0..rows.len())
        .filter(|&index| !known.contains(&rows[index].digest))
        .collect();
    // Before anything is read: what is in memory counts.
    let places = places_for(shared, &list, &unknown).await?;
    let (of_thread, asked) = (Arc::clone(shared), rows);
    let found = aside(move || {
        let found = asked.iter().map(|row| Member::find(&of_thread, row, &known));
        found.collect::<Vec<_>>()
    });
    let (mut ended, mut had, mut sent) = (Vec::new(), Vec::new(), Vec::new());
    let (mut chunks, mut bodies) = (Vec::new(), Vec::new());
    for found in found.await? {
        match found {
            Found::Ended(end) => ended.push(end),
            Found::Known(row) => had.push(row),
            Found::Read(member, bytes) => {
                chunks.push(single(&member.row));
                bodies.push(bytes);
                sent.push(member);
            }
        }
    }
    for _ in &had {
        shared.counters.skipped();
    }
    if !sent.is_empty() {
        let (packed, compress) = (chunks.clone(), shared.bucket.compresses());
        let pack = aside(move || make_pack(&packed, &bodies, compress)).await?;
        let key = layout::pack(&pack.name);
        let members = if shared.condemned.known().await?.is_condemned(&pack.name) {
            None
        } else {
            match put(shared, &key, Body::raw(pack.object)).await? {
                Put::Written(_) => Some(pack.members),
                // The reply to an earlier attempt was lost, or another machine made the same.
                Put::Refused => find_pack(shared, &chunks).await?,
            }
        };
        let rows: Vec<_> = sent.iter().map(|member| Arc::clone(&member.row)).collect();
        drop((places, sent));
        if let Some(members) = members {
            confirm_members(shared, began_millis, members)?;
            for row in &rows {
                shared.counters.sent(row.size);
            }
            had.extend(rows);
        } else {
            warn!(%key, "another object has the name of a pack, or a sweep condemned it; its blobs are stored one by one");
            ended.extend(one_by_one(shared, rows).await);
        }
    }
    let shared = Arc::clone(shared);
    let durable = aside(move || {
        let rows = had.iter().map(|row| durable(&shared, row, began_millis));
        rows.collect::<Vec<_>>()
    });
    ended.extend(durable.await?);
    Ok(ended)
}

fn make_pack(chunks: &[Chunk], bodies: &[Bytes], compress: bool) -> Pack {
    let bytes = bodies.iter().map(Bytes::len).sum();
    let mut pack = pack::Builder::new(chunks.len(), bytes);
    for (chunk, bytes) in chunks.iter().zip(bodies) {
        match compress.then(|| body::compressed(bytes)).flatten() {
            Some(packed) => pack.add(*chunk, &packed, true),
            None => pack.add(*chunk, bytes, false),
        }
    }
    pack.finish()
}

fn durable(shared: &Shared, row: &BlobRow, began_millis: u64) -> Ended {
    let outcome = match shared.blobs.set_durable(&row.digest, began_millis) {
        Ok(true) => {
            shared.counters.uploaded_blob();
            Ok(Outcome::Durable)
        }
        Ok(false) => Ok(Outcome::Gone),
        Err(err) => Err(err.into()),
    };
    (row.digest, outcome)
}

async fn one_by_one(shared: &Arc<Shared>, rows: Vec<Arc<BlobRow>>) -> Vec<Ended> {
    let mut under_way = JoinSet::new();
    for row in rows {
        let shared = Arc::clone(shared);
        under_way.spawn(async move { (row.digest, upload_blob(shared, row).await) });
    }
    under_way.join_all().await
}
