//! The words of the control protocol; specified in [`super`].

use serde::{Deserialize, Serialize};

use crate::{daemon::users::User, observe::Status, vfs::Listed};

pub const VERSION: u32 = 1;
/// The longest request: a path has at most 4096 bytes, each up to four characters here.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Request {
    Ping,
    Status,
    Ls {
        path: Vec<u8>,
    },
    Flush {
        deadline_millis: u64,
    },
    Commit {
        deadline_millis: u64,
    },
    Unmount {
        deadline_millis: u64,
        lazy: bool,
        success: bool,
    },
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    request: T,
}

impl Request {
    /// The line that asks for it.
    pub fn to_line(&self) -> String {
        let versioned = Versioned {
            version: VERSION,
            request: self,
        };
        let mut line = serde_json::to_string(&versioned).expect("these types have no state that JSON lacks");
        line.push('\n');
        line
    }

    /// Reads a line; the error is for the client.
    pub fn from_line(line: &str) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Any {}
        let malformed = |err: serde_json::Error| format!("the request is malformed: {err}");
        // The version first: another one may have other commands.
        let version = serde_json::from_str::<Versioned<Any>>(line)
            .map_err(malformed)?
            .version;
        if version != VERSION {
            return Err(format!(
                "this daemon speaks version {VERSION} of the control protocol and the command version {version}; \
                 unmount with the casmount that mounted, then mount anew"
            ));
        }
        serde_json::from_str::<Versioned<Self>>(line)
            .map(|versioned| versioned.request)
            .map_err(malformed)
    }
}

/// What a daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Progress(Progress),
    Pong {
        pid: u32,
        daemon: String,
    },
    Status {
        status: Box<Status>,
    },
    Listed {
        files: Vec<ListedFile>,
    },
    Flushed(DrainReport),
    Committed {
        drained: DrainReport,
        /// `None`: not all was drained, so nothing was promoted.
        committed: Option<CommitReport>,
    },
    Unmounted(UnmountReport),
    Busy {
        users: Vec<User>,
    },
    Error {
        message: String,
    },
}

impl Reply {
    pub fn to_line(&self) -> String {
        let mut line = serde_json::to_string(self).expect("these types have no state that JSON lacks");
        line.push('\n');
        line
    }

    pub fn is_last(&self) -> bool {
        !matches!(self, Self::Progress(_))
    }
}

/// What a drain waits for just now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// `sealing`, `uploading`, `publishing`, `promoting`, `unmounting`.
    pub step: String,
    pub unsealed: u64,
    pub dirty_blobs: u64,
    pub dirty_bytes: u64,
    pub unpublished: u64,
    pub last_error: Option<String>,
}

/// How a drain ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DrainReport {
    /// Everything closed before is durable and published, and nothing was open for writing.
    pub complete: bool,
    /// Files still open for writing; not part of the drain.
    pub still_open: Vec<String>,
    /// Closed files that are not sealed.
    pub unsealed: u64,
    pub dirty_blobs: u64,
    /// Blobs that never will be durable: their bytes differ from their name.
    pub quarantined_blobs: u64,
    /// Changes of the tree that other machines do not see.
    pub unpublished: u64,
    /// Files that turned out to be lost since this was last told: never published, and their blobs are nowhere any more.
    #[serde(default)]
    pub lost_files: u64,
    pub last_error: Option<String>,
    pub seconds: f64,
}

impl DrainReport {
    /// Sets `complete` from the rest.
    #[must_use]
    pub fn judged(mut self) -> Self {
        self.complete = self.still_open.is_empty()
            && self.unsealed == 0
            && self.dirty_blobs == 0
            && self.quarantined_blobs == 0
            && self.unpublished == 0
            && self.lost_files == 0;
        self
    }
}

/// What became of a fork's changes that were to become a part of its parent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitReport {
    pub volume: String,
    pub into: String,
    /// Paths that the fork says something of.
    pub changes: u64,
    /// How many of these are deletions.
    pub removed: u64,
    pub segments: u64,
    /// Why it was not done, or not whole.
    pub error: Option<String>,
}

/// How a mount ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UnmountReport {
    #[serde(flatten)]
    pub drained: DrainReport,
    /// `None`: nobody wanted that.
    pub committed: Option<CommitReport>,
}

impl UnmountReport {
    /// Everything was done that was wanted.
    pub fn is_whole(&self) -> bool {
        let committed = self.committed.as_ref();
        self.drained.complete && committed.is_none_or(|committed| committed.error.is_none())
    }
}

/// One line of `casmount ls`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedFile {
    pub path: String,
    /// `file`, `dir`, `symlink`, ...
    pub kind: String,
    pub size: u64,
    /// Of a sealed file.
    pub digest: Option<String>,
    /// `resident`, `partial`, `remote` or `staging`.
    pub residency: String,
    /// `durable`, `dirty`, `quarantined`, `writing`, `lost`.
    pub durability: String,
}

impl From<Listed> for ListedFile {
    fn from(listed: Listed) -> Self {
        Self {
            path: listed.path,
            kind: listed.kind.to_owned(),
            size: listed.size,
            digest: listed.digest,
            residency: listed.residency.to_owned(),
            durability: listed.durability.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_written_as_specified() {
        for (request, line) in [
            (Request::Ping, r#"{"version":1,"command":"ping"}"#),
            (Request::Status, r#"{"version":1,"command":"status"}"#),
            (
                Request::Ls {
                    path: b"src".to_vec(),
                },
                r#"{"version":1,"command":"ls","path":[115,114,99]}"#,
            ),
            (
                Request::Flush {
                    deadline_millis: 90_000,
                },
                r#"{"version":1,"command":"flush","deadline_millis":90000}"#,
            ),
            (
                Request::Commit {
                    deadline_millis: 90_000,
                },
                r#"{"version":1,"command":"commit","deadline_millis":90000}"#,
            ),
            (
                Request::Unmount {
                    deadline_millis: 90_000,
                    lazy: false,
                    success: true,
                },
                r#"{"version":1,"command":"unmount","deadline_millis":90000,"lazy":false,"success":true}"#,
            ),
        ] {
            assert_eq!(request.to_line().trim_end(), line);
            assert_eq!(Request::from_line(line), Ok(request));
        }
    }

    #[test]
    fn another_version_is_told_so_before_anything_else() {
        let answer = Request::from_line(r#"{"version":2,"command":"levitate"}"#).unwrap_err();
        assert!(
            answer.contains("version 1") && answer.contains("version 2"),
            "{answer}"
        );
        assert!(Request::from_line(r#"{"version":1,"command":"levitate"}"#).is_err());
        assert!(Request::from_line("{}").is_err());
        assert!(Request::from_line("GET / HTTP/1.1").is_err());
    }

    #[test]
    fn replies_are_written_as_specified() {
        let pong = Reply::Pong {
            pid: 7,
            daemon: "0.1.0".into(),
        };
        assert_eq!(
            pong.to_line(),
            "{\"reply\":\"pong\",\"pid\":7,\"daemon\":\"0.1.0\"}\n"
        );
        let flushed = Reply::Flushed(DrainReport {
            complete: true,
            ..DrainReport::default()
        });
        assert_eq!(
            flushed.to_line().trim_end(),
            r#"{"reply":"flushed","complete":true,"still_open":[],"unsealed":0,"dirty_blobs":0,"quarantined_blobs":0,"unpublished":0,"lost_files":0,"last_error":null,"seconds":0.0}"#
        );
        assert_eq!(
            serde_json::from_str::<Reply>(&flushed.to_line()).unwrap(),
            flushed
        );
        assert!(!Reply::Progress(Progress::default()).is_last() && flushed.is_last());
        let unmounted = Reply::Unmounted(UnmountReport {
            drained: DrainReport::default().judged(),
            committed: Some(CommitReport {
                volume: "job-1".into(),
                into: "main".into(),
                changes: 2,
                ..CommitReport::default()
            }),
        });
        assert_eq!(
            unmounted.to_line().trim_end(),
            r#"{"reply":"unmounted","complete":true,"still_open":[],"unsealed":0,"dirty_blobs":0,"quarantined_blobs":0,"unpublished":0,"lost_files":0,"last_error":null,"seconds":0.0,"committed":{"volume":"job-1","into":"main","changes":2,"removed":0,"segments":0,"error":null}}"#
        );
        assert_eq!(
            serde_json::from_str::<Reply>(&unmounted.to_line()).unwrap(),
            unmounted
        );
    }

    #[test]
    fn a_drain_that_left_anything_is_not_complete() {
        assert!(DrainReport::default().judged().complete);
        for report in [
            DrainReport {
                still_open: vec!["a".into()],
                ..DrainReport::default()
            },
            DrainReport {
                unsealed: 1,
                ..DrainReport::default()
            },
            DrainReport {
                dirty_blobs: 1,
                ..DrainReport::default()
            },
            DrainReport {
                quarantined_blobs: 1,
                ..DrainReport::default()
            },
            DrainReport {
                unpublished: 1,
                ..DrainReport::default()
            },
            DrainReport {
                lost_files: 1,
                ..DrainReport::default()
            },
        ] {
            assert!(!report.clone().judged().complete, "{report:?}");
        }
    }
}
