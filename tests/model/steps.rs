//! What happens to machines that share a volume: operations on each, and what befalls them.

use proptest::{prelude::*, sample::select};

use super::ops::{self, Op};

/// What is wrong with the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It cannot be reached.
    Away,
    /// It does not list, so nobody hears of others. Of an S3 server only.
    Deaf,
    /// It takes nothing. Of an S3 server only.
    Mute,
}

#[derive(Clone, Debug)]
pub enum Step {
    Do(usize, Op),
    /// The store works again, everything is told, and all machines see it.
    Agree,
    /// From here on machines do not hear of each other, until they agree.
    Trouble(Trouble),
    /// The daemon of a machine is killed and started again.
    Kill(usize),
    /// It is stopped and started again.
    Remount(usize),
}

/// A part of a story: one machine is at work, or in a trouble all of them are.
fn chapter(machines: usize, most: usize) -> impl Strategy<Value = Vec<Step>> {
    let trouble = select(vec![Trouble::Away, Trouble::Deaf, Trouble::Mute]);
    let apart = prop::option::weighted(0.6, trouble);
    let deed = (0..machines, ops::op()).prop_map(|(who, op)| Step::Do(who, op));
    let event = (0..machines).prop_map(Step::Kill);
    let steps = prop::collection::vec(prop_oneof![40 => deed, 1 => event], 1..most);
    (apart, 0..machines, steps, prop::bool::weighted(0.1)).prop_map(|(apart, one, mut steps, remount)| {
        if let Some(trouble) = apart {
            steps.insert(0, Step::Trouble(trouble));
        } else {
            for step in &mut steps {
                if let Step::Do(who, _) = step {
                    *who = one;
                }
            }
            if remount {
                steps.push(Step::Remount(one));
            }
        }
        steps.push(Step::Agree);
        steps
    })
}

/// What is there before anything happens: without it most operations find nothing to be done to.
fn prologue(machines: usize) -> impl Strategy<Value = Vec<Step>> {
    let make = |who: usize, op: Op| Step::Do(who, op);
    let made = prop::collection::vec(ops::making(), 0..12);
    (0..machines, made).prop_map(move |(who, made)| {
        let made = made.into_iter().map(|op| make(who, op));
        made.chain([Step::Agree]).collect()
    })
}

/// A whole story.
pub fn story(machines: usize) -> impl Strategy<Value = Vec<Step>> {
    let chapters = prop::collection::vec(chapter(machines, 40), 1..5);
    (prologue(machines), chapters)
        .prop_map(|(prologue, chapters)| [vec![prologue], chapters].concat().concat())
}
