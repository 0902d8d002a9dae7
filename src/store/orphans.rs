//! Removes blob files that no row vouches for, after a crash.
//!
//! Nothing depends on this: whoever needs the name of an orphan replaces it.
//! It gives back disk space that no row counts.

use std::{fs, sync::atomic::Ordering, thread, time::Duration};

use tracing::info;

use super::{
    StoreError,
    blobs::Blobs,
    rows::{Durability, Residency},
};
use crate::base::{digest::Digest, durable::remove_if_there};

/// The pause after each of the 256 folders that has files: a full walk takes some seconds,
/// and the disk belongs to the build meanwhile.
const PAUSE: Duration = Duration::from_millis(20);

impl Blobs {
    /// Walks the blob files and removes those without a resident row; returns how many.
    ///
    /// Slow on purpose; ends early after [`Self::stop_background_work`]. Needed only after an
    /// unclean stop.
    pub fn remove_orphans(&self) -> Result<u64, StoreError> {
        let mut removed = 0;
        for number in 0..=u8::MAX {
            if self.shared.closing.load(Ordering::Acquire) {
                break;
            }
            let (seen, gone) = self.remove_orphans_of(number)?;
            removed += gone;
            if seen > 0 {
                thread::sleep(PAUSE);
            }
        }
        if removed > 0 {
            info!(removed, "removed blob files that a crash left");
        }
        Ok(removed)
    }

    /// Returns how many files were looked at, and how many removed.
    fn remove_orphans_of(&self, number: u8) -> Result<(u64, u64), StoreError> {
        let dir = self.shared.dir.join(format!("{number:02x}"));
        let (mut seen, mut removed) = (0, 0);
        for entry in fs::read_dir(&dir).map_err(StoreError::disk("list", &dir))? {
            let entry = entry.map_err(StoreError::disk("list", &dir))?;
            seen += 1;
            let name = entry.file_name();
            let digest: Option<Digest> = name.to_str().and_then(|name| name.parse().ok());
            // Without the lock, a name that is just being made would be taken for what a crash left.
            let shard = self.shared.shard_at(number);
            let keep = match &digest {
                Some(digest) => {
                    shard.contains_key(digest)
                        || self.shared.staging.is_sealing(digest)
                        || self.shared.ledger.blob(digest)?.is_some_and(|row| {
                            row.residency != Residency::Nothing || row.durability == Durability::Quarantined
                        })
                }
                None => false,
            };
            if !keep {
                let path = entry.path();
                remove_if_there(&path).map_err(StoreError::disk("remove", &path))?;
                removed += 1;
            }
        }
        Ok((seen, removed))
    }
}
