//! Tells whoever started the daemon how the start goes: the command that
//! waits at the other end of a pipe, and systemd.
//!
//! # The pipe
//!
//! A detached daemon's standard output is a pipe to the command that started
//! it. It carries lines of JSON, at most one of them `ready` or `failed`; the
//! end of the pipe without either means that the daemon died.
//!
//! ```text
//! {"event":"step","text":"reading the log of the volume"}
//! {"event":"ready","text":"..."}
//! {"event":"failed","code":1,"text":"there is no bucket b; ..."}
//! ```

use std::{
    io::{self, BufRead, Write},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::notify::Notifier;

/// One line of the pipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    Step { text: String },
    Ready { text: String },
    Failed { code: u8, text: String },
}

/// The daemon's end.
#[derive(Debug)]
pub struct Announcer {
    pub notifier: Option<Notifier>,
    /// Standard output is the pipe.
    pub detached: bool,
}

impl Announcer {
    pub fn step(&self, text: &str) {
        tracing::debug!("{text}");
        self.send(&Event::Step {
            text: text.to_owned(),
        });
        if let Some(notifier) = &self.notifier {
            notifier.status(text);
            // A long start that goes on is not a failed one.
            notifier.extend_timeout(Duration::from_secs(90));
        }
    }

    pub fn ready(&self, text: &str) {
        tracing::info!("{text}");
        self.send(&Event::Ready {
            text: text.to_owned(),
        });
        if let Some(notifier) = &self.notifier {
            notifier.ready(text);
        }
    }

    pub fn failed(&self, code: u8, text: &str) {
        self.send(&Event::Failed {
            code,
            text: text.to_owned(),
        });
        if let Some(notifier) = &self.notifier {
            notifier.status(text);
        }
    }

    fn send(&self, event: &Event) {
        if self.detached {
            let mut line = serde_json::to_string(event).expect("these types have no state that JSON lacks");
            line.push('\n');
            // The command may have been interrupted; the daemon goes on.
            let mut out = io::stdout().lock();
            let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
        }
    }
}

/// Reads the pipe to its decisive event; `None` when the daemon died.
pub fn wait(pipe: impl BufRead, mut on_step: impl FnMut(&str)) -> Option<Event> {
    for line in pipe.lines() {
        match serde_json::from_str(&line.ok()?) {
            Ok(Event::Step { text }) => on_step(&text),
            Ok(event) => return Some(event),
            // Something below printed to standard output; it is not for us.
            Err(_) => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_decisive_event_ends_the_wait() {
        let pipe = "{\"event\":\"step\",\"text\":\"a\"}\nnoise\n{\"event\":\"failed\",\"code\":2,\"text\":\"b\"}\n{\"event\":\"ready\",\"text\":\"c\"}\n";
        let mut steps = Vec::new();
        let event = wait(pipe.as_bytes(), |step| steps.push(step.to_owned()));
        assert_eq!(
            event,
            Some(Event::Failed {
                code: 2,
                text: "b".into()
            })
        );
        assert_eq!(steps, ["a"]);
    }

    #[test]
    fn a_daemon_that_died_is_noticed() {
        assert_eq!(wait(&b"{\"event\":\"step\",\"text\":\"a\"}\n"[..], |_| {}), None);
    }
}
