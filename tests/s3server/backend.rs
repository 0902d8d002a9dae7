//! The objects: an ordered map under one lock, bodies in memory or in files.
//!
//! The condition of a write is checked and the object put in its place under
//! that lock, so of any number of writers exactly one wins.

use std::{
    collections::BTreeMap,
    fs,
    ops::Bound,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use s3s::{
    S3, S3Request, S3Response, S3Result, checksum::ChecksumHasher, crypto::Checksum as _, dto, s3_error,
};
use serde::Serialize;

use super::faults::Faults;

/// One object, as a listing shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stored {
    pub key: String,
    /// Bytes as stored.
    pub size: u64,
    pub content_encoding: Option<String>,
    pub modified_millis: u64,
}

/// Where the bytes of an object are.
#[derive(Clone, Debug)]
enum Kept {
    Memory(Bytes),
    /// Removed when the last user of it goes.
    File(Arc<BodyFile>),
}

#[derive(Debug)]
struct BodyFile {
    path: PathBuf,
}

impl Drop for BodyFile {
    fn drop(&mut self) {
        // The directory belongs to the test, which removes it.
        let _ = fs::remove_file(&self.path);
    }
}

#[derive(Clone, Debug)]
struct Entry {
    bytes: Kept,
    size: u64,
    etag: String,
    content_encoding: Option<String>,
    content_type: Option<String>,
    /// What the client wants to remember of it.
    metadata: Option<dto::Metadata>,
    modified: SystemTime,
}

/// A bucket and its objects.
#[derive(Clone)]
pub(super) struct Backend {
    bucket: String,
    dir: Option<PathBuf>,
    files: Arc<AtomicU64>,
    objects: Arc<Mutex<BTreeMap<String, Entry>>>,
    faults: Arc<Mutex<Faults>>,
}

impl Backend {
    pub(super) fn new(bucket: &str, dir: Option<PathBuf>, faults: Arc<Mutex<Faults>>) -> Self {
        if let Some(dir) = &dir {
            fs::create_dir_all(dir).unwrap_or_else(|err| panic!("cannot make {}: {err}", dir.display()));
        }
        Self {
            bucket: bucket.to_owned(),
            dir,
            files: Arc::default(),
            objects: Arc::default(),
            faults,
        }
    }

    pub(super) fn objects(&self) -> Vec<Stored> {
        let objects = self.objects.lock().unwrap();
        objects
            .iter()
            .map(|(key, entry)| Stored {
                key: key.clone(),
                size: entry.size,
                content_encoding: entry.content_encoding.clone(),
                modified_millis: entry
                    .modified
                    .duration_since(UNIX_EPOCH)
                    .map_or(0, |since| since.as_millis() as u64),
            })
            .collect()
    }

    pub(super) fn read(&self, key: &str) -> Option<Vec<u8>> {
        let entry = self.objects.lock().unwrap().get(key).cloned()?;
        let bytes = read_range(&entry.bytes, 0..entry.size).expect("bodies of the test can be read");
        Some(bytes.to_vec())
    }

    pub(super) fn tamper(&self, key: &str, bytes: Option<Vec<u8>>) {
        let entry = bytes.map(|bytes| {
            let old = self.objects.lock().unwrap().get(key).cloned();
            let old = old.unwrap_or_else(|| panic!("there is no object {key} to tamper with"));
            let bytes = Bytes::from(bytes);
            Entry {
                size: bytes.len() as u64,
                bytes: self.keep(bytes).expect("bodies of the test can be written"),
                ..old
            }
        });
        let mut objects = self.objects.lock().unwrap();
        match entry {
            Some(entry) => objects.insert(key.to_owned(), entry),
            None => objects.remove(key),
        };
    }

    /// Makes the objects of a prefix older than they are.
    pub(super) fn age(&self, prefix: &str, by: Duration) {
        let mut objects = self.objects.lock().unwrap();
        for (_, entry) in objects.iter_mut().filter(|(key, _)| key.starts_with(prefix)) {
            entry.modified -= by;
        }
    }

    /// Does what a lifecycle rule does: removes the objects of a prefix that were written so long ago.
    pub(super) fn expire(&self, prefix: &str, lifetime: Duration) {
        let now = SystemTime::now();
        let mut objects = self.objects.lock().unwrap();
        objects.retain(|key, entry| {
            let age = now.duration_since(entry.modified).unwrap_or_default();
            !key.starts_with(prefix) || age < lifetime
        });
    }

    fn faults(&self) -> Faults {
        self.faults.lock().unwrap().clone()
    }

    fn check_bucket(&self, bucket: &str) -> S3Result<()> {
        if bucket == self.bucket {
            Ok(())
        } else {
            Err(s3_error!(NoSuchBucket))
        }
    }

    fn entry(&self, bucket: &str, key: &str) -> S3Result<Entry> {
        self.check_bucket(bucket)?;
        let found = self.objects.lock().unwrap().get(key).cloned();
        found.ok_or_else(|| {
            if self.faults().missing_is_403 {
                s3_error!(AccessDenied)
            } else {
                s3_error!(NoSuchKey)
            }
        })
    }

    /// Puts bytes where they stay.
    fn keep(&self, bytes: Bytes) -> std::io::Result<Kept> {
        let Some(dir) = &self.dir else {
            return Ok(Kept::Memory(bytes));
        };
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("{}-{number}", std::process::id()));
        fs::write(&path, &bytes)?;
        Ok(Kept::File(Arc::new(BodyFile { path })))
    }
}

fn read_range(bytes: &Kept, range: std::ops::Range<u64>) -> std::io::Result<Bytes> {
    match bytes {
        Kept::Memory(bytes) => Ok(bytes.slice(range.start as usize..range.end as usize)),
        Kept::File(body) => {
            let mut buffer = vec![0; (range.end - range.start) as usize];
            fs::File::open(&body.path)?.read_exact_at(&mut buffer, range.start)?;
            Ok(buffer.into())
        }
    }
}

/// The checksum as the header has it, and the MD5 that is the version: clients compare it with their own.
fn checksums(bytes: &[u8]) -> (String, String) {
    let mut hasher = ChecksumHasher {
        sha256: Some(s3s::crypto::Sha256::new()),
        ..ChecksumHasher::default()
    };
    hasher.update(bytes);
    let sha256 = hasher
        .finalize()
        .checksum_sha256
        .expect("the hasher was asked for it");
    let md5 = s3s::crypto::Md5::checksum(bytes);
    let etag = md5.iter().map(|byte| format!("{byte:02x}")).collect();
    (sha256, etag)
}

#[async_trait::async_trait]
impl S3 for Backend {
    async fn head_bucket(
        &self,
        request: S3Request<dto::HeadBucketInput>,
    ) -> S3Result<S3Response<dto::HeadBucketOutput>> {
        self.check_bucket(&request.input.bucket)?;
        Ok(S3Response::new(dto::HeadBucketOutput::default()))
    }

    async fn get_object(
        &self,
        request: S3Request<dto::GetObjectInput>,
    ) -> S3Result<S3Response<dto::GetObjectOutput>> {
        let input = request.input;
        let entry = self.entry(&input.bucket, &input.key)?;
        let wanted = input.range.filter(|_| !self.faults().ignore_ranges);
        let (range, content_range) = match wanted {
            Some(range) => {
                let range = range.check(entry.size)?;
                let header = format!("bytes {}-{}/{}", range.start, range.end - 1, entry.size);
                (range, Some(header))
            }
            None => (0..entry.size, None),
        };
        let bytes = match &entry.bytes {
            Kept::Memory(_) => read_range(&entry.bytes, range.clone()),
            Kept::File(_) => {
                let (bytes, range) = (entry.bytes.clone(), range.clone());
                tokio::task::spawn_blocking(move || read_range(&bytes, range))
                    .await
                    .map_err(s3s::S3Error::internal_error)?
            }
        };
        let bytes = bytes.map_err(s3s::S3Error::internal_error)?;
        Ok(S3Response::new(dto::GetObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some((range.end - range.start) as i64),
            content_range,
            content_encoding: entry.content_encoding,
            content_type: entry.content_type,
            e_tag: Some(dto::ETag::Strong(entry.etag)),
            metadata: entry.metadata,
            last_modified: Some(entry.modified.into()),
            body: Some(dto::StreamingBlob::from(s3s::Body::from(bytes))),
            ..Default::default()
        }))
    }

    async fn head_object(
        &self,
        request: S3Request<dto::HeadObjectInput>,
    ) -> S3Result<S3Response<dto::HeadObjectOutput>> {
        let entry = self.entry(&request.input.bucket, &request.input.key)?;
        Ok(S3Response::new(dto::HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(entry.size as i64),
            content_encoding: entry.content_encoding,
            content_type: entry.content_type,
            e_tag: Some(dto::ETag::Strong(entry.etag)),
            metadata: entry.metadata,
            last_modified: Some(entry.modified.into()),
            ..Default::default()
        }))
    }

    async fn put_object(
        &self,
        request: S3Request<dto::PutObjectInput>,
    ) -> S3Result<S3Response<dto::PutObjectOutput>> {
        let input = request.input;
        self.check_bucket(&input.bucket)?;
        let mut whole = BytesMut::with_capacity(input.content_length.unwrap_or_default().max(0) as usize);
        if let Some(mut stream) = input.body {
            while let Some(piece) = stream.next().await {
                let piece = piece.map_err(|_| s3_error!(IncompleteBody))?;
                whole.extend_from_slice(&piece);
            }
        }
        let bytes = whole.freeze();
        if input
            .content_length
            .is_some_and(|len| len as usize != bytes.len())
        {
            return Err(s3_error!(IncompleteBody));
        }
        let (sha256, etag) = checksums(&bytes);
        if input.checksum_sha256.as_ref().is_some_and(|sent| *sent != sha256) {
            return Err(s3_error!(BadDigest));
        }
        let size = bytes.len() as u64;
        let entry = Entry {
            bytes: self.keep(bytes).map_err(s3s::S3Error::internal_error)?,
            size,
            etag: etag.clone(),
            content_encoding: input.content_encoding,
            content_type: input.content_type,
            metadata: input.metadata,
            modified: SystemTime::now(),
        };
        let conditional = !self.faults().ignore_conditions;
        let mut objects = self.objects.lock().unwrap();
        let current = objects.get(&input.key);
        if conditional {
            if input.if_none_match.is_some() && current.is_some() {
                return Err(s3_error!(PreconditionFailed));
            }
            if let Some(condition) = &input.if_match {
                let Some(current) = current else {
                    return Err(s3_error!(NoSuchKey));
                };
                let same = condition
                    .as_etag()
                    .is_none_or(|etag| etag.value() == current.etag);
                if !same {
                    return Err(s3_error!(PreconditionFailed));
                }
            }
        }
        objects.insert(input.key, entry);
        drop(objects);
        Ok(S3Response::new(dto::PutObjectOutput {
            e_tag: Some(dto::ETag::Strong(etag)),
            checksum_sha256: Some(sha256),
            ..Default::default()
        }))
    }

    async fn copy_object(
        &self,
        request: S3Request<dto::CopyObjectInput>,
    ) -> S3Result<S3Response<dto::CopyObjectOutput>> {
        let input = request.input;
        let dto::CopySource::Bucket { bucket, key, .. } = &input.copy_source else {
            return Err(s3_error!(NotImplemented));
        };
        self.check_bucket(&input.bucket)?;
        let source = self.entry(bucket, key)?;
        let replaces = input
            .metadata_directive
            .as_ref()
            .is_some_and(|directive| directive.as_str() == dto::MetadataDirective::REPLACE);
        if !replaces && **key == *input.key {
            // As S3 has it: a copy onto itself must change something.
            return Err(s3_error!(InvalidRequest));
        }
        let mut objects = self.objects.lock().unwrap();
        if let Some(condition) = &input.copy_source_if_match {
            let is_same = condition.as_etag().is_none_or(|etag| etag.value() == source.etag);
            if !is_same {
                return Err(s3_error!(PreconditionFailed));
            }
        }
        let copy = if replaces {
            Entry {
                content_encoding: input.content_encoding,
                content_type: input.content_type,
                metadata: input.metadata,
                modified: SystemTime::now(),
                ..source
            }
        } else {
            Entry {
                modified: SystemTime::now(),
                ..source
            }
        };
        let result = dto::CopyObjectResult {
            e_tag: Some(dto::ETag::Strong(copy.etag.clone())),
            last_modified: Some(copy.modified.into()),
            ..Default::default()
        };
        objects.insert(input.key, copy);
        Ok(S3Response::new(dto::CopyObjectOutput {
            copy_object_result: Some(result),
            ..Default::default()
        }))
    }

    async fn delete_object(
        &self,
        request: S3Request<dto::DeleteObjectInput>,
    ) -> S3Result<S3Response<dto::DeleteObjectOutput>> {
        self.check_bucket(&request.input.bucket)?;
        self.objects.lock().unwrap().remove(&request.input.key);
        Ok(S3Response::new(dto::DeleteObjectOutput::default()))
    }

    async fn delete_objects(
        &self,
        request: S3Request<dto::DeleteObjectsInput>,
    ) -> S3Result<S3Response<dto::DeleteObjectsOutput>> {
        let input = request.input;
        self.check_bucket(&input.bucket)?;
        if input.delete.objects.len() > 1000 {
            return Err(s3_error!(MalformedXML));
        }
        let mut objects = self.objects.lock().unwrap();
        let mut deleted = Vec::new();
        for object in input.delete.objects {
            objects.remove(&object.key);
            deleted.push(dto::DeletedObject {
                key: Some(object.key),
                ..Default::default()
            });
        }
        drop(objects);
        let quiet = input.delete.quiet.unwrap_or_default();
        Ok(S3Response::new(dto::DeleteObjectsOutput {
            deleted: (!quiet).then_some(deleted),
            ..Default::default()
        }))
    }

    /// The listing of older clients, s3fs among them.
    async fn list_objects(
        &self,
        request: S3Request<dto::ListObjectsInput>,
    ) -> S3Result<S3Response<dto::ListObjectsOutput>> {
        let marker = request.input.marker.clone();
        let newer = request.map_input(|input| dto::ListObjectsV2Input {
            bucket: input.bucket,
            delimiter: input.delimiter,
            max_keys: input.max_keys,
            prefix: input.prefix,
            start_after: input.marker,
            ..Default::default()
        });
        let listed = self.list_objects_v2(newer).await?;
        Ok(listed.map_output(|output| dto::ListObjectsOutput {
            name: output.name,
            prefix: output.prefix,
            delimiter: output.delimiter,
            marker,
            max_keys: output.max_keys,
            is_truncated: output.is_truncated,
            next_marker: output.next_continuation_token,
            contents: output.contents,
            common_prefixes: output.common_prefixes,
            ..Default::default()
        }))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<dto::ListObjectsV2Input>,
    ) -> S3Result<S3Response<dto::ListObjectsV2Output>> {
        let input = request.input;
        self.check_bucket(&input.bucket)?;
        let most = input.max_keys.unwrap_or(1000).clamp(0, 1000) as usize;
        let prefix = input.prefix.clone().unwrap_or_default();
        let delimiter = input.delimiter.clone().unwrap_or_default();
        // A continuation is the last key or folder that was sent.
        let mut after = input
            .continuation_token
            .clone()
            .or_else(|| input.start_after.clone())
            .unwrap_or_default();
        let mut contents = Vec::new();
        let mut folders: Vec<String> = Vec::new();
        let mut more = false;
        let objects = self.objects.lock().unwrap();
        let from = if after >= prefix {
            Bound::Excluded(after.clone())
        } else {
            Bound::Included(prefix.clone())
        };
        for (key, entry) in objects.range((from, Bound::Unbounded)) {
            if !key.starts_with(&prefix) {
                break;
            }
            let folder = key[prefix.len()..]
                .find(&delimiter)
                .filter(|_| !delimiter.is_empty())
                .map(|end| key[..prefix.len() + end + delimiter.len()].to_owned());
            if folder
                .as_ref()
                .is_some_and(|folder| folders.last() == Some(folder) || after == *folder)
            {
                continue;
            }
            if contents.len() + folders.len() == most {
                more = true;
                break;
            }
            if let Some(folder) = folder {
                after.clone_from(&folder);
                folders.push(folder);
                continue;
            }
            after.clone_from(key);
            contents.push(dto::Object {
                key: Some(key.clone()),
                size: Some(entry.size as i64),
                e_tag: Some(dto::ETag::Strong(entry.etag.clone())),
                last_modified: Some(entry.modified.into()),
                ..Default::default()
            });
        }
        drop(objects);
        Ok(S3Response::new(dto::ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: input.prefix,
            delimiter: input.delimiter,
            max_keys: Some(most as i32),
            key_count: Some((contents.len() + folders.len()) as i32),
            is_truncated: Some(more),
            next_continuation_token: more.then_some(after),
            continuation_token: input.continuation_token,
            start_after: input.start_after,
            contents: Some(contents),
            common_prefixes: Some(
                folders
                    .into_iter()
                    .map(|folder| dto::CommonPrefix { prefix: Some(folder) })
                    .collect(),
            ),
            ..Default::default()
        }))
    }
}
