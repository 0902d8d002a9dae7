//! Takes over the blobs of a fork whose writers are trusted less, after looking at every byte.
//!
//! Such a fork keeps its blobs and packs below its own prefix, where its writers can put anything under any name,
//! and its log can claim anything of them. Whatever its changes name is read here: a pack member by
//! member, each at the place that the change tells; a chunk by its digest; a blob of several chunks once more as a
//! whole, because a wrong chunk list would change what everybody reads under that digest. What is
//! right and not yet among the parent's blobs is copied there. What is not right ends the promotion.
//!
//! # Cost
//!
//! One GET and one PUT for each pack and each chunk of its own; what the parent has already is read and not
//! written. Blobs of several chunks are read twice. Memory: [`PARALLEL`] packs.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::{OnStep, PromoteError, PromoteStep};
use crate::{
    base::{
        chunk::{Chunk, ChunkList, MAX_CHUNK_BYTES},
        digest::{Digest, Hasher},
        volume::VolumeName,
    },
    namespace::{
        background::blocking,
        change::{EntryBlob, EntryChunks, PathChange},
        patience::patiently,
    },
    store::{
        manifest::{self, MAX_LIST_BYTES},
        pack::{self, PackPlace},
    },
    tier::{Body, Put, SharedBucket, TierError, body, layout},
};

/// Packs or chunks under way at once.
const PARALLEL: usize = 8;

/// Where blobs are looked for and put.
#[derive(Clone, Debug)]
pub(super) struct Domains {
    /// Prefixes of those whom the parent's readers trust; copies go below the first.
    pub trusted: Vec<String>,
    /// The fork's own.
    pub from: String,
}

/// A chunk whose bytes were seen and are right.
#[derive(Clone, Debug)]
struct Known {
    len: u32,
    place: Option<PackPlace>,
    /// The trusted prefix below which it is.
    below: String,
}

/// By digest and pack; without one, as an object of its own.
type KnownChunks = BTreeMap<(Digest, Option<Digest>), Known>;

/// What one object has.
type Taken = Vec<(Digest, Known)>;

/// One object that a change needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    Pack(Digest),
    Chunk(Digest),
}

/// Verifies and copies all that `changes` name, and corrects where they say it is; returns how many objects that were.
pub(super) async fn adopt(
    bucket: &SharedBucket,
    domains: &Domains,
    fork: &VolumeName,
    changes: &mut [PathChange],
    on_step: OnStep<'_>,
) -> Result<u64, PromoteError> {
    let mut lists = HashMap::new();
    let mut sources = HashSet::new();
    for blob in blobs(changes) {
        if let EntryChunks::Listed { digest, .. } = blob.chunks {
            if let Some(listed) = read_list(bucket, domains, digest).await? {
                add_sources(&listed.0, &listed.1, &mut sources);
                lists.insert(digest, listed);
            }
        } else if let Some(list) = list_of(blob) {
            add_sources(&list, &blob.places, &mut sources);
        }
    }
    let of = sources.len() as u64;
    let mut known = KnownChunks::new();
    let mut rest = sources.into_iter();
    let mut under_way: VecDeque<JoinHandle<Result<Taken, TierError>>> = VecDeque::new();
    let mut seen = 0;
    loop {
        while under_way.len() < PARALLEL
            && let Some(source) = rest.next()
        {
            let (bucket, domains) = (Arc::clone(bucket), domains.clone());
            under_way.push_back(tokio::spawn(async move {
                match source {
                    Source::Pack(name) => take_pack(&bucket, &domains, name).await,
                    Source::Chunk(digest) => take_chunk(&bucket, &domains, digest).await,
                }
            }));
        }
        let Some(task) = under_way.pop_front() else { break };
        let taken = joined(task).await?;
        for (digest, chunk) in taken {
            let pack = chunk.place.map(|place| place.pack);
            known.insert((digest, pack), chunk);
        }
        seen += 1;
        on_step(PromoteStep::Confirming { objects: seen, of });
    }
    let mut wrong = Vec::new();
    let mut judged = HashMap::new();
    for change in changes {
        let Some(blob) = change.entry.as_mut().and_then(|entry| entry.blob.as_mut()) else {
            continue;
        };
        let told = blob.clone();
        let judgement = match judged.get(&told.digest) {
            Some((before, judgement)) if *before == told => Option::clone(judgement),
            _ => {
                let judgement = judge(bucket, domains, &known, &lists, &told).await?;
                judged.insert(told.digest, (told, judgement.clone()));
                judgement
            }
        };
        match judgement {
            Some(right) => *blob = right,
            None => wrong.push(change.path.clone()),
        }
    }
    match wrong.iter().min() {
        None => Ok(of),
        Some(first) => Err(PromoteError::Wrong {
            volume: fork.clone(),
            count: wrong.len() as u64,
            path: String::from_utf8_lossy(first).into_owned(),
        }),
    }
}

async fn joined<T>(task: JoinHandle<T>) -> T {
    match task.await {
        Ok(done) => done,
        Err(err) => match err.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_shutdown) => std::future::pending().await,
        },
    }
}

fn blobs(changes: &[PathChange]) -> impl Iterator<Item = &EntryBlob> {
    changes
        .iter()
        .filter_map(|change| change.entry.as_ref()?.blob.as_ref())
}

/// The chunks of a blob that carries its list itself; `None` of an empty and of a listed one.
fn list_of(blob: &EntryBlob) -> Option<ChunkList> {
    match &blob.chunks {
        EntryChunks::Single if blob.size == 0 => None,
        EntryChunks::Single => Some(ChunkList::single(blob.digest, blob.size)),
        EntryChunks::Inline(list) => Some(list.clone()),
        EntryChunks::Listed { .. } => None,
    }
}

fn add_sources(list: &ChunkList, places: &[Option<PackPlace>], sources: &mut HashSet<Source>) {
    for (index, chunk) in list.chunks().iter().enumerate() {
        sources.insert(match places.get(index).copied().flatten() {
            Some(place) => Source::Pack(place.pack),
            None => Source::Chunk(chunk.digest),
        });
    }
}

async fn read_list(
    bucket: &SharedBucket,
    domains: &Domains,
    digest: Digest,
) -> Result<Option<manifest::Placed>, TierError> {
    for below in domains.trusted.iter().chain([&domains.from]) {
        if let Some(bytes) = get_blob(bucket, below, &digest, MAX_LIST_BYTES).await? {
            return Ok(manifest::decode(&bytes).ok());
        }
    }
    Ok(None)
}

/// Reads an object that is named by its digest; `None` for none, and for one of other bytes.
async fn get_blob(
    bucket: &SharedBucket,
    below: &str,
    digest: &Digest,
    max_bytes: u64,
) -> Result<Option<Bytes>, TierError> {
    let key = format!("{below}{}", layout::blob(digest));
    match get(bucket, &key, max_bytes).await? {
        Some(bytes) => {
            let (hashed, digest) = (bytes.clone(), *digest);
            let right = blocking(move || Digest::of(&hashed) == digest).await;
            Ok(right.then_some(bytes))
        }
        None => Ok(None),
    }
}

/// Reads an object; one that is no object of ours is as good as none.
async fn get(bucket: &SharedBucket, key: &str, max_bytes: u64) -> Result<Option<Bytes>, TierError> {
    match patiently(|| bucket.get(key, None, max_bytes)).await {
        Ok(object) => Ok(object.map(|object| object.bytes)),
        Err(TierError::Malformed { .. }) => Ok(None),
        Err(err) => Err(err),
    }
}

/// Verifies a pack wherever it is, and sees to it that the parent's readers have it.
async fn take_pack(bucket: &SharedBucket, domains: &Domains, name: Digest) -> Result<Taken, TierError> {
    for below in &domains.trusted {
        if let Some((_, chunks)) = read_pack(bucket, below, name).await? {
            return Ok(placed(chunks, below));
        }
    }
    let Some((object, chunks)) = read_pack(bucket, &domains.from, name).await? else {
        return Ok(Taken::new());
    };
    let target = &domains.trusted[0];
    let key = format!("{target}{}", layout::pack(&name));
    match patiently(|| bucket.put_new(&key, Body::raw(object.clone()))).await? {
        Put::Written(_) => Ok(placed(chunks, target)),
        // A lost reply, or another promotion, or an object that is not this pack: what is there counts.
        Put::Refused => Ok(match read_pack(bucket, target, name).await? {
            Some((_, chunks)) => placed(chunks, target),
            None => Taken::new(),
        }),
    }
}

type Packed = (Bytes, Vec<(Chunk, PackPlace)>);

/// Reads a pack and checks every member; `None` when there is none, or not that one.
async fn read_pack(bucket: &SharedBucket, below: &str, name: Digest) -> Result<Option<Packed>, TierError> {
    let key = format!("{below}{}", layout::pack(&name));
    let Some(object) = get(bucket, &key, pack::MAX_OBJECT_BYTES).await? else {
        return Ok(None);
    };
    Ok(blocking(move || {
        let members = pack::read_members(&object, &name)?;
        let right = |(chunk, place): &(Chunk, PackPlace)| {
            unpack(&object, place, chunk.len).is_some_and(|bytes| {
                bytes.len() as u64 == u64::from(chunk.len) && Digest::of(&bytes) == chunk.digest
            })
        };
        members.iter().all(right).then_some((object, members))
    })
    .await)
}

/// The bytes of a member of a pack's object.
fn unpack(object: &Bytes, place: &PackPlace, len: u32) -> Option<Bytes> {
    let range = place.range();
    let stored = object.get(range.start as usize..range.end as usize)?;
    if place.zstd {
        body::decode("a pack", stored, u64::from(len)).ok()
    } else {
        Some(object.slice_ref(stored))
    }
}

fn placed(chunks: Vec<(Chunk, PackPlace)>, below: &str) -> Taken {
    let known = |(chunk, place): (Chunk, PackPlace)| {
        let known = Known {
            len: chunk.len,
            place: Some(place),
            below: below.to_owned(),
        };
        (chunk.digest, known)
    };
    chunks.into_iter().map(known).collect()
}

/// Verifies a chunk that is an object of its own, and sees to it that the parent's readers have it.
async fn take_chunk(bucket: &SharedBucket, domains: &Domains, digest: Digest) -> Result<Taken, TierError> {
    let known = |bytes: &Bytes, below: &str| {
        let known = Known {
            len: bytes.len() as u32,
            place: None,
            below: below.to_owned(),
        };
        vec![(digest, known)]
    };
    let most = u64::from(MAX_CHUNK_BYTES);
    for below in &domains.trusted {
        if let Some(bytes) = get_blob(bucket, below, &digest, most).await? {
            return Ok(known(&bytes, below));
        }
    }
    let Some(bytes) = get_blob(bucket, &domains.from, &digest, most).await? else {
        return Ok(Taken::new());
    };
    let target = &domains.trusted[0];
    put_blob(bucket, target, digest, bytes.clone()).await?;
    // Also when it was refused: the object that is there may be another one.
    Ok(match get_blob(bucket, target, &digest, most).await? {
        Some(bytes) => known(&bytes, target),
        None => Taken::new(),
    })
}

async fn put_blob(bucket: &SharedBucket, below: &str, digest: Digest, bytes: Bytes) -> Result<(), TierError> {
    let key = format!("{below}{}", layout::blob(&digest));
    let compress = bucket.compresses();
    let body = blocking(move || body::encode_known(bytes, digest, compress)).await;
    patiently(|| bucket.put_new(&key, body.clone())).await?;
    Ok(())
}

/// The chunk in the pack that a change tells, if it is there: whoever promotes the change again says the same place then.
fn find(known: &KnownChunks, digest: Digest, pack: Option<Digest>) -> Option<&Known> {
    let elsewhere = || {
        let (key, known) = known.range((digest, None)..).next()?;
        (key.0 == digest).then_some(known)
    };
    known.get(&(digest, pack)).or_else(elsewhere)
}

/// What a change may say of a blob; `None` when what it says is not so.
async fn judge(
    bucket: &SharedBucket,
    domains: &Domains,
    known: &KnownChunks,
    lists: &HashMap<Digest, manifest::Placed>,
    told: &EntryBlob,
) -> Result<Option<EntryBlob>, TierError> {
    if told.size == 0 {
        return Ok(Some(told.clone()));
    }
    let (list, places) = match &told.chunks {
        EntryChunks::Listed { digest, .. } => lists
            .get(digest)
            .map(|(list, places)| (list.clone(), places))
            .unzip(),
        EntryChunks::Single | EntryChunks::Inline(_) => (list_of(told), Some(&told.places)),
    };
    let Some(list) = list.filter(|list| list.size() == told.size) else {
        return Ok(None);
    };
    let mut chunks = Vec::with_capacity(list.chunks().len());
    for (index, chunk) in list.chunks().iter().enumerate() {
        let place = places.and_then(|places| places.get(index).copied().flatten());
        match find(known, chunk.digest, place.map(|place| place.pack)) {
            Some(known) if known.len == chunk.len => chunks.push(known.clone()),
            _ => return Ok(None),
        }
    }
    if list.chunks().len() > 1 && whole_digest(bucket, &list, &chunks).await? != Some(told.digest) {
        return Ok(None);
    }
    let mut places: Vec<Option<PackPlace>> = chunks.iter().map(|known| known.place).collect();
    if places.iter().all(Option::is_none) {
        places.clear();
    }
    if !matches!(told.chunks, EntryChunks::Listed { .. }) {
        return Ok(Some(EntryBlob {
            places,
            ..told.clone()
        }));
    }
    let object = manifest::encode(&list, &places);
    let (digest, size) = (Digest::of(&object), object.len() as u64);
    put_blob(bucket, &domains.trusted[0], digest, object).await?;
    Ok(Some(EntryBlob {
        chunks: EntryChunks::Listed { digest, size },
        places: Vec::new(),
        ..told.clone()
    }))
}

/// Hashes the chunks of a blob one after the other, as the parent's readers will get them.
async fn whole_digest(
    bucket: &SharedBucket,
    list: &ChunkList,
    known: &[Known],
) -> Result<Option<Digest>, TierError> {
    let mut rest = list.chunks().iter().copied().zip(known.iter().cloned());
    let mut under_way = VecDeque::new();
    let mut hasher = Hasher::default();
    loop {
        while under_way.len() < PARALLEL
            && let Some((chunk, known)) = rest.next()
        {
            let bucket = Arc::clone(bucket);
            under_way.push_back(tokio::spawn(
                async move { read_known(&bucket, chunk, &known).await },
            ));
        }
        let Some(task) = under_way.pop_front() else {
            return Ok(Some(hasher.finish()));
        };
        let Some(bytes) = joined(task).await? else {
            return Ok(None);
        };
        hasher = blocking(move || {
            hasher.update(&bytes);
            hasher
        })
        .await;
    }
}

async fn read_known(bucket: &SharedBucket, chunk: Chunk, known: &Known) -> Result<Option<Bytes>, TierError> {
    let Some(place) = known.place else {
        return get_blob(bucket, &known.below, &chunk.digest, u64::from(MAX_CHUNK_BYTES)).await;
    };
    let key = format!("{}{}", known.below, layout::pack(&place.pack));
    let range = place.range();
    let max_bytes = range.end - range.start;
    let Some(object) = patiently(|| bucket.get(&key, Some(range.clone()), max_bytes)).await? else {
        return Ok(None);
    };
    if !place.zstd {
        return Ok(Some(object.bytes));
    }
    Ok(blocking(move || body::decode(&key, &object.bytes, u64::from(chunk.len)).ok()).await)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::{clock::Stamp, id::MachineId},
        namespace::change::Entry,
        store::rows::NodeKind,
        tier::url::{ConnectOptions, connect},
    };

    const BYTES: &[u8] = b"stored three times";

    fn chunk(bytes: &[u8]) -> Chunk {
        Chunk {
            digest: Digest::of(bytes),
            len: bytes.len() as u32,
        }
    }

    /// A file of [`BYTES`], which are at `place`.
    fn change(path: String, place: Option<PackPlace>) -> PathChange {
        let blob = EntryBlob {
            digest: Digest::of(BYTES),
            size: BYTES.len() as u64,
            chunks: EntryChunks::Single,
            places: place.map(Some).into_iter().collect(),
        };
        PathChange {
            path: path.into_bytes(),
            stamp: Stamp {
                millis: 1,
                counter: 0,
                machine: MachineId(1),
            },
            entry: Some(Entry {
                blob: Some(blob),
                ..Entry::new(NodeKind::File, 0o644)
            }),
        }
    }

    #[tokio::test]
    async fn bytes_that_are_in_several_places_stay_where_each_change_says() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}", dir.path().display());
        let bucket = connect(&url.parse().unwrap(), &ConnectOptions::default())
            .await
            .unwrap();
        let domains = Domains {
            trusted: vec![String::new()],
            from: layout::volume_prefix("pr-1"),
        };
        put_blob(
            &bucket,
            &domains.from,
            Digest::of(BYTES),
            Bytes::from_static(BYTES),
        )
        .await
        .unwrap();
        let mut changes = vec![change("alone".to_owned(), None)];
        for number in 0..8_u8 {
            let mut builder = pack::Builder::new(2, 100);
            builder.add(chunk(&[number]), &[number], false);
            builder.add(chunk(BYTES), BYTES, false);
            let pack = builder.finish();
            let key = format!("{}{}", domains.from, layout::pack(&pack.name));
            bucket.put_new(&key, Body::raw(pack.object)).await.unwrap();
            changes.push(change(format!("packed-{number}"), Some(pack.members[1].1)));
        }
        let told = changes.clone();
        let fork = "pr-1".parse().unwrap();
        let adopted = adopt(&bucket, &domains, &fork, &mut changes, &|_| {}).await;
        assert_eq!(adopted.unwrap(), 9);
        assert_eq!(changes, told);
    }
}
