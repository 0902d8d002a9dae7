//! `kill -9` of a process that commits: what it was told is committed is there.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use casmount::store::{
    cachedir::LastStop,
    ledger::{Ledger, LedgerOptions},
    rows::{Change, Content, Ino, NodeKind, NodeRow},
};

const DIR: &str = "CASMOUNT_TEST_LEDGER";

fn open(dir: &Path) -> Ledger {
    // Often, so that kills hit absorbs and barriers as well.
    let options = LedgerOptions {
        absorb_every: Duration::from_millis(2),
        barrier_every: Duration::from_millis(20),
    };
    Ledger::open(dir, LastStop::Crashed, &options).unwrap().0
}

fn newest(ledger: &Ledger) -> u64 {
    let value = ledger.meta("newest").unwrap();
    value.map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap()))
}

fn node(ino: u64) -> NodeRow {
    NodeRow {
        ino: Ino(ino),
        kind: NodeKind::File,
        perm: 0o644,
        uid: 0,
        gid: 0,
        rdev: 0,
        size: ino * 3,
        atime: 0,
        mtime: 0,
        ctime: 0,
        nlink: 1,
        content: Content::None,
        target: Vec::new(),
        xattrs: Vec::new(),
        dir: None,
        link_id: None,
        places: Vec::new(),
    }
}

struct KilledOnDrop(Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        // It may have ended by itself, which the test finds out by what it told.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The process that is killed: commits, and says so.
#[test]
#[ignore = "run by the other test"]
fn committer() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let ledger = open(dir.as_ref());
    let start = newest(&ledger);
    for number in start + 1..start + 1_000_000 {
        let newest = number.to_le_bytes().to_vec();
        ledger
            .commit(vec![
                Change::PutNode(node(number)),
                Change::PutMeta("newest".to_owned(), newest),
            ])
            .unwrap();
        // Not println: the harness would hold it back.
        writeln!(std::io::stdout(), "committed {number}").unwrap();
    }
}

#[test]
fn a_killed_process_loses_no_committed_change() {
    let dir = tempfile::tempdir().unwrap();
    let mut last = 0;
    for round in 0..8 {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "committer", "--ignored", "--nocapture"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = KilledOnDrop(child.unwrap());
        let lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
        let mut told = lines.filter_map(|line| line.ok()?.strip_prefix("committed ")?.parse::<u64>().ok());
        let before_kill = told.by_ref().nth(50 + 137 * round).expect("the process commits");
        drop(child);
        // What was told and not read yet is in the pipe; the last line may be cut short.
        let told = told.max().unwrap_or(0).max(before_kill);

        let ledger = open(dir.path());
        let newest = newest(&ledger);
        assert!(
            newest >= told && told > last,
            "{newest} is there, {told} was committed, {last} before"
        );
        for number in last + 1..=newest {
            assert_eq!(ledger.node(Ino(number)).unwrap().as_deref(), Some(&node(number)));
        }
        assert_eq!(ledger.node(Ino(newest + 1)).unwrap(), None);
        last = newest;
    }
}
