//! Small blobs and their neighbours: a whole pack by one request.
//!
//! Files that were made together mostly are read together. Who misses one small member of a pack gets it
//! by itself; who misses another one gets the pack, and its small members become resident, so that a build that
//! reads thousands of them asks the bucket some two times a pack.
//!
//! # Invariants
//!
//! - Every member is checked by its digest before anything is done with it; what the head of the pack says is
//!   an address only.
//! - Only what an entry named to this machine, with this place, is kept: of other members nobody here could
//!   say where the bucket has them.
//! - Neighbours take nobody's place: they are not kept when the cache has no room for them.

use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use bytes::Bytes;
use lru::LruCache;
use tokio::{task::spawn_blocking, time::timeout};
use tracing::{debug, warn};

use super::{
    fetch_chunk::{ChunkFetcher, Disk, unpacked_and_checked, verified},
    ledger::Ledger,
    pack::{self, MAX_OBJECT_BYTES, PackPlace},
};
use crate::{
    base::{chunk::Chunk, digest::Digest, flight::Flights},
    tier::layout,
};

/// Packs remembered, some 100 bytes each.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// The newest packs, kept in memory because their members may still be on their way to the disk: 16 MiB at
/// the most.
const HELD: NonZeroUsize = NonZeroUsize::new(4).unwrap();

/// A whole pack counts as two requests for chunks.
const WEIGHT: u32 = 2;

/// How long a pack that was fetched is not fetched again: a member that is missed meanwhile was not
/// kept for a reason.
const WHOLE_AGAIN: Duration = Duration::from_secs(60);

/// What was asked for of a pack lately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Met {
    Member(Digest),
    Whole(Instant),
}

#[derive(Debug)]
pub(super) struct Neighbours {
    met: Mutex<LruCache<Digest, Met>>,
    flights: Flights<Digest, Option<Bytes>>,
    held: Mutex<LruCache<Digest, Bytes>>,
}

impl Default for Neighbours {
    fn default() -> Self {
        Self {
            met: Mutex::new(LruCache::new(REMEMBERED)),
            flights: Flights::default(),
            held: Mutex::new(LruCache::new(HELD)),
        }
    }
}

impl Neighbours {
    /// Notes that a member of `pack` is missed; whether the whole pack is to be fetched.
    fn miss(&self, pack: Digest, member: Digest) -> bool {
        let mut met = self.met();
        match met.get(&pack) {
            Some(Met::Member(other)) if *other != member => true,
            Some(Met::Whole(at)) if at.elapsed() < WHOLE_AGAIN => false,
            _ => {
                met.put(pack, Met::Member(member));
                false
            }
        }
    }

    fn note_whole(&self, pack: Digest) {
        self.met().put(pack, Met::Whole(Instant::now()));
    }

    fn met(&self) -> MutexGuard<'_, LruCache<Digest, Met>> {
        self.met.lock().expect("no code panics while it holds the packs")
    }

    fn held(&self, pack: &Digest) -> Option<Bytes> {
        let mut held = self.held.lock().expect("no code panics while it holds the packs");
        held.get(pack).cloned()
    }

    fn hold(&self, pack: Digest, object: Bytes) {
        let mut held = self.held.lock().expect("no code panics while it holds the packs");
        held.put(pack, object);
    }
}

impl ChunkFetcher {
    /// The bytes of a small member of a pack, if they come with its neighbours; `None` when it is
    /// to be fetched by itself.
    pub(super) async fn with_neighbours(&self, place: PackPlace, name: Digest, len: u64) -> Option<Bytes> {
        if len > pack::small_bytes() || self.was_full_lately() {
            return None;
        }
        let object = match self.neighbours.held(&place.pack) {
            Some(object) => object,
            None if self.neighbours.miss(place.pack, name) => {
                let fetch = self.fetch_pack(place.pack);
                self.neighbours.flights.run(place.pack, fetch).await?
            }
            None => return None,
        };
        let range = place.range();
        let stored = (range.end <= object.len() as u64)
            .then(|| object.slice(range.start as usize..range.end as usize))?;
        verified(stored, Some(place), name, len).await
    }

    async fn fetch_pack(&self, name: Digest) -> Option<Bytes> {
        // Whoever asked may have looked before the last flight landed.
        if let Some(object) = self.neighbours.held(&name) {
            return Some(object);
        }
        let key = layout::pack(&name);
        let places = Arc::clone(&self.requests).acquire_many_owned(WEIGHT).await.ok()?;
        let get = self.bucket.get(&key, None, MAX_OBJECT_BYTES);
        let got = timeout(self.attempt_time(), get).await;
        // Whoever asks for a member by itself finds out what is wrong, and says so.
        if let Ok(Err(err)) = &got
            && err.is_transient()
        {
            debug!(%key, error = %err, "a pack was not fetched");
            return None;
        }
        self.neighbours.note_whole(name);
        let object = got.ok()?.ok()??;
        self.count_transfer(object.transferred_bytes);
        let Some(members) = pack::read_members(&object.bytes, &name) else {
            self.wrong_answer(&key, 1);
            return None;
        };
        self.neighbours.hold(name, object.bytes.clone());
        let (disk, ledger) = (self.disk.clone(), Arc::clone(&self.ledger));
        let bytes = object.bytes.clone();
        spawn_blocking(move || {
            let _places = places;
            disk.keep_members(&ledger, &bytes, &members);
        });
        Some(object.bytes)
    }
}

impl Disk {
    /// Writes the small members of a pack to their places, as far as there is room.
    fn keep_members(&self, ledger: &Ledger, object: &Bytes, members: &[(Chunk, PackPlace)]) {
        let small = members
            .iter()
            .filter(|(chunk, _)| u64::from(chunk.len) <= pack::small_bytes());
        for (chunk, place) in small {
            let told = ledger.chunk(&chunk.digest).ok().flatten();
            if told.is_none_or(|row| row.place != Some(*place)) {
                continue;
            }
            let len = u64::from(chunk.len);
            let range = place.range();
            let stored = object.slice(range.start as usize..range.end as usize);
            let Some(bytes) = unpacked_and_checked(stored, Some(*place), chunk.digest, len) else {
                warn!(pack = %place.pack, member = %chunk.digest, "a pack has wrong bytes for a member");
                continue;
            };
            if self.blobs.is_disk_full() || !self.reclaimer.has_room(len) {
                return;
            }
            let Ok(Some(blob)) = self.blobs.lease(&chunk.digest, len) else {
                continue;
            };
            if blob.has_chunk(0) || blob.file.doubts_chunk(0) {
                continue;
            }
            if self.blobs.store_chunks(&blob, 0..1, &bytes).is_err() {
                return;
            }
        }
    }
}
