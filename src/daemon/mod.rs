//! The running daemon: how it starts, what it is made of, how it stops.
//!
//! ```text
//! detach  announce  process  log   the process and whoever started it
//! run                              the life: start, serve, stop
//! start  layers  notices           putting the layers up, in order
//! serving  answer  control         what commands can ask meanwhile
//! drain  commit  stop              the end, with nothing left behind
//! fork  volume  snapshot           what commands do to volumes without a daemon
//! mountpoint mountinfo users root_check    the place, seen from outside
//! ```
//!
//! # Invariants
//!
//! - The daemon never touches its own mount: a child process looks at it, and
//!   tables in `/proc` say who uses it.
//! - What fails before the cache directory is opened has changed nothing.
//! - `ready` is said only after the mount answered through the kernel.
//! - A stop waits for the bucket at most until its deadline; what is left then
//!   stays in the cache directory, for the next mount.

pub mod announce;
pub mod answer;
pub mod bucket;
pub mod catalogs;
pub mod commit;
pub mod compact;
pub mod control;
pub mod detach;
pub mod drain;
pub mod error;
pub mod expire;
pub mod fork;
pub mod layers;
pub mod log;
pub mod mountinfo;
pub mod mountpoint;
pub mod notices;
pub mod notify;
pub mod presets;
pub mod process;
pub mod readahead;
pub mod retention;
pub mod root_check;
pub mod run;
pub mod serving;
pub mod snapshot;
pub mod start;
pub mod stop;
pub mod sweep;
pub mod users;
pub mod volume;
pub mod volumes;
