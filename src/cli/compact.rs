//! `casmount compact`.

use std::{cell::RefCell, time::Duration};

use clap::Args;
use serde::Serialize;
use tokio::runtime::Builder;

use super::{
    args::{self, BucketArgs},
    failure::Failure,
    output::{self, ProgressLine},
};
use crate::{
    base::units::{format_moment, format_size},
    config::{Dirs, Layer, VolumeName},
    daemon,
    namespace::catalog::compact::{Outcome, Progress},
    observe::render::count,
};

/// Make a checkpoint of a volume, so that a new machine need not read its log.
///
/// Daemons do this by themselves when a log has grown; here it is done at once, without a mount. What the last
/// five minutes brought stays in the log. Nothing is removed, and any number of machines may do it at once.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount compact --store s3://my-bucket/ci
  casmount compact --store s3://my-bucket/ci --volume pr-17 --json")]
pub struct CompactArgs {
    #[command(flatten)]
    bucket: BucketArgs,
    /// The shared tree in the store [default: main]
    #[arg(long, value_name = "NAME")]
    volume: Option<VolumeName>,
    /// How much of the log's end is left out; tests want less than is wise
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = args::duration, hide = true)]
    trail: Duration,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The JSON of `casmount compact`.
#[derive(Debug, Serialize)]
struct Report {
    volume: String,
    /// `compacted`, `nothing_new`, or `other_was_first`: another machine made a catalog meanwhile.
    outcome: &'static str,
    catalog: Option<String>,
    watermark_millis: Option<u64>,
    names: Option<u64>,
    parts: Option<u64>,
    segments: u64,
    changes: u64,
    /// Damaged segments, which nobody can read.
    left_out: u64,
    written_parts: u64,
    written_bytes: u64,
}

pub fn run(args: &CompactArgs) -> Result<(), Failure> {
    let dirs = Dirs::of_this_process();
    let flags = Layer {
        volume: args.volume.clone(),
        ..args.bucket.layer()
    };
    let settings = args::settings(flags, args.bucket.config.as_deref(), &dirs)?;
    let runtime = Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|err| Failure::because(1, format!("cannot start the runtime: {err}")))?;
    let line = RefCell::new(ProgressLine::new());
    let show = |progress: Progress| line.borrow_mut().show(&progress_text(&progress));
    let done = runtime.block_on(daemon::compact::run(&settings, args.trail, show));
    line.borrow_mut().end();
    let report = report(settings.volume.as_str(), done?);
    if args.json {
        return output::print_json(&report);
    }
    output::print(&(text(&report) + "\n"))
}

pub fn progress_text(progress: &Progress) -> String {
    // Elsewhere than on a terminal each text is a line: thousands tell less than a few.
    let rounded = progress.segments / 100 * 100;
    if progress.folding {
        format!("writing what {} say", count(progress.segments, "segment"))
    } else {
        format!("reading the log: {}", count(rounded, "segment"))
    }
}

fn report(volume: &str, outcome: Outcome) -> Report {
    let mut report = Report {
        volume: volume.to_owned(),
        outcome: "other_was_first",
        catalog: None,
        watermark_millis: None,
        names: None,
        parts: None,
        segments: 0,
        changes: 0,
        left_out: 0,
        written_parts: 0,
        written_bytes: 0,
    };
    let head = match outcome {
        Outcome::Lost => None,
        Outcome::NothingNew(head) => {
            report.outcome = "nothing_new";
            head
        }
        Outcome::Done(done) => {
            report.outcome = "compacted";
            (report.segments, report.changes) = (done.segments, done.changes);
            report.left_out = done.left_out;
            (report.written_parts, report.written_bytes) = (done.written_parts, done.written_bytes);
            Some(done.head)
        }
    };
    if let Some(head) = head {
        report.catalog = Some(head.catalog.to_string());
        report.watermark_millis = Some(head.watermark_millis);
        (report.names, report.parts) = (Some(head.names), Some(head.parts));
    }
    report
}

fn text(report: &Report) -> String {
    let volume = &report.volume;
    match (report.outcome, report.watermark_millis) {
        ("compacted", Some(watermark)) => {
            let left_out = match report.left_out {
                0 => String::new(),
                left_out => format!("; left out {} that nobody can read", count(left_out, "segment")),
            };
            format!(
                "compacted {} of volume {volume} into a catalog of {} as of {}: wrote {} of {} ({}){left_out}",
                count(report.segments, "segment"),
                count(report.names.unwrap_or(0), "name"),
                format_moment(watermark),
                report.written_parts,
                count(report.parts.unwrap_or(0), "part"),
                format_size(report.written_bytes)
            )
        }
        ("nothing_new", Some(watermark)) => format!(
            "nothing to do: the catalog of volume {volume} is of {}, and nothing old enough came since",
            format_moment(watermark)
        ),
        ("nothing_new", None) => {
            format!("nothing to do: the log of volume {volume} has nothing that is old enough")
        }
        _ => format!("another machine was first: it made a catalog of volume {volume} meanwhile"),
    }
}
