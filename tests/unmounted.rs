//! What outlives an unmount: copies of the mount in other mount namespaces, and files of a mount that was detached.
//! They get errors, and nobody waits for them: the cache directory is closed as ever.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::unix::fs::FileExt,
    path::Path,
    process::{ChildStdin, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use lab::{Lab, StoreKind};
use support::{
    machine::Machine,
    posix::{content, file, rw},
    rng::Rng,
    wait,
};

on_both_stores!(
    a_copy_of_the_mount_elsewhere_gets_errors_and_hinders_no_clean_end,
    who_waits_for_the_store_elsewhere_hinders_no_clean_end,
    a_file_open_for_writing_elsewhere_is_kept_as_far_as_it_was_written,
    a_file_lent_for_writing_elsewhere_is_kept_to_its_end,
    files_of_a_detached_mount_get_errors_and_hinder_no_clean_end,
    what_is_closed_elsewhere_until_the_end_is_told_or_named,
);

const SOON: Duration = Duration::from_secs(60);

/// A shell with a mount namespace of its own; ends with this.
struct Elsewhere {
    child: wait::ChildGuard,
    commands: ChildStdin,
    lines: Receiver<String>,
}

impl Elsewhere {
    fn start() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = wait::ChildGuard(command.spawn().unwrap());
        let commands = child.0.stdin.take().unwrap();
        let said = BufReader::new(child.0.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in said.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let mut elsewhere = Self {
            child,
            commands,
            lines,
        };
        // From here on it has its own mounts.
        elsewhere.succeeds(":");
        elsewhere
    }

    fn begin(&mut self, command: &str) {
        writeln!(self.commands, "{{ {command}\n}} 2>&1; echo \"=$?\"").unwrap();
    }

    /// What the command begun last printed, and its exit code.
    #[track_caller]
    fn end(&mut self) -> (String, String) {
        let mut said = String::new();
        loop {
            let line = self
                .lines
                .recv_timeout(SOON)
                .expect("the shell elsewhere answers");
            if let Some(code) = line.strip_prefix('=') {
                return (said, code.to_owned());
            }
            said.push_str(&line);
            said.push('\n');
        }
    }

    #[track_caller]
    fn succeeds(&mut self, command: &str) -> String {
        self.begin(command);
        let (said, code) = self.end();
        assert_eq!(code, "0", "{command}: {said}");
        said
    }

    #[track_caller]
    fn fails(&mut self, command: &str) -> String {
        self.begin(command);
        let (said, code) = self.end();
        assert_ne!(code, "0", "{command}: {said}");
        said
    }
}

/// Of the last start.
#[track_caller]
fn assert_ended_cleanly(machine: &Machine) {
    let log = machine.log();
    let opened = log
        .lines()
        .rfind(|line| line.contains("opened the cache directory"));
    let opened = opened.expect("each start says so");
    assert!(opened.contains("crashed: false"), "{opened}");
    for word in [
        "still in use",
        "still being answered",
        "mends",
        "not closed cleanly",
    ] {
        assert!(!log.contains(word), "the log says {word:?}");
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn shown(path: &Path) -> String {
    format!("'{}'", path.display())
}

fn a_copy_of_the_mount_elsewhere_gets_errors_and_hinders_no_clean_end(kind: StoreKind) {
    if !is_root() {
        skip!("mount namespaces need root");
    }
    let lab = Lab::new(kind);
    let mut a = lab.spec("a").start();
    file(&a.path("f"), b"f");
    a.flush();
    let mut elsewhere = Elsewhere::start();
    let at = shown(&a.path("f"));
    assert_eq!(elsewhere.succeeds(&format!("cat {at}; echo")), "f\n");
    elsewhere.succeeds(&format!("exec 4<{at}"));
    elsewhere.begin(&format!("while cat {at} >/dev/null; do :; done"));
    a.unmount();
    let (said, _) = elsewhere.end();
    assert!(said.contains("not connected"), "another error: {said}");
    let log = a.log();
    assert!(
        log.contains("mount namespaces") && log.contains(&format!("pid: {}", elsewhere.child.0.id())),
        "who keeps it is not named"
    );
    let said = elsewhere.fails(&format!("cat {at}"));
    assert!(said.contains("not connected"), "{said}");
    elsewhere.fails(&format!("echo new >{}", shown(&a.path("new"))));
    a.restart();
    assert_ended_cleanly(&a);
    assert_eq!(content(&a.path("f")), b"f");
    // The new mount is another one.
    elsewhere.fails(&format!("cat {at}"));
    drop(elsewhere);
    file(&a.path("g"), b"g");
    a.unmount();
}

fn who_waits_for_the_store_elsewhere_hinders_no_clean_end(kind: StoreKind) {
    if !is_root() {
        skip!("mount namespaces need root");
    }
    let lab = Lab::new(kind);
    let a = lab.machine("a");
    let cold = Rng::seeded(7).bytes(200_000);
    file(&a.path("cold"), &cold);
    a.flush();
    let mut b = lab.spec("b").arg("--read-timeout").arg("10m").start();
    wait::until("B has the name", SOON, || fs::metadata(b.path("cold")).ok());
    let mut elsewhere = Elsewhere::start();
    lab.set_down(true);
    elsewhere.begin(&format!("cat {} >/dev/null", shown(&b.path("cold"))));
    wait::until("it waits for the store", SOON, || {
        (b.counter("/files/misses") > 0).then_some(())
    });
    b.unmount();
    let (said, code) = elsewhere.end();
    assert_ne!(code, "0", "{said}");
    lab.set_down(false);
    b.restart();
    assert_ended_cleanly(&b);
    b.until_content("cold", &cold);
}

/// Unmounts while files are open for writing elsewhere: they are named, and that is no success.
#[track_caller]
fn unmount_with_open_file(machine: &mut Machine, name: &str) {
    let out = machine.control("unmount", &["--deadline", "90s"]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains(name), "{said}");
    machine.wait_until_ended_with(1);
}

fn a_file_open_for_writing_elsewhere_is_kept_as_far_as_it_was_written(kind: StoreKind) {
    if !is_root() {
        skip!("mount namespaces need root");
    }
    let lab = Lab::new(kind);
    let mut a = lab.spec("a").arg("--no-passthrough").start();
    let mut elsewhere = Elsewhere::start();
    elsewhere.succeeds(&format!("exec 3>{}", shown(&a.path("written"))));
    elsewhere.succeeds("echo first >&3");
    unmount_with_open_file(&mut a, "written");
    elsewhere.fails("echo second >&3");
    a.restart();
    assert_ended_cleanly(&a);
    assert_eq!(content(&a.path("written")), b"first\n");
    a.flush();
    let b = lab.machine("b");
    b.until_content("written", b"first\n");
}

fn a_file_lent_for_writing_elsewhere_is_kept_to_its_end(kind: StoreKind) {
    if !is_root() {
        skip!("mount namespaces need root");
    }
    let lab = Lab::new(kind);
    let mut a = lab.spec("a").start();
    if a.status()["passthrough"] != true {
        skip!("this kernel takes no files");
    }
    let mut elsewhere = Elsewhere::start();
    elsewhere.succeeds(&format!("exec 3>{}", shown(&a.path("written"))));
    elsewhere.succeeds("echo first >&3");
    unmount_with_open_file(&mut a, "written");
    // The kernel writes to the lent file by itself, as after the end of a daemon that died.
    elsewhere.succeeds("echo second >&3");
    a.restart();
    assert_ended_cleanly(&a);
    assert_eq!(content(&a.path("written")), b"first\nsecond\n");
    let refused = a.control("flush", &["--deadline", "2s"]);
    assert_eq!(refused.status.code(), Some(1), "flush says that it is closed");
    elsewhere.succeeds("echo third >&3");
    drop(elsewhere);
    wait::until("nobody writes to it any more", SOON, || {
        let flushed = a.control("flush", &["--deadline", "5s"]);
        flushed.status.success().then_some(())
    });
    assert_eq!(content(&a.path("written")), b"first\nsecond\nthird\n");
    let b = lab.machine("b");
    b.until_content("written", b"first\nsecond\nthird\n");
}

fn files_of_a_detached_mount_get_errors_and_hinder_no_clean_end(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut a = lab.spec("a").arg("--no-passthrough").start();
    file(&a.path("f"), b"f");
    a.flush();
    let reader = File::open(a.path("f")).unwrap();
    let writer = rw(&file(&a.path("g"), b"g"));
    let out = a.control("unmount", &["--lazy", "--deadline", "90s"]);
    assert_eq!(out.status.code(), Some(1), "g is still open");
    a.wait_until_ended_with(1);
    assert_errno!(writer.write_all_at(b"h", 0), ENOTCONN);
    assert_errno!(reader.sync_all(), ENOTCONN);
    drop((reader, writer));
    a.restart();
    assert_ended_cleanly(&a);
    assert_eq!(content(&a.path("f")), b"f");
    assert_eq!(content(&a.path("g")), b"g");
    a.unmount();
}

/// Somebody elsewhere makes files until he is refused: what he closed is in the store, or the unmount is no success.
fn what_is_closed_elsewhere_until_the_end_is_told_or_named(kind: StoreKind) {
    if !is_root() {
        skip!("mount namespaces need root");
    }
    let lab = Lab::new(kind);
    let mut a = lab.spec("a").arg("--settle=0s").start();
    let mut elsewhere = Elsewhere::start();
    let at = shown(&a.path("f"));
    elsewhere.begin(&format!(
        "n=0; while echo $n >{at}$n; do n=$((n+1)); sleep 0.02; done; echo made $n"
    ));
    wait::until("some are made", SOON, || a.path("f20").exists().then_some(()));
    let out = a.control("unmount", &["--deadline", "90s"]);
    let is_all = out.status.success();
    a.wait_until_ended_with(i32::from(!is_all));
    let (said, _) = elsewhere.end();
    let made = said.lines().find_map(|line| line.strip_prefix("made "));
    let made: usize = made.expect("it says how many").parse().unwrap();
    assert!(made > 20, "{said}");
    if !is_all {
        a.restart();
        a.flush();
    }
    let b = lab.machine("b");
    for n in 0..made {
        b.until_content(&format!("f{n}"), format!("{n}\n").as_bytes());
    }
}
