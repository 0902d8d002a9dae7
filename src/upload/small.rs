//! Sends small blobs together, as the members of one pack.
//!
//! Each keeps its name; where its bytes are travels with the entries that name it.
//!
//! What another machine has sent at the same time is stored twice then, where single objects
//! would have met under one name. Sweeping and compaction deal with that, not uploads.

use std::sync::Arc;

use bytes::Bytes;
use tokio::task::{JoinSet, spawn_blocking};
use tracing::warn;

use super::{
    Shared,
    chunks::{confirm_members, find_pack, places_for, present, read_checked},
    status::UploadingGuard,
    task::{Outcome, UploadError, put, upload_blob},
};
use crate::{
    base::{
        chunk::{Chunk, ChunkList},
        digest::Digest,
    },
    store::{
        StoreError,
        blobs::Blob,
        pack::{self, MAX_MEMBERS, MAX_PACKED_BYTES, MAX_SMALL_BYTES, Pack},
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
    size <= MAX_SMALL_BYTES && count < MAX_MEMBERS && bytes + size <= MAX_PACKED_BYTES
}

/// Uploads small blobs by one request, if nothing is wrong with any of them.
pub(super) async fn upload_together(shared: Arc<Shared>, rows: Vec<Arc<BlobRow>>) -> Vec<Ended> {
    if rows.len() < MIN_TOGETHER {
        return one_by_one(&shared, rows).await;
    }
    let mut ended = Vec::with_capacity(rows.len());
    let mut group = Vec::with_capacity(rows.len());
    for row in rows {
        match Member::new(&shared, &row) {
            Ok(Some(member)) => group.push(member),
            Ok(None) => ended.push((row.digest, Ok(Outcome::Gone))),
            Err(err) => ended.push((row.digest, Err(err.into()))),
        }
    }
    let digests: Vec<_> = group.iter().map(|member| member.row.digest).collect();
    match upload_members(&shared, group).await {
        Ok(done) => ended.extend(done),
        Err(err) => {
            // What failed is told once.
            let others = std::iter::repeat_with(|| Err(UploadError::Together));
            let results = std::iter::once(Err(err)).chain(others);
            ended.extend(digests.into_iter().zip(results));
        }
    }
    ended
}

/// A dirty blob that is kept here while it is sent.
struct Member {
    row: Arc<BlobRow>,
    blob: Arc<Blob>,
    _uploading: UploadingGuard,
}

impl Member {
    /// `None` for a blob that is no longer dirty.
    fn new(shared: &Arc<Shared>, row: &Arc<BlobRow>) -> Result<Option<Self>, StoreError> {
        if !shared.blobs.is_dirty(&row.digest)? {
            return Ok(None);
        }
        let Some(blob) = shared.blobs.lease(&row.digest, row.size)? else {
            return Err(StoreError::Missing { blob: row.digest });
        };
        Ok(Some(Self {
            row: Arc::clone(row),
            blob,
            _uploading: shared.uploading(row.size),
        }))
    }

    fn chunk(&self) -> Chunk {
        self.blob.chunks().chunks()[0]
    }
}

async fn upload_members(shared: &Arc<Shared>, mut group: Vec<Member>) -> Result<Vec<Ended>, UploadError> {
    let began_millis = shared.bucket.clock().now_millis();
    let mut ended = Vec::with_capacity(group.len());
    // Some may have come with the entries of other machines.
    let list = ChunkList::new(group.iter().map(Member::chunk).collect());
    let known = present(shared, &list).await?;
    for member in group.extract_if(.., |member| known.contains(&member.row.digest)) {
        shared.counters.skipped();
        ended.push(durable(shared, &member, began_millis));
    }
    let (group, read) = read_all(group).await?;
    let (mut sent, mut chunks, mut bodies) = (Vec::new(), Vec::new(), Vec::new());
    for (member, read) in group.into_iter().zip(read) {
        match read {
            Ok(Some((chunk, bytes))) => {
                sent.push(member);
                chunks.push(chunk);
                bodies.push(bytes);
            }
            Ok(None) => ended.push(quarantined(shared, &member)),
            Err(err) => ended.push((member.row.digest, Err(err.into()))),
        }
    }
    if sent.is_empty() {
        return Ok(ended);
    }
    let indexes: Vec<_> = (0..chunks.len()).collect();
    let _places = places_for(shared, &ChunkList::new(chunks.clone()), &indexes).await?;
    let (packed, compress) = (chunks.clone(), shared.bucket.compresses());
    let pack = spawn_blocking(move || make_pack(&packed, &bodies, compress)).await;
    let pack = pack.map_err(|_| UploadError::Stopped)?;
    let key = layout::pack(&pack.name);
    let members = match put(shared, &key, Body::raw(pack.object)).await? {
        Put::Written(_) => Some(pack.members),
        // The reply to an earlier attempt was lost, or another machine made the same.
        Put::Refused => find_pack(shared, &chunks).await?,
    };
    let Some(members) = members else {
        warn!(%key, "another object has the name of a pack; its blobs are stored one by one");
        let rows = sent.iter().map(|member| Arc::clone(&member.row)).collect();
        ended.extend(one_by_one(shared, rows).await);
        return Ok(ended);
    };
    confirm_members(shared, members)?;
    for member in &sent {
        shared.counters.sent(member.row.size);
        ended.push(durable(shared, member, began_millis));
    }
    Ok(ended)
}

type Read = Result<Option<(Chunk, Bytes)>, StoreError>;

/// Reads the bytes of all, away from the runtime's workers.
async fn read_all(group: Vec<Member>) -> Result<(Vec<Member>, Vec<Read>), UploadError> {
    let reading = spawn_blocking(move || {
        let read = group.iter().map(|member| read_checked(&member.blob, 0)).collect();
        (group, read)
    });
    reading.await.map_err(|_| UploadError::Stopped)
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

fn durable(shared: &Shared, member: &Member, began_millis: u64) -> Ended {
    let digest = member.row.digest;
    let outcome = match shared.blobs.set_durable(&digest, began_millis) {
        Ok(true) => {
            shared.counters.uploaded_blob();
            Ok(Outcome::Durable)
        }
        Ok(false) => Ok(Outcome::Gone),
        Err(err) => Err(err.into()),
    };
    (digest, outcome)
}

fn quarantined(shared: &Shared, member: &Member) -> Ended {
    let outcome = shared.blobs.quarantine(&member.blob, &[0]);
    shared.counters.quarantined_blob();
    (
        member.row.digest,
        outcome.map(|()| Outcome::Quarantined).map_err(Into::into),
    )
}

async fn one_by_one(shared: &Arc<Shared>, rows: Vec<Arc<BlobRow>>) -> Vec<Ended> {
    let mut under_way = JoinSet::new();
    for row in rows {
        let shared = Arc::clone(shared);
        under_way.spawn(async move { (row.digest, upload_blob(shared, row).await) });
    }
    under_way.join_all().await
}
