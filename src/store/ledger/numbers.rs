//! Numbers that are never given out twice, without a write for each.
//!
//! The ledger keeps *ceilings* on the disk: numbers below them may have been given out. They are raised
//! by a block, as part of a commit that happens anyway, when half of the last block is used up.
//! A start goes on at the ceiling. A number at or above it can only have been given out if half a block
//! of numbers was drawn without one commit, so that none of them is in any row.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::store::record::Ceilings;

const BLOCK: u64 = 1 << 16;

/// 1 is the root directory.
const FIRST_INO: u64 = 2;
const FIRST_PLACE: u64 = 1;

#[derive(Debug)]
pub struct Numbers {
    next_ino: AtomicU64,
    next_place: AtomicU64,
    ceiling_ino: AtomicU64,
    ceiling_place: AtomicU64,
}

impl Numbers {
    /// Goes on where the last process cannot have been.
    pub fn new(ceilings: Ceilings) -> Self {
        Self {
            next_ino: AtomicU64::new(ceilings.ino.max(FIRST_INO)),
            next_place: AtomicU64::new(ceilings.place.max(FIRST_PLACE)),
            ceiling_ino: AtomicU64::new(ceilings.ino),
            ceiling_place: AtomicU64::new(ceilings.place),
        }
    }

    pub fn next_ino(&self) -> u64 {
        self.next_ino.fetch_add(1, Relaxed)
    }

    pub fn next_place(&self) -> u64 {
        self.next_place.fetch_add(1, Relaxed)
    }

    /// The ceilings that the next commit has to carry, if they are due.
    pub fn due(&self) -> Option<Ceilings> {
        let (ino, place) = (self.next_ino.load(Relaxed), self.next_place.load(Relaxed));
        let low = ino + BLOCK / 2 > self.ceiling_ino.load(Relaxed)
            || place + BLOCK / 2 > self.ceiling_place.load(Relaxed);
        low.then_some(Ceilings {
            ino: ino + BLOCK,
            place: place + BLOCK,
        })
    }

    /// Notes ceilings that were committed.
    pub fn raised(&self, ceilings: Ceilings) {
        self.ceiling_ino.store(ceilings.ino, Relaxed);
        self.ceiling_place.store(ceilings.place, Relaxed);
    }

    /// What a clean stop leaves, so that the next start wastes no block.
    pub fn exact(&self) -> Ceilings {
        Ceilings {
            ino: self.next_ino.load(Relaxed),
            place: self.next_place.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_a_commit_may_hold_is_below_the_committed_ceiling() {
        let numbers = Numbers::new(Ceilings::default());
        let mut committed = Ceilings::default();
        let mut raised = 0;
        for _ in 0..3 * BLOCK {
            let (ino, place) = (numbers.next_ino(), numbers.next_place());
            if let Some(ceilings) = numbers.due() {
                committed = ceilings;
                numbers.raised(ceilings);
                raised += 1;
            }
            assert!(ino < committed.ino && place < committed.place);
        }
        assert!((4..=7).contains(&raised), "{raised} commits carried ceilings");
        let after_crash = Numbers::new(committed);
        assert!(after_crash.next_ino() > 3 * BLOCK);
    }

    #[test]
    fn the_root_is_never_given_out() {
        let numbers = Numbers::new(Ceilings::default());
        assert_eq!((numbers.next_ino(), numbers.next_place()), (2, 1));
    }
}
