//! Makes a catalog of all that a volume says up to a moment, which nobody goes on from: for a snapshot.
//!
//! A catalog that [`super::compact`] makes trails by some minutes, because followers go on from its watermark, and
//! a segment that appears late must not be missed by them. Nobody follows from this one, so
//! it has the end of the log as well: every segment that can be seen when it is made. One that appears
//! later is no part of it, whatever time its key carries: it was not published yet.
//!
//! # Invariants
//!
//! - Everything that was acknowledged before the call, with a time up to the moment, is in it.
//! - It is not half of one catalog and half of another: when another machine makes a catalog meanwhile, after
//!   which segments may go, all is read once more.
//! - A segment that cannot be read ends it: what lacks something would lack it for ever.
//! - It names no older catalogs, so that it keeps none of them alive.

use std::path::PathBuf;

use super::{
    CatalogError,
    compact::{Checkpoint, Gathered, Progress},
    format::Root,
    head, read, write,
};
use crate::{
    base::{digest::Digest, id::MachineId, volume::StackLayer},
    namespace::follow::WINDOW_MILLIS,
    tier::SharedBucket,
};

/// How often a volume is read of which others make catalogs meanwhile.
const READS: u32 = 4;

/// How a catalog is made.
#[derive(Clone, Debug)]
pub struct FreezeOptions {
    /// Everything that was acknowledged carries this time or an earlier one.
    pub now_millis: u64,
    /// The volume, and up to which moment it is seen.
    pub layer: StackLayer,
    pub machine: MachineId,
    /// Where changes are put down when memory does not do.
    pub spill_dir: PathBuf,
    /// What lies below the volume would show where a tombstone is missing.
    pub keeps_tombstones: bool,
}

/// The catalog that was made.
#[derive(Clone, Debug)]
pub struct Made {
    pub digest: Digest,
    pub root: Root,
    /// What of it is new in the bucket, but for the root.
    pub sent: write::Sent,
}

/// Makes a catalog of what was published in `volume`.
///
/// Costs what compacting costs: the newest catalog that is old enough and the log since then are read, and
/// the parts are written in which something changed.
pub async fn freeze(
    bucket: &SharedBucket,
    volume: &str,
    options: &FreezeOptions,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Made, CatalogError> {
    for _ in 0..READS {
        let newest = head::read(bucket.as_ref(), volume).await?;
        let gathered = freeze_once(bucket, volume, options, progress).await;
        let made = match gathered {
            // A segment or a part that was there when it was listed.
            Err(CatalogError::Missing { .. }) if newest != head::read(bucket.as_ref(), volume).await? => None,
            other => Some(other?),
        };
        if let Some(made) = made
            && newest == head::read(bucket.as_ref(), volume).await?
        {
            return Ok(made);
        }
    }
    Err(CatalogError::Moving {
        volume: volume.to_owned(),
    })
}

async fn freeze_once(
    bucket: &SharedBucket,
    volume: &str,
    options: &FreezeOptions,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Made, CatalogError> {
    let old = read::of_layer(bucket.as_ref(), &options.layer).await?;
    let old = old.as_ref().map(|opened| opened.root.as_ref());
    let since = old.map_or(0, |root| root.watermark_millis);
    // What is in a catalog was published, whatever this machine takes for the time.
    let until = options
        .layer
        .until_millis
        .unwrap_or(options.now_millis.max(since));
    let mut gathered = Gathered::new(bucket, volume, options.spill_dir.clone());
    gathered.refuses_damaged = true;
    gathered
        .read(since.saturating_sub(WINDOW_MILLIS), until, &progress)
        .await?;
    progress(Progress {
        folding: true,
        ..gathered.done
    });
    let checkpoint = Checkpoint {
        watermark_millis: until,
        machine: options.machine,
        keeps_tombstones: options.keeps_tombstones,
        part_bytes: write::PART_BYTES,
    };
    let (digest, root, sent) = checkpoint
        .write_root(bucket, volume, old, Vec::new(), gathered.delta)
        .await?;
    Ok(Made { digest, root, sent })
}
