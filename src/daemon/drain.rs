//! Waiting until everything closed so far is in the bucket and in the log.
//!
//! In this order, because each step feeds the next: seal what is closed,
//! upload what is dirty, publish what is durable.

use std::time::Duration;

use tokio::{sync::mpsc, time::Instant};

use super::{
    control::protocol::{DrainReport, Progress, Reply},
    serving::Serving,
};

/// How often somebody who waits hears how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// Every so many looks, waits after failures are cut short: somebody waits
/// for the end of this, and a bucket that is back shall be noticed soon.
const KICK_EVERY: u32 = 4;

/// Drains until `deadline`; tells `progress`, if anyone listens there.
pub async fn run(
    serving: &Serving,
    deadline: Instant,
    progress: Option<&mpsc::Sender<Reply>>,
) -> DrainReport {
    let began = Instant::now();
    let sealed = telling(
        serving,
        progress,
        "sealing",
        serving.layers.vfs.seal_all(deadline),
    )
    .await;
    serving.layers.uploader.kick();
    let dirty = telling(
        serving,
        progress,
        "uploading",
        serving.layers.uploader.wait_clean(deadline),
    )
    .await;
    serving.layers.publisher.kick();
    let unpublished = telling(
        serving,
        progress,
        "publishing",
        serving.layers.publisher.wait_published(deadline),
    )
    .await;
    // Bytes that a power loss took were never promised; the log and the status name them.
    let store = &serving.layers.store;
    let quarantined_blobs = if store.recovery.power_lost {
        0
    } else {
        store.ledger.totals().quarantined_blobs
    };
    let report = DrainReport {
        complete: false,
        still_open: sealed.still_open,
        unsealed: sealed.unsealed,
        dirty_blobs: dirty,
        quarantined_blobs,
        unpublished,
        lost_files: serving.layers.publisher.take_lost(),
        last_error: serving.last_error(),
        seconds: began.elapsed().as_secs_f64(),
    }
    .judged();
    if report.complete {
        tracing::debug!(seconds = report.seconds, "drained");
    } else {
        tracing::warn!(?report, "drained in part");
    }
    report
}

/// Runs a step and says twice a second what is left.
async fn telling<T>(
    serving: &Serving,
    progress: Option<&mpsc::Sender<Reply>>,
    step: &str,
    work: impl Future<Output = T>,
) -> T {
    tokio::pin!(work);
    let mut looks = 0_u32;
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(PROGRESS_EVERY) => {}
        }
        looks += 1;
        if looks.is_multiple_of(KICK_EVERY) {
            serving.layers.uploader.kick();
            serving.layers.publisher.kick();
        }
        if let Some(listener) = progress {
            // One who does not read is not waited for.
            let _ = listener.try_send(Reply::Progress(look(serving, step)));
        }
    }
}

fn look(serving: &Serving, step: &str) -> Progress {
    let totals = serving.layers.store.ledger.totals();
    Progress {
        step: step.to_owned(),
        unsealed: serving.layers.vfs.status().settling,
        dirty_blobs: totals.dirty_blobs,
        dirty_bytes: totals.dirty_bytes,
        unpublished: serving.layers.publisher.status().pending_changes,
        last_error: serving.last_error(),
    }
}
