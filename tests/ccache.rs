//! A real client: a ccache directory that two machines share.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use lab::{Lab, StoreKind};
use support::{input, machine::Machine, posix::file, wait};

on_both_stores!(
    what_one_machine_compiled_the_other_finds,
    two_machines_that_build_at_once_keep_their_locks_and_counters_to_themselves,
);

/// The least number of files that count as a real program.
const MIN_SOURCES: usize = 100;

/// C sources of the dependencies: `SQLite`, zstd, and the plain C part of AWS-LC.
fn sources() -> Vec<(PathBuf, Vec<String>)> {
    let include = |dir: &Path| format!("-I{}", dir.display());
    let mut sources = Vec::new();
    let sqlite = input::dependency("libsqlite3-sys").join("sqlite3");
    sources.push((sqlite.join("sqlite3.c"), vec![include(&sqlite)]));
    let zstd = input::dependency("zstd-sys").join("zstd/lib");
    for part in ["common", "compress", "decompress", "dictBuilder"] {
        for path in c_files(&zstd.join(part)) {
            sources.push((path, vec!["-DZSTD_DISABLE_ASM=1".to_owned(), include(&zstd)]));
        }
    }
    let aws = input::dependency("aws-lc-sys").join("aws-lc");
    for part in [
        "asn1",
        "base64",
        "bio",
        "bn_extra",
        "buf",
        "bytestring",
        "conf",
        "ec_extra",
        "err",
        "evp_extra",
        "x509",
    ] {
        for path in c_files(&aws.join("crypto").join(part)) {
            sources.push((
                path,
                vec![include(&aws.join("include")), "-DOPENSSL_NO_ASM".to_owned()],
            ));
        }
    }
    sources.truncate(110);
    assert!(sources.len() >= MIN_SOURCES, "only {} C sources", sources.len());
    sources
}

fn c_files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|err| panic!("cannot list {}: {err}", dir.display()));
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
        .filter(|path| !path.to_string_lossy().contains("test"))
        .collect();
    paths.sort();
    paths
}

/// Compiles everything with the cache on a machine's mount; returns ccache's counters of this build.
fn build(machine: &Machine, lab: &Lab, sources: &[(PathBuf, Vec<String>)]) -> HashMap<String, u64> {
    let ccache = || {
        let mut command = Command::new("ccache");
        command.env_remove("CCACHE_DISABLE");
        command.env("CCACHE_DIR", machine.path("ccache"));
        // The same on both machines: the sources and compiler are, and only they shall count.
        command
            .env("CCACHE_NOHASHDIR", "1")
            .env("CCACHE_CONFIGPATH", "/dev/null");
        command
    };
    fs::create_dir_all(machine.path("ccache")).unwrap();
    wait::run_ok(ccache().arg("--zero-stats"), Duration::from_secs(60));
    let out = lab.dir().join(format!("objects-{}", machine.spec.name));
    fs::create_dir_all(&out).unwrap();
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((source, flags)) =
                    sources.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
                {
                    let object = out.join(format!("{}.o", source.to_string_lossy().replace('/', "_")));
                    let mut compile = ccache();
                    compile
                        .args(["cc", "-c", "-O0", "-w"])
                        .args(flags)
                        .arg("-o")
                        .arg(&object)
                        .arg(source);
                    wait::run_ok(&mut compile, Duration::from_secs(120));
                }
            });
        }
    });
    let stats = wait::run_ok(ccache().arg("--print-stats"), Duration::from_secs(60));
    let pairs = stats.lines().filter_map(|line| line.split_once('\t'));
    pairs
        .filter_map(|(name, value)| Some((name.to_owned(), value.trim().parse().ok()?)))
        .collect()
}

/// Panics unless ccache and a compiler are here.
fn require_tools() {
    for tool in ["ccache", "cc"] {
        assert!(
            Command::new(tool)
                .arg("--version")
                .output()
                .is_ok_and(|output| output.status.success()),
            "{tool} is missing: apt-get install ccache gcc libc6-dev"
        );
    }
}

/// The presets that a machine's status shows, with their origins.
fn presets(machine: &Machine) -> Vec<String> {
    let status = machine.status();
    let shown = status["presets"].as_array().unwrap().iter();
    shown
        .map(|at| format!("{}={} {}", at["dir"], at["preset"], at["origin"]).replace('"', ""))
        .collect()
}

fn what_one_machine_compiled_the_other_finds(kind: StoreKind) {
    require_tools();
    let lab = Lab::new(kind);
    let sources = sources();
    let count = sources.len() as u64;
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    let first = build(&a, &lab, &sources);
    assert_eq!(first.get("cache_miss"), Some(&count), "{first:?}");
    assert_eq!(presets(&a), ["ccache=ccache recognised"]);
    a.flush();
    file(&a.path("last"), b"last");
    a.flush();
    wait::until("B has followed", Duration::from_secs(30), || {
        b.path("last").exists().then_some(())
    });

    let second = build(&b, &lab, &sources);
    eprintln!("{second:?}");
    let hits = second["direct_cache_hit"] + second["preprocessed_cache_hit"];
    assert_eq!((hits, second["cache_miss"]), (count, 0), "{second:?}");
    for trouble in [
        "internal_error",
        "bad_output_file",
        "missing_cache_file",
        "compile_failed",
    ] {
        assert_eq!(second.get(trouble).copied().unwrap_or_default(), 0, "{trouble}");
    }
    // The objects are those of the first build, byte for byte.
    let of = |name: &str| support::tree::read(&lab.dir().join(name)).into_iter();
    let (a, b): (Vec<_>, Vec<_>) = (
        of("objects-a")
            .map(|(path, entry)| (path, entry.content))
            .collect(),
        of("objects-b")
            .map(|(path, entry)| (path, entry.content))
            .collect(),
    );
    assert!(a == b);
}

/// All names below a directory, from there.
fn names_below(top: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut dirs = vec![top.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            names.push(path.strip_prefix(top).unwrap().display().to_string());
            if path.is_dir() {
                dirs.push(path);
            }
        }
    }
    names
}

fn two_machines_that_build_at_once_keep_their_locks_and_counters_to_themselves(kind: StoreKind) {
    require_tools();
    let lab = Lab::new(kind);
    let start = |name: &str| lab.spec(name).arg("--preset=ccache=ccache").start();
    let (a, b) = (start("a"), start("b"));
    let sources: Vec<_> = sources().into_iter().skip(1).take(30).collect();
    let count = sources.len() as u64;
    // A lock that is held on A is nobody's business on B, and what A counted is not B's.
    fs::create_dir_all(a.path("ccache/tmp")).unwrap();
    file(&a.path("ccache/tmp/held.alive"), b"");
    std::os::unix::fs::symlink("a-1-2-3", a.path("ccache/tmp/held.lock")).unwrap();
    let (on_a, on_b) = std::thread::scope(|scope| {
        let on_b = scope.spawn(|| build(&b, &lab, &sources));
        (build(&a, &lab, &sources), on_b.join().unwrap())
    });
    for (machine, stats) in [(&a, on_a), (&b, on_b)] {
        let of = |name: &str| stats.get(name).copied().unwrap_or_default();
        let calls = of("direct_cache_hit") + of("preprocessed_cache_hit") + of("cache_miss");
        assert_eq!(calls, count, "{} counted others: {stats:?}", machine.spec.name);
        for trouble in [
            "internal_error",
            "bad_output_file",
            "missing_cache_file",
            "compile_failed",
        ] {
            assert_eq!(of(trouble), 0, "{trouble}: {stats:?}");
        }
        let names = names_below(&machine.path("ccache"));
        assert!(names.iter().any(|name| name.ends_with("/stats")), "{names:?}");
        machine.flush();
    }
    assert!(!b.path("ccache/tmp/held.lock").exists());

    // A machine that was not there finds the results of both, and nothing else.
    let c = start("c");
    for name in names_below(&c.path("ccache")) {
        let file = name.rsplit('/').next().unwrap();
        let stays = matches!(file, "stats" | "tmp" | "lock" | ".cleaned")
            || [".lock", ".alive"].iter().any(|end| file.ends_with(end))
            || file.contains(".tmp.");
        assert!(!stays, "{name} left its machine");
    }
    let third = build(&c, &lab, &sources);
    let hits = third["direct_cache_hit"] + third["preprocessed_cache_hit"];
    assert_eq!((hits, third["cache_miss"]), (count, 0), "{third:?}");
}
