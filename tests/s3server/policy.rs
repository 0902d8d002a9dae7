//! Decides by an IAM policy whether a request is permitted, as far as policies of stores go.
//!
//! Statements with `Effect`, `Action` and `Resource`, each one text or a list, with `*` for any text. What no
//! statement allows is denied, and a `Deny` beats every `Allow`.

use serde::Deserialize;

/// One or many.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Texts {
    One(String),
    Many(Vec<String>),
}

impl Texts {
    fn any_matches(&self, text: &str) -> bool {
        match self {
            Self::One(pattern) => matches(pattern, text),
            Self::Many(patterns) => patterns.iter().any(|pattern| matches(pattern, text)),
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct Statement {
    #[allow(dead_code, reason = "for people")]
    sid: Option<String>,
    effect: String,
    action: Texts,
    resource: Texts,
}

/// A policy as it stands in a file.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
pub struct Policy {
    #[allow(dead_code, reason = "for people")]
    version: String,
    statement: Vec<Statement>,
}

impl Policy {
    /// Reads a policy; one that is not understood would be no test.
    pub fn parse(json: &str) -> Self {
        let policy: Self = serde_json::from_str(json).unwrap_or_else(|err| panic!("not a policy: {err}"));
        for statement in &policy.statement {
            assert!(
                matches!(statement.effect.as_str(), "Allow" | "Deny"),
                "{statement:?}"
            );
        }
        policy
    }

    /// Whether it permits `operation` (of S3) on a key, or on the bucket.
    pub fn permits(&self, operation: &str, bucket: &str, key: Option<&str>) -> bool {
        let action = match operation {
            "GetObject" | "HeadObject" => "s3:GetObject",
            // Of what may be written, all may be read.
            "PutObject" | "CopyObject" => "s3:PutObject",
            "DeleteObject" | "DeleteObjects" => "s3:DeleteObject",
            "ListObjectsV2" | "HeadBucket" => "s3:ListBucket",
            _ => return false,
        };
        let resource = match key {
            Some(key) => format!("arn:aws:s3:::{bucket}/{key}"),
            // Its keys are in the body: who may not delete all may not delete many.
            None if operation == "DeleteObjects" => format!("arn:aws:s3:::{bucket}/*"),
            None => format!("arn:aws:s3:::{bucket}"),
        };
        let applies = |effect: &str| {
            self.statement.iter().any(|statement| {
                statement.effect == effect
                    && statement.action.any_matches(action)
                    && statement.resource.any_matches(&resource)
            })
        };
        applies("Allow") && !applies("Deny")
    }
}

/// Whether `text` is `pattern` with some text for each `*`.
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((start, rest)) => text.strip_prefix(start).is_some_and(|behind| {
            (0..=behind.len())
                .filter(|at| behind.is_char_boundary(*at))
                .any(|at| matches(rest, &behind[at..]))
        }),
    }
}
