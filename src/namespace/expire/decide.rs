//! Decides which names expire. Nothing here touches the bucket or the clock.
//!
//! # Invariants
//!
//! - What is decided of a name depends on its own register, on what was told of its path, and on the rule: not on
//!   other names, nor on the order in which anything came.
//! - A name that was written within the time never goes, whatever was told or not told.
//! - What was told only ever keeps a name.
//! - The deletion counts for less than every write but the one that was judged ([`Stamp::expired`]).

use super::super::{sweep::marks::Marks, touch::format};
use crate::base::clock::{HOUR_MILLIS, Stamp};

/// What a volume says of a path where something is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Register {
    pub path: Vec<u8>,
    pub stamp: Stamp,
    /// Something may be alive below it.
    pub holds: bool,
    pub is_dir: bool,
    /// Of a file.
    pub bytes: u64,
}

/// When a name is unused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    pub now_millis: u64,
    /// What was neither written nor used after this is unused.
    pub from_millis: u64,
}

/// What becomes of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was written within the time.
    Young,
    Used,
    /// A directory with something in it.
    Holds,
    /// It goes, by a deletion with this stamp.
    Expires(Stamp),
}

/// Decides of one name; `used` are the marks of what was used after [`Rule::from_millis`].
pub fn fate(register: &Register, used: &Marks, rule: Rule) -> Fate {
    if register.stamp.millis > rule.from_millis {
        return Fate::Young;
    }
    if register.is_dir && register.holds {
        return Fate::Holds;
    }
    if used.has(format::mark(&register.path)) {
        return Fate::Used;
    }
    let hours = u32::try_from(rule.now_millis / HOUR_MILLIS).unwrap_or(u32::MAX);
    // One without a follower is of a clock that nobody can have had.
    register.stamp.expired(hours).map_or(Fate::Young, Fate::Expires)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::base::id::MachineId;

    const RULE: Rule = Rule {
        now_millis: 1_767_225_600_000,
        from_millis: 1_767_000_000_000,
    };

    fn stamp(millis: u64, counter: u32, machine: u64) -> Stamp {
        Stamp {
            millis,
            counter,
            machine: MachineId(machine),
        }
    }

    fn file(stamp: Stamp) -> Register {
        Register {
            path: b"ac/00/x".to_vec(),
            stamp,
            holds: false,
            is_dir: false,
            bytes: 1,
        }
    }

    fn used(paths: &[&[u8]]) -> Marks {
        let mut marks = Marks::default();
        for path in paths {
            marks.add(format::mark(path));
        }
        marks.sort();
        marks
    }

    #[test]
    fn what_was_neither_written_nor_used_goes() {
        let old = file(stamp(RULE.from_millis, 3, 9));
        let Fate::Expires(deleted) = fate(&old, &used(&[b"ac/00/y"]), RULE) else {
            panic!("it stays");
        };
        assert!(deleted > old.stamp && deleted.is_expired());
        assert_eq!(deleted.made_millis(), RULE.now_millis);
        assert_eq!(fate(&old, &used(&[b"ac/00/x"]), RULE), Fate::Used);
        let young = file(stamp(RULE.from_millis + 1, 0, 9));
        assert_eq!(fate(&young, &used(&[]), RULE), Fate::Young);
    }

    #[test]
    fn a_directory_goes_when_nothing_is_in_it() {
        let dir = |holds| Register {
            is_dir: true,
            holds,
            ..file(stamp(1, 0, 9))
        };
        assert_eq!(fate(&dir(true), &used(&[]), RULE), Fate::Holds);
        assert!(matches!(fate(&dir(false), &used(&[]), RULE), Fate::Expires(_)));
        // A file that lives on below is none of the directory's business.
        let hidden = Register {
            holds: true,
            ..file(stamp(1, 0, 9))
        };
        assert!(matches!(fate(&hidden, &used(&[]), RULE), Fate::Expires(_)));
    }

    #[test]
    fn what_expired_before_does_not_expire_again() {
        let expired = stamp(5, 1, 7).expired(400_000).unwrap();
        assert_eq!(fate(&file(expired), &used(&[]), RULE), Fate::Young);
    }

    fn any_stamp() -> impl Strategy<Value = Stamp> {
        let millis = RULE.from_millis - 3..RULE.from_millis + 3;
        (millis, 0_u32..3, 1_u64..4).prop_map(|(millis, counter, machine)| stamp(millis, counter, machine))
    }

    proptest! {
        /// Whatever else was written: the deletion wins over what was judged and over what that had won over, and loses
        /// to everything later, in any order of arrival.
        #[test]
        fn the_deletion_takes_the_version_that_was_judged_and_no_later_one(
            judged in any_stamp(),
            others in prop::collection::vec(any_stamp(), 0..6),
        ) {
            let Fate::Expires(deleted) = fate(&file(judged), &used(&[]), RULE) else {
                prop_assert!(judged.millis > RULE.from_millis);
                return Ok(());
            };
            for other in others {
                if other <= judged {
                    prop_assert!(other < deleted);
                } else if other.millis > judged.millis {
                    prop_assert!(other > deleted);
                }
            }
            let later = rule_in(1);
            let Fate::Expires(again) = fate(&file(judged), &used(&[]), later) else {
                panic!("it goes later as well");
            };
            prop_assert!(again > deleted && again.millis == judged.millis);
        }

        /// More uses and a longer time keep more, never less.
        #[test]
        fn uses_and_time_only_keep(
            judged in any_stamp(),
            names in prop::collection::vec(0_u8..4, 0..4),
            earlier in 0_u64..5,
        ) {
            let path = |name: u8| vec![b'a' + name];
            let register = Register { path: path(0), ..file(judged) };
            let told: Vec<Vec<u8>> = names.iter().copied().map(path).collect();
            let told: Vec<&[u8]> = told.iter().map(Vec::as_slice).collect();
            let goes = |fate: Fate| matches!(fate, Fate::Expires(_));
            let with = fate(&register, &used(&told), RULE);
            prop_assert!(!goes(with) || goes(fate(&register, &used(&[]), RULE)));
            prop_assert!(!goes(with) || !names.contains(&0));
            let longer = Rule { from_millis: RULE.from_millis - earlier, ..RULE };
            prop_assert!(!goes(fate(&register, &used(&told), longer)) || goes(with));
        }
    }

    fn rule_in(hours: u64) -> Rule {
        Rule {
            now_millis: RULE.now_millis + hours * HOUR_MILLIS,
            from_millis: RULE.from_millis + hours * HOUR_MILLIS,
        }
    }
}
