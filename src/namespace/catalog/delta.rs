//! What changed since a catalog: the newest change of each path, sorted, in bounded memory.
//!
//! Changes come in any order, many of one path too. They are kept in memory up to `SPILL_BYTES`
//! and then written, sorted, to a file that has no name any more; in the end the files are merged.

use std::{
    collections::{BTreeMap, BinaryHeap, btree_map::Entry},
    fs::{File, OpenOptions},
    io::{self, BufReader, BufWriter, Read, Seek, Write},
    path::PathBuf,
};

use super::{format, order::Key};
use crate::{
    base::id::random_bytes,
    namespace::{
        change::{Below, Item, PathChange, Said},
        segment,
    },
};

/// About how much memory changes take before they go to a file.
const SPILL_BYTES: u64 = 24 << 20;

/// Changes of paths, the newest of each.
#[derive(Debug)]
pub struct Delta {
    newest: BTreeMap<Key, Said>,
    bytes: u64,
    runs: Vec<File>,
    /// Where files are made when memory does not do.
    dir: PathBuf,
    spill_bytes: u64,
}

impl Delta {
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self {
            newest: BTreeMap::new(),
            bytes: 0,
            runs: Vec::new(),
            dir,
            spill_bytes: SPILL_BYTES,
        }
    }

    /// Takes in one change; of two of one path the one with the greater stamp stays. Of one that was published again the
    /// last one that came stays: it tells where its bytes are by now.
    pub fn insert(&mut self, change: PathChange) -> io::Result<()> {
        let bytes = segment::estimate_bytes(&change);
        let said = Said {
            stamp: change.stamp,
            entry: change.entry,
        };
        match self.newest.entry(Key(change.path)) {
            Entry::Vacant(slot) => {
                slot.insert(said);
                self.bytes += bytes;
            }
            Entry::Occupied(mut slot) => {
                if slot.get().stamp <= said.stamp {
                    slot.insert(said);
                }
            }
        }
        if self.bytes >= self.spill_bytes {
            self.spill()?;
        }
        Ok(())
    }

    fn spill(&mut self) -> io::Result<()> {
        let mut file = BufWriter::new(nameless(&self.dir)?);
        while let Some((Key(path), said)) = self.newest.pop_last() {
            let item = Item {
                path,
                said: Some(said),
                below: Below::Nothing,
            };
            file.write_all(&format::encode_item(&item))?;
        }
        let mut file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.rewind()?;
        self.runs.push(file);
        self.bytes = 0;
        Ok(())
    }

    /// The changes from the last path to the first.
    pub fn into_sorted(self) -> io::Result<Sorted> {
        let mut sorted = Sorted {
            memory: self.newest,
            runs: self.runs.into_iter().map(BufReader::new).collect(),
            heads: BinaryHeap::new(),
            next: None,
        };
        for run in 0..=sorted.runs.len() {
            sorted.advance(run)?;
        }
        sorted.step()?;
        Ok(sorted)
    }
}

/// A file in `dir` that goes with its descriptor.
fn nameless(dir: &std::path::Path) -> io::Result<File> {
    let name = format!(".casmount-fold-{:016x}", u64::from_le_bytes(random_bytes()));
    let path = dir.join(name);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// One run's next change.
#[derive(Debug)]
struct Head {
    key: Key,
    said: Said,
    run: usize,
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key
            .cmp(&other.key)
            .then_with(|| self.said.stamp.cmp(&other.said.stamp))
            // What came last was put down last.
            .then_with(|| self.run.cmp(&other.run))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Head {}

/// The newest change of each path, from the last path to the first.
#[derive(Debug)]
pub struct Sorted {
    memory: BTreeMap<Key, Said>,
    runs: Vec<BufReader<File>>,
    heads: BinaryHeap<Head>,
    next: Option<(Key, Said)>,
}

impl Sorted {
    /// The path of the next change.
    #[must_use]
    pub fn peek(&self) -> Option<&Key> {
        self.next.as_ref().map(|(key, _)| key)
    }

    /// Takes the change that [`Self::peek`] shows.
    pub fn take(&mut self) -> io::Result<Option<(Key, Said)>> {
        let taken = self.next.take();
        self.step()?;
        Ok(taken)
    }

    fn step(&mut self) -> io::Result<()> {
        let Some(Head { key, said, run }) = self.heads.pop() else {
            return Ok(());
        };
        self.advance(run)?;
        // Older changes of the same path.
        while self.heads.peek().is_some_and(|head| head.key == key) {
            let older = self.heads.pop().map(|head| head.run);
            older.map_or(Ok(()), |run| self.advance(run))?;
        }
        self.next = Some((key, said));
        Ok(())
    }

    /// Puts the next change of a run on the heap; the run behind the last is the memory.
    fn advance(&mut self, run: usize) -> io::Result<()> {
        let head = match self.runs.get_mut(run) {
            None => self.memory.pop_last(),
            Some(file) => read(file)?,
        };
        if let Some((key, said)) = head {
            self.heads.push(Head { key, said, run });
        }
        Ok(())
    }
}

/// Reads the next item that [`Delta::spill`] wrote.
fn read(file: &mut BufReader<File>) -> io::Result<Option<(Key, Said)>> {
    let mut len = 0usize;
    let mut shift = 0;
    loop {
        let mut byte = [0];
        if file.read(&mut byte)? == 0 {
            return Ok(None);
        }
        len |= usize::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            break;
        }
        shift += 7;
    }
    let mut record = vec![0; len];
    file.read_exact(&mut record)?;
    let item = format::decode_item(&record).map_err(|err| io::Error::other(err.to_string()))?;
    Ok(item.said.map(|said| (Key(item.path), said)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{clock::Stamp, id::MachineId};

    #[test]
    fn the_newest_change_of_each_path_comes_sorted_from_memory_and_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut delta = Delta {
            spill_bytes: 5_000,
            ..Delta::new(dir.path().to_owned())
        };
        let mut expected = BTreeMap::new();
        for number in 0..500u64 {
            let path = format!("d{}/f{}", number * 7 % 5, number * 13 % 40).into_bytes();
            let stamp = Stamp {
                millis: number * 31 % 97,
                counter: number as u32,
                machine: MachineId(1),
            };
            let newest = expected.entry(Key(path.clone())).or_insert(stamp);
            *newest = stamp.max(*newest);
            delta
                .insert(PathChange {
                    path,
                    stamp,
                    entry: None,
                })
                .unwrap();
        }
        assert!(delta.runs.len() > 3, "{} files", delta.runs.len());
        let mut sorted = delta.into_sorted().unwrap();
        for (key, stamp) in expected.into_iter().rev() {
            let (found, said) = sorted.take().unwrap().unwrap();
            assert_eq!((found, said.stamp), (key, stamp));
        }
        assert!(sorted.take().unwrap().is_none());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
