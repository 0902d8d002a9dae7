//! What a store is asked when it is first used: whose it is, and what its server can do.
//!
//! `casmount.json` is what makes a bucket a store. It is JSON, one object:
//!
//! ```text
//! format       the version of everything in the bucket (layout::FORMAT_VERSION)
//! store        the store's id, 32 hexadecimal digits, drawn when it was made
//! chunking     how blobs are cut: algorithm, normalization, seed and the
//!              minimum, average and maximum of a chunk in bytes
//! created_by   the program and version that made it; for people
//! lifetime_millis   optional: the bucket's lifecycle rule deletes blobs and packs that were written so long ago, and
//!              what is in use is kept young, see [`super::retaining`]. The format is then
//!              [`layout::LIFECYCLE_FORMAT_VERSION`]
//! lifetime_by  optional: 16 hexadecimal digits, drawn by whoever said the lifetime, see [`super::lifetime`]
//! ```
//!
//! `format` is read first and alone, so that a newer format can change all the
//! rest. Members that are not known are ignored. The object is replaced only to change the lifetime, with
//! the condition that it is the version that was read.
//! `tests/tier.rs` pins its bytes.
//!
//! # Policy
//!
//! Blobs and segments are immutable and their keys unique, so a server that
//! ignores conditions of writes (Garage 2.5 does) can carry them all. Only the
//! making of a store is a race there: it is checked by reading back, and said.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Body, Bucket, Etag, Put, TierError, layout};
use crate::base::{
    chunk::{AVG_CHUNK_BYTES, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES},
    id::{MachineId, StoreId, random_bytes},
};

/// `casmount.json` and probe objects are far below this.
pub(super) const MAX_BYTES: u64 = 64 << 10;

/// How long another maker of the same store may take between looking and writing,
/// where the server does not decide between them.
const UNDECIDED_WAIT: Duration = Duration::from_secs(1);

/// A clock that is wrong by more than this makes S3 refuse requests (15 minutes), so it is said well before.
const CLOCK_TOLERANCE_MILLIS: u64 = 60_000;

/// How blobs are cut into chunks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunking {
    pub algorithm: String,
    pub normalization: u32,
    pub seed: u64,
    pub min: u32,
    pub average: u32,
    pub max: u32,
}

impl Chunking {
    /// How this program cuts.
    #[must_use]
    pub fn ours() -> Self {
        Self {
            algorithm: "fastcdc-2020".to_owned(),
            normalization: 2,
            seed: 0,
            min: MIN_CHUNK_BYTES,
            average: AVG_CHUNK_BYTES,
            max: MAX_CHUNK_BYTES,
        }
    }
}

/// The content of `casmount.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreJson {
    pub format: u32,
    pub store: StoreId,
    pub chunking: Chunking,
    pub created_by: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifetime_millis: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifetime_by: Option<String>,
}

impl StoreJson {
    /// A store that this program makes.
    #[must_use]
    pub fn new(store: StoreId) -> Self {
        Self {
            format: layout::FORMAT_VERSION,
            store,
            chunking: Chunking::ours(),
            created_by: concat!("casmount ", env!("CARGO_PKG_VERSION")).to_owned(),
            lifetime_millis: None,
            lifetime_by: None,
        }
    }

    /// See [`StoreFacts::lifetime`].
    #[must_use]
    pub fn lifetime(&self) -> Option<Duration> {
        self.lifetime_millis.map(Duration::from_millis)
    }

    /// The bytes of the object.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("no member can fail to be written");
        bytes.push(b'\n');
        bytes
    }

    /// Reads a store's settings and refuses what this program cannot work with.
    ///
    /// # Errors
    ///
    /// [`TierError::Unsupported`] for a newer format and for other chunks,
    /// [`TierError::Malformed`] for what is no such object. `url` is for the message.
    pub fn decode(bytes: &[u8], url: &str) -> Result<Self, TierError> {
        #[derive(Deserialize)]
        struct FormatOnly {
            format: u32,
        }
        let malformed = |error: serde_json::Error| TierError::Malformed {
            key: layout::STORE.to_owned(),
            why: error.to_string(),
        };
        let FormatOnly { format } = serde_json::from_slice(bytes).map_err(malformed)?;
        if format > layout::LIFECYCLE_FORMAT_VERSION {
            let known = layout::LIFECYCLE_FORMAT_VERSION;
            return Err(TierError::Unsupported {
                why: format!(
                    "the store {url} has format {format}, this casmount knows formats up to {known}: a newer casmount is needed"
                ),
            });
        }
        let store: Self = serde_json::from_slice(bytes).map_err(malformed)?;
        if store.chunking != Chunking::ours() {
            return Err(TierError::Unsupported {
                why: format!(
                    "the store {url} cuts blobs in another way ({:?}) than this casmount ({:?})",
                    store.chunking,
                    Chunking::ours()
                ),
            });
        }
        Ok(store)
    }
}

/// What is known of a store once it was opened.
#[derive(Clone, Debug)]
pub struct StoreFacts {
    pub id: StoreId,
    /// The store was made by this call.
    pub created: bool,
    /// How old blobs and packs become before the bucket's lifecycle rule deletes them; `None`: there is none.
    pub lifetime: Option<Duration>,
    /// What an operator should know, one sentence each.
    pub warnings: Vec<String>,
}

/// What to do with a bucket that is no store yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfAbsent {
    Create,
    /// Fail, and write nothing.
    Refuse,
}

/// Reads the identity of a store, or makes the bucket one.
///
/// Of several that make the same store at once, one wins and all return its
/// id; on a server that ignores conditions this holds but for a rare race,
/// and a warning says so. One request when the store is there.
pub async fn open_store(bucket: &dyn Bucket, if_absent: IfAbsent) -> Result<StoreFacts, TierError> {
    let found = match read_store(bucket).await {
        // A directory that is not there yet is made with the store's first object.
        Err(TierError::NoBucket { .. }) if if_absent == IfAbsent::Create => None,
        Err(TierError::Denied {
            permission,
            key,
            source,
        }) => {
            // Without the permission to list, an absent object is answered in the same way.
            let listable = permitted(bucket.list(layout::STORE, None).await)?.is_some();
            return Err(TierError::Denied {
                permission: if listable {
                    permission
                } else {
                    "s3:ListBucket (or s3:GetObject)"
                },
                key,
                source,
            });
        }
        other => other?,
    };
    if let Some(store) = found {
        return Ok(StoreFacts {
            id: store.store,
            created: false,
            lifetime: store.lifetime(),
            warnings: Vec::new(),
        });
    }
    match if_absent {
        IfAbsent::Create => create_store(bucket).await,
        IfAbsent::Refuse => Err(TierError::Unsupported {
            why: format!("{} is no casmount store yet", bucket.url()),
        }),
    }
}

pub(super) async fn read_store(bucket: &dyn Bucket) -> Result<Option<StoreJson>, TierError> {
    let object = bucket.get(layout::STORE, None, MAX_BYTES).await?;
    object
        .map(|object| StoreJson::decode(&object.bytes, &bucket.url()))
        .transpose()
}

async fn create_store(bucket: &dyn Bucket) -> Result<StoreFacts, TierError> {
    let ours = StoreJson::new(StoreId::random());
    let put = bucket.put_new(layout::STORE, Body::raw(ours.encode())).await?;
    let mut warnings = Vec::new();
    if put != Put::Refused && !honours_conditions(bucket).await? {
        warnings.push(format!(
            "the server of {} ignores If-None-Match: two machines that make a store at the same moment may each believe in their own",
            bucket.url()
        ));
        // Another maker may have written over ours; after this wait nobody does any more.
        tokio::time::sleep(UNDECIDED_WAIT).await;
    }
    // Read back in any case: a lost reply looks like a refusal.
    let store = read_store(bucket).await?.ok_or_else(|| TierError::Malformed {
        key: layout::STORE.to_owned(),
        why: "it was written just now and is gone".to_owned(),
    })?;
    Ok(StoreFacts {
        id: store.store,
        created: store.store == ours.store,
        lifetime: store.lifetime(),
        warnings,
    })
}

/// Asks whether the second of two writers that create one key is refused. Three requests.
pub async fn honours_conditions(bucket: &dyn Bucket) -> Result<bool, TierError> {
    let key = probe_key(MachineId(0));
    bucket.put_new(&key, Body::raw("probe")).await?;
    let second = bucket.put_new(&key, Body::raw("probe")).await?;
    match bucket.delete(&key).await {
        // A store that only grows is a fine store.
        Ok(()) | Err(TierError::Denied { .. }) => Ok(second == Put::Refused),
        Err(error) => Err(error),
    }
}

fn probe_key(machine: MachineId) -> String {
    let random = u64::from_be_bytes(random_bytes());
    format!("{}{machine}-{random:016x}", layout::PROBE_PREFIX)
}

/// Whether a probe may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeMode {
    ReadOnly,
    ReadWrite,
}

/// What a server can do and the credentials permit; `None` was not asked.
#[derive(Clone, Debug, Serialize)]
pub struct ProbeReport {
    pub url: String,
    /// An absent object is answered with 404; credentials without `s3:ListBucket` get 403.
    pub missing_is_404: bool,
    pub can_list: bool,
    pub can_write: Option<bool>,
    pub can_delete: Option<bool>,
    /// `If-None-Match: *` is honoured.
    pub conditional_create: Option<bool>,
    /// `If-Match` is honoured.
    pub conditional_replace: Option<bool>,
    /// What the bucket's clock is ahead of this machine's.
    pub clock_offset_millis: i64,
}

/// One thing that a probe found, in a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// A mount cannot work with this.
    pub fatal: bool,
    pub text: String,
}

/// Asks a bucket what it can do. Needs no store in it and leaves nothing behind
/// (but one small object under `probe/` where deleting is not permitted).
///
/// # Errors
///
/// Everything but missing permissions, which are findings.
pub async fn probe(
    bucket: &dyn Bucket,
    machine: MachineId,
    mode: ProbeMode,
) -> Result<ProbeReport, TierError> {
    let key = probe_key(machine);
    let missing = permitted(bucket.get(&key, None, MAX_BYTES).await)?;
    let listed = permitted(bucket.list(layout::PROBE_PREFIX, None).await)?;
    let mut report = ProbeReport {
        url: bucket.url(),
        missing_is_404: missing.is_some(),
        can_list: listed.is_some(),
        can_write: None,
        can_delete: None,
        conditional_create: None,
        conditional_replace: None,
        clock_offset_millis: 0,
    };
    if mode == ProbeMode::ReadWrite {
        probe_writes(bucket, &key, &mut report).await?;
    }
    report.clock_offset_millis = bucket.clock().offset_millis();
    Ok(report)
}

async fn probe_writes(bucket: &dyn Bucket, key: &str, report: &mut ProbeReport) -> Result<(), TierError> {
    let first = permitted(bucket.put_new(key, Body::raw("first")).await)?;
    report.can_write = Some(first.is_some());
    if first.is_none() {
        return Ok(());
    }
    let second = supported(bucket.put_new(key, Body::raw("second")).await)?;
    report.conditional_create = Some(second == Some(Put::Refused));
    let wrong = Etag(format!("\"{:032x}\"", 0));
    let replaced = supported(bucket.put_if(key, Body::raw("third"), &wrong).await)?;
    report.conditional_replace = Some(replaced == Some(Put::Refused));
    report.can_delete = Some(permitted(bucket.delete(key).await)?.is_some());
    Ok(())
}

/// Turns a missing permission into a value.
fn permitted<T>(result: Result<T, TierError>) -> Result<Option<T>, TierError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(TierError::Denied { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Turns a request that the server does not know into a value.
fn supported<T>(result: Result<T, TierError>) -> Result<Option<T>, TierError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(TierError::Unsupported { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

impl ProbeReport {
    /// What an operator should know; nothing when all is well.
    #[must_use]
    pub fn findings(&self) -> Vec<Finding> {
        let url = &self.url;
        let mut findings = Vec::new();
        let mut found = |fatal, text| findings.push(Finding { fatal, text });
        if !self.missing_is_404 {
            found(
                true,
                format!("{url} answers 403 for an absent object: the permission s3:ListBucket is missing"),
            );
        } else if !self.can_list {
            found(
                true,
                format!("{url} cannot be listed: the permission s3:ListBucket is missing"),
            );
        }
        if self.can_write == Some(false) {
            found(
                true,
                format!("{url} cannot be written to: the permission s3:PutObject is missing"),
            );
        }
        if self.can_delete == Some(false) {
            found(
                false,
                format!("nothing can be removed from {url}: the permission s3:DeleteObject is missing"),
            );
        }
        if self.conditional_create == Some(false) {
            found(
                false,
                format!(
                    "the server of {url} ignores If-None-Match: an object that exists can be overwritten"
                ),
            );
        }
        if self.conditional_replace == Some(false) {
            found(
                false,
                format!("the server of {url} ignores If-Match: what rests on it is not offered"),
            );
        }
        if self.clock_offset_millis.unsigned_abs() > CLOCK_TOLERANCE_MILLIS {
            let seconds = self.clock_offset_millis.unsigned_abs() / 1000;
            let direction = if self.clock_offset_millis > 0 {
                "behind"
            } else {
                "ahead of"
            };
            found(
                false,
                format!("the clock of this machine is {seconds} s {direction} that of {url}"),
            );
        }
        findings
    }
}
