//! All names of a volume, read from its newest catalog and the log since.
//!
//! A part of the catalog is in memory at a time, and of the log since the newest change of each path, some 100 bytes
//! each. Without a catalog all of it is the log.
//!
//! Of a directory in which something was alive when the catalog was made it is believed that something is: so one that
//! became empty goes after the next catalog at the earliest.

use std::collections::{HashMap, HashSet};

use super::{ExpireError, decide::Register};
use crate::{
    base::{clock::Stamp, volume::VolumeName},
    namespace::{
        catalog::{
            CatalogError,
            read::{self, Opened},
        },
        change::{Below, Entry, Item},
        follow::WINDOW_MILLIS,
        view,
    },
    store::rows::NodeKind,
    tier::SharedBucket,
};

/// How often a volume is read anew whose log is shortened while it is read.
const READS: u32 = 3;

/// How often a part is asked for.
const TRIES: u32 = 3;
const WAIT: std::time::Duration = std::time::Duration::from_secs(1);

/// Names of the log that are handed out at once.
const TOGETHER: usize = 16_384;

/// What is at a path, as far as it matters.
#[derive(Clone, Copy, Debug)]
struct Live {
    is_dir: bool,
    bytes: u64,
}

impl Live {
    fn of(entry: &Entry) -> Self {
        Self {
            is_dir: entry.kind == NodeKind::Dir,
            bytes: entry.blob.as_ref().map_or(0, |blob| blob.size),
        }
    }
}

/// The newest change of each path since the catalog; `None`: it is dead.
type Tail = HashMap<Vec<u8>, (Stamp, Option<Live>)>;

/// The names of a volume.
#[derive(Debug)]
pub struct Names<'a> {
    bucket: &'a SharedBucket,
    volume: &'a VolumeName,
    catalog: Option<Opened>,
    next_part: usize,
    tail: Tail,
    /// Directories below which the tail has something alive.
    holding: HashSet<Vec<u8>>,
}

impl<'a> Names<'a> {
    /// Begins to read.
    pub async fn of(bucket: &'a SharedBucket, volume: &'a VolumeName) -> Result<Self, ExpireError> {
        for _ in 0..READS {
            let catalog = read::newest(bucket.as_ref(), volume.as_str(), None).await;
            let catalog = catalog.map_err(|err| ExpireError::catalog(volume, err))?;
            let since = catalog
                .as_ref()
                .map(|opened| opened.root.watermark_millis.saturating_sub(WINDOW_MILLIS));
            if let Some(tail) = tail(bucket, volume, since).await? {
                let holding = holding(&tail);
                return Ok(Self {
                    bucket,
                    volume,
                    catalog,
                    next_part: 0,
                    tail,
                    holding,
                });
            }
        }
        let vanishing = view::ViewError::Vanishing {
            volume: volume.clone(),
        };
        Err(ExpireError::view(volume, vanishing))
    }

    /// Some more names that are alive; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<Register>>, ExpireError> {
        let root = self.catalog.as_ref().map(|opened| opened.root.clone());
        if let Some(part) = root.as_ref().and_then(|root| root.parts.get(self.next_part)) {
            let mut tries = 1;
            let items = loop {
                match read::part(self.bucket.as_ref(), self.volume.as_str(), part).await {
                    Err(err) if err.is_transient() && tries < TRIES => {
                        tries += 1;
                        tokio::time::sleep(WAIT).await;
                    }
                    Err(err @ CatalogError::Missing { .. }) => {
                        // Removed with its catalog, because there is a newer one.
                        tracing::debug!(error = %err, "a catalog went while it was read");
                        return Err(ExpireError::view(
                            self.volume,
                            view::ViewError::Vanishing {
                                volume: self.volume.clone(),
                            },
                        ));
                    }
                    done => break done.map_err(|err| ExpireError::catalog(self.volume, err))?,
                }
            };
            self.next_part += 1;
            return Ok(Some(
                items.into_iter().filter_map(|item| self.newest(item)).collect(),
            ));
        }
        let paths: Vec<Vec<u8>> = self.tail.keys().take(TOGETHER).cloned().collect();
        if paths.is_empty() {
            return Ok(None);
        }
        let mut registers = Vec::new();
        for path in paths {
            if let Some((stamp, Some(live))) = self.tail.remove(&path) {
                registers.push(self.register(path, stamp, live, false));
            }
        }
        Ok(Some(registers))
    }

    /// What is at the path of an item of the catalog, by now.
    fn newest(&mut self, item: Item) -> Option<Register> {
        let of_catalog = item
            .said
            .as_ref()
            .map(|said| (said.stamp, said.entry.as_ref().map(Live::of)));
        let of_log = self.tail.remove(&item.path);
        let newest = match (of_catalog, of_log) {
            (Some(old), Some(new)) if new.0 > old.0 => Some(new),
            (Some(old), _) => Some(old),
            (None, new) => new,
        };
        let (stamp, live) = newest?;
        Some(self.register(item.path, stamp, live?, item.below == Below::Live))
    }

    fn register(&self, path: Vec<u8>, stamp: Stamp, live: Live, holds: bool) -> Register {
        Register {
            stamp,
            holds: live.is_dir && (holds || self.holding.contains(&path)),
            is_dir: live.is_dir,
            bytes: live.bytes,
            path,
        }
    }
}

/// The newest changes since the catalog; `None` when a segment went while it was read.
async fn tail(
    bucket: &SharedBucket,
    volume: &VolumeName,
    since: Option<u64>,
) -> Result<Option<Tail>, ExpireError> {
    let keys = view::list(bucket, volume, since, None).await;
    let keys = keys.map_err(|err| ExpireError::view(volume, err))?;
    let mut tail = Tail::new();
    let mut odd = None;
    let whole = view::fetch(bucket, volume, keys, |key, decoded| {
        if let Some(skipped) = decoded.skipped.into_iter().next() {
            odd.get_or_insert((key, skipped));
        }
        for change in decoded.changes {
            let said = (change.stamp, change.entry.as_ref().map(Live::of));
            let known = tail.entry(change.path).or_insert(said);
            if known.0 < said.0 {
                *known = said;
            }
        }
    })
    .await
    .map_err(|err| ExpireError::view(volume, err))?;
    if let Some((key, skipped)) = odd {
        return Err(ExpireError::Change {
            volume: volume.clone(),
            key: key.to_key(volume.as_str()),
            path: String::from_utf8_lossy(&skipped.path).into_owned(),
            why: skipped.why,
        });
    }
    Ok(whole.then_some(tail))
}

fn holding(tail: &Tail) -> HashSet<Vec<u8>> {
    let mut holding = HashSet::new();
    for (path, _) in tail.iter().filter(|(_, (_, live))| live.is_some()) {
        let mut above = path.as_slice();
        while let Some(slash) = above.iter().rposition(|&byte| byte == b'/') {
            above = &above[..slash];
            if !holding.insert(above.to_vec()) {
                break;
            }
        }
    }
    holding
}
