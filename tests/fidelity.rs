//! The calls of POSIX in a mount beside the same calls on the disk: what they answer must be the same.
//!
//! Where it is not, the test names the line, which is in the README's table of differences as well.

#[path = "support/lab.rs"]
#[macro_use]
mod lab;
mod s3server;
#[macro_use]
mod support;

#[path = "fidelity/beyond.rs"]
mod beyond;
#[path = "fidelity/calls.rs"]
mod calls;
#[path = "fidelity/chance.rs"]
mod chance;
#[path = "fidelity/descriptors.rs"]
mod descriptors;
#[path = "fidelity/killed.rs"]
mod killed;
#[path = "fidelity/kinds.rs"]
mod kinds;
#[path = "fidelity/limits.rs"]
mod limits;
#[path = "fidelity/listings.rs"]
mod listings;
#[path = "fidelity/locks.rs"]
mod locks;
#[path = "fidelity/memory.rs"]
mod memory;
#[path = "fidelity/names.rs"]
mod names;
#[path = "fidelity/open_files.rs"]
mod open_files;
#[path = "fidelity/renames.rs"]
mod renames;
#[path = "fidelity/rights.rs"]
mod rights;
#[path = "fidelity/served.rs"]
mod served;
#[path = "fidelity/shared_dirs.rs"]
mod shared_dirs;
#[path = "fidelity/space.rs"]
mod space;
#[path = "fidelity/stacked.rs"]
mod stacked;
#[path = "fidelity/stress.rs"]
mod stress;
#[path = "fidelity/suite.rs"]
mod suite;
#[path = "fidelity/times.rs"]
mod times;
