//! A directory to test POSIX behaviour in.
//!
//! The tests of the mount state what a local file system does. So that the tests
//! themselves can be checked, `CASMOUNT_TEST_PLACE` says where they run:
//! `casmount` (the default: a mount over a directory as the store), `null` (the bare
//! daemon of the benchmark), or `dir` (a plain directory, no FUSE at all).

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use super::{
    machine::{Machine, MachineSpec},
    tempdir::{self, TestDir},
    wait,
};

enum Kind {
    Dir,
    Null(Child),
    Casmount(Box<Machine>),
}

pub struct Place {
    kind: Kind,
    path: PathBuf,
    // Dropped last: everything else is below it.
    dir: TestDir,
}

impl Place {
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// A place whose mount, if it is one of casmount, has more arguments.
    pub fn with(args: &[&str]) -> Self {
        let dir = TestDir::new();
        let kind = std::env::var("CASMOUNT_TEST_PLACE").unwrap_or_else(|_| "casmount".to_owned());
        match kind.as_str() {
            "dir" => {
                let path = dir.path().join("plain");
                fs::create_dir(&path).expect("a directory can be made");
                Self {
                    kind: Kind::Dir,
                    path,
                    dir,
                }
            }
            "null" => {
                let (source, path) = (dir.path().join("source"), dir.path().join("mnt"));
                fs::create_dir(&source).expect("a directory can be made");
                fs::create_dir(&path).expect("a directory can be made");
                let mut command = Command::new(example("null-daemon"));
                command
                    .arg("--xattr")
                    .arg(&source)
                    .arg(&path)
                    .stdin(Stdio::null());
                let child = command
                    .spawn()
                    .expect("null-daemon is built (cargo build --examples)");
                wait::until("null-daemon is mounted", Duration::from_secs(10), || {
                    tempdir::mountpoints().contains(&path).then_some(())
                });
                Self {
                    kind: Kind::Null(child),
                    path,
                    dir,
                }
            }
            "casmount" => {
                let store = dir.path().join("store");
                fs::create_dir(&store).expect("a directory can be made");
                let url = format!("file://{}", store.display());
                let mut spec = MachineSpec::new("a", dir.path(), &url);
                spec.args.extend(args.iter().map(Into::into));
                let machine = spec.start();
                Self {
                    path: machine.root().to_owned(),
                    kind: Kind::Casmount(Box::new(machine)),
                    dir,
                }
            }
            other => panic!("CASMOUNT_TEST_PLACE is `casmount`, `null` or `dir`, not `{other}`"),
        }
    }

    pub fn root(&self) -> &Path {
        &self.path
    }

    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.path.join(below)
    }

    /// Makes closed files blobs, so that what follows works on sealed content.
    #[track_caller]
    pub fn seal(&self) {
        if let Kind::Casmount(machine) = &self.kind {
            machine.flush();
        }
    }

    /// Stops and starts the daemon, so that what follows sees what was kept.
    #[track_caller]
    pub fn remount(&mut self) {
        if let Kind::Casmount(machine) = &mut self.kind {
            machine.unmount();
            machine.restart();
        }
    }

    pub fn is_casmount(&self) -> bool {
        matches!(self.kind, Kind::Casmount(_))
    }

    /// The machine, when the place is a casmount mount.
    pub fn machine(&mut self) -> Option<&mut Machine> {
        match &mut self.kind {
            Kind::Casmount(machine) => Some(machine),
            Kind::Dir | Kind::Null(_) => None,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Kind::Null(child) = &mut self.kind {
            tempdir::unmount_below(self.dir.path());
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The path of an example program of this package, beside the test program.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a running program has a path");
    let profile = test.ancestors().nth(2).expect("target/PROFILE/deps/TEST");
    profile.join("examples").join(name)
}
