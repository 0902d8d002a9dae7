//! `casmount ls`.

use std::{ffi::OsString, fmt::Write as _, time::Duration};

use clap::Args;

use super::{
    args::{self, MountedArgs},
    asking,
    failure::Failure,
    output::{self, escape},
};
use crate::daemon::control::protocol::{ListedFile, Reply, Request};

/// A directory of a million files takes its time.
const ANSWER_WITHIN: Duration = Duration::from_secs(120);

/// List files of a mount with their digest, size, and where their bytes are.
///
/// Where: resident (on this disk), partial, remote (in the store only), staging (not sealed yet). Safe: durable
/// (in the store), dirty (not yet), writing, quarantined (bytes differ from the digest), lost (gone from the store).
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount ls /mnt/cache                           the root of the mount
  casmount ls /mnt/cache ccache/a/b
  casmount ls --json /mnt/cache /mnt/cache/ccache")]
pub struct LsArgs {
    #[command(flatten)]
    mounted: MountedArgs,
    /// A file or directory, from the root of the mount or with the mountpoint before it
    #[arg(default_value = ".", hide_default_value = true)]
    path: OsString,
}

pub fn run(args: &LsArgs) -> Result<(), Failure> {
    let mountpoint = args.mounted.canonical()?;
    let path = args::path_in_mount(&args.path, &args.mounted.mountpoint, &mountpoint)?;
    match asking::ask(&mountpoint, &Request::Ls { path }, ANSWER_WITHIN)? {
        Reply::Listed { files } if args.mounted.json => output::print_json(&files),
        Reply::Listed { files } => output::print(&table(&files)),
        other => Err(asking::odd(&mountpoint, &other)),
    }
}

/// One line a file: digest, size in bytes, where the bytes are, whether they are safe, path.
fn table(files: &[ListedFile]) -> String {
    let width = files
        .iter()
        .map(|file| file.size.to_string().len())
        .max()
        .unwrap_or(0);
    let mut out = String::new();
    for file in files {
        let digest = file.digest.as_deref().unwrap_or("-");
        let (residency, durability) = if file.kind == "file" {
            (file.residency.as_str(), file.durability.as_str())
        } else {
            (file.kind.as_str(), "-")
        };
        writeln!(
            out,
            "{digest:<64}  {:>width$}  {residency:<9} {durability:<11} {}",
            file.size,
            escape(&file.path)
        )
        .expect("a string takes everything");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_all_of_a_file() {
        let file = |path: &str, kind: &str, digest: Option<&str>| ListedFile {
            path: path.into(),
            kind: kind.into(),
            size: 1234,
            digest: digest.map(str::to_owned),
            residency: "resident".into(),
            durability: "dirty".into(),
        };
        let digest = "a".repeat(64);
        let text = table(&[file("x\ny", "file", Some(&digest)), file("d", "dir", None)]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], format!("{digest}  1234  resident  dirty       x\\ny"));
        assert!(
            lines[1].starts_with('-') && lines[1].ends_with("dir       -           d"),
            "{}",
            lines[1]
        );
        assert_eq!(table(&[]), "");
    }
}
