//! The contract of buckets, on every implementation, and what each of them
//! does when the world around it goes wrong.

#[path = "tier/contract.rs"]
mod contract;
#[path = "tier/dir.rs"]
mod dir;
#[path = "tier/environment.rs"]
mod environment;
#[path = "tier/faults.rs"]
mod faults;
#[path = "s3server/mod.rs"]
mod s3server;
#[path = "tier/server.rs"]
mod server;
#[path = "tier/store.rs"]
mod store;

use std::time::Duration;

use casmount::tier::{
    SharedBucket, TierError,
    url::{AccessKey, ConnectOptions, connect},
};
use s3server::{ServerOptions, TestServer};
use tempfile::TempDir;

/// A bucket to test, and what it stands on.
struct Fixture {
    bucket: SharedBucket,
    server: Option<TestServer>,
    dir: Option<TempDir>,
}

impl Fixture {
    /// A part of a bucket on a server of its own.
    async fn s3() -> Self {
        let server = TestServer::start(ServerOptions::default());
        let bucket = connect_to(&server, &format!("{}/team/ci", server.url()))
            .await
            .unwrap();
        Self {
            bucket,
            server: Some(server),
            dir: None,
        }
    }

    async fn dir() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}", dir.path().display()).parse().unwrap();
        let bucket = connect(&url, &ConnectOptions::default()).await.unwrap();
        Self {
            bucket,
            server: None,
            dir: Some(dir),
        }
    }

    fn server(&self) -> &TestServer {
        self.server.as_ref().expect("the fixture has a server")
    }

    fn path(&self) -> &std::path::Path {
        self.dir.as_ref().expect("the fixture has a directory").path()
    }
}

/// Options that reach `server`, whatever the environment of the test says.
fn options_for(server: &TestServer) -> ConnectOptions {
    ConnectOptions {
        endpoint_url: Some(server.endpoint()),
        region: Some("us-east-1".to_owned()),
        access_key: Some(AccessKey {
            id: server.access_key().to_owned(),
            secret: server.secret_key().to_owned(),
        }),
        // Long enough for a machine that is busy with other tests, short enough to wait for in one.
        request_timeout: Duration::from_secs(5),
    }
}

async fn connect_to(server: &TestServer, url: &str) -> Result<SharedBucket, TierError> {
    connect(&url.parse().unwrap(), &options_for(server)).await
}
