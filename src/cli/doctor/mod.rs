//! `casmount doctor`: what would stop a mount here, and how to mend it.
//!
//! Each check gathers facts and judges them in a pure function, so that
//! what it says of a machine can be tested on any other. Nothing is changed,
//! but for probe objects in the store, which are removed again.

pub mod bucket;
pub mod cache;
pub mod finding;
pub mod kernel;
pub mod mounts;

use clap::Args;
use serde::Serialize;

use super::{
    args::{self, StoreArgs},
    failure::Failure,
    output,
};
use crate::config::Dirs;
use finding::{Finding, Severity};

/// Look for what would stop a mount here, or make it slow or unsafe, and say how to mend it.
///
/// Exit code 1 when anything would stop a mount. Changes nothing; probe objects in the store are removed again.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  casmount doctor
  casmount doctor --store s3://my-bucket/ci --cache-dir /var/cache/ci
  casmount doctor --json | jq '.findings[] | select(.severity != \"ok\")'")]
pub struct DoctorArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The JSON of `casmount doctor`.
#[derive(Debug, Serialize)]
struct Diagnosis {
    store: String,
    volume: String,
    cache_dir: String,
    worst: Severity,
    findings: Vec<Finding>,
}

pub fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let dirs = Dirs::of_this_process();
    let settings = args::settings(args.store.layer(), args.store.bucket.config.as_deref(), &dirs)?;
    crate::daemon::bucket::parse_url(&settings.store)?;
    let mut findings = kernel::check(&settings);
    findings.extend(mounts::check());
    let (bucket_findings, store_id) = bucket::check(&settings);
    findings.extend(cache::check(&settings, store_id));
    findings.extend(bucket_findings);
    let worst = findings
        .iter()
        .map(|finding| finding.severity)
        .max()
        .unwrap_or(Severity::Ok);
    let diagnosis = Diagnosis {
        store: settings.store,
        volume: settings.volume.to_string(),
        cache_dir: settings.cache_dir.display().to_string(),
        worst,
        findings,
    };
    if args.json {
        output::print_json(&diagnosis)?;
    } else {
        output::print(&finding::text(&diagnosis.findings))?;
    }
    if worst == Severity::Fail {
        return Err(Failure::said(1));
    }
    Ok(())
}
