//! The store: can it be reached, does it permit and do what is needed, what time is it there?

use std::{path::Path, time::Duration};

use super::finding::Finding;
use crate::{
    base::id::{MachineId, StoreId},
    config::Settings,
    daemon::{
        bucket,
        error::{StartError, advice, chain, what_happened},
        start::CLOCK_TOLERANCE_MILLIS,
    },
    namespace::stack,
    tier::{
        SharedBucket, TierError, layout,
        probe::{self, ProbeMode, ProbeReport, StoreJson},
    },
};

/// An S3 client tries a few times by itself within this.
const WITHIN: Duration = Duration::from_secs(30);
/// `casmount.json` is far below this.
const MAX_STORE_BYTES: u64 = 64 << 10;

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
    let store = &settings.store;
    let bucket = match bucket::connect(settings).await {
        Ok(bucket) => bucket,
        Err(StartError::Bucket { cause, .. }) => return (vec![failure(store, &cause)], None),
        Err(err) => {
            return (
                vec![Finding::fail("store", chain(&err), "correct the settings")],
                None,
            );
        }
    };
    // Where a mount of the volume would write; when that cannot be known, the rest says why.
    let bucket = match stack::read(bucket.as_ref(), &settings.volume).await {
        Ok(stack) => bucket::of_stack(&bucket, &stack),
        Err(_) => bucket,
    };
    // What is permitted comes first: it explains why the rest may fail.
    let mode = if settings.read_only {
        ProbeMode::ReadOnly
    } else {
        ProbeMode::ReadWrite
    };
    let report = match probe::probe(bucket.as_ref(), MachineId::random(), mode).await {
        Ok(report) => report,
        Err(err) => return (vec![failure(store, &err)], None),
    };
    let mut findings = judge_permissions(store, &report);
    findings.extend(judge_conditions(store, &report));
    findings.push(judge_clock(report.clock_offset_millis));
    if !report.missing_is_404 {
        // A store that is not there could not be told from one that may not be read.
        return (findings, None);
    }
    match read_store(&bucket).await {
        Ok(Some(found)) => {
            let what = format!(
                "the store {store} answers (id {}, format {})",
                found.store, found.format
            );
            findings.push(Finding::ok("store", what));
            (findings, Some(found.store))
        }
        Ok(None) => {
            findings.push(Finding::ok(
                "store",
                format!("the store {store} answers and was never used"),
            ));
            (findings, None)
        }
        Err(err) => {
            findings.push(failure(store, &err));
            (findings, None)
        }
    }
}

/// Reads who the store is, and makes nothing.
async fn read_store(bucket: &SharedBucket) -> Result<Option<StoreJson>, TierError> {
    let object = bucket.get(layout::STORE, None, MAX_STORE_BYTES).await?;
    object
        .map(|object| StoreJson::decode(&object.bytes, &bucket.url()))
        .transpose()
}

fn judge_permissions(store: &str, report: &ProbeReport) -> Vec<Finding> {
    const CHECK: &str = "store-permissions";
    const MEND: &str = "grant it, as the policy in the README does";
    let mut findings = Vec::new();
    if !report.missing_is_404 {
        let what = format!("{store} answers 403 for a missing key, because s3:ListBucket is not permitted");
        findings.push(Finding::fail(CHECK, what, MEND));
    } else if !report.can_list {
        findings.push(Finding::fail(
            CHECK,
            format!("s3:ListBucket is not permitted in {store}"),
            MEND,
        ));
    }
    if report.can_write == Some(false) {
        let what = format!("s3:PutObject is not permitted in {store}");
        let mend = "grant it, as the policy in the README does, or mount with --read-only";
        findings.push(Finding::fail(CHECK, what, mend));
    }
    if report.can_delete == Some(false) {
        let what = format!("s3:DeleteObject is not permitted in {store}, so nothing can be cleaned up there");
        findings.push(Finding::warn(CHECK, what, MEND));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(
            CHECK,
            format!("everything needed is permitted in {store}"),
        ));
    }
    findings
}

fn judge_conditions(store: &str, report: &ProbeReport) -> Option<Finding> {
    const CHECK: &str = "store-conditions";
    let ignored = match (report.conditional_create?, report.conditional_replace?) {
        (true, true) => return Some(Finding::ok(CHECK, "conditional writes are honoured")),
        (false, true) => "If-None-Match",
        (true, false) => "If-Match",
        (false, false) => "If-None-Match and If-Match",
    };
    Some(Finding::warn(
        CHECK,
        format!("the server of {store} ignores {ignored}"),
        "blobs and changes are safe; what needs one winner among machines is off. Use AWS S3 or another server",
    ))
}

fn judge_clock(offset_millis: i64) -> Finding {
    const CHECK: &str = "clock";
    if offset_millis.unsigned_abs() > CLOCK_TOLERANCE_MILLIS {
        Finding::warn(
            CHECK,
            format!(
                "this machine's clock is {:.1} s {} the store's",
                offset_millis.unsigned_abs() as f64 / 1000.0,
                if offset_millis > 0 { "behind" } else { "ahead of" }
            ),
            "set it, for example with chrony or systemd-timesyncd; requests to S3 fail from 15 minutes on",
        )
    } else {
        Finding::ok(CHECK, "this machine's clock agrees with the store's")
    }
}

fn failure(store: &str, err: &TierError) -> Finding {
    let check = match err {
        TierError::Unavailable { .. } | TierError::NoBucket { .. } => "store",
        TierError::Denied { .. } => "store-permissions",
        TierError::Credentials { .. } => "store-credentials",
        TierError::Malformed { .. } | TierError::Unsupported { .. } => "store-format",
    };
    Finding::fail(check, what_happened(store, err), advice(store, err))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Severity;

    #[test]
    fn a_clock_within_two_seconds_is_right() {
        assert_eq!(judge_clock(-2000).severity, Severity::Ok);
        let slow = judge_clock(3_600_500);
        assert_eq!(slow.severity, Severity::Warn);
        assert!(slow.what.contains("3600.5 s behind"), "{}", slow.what);
    }

    fn report() -> ProbeReport {
        ProbeReport {
            url: "s3://b".into(),
            missing_is_404: true,
            can_list: true,
            can_write: Some(true),
            can_delete: Some(true),
            conditional_create: Some(true),
            conditional_replace: Some(true),
            clock_offset_millis: 0,
        }
    }

    #[test]
    fn a_server_without_conditional_writes_is_named() {
        let judged = |create, replace| {
            let report = ProbeReport {
                conditional_create: create,
                conditional_replace: replace,
                ..report()
            };
            judge_conditions("s3://b", &report)
        };
        assert_eq!(judged(Some(true), Some(true)).unwrap().severity, Severity::Ok);
        let garage = judged(Some(false), Some(true)).unwrap();
        assert_eq!(garage.severity, Severity::Warn);
        assert!(garage.what.contains("If-None-Match"));
        // A probe that only reads does not know.
        assert_eq!(judged(None, None), None);
    }

    #[test]
    fn each_missing_permission_is_named() {
        let judged = |report: &ProbeReport| judge_permissions("s3://b", report).remove(0);
        assert_eq!(judged(&report()).severity, Severity::Ok);
        for (report, severity, word) in [
            (
                ProbeReport {
                    missing_is_404: false,
                    ..report()
                },
                Severity::Fail,
                "403 for a missing key",
            ),
            (
                ProbeReport {
                    can_list: false,
                    ..report()
                },
                Severity::Fail,
                "s3:ListBucket",
            ),
            (
                ProbeReport {
                    can_write: Some(false),
                    ..report()
                },
                Severity::Fail,
                "s3:PutObject",
            ),
            (
                ProbeReport {
                    can_delete: Some(false),
                    ..report()
                },
                Severity::Warn,
                "s3:DeleteObject",
            ),
        ] {
            let finding = judged(&report);
            assert_eq!(finding.severity, severity, "{word}");
            assert!(finding.what.contains(word), "{}", finding.what);
        }
        assert_eq!(
            judged(&ProbeReport {
                can_write: None,
                ..report()
            })
            .severity,
            Severity::Ok
        );
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
