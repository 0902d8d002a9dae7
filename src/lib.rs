//! casmount mounts a content-addressed store as an ordinary directory that
//! many machines share through a bucket.
//!
//! The layers, from the top; imports point strictly downward, and
//! `tests/layering.rs` holds them to it:
//!
//! ```text
//! cli  config  daemon      wiring
//! fuse  observe            fronts: translate a protocol, decide nothing
//! vfs                      file system semantics, no FUSE types
//! namespace                one tree out of many machines' logs
//! upload                   dirty blobs to the bucket, later
//! store                    blobs on this disk
//! tier                     blobs elsewhere
//! base                     digest, clock, durable files, retry, single flight
//! ```

pub mod base;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod fuse;
pub mod namespace;
pub mod observe;
pub mod store;
pub mod tier;
pub mod upload;
pub mod vfs;
