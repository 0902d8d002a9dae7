//! The model against mounts of casmount: one machine, and two that share a volume.

use std::time::Duration;

use super::{drive::Trials, fleet::Fleet, lab::StoreKind, steps};

on_both_stores!(one_machine_answers_as_the_model, two_machines_agree_as_the_model);

/// How hard a failure is shrunk. A story takes seconds: proptest's way, one operation after the other,
/// is gone for a few steps only, before parts are left out by halves.
const SHRINK_STEPS: u32 = 4;
const SHRINK: Duration = Duration::from_secs(90);

fn one_machine_answers_as_the_model(kind: StoreKind) {
    // Both ways in which bytes reach a program.
    let args: &[&str] = match kind {
        StoreKind::File => &["--no-passthrough"],
        StoreKind::S3 => &[],
    };
    let mut fleet = Fleet::new(kind, 1, args);
    Trials::new(12, SHRINK_STEPS, SHRINK).run(&steps::story(1), |steps| fleet.live(steps));
    fleet.assert_told_much();
}

fn two_machines_agree_as_the_model(kind: StoreKind) {
    let mut fleet = Fleet::new(kind, 2, &[]);
    Trials::new(6, SHRINK_STEPS, SHRINK).run(&steps::story(2), |steps| fleet.live(steps));
    fleet.assert_told_much();
}
