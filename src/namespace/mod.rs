//! One tree out of many machines' logs.
//!
//! A volume is a set of registers, one a path; every machine appends its
//! changes to the volume's log as *segments*, and every machine merges what it
//! reads: the change with the greatest stamp wins ([`crate::base::clock::Stamp`]).
//!
//! A volume may lie over others ([`stack`]): a fork shows what its parent has where it says nothing itself.
//!
//! The changes of this machine, those of the others and those of the volumes below obey one law, so they lie
//! in one table ([`tree`]), each with its stamp and its layer; an own one also has its place in the order of
//! what is to be published.

mod background;
pub mod catalog;
pub mod change;
pub mod cut;
pub mod error;
pub mod follow;
#[cfg(test)]
mod log_tests;
pub mod publish;
pub mod segment;
pub mod stack;
pub mod tree;

pub use error::TreeError;
