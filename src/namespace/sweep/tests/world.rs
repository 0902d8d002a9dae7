//! A bucket in memory with a clock that is turned by hand, which knows what must not be deleted.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use tokio::sync::Semaphore;

use crate::{
    base::{
        BoxFuture,
        clock::{ServerClock, Stamp},
        digest::Digest,
        volume::StackLayer,
    },
    namespace::{
        change::{EntryBlob, PathChange},
        follow::SegmentKey,
        segment,
        stack::VolumeJson,
    },
    tier::{Body, Bucket, Etag, Object, ObjectMeta, Page, Put, TierError, layout},
    upload::condemned::BucketTime,
};

pub const VOLUME: &str = "v";

/// Pages are short, so that much happens between two of them.
const PAGE: usize = 3;

#[derive(Debug)]
pub struct World {
    now: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, (Bytes, u64)>,
    /// Changes whose segment was acknowledged while its blobs were sure to be kept, with the object of the blob.
    acknowledged: HashSet<(Stamp, String)>,
    /// The moments at which forks see the volume.
    moments: Vec<u64>,
    wrong: Option<String>,
}

/// The object that a blob of one chunk is in.
pub fn object_of(blob: &EntryBlob) -> String {
    match blob.places.first().copied().flatten() {
        Some(place) => layout::pack(&place.pack),
        None => layout::blob(&blob.digest),
    }
}

impl State {
    /// Every change of the log with the time at which it was published, in the order of their segments.
    fn log(&self) -> Vec<(u64, PathChange)> {
        let segments = self.objects.iter().filter_map(|(key, (bytes, _))| {
            let key = SegmentKey::parse(VOLUME, key)?;
            Some((
                key.millis,
                segment::decode(bytes).expect("writers write segments"),
            ))
        });
        let changes = segments
            .flat_map(|(millis, decoded)| decoded.changes.into_iter().map(move |change| (millis, change)));
        changes.collect()
    }

    /// What counts of the changes up to `until`, with all that was published of each.
    fn winners(&self, until: u64) -> HashMap<Vec<u8>, Vec<PathChange>> {
        let mut winners: HashMap<Vec<u8>, Vec<PathChange>> = HashMap::new();
        for (millis, change) in self.log() {
            if millis > until {
                continue;
            }
            let of_path = winners.entry(change.path.clone()).or_default();
            match of_path.first().map(|winner| winner.stamp) {
                Some(stamp) if stamp > change.stamp => {}
                Some(stamp) if stamp == change.stamp => of_path.push(change),
                _ => *of_path = vec![change],
            }
        }
        winners
    }

    fn check_deletion(&mut self, key: &str) {
        let views = self.moments.iter().copied().chain([u64::MAX]);
        for until in views.collect::<Vec<_>>() {
            for change in self.winners(until).into_values().flatten() {
                let Some(blob) = change.entry.as_ref().and_then(|entry| entry.blob.as_ref()) else {
                    continue;
                };
                let object = object_of(blob);
                if object == key && self.acknowledged.contains(&(change.stamp, object)) {
                    self.wrong = Some(format!(
                        "{key} is deleted, which {change:?} refers to, seen at {until}"
                    ));
                }
            }
        }
    }
}

impl World {
    pub fn new(start: u64) -> Arc<Self> {
        Arc::new(Self {
            now: AtomicU64::new(start),
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    pub fn clock(self: &Arc<Self>) -> BucketTime {
        let world = Arc::clone(self);
        Arc::new(move || world.now())
    }

    pub fn advance(&self, millis: u64) {
        self.now.fetch_add(millis, Ordering::Relaxed);
    }

    /// What went wrong in the bucket.
    pub fn wrong(&self) -> Option<String> {
        self.state().wrong.clone()
    }

    pub fn acknowledge(&self, change: &PathChange) {
        if let Some(blob) = change.entry.as_ref().and_then(|entry| entry.blob.as_ref()) {
            self.state().acknowledged.insert((change.stamp, object_of(blob)));
        }
    }

    /// Makes a fork that sees the volume as it is now.
    pub fn fork(&self) {
        let now = self.now();
        let mut state = self.state();
        if state.log().is_empty() {
            return;
        }
        let json = VolumeJson {
            version: 1,
            parent: Some(StackLayer {
                volume: VOLUME.parse().unwrap(),
                until_millis: Some(now),
                own_prefix: false,
            }),
            own_prefix: false,
            created_millis: now,
            deleted_millis: None,
            presets: BTreeMap::new(),
        };
        let name = format!("fork-{}", state.moments.len());
        state.moments.push(now);
        state
            .objects
            .insert(layout::volume(&name), (json.encode().into(), now));
    }

    pub fn segments(&self) -> usize {
        self.state().log().len()
    }

    /// How many chunks and packs there are.
    pub fn stored(&self) -> usize {
        let state = self.state();
        let keys = state.objects.keys();
        keys.filter(|key| layout::object_digest(key).is_some()).count()
    }

    /// Every name that was acknowledged has its bytes, where an entry says or under their own digest.
    pub fn assert_all_readable(&self) {
        let state = self.state();
        for until in state.moments.iter().copied().chain([u64::MAX]) {
            for (path, told) in state.winners(until) {
                let blobs = told
                    .iter()
                    .filter_map(|change| change.entry.as_ref()?.blob.as_ref());
                let objects: Vec<_> = blobs.map(object_of).collect();
                let is_acknowledged = told
                    .iter()
                    .zip(&objects)
                    .any(|(change, object)| state.acknowledged.contains(&(change.stamp, object.clone())));
                let readable = objects.iter().any(|object| state.objects.contains_key(object));
                assert!(
                    readable || !is_acknowledged,
                    "{path:?} has none of {objects:?} as of {until}"
                );
            }
        }
    }

    /// Every object is one that a view refers to.
    pub fn assert_nothing_unused(&self) {
        let state = self.state();
        let views = state.moments.iter().copied().chain([u64::MAX]);
        let blobs: Vec<EntryBlob> = views
            .flat_map(|until| state.winners(until).into_values().flatten())
            .filter_map(|change| change.entry?.blob)
            .collect();
        let contents: HashSet<Digest> = blobs.iter().map(|blob| blob.digest).collect();
        for (key, (bytes, _)) in &state.objects {
            let Some(digest) = layout::object_digest(key) else {
                continue;
            };
            let members = crate::store::pack::read_names(bytes, &digest).unwrap_or(vec![digest]);
            assert!(
                members.iter().any(|member| contents.contains(member)),
                "{key} is left, and nothing refers to it"
            );
        }
    }
}

/// A way to the bucket: open, or one that lets through as many requests as its gate says.
#[derive(Debug)]
pub struct Door {
    world: Arc<World>,
    gate: Option<Arc<Semaphore>>,
    clock: ServerClock,
}

impl Door {
    pub fn open(world: &Arc<World>) -> Self {
        Self {
            world: Arc::clone(world),
            gate: None,
            clock: ServerClock::default(),
        }
    }

    pub fn gated(world: &Arc<World>, gate: Arc<Semaphore>) -> Self {
        Self {
            gate: Some(gate),
            ..Self::open(world)
        }
    }

    async fn pass(&self) {
        if let Some(gate) = &self.gate {
            gate.acquire().await.expect("nobody closes it").forget();
        }
    }
}

impl Bucket for Door {
    fn url(&self) -> String {
        "memory:".to_owned()
    }

    fn clock(&self) -> &ServerClock {
        &self.clock
    }

    fn compresses(&self) -> bool {
        false
    }

    fn get<'a>(
        &'a self,
        key: &'a str,
        range: Option<Range<u64>>,
        _max_bytes: u64,
    ) -> BoxFuture<'a, Result<Option<Object>, TierError>> {
        Box::pin(async move {
            self.pass().await;
            let found = self.world.state().objects.get(key).cloned();
            Ok(found.map(|(bytes, _)| {
                let bytes = match range {
                    Some(range) => {
                        let end = range.end.min(bytes.len() as u64);
                        bytes.slice(range.start as usize..end as usize)
                    }
                    None => bytes,
                };
                Object {
                    modified_millis: 0,
                    transferred_bytes: bytes.len() as u64,
                    bytes,
                    etag: Etag(String::new()),
                }
            }))
        })
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<ObjectMeta>, TierError>> {
        Box::pin(async move {
            self.pass().await;
            let found = self.world.state().objects.get(key).cloned();
            Ok(found.map(|(bytes, modified_millis)| ObjectMeta {
                key: key.to_owned(),
                size: bytes.len() as u64,
                modified_millis,
            }))
        })
    }

    fn put_new<'a>(&'a self, key: &'a str, body: Body) -> BoxFuture<'a, Result<Put, TierError>> {
        Box::pin(async move {
            self.pass().await;
            let now = self.world.now();
            let mut state = self.world.state();
            if state.objects.contains_key(key) {
                return Ok(Put::Refused);
            }
            state.objects.insert(key.to_owned(), (body.bytes, now));
            Ok(Put::Written(Etag(String::new())))
        })
    }

    fn put_if<'a>(
        &'a self,
        _key: &'a str,
        _body: Body,
        _etag: &'a Etag,
    ) -> BoxFuture<'a, Result<Put, TierError>> {
        unreachable!("the window is never changed here")
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>) -> BoxFuture<'a, Result<Page, TierError>> {
        Box::pin(async move {
            self.pass().await;
            let state = self.world.state();
            let mut found = state
                .objects
                .iter()
                .filter(|(key, _)| key.starts_with(prefix) && Some(key.as_str()) > after);
            let objects: Vec<_> = found
                .by_ref()
                .take(PAGE)
                .map(|(key, (bytes, modified_millis))| ObjectMeta {
                    key: key.clone(),
                    size: bytes.len() as u64,
                    modified_millis: *modified_millis,
                })
                .collect();
            let more = found.next().is_some();
            Ok(Page { objects, more })
        })
    }

    fn refresh<'a>(&'a self, _key: &'a str) -> BoxFuture<'a, Result<bool, TierError>> {
        unreachable!("nothing has a lifetime here")
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), TierError>> {
        Box::pin(async move {
            self.pass().await;
            let mut state = self.world.state();
            if layout::object_digest(key).is_some() {
                state.check_deletion(key);
            }
            state.objects.remove(key);
            Ok(())
        })
    }
}
