//! A reference model of the file system: random operations on real directories answer what the
//! model says, error by error, and what they leave is what the model has.
//!
//! The model is first held against a directory of the disk, so that a failure on a mount is one of
//! the mount.
//!
//! `CASMOUNT_MODEL_CASES` sets how many sequences each test does, `CASMOUNT_TEST_SEED` where they
//! begin. A failure is shrunk and printed as a script.

#[path = "support/lab.rs"]
#[macro_use]
mod lab;
mod s3server;
#[macro_use]
mod support;

#[path = "model/answer.rs"]
mod answer;
#[path = "model/compare.rs"]
mod compare;
#[path = "model/disk.rs"]
mod disk;
#[path = "model/drive.rs"]
mod drive;
#[path = "model/files.rs"]
mod files;
#[path = "model/fleet.rs"]
mod fleet;
#[path = "model/fs.rs"]
mod fs;
#[path = "model/mount.rs"]
mod mount;
#[path = "model/names.rs"]
mod names;
#[path = "model/ops.rs"]
mod ops;
#[path = "model/real.rs"]
mod real;
#[path = "model/script.rs"]
mod script;
#[path = "model/steps.rs"]
mod steps;
#[path = "model/world.rs"]
mod world;
