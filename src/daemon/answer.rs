//! What the daemon does when a command asks, see [`super::control`].

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{sync::mpsc, time::Instant};

use super::{
    commit,
    control::{
        protocol::{Reply, Request},
        server::Answerer,
    },
    drain,
    serving::Serving,
};

/// An unmount that a command asked for; the main loop does it.
#[derive(Debug)]
pub struct StopRequest {
    pub deadline: Instant,
    pub lazy: bool,
    /// What was done in the mount may become a part of the parent.
    pub success: bool,
    pub replies: mpsc::Sender<Reply>,
}

/// Answers from `serving`, as long as that is there: the socket does not keep it.
pub fn answerer(serving: Weak<Serving>, stop: mpsc::Sender<StopRequest>) -> Answerer {
    Arc::new(move |request, replies| {
        let Some(serving) = serving.upgrade() else {
            return say(&replies, error("the daemon is stopping"));
        };
        match request {
            Request::Ping => say(
                &replies,
                Reply::Pong {
                    pid: std::process::id(),
                    daemon: env!("CARGO_PKG_VERSION").to_owned(),
                },
            ),
            // Both look at the disk.
            Request::Status => blocking(replies, move || Reply::Status {
                status: Box::new(serving.status()),
            }),
            Request::Ls { path } => {
                tokio::spawn(async move {
                    let reply = match serving.list(&path).await {
                        Ok(files) => Reply::Listed { files },
                        Err(message) => Reply::Error { message },
                    };
                    drop(serving);
                    say(&replies, reply);
                });
            }
            Request::Flush { deadline_millis } => {
                tokio::spawn(flush(serving, after(deadline_millis), replies));
            }
            Request::Commit { deadline_millis } => {
                tokio::spawn(commit(serving, after(deadline_millis), replies));
            }
            Request::Unmount {
                deadline_millis,
                lazy,
                success,
            } => {
                let request = StopRequest {
                    deadline: after(deadline_millis),
                    lazy,
                    success,
                    replies,
                };
                if let Err(refused) = stop.try_send(request) {
                    let (mpsc::error::TrySendError::Full(request)
                    | mpsc::error::TrySendError::Closed(request)) = refused;
                    say(&request.replies, error("an unmount is under way already"));
                }
            }
        }
    })
}

async fn flush(serving: Arc<Serving>, deadline: Instant, replies: mpsc::Sender<Reply>) {
    let mut ending = serving.ending.subscribe();
    let reply = tokio::select! {
        report = drain::run(&serving, deadline, Some(&replies)) => Reply::Flushed(report),
        _ = ending.wait_for(|ending| *ending) => error("the daemon stopped before the flush was complete"),
        // Nobody waits for the answer any more: the command was interrupted.
        () = replies.closed() => return,
    };
    drop(serving);
    let _ = replies.send(reply).await;
}

async fn commit(serving: Arc<Serving>, deadline: Instant, replies: mpsc::Sender<Reply>) {
    let mut ending = serving.ending.subscribe();
    // Goes on when nobody waits for the answer any more: half a promotion helps nobody.
    let reply = tokio::select! {
        reply = commit::run(&serving, deadline, &replies) => reply,
        _ = ending.wait_for(|ending| *ending) => error("the daemon stopped before the commit was complete"),
    };
    drop(serving);
    let _ = replies.send(reply).await;
}

fn blocking(replies: mpsc::Sender<Reply>, work: impl FnOnce() -> Reply + Send + 'static) {
    tokio::task::spawn_blocking(move || say(&replies, work()));
}

/// Sends the only reply to a request, for which there always is room.
fn say(replies: &mpsc::Sender<Reply>, reply: Reply) {
    let _ = replies.try_send(reply);
}

fn error(message: &str) -> Reply {
    Reply::Error {
        message: message.to_owned(),
    }
}

/// Far deadlines are cut at a day: the clock cannot add everything.
fn after(millis: u64) -> Instant {
    Instant::now() + Duration::from_millis(millis.min(86_400_000))
}
