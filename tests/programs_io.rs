//! Programs that test file systems, and a database, on real mounts: fsx, fio and the shell of `SQLite`.
//!
//! Each test says that it is skipped where its program is not; `scripts/test` brings all of them.

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use lab::{Lab, StoreKind};
use support::{
    machine::Machine,
    posix::file,
    programs::{self, LIMIT},
    rng::Rng,
    tree,
    wait::{self, ChildGuard},
};

on_both_stores!(
    sqlite_finds_its_database_whole_on_both_machines,
    fio_reads_what_it_wrote,
);

/// Of both `fsx` tests that only run; with the others more than a hundred thousand together.
const FSX_OPERATIONS: u64 = 45_000;

/// Of both that wait for a seal now and then.
const FSX_SLOW_OPERATIONS: u64 = 12_000;

/// How many run at the same time, each on a file of its own.
const FSX_AT_ONCE: u64 = 3;

/// Everything that `fsx` can do, the slow things seldom. Without the least size it asks for an allocation of nothing
/// now and then, which no file system grants.
const FSX_CONFIG: &str = "
flen = 1500000
[opsize]
min = 1
max = 100000
[weights]
close_open = 4
read = 10
write = 10
mapread = MAPREAD
mapwrite = 10
invalidate = 1
truncate = 3
fsync = 0.1
fdatasync = 0.1
posix_fallocate = 2
punch_hole = 4
sendfile = 2
posix_fadvise = 1
copy_file_range = 3
";

/// Goes into a program and lets it rest after each close, so that its file is sealed before it opens it again.
const SLOW_CLOSE: &str = r"
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int close(int fd) {
    int closed = syscall(SYS_close, fd);
    struct timespec rest = { 0, 20000000 };
    nanosleep(&rest, 0);
    return closed;
}
";

/// Runs `fsx` on several files of a mount at once, and expects the same bytes wherever one looks afterwards.
fn exercise(kind: StoreKind, args: &[&str], passthrough: bool, sealed_in_between: bool) {
    let [fsx, cc] = need!("fsx", "cc");
    let lab = Lab::new(kind);
    let mut spec = lab.spec("a");
    spec.args.extend(args.iter().map(Into::into));
    let mut machine = spec.start();
    assert_eq!(machine.status()["passthrough"], passthrough);
    // fsx never unmaps what it mapped to read, and a mapping that could write forbids sealing.
    let mapread = if sealed_in_between { "0" } else { "10" };
    let config = FSX_CONFIG.replace("MAPREAD", mapread);
    let config = file(&lab.dir().join("fsx.toml"), config.as_bytes());
    let slow_close = lab.dir().join("slow-close.so");
    if sealed_in_between {
        let source = file(&lab.dir().join("slow-close.c"), SLOW_CLOSE.as_bytes());
        let mut compile = programs::command(&cc, lab.dir());
        compile
            .args(["-shared", "-fPIC", "-o"])
            .arg(&slow_close)
            .arg(&source);
        wait::run_ok(&mut compile, LIMIT);
    }
    let operations = if sealed_in_between {
        FSX_SLOW_OPERATIONS
    } else {
        FSX_OPERATIONS
    };
    let mut rng = Rng::from_environment();
    let running: Vec<_> = (0..FSX_AT_ONCE)
        .map(|number| {
            let mut command = programs::command(&fsx, lab.dir());
            let seed = rng.next();
            command.arg("-S").arg(seed.to_string());
            command.arg("-N").arg((operations / FSX_AT_ONCE).to_string());
            command.arg("-f").arg(&config).arg("-P").arg(lab.dir());
            command.arg(machine.path(format!("fsx-{number}")));
            if sealed_in_between {
                command.env("LD_PRELOAD", &slow_close);
            }
            eprintln!("{command:?}");
            // Into a file: when it finds something it says more than a pipe holds.
            let said = lab.dir().join(format!("fsx-{number}.log"));
            let log = std::fs::File::create(&said).expect("a log can be made");
            command
                .stdin(Stdio::null())
                .stdout(log.try_clone().expect("a descriptor can be copied"))
                .stderr(log);
            (ChildGuard(command.spawn().expect("fsx can be started")), said)
        })
        .collect();
    for (mut child, said) in running {
        let status = wait::until("fsx has ended", LIMIT, || {
            child.0.try_wait().expect("our own child")
        });
        let said = std::fs::read_to_string(said).expect("fsx writes text");
        assert!(status.success() && said.contains("A-OK"), "{status}\n{said}");
    }
    if sealed_in_between {
        let sealed = machine.counter("/files/sealed");
        eprintln!("files were sealed {sealed} times in between");
        assert!(sealed > 100, "only {sealed} times a file was sealed in between");
    }
    let left = tree::read(machine.root());
    machine.flush();
    tree::assert_same(&left, &tree::read(machine.root()));
    let other = lab.machine("b");
    tree::assert_same(&left, &tree::read(other.root()));
    machine.unmount();
    machine.restart();
    tree::assert_same(&left, &tree::read(machine.root()));
    assert!(lab.assert_blobs_match_their_names() > 0);
}

#[test]
fn fsx_finds_no_fault_with_passthrough() {
    exercise(StoreKind::File, &[], true, false);
}

#[test]
fn fsx_finds_no_fault_without_passthrough() {
    exercise(StoreKind::S3, &["--no-passthrough"], false, false);
}

#[test]
fn fsx_finds_no_fault_while_files_are_sealed_with_passthrough() {
    exercise(StoreKind::S3, &["--settle", "0s"], true, true);
}

#[test]
fn fsx_finds_no_fault_while_files_are_sealed_without_passthrough() {
    exercise(
        StoreKind::File,
        &["--settle", "0s", "--no-passthrough"],
        false,
        true,
    );
}

/// Jobs of `fio` that write and then verify what they wrote, each in its own file unless it says otherwise.
const FIO_JOBS: &str = "
[global]
directory=.
size=12m
verify=crc32c
verify_fatal=1
do_verify=1
end_fsync=1
group_reporting=0

[sequential]
rw=write
bs=128k
ioengine=sync
numjobs=2

[random]
rw=randwrite
bs=4k
ioengine=psync
numjobs=2

[mapped]
rw=randwrite
bs=4k
ioengine=mmap

[synced]
rw=randwrite
bs=16k
size=2m
ioengine=pvsync
fsync=16
fdatasync=7

[mixed]
rw=randrw
bsrange=512-64k
bs_unaligned=1
ioengine=psync
size=6m

[direct]
rw=randwrite
bs=4k
size=4m
direct=1
ioengine=psync
";

fn fio_reads_what_it_wrote(kind: StoreKind) {
    let [fio] = need!("fio");
    let lab = Lab::new(kind);
    let jobs = file(&lab.dir().join("jobs.fio"), FIO_JOBS.as_bytes());
    // Read again later by programs that do not write: the same jobs, verifying only.
    for args in [&[][..], &["--no-passthrough"], &["--settle", "0s"]] {
        let mut spec = lab.spec(&format!("a{}", args.len()));
        spec.args.extend(args.iter().map(Into::into));
        let mut machine = spec.start();
        let dir = machine.path(format!("fio{}", args.len()));
        std::fs::create_dir(&dir).unwrap();
        fio_run(&fio, &dir, &jobs, &[]);
        let left = tree::read(&dir);
        machine.flush();
        fio_run(&fio, &dir, &jobs, &["--verify_only"]);
        tree::assert_same(&left, &tree::read(&dir));
        machine.unmount();
    }
    let other: Machine = lab.machine("b");
    for name in ["fio0", "fio1", "fio2"] {
        assert_eq!(tree::read(&other.path(name)).len(), 8);
        fio_run(&fio, &other.path(name), &jobs, &["--verify_only"]);
    }
}

#[track_caller]
fn fio_run(fio: &Path, dir: &Path, jobs: &Path, args: &[&str]) {
    let mut command = programs::command(fio, dir);
    command.current_dir(dir).args(args).arg("--output-format=terse");
    // What it keeps of a run is not to be on the mount.
    command.arg("--verify_state_save=0").arg(jobs);
    let said = wait::run_ok(&mut command, LIMIT);
    let failed: Vec<_> = said
        .lines()
        .filter(|line| line.split(';').nth(4).is_some_and(|error| error != "0"))
        .collect();
    assert!(failed.is_empty(), "{failed:?}");
}

const SQLITE_ROWS: u32 = 20_000;

fn sqlite_finds_its_database_whole_on_both_machines(kind: StoreKind) {
    let [sqlite] = need!("sqlite3");
    let lab = Lab::new(kind);
    let mut machine = lab.machine("a");
    let ask = |database: &Path, statements: &str| {
        let mut command = programs::command(&sqlite, lab.dir());
        wait::run_ok(command.arg("-bail").arg(database).arg(statements), LIMIT)
    };
    for mode in ["delete", "wal"] {
        let database = machine.path(format!("{mode}.db"));
        let said = ask(
            &database,
            &format!(
                "PRAGMA journal_mode={mode};
                 CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT UNIQUE, body BLOB);
                 BEGIN;
                 WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {SQLITE_ROWS})
                 INSERT INTO t SELECT i, 'name ' || i, randomblob(i % 700) FROM n;
                 COMMIT;
                 CREATE INDEX bodies ON t(body);
                 PRAGMA integrity_check;"
            ),
        );
        assert_eq!(said.lines().collect::<Vec<_>>(), [mode, "ok"]);
        // Several programs at once, each transaction by itself.
        let writers: Vec<_> = (0..3)
            .map(|writer| {
                let update = |step| {
                    let first = writer * 100 + step;
                    format!("UPDATE t SET body = randomblob(300) WHERE id % 1000 = {first};\n")
                };
                let updates: Vec<_> = (0..40).map(update).collect();
                let statements = format!(".timeout 60000\n{}", updates.concat());
                let script = file(
                    &lab.dir().join(format!("{mode}-{writer}.sql")),
                    statements.as_bytes(),
                );
                let mut command = Command::new(&sqlite);
                command
                    .arg("-bail")
                    .arg(&database)
                    .arg(format!(".read {}", script.display()));
                command.stdin(Stdio::null()).stdout(Stdio::null());
                ChildGuard(command.spawn().expect("sqlite3 can be started"))
            })
            .collect();
        for mut writer in writers {
            let ended = wait::until("sqlite3 has ended", LIMIT, || {
                writer.0.try_wait().expect("our own child")
            });
            assert!(ended.success(), "{ended}");
        }
        let said = ask(
            &database,
            "DELETE FROM t WHERE id % 3 = 0; VACUUM; PRAGMA integrity_check; SELECT count(*) FROM t;",
        );
        let kept = SQLITE_ROWS - SQLITE_ROWS / 3;
        assert_eq!(said.lines().collect::<Vec<_>>(), ["ok", &kept.to_string()]);
    }
    machine.unmount();
    machine.restart();
    let whole = |machine: &Machine, mode: &str| {
        let database = machine.path(format!("{mode}.db"));
        let said = ask(
            &database,
            "PRAGMA integrity_check; SELECT count(*), sum(length(body)), sum(id) FROM t;",
        );
        assert!(said.starts_with("ok\n"), "{said}");
        said
    };
    let other = lab.machine("b");
    for mode in ["delete", "wal"] {
        assert_eq!(whole(&machine, mode), whole(&other, mode));
    }
    wait::until("the journals are gone", Duration::from_secs(30), || {
        (tree::read(other.root()).len() == 2).then_some(())
    });
}
