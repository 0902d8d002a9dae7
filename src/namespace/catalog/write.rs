//! Writing the parts of a catalog, from the last register to the first.
//!
//! # Policy
//!
//! A part has [`PART_BYTES`] before compression, or up to twice that where it ends at one that is
//! kept. A part that is as it was is not sent again.
//!
//! # Invariant
//!
//! A part that is sent has a name that no object ever had (a salt sees to that): nobody can be about to
//! delete it, whatever is in the bucket.

use std::collections::{HashMap, VecDeque};

use tokio::task::JoinSet;

use super::{
    CatalogError,
    format::{self, MAX_ITEMS, PartRef},
};
use crate::{
    base::{
        digest::{Digest, Hasher},
        id::random_bytes,
    },
    namespace::{background::blocking, change::Item},
    tier::{Body, SharedBucket, layout},
};

/// About what a part has before compression: some thousands of registers.
pub const PART_BYTES: usize = 512 << 10;

/// A run of registers with less than this share of a part is joined with the part before it.
const SMALL_SHARE: usize = 8;

/// Parts that are sent at once.
const PARALLEL: usize = 4;

#[derive(Debug)]
struct Written {
    bytes: Vec<u8>,
    path: Vec<u8>,
    live: bool,
    dead_millis: u64,
}

/// What was written, and what of it was news to the bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    pub parts: u64,
    pub bytes: u64,
}

/// Takes items from the last to the first, and cuts them into parts.
#[derive(Debug)]
pub struct PartWriter {
    bucket: SharedBucket,
    volume: String,
    /// Parts of the catalog before, by what is in them.
    known: HashMap<Digest, PartRef>,
    /// The last one first.
    items: VecDeque<Written>,
    bytes: usize,
    part_bytes: usize,
    /// The last one first.
    parts: Vec<PartRef>,
    sending: JoinSet<Result<(), CatalogError>>,
    pub sent: Sent,
}

impl PartWriter {
    pub fn new(bucket: &SharedBucket, volume: &str, part_bytes: usize) -> Self {
        Self {
            bucket: bucket.clone(),
            volume: volume.to_owned(),
            known: HashMap::new(),
            items: VecDeque::new(),
            bytes: 0,
            part_bytes,
            parts: Vec::new(),
            sending: JoinSet::new(),
            sent: Sent::default(),
        }
    }

    /// Whether what was taken is too little for a part of its own.
    pub fn is_small(&self) -> bool {
        (1..self.part_bytes / SMALL_SHARE).contains(&self.bytes)
    }

    /// Takes the item before the last one that it took.
    pub async fn push(&mut self, item: &Item) -> Result<(), CatalogError> {
        let bytes = format::encode_item(item);
        self.bytes += bytes.len();
        self.items.push_back(Written {
            bytes,
            path: item.path.clone(),
            live: item.is_live(),
            dead_millis: item
                .said
                .as_ref()
                .filter(|said| said.entry.is_none())
                .map_or(0, |said| said.stamp.made_millis()),
        });
        // Two parts' worth, so that what is left at the end is never a crumb.
        if self.bytes >= 2 * self.part_bytes || self.items.len() >= MAX_ITEMS {
            self.cut(self.part_bytes).await?;
        }
        Ok(())
    }

    /// Notes a part of the catalog before that has these items: if a part comes out the same, it is that one.
    pub fn note(&mut self, part: &PartRef, items: &[Item]) {
        let encoded: Vec<Vec<u8>> = items.iter().map(format::encode_item).collect();
        let content = content(encoded.iter().map(Vec::as_slice));
        self.known.insert(content, part.clone());
    }

    /// Takes a part as it is, before what it took.
    pub async fn keep(&mut self, part: &PartRef) -> Result<(), CatalogError> {
        self.close().await?;
        self.parts.push(part.clone());
        Ok(())
    }

    /// Ends a run of items.
    async fn close(&mut self) -> Result<(), CatalogError> {
        if self.bytes > self.part_bytes + self.part_bytes / 2 {
            self.cut(self.bytes / 2).await?;
        }
        self.cut(usize::MAX).await
    }

    /// Makes a part of what lies last.
    async fn cut(&mut self, limit: usize) -> Result<(), CatalogError> {
        let mut taken = Vec::new();
        let mut bytes = 0;
        while let Some(item) = self
            .items
            .front()
            .filter(|item| bytes == 0 || bytes + item.bytes.len() <= limit)
        {
            bytes += item.bytes.len();
            taken.extend(self.items.pop_front());
        }
        self.bytes -= bytes;
        let Some(first) = taken.last() else { return Ok(()) };
        let mut part = PartRef {
            digest: Digest::EMPTY,
            bytes: 0,
            items: taken.len() as u64,
            names: taken.iter().filter(|item| item.live).count() as u64,
            first: first.path.clone(),
            oldest_dead_millis: taken
                .iter()
                .map(|item| item.dead_millis)
                .filter(|millis| *millis > 0)
                .min()
                .unwrap_or(0),
        };
        let same = self.known.get(&content(encoded(&taken)));
        if let Some(same) = same {
            self.parts.push(same.clone());
            return Ok(());
        }
        let (object, digest) = blocking(move || {
            let salt = u64::from_be_bytes(random_bytes());
            let object = format::encode_salted_part(encoded(&taken), salt);
            let digest = Digest::of(&object);
            (object, digest)
        })
        .await;
        (part.digest, part.bytes) = (digest, object.len() as u64);
        self.parts.push(part);
        self.send(digest, object).await
    }

    async fn send(&mut self, digest: Digest, object: Vec<u8>) -> Result<(), CatalogError> {
        self.sent.parts += 1;
        self.sent.bytes += object.len() as u64;
        while self.sending.len() >= PARALLEL {
            self.one_sent().await?;
        }
        let (bucket, volume) = (self.bucket.clone(), self.volume.clone());
        self.sending
            .spawn(async move { put(&bucket, &volume, &digest, object).await });
        Ok(())
    }

    async fn one_sent(&mut self) -> Result<(), CatalogError> {
        match self.sending.join_next().await {
            None => Ok(()),
            Some(Ok(sent)) => sent,
            Some(Err(err)) => match err.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_shutdown) => std::future::pending().await,
            },
        }
    }

    /// Waits until all is in the bucket; the parts in their order.
    pub async fn finish(mut self) -> Result<(Vec<PartRef>, Sent), CatalogError> {
        self.close().await?;
        while !self.sending.is_empty() {
            self.one_sent().await?;
        }
        self.parts.reverse();
        Ok((self.parts, self.sent))
    }
}

/// What was taken, the first one first.
fn encoded(taken: &[Written]) -> impl Iterator<Item = &[u8]> {
    taken.iter().rev().map(|item| item.bytes.as_slice())
}

/// Stands for the items of a part, whatever its name.
fn content<'a>(items: impl Iterator<Item = &'a [u8]>) -> Digest {
    let mut hasher = Hasher::default();
    items.for_each(|item| hasher.update(item));
    hasher.finish()
}

/// Writes an object of a catalog. One that is there already has the same bytes, or whoever reads it will tell.
pub async fn put(
    bucket: &SharedBucket,
    volume: &str,
    digest: &Digest,
    object: Vec<u8>,
) -> Result<(), CatalogError> {
    bucket
        .put_new(&layout::catalog(volume, digest), Body::raw(object))
        .await?;
    Ok(())
}
