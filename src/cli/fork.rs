//! `casmount fork`.

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use tokio::runtime::Builder;

use super::{
    args::{self, BucketArgs},
    failure::Failure,
    output,
};
use crate::{
    base::units::format_moment,
    config::{Dirs, VolumeName},
    daemon,
    namespace::stack::ForkPoint,
};

/// Make volumes that lie over others.
///
/// A fork shows what its parent has and keeps what is changed in it to itself: the parent never sees any of it.
#[derive(Debug, Args)]
#[command(arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  casmount fork create pr-17 --from main --store s3://my-bucket/ci
  casmount mount --volume pr-17 --store s3://my-bucket/ci /mnt/pr")]
pub struct ForkArgs {
    #[command(subcommand)]
    command: ForkCommand,
}

#[derive(Debug, Subcommand)]
enum ForkCommand {
    Create(CreateArgs),
}

/// Make a volume that lies over another one.
///
/// Takes a moment however large the parent is: nothing is copied. Mount it by its name as any other volume.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount fork create pr-17 --from main
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
    created_millis: u64,
}

pub fn run(args: &ForkArgs) -> Result<(), Failure> {
    match &args.command {
        ForkCommand::Create(args) => create(args),
    }
}

fn create(args: &CreateArgs) -> Result<(), Failure> {
    let dirs = Dirs::of_this_process();
    let settings = args::settings(args.bucket.layer(), args.bucket.config.as_deref(), &dirs)?;
    let point = match args.at {
        At::Live => ForkPoint::Live,
        At::Now => ForkPoint::Now,
    };
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|err| Failure::because(1, format!("cannot start the runtime: {err}")))?;
    let made = runtime.block_on(daemon::fork::create(&settings, &args.name, &args.from, point))?;
    let fork = Fork {
        volume: args.name.to_string(),
        parent: args.from.to_string(),
        until_millis: made.parent.and_then(|parent| parent.until_millis),
        created_millis: made.created_millis,
    };
    if args.json {
        return output::print_json(&fork);
    }
    let seen = match fork.until_millis {
        None => "live".to_owned(),
        Some(until) => format!("as of {}", format_moment(until)),
    };
    output::print(&format!(
        "made volume {}, a fork of {} ({seen})\n",
        fork.volume, fork.parent
    ))
}
