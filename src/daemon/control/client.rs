//! A command's end of the control socket.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{
    place,
    protocol::{Progress, Reply, Request},
};
use crate::{config::Dirs, daemon::mountinfo};

/// A daemon did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error(
        "no casmount daemon serves {}; mount it with: casmount mount {}",
        mountpoint.display(), mountpoint.display()
    )]
    NoDaemon { mountpoint: PathBuf },
    #[error(
        "the daemon of {} died and left its mount behind; mount again to take it over: casmount mount {}",
        mountpoint.display(), mountpoint.display()
    )]
    Died { mountpoint: PathBuf },
    #[error("{} is mounted by another user; ask as that user or as root", mountpoint.display())]
    NotYours { mountpoint: PathBuf },
    #[error("the daemon of {} did not answer within {} s; see its log", mountpoint.display(), within.as_secs())]
    Silent { mountpoint: PathBuf, within: Duration },
    #[error("cannot talk to the daemon of {}", mountpoint.display())]
    Broken { mountpoint: PathBuf, source: io::Error },
    /// In the daemon's words.
    #[error("{message}")]
    Refused { message: String },
}

/// Sends a request to the daemon of `mountpoint` (canonical) and waits for the
/// last reply, for at most `within`.
pub fn ask(
    dirs: &Dirs,
    mountpoint: &Path,
    request: &Request,
    within: Duration,
    mut on_progress: impl FnMut(&Progress),
) -> Result<Reply, ControlError> {
    let deadline = Instant::now() + within;
    let mountpoint = || mountpoint.to_owned();
    let broken = |source: io::Error| match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ControlError::Silent {
            mountpoint: mountpoint(),
            within,
        },
        _ => ControlError::Broken {
            mountpoint: mountpoint(),
            source,
        },
    };
    let mut stream = connect(dirs, &mountpoint())?;
    stream.set_write_timeout(Some(within)).map_err(broken)?;
    stream.write_all(request.to_line().as_bytes()).map_err(broken)?;
    let mut reader = BufReader::new(stream);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Zero would mean no limit.
        let left = left.max(Duration::from_millis(1));
        reader.get_ref().set_read_timeout(Some(left)).map_err(broken)?;
        let mut line = String::new();
        if reader.read_line(&mut line).map_err(broken)? == 0 {
            return Err(broken(io::ErrorKind::UnexpectedEof.into()));
        }
        match serde_json::from_str(&line).map_err(|err| broken(err.into()))? {
            Reply::Progress(progress) => on_progress(&progress),
            Reply::Error { message } => return Err(ControlError::Refused { message }),
            reply => return Ok(reply),
        }
    }
}

fn connect(dirs: &Dirs, mountpoint: &Path) -> Result<UnixStream, ControlError> {
    let mut denied = false;
    for socket in place::candidates(dirs, mountpoint) {
        let dir = socket.parent().expect("a socket is in a directory");
        if place::check_owner(dir).is_err() {
            continue;
        }
        match UnixStream::connect(&socket) {
            Ok(stream) => return Ok(stream),
            Err(err) if err.kind() == io::ErrorKind::PermissionDenied => denied = true,
            // Not there, or nobody listens any more.
            Err(_) => {}
        }
    }
    let mount = mountinfo::at(mountpoint).ok().flatten();
    let ours = mount.filter(mountinfo::Mount::is_casmount);
    let me = rustix::process::geteuid().as_raw();
    let mountpoint = mountpoint.to_owned();
    Err(match ours {
        Some(mount) if denied || (me != 0 && mount.user_id() != Some(me)) => {
            ControlError::NotYours { mountpoint }
        }
        Some(_) => ControlError::Died { mountpoint },
        None => ControlError::NoDaemon { mountpoint },
    })
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::PermissionsExt,
        sync::{Arc, Mutex},
    };

    use super::*;
    use crate::daemon::control::{protocol::DrainReport, server};

    const SECOND: Duration = Duration::from_secs(5);

    fn dirs(dir: &Path) -> Dirs {
        Dirs {
            sockets: vec![dir.join("run")],
            ..Dirs::default()
        }
    }

    /// Runs a daemon's end in a runtime of its own while `client` runs.
    fn with_server(answer: server::Answerer, client: impl FnOnce(&Dirs, &Path)) {
        let dir = tempfile::tempdir().unwrap();
        let dirs = dirs(dir.path());
        let mountpoint = dir.path().join("mnt");
        let path = place::make(&dirs, &mountpoint).unwrap();
        // What a daemon that was killed leaves.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let server = runtime.block_on(async { server::serve(path.clone(), answer).unwrap() });
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        client(&dirs, &mountpoint);
        runtime.block_on(server.finish(Duration::ZERO));
        assert!(!path.exists());
    }

    #[test]
    fn progress_comes_before_the_last_reply() {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        let answer: server::Answerer = Arc::new(move |request, replies| {
            seen.lock().unwrap().push(request);
            tokio::spawn(async move {
                for left in [2, 1] {
                    let progress = Progress {
                        dirty_blobs: left,
                        ..Progress::default()
                    };
                    replies.send(Reply::Progress(progress)).await.unwrap();
                }
                replies
                    .send(Reply::Flushed(DrainReport::default().judged()))
                    .await
                    .unwrap();
            });
        });
        with_server(answer, |dirs, mountpoint| {
            let request = Request::Flush { deadline_millis: 5 };
            let mut progress = Vec::new();
            let reply = ask(dirs, mountpoint, &request, SECOND, |step| {
                progress.push(step.dirty_blobs);
            })
            .unwrap();
            assert!(matches!(
                reply,
                Reply::Flushed(DrainReport { complete: true, .. })
            ));
            assert_eq!(progress, [2, 1]);
            assert_eq!(*asked.lock().unwrap(), [request]);
        });
    }

    #[test]
    fn a_refusal_is_told_in_the_words_of_the_daemon() {
        let answer: server::Answerer = Arc::new(|_, replies| {
            replies
                .try_send(Reply::Error {
                    message: "no such file: x".into(),
                })
                .unwrap();
        });
        with_server(answer, |dirs, mountpoint| {
            let err = ask(
                dirs,
                mountpoint,
                &Request::Ls { path: b"x".to_vec() },
                SECOND,
                |_| {},
            )
            .unwrap_err();
            assert_eq!(err.to_string(), "no such file: x");
        });
    }

    #[test]
    fn a_daemon_that_says_nothing_is_given_up() {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let answer: server::Answerer = Arc::new(move |_, replies| kept.lock().unwrap().push(replies));
        with_server(answer, |dirs, mountpoint| {
            let err = ask(
                dirs,
                mountpoint,
                &Request::Ping,
                Duration::from_millis(50),
                |_| {},
            )
            .unwrap_err();
            assert!(matches!(err, ControlError::Silent { .. }), "{err:?}");
        });
    }

    #[test]
    fn a_daemon_that_ends_without_an_answer_is_an_error() {
        let answer: server::Answerer = Arc::new(|_, _| {});
        with_server(answer, |dirs, mountpoint| {
            let err = ask(dirs, mountpoint, &Request::Ping, SECOND, |_| {}).unwrap_err();
            assert!(matches!(err, ControlError::Broken { .. }), "{err:?}");
        });
    }

    #[test]
    fn a_client_of_another_version_gets_a_clear_answer() {
        let answer: server::Answerer = Arc::new(|_, _| panic!("never asked"));
        with_server(answer, |dirs, mountpoint| {
            let mut stream = connect(dirs, mountpoint).unwrap();
            stream.write_all(b"{\"version\":9,\"command\":\"x\"}\n").unwrap();
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line).unwrap();
            assert!(line.contains("version 9"), "{line}");
        });
    }

    #[test]
    fn where_nobody_serves_the_way_to_mount_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mountpoint = dir.path().join("mnt");
        let err = ask(&dirs(dir.path()), &mountpoint, &Request::Ping, SECOND, |_| {}).unwrap_err();
        assert!(matches!(err, ControlError::NoDaemon { .. }));
        assert!(
            err.to_string().starts_with("no casmount daemon serves /"),
            "{err}"
        );
    }
}
