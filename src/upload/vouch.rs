//! Says whether names may be published: whether the bucket has their blobs, and will keep them for a while.
//!
//! "Durable" was true when a blob was uploaded. A machine that slept since then, or was cut off, may come back
//! when a sweep has condemned or deleted what it uploaded, because no name in the bucket referred to it yet. So
//! before each segment every object that it names is looked at again.
//!
//! # Invariants
//!
//! - An object that is condemned, as far as this machine knows, is never vouched for.
//! - One that was not seen in the bucket within a third of the window is asked for again.
//! - The answer ends: whoever publishes compares it with the time at which the segment was acknowledged.
//!
//! What is not there, or will not stay, is uploaded again from this disk; what is condemned but not here is fetched
//! first, as long as it can be. A blob that is neither here nor there is lost.
//!
//! # Cost
//!
//! Nothing for what this machine uploaded lately. A HEAD for each object, a pack counting as one, for names of
//! blobs that others uploaded: what is renamed, or changed in its mode or time.

use std::{collections::HashMap, sync::Arc};

use tokio::task::JoinSet;
use tracing::{info, warn};

use super::{
    Shared,
    chunks::confirm,
    condemned::Known,
    task::{UploadError, aside, retrying},
};
use crate::{
    base::{chunk::ChunkList, digest::Digest},
    store::{
        StoreError,
        fetch::Fetcher,
        manifest,
        pack::PackPlace,
        rows::{Change, ChunkRow, Durability},
    },
    tier::layout,
};

/// A blob as an entry names it.
#[derive(Clone, Debug)]
pub struct Named {
    pub digest: Digest,
    pub size: u64,
    pub chunks: NamedChunks,
}

/// How an entry tells the chunks of a blob.
#[derive(Clone, Debug)]
pub enum NamedChunks {
    /// With where packs have them; no places: each is an object of its own.
    Told(ChunkList, Vec<Option<PackPlace>>),
    /// By a chunk list that is an object of its own.
    Listed(Digest, u64),
}

/// Whether names may be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vouch {
    /// When the segment is acknowledged before this time of the bucket.
    Until(u64),
    /// Some blobs are being uploaded again.
    Later,
    /// These are neither here nor in the bucket.
    Lost(Vec<Digest>),
}

/// Vouches for blobs.
#[derive(Debug)]
pub struct Voucher {
    shared: Arc<Shared>,
    fetcher: Arc<Fetcher>,
}

/// An object of the bucket that names refer to.
#[derive(Clone, Debug)]
struct Object {
    /// Of the blobs that were asked about, by their index.
    blobs: Vec<usize>,
    chunks: Vec<(Digest, Option<PackPlace>)>,
    confirmed_millis: u64,
}

/// An object by its key: a pack, or a chunk or chunk list; and the digest in it.
type Name = (bool, Digest);

type Objects = HashMap<Name, Object>;

fn key_of((is_pack, digest): &Name) -> String {
    if *is_pack {
        layout::pack(digest)
    } else {
        layout::blob(digest)
    }
}

fn note(objects: &mut Objects, blob: usize, chunk: (Digest, Option<PackPlace>), confirmed_millis: u64) {
    let name = chunk.1.map_or((false, chunk.0), |place| (true, place.pack));
    let object = objects.entry(name).or_insert_with(|| Object {
        blobs: Vec::new(),
        chunks: Vec::new(),
        confirmed_millis: 0,
    });
    if object.blobs.last() != Some(&blob) {
        object.blobs.push(blob);
    }
    object.chunks.push(chunk);
    // Whoever saw one member of a pack saw all.
    object.confirmed_millis = object.confirmed_millis.max(confirmed_millis);
}

impl Voucher {
    pub(super) fn new(shared: Arc<Shared>, fetcher: Arc<Fetcher>) -> Self {
        Self { shared, fetcher }
    }

    /// Looks at every object that `named` needs; sees to it that what is missing comes back.
    pub async fn vouch(&self, named: Vec<Named>) -> Result<Vouch, UploadError> {
        if named.is_empty() {
            return Ok(Vouch::Until(u64::MAX));
        }
        let known = self.shared.condemned.known().await?;
        let (mut objects, named) = self.objects(named).await?;
        let bad = self.ask(&known, &mut objects).await?;
        if bad.is_empty() {
            let until = objects
                .values()
                .map(|object| known.good_until(object.confirmed_millis));
            let until = until.min().unwrap_or(u64::MAX);
            // This machine slept while it asked.
            return Ok(if until <= self.shared.condemned.now_millis() {
                Vouch::Later
            } else {
                Vouch::Until(until)
            });
        }
        self.restore(&named, bad).await
    }

    /// Collects what the blobs consist of, with when each was last seen.
    async fn objects(&self, named: Vec<Named>) -> Result<(Objects, Vec<Named>), UploadError> {
        let shared = Arc::clone(&self.shared);
        let (mut objects, unclear, named) = aside(move || {
            let mut objects = Objects::new();
            let mut unclear = Vec::new();
            for (index, blob) in named.iter().enumerate() {
                match &blob.chunks {
                    NamedChunks::Told(list, places) => {
                        shared.note_chunks(&mut objects, index, blob, list, places)?;
                    }
                    NamedChunks::Listed(list, _) => {
                        let (confirmed, same) = shared.same_list(blob, list)?;
                        note(&mut objects, index, (*list, None), confirmed);
                        match same {
                            Some((list, places)) => {
                                shared.note_chunks(&mut objects, index, blob, &list, &places)?;
                            }
                            None => unclear.push(index),
                        }
                    }
                }
            }
            Ok::<_, StoreError>((objects, unclear, named))
        })
        .await??;
        // Where a list of another time says that its chunks are, only the list knows.
        for index in unclear {
            let NamedChunks::Listed(list, size) = named[index].chunks else {
                continue;
            };
            let key = layout::blob(&list);
            let asked_millis = self.shared.condemned.now_millis();
            let bucket = &self.shared.bucket;
            let found = retrying(&self.shared, "get", &key, || bucket.get(&key, None, size)).await?;
            let read = found.and_then(|object| manifest::decode(&object.bytes).ok());
            if let Some((chunks, places)) = read {
                confirm(&self.shared, asked_millis, [(list, None)])?;
                note(&mut objects, index, (list, None), asked_millis);
                let blob = &named[index];
                self.shared
                    .note_chunks(&mut objects, index, blob, &chunks, &places)?;
            }
        }
        Ok((objects, named))
    }

    /// Asks for those that were not seen lately; returns those that are not there or will not stay.
    async fn ask(&self, known: &Known, objects: &mut Objects) -> Result<Vec<Object>, UploadError> {
        let now = self.shared.condemned.now_millis();
        let mut bad = Vec::new();
        let mut asked: JoinSet<Result<(Name, u64, bool), UploadError>> = JoinSet::new();
        for (name, object) in objects.iter() {
            if known.is_condemned(&name.1) {
                bad.push(object.clone());
            } else if !known.is_fresh(object.confirmed_millis, now) {
                let (shared, name) = (Arc::clone(&self.shared), *name);
                asked.spawn(async move {
                    let places = Arc::clone(&shared.places);
                    let _place = places.acquire_owned().await.map_err(|_| UploadError::Stopped)?;
                    let key = key_of(&name);
                    let asked_millis = shared.condemned.now_millis();
                    let found = retrying(&shared, "head", &key, || shared.bucket.head(&key)).await?;
                    Ok((name, asked_millis, found.is_some()))
                });
            }
        }
        let mut seen = Vec::new();
        while let Some(done) = asked.join_next().await {
            let (name, asked_millis, found) = done.map_err(|_| UploadError::Stopped)??;
            let object = objects
                .get_mut(&name)
                .expect("it was asked for because it is here");
            if found {
                object.confirmed_millis = asked_millis;
                let row = |(chunk, place): &(Digest, _)| Change::PutChunk(*chunk, row(asked_millis, *place));
                seen.extend(object.chunks.iter().map(row));
            } else {
                let shared = &self.shared;
                for (chunk, place) in &object.chunks {
                    // Or it would be taken for present by whoever uploads it.
                    if shared.ledger.chunk(chunk)?.is_none_or(|row| row.place == *place) {
                        seen.push(Change::PutChunk(*chunk, row(0, None)));
                    }
                }
                bad.push(object.clone());
            }
        }
        if !seen.is_empty() {
            let shared = Arc::clone(&self.shared);
            aside(move || shared.ledger.commit(seen)).await??;
        }
        Ok(bad)
    }

    /// Makes the blobs of bad objects wait to be uploaded again.
    async fn restore(&self, named: &[Named], bad: Vec<Object>) -> Result<Vouch, UploadError> {
        let mut blobs: Vec<usize> = bad.into_iter().flat_map(|object| object.blobs).collect();
        blobs.sort_unstable();
        blobs.dedup();
        let mut lost = Vec::new();
        for blob in blobs.into_iter().map(|index| &named[index]) {
            if !self.make_dirty(blob).await? {
                warn!(digest = %blob.digest, "a blob that no name referred to is gone from the bucket, and is not here");
                lost.push(blob.digest);
            }
        }
        self.shared.kick();
        Ok(if lost.is_empty() {
            Vouch::Later
        } else {
            Vouch::Lost(lost)
        })
    }

    /// False when the bytes are nowhere.
    async fn make_dirty(&self, named: &Named) -> Result<bool, UploadError> {
        let blobs = &self.shared.blobs;
        if blobs.set_dirty(&named.digest)? {
            info!(digest = %named.digest, "a sweep may take a blob before it is named: it is uploaded again");
            return Ok(true);
        }
        let Some(blob) = blobs.lease(&named.digest, named.size)? else {
            return Ok(false);
        };
        match self.fetcher.ensure_whole(&blob).await {
            Ok(()) => {}
            Err(StoreError::Missing { .. } | StoreError::Corrupt { .. }) => return Ok(false),
            Err(err) => return Err(err.into()),
        }
        if blobs.set_dirty(&named.digest)? {
            return Ok(true);
        }
        // The disk did not take it.
        Err(StoreError::Full.into())
    }
}

fn row(confirmed_millis: u64, place: Option<PackPlace>) -> ChunkRow {
    ChunkRow {
        confirmed_millis,
        place,
    }
}

impl Shared {
    fn note_chunks(
        &self,
        objects: &mut Objects,
        index: usize,
        blob: &Named,
        list: &ChunkList,
        places: &[Option<PackPlace>],
    ) -> Result<(), StoreError> {
        for (number, chunk) in list.chunks().iter().enumerate() {
            let place = places.get(number).copied().flatten();
            let confirmed = match self.ledger.chunk(&chunk.digest)? {
                Some(row) if row.place == place => row.confirmed_millis,
                // The only chunk of a blob has no row of its own when nothing is to be said of its place.
                None if place.is_none() && chunk.digest == blob.digest => {
                    self.blob_confirmed(&blob.digest)?
                }
                Some(_) | None => 0,
            };
            note(objects, index, (chunk.digest, place), confirmed);
        }
        Ok(())
    }

    fn blob_confirmed(&self, digest: &Digest) -> Result<u64, StoreError> {
        let row = self.ledger.blob(digest)?;
        Ok(match row.map(|row| row.durability) {
            Some(Durability::Durable { confirmed_millis }) => confirmed_millis,
            Some(Durability::Dirty | Durability::Quarantined) | None => 0,
        })
    }

    /// When a chunk list was last seen, and what it says if that is what the rows say.
    #[expect(clippy::type_complexity, reason = "a list with its places, or none")]
    fn same_list(
        &self,
        blob: &Named,
        list: &Digest,
    ) -> Result<(u64, Option<(Arc<ChunkList>, Vec<Option<PackPlace>>)>), StoreError> {
        let confirmed = self.ledger.chunk(list)?.map_or(0, |row| row.confirmed_millis);
        let Some(chunks) = self.ledger.manifest(&blob.digest, blob.size)? else {
            return Ok((confirmed, None));
        };
        let mut places = Vec::with_capacity(chunks.chunks().len());
        for chunk in chunks.chunks() {
            places.push(self.ledger.chunk(&chunk.digest)?.and_then(|row| row.place));
        }
        let same = Digest::of(&manifest::encode(&chunks, &places)) == *list;
        Ok((confirmed, same.then_some((chunks, places))))
    }
}
