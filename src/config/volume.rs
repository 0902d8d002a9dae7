//! Names of volumes: they become part of keys in the bucket.

use std::{fmt, str::FromStr};

/// `[a-z0-9][a-z0-9._-]{0,62}`: safe in an object key, a path and a URL.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VolumeName(String);

impl VolumeName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for VolumeName {
    fn default() -> Self {
        Self("main".to_owned())
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for VolumeName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |b: u8| b.is_ascii_digit() || b.is_ascii_lowercase();
        let ok = text.len() <= 63
            && text.bytes().next().is_some_and(plain)
            && text.bytes().all(|b| plain(b) || matches!(b, b'.' | b'_' | b'-'));
        if ok {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "{text:?} is not a volume name (a-z, 0-9, '.', '_' and '-', a letter or digit first, at most 63)"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_are_safe_in_a_key_are_taken() {
        for name in ["main", "0", "ci-linux_x86.64", &"a".repeat(63)] {
            assert_eq!(name.parse::<VolumeName>().unwrap().as_str(), name);
        }
        for name in [
            "",
            ".",
            "..",
            "-a",
            "_a",
            "Main",
            "a/b",
            "a b",
            "ä",
            "a\n",
            &"a".repeat(64),
        ] {
            assert!(name.parse::<VolumeName>().is_err(), "{name:?}");
        }
    }
}
