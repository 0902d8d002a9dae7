//! `casmount mount`.

use std::{path::PathBuf, time::Duration};

use clap::Args;

use super::{
    args::{self, StoreArgs},
    failure::Failure,
    output::{self, ProgressLine},
};
use crate::{
    base::snapshot::SnapshotTag,
    config::{CommitMode, CompactWithin, Dirs, Layer, OwnerMode, Settings, VolumeName, layer},
    daemon::{
        announce::Announcer,
        detach::{self, Started},
        error::chain,
        log, mountpoint,
        notify::Notifier,
        process,
        run::{self, Ended},
        start::Plan,
    },
    namespace::preset::{self, at::PresetAt},
};

/// Mount a volume at a directory.
///
/// Returns when the mount answers; a daemon in the background serves it then. Every flag below is also a
/// variable (--cache-size: CASMOUNT_CACHE_SIZE) and a key of the settings file (cache-size = "60G"); flag beats
/// variable beats file.
#[derive(Debug, Args)]
// Each is a flag of its own.
#[allow(clippy::struct_excessive_bools)]
#[command(after_help = "\
Examples:
  casmount mount /mnt/cache
  casmount mount --store s3://my-bucket/ci --volume linux --cache-size 60G /mnt/cache
  casmount mount --store s3://test --endpoint-url http://localhost:9000 --foreground /mnt/cache
  casmount mount --store file:///mnt/nfs/store --read-only /mnt/cache
  casmount mount --fork-from main --volume job-17 --commit on-success /mnt/cache   a CI job with its own fork
  casmount mount --snapshot release=1.2 /mnt/release                                   made by casmount snapshot create
  casmount mount --preset bazel-disk=bazel --preset cc=ccache /mnt/cache")]
pub struct MountArgs {
    /// An empty directory
    mountpoint: PathBuf,
    #[command(flatten)]
    store: StoreArgs,
    /// Mount this state of the volume, which never changes, instead of the volume itself; read-only
    #[arg(long, value_name = "TAG")]
    snapshot: Option<SnapshotTag>,
    /// Make the volume a fork of this one, if it is not there yet: what is done in the mount stays in the fork
    #[arg(long, value_name = "PARENT")]
    fork_from: Option<VolumeName>,
    /// When the fork becomes a part of its parent; unmounted in any other way, it never does [default: never]
    #[arg(long, value_enum, value_name = "WHEN")]
    commit: Option<CommitMode>,
    /// How much the cache may hold: 500M, 60G, 1.5T [default: half of the disk]
    #[arg(long, value_name = "SIZE", value_parser = args::size)]
    cache_size: Option<u64>,
    /// How much of the cache's disk stays free [default: 5 % of it, at most 10G]
    #[arg(long, value_name = "SIZE", value_parser = args::size)]
    min_free: Option<u64>,
    /// Stay in the foreground and log to standard error
    #[arg(long, short = 'f')]
    foreground: bool,
    /// Refuse changes
    #[arg(long)]
    read_only: bool,
    /// Let other users use the mount, each with their permissions [default as root]
    #[arg(long, overrides_with = "no_allow_other")]
    allow_other: bool,
    /// Let only this user use the mount
    #[arg(long, overrides_with = "allow_other")]
    no_allow_other: bool,
    /// How long a closed file rests before it is uploaded [default: 2s]
    #[arg(long, value_name = "TIME", value_parser = args::duration)]
    settle: Option<Duration>,
    /// How long a read may wait for the store before it fails [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = args::duration)]
    read_timeout: Option<Duration>,
    /// How soon this machine compacts a log that has grown, if no other one has done it by then; never leaves it to
    /// others [default: 6m]
    #[arg(long, value_name = "TIME", value_parser = str::parse::<CompactWithin>)]
    compact_within: Option<CompactWithin>,
    /// Catalogs of up to this size are fetched whole behind the mount, so that no look-up waits for the store; of
    /// larger ones the parts that are touched [default: a 16th of the cache size, at most 1G]
    #[arg(long, value_name = "SIZE", value_parser = args::size)]
    catalog_prefetch: Option<u64>,
    /// Who files belong to: the mounting user, or who they belonged to where they were made [default: mount]
    #[arg(long, value_enum)]
    owner: Option<OwnerMode>,
    /// The user whom all files belong to [default: the mounting user]
    #[arg(long, value_name = "ID")]
    uid: Option<u32>,
    /// The group that all files belong to [default: that of the mounting user]
    #[arg(long, value_name = "ID")]
    gid: Option<u32>,
    /// Permissions that no file shows, octal [default: 000]
    #[arg(long, value_name = "BITS", value_parser = layer::parse_umask)]
    umask: Option<u32>,
    /// What a directory of the volume is used for: bazel, ccache, sccache or plain; may be repeated [default: as
    /// the volume says, else recognised by what a tool makes there]
    #[arg(long = "preset", value_name = "DIR=NAME", value_parser = str::parse::<PresetAt>)]
    presets: Vec<PresetAt>,
    /// Support extended attributes (one more request for each file created)
    #[arg(long)]
    xattr: bool,
    /// Serve every read and write from the daemon
    #[arg(long)]
    no_passthrough: bool,
    /// What is logged: error, warn, info, debug, trace, or a filter [default: info]
    #[arg(long, value_name = "LEVEL", value_parser = layer::parse_log_level)]
    log_level: Option<String>,
    /// Log more: -v debug, -vv trace
    #[arg(long, short = 'v', action = clap::ArgAction::Count, conflicts_with = "log_level")]
    verbose: u8,
    /// Where the log goes [default: standard error in the foreground, else the user's state directory]
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// How long nobody used a mount that is not in use any more; for tests, which do not wait for minutes.
    #[arg(long, value_name = "TIME", value_parser = args::duration, hide = true)]
    rests_after: Option<Duration>,
    /// How often such a mount looks for changes of other machines; for tests as well.
    #[arg(long, value_name = "TIME", value_parser = args::duration, hide = true)]
    rest_pace: Option<Duration>,
    /// This is the daemon that another casmount started.
    #[arg(long, hide = true)]
    detached: bool,
}

impl MountArgs {
    fn layer(&self) -> Layer {
        // A switch that is off says nothing: a variable or the file may still turn it on.
        let on = |switch: bool| switch.then_some(true);
        let log_level = match self.verbose {
            0 => self.log_level.clone(),
            1 => Some("debug".to_owned()),
            _ => Some("trace".to_owned()),
        };
        Layer {
            snapshot: self.snapshot.clone(),
            fork_from: self.fork_from.clone(),
            commit: self.commit,
            cache_size: self.cache_size,
            min_free: self.min_free,
            settle: self.settle,
            read_timeout: self.read_timeout,
            compact_within: self.compact_within,
            catalog_prefetch: self.catalog_prefetch,
            read_only: on(self.read_only),
            allow_other: on(self.allow_other).or(self.no_allow_other.then_some(false)),
            passthrough: self.no_passthrough.then_some(false),
            xattr: on(self.xattr),
            owner: self.owner,
            uid: self.uid,
            gid: self.gid,
            umask: self.umask,
            preset: (!self.presets.is_empty()).then(|| self.presets.clone()),
            log_level,
            log_file: self.log_file.clone(),
            ..self.store.layer()
        }
    }
}

pub fn run(args: &MountArgs) -> Result<(), Failure> {
    let dirs = Dirs::of_this_process();
    let announcer = Announcer {
        notifier: None,
        detached: args.detached,
    };
    let detached = args.detached;
    let done = prepare(args, &dirs).and_then(|plan| {
        if args.foreground || detached {
            serve(&plan, &dirs, detached)
        } else {
            start_daemon(&plan)
        }
    });
    if let (true, Err(failure)) = (detached, &done) {
        // The command at the other end of the pipe prints it.
        announcer.failed(failure.code(), failure.message());
    }
    done
}

fn prepare(args: &MountArgs, dirs: &Dirs) -> Result<Plan, Failure> {
    let mut settings = args::settings(args.layer(), args.store.bucket.config.as_deref(), dirs)?;
    (settings.rests_after, settings.rest_pace) = (args.rests_after, args.rest_pace);
    if settings.fork_from.as_ref() == Some(&settings.volume) {
        return Err(Failure::usage(format!(
            "a fork of volume {0} needs another name than {0}: name it with --volume",
            settings.volume
        )));
    }
    check_snapshot(&settings)?;
    preset::at::check(&args.presets).map_err(Failure::usage)?;
    // A wrong URL is a wrong command, whatever else is wrong.
    crate::daemon::bucket::parse_url(&settings.store)?;
    let mountpoint = mountpoint::canonical(&args.mountpoint)?;
    if !args.foreground && settings.log_file.is_none() {
        settings.log_file = dirs.default_log(&mountpoint::id(&mountpoint));
    }
    log::check(settings.log_file.as_ref(), &mountpoint).map_err(Failure::usage)?;
    check_places(&settings, &mountpoint)?;
    Ok(Plan {
        log_file: settings.log_file.clone(),
        settings,
        mountpoint,
    })
}

/// What changes something means nothing in a snapshot.
fn check_snapshot(settings: &Settings) -> Result<(), Failure> {
    let Some(tag) = &settings.snapshot else {
        return Ok(());
    };
    let odd = match (&settings.fork_from, settings.commit) {
        (Some(_), _) => "--fork-from",
        (None, CommitMode::OnSuccess) => "--commit on-success",
        (None, CommitMode::Never) => return Ok(()),
    };
    Err(Failure::usage(format!(
        "{odd} means nothing with snapshot {tag}, which never changes: leave one of them out"
    )))
}

/// A cache inside its own mount would wait for itself.
fn check_places(settings: &Settings, mountpoint: &std::path::Path) -> Result<(), Failure> {
    if settings.cache_dir.starts_with(mountpoint) || mountpoint.starts_with(&settings.cache_dir) {
        return Err(Failure::usage(format!(
            "the cache directory {} and the mountpoint {} are inside each other; name another --cache-dir",
            settings.cache_dir.display(),
            mountpoint.display()
        )));
    }
    Ok(())
}

fn start_daemon(plan: &Plan) -> Result<(), Failure> {
    // Here, where a failure can be shown at once and costs no second process.
    mountpoint::prepare(&plan.mountpoint)?;
    let log =
        match &plan.log_file {
            Some(path) => Some(log::open(path).map_err(|err| {
                Failure::because(1, format!("cannot open the log {}: {err}", path.display()))
            })?),
            None => None,
        };
    let mut line = ProgressLine::new();
    let started = detach::start(std::env::args_os().skip(1), log, |step| {
        line.show(&format!("{step} ..."));
    });
    line.end();
    let see_log = match &plan.log_file {
        Some(path) => format!("; see {}", path.display()),
        None => String::new(),
    };
    match started {
        Ok(Started::Serving { text, .. }) => output::print(&format!("{text}\n")),
        Ok(Started::Failed { code, text }) => Err(Failure::because(code, text)),
        Ok(Started::Died { how }) => Err(Failure::because(
            1,
            format!("the daemon ended with {how}{see_log}"),
        )),
        Err(err) => Err(Failure::because(1, format!("cannot start the daemon: {err}"))),
    }
}

fn serve(plan: &Plan, dirs: &Dirs, detached: bool) -> Result<(), Failure> {
    if detached {
        detach::leave_session().map_err(|err| Failure::failed(&err))?;
    }
    let log_file =
        match &plan.log_file {
            // A detached daemon's standard error is the log already.
            Some(path) if !detached => Some(log::open(path).map_err(|err| {
                Failure::because(1, format!("cannot open the log {}: {err}", path.display()))
            })?),
            _ => None,
        };
    log::start(&plan.settings.log_level, log_file);
    process::set_up();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        mountpoint = %plan.mountpoint.display(),
        store = plan.settings.store,
        volume = %plan.settings.volume,
        snapshot = plan.settings.snapshot.as_ref().map(SnapshotTag::as_str),
        cache_dir = %plan.settings.cache_dir.display(),
        "starting"
    );
    let announcer = Announcer {
        notifier: Notifier::from_env(std::env::var_os("NOTIFY_SOCKET")),
        detached,
    };
    match run::run(plan, dirs, &announcer) {
        Ok(Ended::Complete) => {
            tracing::info!("stopped; everything is in the store");
            Ok(())
        }
        Ok(Ended::Incomplete) => Err(Failure::because(
            1,
            "stopped with changes left that are not in the store; the next mount with this cache directory uploads them",
        )),
        Ok(Ended::AtOnce) => Err(Failure::because(
            1,
            "stopped at once, as asked by a second signal",
        )),
        Err(err) => {
            tracing::error!("{}", chain(&err));
            Err(err.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        args: MountArgs,
    }

    fn layer(args: &[&str]) -> Layer {
        let args = ["mount"].iter().chain(args).chain(&["/mnt/x"]);
        Only::try_parse_from(args).unwrap().args.layer()
    }

    #[test]
    fn no_flag_says_nothing() {
        assert_eq!(layer(&[]), Layer::default());
    }

    #[test]
    fn the_last_of_two_opposite_flags_counts() {
        assert_eq!(
            layer(&["--allow-other", "--no-allow-other"]).allow_other,
            Some(false)
        );
        assert_eq!(
            layer(&["--no-allow-other", "--allow-other"]).allow_other,
            Some(true)
        );
    }

    #[test]
    fn every_setting_has_a_flag() {
        let all = layer(&[
            "--store=s3://b",
            "--volume=v",
            "--snapshot=s",
            "--fork-from=p",
            "--commit=on-success",
            "--cache-dir=/c",
            "--cache-size=1G",
            "--min-free=1",
            "--endpoint-url=u",
            "--region=r",
            "--settle=1s",
            "--read-timeout=1s",
            "--compact-within=1m",
            "--catalog-prefetch=1G",
            "--read-only",
            "--allow-other",
            "--no-passthrough",
            "--xattr",
            "--owner=preserve",
            "--uid=1",
            "--gid=1",
            "--umask=022",
            "--preset=a=bazel",
            "--log-level=warn",
            "--log-file=/l",
        ]);
        // What every flag says is kept over a lower layer that says something else everywhere.
        let mut lower = Layer::default();
        for key in Layer::KEYS {
            let text = match key {
                "settle" | "read-timeout" | "compact-within" => "9s",
                "cache-size" | "min-free" | "catalog-prefetch" | "uid" | "gid" => "9",
                "read-only" | "allow-other" | "xattr" => "no",
                "passthrough" => "yes",
                "owner" => "mount",
                "commit" => "never",
                "umask" => "007",
                "preset" => "b=plain",
                "log-level" => "trace",
                _ => "other",
            };
            lower.set(key, text).unwrap();
        }
        assert_eq!(all.clone().over(lower), all);
    }

    #[test]
    fn what_changes_something_means_nothing_in_a_snapshot() {
        let check = |args: &[&str]| {
            let dirs = Dirs::new(0, |_| None);
            check_snapshot(&Settings::resolve(layer(args), &dirs, 0).unwrap())
        };
        let fork = "--fork-from=p";
        let commit = "--commit=on-success";
        for fine in [
            &[fork, commit][..],
            &["--snapshot=v=1"],
            &["--snapshot=v=1", "--commit=never"],
        ] {
            check(fine).unwrap();
        }
        for (args, word) in [
            (&["--snapshot=v=1", fork][..], "--fork-from"),
            (&["--snapshot=v=1", commit], "--commit on-success"),
        ] {
            let refused = check(args).unwrap_err();
            assert_eq!(refused.code(), 2);
            assert!(refused.message().starts_with(word), "{}", refused.message());
        }
    }

    #[test]
    fn verbosity_is_a_level() {
        assert_eq!(layer(&["-v"]).log_level.as_deref(), Some("debug"));
        assert_eq!(layer(&["-vv"]).log_level.as_deref(), Some("trace"));
        assert!(Only::try_parse_from(["mount", "-v", "--log-level=info", "/m"]).is_err());
    }
}
