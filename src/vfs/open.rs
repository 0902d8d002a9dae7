//! Opening files: which bytes serve an inode while it is open.
//!
//! See [`super::handle::Serving`] for why that is decided at the first open.

use std::{fs::File, io, sync::Arc};

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    task::block_in_place,
};

use super::{
    Vfs, VfsError, count,
    handle::{Handle as OpenHandle, Loan, OpenNode, OpenState, Serving},
    lend::{KEPT_BYTES, Lend, lend_blob, lent},
};
use crate::{
    base::digest::Digest,
    namespace::{TreeError, tree::wall_nanos},
    store::{
        StoreError,
        blobs::{Blob, FileId, TakeOver},
        error::chain,
        fetch::ReadCursor,
        rows::{Content, Ino, NodeRow},
    },
};

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default)]
#[allow(clippy::struct_excessive_bools)] // As independent as the flags of open(2) that they are.
pub struct OpenRequest {
    /// With `write`: a program can map the file and store to the mapping.
    pub read: bool,
    pub write: bool,
    pub truncate: bool,
    /// By somebody for whom a file that he changes loses its set-id bits.
    pub drop_set_id: bool,
    /// By the kernel, which runs the file as a program until it closes it.
    pub execute: bool,
}

/// A file that is open.
#[derive(Debug)]
pub struct Opened {
    pub handle: u64,
    /// What the front made of the file it lent to the kernel.
    pub loan: Option<Loan>,
    /// Pages that the kernel kept of this inode are still right.
    pub keep_cache: bool,
    pub write: bool,
    /// The file was made by this open, and nobody need wait for its close.
    pub created: bool,
}

/// What an attempt to open came to.
#[derive(Debug)]
pub enum OpenStep {
    Ready(Opened),
    /// It takes long, because chunks are missing or many bytes are to be copied: go on
    /// with [`Vfs::open_fetching`].
    Fetch(Missing),
}

/// What an open waits for: the first chunk of a blob or all of them, and time to copy them.
#[derive(Debug)]
pub struct Missing {
    blob: Arc<Blob>,
    whole: bool,
}

impl Missing {
    /// Whether this brought what an open of `digest` needs.
    fn is_of(&self, digest: &Digest) -> bool {
        self.blob.digest() == *digest
    }

    /// Why a blob is still not here after it was brought.
    pub(super) fn failure(&self) -> VfsError {
        match (self.whole, self.blob.is_whole(), self.blob.is_damaged()) {
            (true, false, true) => StoreError::Corrupt {
                blob: self.blob.digest(),
            }
            .into(),
            (true, false, false) => StoreError::Full.into(),
            (false, ..) | (true, true, _) => VfsError::Gone,
        }
    }
}

/// Longer blobs are not copied for a writer on the threads that answer the kernel.
const QUICK_COPY_BYTES: u64 = 1 << 20;

/// Attempts before an open gives up: each is spoilt only by a change of the
/// file between two looks at it.
pub(super) const ATTEMPTS: u32 = 8;

impl Vfs {
    /// Opens a file whose bytes are here, or says what must be fetched first.
    pub fn open(&self, ino: Ino, request: OpenRequest, lend: Lend<'_>) -> Result<OpenStep, VfsError> {
        self.open_with(ino, request, lend, None)
    }

    /// Opens a file for which `brought` was brought; that it cannot be kept does not matter to a reader.
    pub(super) fn open_with(
        &self,
        ino: Ino,
        request: OpenRequest,
        lend: Lend<'_>,
        brought: Option<&Missing>,
    ) -> Result<OpenStep, VfsError> {
        self.used();
        let only_empties = request.truncate && !request.write;
        let request = OpenRequest {
            write: request.write || request.truncate,
            ..request
        };
        if request.write {
            self.writable()?;
        }
        self.tree.touch(ino);
        for _ in 0..ATTEMPTS {
            match self.tree.pin(ino, request.write) {
                Err(TreeError::NotFound) => return Err(VfsError::Gone),
                pinned => drop(pinned?),
            }
            let node = self.nodes.get_or(ino, || OpenNode::new(ino));
            let served = if only_empties && node.lock().executors > 0 {
                Err(VfsError::Executed)
            } else {
                self.serve(&node, request, lend, brought)
            };
            if let Ok(Served::Now { loan, content }) = served {
                let keep_cache = self.keeps_pages(ino, content, request);
                let opened = self.opened(node, request, loan, keep_cache);
                if request.truncate
                    && request.drop_set_id
                    && let Err(err) = self.drop_set_id(ino)
                {
                    self.release(opened.handle)?;
                    return Err(err);
                }
                return Ok(OpenStep::Ready(opened));
            }
            self.forget_open(&node, request.write)?;
            match served? {
                Served::Fetch(missing) => return Ok(OpenStep::Fetch(missing)),
                Served::Changed => {}
                Served::Now { .. } => unreachable!("returned above"),
            }
        }
        Err(VfsError::Gone)
    }

    /// Fetches what an open lacks and opens; bounded by the read timeout.
    pub async fn open_fetching(
        &self,
        ino: Ino,
        request: OpenRequest,
        mut missing: Missing,
        lend: impl Fn(&File) -> io::Result<Loan> + Send + Sync,
        may_lend: bool,
    ) -> Result<Opened, VfsError> {
        // A copy for a writer may be all that it waits for.
        if !missing.blob.is_whole() {
            count(&self.counters.misses);
        }
        for _ in 0..ATTEMPTS {
            self.bring(ino, &missing).await?;
            let open = || self.open_with(ino, request, may_lend.then_some(&lend), Some(&missing));
            match may_block(open)? {
                OpenStep::Ready(opened) => return Ok(opened),
                OpenStep::Fetch(more) => missing = more,
            }
        }
        Err(missing.failure())
    }

    pub(super) async fn bring(&self, ino: Ino, missing: &Missing) -> Result<(), VfsError> {
        let fetched = if missing.whole {
            self.store.fetcher.ensure_whole(&missing.blob).await
        } else {
            self.store.fetcher.ensure_first(&missing.blob).await
        };
        match fetched {
            Err(StoreError::Missing { .. }) => {
                self.lose(ino, missing.blob.digest())?;
                Err(VfsError::Gone)
            }
            Err(err) => Err(self.failed(ino, err)),
            Ok(()) => Ok(()),
        }
    }

    /// Hides a file whose blob is gone from the bucket, and says so.
    pub(super) fn lose(&self, ino: Ino, blob: Digest) -> Result<(), VfsError> {
        count(&self.counters.lost);
        let path = self.tree.path_of(ino).unwrap_or_default();
        tracing::warn!(
            path = %String::from_utf8_lossy(&path),
            %blob,
            "gone from the bucket: the name reads as \"no such file\" here until it is made again"
        );
        self.tell(self.tree.lose(ino, blob)?);
        Ok(())
    }

    /// Says in the log why a program gets EIO.
    pub(super) fn failed(&self, ino: Ino, err: StoreError) -> VfsError {
        let path = self.tree.path_of(ino).unwrap_or_default();
        let path = String::from_utf8_lossy(&path);
        tracing::warn!(%path, error = %chain(&err), "a file cannot be read now");
        err.into()
    }

    /// Whether the pages that the kernel kept of an inode since an earlier open
    /// are those of the blob it is opened with now.
    fn keeps_pages(&self, ino: Ino, content: Content, request: OpenRequest) -> bool {
        let mut pages = self.pages.lock().expect("a panic ends the process");
        match content {
            Content::Blob(digest) if !request.write => pages.put(ino, digest) == Some(digest),
            _ => {
                pages.pop(&ino);
                false
            }
        }
    }

    fn opened(
        &self,
        node: Arc<OpenNode>,
        request: OpenRequest,
        loan: Option<Loan>,
        keep_cache: bool,
    ) -> Opened {
        if loan.is_some() {
            count(&self.counters.passthrough_opens);
        }
        let handle = OpenHandle {
            node,
            write: request.write,
            execute: request.execute,
            cursor: ReadCursor::default(),
        };
        Opened {
            handle: self.handles.insert(handle),
            loan,
            keep_cache,
            write: request.write,
            created: false,
        }
    }

    /// Undoes the pin of an open that did not come to be.
    fn forget_open(&self, node: &Arc<OpenNode>, write: bool) -> Result<(), VfsError> {
        self.nodes
            .release(node.ino, node, |node| node.lock().handles == 0);
        self.tree.unpin(node.ino, write)?;
        // The attempt stopped a sealing under way.
        let staged = |node: &NodeRow| matches!(node.content, Content::Staging(_));
        if write && self.tree.node(node.ino)?.is_some_and(|node| staged(&node)) {
            self.settling.rest(node.ino, self.settle_of(node.ino));
        }
        Ok(())
    }

    fn serve(
        &self,
        node: &OpenNode,
        request: OpenRequest,
        lend: Lend<'_>,
        brought: Option<&Missing>,
    ) -> Result<Served, VfsError> {
        let mut state = node.lock();
        // What the file holds changes only under this lock, or by a seal, which keeps to it.
        let row = &*self.tree.node(node.ino)?.ok_or(VfsError::Gone)?;
        let first = state.handles == 0;
        let served = if request.write {
            self.serve_writer(node, &mut state, row, request, lend, brought)
        } else {
            self.serve_reader(node, &mut state, row, lend, brought)
        };
        if !matches!(served, Ok(Served::Now { .. })) {
            if first {
                Self::stop_serving(node, &mut state);
            }
            return served;
        }
        if first && !request.write {
            count(&self.counters.hits);
        }
        state.handles += 1;
        state.writers += u32::from(request.write);
        state.executors += u32::from(request.execute);
        state.attr_given |= request.write;
        state.mappable |= request.write && request.read;
        Ok(Served::Now {
            loan: state.serving.loan().cloned(),
            content: row.content,
        })
    }

    fn serve_reader(
        &self,
        node: &OpenNode,
        state: &mut OpenState,
        row: &NodeRow,
        lend: Lend<'_>,
        brought: Option<&Missing>,
    ) -> Result<Served, VfsError> {
        if !matches!(state.serving, Serving::Nothing) {
            return Ok(SERVED);
        }
        state.serving = match row.content {
            Content::None => return Err(VfsError::Invalid),
            Content::Lost(_) => return Err(VfsError::Gone),
            Content::Blob(Digest::EMPTY) => Serving::Empty,
            Content::Staging(id) => {
                let file = match self.store.staging.open(id, false) {
                    Ok(file) => Arc::new(file),
                    // Sealed between the look at the row and this one.
                    Err(_) if self.content_changed(node.ino, row)? => return Ok(Served::Changed),
                    Err(err) => return Err(err.into()),
                };
                let loan = lend.and_then(|lend| lent(lend(&file)));
                Serving::Staging { id, file, loan }
            }
            Content::Blob(digest) => {
                let blob = self.open_blob(&digest, row)?;
                if blob.size() <= KEPT_BYTES && blob.is_said_whole() {
                    Serving::Blob { blob, loan: None }
                } else if blob.is_whole() {
                    let loan = lend.map_or(Ok(None), |lend| lend_blob(&blob, node.ino, lend))?;
                    Serving::Blob { blob, loan }
                } else {
                    if !blob.has(0, 1) && !brought.is_some_and(|missing| missing.is_of(&digest)) {
                        return Ok(Served::Fetch(Missing { blob, whole: false }));
                    }
                    Serving::Blob { blob, loan: None }
                }
            }
        };
        Ok(SERVED)
    }

    fn serve_writer(
        &self,
        node: &OpenNode,
        state: &mut OpenState,
        row: &NodeRow,
        request: OpenRequest,
        lend: Lend<'_>,
        brought: Option<&Missing>,
    ) -> Result<Served, VfsError> {
        let brought = |digest| brought.is_some_and(|missing| missing.is_of(digest));
        let first = matches!(state.serving, Serving::Nothing);
        let loaned = state.serving.loan().is_some();
        let source = match (&state.serving, row.content) {
            (_, Content::None) => return Err(VfsError::Invalid),
            (Serving::Staging { id, .. }, Content::Staging(now)) if *id == now => {
                if state.writers == 0 {
                    Source::Reopen
                } else {
                    Source::Open
                }
            }
            // Sealed while readers have it open: their file, not the blob's, is what a writer must change.
            (Serving::Staging { .. }, Content::Blob(digest)) => Source::Unseal(digest),
            // Emptied in a file of its own: a power loss before the next sync leaves the old bytes whole.
            (Serving::Nothing, Content::Staging(_)) if request.truncate => Source::Fresh,
            (Serving::Nothing, Content::Staging(_)) => Source::Reopen,
            (_, Content::Lost(_)) => return Err(VfsError::Gone),
            (_, Content::Blob(Digest::EMPTY)) => Source::Fresh,
            (_, Content::Blob(_)) if request.truncate && !loaned => Source::Fresh,
            (_, Content::Blob(digest)) => Source::Blob(digest),
            (_, Content::Staging(_)) => return Ok(Served::Changed),
        };
        let mut fresh = false;
        match source {
            Source::Open => {}
            Source::Reopen => {
                let Content::Staging(id) = row.content else {
                    return Ok(Served::Changed);
                };
                let file = Arc::new(self.store.staging.open(id, true)?);
                match &mut state.serving {
                    Serving::Staging { file: open, .. } => *open = file,
                    serving => *serving = Serving::Staging { id, file, loan: None },
                }
            }
            Source::Fresh => {
                let (id, file) = self.with_room(|| 0, || self.store.staging.create())?;
                let set = self.tree.set_staging(node.ino, id, 0, Vec::new());
                set.inspect_err(|_| self.store.staging.remove(id))?;
                if let Content::Staging(old) = row.content {
                    self.store.staging.remove_after_barrier(old);
                }
                Self::give_back(node, state);
                state.serving = Serving::Staging {
                    id,
                    file: Arc::new(file),
                    loan: None,
                };
                fresh = true;
            }
            Source::Blob(digest) => {
                let blob = self.open_blob(&digest, row)?;
                if !blob.is_whole() || (blob.size() > QUICK_COPY_BYTES && !brought(&digest)) {
                    return Ok(Served::Fetch(Missing { blob, whole: true }));
                }
                let lent = match &state.serving {
                    Serving::Blob { loan, .. } => loan.as_ref().map(|(_, file)| *file),
                    Serving::Nothing | Serving::Empty | Serving::Staging { .. } => None,
                };
                let done = self.with_room(|| blob.size(), || self.store.blobs.take_over(&blob, lent))?;
                self.put_taken_over(node, state, row, done)?;
            }
            Source::Unseal(digest) => self.unseal(node, state, row, digest)?,
        }
        let Serving::Staging { id, file, loan } = &mut state.serving else {
            return Ok(Served::Changed);
        };
        let is_emptied = fresh && request.truncate;
        if is_emptied {
            state.born = Some(wall_nanos());
        } else if fresh {
            // Opening an empty file changes nothing.
            super::set_attr::set_file_times(file, Some(row.atime), Some(row.mtime))?;
        }
        if first {
            *loan = lend.and_then(|lend| self.lend_staging(*id, lend));
        }
        let file = Arc::clone(file);
        if state.writers == 0 {
            state.recorded = if is_emptied {
                (row.size, row.mtime)
            } else {
                stat(&file)?
            };
            state.written = is_emptied;
        }
        if request.truncate && !fresh {
            file.set_len(0)?;
            state.written = true;
        }
        Ok(SERVED)
    }

    /// Puts the staging file made from a blob under an inode. It keeps the
    /// times of the file, so that a writer that changes nothing leaves no trace.
    fn put_taken_over(
        &self,
        node: &OpenNode,
        state: &mut OpenState,
        row: &NodeRow,
        mut done: TakeOver,
    ) -> Result<(), VfsError> {
        let changes = std::mem::take(&mut done.changes);
        let id = done.id;
        let set = self.tree.set_staging(node.ino, id, row.size, changes);
        // Nothing refers to it; on a full disk it would take up what is looked for.
        set.inspect_err(|_| self.store.staging.remove(id))?;
        let file = self.store.blobs.finish_take_over(done);
        super::set_attr::set_file_times(&file, Some(row.atime), Some(row.mtime))?;
        let file = Arc::new(file);
        let loan = match std::mem::replace(&mut state.serving, Serving::Nothing) {
            Serving::Blob { blob, loan } => {
                blob.give_back(node.ino);
                loan.map(|(loan, _)| loan)
            }
            Serving::Staging { loan, .. } => loan,
            Serving::Nothing | Serving::Empty => None,
        };
        state.serving = Serving::Staging { id, file, loan };
        Ok(())
    }

    /// Makes a file writable again that was sealed while readers had its staging file open.
    fn unseal(
        &self,
        node: &OpenNode,
        state: &mut OpenState,
        row: &NodeRow,
        digest: Digest,
    ) -> Result<(), VfsError> {
        let Serving::Staging { id, file, .. } = &mut state.serving else {
            return Err(VfsError::Invalid);
        };
        let same_file = match digest {
            Digest::EMPTY => None,
            digest => Some(self.open_blob(&digest, row)?),
        };
        if let Some(blob) = same_file
            && blob.is_whole()
            && let lent = FileId::of(file)?
            && FileId::of(&blob.file()?)? == lent
        {
            let kept = *id;
            let take_over = || self.store.blobs.take_over(&blob, Some(lent));
            let done = self.with_room(|| blob.size(), take_over)?;
            self.put_taken_over(node, state, row, done)?;
            self.store.staging.remove_after_barrier(kept);
            return Ok(());
        }
        // A duplicate: the readers' file is theirs alone, and its name was kept for this.
        *file = Arc::new(self.store.staging.open(*id, true)?);
        let id = *id;
        self.tree.set_staging(node.ino, id, row.size, Vec::new())?;
        Ok(())
    }

    fn open_blob(&self, digest: &Digest, row: &NodeRow) -> Result<Arc<Blob>, VfsError> {
        if !row.places.is_empty() {
            self.tree.tell_places(row.ino)?;
        }
        self.store
            .blobs
            .open(digest, row.size)?
            .ok_or_else(|| VfsError::Store(StoreError::Corrupt { blob: *digest }))
    }

    fn content_changed(&self, ino: Ino, row: &NodeRow) -> Result<bool, VfsError> {
        Ok(self.tree.node(ino)?.is_none_or(|now| now.content != row.content))
    }

    /// Ends the loan of a blob's file.
    fn give_back(node: &OpenNode, state: &OpenState) {
        if let Serving::Blob { blob, loan: Some(_) } = &state.serving {
            blob.give_back(node.ino);
        }
    }

    /// Lets go of what served an inode, after its last close.
    pub(super) fn stop_serving(node: &OpenNode, state: &mut OpenState) {
        Self::give_back(node, state);
        state.serving = Serving::Nothing;
    }
}

/// What looking for bytes to serve came to.
enum Served {
    Now {
        loan: Option<Loan>,
        content: Content,
    },
    Fetch(Missing),
    /// The file changed meanwhile: look again.
    Changed,
}

/// Bytes are served; how, is in the state.
const SERVED: Served = Served::Now {
    loan: None,
    content: Content::None,
};

/// Where the bytes that a writer changes come from.
enum Source {
    /// The staging file is open for writing already.
    Open,
    Reopen,
    Fresh,
    Blob(Digest),
    Unseal(Digest),
}

/// Runs `job`, which takes long, without keeping the tasks of this thread waiting.
pub(super) fn may_block<T>(job: impl FnOnce() -> T) -> T {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => block_in_place(job),
        _ => job(),
    }
}

/// Size and modification time of a staging file, the latter in nanoseconds since 1970.
pub(super) fn stat(file: &File) -> io::Result<(u64, i64)> {
    let stat = rustix::fs::fstat(file)?;
    Ok((stat.st_size as u64, nanos(stat.st_mtime, stat.st_mtime_nsec)))
}

/// Whether a staging file with this size and time is as it lay ready when its file was made at `born`.
pub(super) fn is_spare(now: (u64, i64), born: i64) -> bool {
    now.0 == 0 && now.1 < born
}

/// When a staging file was changed last, in nanoseconds since 1970.
pub(super) fn change_time(file: &File) -> io::Result<i64> {
    let stat = rustix::fs::fstat(file)?;
    Ok(nanos(stat.st_ctime, stat.st_ctime_nsec))
}

pub(super) fn nanos(seconds: i64, nanoseconds: u64) -> i64 {
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds as i64)
}
