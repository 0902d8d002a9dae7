//! A directory of the volume with its preset, as people write it: `DIR=NAME`.

use std::{fmt, str::FromStr};

use super::Preset;

/// `--preset DIR=NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresetAt {
    dir: String,
    pub preset: Preset,
}

impl PresetAt {
    /// Checks the directory: a path from the root of the volume, which need not exist.
    pub fn new(dir: &str, preset: Preset) -> Result<Self, String> {
        let dir = directory(dir)?;
        Ok(Self { dir, preset })
    }

    /// The path from the root of the volume; empty for the root.
    #[must_use]
    pub fn dir(&self) -> &str {
        &self.dir
    }

    /// The directory as people write it: `.` for the root.
    #[must_use]
    pub fn shown_dir(&self) -> &str {
        shown(&self.dir)
    }

    /// Reads several, separated by commas.
    pub fn list(text: &str) -> Result<Vec<Self>, String> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let list = parts.map(str::parse).collect::<Result<Vec<Self>, _>>()?;
        check(&list)?;
        Ok(list)
    }
}

/// Refuses two presets for one directory.
pub fn check(list: &[PresetAt]) -> Result<(), String> {
    for (index, at) in list.iter().enumerate() {
        if let Some(other) = list[..index].iter().find(|other| other.dir == at.dir) {
            return Err(format!(
                "{} has two presets, {} and {}: keep one",
                at.shown_dir(),
                other.preset,
                at.preset
            ));
        }
    }
    Ok(())
}

/// A directory from the root of the volume, as it is shown.
#[must_use]
pub fn shown(dir: &str) -> &str {
    if dir.is_empty() { "." } else { dir }
}

/// Reads a directory from the root of the volume; empty: the root itself.
pub fn directory(text: &str) -> Result<String, String> {
    if text.starts_with('/') {
        return Err(format!(
            "{text:?} is absolute: name the directory from the root of the volume"
        ));
    }
    let mut names = Vec::new();
    for name in text.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                return Err(format!(
                    "{text:?} has a '..' in it: name the directory from the root of the volume"
                ));
            }
            name => names.push(name),
        }
    }
    if text.is_empty() {
        return Err("the directory is missing: DIR=NAME, with '.' for the root of the volume".to_owned());
    }
    Ok(names.join("/"))
}

impl FromStr for PresetAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((dir, name)) = text.rsplit_once('=') else {
            return Err(format!("{text:?} is not DIR=NAME (presets: {})", Preset::known()));
        };
        Self::new(dir, name.parse()?)
    }
}

impl fmt::Display for PresetAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.shown_dir(), self.preset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_spelling() {
        for (text, expected) in [
            ("cache=bazel", "cache=bazel"),
            ("./a//b/=ccache", "a/b=ccache"),
            (".=plain", ".=plain"),
            ("a=b=plain", "a=b=plain"),
        ] {
            assert_eq!(text.parse::<PresetAt>().unwrap().to_string(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_directory_of_the_volume_is_refused() {
        for (text, why) in [
            ("cache", "is not DIR=NAME"),
            ("cache=make", "known: bazel, ccache, sccache, plain"),
            ("/cache=bazel", "is absolute"),
            ("a/../b=bazel", "has a '..' in it"),
            ("=bazel", "the directory is missing"),
        ] {
            let err = text.parse::<PresetAt>().unwrap_err();
            assert!(err.contains(why), "{text}: {err}");
        }
        assert_eq!(
            PresetAt::list("a=bazel, ./a/=ccache").unwrap_err(),
            "a has two presets, bazel and ccache: keep one"
        );
        assert_eq!(PresetAt::list("a=bazel, b=ccache,").unwrap().len(), 2);
    }
}
