//! What the tests on real mounts share: machines, places, trees, loop file systems.
//!
//! Every guard here cleans up when it is dropped, on a panic too, and every wait
//! has a deadline. A test ends the processes that it started by their ids.
//!
//! `lab` (both kinds of store) is a file beside these, because it needs the S3
//! server of the tests, which the tests of single machines do without.

// Each test program uses a part of this.
#![allow(dead_code, unreachable_pub, missing_debug_implementations)]

pub mod child;
pub mod input;
pub mod loopdev;
pub mod machine;
pub mod namespace;
pub mod place;
pub mod posix;
pub mod posix_suite;
pub mod programs;
pub mod rng;
pub mod tempdir;
pub mod tree;
pub mod trial;
pub mod wait;

/// Ends a test early and says why, where this host cannot run it.
#[macro_export]
macro_rules! skip {
    ($($why:tt)*) => {{
        eprintln!("SKIPPED: {}", format!($($why)*));
        return;
    }};
}
