//! What a commit and a question cost; run by hand:
//! `cargo test --release --lib store::ledger::tests::speed -- --ignored --nocapture`.

use std::time::Instant;

use super::*;

/// What this thread computed, which neighbours on the machine do not lengthen as much as the time that passed.
fn computed() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn file(number: u64) -> Vec<Change> {
    vec![
        Change::PutNode(node(number, Content::Staging(StagingId(number)))),
        Change::PutName(name(
            1,
            &format!("file-{number:08}"),
            NameState::Live(Ino(number)),
            Some(number),
        )),
        Change::PutNode(node(1, Content::None)),
    ]
}

#[test]
#[ignore = "measures"]
fn commit_and_read() {
    const FILES: u64 = 200_000;
    let dir = tempfile::tempdir().unwrap();
    let (ledger, _) = Ledger::open(dir.path(), LastStop::Clean, &LedgerOptions::default()).unwrap();
    let (start, cpu) = (Instant::now(), computed());
    let mut worst = Duration::ZERO;
    for number in 2..FILES {
        let changes = file(number);
        let before = Instant::now();
        ledger.commit(changes).unwrap();
        worst = worst.max(before.elapsed());
    }
    let (each, own) = (
        start.elapsed() / FILES as u32,
        computed().checked_sub(cpu).unwrap() / FILES as u32,
    );
    println!(
        "commit of 3 rows: {each:?} each ({own:?} computed) with the absorber running, {worst:?} at the worst"
    );

    let names: Vec<_> = (2..FILES).map(|number| format!("file-{number:08}")).collect();
    let measure = |what: &str, count: u64, run: &dyn Fn(u64)| {
        let (start, cpu) = (Instant::now(), computed());
        (0..count).for_each(run);
        let (each, own) = (
            start.elapsed() / count as u32,
            computed().checked_sub(cpu).unwrap() / count as u32,
        );
        println!("{what}: {each:?} each ({own:?} computed)");
    };
    ledger.core.layers.absorb_all().unwrap();
    let recent = FILES - 2 - 50_000;
    measure("cached node", 50_000, &|at| {
        assert!(ledger.node(Ino(recent + at)).unwrap().is_some());
    });
    measure("cached name", 50_000, &|at| {
        let name = names[(recent + at) as usize].as_bytes();
        assert!(ledger.name(Ino(1), name).unwrap().is_some());
    });
    measure("node from the index", 50_000, &|at| {
        assert!(ledger.node(Ino(2 + at)).unwrap().is_some());
    });
    measure("absent name from the index", 50_000, &|at| {
        assert!(ledger.name(Ino(2), &at.to_be_bytes()).unwrap().is_none());
    });
    measure("1000 names of a listing", 100, &|at| {
        let after = names[at as usize * 1000].as_bytes();
        assert_eq!(ledger.names_in(Ino(1), Some(after), 1000).unwrap().len(), 1000);
    });
    measure("256 pending names", 100, &|_| {
        assert_eq!(ledger.pending_names(256).unwrap().len(), 256);
    });
    let start = Instant::now();
    ledger.barrier().unwrap();
    println!("barrier: {:?}", start.elapsed());
    measure("sync of one commit", 50, &|at| {
        ledger.commit(file(FILES + at)).unwrap();
        ledger.sync().unwrap();
    });
}

/// Create, rename, seal and upload of many small files, as a build makes them.
#[test]
#[ignore = "measures"]
fn life_of_files() {
    const FILES: u64 = 50_000;
    let dir = tempfile::tempdir().unwrap();
    let (ledger, _) = Ledger::open(dir.path(), LastStop::Clean, &LedgerOptions::default()).unwrap();
    let (start, cpu) = (Instant::now(), computed());
    for number in 2..FILES {
        let place = ledger.next_place();
        let temp = format!("tmp-{number}");
        let last = format!("file-{number}");
        let ino = Ino(number);
        ledger
            .commit(vec![
                Change::PutNode(node(number, Content::Staging(StagingId(number)))),
                Change::PutName(name(2, &temp, NameState::Live(ino), None)),
                Change::PutNode(node(2, Content::None)),
            ])
            .unwrap();
        ledger
            .commit(vec![
                Change::DropName(Ino(2), temp.into_bytes()),
                Change::PutName(name(3, &last, NameState::Live(ino), Some(place))),
                Change::PutNode(node(3, Content::None)),
            ])
            .unwrap();
        assert!(ledger.blob(&digest(number)).unwrap().is_none());
        ledger
            .commit(vec![
                Change::PutBlob(blob(number, Durability::Dirty)),
                Change::PutNode(node(number, Content::Blob(digest(number)))),
            ])
            .unwrap();
    }
    let (each, own) = (
        start.elapsed() / FILES as u32,
        computed().checked_sub(cpu).unwrap() / FILES as u32,
    );
    println!("three commits of a file: {each:?} each ({own:?} computed)");
    let start = Instant::now();
    ledger.close().unwrap();
    println!("close: {:?}; {}", start.elapsed(), memory());
}

/// The most memory that the process took, in kilobytes.
fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap_or_default()
        .to_owned()
}
