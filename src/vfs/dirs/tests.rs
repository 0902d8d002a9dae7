//! What is seen by who goes on in a listing that is gone.

use std::{collections::BTreeSet, time::Duration};

use super::{listings::Limits, *};
use crate::{
    base::{
        activity::Activity,
        id::{MachineId, StoreId},
    },
    namespace::tree::Tree,
    store::{Store, StoreOptions, testing::MemoryBucket},
    vfs::{NewFile, Owner, VfsOptions},
};

/// A file system of its own, that keeps one listing at a time.
struct Rig {
    vfs: Arc<Vfs>,
    dir: Ino,
    _cache: tempfile::TempDir,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.vfs.shutdown();
    }
}

fn new(kind: NodeKind) -> NewFile {
    NewFile {
        kind,
        perm: 0o755,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: Vec::new(),
    }
}

impl Rig {
    fn new(names: impl IntoIterator<Item = String>) -> Self {
        let cache = tempfile::tempdir().unwrap();
        let options = StoreOptions {
            dir: cache.path().to_owned(),
            cache_size: 1 << 20,
            min_free: 0,
            read_timeout: Duration::from_secs(5),
        };
        let store = Arc::new(Store::open(options, StoreId::random(), MemoryBucket::new()).unwrap());
        let tree = Tree::open(Arc::clone(&store.ledger), MachineId(1), Arc::new(|| 1_000)).unwrap();
        let options = VfsOptions {
            owner: Owner::Preserve,
            user: (0, 0),
            umask: 0,
            settle: Duration::from_secs(3600),
            read_only: false,
            xattr: false,
            activity: Arc::new(Activity::default()),
            rests_after: Duration::from_secs(3600),
        };
        let vfs = Vfs::new(options, store, tree).unwrap();
        *vfs.listings() = Listings::with(Limits {
            listings: 1,
            names: 1 << 20,
            begun: 1 << 20,
        });
        let dir = vfs.make(Ino::ROOT, b"dir", &new(NodeKind::Dir)).unwrap().ino;
        let rig = Self {
            vfs,
            dir: Ino(dir.0),
            _cache: cache,
        };
        names.into_iter().for_each(|name| rig.add(&name));
        rig
    }

    fn add(&self, name: &str) {
        self.vfs
            .make(self.dir, name.as_bytes(), &new(NodeKind::Fifo))
            .unwrap();
    }

    fn remove(&self, name: &str) {
        self.vfs.unlink(self.dir, name.as_bytes()).unwrap();
    }

    /// Has all other listings be evicted.
    fn evict(&self) {
        self.vfs.read_dir(Ino::ROOT, 0).unwrap();
        assert_eq!(self.vfs.listings().listed(), [Ino::ROOT]);
    }

    /// All entries behind an offset, and where each ends.
    fn rest(&self, mut offset: u64) -> Vec<(String, u64)> {
        let mut seen = Vec::new();
        loop {
            let page = self.vfs.read_dir(self.dir, offset).unwrap();
            let Some(last) = page.last() else { return seen };
            offset = last.next_offset;
            let text = |name| String::from_utf8(name).unwrap();
            seen.extend(
                page.into_iter()
                    .map(|entry| (text(entry.name), entry.next_offset)),
            );
        }
    }
}

fn names(entries: &[(String, u64)]) -> Vec<&str> {
    entries.iter().map(|(name, _)| name.as_str()).collect()
}

fn numbered(numbers: std::ops::Range<usize>) -> impl Iterator<Item = String> {
    numbers.map(|n| format!("name-{n:04}"))
}

#[tokio::test]
async fn who_goes_on_in_a_listing_that_is_gone_sees_what_stays_once() {
    let rig = Rig::new(numbered(0..1_500));
    let all = rig.rest(0);
    assert_eq!(all.len(), 1_502);
    rig.evict();
    // Before the place, at it and behind it some go and some come.
    for name in numbered(0..1_500).step_by(3) {
        rig.remove(&name);
    }
    for n in (1..1_500).step_by(4) {
        rig.add(&format!("name-{n:04}-came"));
    }
    for at in [
        0, 1, 2, 3, 4, 511, 512, 513, 700, 1_000, 1_400, 1_499, 1_500, 1_501,
    ] {
        let (_, offset) = all[at];
        let rest = rig.rest(offset);
        let seen = names(&rest);
        let unique: BTreeSet<_> = seen.iter().collect();
        assert_eq!(unique.len(), seen.len(), "twice, from {at}");
        let old: Vec<_> = seen.iter().filter(|name| !name.ends_with("-came")).collect();
        let stay: Vec<_> = names(&all[at + 1..])
            .into_iter()
            .filter(|name| name.starts_with('.') || name[5..].parse::<usize>().unwrap() % 3 != 0)
            .collect();
        assert!(old.into_iter().eq(&stay), "from {at}: {seen:?}");
        // And from the middle of what was seen now, evicted as well.
        rig.evict();
        let half = rest.len() / 2;
        if let Some((_, offset)) = rest.get(half) {
            assert_eq!(names(&rig.rest(*offset)), names(&rest[half + 1..]), "from {at}");
        }
        rig.evict();
    }
}

#[tokio::test]
async fn every_step_may_be_in_another_listing() {
    let rig = Rig::new(numbered(0..40));
    let (mut offset, mut seen) = (0, Vec::new());
    for step in 0.. {
        let page = rig.vfs.read_dir(rig.dir, offset).unwrap();
        let Some(entry) = page.into_iter().next() else {
            break;
        };
        offset = entry.next_offset;
        let name = String::from_utf8(entry.name).unwrap();
        // Of what was seen some goes while the place is right behind it.
        if name.starts_with("name") && step % 2 == 0 {
            rig.remove(&name);
        }
        seen.push(name);
        rig.add(&format!("before-{:04}", 1_000 - step));
        rig.evict();
    }
    seen.retain(|name| name.starts_with("name"));
    assert!(seen.into_iter().eq(numbered(0..40)));
}

#[tokio::test]
async fn who_stands_where_nobody_knows_begins_anew_and_misses_nothing() {
    let rig = Rig::new(numbered(0..600));
    let all = rig.rest(0);
    let (_, offset) = all[300];
    rig.evict();
    // Another mark: as of a name that left nothing behind.
    let rest = rig.rest(offset ^ 1);
    assert_eq!(names(&rest), names(&all));
    // It goes on from there as any other reader.
    let (_, offset) = rest[450];
    assert_eq!(names(&rig.rest(offset)), names(&all[451..]));
}
