//! What every layer shares and what knows none of them: digests, identities,
//! names of volumes and snapshots, clocks, CPUs, chunking, buffers, activity, durable files, retry and single flight.

pub mod activity;
pub mod buffers;
pub mod chunk;
pub mod clock;
pub mod cpus;
pub mod digest;
pub mod durable;
pub mod flight;
pub mod id;
pub mod retry;
mod sha256;
pub mod snapshot;
pub mod units;
pub mod volume;

use std::{future::Future, pin::Pin};

/// A future that a trait object can return.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
