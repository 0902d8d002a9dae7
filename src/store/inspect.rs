//! Looks at a cache directory from outside, without taking it into use.
//!
//! Reads the files that [`super::cachedir`] specifies and changes nothing. What
//! it says can be outdated at once; only opening the directory decides.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use rustix::{fs::FlockOperation, io::Errno};
use serde::Deserialize;

use super::StoreError;
use crate::base::id::StoreId;

/// The store that a cache directory belongs to; `None` if it was never used.
pub fn bound_store(dir: &Path) -> Result<Option<StoreId>, StoreError> {
    #[derive(Deserialize)]
    struct Binding {
        store: StoreId,
    }
    // Written last: without it the rest may be half there.
    if !dir.join("format").exists() {
        return Ok(None);
    }
    let path = dir.join("machine.json");
    let bytes = fs::read(&path).map_err(|source| StoreError::Disk {
        verb: "read",
        path: path.clone(),
        source,
    })?;
    let binding: Binding = serde_json::from_slice(&bytes).map_err(|err| StoreError::Unusable {
        why: format!("{} is damaged: {err}", path.display()),
    })?;
    Ok(Some(binding.store))
}

/// Whether a daemon holds a cache directory just now.
///
/// Takes the lock for a moment, shared, if it is free: a daemon that starts
/// within this moment is refused, so this is for a user who looks, not for a loop.
pub fn is_in_use(dir: &Path) -> Result<bool, StoreError> {
    let path = dir.join("lock");
    let failed = |source: io::Error| StoreError::Disk {
        verb: "look at",
        path: path.clone(),
        source,
    };
    let lock = match File::open(&path) {
        Ok(lock) => lock,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(err) => return Err(failed(err)),
    };
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(err) => Err(failed(err.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_tells_whose_it_is_once_it_was_used() {
        let dir = tempfile::tempdir().unwrap();
        let store = StoreId(7);
        let json = format!(r#"{{"machine":"00000000000000ab","store":"{store}","host":{{}}}}"#);
        assert_eq!(bound_store(&dir.path().join("no")).unwrap(), None);
        fs::write(dir.path().join("machine.json"), json).unwrap();
        assert_eq!(bound_store(dir.path()).unwrap(), None);
        fs::write(dir.path().join("format"), "casmount cache 1\n").unwrap();
        assert_eq!(bound_store(dir.path()).unwrap(), Some(store));
        fs::write(dir.path().join("machine.json"), "{").unwrap();
        assert!(matches!(
            bound_store(dir.path()),
            Err(StoreError::Unusable { .. })
        ));
    }

    #[test]
    fn a_held_lock_is_seen_and_a_free_one_is_left_free() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_in_use(dir.path()).unwrap());
        let lock = File::create(dir.path().join("lock")).unwrap();
        assert!(!is_in_use(dir.path()).unwrap());
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        assert!(is_in_use(dir.path()).unwrap());
    }
}
