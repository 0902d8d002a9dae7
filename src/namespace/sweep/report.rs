//! What a sweep found and did.

use serde::Serialize;

/// How far a sweep is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub step: &'static str,
    pub done: u64,
    pub total: Option<u64>,
}

/// Objects and their bytes, as they are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    pub objects: u64,
    pub bytes: u64,
}

impl Amount {
    pub(super) fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes += bytes;
    }
}

/// What became of objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amounts {
    pub all: Amount,
    /// Something refers to them.
    pub used: Amount,
    /// Nothing does, but they are younger than the window.
    pub young: Amount,
    /// Condemned by an earlier sweep, not long enough ago.
    pub waiting: Amount,
    pub deleted: Amount,
    pub condemned: Amount,
    /// Unused, but more than one sweep condemns.
    pub left: Amount,
}

impl Amounts {
    /// Adds what a later pass of the same sweep did.
    fn follow(&mut self, later: Self) {
        let (condemned, deleted) = (self.condemned, self.deleted);
        *self = later;
        self.condemned = condemned;
        self.deleted.objects += deleted.objects;
        self.deleted.bytes += deleted.bytes;
    }
}

/// What objects are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    /// A chunk, a chunk list or a pack.
    Blob,
    Segment,
    /// A root or a part.
    Catalog,
}

/// What became of objects, in all and of two sorts by themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counted {
    #[serde(flatten)]
    pub all: Amounts,
    /// Of these: segments of logs.
    pub of_logs: Amounts,
    /// Of these: parts and roots of catalogs.
    pub of_catalogs: Amounts,
}

impl Counted {
    pub(super) fn add(&mut self, sort: Sort, bytes: u64, of: impl Fn(&mut Amounts) -> &mut Amount) {
        of(&mut self.all).add(bytes);
        match sort {
            Sort::Blob => {}
            Sort::Segment => of(&mut self.of_logs).add(bytes),
            Sort::Catalog => of(&mut self.of_catalogs).add(bytes),
        }
    }
}

/// The JSON of `casmount sweep`. A dry run tells what would be done.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SweepReport {
    pub store: String,
    pub dry_run: bool,
    pub window_seconds: u64,
    /// Milliseconds since 1970 of the bucket's clock.
    pub began_millis: u64,
    pub volumes: u64,
    pub segments: u64,
    pub names: u64,
    /// Chunk lists that are gone from the bucket: their blobs cannot be read.
    pub lost_lists: u64,
    /// All that they name is in use.
    pub snapshots: u64,
    /// Some of what counts for nothing: it is of no volume, or was got wrong by writers that are not trusted.
    pub ignored: Vec<String>,
    /// Chunks, chunk lists, packs, segments and catalogs.
    #[serde(flatten)]
    pub objects: Counted,
    /// When a sweep may delete what waits and what was condemned now.
    pub next_due_millis: Option<u64>,
    /// Dollars for 10^9 bytes.
    pub price_per_gb_month: f64,
}

impl SweepReport {
    /// Dollars a month for so many bytes.
    #[must_use]
    pub fn dollars(&self, amount: Amount) -> f64 {
        amount.bytes as f64 / 1e9 * self.price_per_gb_month
    }

    /// Adds what a later pass of the same sweep did.
    pub(super) fn follow(&mut self, later: Self) {
        let mut objects = self.objects;
        objects.all.follow(later.objects.all);
        objects.of_logs.follow(later.objects.of_logs);
        objects.of_catalogs.follow(later.objects.of_catalogs);
        *self = Self { objects, ..later };
    }
}
