//! Names of snapshots, and what of one a layer shows.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::digest::Digest;

/// The longest tag, in bytes.
const MAX_BYTES: usize = 100;

/// `[A-Za-z0-9][A-Za-z0-9._=-]{0,99}`: safe in an object key, a path and a URL; `release=1.2` is one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotTag(String);

impl SnapshotTag {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SnapshotTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SnapshotTag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |b: u8| b.is_ascii_alphanumeric();
        let ok = text.len() <= MAX_BYTES
            && text.bytes().next().is_some_and(plain)
            && text
                .bytes()
                .all(|b| plain(b) || matches!(b, b'.' | b'_' | b'=' | b'-'));
        if ok {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "{text:?} is not a snapshot tag (a-z, A-Z, 0-9, '.', '_', '=' and '-', a letter or digit first, at \
                 most {MAX_BYTES})"
            ))
        }
    }
}

impl TryFrom<String> for SnapshotTag {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<SnapshotTag> for String {
    fn from(tag: SnapshotTag) -> Self {
        tag.0
    }
}

/// That a layer shows a catalog and nothing else, whatever is published later.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Frozen {
    /// The snapshot that says so.
    pub tag: SnapshotTag,
    /// The catalog has what was published until then; milliseconds since 1970 of the bucket's clock.
    pub as_of_millis: u64,
    /// Name of the catalog's root.
    pub catalog: Digest,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tags_that_are_safe_in_a_key_are_taken() {
        for tag in ["release=1.2", "v1.2.0-RC_1", "0", "2026-11-27", &"a".repeat(100)] {
            assert_eq!(tag.parse::<SnapshotTag>().unwrap().as_str(), tag);
        }
        for tag in [
            "",
            ".",
            "..",
            "-a",
            "=1",
            "_a",
            "a/b",
            "a b",
            "a+b",
            "ä",
            "a\n",
            "a\0",
            "a%2fb",
            &"a".repeat(101),
        ] {
            let err = tag.parse::<SnapshotTag>().unwrap_err();
            assert!(err.contains("is not a snapshot tag ("), "{tag:?}: {err}");
        }
    }
}
