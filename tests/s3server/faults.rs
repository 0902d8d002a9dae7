//! What the server does wrong, and what it counts.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
};

use serde::{Deserialize, Serialize};

/// Wrongs to do; none by default. Shares are 0 to 1 of the requests they apply to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// The same seed and order of requests give the same faults.
    pub seed: u64,
    /// The operations that the shares below apply to, by their names in S3; empty for all.
    pub only: Vec<String>,
    /// Share of requests answered with 500 InternalError.
    pub error_500: f64,
    /// Share of requests answered with 503 SlowDown.
    pub slow_down: f64,
    /// Share of writes answered with 409 ConditionalRequestConflict.
    pub conflict: f64,
    /// Share of replies whose connection is closed in the middle of the body.
    pub reset: f64,
    /// Share of replies that stop in the middle of the body, or never begin.
    pub stall: f64,
    /// Share of bodies with one bit turned.
    pub wrong_bytes: f64,
    /// Share of writes and deletes that are done, but whose connection is closed without a reply.
    pub lost_reply: f64,
    /// Added to every reply.
    pub latency_ms: u64,
    /// How much later writes land, and are answered, whatever became of who sent them.
    pub land_later_ms: u64,
    /// The writes that do: those with one of these in their keys.
    pub land_later_keys: Vec<String>,
    /// Writes with one of these in their keys are answered with 503 SlowDown.
    pub refused_keys: Vec<String>,
    /// Closes every connection at its first request.
    pub down: bool,
    /// Operations answered with 403 AccessDenied, by their names in S3.
    pub forbidden: Vec<String>,
    /// Answers 403 for absent keys, as S3 does without s3:ListBucket.
    pub missing_is_403: bool,
    /// Ignores If-None-Match and If-Match, as Garage does.
    pub ignore_conditions: bool,
    /// Ignores Range, as simple servers do.
    pub ignore_ranges: bool,
    /// Added to the header Date, in seconds.
    pub date_skew_secs: i64,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            seed: 0,
            only: Vec::new(),
            error_500: 0.0,
            slow_down: 0.0,
            conflict: 0.0,
            reset: 0.0,
            stall: 0.0,
            wrong_bytes: 0.0,
            lost_reply: 0.0,
            latency_ms: 0,
            land_later_ms: 0,
            land_later_keys: Vec::new(),
            refused_keys: Vec::new(),
            down: false,
            forbidden: Vec::new(),
            missing_is_403: false,
            ignore_conditions: false,
            ignore_ranges: false,
            date_skew_secs: 0,
        }
    }
}

/// The one wrong that is done to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    Down,
    Forbidden,
    Error500,
    SlowDown,
    Conflict,
    LostReply,
    Reset,
    Stall,
    Flip,
    /// After so many milliseconds.
    LandsLater(u64),
}

impl Faults {
    /// Decides what happens to the `number`th request.
    pub(super) fn choose(&self, operation: &str, number: u64) -> Option<Wrong> {
        if self.down {
            return Some(Wrong::Down);
        }
        if self.forbidden.iter().any(|name| name == operation) {
            return Some(Wrong::Forbidden);
        }
        if !self.only.is_empty() && !self.only.iter().any(|name| name == operation) {
            return None;
        }
        let writes = operation == "PutObject";
        let changes = writes || ["CopyObject", "DeleteObject", "DeleteObjects"].contains(&operation);
        let reads = operation == "GetObject";
        // One draw on a line of all shares, so that they do not shadow each other.
        let mut draw = unit(self.seed, number);
        for (share, wrong, applies) in [
            (self.error_500, Wrong::Error500, true),
            (self.slow_down, Wrong::SlowDown, true),
            (self.conflict, Wrong::Conflict, writes),
            (self.lost_reply, Wrong::LostReply, changes),
            (self.reset, Wrong::Reset, true),
            (self.stall, Wrong::Stall, true),
            (self.wrong_bytes, Wrong::Flip, reads),
        ] {
            if applies {
                if draw < share {
                    return Some(wrong);
                }
                draw -= share;
            }
        }
        None
    }
}

/// A number in 0..1 that the arguments decide (the finalizer of splitmix64).
fn unit(seed: u64, number: u64) -> f64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// What the server was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Requests by their names in S3, those that went wrong included.
    pub requests: BTreeMap<String, u64>,
    /// The same by the access keys that signed them.
    pub by_key: BTreeMap<String, BTreeMap<String, u64>>,
    /// Bytes of the bodies of replies that were handed to the connection.
    pub bytes_sent: u64,
    /// Bytes of the bodies of requests, as announced.
    pub bytes_received: u64,
    /// Requests that a fault was done to.
    pub faults: u64,
}

impl Counts {
    /// The requests of one operation.
    pub fn of(&self, operation: &str) -> u64 {
        self.requests.get(operation).copied().unwrap_or_default()
    }

    /// The requests of one operation that an access key signed.
    pub fn of_key(&self, access_key: &str, operation: &str) -> u64 {
        let of_key = self.by_key.get(access_key);
        of_key
            .and_then(|requests| requests.get(operation).copied())
            .unwrap_or_default()
    }

    /// All requests that an access key signed.
    pub fn total_of_key(&self, access_key: &str) -> u64 {
        self.by_key
            .get(access_key)
            .map_or(0, |requests| requests.values().sum())
    }

    /// All requests.
    pub fn total(&self) -> u64 {
        self.requests.values().sum()
    }
}

/// Counters that a body can hold on to.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) faults: AtomicU64,
}

impl Traffic {
    pub(super) fn reset(&self) {
        for counter in [&self.sent, &self.received, &self.faults] {
            counter.store(0, Ordering::Relaxed);
        }
    }
}
