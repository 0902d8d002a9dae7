//! The store: can it be reached, does it permit and do what is needed, what time is it there?

use std::{path::Path, time::Duration};

use super::finding::Finding;
use crate::{
    base::id::StoreId,
    config::Settings,
    daemon::{
        bucket,
        error::{StartError, chain, in_words},
        start::CLOCK_TOLERANCE_MILLIS,
    },
    tier::{
        SharedBucket, TierError,
        probe::{self, ProbeReport},
    },
};

/// An S3 client tries a few times by itself within this.
const WITHIN: Duration = Duration::from_secs(30);

/// Returns also the store's id, if it has one already.
pub fn check(settings: &Settings) -> (Vec<Finding>, Option<StoreId>) {
    if let Some(dir) = settings.store.strip_prefix("file://").map(Path::new)
        && !dir.exists()
    {
        // Looking closer would make it.
        let what = format!("the store {} will be made by the first mount", settings.store);
        return (vec![Finding::ok("store", what)], None);
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(err) => {
            let what = format!("cannot start the threads that ask the store: {err}");
            return (vec![Finding::fail("store", what, "see ulimit -u and -n")], None);
        }
    };
    runtime.block_on(async {
        tokio::time::timeout(WITHIN, ask(settings))
            .await
            .unwrap_or_else(|_| {
                let what = format!(
                    "the store {} does not answer within {} s",
                    settings.store,
                    WITHIN.as_secs()
                );
                (
                    vec![Finding::fail(
                        "store",
                        what,
                        "check the network and --endpoint-url",
                    )],
                    None,
                )
            })
    })
}

async fn ask(settings: &Settings) -> (Vec<Finding>, Option<StoreId>) {
    let bucket = match bucket::connect(settings).await {
        Ok(bucket) => bucket,
        Err(StartError::Bucket { source, .. }) => return (vec![failure(&settings.store, &source)], None),
        Err(err) => {
            let what = chain(&err);
            return (vec![Finding::fail("store", what, "correct the settings")], None);
        }
    };
    let facts = match probe::read_store(&bucket).await {
        Ok(facts) => facts,
        Err(err) => return (vec![failure(&settings.store, &err)], None),
    };
    let mut findings = vec![match &facts {
        Some(facts) => Finding::ok(
            "store",
            format!(
                "the store {} answers (id {}, format {})",
                settings.store, facts.id, facts.format
            ),
        ),
        None => Finding::ok(
            "store",
            format!("the store {} answers and was never used", settings.store),
        ),
    }];
    findings.extend(probe_store(settings, &bucket).await);
    (findings, facts.map(|facts| facts.id))
}

async fn probe_store(settings: &Settings, bucket: &SharedBucket) -> Vec<Finding> {
    match probe::probe(bucket).await {
        Ok(report) => vec![
            judge_conditions(&settings.store, &report),
            judge_clock(bucket.clock().offset_millis()),
        ],
        // A read-only mount does not need to write.
        Err(err @ TierError::Denied { .. }) if settings.read_only => vec![Finding::ok(
            "store-writes",
            format!("read-only, as the settings want it: {}", chain(&err)),
        )],
        Err(err) => vec![failure(&settings.store, &err)],
    }
}

fn judge_conditions(store: &str, report: &ProbeReport) -> Finding {
    const CHECK: &str = "store-conditions";
    let missing = match (report.conditional_create, report.conditional_replace) {
        (true, true) => return Finding::ok(CHECK, "conditional writes are honoured"),
        (false, true) => "If-None-Match",
        (true, false) => "If-Match",
        (false, false) => "If-None-Match and If-Match",
    };
    Finding::warn(
        CHECK,
        format!("the server of {store} ignores {missing}"),
        "blobs and changes are safe; what needs one winner among machines is off. Use AWS S3 or another server",
    )
}

fn judge_clock(offset_millis: i64) -> Finding {
    const CHECK: &str = "clock";
    if offset_millis.unsigned_abs() > CLOCK_TOLERANCE_MILLIS {
        Finding::warn(
            CHECK,
            format!(
                "this machine's clock is {:.1} s from the store's",
                -offset_millis as f64 / 1000.0
            ),
            "set it, for example with chrony or systemd-timesyncd; requests to S3 fail from 15 minutes on",
        )
    } else {
        Finding::ok(CHECK, "this machine's clock agrees with the store's")
    }
}

fn failure(store: &str, err: &TierError) -> Finding {
    let (check, mend) = match err {
        TierError::Unavailable { .. } => ("store", "check the network, --endpoint-url and --region"),
        TierError::Denied { .. } => ("store-permissions", "grant it, as the policy in the README does"),
        TierError::NoBucket { .. } => (
            "store",
            "create it, or correct --store, --region or --endpoint-url",
        ),
        TierError::Credentials { .. } => (
            "store-credentials",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role",
        ),
        TierError::Malformed { .. } => ("store-format", "see whether something else writes to this store"),
        TierError::Unsupported { .. } => ("store-format", "use a newer casmount, or another store"),
    };
    // The words end with the same advice; the cause tells more.
    let words = in_words(store, err);
    let what = words.split("; ").next().unwrap_or(&words);
    let cause = std::error::Error::source(err).map(|source| format!(": {}", chain(source)));
    Finding::fail(check, format!("{what}{}", cause.unwrap_or_default()), mend)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Severity;

    #[test]
    fn a_clock_within_two_seconds_is_right() {
        assert_eq!(judge_clock(-2000).severity, Severity::Ok);
        let slow = judge_clock(3600_500);
        assert_eq!(slow.severity, Severity::Warn);
        assert!(slow.what.contains("-3600.5 s"), "{}", slow.what);
    }

    #[test]
    fn a_server_without_conditional_writes_is_named() {
        let report = |conditional_create, conditional_replace| ProbeReport {
            conditional_create,
            conditional_replace,
            clock_offset_millis: 0,
        };
        assert_eq!(
            judge_conditions("s3://b", &report(true, true)).severity,
            Severity::Ok
        );
        let garage = judge_conditions("s3://b", &report(false, true));
        assert_eq!(garage.severity, Severity::Warn);
        assert!(garage.what.contains("If-None-Match"));
    }

    #[test]
    fn a_missing_permission_is_named_with_what_to_do() {
        let denied = TierError::Denied {
            permission: "s3:ListBucket",
            key: "casmount.json".into(),
            source: "403 AccessDenied".into(),
        };
        let finding = failure("s3://b", &denied);
        assert_eq!(
            (finding.check, finding.severity),
            ("store-permissions", Severity::Fail)
        );
        assert!(
            finding.what.contains("s3:ListBucket") && finding.what.contains("403"),
            "{}",
            finding.what
        );
    }

    #[test]
    fn a_directory_that_is_not_there_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("store");
        let mut layer = crate::config::Layer::default();
        layer
            .set("store", &format!("file://{}", store.display()))
            .unwrap();
        layer.set("cache-dir", "/c").unwrap();
        let settings = Settings::resolve(layer, &crate::config::Dirs::default(), 0).unwrap();
        let (findings, id) = check(&settings);
        assert_eq!((findings[0].severity, id), (Severity::Ok, None));
        assert!(!store.exists());
    }
}
