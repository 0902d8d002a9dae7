//! Looks at a cache directory from outside, without taking it into use.
//!
//! Reads the files that [`super::cachedir`] specifies and changes nothing. What
//! it says can be outdated at once; only opening the directory decides.

use std::{fs::File, io, path::Path};

use rustix::{fs::FlockOperation, io::Errno};

use super::{
    StoreError,
    cachedir::{Binding, read_binding},
};

/// What a cache directory belongs to; `None` if it was never used.
pub fn binding(dir: &Path) -> Result<Option<Binding>, StoreError> {
    // Written last: without it the rest may be half there.
    if !dir.join("format").exists() {
        return Ok(None);
    }
    read_binding(dir)
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
    use std::fs;

    use super::*;
    use crate::base::id::StoreId;

    #[test]
    fn a_directory_tells_whose_it_is_once_it_was_used() {
        let dir = tempfile::tempdir().unwrap();
        let store = StoreId(7);
        let json = format!(r#"{{"machine":"00000000000000ab","store":"{store}","host":{{}}}}"#);
        let bound_store = || binding(dir.path()).map(|found| found.map(|found| found.store));
        assert_eq!(binding(&dir.path().join("no")).unwrap(), None);
        fs::write(dir.path().join("machine.json"), json).unwrap();
        assert_eq!(bound_store().unwrap(), None);
        fs::write(dir.path().join("format"), "casmount cache 1\n").unwrap();
        assert_eq!(bound_store().unwrap(), Some(store));
        fs::write(dir.path().join("machine.json"), "{").unwrap();
        assert!(matches!(bound_store(), Err(StoreError::Unusable { .. })));
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
