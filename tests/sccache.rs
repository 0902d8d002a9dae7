//! A real client: sccache with its directory on the mounts of two machines, for C and for Rust.
//!
//! `CASMOUNT_TEST_SCCACHE` names the program, else `target/tools/sccache` is it, which `scripts/test` brings.
//! Where there is none the tests say that they are skipped.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use lab::{Lab, StoreKind};
use serde_json::Value;
use support::{
    machine::Machine,
    posix::file,
    wait::{self, ChildGuard},
};

on_both_stores!(
    what_one_machine_compiled_the_other_finds,
    two_machines_that_build_at_once_find_no_half_written_file_of_each_other,
);

/// C files, and crates that need each other.
const SOURCES: usize = 6;

const LIMIT: Duration = Duration::from_secs(120);

fn sccache() -> Option<PathBuf> {
    let program = match std::env::var_os("CASMOUNT_TEST_SCCACHE") {
        Some(program) => PathBuf::from(program),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/sccache"),
    };
    program.exists().then_some(program)
}

macro_rules! sccache_or_skip {
    () => {
        match sccache() {
            Some(program) => program,
            None => skip!("there is no sccache (scripts/test brings one where pip has it)"),
        }
    };
}

/// The sources, which lie at one place for all machines, as they do in CI.
fn project(dir: &Path) {
    let mut members = Vec::new();
    for number in 0..SOURCES {
        let name = format!("part{number}");
        fs::create_dir_all(dir.join(&name).join("src")).unwrap();
        let (needs, calls) = match number.checked_sub(1) {
            Some(before) => (
                format!("part{before} = {{ path = \"../part{before}\" }}"),
                format!("part{before}::number() + 1"),
            ),
            None => (String::new(), "0".to_owned()),
        };
        let manifest = format!(
            "[package]\nname = \"{name}\"\nversion = \"0.1.0\"\nedition = \"2021\"\n\n[dependencies]\n{needs}\n"
        );
        file(&dir.join(&name).join("Cargo.toml"), manifest.as_bytes());
        let source = format!("pub fn number() -> u32 {{\n    {calls}\n}}\n");
        file(&dir.join(&name).join("src/lib.rs"), source.as_bytes());
        members.push(format!("\"{name}\""));
        let source = format!("int number{number}(void) {{ return {number}; }}\n");
        file(&dir.join(format!("{name}.c")), source.as_bytes());
    }
    let workspace = format!(
        "[workspace]\nresolver = \"2\"\nmembers = [{}]\n",
        members.join(", ")
    );
    file(&dir.join("Cargo.toml"), workspace.as_bytes());
}

/// sccache with its server on one machine.
struct Sccache<'a> {
    program: &'a Path,
    lab: &'a Lab,
    machine: &'a Machine,
    server: ChildGuard,
}

impl<'a> Sccache<'a> {
    fn start(program: &'a Path, lab: &'a Lab, machine: &'a Machine) -> Self {
        let mut command = Self::command_for(program, lab, machine);
        command
            .env("SCCACHE_START_SERVER", "1")
            .env("SCCACHE_NO_DAEMON", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let server = ChildGuard(command.spawn().unwrap());
        let socket = Self::socket(lab, machine);
        wait::until("sccache listens", LIMIT, || socket.exists().then_some(()));
        Self {
            program,
            lab,
            machine,
            server,
        }
    }

    fn socket(lab: &Lab, machine: &Machine) -> PathBuf {
        lab.dir().join(format!("{}.sock", machine.spec.name))
    }

    fn command_for(program: &Path, lab: &Lab, machine: &Machine) -> Command {
        let mut command = Command::new(program);
        // Nothing of the developer's own sccache counts.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("SCCACHE_") || text.starts_with("CARGO") || text.starts_with("RUSTC") {
                command.env_remove(&name);
            }
        }
        command
            .env("SCCACHE_DIR", machine.path("sccache"))
            .env("SCCACHE_SERVER_UDS", Self::socket(lab, machine))
            .env("SCCACHE_CONF", "/dev/null")
            .env("SCCACHE_IDLE_TIMEOUT", "0");
        command
    }

    fn command(&self) -> Command {
        Self::command_for(self.program, self.lab, self.machine)
    }

    /// Compiles everything, crates into a target directory at one place for all.
    fn build(&self, target: &Path) {
        let project = self.lab.dir().join("project");
        let objects = self.lab.dir().join(format!("objects-{}", self.machine.spec.name));
        fs::create_dir_all(&objects).unwrap();
        for number in 0..SOURCES {
            let mut compile = self.command();
            compile
                .current_dir(&project)
                .args(["cc", "-c", "-O1", &format!("part{number}.c"), "-o"])
                .arg(objects.join(format!("part{number}.o")));
            wait::run_ok(&mut compile, LIMIT);
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        build.envs(
            self.command()
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        build
            .current_dir(&project)
            .env("RUSTC_WRAPPER", self.program)
            .env("CARGO_TARGET_DIR", target)
            // What rustc keeps for itself is not cached.
            .env("CARGO_INCREMENTAL", "0")
            .env_remove("RUSTC_WORKSPACE_WRAPPER")
            .args(["build", "--offline", "--quiet"]);
        wait::run_ok(&mut build, LIMIT * 2);
    }

    /// Hits and misses since the server's start; panics when it had trouble with its files.
    #[track_caller]
    fn counted(&self) -> (u64, u64) {
        let mut command = self.command();
        command.args(["--show-stats", "--stats-format=json"]);
        let stats: Value = serde_json::from_str(&wait::run_ok(&mut command, LIMIT)).unwrap();
        let stats = &stats["stats"];
        let sum = |what: &str| -> u64 {
            let counts = stats[what]["counts"].as_object().unwrap().values();
            counts.map(|count| count.as_u64().unwrap()).sum()
        };
        let troubles = [
            sum("cache_errors"),
            stats["cache_write_errors"].as_u64().unwrap(),
            stats["cache_read_errors"].as_u64().unwrap_or(0),
            stats["cache_timeouts"].as_u64().unwrap(),
        ];
        assert_eq!(troubles, [0; 4], "{}: {stats:#}", self.machine.spec.name);
        (sum("cache_hits"), sum("cache_misses"))
    }

    fn stop(mut self) {
        wait::run(self.command().arg("--stop-server"), LIMIT);
        wait::until("sccache has ended", LIMIT, || self.server.0.try_wait().unwrap());
    }
}

const ALL: u64 = 2 * SOURCES as u64;

/// Waits until what `from` made, down to the last, is on `to`.
fn follow(from: &Machine, to: &Machine, name: &str) {
    from.flush();
    file(&from.path(name), name.as_bytes());
    from.flush();
    to.until_content(name, name.as_bytes());
}

/// Every name in a machine's cache.
fn names(machine: &Machine) -> Vec<String> {
    let mut find = Command::new("find");
    find.arg(".").current_dir(machine.path("sccache"));
    let text = wait::run_ok(&mut find, LIMIT);
    let mut names: Vec<_> = text.lines().map(str::to_owned).collect();
    names.sort();
    names
}

fn what_one_machine_compiled_the_other_finds(kind: StoreKind) {
    let program = sccache_or_skip!();
    let lab = Lab::new(kind);
    project(&lab.dir().join("project"));
    let target = lab.dir().join("target");
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    let on_a = Sccache::start(&program, &lab, &a);
    on_a.build(&target);
    assert_eq!(on_a.counted(), (0, ALL));
    on_a.stop();
    let preset = &a.status()["presets"][0];
    assert_eq!(
        (&preset["dir"], &preset["preset"], &preset["origin"]),
        (&"sccache".into(), &"sccache".into(), &"recognised".into())
    );
    follow(&a, &b, "last");
    assert_eq!(names(&a), names(&b));

    fs::remove_dir_all(&target).unwrap();
    let on_b = Sccache::start(&program, &lab, &b);
    on_b.build(&target);
    assert_eq!(on_b.counted(), (ALL, 0));
    on_b.stop();
    // B knows what it is for though it stored nothing, and that it set the times of all that it found is
    // for nobody else.
    assert_eq!(b.status()["presets"][0]["preset"], "sccache");
    b.flush();
    assert_eq!(b.counter("/publish/published_changes"), 0);
    // The objects are those of the first build, byte for byte.
    for number in 0..SOURCES {
        let object = |machine: &str| fs::read(lab.dir().join(format!("objects-{machine}/part{number}.o")));
        assert!(object("a").unwrap() == object("b").unwrap(), "part{number}.o");
    }
    assert_eq!(b.counter("/cache/dirty_blobs"), 0);
}

fn two_machines_that_build_at_once_find_no_half_written_file_of_each_other(kind: StoreKind) {
    let program = sccache_or_skip!();
    let lab = Lab::new(kind);
    project(&lab.dir().join("project"));
    let start = |name: &str| lab.spec(name).arg("--preset=sccache=sccache").start();
    let (a, b) = (start("a"), start("b"));
    let (on_a, on_b) = (
        Sccache::start(&program, &lab, &a),
        Sccache::start(&program, &lab, &b),
    );
    std::thread::scope(|scope| {
        scope.spawn(|| on_b.build(&lab.dir().join("target-b")));
        on_a.build(&lab.dir().join("target-a"));
    });
    for (machine, sccache) in [(&a, on_a), (&b, on_b)] {
        let (hits, misses) = sccache.counted();
        assert_eq!(hits + misses, ALL, "{} counted others", machine.spec.name);
        sccache.stop();
    }
    // A file that sccache was killed over: nobody's but A's.
    file(&a.path("sccache/.sccachetmpLeft"), b"half");
    follow(&a, &b, "last of a");
    follow(&b, &a, "last of b");
    assert!(a.path("sccache/.sccachetmpLeft").exists());
    let shared = |machine: &Machine| -> Vec<String> {
        let names = names(machine).into_iter();
        names.filter(|name| !name.contains(".sccachetmp")).collect()
    };
    assert!(!names(&b).iter().any(|name| name.contains(".sccachetmp")));
    assert_eq!(shared(&a), shared(&b));
    // All that either compiled is a hit on a third, which was not there.
    let c = start("c");
    fs::remove_dir_all(lab.dir().join("target-a")).unwrap();
    let on_c = Sccache::start(&program, &lab, &c);
    on_c.build(&lab.dir().join("target-a"));
    assert_eq!(on_c.counted(), (ALL, 0));
    on_c.stop();
}
