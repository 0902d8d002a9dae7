//! The command line: reads arguments, asks the daemon, prints.
//!
//! Exit codes: 0 done, 1 failed, 2 the command itself is wrong. A failure is one
//! line on standard error: what happened, to what; what to do. Facts go to
//! standard output, as text or with `--json` as one JSON value.

// Doc comments of arguments are read on a terminal, where marks and links would be noise.
#![allow(clippy::doc_markdown, rustdoc::bare_urls, rustdoc::broken_intra_doc_links)]

pub mod args;
pub mod asking;
pub mod commit;
pub mod compact;
pub mod confirm;
pub mod doctor;
pub mod failure;
pub mod flush;
pub mod fork;
pub mod ls;
pub mod mount;
pub mod output;
pub mod preset;
mod retention;
pub mod snapshot;
pub mod status;
pub mod sweep;
pub mod unmount;
pub mod volume;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::daemon::root_check;
use failure::Failure;

/// Mounts a content-addressed store as an ordinary directory that many machines share through a bucket.
#[derive(Debug, Parser)]
#[command(
    name = "casmount",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
#[command(after_help = "\
Examples:
  casmount mount /mnt/cache                        a store on this disk, nothing to configure
  casmount mount --store s3://my-bucket /mnt/cache shared by every machine that does the same
  casmount status /mnt/cache
  casmount unmount /mnt/cache")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Mount(Box<mount::MountArgs>),
    Unmount(unmount::UnmountArgs),
    Flush(flush::FlushArgs),
    Commit(commit::CommitArgs),
    Compact(compact::CompactArgs),
    Fork(fork::ForkArgs),
    Volume(volume::VolumeArgs),
    Preset(preset::PresetArgs),
    Snapshot(snapshot::SnapshotArgs),
    Status(status::StatusArgs),
    Sweep(sweep::SweepArgs),
    Ls(ls::LsArgs),
    Doctor(doctor::DoctorArgs),
    /// What the daemon starts to look at its mount.
    #[command(name = root_check::SUBCOMMAND, hide = true)]
    ReadRoot {
        mountpoint: PathBuf,
    },
}

/// Runs the program.
pub fn run() -> ExitCode {
    // Clap prints usage errors by itself, with exit code 2.
    let cli = Cli::parse();
    let done = match cli.command {
        Command::Mount(args) => mount::run(&args),
        Command::Unmount(args) => unmount::run(&args),
        Command::Flush(args) => flush::run(&args),
        Command::Commit(args) => commit::run(&args),
        Command::Fork(args) => fork::run(&args),
        Command::Volume(args) => volume::run(&args),
        Command::Preset(args) => preset::run(&args),
        Command::Snapshot(args) => snapshot::run(&args),
        Command::Compact(args) => compact::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Sweep(args) => sweep::run(&args),
        Command::Ls(args) => ls::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::ReadRoot { mountpoint } => {
            root_check::look(&mountpoint).map_err(|err| Failure::failed(&err))
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        for command in Cli::command()
            .get_subcommands()
            .filter(|command| !command.is_hide_set())
        {
            let help = command.clone().render_long_help().to_string();
            assert!(help.contains("Example"), "{}", command.get_name());
            assert!(
                help.contains(&format!("casmount {}", command.get_name())),
                "{}",
                command.get_name()
            );
        }
    }
}
