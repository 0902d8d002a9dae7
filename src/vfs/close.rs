//! Closing and syncing: the moments at which a change is made, and made safe.

use std::sync::Arc;

use super::{
    Vfs, VfsError,
    handle::{Handle, OpenNode, OpenState, Serving},
    open::{change_time, is_spare, stat},
    set_attr::set_file_times,
};
use crate::{
    namespace::tree::Notice,
    store::{
        error::chain,
        rows::{Content, Ino, NodeRow, StagingId},
    },
};

impl Vfs {
    /// A descriptor was closed (FLUSH): what was written through it is now a
    /// change of the file, with this moment's stamp.
    pub fn flush(&self, handle: u64) -> Result<(), VfsError> {
        let handle = self.handle(handle)?;
        if !handle.write {
            return Ok(());
        }
        self.record(&handle.node, &mut handle.node.lock())
    }

    /// The last descriptor of an open is gone (RELEASE).
    pub fn release(&self, handle: u64) -> Result<(), VfsError> {
        let handle = self.handles.remove(handle).ok_or(VfsError::BadHandle)?;
        let node = &handle.node;
        self.tree.touch(node.ino);
        let (recorded, written) = {
            let mut state = node.lock();
            state.handles -= 1;
            state.writers -= u32::from(handle.write);
            state.executors -= u32::from(handle.execute);
            let mut recorded = Ok(());
            if handle.write && state.writers == 0 {
                recorded = self.record(node, &mut state);
                state.mappable = false;
            }
            let written = handle.write && matches!(state.serving, Serving::Staging { .. });
            // A descriptor of ours that can write would keep the file from being sealed; what the kernel
            // was lent cannot.
            if state.writers == 0
                && state.handles > 0
                && let Serving::Staging { id, file, .. } = &mut state.serving
            {
                match self.store.staging.open(*id, false) {
                    Ok(reader) => *file = Arc::new(reader),
                    // The next close tries again; until the last one the file is not sealed.
                    Err(err) => {
                        tracing::warn!(ino = node.ino.0, error = %chain(&err), "a file stays open for writing");
                    }
                }
            }
            if state.handles == 0 {
                self.drop_kept(node.ino, &state);
                Self::stop_serving(node, &mut state);
            }
            (recorded, written)
        };
        self.nodes
            .release(node.ino, node, |node| node.lock().handles == 0);
        // A flush that sees no writer any more must see the file waiting to be sealed.
        let closing = self.settling.closing();
        // Of several that close at once the last one here, not the last one above: while the tree knows of a writer
        // the file is not sealed, and nobody would put it to rest again.
        let unpinned = self.tree.unpin(node.ino, handle.write);
        // One too many is found out when its rest is over; one that rests never would never be sealed.
        if written && !matches!(unpinned, Ok(false)) {
            self.settling.rest(node.ino, self.settle_of(node.ino));
        }
        drop(closing);
        unpinned?;
        if handle.write {
            // Where one file is closed the next is made; mostly nobody waits for this.
            self.store.staging.prepare();
        }
        if let Err(err) = &recorded {
            tracing::warn!(ino = node.ino.0, error = %chain(err), "cannot note what a program wrote; the file is looked at again before it is sealed");
        }
        recorded
    }

    /// Writes down what changed since it was last written down.
    pub(super) fn record(&self, node: &OpenNode, state: &mut OpenState) -> Result<(), VfsError> {
        let Serving::Staging { file, .. } = &state.serving else {
            return Ok(());
        };
        let (mut now, mut changed) = (stat(file)?, None);
        if let Some(born) = state.born.take().filter(|born| is_spare(now, *born)) {
            set_file_times(file, None, Some(born))?;
            now = stat(file)?;
            // That it was given its time is no change of the file.
            changed = Some(born);
        }
        if now == state.recorded && !state.written {
            return Ok(());
        }
        let changed = changed.map_or_else(|| change_time(file), Ok)?;
        let mut notices = self.tree.closed(node.ino, now.0, now.1, changed)?;
        if std::mem::take(&mut state.attr_given) && state.mappable && state.serving.loan().is_some() {
            notices.push(Notice::Attributes { ino: node.ino });
        }
        state.recorded = now;
        state.written = false;
        self.tell(notices);
        Ok(())
    }

    /// A staging file that was sealed while readers had it open kept its name
    /// for a writer; with the last close it is not needed any more.
    fn drop_kept(&self, ino: Ino, state: &OpenState) {
        let Serving::Staging { id, .. } = &state.serving else {
            return;
        };
        if is_left_over(*id, &self.tree.node(ino)) {
            self.store.staging.remove_after_barrier(*id);
        }
    }

    /// Makes a file's bytes and the index survive power loss (FSYNC). Waits for the disk.
    pub fn fsync(&self, handle: u64, data_only: bool) -> Result<(), VfsError> {
        let handle = self.handle(handle)?;
        let (file, id) = {
            let mut state = handle.node.lock();
            if handle.write {
                self.record(&handle.node, &mut state)?;
            }
            match &state.serving {
                Serving::Staging { id, file, .. } => (Some(Arc::clone(file)), Some(*id)),
                Serving::Blob { blob, .. } if blob.is_whole() => (Some(Arc::new(blob.file()?)), None),
                Serving::Nothing | Serving::Empty | Serving::Blob { .. } => (None, None),
            }
        };
        if let Some(file) = file {
            if data_only {
                file.sync_data()?;
            } else {
                file.sync_all()?;
            }
        }
        if let Some(id) = id {
            self.tree.synced(handle.node.ino, id)?;
        }
        Ok(self.store.ledger.sync()?)
    }

    /// Makes every name survive power loss (FSYNCDIR). Waits for the disk.
    pub fn fsync_dir(&self) -> Result<(), VfsError> {
        Ok(self.store.ledger.sync()?)
    }

    pub(super) fn handle(&self, handle: u64) -> Result<Arc<Handle>, VfsError> {
        self.handles.get(handle).ok_or(VfsError::BadHandle)
    }
}

/// Whether no row needs a staging file any more, by what was found of its file's. One that cannot be read may need it: the
/// next start removes what nobody does.
pub(super) fn is_left_over<E>(id: StagingId, found: &Result<Option<Arc<NodeRow>>, E>) -> bool {
    match found {
        Ok(Some(node)) => node.content != Content::Staging(id),
        Ok(None) => true,
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::rows::NodeKind;

    #[test]
    fn a_staging_file_goes_only_when_it_is_known_that_no_row_needs_it() {
        let id = StagingId(7);
        let node = |content| {
            let mut node = NodeRow::new(Ino(2), NodeKind::File, 0);
            node.content = content;
            Ok::<_, ()>(Some(Arc::new(node)))
        };
        assert!(!is_left_over(id, &node(Content::Staging(id))));
        assert!(is_left_over(id, &node(Content::Staging(StagingId(8)))));
        assert!(is_left_over(id, &node(Content::None)));
        assert!(is_left_over(id, &Ok::<_, ()>(None)));
        assert!(!is_left_over(id, &Err(())));
    }
}
