//! Taking over: a blob's bytes become a staging file that a program may write to.
//!
//! Either the staging file is a copy (shared blocks where the file system can),
//! or it is the blob's own file under a second name, and the blob leaves
//! this disk or gets a copy for itself.
//!
//! # Order
//!
//! 1. [`Blobs::take_over`] makes the staging name. A blob that gives its file
//!    away loses its residency row here: from then on nobody trusts the name.
//! 2. The caller commits the row of the file, which refers to the staging file, and behind it
//!    the changes that came with it.
//! 3. [`Blobs::finish_take_over`] unlinks the blob's name and brings the rows to
//!    the disk. Only then may anyone write to the file: after a power loss the old row
//!    could otherwise vouch for bytes that were written since.
//!
//! A crash before 2 leaves a staging file that no row refers to, which the next start
//! removes, and a clean blob that has to be fetched again; a crash before 3
//! leaves a blob file without a resident row, which whoever needs the name replaces.
//!
//! The staging file is brought to the disk before it is used: the bytes may have been
//! promised to survive a power loss, and the blob they were in is about to be forgotten. The
//! change that says so keeps recovery from doubting it.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use tracing::{error, warn};

use super::{
    StoreError,
    blobs::{Blob, Blobs},
    error::chain,
    rows::{BlobRow, Change, Durability, Residency, StagingId},
};
use crate::base::{
    digest::Digest,
    durable::{remove_if_there, sync_dir},
};

/// Blobs up to this size are copied rather than taken: the copy takes no
/// longer than the disk barrier that taking needs, and the blob stays resident.
const COPY_BYTES: u64 = 8 << 20;

/// Which file it is, whatever its names are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// # Errors
    ///
    /// Those of `fstat(2)`.
    pub fn of(file: &File) -> io::Result<Self> {
        file.metadata().map(|found| Self::from(&found))
    }
}

impl From<&fs::Metadata> for FileId {
    fn from(found: &fs::Metadata) -> Self {
        Self {
            device: found.dev(),
            inode: found.ino(),
        }
    }
}

/// A staging file made from a blob.
#[derive(Debug)]
pub struct TakeOver {
    pub id: StagingId,
    /// Open for reading and writing; not written to before [`Blobs::finish_take_over`].
    pub file: File,
    /// To be committed with the row of the file, behind it.
    pub changes: Vec<Change>,
    /// The blob whose file this was, and which file that is.
    left: Option<(Digest, FileId)>,
}

impl Blobs {
    /// Makes a staging file with the bytes of a whole blob, for a writer.
    ///
    /// With `lent` (the caller lent this very file to readers of the inode
    /// that is now opened for writing, so the kernel demands one backing file)
    /// the blob's own file becomes the staging file and the blob keeps a copy,
    /// or leaves this disk if it is clean; without one a large clean blob that nobody
    /// else uses or has mapped is taken over likewise, anything else is copied (reflink where the file
    /// system can). Returns the changes that the caller commits with the row of the file;
    /// the blob's name is unlinked only by `finish_take_over` after that commit.
    ///
    /// Other users of a blob that left fetch it again. Takes as long as copying the file
    /// where it is copied, and a disk barrier in any case: not for a thread that must not wait.
    ///
    /// # Errors
    ///
    /// [`StoreError::Full`] when there is no room for the copy; an error of the disk with
    /// `ResourceBusy` when the lent file is not the blob's any more.
    pub fn take_over(&self, blob: &Arc<Blob>, lent: Option<FileId>) -> Result<TakeOver, StoreError> {
        if blob.size() == 0 {
            let (id, file) = self.shared.staging.create()?;
            make_durable(&file, &self.shared.staging.path(id))?;
            return Ok(TakeOver::new(id, file));
        }
        if let Some(lent) = lent {
            return self.give_lent_file(blob, lent);
        }
        let (id, target) = self.shared.staging.create()?;
        let staged = Unfinished::new(self.shared.staging.path(id));
        let shared = blob.file.with_file(|source| Ok(shares_blocks(source, &target)))?;
        if !shared {
            if blob.size() > COPY_BYTES
                && let Some(taken) = self.give_free_file(blob)?
            {
                return Ok(taken);
            }
            blob.file
                .with_file(|source| copy(source, &target, blob.size(), &staged.path))?;
        }
        make_durable(&target, &staged.path)?;
        staged.finish();
        Ok(TakeOver::new(id, target))
    }

    /// Ends what `take_over` began, after its changes and the row of the file are committed.
    ///
    /// Returns the staging file, which may be written to from now on.
    pub fn finish_take_over(&self, done: TakeOver) -> File {
        if let Some((digest, file)) = done.left {
            self.unlink_left(digest, file);
        }
        done.file
    }

    /// Unlinks the name of a blob that gave its file away.
    fn unlink_left(&self, digest: Digest, file: FileId) {
        let path = self.shared.path(&digest);
        let shard = self.shared.shard(&digest);
        // A new file may have the name by now: whoever fetched the blob again made it.
        let unlink = || match fs::metadata(&path) {
            Ok(found) if FileId::from(&found) == file => remove_if_there(&path),
            Ok(_) => Ok(()),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(err) => Err(err),
        };
        let unlinked = match shard.get(&digest) {
            Some(in_use) => in_use.file.unlink_with(unlink),
            None => unlink(),
        };
        drop(shard);
        if let Err(err) = unlinked {
            warn!(path = %path.display(), error = %err, "cannot unlink a blob that was taken over");
        }
        if let Err(err) = self.shared.ledger.sync() {
            error!(error = %chain(&err), "rows do not reach the disk");
        }
    }

    /// Makes the file that readers of the caller's inode have its staging file.
    fn give_lent_file(&self, blob: &Blob, lent: FileId) -> Result<TakeOver, StoreError> {
        let shared = &self.shared;
        let digest = blob.digest();
        // Copied before the lock is taken; the bytes cannot change while the blob is leased.
        let spare = match self.clean_row(&digest)? {
            Some(_) => None,
            None => Some(self.spare_copy(blob)?),
        };
        let shard = shared.shard(&digest);
        // Until a take-over is finished the name leads to a file that was given away.
        blob.file.with_file(|file| {
            let path = &blob.file.path;
            let same = FileId::of(file).map_err(StoreError::disk("examine", path))? == lent;
            same.then_some(())
                .ok_or_else(|| StoreError::disk("take over", path)(io::ErrorKind::ResourceBusy.into()))
        })?;
        let taken = match (spare, self.clean_row(&digest)?) {
            (None, Some(row)) => self.give_clean_file(blob, &row),
            (Some(spare), _) => self.link_file(blob).and_then(|taken| {
                let path = &blob.file.path;
                blob.file.replace_with(|| {
                    fs::rename(&spare.path, path).map_err(StoreError::disk("rename", path))?;
                    spare.finish();
                    sync_dir(folder_of(path)).map_err(StoreError::disk("sync", path))
                })?;
                Ok(taken)
            }),
            // It became dirty in between: sealed again, by another file.
            (None, None) => {
                drop(shard);
                return self.give_lent_file(blob, lent);
            }
        };
        drop(shard);
        taken
    }

    /// Makes the blob's own file the staging file, if it can do without and
    /// nobody else can see it being written.
    fn give_free_file(&self, blob: &Blob) -> Result<Option<TakeOver>, StoreError> {
        let digest = blob.digest();
        let shard = self.shared.shard(&digest);
        let alone = shard.get(&digest).is_some_and(|in_use| in_use.leases == 1);
        match self.clean_row(&digest)? {
            Some(row) if alone && blob.is_whole() && !blob.file.is_lent() && blob.file.is_exclusive() => {
                self.give_clean_file(blob, &row).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// The row of a blob that may leave this disk.
    fn clean_row(&self, digest: &Digest) -> Result<Option<Arc<BlobRow>>, StoreError> {
        let row = self.shared.ledger.blob(digest)?;
        let sealing = self.shared.staging.is_sealing(digest);
        Ok(row.filter(|row| matches!(row.durability, Durability::Durable { .. }) && !row.pinned && !sealing))
    }

    /// Links the file, which is whole, and takes back the row that vouches for it. The shard is locked.
    fn give_clean_file(&self, blob: &Blob, row: &BlobRow) -> Result<TakeOver, StoreError> {
        let mut taken = self.link_file(blob)?;
        let found = FileId::of(&taken.file).map_err(StoreError::disk("examine", &blob.file.path))?;
        self.shared.commit_leaving(BlobRow {
            residency: Residency::Nothing,
            doubted: false,
            ..row.clone()
        })?;
        blob.file.leave(|| ());
        taken.left = Some((blob.digest(), found));
        Ok(taken)
    }

    /// Gives the blob's file a name among the staging files, on the disk too.
    fn link_file(&self, blob: &Blob) -> Result<TakeOver, StoreError> {
        let staging = &self.shared.staging;
        let id = staging.next_id();
        let staged = Unfinished::new(staging.path(id));
        fs::hard_link(&blob.file.path, &staged.path).map_err(StoreError::disk("link", &staged.path))?;
        sync_dir(staging.dir()).map_err(StoreError::disk("sync", staging.dir()))?;
        let file = staging.open(id, true)?;
        file.sync_data().map_err(StoreError::disk("sync", &staged.path))?;
        staged.finish();
        Ok(TakeOver::new(id, file))
    }

    /// Makes a copy that takes the blob's place, on the disk, under a name that a start removes.
    fn spare_copy(&self, blob: &Blob) -> Result<Unfinished, StoreError> {
        let spare = Unfinished::new(self.shared.staging.path(self.shared.staging.next_id()));
        let path = &spare.path;
        let target = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(StoreError::disk("create", path))?;
        blob.file.with_file(|source| {
            if shares_blocks(source, &target) {
                return Ok(());
            }
            copy(source, &target, blob.size(), path)
        })?;
        target.sync_all().map_err(StoreError::disk("sync", path))?;
        Ok(spare)
    }
}

/// A file that is removed again unless it is finished.
#[derive(Debug)]
struct Unfinished {
    path: PathBuf,
    finished: bool,
}

impl Unfinished {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            finished: false,
        }
    }

    fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished
            && let Err(err) = remove_if_there(&self.path)
        {
            warn!(path = %self.path.display(), error = %err, "cannot remove a file; the next start will");
        }
    }
}

impl TakeOver {
    fn new(id: StagingId, file: File) -> Self {
        Self {
            id,
            file,
            changes: vec![Change::SyncedStaging(id)],
            left: None,
        }
    }
}

/// Makes `target` share the blocks of `source`, where the file system can.
fn shares_blocks(source: &File, target: &File) -> bool {
    rustix::fs::ioctl_ficlone(target, source).is_ok()
}

fn copy(source: &File, target: &File, size: u64, path: &Path) -> Result<(), StoreError> {
    let mut done = 0;
    while done < size {
        let (mut from, mut to) = (done, done);
        // In pieces, so that a signal or a limit of the kernel costs one of them.
        let piece = (size - done).min(1 << 30) as usize;
        match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), piece) {
            Ok(0) => {
                return Err(StoreError::disk("copy to", path)(
                    io::ErrorKind::UnexpectedEof.into(),
                ));
            }
            Ok(copied) => done += copied as u64,
            Err(rustix::io::Errno::INTR) => {}
            Err(err) => return Err(StoreError::disk("copy to", path)(err.into())),
        }
    }
    Ok(())
}

/// Brings a new file and its name to the disk.
fn make_durable(file: &File, path: &Path) -> Result<(), StoreError> {
    file.sync_all()
        .and_then(|()| sync_dir(folder_of(path)))
        .map_err(StoreError::disk("sync", path))
}

fn folder_of(path: &Path) -> &Path {
    path.parent()
        .expect("these files are all in folders of the cache directory")
}
