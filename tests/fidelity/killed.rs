//! Programs that are killed or interrupted while they wait for the daemon.

use std::{
    fs::{self, File},
    process::{Command, Stdio},
    time::Duration,
};

use crate::{
    lab::{Lab, StoreKind},
    s3server::Faults,
    support::{
        posix::{content, file},
        wait,
    },
};

/// Ways of programs to wait for the store: for the first bytes, for those behind, for all of them.
const WAYS: [&str; 4] = [
    "exec head -c 1 \"$1\"",
    "exec tail -c 1 \"$1\"",
    "exec dd if=\"$1\" iflag=direct bs=1M status=none of=/dev/null",
    "exec truncate -s 5 \"$1\"",
];

#[test]
fn who_is_killed_while_the_store_stalls_is_no_error_in_the_log() {
    let lab = Lab::new(StoreKind::S3);
    let a = lab.machine("a");
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 241) as u8).collect();
    for number in 0..2 * WAYS.len() {
        let mut own = bytes.clone();
        own[0] = number as u8;
        file(&a.path(format!("f{number}")), &own);
    }
    a.flush();
    let b = lab.machine("b");
    wait::until("b follows", Duration::from_secs(30), || {
        (fs::read_dir(b.root()).unwrap().count() == 2 * WAYS.len()).then_some(())
    });
    let before = b.counter("/files/misses");
    lab.server().set_faults(Faults {
        only: vec!["GetObject".to_owned()],
        stall: 1.0,
        ..Faults::default()
    });
    let start = |number: usize| {
        let mut sh = Command::new("sh");
        sh.args(["-c", WAYS[number % WAYS.len()], "sh"])
            .arg(b.path(format!("f{number}")));
        wait::ChildGuard(sh.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    };
    let mut waiting: Vec<_> = (0..2 * WAYS.len()).map(start).collect();
    wait::until("all of them wait", Duration::from_secs(30), || {
        let waits = |child: &wait::ChildGuard| {
            let state = fs::read_to_string(format!("/proc/{}/stat", child.0.id())).unwrap_or_default();
            state.contains(") D ") || state.contains(") S ")
        };
        waiting.iter().all(waits).then_some(())
    });
    wait::until("the store was asked", Duration::from_secs(30), || {
        (b.counter("/files/misses") > before).then_some(())
    });
    for child in &waiting {
        wait::kill(child.0.id());
    }
    lab.server().set_faults(Faults::default());
    for child in &mut waiting {
        wait::until("it has ended", Duration::from_secs(60), || {
            child.0.try_wait().unwrap()
        });
    }
    // Nobody waits for long, and the daemon serves on.
    for number in 0..2 * WAYS.len() {
        let read = wait::try_until(Duration::from_secs(60), || {
            fs::read(b.path(format!("f{number}"))).ok()
        });
        assert!(read.is_some(), "f{number} cannot be read");
    }
    drop(File::create(b.path("more")).unwrap());
    b.flush();
    let log = b.log();
    assert!(!log.contains("ERROR"), "{log}");
    assert!(!log.contains("FUSE reply"), "{log}");
    assert_eq!(content(&a.path("f0"))[..2], content(&b.path("f0"))[..2]);
}

/// Signals whose handlers return interrupt requests all the time: each ends by its own answer.
#[test]
fn signals_change_nothing_and_are_no_error_in_the_log() {
    let lab = Lab::new(StoreKind::File);
    for (name, more) in [("a", None), ("b", Some("--no-passthrough"))] {
        let mut spec = lab.spec(name).arg("--volume").arg(name);
        spec.args.extend(more.map(Into::into));
        let machine = spec.start();
        let root = machine.path("d");
        fs::create_dir(&root).unwrap();
        let script = r#"trap : USR1; n=0
            while [ $n -lt 300 ]; do
                n=$((n + 1)); echo "$n" > "$1/f$n"; read back < "$1/f$n" || read back < "$1/f$n"
                [ "$back" = "$n" ] || exit 3
                [ $((n % 2)) = 0 ] || mv "$1/f$n" "$1/g$n"
            done"#;
        let mut sh = Command::new("sh");
        sh.args(["-c", script, "sh"]).arg(&root).stdin(Stdio::null());
        let mut child = wait::ChildGuard(sh.spawn().unwrap());
        let pid = rustix::process::Pid::from_child(&child.0);
        std::thread::sleep(Duration::from_millis(50));
        let ended = wait::until("it has ended", Duration::from_secs(120), || {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::USR1);
            child.0.try_wait().unwrap()
        });
        assert!(ended.success(), "{ended}");
        assert_eq!(fs::read_dir(&root).unwrap().count(), 300);
        machine.flush();
        let log = machine.log();
        assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
    }
}
