//! A real client: Bazel with its `--disk_cache` on the mounts of two machines.
//!
//! `CASMOUNT_TEST_BAZEL` names the program, else `target/tools/bazel` is it, which `scripts/test` brings.
//! Where there is none the tests say so and pass.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use lab::{Lab, StoreKind};
use support::{
    machine::Machine,
    posix::{content, file},
    wait,
};

on_both_stores!(what_one_machine_built_is_not_built_on_the_other);

const PARTS: usize = 12;

/// Bazel unpacks itself before it does anything.
const BUILD_LIMIT: Duration = Duration::from_secs(240);

fn bazel() -> Option<PathBuf> {
    let program = match std::env::var_os("CASMOUNT_TEST_BAZEL") {
        Some(program) => PathBuf::from(program),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bazel"),
    };
    program.exists().then_some(program)
}

fn workspace(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    file(&dir.join("WORKSPACE"), b"");
    let rules = format!(
        r#"
[genrule(
    name = "part%d" % n,
    outs = ["part%d.txt" % n],
    cmd = "echo part %d > $@" % n,
) for n in range({PARTS})]

genrule(
    name = "whole",
    srcs = [":part%d" % n for n in range({PARTS})],
    outs = ["whole.txt"],
    cmd = "cat $(SRCS) > $@",
)
"#
    );
    file(&dir.join("BUILD"), rules.as_bytes());
}

/// Builds everything on a machine that never built it; returns what Bazel said.
fn build(bazel: &Path, lab: &Lab, machine: &Machine) -> String {
    let output = lab.dir().join(format!("output-{}", machine.spec.name));
    let install = lab.dir().join("install");
    let disk = machine.path("disk");
    let mut command = Command::new(bazel);
    command.current_dir(lab.dir().join("workspace"));
    // Its home is not the developer's.
    command
        .env("HOME", &machine.spec.dir)
        .env_remove("BAZELISK_SKIP_WRAPPER");
    command.arg(format!("--output_user_root={}", output.display()));
    command.arg(format!("--install_base={}", install.display()));
    // No server is left behind.
    command.args(["--batch", "--nosystem_rc", "--nohome_rc", "build"]);
    command.arg(format!("--disk_cache={}", disk.display()));
    command.args([
        "--spawn_strategy=local",
        "--genrule_strategy=local",
        "--color=no",
        "//:whole",
    ]);
    let done = wait::run(&mut command, BUILD_LIMIT);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{}: {said}", machine.spec.name);
    let whole = content(&lab.dir().join("workspace/bazel-bin/whole.txt"));
    assert_eq!(String::from_utf8_lossy(&whole).lines().count(), PARTS);
    // Read-only trees that the directory of the test could not remove.
    let mut chmod = Command::new("chmod");
    wait::run_ok(chmod.args(["-R", "u+w"]).arg(&output), BUILD_LIMIT);
    said
}

fn what_one_machine_built_is_not_built_on_the_other(kind: StoreKind) {
    let Some(bazel) = bazel() else {
        eprintln!("skipped: there is no Bazel (scripts/test brings one where npm has it)");
        return;
    };
    let lab = Lab::new(kind);
    workspace(&lab.dir().join("workspace"));
    let (a, b) = (lab.machine("a"), lab.machine("b"));
    let first = build(&bazel, &lab, &a);
    assert!(!first.contains("cache hit"), "{first}");
    a.flush();
    let preset = &a.status()["presets"][0];
    assert_eq!(
        (&preset["preset"], &preset["origin"]),
        (&"bazel".into(), &"recognised".into())
    );
    assert_eq!(a.counter("/files/misnamed"), 0);
    file(&a.path("last"), b"last");
    a.flush();
    b.until_content("last", b"last");

    let all = format!("{} remote cache hit", PARTS + 1);
    let second = build(&bazel, &lab, &b);
    assert!(second.contains(&all), "{second}");
    assert_eq!(b.counter("/files/withheld"), 0);

    // A blob goes on a third machine before it builds: its entry is a miss there, and the build is whole.
    let c = lab.machine("c");
    let disk = c.path("disk");
    wait::until("C has the cache", Duration::from_secs(30), || {
        disk.is_dir().then_some(())
    });
    let part = support::tree::hex(&support::tree::digest(b"part 3\n"));
    let flat = disk.join(&part);
    let sharded = disk.join("cas").join(&part[..2]).join(&part);
    let removed = [flat, sharded]
        .iter()
        .filter(|path| fs::remove_file(path).is_ok())
        .count();
    assert_eq!(removed, 1);
    let third = build(&bazel, &lab, &c);
    let most = format!("{PARTS} remote cache hit");
    assert!(third.contains(&most), "{third}");
    assert!(c.counter("/files/withheld") > 0);
}
