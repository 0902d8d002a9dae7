//! Settings of the SDK: who we are, where the server is, how long to wait.

use std::{env, sync::Arc, time::Duration};

use aws_config::{
    BehaviorVersion, Region, environment::EnvironmentVariableRegionProvider,
    meta::region::RegionProviderChain, profile::ProfileFileRegionProvider,
};
use aws_sdk_s3::config::{
    Builder, Credentials, ProvideCredentials, RequestChecksumCalculation, ResponseChecksumValidation,
    StalledStreamProtectionConfig, retry::RetryConfig, timeout::TimeoutConfig,
};

use super::S3Bucket;
use crate::{
    base::clock::ServerClock,
    tier::{TierError, url::ConnectOptions},
};

/// A server that does not take a connection within this time is down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A second attempt mends what a kept connection that the server has closed
/// breaks; everything beyond is the caller's policy.
const ATTEMPTS: u32 = 2;
const FIRST_BACKOFF: Duration = Duration::from_millis(50);

/// Servers other than AWS mostly do not care which region they are told.
const REGION_OF_OTHERS: &str = "us-east-1";

impl S3Bucket {
    /// Finds credentials and region by the SDK's usual chain. No request to S3 is sent yet.
    ///
    /// Connections belong to the runtime on which this is called.
    pub async fn connect(bucket: &str, prefix: &str, options: &ConnectOptions) -> Result<Self, TierError> {
        let endpoint = options.endpoint_url.clone().or_else(endpoint_of_environment);
        let mut loader = aws_config::defaults(BehaviorVersion::latest());
        if let Some(endpoint) = &endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        if let Some(key) = &options.access_key {
            let pair = Credentials::new(&key.id, &key.secret, None, None, "given");
            loader = loader.credentials_provider(pair);
        }
        let region = region(options, endpoint.is_some()).await;
        let shared = loader.region(region).load().await;
        if shared.region().is_none() {
            return Err(TierError::Unsupported {
                why: "no region is known: set AWS_REGION, or a region in the profile".to_owned(),
            });
        }
        find_credentials(&shared).await?;

        // The profile may name an endpoint too. Names of buckets as host names need
        // a DNS entry for each, which only AWS is known to have.
        let path_style = shared.endpoint_url().is_some();
        let config = Builder::from(&shared)
            .force_path_style(path_style)
            // Callers send SHA-256 themselves and verify what they read: another checksum
            // of the SDK's choice would be a trailer that many servers do not know.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            // Requests and bodies have limits of their own here; the SDK's watches every piece of a body.
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .retry_config(
                RetryConfig::standard()
                    .with_max_attempts(ATTEMPTS)
                    .with_initial_backoff(FIRST_BACKOFF),
            )
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(CONNECT_TIMEOUT)
                    .operation_attempt_timeout(options.request_timeout)
                    .build(),
            )
            .build();
        Ok(Self {
            client: aws_sdk_s3::Client::from_conf(config),
            bucket: bucket.to_owned(),
            prefix: if prefix.is_empty() {
                String::new()
            } else {
                format!("{prefix}/")
            },
            clock: Arc::new(ServerClock::default()),
            body_timeout: options.request_timeout,
        })
    }
}

fn endpoint_of_environment() -> Option<String> {
    ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]
        .into_iter()
        .filter_map(|name| env::var(name).ok())
        .find(|url| !url.is_empty())
}

/// The region from the options or the usual chain. With an endpoint the
/// chain's last link is left out: asking the instance metadata service takes
/// seconds where there is none.
async fn region(options: &ConnectOptions, has_endpoint: bool) -> Option<Region> {
    if let Some(region) = &options.region {
        return Some(Region::new(region.clone()));
    }
    if has_endpoint {
        return RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
            .or_else(ProfileFileRegionProvider::new())
            .or_else(Region::from_static(REGION_OF_OTHERS))
            .region()
            .await;
    }
    RegionProviderChain::default_provider().region().await
}

/// Says at once that there are no credentials, rather than at the first request.
async fn find_credentials(shared: &aws_config::SdkConfig) -> Result<(), TierError> {
    let Some(provider) = shared.credentials_provider() else {
        return Err(TierError::Credentials {
            source: "no source of credentials is set up".into(),
        });
    };
    match provider.provide_credentials().await {
        Ok(_) => Ok(()),
        Err(error) => Err(TierError::Credentials {
            source: Box::new(error),
        }),
    }
}
