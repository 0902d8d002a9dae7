//! Walks the objects of the bucket, and says of each what becomes of it.
//!
//! # Invariants
//!
//! - Nothing is deleted that no due list has, or that was written within a window before that list was begun.
//! - Nothing is deleted when the references are half a window old.

use tokio::task::JoinSet;

use super::{SweepError, SweepReport, asking::Asking, marks::Marks, report::Progress, state::State};
use crate::{
    base::digest::Digest,
    store::pack,
    tier::{
        DELETE_BATCH, ObjectMeta, TierError, layout,
        sweeping::{MAX_CONDEMNED, mark},
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

/// Decides what becomes of an unused object.
fn fate(object: &ObjectMeta, digest: &Digest, state: &State, began: u64) -> Fate {
    if object.modified_millis.saturating_add(state.window_millis) > began {
        return Fate::Young;
    }
    let is_due = state.due.iter().any(|(_, list)| {
        list.has(digest) && object.modified_millis.saturating_add(list.window_millis) <= list.began_millis
    });
    if is_due {
        Fate::Delete
    } else if state.waiting.iter().any(|(_, list)| list.has(digest)) {
        Fate::Waiting
    } else {
        Fate::Condemn
    }
}

/// What a walk found.
pub struct Found {
    /// Of what is to be condemned.
    pub marks: Vec<u64>,
    pub amounts: SweepReport,
}

/// A walk over all objects.
pub struct Walk<'a> {
    asking: &'a Asking,
    state: &'a State,
    used: &'a Marks,
    began: u64,
    dry_run: bool,
    marks: Vec<u64>,
    amounts: SweepReport,
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
            amounts: SweepReport::default(),
            batch: Vec::new(),
        }
    }

    /// Looks at every object; deletes what may go.
    pub async fn run(&mut self, tell: &mut (dyn FnMut(&Progress) + Send)) -> Result<(), SweepError> {
        for prefix in [layout::BLOB_PREFIX, layout::PACKS_PREFIX] {
            let mut after = None;
            loop {
                let (objects, more) = self.asking.page(prefix, &mut after).await?;
                self.page(objects).await?;
                tell(&Progress {
                    step: "looking at objects",
                    done: self.amounts.all.objects,
                    total: None,
                });
                if !more {
                    break;
                }
            }
        }
        self.delete(1).await
    }

    pub fn finish(self) -> Found {
        Found {
            marks: self.marks,
            amounts: self.amounts,
        }
    }

    async fn page(&mut self, objects: Vec<ObjectMeta>) -> Result<(), SweepError> {
        let mut unused = Vec::new();
        for object in objects {
            // What has no digest in its key is not ours.
            let Some(digest) = layout::object_digest(&object.key) else {
                continue;
            };
            self.amounts.all.add(object.size);
            if self.used.has(mark(&digest)) {
                self.amounts.used.add(object.size);
                continue;
            }
            match fate(&object, &digest, self.state, self.began) {
                Fate::Young => self.amounts.young.add(object.size),
                Fate::Waiting => self.amounts.waiting.add(object.size),
                fate @ (Fate::Delete | Fate::Condemn) => unused.push((object, digest, fate)),
            }
        }
        let used = self.used_packs(&unused).await?;
        for (index, (object, digest, fate)) in unused.into_iter().enumerate() {
            if used.contains(&index) {
                self.amounts.used.add(object.size);
            } else if fate == Fate::Delete {
                self.amounts.deleted.add(object.size);
                self.batch.push(object.key);
                self.delete(DELETE_BATCH).await?;
            } else if self.marks.len() == MAX_CONDEMNED {
                self.amounts.left.add(object.size);
            } else {
                self.amounts.condemned.add(object.size);
                self.marks.push(mark(&digest));
            }
        }
        Ok(())
    }

    /// Which of the objects are packs that have something in use.
    async fn used_packs(&self, unused: &[(ObjectMeta, Digest, Fate)]) -> Result<Vec<usize>, SweepError> {
        let packs = unused.iter().enumerate();
        let packs = packs.filter(|(_, (object, ..))| object.key.starts_with(layout::PACKS_PREFIX));
        let packs: Vec<_> = packs
            .map(|(index, (object, digest, _))| (index, object.key.clone(), *digest))
            .collect();
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
                if members?.is_none_or(is_used) {
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
        let object = ObjectMeta {
            key: layout::blob(&digest),
            size: 1,
            modified_millis: modified,
        };
        fate(&object, &digest, &state, began)
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
