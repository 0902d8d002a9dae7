//! Going on where the last daemon stopped, or was stopped.

use std::{io, time::Duration};

use super::{
    Vfs, VfsError,
    open::{change_time, is_spare, stat},
    set_attr::set_file_times,
};
use crate::store::{
    StoreError,
    rows::{Content, NodeRow},
};

impl Vfs {
    /// Drops what nothing names, and puts everything unsealed in line to be sealed.
    ///
    /// A file that was open for writing when the daemon died counts as closed
    /// then: its bytes are in its staging file. Programs that outlived the daemon
    /// may go on writing to that file; sealing waits for them (see [`super::seal`]).
    pub(super) fn resume(&self) -> Result<(), VfsError> {
        self.discard(self.tree.drop_nameless()?);
        for node in self.store.ledger.doubted_staging()? {
            self.give_up(
                &node,
                "it was not synced before the power went, and its bytes may be torn",
            )?;
        }
        for node in self.store.ledger.staging_nodes()? {
            self.resume_file(&node)?;
        }
        Ok(())
    }

    fn resume_file(&self, node: &NodeRow) -> Result<(), VfsError> {
        let Content::Staging(id) = node.content else {
            return Ok(());
        };
        let file = match self.store.staging.open(id, false) {
            Ok(file) => file,
            Err(StoreError::Disk { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return self.give_up(node, "its bytes are gone from the cache disk");
            }
            Err(err) => return Err(err.into()),
        };
        let ((size, mut mtime), mut changed) = (stat(&file)?, change_time(&file)?);
        if (size, mtime) != (node.size, node.mtime) {
            if node.size == 0 && is_spare((size, mtime), node.mtime) {
                // Made, and not written to: its time is that of the making.
                set_file_times(&file, None, Some(node.mtime))?;
                (mtime, changed) = (stat(&file)?.1, node.mtime);
            }
            self.tree.closed(node.ino, size, mtime, changed)?;
        }
        self.settling.rest(node.ino, Duration::ZERO);
        Ok(())
    }

    fn give_up(&self, node: &NodeRow, why: &str) -> Result<(), VfsError> {
        let path = self.tree.path_of(node.ino).unwrap_or_default();
        tracing::error!(path = %String::from_utf8_lossy(&path), "a file is lost: {why}");
        self.tree.lose_staging(node.ino)?;
        if let Content::Staging(id) = node.content {
            self.store.staging.remove_after_barrier(id);
        }
        Ok(())
    }
}
