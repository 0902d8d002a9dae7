//! The S3 server of the tests: a real one over HTTP, on the `s3s` crate.
//!
//! It is reached through the real SDK, keeps its objects in memory or in files,
//! decides conditional writes atomically, counts what it is asked, and does
//! wrong by switch and by seed ([`Faults`]). It runs on a thread and a runtime
//! of its own, and stops when dropped.
//!
//! Boundary: nothing of `casmount` is used here, so that a mistake there cannot
//! hide itself. Persistence over a restart, versions, multipart uploads and
//! access control lists are not offered. Further access keys can be held to a policy each.
//!
//! ```text
//! GET  /_admin/counts     what was asked so far, as JSON
//! GET  /_admin/objects    keys and sizes, as JSON
//! POST /_admin/faults     replaces the faults by those of the JSON body
//! POST /_admin/reset      no faults, counts at zero; objects stay
//! ```

#![allow(
    dead_code,
    reason = "each program that includes this module uses another part of it"
)]
#![allow(
    clippy::pedantic,
    reason = "code for tests; what it says about prose and casts does not pay here"
)]

mod backend;
mod body;
mod faults;
mod http;
mod policy;

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use tokio::sync::oneshot;

pub use self::{
    backend::Stored,
    faults::{Counts, Faults},
};

/// What a server starts with.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// 0 lets the kernel choose.
    pub port: u16,
    pub bucket: String,
    /// Keeps bodies in files of this directory instead of in memory.
    pub dir: Option<PathBuf>,
    pub access_key: String,
    pub secret_key: String,
    /// Further access keys, each held to its policy.
    pub restricted: Vec<RestrictedKey>,
    pub faults: Faults,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            port: 0,
            bucket: "casmount-test".to_owned(),
            dir: None,
            access_key: "test-access-key".to_owned(),
            secret_key: "test-secret-key".to_owned(),
            restricted: Vec::new(),
            faults: Faults::default(),
        }
    }
}

/// An access key that may do what an IAM policy permits, and nothing else.
#[derive(Clone, Debug)]
pub struct RestrictedKey {
    pub access_key: String,
    pub secret_key: String,
    /// JSON, as it stands in a file.
    pub policy: String,
}

/// A running server; dropping it ends it.
pub struct TestServer {
    options: ServerOptions,
    address: SocketAddr,
    state: Arc<http::ServerState>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TestServer {
    /// Starts a server; it answers when this returns.
    pub fn start(options: ServerOptions) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, options.port))
            .unwrap_or_else(|err| panic!("cannot listen on port {}: {err}", options.port));
        listener
            .set_nonblocking(true)
            .expect("a socket can be nonblocking");
        let address = listener.local_addr().expect("a bound socket has an address");
        let state = Arc::new(http::ServerState::new(&options));
        let (stop, stopped) = oneshot::channel();
        let served = Arc::clone(&state);
        let thread = std::thread::Builder::new()
            .name("s3-test-server".to_owned())
            .spawn(move || http::run(listener, served, stopped))
            .expect("a thread can be started");
        Self {
            options,
            address,
            state,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// Where it listens, `http://127.0.0.1:<port>`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn bucket(&self) -> &str {
        &self.options.bucket
    }

    /// The store that is the whole bucket.
    pub fn url(&self) -> String {
        format!("s3://{}", self.options.bucket)
    }

    pub fn access_key(&self) -> &str {
        &self.options.access_key
    }

    pub fn secret_key(&self) -> &str {
        &self.options.secret_key
    }

    /// The variables with which any SDK finds this server and nothing else.
    pub fn env(&self) -> Vec<(String, String)> {
        [
            ("AWS_ENDPOINT_URL", self.endpoint().as_str()),
            ("AWS_ACCESS_KEY_ID", self.access_key()),
            ("AWS_SECRET_ACCESS_KEY", self.secret_key()),
            ("AWS_REGION", "us-east-1"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
            ("AWS_CONFIG_FILE", "/dev/null"),
            ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
    }

    /// What was asked since the start, or since the counts were reset.
    pub fn counts(&self) -> Counts {
        self.state.counts()
    }

    pub fn reset_counts(&self) {
        self.state.reset_counts();
    }

    /// Replaces all faults; requests under way keep theirs.
    pub fn set_faults(&self, faults: Faults) {
        self.state.set_faults(faults);
    }

    /// Every object of the bucket, in the order of their keys.
    pub fn objects(&self) -> Vec<Stored> {
        self.state.backend.objects()
    }

    /// The bytes of an object as they are stored.
    pub fn object(&self, key: &str) -> Option<Vec<u8>> {
        self.state.backend.read(key)
    }

    /// Puts other bytes under a key behind everyone's back; `None` removes it.
    pub fn tamper(&self, key: &str, bytes: Option<Vec<u8>>) {
        self.state.backend.tamper(key, bytes);
    }

    /// Makes the objects of a prefix older than they are.
    pub fn age(&self, prefix: &str, by: Duration) {
        self.state.backend.age(prefix, by);
    }

    /// Does what a lifecycle rule of the bucket does, now.
    pub fn expire(&self, prefix: &str, lifetime: Duration) {
        self.state.backend.expire(prefix, lifetime);
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // The thread may have ended by itself.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; a second one here would only hide the test's own.
            let _ = thread.join();
        }
    }
}
