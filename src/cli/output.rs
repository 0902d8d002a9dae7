//! What commands print: facts to standard output, progress to standard error.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::{
    base::units::format_size,
    cli::failure::Failure,
    daemon::control::protocol::{DrainReport, Progress},
    observe::render::count,
};

/// Prints text; a reader that went away (`| head`) is no failure.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(err) if err.kind() != io::ErrorKind::BrokenPipe => Err(Failure::because(
            1,
            format!("cannot write to standard output: {err}"),
        )),
        _ => Ok(()),
    }
}

/// Prints one JSON value.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).expect("these types have no state that JSON lacks");
    print(&(text + "\n"))
}

/// Shows how far something is: one line that changes on a terminal, and
/// elsewhere a line whenever the text changes.
#[derive(Debug)]
pub struct ProgressLine {
    terminal: bool,
    shown: String,
}

impl ProgressLine {
    pub fn new() -> Self {
        Self {
            terminal: io::stderr().is_terminal(),
            shown: String::new(),
        }
    }

    pub fn show(&mut self, text: &str) {
        if self.shown == text {
            return;
        }
        text.clone_into(&mut self.shown);
        if self.terminal {
            // To the start of the line, and clear what stands there.
            eprint!("\r\x1b[K{text}");
        } else {
            eprintln!("{text}");
        }
    }

    /// Clears the line, before anything else is printed.
    pub fn end(&mut self) {
        if self.terminal && !self.shown.is_empty() {
            eprint!("\r\x1b[K");
        }
        self.shown.clear();
    }
}

impl Default for ProgressLine {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether a step of a long work is worth a line where lines stay: some twenty in all, and the last.
pub fn is_shown(done: u64, of: u64) -> bool {
    done == of || done.is_multiple_of((of / 20).max(1))
}

/// A name with a line break in it must not look like two files.
pub fn escape(path: &str) -> String {
    path.chars()
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect::<Vec<_>>()
            } else {
                vec![c]
            }
        })
        .collect()
}

/// What a drain waits for, in words.
pub fn progress_text(progress: &Progress) -> String {
    let left = match progress.step.as_str() {
        "sealing" => format!("{} to seal", count(progress.unsealed, "file")),
        "promoting" => return "promoting".to_owned(),
        "publishing" => format!("{} to publish", count(progress.unpublished, "change")),
        _ => format!(
            "{} to upload ({})",
            count(progress.dirty_blobs, "blob"),
            format_size(progress.dirty_bytes)
        ),
    };
    let trouble = progress.last_error.as_ref().map(|err| format!(" ({err})"));
    format!("{}: {left}{}", progress.step, trouble.unwrap_or_default())
}

/// What a drain left undone, in words; empty when nothing.
pub fn left_text(report: &DrainReport) -> String {
    let mut left = Vec::new();
    if !report.still_open.is_empty() {
        // A few names help, a thousand do not.
        let some: Vec<_> = report.still_open.iter().take(5).map(String::as_str).collect();
        let more = report.still_open.len() - some.len();
        let more = if more == 0 {
            String::new()
        } else {
            format!(" and {more} more")
        };
        left.push(format!("still open for writing: {}{more}", some.join(", ")));
    }
    for (number, noun, what) in [
        (report.unsealed, "file", "not sealed"),
        (report.dirty_blobs, "blob", "not uploaded"),
        (report.unpublished, "change", "not published"),
        (report.quarantined_blobs, "blob", "quarantined (see the log)"),
        (report.lost_files, "file", "lost (see the log)"),
    ] {
        if number > 0 {
            left.push(format!("{} {what}", count(number, noun)));
        }
    }
    if let (false, Some(err)) = (left.is_empty(), &report.last_error) {
        left.push(format!("last error: {err}"));
    }
    left.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_named() {
        assert_eq!(left_text(&DrainReport::default()), "");
        let report = DrainReport {
            still_open: (0..7).map(|n| format!("f{n}")).collect(),
            dirty_blobs: 1,
            unpublished: 2,
            last_error: Some("no route".into()),
            ..DrainReport::default()
        };
        assert_eq!(
            left_text(&report),
            "still open for writing: f0, f1, f2, f3, f4 and 2 more; 1 blob not uploaded; 2 changes not published; \
             last error: no route"
        );
        // An old error is no news when nothing is left.
        let done = DrainReport {
            last_error: Some("no route".into()),
            ..DrainReport::default()
        };
        assert_eq!(left_text(&done), "");
    }

    #[test]
    fn progress_speaks_of_the_step() {
        let progress = Progress {
            step: "uploading".into(),
            dirty_blobs: 3,
            dirty_bytes: 3 << 20,
            ..Progress::default()
        };
        assert_eq!(progress_text(&progress), "uploading: 3 blobs to upload (3.0 MiB)");
    }
}
