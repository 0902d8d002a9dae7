//! Facts about a running daemon, as text and JSON.
//!
//! A [`Status`] is a value: whoever has the parts fills it in, this module
//! only says what it consists of and how people read it.
//!
//! # Stability
//!
//! The names in the JSON are an interface: monitoring reads them. Names are
//! added, never renamed and never given another meaning or unit. A test pins them.

pub mod memory;
pub mod render;
pub mod status;

pub use status::Status;
