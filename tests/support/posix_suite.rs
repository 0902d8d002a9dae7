//! pjdfstest, which asks a file system call by call for what POSIX says, and what it found.
//!
//! It becomes other users by itself where it runs as root. So that it need not make any, it is told of two that
//! every system has.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{
        fs::{PermissionsExt, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Output,
};

use super::{
    posix::file,
    programs::{self, LIMIT},
    wait,
};

/// What the suite found, by the names of its cases.
#[derive(Debug, Default)]
pub struct Found {
    pub passed: BTreeSet<String>,
    pub failed: BTreeSet<String>,
    pub skipped: BTreeSet<String>,
    /// What it said of cases that did not pass.
    pub said: String,
}

/// Runs all of it in a mount; `home` is a directory for what it needs elsewhere.
#[track_caller]
pub fn run(program: &Path, mountpoint: &Path, home: &Path, user: Option<u32>) -> Found {
    // Sockets have short paths.
    let short = tempfile::tempdir().expect("a directory can be made");
    fs::set_permissions(short.path(), fs::Permissions::from_mode(0o755)).expect("our own directory");
    let at = short.path().join("m");
    symlink(mountpoint, &at).expect("our own directory");
    let mut found = Found::default();
    // It keeps files of some cases open to its end, and what is written to cannot become read-only. So the
    // cases that want that have a run of their own.
    for (remount, pattern) in [(false, None), (true, Some("erofs"))] {
        let mut command = programs::command(program, home);
        let settings = file(&home.join("suite.toml"), settings(remount).as_bytes());
        // Only by its own path it finds what is to be remounted.
        let dir = if remount { mountpoint } else { &at };
        command.arg("-c").arg(settings).arg("-p").arg(dir).args(pattern);
        command.env("PATH", path_with_plain_remount(home));
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        let output = wait::run(&mut command, LIMIT);
        found.take(&output);
    }
    found.skipped.retain(|case| !found.passed.contains(case));
    found
}

impl Found {
    #[track_caller]
    fn take(&mut self, output: &Output) {
        let before = self.failed.len();
        let streams = [&output.stdout, &output.stderr];
        let said = streams.map(|bytes| String::from_utf8_lossy(bytes)).concat();
        let mut passed = true;
        for line in said.lines() {
            let (name, verdict) = line.split_once(' ').unwrap_or_default();
            // What a case says is indented.
            let verdict = if name.is_empty() { "" } else { verdict.trim() };
            let cases = match verdict {
                "ok" => Some(&mut self.passed),
                "FAILED" => Some(&mut self.failed),
                "skipped" => Some(&mut self.skipped),
                _ => None,
            };
            if let Some(cases) = cases {
                cases.insert(name.to_owned());
                passed = verdict == "ok";
            }
            if !passed {
                self.said += line;
                self.said.push('\n');
            }
        }
        assert_eq!(output.status.success(), self.failed.len() == before, "{said}");
    }
}

fn settings(remount: bool) -> String {
    let [first, second] = two_users();
    format!(
        "[features]
         posix_fallocate = {{}}
         rename_ctime = {{}}
         utime_now = {{}}
         utimensat = {{}}
         secondary_fs = \"/dev/shm\"
         [settings]
         # Longer than a step of the clock of file systems.
         naptime = 0.02
         allow_remount = {remount}
         [dummy_auth]
         entries = [[\"{}\", \"{}\"], [\"{}\", \"{}\"]]",
        first.0, first.1, second.0, second.1
    )
}

/// Two users who are not root, each with the name of their group.
fn two_users() -> [(String, String); 2] {
    let read = |path: &str| fs::read_to_string(path).expect("every system has it");
    let (users, groups) = (read("/etc/passwd"), read("/etc/group"));
    let field = |line: &str, n: usize| line.split(':').nth(n).unwrap_or_default().to_owned();
    let mut found = Vec::<(String, String)>::new();
    for user in users.lines().filter(|line| field(line, 2) != "0") {
        let group = groups.lines().find(|line| field(line, 2) == field(user, 3));
        let Some(group) = group.map(|line| field(line, 0)) else {
            continue;
        };
        // Groups of their own.
        if group != "root" && found.iter().all(|(_, known)| *known != group) {
            found.push((field(user, 0), group));
        }
    }
    found.truncate(2);
    found.try_into().expect("every system has other users than root")
}

/// A `PATH` on which `mount` asks the kernel by itself: for types of FUSE it else has a program mount anew, and
/// remounting is for the kernel alone. A mount with a file that is deleted and not let go does not become read-only, and
/// the kernel lets files of FUSE go behind the close: so it is asked again for a while.
fn path_with_plain_remount(home: &Path) -> std::ffi::OsString {
    let dir = home.join("suite-bin");
    fs::create_dir_all(&dir).expect("a directory can be made");
    let mount = programs::find("mount").unwrap_or_else(|| PathBuf::from("mount"));
    let script = format!(
        "#!/bin/sh
        for again in $(seq 200); do
            {} -i \"$@\" && exit
            sleep 0.05
        done
        exit 32\n",
        mount.display()
    );
    let script = file(&dir.join("mount"), script.as_bytes());
    fs::set_permissions(script, fs::Permissions::from_mode(0o755)).expect("our own file");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = [dir].into_iter().chain(std::env::split_paths(&path));
    std::env::join_paths(dirs).expect("no colons in paths of tests")
}
