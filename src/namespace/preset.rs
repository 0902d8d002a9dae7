//! What a build tool expects of the directory that it keeps its cache in.
//!
//! A directory has a *preset*: chosen by `--preset DIR=NAME`, in the settings of the volume, or recognised
//! by what a tool makes there. This file decides what a preset says of a name; [`table`] knows which
//! directory has which, [`super::tree`] and the layers above act. Nothing here does I/O, so every rule
//! is tested with a literal.
//!
//! | | `bazel` | `ccache` | `sccache` | `plain` |
//! |---|---|---|---|---|
//! | stay on this machine | `tmp/`, `gc/`, `<uuid>` beside them | `tmp/`, `lock/`, `stats`, `.cleaned`, `*.lock`, `*.alive`, `*.tmp.*` | `.sccachetmp*` | nothing |
//! | a delete is | this machine's | this machine's | this machine's | for all |
//! | names prove content | `cas/<xx>/<sha256>`, `<sha256>` | | | |
//! | shown when all that it names is there | `ac/<xx>/<sha256>`, `ac_<sha256>` | | | |
//! | settle time | none | none | none | that of the mount |
//! | times that are set | stay on this machine | the same | the same | are for all, but for *now* |
//! | belongs to | the mounting user | the mounting user | the mounting user | as the mount says |
//!
//! (Bazel up to version 2 has one directory without `cas/`, `ac/` and `tmp/`.)
//!
//! # Rules
//!
//! - A name that *stays* is of this machine alone: it is never published, its bytes never leave, and what other
//!   machines say of it does not replace it. What is below such a directory stays as well. The tool
//!   makes it anew on every machine: a lock, a counter, a file that is not complete.
//! - A *delete of this machine* hides the name here and is never told: each tool deletes to keep its own idea
//!   of a size, and one small machine must not empty the cache of all. The name comes back when another
//!   machine makes it again, or, if it is an action-cache entry, makes again what it names. A rename tells the others
//!   that the old name is gone, unless the new one is how the tool deletes (ccache renames to `*.tmp.*` first).
//! - No *settle time*: a name of such a cache is complete when it appears, because it was renamed into place.
//! - The deepest directory with a preset counts. A recognised preset counts only where none was chosen.

pub mod at;
pub mod table;
pub mod volume;

use std::{fmt, str::FromStr, time::Duration};

use crate::base::digest::Digest;

/// How a directory is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Preset {
    /// Bazel's `--disk_cache`.
    Bazel,
    /// ccache's `cache_dir`.
    Ccache,
    /// sccache's `SCCACHE_DIR`.
    Sccache,
    /// Files like any other; also turns recognition off.
    Plain,
}

/// What a preset says of a directory. Small, to be kept for every directory in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirRule {
    pub preset: Preset,
    place: Place,
}

/// Where below the directory that has the preset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Top,
    /// Everything here stays on this machine.
    Here,
    /// `cas`, and a directory in it.
    Contents,
    ContentShard,
    /// `ac`, and a directory in it.
    Actions,
    ActionShard,
    Below,
}

/// Where the blobs are that an action-cache entry names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blobs {
    /// In `../../cas/<xx>/`.
    Sharded,
    /// Beside it.
    Beside,
}

/// What a preset says of a name in a directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NameRule {
    /// It is of this machine alone.
    pub stays: bool,
    /// Its bytes have this digest, or it is not what it says.
    pub proves: Option<Digest>,
    /// It is an action-cache entry: shown only when every blob that it names is known to exist.
    pub action: Option<Blobs>,
    /// Removing it hides it on this machine only.
    pub deletes_here: bool,
    /// A name that the tool gives to what it is about to delete.
    pub scrap: bool,
}

impl Preset {
    pub const ALL: [Self; 4] = [Self::Bazel, Self::Ccache, Self::Sccache, Self::Plain];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bazel => "bazel",
            Self::Ccache => "ccache",
            Self::Sccache => "sccache",
            Self::Plain => "plain",
        }
    }

    /// The names of all presets, for people.
    #[must_use]
    pub fn known() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// Whether a delete hides the name on this machine only.
    #[must_use]
    pub fn deletes_here(self) -> bool {
        self != Self::Plain
    }

    /// How long a closed file rests before it is sealed; `None`: as the mount says.
    #[must_use]
    pub fn settle(self) -> Option<Duration> {
        (self != Self::Plain).then_some(Duration::ZERO)
    }

    /// Whether the times of a file say when it was used here, however they are set, and nothing that others
    /// need to know. Bazel 7 and sccache write the time of their own clock at every hit.
    #[must_use]
    pub fn times_tell_use(self) -> bool {
        self != Self::Plain
    }

    /// Whether files belong to the mounting user also where the mount keeps recorded owners: who wrote
    /// an entry elsewhere means nothing here, and every build must be allowed to touch it.
    #[must_use]
    pub fn owned_by_mount(self) -> bool {
        self != Self::Plain
    }

    /// What it says of the directory that has it.
    #[must_use]
    pub fn top(self) -> DirRule {
        DirRule {
            preset: self,
            place: Place::Top,
        }
    }
}

impl DirRule {
    /// What is said of the directory `name` in this one.
    #[must_use]
    pub fn below(self, name: &[u8]) -> Self {
        let place = match (self.preset, self.place, name) {
            _ if self.name(name).stays => Place::Here,
            (Preset::Bazel, Place::Top, b"cas") => Place::Contents,
            (Preset::Bazel, Place::Top, b"ac") => Place::Actions,
            (Preset::Bazel, Place::Contents, _) if is_shard(name) => Place::ContentShard,
            (Preset::Bazel, Place::Actions, _) if is_shard(name) => Place::ActionShard,
            _ => Place::Below,
        };
        Self { place, ..self }
    }

    /// What is said of a name in this directory.
    #[must_use]
    pub fn name(self, name: &[u8]) -> NameRule {
        let rule = NameRule {
            deletes_here: self.preset.deletes_here(),
            ..NameRule::default()
        };
        if self.place == Place::Here {
            return NameRule { stays: true, ..rule };
        }
        match self.preset {
            Preset::Plain => rule,
            Preset::Bazel => NameRule {
                stays: self.place == Place::Top && (matches!(name, b"tmp" | b"gc") || is_uuid(name)),
                proves: matches!(self.place, Place::ContentShard | Place::Top)
                    .then(|| sha256(name))
                    .flatten(),
                action: match self.place {
                    Place::ActionShard if sha256(name).is_some() => Some(Blobs::Sharded),
                    Place::Top if is_flat_action(name) => Some(Blobs::Beside),
                    _ => None,
                },
                ..rule
            },
            Preset::Ccache => {
                let scrap = name.windows(5).any(|part| part == b".tmp.");
                let at_top = self.place == Place::Top && matches!(name, b"tmp" | b"lock");
                NameRule {
                    stays: scrap
                        || at_top
                        || matches!(name, b"stats" | b".cleaned")
                        || name.ends_with(b".lock")
                        || name.ends_with(b".alive"),
                    scrap,
                    ..rule
                }
            }
            Preset::Sccache => NameRule {
                stays: name.starts_with(SCCACHE_TEMP),
                ..rule
            },
        }
    }
}

/// What sccache calls a file that it writes, before it is renamed into place.
const SCCACHE_TEMP: &[u8] = b".sccachetmp";

/// A sign that a tool keeps its cache in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sign {
    pub preset: Preset,
    /// The cache is so many directories above the one with the new name.
    pub above: usize,
    /// A directory that must be there as well.
    pub needs: Option<&'static [u8]>,
}

/// Reads the making of `name` in a directory as the sign of a tool. `dir` tells the name of that directory (0) and
/// of those above it, asked for only when `name` may be a sign; that of the root is empty.
///
/// Cheap for all other names: this is asked for every one that is made. A name that stays on its machine is a
/// sign there alone, so each tool has another one that travels.
pub fn sign(name: &[u8], is_dir: bool, dir: impl Fn(usize) -> Vec<u8>) -> Option<Sign> {
    let sign = |preset, above, needs| Some(Sign { preset, above, needs });
    match name {
        b"ccache.conf" if !is_dir => sign(Preset::Ccache, 0, None),
        b"CACHEDIR.TAG" if !is_dir => match dir(0).as_slice() {
            [digit] if is_hex(*digit) => sign(Preset::Ccache, 1, None),
            _ => None,
        },
        [a, b] if is_dir && is_hex(*a) && is_hex(*b) => match dir(0).as_slice() {
            b"ac" => sign(Preset::Bazel, 1, Some(b"cas")),
            b"cas" => sign(Preset::Bazel, 1, Some(b"ac")),
            _ => None,
        },
        _ if !is_dir && is_flat_action(name) => sign(Preset::Bazel, 0, None),
        _ if !is_dir && name.starts_with(SCCACHE_TEMP) => sign(Preset::Sccache, 0, None),
        // `<h>/<i>/<hi...>`. What lies three directories deep is of a cache within that.
        [first, second, ..] if !is_dir && sha256(name).is_some() => {
            let lies_in = |above: usize, digit: u8| dir(above) == [digit];
            let is_entry = lies_in(0, *second) && lies_in(1, *first);
            let is_deeper = || matches!(dir(2).as_slice(), [digit] if is_hex(*digit));
            if is_entry && !is_deeper() {
                return sign(Preset::Sccache, 2, None);
            }
            None
        }
        _ => None,
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Preset {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|preset| preset.name() == text);
        found.ok_or_else(|| format!("{text:?} is not a preset (known: {})", Self::known()))
    }
}

fn is_flat_action(name: &[u8]) -> bool {
    name.strip_prefix(b"ac_")
        .is_some_and(|rest| sha256(rest).is_some())
}

fn is_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

fn is_shard(name: &[u8]) -> bool {
    matches!(name, [a, b] if is_hex(*a) && is_hex(*b))
}

/// The digest that a name is, if it is one.
fn sha256(name: &[u8]) -> Option<Digest> {
    if name.len() != 64 || !name.iter().copied().all(is_hex) {
        return None;
    }
    std::str::from_utf8(name).ok()?.parse().ok()
}

/// Older Bazels write `<root>/<uuid>` first.
fn is_uuid(name: &[u8]) -> bool {
    name.len() == 36
        && name.iter().enumerate().all(|(at, &byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => is_hex(byte),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    /// What is said of a path below the directory with the preset, as letters: `s`tays, `p`roves,
    /// `a`ction, `d`eletes here, s`c`rap.
    fn said(preset: Preset, path: &str) -> String {
        let mut rule = preset.top();
        let (dirs, name) = path.rsplit_once('/').unwrap_or(("", path));
        for dir in dirs.split('/').filter(|dir| !dir.is_empty()) {
            rule = rule.below(dir.as_bytes());
        }
        let rule = rule.name(name.as_bytes());
        if let Some(digest) = rule.proves {
            assert_eq!(digest.to_string(), name);
        }
        [
            (rule.stays, 's'),
            (rule.proves.is_some(), 'p'),
            (rule.action.is_some(), 'a'),
            (rule.deletes_here, 'd'),
            (rule.scrap, 'c'),
        ]
        .into_iter()
        .filter_map(|(holds, letter)| holds.then_some(letter))
        .collect()
    }

    #[test]
    fn each_preset_says_what_its_tool_needs() {
        let cas = format!("cas/e3/{SHA}");
        let upper = format!("cas/e3/{}", SHA.to_uppercase());
        let sha1 = format!("cas/e3/{}", &SHA[..40]);
        let shallow = format!("cas/{SHA}");
        let deep = format!("cas/e3/x/{SHA}");
        let other_function = format!("blake3/cas/e3/{SHA}");
        let ac = format!("ac/e3/{SHA}");
        let flat = format!("ac_{SHA}");
        let in_tmp = format!("tmp/cas/e3/{SHA}");
        let table = [
            (Preset::Bazel, "cas", "d"),
            (Preset::Bazel, "ac/e3", "d"),
            (Preset::Bazel, &cas, "pd"),
            (Preset::Bazel, &upper, "d"),
            (Preset::Bazel, &sha1, "d"),
            (Preset::Bazel, &shallow, "d"),
            (Preset::Bazel, &deep, "d"),
            (Preset::Bazel, &other_function, "d"),
            (Preset::Bazel, &ac, "ad"),
            (Preset::Bazel, SHA, "pd"),
            (Preset::Bazel, &flat, "ad"),
            (Preset::Bazel, "ac_1", "d"),
            (Preset::Bazel, "ac/e3/README", "d"),
            (Preset::Bazel, "tmp", "sd"),
            (Preset::Bazel, "tmp/x", "sd"),
            (Preset::Bazel, &in_tmp, "sd"),
            (Preset::Bazel, "gc/lock", "sd"),
            (Preset::Bazel, "cas/tmp", "d"),
            (Preset::Bazel, "0f8fad5b-d9cb-469f-a165-70867728950e", "sd"),
            (Preset::Bazel, "cas/0f8fad5b-d9cb-469f-a165-70867728950e", "d"),
            (Preset::Bazel, "0f8fad5b-d9cb-469f-a165-70867728950", "d"),
            (Preset::Ccache, "0", "d"),
            (Preset::Ccache, "0/1", "d"),
            (Preset::Ccache, "0/1/23abcR", "d"),
            (Preset::Ccache, "0/CACHEDIR.TAG", "d"),
            (Preset::Ccache, "ccache.conf", "d"),
            (Preset::Ccache, "0/stats", "sd"),
            (Preset::Ccache, "0/1/stats", "sd"),
            (Preset::Ccache, "0/stats.lock", "sd"),
            (Preset::Ccache, "0/stats.alive", "sd"),
            (Preset::Ccache, "0/stats.tmp.Ab1.tmp", "sdc"),
            (Preset::Ccache, "0/1/23abcR.tmp.Ab1.tmp", "sdc"),
            (Preset::Ccache, "0/1/23abcR.ccache.tmp.remove", "sdc"),
            (Preset::Ccache, "0/1/23abcR.tmp", "d"),
            (Preset::Ccache, "tmp", "sd"),
            (Preset::Ccache, "tmp/cpp_stdout", "sd"),
            (Preset::Ccache, "0/tmp", "d"),
            (Preset::Ccache, "lock/subdir_01.lock", "sd"),
            (Preset::Sccache, "a/b/abc", "d"),
            (Preset::Sccache, "preprocessor/a/b/c/abc", "d"),
            (Preset::Sccache, ".sccachetmpX1y2", "sd"),
            (Preset::Plain, "tmp/stats.lock", ""),
            (Preset::Plain, &cas, ""),
            (Preset::Plain, &ac, ""),
        ];
        for (preset, path, expected) in table {
            assert_eq!(said(preset, path), expected, "{preset} {path}");
        }
    }

    #[test]
    fn a_tool_is_recognised_by_what_it_makes() {
        let of = |path: &str, is_dir| {
            let names: Vec<&str> = path.rsplit('/').collect();
            let dir = |above: usize| names.get(above + 1).unwrap_or(&"").as_bytes().to_vec();
            sign(names[0].as_bytes(), is_dir, dir).map(|sign| (sign.preset, sign.above, sign.needs))
        };
        let flat = format!("d/ac_{SHA}");
        let entry = format!("sc/e/3/{SHA}");
        let cas: Option<&[u8]> = Some(b"cas");
        let table = [
            ("d/ccache.conf", false, Some((Preset::Ccache, 0, None))),
            ("d/ccache.conf", true, None),
            ("d/3/CACHEDIR.TAG", false, Some((Preset::Ccache, 1, None))),
            ("target/CACHEDIR.TAG", false, None),
            ("d/g/CACHEDIR.TAG", false, None),
            ("d/ac/0f", true, Some((Preset::Bazel, 1, cas))),
            ("d/cas/0f", true, Some((Preset::Bazel, 1, Some(b"ac")))),
            ("d/ac/0f", false, None),
            (&flat, false, Some((Preset::Bazel, 0, None))),
            (&flat, true, None),
            ("d/objects/0f", true, None),
            ("d/ac/0g", true, None),
            ("d/.sccachetmpAb", false, Some((Preset::Sccache, 0, None))),
            (&entry, false, Some((Preset::Sccache, 2, None))),
            (&entry["sc/".len()..], false, Some((Preset::Sccache, 2, None))),
            (&entry, true, None),
            (&format!("sc/e/0/{SHA}"), false, None),
            (&format!("sc/preprocessor/e/e/3/{SHA}"), false, None),
            (&format!("sc/preprocessor/e/3/b/{SHA}"), false, None),
            (&format!("d/cas/e3/{SHA}"), false, None),
            ("d/file", false, None),
            ("d/dir", true, None),
        ];
        for (path, is_dir, expected) in table {
            assert_eq!(of(path, is_dir), expected, "{path}");
        }
    }

    #[test]
    fn an_unknown_preset_is_told_with_the_known_ones() {
        for preset in Preset::ALL {
            assert_eq!(preset.name().parse(), Ok(preset));
        }
        let err = "Bazel".parse::<Preset>().unwrap_err();
        assert_eq!(
            err,
            "\"Bazel\" is not a preset (known: bazel, ccache, sccache, plain)"
        );
    }
}
