//! Staging files: private files being written, not yet blobs.
//!
//! # Invariants
//!
//! - A number is never used again: numbers start behind the newest that is on
//!   the disk or in a row, and behind this machine's clock, which keeps them
//!   growing when all files of the last run are gone.
//! - A file that a row refers to is not removed before that row is gone from
//!   the disk too ([`Staging::remove_after_barrier`]).
//! - Between [`super::blobs::Blobs::seal`] and the removal of the staging name,
//!   the digest counts as *sealing*: its row is about to be committed by
//!   someone else, so nobody changes it.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, Thread},
};

use rustix::fs::{Timespec, Timestamps, UTIME_NOW};
use tracing::warn;

use super::{
    StoreError,
    ledger::Ledger,
    rows::{Content, StagingId},
};
use crate::base::{clock::local_millis, digest::Digest, durable::remove_if_there};

/// The folder of the files being written. Clones are one and the same.
#[derive(Clone, Debug)]
pub struct Staging(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    ledger: Arc<Ledger>,
    next: AtomicU64,
    sealing: Mutex<Sealing>,
    /// Empty files that nothing refers to, open, for the next to be written.
    spares: Mutex<Vec<(StagingId, File)>>,
    /// The thread that makes them.
    maker: OnceLock<Thread>,
}

/// Spares kept at the most.
const SPARES: usize = 32;

/// With so many left new ones are made: enough for the time until they are there.
const FEW: usize = 20;

#[derive(Debug, Default)]
struct Sealing {
    by_id: HashMap<StagingId, Digest>,
    counts: HashMap<Digest, u32>,
}

impl Staging {
    /// Opens the folder, making it if there is none, and removes the files that no row refers to.
    pub fn open_dir(dir: PathBuf, ledger: Arc<Ledger>) -> Result<Self, StoreError> {
        fs::create_dir_all(&dir).map_err(StoreError::disk("create", &dir))?;
        let mut wanted: HashSet<StagingId> = ledger
            .staging_nodes()?
            .iter()
            .filter_map(|node| match node.content {
                Content::Staging(id) => Some(id),
                Content::None | Content::Blob(_) | Content::Lost(_) => None,
            })
            .collect();
        let mut newest = wanted.iter().map(|id| id.0).max().unwrap_or(0);
        for entry in fs::read_dir(&dir).map_err(StoreError::disk("list", &dir))? {
            let name = entry.map_err(StoreError::disk("list", &dir))?.file_name();
            let id = name.to_str().and_then(|name| name.parse().ok()).map(StagingId);
            newest = newest.max(id.map_or(0, |id| id.0));
            if !id.is_some_and(|id| wanted.remove(&id)) {
                let path = dir.join(name);
                remove_if_there(&path).map_err(StoreError::disk("remove", &path))?;
            }
        }
        if !wanted.is_empty() {
            warn!(files = wanted.len(), first = ?wanted.iter().min(), "staging files are gone");
        }
        // 2^12 numbers a millisecond cannot be used up before the clock has moved on.
        let next = (newest + 1).max(local_millis() << 12);
        let inner = Arc::new(Inner {
            dir,
            ledger,
            next: AtomicU64::new(next),
            sealing: Mutex::default(),
            spares: Mutex::default(),
            maker: OnceLock::new(),
        });
        let staging = Arc::downgrade(&inner);
        let maker = thread::Builder::new()
            .name("spares".to_owned())
            .spawn(move || make_spares(&staging))
            .map_err(StoreError::disk("start a thread for", &inner.dir))?;
        let _ = inner.maker.set(maker.thread().clone());
        Ok(Self(inner))
    }

    /// Gives an empty staging file, open for reading and writing, changed just now.
    pub fn create(&self) -> Result<(StagingId, File), StoreError> {
        let spare = self.spares().pop();
        if let Some((id, file)) = spare {
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_NOW,
            };
            let times = Timestamps {
                last_access: now,
                last_modification: now,
            };
            let checked = rustix::fs::futimens(&file, &times).and_then(|()| rustix::fs::fstat(&file));
            let stat = checked
                .map_err(io::Error::from)
                .map_err(StoreError::disk("set the times of", &self.path(id)))?;
            // Somebody may have swept an old empty file away.
            if stat.st_nlink > 0 {
                return Ok((id, file));
            }
        }
        self.make()
    }

    /// Has spare files made when few are left; never waits. To be called where a next file is likely.
    ///
    /// To make one takes the disk as long as all else that a program waits for when it creates a file, some 20 us on
    /// ext4. By the thread that answers the kernel this was a fifth of its time in `git clone`, and the
    /// next request of the program waited for it.
    pub fn prepare(&self) {
        if self.spares().len() <= FEW
            && let Some(maker) = self.0.maker.get()
        {
            maker.unpark();
        }
    }

    fn fill_spares(&self) {
        while self.spares().len() < SPARES && !self.0.ledger.is_disk_full() {
            // Whoever needs one finds out what is wrong.
            let Ok(spare) = self.make() else { return };
            self.spares().push(spare);
        }
    }

    fn make(&self) -> Result<(StagingId, File), StoreError> {
        let id = self.next_id();
        let path = self.path(id);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(StoreError::disk("create", &path))?;
        Ok((id, file))
    }

    fn spares(&self) -> MutexGuard<'_, Vec<(StagingId, File)>> {
        self.0
            .spares
            .lock()
            .expect("no code panics while it holds the spares")
    }

    pub fn open(&self, id: StagingId, write: bool) -> Result<File, StoreError> {
        let path = self.path(id);
        File::options()
            .read(true)
            .write(write)
            .open(&path)
            .map_err(StoreError::disk("open", &path))
    }

    pub fn path(&self, id: StagingId) -> PathBuf {
        self.0.dir.join(id.0.to_string())
    }

    /// Removes the name after the next barrier (the rows that make it useless may not be on the disk yet).
    /// Called after those rows are committed; ends what `seal` of this file began.
    pub fn remove_after_barrier(&self, id: StagingId) {
        self.end_sealing(id);
        let path = self.path(id);
        self.0.ledger.after_barrier(Box::new(move || remove(&path)));
    }

    /// Removes the name at once: nothing ever referred to it.
    pub fn remove(&self, id: StagingId) {
        self.end_sealing(id);
        remove(&self.path(id));
    }

    pub(super) fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Takes a number whose file the caller makes by itself.
    pub(super) fn next_id(&self) -> StagingId {
        StagingId(self.0.next.fetch_add(1, Ordering::Relaxed))
    }

    /// The rows of a seal are committed: others may change the blob's row again. The name
    /// stays until [`Staging::remove_after_barrier`].
    pub fn sealed(&self, id: StagingId) {
        self.end_sealing(id);
    }

    /// Notes that the row of `digest` will be committed by whoever seals `id`. The shard is locked.
    pub(super) fn begin_sealing(&self, id: StagingId, digest: Digest) {
        let mut sealing = self.sealing();
        sealing.end(id);
        sealing.by_id.insert(id, digest);
        *sealing.counts.entry(digest).or_default() += 1;
    }

    /// Returns the other digest that the same file was sealed under before, if that was never
    /// committed, and takes its mark away.
    pub(super) fn end_sealing_as_other(&self, id: StagingId, digest: Digest) -> Option<Digest> {
        let mut sealing = self.sealing();
        let other = sealing.by_id.get(&id).is_some_and(|before| *before != digest);
        if other { sealing.end(id) } else { None }
    }

    /// Whether someone is about to commit the row of `digest`.
    pub(super) fn is_sealing(&self, digest: &Digest) -> bool {
        self.sealing().counts.contains_key(digest)
    }

    pub(super) fn end_sealing(&self, id: StagingId) {
        self.sealing().end(id);
    }

    fn sealing(&self) -> std::sync::MutexGuard<'_, Sealing> {
        self.0
            .sealing
            .lock()
            .expect("no code panics while it holds the marks")
    }
}

impl Sealing {
    fn end(&mut self, id: StagingId) -> Option<Digest> {
        let digest = self.by_id.remove(&id)?;
        if let Some(count) = self.counts.get_mut(&digest) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&digest);
            }
        }
        Some(digest)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(maker) = self.maker.get() {
            maker.unpark();
        }
    }
}

/// Makes spares whenever it is woken, until nobody has the folder any more.
fn make_spares(staging: &Weak<Inner>) {
    loop {
        thread::park();
        let Some(inner) = staging.upgrade() else { return };
        Staging(inner).fill_spares();
    }
}

fn remove(path: &Path) {
    if let Err(err) = remove_if_there(path) {
        warn!(path = %path.display(), error = %err, "cannot remove a staging file; the next start will");
    }
}

#[cfg(test)]
mod tests {
    use std::{
        thread::sleep,
        time::{Duration, Instant, SystemTime},
    };

    use super::*;
    use crate::store::testing::Rig;

    #[track_caller]
    fn until(what: &str, is_so: impl Fn() -> bool) {
        let began = Instant::now();
        while !is_so() {
            assert!(began.elapsed() < Duration::from_secs(20), "not so: {what}");
            sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn spares_are_made_when_few_are_left_and_are_as_new_when_they_are_given() {
        let rig = Rig::new();
        let staging = &rig.staging;
        let are_there = || staging.spares().len() == SPARES;
        assert!(staging.spares().is_empty());
        staging.prepare();
        until("there are spares", are_there);
        let spares: HashSet<StagingId> = staging.spares().iter().map(|(id, _)| *id).collect();
        let old = SystemTime::now();
        sleep(Duration::from_millis(20));
        let mut given = HashSet::new();
        for _ in 0..SPARES - FEW {
            staging.prepare();
            let (id, file) = staging.create().unwrap();
            assert!(given.insert(id) && spares.contains(&id));
            assert!(file.metadata().unwrap().modified().unwrap() > old);
        }
        staging.prepare();
        until("there are new ones", are_there);
    }

    #[test]
    fn a_spare_that_was_swept_away_is_not_given() {
        let rig = Rig::new();
        rig.staging.prepare();
        until("there are spares", || rig.staging.spares().len() == SPARES);
        for entry in fs::read_dir(rig.staging.dir()).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let (id, _) = rig.staging.create().unwrap();
        assert!(rig.staging.path(id).exists());
    }
}
