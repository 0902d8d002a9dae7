//! Facts about a running daemon, as text and JSON.
