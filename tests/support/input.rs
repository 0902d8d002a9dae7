//! Real input: the unpacked sources of this project's own dependencies.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use super::wait;

/// The least that counts as a real tree.
pub const MIN_FILES: u64 = 5_000;
pub const MIN_BYTES: u64 = 100 << 20;

/// The source directories of all dependencies, the largest first.
pub fn dependency_sources() -> Vec<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut metadata = Command::new(cargo);
    metadata.args(["metadata", "--offline", "--locked", "--format-version", "1"]);
    // Dependencies of other platforms are not fetched by a build.
    metadata.args(["--filter-platform", "x86_64-unknown-linux-gnu"]);
    metadata.current_dir(env!("CARGO_MANIFEST_DIR"));
    let text = wait::run_ok(&mut metadata, Duration::from_secs(60));
    let metadata: serde_json::Value = serde_json::from_str(&text).expect("cargo metadata writes JSON");
    let packages = metadata["packages"]
        .as_array()
        .expect("cargo metadata lists packages");
    let dependencies = packages.iter().filter(|package| !package["source"].is_null());
    let manifests = dependencies.filter_map(|package| package["manifest_path"].as_str());
    let dirs = manifests.filter_map(|manifest| Path::new(manifest).parent());
    let mut sized: Vec<_> = dirs
        .map(|dir| (measure(dir).unwrap_or_default(), dir.to_owned()))
        .collect();
    sized.sort_by(|(a, path_a), (b, path_b)| b.1.cmp(&a.1).then_with(|| path_a.cmp(path_b)));
    sized.into_iter().map(|(_, dir)| dir).collect()
}

/// The source directory of one dependency.
pub fn dependency(name: &str) -> PathBuf {
    let named = |dir: &PathBuf| {
        let dir = dir.file_name().and_then(|dir| dir.to_str());
        dir.and_then(|dir| dir.strip_prefix(name))
            .is_some_and(|rest| rest.starts_with('-'))
    };
    let found = dependency_sources().into_iter().find(named);
    found.unwrap_or_else(|| panic!("no sources of {name}: is it still a dependency?"))
}

/// Dependencies, the largest first, until they are a real tree together.
///
/// Panics when all of them are less than that: there is no smaller stand-in.
pub fn real_tree() -> Vec<PathBuf> {
    let (mut files, mut bytes) = (0, 0);
    let mut chosen = Vec::new();
    for dir in dependency_sources() {
        if files >= MIN_FILES && bytes >= MIN_BYTES {
            break;
        }
        let (more_files, more_bytes) = measure(&dir).unwrap_or_default();
        files += more_files;
        bytes += more_bytes;
        chosen.push(dir);
    }
    assert!(
        files >= MIN_FILES && bytes >= MIN_BYTES,
        "the sources of the dependencies are {files} files and {bytes} bytes, too little for a real tree"
    );
    chosen
}

/// Every regular file below some directories, as (directory's parent, path below it), sorted.
pub fn files_of(dirs: &[PathBuf]) -> Vec<(PathBuf, PathBuf)> {
    let mut files = Vec::new();
    for dir in dirs {
        let parent = dir
            .parent()
            .expect("a package is inside of a directory")
            .to_owned();
        let mut pending = vec![dir.clone()];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(&dir).expect("sources can be listed") {
                let entry = entry.expect("sources can be listed");
                if entry.file_type().expect("sources can be listed").is_dir() {
                    pending.push(entry.path());
                } else {
                    let below = entry
                        .path()
                        .strip_prefix(&parent)
                        .expect("it is below")
                        .to_owned();
                    files.push((parent.clone(), below));
                }
            }
        }
    }
    files.sort();
    files
}

/// Copies directories with everything that `cp -a` keeps.
#[track_caller]
pub fn copy_into(dirs: &[PathBuf], to: &Path) {
    let mut copy = Command::new("cp");
    copy.arg("-a").arg("--").args(dirs).arg(to);
    wait::run_ok(&mut copy, Duration::from_secs(180));
}

/// Counts the files and bytes below a directory.
pub fn measure(dir: &Path) -> io::Result<(u64, u64)> {
    let (mut files, mut bytes) = (0, 0);
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let meta = entry.metadata()?;
            if meta.is_dir() {
                pending.push(entry.path());
            } else {
                files += 1;
                bytes += meta.len();
            }
        }
    }
    Ok((files, bytes))
}
