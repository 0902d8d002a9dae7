//! `casmount unmount`.

use std::time::Duration;

use clap::Args;

use super::{
    args::{self, MountedArgs},
    asking, commit,
    failure::Failure,
    output,
};
use crate::daemon::{
    control::{
        client::ControlError,
        protocol::{Reply, Request},
    },
    mountinfo, mountpoint,
};

/// Upload what is left, then unmount.
///
/// When the deadline passes, the mount goes all the same and the exit code is 1: what was not uploaded stays in
/// the cache directory, and the next mount with it uploads the rest.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount unmount /mnt/cache
  casmount unmount --deadline 10m /mnt/cache
  casmount unmount --lazy /mnt/cache               also when programs still use it
  make && casmount unmount --success /mnt/cache    and merge the job's fork, see casmount mount --commit")]
pub struct UnmountArgs {
    #[command(flatten)]
    mounted: MountedArgs,
    /// How long to wait for uploads
    #[arg(long, value_name = "TIME", default_value = "90s", value_parser = args::duration)]
    deadline: Duration,
    /// Unmount even while programs use it: they can use what they have open until everything else is uploaded
    #[arg(long)]
    lazy: bool,
    /// The work was good: a fork that was mounted with --commit on-success becomes a part of its parent
    #[arg(long)]
    success: bool,
}

pub fn run(args: &UnmountArgs) -> Result<(), Failure> {
    let mountpoint = args.mounted.canonical()?;
    let request = Request::Unmount {
        deadline_millis: args.deadline.as_millis() as u64,
        lazy: args.lazy,
        success: args.success,
    };
    let reply = asking::await_work(&mountpoint, &request, args.deadline);
    let place = mountpoint.display();
    match reply {
        Ok(Reply::Unmounted(report)) => {
            if args.mounted.json {
                output::print_json(&report)?;
            }
            let committed = report.committed.as_ref();
            if !report.drained.complete {
                let merged = match committed {
                    Some(committed) => format!(", and nothing was promoted into {}", committed.into),
                    None => String::new(),
                };
                return Err(Failure::because(
                    1,
                    format!(
                        "unmounted {place}, but not everything is in the store{merged}: {}; the next mount with \
                         this cache directory goes on with it",
                        output::left_text(&report.drained)
                    ),
                ));
            }
            match committed {
                Some(committed) => match commit::failure_of(committed) {
                    Some(failure) => Err(failure),
                    None if args.mounted.json => Ok(()),
                    None => output::print(&commit::text(committed)),
                },
                None => Ok(()),
            }
        }
        Ok(Reply::Busy { users }) => {
            if args.mounted.json {
                output::print_json(&serde_json::json!({ "complete": false, "busy": users }))?;
            }
            let users: Vec<_> = users
                .iter()
                .map(|user| format!("{} (pid {}, {})", user.name, user.pid, user.path))
                .collect();
            let users = if users.is_empty() {
                "a program".to_owned()
            } else {
                users.join(", ")
            };
            Err(Failure::because(
                1,
                format!("{place} is in use by {users}; end it, or unmount with --lazy"),
            ))
        }
        Ok(other) => Err(asking::odd(&mountpoint, &other)),
        Err(ControlError::Died { .. }) => clear_dead(&mountpoint),
        Err(err) => Err(err.into()),
    }
}

/// A dead mount has nothing to flush and nobody to ask.
fn clear_dead(mountpoint: &std::path::Path) -> Result<(), Failure> {
    let dead = std::fs::metadata(mountpoint).is_err_and(|err| mountpoint::is_dead(&err));
    let ours = mountinfo::at(mountpoint)
        .ok()
        .flatten()
        .is_some_and(|mount| mount.is_casmount());
    if !(dead && ours) {
        return Err(Failure::because(
            1,
            format!(
                "no daemon answers for {0}; if it hangs: umount -l {0}",
                mountpoint.display()
            ),
        ));
    }
    mountpoint::unmount_lazily(mountpoint)
        .map_err(|err| Failure::because(1, format!("cannot unmount {}: {err}", mountpoint.display())))?;
    Err(Failure::because(
        1,
        format!(
            "the daemon of {} had died; its mount was taken away, and the next mount with its cache directory \
             uploads what is left",
            mountpoint.display()
        ),
    ))
}
