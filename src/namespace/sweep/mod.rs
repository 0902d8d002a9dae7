//! Deletes from the bucket what nothing refers to.
//!
//! One [`sweep`] is one pass: read every reference, walk all objects, delete what an earlier pass condemned and is
//! still unused, condemn what is unused now. Whoever runs it once a day needs nothing else; `wait` stays until
//! what was condemned is deleted. `inventory` knows every key below `volumes/`, `log` says which catalogs and how much of
//! the logs is kept, `references` what is used, `winners` what of a log still counts, `objects` walks the bucket, `state`
//! reads and writes what the passes leave for each other and for the writers
//! (its formats: [`crate::tier::sweeping`]), `withheld` knows whose fault it is that an object may not be read.
//!
//! # The rules
//!
//! `W` is the window of the store; all times are those of the bucket's clock.
//!
//! 1. An object younger than `W` by its own last-modified is never touched.
//! 2. A name that was deleted or replaced less than `W` ago still refers to its blob: a build that read an
//!    action-cache entry finds the files that it names for so long.
//! 3. What is neither is *condemned*: its list is published, and deleted at the earliest `W` after that, when the
//!    references, read again from the beginning, still do not have it.
//! 4. A writer ([`crate::upload::vouch`]) names an object in a segment only if it saw the object in the bucket, and
//!    read the lists, less than `W/2` before the segment was acknowledged; and no object that it knows to be
//!    condemned: that it stores again, under a key that nobody ever had.
//! 5. A list stays published for another `W` after everything in it was deleted.
//! 6. Chunks and packs of a volume that keeps its own are swept as those of all are, and all of a deleted one.
//! 7. Segments that a catalog covers, and catalogs that nothing begins with, are condemned and deleted likewise; `log` has
//!    the rules for them, and why nobody misses anything.
//!
//! # Why nothing is lost
//!
//! Let a list with the object `K` be complete at `c`, the references of the pass that deletes `K` be read from `r`
//! on, with `r >= c + W`, and let a segment that names `K` be acknowledged at `s`.
//!
//! - If `s < r`, the segment is there when the references are read, and `K` is spared.
//! - If `s >= r`, its writer read the lists at some time after `s - W/2 >= c + W/2`, so it knew the list of `K`, and
//!   did not name `K`: the list is there until `W` after the last deletion. If it read the lists after they were
//!   gone, it saw `K` after the deletion, because that is less than `W/2` before `s`: then `K` is another
//!   object, younger than `W`, that somebody wrote since.
//!
//! Nothing of this needs the first reading of the references, nor that only one sweep runs, nor that one ends: any
//! pass may die at any point, and the next one begins with the lists as they are. Clocks may be wrong by up
//! to a quarter of the window. A pass that slept for half a window stops before it deletes more ([`SweepError::Slept`]).
//!
//! A promotion is a writer that does not look at the lists: it names only what the log of its fork names until
//! it is done, so that the content is in use at every moment, here or there. That is why `volumes/` is listed twice
//! (`inventory`): what was moved between two pages of a listing, and its fork deleted, is found by the other one; and why what
//! came meanwhile is read when something went that was listed (`references::again`).
//!
//! Objects count as used by the *content* that is named, wherever it is: a chunk that is in use keeps its own object
//! and every pack that holds it, because machines remember one place of a chunk, not always the newest. A pack
//! dies whole, when none of its members is in use.
//!
//! What a snapshot names stays as long as its object is there ([`crate::namespace::snapshot`]). It names what was in use
//! when its making began, and is withdrawn when that took half a window, so rule 2 keeps all of it until its object is seen.
//!
//! Everything of a volume must be understood: a key, a segment or a version that is not stops the pass before
//! anything is condemned or deleted. Not so where its writers are not trusted, who could stop every pass: what of them
//! cannot be read counts for nothing and is told, and only the readers of their volume may lose something by that. What the
//! sweeper's own credentials do not permit stops the pass, whosever it is: else a policy that lets him delete and not read
//! would empty these volumes.
//!
//! # Catalogs
//!
//! What a catalog has is used like what its segments had. A compaction names two kinds of parts: those of the catalog
//! that it replaces, which are used until it does; and those that it writes, whose names never were before. Let a
//! list with such a part be published at `c`; the pass that deletes it changes `head.json` at `f >= c + W`
//! ([`crate::namespace::catalog::head::fence`]), and reads it from then on. A compaction that read `head.json` before `f` either replaced it before
//! `f`, so the pass sees that the part is used, or it loses; one that read it after `f` writes parts of other
//! names. A fork that begins with a catalog names it within `W/2` of when that was the newest one, or is not made; and a
//! catalog stays for `W` after it was the newest.
//!
//! # Cost
//!
//! Of `n` objects, and `s` segments that are left with the `p` parts of the catalog before them and of those that
//! snapshots name (once for those that several share): `(n + 2 s + 2 p) / 1000` LISTs, `s + p` GETs for each 1.8
//! million names, some 10 GETs for the catalogs of a volume that has any, one GET for each volume that was ever deleted
//! and some four for each that lies over others, sixteen at once; one GET for the chunk list of each blob of over half a
//! gigabyte, one small GET for each unused pack, one DELETE request for a thousand objects. If something goes while it is
//! read, `volumes/` is listed twice more at least, with one GET for each segment and each volume that came since.
//!
//! One object is left of each deleted volume, for ever: 10,000 forks a day are 300,000 GETs a sweep (12 cents, ten
//! minutes at 30 ms) after a month. 10 million objects with as many names in 3,600 parts and 20,000 segments: 10,000
//! LISTs and 140,000 GETs, 11 cents.
//!
//! Memory: 8 bytes for each chunk and pack in use, 150 MB for the names of one reading, 8 bytes for each condemned
//! object (at most 2 million of them in one pass; the rest is left to the next).

mod asking;
mod error;
mod inventory;
mod log;
pub(super) mod marks;
mod objects;
mod references;
mod report;
mod state;
mod winners;
mod withheld;

#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

pub use error::SweepError;
pub use report::{Amount, Amounts, Counted, Progress, SweepReport};

use self::{
    asking::Asking,
    inventory::{Volumes, inventory},
    log::{Ages, MIN_LOG_AGE_MILLIS, fence},
    objects::Walk,
    references::unless_apart,
    state::State,
};
use crate::{
    base::volume::VolumePattern,
    tier::{SharedBucket, layout, sweeping::mark_of_key},
    upload::condemned::BucketTime,
};

/// A shorter window could not be told apart from the coarseness of the bucket's clock, which has whole seconds.
pub const MIN_WINDOW: Duration = Duration::from_secs(4);

/// Below this, machines that are merely slow upload again what they have uploaded.
pub const SHORT_WINDOW: Duration = Duration::from_secs(3600);

/// The log is kept for so long at least, whatever the window is.
pub const MIN_LOG_AGE: Duration = Duration::from_millis(MIN_LOG_AGE_MILLIS);

/// How far apart two looks at the clock are while a pass waits.
const WAIT_STEP: Duration = Duration::from_millis(250);

/// How a sweep is run.
#[derive(Clone, Debug)]
pub struct SweepOptions {
    /// Changes the window of the store; `None` leaves it as it is.
    pub window: Option<Duration>,
    /// Writes and deletes nothing.
    pub dry_run: bool,
    /// Stays until what is condemned is deleted.
    pub wait: bool,
    /// Dollars for a gigabyte (10^9 bytes) and month.
    pub price: f64,
    /// Volumes whose writers are not trusted, beside those that keep their blobs apart: what cannot be read of them counts for
    /// nothing, and stops no sweep.
    pub untrusted: Vec<VolumePattern>,
    /// [`MIN_LOG_AGE`], but for tests.
    pub log_age: Duration,
}

/// Sweeps the store once.
///
/// The bucket must have answered before: the time is taken from its clock.
pub async fn sweep(
    bucket: &SharedBucket,
    options: &SweepOptions,
    tell: &mut (dyn FnMut(&Progress) + Send),
) -> Result<SweepReport, SweepError> {
    let clock = Arc::clone(bucket);
    let now: BucketTime = Arc::new(move || clock.clock().now_millis());
    sweep_by(bucket, now, options, tell).await
}

/// Gives a store that was made just now its window: no machine can go by another one.
pub async fn set_first_window(bucket: &SharedBucket, window: Duration) -> Result<(), SweepError> {
    let clock = Arc::clone(bucket);
    let now: BucketTime = Arc::new(move || clock.clock().now_millis());
    state::set_first_window(&Asking::new(Arc::clone(bucket), now), window).await
}

/// The same, by any clock.
pub(super) async fn sweep_by(
    bucket: &SharedBucket,
    now: BucketTime,
    options: &SweepOptions,
    tell: &mut (dyn FnMut(&Progress) + Send),
) -> Result<SweepReport, SweepError> {
    let asking = Asking::new(Arc::clone(bucket), now);
    if let Some(window) = options.window
        && !options.dry_run
    {
        state::set_window(&asking, window).await?;
    }
    let mut report = pass(&asking, options, true, tell).await?;
    while options.wait
        && !options.dry_run
        && let Some(due) = report.next_due_millis
    {
        wait_until(&asking, due, tell).await;
        let last = pass(&asking, options, false, tell).await?;
        report.follow(last);
    }
    Ok(report)
}

async fn wait_until(asking: &Asking, due: u64, tell: &mut (dyn FnMut(&Progress) + Send)) {
    while let Some(left) = due.checked_sub(asking.now()).filter(|left| *left > 0) {
        tell(&Progress {
            step: "waiting until what is condemned may be deleted, seconds left",
            done: left.div_ceil(1000),
            total: None,
        });
        tokio::time::sleep(WAIT_STEP.min(Duration::from_millis(left))).await;
    }
}

/// One pass. Without `condemn` it only deletes.
async fn pass(
    asking: &Asking,
    options: &SweepOptions,
    condemn: bool,
    tell: &mut (dyn FnMut(&Progress) + Send),
) -> Result<SweepReport, SweepError> {
    // Before the references: what is due by now was condemned a window before they are read.
    let began = asking.now();
    let mut state = State::read(asking, began).await?;
    if options.dry_run
        && let Some(window) = options.window
    {
        state.window_millis = window.as_millis() as u64;
    }
    let volumes = inventory(asking, &options.untrusted).await?;
    if !options.dry_run {
        fence_all(asking, &volumes, &state).await?;
    }
    let ages = Ages {
        began_millis: began,
        window_millis: state.window_millis,
        log_millis: options.log_age.as_millis() as u64,
    };
    let mut references = references::read(asking, &volumes, &options.untrusted, ages, tell).await?;
    if condemn && !options.dry_run {
        // Before anything is condemned by it.
        for (name, log) in &mut references.logs {
            unless_apart(asking, &volumes[name], log.say(asking, name.as_str()).await)?;
        }
    }
    let mut walk = Walk::new(asking, &state, &references.marks, began, options.dry_run);
    walk.run(&volumes, &references, tell).await?;
    let found = walk.finish();
    let mut next_due = state.next_due();
    if !options.dry_run {
        state.settle(asking).await?;
        if condemn && !found.marks.is_empty() {
            let due = state.condemn(asking, began, found.marks).await?;
            next_due = Some(next_due.map_or(due, |next| next.max(due)));
        }
    }
    Ok(SweepReport {
        store: asking.bucket().url(),
        dry_run: options.dry_run,
        window_seconds: state.window_millis / 1000,
        began_millis: began,
        volumes: references.volumes,
        segments: references.segments,
        names: references.names,
        lost_lists: references.lost_lists,
        snapshots: references.snapshots,
        ignored: asking.take_ignored(),
        next_due_millis: next_due,
        price_per_gb_month: options.price,
        objects: found.amounts,
    })
}

/// Lets no compaction end that began before catalogs are deleted, of the volumes in which some are to be.
async fn fence_all(asking: &Asking, volumes: &Volumes, state: &State) -> Result<(), SweepError> {
    let is_due = |mark: u64| state.due.iter().any(|(_, list)| list.has_mark(mark));
    for (name, volume) in volumes.iter().filter(|(_, volume)| !volume.is_deleted()) {
        let keys = volume.catalogs.keys();
        let mut keys = keys.map(|digest| layout::catalog(name.as_str(), digest));
        if keys.any(|key| is_due(mark_of_key(&key))) {
            // Where its writers are not trusted, and prevent it, only its own readers may miss a catalog.
            unless_apart(asking, volume, fence(asking, name.as_str()).await)?;
        }
    }
    Ok(())
}
