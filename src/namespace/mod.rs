//! One tree out of many machines' logs.
//!
//! A volume is a set of registers, one a path; every machine appends its
//! changes to the volume's log as *segments*, and every machine merges what it
//! reads: the change with the greatest stamp wins ([`crate::base::clock::Stamp`]).
//!
//! A volume may lie over others ([`stack`]): a fork shows what its parent has where it says nothing itself.
//! What is said in it can be promoted into the parent ([`promote`]). A state of a volume can be kept
//! under a tag ([`snapshot`]).
//!
//! What a volume says is also read without a mount ([`view`], [`diff`], [`history`]), and which volumes there
//! are ([`volumes`]).
//!
//! What machines use of a volume they tell ([`touch`]), so that names which nobody uses can leave it ([`expire`]).
//!
//! The changes of this machine, those of the others and those of the volumes below obey one law, so they lie
//! in one table ([`tree`]), each with its stamp and its layer; an own one also has its place in the order of
//! what is to be published.

pub mod action;
mod background;
pub mod catalog;
pub mod change;
pub mod cut;
pub mod deleted;
pub mod diff;
pub mod error;
pub mod expire;
pub mod follow;
pub mod history;
#[cfg(test)]
mod log_tests;
mod patience;
pub mod preset;
pub mod promote;
pub mod publish;
pub mod segment;
pub mod snapshot;
pub mod stack;
pub mod sweep;
mod together;
pub mod touch;
pub mod tree;
pub mod trim;
pub mod view;
pub mod volumes;

pub use error::TreeError;
