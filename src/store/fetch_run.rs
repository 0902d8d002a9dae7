//! Several chunks of a blob by one request: neighbours in the blob that are neighbours in their pack.
//!
//! A run is what a sequential reader gets. It shares the flights of its chunks with whoever wants
//! one of them meanwhile. A run is tried once: when anything about it is not as it should be, its chunks
//! are asked for one by one, by `fetch_chunk`, which knows what to do about each kind of trouble.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use tokio::{
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tracing::debug;

use super::{
    StoreError,
    blobs::Blob,
    fetch_chunk::{ChunkFetcher, Failure, blocking, no_answer, unpacked_and_checked},
    pack::{MAX_PACKED_BYTES, PackPlace},
};
use crate::{
    base::{
        chunk::{ChunkList, MAX_CHUNK_BYTES},
        digest::Digest,
    },
    tier::{Object, layout},
};

/// The chunks that a request brought, by their index.
pub(super) type Brought = Arc<[(usize, Bytes)]>;

/// `places` are those of the chunks `wanted`.
fn split(
    list: &ChunkList,
    wanted: Range<usize>,
    places: &[Option<PackPlace>],
    is_here: impl Fn(usize) -> bool,
) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for index in wanted.clone().filter(|&index| !is_here(index)) {
        let place = |index: usize| places[index - wanted.start];
        let fits = |run: &Range<usize>| {
            let adjoins = run.end == index
                && place(index - 1)
                    .zip(place(index))
                    .is_some_and(|(before, this)| before.touches(&this));
            adjoins && list.start(index + 1) - list.start(run.start) <= MAX_PACKED_BYTES
        };
        match runs.last_mut() {
            Some(run) if fits(run) => run.end += 1,
            _ => runs.push(index..index + 1),
        }
    }
    runs
}

impl ChunkFetcher {
    /// Splits those of `wanted` that are not here into runs that one request can bring.
    pub(super) fn runs(&self, blob: &Blob, wanted: Range<usize>) -> Result<Vec<Range<usize>>, StoreError> {
        self.runs_without(blob, wanted, |_| false)
    }

    /// The same without what is on its way for others already.
    pub(super) fn runs_ahead(
        &self,
        blob: &Blob,
        wanted: Range<usize>,
    ) -> Result<Vec<Range<usize>>, StoreError> {
        let comes = |index| self.fills.is_under_way(&(blob.digest(), index));
        self.runs_without(blob, wanted, comes)
    }

    /// Extends `wanted` by what follows it in the pack of its last chunk, to twice its length at the most.
    pub(super) fn to_end_of_pack(
        &self,
        blob: &Blob,
        wanted: Range<usize>,
    ) -> Result<Range<usize>, StoreError> {
        let chunks = blob.chunks().chunks();
        let mut until = wanted.end;
        let place = |index: usize| {
            let row = self.ledger.chunk(&chunks[index].digest)?;
            Ok::<_, StoreError>(row.and_then(|row| row.place))
        };
        let mut last = place(until - 1)?;
        while let Some(before) = last
            && until < chunks.len()
            && until - wanted.end < wanted.len()
        {
            let next = place(until)?;
            if !next.is_some_and(|next| before.touches(&next)) {
                break;
            }
            last = next;
            until += 1;
        }
        Ok(wanted.start..until)
    }

    fn runs_without(
        &self,
        blob: &Blob,
        wanted: Range<usize>,
        skipped: impl Fn(usize) -> bool,
    ) -> Result<Vec<Range<usize>>, StoreError> {
        let mut places = Vec::with_capacity(wanted.len());
        for index in wanted.clone() {
            // What may be here after all is looked at before the bucket is asked, by itself.
            let row = if blob.file.doubts_chunk(index) {
                None
            } else {
                self.ledger.chunk(&blob.chunks().chunks()[index].digest)?
            };
            places.push(row.and_then(|row| row.place));
        }
        let is_here = |index| blob.has_chunk(index) || skipped(index);
        Ok(split(blob.chunks(), wanted, &places, is_here))
    }

    /// Like [`Self::run`], for nobody in particular: gives way to readers, says nothing of failures.
    pub(super) async fn run_ahead(self: Arc<Self>, blob: Arc<Blob>, run: Range<usize>) {
        if run.len() == 1 {
            return self.chunk_ahead(blob, run.start).await;
        }
        let Ok(_places) = self.ahead.acquire_many(weight(blob.chunks(), &run)).await else {
            return;
        };
        if self.was_full_lately() {
            return;
        }
        if let Err(failure) = self.bring(&blob, run.clone()).await {
            debug!(blob = %blob.digest(), chunks = ?run, ?failure, "readahead failed");
        }
    }

    /// Makes the chunks of a run resident, as far as the disk takes them.
    pub(super) async fn run(self: Arc<Self>, blob: Arc<Blob>, run: Range<usize>) -> Result<(), StoreError> {
        if run.len() == 1 {
            return self.chunk(&blob, run.start, self.deadline()).await.map(drop);
        }
        self.bring(&blob, run).await.map_err(|failure| {
            let error = failure.of_blob(blob.digest());
            self.report(&error);
            error
        })
    }

    /// Flies every chunk of the run, the first failure is told.
    async fn bring(self: &Arc<Self>, blob: &Arc<Blob>, run: Range<usize>) -> Result<(), Failure> {
        let deadline = self.deadline();
        let mut flights = JoinSet::new();
        for index in run.clone() {
            let (fetcher, blob, run) = (Arc::clone(self), Arc::clone(blob), run.clone());
            flights.spawn(async move {
                let fill = fetcher.fill_by_run(&blob, index, run, deadline);
                let filled = fetcher.fills.run((blob.digest(), index), fill);
                timeout_at(deadline, filled).await
            });
        }
        let mut result = Ok(());
        while let Some(done) = flights.join_next().await {
            // A run does not panic, and is aborted only with the runtime.
            let Ok(filled) = done else { continue };
            result = result.and(filled.unwrap_or_else(|_| Err(no_answer_in(&run))).map(drop));
        }
        result
    }

    async fn fill_by_run(
        &self,
        blob: &Arc<Blob>,
        index: usize,
        run: Range<usize>,
        deadline: Instant,
    ) -> Result<Bytes, Failure> {
        let key = (blob.digest(), run.start, run.end);
        let brought = self.runs.run(key, self.fetch_run(blob, run)).await;
        let found = brought.iter().find(|(brought, _)| *brought == index);
        if let Some((_, bytes)) = found {
            return Ok(bytes.clone());
        }
        let chunk = blob.chunks().chunks()[index].digest;
        self.fill(blob, index, chunk, deadline).await
    }

    /// Makes one request for what is not here of a run, checks and keeps its chunks; nothing comes of
    /// trouble of any kind.
    async fn fetch_run(&self, blob: &Arc<Blob>, run: Range<usize>) -> Brought {
        self.try_run(blob, run).await.unwrap_or_default()
    }

    async fn try_run(&self, blob: &Arc<Blob>, run: Range<usize>) -> Option<Brought> {
        let list = blob.chunks();
        let run = lacking(run, |index| blob.has_chunk(index));
        let places: Option<Vec<_>> = run
            .clone()
            .map(|index| self.place(&list.chunks()[index].digest).ok().flatten())
            .collect();
        let places = places?;
        if !places.windows(2).all(|pair| pair[0].touches(&pair[1])) {
            return None;
        }
        let range = places.first()?.range().start..places.last()?.range().end;
        let key = layout::pack(&places.first()?.pack);
        let _permit = self.requests.acquire_many(weight(list, &run)).await.ok()?;
        let get = self
            .bucket
            .get(&key, Some(range.clone()), range.end - range.start);
        let object = timeout(self.attempt_time(), get).await.ok()?.ok()??;
        if object.bytes.len() as u64 != range.end - range.start {
            return None;
        }
        // As they are in the pack, the chunks are as they are in the blob.
        let kept = if places.iter().all(|place| !place.zstd) {
            self.take_raw(blob, run, object).await
        } else {
            self.take_packed(blob, run, places, object).await
        };
        if kept.is_none() {
            self.wrong_answer(&key, 1);
        }
        kept
    }

    /// Takes in chunks that are stored as they are: hashed two at a time, served before they are
    /// written, and written by one write. `None` if they are wrong.
    async fn take_raw(&self, blob: &Arc<Blob>, run: Range<usize>, object: Object) -> Option<Brought> {
        let list = blob.chunks();
        let bytes = object.bytes;
        let start = list.start(run.start);
        if bytes.len() as u64 != list.start(run.end) - start {
            return None;
        }
        let (read, of, chunks) = (bytes.clone(), run.clone(), Arc::clone(blob));
        let right = blocking(move || {
            let list = chunks.chunks();
            let parts: Vec<&[u8]> = of
                .clone()
                .map(|index| {
                    &read[(list.start(index) - start) as usize..(list.start(index + 1) - start) as usize]
                })
                .collect();
            let expected = list.chunks()[of].iter().map(|chunk| chunk.digest);
            expected.eq(Digest::of_each(&parts))
        });
        if !right.await {
            return None;
        }
        self.count_transfer(object.transferred_bytes);
        self.fresh.put(blob.digest(), start, bytes.clone());
        let (disk, into) = (self.disk.clone(), Arc::clone(blob));
        let (kept, of) = (bytes.clone(), run.clone());
        self.note_stored(blocking(move || disk.store(&into, of, &kept)).await);
        let mut brought = Vec::with_capacity(run.len());
        for index in run.clone() {
            let from = (list.start(index) - start) as usize;
            let chunk = bytes.slice(from..from + list.chunks()[index].len as usize);
            self.count_arrival(chunk.len() as u64, 0);
            self.note_kept(blob, index, &chunk);
            brought.push((index, chunk));
        }
        Some(brought.into())
    }

    /// Takes in chunks some of which are compressed. `None` if any is wrong.
    async fn take_packed(
        &self,
        blob: &Arc<Blob>,
        run: Range<usize>,
        places: Vec<PackPlace>,
        object: Object,
    ) -> Option<Brought> {
        let start = places.first()?.range().start;
        let (disk, into) = (self.disk.clone(), Arc::clone(blob));
        let chunks = blocking(move || {
            let mut kept = Vec::with_capacity(places.len());
            for (index, place) in run.zip(&places) {
                let chunk = into.chunks().chunks()[index];
                let from = (place.range().start - start) as usize;
                let stored = object.bytes.slice(from..from + place.stored_len as usize);
                let bytes = unpacked_and_checked(stored, Some(*place), chunk.digest, u64::from(chunk.len))?;
                let stored = if into.has_chunk(index) {
                    Ok(())
                } else {
                    disk.store(&into, index..index + 1, &bytes)
                };
                kept.push((index, bytes, u64::from(place.stored_len), stored));
            }
            Some(kept)
        });
        let kept = chunks.await?;
        let mut brought = Vec::with_capacity(kept.len());
        for (index, bytes, transferred, stored) in kept {
            self.count_arrival(bytes.len() as u64, transferred);
            self.note_stored(stored);
            self.note_kept(blob, index, &bytes);
            brought.push((index, bytes));
        }
        Some(brought.into())
    }
}

fn no_answer_in(run: &Range<usize>) -> Failure {
    Failure::Unreachable(Arc::new(no_answer(format!(
        "chunks {} to {}",
        run.start,
        run.end - 1
    ))))
}

/// What is left of a run without the chunks at its ends that came by another way meanwhile.
fn lacking(run: Range<usize>, is_here: impl Fn(usize) -> bool) -> Range<usize> {
    let start = run.clone().find(|&index| !is_here(index)).unwrap_or(run.end);
    let end = (start..run.end)
        .rfind(|&index| !is_here(index))
        .map_or(start, |last| last + 1);
    start..end
}

/// A run counts as one chunk for each 2 MiB.
fn weight(list: &ChunkList, run: &Range<usize>) -> u32 {
    let bytes = list.start(run.end) - list.start(run.start);
    bytes.div_ceil(u64::from(MAX_CHUNK_BYTES)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::chunk::Chunk;

    const MIB: u32 = 1 << 20;

    fn list(count: usize) -> ChunkList {
        let chunk = Chunk {
            digest: Digest::EMPTY,
            len: MIB,
        };
        ChunkList::new(vec![chunk; count])
    }

    fn place(pack: u8, number: u32) -> PackPlace {
        PackPlace {
            pack: Digest::of(&[pack]),
            offset: number * MIB,
            stored_len: MIB,
            zstd: false,
        }
    }

    #[test]
    fn what_came_meanwhile_is_not_brought_again() {
        assert_eq!(
            lacking(3..8, |index| index == 3 || index == 5 || index == 7),
            4..7
        );
        assert_eq!(lacking(3..8, |_| false), 3..8);
        assert!(lacking(3..8, |_| true).is_empty());
    }

    #[test]
    fn a_run_ends_where_its_pack_ends_or_a_chunk_is_here_or_it_is_long() {
        let list = list(12);
        let mut places = [(1, 0), (1, 1), (2, 0), (2, 2)]
            .map(|(pack, number)| Some(place(pack, number)))
            .to_vec();
        places.extend([None, None]);
        places.extend((0..6).map(|number| Some(place(3, number))));
        let runs = split(&list, 0..12, &places, |_| false);
        assert_eq!(runs, [0..2, 2..3, 3..4, 4..5, 5..6, 6..10, 10..12]);
        let runs = split(&list, 6..12, &places[6..], |index| index == 8);
        assert_eq!(runs, [6..8, 9..12]);
    }
}
