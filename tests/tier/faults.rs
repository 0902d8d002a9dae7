//! What a server in trouble, or a wrong setting, looks like to a caller.

use std::time::{Duration, Instant};

use casmount::tier::{
    Body, Put, TierError,
    url::{AccessKey, ConnectOptions, connect},
};

use super::{
    Fixture, connect_to, options_for,
    s3server::{Faults, ServerOptions, TestServer},
};

const MAX: u64 = 4 << 20;

fn always(set: impl FnOnce(&mut Faults)) -> Faults {
    let mut faults = Faults::default();
    set(&mut faults);
    faults
}

#[tokio::test]
async fn trouble_of_the_server_is_transient_for_every_request() {
    let fixture = Fixture::s3().await;
    let bucket = &fixture.bucket;
    bucket
        .put_new("there", Body::raw(vec![1; 100_000]))
        .await
        .unwrap();
    for faults in [
        always(|faults| faults.error_500 = 1.0),
        always(|faults| faults.slow_down = 1.0),
        always(|faults| faults.reset = 1.0),
        always(|faults| faults.down = true),
    ] {
        fixture.server().set_faults(faults.clone());
        let errors = [
            bucket.get("there", None, MAX).await.err(),
            bucket.get("there", Some(0..50_000), MAX).await.err(),
            bucket.head("there").await.err(),
            bucket.put_new("new", Body::raw("x")).await.err(),
            bucket.list("", None).await.err(),
            bucket.delete("there").await.err(),
        ];
        for (request, error) in errors.into_iter().enumerate() {
            let error = error.unwrap_or_else(|| panic!("request {request} succeeded with {faults:?}"));
            assert!(error.is_transient(), "request {request}: {error:?}");
        }
    }
    fixture.server().set_faults(Faults::default());
    let read = bucket.get("there", None, MAX).await.unwrap().unwrap();
    assert_eq!(read.bytes.len(), 100_000);
}

#[tokio::test]
async fn a_stalled_reply_ends_in_time() {
    let fixture = Fixture::s3().await;
    let mut options = options_for(fixture.server());
    options.request_timeout = Duration::from_millis(300);
    let bucket = connect(&fixture.bucket.url().parse().unwrap(), &options)
        .await
        .unwrap();
    bucket
        .put_new("there", Body::raw(vec![1; 100_000]))
        .await
        .unwrap();
    fixture.server().set_faults(always(|faults| faults.stall = 1.0));
    let start = Instant::now();
    for error in [
        bucket.get("there", None, MAX).await.unwrap_err(),
        bucket.put_new("new", Body::raw("x")).await.unwrap_err(),
    ] {
        assert!(error.is_transient(), "{error:?}");
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_single_failure_is_mended_by_the_second_attempt() {
    let fixture = Fixture::s3().await;
    fixture.server().set_faults(always(|faults| {
        faults.error_500 = 0.5;
        faults.seed = 3;
    }));
    let before = fixture.server().counts().total();
    let mut failures = 0;
    for n in 0..10 {
        let put = fixture.bucket.put_new(&format!("k{n}"), Body::raw("x")).await;
        failures += u64::from(put.is_err());
    }
    let counts = fixture.server().counts();
    assert!(counts.total() - before > 10, "no attempt was repeated");
    assert!(counts.total() - before <= 20, "more than two attempts");
    assert!(failures < counts.faults, "no second attempt helped");
}

#[tokio::test]
async fn conflicting_writes_are_repeated_and_then_given_up() {
    let fixture = Fixture::s3().await;
    fixture
        .server()
        .set_faults(always(|faults| faults.conflict = 1.0));
    let error = fixture.bucket.put_new("a", Body::raw("x")).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    let asked = fixture.server().counts().of("PutObject");
    assert!((2..=10).contains(&asked), "{asked} attempts");
    // Some of them conflict, none of them fails.
    fixture.server().set_faults(always(|faults| {
        faults.conflict = 0.4;
        faults.seed = 1;
    }));
    for n in 0..5 {
        let put = fixture
            .bucket
            .put_new(&format!("k{n}"), Body::raw("x"))
            .await
            .unwrap();
        assert!(matches!(put, Put::Written(_)));
    }
}

#[tokio::test]
async fn a_write_whose_reply_was_lost_is_there() {
    let fixture = Fixture::s3().await;
    fixture
        .server()
        .set_faults(always(|faults| faults.lost_reply = 1.0));
    let put = fixture.bucket.put_new("a", Body::raw("x")).await;
    // The second attempt met the first one's object, or its reply was lost as well.
    match put {
        Ok(Put::Refused) => {}
        Ok(Put::Written(_)) => panic!("no reply came"),
        Err(error) => assert!(error.is_transient(), "{error:?}"),
    }
    assert_eq!(fixture.server().object("team/ci/a").unwrap(), b"x");
}

#[tokio::test]
async fn missing_permissions_are_named() {
    let fixture = Fixture::s3().await;
    let bucket = &fixture.bucket;
    bucket.put_new("a", Body::raw("x")).await.unwrap();
    let all = [
        "GetObject",
        "HeadObject",
        "PutObject",
        "ListObjectsV2",
        "DeleteObject",
    ];
    fixture.server().set_faults(always(|faults| {
        faults.forbidden = all.map(str::to_owned).into();
    }));
    for (error, expected) in [
        (bucket.get("a", None, MAX).await.unwrap_err(), "s3:GetObject"),
        (bucket.head("a").await.unwrap_err(), "s3:GetObject"),
        (
            bucket.put_new("b", Body::raw("x")).await.unwrap_err(),
            "s3:PutObject",
        ),
        (bucket.list("", None).await.unwrap_err(), "s3:ListBucket"),
        (bucket.delete("a").await.unwrap_err(), "s3:DeleteObject"),
    ] {
        assert!(matches!(error, TierError::Denied { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert!(fixture.server().object("team/ci/a").is_some());
}

#[tokio::test]
async fn a_bucket_that_does_not_exist_is_named() {
    let server = TestServer::start(ServerOptions::default());
    let bucket = connect_to(&server, "s3://no-such-bucket").await.unwrap();
    for error in [
        bucket.get("a", None, MAX).await.unwrap_err(),
        bucket.put_new("a", Body::raw("x")).await.unwrap_err(),
        bucket.list("", None).await.unwrap_err(),
        bucket.delete("a").await.unwrap_err(),
    ] {
        assert!(
            matches!(&error, TierError::NoBucket { bucket } if bucket == "no-such-bucket"),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn wrong_credentials_are_told_from_missing_permissions() {
    let server = TestServer::start(ServerOptions::default());
    for (id, secret) in [
        (server.access_key(), "another secret"),
        ("another-id", server.secret_key()),
    ] {
        let mut options = options_for(&server);
        options.access_key = Some(AccessKey {
            id: id.to_owned(),
            secret: secret.to_owned(),
        });
        let bucket = connect(&server.url().parse().unwrap(), &options).await.unwrap();
        let error = bucket.get("a", None, MAX).await.unwrap_err();
        assert!(matches!(error, TierError::Credentials { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn nobody_listens_is_transient() {
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind(("127.0.0.1", 0))
        .and_then(|listener| listener.local_addr())
        .unwrap()
        .port();
    let options = ConnectOptions {
        endpoint_url: Some(format!("http://127.0.0.1:{port}")),
        access_key: Some(AccessKey {
            id: "a".to_owned(),
            secret: "b".to_owned(),
        }),
        ..ConnectOptions::default()
    };
    let bucket = connect(&"s3://b".parse().unwrap(), &options).await.unwrap();
    let error = bucket.get("a", None, MAX).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
}

#[tokio::test]
async fn the_clock_of_the_server_is_learned_from_errors_too() {
    for faults in [
        always(|faults| faults.date_skew_secs = 3600),
        always(|faults| {
            faults.date_skew_secs = 3600;
            faults.error_500 = 1.0;
        }),
    ] {
        let fixture = Fixture::s3().await;
        assert_eq!(fixture.bucket.clock().offset_millis(), 0);
        fixture.server().set_faults(faults);
        // Some answer, whichever.
        let _ = fixture.bucket.head("a").await;
        let offset = fixture.bucket.clock().offset_millis();
        assert!((3_590_000..=3_601_000).contains(&offset), "{offset}");
    }
}

#[tokio::test]
async fn wrong_bytes_are_handed_on_for_the_caller_to_find() {
    let fixture = Fixture::s3().await;
    fixture
        .bucket
        .put_new("a", Body::raw(vec![0; 1000]))
        .await
        .unwrap();
    fixture
        .server()
        .set_faults(always(|faults| faults.wrong_bytes = 1.0));
    let read = fixture.bucket.get("a", None, MAX).await.unwrap().unwrap();
    assert_eq!(read.bytes.iter().filter(|&&byte| byte != 0).count(), 1);
}

#[tokio::test]
async fn bytes_that_were_damaged_on_the_way_are_refused_by_the_server() {
    let fixture = Fixture::s3().await;
    let mut body = Body::raw("what the digest names");
    body.bytes = "what arrives instead!".into();
    let error = fixture.bucket.put_new("a", body).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    assert!(fixture.server().objects().is_empty());
}

#[tokio::test]
async fn a_range_is_cut_out_of_a_whole_answer_unless_that_is_large() {
    let fixture = Fixture::s3().await;
    fixture
        .bucket
        .put_new("a", Body::raw("0123456789"))
        .await
        .unwrap();
    let large = Body::raw(vec![7; 9 << 20]);
    fixture.bucket.put_new("large", large).await.unwrap();
    fixture
        .server()
        .set_faults(always(|faults| faults.ignore_ranges = true));
    for (range, bytes) in [(2..4, "23"), (0..10, "0123456789"), (8..20, "89"), (20..30, "")] {
        let part = fixture.bucket.get("a", Some(range), MAX).await.unwrap();
        assert_eq!(part.unwrap().bytes, bytes);
    }
    let error = fixture.bucket.get("large", Some(2..4), MAX).await.unwrap_err();
    assert!(matches!(error, TierError::Unsupported { .. }), "{error:?}");
}
