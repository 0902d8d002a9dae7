//! Results of the vfs as answers to the kernel.

use std::time::Duration;

use fuser::{
    BackingId, Errno, FileHandle, FopenFlags, Generation, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
};

use super::{convert, turns};
use crate::vfs::{Attr, FsStat, Opened, VfsError};

pub(super) fn entry(reply: ReplyEntry, result: Result<Option<Attr>, VfsError>) {
    entry_for(reply, result, &super::front::TTL);
}

pub(super) fn entry_for(reply: ReplyEntry, result: Result<Option<Attr>, VfsError>, ttl: &Duration) {
    turns::answering();
    match result {
        Ok(Some(attr)) => reply.entry(ttl, &convert::attr(&attr), Generation(0)),
        Ok(None) => reply.entry(ttl, &convert::no_entry(), Generation(0)),
        Err(err) => reply.error(convert::errno(&err)),
    }
}

pub(super) fn attr(reply: ReplyAttr, result: Result<Attr, VfsError>) {
    turns::answering();
    match result {
        Ok(attr) => reply.attr(&super::front::TTL, &convert::attr(&attr)),
        Err(err) => reply.error(convert::errno(&err)),
    }
}

pub(super) fn empty(reply: ReplyEmpty, result: Result<(), VfsError>) {
    turns::answering();
    match result {
        Ok(()) => reply.ok(),
        Err(err) => reply.error(convert::errno(&err)),
    }
}

pub(super) fn data(reply: ReplyData, result: Result<impl AsRef<[u8]>, VfsError>) {
    turns::answering();
    match result {
        Ok(data) => reply.data(data.as_ref()),
        Err(err) => {
            tracing::debug!(error = %err, "a read failed");
            reply.error(convert::errno(&err));
        }
    }
}

pub(super) fn xattr(reply: ReplyXattr, size: u32, result: Result<Vec<u8>, VfsError>) {
    turns::answering();
    match result {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(err) => reply.error(convert::errno(&err)),
    }
}

pub(super) fn open(reply: ReplyOpen, result: Result<Opened, VfsError>) {
    turns::answering();
    match result {
        Err(err) => reply.error(convert::errno(&err)),
        Ok(opened) => {
            let (handle, flags) = (FileHandle(opened.handle), open_flags(&opened));
            match backing(&opened) {
                Some(id) => reply.opened_passthrough(handle, flags, id),
                None => reply.opened(handle, flags),
            }
        }
    }
}

/// `keep_entries`: those that the kernel has of the directory are still right.
pub(super) fn open_dir(reply: ReplyOpen, keep_entries: bool) {
    turns::answering();
    let mut flags = FopenFlags::FOPEN_CACHE_DIR;
    flags.set(FopenFlags::FOPEN_KEEP_CACHE, keep_entries);
    reply.opened(FileHandle(0), flags);
}

pub(super) fn create(reply: ReplyCreate, attr: &Attr, opened: &Opened) {
    turns::answering();
    let handle = FileHandle(opened.handle);
    // The name of a file that was created waits to be told anyway, so its last close, which
    // needs no answer, records soon enough what was written: one request less. A file that was
    // there is another matter: that it changed must not be missed, or the program be told.
    let flags = if opened.created {
        open_flags(opened) | FopenFlags::FOPEN_NOFLUSH
    } else {
        open_flags(opened)
    };
    let attr = convert::attr(attr);
    match backing(opened) {
        Some(id) => reply.created_passthrough(&super::front::TTL, &attr, Generation(0), handle, flags, id),
        None => reply.created(&super::front::TTL, &attr, Generation(0), handle, flags),
    }
}

/// What the front lent to the kernel; loans are only ever made by it.
fn backing(opened: &Opened) -> Option<&BackingId> {
    opened
        .loan
        .as_ref()
        .and_then(|loan| loan.downcast_ref::<BackingId>())
}

fn open_flags(opened: &Opened) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    if opened.keep_cache && opened.loan.is_none() {
        flags |= FopenFlags::FOPEN_KEEP_CACHE;
    }
    if !opened.write {
        // A close of a reader is of no interest: one request less.
        flags |= FopenFlags::FOPEN_NOFLUSH;
    }
    flags
}

pub(super) fn written(reply: ReplyWrite, result: Result<u32, VfsError>) {
    turns::answering();
    match result {
        Ok(bytes) => reply.written(bytes),
        Err(err) => reply.error(convert::errno(&err)),
    }
}

pub(super) fn offset(reply: ReplyLseek, result: Result<u64, VfsError>) {
    turns::answering();
    match result {
        Ok(at) => reply.offset(at as i64),
        Err(err) => reply.error(convert::errno(&err)),
    }
}

pub(super) fn stat_fs(reply: ReplyStatfs, result: Result<FsStat, VfsError>) {
    turns::answering();
    match result {
        Err(err) => reply.error(convert::errno(&err)),
        Ok(fs) => reply.statfs(
            fs.blocks,
            fs.free,
            fs.available,
            fs.files,
            fs.free_files,
            fs.block_bytes,
            fs.name_max,
            fs.block_bytes,
        ),
    }
}
