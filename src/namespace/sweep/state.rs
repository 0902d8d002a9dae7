//! What the passes leave in the bucket for each other and for the writers.

use std::time::Duration;

use super::{SweepError, asking::Asking};
use crate::base::id::random_bytes;
use crate::tier::{
    Body, Put, layout,
    sweeping::{self, DEFAULT_WINDOW, DoneJson, SweepList, WindowJson},
};

/// A list that took this part of the window to be written may have been late for the writers.
const SLOW_SHARE: u64 = 8;

/// The lists of earlier passes.
#[derive(Debug, Default)]
pub struct State {
    /// The longest window that any machine goes by.
    pub window_millis: u64,
    /// Published long enough ago to be deleted now.
    pub due: Vec<(String, SweepList)>,
    /// Not yet; with when they will be.
    pub waiting: Vec<(u64, SweepList)>,
    /// Done with for long enough.
    pub expired: Vec<String>,
}

impl State {
    pub async fn read(asking: &Asking, now: u64) -> Result<Self, SweepError> {
        let found = asking.again(|bucket| Box::pin(sweeping::list(bucket))).await?;
        let window = if found.has_window {
            asking
                .again(|bucket| Box::pin(sweeping::read_window(bucket)))
                .await?
        } else {
            None
        };
        let window_millis = match window {
            Some((window, _)) => window.longest_millis(now),
            None => DEFAULT_WINDOW.as_millis() as u64,
        };
        let mut state = Self {
            window_millis,
            ..Self::default()
        };
        for id in &found.done {
            let done = asking
                .again(|bucket| Box::pin(sweeping::read_done(bucket, id)))
                .await?;
            if done.is_some_and(|done| done.finished_millis + window_millis <= now) {
                state.expired.push(id.clone());
            }
        }
        for (id, meta) in found.lists {
            if found.done.contains(&id) {
                continue;
            }
            let list = asking
                .again(|bucket| Box::pin(sweeping::read_list(bucket, &id)))
                .await?;
            let Some(list) = list else { continue };
            // The window may have been changed since.
            let due = meta.modified_millis.max(list.began_millis) + list.window_millis.max(window_millis);
            if due <= now {
                state.due.push((id, list));
            } else {
                state.waiting.push((due, list));
            }
        }
        Ok(state)
    }

    /// When all that waits may be deleted.
    pub fn next_due(&self) -> Option<u64> {
        self.waiting.iter().map(|(due, _)| *due).max()
    }

    /// Notes that what was due is deleted, and removes what is of no use any more.
    pub async fn settle(&self, asking: &Asking) -> Result<(), SweepError> {
        for (id, _) in &self.due {
            let done = Body::raw(DoneJson::new(asking.now()).encode());
            let key = layout::sweep_done(id);
            asking.again(|bucket| bucket.put_new(&key, done.clone())).await?;
        }
        for id in &self.expired {
            // In this order: a list without its end would be swept once more.
            for key in [layout::sweep_list(id), layout::sweep_done(id)] {
                asking.again(|bucket| bucket.delete(&key)).await?;
            }
        }
        Ok(())
    }

    /// Publishes what is condemned; returns when it may be deleted.
    pub async fn condemn(&self, asking: &Asking, began: u64, marks: Vec<u64>) -> Result<u64, SweepError> {
        let started = asking.now();
        let id = format!("{started:013}-{:016x}", u64::from_be_bytes(random_bytes()));
        let key = layout::sweep_list(&id);
        let list = SweepList::new(began, self.window_millis, marks);
        let body = Body::raw(list.encode());
        asking.again(|bucket| bucket.put_new(&key, body.clone())).await?;
        let published = asking.now();
        if published.saturating_sub(started) > self.window_millis / SLOW_SHARE {
            // Its time in the bucket may be that of the begin of the request.
            asking.again(|bucket| bucket.delete(&key)).await?;
            return Err(SweepError::Slept {
                window_millis: self.window_millis,
            });
        }
        Ok(published + self.window_millis)
    }
}

/// Makes `window` that of the store, for every machine.
pub async fn set_window(asking: &Asking, window: Duration) -> Result<(), SweepError> {
    let now = asking.now();
    let stored = asking
        .again(|bucket| Box::pin(sweeping::read_window(bucket)))
        .await?;
    let put = match stored {
        Some((stored, _)) if stored.window_millis == window.as_millis() as u64 => return Ok(()),
        Some((stored, etag)) => {
            let before = Duration::from_millis(stored.longest_millis(now));
            let body = Body::raw(WindowJson::new(window, before, now).encode());
            asking.bucket().put_if(layout::SWEEP_WINDOW, body, &etag).await?
        }
        // Machines that run already go by the window of a store that says nothing.
        None => put_first_window(asking, window, DEFAULT_WINDOW).await?,
    };
    match put {
        Put::Written(_) => Ok(()),
        Put::Refused => Err(SweepError::Raced),
    }
}

/// Gives a store that was made just now its window: no machine can go by another one.
pub async fn set_first_window(asking: &Asking, window: Duration) -> Result<(), SweepError> {
    put_first_window(asking, window, window).await?;
    Ok(())
}

async fn put_first_window(asking: &Asking, window: Duration, before: Duration) -> Result<Put, SweepError> {
    let body = Body::raw(WindowJson::new(window, before, asking.now()).encode());
    Ok(asking.bucket().put_new(layout::SWEEP_WINDOW, body).await?)
}
