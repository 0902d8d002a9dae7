//! The life of a daemon: start, serve until there is a reason to stop, stop.

use std::{io, sync::Arc, thread, time::Duration};

use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot},
};

use super::{
    announce::Announcer,
    answer::{self, StopRequest},
    control::{place, server},
    error::{StartError, chain},
    mountinfo, mountpoint, notify,
    serving::Serving,
    start::{self, Plan},
    stop::{self, Cause},
};
use crate::{base::cpus, config::Dirs};

/// How a daemon ended that had started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Everything is in the bucket.
    Complete,
    /// Something is left in the cache directory, for the next mount.
    Incomplete,
    /// A second signal: nothing was waited for.
    AtOnce,
}

/// Runs a daemon to its end. The process was set up, the log was started.
pub fn run(plan: &Plan, dirs: &Dirs, announcer: &Announcer) -> Result<Ended, StartError> {
    let runtime = runtime().map_err(|source| StartError::Disk {
        verb: "start the threads of",
        path: plan.mountpoint.clone(),
        source,
    })?;
    let ended = runtime.block_on(live(plan, dirs, announcer));
    // Whoever still runs waits for the network or the disk and has nothing to lose.
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

fn runtime() -> io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(thread::available_parallelism().map_or(2, usize::from).clamp(2, 4))
        // Hashing and reading the disk; more at once would only be more seeks and memory.
        .max_blocking_threads(32)
        .thread_name("casmount-io")
        // The thread that asks for another one may be bound to a CPU.
        .on_thread_start(cpus::anywhere)
        .enable_all()
        .build()
}

async fn live(plan: &Plan, dirs: &Dirs, announcer: &Announcer) -> Result<Ended, StartError> {
    // From here on a signal does not kill; one during the start gives the start up.
    let mut signals = Signals::new().map_err(|source| StartError::Disk {
        verb: "listen to signals for",
        path: plan.mountpoint.clone(),
        source,
    })?;
    let started = tokio::select! {
        started = start::start(plan, announcer) => started?,
        () = signals.next() => {
            abandon(plan);
            return Err(StartError::Interrupted);
        }
    };
    let serving = Arc::new(started);
    let (stop_sender, mut stop_requests) = mpsc::channel(1);
    let answer = answer::answerer(Arc::downgrade(&serving), stop_sender);
    let served = place::make(dirs, &plan.mountpoint)
        .and_then(|path| server::serve(path, answer))
        .and_then(|server| Ok((server, watch_mount(&serving)?)));
    let (server, mut gone) = match served {
        Ok(served) => served,
        Err(source) => {
            abandon(plan);
            return Err(StartError::Disk {
                verb: "make the control socket of",
                path: plan.mountpoint.clone(),
                source,
            });
        }
    };
    feed_watchdog(announcer);
    announcer.ready(&format!(
        "serving {}volume {} of {} at {}",
        (plan.settings.snapshot.as_ref()).map_or(String::new(), |tag| format!("snapshot {tag} of ")),
        plan.settings.volume,
        plan.settings.store,
        plan.mountpoint.display()
    ));

    loop {
        let cause = wait_for_cause(&mut signals, &mut stop_requests, &mut gone).await;
        tracing::info!(cause = cause_name(&cause), "stopping");
        if let Some(notifier) = &announcer.notifier {
            notifier.stopping("uploading what is left");
            notifier.extend_timeout(stop::DRAIN_WITHIN + Duration::from_secs(30));
        }
        let report = tokio::select! {
            report = stop::drain_and_unmount(&serving, &cause) => report,
            () = signals.next() => {
                tracing::warn!("a second signal: stopping at once; what is not uploaded stays for the next mount");
                let _ = serving.mounted.unmount(true);
                return Ok(Ended::AtOnce);
            }
        };
        let Some(report) = report else {
            tracing::info!("the mount is in use and stays");
            continue;
        };
        let complete = report.drained.complete;
        stop::close(serving, server, cause, report).await;
        return Ok(if complete {
            Ended::Complete
        } else {
            Ended::Incomplete
        });
    }
}

fn cause_name(cause: &Cause) -> &'static str {
    match cause {
        Cause::Signal => "signal",
        Cause::Command(_) => "unmount command",
        Cause::Gone => "the mount was taken away",
    }
}

async fn wait_for_cause(
    signals: &mut Signals,
    stop_requests: &mut mpsc::Receiver<StopRequest>,
    gone: &mut oneshot::Receiver<()>,
) -> Cause {
    tokio::select! {
        () = signals.next() => Cause::Signal,
        Some(request) = stop_requests.recv() => Cause::Command(request),
        _ = gone => Cause::Gone,
    }
}

/// Takes away the mount of a start that failed or was interrupted; the rest ends with the process.
fn abandon(plan: &Plan) {
    let ours = mountinfo::at(&plan.mountpoint).ok().flatten();
    if ours.is_some_and(|mount| mount.is_casmount())
        && let Err(err) = mountpoint::unmount_lazily(&plan.mountpoint)
    {
        tracing::error!(%err, "cannot take the mount away again");
    }
}

/// Waits for the end of the mount, on a thread of its own because that blocks.
fn watch_mount(serving: &Serving) -> io::Result<oneshot::Receiver<()>> {
    let (sender, receiver) = oneshot::channel();
    let mounted = Arc::clone(&serving.mounted);
    let watch = move || {
        if let Err(err) = mounted.wait() {
            tracing::error!(err = chain(&err), "the mount ended");
        }
        drop(mounted);
        let _ = sender.send(());
    };
    thread::Builder::new()
        .name("casmount-watch".into())
        .spawn(watch)?;
    Ok(receiver)
}

/// A hung runtime stops feeding, and systemd starts the daemon anew.
fn feed_watchdog(announcer: &Announcer) {
    let variable = |name| std::env::var(name).ok();
    let (usec, pid) = (variable("WATCHDOG_USEC"), variable("WATCHDOG_PID"));
    let Some(every) = notify::watchdog_interval(usec.as_deref(), pid.as_deref()) else {
        return;
    };
    if announcer.notifier.is_none() {
        return;
    }
    let Some(notifier) = notify::Notifier::from_env(std::env::var_os("NOTIFY_SOCKET")) else {
        return;
    };
    tokio::spawn(async move {
        loop {
            notifier.watchdog();
            tokio::time::sleep(every).await;
        }
    });
}

/// The signals that ask a daemon to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = self.hang_up.recv() => {}
        }
    }
}
