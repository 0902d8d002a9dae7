//! Starting the daemon in the background.
//!
//! The command starts its own program again (a new process, not a fork, because
//! threads and locks do not survive one) and waits at a pipe until the daemon
//! serves or says why not; see [`super::announce`].

use std::{
    ffi::OsString,
    fs::File,
    io::{self, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use super::announce::{self, Event};

/// The hidden flag that tells the program to be that daemon.
pub const FLAG: &str = "--detached";

/// What became of the daemon.
#[derive(Debug, PartialEq, Eq)]
pub enum Started {
    Serving {
        pid: u32,
        text: String,
    },
    Failed {
        code: u8,
        text: String,
    },
    /// It ended without a word; in words how.
    Died {
        how: String,
    },
}

/// Starts this program again with the same arguments and [`FLAG`].
///
/// Its standard error goes to `log`, so that not even a panic is lost.
pub fn start(
    args: impl Iterator<Item = OsString>,
    log: Option<File>,
    on_step: impl FnMut(&str),
) -> io::Result<Started> {
    let child = Command::new("/proc/self/exe")
        .args(args)
        .arg(FLAG)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.map_or_else(Stdio::null, Stdio::from))
        .spawn()?;
    wait(child, on_step)
}

fn wait(mut child: Child, on_step: impl FnMut(&str)) -> io::Result<Started> {
    let pipe = child.stdout.take().expect("it was asked to be a pipe");
    Ok(match announce::wait(BufReader::new(pipe), on_step) {
        Some(Event::Ready { text }) => Started::Serving {
            pid: child.id(),
            text,
        },
        Some(Event::Failed { code, text }) => {
            child.wait()?;
            Started::Failed { code, text }
        }
        Some(Event::Step { .. }) | None => Started::Died {
            how: child.wait()?.to_string(),
        },
    })
}

/// Leaves the terminal and the directory that the daemon was started from.
pub fn leave_session() -> io::Result<()> {
    // A new process is no group leader, so this works.
    rustix::process::setsid()?;
    std::env::set_current_dir(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str) -> Started {
        let child = Command::new("/bin/sh")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        wait(child, |_| {}).unwrap()
    }

    #[test]
    fn the_command_learns_what_became_of_the_daemon() {
        assert!(
            matches!(run(r#"echo '{"event":"ready","text":"up"}'"#), Started::Serving { text, .. } if text == "up")
        );
        assert_eq!(
            run(r#"echo '{"event":"failed","code":2,"text":"no"}'"#),
            Started::Failed {
                code: 2,
                text: "no".into()
            }
        );
        assert!(matches!(run("exit 3"), Started::Died { how } if how.contains('3')));
        assert!(matches!(run("kill -9 $$"), Started::Died { how } if how.contains('9')));
    }
}
