//! Names of volumes, and the volumes that one is read through.
//!
//! A fork lies over its parent, which may be a fork itself: what is mounted is a [`Stack`]. How it
//! is kept in the bucket is `namespace::stack`'s to say, what it shows `namespace::tree`'s.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{digest::Digest, snapshot::Frozen, units::format_moment};

/// `[a-z0-9][a-z0-9._-]{0,62}`: safe in an object key, a path and a URL.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
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

impl TryFrom<String> for VolumeName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<VolumeName> for String {
    fn from(name: VolumeName) -> Self {
        name.0
    }
}

/// Volumes by their names: one, or with a `*` at the end all whose names begin so. Not `*` alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumePattern {
    begin: String,
    is_open: bool,
}

impl VolumePattern {
    #[must_use]
    pub fn matches(&self, volume: &VolumeName) -> bool {
        if self.is_open {
            volume.as_str().starts_with(&self.begin)
        } else {
            volume.as_str() == self.begin
        }
    }
}

impl FromStr for VolumePattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let begin = text.strip_suffix('*').unwrap_or(text);
        let _: VolumeName = begin
            .parse()
            .map_err(|_| format!("{text:?} is no volume name, nor the begin of one with a '*' behind it"))?;
        Ok(Self {
            begin: begin.to_owned(),
            is_open: begin != text,
        })
    }
}

/// Where the view of a volume as of a moment begins: a catalog, and from there the log up to the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Base {
    /// `None`: the volume had no catalog then, and the view begins with the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub catalog: Option<Digest>,
    /// Of the catalog.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub watermark_millis: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over references")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// One volume of a stack.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StackLayer {
    pub volume: VolumeName,
    /// What was published later is not seen; milliseconds since 1970 of the bucket's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_millis: Option<u64>,
    /// Its blobs are below its own prefix in the bucket, because its writers are trusted less.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own_prefix: bool,
    /// It is a part of a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<Frozen>,
    /// Of a layer that is seen up to a moment: where that view begins. `None`: it was not noted, and any catalog of
    /// that time will do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
}

impl StackLayer {
    /// All of a volume, whatever is published in it.
    #[must_use]
    pub fn live(volume: VolumeName) -> Self {
        Self {
            volume,
            until_millis: None,
            own_prefix: false,
            frozen: None,
            base: None,
        }
    }
}

/// The mounted volume and those that it is read through, from the top; never empty.
///
/// Either none of its layers is frozen, or all of them are, by one snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<StackLayer>", into = "Vec<StackLayer>")]
pub struct Stack(Vec<StackLayer>);

impl Stack {
    /// A volume that lies over nothing.
    #[must_use]
    pub fn of(volume: VolumeName) -> Self {
        Self(vec![StackLayer::live(volume)])
    }

    /// The layers of a snapshot, from the top; `None` when they are none, or of several snapshots.
    #[must_use]
    pub fn of_snapshot(layers: Vec<StackLayer>) -> Option<Self> {
        let stack = Self::try_from(layers).ok()?;
        stack.snapshot().is_some().then_some(stack)
    }

    /// What the snapshot shows of the mounted volume, if this is one.
    #[must_use]
    pub fn snapshot(&self) -> Option<&Frozen> {
        self.0[0].frozen.as_ref()
    }

    /// Notes that the blobs of the lowest layer so far are below its own prefix.
    pub fn keep_last_apart(&mut self) {
        if let Some(last) = self.0.last_mut() {
            last.own_prefix = true;
        }
    }

    /// The mounted volume.
    #[must_use]
    pub fn volume(&self) -> &VolumeName {
        &self.0[0].volume
    }

    /// All layers, the mounted volume first.
    #[must_use]
    pub fn layers(&self) -> &[StackLayer] {
        &self.0
    }

    /// Lays everything over one more volume.
    pub fn push(&mut self, below: StackLayer) {
        self.0.push(below);
    }
}

impl fmt::Display for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(snapshot) = self.snapshot() {
            // Two snapshots may have had the same tag, one after the other.
            let as_of = format_moment(snapshot.as_of_millis);
            let catalog = short(&snapshot.catalog);
            let volume = self.volume();
            return write!(
                f,
                "{volume} at snapshot {} ({as_of}, catalog {catalog})",
                snapshot.tag
            );
        }
        for (number, layer) in self.0.iter().enumerate() {
            if number > 0 {
                f.write_str(" over ")?;
            }
            write!(f, "{}", layer.volume)?;
            if let Some(until) = layer.until_millis {
                write!(f, " as of {}", format_moment(until))?;
            }
        }
        Ok(())
    }
}

/// As much of a digest as tells it from others.
fn short(digest: &Digest) -> String {
    digest.to_string()[..12].to_owned()
}

impl TryFrom<Vec<StackLayer>> for Stack {
    type Error = &'static str;

    fn try_from(layers: Vec<StackLayer>) -> Result<Self, Self::Error> {
        let tag = |layer: &StackLayer| layer.frozen.as_ref().map(|frozen| frozen.tag.clone());
        if layers.windows(2).any(|two| tag(&two[0]) != tag(&two[1])) {
            return Err("its layers are of several snapshots");
        }
        match layers.first() {
            Some(StackLayer {
                until_millis: None, ..
            }) => Ok(Self(layers)),
            Some(_) => Err("the mounted volume has no end"),
            None => Err("there is no volume"),
        }
    }
}

impl From<Stack> for Vec<StackLayer> {
    fn from(stack: Stack) -> Self {
        stack.0
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

    #[test]
    fn a_pattern_is_a_name_or_the_begin_of_one() {
        let matches = |pattern: &str, volume: &str| {
            let pattern: VolumePattern = pattern.parse().unwrap();
            pattern.matches(&volume.parse().unwrap())
        };
        assert!(matches("pr-*", "pr-1") && matches("pr-*", "pr-") && matches("pr-1", "pr-1"));
        assert!(!matches("pr-*", "pr") && !matches("pr-*", "main") && !matches("pr-1", "pr-10"));
        for odd in ["*", "", "pr-*1", "PR-*", "**"] {
            assert!(odd.parse::<VolumePattern>().is_err(), "{odd}");
        }
    }

    #[test]
    fn a_stack_is_told_from_the_top_and_reads_back() {
        let layer = |volume: &str, until_millis| StackLayer {
            until_millis,
            ..StackLayer::live(volume.parse().unwrap())
        };
        let mut stack = Stack::of("fork".parse().unwrap());
        assert_eq!(stack.to_string(), "fork");
        stack.push(layer("main", None));
        stack.push(layer("base", Some(1_767_225_600_000)));
        assert_eq!(
            stack.to_string(),
            "fork over main over base as of 2026-01-01 00:00:00 UTC"
        );
        let json = serde_json::to_string(&stack).unwrap();
        assert_eq!(
            json,
            r#"[{"volume":"fork"},{"volume":"main"},{"volume":"base","until_millis":1767225600000}]"#
        );
        assert_eq!(serde_json::from_str::<Stack>(&json).unwrap(), stack);
        stack.keep_last_apart();
        let json = serde_json::to_string(&stack).unwrap();
        assert!(
            json.ends_with(r#""until_millis":1767225600000,"own_prefix":true}]"#),
            "{json}"
        );
        assert_eq!(serde_json::from_str::<Stack>(&json).unwrap(), stack);
        for bad in [
            "[]",
            r#"[{"volume":"../x"}]"#,
            r#"[{"volume":"a","until_millis":1}]"#,
        ] {
            assert!(serde_json::from_str::<Stack>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_snapshot_is_another_stack_than_its_volume_and_reads_back() {
        let layer = |volume: &str, tag: &str| StackLayer {
            frozen: Some(Frozen {
                tag: tag.parse().unwrap(),
                as_of_millis: 1_767_225_600_000,
                catalog: Digest::of(volume.as_bytes()),
            }),
            ..StackLayer::live(volume.parse().unwrap())
        };
        let stack = Stack::of_snapshot(vec![layer("fork", "v=1"), layer("main", "v=1")]).unwrap();
        assert_eq!(
            stack.to_string(),
            format!(
                "fork at snapshot v=1 (2026-01-01 00:00:00 UTC, catalog {})",
                &Digest::of(b"fork").to_string()[..12]
            )
        );
        let json = serde_json::to_string(&stack).unwrap();
        assert_eq!(serde_json::from_str::<Stack>(&json).unwrap(), stack);
        assert_ne!(stack, Stack::of("fork".parse().unwrap()));
        assert_eq!(Stack::of("fork".parse().unwrap()).snapshot(), None);
        for odd in [
            vec![],
            vec![layer("fork", "v=1"), layer("main", "v=2")],
            vec![layer("fork", "v=1"), StackLayer::live("main".parse().unwrap())],
            vec![StackLayer::live("main".parse().unwrap())],
        ] {
            assert_eq!(Stack::of_snapshot(odd), None);
        }
    }
}
