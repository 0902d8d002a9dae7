//! `casmount status`.

use std::time::Duration;

use clap::Args;

use super::{args::MountedArgs, asking, failure::Failure, output};
use crate::{
    daemon::control::protocol::{Reply, Request},
    observe::render,
};

/// The daemon only looks at counters, and once at its disk.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Show what a mount holds, what it still has to upload, and how the store is.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount status /mnt/cache
  casmount status --json /mnt/cache | jq .cache.dirty_bytes")]
pub struct StatusArgs {
    #[command(flatten)]
    mounted: MountedArgs,
}

pub fn run(args: &StatusArgs) -> Result<(), Failure> {
    let mountpoint = args.mounted.canonical()?;
    match asking::ask(&mountpoint, &Request::Status, ANSWER_WITHIN)? {
        Reply::Status { status } if args.mounted.json => output::print_json(&status),
        Reply::Status { status } => output::print(&render::text(&status)),
        other => Err(asking::odd(&mountpoint, &other)),
    }
}
