//! What the tests of this layer share: a cache directory and a bucket in memory that fails on demand.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::File,
    io::Write,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::UnshareFlags,
};
use tokio::sync::Semaphore;

use super::{
    blobs::{Blob, Blobs},
    cachedir::LastStop,
    fetch::Fetcher,
    ingest,
    ledger::{Ledger, LedgerOptions},
    pack,
    reclaim::{ReclaimOptions, Reclaimer},
    rows::{BlobRow, Change, Durability, Residency, StagingId},
    staging::Staging,
};
use crate::{
    base::{
        BoxFuture,
        chunk::{Sliced, slice},
        clock::ServerClock,
        digest::Digest,
    },
    tier::{Body, Bucket, Etag, Object, ObjectMeta, Page, Put, SharedBucket, TierError, layout},
};

/// Bytes that look random and are the same everywhere (xorshift64).
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Waits for a condition that other threads bring about.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The same for a task, which lets others run.
pub(crate) async fn eventually_async(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// How a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Unavailable,
    Denied,
    /// A read answers with other bytes of the same length.
    WrongBytes,
    /// A write happens, and its answer is lost.
    LostReply,
}

type Faults = Box<dyn FnMut(&str, &str) -> Option<Fault> + Send>;

/// A bucket in memory.
pub(crate) struct MemoryBucket {
    objects: Mutex<BTreeMap<String, Bytes>>,
    /// Verb and key of every request, in order.
    log: Mutex<Vec<(&'static str, String)>>,
    faults: Mutex<Option<Faults>>,
    /// Reads and writes wait for one of these; closed while `hold` holds.
    gate: Semaphore,
    under_way: AtomicUsize,
    pub(crate) most_under_way: AtomicUsize,
    clock: ServerClock,
}

/// More permits than a test has requests.
const OPEN: usize = 1 << 20;

impl std::fmt::Debug for MemoryBucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MemoryBucket")
    }
}

impl MemoryBucket {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            objects: Mutex::default(),
            log: Mutex::default(),
            faults: Mutex::default(),
            gate: Semaphore::new(OPEN),
            under_way: AtomicUsize::new(0),
            most_under_way: AtomicUsize::new(0),
            clock: ServerClock::default(),
        })
    }

    /// Puts every chunk of `bytes` in the bucket.
    pub(crate) fn fill(&self, bytes: &[u8]) -> Sliced {
        let sliced = slice(bytes).unwrap();
        let mut objects = self.objects.lock().unwrap();
        for (index, chunk) in sliced.chunks.chunks().iter().enumerate() {
            let start = sliced.chunks.start(index) as usize;
            let piece = Bytes::copy_from_slice(&bytes[start..start + chunk.len as usize]);
            objects.insert(layout::blob(&chunk.digest), piece);
        }
        sliced
    }

    pub(crate) fn insert(&self, key: String, bytes: Bytes) {
        self.objects.lock().unwrap().insert(key, bytes);
    }

    pub(crate) fn remove(&self, key: &str) {
        self.objects.lock().unwrap().remove(key);
    }

    /// The object as it is stored.
    pub(crate) fn object(&self, key: &str) -> Option<Bytes> {
        self.objects.lock().unwrap().get(key).cloned()
    }

    pub(crate) fn len(&self) -> usize {
        self.objects.lock().unwrap().len()
    }

    pub(crate) fn fail(&self, faults: impl FnMut(&str, &str) -> Option<Fault> + Send + 'static) {
        *self.faults.lock().unwrap() = Some(Box::new(faults));
    }

    pub(crate) fn heal(&self) {
        *self.faults.lock().unwrap() = None;
    }

    /// From now on no request is answered.
    pub(crate) fn hold(&self) {
        let held = self.gate.try_acquire_many(OPEN as u32);
        held.expect("nothing is under way").forget();
    }

    /// Answers `count` requests that wait.
    pub(crate) fn let_through(&self, count: usize) {
        self.gate.add_permits(count);
    }

    pub(crate) fn open(&self) {
        self.gate.add_permits(OPEN);
    }

    pub(crate) fn under_way(&self) -> usize {
        self.under_way.load(Ordering::SeqCst)
    }

    /// The keys of all requests of a kind so far.
    pub(crate) fn requests(&self, verb: &str) -> Vec<String> {
        let log = self.log.lock().unwrap();
        let of_verb = log.iter().filter(|request| request.0 == verb);
        of_verb.map(|request| request.1.clone()).collect()
    }

    pub(crate) fn forget_requests(&self) {
        self.log.lock().unwrap().clear();
    }

    async fn enter(&self, verb: &'static str, key: &str) -> Result<Option<Fault>, TierError> {
        self.log.lock().unwrap().push((verb, key.to_owned()));
        let now = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_under_way.fetch_max(now, Ordering::SeqCst);
        let _leave = Leave(&self.under_way);
        self.gate.acquire().await.expect("nobody closes it").forget();
        if self.gate.available_permits() >= OPEN / 2 {
            self.gate.add_permits(1);
        }
        let fault = self
            .faults
            .lock()
            .unwrap()
            .as_mut()
            .and_then(|faults| faults(verb, key));
        match fault {
            Some(Fault::Unavailable) => Err(unavailable(verb, key)),
            Some(Fault::Denied) => Err(TierError::Denied {
                permission: "s3:Everything",
                key: key.to_owned(),
                source: "403".into(),
            }),
            fault => Ok(fault),
        }
    }
}

struct Leave<'a>(&'a AtomicUsize);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn unavailable(verb: &'static str, key: &str) -> TierError {
    TierError::Unavailable {
        verb,
        key: key.to_owned(),
        source: "503".into(),
    }
}

impl Bucket for MemoryBucket {
    fn url(&self) -> String {
        "memory:".to_owned()
    }

    fn clock(&self) -> &ServerClock {
        &self.clock
    }

    fn compresses(&self) -> bool {
        false
    }

    fn get<'a>(
        &'a self,
        key: &'a str,
        range: Option<Range<u64>>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<Option<Object>, TierError>> {
        Box::pin(async move {
            let fault = self.enter("get", key).await?;
            let Some(mut bytes) = self.object(key) else {
                return Ok(None);
            };
            if let Some(range) = range {
                let end = (range.end as usize).min(bytes.len());
                bytes = bytes.slice(range.start as usize..end);
            }
            if fault == Some(Fault::WrongBytes) {
                let mut wrong = bytes.to_vec();
                wrong[0] ^= 1;
                bytes = wrong.into();
            }
            if bytes.len() as u64 > max_bytes {
                return Err(TierError::Malformed {
                    key: key.to_owned(),
                    why: "too long".to_owned(),
                });
            }
            Ok(Some(Object {
                modified_millis: 0,
                transferred_bytes: bytes.len() as u64,
                etag: etag_of(&bytes),
                bytes,
            }))
        })
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<ObjectMeta>, TierError>> {
        Box::pin(async move {
            self.enter("head", key).await?;
            Ok(self.object(key).map(|bytes| ObjectMeta {
                key: key.to_owned(),
                size: bytes.len() as u64,
                modified_millis: 0,
            }))
        })
    }

    fn put_new<'a>(&'a self, key: &'a str, body: Body) -> BoxFuture<'a, Result<Put, TierError>> {
        Box::pin(async move {
            let fault = self.enter("put", key).await?;
            assert_eq!(body.sha256, Digest::of(&body.bytes));
            let mut objects = self.objects.lock().unwrap();
            let put = if objects.contains_key(key) {
                Put::Refused
            } else {
                let etag = etag_of(&body.bytes);
                objects.insert(key.to_owned(), body.bytes);
                Put::Written(etag)
            };
            match fault {
                Some(Fault::LostReply) => Err(unavailable("put", key)),
                _ => Ok(put),
            }
        })
    }

    fn put_if<'a>(
        &'a self,
        key: &'a str,
        body: Body,
        etag: &'a Etag,
    ) -> BoxFuture<'a, Result<Put, TierError>> {
        Box::pin(async move {
            self.enter("put", key).await?;
            let mut objects = self.objects.lock().unwrap();
            if objects.get(key).map(|bytes| etag_of(bytes)).as_ref() != Some(etag) {
                return Ok(Put::Refused);
            }
            let etag = etag_of(&body.bytes);
            objects.insert(key.to_owned(), body.bytes);
            Ok(Put::Written(etag))
        })
    }

    /// All at once, however many.
    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>) -> BoxFuture<'a, Result<Page, TierError>> {
        let objects = self.objects.lock().unwrap();
        let found = objects
            .iter()
            .filter(|(key, _)| key.starts_with(prefix) && after.is_none_or(|after| key.as_str() > after));
        let objects = found.map(|(key, bytes)| ObjectMeta {
            key: key.clone(),
            size: bytes.len() as u64,
            modified_millis: 0,
        });
        let page = Page {
            objects: objects.collect(),
            more: false,
        };
        Box::pin(std::future::ready(Ok(page)))
    }

    fn refresh<'a>(&'a self, _key: &'a str) -> BoxFuture<'a, Result<bool, TierError>> {
        unreachable!("nothing has a lifetime here")
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), TierError>> {
        self.remove(key);
        Box::pin(std::future::ready(Ok(())))
    }
}

fn etag_of(bytes: &[u8]) -> Etag {
    Etag(Digest::of(bytes).to_string())
}

/// A cache directory and a bucket.
pub(crate) struct Rig {
    pub(crate) bucket: Arc<MemoryBucket>,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) staging: Staging,
    pub(crate) blobs: Arc<Blobs>,
    pub(crate) dir: tempfile::TempDir,
}

/// How long a read waits in tests that are about waiting.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_millis(1500);

impl Rig {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ledger = open_ledger(dir.path());
        Self::over(dir, ledger)
    }

    /// Puts blobs and staging files on a disk of `bytes`, which only the calling
    /// thread and those that it starts can see, and which is gone when they are.
    /// `None` without the privilege for it.
    pub(crate) fn on_small_disk(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        std::fs::create_dir(&disk).unwrap();
        // SAFETY: a mount namespace concerns no memory and no descriptor.
        let apart = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) };
        if apart.is_err() {
            return None;
        }
        let alone = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", alone).unwrap();
        let options = CString::new(format!("size={bytes}")).unwrap();
        mount("none", &disk, "tmpfs", MountFlags::empty(), &*options).unwrap();
        for folder in ["blobs", "staging"] {
            std::fs::create_dir(disk.join(folder)).unwrap();
            std::os::unix::fs::symlink(disk.join(folder), dir.path().join(folder)).unwrap();
        }
        let ledger = open_ledger(dir.path());
        Some(Self::over(dir, ledger))
    }

    fn over(dir: tempfile::TempDir, ledger: Arc<Ledger>) -> Self {
        let staging = Staging::open_dir(dir.path().join("staging"), Arc::clone(&ledger)).unwrap();
        let bucket = MemoryBucket::new();
        let asked = Arc::clone(&bucket) as SharedBucket;
        let blobs = Blobs::open_dir(
            dir.path().join("blobs"),
            Arc::clone(&ledger),
            staging.clone(),
            asked,
        )
        .unwrap();
        Self {
            bucket,
            ledger,
            staging,
            blobs: Arc::new(blobs),
            dir,
        }
    }

    /// What a `kill -9` and a new start leave: the files and the rows.
    pub(crate) fn killed(self) -> Self {
        let bucket = Arc::clone(&self.bucket);
        let Self {
            dir,
            ledger,
            staging,
            blobs,
            ..
        } = self;
        drop((staging, blobs));
        assert_eq!(
            Arc::strong_count(&ledger),
            1,
            "something of the old process lives"
        );
        drop(ledger);
        let ledger = open_ledger(dir.path());
        Self {
            bucket,
            ..Self::over(dir, ledger)
        }
    }

    pub(crate) fn reclaimer(&self, cache_size: u64) -> Arc<Reclaimer> {
        let options = ReclaimOptions {
            dir: self.dir.path().to_owned(),
            cache_size,
            min_free: 0,
        };
        let objects = super::objects::Objects::open_dir(self.dir.path().join("catalogs"), 0);
        Reclaimer::spawn(
            options,
            Arc::clone(&self.ledger),
            Arc::clone(&self.blobs),
            objects,
        )
        .unwrap()
    }

    pub(crate) fn fetcher(&self) -> Fetcher {
        self.fetcher_with(READ_TIMEOUT, self.reclaimer(u64::MAX))
    }

    pub(crate) fn fetcher_with(&self, read_timeout: Duration, reclaimer: Arc<Reclaimer>) -> Fetcher {
        let bucket = Arc::clone(&self.bucket) as SharedBucket;
        let (ledger, blobs) = (Arc::clone(&self.ledger), Arc::clone(&self.blobs));
        Fetcher::new(bucket, ledger, blobs, reclaimer, read_timeout)
    }

    pub(crate) fn stage(&self, bytes: &[u8]) -> (StagingId, Sliced) {
        let (id, mut file) = self.staging.create().unwrap();
        file.write_all(bytes).unwrap();
        drop(file);
        let sliced = ingest::slice_file(&File::open(self.staging.path(id)).unwrap()).unwrap();
        (id, sliced)
    }

    /// Seals `bytes` as a dirty blob.
    pub(crate) fn seal(&self, bytes: &[u8]) -> Sliced {
        let (id, sliced) = self.stage(bytes);
        let changes = self.blobs.seal(id, &sliced).unwrap();
        self.ledger.commit(changes).unwrap();
        self.staging.remove_after_barrier(id);
        self.ledger.barrier().unwrap();
        sliced
    }

    /// Seals `bytes` and says that the bucket has them.
    pub(crate) fn seal_clean(&self, bytes: &[u8]) -> Sliced {
        let sliced = self.seal(bytes);
        assert!(self.blobs.set_durable(&sliced.digest, u64::MAX / 2).unwrap());
        sliced
    }

    /// Puts `bytes` in the bucket and makes their chunk list known, as the log of another machine does.
    pub(crate) fn publish(&self, bytes: &[u8]) -> Sliced {
        let sliced = self.bucket.fill(bytes);
        if sliced.chunks.chunks().len() > 1 {
            let manifest = Change::PutManifest(sliced.digest, sliced.chunks.clone());
            self.ledger.commit(vec![manifest]).unwrap();
        }
        sliced
    }

    /// The same with its chunks in packs; returns their keys, too.
    pub(crate) fn publish_packed(&self, bytes: &[u8]) -> (Sliced, Vec<String>) {
        let sliced = slice(bytes).unwrap();
        let list = &sliced.chunks;
        let mut keys = Vec::new();
        let mut places = vec![None; list.chunks().len()];
        for group in pack::group(list) {
            let mut builder = pack::Builder::new(group.len(), 0);
            for &index in &group {
                let (start, end) = (list.start(index) as usize, list.start(index + 1) as usize);
                builder.add(list.chunks()[index], &bytes[start..end], false);
            }
            let pack = builder.finish();
            for (index, (_, place)) in group.into_iter().zip(&pack.members) {
                places[index] = Some(*place);
            }
            keys.push(layout::pack(&pack.name));
            self.bucket.insert(layout::pack(&pack.name), pack.object);
        }
        let mut changes = self.ledger.told_places(list, &places).unwrap();
        changes.push(Change::PutManifest(sliced.digest, list.clone()));
        self.ledger.commit(changes).unwrap();
        (sliced, keys)
    }

    /// Puts small blobs into one pack, and makes known where they are; returns its key, too.
    pub(crate) fn publish_together(&self, blobs: &[Vec<u8>]) -> (Vec<Sliced>, String) {
        self.publish_together_but(blobs, usize::MAX)
    }

    /// The same, but nobody told this machine of the member `unnamed`.
    pub(crate) fn publish_together_but(&self, blobs: &[Vec<u8>], unnamed: usize) -> (Vec<Sliced>, String) {
        let sliced: Vec<_> = blobs.iter().map(|bytes| slice(&bytes[..]).unwrap()).collect();
        let mut builder = pack::Builder::new(blobs.len(), 0);
        for (sliced, bytes) in sliced.iter().zip(blobs) {
            builder.add(sliced.chunks.chunks()[0], bytes, false);
        }
        let pack = builder.finish();
        let members = sliced.iter().zip(&pack.members).enumerate();
        for (_, (sliced, (_, place))) in members.filter(|(index, _)| *index != unnamed) {
            let told = self.ledger.told_places(&sliced.chunks, &[Some(*place)]);
            self.ledger.commit(told.unwrap()).unwrap();
        }
        let key = layout::pack(&pack.name);
        self.bucket.insert(key.clone(), pack.object);
        (sliced, key)
    }

    pub(crate) fn open(&self, sliced: &Sliced) -> Arc<Blob> {
        let blob = self.blobs.open(&sliced.digest, sliced.chunks.size());
        blob.unwrap().expect("its chunks are known")
    }

    pub(crate) fn row(&self, sliced: &Sliced) -> Option<BlobRow> {
        let row = self.ledger.blob(&sliced.digest).unwrap();
        row.map(|row| (*row).clone())
    }

    /// Marks its row as a power loss does.
    pub(crate) fn doubt(&self, sliced: &Sliced) {
        let row = self.row(sliced).unwrap();
        let doubted = Change::PutBlob(BlobRow { doubted: true, ..row });
        self.ledger.commit(vec![doubted]).unwrap();
    }

    pub(crate) fn residency(&self, sliced: &Sliced) -> Residency {
        self.row(sliced).map_or(Residency::Nothing, |row| row.residency)
    }

    pub(crate) fn durability(&self, sliced: &Sliced) -> Option<Durability> {
        self.row(sliced).map(|row| row.durability)
    }

    pub(crate) fn path(&self, digest: &Digest) -> std::path::PathBuf {
        let dir = self.dir.path().join("blobs").join(digest.shard());
        dir.join(digest.to_string())
    }

    /// Names in the staging folder.
    pub(crate) fn staged(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("staging"))
            .unwrap()
            .count()
    }
}

/// Opens the ledger of a test's cache directory; a power loss is not what these tests are about.
fn open_ledger(dir: &std::path::Path) -> Arc<Ledger> {
    let options = LedgerOptions::default();
    Arc::new(Ledger::open(dir, LastStop::Crashed, &options).unwrap().0)
}
