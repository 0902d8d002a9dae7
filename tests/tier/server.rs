//! The server of the tests does and counts what it says.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use casmount::tier::{Body, url::connect};

use super::{
    Fixture, options_for,
    s3server::{Counts, Faults, ServerOptions, TestServer},
};

#[tokio::test]
async fn requests_and_bytes_are_counted() {
    let fixture = Fixture::s3().await;
    fixture
        .bucket
        .put_new("a", Body::raw(vec![1; 1000]))
        .await
        .unwrap();
    fixture.server().reset_counts();
    fixture.bucket.get("a", None, 1000).await.unwrap();
    fixture.bucket.get("a", Some(0..100), 1000).await.unwrap();
    fixture.bucket.head("a").await.unwrap();
    fixture.bucket.put_new("b", Body::raw(vec![1; 50])).await.unwrap();
    let counts = fixture.server().counts();
    assert_eq!(counts.of("GetObject"), 2);
    assert_eq!(counts.of("HeadObject"), 1);
    assert_eq!(counts.of("PutObject"), 1);
    assert_eq!(
        (counts.bytes_sent, counts.bytes_received, counts.faults),
        (1100, 50, 0)
    );
}

#[tokio::test]
async fn bodies_in_files_are_the_same_and_go_with_their_objects() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(ServerOptions {
        dir: Some(dir.path().to_owned()),
        ..ServerOptions::default()
    });
    let bucket = connect(&server.url().parse().unwrap(), &options_for(&server))
        .await
        .unwrap();
    bucket.put_new("a", Body::raw("0123456789")).await.unwrap();
    let read = bucket.get("a", Some(2..5), 10).await.unwrap().unwrap();
    assert_eq!(read.bytes, "234");
    server.tamper("a", Some(b"other".to_vec()));
    let read = bucket.get("a", None, 10).await.unwrap().unwrap();
    assert_eq!(read.bytes, "other");
    bucket.delete("a").await.unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn the_same_seed_gives_the_same_faults() {
    let mut runs = Vec::new();
    for _ in 0..2 {
        let server = TestServer::start(ServerOptions {
            faults: Faults {
                seed: 42,
                wrong_bytes: 0.5,
                ..Faults::default()
            },
            ..ServerOptions::default()
        });
        let bucket = connect(&server.url().parse().unwrap(), &options_for(&server))
            .await
            .unwrap();
        bucket.put_new("a", Body::raw("x")).await.unwrap();
        let mut seen = Vec::new();
        for _ in 0..20 {
            seen.push(bucket.get("a", None, 1).await.unwrap().unwrap().bytes == "x");
        }
        assert!(seen.contains(&true) && seen.contains(&false));
        runs.push(seen);
    }
    assert_eq!(runs[0], runs[1]);
}

/// Asks a server over plain HTTP and returns the body of the reply.
fn ask(address: &str, method: &str, path: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let len = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}"
    )
    .unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{reply}");
    body.to_owned()
}

#[tokio::test]
async fn another_process_steers_it_over_http() {
    let fixture = Fixture::s3().await;
    let bucket = &fixture.bucket;
    let endpoint = fixture.server().endpoint();
    let address = endpoint.strip_prefix("http://").unwrap();
    bucket.put_new("a", Body::raw("x")).await.unwrap();
    let counts: Counts = serde_json::from_str(&ask(address, "GET", "/_admin/counts", "")).unwrap();
    assert_eq!(counts.of("PutObject"), 1);
    assert!(ask(address, "GET", "/_admin/objects", "").contains("\"key\":\"team/ci/a\""));
    ask(address, "POST", "/_admin/faults", "{\"error_500\":1}");
    assert!(bucket.head("a").await.unwrap_err().is_transient());
    ask(address, "POST", "/_admin/reset", "");
    assert!(bucket.head("a").await.unwrap().is_some());
    let counts: Counts = serde_json::from_str(&ask(address, "GET", "/_admin/counts", "")).unwrap();
    assert_eq!(counts.total(), 1);
}
