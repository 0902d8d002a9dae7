//! `casmount snapshot`.

use std::{fmt::Write, sync::Mutex};

use clap::{Args, Subcommand};
use serde::Serialize;
use tokio::runtime::Builder;

use super::{
    args::{self, BucketArgs},
    compact, confirm,
    failure::Failure,
    output::{self, ProgressLine},
};
use crate::{
    base::{
        snapshot::SnapshotTag,
        units::{format_moment, format_size},
    },
    config::{Dirs, Layer, Settings, VolumeName},
    daemon,
    namespace::snapshot::{Created, Listed, Snapshot, Step},
    observe::render::count,
};

/// Keep states of a volume under tags, for ever.
///
/// A snapshot shows a volume as it was when the snapshot was made, whatever is changed, deleted or swept later. It is
/// mounted with casmount mount --snapshot TAG, read-only.
#[derive(Debug, Args)]
#[command(arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  casmount snapshot create --tag release=1.2 --store s3://my-bucket/ci
  casmount mount --snapshot release=1.2 --store s3://my-bucket/ci /mnt/release
  casmount snapshot list --store s3://my-bucket/ci
  casmount snapshot delete release=1.2 --yes --store s3://my-bucket/ci")]
pub struct SnapshotArgs {
    #[command(subcommand)]
    command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    Create(CreateArgs),
    List(ListArgs),
    Delete(DeleteArgs),
}

/// Make a snapshot of a volume as it is now.
///
/// Everything that was published when the command began is in it; casmount flush publishes what a mount has. Of a
/// fork, what it lies over is kept as well. Nothing is copied: a catalog of the volume is written, and what it names
/// is never swept. A tag is made once.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount snapshot create --tag release=1.2
  casmount snapshot create --tag nightly-2026-11-27 --volume linux --store s3://my-bucket/ci
  casmount flush /mnt/cache && casmount snapshot create --tag v7 --json")]
struct CreateArgs {
    /// What the snapshot is called: letters, digits, '.', '_', '=' and '-'
    #[arg(long, value_name = "TAG")]
    tag: SnapshotTag,
    #[command(flatten)]
    of: VolumeArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Show which snapshots there are, of all volumes or of one.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount snapshot list
  casmount snapshot list --volume linux --store s3://my-bucket/ci --json | jq -r '.[].tag'")]
struct ListArgs {
    #[command(flatten)]
    bucket: BucketArgs,
    /// Only those of this volume
    #[arg(long, value_name = "NAME")]
    volume: Option<VolumeName>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Delete a snapshot.
///
/// What only the snapshot kept is deleted by later sweeps, a window after it was condemned; a machine that has it
/// mounted reads on until then. The volume is not touched. The tag may be made again, and is another snapshot then.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount snapshot delete release=1.1
  casmount snapshot delete release=1.1 --volume linux --yes --store s3://my-bucket/ci")]
struct DeleteArgs {
    /// The snapshot
    tag: SnapshotTag,
    /// Do not ask; needed where there is no terminal to ask at
    #[arg(long, short = 'y')]
    yes: bool,
    #[command(flatten)]
    of: VolumeArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Which volume of which store.
#[derive(Clone, Debug, Args)]
struct VolumeArgs {
    #[command(flatten)]
    bucket: BucketArgs,
    /// The shared tree in the store [default: main]
    #[arg(long, value_name = "NAME")]
    volume: Option<VolumeName>,
}

impl VolumeArgs {
    fn settings(&self) -> Result<Settings, Failure> {
        let flags = Layer {
            volume: self.volume.clone(),
            ..self.bucket.layer()
        };
        args::settings(flags, self.bucket.config.as_deref(), &Dirs::of_this_process())
    }
}

/// One snapshot in the JSON of `create` and `list`.
#[derive(Debug, Serialize)]
struct SnapshotJson {
    volume: String,
    tag: String,
    /// The state is that of this time of the store's clock; null, as all below, when the snapshot cannot be read.
    as_of_millis: Option<u64>,
    created_millis: Option<u64>,
    created_by: Option<String>,
    names: Option<u64>,
    /// The volume and those below it, from the top.
    layers: Vec<LayerJson>,
    /// Why it cannot be read.
    trouble: Option<String>,
}

#[derive(Debug, Serialize)]
struct LayerJson {
    volume: String,
    catalog: String,
    /// Its blobs are kept apart.
    own_prefix: bool,
}

impl SnapshotJson {
    fn new(volume: &VolumeName, tag: &SnapshotTag, snapshot: Result<Snapshot, String>) -> Self {
        let (snapshot, trouble) = match snapshot {
            Ok(snapshot) => (Some(snapshot), None),
            Err(trouble) => (None, Some(trouble)),
        };
        let of = snapshot.as_ref();
        let layers = of.map(|snapshot| snapshot.layers.as_slice()).unwrap_or_default();
        Self {
            volume: volume.to_string(),
            tag: tag.to_string(),
            as_of_millis: of.map(|snapshot| snapshot.as_of_millis),
            created_millis: of.map(|snapshot| snapshot.created_millis),
            created_by: of.map(|snapshot| snapshot.created_by.clone()),
            names: of.map(|snapshot| snapshot.names),
            layers: layers
                .iter()
                .map(|layer| LayerJson {
                    volume: layer.volume.to_string(),
                    catalog: layer.catalog.to_string(),
                    own_prefix: layer.own_prefix,
                })
                .collect(),
            trouble,
        }
    }
}

/// The JSON of `casmount snapshot create`.
#[derive(Debug, Serialize)]
struct CreatedJson {
    #[serde(flatten)]
    snapshot: SnapshotJson,
    /// Of its catalogs, what was not in the store before.
    written_parts: u64,
    written_bytes: u64,
}

/// The JSON of `casmount snapshot delete`.
#[derive(Debug, Serialize)]
struct DeletedJson {
    volume: String,
    tag: String,
}

pub fn run(args: &SnapshotArgs) -> Result<(), Failure> {
    match &args.command {
        SnapshotCommand::Create(args) => create(args),
        SnapshotCommand::List(args) => list(args),
        SnapshotCommand::Delete(args) => delete(args),
    }
}

fn create(args: &CreateArgs) -> Result<(), Failure> {
    let settings = args.of.settings()?;
    let runtime = Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|err| Failure::because(1, format!("cannot start the runtime: {err}")))?;
    let line = Mutex::new(ProgressLine::new());
    let show = |step: Step| {
        if let Ok(mut line) = line.lock() {
            line.show(&step_text(&step));
        }
    };
    let done = runtime.block_on(daemon::snapshot::create(&settings, &args.tag, &show));
    if let Ok(mut line) = line.lock() {
        line.end();
    }
    let Created {
        snapshot,
        written_parts,
        written_bytes,
    } = done?;
    let text = format!(
        "made snapshot {} of volume {} as of {}: {}; wrote {} ({})\n",
        args.tag,
        settings.volume,
        format_moment(snapshot.as_of_millis),
        count(snapshot.names, "name"),
        count(written_parts, "part"),
        format_size(written_bytes)
    );
    if args.json {
        return output::print_json(&CreatedJson {
            snapshot: SnapshotJson::new(&settings.volume, &args.tag, Ok(snapshot)),
            written_parts,
            written_bytes,
        });
    }
    output::print(&text)
}

fn step_text(step: &Step) -> String {
    format!(
        "volume {}: {}",
        step.volume,
        compact::progress_text(&step.progress)
    )
}

fn list(args: &ListArgs) -> Result<(), Failure> {
    let settings = args::settings(
        args.bucket.layer(),
        args.bucket.config.as_deref(),
        &Dirs::of_this_process(),
    )?;
    let listed = args::block_on(daemon::snapshot::list(&settings, args.volume.as_ref()))??;
    let json = |listed: Listed| SnapshotJson::new(&listed.volume, &listed.tag, listed.snapshot);
    let shown: Vec<SnapshotJson> = listed.into_iter().map(json).collect();
    if args.json {
        output::print_json(&shown)
    } else {
        output::print(&list_text(&shown))
    }
}

/// One line a snapshot: volume, tag, what it is.
fn list_text(snapshots: &[SnapshotJson]) -> String {
    let width = |of: fn(&SnapshotJson) -> &str| snapshots.iter().map(|one| of(one).len()).max().unwrap_or(0);
    let (volumes, tags) = (width(|one| &one.volume), width(|one| &one.tag));
    let mut out = String::new();
    for one in snapshots {
        let (volume, tag, facts) = (&one.volume, &one.tag, facts(one));
        writeln!(out, "{volume:<volumes$}  {tag:<tags$}  {facts}").expect("a string takes everything");
    }
    out
}

/// What there is to say of a snapshot, or why there is nothing.
fn facts(one: &SnapshotJson) -> String {
    let (Some(as_of), Some(names)) = (one.as_of_millis, one.names) else {
        return one.trouble.clone().unwrap_or_default();
    };
    let mut facts = vec![format!("as of {}", format_moment(as_of)), count(names, "name")];
    let below = one.layers.iter().skip(1);
    facts.extend(below.map(|layer| format!("over {}", layer.volume)));
    let by = one.created_by.as_deref().map(output::escape);
    facts.extend(by.map(|by| format!("made by {by}")));
    facts.join(", ")
}

fn delete(args: &DeleteArgs) -> Result<(), Failure> {
    let settings = args.of.settings()?;
    if !args.yes {
        let what = format!("snapshot {} of volume {}", args.tag, settings.volume);
        confirm::deleting(&what, &format!("Delete {what}, and in time what only it keeps?"))?;
    }
    args::block_on(daemon::snapshot::delete(&settings, &args.tag))??;
    if args.json {
        return output::print_json(&DeletedJson {
            volume: settings.volume.to_string(),
            tag: args.tag.to_string(),
        });
    }
    output::print(&format!(
        "deleted snapshot {} of volume {}\n",
        args.tag, settings.volume
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{base::digest::Digest, namespace::snapshot::SnapshotLayer};

    #[test]
    fn a_line_says_what_a_snapshot_is_or_why_it_cannot_be_read() {
        let layer = |volume: &str| SnapshotLayer {
            volume: volume.parse().unwrap(),
            catalog: Digest::EMPTY,
            own_prefix: false,
        };
        let snapshot = Snapshot {
            version: 1,
            as_of_millis: 1_767_225_600_000,
            created_millis: 1_767_225_600_000,
            created_by: "release@builder".to_owned(),
            names: 42,
            layers: vec![layer("pr-1"), layer("main")],
            presets: std::collections::BTreeMap::new(),
        };
        let of = |volume: &str, tag: &str, snapshot| {
            SnapshotJson::new(&volume.parse().unwrap(), &tag.parse().unwrap(), snapshot)
        };
        let all = [
            of("main", "release=1.2", Err("it is damaged".to_owned())),
            of("pr-1", "v1", Ok(snapshot)),
        ];
        let expected = [
            "main  release=1.2  it is damaged\n",
            "pr-1  v1           as of 2026-01-01 00:00:00 UTC, 42 names, over main, made by release@builder\n",
        ];
        assert_eq!(list_text(&all), expected.concat());
        assert_eq!(list_text(&[]), "");
    }
}
