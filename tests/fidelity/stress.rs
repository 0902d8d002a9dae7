//! stress-ng, which does many things at once to files and looks whether they came true, see [`STRESSORS`].

use std::{fs, time::Duration};

use crate::{
    lab::{Lab, StoreKind},
    need,
    support::{
        posix::{content, file},
        programs, wait,
    },
};

/// Each runs twice at once, for [`SECONDS`]: names, times, holes, locks, mappings and copies, while what was
/// closed is sealed and uploaded; watches, pipes and handles; `link` gives one file thousands of names.
const STRESSORS: [&str; 26] = [
    "access",
    "chmod",
    "copy-file",
    "dentry",
    "dir",
    "dirmany",
    "fallocate",
    "fanotify",
    "filename",
    "flock",
    "fpunch",
    "fsize",
    "getdent",
    "handle",
    "inotify",
    "iomix",
    "lease",
    "link",
    "lockofd",
    "metamix",
    "mknod",
    "msync",
    "rename",
    "splice",
    "sync-file",
    "utime",
];

const SECONDS: &str = "1";

#[test]
fn stressors_find_no_fault_and_leave_nothing() {
    let [program] = need!("stress-ng");
    let lab = Lab::new(StoreKind::S3);
    let machine = lab.spec("a").arg("--settle").arg("0s").start();
    let known = programs::command(&program, lab.dir()).arg("--stressors").output();
    let known = String::from_utf8(known.unwrap().stdout).unwrap();
    let kept = file(&machine.path("kept"), b"kept");
    for stressor in STRESSORS {
        // Each version has its own.
        if !known.split_whitespace().any(|known| known == stressor) {
            continue;
        }
        let mut command = programs::command(&program, lab.dir());
        command.args(["--verify", "--timeout", SECONDS, "--temp-path"]);
        command.arg(machine.root()).args([&format!("--{stressor}"), "2"]);
        let bytes = format!("--{stressor}-bytes");
        match stressor {
            "fallocate" | "iomix" => drop(command.args([&bytes, "8M"])),
            _ => {}
        }
        wait::run_ok(&mut command, programs::LIMIT);
        let left: Vec<_> = fs::read_dir(machine.root()).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "{stressor} left {left:?}");
    }
    machine.flush();
    assert_eq!(content(&kept), b"kept");
    let log = machine.log();
    // Stressors kill their processes, which are no trouble.
    let troubles: Vec<_> = log
        .lines()
        .filter(|line| line.contains("WARN") || line.contains("ERROR"))
        .collect();
    assert!(troubles.is_empty(), "{troubles:#?}");
    // What they deleted keeps no descriptor, and its bytes go from the disk.
    let count = |dir: String| fs::read_dir(dir).unwrap().count();
    wait::until("the daemon has let go", Duration::from_secs(60), || {
        (count(format!("/proc/{}/fd", machine.id())) < 100).then_some(())
    });
    lab.machine("b").until_content("kept", b"kept");
}
