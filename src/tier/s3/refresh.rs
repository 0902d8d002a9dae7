//! An object that is written onto itself by the server (`CopyObject`), so that its age begins anew.

use std::fmt::Write;

use aws_sdk_s3::types::MetadataDirective;

use super::{S3Bucket, reply::Refusal};
use crate::tier::{TierError, s3::reply::refusal};

impl S3Bucket {
    /// Copies an object onto itself; false when there is none. Two requests: what is not said again is lost.
    pub(super) async fn copy_onto_itself(&self, key: &str) -> Result<bool, TierError> {
        let ask = self.ask("refresh", "s3:GetObject", key);
        let asked = self
            .client
            .head_object()
            .bucket(&self.bucket)
            .key(self.full(key))
            .customize()
            .interceptor(self.watch())
            .send()
            .await;
        let found = match asked {
            Ok(found) => found,
            Err(error) => return refusal(error, &ask).missing_is(false, &ask),
        };
        let ask = self.ask("refresh", "s3:PutObject", key);
        let copied = self
            .client
            .copy_object()
            .bucket(&self.bucket)
            .key(self.full(key))
            .copy_source(format!("{}/{}", self.bucket, encoded(&self.full(key))))
            .set_copy_source_if_match(found.e_tag().map(str::to_owned))
            // A copy onto itself must change something: it says its metadata anew.
            .metadata_directive(MetadataDirective::Replace)
            .content_type("application/octet-stream")
            .set_content_encoding(found.content_encoding().map(str::to_owned))
            .customize()
            .interceptor(self.watch())
            .send()
            .await;
        match copied {
            Ok(_) => Ok(true),
            Err(error) => match refusal(error, &ask) {
                Refusal::Missing => Ok(false),
                // Somebody wrote it meanwhile, so it is young.
                Refusal::Condition | Refusal::Conflict => Ok(true),
                other @ (Refusal::Range | Refusal::Failed(_)) => Err(other.into_error(&ask)),
            },
        }
    }
}

/// A key as the header `x-amz-copy-source` has it: URL-encoded.
fn encoded(key: &str) -> String {
    let mut text = String::with_capacity(key.len());
    for byte in key.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            text.push(char::from(byte));
        } else {
            write!(text, "%{byte:02X}").expect("writing to a text cannot fail");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_encoded_but_for_what_needs_none() {
        assert_eq!(encoded("ci/blobs/sha256/aa/0f"), "ci/blobs/sha256/aa/0f");
        assert_eq!(encoded("a b+ü%"), "a%20b%2B%C3%BC%25");
    }
}
