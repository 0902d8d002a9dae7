//! Creates, replaces and removes the files of objects.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use rustix::{
    fs::{AtFlags, CWD, FlockOperation, RenameFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT},
    io::Errno,
};

use super::{HASHED_BYTES, PRIVATE, State, etag_of_content, etag_of_file, failed, is_absent};
use crate::{
    base::{
        clock::local_millis,
        durable::{remove_if_there, sync_dir},
        id::random_bytes,
    },
    tier::{Body, Etag, Put, TierError, layout},
};

/// A process that replaces an object holds the lock for two disk barriers.
const LOCK_WAIT: Duration = Duration::from_secs(10);

/// No write takes this long, so older temporary files are those of crashes.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// How often a folder that another process removes, because it became empty, is made again.
const FOLDER_ATTEMPTS: u32 = 8;

/// A written and synced file without a key; removed when dropped.
struct TempFile {
    path: PathBuf,
    file: File,
    /// The version of an object with these bytes, once they are written.
    etag: Etag,
}

impl Drop for TempFile {
    fn drop(&mut self) {
        // What stays is swept later.
        let _ = fs::remove_file(&self.path);
    }
}

impl State {
    pub(super) fn put_new(&self, key: &str, body: &Body) -> Result<Put, TierError> {
        let path = self.path(key)?;
        self.check_or_make_root(key, &path)?;
        // Most repeated writes end here, without writing a byte.
        if self.open(&path, "write")?.is_some() {
            return self.refuse(&path);
        }
        let temp = self.write_temp(&path, body)?;
        for _ in 0..FOLDER_ATTEMPTS {
            return match link(&temp.path, &path) {
                Ok(()) => self.settle(&path, &temp),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    // Over NFS the reply to a link that was made can be lost, and the repeated call fails.
                    let links = temp.file.metadata().map(|meta| meta.nlink());
                    if links.is_ok_and(|links| links == 2) {
                        self.settle(&path, &temp)
                    } else {
                        self.refuse(&path)
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.make_folders(&path)?;
                    continue;
                }
                Err(error) => Err(failed("write", &path, error)),
            };
        }
        Err(failed("write", &path, io::ErrorKind::NotFound.into()))
    }

    pub(super) fn put_if(&self, key: &str, body: &Body, etag: &Etag) -> Result<Put, TierError> {
        let path = self.path(key)?;
        self.check_or_make_root(key, &path)?;
        let temp = self.write_temp(&path, body)?;
        let _lock = self.lock(&path)?;
        let Some((_, meta)) = self.open(&path, "write")? else {
            return Ok(Put::Refused);
        };
        let mut current = etag_of_file(&meta) == *etag;
        if !current && meta.len() <= HASHED_BYTES {
            let bytes = fs::read(&path).map_err(|error| failed("write", &path, error))?;
            current = etag_of_content(&bytes) == *etag;
        }
        if !current {
            return Ok(Put::Refused);
        }
        fs::rename(&temp.path, &path).map_err(|error| failed("write", &path, error))?;
        self.settle(&path, &temp)
    }

    /// Gives the file of an object the time of now.
    pub(super) fn refresh(&self, key: &str) -> Result<bool, TierError> {
        let path = self.path(key)?;
        let spec = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
        let now = Timestamps {
            last_access: spec(UTIME_OMIT),
            last_modification: spec(UTIME_NOW),
        };
        match rustix::fs::utimensat(CWD, &path, &now, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT | Errno::NOTDIR) => self.check_root(&path).map(|()| false),
            Err(errno) => Err(failed("refresh", &path, errno.into())),
        }
    }

    pub(super) fn delete(&self, key: &str) -> Result<(), TierError> {
        let path = self.path(key)?;
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if is_absent(&error) => return self.check_root(&path),
            // A folder is no object.
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => return Ok(()),
            Err(error) => return Err(failed("delete", &path, error)),
        }
        // Minutes of a log would pile up as empty folders. That this one has
        // other objects is the usual case; writers make folders again.
        if let Some(folder) = path.parent().filter(|folder| *folder != self.root) {
            let _ = fs::remove_dir(folder);
        }
        Ok(())
    }

    /// Makes the name durable.
    fn settle(&self, path: &Path, temp: &TempFile) -> Result<Put, TierError> {
        self.sync_folder(path)?;
        Ok(Put::Written(temp.etag.clone()))
    }

    /// Makes the other writer's name durable before anyone relies on it.
    fn refuse(&self, path: &Path) -> Result<Put, TierError> {
        self.sync_folder(path)?;
        Ok(Put::Refused)
    }

    fn sync_folder(&self, path: &Path) -> Result<(), TierError> {
        let folder = path.parent().unwrap_or(&self.root);
        match sync_dir(folder) {
            // Deleted again by another process: there is nothing to keep.
            Err(error) if !is_absent(&error) => Err(failed("write", folder, error)),
            _ => Ok(()),
        }
    }

    /// Writes and syncs a file of the private folder.
    fn write_temp(&self, path: &Path, body: &Body) -> Result<TempFile, TierError> {
        let unpacked;
        let bytes = if body.zstd {
            unpacked =
                zstd::stream::decode_all(&body.bytes[..]).map_err(|error| failed("write", path, error))?;
            &unpacked[..]
        } else {
            &body.bytes[..]
        };
        let sent = local_millis();
        let mut temp = self.new_temp()?;
        let written = temp
            .file
            .write_all(bytes)
            .and_then(|()| temp.file.sync_all())
            .and_then(|()| temp.file.metadata());
        let meta = written.map_err(|error| failed("write", &temp.path, error))?;
        if meta.len() != bytes.len() as u64 {
            return Err(failed("write", &temp.path, io::ErrorKind::WriteZero.into()));
        }
        self.observe_clock(sent, &meta);
        temp.etag = if meta.len() > HASHED_BYTES {
            etag_of_file(&meta)
        } else {
            etag_of_content(bytes)
        };
        Ok(temp)
    }

    fn new_temp(&self) -> Result<TempFile, TierError> {
        let folder = self.root.join(PRIVATE).join("tmp");
        let path = folder.join(format!("{:032x}", u128::from_be_bytes(random_bytes())));
        let create = || {
            File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)
        };
        let created = match create() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.make_private(&folder).and_then(|()| create())
            }
            other => other,
        };
        match created {
            Ok(file) => Ok(TempFile {
                path,
                file,
                etag: Etag(String::new()),
            }),
            Err(error) => Err(failed("write", &path, error)),
        }
    }

    /// Makes the folder of temporary files, but never the root above it.
    fn make_private(&self, folder: &Path) -> io::Result<()> {
        for dir in [&self.root.join(PRIVATE), folder] {
            match fs::create_dir(dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes the root for the object that makes a store, and for no other.
    fn check_or_make_root(&self, key: &str, path: &Path) -> Result<(), TierError> {
        match self.check_root(path) {
            Err(TierError::NoBucket { .. }) if key == layout::STORE && self.seen.get().is_none() => {}
            other => return other,
        }
        let made = fs::create_dir(&self.root);
        match made {
            Ok(()) => {
                let parent = self.root.parent().unwrap_or(Path::new("/"));
                sync_dir(parent).map_err(|error| failed("write", parent, error))?;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists || is_absent(&error) => {}
            Err(error) => return Err(failed("write", &self.root, error)),
        }
        self.check_root(path)
    }

    /// Makes the folders of a key, each of them durable.
    fn make_folders(&self, path: &Path) -> Result<(), TierError> {
        let folder = path.parent().unwrap_or(&self.root);
        match fs::create_dir(folder) {
            Ok(()) => self.sync_folder(folder),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound && folder != self.root => {
                self.check_root(path)?;
                self.make_folders(folder)?;
                match fs::create_dir(folder) {
                    Ok(()) => self.sync_folder(folder),
                    // Made, or removed again, by another process: the caller tries anew.
                    Err(error)
                        if matches!(
                            error.kind(),
                            io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound
                        ) =>
                    {
                        Ok(())
                    }
                    Err(error) => Err(failed("write", folder, error)),
                }
            }
            Err(error) => Err(failed("write", folder, error)),
        }
    }

    /// Takes the lock under which objects are replaced; it goes with the file.
    fn lock(&self, asked: &Path) -> Result<File, TierError> {
        let path = self.root.join(PRIVATE).join("lock");
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| failed("lock", &path, error))?;
        let deadline = Instant::now() + LOCK_WAIT;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) => return Err(failed("lock", asked, error.into())),
            }
        }
    }

    /// Learns the time of the file system, which on NFS is the server's.
    pub(super) fn sample_clock(&self) {
        let sent = local_millis();
        // A directory that may not be written to is read only, and readers give no stamps.
        let Ok(mut temp) = self.new_temp() else { return };
        let sampled = temp
            .file
            .write_all(b"time")
            .and_then(|()| temp.file.sync_all())
            .and_then(|()| temp.file.metadata());
        if let Ok(meta) = sampled {
            self.observe_clock(sent, &meta);
        }
    }

    /// Removes the temporary files of crashes.
    pub(super) fn sweep_temp_files(&self) {
        let Ok(entries) = fs::read_dir(self.root.join(PRIVATE).join("tmp")) else {
            return;
        };
        let stale = |modified: SystemTime| modified.elapsed().is_ok_and(|age| age > STALE);
        for entry in entries.flatten() {
            let modified = entry.metadata().and_then(|meta| meta.modified());
            if modified.is_ok_and(stale) {
                // Another process may sweep at the same time.
                let _ = remove_if_there(&entry.path());
            }
        }
    }
}

/// Gives a file its key unless there is such an object.
fn link(temp: &Path, path: &Path) -> io::Result<()> {
    match rustix::fs::link(temp, path) {
        // File systems without hard links; the rename is as atomic.
        Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK) => {
            rustix::fs::renameat_with(CWD, temp, CWD, path, RenameFlags::NOREPLACE).map_err(Into::into)
        }
        other => other.map_err(Into::into),
    }
}
