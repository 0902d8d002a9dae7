//! Reading and writing what the kernel does not do by itself.

use std::{
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    sync::Arc,
};

use bytes::Bytes;
use rustix::fs::{FallocateFlags, SeekFrom};

use super::{
    Vfs, VfsError,
    handle::{Handle, Serving},
};
use crate::store::{StoreError, blobs::Blob, fetch::Here};

/// What `st_blocks` counts, see stat(2).
const BLOCK_BYTES: u64 = 512;

/// What `SEEK_DATA` and `SEEK_HOLE` of lseek(2) look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    Data,
    Hole,
}

/// The bytes of an open inode, taken out of its lock.
enum Bytesource {
    Empty,
    File(Arc<File>),
    Blob(Arc<Blob>),
}

impl Vfs {
    /// Reads bytes that are on this machine, with `buffer` for those that are on its disk; `None` when
    /// some must be fetched first, with [`Vfs::read_fetching`]. Short only at the end of the file.
    pub fn read_resident<'a>(
        &self,
        handle: u64,
        offset: u64,
        len: usize,
        buffer: &'a mut Vec<u8>,
    ) -> Result<Option<Here<'a>>, VfsError> {
        let open = self.handle(handle)?;
        match source(&open)? {
            Bytesource::Empty => Ok(Some(Here::Read(&[]))),
            Bytesource::File(file) => {
                read_file(&file, offset, len, buffer)?;
                Ok(Some(Here::Read(buffer)))
            }
            // The fetcher sees every read, to fetch ahead of the reader.
            Bytesource::Blob(blob) => {
                let fetcher = &self.store.fetcher;
                Ok(fetcher.read_resident(&blob, &open.cursor, offset, len, buffer)?)
            }
        }
    }

    /// Reads bytes, bringing those that are not here; bounded by the read timeout.
    pub async fn read_fetching(&self, handle: u64, offset: u64, len: usize) -> Result<Bytes, VfsError> {
        let open = self.handle(handle)?;
        let blob = match source(&open)? {
            Bytesource::Empty => return Ok(Bytes::new()),
            // A writer came meanwhile and brought the whole.
            Bytesource::File(file) => {
                let mut bytes = Vec::new();
                read_file(&file, offset, len, &mut bytes)?;
                return Ok(bytes.into());
            }
            Bytesource::Blob(blob) => blob,
        };
        match self.store.fetcher.read(&blob, &open.cursor, offset, len).await {
            Err(err @ StoreError::Missing { .. }) => {
                self.lose(open.node.ino, blob.digest())?;
                Err(err.into())
            }
            Err(err) => Err(self.failed(open.node.ino, err)),
            Ok(bytes) => {
                self.used();
                Ok(bytes)
            }
        }
    }

    /// Writes bytes to the staging file of an open file.
    ///
    /// The kernel serialises appends of one machine and gives their offsets: it alone knows which writes are some, as
    /// a descriptor can change its mind (`F_SETFL`, `RWF_NOAPPEND`).
    pub fn write(&self, handle: u64, offset: u64, data: &[u8]) -> Result<u32, VfsError> {
        let handle = self.handle(handle)?;
        let file = writable(&handle)?;
        note_written(&handle);
        self.with_room(|| data.len() as u64, || file.write_all_at(data, offset))?;
        Ok(data.len() as u32)
    }

    /// Allocates or frees space (fallocate(2)); `mode` as in the kernel's interface.
    pub fn allocate(&self, handle: u64, offset: u64, len: u64, mode: i32) -> Result<(), VfsError> {
        let handle = self.handle(handle)?;
        let flags = FallocateFlags::from_bits(mode as u32).ok_or(VfsError::NotSupported)?;
        let file = writable(&handle)?;
        // As if what the file takes lay at its start, without holes; what a call that failed could take counts then, too.
        let taken = || file.metadata().map_or(0, |meta| meta.blocks() * BLOCK_BYTES);
        let wanted = if flags.contains(FallocateFlags::PUNCH_HOLE) {
            0
        } else {
            len
        };
        let needed = || wanted.saturating_sub(taken().saturating_sub(offset));
        let allocate = || rustix::fs::fallocate(&file, flags, offset, len).map_err(std::io::Error::from);
        self.with_room_first(needed, allocate)?;
        note_written(&handle);
        Ok(())
    }

    /// Finds the next data or hole (lseek(2)); a sealed file that is not whole here is all data.
    pub fn seek(&self, handle: u64, offset: u64, what: Seek) -> Result<u64, VfsError> {
        let (file, size) = match source(&*self.handle(handle)?)? {
            Bytesource::Empty => return Err(VfsError::NoSuchOffset),
            Bytesource::File(file) => (Some(file), 0),
            Bytesource::Blob(blob) if blob.is_whole() => (Some(Arc::new(blob.file()?)), blob.size()),
            Bytesource::Blob(blob) => (None, blob.size()),
        };
        let Some(file) = file else {
            return match what {
                _ if offset >= size => Err(VfsError::NoSuchOffset),
                Seek::Data => Ok(offset),
                Seek::Hole => Ok(size),
            };
        };
        let from = match what {
            Seek::Data => SeekFrom::Data(offset),
            Seek::Hole => SeekFrom::Hole(offset),
        };
        // The descriptor's own position is of no meaning here: all else reads at offsets.
        Ok(rustix::fs::seek(&file, from).map_err(std::io::Error::from)?)
    }

    /// Copies between two open files without the bytes passing through a
    /// program (`copy_file_range(2)`); shares them where the disk's file system can.
    pub fn copy_range(
        &self,
        from: u64,
        from_offset: u64,
        to: u64,
        to_offset: u64,
        len: u64,
    ) -> Result<u64, VfsError> {
        let source = match source(&*self.handle(from)?)? {
            Bytesource::Empty => return Ok(0),
            Bytesource::File(file) => file,
            Bytesource::Blob(blob) if blob.is_whole() => Arc::new(blob.file()?),
            // The kernel falls back to reading and writing, which fetches.
            Bytesource::Blob(_) => return Err(VfsError::NotSupported),
        };
        let target = self.handle(to)?;
        let file = writable(&target)?;
        note_written(&target);
        let wanted = usize::try_from(len).unwrap_or(usize::MAX);
        let copy = || {
            let (mut from, mut to) = (from_offset, to_offset);
            rustix::fs::copy_file_range(&source, Some(&mut from), &file, Some(&mut to), wanted)
                .map_err(std::io::Error::from)
        };
        // Who copies a file asks for as much as there can be.
        let there = source.metadata().map_or(0, |meta| meta.len());
        let copied = self.with_room(|| len.min(there.saturating_sub(from_offset)), copy)?;
        Ok(copied as u64)
    }
}

/// The staging file of a handle that writes.
pub(super) fn writable(handle: &Handle) -> Result<Arc<File>, VfsError> {
    match &handle.node.lock().serving {
        Serving::Staging { file, .. } if handle.write => Ok(Arc::clone(file)),
        _ => Err(VfsError::BadHandle),
    }
}

/// What was done through a handle is a change of its file.
pub(super) fn note_written(handle: &Handle) {
    handle.node.lock().written = true;
}

fn source(handle: &Handle) -> Result<Bytesource, VfsError> {
    let state = handle.node.lock();
    Ok(match &state.serving {
        Serving::Nothing => return Err(VfsError::BadHandle),
        Serving::Empty => Bytesource::Empty,
        Serving::Staging { file, .. } => Bytesource::File(Arc::clone(file)),
        Serving::Blob { blob, .. } => Bytesource::Blob(Arc::clone(blob)),
    })
}

/// Reads what there is of `len` bytes, in place of what `bytes` holds.
fn read_file(file: &File, offset: u64, len: usize, bytes: &mut Vec<u8>) -> Result<(), VfsError> {
    bytes.resize(len, 0);
    let mut filled = 0;
    while filled < len {
        match file.read_at(&mut bytes[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err.into()),
        }
    }
    bytes.truncate(filled);
    Ok(())
}
