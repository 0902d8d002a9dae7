//! Makes sure that the bucket has every byte that a promotion names.
//!
//! Asked for is each object once: a pack however many of its members are named, a chunk that is an object of
//! its own, a chunk list. The list of a long blob is read, because what it names is needed as well.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use tokio::task::JoinSet;

use super::{OnStep, PromoteError, PromoteStep};
use crate::{
    base::{chunk::ChunkList, digest::Digest, volume::VolumeName},
    namespace::{
        change::{EntryBlob, EntryChunks, PathChange},
        patience::patiently,
    },
    store::{
        manifest::{self, MAX_LIST_BYTES},
        pack::PackPlace,
    },
    tier::{SharedBucket, TierError, layout},
};

/// Objects that are asked for at once.
const PARALLEL: usize = 32;

/// Objects by key, each with the changes (by their numbers) that need it.
type Needed = BTreeMap<String, Vec<usize>>;

/// Confirms all that `changes` name; returns how many objects that are.
pub(super) async fn confirm(
    bucket: &SharedBucket,
    fork: &VolumeName,
    changes: &[PathChange],
    on_step: OnStep<'_>,
) -> Result<u64, PromoteError> {
    let mut needed = Needed::new();
    let mut lost: HashSet<usize> = HashSet::new();
    let blobs = changes.iter().enumerate();
    let blobs = blobs.filter_map(|(number, change)| Some((number, change.entry.as_ref()?.blob.as_ref()?)));
    for (number, blob) in blobs {
        if !objects_of(bucket, blob, |key| {
            needed.entry(key).or_default().push(number);
        })
        .await?
        {
            lost.insert(number);
        }
    }
    let of = needed.len() as u64;
    let mut asked = 0;
    let mut rest = needed.into_iter();
    let mut under_way = JoinSet::new();
    loop {
        while under_way.len() < PARALLEL
            && let Some((key, numbers)) = rest.next()
        {
            let bucket = Arc::clone(bucket);
            under_way.spawn(async move {
                let found = patiently(|| bucket.head(&key)).await?;
                Ok::<_, TierError>(if found.is_some() { Vec::new() } else { numbers })
            });
        }
        match under_way.join_next().await {
            Some(Ok(missing)) => lost.extend(missing?),
            Some(Err(err)) if err.is_panic() => std::panic::resume_unwind(err.into_panic()),
            Some(Err(_shutdown)) => std::future::pending().await,
            None => break,
        }
        asked += 1;
        on_step(PromoteStep::Confirming { objects: asked, of });
    }
    match lost.iter().map(|&number| &changes[number].path).min() {
        None => Ok(of),
        Some(first) => Err(PromoteError::Lost {
            volume: fork.clone(),
            count: lost.len() as u64,
            path: String::from_utf8_lossy(first).into_owned(),
        }),
    }
}

/// Names the objects that have the bytes of a blob; false when its chunks cannot be known any more.
async fn objects_of(
    bucket: &SharedBucket,
    blob: &EntryBlob,
    mut needs: impl FnMut(String),
) -> Result<bool, TierError> {
    match &blob.chunks {
        EntryChunks::Single if blob.size == 0 => {}
        EntryChunks::Single => {
            let list = ChunkList::single(blob.digest, blob.size);
            objects_of_list(&list, &blob.places, needs);
        }
        EntryChunks::Inline(list) => objects_of_list(list, &blob.places, needs),
        EntryChunks::Listed { digest, .. } => {
            let Some((list, places)) = read_list(bucket, digest).await? else {
                return Ok(false);
            };
            needs(layout::blob(digest));
            objects_of_list(&list, &places, needs);
        }
    }
    Ok(true)
}

fn objects_of_list(list: &ChunkList, places: &[Option<PackPlace>], mut needs: impl FnMut(String)) {
    for (index, chunk) in list.chunks().iter().enumerate() {
        needs(match places.get(index).copied().flatten() {
            Some(place) => layout::pack(&place.pack),
            None => layout::blob(&chunk.digest),
        });
    }
}

/// Reads a chunk list; `None` when it is gone, or is another.
async fn read_list(bucket: &SharedBucket, digest: &Digest) -> Result<Option<manifest::Placed>, TierError> {
    let key = layout::blob(digest);
    let object = match patiently(|| bucket.get(&key, None, MAX_LIST_BYTES)).await {
        Err(TierError::Malformed { .. }) | Ok(None) => return Ok(None),
        Ok(Some(object)) => object,
        Err(err) => return Err(err),
    };
    if Digest::of(&object.bytes) != *digest {
        return Ok(None);
    }
    Ok(manifest::decode(&object.bytes).ok())
}
