//! `casmount commit`.

use std::time::Duration;

use clap::Args;

use super::{
    args::{self, MountedArgs},
    asking,
    failure::Failure,
    output,
};
use crate::{
    daemon::control::protocol::{CommitReport, Reply, Request},
    observe::render::count,
};

/// Make what was done in a mounted fork a part of its parent.
///
/// Waits until everything closed so far is in the store, as casmount flush does, then promotes the fork into its
/// parent. Where the parent changed the same path later, the parent's change stays. The mount goes on as before.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount mount --fork-from main --volume job-17 /mnt/cache
  make && casmount commit /mnt/cache")]
pub struct CommitArgs {
    #[command(flatten)]
    mounted: MountedArgs,
    /// How long to wait
    #[arg(long, value_name = "TIME", default_value = "90s", value_parser = args::duration)]
    deadline: Duration,
}

pub fn run(args: &CommitArgs) -> Result<(), Failure> {
    let mountpoint = args.mounted.canonical()?;
    let request = Request::Commit {
        deadline_millis: args.deadline.as_millis() as u64,
    };
    match asking::await_work(&mountpoint, &request, args.deadline)? {
        Reply::Committed { drained, committed } => {
            if args.mounted.json {
                let json = serde_json::json!({ "drained": drained, "committed": committed });
                output::print_json(&json)?;
            }
            let Some(committed) = committed else {
                return Err(Failure::because(
                    1,
                    format!(
                        "nothing was promoted, because not everything of {} is in the store: {}",
                        mountpoint.display(),
                        output::left_text(&drained)
                    ),
                ));
            };
            if let Some(failure) = failure_of(&committed) {
                return Err(failure);
            }
            if args.mounted.json {
                return Ok(());
            }
            output::print(&text(&committed))
        }
        other => Err(asking::odd(&mountpoint, &other)),
    }
}

/// What was promoted, in a line.
pub fn text(committed: &CommitReport) -> String {
    let removed = match committed.removed {
        0 => String::new(),
        removed => format!(", {removed} of them removed"),
    };
    format!(
        "promoted {} of volume {} into {}{removed}\n",
        count(committed.changes, "path"),
        committed.volume,
        committed.into
    )
}

/// The failure to promote, with what to do about it.
pub fn failure_of(committed: &CommitReport) -> Option<Failure> {
    let error = committed.error.as_ref()?;
    let CommitReport { volume, into, .. } = committed;
    Some(Failure::because(
        1,
        format!(
            "volume {volume} was not promoted into {into}: {error}; its changes are kept, promote them with: \
             casmount fork promote {volume} --into {into}"
        ),
    ))
}
