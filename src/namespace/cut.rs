//! Decides which pending changes may go into the next segment.
//!
//! This file decides; `publish` acts. Nothing here touches the tree, the bucket
//! or the clock, so every rule can be tested with a literal.
//!
//! # Laws
//!
//! 1. *Only what is durable is named.* A change goes out when it is
//!    [`RowState::Ready`]: every blob that it names is in the bucket.
//! 2. *In the order of its machine.* Changes go out in the order of their
//!    places. One that waits (closed, not durable yet) stops everything behind
//!    it. One that is being written takes its place when it is closed, and one
//!    that never goes out has none: both are left out, and stop nothing.
//! 3. *Nothing overtakes a change that was made again.* A name that changed
//!    again before it was published moved to a later place (`seq`), and its
//!    older change at `first_seq` is no more: whatever was made behind
//!    `first_seq` may build on it, and goes out with it or after it. (A file,
//!    then the action-cache entry that names it, then the file is touched.) A change
//!    that another machine's newer one replaced is not pending any more, and holds nothing.
//! 4. *But not for ever.* A name holds others back by law 3 for at most
//!    [`ORDER_HOLD`] since its change at `first_seq` was first seen to be
//!    pending: a file that is rewritten all the time does not stop publication.
//! 5. *Progress.* What the laws allow goes out, up to the limits of a segment. A
//!    segment is larger than its aim only when laws 2 and 3 allow no smaller one.
//!
//! A look at the pending changes can be cut off ([`Look::complete`]). A name
//! behind the cut may then hold back any row that was seen; because its change at
//! `first_seq` is older than whatever it holds back, rows that are themselves
//! older than [`ORDER_HOLD`] are free, and only those go out.
//!
//! # A file that is open again
//!
//! A file that was closed, waits to be published and is opened for writing again keeps its
//! place until it is closed; it holds others back like any name that changed again.

use std::time::Duration;

use crate::store::rows::Place;

/// How long a name that keeps changing may hold back what was made after it.
pub const ORDER_HOLD: Duration = Duration::from_secs(10);

/// A pending change, as far as the cut is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub place: Place,
    pub state: RowState,
    /// How long the change at `place.first_seq` has been seen pending.
    pub held: Duration,
    /// How long the change at `place.seq` has been seen pending.
    pub age: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowState {
    /// Open for writing, and never closed so far.
    Writing,
    /// Closed before, and open for writing again.
    Rewriting,
    Waiting,
    Never,
    Ready {
        /// What it takes in a segment, at most.
        bytes: u64,
    },
}

/// The pending changes of this machine in the order of `place.seq`.
#[derive(Clone, Copy, Debug)]
pub struct Look<'a> {
    pub rows: &'a [Row],
    /// There are no more behind the last row.
    pub complete: bool,
}

/// How large a segment should be, and may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub aim_changes: usize,
    pub aim_bytes: u64,
    pub max_changes: usize,
    pub max_bytes: u64,
}

/// Returns the indexes of the rows that make the next segment, in their order;
/// none when nothing may go out now.
///
/// Runs in `O(n)` on the number of rows.
#[must_use]
pub fn cut(look: Look<'_>, limits: &Limits) -> Vec<usize> {
    // Law 2, and what may be overtaken by rows that this look does not show.
    let free = look
        .rows
        .iter()
        .take_while(|row| row.state != RowState::Waiting && (look.complete || row.age >= ORDER_HOLD))
        .count();
    let mut chosen = Vec::new();
    let (mut bytes, mut aim) = (0, 0);
    for (index, row) in look.rows[..free].iter().enumerate() {
        let RowState::Ready { bytes: more } = row.state else {
            continue;
        };
        bytes += more;
        if chosen.len() == limits.max_changes || (bytes > limits.max_bytes && !chosen.is_empty()) {
            break;
        }
        chosen.push(index);
        if chosen.len() <= limits.aim_changes && bytes <= limits.aim_bytes {
            aim = chosen.len();
        }
    }
    chosen.truncate(lawful_len(look.rows, &chosen, aim.max(1)));
    chosen
}

/// Returns the greatest lawful length up to `aim`, else the smallest above it, else 0 (law 3).
fn lawful_len(rows: &[Row], chosen: &[usize], aim: usize) -> usize {
    // The least place that a row outside the segment holds on to.
    let mut barrier = u64::MAX;
    let mut taken = vec![false; rows.len()];
    for &index in chosen {
        taken[index] = true;
    }
    for (row, _) in rows.iter().zip(&taken).filter(|(_, taken)| !**taken) {
        barrier = barrier.min(holds(row));
    }
    let mut above = 0;
    for len in (1..=chosen.len()).rev() {
        let last = &rows[chosen[len - 1]];
        if last.place.seq < barrier {
            if len <= aim {
                return len;
            }
            above = len;
        }
        barrier = barrier.min(holds(last));
    }
    above
}

/// The place behind which nothing goes out before `row` does.
fn holds(row: &Row) -> u64 {
    let changed_again = row.place.first_seq < row.place.seq || row.state == RowState::Rewriting;
    if changed_again && row.state != RowState::Never && row.held < ORDER_HOLD {
        row.place.first_seq
    } else {
        u64::MAX
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits {
        aim_changes: 100,
        aim_bytes: 1000,
        max_changes: 200,
        max_bytes: 2000,
    };
    const READY: RowState = RowState::Ready { bytes: 1 };

    fn row(first_seq: u64, seq: u64, state: RowState) -> Row {
        Row {
            place: Place { seq, first_seq },
            state,
            held: Duration::ZERO,
            age: Duration::ZERO,
        }
    }

    fn cut_all(rows: &[Row]) -> Vec<usize> {
        cut(Look { rows, complete: true }, &LIMITS)
    }

    #[test]
    fn what_waits_stops_what_is_behind_it() {
        let rows = [row(1, 1, READY), row(2, 2, RowState::Waiting), row(3, 3, READY)];
        assert_eq!(cut_all(&rows), [0]);
    }

    #[test]
    fn what_is_being_written_or_never_goes_out_stops_nothing() {
        let rows = [
            row(1, 1, RowState::Writing),
            row(2, 2, RowState::Never),
            row(3, 3, READY),
        ];
        assert_eq!(cut_all(&rows), [2]);
    }

    #[test]
    fn an_entry_does_not_overtake_the_file_that_was_touched_after_it() {
        // The file (place 1) was touched (place 3) and its bytes are not in the bucket.
        let rows = [row(2, 2, READY), row(1, 3, RowState::Waiting)];
        assert_eq!(cut_all(&rows), [0; 0]);
        let durable = [row(2, 2, READY), row(1, 3, READY)];
        assert_eq!(cut_all(&durable), [0, 1]);
        // Also when it is open again, before it was touched or after.
        for open in [row(1, 1, RowState::Rewriting), row(1, 3, RowState::Rewriting)] {
            let mut rows = [open, row(2, 2, READY), row(4, 4, READY)];
            rows.sort_by_key(|row| row.place.seq);
            assert_eq!(cut_all(&rows), [0; 0]);
        }
    }

    #[test]
    fn a_file_that_is_rewritten_all_the_time_stops_publication_for_a_while_only() {
        let mut rows = [row(2, 2, READY), row(1, 3, RowState::Waiting)];
        rows[1].held = ORDER_HOLD;
        assert_eq!(cut_all(&rows), [0]);
    }

    #[test]
    fn a_segment_grows_over_its_aim_rather_than_cut_a_name_in_two() {
        let rows = [
            row(2, 2, READY),
            row(3, 3, READY),
            row(1, 4, READY),
            row(5, 5, READY),
        ];
        let limits = Limits {
            aim_changes: 2,
            ..LIMITS
        };
        assert_eq!(
            cut(
                Look {
                    rows: &rows,
                    complete: true
                },
                &limits
            ),
            [0, 1, 2]
        );
        let limits = Limits {
            aim_changes: 2,
            max_changes: 2,
            ..LIMITS
        };
        assert_eq!(
            cut(
                Look {
                    rows: &rows,
                    complete: true
                },
                &limits
            ),
            [0; 0]
        );
    }

    #[test]
    fn of_a_look_that_was_cut_off_only_old_rows_go_out() {
        let mut rows = [row(1, 1, READY), row(2, 2, READY)];
        rows[0].age = ORDER_HOLD;
        assert_eq!(
            cut(
                Look {
                    rows: &rows,
                    complete: false
                },
                &LIMITS
            ),
            [0]
        );
    }

    fn any_rows() -> impl Strategy<Value = Vec<Row>> {
        let state = prop_oneof![
            6 => (1u64..400).prop_map(|bytes| RowState::Ready { bytes }),
            1 => Just(RowState::Writing),
            1 => Just(RowState::Rewriting),
            1 => Just(RowState::Never),
            1 => Just(RowState::Waiting),
        ];
        prop::collection::vec((state, 0u64..12, prop::bool::weighted(0.3), 0u64..15), 0..30).prop_map(
            |rows| {
                let mut seqs = 0u64;
                let row = |(state, back, again, secs): (RowState, u64, bool, u64)| {
                    seqs += 10;
                    // Places are unique: odd ones are the first places of rows that changed again.
                    let first_seq = if again {
                        (seqs + 1).saturating_sub(back * 10 + 10).max(1)
                    } else {
                        seqs
                    };
                    Row {
                        place: Place {
                            seq: seqs,
                            first_seq: first_seq.min(seqs),
                        },
                        state,
                        held: Duration::from_secs(secs),
                        age: Duration::from_secs(secs / 2),
                    }
                };
                rows.into_iter().map(row).collect()
            },
        )
    }

    /// Whether a set of rows breaks a law, told the long way.
    fn breaks_a_law(look: Look<'_>, chosen: &[usize]) -> Option<&'static str> {
        let rows = look.rows;
        for &index in chosen {
            if !matches!(rows[index].state, RowState::Ready { .. }) {
                return Some("law 1");
            }
            for (other, row) in rows
                .iter()
                .enumerate()
                .filter(|(other, _)| !chosen.contains(other))
            {
                if other < index && matches!(row.state, RowState::Waiting | RowState::Ready { .. }) {
                    return Some("law 2");
                }
                let again = row.place.first_seq < row.place.seq || row.state == RowState::Rewriting;
                if again
                    && row.state != RowState::Never
                    && row.held < ORDER_HOLD
                    && rows[index].place.seq > row.place.first_seq
                {
                    return Some("law 3");
                }
            }
            if !look.complete && rows[index].age < ORDER_HOLD {
                return Some("an unseen row may be overtaken");
            }
        }
        None
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn every_cut_keeps_the_laws_and_makes_progress(
            rows in any_rows(),
            complete in prop::bool::weighted(0.8),
            aim_changes in 1usize..12,
            aim_bytes in 1u64..2000,
        ) {
            let look = Look { rows: &rows, complete };
            let limits = Limits { aim_changes, aim_bytes, max_changes: 20, max_bytes: 4000 };
            let chosen = cut(look, &limits);
            prop_assert_eq!(breaks_a_law(look, &chosen), None);
            // Law 5: of all prefixes that keep the laws and the limits, none within
            // the aim is longer, and if there is none, none above is shorter.
            let ready: Vec<usize> =
                (0..rows.len()).filter(|&index| matches!(rows[index].state, RowState::Ready { .. })).collect();
            let size = |len: usize| -> u64 {
                ready[..len].iter().map(|&index| match rows[index].state { RowState::Ready { bytes } => bytes, _ => 0 }).sum()
            };
            let lawful = |len: &usize| {
                *len <= limits.max_changes
                    && size(*len) <= limits.max_bytes
                    && breaks_a_law(look, &ready[..*len]).is_none()
            };
            let within = |len: &usize| *len == 1 || (*len <= aim_changes && size(*len) <= aim_bytes);
            let best = (1..=ready.len()).filter(lawful).filter(within).max();
            let best = best.or_else(|| (1..=ready.len()).find(lawful)).unwrap_or(0);
            prop_assert_eq!(chosen.len(), best);
            prop_assert_eq!(&chosen[..], &ready[..best]);
        }

        #[test]
        fn nothing_is_held_for_ever(rows in any_rows()) {
            let rows: Vec<Row> = rows.into_iter().map(|row| Row { held: ORDER_HOLD, age: ORDER_HOLD, ..row }).collect();
            let first = rows.iter().position(|row| matches!(row.state, RowState::Ready { .. } | RowState::Waiting));
            let expected = first.filter(|&index| rows[index].state != RowState::Waiting);
            let chosen = cut(Look { rows: &rows, complete: false }, &LIMITS);
            prop_assert_eq!(chosen.first().copied(), expected);
        }
    }
}
