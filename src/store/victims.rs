//! Chooses which blobs leave the cache when it is over budget.
//!
//! This file decides; `reclaim` acts. Nothing here touches the disk, the index
//! or the clock, so every rule can be tested with a literal.
//!
//! # Invariants
//!
//! - A *dirty* blob is never chosen: this machine holds its only copy.
//! - A *quarantined* blob is never chosen: it is kept for inspection.
//! - A *pinned* blob is never chosen: a user relies on it.
//! - A blob *in use* is never chosen: an open handle relies on it.
//! - The result depends only on the arguments, in any order they come.

use super::rows::{BlobRow, Durability};
use crate::base::digest::Digest;

/// A blob that might leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub digest: Digest,
    /// Bytes that leave the disk with it.
    pub resident_bytes: u64,
    /// Seconds since 1970; the least recent goes first.
    pub used_secs: u64,
    pub durable: bool,
    pub pinned: bool,
    pub in_use: bool,
}

impl Candidate {
    #[must_use]
    pub fn new(row: &BlobRow, resident_bytes: u64, in_use: bool) -> Self {
        Self {
            digest: row.digest,
            resident_bytes,
            used_secs: row.used_secs,
            durable: match row.durability {
                Durability::Durable { .. } => true,
                Durability::Dirty | Durability::Quarantined => false,
            },
            pinned: row.pinned,
            in_use,
        }
    }

    fn may_leave(&self) -> bool {
        self.durable && !self.pinned && !self.in_use && self.resident_bytes > 0
    }
}

/// Returns blobs to evict, in order, so that at least `want_bytes` come free.
///
/// Least recent use goes first; of blobs used in the same second the larger, which spares more others.
/// Returns fewer when everything left must stay; the caller compares the sum.
/// Runs in `O(n log n)` on the number of candidates and performs no I/O.
#[must_use]
pub fn choose_victims(mut candidates: Vec<Candidate>, want_bytes: u64) -> Vec<Candidate> {
    candidates.retain(Candidate::may_leave);
    candidates.sort_unstable_by(|a, b| {
        a.used_secs
            .cmp(&b.used_secs)
            .then(b.resident_bytes.cmp(&a.resident_bytes))
            .then(a.digest.cmp(&b.digest))
    });
    let mut chosen_bytes = 0u64;
    let enough = candidates.iter().position(|candidate| {
        let done = chosen_bytes >= want_bytes;
        chosen_bytes = chosen_bytes.saturating_add(candidate.resident_bytes);
        done
    });
    candidates.truncate(enough.unwrap_or(candidates.len()));
    candidates
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidate(name: u8, resident_bytes: u64, used_secs: u64) -> Candidate {
        Candidate {
            digest: Digest::from_bytes([name; 32]),
            resident_bytes,
            used_secs,
            durable: true,
            pinned: false,
            in_use: false,
        }
    }

    fn names(chosen: &[Candidate]) -> Vec<u8> {
        chosen.iter().map(|victim| victim.digest.as_bytes()[0]).collect()
    }

    #[test]
    fn the_least_recently_used_go_first_and_no_more_than_needed() {
        let all = vec![
            candidate(1, 10, 300),
            candidate(2, 10, 100),
            candidate(3, 10, 200),
        ];
        assert_eq!(names(&choose_victims(all.clone(), 11)), [2, 3]);
        assert_eq!(names(&choose_victims(all.clone(), 10)), [2]);
        assert!(choose_victims(all.clone(), 0).is_empty());
        assert_eq!(names(&choose_victims(all, 1000)), [2, 3, 1]);
    }

    #[test]
    fn dirty_pinned_and_open_blobs_are_never_chosen() {
        let dirty = Candidate {
            durable: false,
            ..candidate(1, 10, 0)
        };
        let pinned = Candidate {
            pinned: true,
            ..candidate(2, 10, 0)
        };
        let open = Candidate {
            in_use: true,
            ..candidate(3, 10, 0)
        };
        assert!(choose_victims(vec![dirty, pinned, open], 1).is_empty());
    }

    fn any_candidate() -> impl Strategy<Value = Candidate> {
        (any::<u8>(), 0u64..50, 0u64..5, any::<[bool; 3]>()).prop_map(
            |(name, bytes, used, [durable, pinned, in_use])| Candidate {
                durable,
                pinned,
                in_use,
                ..candidate(name, bytes, used)
            },
        )
    }

    proptest! {
        #[test]
        fn the_order_of_the_candidates_does_not_matter(
            candidates in prop::collection::vec(any_candidate(), 0..30),
            want in 0u64..400,
        ) {
            let mut reversed = candidates.clone();
            reversed.reverse();
            let chosen = choose_victims(candidates.clone(), want);
            prop_assert_eq!(&chosen, &choose_victims(reversed, want));
            let sum: u64 = chosen.iter().map(|victim| victim.resident_bytes).sum();
            let all: u64 = candidates.iter().filter(|c| c.may_leave()).map(|c| c.resident_bytes).sum();
            prop_assert!(sum >= want.min(all));
            if let Some((last, others)) = chosen.split_last() {
                let others: u64 = others.iter().map(|victim| victim.resident_bytes).sum();
                prop_assert!(others < want, "{} was not needed", last.digest);
            }
        }
    }
}
