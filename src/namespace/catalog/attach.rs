//! Which catalog a machine's tree begins with, decided at a start of the daemon.
//!
//! # Policy
//!
//! For each layer, by where its follower stopped and by how far its newest catalog reaches:
//!
//! | the follower | then |
//! |---|---|
//! | never read the log | the catalog is *attached*: the root directory is unloaded, the follower begins at the watermark |
//! | stopped less than [`MOVE_MILLIS`] before the watermark | nothing: the log is the shorter way |
//! | stopped longer before it | the tree *moves* to the newer catalog, as if it were attached, over what it has |
//! | stopped longer than tombstones are kept before it, or never read the log to its end | the tree *starts over* |
//! | stopped before the floor of the log, up to which sweeps remove it | the tree *starts over* |
//!
//! Moving needs no forgetting: what was removed since has a tombstone in the catalog. To start over,
//! everything but own changes that nobody was told of is forgotten ([`Tree::forget`]), all layers at
//! once. Own changes that were published come back from the catalog and the log, so the follower then
//! reads this machine's own segments too. Files that were known get new numbers; blobs on this disk stay.
//!
//! A layer that is seen up to a moment and whose log was read to that moment never changes again.
//!
//! The layers of a snapshot are its catalogs and nothing else: they are attached once, and no log is followed.
//!
//! # Invariants
//!
//! - The root is unloaded in the same commit that has the follower begin at the watermark.
//! - A tree that is starting over says so in a note until all is forgotten, and every start goes on
//!   with that; until then nothing is shown that may be gone.

use serde::{Deserialize, Serialize};

use super::{compact::TOMBSTONE_MILLIS, read::Opened};
use crate::{
    base::{digest::Digest, volume::Stack},
    namespace::{
        TreeError,
        follow::{Cursor, note_key},
        tree::Tree,
    },
    store::{
        StoreError,
        ledger::Ledger,
        rows::{Change, TreeLayer},
    },
};

/// How far the log is followed rather than a newer catalog loaded.
pub const MOVE_MILLIS: u64 = 24 * 3_600_000;

/// Set while the tree starts over.
const META_STARTING_OVER: &str = "catalogs/starting-over";

fn meta_key(volume: &str) -> String {
    format!("catalog/{volume}")
}

/// The catalog that a layer of the tree is loaded from, as the ledger keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    pub catalog: Digest,
    pub watermark_millis: u64,
    /// The follower reads this machine's own segments, too: the tree forgot them once.
    pub reads_own: bool,
    /// All registers with link ids are among the rows.
    #[serde(default)]
    pub linked: bool,
}

impl Attached {
    /// What was noted of a volume.
    pub fn of(ledger: &Ledger, volume: &str) -> Result<Option<Self>, StoreError> {
        let note = ledger.meta(&meta_key(volume))?;
        Ok(note.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    pub(super) fn note(&self, volume: &str) -> Change {
        let bytes = serde_json::to_vec(self).expect("no member can fail to be written");
        Change::PutMeta(meta_key(volume), bytes)
    }
}

/// What became of the tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decided {
    /// Volumes that a newer catalog speaks for now.
    pub attached: Vec<String>,
    pub started_over: bool,
}

/// What becomes of the tree of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::namespace) enum Way {
    Stay,
    Attach,
    StartOver,
}

/// Has the newest catalogs of the layers of `stack`, as far as there are any, speak for the tree.
///
/// `newest` has one place for each layer. Before anything follows the logs or uses the tree.
pub fn settle(
    tree: &Tree,
    ledger: &Ledger,
    stack: &Stack,
    newest: &[Option<Opened>],
) -> Result<Decided, TreeError> {
    if stack.snapshot().is_some() {
        return settle_snapshot(tree, ledger, stack);
    }
    let mut decided = Decided::default();
    let mut ways = Vec::new();
    for (layer, opened) in stack.layers().iter().zip(newest) {
        let way = match opened {
            Some(opened) => way(ledger, layer.volume.as_str(), layer.until_millis, opened)?,
            None => Way::Stay,
        };
        ways.push(way);
    }
    decided.started_over = ways.contains(&Way::StartOver);
    let mut also = Vec::new();
    let mut layers = Vec::new();
    let numbered = (0..).map_while(TreeLayer::new);
    for (((layer, opened), way), number) in stack.layers().iter().zip(newest).zip(&ways).zip(numbered) {
        let volume = layer.volume.as_str();
        let fresh = opened
            .as_ref()
            .filter(|_| decided.started_over || *way == Way::Attach);
        let cursor = match fresh {
            Some(opened) => {
                let old = Attached::of(ledger, volume)?;
                let attached = Attached {
                    catalog: opened.digest,
                    watermark_millis: opened.root.watermark_millis,
                    reads_own: decided.started_over || old.is_some_and(|old| old.reads_own),
                    linked: false,
                };
                also.push(attached.note(volume));
                layers.push(number);
                decided.attached.push(volume.to_owned());
                Cursor::beginning_at(opened.root.watermark_millis)
            }
            None if decided.started_over => Cursor::default(),
            None => continue,
        };
        also.push(Change::PutMeta(note_key(volume), cursor.to_bytes()));
    }
    if decided.started_over {
        also.push(Change::PutMeta(META_STARTING_OVER.to_owned(), vec![1]));
    }
    if !also.is_empty() {
        tree.attach(&layers, also)?;
    }
    let left_over = ledger
        .meta(META_STARTING_OVER)?
        .is_some_and(|note| !note.is_empty());
    if left_over {
        tree.forget()?;
        ledger.commit(vec![Change::PutMeta(META_STARTING_OVER.to_owned(), Vec::new())])?;
    }
    for layer in stack.layers() {
        if Attached::of(ledger, layer.volume.as_str())?.is_some() {
            tree.expect_catalogs();
        }
    }
    Ok(decided)
}

/// Has the catalogs of a snapshot speak for the tree, if they do not yet.
fn settle_snapshot(tree: &Tree, ledger: &Ledger, stack: &Stack) -> Result<Decided, TreeError> {
    let mut decided = Decided::default();
    let (mut also, mut layers) = (Vec::new(), Vec::new());
    for (layer, number) in stack.layers().iter().zip((0..).map_while(TreeLayer::new)) {
        let volume = layer.volume.as_str();
        let Some(frozen) = &layer.frozen else { continue };
        // The cache directory belongs to this snapshot, so that is its catalog.
        if Attached::of(ledger, volume)?.is_some() {
            continue;
        }
        let attached = Attached {
            catalog: frozen.catalog,
            watermark_millis: frozen.as_of_millis,
            reads_own: false,
            linked: false,
        };
        also.push(attached.note(volume));
        layers.push(number);
        decided.attached.push(volume.to_owned());
    }
    if !also.is_empty() {
        tree.attach(&layers, also)?;
    }
    tree.expect_catalogs();
    Ok(decided)
}

fn way(ledger: &Ledger, volume: &str, until_millis: Option<u64>, opened: &Opened) -> Result<Way, StoreError> {
    let note = ledger.meta(&note_key(volume))?;
    Ok(way_from(note.as_deref(), until_millis, opened))
}

/// Decides by what the follower of a layer keeps in the ledger.
pub(in crate::namespace) fn way_from(note: Option<&[u8]>, until_millis: Option<u64>, opened: &Opened) -> Way {
    let watermark = opened.root.watermark_millis;
    let Some(note) = note else {
        return Way::Attach;
    };
    let cursor = Cursor::from_bytes(note).unwrap_or_default();
    if until_millis.is_some_and(|until| cursor.is_settled(until)) {
        return Way::Stay;
    }
    match cursor.reached_millis() {
        None => Way::StartOver,
        Some(reached) if reached < opened.floor_millis => Way::StartOver,
        Some(reached) if reached + TOMBSTONE_MILLIS < watermark => Way::StartOver,
        Some(reached) if reached + MOVE_MILLIS < watermark => Way::Attach,
        Some(_) => Way::Stay,
    }
}
