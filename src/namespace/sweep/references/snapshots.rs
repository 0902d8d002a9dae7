//! What snapshots refer to: all that the catalogs name which they name, as long as they are there.
//!
//! A snapshot that cannot be read stops the sweep, unless its volume's writers are not trusted: what these write
//! keeps more than is needed at the most.

use std::collections::HashSet;

use tokio::task::JoinSet;

use super::{Reading, References, TOGETHER, Volume, Volumes, unless_apart};
use crate::{
    base::{digest::Digest, snapshot::SnapshotTag, volume::VolumeName},
    namespace::{
        catalog::format::PartRef,
        change::Item,
        snapshot::{
            SnapshotError,
            references::{self, Named},
        },
        sweep::{SweepError, asking::Asking, report::Progress},
    },
    tier::{TierError, layout},
};

impl Reading<'_> {
    /// Reads what the snapshots of all volumes refer to.
    pub(super) async fn snapshots(
        &mut self,
        volumes: &Volumes,
        found: &mut References,
    ) -> Result<(), SweepError> {
        // Parts are shared by most snapshots of a volume. What was read for one whose writers are not trusted
        // counts for nobody else: there, failures count for nothing.
        let mut trusted = HashSet::new();
        for (name, volume) in volumes {
            let mut apart = HashSet::new();
            let seen = if volume.is_apart { &mut apart } else { &mut trusted };
            for tag in &volume.snapshots {
                self.snapshot(name, volume, tag, seen, found).await?;
            }
        }
        Ok(())
    }

    async fn snapshot(
        &mut self,
        name: &VolumeName,
        volume: &Volume,
        tag: &SnapshotTag,
        seen: &mut HashSet<Digest>,
        found: &mut References,
    ) -> Result<(), SweepError> {
        let key = layout::snapshot(name.as_str(), tag.as_str());
        let named = references::of(self.asking.bucket(), name, tag).await;
        let named = unless_apart(self.asking, volume, named.map_err(|err| unknown(&key, err)))?;
        // Deleted meanwhile, or nothing to go by.
        let Some(named) = named.flatten() else {
            return Ok(());
        };
        found.snapshots += 1;
        for catalog in &named {
            let kept = found.catalogs.entry(catalog.volume.clone()).or_default();
            kept.extend(catalog.objects());
            let parts = catalog.root.parts.iter();
            let fresh: Vec<&PartRef> = parts.filter(|part| seen.insert(part.digest)).collect();
            for together in fresh.chunks(TOGETHER) {
                for items in read_parts(self.asking, catalog, together).await {
                    let items = unless_apart(self.asking, volume, items.map_err(|err| unknown(&key, err)))?;
                    for item in items.unwrap_or_default() {
                        let Some(blob) = item.entry().and_then(|entry| entry.blob.as_ref()) else {
                            continue;
                        };
                        let held =
                            unless_apart(self.asking, volume, self.held(blob, &key, name, volume).await)?;
                        held.unwrap_or_default().add_to(&mut found.marks);
                    }
                }
                (self.tell)(&Progress {
                    step: "reading what snapshots name, names",
                    done: together.iter().map(|part| part.names).sum(),
                    total: None,
                });
            }
        }
        Ok(())
    }
}

/// Reads some parts of a catalog at once.
async fn read_parts(
    asking: &Asking,
    of: &Named,
    parts: &[&PartRef],
) -> Vec<Result<Vec<Item>, SnapshotError>> {
    let mut under_way = JoinSet::new();
    for part in parts {
        let (asking, volume, part) = (asking.clone(), of.volume.clone(), (*part).clone());
        under_way.spawn(async move { references::part(asking.bucket(), &volume, &part).await });
    }
    under_way.join_all().await
}

fn unknown(key: &str, err: SnapshotError) -> SweepError {
    match err {
        SnapshotError::Bucket(err) if !matches!(err, TierError::Malformed { .. }) => err.into(),
        source => SweepError::Snapshot {
            key: key.to_owned(),
            source: Box::new(source),
        },
    }
}
