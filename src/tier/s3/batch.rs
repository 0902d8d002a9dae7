//! Many objects removed by one request (`DeleteObjects`).

use aws_sdk_s3::types::{Delete, ObjectIdentifier};

use super::{S3Bucket, reply};
use crate::tier::{TierError, s3::reply::refusal};

impl S3Bucket {
    /// Removes objects by one request. The reply names those that were refused: the first of them is told.
    pub(super) async fn delete_batch(&self, keys: &[String]) -> Result<(), TierError> {
        let Some(first) = keys.first() else { return Ok(()) };
        let ask = self.ask("delete", "s3:DeleteObject", first);
        let object = |key: &String| {
            let object = ObjectIdentifier::builder().key(self.full(key)).build();
            object.expect("a key is all that it needs")
        };
        let batch = Delete::builder()
            .set_objects(Some(keys.iter().map(object).collect()))
            // Only what failed is listed in the reply.
            .quiet(true)
            .build()
            .expect("objects are all that it needs");
        let sent = self
            .client
            .delete_objects()
            .bucket(&self.bucket)
            .delete(batch)
            .customize()
            .interceptor(self.watch())
            .send()
            .await;
        let answer = match sent {
            Ok(answer) => answer,
            Err(error) => return Err(refusal(error, &ask).into_error(&ask)),
        };
        let failed = answer.errors().iter();
        let mut failed = failed.filter(|error| error.code() != Some("NoSuchKey"));
        match failed.next() {
            None => Ok(()),
            Some(error) => {
                let key = error.key().and_then(|key| key.strip_prefix(&self.prefix));
                let ask = self.ask("delete", "s3:DeleteObject", key.unwrap_or(first));
                Err(reply::refused_key(error.code(), error.message(), &ask))
            }
        }
    }
}
