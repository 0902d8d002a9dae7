//! Sends the chunks of one blob that the bucket lacks.
//!
//! The only chunk of a blob becomes an object of its own, unless `small` sends it with others. Those of a
//! larger blob go into packs, in the order in which they lie in the blob, so that whoever reads it later
//! gets many by one request.
//!
//! What the bucket has is known by the rows of the chunks. Those that were not confirmed lately are
//! asked for, by one request for all chunks of a pack; of chunks that nothing is known of, the pack that
//! another machine would have made of them is looked for.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use bytes::Bytes;
use tokio::{sync::OwnedSemaphorePermit, task::JoinSet};
use tracing::warn;

use super::{
    Shared, rescue,
    task::{UploadError, aside, put, retrying},
};
use crate::{
    base::{
        chunk::{Chunk, ChunkList, MAX_CHUNK_BYTES},
        digest::Digest,
    },
    store::{
        StoreError,
        blobs::Blob,
        pack::{self, Members, Pack, PackPlace},
        rows::{Change, ChunkRow},
        seal::is_trusted,
    },
    tier::{Body, Put, body, layout},
};

/// Uploads what the bucket lacks; returns the chunks that are wrong here.
pub(super) async fn upload_chunks(shared: &Arc<Shared>, blob: &Arc<Blob>) -> Result<Vec<usize>, UploadError> {
    let list = blob.chunks();
    // The only chunk of a small blob is new nearly always: asking first would double the requests.
    let present = if list.chunks().len() > 1 {
        present(shared, list).await?
    } else {
        HashSet::new()
    };
    for _ in &present {
        shared.counters.skipped();
    }
    let mut wrong = Vec::new();
    let mut under_way = JoinSet::new();
    for group in pack::group(list) {
        let whole = group.len();
        let mut group = group;
        group.retain(|&index| !present.contains(&list.chunks()[index].digest));
        if group.is_empty() {
            continue;
        }
        let unknown = group.len() == whole;
        // Taken before the task starts, so that a long blob does not make a task for each pack.
        let places = places_for(shared, list, &group).await?;
        while let Some(done) = under_way.try_join_next() {
            wrong.extend(joined(done)?);
        }
        if shared.is_stopping() {
            return Err(UploadError::Stopped);
        }
        if shared.ledger.is_unwanted(&blob.digest()) {
            return Err(UploadError::Unwanted);
        }
        if !wrong.is_empty() || !shared.blobs.is_dirty(&blob.digest())? {
            break;
        }
        let (shared, blob) = (Arc::clone(shared), Arc::clone(blob));
        under_way.spawn(async move {
            let _places = places;
            if let [index] = group[..] {
                return upload_single(&shared, &blob, index).await;
            }
            upload_group(&shared, &blob, &group, unknown).await
        });
    }
    while let Some(done) = under_way.join_next().await {
        wrong.extend(joined(done)?);
    }
    Ok(wrong)
}

type Joined<T> = Result<Result<T, UploadError>, tokio::task::JoinError>;

fn joined<T>(done: Joined<T>) -> Result<T, UploadError> {
    done.map_err(|_| UploadError::Stopped)?
}

/// One for each 2 MiB, as far as there are so many.
pub(super) async fn places_for(
    shared: &Shared,
    list: &ChunkList,
    group: &[usize],
) -> Result<OwnedSemaphorePermit, UploadError> {
    let bytes: u64 = group
        .iter()
        .map(|&index| u64::from(list.chunks()[index].len))
        .sum();
    let count = bytes.div_ceil(u64::from(MAX_CHUNK_BYTES)) as usize;
    let count = count.clamp(1, shared.options.parallel.max(1)) as u32;
    let places = Arc::clone(&shared.places).acquire_many_owned(count).await;
    places.map_err(|_| UploadError::Stopped)
}

/// The chunks of `list` that the bucket has, by memory or by asking.
///
/// What is condemned is not among them.
pub(super) async fn present(shared: &Arc<Shared>, list: &ChunkList) -> Result<HashSet<Digest>, UploadError> {
    let known = shared.condemned.known().await?;
    let now = shared.bucket.clock().now_millis();
    let mut present = HashSet::new();
    let mut doubtful: HashMap<String, HashMap<Digest, Option<PackPlace>>> = HashMap::new();
    for chunk in list.chunks() {
        let Some(row) = shared.ledger.chunk(&chunk.digest)? else {
            continue;
        };
        let object = row.place.map_or(chunk.digest, |place| place.pack);
        if known.is_condemned(&object) {
            continue;
        }
        if is_trusted(row.confirmed_millis, now) && known.is_fresh(row.confirmed_millis, now) {
            present.insert(chunk.digest);
            continue;
        }
        let key = match row.place {
            Some(place) => layout::pack(&place.pack),
            None => layout::blob(&chunk.digest),
        };
        doubtful.entry(key).or_default().insert(chunk.digest, row.place);
    }
    let mut asked = JoinSet::new();
    for (key, chunks) in doubtful {
        let permit = Arc::clone(&shared.places)
            .acquire_owned()
            .await
            .map_err(|_| UploadError::Stopped)?;
        let shared = Arc::clone(shared);
        asked.spawn(async move {
            let _permit = permit;
            let asked_millis = shared.bucket.clock().now_millis();
            let found = retrying(&shared, "head", &key, || shared.bucket.head(&key)).await?;
            Ok(found.is_some().then_some((asked_millis, chunks)))
        });
    }
    while let Some(done) = asked.join_next().await {
        let Some((asked_millis, chunks)) = joined(done)? else {
            continue;
        };
        present.extend(chunks.keys());
        confirm(shared, asked_millis, chunks)?;
    }
    Ok(present)
}

/// Notes that the bucket has chunks, and where; it was asked, or told, at `confirmed_millis`.
pub(super) fn confirm(
    shared: &Shared,
    confirmed_millis: u64,
    chunks: impl IntoIterator<Item = (Digest, Option<PackPlace>)>,
) -> Result<(), StoreError> {
    let row = |place| ChunkRow {
        confirmed_millis,
        place,
    };
    let changes = chunks.into_iter();
    let changes = changes.map(|(digest, place)| Change::PutChunk(digest, row(place)));
    shared.ledger.commit(changes.collect())
}

/// Sends a chunk as an object of its own; returns it if its bytes on this disk are others.
async fn upload_single(shared: &Shared, blob: &Arc<Blob>, index: usize) -> Result<Vec<usize>, UploadError> {
    let chunk = blob.chunks().chunks()[index];
    if shared.condemned.known().await?.is_condemned(&chunk.digest) {
        return rescue::upload_again(shared, blob, &[index]).await;
    }
    let began_millis = shared.bucket.clock().now_millis();
    let key = layout::blob(&chunk.digest);
    let one_of_many = blob.chunks().chunks().len() > 1;
    if one_of_many {
        let found = retrying(shared, "head", &key, || shared.bucket.head(&key)).await?;
        if found.is_some() {
            shared.counters.skipped();
            confirm(shared, began_millis, [(chunk.digest, None)])?;
            return Ok(Vec::new());
        }
    }
    let (read, compress) = (Arc::clone(blob), shared.bucket.compresses());
    let Some(body) = aside(move || prepare(&read, index, compress)).await?? else {
        return Ok(vec![index]);
    };
    put(shared, &key, body).await?;
    // Of a blob of one chunk its own row says it, unless something else was known of the chunk.
    if one_of_many || shared.ledger.chunk(&chunk.digest)?.is_some() {
        confirm(shared, began_millis, [(chunk.digest, None)])?;
    }
    shared.counters.sent(u64::from(chunk.len));
    Ok(Vec::new())
}

/// Sends chunks as a pack; returns those whose bytes on this disk are others.
///
/// `unknown`: nothing is known of any of them, so another machine may have made the pack.
async fn upload_group(
    shared: &Shared,
    blob: &Arc<Blob>,
    group: &[usize],
    unknown: bool,
) -> Result<Vec<usize>, UploadError> {
    let chunks: Vec<_> = group.iter().map(|&index| blob.chunks().chunks()[index]).collect();
    let name = pack::name_of(chunks.iter().map(|chunk| chunk.digest));
    if shared.condemned.known().await?.is_condemned(&name) {
        return rescue::upload_again(shared, blob, group).await;
    }
    let began_millis = shared.bucket.clock().now_millis();
    if unknown && let Some(members) = find_pack(shared, &chunks).await? {
        for _ in &members {
            shared.counters.skipped();
        }
        confirm_members(shared, began_millis, members)?;
        return Ok(Vec::new());
    }
    let (read, indexes, compress) = (Arc::clone(blob), group.to_vec(), shared.bucket.compresses());
    let (pack, body) = match aside(move || prepare_pack(&read, &indexes, None, compress)).await?? {
        Ok(ready) => ready,
        Err(wrong) => return Ok(wrong),
    };
    let key = layout::pack(&pack.name);
    let members = match put(shared, &key, body).await? {
        Put::Written(_) => Some(pack.members),
        // Another machine was first, and may have compressed in another way.
        Put::Refused => find_pack(shared, &chunks).await?,
    };
    if let Some(members) = members {
        confirm_members(shared, began_millis, members)?;
        shared
            .counters
            .sent(chunks.iter().map(|chunk| u64::from(chunk.len)).sum());
        return Ok(Vec::new());
    }
    warn!(%key, "another object has the name of a pack; its chunks are stored one by one");
    for &index in group {
        let wrong = upload_single(shared, blob, index).await?;
        if !wrong.is_empty() {
            return Ok(wrong);
        }
    }
    Ok(Vec::new())
}

/// Looks for the pack of `chunks`; `None` if there is none that is one.
pub(super) async fn find_pack(shared: &Shared, chunks: &[Chunk]) -> Result<Option<Members>, UploadError> {
    let key = layout::pack(&pack::name_of(chunks.iter().map(|chunk| chunk.digest)));
    let len = pack::head_bytes(chunks.len());
    let found = retrying(shared, "get", &key, || shared.bucket.get(&key, Some(0..len), len)).await?;
    Ok(found.and_then(|object| pack::read_head(&object.bytes, chunks)))
}

pub(super) fn confirm_members(
    shared: &Shared,
    confirmed_millis: u64,
    members: Members,
) -> Result<(), StoreError> {
    let members = members.into_iter();
    confirm(
        shared,
        confirmed_millis,
        members.map(|(digest, place)| (digest, Some(place))),
    )
}

/// Reads a chunk from the disk and checks it; `None` when it is another.
pub(super) fn read_checked(blob: &Blob, index: usize) -> Result<Option<(Chunk, Bytes)>, StoreError> {
    let chunk = blob.chunks().chunks()[index];
    let bytes = match blob.read_unverified(index) {
        Ok(Some(bytes)) => bytes,
        // No file, or one that is too short.
        Ok(None) => return Ok(None),
        Err(StoreError::Disk { source, .. }) if source.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Ok(None);
        }
        Err(err) => return Err(err),
    };
    Ok((Digest::of(&bytes) == chunk.digest).then_some((chunk, bytes)))
}

/// The object of one chunk.
fn prepare(blob: &Blob, index: usize, compress: bool) -> Result<Option<Body>, StoreError> {
    let read = read_checked(blob, index)?;
    Ok(read.map(|(chunk, bytes)| body::encode_known(bytes, chunk.digest, compress)))
}

/// The pack of several, or those of them that are wrong. With `salt` behind them it has a name of its own.
pub(super) fn prepare_pack(
    blob: &Blob,
    group: &[usize],
    salt: Option<&[u8]>,
    compress: bool,
) -> Result<Result<(Pack, Body), Vec<usize>>, StoreError> {
    let mut wrong = Vec::new();
    let bytes = group
        .iter()
        .map(|&index| blob.chunks().chunks()[index].len as usize);
    let (members, salted) = (
        group.len() + usize::from(salt.is_some()),
        salt.map_or(0, <[u8]>::len),
    );
    let mut pack = pack::Builder::new(members, bytes.sum::<usize>() + salted);
    for &index in group {
        let Some((chunk, bytes)) = read_checked(blob, index)? else {
            wrong.push(index);
            continue;
        };
        match compress.then(|| body::compressed(&bytes)).flatten() {
            Some(packed) => pack.add(chunk, &packed, true),
            None => pack.add(chunk, &bytes, false),
        }
    }
    if !wrong.is_empty() {
        return Ok(Err(wrong));
    }
    if let Some(salt) = salt {
        let chunk = Chunk {
            digest: Digest::of(salt),
            len: salt.len() as u32,
        };
        pack.add(chunk, salt, false);
    }
    let pack = pack.finish();
    let body = Body::raw(pack.object.clone());
    Ok(Ok((pack, body)))
}
