//! How users name a store, and how a name becomes a bucket.
//!
//! ```text
//! s3://bucket[/prefix]      a bucket of S3 or of a server that speaks it
//! file:///directory         a directory, also on a network file system
//! ```
//!
//! Nothing is percent-decoded: what stands behind the scheme is the name.

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{SharedBucket, TierError, dir::DirBucket, s3::S3Bucket};

/// The name of a store.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StoreUrl {
    /// Objects of `bucket` below `prefix`, which is empty or has no slash at either end.
    S3 { bucket: String, prefix: String },
    /// Files below an absolute `path`.
    Dir { path: PathBuf },
}

/// A text does not name a store.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StoreUrlError {
    #[error("{text:?} does not name a store (s3://bucket/prefix or file:///directory)")]
    Scheme { text: String },
    #[error("{text:?} does not name a bucket (s3://bucket/prefix)")]
    Bucket { text: String },
    #[error("the prefix in {text:?} has an empty, \".\" or \"..\" part")]
    Prefix { text: String },
    #[error("the directory in {text:?} is not absolute (file:///directory, with three slashes)")]
    RelativeDir { text: String },
}

impl FromStr for StoreUrl {
    type Err = StoreUrlError;

    fn from_str(text: &str) -> Result<Self, StoreUrlError> {
        let named = || text.to_owned();
        if let Some(rest) = text.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
            if bucket.is_empty() || !bucket.chars().all(plain) {
                return Err(StoreUrlError::Bucket { text: named() });
            }
            let prefix = prefix.trim_end_matches('/');
            let bad = |part: &str| matches!(part, "" | "." | "..");
            if !prefix.is_empty() && prefix.split('/').any(bad) {
                return Err(StoreUrlError::Prefix { text: named() });
            }
            return Ok(Self::S3 {
                bucket: bucket.to_owned(),
                prefix: prefix.to_owned(),
            });
        }
        if let Some(path) = text.strip_prefix("file://") {
            if !path.starts_with('/') {
                return Err(StoreUrlError::RelativeDir { text: named() });
            }
            let trimmed = path.trim_end_matches('/');
            let path = PathBuf::from(if trimmed.is_empty() { "/" } else { trimmed });
            return Ok(Self::Dir { path });
        }
        Err(StoreUrlError::Scheme { text: named() })
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
            Self::Dir { path } => write!(f, "file://{}", path.display()),
        }
    }
}

impl Serialize for StoreUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for StoreUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// A key pair given in place of the usual chain.
#[derive(Clone)]
pub struct AccessKey {
    pub id: String,
    pub secret: String,
}

impl fmt::Debug for AccessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessKey")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// How to reach a store; all of it is about S3.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// A server other than AWS; `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL` and the profile are asked without it.
    pub endpoint_url: Option<String>,
    /// Without it the SDK's usual chain is asked.
    pub region: Option<String>,
    /// Without it the SDK's usual chain is asked.
    pub access_key: Option<AccessKey>,
    /// How long one attempt may take, the body of the reply included.
    pub request_timeout: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            endpoint_url: None,
            region: None,
            access_key: None,
            request_timeout: Duration::from_secs(20),
        }
    }
}

/// Prepares a bucket for use, on the runtime that will use it.
///
/// Looks for credentials, but does not speak to S3 yet; of a directory it
/// learns the time, if it may write there. Never creates anything that stays.
///
/// # Errors
///
/// [`TierError::Credentials`] when there are none, and [`TierError::Unsupported`]
/// when no region is known.
pub async fn connect(url: &StoreUrl, options: &ConnectOptions) -> Result<SharedBucket, TierError> {
    match url {
        StoreUrl::S3 { bucket, prefix } => Ok(Arc::new(S3Bucket::connect(bucket, prefix, options).await?)),
        StoreUrl::Dir { path } => Ok(Arc::new(DirBucket::connect(path.clone()).await)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_reads_back_from_its_text() {
        for (text, printed) in [
            ("s3://b", "s3://b"),
            ("s3://b/", "s3://b"),
            ("s3://b/team/ci/", "s3://b/team/ci"),
            ("file:///srv/store/", "file:///srv/store"),
            ("file:///", "file:///"),
        ] {
            let url = text.parse::<StoreUrl>().unwrap();
            assert_eq!(url.to_string(), printed);
            assert_eq!(printed.parse::<StoreUrl>().unwrap(), url);
            let json = serde_json::to_string(&url).unwrap();
            assert_eq!(serde_json::from_str::<StoreUrl>(&json).unwrap(), url);
        }
    }

    #[test]
    fn what_names_no_store_is_refused_with_its_reason() {
        for (text, reason) in [
            ("", "does not name a store"),
            ("/srv/store", "does not name a store"),
            ("gs://b", "does not name a store"),
            ("s3://", "does not name a bucket"),
            ("s3://a b/", "does not name a bucket"),
            ("s3://b//p", "empty"),
            ("s3://b/../p", "part"),
            ("file://srv/store", "not absolute"),
            ("file:srv", "does not name a store"),
        ] {
            let error = text.parse::<StoreUrl>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn the_secret_is_not_printed() {
        let key = AccessKey {
            id: "id".into(),
            secret: "hush".into(),
        };
        assert!(!format!("{key:?}").contains("hush"));
    }
}
