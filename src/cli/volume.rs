//! `casmount volume`.

use std::fmt::Write;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{
    args::{self, BucketArgs},
    failure::Failure,
    output::{self, ProgressLine, escape},
};
use crate::{
    base::units::format_moment,
    config::{Dirs, Settings, VolumeName},
    daemon,
    namespace::{
        diff::Difference,
        history::{Before, Publication},
        volumes::Listed,
    },
    observe::render::count,
};

/// Look at the volumes of a store, without a mount.
#[derive(Debug, Args)]
#[command(arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  casmount volume list --store s3://my-bucket/ci
  casmount volume diff main pr-17
  casmount volume log main -n 5 --paths")]
pub struct VolumeArgs {
    #[command(subcommand)]
    command: VolumeCommand,
}

#[derive(Debug, Subcommand)]
enum VolumeCommand {
    List(ListArgs),
    Diff(DiffArgs),
    Log(LogArgs),
}

/// Show which volumes there are, and what they are forks of.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount volume list
  casmount volume list --store s3://my-bucket/ci --json | jq -r '.[].volume'")]
struct ListArgs {
    /// Also those that were deleted
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    bucket: BucketArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Show where two volumes differ.
///
/// One line for each path: A only the second volume has it, D only the first has it, M other content, m the same
/// content with another mode, owner, time or attribute. Times of directories are not compared. Exit code 0 in any case.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount volume diff main pr-17                  what the fork changed
  casmount volume diff --json main pr-17 | jq length")]
struct DiffArgs {
    /// The volume to start from
    a: VolumeName,
    /// The volume that is compared with it
    b: VolumeName,
    #[command(flatten)]
    bucket: BucketArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Show what was published in a volume: when, by which machine, how much; the newest first.
///
/// Of a fork this is what was published in the fork itself. The machine is the one that casmount status names. Sweeps
/// remove what is in a catalog; the last line then says so.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount volume log main
  casmount volume log main -n 100 --paths --store s3://my-bucket/ci")]
struct LogArgs {
    volume: VolumeName,
    /// How many publications to show
    #[arg(short = 'n', long = "count", value_name = "COUNT", default_value_t = 20)]
    limit: usize,
    /// Show the paths, too
    #[arg(long)]
    paths: bool,
    #[command(flatten)]
    bucket: BucketArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &VolumeArgs) -> Result<(), Failure> {
    match &args.command {
        VolumeCommand::List(args) => list(args),
        VolumeCommand::Diff(args) => diff(args),
        VolumeCommand::Log(args) => log(args),
    }
}

fn settings(bucket: &BucketArgs) -> Result<Settings, Failure> {
    args::settings(bucket.layer(), bucket.config.as_deref(), &Dirs::of_this_process())
}

/// One volume in the JSON of `casmount volume list`.
#[derive(Debug, Serialize)]
struct ListedJson {
    volume: String,
    parent: Option<String>,
    /// What is published in the parent later is not seen; null: all of it is.
    until_millis: Option<u64>,
    /// Its blobs are kept apart.
    own_prefix: bool,
    /// null: not known, because it has no settings.
    created_millis: Option<u64>,
    deleted_millis: Option<u64>,
    /// Why its settings cannot be read.
    trouble: Option<String>,
}

impl From<Listed> for ListedJson {
    fn from(listed: Listed) -> Self {
        Self {
            volume: listed.volume.to_string(),
            until_millis: listed.parent.as_ref().and_then(|parent| parent.until_millis),
            own_prefix: listed.own_prefix,
            parent: listed.parent.map(|parent| parent.volume.to_string()),
            created_millis: listed.created_millis,
            deleted_millis: listed.deleted_millis,
            trouble: listed.trouble,
        }
    }
}

fn list(args: &ListArgs) -> Result<(), Failure> {
    let settings = settings(&args.bucket)?;
    let listed = args::block_on(daemon::volume::list(&settings, args.all))??.into_iter();
    let shown = listed.filter(|listed| args.all || listed.deleted_millis.is_none());
    let shown: Vec<ListedJson> = shown.map(ListedJson::from).collect();
    if args.json {
        output::print_json(&shown)
    } else {
        output::print(&list_text(&shown))
    }
}

/// One line a volume: its name, what it is.
fn list_text(volumes: &[ListedJson]) -> String {
    let width = volumes
        .iter()
        .map(|listed| listed.volume.len())
        .max()
        .unwrap_or(0);
    let mut out = String::new();
    for listed in volumes {
        let mut facts = Vec::new();
        if let Some(parent) = &listed.parent {
            facts.push(match listed.until_millis {
                None => format!("fork of {parent} (live)"),
                Some(until) => format!("fork of {parent} (as of {})", format_moment(until)),
            });
        }
        if listed.own_prefix {
            facts.push("its blobs apart".to_owned());
        }
        facts.extend(
            listed
                .created_millis
                .map(|made| format!("made {}", format_moment(made))),
        );
        facts.extend(
            listed
                .deleted_millis
                .map(|gone| format!("deleted {}", format_moment(gone))),
        );
        facts.extend(listed.trouble.clone());
        let line = format!("{:<width$}  {}", listed.volume, facts.join(", "));
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// One path in the JSON of `casmount volume diff`.
#[derive(Debug, Serialize)]
struct DifferenceJson {
    path: String,
    /// `added`, `removed`, `content`, `attributes`.
    what: &'static str,
}

fn diff(args: &DiffArgs) -> Result<(), Failure> {
    let settings = settings(&args.bucket)?;
    let line = std::sync::Mutex::new(ProgressLine::new());
    let found = args::block_on(daemon::volume::diff(&settings, &args.a, &args.b, &|read, of| {
        if let Ok(mut line) = line.lock()
            && output::is_shown(read, of)
        {
            line.show(&format!("reading: {read} of {}", count(of, "object")));
        }
    }));
    if let Ok(mut line) = line.lock() {
        line.end();
    }
    let found = found??;
    if args.json {
        let json = |(path, difference): &(Vec<u8>, Difference)| DifferenceJson {
            path: String::from_utf8_lossy(path).into_owned(),
            what: words(*difference).1,
        };
        return output::print_json(&found.iter().map(json).collect::<Vec<_>>());
    }
    let mut out = String::new();
    for (path, difference) in &found {
        let path = escape(&String::from_utf8_lossy(path));
        writeln!(out, "{} {path}", words(*difference).0).expect("a string takes everything");
    }
    output::print(&out)
}

/// For people, and for programs.
fn words(difference: Difference) -> (char, &'static str) {
    match difference {
        Difference::Added => ('A', "added"),
        Difference::Removed => ('D', "removed"),
        Difference::Content => ('M', "content"),
        Difference::Attributes => ('m', "attributes"),
    }
}

/// One publication in the JSON of `casmount volume log`.
#[derive(Debug, Serialize)]
struct PublicationJson {
    published_millis: u64,
    machine: String,
    seq: u64,
    changes: u64,
    removed: u64,
    /// With `--paths`.
    #[serde(skip_serializing_if = "Option::is_none")]
    paths: Option<Vec<PathJson>>,
}

#[derive(Debug, Serialize)]
struct PathJson {
    path: String,
    /// There is nothing at it any more.
    removed: bool,
}

impl PublicationJson {
    fn new(publication: &Publication, paths: bool) -> Self {
        let path = |change: &crate::namespace::change::PathChange| PathJson {
            path: String::from_utf8_lossy(&change.path).into_owned(),
            removed: change.entry.is_none(),
        };
        Self {
            published_millis: publication.millis,
            machine: publication.machine.to_string(),
            seq: publication.seq,
            changes: publication.changes.len() as u64,
            removed: publication.removed(),
            paths: paths.then(|| publication.changes.iter().map(path).collect()),
        }
    }
}

fn log(args: &LogArgs) -> Result<(), Failure> {
    let settings = settings(&args.bucket)?;
    let (found, before) = args::block_on(daemon::volume::log(&settings, &args.volume, args.limit))??;
    let found = found
        .iter()
        .map(|publication| PublicationJson::new(publication, args.paths));
    let found: Vec<PublicationJson> = found.collect();
    if args.json {
        output::print_json(&found)
    } else {
        output::print(&(log_text(&found) + &before.map_or(String::new(), before_text)))
    }
}

fn before_text(before: Before) -> String {
    format!(
        "what was published up to {} is in the catalog ({} now)\n",
        format_moment(before.floor_millis),
        count(before.names, "name")
    )
}

fn log_text(publications: &[PublicationJson]) -> String {
    let mut out = String::new();
    for publication in publications {
        let removed = match publication.removed {
            0 => String::new(),
            removed => format!(", {removed} of them removed"),
        };
        writeln!(
            out,
            "{}  {}  {}{removed}",
            format_moment(publication.published_millis),
            publication.machine,
            count(publication.changes, "path"),
        )
        .expect("a string takes everything");
        for path in publication.paths.iter().flatten() {
            let letter = if path.removed { 'D' } else { 'M' };
            writeln!(out, "    {letter} {}", escape(&path.path)).expect("a string takes everything");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_a_volume_is() {
        let plain = |volume: &str| ListedJson {
            volume: volume.into(),
            parent: None,
            until_millis: None,
            own_prefix: false,
            created_millis: None,
            deleted_millis: None,
            trouble: None,
        };
        let all = [
            plain("main"),
            ListedJson {
                parent: Some("main".into()),
                until_millis: Some(0),
                created_millis: Some(0),
                ..plain("release-2")
            },
            ListedJson {
                trouble: Some("it is damaged".into()),
                ..plain("x")
            },
        ];
        assert_eq!(
            list_text(&all),
            "main\nrelease-2  fork of main (as of 1970-01-01 00:00:00 UTC), made 1970-01-01 00:00:00 UTC\n\
             x          it is damaged\n"
        );
        assert_eq!(list_text(&[]), "");
    }

    #[test]
    fn a_publication_is_told_with_its_paths() {
        let publication = PublicationJson {
            published_millis: 0,
            machine: "00ab".into(),
            seq: 1,
            changes: 2,
            removed: 1,
            paths: Some(vec![
                PathJson {
                    path: "a\nb".into(),
                    removed: false,
                },
                PathJson {
                    path: "c".into(),
                    removed: true,
                },
            ]),
        };
        assert_eq!(
            log_text(&[publication]),
            "1970-01-01 00:00:00 UTC  00ab  2 paths, 1 of them removed\n    M a\\nb\n    D c\n"
        );
    }
}
