//! Which catalogs and how much of the log of a volume are kept.
//!
//! # The rules
//!
//! `A` is the window of the store, or [`MIN_LOG_AGE_MILLIS`] if that is longer.
//!
//! 1. The *floor* is the newest catalog of those that sweeps keep ([`crate::namespace::trim`]) whose watermark is older
//!    than `A`. It never goes down, and is published before anything is condemned by it.
//! 2. A segment is needed while it is younger than the floor less [`MIN_LOG_AGE_MILLIS`]; while a fork sees the volume up to a
//!    moment, of the log before it from the catalog that the fork begins with; and when the floor does not
//!    have what it says ([`super::references`] compares).
//! 3. A catalog is needed while it is the newest, and for a window after; while it is the floor, or to be one; and while
//!    a fork begins with it. Of a fork that does not say with what it begins, all are.
//! 4. Where a volume has no catalog, all of it is needed. Of a deleted one, nothing is.
//!
//! What is not needed is condemned, and deleted a window later, as all else is.
//!
//! # Why nobody misses anything
//!
//! - Who begins with the newest catalog reads the log from there, which is above the floor.
//! - Who follows the log, and was away for so long that the floor is above what it had read, is told by `trim.json` and
//!   begins with a catalog anew ([`crate::namespace::follow`]). What was published late, behind the floor, was published
//!   again by its machine.
//! - A compaction replaces the catalog that it read, or loses; and all that went is in the one that it read.
//! - Who has opened a catalog that goes meanwhile takes the newest one instead
//!   ([`crate::namespace::catalog::load`]), or reads again ([`crate::namespace::view`]).
//! - A sweep needs what was there a window ago, to know what was replaced since: the floor was the newest then, or
//!   was older, and nothing behind it is gone.

use std::{collections::HashSet, sync::Arc};

use super::{
    SweepError,
    asking::Asking,
    inventory::{Meta, Moment, Standing, Volume},
};
use crate::{
    base::{digest::Digest, volume::Base},
    namespace::{
        catalog::{CatalogError, compact::TOMBSTONE_MILLIS, format::Root, head, read},
        follow::{SegmentKey, WINDOW_MILLIS},
        trim::{self, Kept, Trim},
    },
    tier::{Etag, layout},
};

/// The log is kept for so long at least, whatever the window is: more than a machine may need between two full
/// listings, and more than a segment may be late.
pub const MIN_LOG_AGE_MILLIS: u64 = 3_600_000;

/// A catalog that is to be a floor is kept for so many parts of the age of a floor.
const FLOORS: u64 = 8;

/// The times that a sweep goes by.
#[expect(clippy::struct_field_names, reason = "each carries its unit")]
#[derive(Clone, Copy, Debug)]
pub struct Ages {
    /// When the sweep began.
    pub began_millis: u64,
    pub window_millis: u64,
    /// [`MIN_LOG_AGE_MILLIS`], but for tests.
    pub log_millis: u64,
}

impl Ages {
    /// How old a floor is at least.
    fn floor_millis(&self) -> u64 {
        self.window_millis.max(self.log_millis)
    }
}

/// A catalog that can be opened.
#[derive(Clone, Debug)]
pub struct Opened {
    pub catalog: Digest,
    pub root: Arc<Root>,
}

/// What is kept of a volume.
#[derive(Debug, Default)]
pub struct Log {
    /// Where the reading of its names begins; `None`: with the log.
    pub floor: Option<Opened>,
    /// Catalogs that somebody names: what they have is in use.
    pub pinned: Vec<Opened>,
    /// Roots and parts that are needed; `None`: all are.
    kept: Option<HashSet<Digest>>,
    /// What `trim.json` has to say, and the version that it replaces.
    next: Option<(Trim, Option<Etag>)>,
    /// What was said of this floor, nobody knows yet: nothing is condemned by it.
    pub is_unsaid: bool,
    margin_millis: u64,
    /// Stamps of tombstones that the floor may lack.
    pub forgotten_millis: u64,
}

/// Lets no compaction of a volume end that began before: what it names is not seen by what is read from now on.
pub async fn fence(asking: &Asking, name: &str) -> Result<(), SweepError> {
    let fenced = asking
        .again(|bucket| Box::pin(head::fence(bucket, name)))
        .await
        .map_err(|err| SweepError::from_catalog(name, err))?;
    if fenced { Ok(()) } else { Err(SweepError::Busy) }
}

impl Log {
    /// Reads the catalogs of a volume and decides what is kept. (The default keeps all of it.)
    pub async fn read(asking: &Asking, name: &str, volume: &Volume, ages: Ages) -> Result<Self, SweepError> {
        let log = Self {
            margin_millis: ages.log_millis,
            ..Self::default()
        };
        if volume.is_deleted() {
            return Ok(Self {
                kept: Some(HashSet::new()),
                ..log
            });
        }
        if !volume.has_head {
            // If there is one by now: nothing of what it has was removed so far.
            return Ok(log);
        }
        let catalogs = Catalogs { asking, name };
        let (newest, stored) = catalogs.newest().await?;
        let (old, etag) = stored.unzip();
        let mut next = next_trim(old.as_ref(), &newest, ages);
        if old.is_none() && !catalogs.are_there(next.as_ref()).await? {
            next = None;
        }
        let mut roots = RootSet::default();
        roots.add(&newest);
        for kept in next.as_ref().or(old.as_ref()).iter().flat_map(|trim| &trim.kept) {
            roots.add(&catalogs.open(kept.catalog).await?);
        }
        let floor = match next.as_ref().or(old.as_ref()).and_then(Trim::floor) {
            Some(floor) => Some(catalogs.open(floor.catalog).await?),
            None => None,
        };
        for opened in catalogs.recent(&newest, ages).await? {
            roots.add(&opened);
        }
        let mut named = Vec::new();
        for catalog in pinned(volume) {
            match catalogs.try_open(catalog).await {
                Ok(root) => {
                    let opened = Opened { catalog, root };
                    roots.add(&opened);
                    named.push(opened);
                }
                // Whoever begins with it cannot be helped, and must not keep all from being swept.
                Err(CatalogError::Missing { key }) => {
                    tracing::warn!(key, "a catalog is gone that somebody names");
                }
                Err(err) => return Err(SweepError::from_catalog(name, err)),
            }
        }
        let is_vague = volume.moments.iter().any(|moment| moment.base.is_none());
        let forgotten_millis = match &floor {
            Some(floor) if volume.standing != Standing::Fork => {
                floor.root.watermark_millis.saturating_sub(TOMBSTONE_MILLIS)
            }
            _ => 0,
        };
        Ok(Self {
            kept: (floor.is_some() && !is_vague).then_some(roots.objects),
            next: next
                .filter(|next| old.as_ref() != Some(next))
                .map(|next| (next, etag)),
            floor,
            pinned: named,
            forgotten_millis,
            ..log
        })
    }

    /// Says in the bucket what is kept; without that nothing is condemned.
    pub async fn say(&mut self, asking: &Asking, name: &str) -> Result<(), SweepError> {
        if let Some((trim, etag)) = &self.next {
            self.is_unsaid = true;
            let said = asking
                .again(|bucket| Box::pin(trim::replace(bucket, name, trim, etag.as_ref())))
                .await
                .map_err(|err| SweepError::from_catalog(name, err))?;
            // Another sweep said something else at the same time: it is that one's turn.
            self.is_unsaid = !said;
        }
        Ok(())
    }

    /// Whether what a segment says must be in the floor.
    pub fn is_below_floor(&self, segment: SegmentKey) -> bool {
        let floor = self.floor.as_ref().map(|floor| floor.root.watermark_millis);
        floor.is_some_and(|floor| segment.millis.saturating_add(self.margin_millis) <= floor)
    }

    /// Whether a segment that the floor covers is needed by a fork all the same.
    pub fn is_in_view(moments: &[Moment], segment: SegmentKey) -> bool {
        moments.iter().any(|moment| {
            let from = match moment.base {
                Some(Base {
                    catalog: Some(_),
                    watermark_millis,
                }) => watermark_millis.saturating_sub(WINDOW_MILLIS.max(MIN_LOG_AGE_MILLIS)),
                Some(Base { catalog: None, .. }) | None => 0,
            };
            (from..=moment.until_millis).contains(&segment.millis)
        })
    }

    /// Whether a root or a part is needed.
    pub fn needs(&self, catalog: &Digest) -> bool {
        self.is_unsaid || self.kept.as_ref().is_none_or(|kept| kept.contains(catalog))
    }

    /// Whether a segment appeared so late that it may be in no catalog although all of its time are.
    pub fn is_late(segment: SegmentKey, meta: Meta) -> bool {
        meta.modified_millis.saturating_sub(segment.millis) > WINDOW_MILLIS
    }
}

/// Catalogs that somebody names, of the volume `volume`. Whatever else names one adds it here: it is kept with all of its
/// parts, and what it has is in use.
fn pinned(volume: &Volume) -> Vec<Digest> {
    let bases = volume.moments.iter().filter_map(|moment| moment.base?.catalog);
    let mut pinned: Vec<Digest> = bases.collect();
    pinned.sort_unstable();
    pinned.dedup();
    pinned
}

/// The catalogs to be kept from now on as floors, if there is a floor.
fn next_trim(old: Option<&Trim>, newest: &Opened, ages: Ages) -> Option<Trim> {
    let newest_kept = Kept {
        catalog: newest.catalog,
        watermark_millis: newest.root.watermark_millis,
    };
    let remembered = newest.root.earlier.iter().rev().map(|earlier| Kept {
        catalog: earlier.digest,
        watermark_millis: earlier.watermark_millis,
    });
    // Before there was anything to go by, no catalog was ever removed: all that are remembered are whole.
    let mut kept: Vec<Kept> = old.map_or_else(|| remembered.collect(), |old| old.kept.clone());
    kept.push(newest_kept);
    kept.dedup_by_key(|kept| kept.watermark_millis);
    let is_old = |kept: &Kept| kept.watermark_millis.saturating_add(ages.floor_millis()) <= ages.began_millis;
    let floor = kept.iter().rposition(is_old)?;
    let mut spaced: Vec<Kept> = Vec::new();
    for kept in kept.drain(floor..) {
        let apart = ages.floor_millis() / FLOORS;
        let is_apart = |last: &Kept| last.watermark_millis.saturating_add(apart) <= kept.watermark_millis;
        if spaced.last().is_none_or(is_apart) {
            spaced.push(kept);
        }
    }
    Some(Trim {
        kept: spaced,
        ..Trim::default()
    })
}

#[derive(Default)]
struct RootSet {
    objects: HashSet<Digest>,
}

impl RootSet {
    fn add(&mut self, opened: &Opened) {
        self.objects
            .extend(read::objects_of(opened.catalog, &opened.root));
    }
}

/// The catalogs of one volume.
struct Catalogs<'a> {
    asking: &'a Asking,
    name: &'a str,
}

type Stored = Option<(Trim, Etag)>;

impl Catalogs<'_> {
    /// The newest catalog, of a volume that had one when it was listed.
    async fn newest(&self) -> Result<(Opened, Stored), SweepError> {
        // In this order: what is kept is that of a time before, so it is there still.
        let trim = self
            .asking
            .again(|bucket| Box::pin(trim::read(bucket, self.name)))
            .await
            .map_err(|err| SweepError::from_catalog(self.name, err))?;
        let head = self
            .asking
            .again(|bucket| Box::pin(head::read(bucket, self.name)))
            .await
            .map_err(|err| SweepError::from_catalog(self.name, err))?;
        let Some((head, _)) = head else {
            let key = layout::head(self.name);
            return Err(SweepError::from_catalog(self.name, CatalogError::Missing { key }));
        };
        Ok((self.open(head.catalog).await?, trim))
    }

    async fn open(&self, catalog: Digest) -> Result<Opened, SweepError> {
        let root = self
            .try_open(catalog)
            .await
            .map_err(|err| SweepError::from_catalog(self.name, err))?;
        Ok(Opened { catalog, root })
    }

    async fn try_open(&self, catalog: Digest) -> Result<Arc<Root>, CatalogError> {
        self.asking
            .again(|bucket| Box::pin(async move { read::root(bucket, self.name, &catalog).await }))
            .await
            .map(Arc::new)
    }

    /// Whether all that is to be kept can be opened.
    async fn are_there(&self, trim: Option<&Trim>) -> Result<bool, SweepError> {
        for kept in trim.iter().flat_map(|trim| &trim.kept) {
            match self.try_open(kept.catalog).await {
                Ok(_) => {}
                Err(CatalogError::Missing { .. }) => return Ok(false),
                Err(err) => return Err(SweepError::from_catalog(self.name, err)),
            }
        }
        Ok(true)
    }

    /// The catalogs that were the newest within the last window.
    async fn recent(&self, newest: &Opened, ages: Ages) -> Result<Vec<Opened>, SweepError> {
        let mut recent = Vec::new();
        let mut superseded = newest.root.written_millis;
        for earlier in &newest.root.earlier {
            if superseded.saturating_add(ages.window_millis) <= ages.began_millis {
                break;
            }
            match self.try_open(earlier.digest).await {
                Ok(root) => {
                    superseded = root.written_millis;
                    recent.push(Opened {
                        catalog: earlier.digest,
                        root,
                    });
                }
                Err(CatalogError::Missing { .. }) => break,
                Err(err) => return Err(SweepError::from_catalog(self.name, err)),
            }
        }
        Ok(recent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{base::id::MachineId, namespace::catalog::format::Earlier};

    fn digest(watermark: u64) -> Digest {
        Digest::of(&watermark.to_le_bytes())
    }

    fn newest(watermark: u64, earlier: &[u64]) -> Opened {
        let earlier = earlier.iter().map(|watermark| Earlier {
            digest: digest(*watermark),
            watermark_millis: *watermark,
        });
        Opened {
            catalog: digest(watermark),
            root: Arc::new(Root {
                watermark_millis: watermark,
                written_millis: watermark,
                machine: MachineId(1),
                earlier: earlier.collect(),
                names: 0,
                parts: Vec::new(),
                linked: Vec::new(),
            }),
        }
    }

    fn next(old: Option<&[u64]>, newest: &Opened, began_millis: u64) -> Option<Vec<u64>> {
        let ages = Ages {
            began_millis,
            window_millis: 800,
            log_millis: 80,
        };
        let old = old.map(|old| Trim {
            kept: old
                .iter()
                .map(|watermark| Kept {
                    catalog: digest(*watermark),
                    watermark_millis: *watermark,
                })
                .collect(),
            ..Trim::default()
        });
        let next = next_trim(old.as_ref(), newest, ages)?;
        assert!(
            next.kept
                .iter()
                .all(|kept| kept.catalog == digest(kept.watermark_millis))
        );
        Some(next.kept.iter().map(|kept| kept.watermark_millis).collect())
    }

    #[test]
    fn a_floor_is_as_old_as_the_window_and_those_to_come_are_apart() {
        // The newest first.
        let catalogs = newest(1900, &[1850, 1100, 1000, 900]);
        assert_eq!(next(None, &catalogs, 1699), None);
        assert_eq!(next(None, &catalogs, 1850), Some(vec![1000, 1100, 1850]));
        // From then on only what was kept counts.
        assert_eq!(
            next(Some(&[1000, 1100, 1850]), &catalogs, 1950),
            Some(vec![1100, 1850])
        );
        let later = newest(1990, &[1900, 1850]);
        assert_eq!(
            next(Some(&[1100, 1850]), &later, 2000),
            Some(vec![1100, 1850, 1990])
        );
        assert_eq!(next(Some(&[1100, 1850, 1990]), &later, 3000), Some(vec![1990]));
        assert_eq!(next(Some(&[1990]), &later, 9000), Some(vec![1990]));
    }

    #[test]
    fn a_view_up_to_a_moment_needs_the_log_from_its_catalog_on() {
        let segment = |millis| SegmentKey {
            millis,
            machine: MachineId(1),
            seq: 1,
        };
        let moment = |base| Moment {
            until_millis: 10_000_000,
            base,
        };
        let at = |catalog: Option<Digest>| {
            Some(Base {
                catalog,
                watermark_millis: 9_000_000,
            })
        };
        let sees = |base, millis| Log::is_in_view(&[moment(base)], segment(millis));
        assert!(!sees(at(Some(digest(1))), 5_000_000));
        assert!(sees(at(Some(digest(1))), 8_500_000));
        for base in [at(None), None] {
            assert!(sees(base, 1));
            assert!(sees(base, 10_000_000) && !sees(base, 10_000_001));
        }
    }
}
