//! Which directory of the tree has which preset.
//!
//! Chosen presets are kept by path, because the directory need not exist; recognised ones by number, so
//! that they move with their directory. What counts for a directory is found once and remembered
//! until directories move.
//!
//! # Invariants
//!
//! - Without any preset a question costs one load.
//! - Nothing here reads the tree: whoever asks brings the way up from a directory.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{
        Mutex, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::{DirRule, NameRule, Preset, at::PresetAt};
use crate::{base::digest::Digest, store::rows::Ino};

/// Directories whose rules are remembered at most; then all are found anew.
const MAX_REMEMBERED: usize = 1 << 16;

/// Who chose a preset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A flag, a variable or the settings file of this mount.
    Mount,
    /// The settings of the volume, or of one below it.
    Volume,
    /// Something that a tool made.
    Recognised,
}

/// A directory with a preset, to be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// From the root of the volume; empty for the root.
    pub dir: Vec<u8>,
    pub preset: Preset,
    pub origin: Origin,
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", String::from_utf8_lossy(&self.dir), self.preset)
    }
}

/// One step on the way from the root to a directory.
#[derive(Clone, Debug)]
pub struct Step {
    pub ino: Ino,
    /// Empty for the root.
    pub name: Vec<u8>,
}

/// What went wrong in directories with presets, since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Names that prove content and did not have it; nobody was told of them.
    pub misnamed: AtomicU64,
    /// Lookups of action-cache entries that name a blob which is not there.
    pub withheld: AtomicU64,
    last: Mutex<Option<String>>,
}

impl Counters {
    /// Tells, and counts, that the file at `path` is not what its name says.
    pub fn misnamed(&self, path: &[u8], expected: &Digest, found: &Digest) {
        self.misnamed.fetch_add(1, Ordering::Relaxed);
        let path = String::from_utf8_lossy(path).into_owned();
        tracing::error!(
            path,
            %expected,
            %found,
            "the bytes of a file are not those that its name promises: it reads as \"no such file\" here and is \
             not shared"
        );
        *self.last.lock().expect("a panic ends the process") = Some(path);
    }

    /// The file found last that is not what its name says.
    pub fn last_misnamed(&self) -> Option<String> {
        self.last.lock().expect("a panic ends the process").clone()
    }
}

#[derive(Debug, Default)]
struct State {
    chosen: BTreeMap<Vec<u8>, (Preset, Origin)>,
    recognised: BTreeMap<Ino, Preset>,
    remembered: HashMap<Ino, Option<DirRule>>,
}

/// The presets of one mount.
#[derive(Debug, Default)]
pub struct Presets {
    active: AtomicBool,
    state: RwLock<State>,
    pub counters: Counters,
}

impl Presets {
    /// Whether any directory has a preset.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// Whether a preset was chosen for a path, whatever is there.
    pub fn is_chosen(&self) -> bool {
        self.is_active()
            && !self
                .state
                .read()
                .expect("a panic ends the process")
                .chosen
                .is_empty()
    }

    /// Takes what was chosen; what the mount says counts before what the volume says.
    pub fn choose(&self, by_mount: &[PresetAt], by_volume: &[PresetAt]) {
        self.change(|state| {
            let both = [(by_volume, Origin::Volume), (by_mount, Origin::Mount)];
            state.chosen = both
                .into_iter()
                .flat_map(|(list, origin)| list.iter().map(move |at| (at, origin)))
                .map(|(at, origin)| (at.dir().as_bytes().to_vec(), (at.preset, origin)))
                .collect();
        });
    }

    /// Takes a preset that was recognised; false if it was known.
    pub fn recognise(&self, dir: Ino, preset: Preset) -> bool {
        self.change(|state| state.recognised.insert(dir, preset) != Some(preset))
    }

    /// Forgets that a tool kept its cache in a directory, which is removed; false if it did not.
    pub fn forget(&self, dir: Ino) -> bool {
        self.is_active() && self.change(|state| state.recognised.remove(&dir).is_some())
    }

    /// Forgets what was found out by paths: directories moved.
    pub fn moved(&self) {
        if self.is_active() {
            self.change(|_| ());
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.write().expect("a panic ends the process");
        let done = change(&mut state);
        state.remembered.clear();
        let active = !state.chosen.is_empty() || !state.recognised.is_empty();
        self.active.store(active, Ordering::Release);
        done
    }

    /// What is said of a directory; `way` leads to it from the root, both included, and is asked
    /// for when this is not remembered. An error of `way` is passed on.
    pub fn rule<E>(
        &self,
        dir: Ino,
        way: impl FnOnce() -> Result<Vec<Step>, E>,
    ) -> Result<Option<DirRule>, E> {
        if !self.is_active() {
            return Ok(None);
        }
        if let Some(rule) = self
            .state
            .read()
            .expect("a panic ends the process")
            .remembered
            .get(&dir)
        {
            return Ok(*rule);
        }
        let way = way()?;
        let mut state = self.state.write().expect("a panic ends the process");
        let rule = state.find(&way);
        if state.remembered.len() >= MAX_REMEMBERED {
            state.remembered.clear();
        }
        state.remembered.insert(dir, rule);
        Ok(rule)
    }

    /// The same for a name in the directory.
    pub fn name_rule<E>(
        &self,
        dir: Ino,
        name: &[u8],
        way: impl FnOnce() -> Result<Vec<Step>, E>,
    ) -> Result<NameRule, E> {
        Ok(self
            .rule(dir, way)?
            .map_or(NameRule::default(), |rule| rule.name(name)))
    }

    /// All that were chosen, and those that were recognised with their numbers.
    pub fn all(&self) -> (Vec<Shown>, Vec<(Ino, Preset)>) {
        let state = self.state.read().expect("a panic ends the process");
        let chosen = state.chosen.iter().map(|(dir, (preset, origin))| Shown {
            dir: dir.clone(),
            preset: *preset,
            origin: *origin,
        });
        let recognised = state.recognised.iter().map(|(ino, preset)| (*ino, *preset));
        (chosen.collect(), recognised.collect())
    }
}

impl State {
    fn find(&self, way: &[Step]) -> Option<DirRule> {
        let mut rule: Option<DirRule> = None;
        // Whether the rule, or the lack of one, was chosen.
        let mut chosen_above = false;
        let mut path: Vec<u8> = Vec::new();
        for step in way {
            if !step.name.is_empty() {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(&step.name);
            }
            rule = if let Some((preset, _)) = self.chosen.get(&path) {
                chosen_above = true;
                Some(preset.top())
            } else if let Some(preset) = self.recognised.get(&step.ino).filter(|_| !chosen_above) {
                Some(preset.top())
            } else {
                rule.map(|rule| rule.below(&step.name))
            };
        }
        rule
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// The way to a path whose directories have the numbers 1, 2, 3 ...
    fn way(path: &str) -> Vec<Step> {
        let names = path.split('/').filter(|name| !name.is_empty());
        std::iter::once("")
            .chain(names)
            .enumerate()
            .map(|(index, name)| Step {
                ino: Ino(index as u64 + 1),
                name: name.as_bytes().to_vec(),
            })
            .collect()
    }

    fn preset(presets: &Presets, path: &str) -> Option<Preset> {
        presets.moved();
        let way = way(path);
        let dir = way.last().unwrap().ino;
        let rule = presets.rule(dir, || Ok::<_, Infallible>(way)).unwrap();
        rule.map(|rule| rule.preset)
    }

    #[test]
    fn nobody_is_asked_for_the_way_without_a_preset() {
        let presets = Presets::default();
        let rule = presets.rule(Ino(7), || Err("asked"));
        assert_eq!(rule, Ok(None));
    }

    #[test]
    fn the_deepest_directory_counts() {
        let presets = Presets::default();
        presets.choose(
            &PresetAt::list("a=bazel,a/b/c=ccache").unwrap(),
            &PresetAt::list("a=plain,d=sccache").unwrap(),
        );
        for (path, expected) in [
            ("", None),
            ("x", None),
            ("a", Some(Preset::Bazel)),
            ("a/b", Some(Preset::Bazel)),
            ("a/b/c", Some(Preset::Ccache)),
            ("a/b/c/d", Some(Preset::Ccache)),
            ("ab", None),
            ("d/e", Some(Preset::Sccache)),
        ] {
            assert_eq!(preset(&presets, path), expected, "{path}");
        }
    }

    #[test]
    fn a_recognised_preset_counts_only_where_none_was_chosen() {
        let presets = Presets::default();
        assert!(presets.recognise(Ino(2), Preset::Ccache));
        assert!(!presets.recognise(Ino(2), Preset::Ccache));
        assert_eq!(preset(&presets, "any/below"), Some(Preset::Ccache));
        assert_eq!(preset(&presets, ""), None);
        presets.choose(&PresetAt::list(".=plain").unwrap(), &[]);
        assert_eq!(preset(&presets, "any/below"), Some(Preset::Plain));
        presets.choose(&[], &[]);
        assert_eq!(preset(&presets, "any"), Some(Preset::Ccache));
        assert!(presets.forget(Ino(2)));
        assert_eq!(preset(&presets, "any"), None);
        assert!(!presets.is_active());
    }

    #[test]
    fn a_rule_is_found_once_until_directories_move() {
        let presets = Presets::default();
        presets.choose(&PresetAt::list("a=bazel").unwrap(), &[]);
        let rule = |path: Option<&str>| presets.rule(Ino(2), || path.map(way).ok_or("asked"));
        assert!(rule(Some("a")).unwrap().is_some());
        assert!(rule(None).unwrap().is_some());
        presets.moved();
        assert_eq!(rule(None), Err("asked"));
        assert_eq!(rule(Some("b")), Ok(None));
    }
}
