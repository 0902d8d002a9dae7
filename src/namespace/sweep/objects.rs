//! Walks the objects of the bucket, and says of each what becomes of it.
//!
//! # Invariants
//!
//! - Nothing is deleted that no due list has, or that was written within a window before that list was begun.
//! - Nothing is deleted when the references are half a window old.
//! - What untrusted writers put below their own prefix ends no sweep.

use tokio::task::JoinSet;

use super::{
    SweepError,
    asking::Asking,
    error::is_of_writer,
    inventory::{Meta, Volume, Volumes},
    log::Log,
    marks::Marks,
    references::References,
    report::{Counted, Progress, Sort},
    state::State,
};
use crate::{
    base::{digest::Digest, volume::VolumeName},
    store::pack,
    tier::{
        DELETE_BATCH, TierError, layout,
        sweeping::{MAX_CONDEMNED, mark, mark_of_key},
    },
};

/// Heads of packs that are asked for at once.
const HEADS: usize = 32;

/// How often the head of a pack is fetched before it counts as none.
const FETCHES: u32 = 4;

/// What becomes of an object that nothing refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Young,
    Waiting,
    Delete,
    Condemn,
}

/// An object as the lists know it.
#[derive(Clone, Debug)]
struct Candidate {
    key: String,
    mark: u64,
    meta: Meta,
    sort: Sort,
}

/// Decides what becomes of an unused object.
fn fate(object: &Candidate, state: &State, began: u64) -> Fate {
    let modified = object.meta.modified_millis;
    if modified.saturating_add(state.window_millis) > began {
        return Fate::Young;
    }
    let is_due = state.due.iter().any(|(_, list)| {
        list.has_mark(object.mark) && modified.saturating_add(list.window_millis) <= list.began_millis
    });
    if is_due {
        Fate::Delete
    } else if state.waiting.iter().any(|(_, list)| list.has_mark(object.mark)) {
        Fate::Waiting
    } else {
        Fate::Condemn
    }
}

/// What a walk found.
pub struct Found {
    /// Of what is to be condemned.
    pub marks: Vec<u64>,
    pub amounts: Counted,
}

/// Where chunks and packs are.
#[derive(Clone, Copy, Debug)]
struct Domain<'a> {
    /// Below the prefix of a volume that keeps its own; `None`: where all have theirs.
    volume: Option<(&'a VolumeName, &'a Volume)>,
}

impl Domain<'_> {
    fn prefix(self) -> String {
        self.volume
            .map_or_else(String::new, |(name, _)| layout::volume_prefix(name.as_str()))
    }

    fn mark(self, key: &str, digest: &Digest) -> u64 {
        match self.volume {
            None => mark(digest),
            Some(_) => mark_of_key(key),
        }
    }

    /// Whether nobody reads anything of it. A deletion that was broken off may have met a snapshot, which stands.
    fn is_deleted(self) -> bool {
        self.volume
            .is_some_and(|(_, volume)| volume.is_deleted() && volume.snapshots.is_empty())
    }
}

/// A walk over all objects.
pub struct Walk<'a> {
    asking: &'a Asking,
    state: &'a State,
    used: &'a Marks,
    began: u64,
    dry_run: bool,
    marks: Vec<u64>,
    amounts: Counted,
    /// To be deleted together.
    batch: Vec<String>,
}

impl<'a> Walk<'a> {
    pub fn new(asking: &'a Asking, state: &'a State, used: &'a Marks, began: u64, dry_run: bool) -> Self {
        Self {
            asking,
            state,
            used,
            began,
            dry_run,
            marks: Vec::new(),
            amounts: Counted::default(),
            batch: Vec::new(),
        }
    }

    /// Looks at every object; deletes what may go.
    pub async fn run(
        &mut self,
        volumes: &Volumes,
        references: &References,
        tell: &mut (dyn FnMut(&Progress) + Send),
    ) -> Result<(), SweepError> {
        let apart = volumes.iter().filter(|(_, volume)| volume.has_blobs);
        let apart = apart.map(|volume| Domain { volume: Some(volume) });
        let shared = Domain { volume: None };
        self.domain(shared, tell).await?;
        for (name, volume) in volumes {
            self.volume(name, volume, references).await?;
        }
        // Last: whoever is trusted less may have put there more than one pass condemns.
        for domain in apart {
            self.domain(domain, tell).await?;
        }
        self.delete(1).await
    }

    async fn domain(
        &mut self,
        domain: Domain<'_>,
        tell: &mut (dyn FnMut(&Progress) + Send),
    ) -> Result<(), SweepError> {
        for folder in [layout::BLOB_PREFIX, layout::PACKS_PREFIX] {
            self.folder(domain, folder, tell).await?;
        }
        Ok(())
    }

    async fn folder(
        &mut self,
        domain: Domain<'_>,
        folder: &str,
        tell: &mut (dyn FnMut(&Progress) + Send),
    ) -> Result<(), SweepError> {
        let prefix = domain.prefix();
        let folder = format!("{prefix}{folder}");
        let mut after = None;
        loop {
            let (objects, more) = self.asking.page(&folder, &mut after).await?;
            let mut page = Vec::with_capacity(objects.len());
            for object in objects {
                // What has no digest in its key is not ours.
                let Some(digest) = layout::object_digest(&object.key[prefix.len()..]) else {
                    continue;
                };
                let candidate = Candidate {
                    mark: domain.mark(&object.key, &digest),
                    key: object.key,
                    meta: Meta {
                        size: object.size,
                        modified_millis: object.modified_millis,
                    },
                    sort: Sort::Blob,
                };
                page.push((candidate, digest));
            }
            self.page(domain, page).await?;
            tell(&Progress {
                step: "looking at objects",
                done: self.amounts.all.all.objects,
                total: None,
            });
            if !more {
                return Ok(());
            }
        }
    }

    /// Looks at the segments and catalogs of a volume.
    async fn volume(
        &mut self,
        name: &VolumeName,
        volume: &Volume,
        references: &References,
    ) -> Result<(), SweepError> {
        let log = &references.logs[name];
        for (segment, meta) in &volume.segments {
            let is_gone = volume.is_deleted()
                || (!log.is_unsaid
                    && log.is_below_floor(*segment)
                    && !Log::is_in_view(&volume.moments, *segment)
                    && !references.uncovered.contains(&(name.clone(), *segment)));
            let key = segment.to_key(name.as_str());
            self.one(candidate(key, *meta, Sort::Segment), !is_gone).await?;
        }
        let in_snapshots = references.catalogs.get(name);
        for (catalog, meta) in &volume.catalogs {
            let key = layout::catalog(name.as_str(), catalog);
            let is_needed = log.needs(catalog) || in_snapshots.is_some_and(|kept| kept.contains(catalog));
            self.one(candidate(key, *meta, Sort::Catalog), is_needed).await?;
        }
        Ok(())
    }

    pub fn finish(self) -> Found {
        Found {
            marks: self.marks,
            amounts: self.amounts,
        }
    }

    async fn page(
        &mut self,
        domain: Domain<'_>,
        objects: Vec<(Candidate, Digest)>,
    ) -> Result<(), SweepError> {
        let may_go =
            |object: &Candidate| matches!(fate(object, self.state, self.began), Fate::Delete | Fate::Condemn);
        let is_used = |digest: &Digest| !domain.is_deleted() && self.used.has(mark(digest));
        let unused = objects
            .iter()
            .enumerate()
            .filter(|(_, (object, digest))| !is_used(digest) && may_go(object));
        let unused: Vec<_> = unused
            .map(|(index, (object, digest))| (index, object.key.clone(), *digest))
            .collect();
        let packs = if domain.is_deleted() {
            Vec::new()
        } else {
            self.used_packs(domain, unused).await?
        };
        let used: Vec<bool> = objects
            .iter()
            .enumerate()
            .map(|(index, (_, digest))| is_used(digest) || packs.contains(&index))
            .collect();
        for ((object, _), is_used) in objects.into_iter().zip(used) {
            self.one(object, is_used).await?;
        }
        Ok(())
    }

    /// Counts an object, and does with it what is to be done.
    async fn one(&mut self, object: Candidate, is_used: bool) -> Result<(), SweepError> {
        let (sort, size) = (object.sort, object.meta.size);
        self.amounts.add(sort, size, |of| &mut of.all);
        if is_used {
            self.amounts.add(sort, size, |of| &mut of.used);
            return Ok(());
        }
        match fate(&object, self.state, self.began) {
            Fate::Young => self.amounts.add(sort, size, |of| &mut of.young),
            Fate::Waiting => self.amounts.add(sort, size, |of| &mut of.waiting),
            Fate::Delete => {
                self.amounts.add(sort, size, |of| &mut of.deleted);
                self.batch.push(object.key);
                self.delete(DELETE_BATCH).await?;
            }
            Fate::Condemn if self.marks.len() == MAX_CONDEMNED => {
                self.amounts.add(sort, size, |of| &mut of.left);
            }
            Fate::Condemn => {
                self.amounts.add(sort, size, |of| &mut of.condemned);
                self.marks.push(object.mark);
            }
        }
        Ok(())
    }

    /// Which of the objects are packs that have something in use.
    async fn used_packs(
        &self,
        domain: Domain<'_>,
        unused: Vec<(usize, String, Digest)>,
    ) -> Result<Vec<usize>, SweepError> {
        let folder = domain.prefix() + layout::PACKS_PREFIX;
        let packs = unused.into_iter().filter(|(_, key, _)| key.starts_with(&folder));
        let packs: Vec<_> = packs.collect();
        let mut used = Vec::new();
        for together in packs.chunks(HEADS) {
            let mut under_way = JoinSet::new();
            for (index, key, name) in together.iter().cloned() {
                let asking = self.asking.clone();
                under_way.spawn(async move { (index, members(&asking, &key, &name).await) });
            }
            for (index, members) in under_way.join_all().await {
                // What cannot be read is kept: nobody knows what it has.
                let is_used = |members: Vec<Digest>| members.iter().any(|member| self.used.has(mark(member)));
                let members = match members {
                    Err(err) if domain.volume.is_some() && is_of_writer(&err) => None,
                    members => members?,
                };
                if members.is_none_or(is_used) {
                    used.push(index);
                }
            }
        }
        Ok(used)
    }

    /// Deletes what was gathered, when it is `least` objects.
    async fn delete(&mut self, least: usize) -> Result<(), SweepError> {
        if self.batch.len() < least {
            return Ok(());
        }
        let batch = std::mem::take(&mut self.batch);
        let window_millis = self.state.window_millis;
        if self.asking.now().saturating_sub(self.began) > window_millis / 2 {
            return Err(SweepError::Slept { window_millis });
        }
        if !self.dry_run {
            self.asking.again(|bucket| bucket.delete_many(&batch)).await?;
        }
        Ok(())
    }
}

fn candidate(key: String, meta: Meta, sort: Sort) -> Candidate {
    Candidate {
        mark: mark_of_key(&key),
        key,
        meta,
        sort,
    }
}

/// The names of what a pack holds; `None` when its head is not that of the pack of its name.
async fn members(asking: &Asking, key: &str, name: &Digest) -> Result<Option<Vec<Digest>>, TierError> {
    let mut len = pack::head_bytes(pack::MAX_MEMBERS);
    for _ in 0..FETCHES {
        let Some(object) = asking.again(|bucket| bucket.get(key, Some(0..len), len)).await? else {
            // It is gone already.
            return Ok(Some(Vec::new()));
        };
        let count = pack::read_count(&object.bytes).map_err(|version| TierError::Unsupported {
            why: format!(
                "pack {key} has version {version}, which this casmount does not know: a newer casmount is needed"
            ),
        })?;
        match count.map(pack::head_bytes) {
            // More members than this program puts into one.
            Some(needed) if needed > len && needed <= pack::MAX_OBJECT_BYTES => len = needed,
            _ => {
                // Otherwise damaged on the way, perhaps.
                if let Some(names) = pack::read_names(&object.bytes, name) {
                    return Ok(Some(names));
                }
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::sweeping::SweepList;

    const WINDOW: u64 = 100;

    fn fate_of(modified: u64, began: u64, due: Option<u64>, waiting: Option<u64>) -> Fate {
        let digest = Digest::of(b"x");
        let list = |at| SweepList::new(at, WINDOW, vec![mark(&digest)]);
        let state = State {
            window_millis: WINDOW,
            due: due.map(|at| (String::new(), list(at))).into_iter().collect(),
            waiting: waiting.map(|at| (at + WINDOW, list(at))).into_iter().collect(),
            ..State::default()
        };
        let object = Candidate {
            key: layout::blob(&digest),
            mark: mark(&digest),
            meta: Meta {
                size: 1,
                modified_millis: modified,
            },
            sort: Sort::Blob,
        };
        fate(&object, &state, began)
    }

    #[test]
    fn the_young_stay_whatever_the_lists_say() {
        assert_eq!(fate_of(901, 1000, None, None), Fate::Young);
        assert_eq!(fate_of(901, 1000, Some(800), Some(900)), Fate::Young);
        assert_eq!(fate_of(2000, 1000, Some(800), None), Fate::Young);
        assert_eq!(fate_of(900, 1000, None, None), Fate::Condemn);
    }

    #[test]
    fn only_what_a_due_list_meant_is_deleted() {
        assert_eq!(fate_of(700, 1000, Some(800), None), Fate::Delete);
        // Written again since: the list means the one before.
        assert_eq!(fate_of(701, 1000, Some(800), None), Fate::Condemn);
        assert_eq!(fate_of(700, 1000, None, Some(950)), Fate::Waiting);
        assert_eq!(fate_of(700, 1000, Some(800), Some(950)), Fate::Delete);
    }
}
