//! Lets names leave a volume that no machine used for a long time.
//!
//! One [`expire`] reads what machines told of their uses ([`super::touch`]), reads all names of a volume, decides of each
//! (`decide`, a function of values), and writes deletions into the log as any machine does. Their blobs go with later
//! sweeps. `forks` finds who else uses them, `uses` reads what was told and keeps it small, `names` reads the volume,
//! `inherit` keeps what a fork told that is deleted.
//!
//! # The rules
//!
//! `E` is the time for which a name may be unused; all times are those of the bucket's clock.
//!
//! 1. A name that was written less than `E` ago stays, whatever was told of it.
//! 2. A name stays if a machine told that it used it, and may have used it less than `E` ago as far as can be told:
//!    what is told says for how long it speaks, because a name in use is not told again at once.
//! 3. Nothing goes before it was known for `E` what machines use, and for an hour more, in which those that run
//!    learn that they shall tell: the first run only says since when. What cannot be read stops the expiry.
//! 4. A deletion removes the version of the name that was judged. Its stamp follows directly on that of the entry
//!    ([`crate::base::clock::Stamp::expired`]): a write of any later millisecond, also one that was not published yet
//!    when the expiry read the log, counts for more, on every machine, in any order of arrival.
//! 5. A machine that used the name lately, and has not told so yet, writes it again when it sees the deletion (law 8
//!    of [`super::tree`]). For a moment the others do not see the name; the blob is kept for the window of the sweep.
//! 6. A directory goes as any name, when it was empty already when the newest catalog was made, so never together with
//!    what was in it: caches make the same directories again and again. If a machine makes something in it meanwhile,
//!    it comes back (law 2 of the tree), with mode 0755.
//! 7. Only names of volumes that lie over nothing expire. A deletion in a fork would hide what the volume below has;
//!    a fork goes as a whole. What forks see of a volume expires with it, and what their machines use of it is told.
//!
//! # What is kept
//!
//! What machines told is removed when it is older than the longest `E` that was ever asked for in this volume
//! ([`super::touch::format::ExpiryJson`]), and before that it is noted since when uses are known: a later expiry with a
//! longer time then waits. What was told in one day becomes one object two days later.
//!
//! Nothing of this needs that an expiry ends: each segment of deletions stands for itself, and the next run decides
//! anew. Two that run at once write the same deletions.
//!
//! # Cost
//!
//! Two GETs for each volume of the store, one LIST for a thousand objects of what was told and one GET for each; the
//! catalog once (a GET for some 2,800 names) and the log since. One PUT for 16,000 names that go. 1,000,000 names, ten
//! machines, run once a day: some 370 GETs for the names and 300 for the uses. Memory: 8 bytes for each name in use.

mod decide;
mod error;
mod forks;
mod inherit;
mod names;
mod uses;

#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use serde::Serialize;

pub use error::ExpireError;
pub use inherit::{Inherited, inherit};

use self::{
    decide::{Fate, Rule, fate},
    names::Names,
    uses::Used,
};
use super::{
    change::PathChange,
    promote,
    sweep::Progress,
    touch::{
        format::{ExpiryJson, MAX_GOOD_FOR_MILLIS},
        tell::{LOOK, read_expiry},
    },
    volumes::{self, Listed},
};
use crate::{
    base::volume::{VolumeName, VolumePattern},
    tier::{Body, Put, SharedBucket, layout, probe},
    upload::condemned::BucketTime,
};

/// A shorter time could not be told apart from the coarseness of the bucket's clock, which has whole seconds.
pub const MIN_EXPIRE: Duration = Duration::from_secs(4);

/// Below this, names that are used once a day go in between.
pub const SHORT_EXPIRE: Duration = Duration::from_secs(2 * 24 * 3600);

/// Deletions that are written at once.
const TOGETHER: usize = 16_384;

/// How an expiry is run.
#[derive(Clone, Debug)]
pub struct ExpireOptions {
    /// How long a name may be unused.
    pub unused_for: Duration,
    /// None: all that lie over nothing, and are not untrusted.
    pub volumes: Vec<VolumeName>,
    /// Volumes whose writers are not trusted, beside those that keep their blobs apart.
    pub untrusted: Vec<VolumePattern>,
    /// Writes and deletes nothing.
    pub dry_run: bool,
}

/// Names, and the bytes of their files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NameAmount {
    pub names: u64,
    pub bytes: u64,
}

impl NameAmount {
    fn add(&mut self, bytes: u64) {
        self.names += 1;
        self.bytes += bytes;
    }
}

/// What became of the names of one volume. A dry run tells what would be done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VolumeExpiry {
    pub volume: String,
    pub unused_seconds: u64,
    /// Nothing goes before, because it is not known for long enough what machines use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_before_millis: Option<u64>,
    pub all: NameAmount,
    /// Written less than the time ago.
    pub young: NameAmount,
    /// Written longer ago, and used.
    pub used: NameAmount,
    /// Gone now. A blob of several names counts for each.
    pub expired: NameAmount,
    /// Objects in which machines told what they use.
    pub told_objects: u64,
}

/// Lets names expire, volume by volume.
///
/// The bucket must have answered before: the time is taken from its clock.
pub async fn expire(
    bucket: &SharedBucket,
    options: &ExpireOptions,
    tell: &mut (dyn FnMut(&Progress) + Send),
) -> Result<Vec<VolumeExpiry>, ExpireError> {
    let clock = Arc::clone(bucket);
    let now: BucketTime = Arc::new(move || clock.clock().now_millis());
    expire_by(bucket, now, options, tell).await
}

/// The same, by any clock.
async fn expire_by(
    bucket: &SharedBucket,
    now: BucketTime,
    options: &ExpireOptions,
    tell: &mut (dyn FnMut(&Progress) + Send),
) -> Result<Vec<VolumeExpiry>, ExpireError> {
    let all = volumes::list_live(bucket).await?;
    if let Some(Listed { volume, trouble, .. }) = all.iter().find(|listed| listed.trouble.is_some()) {
        return Err(ExpireError::Settings {
            volume: volume.clone(),
            why: trouble.clone().unwrap_or_default(),
        });
    }
    let forks_over = forks::by_lowest(&all);
    let mut done = Vec::new();
    for volume in chosen(&all, options)? {
        let forks = forks_over.get(volume).map_or(&[][..], Vec::as_slice).iter();
        let fork = |fork: &&Listed| {
            let is_apart = fork.own_prefix || is_untrusted(&options.untrusted, &fork.volume);
            (fork.volume.clone(), is_apart)
        };
        let expiry = Expiry {
            bucket,
            volume,
            forks: forks.map(fork).collect(),
            now_millis: now(),
            unused_millis: options.unused_for.as_millis() as u64,
            dry_run: options.dry_run,
        };
        done.push(expiry.run(tell).await?);
    }
    Ok(done)
}

/// The volumes that are meant.
fn chosen<'a>(all: &'a [Listed], options: &ExpireOptions) -> Result<Vec<&'a VolumeName>, ExpireError> {
    let wanted = &options.volumes;
    let may = |listed: &Listed| listed.parent.is_none() && listed.deleted_millis.is_none();
    if wanted.is_empty() {
        let all = all
            .iter()
            .filter(|listed| may(listed) && !is_untrusted(&options.untrusted, &listed.volume));
        return Ok(all.map(|listed| &listed.volume).collect());
    }
    let mut chosen = Vec::new();
    for volume in wanted {
        match all.iter().find(|listed| listed.volume == *volume) {
            Some(listed) if may(listed) => chosen.push(&listed.volume),
            Some(listed) if listed.is_live() => {
                return Err(ExpireError::Fork {
                    volume: volume.clone(),
                });
            }
            _ => {
                return Err(ExpireError::Absent {
                    volume: volume.clone(),
                });
            }
        }
    }
    Ok(chosen)
}

fn is_untrusted(untrusted: &[VolumePattern], volume: &VolumeName) -> bool {
    untrusted.iter().any(|untrusted| untrusted.matches(volume))
}

/// The expiry of one volume.
struct Expiry<'a> {
    bucket: &'a SharedBucket,
    volume: &'a VolumeName,
    /// Those over it, also over others between; and whether their writers are trusted less.
    forks: Vec<(VolumeName, bool)>,
    now_millis: u64,
    unused_millis: u64,
    dry_run: bool,
}

impl Expiry<'_> {
    async fn run(&self, tell: &mut (dyn FnMut(&Progress) + Send)) -> Result<VolumeExpiry, ExpireError> {
        let mut report = VolumeExpiry {
            volume: self.volume.to_string(),
            unused_seconds: self.unused_millis / 1000,
            ..VolumeExpiry::default()
        };
        let settings = self.settings().await?;
        let ready_millis = settings
            .since_millis
            .saturating_add(self.unused_millis)
            .saturating_add((LOOK.as_millis() as u64).min(self.unused_millis));
        if self.now_millis < ready_millis {
            report.not_before_millis = Some(ready_millis);
            return Ok(report);
        }
        let rule = Rule {
            now_millis: self.now_millis,
            from_millis: self.now_millis - self.unused_millis,
        };
        let used = self.used(rule, tell).await?;
        report.told_objects = used.objects;
        self.names(rule, &used, &mut report, tell).await?;
        if !self.dry_run {
            self.tidy(&settings).await?;
        }
        Ok(report)
    }

    /// Since when it is known what is used; that begins now if nobody asked before.
    async fn settings(&self) -> Result<ExpiryJson, ExpireError> {
        let stored = read_expiry(self.bucket.as_ref(), self.volume).await?;
        let begun = || ExpiryJson::new(self.now_millis, self.unused_millis);
        let (wanted, put) = match stored {
            Some((stored, etag)) if stored.expire_millis < self.unused_millis => {
                let wanted = ExpiryJson::new(stored.since_millis, self.unused_millis);
                (wanted, Some(etag))
            }
            Some((stored, _)) => return Ok(stored),
            None => (begun(), None),
        };
        if self.dry_run {
            return Ok(wanted);
        }
        let (key, body) = (layout::expiry(self.volume.as_str()), Body::raw(wanted.encode()));
        let written = match put {
            Some(etag) => self.bucket.put_if(&key, body, &etag).await?,
            None => self.bucket.put_new(&key, body).await?,
        };
        match written {
            Put::Written(_) => Ok(wanted),
            Put::Refused => Err(ExpireError::Raced {
                volume: self.volume.clone(),
            }),
        }
    }

    /// Reads what was used, of the forks before the volume: that of a fork that is deleted meanwhile is in the volume
    /// before it is gone ([`inherit()`]).
    async fn used(&self, rule: Rule, tell: &mut (dyn FnMut(&Progress) + Send)) -> Result<Used, ExpireError> {
        let mut used = Used::after(rule.from_millis);
        let own = (self.volume.clone(), false);
        for (volume, is_apart) in self.forks.iter().chain([&own]) {
            let found = match uses::list(self.bucket, volume, used.first_millis()).await {
                Err(ExpireError::Touched { key, .. }) if *is_apart => {
                    tracing::warn!(
                        key,
                        "nothing is known of it, and what its writers use counts for nothing"
                    );
                    continue;
                }
                found => found?,
            };
            let keys = found.keys.into_iter().map(|(key, _)| key);
            let is_whole = uses::read(self.bucket, volume, keys, *is_apart, |told| {
                used.take(&told);
                tell(&Progress {
                    step: "reading what is used, objects",
                    done: used.objects,
                    total: None,
                });
            })
            .await?;
            if !is_whole && volume == self.volume {
                return Err(uses::raced(volume));
            }
        }
        used.marks.sort();
        Ok(used)
    }

    /// Decides of every name, and deletes what goes.
    async fn names(
        &self,
        rule: Rule,
        used: &Used,
        report: &mut VolumeExpiry,
        tell: &mut (dyn FnMut(&Progress) + Send),
    ) -> Result<(), ExpireError> {
        let mut names = Names::of(self.bucket, self.volume).await?;
        let mut going = Vec::new();
        while let Some(registers) = names.next().await? {
            for register in registers {
                report.all.add(register.bytes);
                match fate(&register, &used.marks, rule) {
                    Fate::Young => report.young.add(register.bytes),
                    Fate::Used | Fate::Holds => report.used.add(register.bytes),
                    Fate::Expires(stamp) => {
                        report.expired.add(register.bytes);
                        going.push(PathChange {
                            path: register.path,
                            stamp,
                            entry: None,
                        });
                    }
                }
                if going.len() == TOGETHER {
                    self.delete(std::mem::take(&mut going)).await?;
                }
            }
            tell(&Progress {
                step: "looking at names",
                done: report.all.names,
                total: None,
            });
        }
        self.delete(going).await
    }

    async fn delete(&self, going: Vec<PathChange>) -> Result<(), ExpireError> {
        if self.dry_run || going.is_empty() {
            return Ok(());
        }
        let written = promote::write::write(self.bucket, self.volume, &going, &|_| {}).await;
        written.map_err(|err| ExpireError::write(self.volume, err))?;
        Ok(())
    }

    /// Removes what was told too long ago to matter to anybody, and puts the rest together.
    async fn tidy(&self, settings: &ExpiryJson) -> Result<(), ExpireError> {
        let kept_from = self.now_millis.saturating_sub(settings.expire_millis);
        let found = uses::list(self.bucket, self.volume, 0).await?;
        let old: Vec<String> = found
            .keys
            .iter()
            .filter(|(_, millis)| millis.saturating_add(MAX_GOOD_FOR_MILLIS) <= kept_from)
            .map(|(key, _)| key.clone())
            .collect();
        if !old.is_empty() && self.forget_before(kept_from).await? {
            uses::remove(self.bucket, &old).await?;
        }
        let kept = uses::Found {
            keys: found
                .keys
                .into_iter()
                .filter(|(key, _)| old.binary_search(key).is_err())
                .collect(),
        };
        uses::put_together(self.bucket, self.volume, &kept, self.now_millis).await
    }

    /// Notes that uses are known from a later time on; false when that cannot be noted safely.
    async fn forget_before(&self, since_millis: u64) -> Result<bool, ExpireError> {
        if !probe::honours_conditions(self.bucket.as_ref()).await? {
            return Ok(false);
        }
        let Some((stored, etag)) = read_expiry(self.bucket.as_ref(), self.volume).await? else {
            return Ok(false);
        };
        if stored.since_millis >= since_millis {
            return Ok(true);
        }
        let since = ExpiryJson::new(since_millis, stored.expire_millis);
        let key = layout::expiry(self.volume.as_str());
        let put = self.bucket.put_if(&key, Body::raw(since.encode()), &etag).await?;
        Ok(matches!(put, Put::Written(_)))
    }
}
