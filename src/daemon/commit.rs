//! Making what was done in a mounted fork a part of its parent.
//!
//! First everything is drained, so that the fork says all that was closed; a part for the whole is never promoted.
//! The fork stays, whatever comes: what could not be promoted is promoted by a repeat, also
//! from another machine (`casmount fork promote`).

use std::time::Duration;

use tokio::{sync::mpsc, time::Instant};

use super::{
    control::protocol::{CommitReport, DrainReport, Progress, Reply},
    drain,
    error::chain,
    fork::compact,
    serving::Serving,
};
use crate::{base::volume::VolumeName, config::CommitMode, namespace::promote};

/// What somebody who commits may have to wait for a catalog of the parent: enough for some millions of names.
const COMPACT_WITHIN: Duration = Duration::from_secs(60);

/// The volume that the mounted one is a fork of.
fn parent(serving: &Serving) -> Option<&VolumeName> {
    let layers = serving.layers.store.stack()?.layers();
    layers.get(1).map(|layer| &layer.volume)
}

/// Drains, then promotes; the whole answer to `casmount commit`.
pub async fn run(serving: &Serving, deadline: Instant, replies: &mpsc::Sender<Reply>) -> Reply {
    let volume = &serving.settings.volume;
    if let Some(snapshot) = serving.snapshot() {
        return Reply::Error {
            message: format!(
                "what is mounted is snapshot {} of volume {volume}, in which nothing changes, so there is nothing to commit",
                snapshot.tag
            ),
        };
    }
    let Some(into) = parent(serving) else {
        return Reply::Error {
            message: format!("volume {volume} is no fork, so there is nothing to commit it into"),
        };
    };
    let drained = drain::run(serving, deadline, Some(replies)).await;
    let committed = if drained.complete {
        Some(promote_into(serving, into, deadline, Some(replies)).await)
    } else {
        None
    };
    Reply::Committed { drained, committed }
}

/// Promotes at the end of a mount that was successful, if the settings want that.
pub async fn at_success(
    serving: &Serving,
    drained: &DrainReport,
    deadline: Instant,
    replies: Option<&mpsc::Sender<Reply>>,
) -> Option<CommitReport> {
    if serving.settings.commit != CommitMode::OnSuccess {
        return None;
    }
    let into = parent(serving)?;
    if !drained.complete {
        return Some(CommitReport {
            error: Some("not everything is in the store".to_owned()),
            ..report(serving, into)
        });
    }
    Some(promote_into(serving, into, deadline, replies).await)
}

fn report(serving: &Serving, into: &VolumeName) -> CommitReport {
    CommitReport {
        volume: serving.settings.volume.to_string(),
        into: into.to_string(),
        ..CommitReport::default()
    }
}

async fn promote_into(
    serving: &Serving,
    into: &VolumeName,
    deadline: Instant,
    replies: Option<&mpsc::Sender<Reply>>,
) -> CommitReport {
    if let Some(listener) = replies {
        let progress = Progress {
            step: "promoting".to_owned(),
            ..Progress::default()
        };
        // One who does not read is not waited for.
        let _ = listener.try_send(Reply::Progress(progress));
    }
    let volume = &serving.settings.volume;
    let work = promote::promote(&serving.whole_bucket, volume, into, &|_| {});
    let report = report(serving, into);
    let report = match tokio::time::timeout_at(deadline, work).await {
        Ok(Ok(done)) => CommitReport {
            changes: done.changes,
            removed: done.removed,
            segments: done.segments,
            ..report
        },
        Ok(Err(err)) => CommitReport {
            error: Some(chain(&err)),
            ..report
        },
        Err(_) => CommitReport {
            error: Some("the deadline passed".to_owned()),
            ..report
        },
    };
    match &report.error {
        None => {
            tracing::info!(%volume, %into, changes = report.changes, "promoted");
            let (bucket, machine) = (&serving.whole_bucket, serving.layers.store.machine);
            let spill_dir = serving.settings.cache_dir.clone();
            let until = deadline.min(Instant::now() + COMPACT_WITHIN);
            compact(bucket, into, machine, spill_dir, until).await;
        }
        Some(error) => tracing::error!(%volume, %into, error, "not promoted"),
    }
    report
}
