//! The volumes of a store: which there are, and deleting one.
//!
//! # Deleting
//!
//! 1. A volume that another one lies over is not deleted: that one would lose what it shows. One whose own deletion
//!    is not decided counts, because it may show that again. Nor is a volume deleted with
//!    snapshots, which are for ever, until each of them is deleted ([`super::snapshot`]).
//! 2. `volume.json` is replaced by one that says `deleted_millis`, on the condition that it is still the one
//!    that was read. From here on nobody mounts, forks or promotes the volume; so what a crash leaves is
//!    never mistaken for an empty volume, nor for one that lies over nothing.
//! 3. Forks and snapshots are looked for once more: who makes one looks at the volume after it wrote the fork's or
//!    the snapshot's object, so one of both sees the other. If there is one, the old `volume.json` is put back; if
//!    there is none, `volume.json` is replaced once more, and the deletion is decided. Until then it says that it is not: what
//!    a crash leaves in between is decided by a repeat, one way or the other.
//! 4. Everything else of the volume is removed ([`Decided`]). A repeat finishes what a crash left.
//!
//! # Cost
//!
//! Looking for forks, twice in each deletion, reads the settings of every volume that lives, and of the last few that were
//! deleted: the others are known from one object ([`super::deleted`], which says what that costs). Settings are read sixteen at once.
//!
//! # What stays
//!
//! `volume.json` stays, a few hundred bytes: a machine that was suspended meanwhile may still write
//! a segment, and without it the log would look like a volume of its own. Blobs stay as well: other
//! volumes may name them, and finding out is the sweep's.

mod list;

use std::{collections::BTreeMap, sync::Arc};

use tokio::task::JoinSet;

use super::{
    deleted::{DeletedVolume, DeletedVolumes, ENOUGH},
    patience::patiently,
    snapshot,
    stack::{StackError, Standing, VolumeJson, read_json, standing},
};
use crate::{
    base::{snapshot::SnapshotTag, volume::VolumeName},
    tier::{Body, Etag, Put, SharedBucket, TierError, layout},
};

use list::{found, look_at};

pub(super) use list::live_names;
pub use list::{Listed, list, list_live};

/// Objects that are removed at once.
const PARALLEL: usize = 16;

/// How often `volume.json` may change between reading and replacing it.
const TRIES: u32 = 4;

/// A volume was not deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    #[error(transparent)]
    Stack(#[from] StackError),
    #[error("there is no volume {volume} in this store: correct the name")]
    Absent { volume: VolumeName },
    #[error("volume {volume} is no fork, and only forks can be deleted")]
    NoFork { volume: VolumeName },
    #[error("{} over volume {volume}: delete {} first", lie(forks), if forks.len() == 1 { "it" } else { "them" })]
    Covered {
        volume: VolumeName,
        forks: Vec<VolumeName>,
    },
    #[error(
        "volume {volume} has {} {}: delete {} first, with casmount snapshot delete",
        if tags.len() == 1 { "snapshot" } else { "snapshots" },
        named(tags),
        if tags.len() == 1 { "it" } else { "them" }
    )]
    Snapshots {
        volume: VolumeName,
        tags: Vec<SnapshotTag>,
    },
    #[error("the settings of volume {volume} change all the time: try again")]
    Contended { volume: VolumeName },
}

impl From<TierError> for DeleteError {
    fn from(err: TierError) -> Self {
        Self::Stack(err.into())
    }
}

fn lie(forks: &[VolumeName]) -> String {
    let names: Vec<&str> = forks.iter().map(VolumeName::as_str).collect();
    match names[..] {
        [one] => format!("volume {one} lies"),
        _ => format!("volumes {} lie", names.join(", ")),
    }
}

/// A few names help, a thousand do not.
fn named(tags: &[SnapshotTag]) -> String {
    const SHOWN: usize = 5;
    let some: Vec<&str> = tags.iter().take(SHOWN).map(SnapshotTag::as_str).collect();
    match tags.len().saturating_sub(SHOWN) {
        0 => some.join(", "),
        more => format!("{} and {more} more", some.join(", ")),
    }
}

/// What became of a volume that was deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// An earlier deletion had begun, or ended, already.
    pub again: bool,
    /// Objects that were removed now.
    pub objects: u64,
}

/// The volumes that lie directly over `volume`, or may again. Notes which are deleted for good, if many were read for it.
async fn forks_of(bucket: &SharedBucket, volume: &VolumeName) -> Result<Vec<VolumeName>, TierError> {
    let deleted = DeletedVolumes::read(bucket.as_ref()).await?;
    let mut found = found(bucket.as_ref()).await?;
    found.retain(|found| !found.is_in(&deleted));
    let all = look_at(
        bucket,
        found.iter().map(|found| found.volume.clone()).collect::<Vec<_>>(),
    )
    .await?;
    let fresh: BTreeMap<_, _> = all
        .iter()
        .zip(&found)
        .filter(|(listed, _)| !listed.is_live())
        .filter_map(|(listed, found)| {
            let of = DeletedVolume::new(found.settings.as_ref()?, listed.own_prefix);
            Some((listed.volume.clone(), of))
        })
        .collect();
    if fresh.len() >= ENOUGH {
        deleted.add(bucket.as_ref(), fresh).await;
    }
    let over = |listed: &Listed| {
        let parent = listed.parent.as_ref().map(|parent| &parent.volume);
        parent == Some(volume) && listed.is_live()
    };
    let forks = all.into_iter().filter(over).map(|listed| listed.volume);
    Ok(forks.collect())
}

/// A fork that nobody shows any more, for good; what is left of it is still there.
#[derive(Debug)]
#[must_use = "what is left of it is to be removed"]
pub struct Decided {
    volume: VolumeName,
    again: bool,
}

/// Decides that the fork `volume` is deleted, and removes nothing of it yet.
pub async fn decide(bucket: &SharedBucket, volume: &VolumeName) -> Result<Decided, DeleteError> {
    let again = match standing(bucket.as_ref(), volume).await? {
        Standing::Absent => {
            return Err(DeleteError::Absent {
                volume: volume.clone(),
            });
        }
        Standing::Plain => {
            return Err(DeleteError::NoFork {
                volume: volume.clone(),
            });
        }
        Standing::Deleted => {
            // A deletion may have been broken off before it was decided; that is made up for.
            mark(bucket, volume).await?;
            // What lies over it all the same keeps what is left, for whoever mends that by hand.
            refuse_if_needed(bucket, volume).await?;
            true
        }
        Standing::Fork(..) => {
            refuse_if_needed(bucket, volume).await?;
            mark(bucket, volume).await?;
            false
        }
    };
    Ok(Decided {
        volume: volume.clone(),
        again,
    })
}

impl Decided {
    /// Removes everything of it but its settings; `on_removed` hears how many objects went so far.
    pub async fn remove_rest(
        self,
        bucket: &SharedBucket,
        on_removed: impl FnMut(u64),
    ) -> Result<Deleted, TierError> {
        let objects = remove_rest(bucket, &self.volume, on_removed).await?;
        Ok(Deleted {
            again: self.again,
            objects,
        })
    }
}

/// Refuses what would take something from another volume or from a snapshot.
async fn refuse_if_needed(bucket: &SharedBucket, volume: &VolumeName) -> Result<(), DeleteError> {
    let volume = volume.clone();
    let forks = forks_of(bucket, &volume).await?;
    if !forks.is_empty() {
        return Err(DeleteError::Covered { volume, forks });
    }
    let tags = snapshot::tags(bucket.as_ref(), &volume).await?;
    if !tags.is_empty() {
        return Err(DeleteError::Snapshots { volume, tags });
    }
    Ok(())
}

/// Says that a volume is deleted; takes that back if another one lies over it by now, or it has a snapshot.
async fn mark(bucket: &SharedBucket, volume: &VolumeName) -> Result<(), DeleteError> {
    let key = layout::volume(volume.as_str());
    for _ in 0..TRIES {
        let Some((json, etag)) = read_json(bucket.as_ref(), volume).await? else {
            return Err(DeleteError::Absent {
                volume: volume.clone(),
            });
        };
        if json.deleted_millis.is_some() && !json.deletion_undecided {
            // Another one was quicker, or the reply to our own request was lost.
            return Ok(());
        }
        let replace = async |by: VolumeJson, etag: &Etag| {
            let body = Body::raw(by.encode());
            patiently(|| bucket.put_if(&key, body.clone(), etag)).await
        };
        let said = |deleted_millis, deletion_undecided| VolumeJson {
            deleted_millis,
            deletion_undecided,
            ..json.clone()
        };
        let deleted_millis = json.deleted_millis.or_else(|| Some(bucket.clock().now_millis()));
        let marked = match json.deleted_millis {
            // One that was broken off, or that another one is at: who is quicker decides.
            Some(_) => etag,
            None => match replace(said(deleted_millis, true), &etag).await? {
                Put::Written(marked) => marked,
                Put::Refused => continue,
            },
        };
        if let Err(refused) = refuse_if_needed(bucket, volume).await {
            replace(said(None, false), &marked).await?;
            return Err(refused);
        }
        match replace(said(deleted_millis, false), &marked).await? {
            Put::Written(_) => return Ok(()),
            Put::Refused => {}
        }
    }
    Err(DeleteError::Contended {
        volume: volume.clone(),
    })
}

/// Removes everything of a deleted volume but its settings.
async fn remove_rest(
    bucket: &SharedBucket,
    volume: &VolumeName,
    mut on_removed: impl FnMut(u64),
) -> Result<u64, TierError> {
    let prefix = layout::volume_prefix(volume.as_str());
    let settings = layout::volume(volume.as_str());
    let mut after = prefix.clone();
    let mut removed = 0;
    loop {
        let page = patiently(|| bucket.list(&prefix, Some(&after))).await?;
        let keys = page.objects.iter().map(|object| object.key.clone());
        let mut keys = keys.filter(|key| *key != settings);
        let mut under_way = JoinSet::new();
        loop {
            while under_way.len() < PARALLEL
                && let Some(key) = keys.next()
            {
                let bucket = Arc::clone(bucket);
                under_way.spawn(async move { patiently(|| bucket.delete(&key)).await });
            }
            match under_way.join_next().await {
                Some(Ok(done)) => done?,
                Some(Err(err)) if err.is_panic() => std::panic::resume_unwind(err.into_panic()),
                Some(Err(_shutdown)) => std::future::pending().await,
                None => break,
            }
            removed += 1;
            on_removed(removed);
        }
        match page.objects.last() {
            Some(last) if page.more && last.key > after => last.key.clone_into(&mut after),
            _ => return Ok(removed),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        base::volume::StackLayer,
        namespace::stack::{ForkPoint, create_fork},
        store::testing::MemoryBucket,
        tier::url::{ConnectOptions, connect},
    };

    fn name(text: &str) -> VolumeName {
        text.parse().unwrap()
    }

    async fn delete(bucket: &SharedBucket, volume: &str) -> Result<Deleted, DeleteError> {
        let decided = decide(bucket, &name(volume)).await?;
        Ok(decided.remove_rest(bucket, |_| {}).await?)
    }

    async fn store(dir: &tempfile::TempDir) -> SharedBucket {
        let url = format!("file://{}", dir.path().display());
        connect(&url.parse().unwrap(), &ConnectOptions::default())
            .await
            .unwrap()
    }

    async fn put(bucket: &SharedBucket, key: &str, bytes: Vec<u8>) {
        let put = bucket.put_new(key, Body::raw(bytes)).await.unwrap();
        assert!(matches!(put, Put::Written(_)));
    }

    async fn fork(bucket: &SharedBucket, volume: &str, from: &str) {
        create_fork(
            bucket.as_ref(),
            &name(volume),
            &name(from),
            ForkPoint::Live,
            false,
        )
        .await
        .unwrap();
    }

    /// A fork of main whose deletion was broken off, undecided.
    async fn broken_off(bucket: &SharedBucket, volume: &str) {
        let (json, etag) = read_json(bucket.as_ref(), &name(volume)).await.unwrap().unwrap();
        let marked = VolumeJson {
            deleted_millis: Some(9),
            deletion_undecided: true,
            ..json
        };
        let key = layout::volume(volume);
        let put = bucket
            .put_if(&key, Body::raw(marked.encode()), &etag)
            .await
            .unwrap();
        assert!(matches!(put, Put::Written(_)));
    }

    #[tokio::test]
    async fn a_deletion_that_was_broken_off_is_taken_back_or_finished_by_a_repeat() {
        let dir = tempfile::tempdir().unwrap();
        let bucket = store(&dir).await;
        put(&bucket, "volumes/main/head.json", b"{}".to_vec()).await;
        fork(&bucket, "f", "main").await;
        let before = read_json(bucket.as_ref(), &name("f")).await.unwrap().unwrap().0;
        fork(&bucket, "g", "f").await;
        broken_off(&bucket, "f").await;
        let err = delete(&bucket, "f").await.unwrap_err();
        assert!(matches!(err, DeleteError::Covered { .. }), "{err}");
        let after = read_json(bucket.as_ref(), &name("f")).await.unwrap().unwrap().0;
        assert_eq!(after, before);
        assert!(matches!(
            standing(bucket.as_ref(), &name("g")).await,
            Ok(Standing::Fork(..))
        ));

        // What lies below one whose deletion is not decided stays as well.
        broken_off(&bucket, "g").await;
        let err = delete(&bucket, "f").await.unwrap_err();
        assert!(matches!(err, DeleteError::Covered { .. }), "{err}");
        assert!(delete(&bucket, "g").await.unwrap().again);

        broken_off(&bucket, "f").await;
        let deleted = delete(&bucket, "f").await.unwrap();
        assert!(deleted.again);
        let after = read_json(bucket.as_ref(), &name("f")).await.unwrap().unwrap().0;
        assert_eq!((after.deleted_millis, after.deletion_undecided), (Some(9), false));
    }

    #[tokio::test]
    async fn names_are_found_by_few_listings_and_none_twice() {
        let dir = tempfile::tempdir().unwrap();
        let bucket = store(&dir).await;
        let mut expected: Vec<String> = (0..40).map(|number| format!("job-{number:02}")).collect();
        for volume in &expected {
            put(&bucket, &layout::volume(volume), b"{}".to_vec()).await;
        }
        // More than one page has.
        let log = dir.path().join("volumes/large/log");
        std::fs::create_dir_all(&log).unwrap();
        for number in 0..1500 {
            std::fs::write(log.join(number.to_string()), "").unwrap();
        }
        for odd in ["volumes/odd", "volumes/large0", "volumes/UPPER/x"] {
            put(&bucket, odd, Vec::new()).await;
        }
        expected.push("large".to_owned());
        let names = live_names(bucket.as_ref()).await.unwrap();
        let names: Vec<&str> = names.iter().map(VolumeName::as_str).collect();
        assert_eq!(names, expected);
        let listed = list(&bucket).await.unwrap();
        assert_eq!(listed.len(), expected.len());
        assert_eq!(forks_of(&bucket, &name("main")).await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_deletion_does_not_ask_all_that_were_deleted_before() {
        let memory = MemoryBucket::new();
        let bucket: SharedBucket = Arc::clone(&memory) as SharedBucket;
        let settings = |deleted_millis| {
            let parent = StackLayer::live(name("main"));
            let json = VolumeJson {
                parent: Some(parent),
                deleted_millis,
                ..plain()
            };
            Bytes::from(json.encode())
        };
        memory.insert(layout::volume("main"), Bytes::from(plain().encode()));
        for number in 0..ENOUGH {
            memory.insert(layout::volume(&format!("old-{number}")), settings(Some(9)));
        }
        for volume in ["f-1", "f-2", "f-3"] {
            memory.insert(layout::volume(volume), settings(None));
        }
        let asked = || {
            let keys = memory.requests("get").into_iter();
            let asked = keys.filter(|key| key.starts_with("volumes/old-")).count();
            memory.forget_requests();
            asked
        };
        delete(&bucket, "f-1").await.unwrap();
        // Twice in a deletion; the first time it was noted.
        assert_eq!(asked(), ENOUGH);
        delete(&bucket, "f-2").await.unwrap();
        assert_eq!(list_live(&bucket).await.unwrap().len(), 4);
        assert_eq!(asked(), 0);
        assert_eq!(list(&bucket).await.unwrap().len(), ENOUGH + 4);
        // Whoever puts one back by hand is seen.
        memory.insert(layout::volume("old-7"), settings(None));
        assert_eq!(
            forks_of(&bucket, &name("main")).await.unwrap(),
            [name("f-3"), name("old-7")]
        );
        // What nobody can read says nothing.
        for odd in [
            &b"{\"version\": 2, \"volumes\": []}"[..],
            b"odd",
            b"{\"version\": 1}",
        ] {
            memory.insert(layout::DELETED.to_owned(), Bytes::from_static(odd));
            assert_eq!(forks_of(&bucket, &name("main")).await.unwrap().len(), 2);
            let newer = odd.starts_with(b"{\"version\": 2");
            assert_eq!(memory.object(layout::DELETED).unwrap() == odd, newer);
        }
    }

    fn plain() -> VolumeJson {
        VolumeJson::decode(&name("main"), b"{\"version\": 1, \"created_millis\": 1}").unwrap()
    }
}
