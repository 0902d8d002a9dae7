//! A bucket in memory with a clock that is turned by hand, which knows what must not be deleted.

mod door;

pub use door::Door;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;

use crate::{
    base::{clock::Stamp, digest::Digest, id::MachineId, snapshot::SnapshotTag, volume::StackLayer},
    namespace::{
        catalog::{head::Head, read},
        change::{EntryBlob, PathChange},
        follow::SegmentKey,
        publish::LATE_MILLIS,
        segment,
        snapshot::{self, SnapshotError, SnapshotOptions},
        stack::{self, ForkPoint},
        view,
    },
    tier::{Etag, Put, SharedBucket, layout},
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

#[derive(Debug)]
struct Stored {
    bytes: Bytes,
    modified: u64,
    version: u64,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Stored>,
    versions: u64,
    /// Every change that was ever in the log, with the time in the key of its segment.
    told: Vec<(u64, PathChange)>,
    /// Changes whose segment was acknowledged while its blobs were sure to be kept, with the object of the blob.
    acknowledged: HashSet<(Stamp, String)>,
    /// The same of names, with the time in the key of the segment.
    published: Vec<(u64, PathChange)>,
    /// The moments at which forks see the volume.
    moments: Vec<u64>,
    /// What snapshots show: what counted when they were made, by their tags.
    snapshots: BTreeMap<SnapshotTag, Winners>,
    /// When each object was last named or used, as far as the rule of the bucket has to know.
    promised: HashMap<String, u64>,
    /// What must not be read: keys, or what they begin with and a `*`.
    denied: Vec<String>,
    /// Keys that were read, each as often as it was.
    read: Vec<String>,
    /// Segments and parts of catalogs that were deleted.
    trimmed: u64,
    wrong: Option<String>,
}

/// What counts at each path, with all that was published of it.
type Winners = HashMap<Vec<u8>, Vec<PathChange>>;

/// The object that a blob of one chunk is in.
pub fn object_of(blob: &EntryBlob) -> String {
    match blob.places.first().copied().flatten() {
        Some(place) => layout::pack(&place.pack),
        None => layout::blob(&blob.digest),
    }
}

impl State {
    /// What counts of the changes up to `until`, with all that was published of each.
    fn winners(&self, until: u64) -> Winners {
        let mut winners = Winners::new();
        for (millis, change) in self.told.iter().cloned() {
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

    /// All that somebody can see: now, at the moments of forks, in snapshots.
    fn views(&self) -> Vec<(String, Winners)> {
        let moments = self.moments.iter().copied().chain([u64::MAX]);
        let moments = moments.map(|until| (format!("as of {until}"), self.winners(until)));
        let snapshots = self.snapshots.iter();
        let snapshots = snapshots.map(|(tag, winners)| (format!("snapshot {tag}"), winners.clone()));
        moments.chain(snapshots).collect()
    }

    /// The moments at which the log is seen.
    fn moments(&self) -> Vec<u64> {
        self.moments.iter().copied().chain([u64::MAX]).collect()
    }

    fn check_deletion(&mut self, key: &str) {
        for (view, winners) in self.views() {
            for change in winners.into_values().flatten() {
                let Some(blob) = change.entry.as_ref().and_then(|entry| entry.blob.as_ref()) else {
                    continue;
                };
                let object = object_of(blob);
                if object == key && self.acknowledged.contains(&(change.stamp, object)) {
                    self.wrong = Some(format!(
                        "{key} is deleted, which {change:?} refers to, seen {view}"
                    ));
                }
            }
        }
    }

    fn put(&mut self, key: &str, bytes: Bytes, now: u64) -> Put {
        if let Some(key) = SegmentKey::parse(VOLUME, key) {
            // What somebody damaged says nothing.
            let changes = segment::decode(&bytes).map(|decoded| decoded.changes);
            let told = changes.unwrap_or_default().into_iter();
            let told = told.map(|change| (key.millis, change));
            self.told.extend(told);
        }
        self.versions += 1;
        let stored = Stored {
            bytes,
            modified: now,
            version: self.versions,
        };
        self.objects.insert(key.to_owned(), stored);
        Put::Written(Etag(self.versions.to_string()))
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

    /// Denies to everybody to read `key`, or all that begins with what is before a `*`.
    pub fn deny(&self, key: &str) {
        self.state().denied.push(key.to_owned());
    }

    /// How often the objects whose keys `is_meant` were read.
    pub fn reads(&self, is_meant: impl Fn(&str) -> bool) -> usize {
        self.state().read.iter().filter(|key| is_meant(key)).count()
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

    /// Notes that a writer takes a change of a segment with `millis` in its key for published.
    pub fn acknowledge(&self, millis: u64, change: &PathChange) {
        let mut state = self.state();
        if let Some(blob) = change.entry.as_ref().and_then(|entry| entry.blob.as_ref()) {
            state.acknowledged.insert((change.stamp, object_of(blob)));
            state.promised.insert(object_of(blob), self.now());
        }
        state.published.push((millis, change.clone()));
    }

    /// Notes that a machine that uses an object was told at `millis` that it is there.
    pub fn promise(&self, key: &str, millis: u64) {
        let mut state = self.state();
        let promised = state.promised.entry(key.to_owned()).or_default();
        *promised = millis.max(*promised);
    }

    /// The objects that acknowledged names refer to.
    pub fn objects_in_use(&self) -> Vec<String> {
        let state = self.state();
        let winners = state.winners(u64::MAX).into_values().flatten();
        let named =
            winners.filter_map(|change| Some((change.stamp, object_of(change.entry?.blob.as_ref()?))));
        let mut keys: Vec<_> = named
            .filter(|named| state.acknowledged.contains(named))
            .map(|(_, key)| key)
            .collect();
        keys.sort();
        keys.dedup();
        keys
    }

    /// Deletes chunks and packs that are as old as `lifetime`, as a rule of the bucket does the moment they are; what was
    /// named or used in the last quarter of that must not be among them.
    pub fn age_out(&self, lifetime: u64) {
        // Doors have a clock that goes on for some milliseconds.
        const SLACK: u64 = 5000;
        let now = self.now();
        let mut state = self.state();
        let is_old =
            |key: &str, modified: u64| layout::object_digest(key).is_some() && modified + lifetime <= now;
        let old: Vec<_> = state
            .objects
            .iter()
            .filter(|(key, stored)| is_old(key, stored.modified))
            .map(|(key, stored)| (key.clone(), stored.modified + lifetime))
            .collect();
        for (key, due) in old {
            state.objects.remove(&key);
            if let Some(promised) = state.promised.get(&key)
                && *promised <= due
                && promised + lifetime / 4 > due + SLACK
            {
                let promised = *promised;
                state.wrong = Some(format!(
                    "{key} aged out at {due}, and was named or used at {promised}"
                ));
            }
        }
    }

    /// Makes a fork that sees the volume as it is now.
    pub async fn fork(self: &Arc<Self>) {
        let name = format!("fork-{}", self.state().moments.len());
        let (name, from) = (name.parse().unwrap(), VOLUME.parse().unwrap());
        let door = Door::open(self);
        match stack::create_fork(&door, &name, &from, ForkPoint::Now, false).await {
            Ok(made) => {
                let until = made.parent.unwrap().until_millis.unwrap();
                self.state().moments.push(until);
            }
            Err(stack::StackError::NothingToFork { .. }) => {}
            Err(err) => panic!("{err}"),
        }
    }

    /// Makes a snapshot of the volume as it is now.
    pub async fn snapshot(self: &Arc<Self>) {
        let tag: SnapshotTag = format!("at-{}-{}", self.now(), self.state().objects.len())
            .parse()
            .unwrap();
        let winners = self.state().winners(u64::MAX);
        match make_snapshot(Door::in_time(self).into(), &tag).await {
            Ok(()) => {
                self.state().snapshots.insert(tag, winners);
            }
            // Nothing was published yet.
            Err(SnapshotError::NoVolume { .. }) => {}
            Err(err) => panic!("{err}"),
        }
    }

    /// Deletes the oldest snapshot.
    pub async fn delete_snapshot(self: &Arc<Self>) {
        let Some((tag, _)) = self.state().snapshots.pop_first() else {
            return;
        };
        let door = Door::open(self);
        let deleted = snapshot::delete(&door, &VOLUME.parse().unwrap(), &tag).await;
        deleted.unwrap();
    }

    pub fn segments(&self) -> usize {
        let state = self.state();
        let keys = state.objects.keys();
        keys.filter(|key| SegmentKey::parse(VOLUME, key).is_some())
            .count()
    }

    /// Objects of catalogs.
    pub fn catalogs(&self) -> usize {
        let state = self.state();
        let prefix = layout::catalogs_prefix(VOLUME);
        state
            .objects
            .keys()
            .filter(|key| key.starts_with(&prefix))
            .count()
    }

    /// How many segments and objects of catalogs were deleted.
    pub fn trimmed(&self) -> u64 {
        self.state().trimmed
    }

    /// How many chunks and packs there are.
    pub fn stored(&self) -> usize {
        let state = self.state();
        let keys = state.objects.keys();
        keys.filter(|key| layout::object_digest(key).is_some()).count()
    }

    /// What is there by now, of names and their blobs; `None`: nothing.
    pub fn truth(&self) -> BTreeMap<Vec<u8>, Option<Digest>> {
        let winners = self.state().winners(u64::MAX);
        let digest = |told: &Vec<PathChange>| Some(told[0].entry.as_ref()?.blob.as_ref()?.digest);
        winners
            .iter()
            .map(|(path, told)| (path.clone(), digest(told)))
            .collect()
    }

    /// Every name that was acknowledged has its bytes, where an entry says or under their own digest.
    pub fn assert_all_readable(&self) {
        let state = self.state();
        for (view, winners) in state.views() {
            for (path, told) in winners {
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
                    "{path:?} has none of {objects:?}, seen {view}"
                );
            }
        }
    }

    /// Whoever reads the volume now, or as a fork of it sees it, finds every change that was acknowledged, or a
    /// later one; and every part of the newest catalog is there.
    pub async fn assert_all_visible(self: &Arc<Self>) {
        let door: SharedBucket = Arc::new(Door::open(self));
        let (published, views) = {
            let state = self.state();
            (state.published.clone(), state.moments())
        };
        for (number, until) in views.into_iter().enumerate() {
            let layer = if until == u64::MAX {
                StackLayer::live(VOLUME.parse().unwrap())
            } else {
                let fork = format!("fork-{number}").parse().unwrap();
                let stack = stack::read(door.as_ref(), &fork).await.unwrap();
                stack.layers()[1].clone()
            };
            let registers = view::registers(&door, &layer, &|_, _| {}).await.unwrap();
            for (millis, change) in published.iter().filter(|(millis, _)| *millis <= until) {
                let found = registers.get(&change.path).map(|register| register.stamp);
                assert!(
                    found.is_some_and(|stamp| stamp >= change.stamp),
                    "{change:?} of a segment of {millis} is not seen at {until}: {found:?}"
                );
            }
        }
        self.assert_snapshots_whole(&door).await;
        let opened = read::newest(door.as_ref(), VOLUME, None).await.unwrap();
        if let Some(opened) = opened {
            for object in read::objects_of(opened.digest, &opened.root) {
                let key = layout::catalog(VOLUME, &object);
                assert!(self.state().objects.contains_key(&key), "{key} is gone");
            }
        }
    }

    /// Every snapshot has what counted when it was made.
    async fn assert_snapshots_whole(&self, door: &SharedBucket) {
        let snapshots = self.state().snapshots.clone();
        for (tag, winners) in snapshots {
            let volume = VOLUME.parse().unwrap();
            let named = snapshot::references::of(door.as_ref(), &volume, &tag).await;
            let mut stamps = HashMap::new();
            for catalog in named.unwrap().expect("it was made") {
                let mut items = read::Items::of(door.as_ref(), VOLUME, &catalog.root);
                while let Some(items) = items.next().await.unwrap() {
                    let said = items
                        .iter()
                        .filter_map(|item| Some((item.path.clone(), item.said.as_ref()?.stamp)));
                    stamps.extend(said);
                }
            }
            for (path, told) in winners {
                let newest = told.iter().max_by_key(|change| change.stamp).unwrap();
                if newest.entry.is_some() {
                    assert_eq!(
                        stamps.get(&path),
                        Some(&newest.stamp),
                        "{path:?} of snapshot {tag}"
                    );
                }
            }
        }
    }

    /// Every object is one that a view refers to, or a catalog that a fork begins with.
    pub async fn assert_nothing_unused(self: &Arc<Self>) {
        let door: SharedBucket = Arc::new(Door::open(self));
        let moments = self.state().moments.len();
        let mut contents = HashSet::new();
        for number in 0..moments {
            let fork = format!("fork-{number}").parse().unwrap();
            let stack = stack::read(door.as_ref(), &fork).await.unwrap();
            let Some(opened) = read::of_layer(door.as_ref(), &stack.layers()[1]).await.unwrap() else {
                continue;
            };
            let mut parts = read::Items::of(door.as_ref(), VOLUME, &opened.root);
            while let Some(items) = parts.next().await.unwrap() {
                let blobs = items.iter().filter_map(|item| item.entry()?.blob.as_ref());
                contents.extend(blobs.map(|blob| blob.digest));
            }
        }
        let state = self.state();
        // What forks see from the catalog on that they begin with.
        let last = state.moments.iter().copied().max().unwrap_or(0);
        let seen = state.told.iter().filter(|(millis, _)| *millis <= last);
        let seen = seen.map(|(_, change)| change.clone());
        let counts = state
            .views()
            .into_iter()
            .flat_map(|(_, winners)| winners.into_values().flatten());
        let blobs = seen.chain(counts).filter_map(|change| change.entry?.blob);
        contents.extend(blobs.map(|blob| blob.digest));
        for (key, stored) in &state.objects {
            let Some(digest) = layout::object_digest(key) else {
                continue;
            };
            let members = crate::store::pack::read_names(&stored.bytes, &digest).unwrap_or(vec![digest]);
            assert!(
                members.iter().any(|member| contents.contains(member)),
                "{key} is left, and nothing refers to it"
            );
        }
    }

    /// The newest catalog's watermark.
    pub fn watermark(&self) -> Option<u64> {
        let state = self.state();
        let head = state.objects.get(&layout::head(VOLUME))?;
        Some(Head::decode(VOLUME, &head.bytes).unwrap().watermark_millis)
    }
}

/// Whether a segment that is acknowledged now, with this time in its key, counts as published.
pub fn is_in_time(world: &World, millis: u64) -> bool {
    world.now().abs_diff(millis) <= LATE_MILLIS
}

/// Makes a snapshot through a door.
pub async fn make_snapshot(door: Arc<Door>, tag: &SnapshotTag) -> Result<(), SnapshotError> {
    let options = SnapshotOptions {
        machine: MachineId(99),
        created_by: String::new(),
        spill_dir: std::env::temp_dir(),
    };
    let bucket: SharedBucket = door;
    let volume = VOLUME.parse().unwrap();
    let made = snapshot::create(&bucket, &volume, tag, &options, &|_| {});
    made.await.map(|_| ())
}
