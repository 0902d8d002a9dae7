//! What a follower has seen of a volume's log, and where it looks next.
//!
//! Keys of segments sort by the time at which their machine published them,
//! but a segment can appear behind that time: its upload took long, or a clock
//! was wrong by a little. So a listing looks back: a *short* one by
//! [`OVERLAP_MILLIS`] from the newest key seen, which is cheap and finds almost
//! everything; a *full* one by [`WINDOW_MILLIS`] from when the last full one
//! began, which finds everything.
//!
//! # Invariants
//!
//! - A segment that is acknowledged within [`WINDOW_MILLIS`] of the time in
//!   its key is seen: a full listing begins where a full listing that came to its
//!   end could have missed something, however long ago that was.
//! - A clock that was ahead when a full listing began, and is set right, hides nothing: a full listing then looks back from
//!   the newest key that was seen, or from now.
//! - A segment is known only after its changes were applied.
//! - What is known is forgotten only when no listing can reach it any more.
//!
//! # Size
//!
//! A machine numbers its segments one by one, so what is known of it is one
//! run of numbers, whatever their count: some 30 bytes a machine that published
//! within the window.
//!
//! # What is kept
//!
//! The cursor is kept in the ledger as a protobuf message ([`Kept`]); one that
//! cannot be read is as good as none, because applying is idempotent.

use std::collections::BTreeMap;

use prost::Message;

use crate::{base::id::MachineId, tier::layout};

/// How far a short listing looks back from the newest key.
pub const OVERLAP_MILLIS: u64 = 10_000;

/// How far a full listing looks back from the begin of the one before: more
/// than a segment may be late plus what two clocks may differ.
pub const WINDOW_MILLIS: u64 = 600_000;

/// The name of a segment; sorts as its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentKey {
    pub millis: u64,
    pub machine: MachineId,
    pub seq: u64,
}

impl SegmentKey {
    pub fn to_key(self, volume: &str) -> String {
        layout::segment(volume, self.millis, self.machine, self.seq)
    }

    /// Reads a key; `None` when it is not one that a machine would write.
    pub fn parse(volume: &str, key: &str) -> Option<Self> {
        let (_, name) = key.rsplit_once('/')?;
        let mut parts = name.split('-');
        let parsed = Self {
            millis: parts.next()?.parse().ok()?,
            machine: parts.next()?.parse().ok()?,
            seq: u64::from_str_radix(parts.next()?, 16).ok()?,
        };
        (parsed.to_key(volume) == key).then_some(parsed)
    }
}

/// Numbers of segments of one machine without a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u64,
    last: u64,
    /// Of the newest of them.
    millis: u64,
}

/// One listing of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The bucket's time when it began.
    pub began: u64,
    pub full: bool,
    /// An earlier poll began it.
    pub resumed: bool,
    /// Keys that sort behind this one are listed.
    pub after: String,
    /// The newest time in a key so far.
    newest: u64,
}

impl Listing {
    /// Lists again from `millis`, if it went past that.
    pub fn go_back(&mut self, volume: &str, millis: u64) {
        let before = before(volume, millis);
        if before < self.after {
            self.after = before;
        }
    }
}

/// What sorts just before every key of `millis`.
pub fn before(volume: &str, millis: u64) -> String {
    format!(
        "{}{}/{millis:013}",
        layout::log_prefix(volume),
        layout::minute(millis)
    )
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// When the last full listing that came to its end began; `None`: none did.
    full_began: Option<u64>,
    /// The newest time in a key that a listing which came to its end saw.
    newest: u64,
    /// The time of the oldest segment that only a newer version can read: after
    /// an upgrade the listing begins there.
    unread_from: Option<u64>,
    /// Begin and place of a full listing that has not come to its end.
    unfinished: Option<(u64, String)>,
    known: BTreeMap<MachineId, Vec<Run>>,
}

impl Cursor {
    /// A cursor that has seen everything that carries `watermark` or an earlier time, but for what
    /// was late.
    pub fn beginning_at(watermark: u64) -> Self {
        Self {
            full_began: Some(watermark),
            newest: watermark,
            ..Self::default()
        }
    }

    /// Everything that was published before this moment was seen; `None`: the log was never read to its end.
    pub fn reached_millis(&self) -> Option<u64> {
        self.full_began
    }

    /// Begins a listing of `volume`; a full one when asked for, and while none came to its end, or the last one
    /// began later than now: the clock was ahead then.
    pub fn begin(&self, volume: &str, now: u64, full: bool) -> Listing {
        let was_ahead = self.full_began.is_some_and(|began| began > now);
        let full = full || was_ahead || self.full_began.is_none();
        if full && let Some((began, after)) = &self.unfinished {
            return Listing {
                began: *began,
                full,
                resumed: true,
                after: after.clone(),
                newest: self.newest,
            };
        }
        let from = if was_ahead {
            self.newest.min(now).saturating_sub(WINDOW_MILLIS)
        } else if full {
            self.window_start()
        } else {
            // A key from the future must not make the listing skip the present, and
            // what was known before the window is forgotten.
            self.newest
                .min(now)
                .saturating_sub(OVERLAP_MILLIS)
                .max(self.window_start())
        };
        Listing {
            began: now,
            full,
            resumed: false,
            after: before(volume, from),
            newest: self.newest,
        }
    }

    /// What is older needs not be listed any more.
    pub fn window_start(&self) -> u64 {
        self.full_began.unwrap_or(0).saturating_sub(WINDOW_MILLIS)
    }

    /// Whether every segment is known that ever carried a time up to `until` in its key.
    pub fn is_settled(&self, until: u64) -> bool {
        self.window_start() > until
    }

    /// Notes that everything of `listing` up to `last` is known.
    pub fn advance(&mut self, listing: &mut Listing, last: &str, newest: Option<u64>) {
        last.clone_into(&mut listing.after);
        listing.newest = listing.newest.max(newest.unwrap_or(0));
        // Resuming pays for the first listing of a long log only; the others are short.
        if self.full_began.is_none() {
            self.unfinished = Some((listing.began, listing.after.clone()));
            self.newest = listing.newest;
        }
    }

    /// Notes that `listing` came to its end, `now`: replies have set right by then what was wrong with the clock when it
    /// began, whichever way.
    pub fn finish(&mut self, listing: &Listing, now: u64) {
        // Whoever has a clock that is ahead is not to hide what comes before it gets there.
        self.newest = self.newest.max(listing.newest).min(now);
        if !listing.full {
            return;
        }
        self.unfinished = None;
        // One that began when the clock was behind takes back nothing that was reached.
        let reached = self.full_began.filter(|reached| *reached <= now);
        self.full_began = Some(reached.unwrap_or(0).max(listing.began.min(now)));
        let start = self.window_start();
        self.known.retain(|_, runs| {
            runs.retain(|run| run.millis >= start);
            !runs.is_empty()
        });
    }

    /// Whether a segment was applied, or is older than every listing to come.
    pub fn knows(&self, key: SegmentKey) -> bool {
        self.known
            .get(&key.machine)
            .is_some_and(|runs| runs.iter().any(|run| (run.first..=run.last).contains(&key.seq)))
    }

    /// Notes that a segment was applied.
    pub fn note(&mut self, key: SegmentKey) {
        if self.knows(key) {
            return;
        }
        let runs = self.known.entry(key.machine).or_default();
        let at = runs.partition_point(|run| run.first < key.seq);
        runs.insert(
            at,
            Run {
                first: key.seq,
                last: key.seq,
                millis: key.millis,
            },
        );
        runs.dedup_by(|next, run| {
            let joins = run.last.checked_add(1) == Some(next.first);
            if joins {
                run.last = next.last;
                run.millis = run.millis.max(next.millis);
            }
            joins
        });
    }

    /// Notes a segment that only a newer version can read.
    pub fn note_unread(&mut self, key: SegmentKey) {
        self.unread_from = Some(self.unread_from.map_or(key.millis, |from| from.min(key.millis)));
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let run = |machine: &MachineId, run: &Run| KeptRun {
            machine: machine.0,
            first: run.first,
            more: run.last - run.first,
            millis: run.millis,
        };
        let (unfinished_began, unfinished_after) = self.unfinished.clone().unzip();
        Kept {
            full_began: self.full_began,
            newest: self.newest,
            unread_from: self.unread_from,
            unfinished_began,
            unfinished_after,
            runs: self
                .known
                .iter()
                .flat_map(|(machine, runs)| runs.iter().map(move |of| run(machine, of)))
                .collect(),
        }
        .encode_to_vec()
    }

    /// Reads what [`Self::to_bytes`] wrote, by this version or an older one.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let kept = Kept::decode(bytes).ok()?;
        let mut known: BTreeMap<_, Vec<Run>> = BTreeMap::new();
        for run in kept.runs {
            known.entry(MachineId(run.machine)).or_default().push(Run {
                first: run.first,
                last: run.first.checked_add(run.more)?,
                millis: run.millis,
            });
        }
        // This may be the version that can read what the last one could not:
        // the next full listing begins there.
        let reach = kept
            .unread_from
            .map_or(u64::MAX, |from| from.saturating_add(WINDOW_MILLIS));
        Some(Self {
            full_began: kept.full_began.map(|began| began.min(reach)),
            newest: kept.newest,
            unread_from: None,
            unfinished: kept.unfinished_began.zip(kept.unfinished_after),
            known,
        })
    }
}

#[derive(Clone, PartialEq, Eq, Message)]
struct Kept {
    #[prost(uint64, optional, tag = "1")]
    full_began: Option<u64>,
    #[prost(uint64, tag = "2")]
    newest: u64,
    #[prost(uint64, optional, tag = "3")]
    unread_from: Option<u64>,
    #[prost(uint64, optional, tag = "4")]
    unfinished_began: Option<u64>,
    #[prost(string, optional, tag = "5")]
    unfinished_after: Option<String>,
    #[prost(message, repeated, tag = "6")]
    runs: Vec<KeptRun>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct KeptRun {
    #[prost(fixed64, tag = "1")]
    machine: u64,
    #[prost(uint64, tag = "2")]
    first: u64,
    /// Numbers behind the first.
    #[prost(uint64, tag = "3")]
    more: u64,
    #[prost(uint64, tag = "4")]
    millis: u64,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const T: u64 = 1_767_225_600_000;

    fn key(millis: u64, machine: u64, seq: u64) -> SegmentKey {
        SegmentKey {
            millis,
            machine: MachineId(machine),
            seq,
        }
    }

    /// Runs one listing to its end, over the keys that it finds.
    fn list(cursor: &mut Cursor, now: u64, full: bool, keys: &[SegmentKey]) -> Vec<SegmentKey> {
        list_until(cursor, now, now, full, keys)
    }

    /// The same; the clock says `now` when it begins, and the replies set it to `end`.
    fn list_until(
        cursor: &mut Cursor,
        now: u64,
        end: u64,
        full: bool,
        keys: &[SegmentKey],
    ) -> Vec<SegmentKey> {
        let mut listing = cursor.begin("v", now, full);
        let mut found: Vec<_> = keys
            .iter()
            .filter(|key| key.to_key("v") > listing.after)
            .copied()
            .collect();
        found.sort();
        let new: Vec<_> = found.iter().filter(|key| !cursor.knows(**key)).copied().collect();
        for &key in &new {
            cursor.note(key);
        }
        if let Some(last) = found.last() {
            cursor.advance(&mut listing, &last.to_key("v"), Some(last.millis));
        }
        cursor.finish(&listing, end);
        new
    }

    #[test]
    fn a_key_reads_back_and_nothing_else_does() {
        let name = key(T, 0xab, 3);
        assert_eq!(SegmentKey::parse("v", &name.to_key("v")), Some(name));
        for other in ["", "volumes/v/log/", "volumes/v/log/20260101T0000/x-y-z"] {
            assert_eq!(SegmentKey::parse("v", other), None);
        }
        let text = name.to_key("v");
        assert_eq!(SegmentKey::parse("w", &text), None);
        assert_eq!(
            SegmentKey::parse("v", &text.replace("T0000", "T0001")),
            None,
            "another minute's folder"
        );
        assert_eq!(SegmentKey::parse("v", &format!("{text}-1")), None);
    }

    #[test]
    fn a_short_listing_looks_back_a_little_and_a_full_one_by_the_window() {
        let mut cursor = Cursor::default();
        assert_eq!(list(&mut cursor, T, false, &[key(T, 1, 1)]), [key(T, 1, 1)]);
        let late = [key(T - 30_000, 2, 1), key(T - 9_000, 2, 2), key(T, 1, 1)];
        assert_eq!(list(&mut cursor, T + 1000, false, &late), [late[1]]);
        assert_eq!(list(&mut cursor, T + 2000, true, &late), [late[0]]);
    }

    #[test]
    fn a_key_from_the_future_does_not_hide_the_present() {
        let mut cursor = Cursor::default();
        list(&mut cursor, T, false, &[key(T + 3_600_000, 1, 1)]);
        assert_eq!(
            list(&mut cursor, T + 1000, false, &[key(T + 500, 2, 1)]),
            [key(T + 500, 2, 1)]
        );
    }

    #[test]
    fn a_clock_that_was_ahead_hides_nothing_when_it_is_set_right() {
        let mut cursor = Cursor::default();
        let first = key(T - 1000, 1, 1);
        list(&mut cursor, T, true, &[first]);
        // The machine's clock was set forward, and no reply of the bucket told better yet.
        list(&mut cursor, T + 3_600_000, true, &[first]);
        let mut cursor = Cursor::from_bytes(&cursor.to_bytes()).unwrap();
        let (late, second) = (key(T - 500, 2, 1), key(T + 1500, 1, 2));
        let mut all = vec![first, late, second];
        // The first one again: that it was known is forgotten.
        assert_eq!(list(&mut cursor, T + 2000, false, &all), all);
        all.push(key(T + 2500, 1, 3));
        assert_eq!(list(&mut cursor, T + 3000, false, &all), [key(T + 2500, 1, 3)]);
    }

    #[test]
    fn a_clock_that_was_behind_when_a_listing_began_takes_nothing_back() {
        let mut cursor = Cursor::default();
        let first = key(T - 1000, 1, 1);
        list(&mut cursor, T, true, &[first]);
        let behind = T - 30 * 24 * 3_600_000;
        for full in [true, false] {
            list_until(&mut cursor, behind, T + 1000, full, &[first]);
            assert!(cursor.reached_millis() >= Some(T));
        }
        assert_eq!(list(&mut cursor, T + 2000, false, &[first]), []);
    }

    #[test]
    fn a_key_from_the_future_seen_by_a_clock_that_was_ahead_hides_nothing_either() {
        let mut cursor = Cursor::default();
        let first = key(T - 1000, 1, 1);
        list(&mut cursor, T, true, &[first]);
        let future = key(T + 7_200_000, 3, 1);
        list_until(&mut cursor, T + 3_600_000, T + 1000, true, &[first, future]);
        let late = key(T - 500, 2, 1);
        assert_eq!(list(&mut cursor, T + 2000, true, &[first, late, future]), [late]);
    }

    #[test]
    fn after_an_outage_the_full_listing_begins_where_the_last_one_could_have_missed_something() {
        let mut cursor = Cursor::default();
        list(&mut cursor, T, true, &[]);
        // Published just behind the last listing, an hour ago; hidden from a window of now.
        let hidden = key(T - 50_000, 2, 1);
        assert_eq!(list(&mut cursor, T + 3_600_000, true, &[hidden]), [hidden]);
    }

    #[test]
    fn a_first_listing_resumes_where_it_stopped() {
        let mut cursor = Cursor::default();
        let mut listing = cursor.begin("v", T, false);
        assert!(listing.full);
        let last = key(T - 1_000_000, 1, 1).to_key("v");
        cursor.advance(&mut listing, &last, Some(T - 1_000_000));
        let cursor = Cursor::from_bytes(&cursor.to_bytes()).unwrap();
        let resumed = cursor.begin("v", T + 60_000, false);
        assert_eq!((resumed.began, resumed.after), (T, last));
    }

    #[test]
    fn after_an_upgrade_the_listing_begins_at_what_could_not_be_read() {
        let mut cursor = Cursor::default();
        list(&mut cursor, T, true, &[]);
        cursor.note_unread(key(T - 1000, 1, 1));
        list(&mut cursor, T + 7_200_000, true, &[]);
        let unread = key(T - 1000, 1, 1);
        let mut upgraded = Cursor::from_bytes(&cursor.to_bytes()).unwrap();
        assert_eq!(list(&mut upgraded, T + 7_300_000, true, &[unread]), [unread]);
    }

    #[test]
    fn what_is_known_of_a_machine_is_one_run_and_leaves_with_the_window() {
        let mut cursor = Cursor::default();
        for seq in (1..=1000).rev() {
            cursor.note(key(T + seq, 1, seq));
        }
        assert!(cursor.to_bytes().len() < 60);
        list(&mut cursor, T, true, &[]);
        assert!(cursor.knows(key(T, 1, 500)));
        list(&mut cursor, T + 2 * WINDOW_MILLIS, true, &[]);
        list(&mut cursor, T + 4 * WINDOW_MILLIS, true, &[]);
        assert!(cursor.known.is_empty());
    }

    #[test]
    fn a_moment_is_settled_when_nothing_before_it_can_come_any_more() {
        let mut cursor = Cursor::default();
        assert!(!cursor.is_settled(0));
        list(&mut cursor, T + WINDOW_MILLIS, true, &[]);
        assert!(cursor.is_settled(T - 1) && !cursor.is_settled(T));
        // A short listing may have missed something.
        list(&mut cursor, T + 2 * WINDOW_MILLIS, false, &[]);
        assert!(!cursor.is_settled(T));
        // What could not be read may be readable now.
        cursor.note_unread(key(T - 1, 1, 1));
        list(&mut cursor, T + 3 * WINDOW_MILLIS, true, &[]);
        assert!(cursor.is_settled(T));
        assert!(!Cursor::from_bytes(&cursor.to_bytes()).unwrap().is_settled(T - 1));
    }

    proptest! {
        #[test]
        fn exactly_what_was_noted_is_known(noted in prop::collection::vec((0u64..3, 0u64..20), 0..60)) {
            let mut cursor = Cursor::default();
            for &(machine, seq) in &noted {
                cursor.note(key(T + seq, machine, seq));
            }
            let kept = Cursor::from_bytes(&cursor.to_bytes()).unwrap();
            prop_assert_eq!(&kept, &cursor);
            for machine in 0..3 {
                for seq in 0..20 {
                    prop_assert_eq!(kept.knows(key(0, machine, seq)), noted.contains(&(machine, seq)));
                }
            }
        }

        /// Segments become visible up to a minute behind the time in their keys, and
        /// listings come when they come: none is missed, and none is applied twice.
        #[test]
        fn no_late_segment_is_missed(
            segments in prop::collection::vec((0u64..3_600_000, 0u64..60_000, 0u64..4), 1..40),
            listings in prop::collection::vec((0u64..3_700_000, prop::bool::weighted(0.2), any::<bool>()), 0..40),
        ) {
            let segments: Vec<_> = segments
                .into_iter()
                .enumerate()
                .map(|(seq, (at, late, machine))| (key(T + at, machine, seq as u64), T + at + late))
                .collect();
            let mut listings = listings;
            listings.sort_unstable();
            listings.push((3_700_000, true, false));
            let mut cursor = Cursor::default();
            let mut seen = Vec::new();
            for (at, full, restart) in listings {
                let now = T + at;
                let visible: Vec<_> =
                    segments.iter().filter(|(_, visible)| *visible <= now).map(|(key, _)| *key).collect();
                seen.extend(list(&mut cursor, now, full, &visible));
                if restart {
                    cursor = Cursor::from_bytes(&cursor.to_bytes()).unwrap();
                }
            }
            let mut all: Vec<_> = segments.iter().map(|(key, _)| *key).collect();
            all.sort_unstable();
            seen.sort_unstable();
            prop_assert_eq!(seen, all);
        }
    }
}
