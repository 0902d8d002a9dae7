//! `casmount sweep`.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use clap::Args;
use serde::Serialize;
use tokio::runtime::Builder;

use super::{
    args::{self, BucketArgs},
    failure::Failure,
    output::{self, ProgressLine},
    retention::{self, Retention},
};
use crate::{
    base::{
        units::{format_moment, format_size},
        volume::VolumePattern,
    },
    config::{Dirs, VolumeName},
    daemon,
    namespace::{
        expire::{ExpireOptions, MIN_EXPIRE, SHORT_EXPIRE, VolumeExpiry},
        sweep::{
            Amount, Amounts, MIN_LOG_AGE, MIN_WINDOW, Progress, SHORT_WINDOW, SweepOptions, SweepReport,
        },
    },
    observe::render::count,
};

/// Delete from the store what no name of any volume refers to.
///
/// A sweep condemns what is unused and older than the window of the store, and deletes what an earlier sweep
/// condemned at least a window ago and is still unused. That goes for the bytes of files, for the log as far as a
/// catalog has what it says, and for catalogs that nothing begins with. Run it once a day, on any machine; it may be interrupted
/// at any time, and is safe beside machines that write.
///
/// With --expire, names that no machine used for so long leave their volumes first; later sweeps then delete what only
/// they referred to. Machines tell what they use once a day or so, from the first run with --expire on: nothing goes
/// before that is known for as long.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount sweep --store s3://my-bucket/ci --dry-run    what would be deleted
  casmount sweep --store s3://my-bucket/ci              once a day
  casmount sweep --store s3://my-bucket/ci --window 3d --wait
  casmount sweep --store s3://my-bucket/ci --untrusted 'pr-*'    pull requests may write below volumes/pr-*
  casmount sweep --store s3://my-bucket/ci --expire 30d    once a day; names unused for 30 days go
  casmount sweep --store s3://my-bucket/ci --expire 30d --volume main --volume nightly
  casmount sweep --store s3://my-bucket/ci --expire 30d --dry-run    what would go
  casmount sweep --store s3://my-bucket/ci --retention lifecycle=30d    no sweeps any more")]
pub struct SweepArgs {
    #[command(flatten)]
    bucket: BucketArgs,
    /// Only tell what would be done
    #[arg(long)]
    dry_run: bool,
    /// How long what nobody names is kept. Kept in the store, for all machines; a store that does not exist is
    /// made with it [default: what the store has, at first 7d]
    #[arg(long, value_name = "DURATION", value_parser = args::duration)]
    window: Option<Duration>,
    /// Let names leave their volumes that no machine used or wrote for so long
    #[arg(long, value_name = "DURATION", value_parser = args::duration)]
    expire: Option<Duration>,
    /// The volumes whose names expire [default: all but forks]
    #[arg(long, value_name = "NAME", requires = "expire")]
    volume: Vec<VolumeName>,
    /// Volumes that machines may write to which are trusted less, beside forks with --own-prefix: a name, or the begin of
    /// names with a `*` behind it. What cannot be read of them is told, and stops nothing; their names do not expire
    #[arg(long, value_name = "NAME")]
    untrusted: Vec<VolumePattern>,
    /// Who deletes from the store what nobody uses, for all machines: `sweep`, or `lifecycle=30d`, a lifecycle rule of its
    /// bucket. Only says so in the store, and prints the rule; while nothing is mounted
    #[arg(long, value_name = "WHO", conflicts_with_all = ["expire", "window", "wait", "dry_run"])]
    retention: Option<Retention>,
    /// Stay until what is condemned now may be deleted, and delete it: takes as long as the window
    #[arg(long)]
    wait: bool,
    /// Dollars for a gigabyte (10^9 bytes) and month, for the report; S3 Standard in us-east-1 costs 0.023
    #[arg(long, value_name = "DOLLARS", default_value_t = 0.023)]
    price: f64,
    /// How much of the logs is kept at least; tests want less than is wise
    #[arg(long, value_name = "TIME", value_parser = args::duration, hide = true)]
    log_age: Option<Duration>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The JSON of `casmount sweep`.
#[derive(Debug, Serialize)]
struct Printed<'a> {
    /// Of `--expire`: a member for each volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    expiry: Option<&'a [VolumeExpiry]>,
    #[serde(flatten)]
    report: &'a SweepReport,
    deleted_dollars_per_month: f64,
    condemned_dollars_per_month: f64,
}

/// Between two lines where no terminal shows one line that changes.
const LINE_PAUSE: Duration = Duration::from_secs(10);
const TERMINAL_PAUSE: Duration = Duration::from_millis(100);

/// Characters of the bar.
const BAR: usize = 30;

pub fn run(args: &SweepArgs) -> Result<(), Failure> {
    if let Some(window) = args.window {
        check_window(window)?;
    }
    if let Some(expire) = args.expire {
        check_expire(expire)?;
    }
    if !args.price.is_finite() || args.price < 0.0 {
        return Err(Failure::usage(
            "--price is a number of dollars, 0.023 for example",
        ));
    }
    let dirs = Dirs::of_this_process();
    let settings = args::settings(args.bucket.layer(), args.bucket.config.as_deref(), &dirs)?;
    if let Some(retention) = args.retention {
        args::block_on(daemon::retention::set(&settings, retention.lifetime()))??;
        return output::print(&retention::text(&settings, retention));
    }
    let options = SweepOptions {
        window: args.window,
        dry_run: args.dry_run,
        wait: args.wait,
        price: args.price,
        untrusted: args.untrusted.clone(),
        log_age: args.log_age.unwrap_or(MIN_LOG_AGE),
    };
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|err| Failure::because(1, format!("cannot start the runtime: {err}")))?;
    let mut shown = Shown::new();
    let expire = args.expire.map(|unused_for| ExpireOptions {
        unused_for,
        volumes: args.volume.clone(),
        untrusted: args.untrusted.clone(),
        dry_run: args.dry_run,
    });
    let expiry = expire
        .map(|expire| {
            let expired = runtime.block_on(daemon::expire::run(&settings, &expire, &mut |progress| {
                shown.show(progress);
            }));
            shown.line.end();
            expired
        })
        .transpose()?;
    if let Some((expiry, _)) = expiry.as_ref().filter(|_| !args.json) {
        output::print(&expiry_text(expiry, args.dry_run))?;
    }
    let (expiry, is_swept) = match expiry {
        Some((expiry, is_swept)) => (Some(expiry), is_swept),
        None => (None, true),
    };
    if !is_swept {
        return if args.json {
            output::print_json(&serde_json::json!({ "expiry": expiry }))
        } else {
            Ok(())
        };
    }
    let swept = runtime.block_on(daemon::sweep::run(&settings, &options, &mut |progress| {
        shown.show(progress);
    }));
    shown.line.end();
    let report = swept?;
    let all = report.objects.all;
    if args.json {
        return output::print_json(&Printed {
            expiry: expiry.as_deref(),
            report: &report,
            deleted_dollars_per_month: report.dollars(all.deleted),
            condemned_dollars_per_month: report.dollars(sum(&[all.condemned, all.waiting])),
        });
    }
    output::print(&text(&report))
}

/// A window that is a typing error is refused, one that is merely short is told.
fn check_window(window: Duration) -> Result<(), Failure> {
    if window < MIN_WINDOW {
        return Err(Failure::usage(format!(
            "--window is at least {} s: the clocks of stores have whole seconds",
            MIN_WINDOW.as_secs()
        )));
    }
    if window < SHORT_WINDOW {
        eprintln!(
            "casmount: a window below an hour is short: a machine that sleeps, or is cut off, for half of it uploads again \
             what it had not published, and a build may miss files that were deleted while it ran"
        );
    }
    Ok(())
}

/// A time that is a typing error is refused, one that is merely short is told.
fn check_expire(expire: Duration) -> Result<(), Failure> {
    if expire < MIN_EXPIRE {
        return Err(Failure::usage(format!(
            "--expire is at least {} s: the clocks of stores have whole seconds",
            MIN_EXPIRE.as_secs()
        )));
    }
    if expire < SHORT_EXPIRE {
        eprintln!(
            "casmount: names that are used once a day or less go when they expire in less than two days, and machines tell \
             more often what they use"
        );
    }
    Ok(())
}

/// Shows progress, not too often.
struct Shown {
    line: ProgressLine,
    pause: Duration,
    last: Option<(&'static str, Instant)>,
}

impl Shown {
    fn new() -> Self {
        Self {
            line: ProgressLine::new(),
            pause: if io::stderr().is_terminal() {
                TERMINAL_PAUSE
            } else {
                LINE_PAUSE
            },
            last: None,
        }
    }

    fn show(&mut self, progress: &Progress) {
        let is_new = self.last.is_none_or(|(step, at)| {
            let is_over = progress.total.is_some_and(|total| progress.done >= total);
            step != progress.step || at.elapsed() >= self.pause || is_over
        });
        if is_new {
            self.last = Some((progress.step, Instant::now()));
            self.line.show(&progress_text(progress));
        }
    }
}

fn progress_text(progress: &Progress) -> String {
    match progress.total {
        Some(total) if total > 0 => {
            let full = (progress.done.min(total) * BAR as u64 / total) as usize;
            let bar = format!("{}{}", "#".repeat(full), ".".repeat(BAR - full));
            format!("[{bar}] {}: {} of {total}", progress.step, progress.done)
        }
        _ => format!("{}: {}", progress.step, progress.done),
    }
}

fn sum(amounts: &[Amount]) -> Amount {
    amounts.iter().fold(Amount::default(), |sum, amount| Amount {
        objects: sum.objects + amount.objects,
        bytes: sum.bytes + amount.bytes,
    })
}

fn expiry_text(volumes: &[VolumeExpiry], dry_run: bool) -> String {
    let mut lines = Vec::new();
    for of in volumes {
        let volume = &of.volume;
        if let Some(moment) = of.not_before_millis {
            lines.push(format!(
                "volume {volume}: nothing expires before {}: what machines use is not known for long enough",
                format_moment(moment)
            ));
            continue;
        }
        let verb = if dry_run { "would expire" } else { "expired" };
        lines.push(format!(
            "volume {volume}: {} ({}) {verb}, of {}; {} in use, {} younger than {} s",
            count(of.expired.names, "name"),
            format_size(of.expired.bytes),
            count(of.all.names, "name"),
            of.used.names,
            of.young.names,
            of.unused_seconds,
        ));
    }
    if lines.is_empty() {
        lines.push("no volume has names that expire".to_owned());
    }
    lines.join("\n") + "\n"
}

fn text(report: &SweepReport) -> String {
    let amount = |amount: Amount| {
        format!(
            "{} ({})",
            count(amount.objects, "object"),
            format_size(amount.bytes)
        )
    };
    let money = |amount: Amount| {
        format!(
            "${:.2} a month at ${} a gigabyte",
            report.dollars(amount),
            report.price_per_gb_month
        )
    };
    let all = report.objects.all;
    let mut lines = vec![format!(
        "checked {} against {} in {}{}; {} in use, {} younger than the window of {} s",
        amount(all.all),
        count(report.names, "name"),
        count(report.volumes, "volume"),
        match report.snapshots {
            0 => String::new(),
            snapshots => format!(" and {}", count(snapshots, "snapshot")),
        },
        amount(all.used),
        amount(all.young),
        report.window_seconds,
    )];
    let (deleted, condemned) = if report.dry_run {
        ("would delete", "would condemn")
    } else {
        ("deleted", "condemned")
    };
    lines.push(format!(
        "{deleted} {}: {}",
        amount(all.deleted),
        money(all.deleted)
    ));
    lines.push(format!(
        "{condemned} {}: {}",
        amount(all.condemned),
        money(all.condemned)
    ));
    for (what, of) in [
        ("segments of logs", report.objects.of_logs),
        ("parts of catalogs", report.objects.of_catalogs),
    ] {
        lines.extend(of_these(what, of, report.dry_run));
    }
    if all.waiting.objects > 0 {
        lines.push(format!("{} were condemned before", amount(all.waiting)));
    }
    if all.left.objects > 0 {
        lines.push(format!(
            "{} more are unused, and left to the next sweep",
            amount(all.left)
        ));
    }
    lines.extend(ignored(&report.ignored));
    if report.lost_lists > 0 {
        lines.push(format!(
            "{} of large files are gone from the store: those files cannot be read",
            count(report.lost_lists, "chunk list")
        ));
    }
    if let Some(due) = report.next_due_millis {
        lines.push(format!(
            "a sweep after {} deletes what is condemned",
            format_moment(due)
        ));
    }
    lines.join("\n") + "\n"
}

/// Says what was not understood, and stopped nothing.
fn ignored(what: &[String]) -> Vec<String> {
    const SHOWN: usize = 5;
    let some = what
        .iter()
        .take(SHOWN)
        .map(|one| format!("counts for nothing: {one}"));
    let more = what.len().saturating_sub(SHOWN);
    let more = (more > 0).then(|| format!("counts for nothing: at least {more} more (--json shows them)"));
    some.chain(more).collect()
}

/// Says how much of what was told is of one sort.
fn of_these(what: &str, of: Amounts, dry_run: bool) -> Option<String> {
    let told = |amount: Amount| format!("{} ({})", amount.objects, format_size(amount.bytes));
    let would = if dry_run { "would be " } else { "" };
    (of.all.objects > 0).then(|| {
        format!(
            "of these, {what}: {} checked, {would}deleted {}, {would}condemned {}",
            told(of.all),
            told(of.deleted),
            told(of.condemned)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::namespace::sweep::Counted;

    #[test]
    fn the_bar_is_as_full_as_the_work() {
        let progress = |done, total| Progress {
            step: "reading",
            done,
            total,
        };
        assert_eq!(
            progress_text(&progress(1, Some(2))),
            "[###############...............] reading: 1 of 2"
        );
        assert_eq!(progress_text(&progress(7, None)), "reading: 7");
    }

    #[test]
    fn a_report_tells_what_was_done_and_what_is_to_come() {
        let report = SweepReport {
            dry_run: true,
            window_seconds: 604_800,
            volumes: 1,
            names: 3,
            objects: Counted {
                all: Amounts {
                    all: Amount {
                        objects: 5,
                        bytes: 5_000_000_000,
                    },
                    deleted: Amount {
                        objects: 2,
                        bytes: 2_000_000_000,
                    },
                    ..Amounts::default()
                },
                of_logs: Amounts {
                    all: Amount {
                        objects: 3,
                        bytes: 300,
                    },
                    ..Amounts::default()
                },
                of_catalogs: Amounts::default(),
            },
            next_due_millis: Some(1_767_225_600_000),
            price_per_gb_month: 0.023,
            ..SweepReport::default()
        };
        let text = text(&report);
        for words in [
            "checked 5 objects (4.7 GiB) against 3 names in 1 volume;",
            "would delete 2 objects (1.9 GiB): $0.05 a month at $0.023 a gigabyte\n",
            "would condemn 0 objects",
            "of these, segments of logs: 3 (300 B) checked, would be deleted 0 (0 B), would be condemned 0 (0 B)\n",
            "a sweep after 2026-01-01 00:00:00 UTC deletes what is condemned\n",
        ] {
            assert!(text.contains(words), "{words:?} is not in {text}");
        }
    }

    #[test]
    fn a_window_that_clocks_cannot_tell_is_refused() {
        assert_eq!(check_window(Duration::from_secs(3)).unwrap_err().code(), 2);
        check_window(Duration::from_secs(7200)).unwrap();
    }
}
