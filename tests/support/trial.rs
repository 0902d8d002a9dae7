//! The same calls in a directory of this machine's disk and in a mount: what they answer must be the same.
//!
//! A trial writes down what each call answered, an error in words. Where a mount is known to
//! differ, the test says so, line by line, and that is held as well: such a line belongs
//! into the README's table of what differs from a local disk.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use super::{machine::Machine, machine::MachineSpec, posix::Code, tempdir::TestDir};

/// What was asked in one directory, and what was answered.
pub struct Trial {
    dir: PathBuf,
    said: Mutex<Vec<(String, String)>>,
    /// Whose mount the directory is in; none on the disk.
    machine: Option<Arc<Machine>>,
}

/// A known difference: what was asked, what the disk and what the mount answers. Where a disk cannot do
/// it either, there is none.
pub type Difference = (&'static str, &'static str, &'static str);

impl Trial {
    fn new(dir: &Path, machine: Option<Arc<Machine>>) -> Self {
        Self {
            dir: dir.to_owned(),
            said: Mutex::default(),
            machine,
        }
    }

    /// Whose mount the trial is in; none on the disk.
    pub fn machine(&self) -> Option<&Machine> {
        self.machine.as_deref()
    }

    /// In a mount, waits until what was closed is sealed and in the store.
    #[track_caller]
    pub fn seal(&self) {
        if let Some(machine) = &self.machine {
            machine.flush();
        }
    }

    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.dir.join(below)
    }

    /// Notes a value under a name of its own.
    #[track_caller]
    pub fn note(&self, what: impl Into<String>, value: impl Debug) {
        let what = what.into();
        let mut said = self.said.lock().expect("a trial that fails ends");
        assert!(said.iter().all(|(said, _)| *said != what), "asked twice: {what}");
        said.push((what, format!("{value:?}")));
    }

    /// Notes whether a call succeeded, and gives what it returned.
    #[track_caller]
    pub fn call<T, E>(&self, what: impl Into<String>, result: Result<T, E>) -> Option<T>
    where
        Result<T, E>: Code,
    {
        self.note(what, Errno(result.code()));
        result.ok()
    }

    /// As [`Self::call`], with the value.
    #[track_caller]
    pub fn ask<T: Debug, E>(&self, what: impl Into<String>, result: Result<T, E>)
    where
        Result<T, E>: Code,
    {
        match (result.code(), result) {
            (0, Ok(value)) => self.note(what, value),
            (code, _) => self.note(what, Errno(code)),
        }
    }
}

/// An error number, shown in the words of the system.
struct Errno(i32);

impl Debug for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => f.write_str("done"),
            code => {
                let words = std::io::Error::from_raw_os_error(code).to_string();
                f.write_str(words.split(" (os error").next().unwrap_or_default())
            }
        }
    }
}

/// Runs a trial on the disk and in mounts, with and without passthrough.
#[track_caller]
pub fn compare(args: &[&str], differences: &[Difference], trial: impl Fn(&Trial)) {
    let dir = TestDir::new();
    let spec = |name: &str| {
        let store = dir.path().join(format!("store-{name}"));
        fs::create_dir(&store).expect("a directory can be made");
        MachineSpec::new(name, dir.path(), &format!("file://{}", store.display()))
    };
    compare_with(dir.path(), spec, args, differences, trial);
}

/// As [`compare`], with machines of any kind below `dir`; each has the name that it is asked for by.
#[track_caller]
pub fn compare_with(
    dir: &Path,
    spec: impl Fn(&str) -> MachineSpec,
    args: &[&str],
    differences: &[Difference],
    trial: impl Fn(&Trial),
) {
    let native = dir.join("native");
    fs::create_dir(&native).expect("a directory can be made");
    fs::set_permissions(&native, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("our own");
    let on_disk = Trial::new(&native, None);
    trial(&on_disk);
    let on_disk = on_disk.said.into_inner().expect("it ended");
    for more in [None, Some("--no-passthrough")] {
        let mut spec = spec(more.unwrap_or("passthrough").trim_start_matches('-'));
        spec.args
            .extend(args.iter().chain(more.as_slice()).map(Into::into));
        let machine = Arc::new(spec.start());
        let root = machine.path("root");
        fs::create_dir(&root).expect("a directory can be made");
        fs::set_permissions(&root, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("our own");
        let mounted = Trial::new(&root, Some(Arc::clone(&machine)));
        trial(&mounted);
        let mounted = mounted.said.into_inner().expect("it ended");
        let differing = on_disk.iter().zip(&mounted);
        let differing = differing.filter(|(disk, mount)| disk != mount);
        let found: BTreeMap<_, _> = differing
            .map(|(disk, mount)| (&*disk.0, (&*disk.1, &*mount.1)))
            .collect();
        let answered = |what: &str| on_disk.iter().find(|(asked, _)| asked == what);
        let known: BTreeMap<_, _> = differences
            .iter()
            .filter(|(what, disk, _)| answered(what).is_some_and(|(_, answer)| answer == disk))
            .map(|(what, disk, mount)| (*what, (*disk, *mount)))
            .collect();
        assert_eq!(on_disk.len(), mounted.len());
        assert_eq!(found, known, "{more:?}: (disk, mount), found and known");
    }
}

/// Runs something as another user, with these groups; the process stays what it is.
#[track_caller]
pub fn as_user<T: Send>(uid: u32, groups: &[u32], act: impl FnOnce() -> T + Send) -> T {
    use rustix::{
        process::{Gid, Uid},
        thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let gids: Vec<_> = groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
            set_thread_groups(&gids).expect("root may");
            set_thread_res_gid(gid, gid, gid).expect("root may");
            set_thread_res_uid(uid, uid, uid).expect("root may");
            act()
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs something with another umask; the process keeps its own.
#[track_caller]
pub fn with_umask<T: Send>(mask: u32, act: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            // SAFETY: the thread has no other's memory or descriptors by this, only a mask and a directory.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }.expect("anybody may");
            rustix::process::umask(rustix::fs::Mode::from_raw_mode(mask));
            act()
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
