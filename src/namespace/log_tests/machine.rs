//! A machine with a toy tree: a map of registers, in memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::world::{ChangeName, World};
use crate::{
    base::{
        BoxFuture,
        clock::{Hlc, Stamp},
        digest::Digest,
        id::MachineId,
    },
    namespace::{
        TreeError,
        change::{Entry, PathChange},
        cut::ORDER_HOLD,
        follow::{LogView, Reader, Sink},
        publish::{Clocks, PublishError, Source, Writer},
        tree::{Pending, Readiness},
    },
    store::{
        StoreError,
        rows::{Ino, NodeKind, Place},
    },
};

/// A change that a machine made.
#[derive(Clone, Debug)]
struct Made {
    place: u64,
    path: Vec<u8>,
    stamp: Stamp,
    at: u64,
    /// When this machine knew that it was published.
    acknowledged: Option<u64>,
}

#[derive(Debug)]
struct Register {
    change: PathChange,
    place: Option<Place>,
    open: bool,
    /// When the blob of the newest change is in the bucket.
    durable_at: u64,
}

#[derive(Debug, Default)]
struct Disk {
    registers: BTreeMap<Vec<u8>, Register>,
    notes: BTreeMap<String, Vec<u8>>,
    made: Vec<Made>,
    seen: BTreeSet<ChangeName>,
    places: u64,
}

/// What survives a restart of the daemon.
#[derive(Debug)]
pub struct Machine {
    pub id: MachineId,
    /// How wrong its idea of the bucket's time is, in milliseconds.
    skew: i64,
    world: Arc<World>,
    hlc: Hlc,
    /// Whether it has read what the others said.
    pub knows: AtomicBool,
    pub vouches_until: AtomicU64,
    disk: Mutex<Disk>,
    /// The others, to look up the order in which they made what is seen here.
    fleet: Mutex<Vec<Arc<Machine>>>,
}

impl Machine {
    pub fn new(id: u64, skew: i64, world: &Arc<World>) -> Arc<Self> {
        let id = MachineId(id);
        Arc::new(Self {
            id,
            skew,
            world: Arc::clone(world),
            hlc: Hlc::new(id, Stamp::ZERO),
            knows: AtomicBool::new(true),
            vouches_until: AtomicU64::new(u64::MAX),
            disk: Mutex::default(),
            fleet: Mutex::default(),
        })
    }

    /// The same disk with another idea of the time.
    pub fn with_skew(&self, skew: i64) -> Arc<Self> {
        Arc::new(Self {
            id: self.id,
            skew,
            world: Arc::clone(&self.world),
            hlc: Hlc::new(self.id, self.hlc.now(0)),
            knows: AtomicBool::new(true),
            vouches_until: AtomicU64::new(u64::MAX),
            disk: Mutex::new(std::mem::take(&mut self.disk())),
            fleet: Mutex::default(),
        })
    }

    pub fn meet(&self, fleet: &[Arc<Self>]) {
        *self.fleet.lock().unwrap() = fleet.to_vec();
    }

    pub fn part(&self) {
        self.fleet.lock().unwrap().clear();
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap()
    }

    fn now(&self) -> u64 {
        self.world.now().saturating_add_signed(self.skew)
    }

    fn clock(self: &Arc<Self>) -> Arc<dyn Fn() -> u64 + Send + Sync> {
        let machine = Arc::clone(self);
        Arc::new(move || machine.now())
    }

    pub fn writer(self: &Arc<Self>) -> Writer<Self> {
        let world = Arc::clone(&self.world);
        let clocks = Clocks {
            bucket: self.clock(),
            uptime: Arc::new(move || Duration::from_millis(world.now())),
        };
        let bucket = Arc::clone(&self.world);
        Writer::open("v".to_owned(), self.id, Arc::clone(self), bucket, clocks).unwrap()
    }

    pub fn reader(self: &Arc<Self>) -> Reader<Self> {
        self.reader_of(LogView {
            volume: "v".to_owned(),
            without: Some(self.id),
            until_millis: None,
        })
    }

    pub fn reader_of(self: &Arc<Self>, view: LogView) -> Reader<Self> {
        let bucket = Arc::clone(&self.world);
        Reader::open(view, Arc::clone(self), bucket, self.clock()).unwrap()
    }

    /// Opens a file for writing, which waits to be published if it was closed before.
    pub fn open_file(&self, path: &[u8]) {
        let mut disk = self.disk();
        disk.places += 1;
        let seq = disk.places;
        if let Some(register) = disk.registers.get_mut(path)
            && let Some(place) = &mut register.place
        {
            place.seq = seq;
            register.open = true;
        }
    }

    /// Makes a change, durable in `after` milliseconds; closes the file if it was open.
    pub fn change(&self, path: &[u8], value: Option<u32>, after: u64) {
        let stamp = self.hlc.now(self.now());
        let at = self.world.now();
        let mut disk = self.disk();
        disk.places += 1;
        let seq = disk.places;
        let first_seq = disk.registers.get(path).and_then(|register| register.place);
        let register = Register {
            change: PathChange {
                path: path.to_vec(),
                stamp,
                entry: value.map(directory),
            },
            place: Some(Place {
                seq,
                first_seq: first_seq.map_or(seq, |place| place.first_seq),
            }),
            open: false,
            durable_at: at + after,
        };
        disk.registers.insert(path.to_vec(), register);
        disk.made.push(Made {
            place: seq,
            path: path.to_vec(),
            stamp,
            at,
            acknowledged: None,
        });
    }

    /// Closes what is open, which makes its change.
    pub fn close_all(&self) {
        let open = |(path, register): (&Vec<u8>, &Register)| register.open.then(|| path.clone());
        let paths: Vec<_> = self.disk().registers.iter().filter_map(open).collect();
        for path in paths {
            self.change(&path, Some(0), 0);
        }
    }

    pub fn unpublished(&self) -> usize {
        self.disk()
            .registers
            .values()
            .filter(|register| register.place.is_some())
            .count()
    }

    pub fn registers(&self) -> Vec<PathChange> {
        self.disk()
            .registers
            .values()
            .map(|register| register.change.clone())
            .collect()
    }

    /// Whether a change of another machine reached this one.
    pub fn saw(&self, change: &ChangeName) -> bool {
        self.disk().seen.contains(change)
    }

    /// Whether this machine shows a change, or a newer one of the same name.
    fn shows(&self, path: &[u8], stamp: Stamp) -> bool {
        let disk = self.disk();
        disk.registers
            .get(path)
            .is_some_and(|register| register.change.stamp >= stamp)
    }

    /// Whether another machine's change replaced this machine's before it was published.
    fn is_replaced(&self, path: &[u8], stamp: Stamp) -> bool {
        let disk = self.disk();
        disk.registers
            .get(path)
            .is_some_and(|register| register.change.stamp.machine != self.id && register.change.stamp > stamp)
    }

    /// Whether the name is open, or has a change behind `place`.
    fn is_changed_again(&self, path: &[u8], place: u64) -> bool {
        let disk = self.disk();
        disk.registers.get(path).is_some_and(|register| register.open)
            || disk
                .made
                .iter()
                .any(|made| made.path == path && made.place > place)
    }

    /// The laws of the cut, as another machine sees them.
    fn check_order(&self, seen: &ChangeName) {
        let fleet = self.fleet.lock().unwrap().clone();
        let Some(author) = fleet.iter().find(|machine| machine.id == seen.1.machine) else {
            return; // A test that does not look at the order.
        };
        let made = author.disk().made.clone();
        let place = made
            .iter()
            .find(|made| made.stamp == seen.1)
            .expect("it was made")
            .place;
        for earlier in made.iter().filter(|made| made.place < place) {
            if self.shows(&earlier.path, earlier.stamp) || author.is_replaced(&earlier.path, earlier.stamp) {
                continue;
            }
            // It came by any of these; the first may have landed behind where this machine read.
            let times = self.world.published_at(seen);
            let held = times.iter().map(|published| {
                // In the time of the world, as the places and acknowledgements are.
                Self::held(
                    &made,
                    &earlier.path,
                    published.saturating_add_signed(-author.skew),
                )
            });
            let held = held.max().expect("it was published");
            let excused = held >= ORDER_HOLD.as_millis() as u64
                && author.is_changed_again(&earlier.path, earlier.place);
            assert!(
                excused,
                "{:?} shows {seen:?} before {earlier:?}, held {held} ms",
                self.id
            );
        }
    }

    /// For how many milliseconds a segment of the time `published` had waited for a change of a name.
    fn held(made: &[Made], path: &[u8], published: u64) -> u64 {
        let of_name = made.iter().filter(|made| made.path == path);
        let is_acknowledged = |made: &&Made| made.acknowledged.is_some_and(|at| at < published);
        let acknowledged = of_name
            .clone()
            .filter(is_acknowledged)
            .map(|made| made.place)
            .max();
        let oldest = of_name.clone().find(|made| Some(made.place) > acknowledged);
        published.saturating_sub(oldest.expect("it is one").at)
    }
}

fn directory(value: u32) -> Entry {
    Entry::new(NodeKind::Dir, value & 0o7777)
}

impl Source for Machine {
    fn pending(&self, limit: usize) -> BoxFuture<'_, Result<Vec<Pending>, TreeError>> {
        let now = self.world.now();
        let mut pending = Vec::new();
        for register in self.disk().registers.values() {
            let Some(place) = register.place else { continue };
            let readiness = if register.open && place.first_seq < place.seq {
                Readiness::Rewriting
            } else if register.open {
                Readiness::Writing
            } else if register.durable_at > now {
                Readiness::Waiting
            } else {
                let change = register.change.clone();
                self.world.make_durable((change.path.clone(), change.stamp));
                Readiness::Ready(Box::new(change))
            };
            pending.push(Pending {
                parent: Ino::ROOT,
                name: register.change.path.clone(),
                place,
                stamp: register.change.stamp,
                readiness,
            });
        }
        pending.sort_by_key(|pending| pending.place);
        pending.truncate(limit);
        Box::pin(std::future::ready(Ok(pending)))
    }

    fn vouch<'a>(&'a self, _chosen: &'a [Pending]) -> BoxFuture<'a, Result<Option<u64>, PublishError>> {
        // Directories have no blobs.
        let until = self.vouches_until.load(Ordering::Relaxed);
        Box::pin(std::future::ready(Ok(Some(until))))
    }

    fn renew<'a>(&'a self, old: &'a [Pending]) -> BoxFuture<'a, Result<bool, TreeError>> {
        let knows = self.knows.load(Ordering::Relaxed);
        let mut disk = self.disk();
        for old in old.iter().filter(|_| knows) {
            let stamp = self.hlc.now(self.now());
            disk.places += 1;
            let seq = disk.places;
            let register = disk.registers.get_mut(&old.name).expect("names stay");
            register.change.stamp = stamp;
            let place = register.place.as_mut().expect("it is pending");
            place.seq = seq;
        }
        Box::pin(std::future::ready(Ok(knows)))
    }

    fn published(&self, done: Vec<(Ino, Vec<u8>, Stamp)>) -> BoxFuture<'_, Result<(), TreeError>> {
        let now = self.world.now();
        let mut disk = self.disk();
        for (_, name, stamp) in done {
            for made in disk.made.iter_mut().filter(|made| made.stamp == stamp) {
                made.acknowledged = Some(now);
            }
            let register = disk.registers.get_mut(&name).expect("names stay");
            if register.change.stamp == stamp && !register.open {
                register.place = None;
            }
        }
        Box::pin(std::future::ready(Ok(())))
    }

    fn next_place(&self) -> u64 {
        let mut disk = self.disk();
        disk.places += 1;
        disk.places
    }

    fn note(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.disk().notes.get(key).cloned())
    }

    fn keep_note(&self, key: &str, value: Vec<u8>) -> Result<(), StoreError> {
        self.disk().notes.insert(key.to_owned(), value);
        Ok(())
    }
}

impl Sink for Machine {
    fn apply(&self, changes: Vec<PathChange>) -> BoxFuture<'_, Result<(), TreeError>> {
        let mut names = Vec::new();
        for change in changes {
            assert_ne!(change.stamp.machine, self.id, "own changes do not come back");
            self.hlc.observe(change.stamp, self.now());
            let mut disk = self.disk();
            let name = (change.path.clone(), change.stamp);
            disk.seen.insert(name.clone());
            names.push(name);
            let newer = disk
                .registers
                .get(&change.path)
                .is_none_or(|register| register.change.stamp < change.stamp);
            if newer {
                let register = Register {
                    place: None,
                    open: false,
                    durable_at: 0,
                    change,
                };
                disk.registers.insert(register.change.path.clone(), register);
            }
        }
        for name in names {
            self.check_order(&name);
        }
        Box::pin(std::future::ready(Ok(())))
    }

    fn fetch_list(
        &self,
        _list: (Digest, u64),
        _blob: (Digest, u64),
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        unreachable!("directories have no chunks")
    }

    fn note(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Source::note(self, key)
    }

    fn keep_note(&self, key: &str, value: Vec<u8>) -> Result<(), StoreError> {
        Source::keep_note(self, key, value)
    }
}
