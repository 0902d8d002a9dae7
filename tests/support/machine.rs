//! One daemon as a machine of its own: cache directory, mount point, environment, log.
//!
//! # Invariants
//!
//! - Whatever happens, dropping a [`Machine`] kills its daemon by id, takes its mount away
//!   and reaps it. The kernel kills the daemon too when the thread that started it dies.
//! - Nothing of the developer's environment (`CASMOUNT_*`, `AWS_*`, `HOME`) reaches a daemon.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use casmount::{config::Dirs, daemon::mountpoint};
use serde_json::Value;

use super::{tempdir, wait};

/// How long a daemon may take to answer at its mount point.
pub const START_LIMIT: Duration = Duration::from_secs(30);

/// How long a command may take that talks to a daemon, beyond its own deadline.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// How long it may take until another machine's change is seen, when the test does not measure it.
const FOLLOW_LIMIT: Duration = Duration::from_secs(30);

/// What a machine is made of, before its daemon runs.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    pub name: String,
    /// Holds everything below that is not set otherwise.
    pub dir: PathBuf,
    pub cache_dir: PathBuf,
    pub mountpoint: PathBuf,
    pub args: Vec<OsString>,
    pub env: Vec<(OsString, OsString)>,
    /// Runs as this user and group instead of the test's.
    pub user: Option<(u32, u32)>,
}

impl MachineSpec {
    /// Describes a machine whose files are below `dir`, which is made.
    pub fn new(name: &str, dir: &Path, store: &str) -> Self {
        let dir = dir.join(name);
        let mountpoint = dir.join("mnt");
        fs::create_dir_all(&mountpoint).expect("a mount point can be made");
        fs::create_dir_all(dir.join("home")).expect("a home can be made");
        // Named, so that the settings of the developer's machine do not count. Nor does how full its disk
        // is: daemons that found it below their floor would drop what a test expects to be resident.
        fs::write(dir.join("config.toml"), "min-free = 0\n").expect("settings can be written");
        Self {
            name: name.to_owned(),
            cache_dir: dir.join("cache"),
            mountpoint,
            dir,
            args: vec!["--store".into(), store.into()],
            env: Vec::new(),
            user: None,
        }
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    #[must_use]
    pub fn cache_dir(mut self, dir: &Path) -> Self {
        dir.clone_into(&mut self.cache_dir);
        self
    }

    #[must_use]
    pub fn user(mut self, uid: u32, gid: u32) -> Self {
        self.user = Some((uid, gid));
        for dir in [&self.dir, &self.mountpoint, &self.dir.join("home")] {
            std::os::unix::fs::chown(dir, Some(uid), Some(gid)).expect("root may give files away");
        }
        self
    }

    /// The casmount program in this machine's environment.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_casmount"));
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["CASMOUNT_", "AWS_", "XDG_"]
                .iter()
                .any(|prefix| text.starts_with(prefix))
            {
                command.env_remove(&name);
            }
        }
        command.env("HOME", self.dir.join("home"));
        command.env("CASMOUNT_CONFIG", self.dir.join("config.toml"));
        // Nothing outside of loopback is asked for credentials.
        command.env("AWS_EC2_METADATA_DISABLED", "true");
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// `casmount mount` with everything but `--foreground` and the mount point.
    pub fn mount_command(&self) -> Command {
        let mut command = self.command();
        command
            .arg("mount")
            .arg("--cache-dir")
            .arg(&self.cache_dir)
            .args(&self.args);
        command
    }

    /// Starts the daemon and waits until its mount answers.
    #[track_caller]
    pub fn start(self) -> Machine {
        let mut machine = Machine {
            spec: self,
            child: None,
        };
        machine.start();
        machine
    }
}

/// A machine whose daemon runs, or was killed.
pub struct Machine {
    pub spec: MachineSpec,
    child: Option<Child>,
}

impl Machine {
    /// The mount point.
    pub fn root(&self) -> &Path {
        &self.spec.mountpoint
    }

    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.spec.mountpoint.join(below)
    }

    /// Waits until it shows these bytes at `path`.
    #[track_caller]
    pub fn until_content(&self, path: &str, expected: &[u8]) {
        let at = self.path(path);
        wait::until(&format!("{} has {path}", self.spec.name), FOLLOW_LIMIT, || {
            fs::read(&at).is_ok_and(|bytes| bytes == expected).then_some(())
        });
    }

    /// Waits until it shows nothing at `path`.
    #[track_caller]
    pub fn until_gone(&self, path: &str) {
        let at = self.path(path);
        wait::until(&format!("{} has no {path}", self.spec.name), FOLLOW_LIMIT, || {
            fs::symlink_metadata(&at)
                .is_err_and(|err| err.raw_os_error() == Some(libc::ENOENT))
                .then_some(())
        });
    }

    pub fn log_path(&self) -> PathBuf {
        self.spec.dir.join("log")
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// The process id of the daemon.
    pub fn id(&self) -> u32 {
        self.child.as_ref().expect("the daemon was started").id()
    }

    #[track_caller]
    fn start(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.spec.name);
        let log = File::options().create(true).append(true).open(self.log_path());
        let log = log.expect("a log can be written");
        let mut command = self.spec.mount_command();
        command.arg("--foreground").arg(&self.spec.mountpoint);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log);
        // SAFETY: the closure makes one system call and touches no memory of this process.
        unsafe {
            command.pre_exec(|| {
                let kill = Some(rustix::process::Signal::KILL);
                Ok(rustix::process::set_parent_process_death_signal(kill)?)
            });
        }
        self.child = Some(command.spawn().expect("casmount can be started"));
        self.wait_until_mounted();
    }

    /// Waits until something else than the directory itself answers at the mount point.
    #[track_caller]
    fn wait_until_mounted(&mut self) {
        let deadline = Instant::now() + START_LIMIT;
        let mountpoint = self.spec.mountpoint.clone();
        let outside = fs::metadata(&self.spec.dir).expect("our own directory").dev();
        loop {
            let child = self.child.as_mut().expect("started above");
            if let Some(status) = child.try_wait().expect("our own child") {
                self.child = None;
                panic!("{}: mount ended: {status}\n{}", self.spec.name, self.log());
            }
            let probe = (self.spec.user.is_none()).then(|| mountpoint.clone());
            let answers = match probe {
                // The mount of another user is closed even to root: the table must do.
                None => tempdir::mountpoints().contains(&mountpoint) && self.status_output().status.success(),
                Some(point) => wait::within("the mount point answers stat", START_LIMIT, move || {
                    fs::metadata(&point).is_ok_and(|meta| meta.dev() != outside)
                        && fs::read_dir(&point).is_ok()
                }),
            };
            if answers && self.status_output().status.success() {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{}: no mount\n{}",
                self.spec.name,
                self.log()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills the daemon as a crash would, and reaps it. The mount point stays, dead.
    pub fn kill9(&mut self) {
        let mut child = self.child.take().expect("the daemon was started");
        child.kill().expect("our own child");
        child.wait().expect("our own child");
    }

    /// Starts the daemon again, over a dead mount point if there is one.
    #[track_caller]
    pub fn restart(&mut self) {
        self.start();
    }

    /// Runs `casmount COMMAND MOUNTPOINT ARGS...` and returns what came of it.
    #[track_caller]
    pub fn control(&self, command: &str, args: &[&str]) -> Output {
        let mut run = self.spec.command();
        run.arg(command).arg(&self.spec.mountpoint).args(args);
        wait::run(&mut run, COMMAND_LIMIT)
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub fn control_ok(&self, command: &str, args: &[&str]) -> String {
        let output = self.control(command, args);
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{}: {command}: {}\n{out}{err}",
            self.spec.name,
            output.status
        );
        out
    }

    /// Makes everything closed so far durable and published.
    #[track_caller]
    pub fn flush(&self) {
        self.control_ok("flush", &["--deadline", "90s"]);
    }

    fn status_output(&self) -> Output {
        self.control("status", &["--json"])
    }

    #[track_caller]
    pub fn status(&self) -> Value {
        let text = self.control_ok("status", &["--json"]);
        serde_json::from_str(&text).unwrap_or_else(|err| panic!("status is not JSON: {err}\n{text}"))
    }

    /// A number of the status, by its JSON pointer.
    #[track_caller]
    pub fn counter(&self, pointer: &str) -> u64 {
        let status = self.status();
        let value = status.pointer(pointer).and_then(Value::as_u64);
        value.unwrap_or_else(|| panic!("no number {pointer} in {status:#}"))
    }

    /// `casmount ls --json` of a path of the mount.
    #[track_caller]
    pub fn ls(&self, path: &str) -> Value {
        let text = self.control_ok("ls", &[path, "--json"]);
        serde_json::from_str(&text).unwrap_or_else(|err| panic!("ls is not JSON: {err}\n{text}"))
    }

    /// Flushes and unmounts by the command, and waits for the daemon's clean end.
    #[track_caller]
    pub fn unmount(&mut self) {
        self.unmount_with(&[]);
    }

    /// As [`Self::unmount`], with more arguments; returns what the command printed.
    #[track_caller]
    pub fn unmount_with(&mut self, args: &[&str]) -> String {
        let out = self.control_ok("unmount", &[&["--deadline", "90s"], args].concat());
        self.wait_until_ended();
        out
    }

    /// Waits for the clean end of a daemon that was told to unmount.
    #[track_caller]
    pub fn wait_until_ended(&mut self) {
        self.wait_until_ended_with(0);
    }

    /// Waits for the end of a daemon that was told to unmount; 1 says that something is left.
    #[track_caller]
    pub fn wait_until_ended_with(&mut self, code: i32) {
        let mut child = self.child.take().expect("the daemon was started");
        let name = self.spec.name.clone();
        let ended = wait::try_until(Duration::from_secs(30), || {
            child.try_wait().expect("our own child")
        });
        let Some(status) = ended else {
            self.child = Some(child);
            panic!("{name}: the daemon is still there after unmount\n{}", self.log());
        };
        assert!(
            status.code() == Some(code),
            "{name}: the daemon ended with {status}\n{}",
            self.log()
        );
        assert!(
            !tempdir::mountpoints().contains(&self.spec.mountpoint),
            "{name}: still mounted"
        );
    }

    /// Removes the control socket that a killed daemon left behind.
    fn remove_socket(&self) {
        let Ok(mountpoint) = fs::canonicalize(&self.spec.mountpoint) else {
            return;
        };
        let user = self.spec.user.map_or(0, |(uid, _)| uid);
        let name = format!("{}.sock", mountpoint::id(&mountpoint));
        for dir in Dirs::new(user, |_| None).sockets {
            let _ = fs::remove_file(dir.join(&name));
        }
    }

    /// Resident memory of the daemon, in bytes.
    pub fn rss_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).expect("our own child");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
        kib.expect("a running process has memory") * 1024
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        tempdir::unmount_below(&self.spec.mountpoint);
        self.remove_socket();
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(120)..];
            eprintln!("---- log of {} ----\n{}\n----", self.spec.name, tail.join("\n"));
        }
    }
}
