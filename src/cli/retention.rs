//! `casmount sweep --retention`: whether sweeps or a lifecycle rule of the bucket delete what nobody uses.

use std::{str::FromStr, time::Duration};

use serde_json::json;

use crate::{
    base::units,
    config::Settings,
    tier::{
        layout,
        url::{StoreUrl, StoreUrlError},
    },
};

const DAY_SECS: u64 = 24 * 3600;

/// Who deletes what nobody uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retention {
    Sweep,
    /// A lifecycle rule, blobs and packs that were written so long ago.
    Lifecycle(Duration),
}

impl Retention {
    pub fn lifetime(self) -> Option<Duration> {
        match self {
            Self::Sweep => None,
            Self::Lifecycle(lifetime) => Some(lifetime),
        }
    }
}

impl FromStr for Retention {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "sweep" {
            return Ok(Self::Sweep);
        }
        let lifetime = text
            .strip_prefix("lifecycle=")
            .ok_or("it is `sweep`, or `lifecycle=` and a duration, lifecycle=30d for example")?;
        let lifetime = units::parse_duration(lifetime).map_err(|err| err.to_string())?;
        if lifetime.is_zero() {
            return Err("nothing lives for no time at all".to_owned());
        }
        Ok(Self::Lifecycle(lifetime))
    }
}

/// What was set, and what is to be done now.
pub fn text(settings: &Settings, retention: Retention) -> String {
    let store = &settings.store;
    let Retention::Lifecycle(lifetime) = retention else {
        return format!(
            "{store} is kept by sweeps; the lifecycle rule of the bucket must be gone already, or it goes on deleting\n"
        );
    };
    let mut lines = vec![format!(
        "{store} is kept by a lifecycle rule: mounts that begin now keep young what they use, no sweep is needed"
    )];
    let url: Result<StoreUrl, StoreUrlError> = store.parse();
    match url {
        Ok(StoreUrl::S3 { bucket, prefix }) => {
            let below = if prefix.is_empty() { prefix } else { prefix + "/" };
            let rule = serde_json::to_string_pretty(&rule(&below, lifetime));
            lines.push("the rule, to be saved as rule.json; put other rules of the bucket into it, it replaces them:".to_owned());
            lines.push(rule.expect("no member can fail to be written"));
            lines.push(format!(
                "aws s3api put-bucket-lifecycle-configuration --bucket {bucket} --lifecycle-configuration file://rule.json"
            ));
        }
        Ok(StoreUrl::Dir { path }) => {
            let (days, path) = (days(lifetime), path.display());
            lines.push("to be run once a day:".to_owned());
            lines.push(format!(
                "find {path}/blobs {path}/packs -type f -mtime +{days} -delete"
            ));
        }
        // It was opened just now.
        Err(_) => {}
    }
    lines.join("\n") + "\n"
}

/// Rules count whole days; one more is safe, one less is not.
fn days(lifetime: Duration) -> u64 {
    lifetime.as_secs().div_ceil(DAY_SECS)
}

fn rule(prefix: &str, lifetime: Duration) -> serde_json::Value {
    let rule = |folder: &str| {
        json!({
            "ID": format!("casmount {prefix}{folder}"),
            "Status": "Enabled",
            "Filter": { "Prefix": format!("{prefix}{folder}") },
            "Expiration": { "Days": days(lifetime) },
        })
    };
    json!({ "Rules": [rule(layout::BLOBS_PREFIX), rule(layout::PACKS_PREFIX)] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retention_is_read_from_its_words() {
        let month = Duration::from_secs(30 * DAY_SECS);
        assert_eq!("lifecycle=30d".parse(), Ok(Retention::Lifecycle(month)));
        assert_eq!("sweep".parse(), Ok(Retention::Sweep));
        for wrong in ["", "lifecycle", "lifecycle=", "lifecycle=0s", "30d"] {
            assert!(wrong.parse::<Retention>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_rule_means_blobs_and_packs_alone() {
        let rule = rule("ci/", Duration::from_secs(30 * DAY_SECS - 1));
        let prefixes: Vec<_> = rule["Rules"]
            .as_array()
            .unwrap()
            .iter()
            .map(|rule| &rule["Filter"]["Prefix"])
            .collect();
        assert_eq!(prefixes, ["ci/blobs/", "ci/packs/"]);
        assert_eq!(rule["Rules"][0]["Expiration"]["Days"], 30);
    }
}
