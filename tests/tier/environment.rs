//! What the environment says about a server, seen by a process that has no other settings.
//!
//! A test cannot change its own environment safely while others run, so each
//! case runs this program again as a child with an environment of its own.

use std::process::Command;

use casmount::tier::{
    Body, TierError,
    url::{ConnectOptions, connect},
};

use super::s3server::{ServerOptions, TestServer};

/// Names the store that a child connects to.
const CHILD: &str = "CASMOUNT_TEST_STORE";

/// Runs `case` below in a child whose environment is `env` alone.
fn run_child(case: &str, env: &[(String, String)]) {
    let home = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", &format!("environment::{case}")])
        .env_clear()
        .env("HOME", home.path())
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .envs(env.iter().cloned())
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}\n{complaint}");
    assert!(printed.contains("1 passed"), "the case did not run: {printed}");
}

fn named(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

#[test]
fn the_variables_of_the_sdk_reach_a_server() {
    let server = TestServer::start(ServerOptions::default());
    let mut env = server.env();
    env.push(named(CHILD, &server.url()));
    run_child("child_writes", &env);
    assert_eq!(server.object("from-the-child").unwrap(), b"x");
    // Without a region, and with the variable that is for S3 alone.
    server.tamper("from-the-child", None);
    env.retain(|(name, _)| name != "AWS_REGION" && name != "AWS_ENDPOINT_URL");
    env.push(named("AWS_ENDPOINT_URL_S3", &server.endpoint()));
    run_child("child_writes", &env);
    assert!(server.object("from-the-child").is_some());
}

#[test]
fn no_credentials_are_an_error_of_their_own() {
    let server = TestServer::start(ServerOptions::default());
    let env = [
        named(CHILD, &server.url()),
        named("AWS_ENDPOINT_URL", &server.endpoint()),
    ];
    run_child("child_has_no_credentials", &env);
    assert_eq!(server.counts().total(), 0);
}

#[test]
fn no_region_is_said_before_any_request() {
    let env = [
        named(CHILD, "s3://casmount-test"),
        named("AWS_ACCESS_KEY_ID", "a"),
        named("AWS_SECRET_ACCESS_KEY", "b"),
    ];
    run_child("child_has_no_region", &env);
}

fn child_url() -> casmount::tier::url::StoreUrl {
    let url = std::env::var(CHILD).expect("this case runs as the child of another test");
    url.parse().unwrap()
}

#[tokio::test]
#[ignore = "the child of another test"]
async fn child_writes() {
    let bucket = connect(&child_url(), &ConnectOptions::default()).await.unwrap();
    bucket.put_new("from-the-child", Body::raw("x")).await.unwrap();
}

#[tokio::test]
#[ignore = "the child of another test"]
async fn child_has_no_credentials() {
    let error = connect(&child_url(), &ConnectOptions::default())
        .await
        .unwrap_err();
    assert!(matches!(error, TierError::Credentials { .. }), "{error:?}");
}

#[tokio::test]
#[ignore = "the child of another test"]
async fn child_has_no_region() {
    let error = connect(&child_url(), &ConnectOptions::default())
        .await
        .unwrap_err();
    assert!(matches!(error, TierError::Unsupported { .. }), "{error:?}");
    assert!(error.to_string().contains("AWS_REGION"), "{error}");
}
