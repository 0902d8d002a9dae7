//! `casmount preset`.

use std::collections::BTreeMap;

use clap::{Args, Subcommand};
use serde::Serialize;
use tokio::runtime::Builder;

use super::{
    args::{self, BucketArgs},
    failure::Failure,
    output,
};
use crate::{
    config::{Dirs, Settings, VolumeName},
    daemon::presets,
    namespace::preset::{
        self, Preset,
        at::{PresetAt, shown},
        volume::PresetChange,
    },
};

/// Say what directories of a volume are used for.
///
/// A preset says which names of a build tool's cache stay on each machine, whether deletes are for all, and
/// what is checked before a name is shown or shared. It is kept in the settings of the volume and counts from the
/// next mount on; `casmount mount --preset` says it for one mount, and counts first. Presets: bazel, ccache,
/// sccache, plain.
#[derive(Debug, Args)]
#[command(arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  casmount preset set bazel-disk=bazel cc=ccache --store s3://my-bucket/ci
  casmount preset set .=plain --volume release
  casmount preset remove cc
  casmount preset list --json")]
pub struct PresetArgs {
    #[command(subcommand)]
    command: PresetCommand,
}

#[derive(Debug, Subcommand)]
enum PresetCommand {
    Set(SetArgs),
    Remove(RemoveArgs),
    List(ListArgs),
}

/// Which volume, and how the output is wanted.
#[derive(Debug, Args)]
struct VolumeArgs {
    /// The volume [default: main]
    #[arg(long, value_name = "NAME")]
    volume: Option<VolumeName>,
    #[command(flatten)]
    bucket: BucketArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Give directories of a volume a preset.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount preset set bazel-disk=bazel cc=ccache")]
struct SetArgs {
    /// A directory, from the root of the volume ('.': the root itself), and its preset
    #[arg(value_name = "DIR=NAME", required = true, value_parser = str::parse::<PresetAt>)]
    presets: Vec<PresetAt>,
    #[command(flatten)]
    volume: VolumeArgs,
}

/// Take the preset of directories away: what a tool makes there counts again.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount preset remove cc --volume main")]
struct RemoveArgs {
    /// A directory, from the root of the volume
    #[arg(value_name = "DIR", required = true, value_parser = preset::at::directory)]
    dirs: Vec<String>,
    #[command(flatten)]
    volume: VolumeArgs,
}

/// List the presets that a volume has, with those of the volumes that it is a fork of.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount preset list --volume main")]
struct ListArgs {
    #[command(flatten)]
    volume: VolumeArgs,
}

/// The JSON of all three commands.
#[derive(Debug, Serialize)]
struct Presets {
    volume: String,
    /// Directory, `.` for the root of the volume, to the name of its preset.
    presets: BTreeMap<String, String>,
}

pub fn run(args: &PresetArgs) -> Result<(), Failure> {
    match &args.command {
        PresetCommand::Set(args) => {
            preset::at::check(&args.presets).map_err(Failure::usage)?;
            let set = args.presets.clone();
            change(
                &args.volume,
                &PresetChange {
                    set,
                    ..PresetChange::default()
                },
            )
        }
        PresetCommand::Remove(args) => {
            let remove = args.dirs.clone();
            change(
                &args.volume,
                &PresetChange {
                    remove,
                    ..PresetChange::default()
                },
            )
        }
        PresetCommand::List(args) => {
            let settings = settings(&args.volume)?;
            let kept = block_on(presets::list(&settings, &settings.volume))??;
            print(&args.volume, &settings, kept)
        }
    }
}

fn settings(args: &VolumeArgs) -> Result<Settings, Failure> {
    let mut layer = args.bucket.layer();
    layer.volume.clone_from(&args.volume);
    args::settings(layer, args.bucket.config.as_deref(), &Dirs::of_this_process())
}

fn change(args: &VolumeArgs, change: &PresetChange) -> Result<(), Failure> {
    let settings = settings(args)?;
    let kept = block_on(presets::change(&settings, &settings.volume, change))??;
    print(args, &settings, kept)
}

fn block_on<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|err| Failure::because(1, format!("cannot start the runtime: {err}")))?;
    Ok(runtime.block_on(work))
}

fn print(args: &VolumeArgs, settings: &Settings, kept: BTreeMap<String, String>) -> Result<(), Failure> {
    let listed = kept.into_iter().map(|(dir, name)| (shown(&dir).to_owned(), name));
    let presets = Presets {
        volume: settings.volume.to_string(),
        presets: listed.collect(),
    };
    if args.json {
        return output::print_json(&presets);
    }
    if presets.presets.is_empty() {
        return output::print(&format!("volume {} has no presets\n", presets.volume));
    }
    let lines = presets.presets.iter().map(|(dir, name)| {
        let unknown = match name.parse::<Preset>() {
            Ok(_) => "",
            Err(_) => "  (not known to this program: left out)",
        };
        format!("{name:<9}{dir}{unknown}\n")
    });
    output::print(&lines.collect::<String>())
}
