//! A machine that shows the volume: the real reader of the log and the real choice of a catalog, with a map in the place
//! of the tree. It loads the catalog late, as a mount does.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use super::world::{Door, VOLUME, World};
use crate::{
    base::{BoxFuture, clock::Stamp, digest::Digest, volume::StackLayer},
    namespace::{
        TreeError,
        catalog::{
            CatalogError,
            attach::{Way, way_from},
            read::{self, Opened},
        },
        change::{Entry, Item, PathChange},
        follow::{Cursor, FollowError, LogView, Reader, Sink, note_key},
    },
    store::StoreError,
    tier::SharedBucket,
};

#[derive(Debug, Default)]
struct Disk {
    registers: BTreeMap<Vec<u8>, (Stamp, Option<Entry>)>,
    notes: BTreeMap<String, Vec<u8>>,
}

/// What survives the daemon.
#[derive(Debug, Default)]
struct Home(Mutex<Disk>);

impl Home {
    fn merge(&self, change: PathChange) {
        let mut disk = self.0.lock().unwrap();
        let known = disk.registers.get(&change.path).map(|(stamp, _)| *stamp);
        if known.is_none_or(|known| known < change.stamp) {
            disk.registers.insert(change.path, (change.stamp, change.entry));
        }
    }
}

impl Sink for Home {
    fn apply(&self, changes: Vec<PathChange>) -> BoxFuture<'_, Result<(), TreeError>> {
        for change in changes {
            self.merge(change);
        }
        Box::pin(std::future::ready(Ok(())))
    }

    fn fetch_list(
        &self,
        _list: (Digest, u64),
        _blob: (Digest, u64),
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        unreachable!("blobs are small here")
    }

    fn note(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.0.lock().unwrap().notes.get(key).cloned())
    }

    fn keep_note(&self, key: &str, value: Vec<u8>) -> Result<(), StoreError> {
        self.0.lock().unwrap().notes.insert(key.to_owned(), value);
        Ok(())
    }
}

pub struct Follower {
    world: Arc<World>,
    door: SharedBucket,
    home: Arc<Home>,
    /// `None`: it does not run.
    reader: Option<Reader<Home>>,
    /// Not loaded yet.
    attached: Option<Opened>,
}

fn layer() -> StackLayer {
    StackLayer::live(VOLUME.parse().unwrap())
}

impl Follower {
    pub fn new(world: &Arc<World>) -> Self {
        Self {
            world: Arc::clone(world),
            door: Arc::new(Door::open(world)),
            home: Arc::default(),
            reader: None,
            attached: None,
        }
    }

    /// The daemon begins, with what its disk has.
    pub async fn start(&mut self) {
        let opened = read::of_layer(self.door.as_ref(), &layer()).await.unwrap();
        if let Some(opened) = opened {
            let mut disk = self.home.0.lock().unwrap();
            let note = disk.notes.get(&note_key(VOLUME)).cloned();
            let way = way_from(note.as_deref(), None, &opened);
            if way == Way::StartOver {
                disk.registers.clear();
            }
            if way != Way::Stay {
                let cursor = Cursor::beginning_at(opened.root.watermark_millis);
                disk.notes.insert(note_key(VOLUME), cursor.to_bytes());
                drop(disk);
                self.attached = Some(opened);
            }
        }
        let view = LogView {
            volume: VOLUME.to_owned(),
            without: None,
            until_millis: None,
        };
        let (home, door) = (Arc::clone(&self.home), Arc::clone(&self.door));
        self.reader = Some(Reader::open(view, home, door, self.world.clock()).unwrap());
    }

    /// The daemon dies. What is attached is noted on the disk.
    pub fn die(&mut self) {
        self.reader = None;
    }

    /// Reads the log; a machine that was away for too long begins anew.
    pub async fn poll(&mut self) {
        if self.reader.is_none() {
            self.start().await;
        }
        let reader = self.reader.as_mut().expect("it was started above");
        match reader.poll(true).await {
            Ok(()) => reader.keep().unwrap(),
            Err(FollowError::AwayTooLong { .. }) => self.reader = None,
            Err(err) => panic!("{err}"),
        }
    }

    /// Looks at everything.
    pub async fn load(&mut self) {
        while let Some(opened) = self.attached.take() {
            let mut parts = read::Items::of(self.door.as_ref(), VOLUME, &opened.root);
            loop {
                match parts.next().await {
                    Ok(None) => return,
                    Ok(Some(items)) => {
                        let changes = items.into_iter().filter_map(Item::into_change);
                        changes.for_each(|change| self.home.merge(change));
                    }
                    Err(CatalogError::Missing { .. }) => break,
                    Err(err) => panic!("{err}"),
                }
            }
            // As the loader does.
            let newer = read::of_layer(self.door.as_ref(), &layer())
                .await
                .unwrap()
                .unwrap();
            assert!(newer.root.watermark_millis > opened.root.watermark_millis);
            self.attached = Some(newer);
        }
    }

    /// Shows what is there.
    pub async fn assert_converged(&mut self) {
        for _ in 0..3 {
            self.poll().await;
        }
        self.load().await;
        let disk = self.home.0.lock().unwrap();
        let live = |entry: &Option<Entry>| Some(entry.as_ref()?.blob.as_ref()?.digest);
        let shown: BTreeMap<_, _> = disk
            .registers
            .iter()
            .filter_map(|(path, (_, entry))| Some((path.clone(), live(entry)?)))
            .collect();
        let truth: BTreeMap<_, _> = self
            .world
            .truth()
            .into_iter()
            .filter_map(|(path, digest)| Some((path, digest?)))
            .collect();
        assert_eq!(shown, truth);
    }
}
