//! A test suite of others that holds file systems to POSIX, see [`posix_suite`].

use std::fs;

use crate::{
    lab::{Lab, StoreKind},
    need,
    support::posix_suite,
};

on_both_stores!(the_suite_of_posix_finds_no_fault);

/// It knows how many links a file may have of some file systems only.
const NOT_KNOWN: &str = "link::link_count_max";

fn the_suite_of_posix_finds_no_fault(kind: StoreKind) {
    let [program] = need!("pjdfstest");
    if !rustix::process::geteuid().is_root() {
        skip!("becoming another user needs root");
    }
    let lab = Lab::new(kind);
    for (name, more) in [
        ("a", &[][..]),
        ("b", &["--xattr"]),
        ("c", &["--no-passthrough", "--settle", "0s"]),
    ] {
        let mut spec = lab.spec(name).arg("--owner").arg("preserve");
        spec.args.extend(more.iter().map(Into::into));
        let mut machine = spec.start();
        let found = posix_suite::run(&program, machine.root(), lab.dir(), None);
        assert!(found.failed.is_empty(), "{name}: {}", found.said);
        let skipped: Vec<_> = found.skipped.iter().filter(|case| *case != NOT_KNOWN).collect();
        assert!(skipped.is_empty(), "{name}: {}", found.said);
        assert!(found.passed.len() > 390, "{name}: {}", found.said);
        // It left nothing, and neither does the daemon.
        assert_eq!(fs::read_dir(machine.root()).unwrap().count(), 0);
        machine.unmount();
    }
}
