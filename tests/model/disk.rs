//! The model against a directory of the disk: it is right. And what becomes of one that is wrong.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::{
    compare,
    drive::{self, Trials},
    fs::{Fs, Mistake},
    ops::{self, Access, How, Op, Renaming},
    real::Real,
    script::{self, Line, What},
    support::{tempdir::TestDir, wait},
};

/// Gives each sequence a directory of its own.
struct Dirs {
    top: TestDir,
    next: AtomicU64,
}

impl Dirs {
    fn new() -> Self {
        Self {
            top: TestDir::new(),
            next: AtomicU64::new(0),
        }
    }

    fn make(&self) -> PathBuf {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let dir = self.top.path().join(number.to_string());
        std::fs::create_dir(&dir).expect("a directory can be made");
        dir
    }
}

/// Does a sequence in a directory and in the model; the script of what differed is the error.
fn run(dir: &Path, ops: &[Op], mistake: Option<Mistake>) -> Result<(), String> {
    let (mut model, mut real) = (Fs::new(), Real::new(dir));
    model.mistake = mistake;
    let mut lines = Vec::new();
    for (op, step) in ops.iter().zip(1..) {
        drive::one("A", op, step, &mut model, &mut real, &mut lines)?;
    }
    real.close_all();
    let differences = compare::differences(&mut model, dir);
    drive::same(&differences, "A", &mut lines)
}

#[test]
fn the_model_answers_as_the_disk_does() {
    drive::prepare();
    let dirs = Dirs::new();
    Trials::new(600, 2_000, Duration::from_secs(60)).run(&ops::sequence(80), |ops| {
        let dir = dirs.make();
        let done = run(&dir, ops, None);
        std::fs::remove_dir_all(&dir).expect("our own directory");
        done
    });
}

#[test]
fn a_model_that_is_wrong_is_found_and_shrunk_to_a_short_script() {
    drive::prepare();
    let dirs = Dirs::new();
    for (mistake, most) in [(Mistake::RenameOntoItself, 3), (Mistake::GapOfOnes, 3)] {
        let trials = Trials::new(2_000, 4_000, Duration::from_secs(60));
        let (ops, script) = trials
            .find(&ops::sequence(80), |ops| run(&dirs.make(), ops, Some(mistake)))
            .expect("a mistake is found");
        eprintln!("{script}");
        // Making a file, giving it another name, renaming; or making, opening, writing behind the end.
        assert!(ops.len() <= most, "{mistake:?}: {ops:#?}");
        assert!(script.lines().count() < 60, "{script}");
        assert!(script.starts_with("#!/bin/sh\n"));
        // What is printed is what failed: without the mistake the same operations are right.
        run(&dirs.make(), &ops, None).unwrap();
    }
}

/// A sequence of one operation of each kind that the script has its own words for.
fn printed() -> Vec<Op> {
    let open = |slot, path: &str, access, create| Op::Open {
        slot,
        path: path.to_owned(),
        how: How {
            access,
            create,
            truncate: false,
            ..How::NEW
        },
    };
    let (a, b, c, d) = ("a".to_owned(), "b".to_owned(), "c".to_owned(), "d".to_owned());
    let rename = |from: &str, to: &str, how| Op::Rename {
        from: from.to_owned(),
        to: to.to_owned(),
        how,
    };
    vec![
        Op::Mkdir {
            path: d.clone(),
            mode: 0o777,
        },
        Op::Mkdir {
            path: "d/e".to_owned(),
            mode: 0o700,
        },
        Op::Put {
            path: a.clone(),
            len: 5_000,
            fill: 4_711,
        },
        Op::Link {
            from: a.clone(),
            to: "d/f".to_owned(),
        },
        Op::Symlink {
            target: "d/f".to_owned(),
            path: b.clone(),
        },
        Op::Chmod {
            path: a.clone(),
            mode: 0o640,
        },
        open(1, "c", Access::Both, true),
        Op::Write {
            slot: 1,
            at: 10,
            len: 300,
            fill: 99,
        },
        open(2, "a", Access::Read, false),
        Op::Copy {
            from: 2,
            from_at: 0,
            to: 1,
            to_at: 4_000,
            len: 100,
        },
        Op::Space {
            slot: 1,
            how: ops::Space::Punch,
            at: 20,
            len: 50,
        },
        Op::SetLen { slot: 1, len: 6_000 },
        Op::Truncate { path: b, len: 4_999 },
        Op::Close { slot: 1 },
        Op::Unlink { path: a.clone() },
        rename("c", "d/f", Renaming::NoReplace),
        rename("c", "d/f", Renaming::Exchange),
        rename("d/e", "e", Renaming::Replace),
        Op::Rmdir { path: "e".to_owned() },
        Op::SetXattr {
            path: c.clone(),
            name: "user.x",
            value: 12,
        },
        Op::Utime {
            path: c,
            seconds: 1_000_000_000,
            nofollow: false,
        },
        Op::Utime {
            path: d,
            seconds: 4_000_000_000,
            nofollow: false,
        },
    ]
}

#[test]
fn a_printed_script_does_what_the_operations_do() {
    drive::prepare();
    let dirs = Dirs::new();
    let line = |op| Line {
        who: "A",
        what: What::Op(op),
        note: "done".to_owned(),
    };
    let text = script::script(&printed().into_iter().map(line).collect::<Vec<_>>());
    let dir = dirs.make();
    let mut sh = Command::new("sh");
    sh.args(["-c", &text]).env("A", &dir).stdin(Stdio::null());
    let said = wait::run(&mut sh, Duration::from_secs(60));
    assert!(said.status.success(), "{said:?}\n{text}");
    let mut model = Fs::new();
    for (op, step) in printed().iter().zip(1..) {
        model.apply(op, step, 0);
    }
    let differences = compare::differences(&mut model, &dir);
    assert!(differences.is_empty(), "{differences:#?}\n{said:?}\n{text}");
}
