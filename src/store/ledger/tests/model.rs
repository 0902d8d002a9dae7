//! Random changes, absorbs, barriers and crashes, compared with plain maps.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{base::chunk::Chunk, store::pack::PackPlace};

/// The size of a blob of four chunks.
const LARGE: u64 = 8 << 20;

#[derive(Clone, Debug)]
enum Step {
    Commit(Vec<Change>),
    Absorb,
    /// An absorb that failed: the batch waits for the next.
    HalfAbsorb,
    Barrier,
    Sync,
    Kill,
    CleanStop,
}

#[derive(Debug, Default)]
struct Model {
    nodes: BTreeMap<Ino, NodeRow>,
    names: BTreeMap<(Ino, Vec<u8>), NameRow>,
    blobs: BTreeMap<Digest, BlobRow>,
    /// The commit that made a blob dirty.
    dirty_since: BTreeMap<Digest, u64>,
    chunks: BTreeMap<Digest, ChunkRow>,
    lists: BTreeMap<Digest, ListObject>,
    meta: BTreeMap<String, Vec<u8>>,
    evicted: (u64, u64),
    commits: u64,
}

fn large_chunks(of: u64) -> ChunkList {
    let chunks = (0..4).map(|at| Chunk {
        digest: digest(1000 + of * 10 + at),
        len: (2 << 20) - 100 + [0, 100, 200, 100][at as usize],
    });
    ChunkList::new(chunks.collect())
}

fn resident_bytes(row: &BlobRow) -> u64 {
    match &row.residency {
        Residency::Nothing => 0,
        Residency::Whole => row.size,
        Residency::Partial(bits) => {
            let of = (0..6).find(|of| digest(*of) == row.digest).unwrap();
            let list = large_chunks(of);
            (0..4)
                .filter(|at| bits[0] >> at & 1 == 1)
                .map(|at| u64::from(list.chunks()[at].len))
                .sum()
        }
    }
}

impl Model {
    fn commit(&mut self, changes: &[Change]) {
        self.commits += 1;
        for change in changes {
            match change.clone() {
                Change::PutNode(row) => drop(self.nodes.insert(row.ino, row)),
                Change::DropNode(ino) => drop(self.nodes.remove(&ino)),
                Change::PutName(row) => drop(self.names.insert((row.parent, row.name.clone()), row)),
                Change::DropName(parent, name) => drop(self.names.remove(&(parent, name))),
                Change::PutBlob(row) => {
                    self.count_evicted(&row.digest, Some(&row));
                    if row.durability == Durability::Dirty {
                        self.dirty_since.entry(row.digest).or_insert(self.commits);
                    } else {
                        self.dirty_since.remove(&row.digest);
                    }
                    self.blobs.insert(row.digest, row);
                }
                Change::DropBlob(digest) => {
                    self.count_evicted(&digest, None);
                    self.dirty_since.remove(&digest);
                    self.blobs.remove(&digest);
                }
                Change::PutChunk(digest, row) => drop(self.chunks.insert(digest, row)),
                Change::PutList(blob, list) => drop(self.lists.insert(blob, list)),
                Change::PutMeta(key, value) => drop(self.meta.insert(key, value)),
                Change::PutManifest(..) | Change::SyncedStaging(_) => {}
            }
        }
    }

    fn count_evicted(&mut self, digest: &Digest, new: Option<&BlobRow>) {
        let Some(old) = self.blobs.get(digest) else { return };
        let had = matches!(old.durability, Durability::Durable { .. }) && old.residency != Residency::Nothing;
        if had && new.is_none_or(|row| row.residency == Residency::Nothing) {
            self.evicted.0 += resident_bytes(old);
            self.evicted.1 += 1;
        }
    }

    fn totals(&self) -> Totals {
        let mut totals = Totals {
            evicted_bytes: self.evicted.0,
            evicted_blobs: self.evicted.1,
            ..Totals::default()
        };
        for row in self.blobs.values() {
            totals.resident_bytes += resident_bytes(row);
            totals.resident_blobs += u64::from(row.residency != Residency::Nothing);
            if row.durability == Durability::Dirty {
                totals.dirty_bytes += row.size;
                totals.dirty_blobs += 1;
            }
            totals.quarantined_blobs += u64::from(row.durability == Durability::Quarantined);
        }
        totals
    }

    fn check(&self, ledger: &Ledger) {
        for ino in (1..8).map(Ino) {
            assert_eq!(ledger.node(ino).unwrap().as_deref(), self.nodes.get(&ino));
            let names = ledger.names_of(ino).unwrap();
            let expected = self
                .names
                .values()
                .filter(|row| row.state == NameState::Live(ino));
            assert!(names.iter().map(|row| &**row).eq(expected), "names of {ino:?}");
        }
        for key in self.names.keys() {
            assert_eq!(
                ledger.name(key.0, &key.1).unwrap().as_deref(),
                self.names.get(key)
            );
        }
        for parent in [Ino(1), Ino(2)] {
            for (after, limit) in [
                (None, 100),
                (None, 3),
                (Some(&b"b"[..]), 2),
                (Some(&b"bz"[..]), 100),
            ] {
                let found = ledger.names_in(parent, after, limit).unwrap();
                let expected = self.names.iter().filter(|((above, name), _)| {
                    *above == parent && after.is_none_or(|after| name.as_slice() > after)
                });
                let expected = expected.map(|(_, row)| row).take(limit);
                assert!(found.iter().map(|row| &**row).eq(expected), "names in {parent:?}");
            }
        }
        let mut pending: Vec<_> = self.names.values().filter(|row| row.pending.is_some()).collect();
        pending.sort_by_key(|row| (row.pending, row.parent, row.name.clone()));
        for limit in [2, 100] {
            let found = ledger.pending_names(limit).unwrap();
            let expected = pending.iter().copied().take(limit);
            assert!(found.iter().map(|row| &**row).eq(expected), "pending names");
        }
        self.check_blobs(ledger);
        let staging = self
            .nodes
            .values()
            .filter(|row| matches!(row.content, Content::Staging(_)));
        assert!(
            ledger
                .staging_nodes()
                .unwrap()
                .iter()
                .map(|row| &**row)
                .eq(staging)
        );
        let nameless = self.nodes.values().filter(|row| row.nlink == 0);
        assert!(
            ledger
                .nameless_nodes()
                .unwrap()
                .iter()
                .map(|row| &**row)
                .eq(nameless)
        );
        for of in 0..3 {
            let known = self.chunks.get(&digest(of)).copied();
            assert_eq!(ledger.chunk(&digest(of)).unwrap(), known);
            let known = self.lists.get(&digest(of)).copied();
            assert_eq!(ledger.list_of(&digest(of)).unwrap(), known);
            let key = format!("k{of}");
            assert_eq!(ledger.meta(&key).unwrap().as_ref(), self.meta.get(&key));
        }
        assert!(ledger.meta_keys("k").unwrap().iter().eq(self.meta.keys()));
        assert!(
            ledger
                .meta_keys("k1")
                .unwrap()
                .iter()
                .eq(self.meta.keys().filter(|key| *key == "k1"))
        );
    }

    fn check_blobs(&self, ledger: &Ledger) {
        for of in 0..6 {
            let row = self.blobs.get(&digest(of));
            assert_eq!(ledger.blob(&digest(of)).unwrap().as_deref(), row);
            let bytes = row.map_or(0, resident_bytes);
            assert_eq!(ledger.resident_bytes(&digest(of)).unwrap(), bytes);
            if row.is_some_and(|row| row.size == LARGE) {
                assert_eq!(
                    *ledger.manifest(&digest(of), LARGE).unwrap().unwrap(),
                    large_chunks(of)
                );
            }
        }
        for unwanted in ledger.unwanted_blobs() {
            assert!(
                self.dirty_since.contains_key(&unwanted),
                "unwanted, but not dirty"
            );
        }
        let mut dirty: Vec<_> = self
            .dirty_since
            .iter()
            .map(|(digest, since)| (since, digest))
            .collect();
        dirty.sort();
        let victim = |row: &&BlobRow| {
            matches!(row.durability, Durability::Durable { .. })
                && !row.pinned
                && row.residency != Residency::Nothing
        };
        let mut victims: Vec<_> = self.blobs.values().filter(victim).collect();
        victims.sort_by_key(|row| (row.used_secs, row.digest));
        for limit in [2, 100] {
            let found = ledger.dirty_blobs(limit).unwrap();
            let expected = dirty.iter().map(|(_, digest)| &self.blobs[digest]).take(limit);
            assert!(found.iter().map(|row| &**row).eq(expected), "dirty blobs");
            let found = ledger.victims(limit).unwrap();
            let expected = victims.iter().copied().take(limit);
            assert!(found.iter().map(|row| &**row).eq(expected), "victims");
        }
        assert_eq!(ledger.totals(), self.totals());
    }
}

fn node_row() -> impl Strategy<Value = NodeRow> {
    (1u64..8, 0u64..3, 0u32..2, prop::option::of(0u64..4)).prop_map(|(ino, size, nlink, content)| NodeRow {
        size,
        nlink,
        xattrs: vec![(b"user.a".to_vec(), vec![size as u8])],
        ..node(
            ino,
            match content {
                None => Content::None,
                Some(0) => Content::Blob(digest(size)),
                Some(1) => Content::Lost(digest(size)),
                Some(id) => Content::Staging(StagingId(id)),
            },
        )
    })
}

fn name_text() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "b", "bz", "c", "d", "\u{fe}", "é"]).prop_map(str::to_owned)
}

fn name_row() -> impl Strategy<Value = NameRow> {
    let parts = (
        1u64..3,
        name_text(),
        prop::option::of(1u64..8),
        prop::option::of(0u64..20),
    );
    parts.prop_map(|(parent, text, live, place)| {
        name(
            parent,
            &text,
            live.map_or(NameState::Dead, |ino| NameState::Live(Ino(ino))),
            place,
        )
    })
}

/// A blob's row, with its manifest before it where one is needed.
fn blob_changes() -> impl Strategy<Value = Vec<Change>> {
    (0u64..6, 0u8..4, 0u8..3, 0u64..5, any::<bool>()).prop_map(|(of, kept, durability, used_secs, pinned)| {
        let large = of >= 3;
        let row = BlobRow {
            digest: digest(of),
            size: if large { LARGE } else { 100 + of },
            residency: match kept {
                0 => Residency::Nothing,
                1 => Residency::Whole,
                _ if large => Residency::Partial(vec![kept * 3]),
                _ => Residency::Whole,
            },
            durability: match durability {
                0 => Durability::Dirty,
                1 => DURABLE,
                _ => Durability::Quarantined,
            },
            used_secs,
            pinned,
            doubted: false,
        };
        let manifest = large.then(|| Change::PutManifest(digest(of), large_chunks(of)));
        manifest.into_iter().chain([Change::PutBlob(row)]).collect()
    })
}

fn chunk_row() -> impl Strategy<Value = ChunkRow> {
    (0u64..9, prop::option::of((0u64..3, 0u32..9, any::<bool>()))).prop_map(|(confirmed_millis, place)| {
        ChunkRow {
            confirmed_millis,
            place: place.map(|(pack, offset, zstd)| PackPlace {
                pack: digest(pack),
                offset,
                stored_len: 7,
                zstd,
            }),
        }
    })
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let one = |change: Change| vec![change];
    let some = prop_oneof![
        4 => node_row().prop_map(move |row| one(Change::PutNode(row))),
        1 => (1u64..8).prop_map(move |ino| one(Change::DropNode(Ino(ino)))),
        6 => name_row().prop_map(move |row| one(Change::PutName(row))),
        2 => (1u64..3, name_text()).prop_map(move |(parent, name)| one(Change::DropName(Ino(parent), name.into_bytes()))),
        4 => blob_changes(),
        1 => (0u64..6).prop_map(move |of| one(Change::DropBlob(digest(of)))),
        1 => (0u64..3, chunk_row()).prop_map(move |(of, row)| one(Change::PutChunk(digest(of), row))),
        1 => (0u64..3, 0u64..9).prop_map(move |(of, size)| {
            let list = ListObject { digest: digest(of + size), size };
            one(Change::PutList(digest(of), list))
        }),
        1 => (0u8..3).prop_map(move |key| one(Change::PutMeta(format!("k{key}"), vec![key; 3]))),
        1 => (2u64..4).prop_map(move |id| one(Change::SyncedStaging(StagingId(id)))),
    ];
    prop::collection::vec(some, 1..5).prop_map(|lists| lists.concat())
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => changes().prop_map(Step::Commit),
        4 => Just(Step::Absorb),
        3 => Just(Step::HalfAbsorb),
        1 => Just(Step::Barrier),
        1 => Just(Step::Sync),
        2 => Just(Step::Kill),
        1 => Just(Step::CleanStop),
    ]
}

fn run(steps: Vec<Step>) {
    let (dir, mut ledger) = fresh();
    let mut model = Model::default();
    let mut given = Ino::ROOT;
    for step in steps {
        match step {
            Step::Commit(changes) => {
                // Names are put below directories whose numbers were given out.
                for change in &changes {
                    while let Change::PutName(row) = change
                        && given < row.parent
                    {
                        given = ledger.next_ino();
                    }
                }
                model.commit(&changes);
                ledger.commit(changes).unwrap();
            }
            Step::Absorb => ledger.core.layers.absorb().unwrap(),
            Step::HalfAbsorb => drop(ledger.core.layers.take_batch()),
            Step::Barrier => ledger.barrier().unwrap(),
            Step::Sync => ledger.sync().unwrap(),
            Step::Kill => {
                drop(ledger);
                ledger = open(dir.path(), LastStop::Crashed);
            }
            Step::CleanStop => {
                ledger.close().unwrap();
                drop(ledger);
                ledger = open(dir.path(), LastStop::Clean);
            }
        }
        model.check(&ledger);
    }
    // The same once more from the disk alone.
    drop(ledger);
    model.check(&open(dir.path(), LastStop::Crashed));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_ledger_is_a_set_of_maps_that_crashes_do_not_harm(steps in prop::collection::vec(step(), 1..25)) {
        run(steps);
    }
}

/// Pages end at other places in memory than on the disk.
#[test]
fn long_listings_are_merged_exactly() {
    let (_dir, ledger) = fresh();
    let mut model = Model::default();
    let mut commit = |number: u64, kind: u64| {
        let text = format!("{:04}", number * 7919 % 3000);
        let change = match kind {
            0 => Change::DropName(Ino(1), text.into_bytes()),
            1 => Change::PutName(name(1, &text, NameState::Dead, None)),
            _ => Change::PutName(name(1, &text, NameState::Live(Ino(number)), Some(number))),
        };
        model.commit(std::slice::from_ref(&change));
        ledger.commit(vec![change]).unwrap();
    };
    (0..3000).for_each(|number| commit(number, 2));
    ledger.core.layers.absorb_all().unwrap();
    (0..2000).for_each(|number| commit(number, number % 4));
    drop(ledger.core.layers.take_batch());
    (1500..2500).for_each(|number| commit(number, number % 3));

    for page in [1, 10, 97, 1000, 5000] {
        let mut listed: Vec<Arc<NameRow>> = Vec::new();
        loop {
            let after = listed.last().map(|row| row.name.clone());
            let rows = ledger.names_in(Ino(1), after.as_deref(), page).unwrap();
            if rows.is_empty() {
                break;
            }
            listed.extend(rows);
        }
        assert!(
            listed.iter().map(|row| &**row).eq(model.names.values()),
            "pages of {page}"
        );
    }
    let mut pending: Vec<_> = model.names.values().filter(|row| row.pending.is_some()).collect();
    pending.sort_by_key(|row| row.pending);
    for limit in [1, 100, 900, 5000] {
        let found = ledger.pending_names(limit).unwrap();
        assert!(
            found
                .iter()
                .map(|row| &**row)
                .eq(pending.iter().copied().take(limit))
        );
    }
}
