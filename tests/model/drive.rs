//! Draws sequences, does them in the model and for real, and shrinks those that differ.

use std::{
    cell::RefCell,
    fmt::Debug,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use proptest::{
    strategy::Strategy,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner},
};

use super::{
    answer::{Answer, Expected, Nanos},
    fs::{Fs, UMASK},
    ops::Op,
    real::Real,
    script::{self, Line, What},
    support::rng::Rng,
};

/// Sets what the model takes for granted: the umask.
pub fn prepare() {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(UMASK));
}

pub fn now() -> Nanos {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("the clock is after 1970");
    since.as_nanos() as Nanos
}

/// Does one operation on both sides; the script so far is the error when they answer differently.
pub fn one(
    who: &'static str,
    op: &Op,
    step: u64,
    model: &mut Fs,
    real: &mut Real,
    lines: &mut Vec<Line>,
) -> Result<(), String> {
    let expected = model.apply(op, step, now());
    let answer = real.apply(op);
    let admitted = expected.admits(&answer);
    let note = if admitted {
        format!("{answer:?}")
    } else {
        format!("expected {expected:?}, but it said {answer:?}")
    };
    if answer != Answer::Skipped || !admitted {
        lines.push(Line {
            who,
            what: What::Op(op.clone()),
            note,
        });
    }
    if !admitted {
        return Err(script::script(lines));
    }
    if let Expected::Meta(_) = expected {
        model.learn(op, &answer);
    }
    Ok(())
}

/// Ends a script with how a tree differs, if it does.
pub fn same(differences: &[String], who: &'static str, lines: &mut Vec<Line>) -> Result<(), String> {
    if differences.is_empty() {
        return Ok(());
    }
    for difference in differences {
        lines.push(Line {
            who,
            what: What::Event(":".to_owned()),
            note: format!("in the end, {who}: {difference}"),
        });
    }
    Err(script::script(lines))
}

/// How many sequences are tried, and how hard a failure is shrunk.
#[derive(Clone, Debug)]
pub struct Trials {
    cases: u64,
    config: Config,
}

impl Trials {
    pub fn new(cases: u64, shrink_steps: u32, shrink_time: Duration) -> Self {
        let wanted = std::env::var("CASMOUNT_MODEL_CASES").ok();
        let cases = wanted.map_or(cases, |text| {
            text.parse().expect("CASMOUNT_MODEL_CASES is a number")
        });
        let config = Config {
            cases: 1,
            failure_persistence: None,
            max_shrink_iters: shrink_steps,
            max_shrink_time: shrink_time.as_millis() as u32,
            ..Config::default()
        };
        Self { cases, config }
    }

    /// Fails with the shortest script that was found when a sequence does not do what it shall.
    #[track_caller]
    pub fn run<T: Clone + Debug>(
        &self,
        sequences: &impl Strategy<Value = Vec<T>>,
        act: impl FnMut(&[T]) -> Result<(), String>,
    ) {
        if let Some((_, script)) = self.find(sequences, act) {
            panic!("{script}");
        }
    }

    /// The shortest sequence that was found not to do what it shall, and the script of it.
    pub fn find<T: Clone + Debug>(
        &self,
        sequences: &impl Strategy<Value = Vec<T>>,
        act: impl FnMut(&[T]) -> Result<(), String>,
    ) -> Option<(Vec<T>, String)> {
        let mut seeds = Rng::from_environment();
        let act = RefCell::new(act);
        let first = std::env::var("CASMOUNT_TEST_SEED")
            .ok()
            .and_then(|text| text.parse().ok());
        for case in 0..self.cases {
            // The first seed is that which was given: a failure names its own.
            let seed = first.filter(|_| case == 0).unwrap_or_else(|| seeds.next());
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&seed.to_le_bytes());
            let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
            let mut runner = TestRunner::new_with_rng(self.config.clone(), rng);
            let shortest = RefCell::new(String::new());
            let result = runner.run(sequences, |sequence| {
                (act.borrow_mut())(&sequence).map_err(|script| {
                    if shortest.borrow().is_empty() {
                        eprintln!("fails: CASMOUNT_MODEL_CASES=1 CASMOUNT_TEST_SEED={seed}\n{script}");
                    }
                    shortest.replace(script);
                    TestCaseError::fail("see the script")
                })
            });
            match result {
                Ok(()) => {}
                Err(TestError::Fail(_, sequence)) => {
                    let mut act = act.borrow_mut();
                    return Some(self.shorten(sequence, shortest.into_inner(), &mut *act));
                }
                Err(TestError::Abort(why)) => panic!("{why}"),
            }
        }
        None
    }
    /// Leaves out what a failure does not need, large parts first.
    fn shorten<T: Clone>(
        &self,
        mut sequence: Vec<T>,
        mut script: String,
        act: &mut impl FnMut(&[T]) -> Result<(), String>,
    ) -> (Vec<T>, String) {
        let began = Instant::now();
        let mut size = sequence.len().div_ceil(2);
        while size > 0 {
            let mut end = sequence.len();
            let mut shorter = false;
            while end > 0 && began.elapsed().as_millis() < u128::from(self.config.max_shrink_time) {
                let start = end.saturating_sub(size);
                let mut without = sequence.clone();
                without.drain(start..end);
                if let Err(found) = act(&without) {
                    (sequence, script, shorter) = (without, found, true);
                }
                end = start;
            }
            if size > 1 || !shorter {
                size /= 2;
            }
        }
        (sequence, script)
    }
}
