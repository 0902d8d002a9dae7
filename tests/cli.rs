//! What the command line does with bad input: one clear line, the right exit
//! code, and nothing changed. No test here mounts anything.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

struct Sandbox {
    dir: tempfile::TempDir,
}

impl Sandbox {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Runs the program with a home, a cache and a store of its own.
    fn run(&self, args: &[&str], variables: &[(&str, &str)]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_casmount"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("CASMOUNT_") {
                command.env_remove(name);
            }
        }
        command
            .args(args)
            .current_dir(self.dir.path())
            .env("CASMOUNT_CONFIG", self.config(""))
            .env("CASMOUNT_STORE", format!("file://{}", self.path("store")))
            .env("CASMOUNT_CACHE_DIR", self.path("cache"))
            .env("CASMOUNT_LOG_FILE", self.path("log"))
            .envs(variables.iter().copied())
            .output()
            .unwrap()
    }

    fn config(&self, text: &str) -> String {
        let name = if text.is_empty() {
            "empty.toml"
        } else {
            "config.toml"
        };
        fs::write(self.dir.path().join(name), text).unwrap();
        self.path(name)
    }

    /// Runs what must fail with `code` and one line that holds all of `words`.
    fn refused(&self, args: &[&str], variables: &[(&str, &str)], code: i32, words: &[&str]) {
        let output = self.run(args, variables);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.starts_with("casmount: "), "{args:?}: {stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{args:?}: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "{args:?} does not say {word:?}: {stderr}");
        }
        assert!(
            !Path::new(&self.path("cache")).exists(),
            "{args:?} made a cache directory"
        );
        assert!(!Path::new(&self.path("store")).exists(), "{args:?} made a store");
    }
}

#[test]
fn a_mountpoint_that_cannot_be_one_is_refused() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.path("full")).unwrap();
    fs::write(sandbox.path("full/file"), "x").unwrap();
    for foreground in [&["mount", "--foreground"][..], &["mount"]] {
        for (mountpoint, words) in [
            ("missing", &["there is no directory", "missing", "mkdir -p"][..]),
            ("full/file", &["not a directory", "full/file"]),
            ("full", &["mountpoint is not empty", "full"]),
        ] {
            // In the foreground the log goes to a file here, so that the line stands alone.
            sandbox.refused(&[foreground, &[mountpoint]].concat(), &[], 1, words);
        }
    }
    assert_eq!(fs::read(sandbox.path("full/file")).unwrap(), b"x");
}

#[test]
fn a_wrong_command_is_a_usage_error() {
    let sandbox = Sandbox::new();
    for args in [
        &["levitate"][..],
        &["mount"],
        &["mount", "--no-such-flag", "m"],
        &["mount", "--cache-size", "lots", "m"],
        &["mount", "--volume", "../x", "m"],
        &["mount", "--umask", "9", "m"],
        &["flush", "--deadline", "soon", "m"],
        &["status"],
    ] {
        let output = sandbox.run(args, &[]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn a_wrong_setting_is_named_with_its_source() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.path("m")).unwrap();
    sandbox.refused(
        &["mount", "m"],
        &[("CASMOUNT_CACHE_SIZE", "lots")],
        2,
        &["CASMOUNT_CACHE_SIZE", "lots"],
    );
    sandbox.refused(&["mount", "m"], &[("CASMOUNT_STORE", "ftp://x")], 2, &["ftp://x"]);
    let config = sandbox.config("cache_size = '1G'\n");
    sandbox.refused(
        &["mount", "--config", &config, "m"],
        &[],
        2,
        &["cache_size", "config.toml", "cache-size"],
    );
    sandbox.refused(&["mount", "--config", "no.toml", "m"], &[], 2, &["no.toml"]);
    sandbox.refused(
        &["mount", "--cache-dir", "m/cache", "m"],
        &[],
        2,
        &["inside each other", "--cache-dir"],
    );
    sandbox.refused(
        &["mount", "--log-file", "m/log", "m"],
        &[],
        2,
        &["inside the mount"],
    );
}

#[test]
fn where_nobody_serves_every_command_says_how_to_mount() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.path("m")).unwrap();
    for args in [
        &["status", "m"][..],
        &["flush", "m"],
        &["unmount", "m"],
        &["ls", "m", "a"],
    ] {
        sandbox.refused(
            args,
            &[],
            1,
            &["no casmount daemon serves", "/m", "casmount mount"],
        );
    }
    sandbox.refused(&["ls", "m", "/etc"], &[], 2, &["/etc is not in"]);
    sandbox.refused(&["status", "no/no"], &[], 1, &["there is no directory"]);
}

#[test]
fn help_and_version_are_no_failures() {
    let sandbox = Sandbox::new();
    for command in ["mount", "unmount", "flush", "status", "ls", "doctor"] {
        let output = sandbox.run(&[command, "--help"], &[]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success() && text.contains("Examples:"),
            "{command}: {text}"
        );
    }
    let output = sandbox.run(&["--version"], &[]);
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        format!("casmount {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn doctor_shows_the_settings_it_judged_and_changes_nothing() {
    let sandbox = Sandbox::new();
    let config = sandbox.config("volume = 'from-file'\n");
    let args = ["doctor", "--json", "--config", &config];
    let diagnose = |variables: &[(&str, &str)], more: &[&str]| -> serde_json::Value {
        let output = sandbox.run(&[&args[..], more].concat(), variables);
        assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    // Flag over variable over file.
    assert_eq!(diagnose(&[], &[])["volume"], "from-file");
    let variable = [("CASMOUNT_VOLUME", "from-env")];
    assert_eq!(diagnose(&variable, &[])["volume"], "from-env");
    let diagnosis = diagnose(&variable, &["--volume", "from-flag"]);
    assert_eq!(diagnosis["volume"], "from-flag");
    let checks: Vec<_> = diagnosis["findings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["check"].as_str().unwrap())
        .collect();
    for check in [
        "fuse-device",
        "kernel",
        "passthrough",
        "cache-file-system",
        "cache-room",
        "store",
    ] {
        assert!(checks.contains(&check), "{check} is missing in {checks:?}");
    }
    assert!(!Path::new(&sandbox.path("cache")).exists() && !Path::new(&sandbox.path("store")).exists());
}
