//! Reads the journal back at the start, and mends its end.
//!
//! # Policy
//!
//! - A record that is cut short or has a wrong checksum ends its file. At the end of the
//!   newest file that is what a crash in the middle of an append leaves; it is cut off.
//! - Records up to `absorbed` are in the index already and are skipped. Those behind it must follow
//!   each other without a gap. After power loss a gap is where the disk stopped keeping up: what lies behind
//!   it was never synced, and is removed. Without power loss it means damage, and an operator must look.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read},
    path::Path,
};

use super::{FILE_HEADER_BYTES, MAGIC, RECORD_HEADER_BYTES, VERSION, checksum, file_numbers, file_path};
use crate::{
    base::durable,
    store::{StoreError, record, record::Redo},
};

/// What [`replay`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// Records that the index did not have.
    pub records: u64,
    /// The newest record that is in the index or was replayed.
    pub seq: u64,
}

enum Step {
    Record(u64, Vec<Redo>),
    /// Nothing follows; `torn` when bytes that are no record do.
    End {
        torn: bool,
    },
}

/// Gives every record behind `absorbed` to `apply`, in order.
///
/// # Errors
///
/// [`StoreError::Unusable`] for a gap without power loss and for a newer
/// format; what `apply` reports.
pub fn replay(
    dir: &Path,
    absorbed: u64,
    power_lost: bool,
    mut apply: impl FnMut(u64, Vec<Redo>) -> Result<(), StoreError>,
) -> Result<Replayed, StoreError> {
    let numbers = file_numbers(dir)?;
    let mut seq = absorbed;
    for (index, &number) in numbers.iter().enumerate() {
        let path = file_path(dir, number);
        let mut reader = FileReader::open(&path)?;
        loop {
            let start = reader.offset;
            match reader.step()? {
                Step::Record(found, _) if found <= absorbed => {}
                Step::Record(found, redos) if found == seq + 1 => {
                    apply(found, redos)?;
                    seq = found;
                }
                Step::Record(found, _) if power_lost => {
                    tracing::warn!(
                        path = %path.display(), missing = seq + 1, found,
                        "the journal has a gap after power loss; what follows it was never synced and is dropped"
                    );
                    discard_from(dir, &numbers[index..], start)?;
                    return Ok(Replayed {
                        records: seq - absorbed,
                        seq,
                    });
                }
                Step::Record(found, _) => {
                    return Err(StoreError::Unusable {
                        why: format!(
                            "the journal is damaged: record {} is missing, {} goes on with record {found}; \
                             changes of this machine that were not published are lost if the cache directory is \
                             removed, so copy it before you do",
                            seq + 1,
                            path.display()
                        ),
                    });
                }
                Step::End { torn } => {
                    if torn && index + 1 == numbers.len() {
                        let dropped_bytes = reader.file_len - start;
                        tracing::warn!(path = %path.display(), dropped_bytes, "the journal ends in the middle of a record");
                        cut(&path, start)?;
                    }
                    break;
                }
            }
        }
    }
    Ok(Replayed {
        records: seq - absorbed,
        seq,
    })
}

/// Removes what lies behind `start` of the first file, and the later files,
/// the newest first: a crash in the middle leaves no second gap.
fn discard_from(dir: &Path, numbers: &[u64], start: u64) -> Result<(), StoreError> {
    for &number in numbers[1..].iter().rev() {
        let path = file_path(dir, number);
        fs::remove_file(&path).map_err(StoreError::disk("remove", &path))?;
        durable::sync_dir(dir).map_err(StoreError::disk("sync", dir))?;
    }
    cut(&file_path(dir, numbers[0]), start)
}

/// Cuts a file, durably: if the torn record came back with a later power loss,
/// it would no longer stand at the journal's end.
fn cut(path: &Path, len: u64) -> Result<(), StoreError> {
    File::options()
        .write(true)
        .open(path)
        .and_then(|file| {
            file.set_len(len)?;
            file.sync_all()
        })
        .map_err(StoreError::disk("truncate", path))
}

struct FileReader<'a> {
    path: &'a Path,
    file: BufReader<File>,
    file_len: u64,
    /// Behind the last whole record; 0 before the file's header was read.
    offset: u64,
}

impl<'a> FileReader<'a> {
    fn open(path: &'a Path) -> Result<Self, StoreError> {
        let file = File::open(path).map_err(StoreError::disk("open", path))?;
        let file_len = file.metadata().map_err(StoreError::disk("examine", path))?.len();
        Ok(Self {
            path,
            file: BufReader::with_capacity(1 << 18, file),
            file_len,
            offset: 0,
        })
    }

    /// Reads exactly `out`, or says that the file ends before.
    fn fill(&mut self, out: &mut [u8]) -> Result<bool, StoreError> {
        match self.file.read_exact(out) {
            Ok(()) => Ok(true),
            Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(err) => Err(StoreError::disk("read", self.path)(err)),
        }
    }

    fn read_file_header(&mut self) -> Result<bool, StoreError> {
        let mut header = [0; FILE_HEADER_BYTES as usize];
        if !self.fill(&mut header)? || header[..8] != MAGIC {
            return Ok(false);
        }
        let version = u32::from_le_bytes(header[8..12].try_into().expect("four bytes"));
        if version > VERSION {
            return Err(StoreError::Unusable {
                why: format!(
                    "{} was written by a newer casmount (journal format {version}, this program knows {VERSION}): \
                     use that version, or another cache directory",
                    self.path.display()
                ),
            });
        }
        self.offset = FILE_HEADER_BYTES;
        Ok(true)
    }

    fn step(&mut self) -> Result<Step, StoreError> {
        let torn = Ok(Step::End { torn: true });
        if self.offset == 0 && !self.read_file_header()? {
            return torn;
        }
        if self.offset == self.file_len {
            return Ok(Step::End { torn: false });
        }
        let mut header = [0; RECORD_HEADER_BYTES];
        if !self.fill(&mut header)? {
            return torn;
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let (len, crc) = (u64::from(word(0)), word(4));
        // A damaged length must not make us reserve memory for it.
        if len
            > self
                .file_len
                .saturating_sub(self.offset + RECORD_HEADER_BYTES as u64)
        {
            return torn;
        }
        let mut body = vec![0; 8 + len as usize];
        body[..8].copy_from_slice(&header[8..]);
        if !self.fill(&mut body[8..])? || checksum(&header[..4], &body) != crc {
            return torn;
        }
        let seq = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
        let redos = record::decode(&body[8..]).map_err(|err| StoreError::Index {
            verb: "read the journal",
            source: err.into(),
        })?;
        self.offset += RECORD_HEADER_BYTES as u64 + len;
        Ok(Step::Record(seq, redos))
    }
}
