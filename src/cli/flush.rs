//! `casmount flush`.

use std::time::Duration;

use clap::Args;

use super::{
    args::{self, MountedArgs},
    asking,
    failure::Failure,
    output,
};
use crate::daemon::control::protocol::{Reply, Request};

/// Wait until everything closed so far is in the store and visible to all.
///
/// Exit code 0 means: every file whose close() had returned before is durable in the store, and so is the tree
/// that names it. Files still open for writing are named, and the exit code is 1.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount flush /mnt/cache
  casmount flush --deadline 10m --json /mnt/cache")]
pub struct FlushArgs {
    #[command(flatten)]
    mounted: MountedArgs,
    /// How long to wait
    #[arg(long, value_name = "TIME", default_value = "90s", value_parser = args::duration)]
    deadline: Duration,
}

pub fn run(args: &FlushArgs) -> Result<(), Failure> {
    let mountpoint = args.mounted.canonical()?;
    let request = Request::Flush {
        deadline_millis: args.deadline.as_millis() as u64,
    };
    match asking::await_work(&mountpoint, &request, args.deadline)? {
        Reply::Flushed(report) => {
            if args.mounted.json {
                output::print_json(&report)?;
            }
            if report.complete {
                return Ok(());
            }
            Err(Failure::because(
                1,
                format!(
                    "not everything of {} is in the store: {}",
                    mountpoint.display(),
                    output::left_text(&report)
                ),
            ))
        }
        other => Err(asking::odd(&mountpoint, &other)),
    }
}
