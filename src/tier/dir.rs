//! A bucket that is a directory, on this machine or on a network file system.
//!
//! ```text
//! <root>/<key>                 one file per object, its bytes as they are
//! <root>/.casmount/tmp/<id>    files being written; nobody reads them
//! <root>/.casmount/lock        held while an object is replaced
//! ```
//!
//! # Invariants
//!
//! - No torn object is ever visible: an object appears by link(2) of a file
//!   that was written and synced before, and is replaced by rename(2). A crash
//!   leaves temporary files only; those older than a day are removed when the
//!   directory is next opened.
//! - A name that was answered as written survives power loss: its folder is
//!   synced before the answer. So is the folder of an object that is found to
//!   exist already, because its writer may have died before doing so.
//! - Folders and files have the modes that the umask gives: several users who
//!   write to one directory need a common group and a umask to match.
//! - A root that was seen once is never made again: what is missing then is a
//!   disk that is not mounted, and every object would seem lost.
//!
//! # Atomic between whom
//!
//! link(2) fails for all but one writer, on NFS as well (a lost reply, which
//! makes a repeated call fail although it was done, is found out by the link
//! count). Replacing compares and renames under flock(2): atomic between the
//! processes of a machine on any file system, and between machines where the
//! file system carries locks to its server, as Linux does for NFS unless it is
//! mounted with `nolock` or `local_lock`.

mod clock;
mod list;
mod write;

use std::{
    fs::{File, Metadata},
    io::{self, Read},
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
    time::Instant,
};

use super::{Body, Bucket, Etag, Object, ObjectMeta, Page, Put, TierError, aside};
use crate::base::{BoxFuture, clock::ServerClock, digest::Digest};

/// Holds what is no object. Keys never have a part that begins with a dot.
const PRIVATE: &str = ".casmount";

/// Objects up to this size have their content as their version, larger ones the file's
/// identity: hashing them at each read would cost more than reading them.
const HASHED_BYTES: u64 = 64 << 10;

/// A bucket over a directory.
#[derive(Clone, Debug)]
pub struct DirBucket {
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    root: PathBuf,
    /// Device and inode of the root, once it was seen.
    seen: OnceLock<(u64, u64)>,
    clock: ServerClock,
    /// When it was learned what the clock is, by time and by this machine's own clock in milliseconds since 1970.
    learned: Mutex<Option<(Instant, u64)>>,
}

impl DirBucket {
    /// Opens `root`, which need not exist yet.
    ///
    /// Of one that is in use it learns the time and removes what crashes left,
    /// as far as it may write there; every write learns the time anew, and so does a listing once in a while.
    pub async fn connect(root: PathBuf) -> Self {
        let bucket = Self {
            state: Arc::new(State {
                root,
                seen: OnceLock::new(),
                clock: ServerClock::default(),
                learned: Mutex::default(),
            }),
        };
        let state = Arc::clone(&bucket.state);
        // Every failure shows again, with its reason, at the first request.
        let _ = aside("open", "", move || {
            // Without the private folder it is no store yet, and nothing is to be left in it.
            if state.check_root(Path::new("")).is_ok() && state.root.join(PRIVATE).is_dir() {
                state.sweep_temp_files();
                state.sample_clock();
            }
            Ok(())
        })
        .await;
        bucket
    }

    async fn run<T: Send + 'static>(
        &self,
        verb: &'static str,
        key: &str,
        work: impl FnOnce(&State, &str) -> Result<T, TierError> + Send + 'static,
    ) -> Result<T, TierError> {
        let state = Arc::clone(&self.state);
        let owned = key.to_owned();
        aside(verb, key, move || work(&state, &owned)).await
    }
}

impl State {
    /// The file of a key, which must not lead out of the root.
    fn path(&self, key: &str) -> Result<PathBuf, TierError> {
        let plain = |part: &str| !part.is_empty() && !part.starts_with('.') && part.len() <= 255;
        if key.split('/').all(plain) && !key.contains('\0') {
            return Ok(self.root.join(key));
        }
        Err(TierError::Malformed {
            key: key.to_owned(),
            why: "it is no key of a directory".to_owned(),
        })
    }

    /// Checks that the root is there, and is the one that was seen first.
    fn check_root(&self, asked: &Path) -> Result<(), TierError> {
        let gone = || TierError::NoBucket { bucket: self.url() };
        let meta = match std::fs::metadata(&self.root) {
            Ok(meta) if meta.is_dir() => meta,
            Ok(_) => return Err(gone()),
            Err(error) if is_absent(&error) => return Err(gone()),
            Err(error) => return Err(failed("open", asked, error)),
        };
        let id = (meta.dev(), meta.ino());
        if *self.seen.get_or_init(|| id) == id {
            Ok(())
        } else {
            Err(gone())
        }
    }

    fn url(&self) -> String {
        format!("file://{}", self.root.display())
    }

    /// Opens the file of an object; `None` if there is no such object.
    fn open(&self, path: &Path, verb: &'static str) -> Result<Option<(File, Metadata)>, TierError> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if is_absent(&error) => {
                self.check_root(path)?;
                return Ok(None);
            }
            Err(error) => return Err(failed(verb, path, error)),
        };
        let meta = file.metadata().map_err(|error| failed(verb, path, error))?;
        // A folder is where keys begin that are longer than this one.
        Ok(meta.is_file().then_some((file, meta)))
    }

    fn get(
        &self,
        key: &str,
        range: Option<&Range<u64>>,
        max_bytes: u64,
    ) -> Result<Option<Object>, TierError> {
        let path = self.path(key)?;
        let malformed = |why: String| TierError::Malformed {
            key: key.to_owned(),
            why,
        };
        if range.is_some_and(Range::is_empty) {
            return Err(malformed("an empty range was asked for".to_owned()));
        }
        let Some((mut file, meta)) = self.open(&path, "read")? else {
            return Ok(None);
        };
        let whole = 0..meta.len();
        let wanted = range.unwrap_or(&whole).clone();
        if range.is_some() && wanted.start >= meta.len() {
            return Err(malformed(
                "it ends before the range that was asked for".to_owned(),
            ));
        }
        let len = wanted.end.min(meta.len()) - wanted.start;
        if len > max_bytes {
            return Err(malformed(format!("it has more than {max_bytes} bytes")));
        }
        let read = if range.is_some() {
            let mut bytes = vec![0; len as usize];
            file.read_exact_at(&mut bytes, wanted.start).map(|()| bytes)
        } else {
            let mut bytes = Vec::with_capacity(len as usize);
            file.by_ref().take(len).read_to_end(&mut bytes).map(|_| bytes)
        };
        let bytes = read.map_err(|error| failed("read", &path, error))?;
        let etag = if wanted == whole && len <= HASHED_BYTES {
            etag_of_content(&bytes)
        } else {
            etag_of_file(&meta)
        };
        Ok(Some(Object {
            transferred_bytes: bytes.len() as u64,
            bytes: bytes.into(),
            etag,
            modified_millis: mtime_millis(&meta),
        }))
    }

    fn head(&self, key: &str) -> Result<Option<ObjectMeta>, TierError> {
        let path = self.path(key)?;
        match std::fs::metadata(&path) {
            Ok(meta) if meta.is_file() => Ok(Some(object_meta(key.to_owned(), &meta))),
            Ok(_) => Ok(None),
            Err(error) if is_absent(&error) => self.check_root(&path).map(|()| None),
            Err(error) => Err(failed("ask for", &path, error)),
        }
    }
}

/// The version of a small object: its content, so that it survives a copy of the store.
fn etag_of_content(bytes: &[u8]) -> Etag {
    Etag(Digest::of(bytes).to_string())
}

/// The version of a large object: files are never changed in place.
fn etag_of_file(meta: &Metadata) -> Etag {
    Etag(format!(
        "{:x}-{:x}.{:x}-{:x}",
        meta.ino(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.len()
    ))
}

fn object_meta(key: String, meta: &Metadata) -> ObjectMeta {
    ObjectMeta {
        key,
        size: meta.len(),
        modified_millis: mtime_millis(meta),
    }
}

fn mtime_millis(meta: &Metadata) -> u64 {
    (meta.mtime().max(0) as u64)
        .saturating_mul(1000)
        .saturating_add(meta.mtime_nsec() as u64 / 1_000_000)
}

/// Whether a path leads nowhere; a file where a folder is expected is that, too.
fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// Sorts an error of the file system by what the caller does next.
fn failed(verb: &'static str, path: &Path, error: io::Error) -> TierError {
    let key = path.display().to_string();
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => TierError::Denied {
            permission: match verb {
                "read" | "ask for" | "list" => "to read",
                _ => "to write",
            },
            key,
            source: Box::new(error),
        },
        // A full or failing disk, a server that does not answer: all may pass.
        _ => TierError::Unavailable {
            verb,
            key,
            source: Box::new(error),
        },
    }
}

impl Bucket for DirBucket {
    fn url(&self) -> String {
        self.state.url()
    }

    fn clock(&self) -> &ServerClock {
        &self.state.clock
    }

    /// Files keep no mark of how they are packed, and ordinary tools can read them as they are.
    fn compresses(&self) -> bool {
        false
    }

    fn get<'a>(
        &'a self,
        key: &'a str,
        range: Option<Range<u64>>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<Option<Object>, TierError>> {
        Box::pin(self.run("read", key, move |state, key| {
            state.get(key, range.as_ref(), max_bytes)
        }))
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<ObjectMeta>, TierError>> {
        Box::pin(self.run("ask for", key, State::head))
    }

    fn put_new<'a>(&'a self, key: &'a str, body: Body) -> BoxFuture<'a, Result<Put, TierError>> {
        Box::pin(self.run("write", key, move |state, key| state.put_new(key, &body)))
    }

    fn put_if<'a>(
        &'a self,
        key: &'a str,
        body: Body,
        etag: &'a Etag,
    ) -> BoxFuture<'a, Result<Put, TierError>> {
        let etag = etag.clone();
        Box::pin(self.run("write", key, move |state, key| state.put_if(key, &body, &etag)))
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>) -> BoxFuture<'a, Result<Page, TierError>> {
        let after = after.map(str::to_owned);
        Box::pin(self.run("list", prefix, move |state, prefix| {
            state.list(prefix, after.as_deref())
        }))
    }

    fn refresh<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, TierError>> {
        Box::pin(self.run("refresh", key, State::refresh))
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), TierError>> {
        Box::pin(self.run("delete", key, State::delete))
    }

    fn delete_many<'a>(&'a self, keys: &'a [String]) -> BoxFuture<'a, Result<(), TierError>> {
        let owned = keys.to_vec();
        let first = keys.first().map_or("", String::as_str);
        Box::pin(self.run("delete", first, move |state, _| {
            owned.iter().try_for_each(|key| state.delete(key))
        }))
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn errors_are_sorted_by_what_the_caller_does_next() {
        let sorted = |errno: Errno| failed("write", Path::new("/s/k"), errno.into());
        for errno in [
            Errno::NOSPC,
            Errno::DQUOT,
            Errno::IO,
            Errno::STALE,
            Errno::TIMEDOUT,
        ] {
            let error = sorted(errno);
            assert!(error.is_transient(), "{errno}");
            assert!(error.to_string().contains("/s/k"), "{error}");
        }
        for errno in [Errno::ACCESS, Errno::PERM, Errno::ROFS] {
            let error = sorted(errno);
            assert!(matches!(error, TierError::Denied { .. }), "{errno}");
            assert!(
                error.to_string().contains("to write is missing for /s/k"),
                "{error}"
            );
        }
    }
}
