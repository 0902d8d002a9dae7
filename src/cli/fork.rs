//! `casmount fork`.

use std::sync::Mutex;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use super::{
    args::{self, BucketArgs},
    commit, confirm,
    failure::Failure,
    output::{self, ProgressLine},
};
use crate::{
    base::units::format_moment,
    config::{Dirs, Settings, VolumeName},
    daemon::{self, control::protocol::CommitReport},
    namespace::{promote::PromoteStep, stack::ForkPoint},
    observe::render::count,
};

/// Make, promote and delete volumes that lie over others.
///
/// A fork shows what its parent has and keeps what is changed in it to itself: the parent sees nothing of it until
/// the fork is promoted.
#[derive(Debug, Args)]
#[command(arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  casmount fork create pr-17 --from main --store s3://my-bucket/ci
  casmount mount --volume pr-17 --store s3://my-bucket/ci /mnt/pr
  casmount fork promote pr-17 --into main --store s3://my-bucket/ci
  casmount fork delete pr-17 --yes --store s3://my-bucket/ci")]
pub struct ForkArgs {
    #[command(subcommand)]
    command: ForkCommand,
}

#[derive(Debug, Subcommand)]
enum ForkCommand {
    Create(CreateArgs),
    Promote(PromoteArgs),
    Delete(DeleteArgs),
}

/// Make a volume that lies over another one.
///
/// Takes a moment however large the parent is: nothing is copied. Mount it by its name as any other volume.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount fork create pr-17 --from main
  casmount fork create pr-18 --from main --own-prefix
  casmount fork create release-2 --from main --at now --store s3://my-bucket/ci")]
struct CreateArgs {
    /// What the fork is called
    name: VolumeName,
    /// The volume that it lies over
    #[arg(long, value_name = "PARENT")]
    from: VolumeName,
    /// How much of the parent it shows
    #[arg(long, value_enum, default_value_t = At::Live)]
    at: At,
    /// Keep its blobs apart, below its own prefix in the store: for machines that may write nothing else, those
    /// of pull requests for example. Promoting then reads every byte and copies what is right
    #[arg(long)]
    own_prefix: bool,
    #[command(flatten)]
    bucket: BucketArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum At {
    /// Also what is changed in it later, where the fork has no change of its own
    Live,
    /// What was published in it until now
    Now,
}

/// The JSON of `casmount fork create`.
#[derive(Debug, Serialize)]
struct Fork {
    volume: String,
    parent: String,
    /// What is published in the parent later is not seen; null: all of it is.
    until_millis: Option<u64>,
    /// Its blobs are kept apart.
    own_prefix: bool,
    created_millis: u64,
}

/// Make what was changed in a fork a part of its parent.
///
/// Everything that was written, removed or renamed in the fork and published is made in the parent, too. Where the
/// parent changed the same path later, the parent's change stays. The fork stays as it is, and may be promoted again.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount fork promote pr-17 --into main
  casmount fork promote pr-17 --into main --json --store s3://my-bucket/ci")]
struct PromoteArgs {
    /// The fork
    name: VolumeName,
    /// Its parent
    #[arg(long, value_name = "PARENT")]
    into: VolumeName,
    #[command(flatten)]
    bucket: BucketArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Delete a fork, and with it every change in it that was not promoted.
///
/// Not while another volume lies over it, or it has snapshots. Its name stays taken. A machine that still has it mounted goes on showing
/// what it has, publishes nothing any more, and says so in its status.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount fork delete pr-17
  casmount fork delete pr-17 --yes --store s3://my-bucket/ci")]
struct DeleteArgs {
    /// The fork
    name: VolumeName,
    /// Do not ask; needed where there is no terminal to ask at
    #[arg(long, short = 'y')]
    yes: bool,
    #[command(flatten)]
    bucket: BucketArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The JSON of `casmount fork delete`.
#[derive(Debug, Serialize)]
struct DeletedJson {
    volume: String,
    /// It had been deleted before.
    again: bool,
    /// Objects of the store that were removed now.
    objects: u64,
}

pub fn run(args: &ForkArgs) -> Result<(), Failure> {
    match &args.command {
        ForkCommand::Create(args) => create(args),
        ForkCommand::Promote(args) => promote(args),
        ForkCommand::Delete(args) => delete(args),
    }
}

fn settings(bucket: &BucketArgs) -> Result<Settings, Failure> {
    args::settings(bucket.layer(), bucket.config.as_deref(), &Dirs::of_this_process())
}

fn promote(args: &PromoteArgs) -> Result<(), Failure> {
    let settings = settings(&args.bucket)?;
    let line = Mutex::new(ProgressLine::new());
    let show = |step| {
        if let (Ok(mut line), Some(text)) = (line.lock(), step_text(step)) {
            line.show(&text);
        }
    };
    let done = args::block_on(daemon::fork::promote(&settings, &args.name, &args.into, &show));
    if let Ok(mut line) = line.lock() {
        line.end();
    }
    let done = done??;
    let report = CommitReport {
        volume: args.name.to_string(),
        into: done.into.to_string(),
        changes: done.changes,
        removed: done.removed,
        segments: done.segments,
        error: None,
    };
    if args.json {
        return output::print_json(&report);
    }
    output::print(&commit::text(&report))
}

fn step_text(step: PromoteStep) -> Option<String> {
    let (verb, done, of, noun) = match step {
        PromoteStep::Reading { segments, of } => ("reading", segments, of, "segment"),
        PromoteStep::Confirming { objects, of } => ("confirming", objects, of, "object"),
        PromoteStep::Writing { changes, of } => ("publishing", changes, of, "path"),
    };
    output::is_shown(done, of).then(|| format!("{verb}: {done} of {}", count(of, noun)))
}

fn delete(args: &DeleteArgs) -> Result<(), Failure> {
    let settings = settings(&args.bucket)?;
    if !args.yes {
        let (what, name) = (format!("volume {}", args.name), &args.name);
        confirm::deleting(
            &what,
            &format!("Delete volume {name}, and every change in it that was not promoted?"),
        )?;
    }
    let mut line = ProgressLine::new();
    let done = args::block_on(daemon::fork::delete(&settings, &args.name, |removed| {
        if removed.is_multiple_of(100) {
            line.show(&format!("removing: {} so far", count(removed, "object")));
        }
    }));
    line.end();
    let done = done??;
    let deleted = DeletedJson {
        volume: args.name.to_string(),
        again: done.again,
        objects: done.objects,
    };
    if args.json {
        return output::print_json(&deleted);
    }
    let before = if deleted.again {
        " (it was deleted before)"
    } else {
        ""
    };
    output::print(&format!("deleted volume {}{before}\n", deleted.volume))
}

fn create(args: &CreateArgs) -> Result<(), Failure> {
    let settings = settings(&args.bucket)?;
    let point = match args.at {
        At::Live => ForkPoint::Live,
        At::Now => ForkPoint::Now,
    };
    let made = args::block_on(daemon::fork::create(
        &settings,
        &args.name,
        &args.from,
        point,
        args.own_prefix,
    ))??;
    let fork = Fork {
        volume: args.name.to_string(),
        parent: args.from.to_string(),
        until_millis: made.parent.and_then(|parent| parent.until_millis),
        own_prefix: made.own_prefix,
        created_millis: made.created_millis,
    };
    if args.json {
        return output::print_json(&fork);
    }
    let seen = match fork.until_millis {
        None => "live".to_owned(),
        Some(until) => format!("as of {}", format_moment(until)),
    };
    let seen = if fork.own_prefix {
        format!("{seen}, its blobs apart")
    } else {
        seen
    };
    output::print(&format!(
        "made volume {}, a fork of {} ({seen})\n",
        fork.volume, fork.parent
    ))
}
