//! How commands talk to a daemon: one Unix socket for each mount.
//!
//! # Protocol, version 1
//!
//! The client connects, writes one line of JSON and reads lines of JSON until
//! the daemon closes the connection. All but the last are progress.
//!
//! ```text
//! -> {"version":1,"command":"ping"}
//! -> {"version":1,"command":"status"}
//! -> {"version":1,"command":"ls","path":[115,114,99]}          bytes of a path relative to the mount
//! -> {"version":1,"command":"flush","deadline_millis":90000}
//! -> {"version":1,"command":"unmount","deadline_millis":90000,"lazy":false}
//! <- {"reply":"progress",...}                                   [`Progress`]
//! <- {"reply":"pong","pid":7,"daemon":"0.1.0"}
//! <- {"reply":"status","status":{...}}                          [`crate::observe::status`]
//! <- {"reply":"listed","files":[...]}                           [`ListedFile`]
//! <- {"reply":"flushed",...}                                    [`DrainReport`]
//! <- {"reply":"unmounted",...}                                  [`DrainReport`]; the daemon is gone, the cache directory free
//! <- {"reply":"busy","users":[...]}                             [`User`]; the mount stays
//! <- {"reply":"error","message":"..."}
//! ```
//!
//! A request of another version is answered by an error that says so. The
//! golden test in `protocol` pins these texts.
//!
//! Whoever may connect may do all this: the socket is the mounting user's own
//! (mode 0600), and the client refuses a directory that another user could have made.
//!
//! [`Progress`]: protocol::Progress
//! [`ListedFile`]: protocol::ListedFile
//! [`DrainReport`]: protocol::DrainReport
//! [`User`]: super::users::User

pub mod client;
pub mod place;
pub mod protocol;
pub mod server;
