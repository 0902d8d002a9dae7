//! What a refusal of the server means to the caller.
//!
//! Codes and statuses are those of the S3 API reference ("Error responses");
//! other servers send the same codes, and where they do not, the status decides.

use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};

use crate::tier::TierError;

/// What is being asked, for the error to say it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask<'a> {
    pub(super) verb: &'static str,
    /// What the credentials must permit.
    pub(super) permission: &'static str,
    pub(super) bucket: &'a str,
    pub(super) key: &'a str,
}

impl Ask<'_> {
    pub(super) fn unavailable(
        &self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> TierError {
        TierError::Unavailable {
            verb: self.verb,
            key: self.key.to_owned(),
            source: source.into(),
        }
    }

    pub(super) fn malformed(&self, why: impl Into<String>) -> TierError {
        TierError::Malformed {
            key: self.key.to_owned(),
            why: why.into(),
        }
    }
}

/// A reply that is not a success.
#[derive(Debug)]
pub(super) enum Refusal {
    /// There is no such object.
    Missing,
    /// The condition of the write does not hold.
    Condition,
    /// Another write to the key was under way; the same request may succeed at once.
    Conflict,
    /// The range begins past the end of the object.
    Range,
    Failed(TierError),
}

impl Refusal {
    /// `absent` if there is no such object, which is an answer; every other refusal is an error.
    pub(super) fn missing_is<T>(self, absent: T, ask: &Ask<'_>) -> Result<T, TierError> {
        match self {
            Self::Missing => Ok(absent),
            Self::Condition | Self::Conflict | Self::Range | Self::Failed(_) => Err(self.into_error(ask)),
        }
    }

    /// The error where the refusal has no meaning of its own.
    pub(super) fn into_error(self, ask: &Ask<'_>) -> TierError {
        match self {
            Self::Failed(error) => error,
            Self::Missing => ask.unavailable("the server says that there is no such thing"),
            Self::Condition => ask.unavailable("the server speaks of a condition that was not asked"),
            Self::Conflict => ask.unavailable("another request to this key is under way"),
            Self::Range => ask.malformed("it ends before the range that was asked for"),
        }
    }
}

/// The kinds of refusal, before they become errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Missing,
    Condition,
    Conflict,
    Range,
    NoBucket,
    Credentials,
    Denied,
    Region,
    Unavailable,
    Unsupported,
}

/// What the server said, in its own words; the error itself where it said nothing.
fn said<E>(error: SdkError<E>) -> Box<dyn std::error::Error + Send + Sync>
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    match (error.code(), error.message()) {
        (Some(code), Some(message)) => format!("{code}, {message}").into(),
        (Some(code), None) => code.to_owned().into(),
        _ => Box::new(error),
    }
}

/// Reads an error of the SDK.
pub(super) fn refusal<E>(error: SdkError<E>, ask: &Ask<'_>) -> Refusal
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    let kind = match &error {
        // The request could not even be made from what the settings say.
        SdkError::ConstructionFailure(_) => Kind::Unsupported,
        SdkError::ResponseError(reply) => kind(reply.raw().status().as_u16(), None),
        SdkError::ServiceError(reply) => kind(reply.raw().status().as_u16(), reply.err().code()),
        // Timeouts and broken connections. The enum is open: what a later SDK adds is retried until it is known.
        _ => Kind::Unavailable,
    };
    let answered = || DisplayErrorContext(&error).to_string();
    match kind {
        Kind::Missing => Refusal::Missing,
        Kind::Condition => Refusal::Condition,
        Kind::Conflict => Refusal::Conflict,
        Kind::Range => Refusal::Range,
        Kind::NoBucket => Refusal::Failed(TierError::NoBucket {
            bucket: ask.bucket.to_owned(),
        }),
        Kind::Credentials => Refusal::Failed(TierError::Credentials { source: said(error) }),
        Kind::Denied => Refusal::Failed(TierError::Denied {
            permission: ask.permission,
            key: ask.key.to_owned(),
            source: said(error),
        }),
        Kind::Region => {
            let home = error
                .raw_response()
                .and_then(|reply| reply.headers().get("x-amz-bucket-region"));
            let why = format!(
                "bucket {} is in {}: set AWS_REGION to it",
                ask.bucket,
                home.map_or("another region".to_owned(), |region| format!("region {region}")),
            );
            Refusal::Failed(TierError::Unsupported { why })
        }
        Kind::Unavailable => Refusal::Failed(ask.unavailable(error)),
        Kind::Unsupported => Refusal::Failed(TierError::Unsupported {
            why: format!("the server does not {} {}: {}", ask.verb, ask.key, answered()),
        }),
    }
}

/// What it means that one key of several was refused.
pub(super) fn refused_key(code: Option<&str>, message: Option<&str>, ask: &Ask<'_>) -> TierError {
    let said = [code, message]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(", ");
    if code == Some("AccessDenied") {
        return TierError::Denied {
            permission: ask.permission,
            key: ask.key.to_owned(),
            source: said.into(),
        };
    }
    ask.unavailable(said)
}

/// Sorts a reply by its code, and by its status where the code says nothing
/// (a reply to HEAD has no body and so no code).
fn kind(status: u16, code: Option<&str>) -> Kind {
    match code.unwrap_or_default() {
        "NoSuchBucket" => return Kind::NoBucket,
        "InvalidAccessKeyId"
        | "SignatureDoesNotMatch"
        | "ExpiredToken"
        | "InvalidToken"
        | "TokenRefreshRequired"
        | "MissingAuthenticationToken"
        | "InvalidSecurity"
        | "NotSignedUp"
        // The message names the clock of this machine, which an operator must set.
        | "RequestTimeTooSkewed" => return Kind::Credentials,
        "PermanentRedirect"
        | "TemporaryRedirect"
        | "AuthorizationHeaderMalformed"
        | "IllegalLocationConstraintException" => return Kind::Region,
        // The bytes were damaged or lost on the way: the same request may succeed.
        "BadDigest" | "InvalidDigest" | "XAmzContentSHA256Mismatch" | "XAmzContentChecksumMismatch"
        | "IncompleteBody" | "RequestTimeout" => return Kind::Unavailable,
        // S3 says this when two conditional writes meet.
        "ConditionalRequestConflict" | "OperationAborted" => return Kind::Conflict,
        _ => {}
    }
    match status {
        401 => Kind::Credentials,
        403 => Kind::Denied,
        404 => Kind::Missing,
        409 => Kind::Conflict,
        412 => Kind::Condition,
        416 => Kind::Range,
        301 | 307 | 308 => Kind::Region,
        501 | 505 => Kind::Unsupported,
        // Of 2xx: a success that could not be read, by a proxy in between or cut in half.
        200..=299 | 408 | 425 | 429 | 500.. => Kind::Unavailable,
        _ => Kind::Unsupported,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_decides_before_the_status() {
        for (status, code, expected) in [
            (404, "NoSuchBucket", Kind::NoBucket),
            (404, "NoSuchKey", Kind::Missing),
            (403, "AccessDenied", Kind::Denied),
            (403, "InvalidAccessKeyId", Kind::Credentials),
            (403, "SignatureDoesNotMatch", Kind::Credentials),
            (403, "RequestTimeTooSkewed", Kind::Credentials),
            (400, "ExpiredToken", Kind::Credentials),
            (400, "AuthorizationHeaderMalformed", Kind::Region),
            (301, "PermanentRedirect", Kind::Region),
            (400, "BadDigest", Kind::Unavailable),
            (400, "RequestTimeout", Kind::Unavailable),
            (409, "ConditionalRequestConflict", Kind::Conflict),
            (412, "PreconditionFailed", Kind::Condition),
            (416, "InvalidRange", Kind::Range),
            (500, "InternalError", Kind::Unavailable),
            (503, "SlowDown", Kind::Unavailable),
            (501, "NotImplemented", Kind::Unsupported),
            (400, "InvalidRequest", Kind::Unsupported),
        ] {
            assert_eq!(kind(status, Some(code)), expected, "{status} {code}");
        }
    }

    #[test]
    fn without_a_code_the_status_decides() {
        for (status, expected) in [
            (404, Kind::Missing),
            (403, Kind::Denied),
            (412, Kind::Condition),
            (429, Kind::Unavailable),
            (502, Kind::Unavailable),
            (200, Kind::Unavailable),
            (400, Kind::Unsupported),
        ] {
            assert_eq!(kind(status, None), expected, "{status}");
        }
    }
}
