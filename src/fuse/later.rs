//! Requests about directories that may have to be loaded from a catalog first.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, sync::Arc};

use fuser::{Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use super::{convert, front::Front, lookup};
use crate::{
    store::rows::Ino,
    vfs::{DirPage, Vfs, VfsError},
};

impl Front {
    /// Answers in place; when a directory is not loaded, from a task that loads it first.
    ///
    /// `act` gets `names` again then, because those of the request are gone by that time.
    pub(super) fn with_loaded<R, T, const N: usize>(
        &self,
        vfs: &Arc<Vfs>,
        reply: R,
        names: [&[u8]; N],
        answer: impl FnOnce(R, Result<T, VfsError>) + Send + 'static,
        act: impl Fn(&Vfs, [&[u8]; N]) -> Result<T, VfsError> + Send + Sync + 'static,
    ) where
        R: Send + 'static,
        T: Send + 'static,
    {
        match act(vfs, names) {
            Err(err) if err.not_loaded().is_some() => {
                let names = names.map(<[u8]>::to_vec);
                let (vfs, ending) = (Arc::clone(vfs), self.hold.ending());
                self.runtime.spawn(async move {
                    let loaded = vfs.with_loaded(|vfs| act(vfs, names.each_ref().map(Vec::as_slice)));
                    let result = ending.or(loaded).await;
                    answer(reply, result);
                });
            }
            result => answer(reply, result),
        }
    }
}

pub(super) fn directory(mut reply: ReplyDirectory, page: Result<DirPage, VfsError>) {
    match page {
        Err(err) => reply.error(convert::errno(&err)),
        Ok(entries) => {
            for entry in entries {
                let kind = convert::file_type(entry.kind);
                let name = OsStr::from_bytes(&entry.name);
                if reply.add(INodeNo(entry.ino.0), entry.next_offset, kind, name) {
                    break;
                }
            }
            reply.ok();
        }
    }
}

pub(super) fn directory_plus(
    vfs: &Vfs,
    dir: Ino,
    mut reply: ReplyDirectoryPlus,
    page: Result<DirPage, VfsError>,
) {
    let mut entries = match page {
        Err(err) => return reply.error(convert::errno(&err)),
        Ok(entries) => entries,
    };
    // An answer without entries is the end of the directory: a page whose names all went since they were listed is not.
    while let Some(next) = entries.last().map(|entry| entry.next_offset) {
        let mut answered = false;
        for entry in entries {
            let (attr, ttl) = match vfs.entry_attr(dir, &entry) {
                Err(err) => return reply.error(convert::errno(&err)),
                Ok(None) => continue,
                Ok(Some((attr, keep))) => (convert::attr(&attr), lookup::ttl(keep)),
            };
            let name = OsStr::from_bytes(&entry.name);
            answered = true;
            if reply.add(attr.ino, entry.next_offset, name, &ttl, &attr, Generation(0)) {
                break;
            }
        }
        if answered {
            break;
        }
        entries = match vfs.read_dir(dir, next) {
            Err(err) => return reply.error(convert::errno(&err)),
            Ok(entries) => entries,
        };
    }
    reply.ok();
}
