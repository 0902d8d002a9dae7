//! The model of several machines with one volume: what each of them sees, and what they agree on.
//!
//! Each machine is a file system of its own (`fs`), which notes what it has to tell. When they hear of
//! each other ([`World::agree`]), the laws of the merge (`casmount::namespace::tree`) are read naively:
//! each path is a register, the last change of it counts, and a live child keeps its ancestors alive.
//! "Last" is in the order in which the operations were done, one after the other.
//!
//! Between two agreements the machines do not hear of each other: either one alone is at work, or the
//! store is in trouble. So each operation has one right answer.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    answer::Time,
    fs::{Body, Fs, Id, Node, ROOT},
    ops::{Op, SLOTS, Slot},
};

/// What a path says of itself.
#[derive(Clone, Debug)]
struct Entry {
    /// Whose change it is; `None` when nobody changed it since the last agreement.
    by: Option<usize>,
    node: Node,
}

/// What is seen after an agreement.
type Seen = BTreeMap<String, Entry>;

pub struct World {
    pub machines: Vec<Fs>,
    pub step: u64,
}

impl World {
    pub fn new(machines: usize) -> Self {
        Self {
            machines: vec![Fs::new(); machines],
            step: 0,
        }
    }

    /// Whether an operation is left out, because its outcome is not promised in this situation.
    pub fn is_unpromised(&self, machine: usize, op: &Op, apart: bool, away: bool) -> bool {
        let model = &self.machines[machine];
        moves_shadows(model, op) || (away && needs_store(model, op)) || (apart && self.is_late(machine, op))
    }

    /// A change of attributes of a file that waits to be told goes with its last close, whose stamp it
    /// has. So it may count as older than a change that another machine made in between.
    ///
    /// The same holds for a directory in which a file is open for writing: it is told again with that.
    fn is_late(&self, machine: usize, op: &Op) -> bool {
        let model = &self.machines[machine];
        let id = match op {
            Op::Chmod { path, .. } | Op::SetXattr { path, .. } | Op::RemoveXattr { path, .. } => {
                model.find(path, true).ok()
            }
            Op::Utime { path, nofollow, .. } => model.find(path, !nofollow).ok(),
            Op::Fchmod { slot, .. } => model.handles[*slot].as_ref().map(|handle| handle.node),
            _ => None,
        };
        let Some(id) = id else { return false };
        if model.node(id).is_dir() {
            return model.entries(id).values().any(|child| model.has_writer(*child));
        }
        let others = self
            .machines
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != machine);
        let others: Vec<_> = others.map(|(_, other)| other).collect();
        model.paths_of(id).iter().any(|path| {
            let own = model.told.get(path);
            own.is_some_and(|own| others.iter().any(|other| other.told.get(path) > Some(own)))
        })
    }

    /// Which open files have to be closed before the machines agree: those of which it is not promised
    /// what becomes of them.
    pub fn to_close(&self, machine: usize) -> Vec<Slot> {
        let model = &self.machines[machine];
        let is_unsure = |slot: &Slot| {
            let Some(handle) = &model.handles[*slot] else {
                return false;
            };
            let node = model.node(handle.node);
            let paths = model.paths_of(handle.node);
            let is_told = paths.iter().any(|path| model.told.contains_key(path));
            node.is_dir() || node.vague || node.dirty || is_told
        };
        (0..SLOTS).filter(is_unsure).collect()
    }

    /// As [`Self::to_close`], by what the others did; to be asked when those are closed.
    pub fn to_close_for_others(&self, machine: usize) -> Vec<Slot> {
        let model = &self.machines[machine];
        let seen = visible(&self.registers());
        let is_unsure = |slot: &Slot| {
            let Some(handle) = &model.handles[*slot] else {
                return false;
            };
            let paths = model.paths_of(handle.node);
            // Names of one file of which some are taken are another file's, or not, by the order of arrival.
            paths.len() > 1 && paths.iter().any(|path| is_others(machine, &seen, path))
                || paths.iter().any(|path| {
                    let entry = seen
                        .get(path)
                        .filter(|entry| entry.by.is_some_and(|by| by != machine));
                    let is_dir = entry.is_some_and(|entry| entry.node.is_dir());
                    let is_same = entry.is_some_and(|entry| holds(model.node(handle.node), &entry.node));
                    let above = path.rsplit_once('/').map(|(above, _)| above);
                    let is_lonely =
                        above.is_some_and(|above| seen.get(above).is_none_or(|above| !above.node.is_dir()));
                    is_dir || is_same || is_lonely
                })
        };
        (0..SLOTS).filter(is_unsure).collect()
    }

    /// All registers: of each path the last change, if anybody changed it.
    fn registers(&self) -> BTreeMap<String, Option<Entry>> {
        let trees: Vec<_> = self.machines.iter().map(Fs::paths).collect();
        let mut paths: BTreeSet<String> = BTreeSet::new();
        for (model, tree) in self.machines.iter().zip(&trees) {
            paths.extend(tree.keys().cloned());
            paths.extend(model.told.keys().cloned());
        }
        let register = |path: String| {
            let steps = self.machines.iter().map(|model| model.told.get(&path).copied());
            let (by, step) = steps
                .enumerate()
                .max_by_key(|(_, step)| *step)
                .expect("there is a machine");
            let entry = trees[by].get(&path).map(|id| Entry {
                by: step.map(|_| by),
                node: self.machines[by].node(*id).clone(),
            });
            (path, entry)
        };
        paths.into_iter().map(register).collect()
    }

    /// Lets all machines hear of everything. Returns what is to be done on the first of them, and told
    /// again, until all is as plain file systems have it: a directory that lives on for its children
    /// alone gets rights of its own, and names of which it is not sure whether they are one file go.
    pub fn agree(&mut self) -> Vec<Op> {
        let seen = visible(&self.registers());
        let mut repairs = Vec::new();
        for (path, entry) in &seen {
            // See `visible`.
            if entry.node.vague && entry.node.is_dir() {
                repairs.push(Op::Chmod {
                    path: path.clone(),
                    mode: 0o755,
                });
            }
        }
        let (unsure, newest) = links(&seen);
        for (link, paths) in &newest {
            if unsure.contains(link) {
                let paths = paths.iter().skip(1).cloned();
                repairs.extend(paths.map(|path| Op::Unlink { path }));
            }
        }
        for machine in 0..self.machines.len() {
            adopt(&mut self.machines[machine], machine, &seen, &unsure);
        }
        repairs
    }
}

/// What is seen of some registers. A directory that is there for its children alone is marked as vague.
fn visible(registers: &BTreeMap<String, Option<Entry>>) -> Seen {
    let mut seen = Seen::new();
    for (path, entry) in registers {
        let Some(entry) = entry else { continue };
        seen.entry(path.clone()).or_insert_with(|| entry.clone());
        for (at, _) in path.match_indices('/') {
            let above = &path[..at];
            let own = registers.get(above).cloned().flatten();
            let shown = own.filter(|entry| entry.node.is_dir()).unwrap_or_else(|| {
                let body = Body::Dir {
                    up: ROOT,
                    names: BTreeMap::new(),
                };
                let mut node = Node::new(body, 0o755, 0);
                node.vague = true;
                Entry { by: None, node }
            });
            seen.insert(above.to_owned(), shown);
        }
    }
    seen
}

/// Files of several names: those whose names say different things, and the names of all.
fn links(seen: &Seen) -> (BTreeSet<u64>, BTreeMap<u64, Vec<String>>) {
    let mut names: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for (path, entry) in seen {
        if let Some(link) = entry.node.link {
            names.entry(link).or_default().push(path.clone());
        }
    }
    let differ = |paths: &Vec<String>| {
        let first = &seen[&paths[0]].node;
        paths.iter().any(|path| {
            let node = &seen[path].node;
            !holds(first, node)
                || (node.perm, &node.xattrs, node.mtime) != (first.perm, &first.xattrs, first.mtime)
        })
    };
    let unsure = names
        .iter()
        .filter(|(_, paths)| differ(paths))
        .map(|(link, _)| *link)
        .collect();
    (unsure, names)
}

/// Whether a file has the bytes, or leads where, another one does.
fn holds(one: &Node, other: &Node) -> bool {
    match (&one.body, &other.body) {
        (Body::File(one), Body::File(other)) => one == other,
        (Body::Link(one), Body::Link(other)) => one == other,
        _ => false,
    }
}

/// Makes the tree of a machine what is seen.
fn adopt(model: &mut Fs, machine: usize, seen: &Seen, unsure: &BTreeSet<u64>) {
    // What goes first, from below: names that are not there any more, or are something else.
    for (path, id) in model.paths().into_iter().rev() {
        let node = model.node(id);
        let stays = seen.get(&path).is_some_and(|entry| {
            let linked = entry.node.link.is_none_or(|link| !unsure.contains(&link));
            let same = node.link == entry.node.link || (node.link.is_none() && node.names == 1);
            node.is_dir() && entry.node.is_dir() || (linked && same && holds(node, &entry.node))
        });
        if !stays {
            let is_file = !node.is_dir();
            let place = model.place(&path, false).expect("it was just seen");
            model.detach(place.dir, &place.name);
            if is_file && model.has_writer(id) {
                model.shadows.insert(path, id);
            }
        }
    }
    // Then what comes, from above.
    let mut linked: BTreeMap<u64, Id> = BTreeMap::new();
    for (path, id) in model.paths() {
        if let Some(link) = seen[&path].node.link {
            linked.insert(link, id);
        }
    }
    for (path, entry) in seen {
        let place = model.place(path, false).expect("its directory is there");
        let known = place.node.or_else(|| {
            let link = entry.node.link.filter(|link| !unsure.contains(link))?;
            linked.get(&link).copied()
        });
        let is_own = entry.by.is_none_or(|by| by == machine);
        let id = known.unwrap_or_else(|| {
            let mut node = entry.node.clone();
            (node.names, node.dirty) = (0, false);
            if let Body::Dir { names, .. } = &mut node.body {
                names.clear();
            }
            model.add(node)
        });
        if place.node.is_none() {
            model.attach(place.dir, &place.name, id);
        }
        let is_unsure = entry.node.link.is_some_and(|link| unsure.contains(&link));
        if let Some(link) = entry.node.link {
            linked.insert(link, id);
        }
        let node = model.node_mut(id);
        if !is_own || node.is_dir() {
            (node.perm, node.mtime) = (entry.node.perm, entry.node.mtime);
            node.xattrs.clone_from(&entry.node.xattrs);
        }
        node.link = entry.node.link;
        node.vague = is_unsure;
        if node.is_dir() {
            // Times of directories are of each machine.
            node.mtime = Time::Any;
        }
    }
    model.node_mut(ROOT).mtime = Time::Any;
    model.told.clear();
}

/// Whether an operation may need bytes that this machine gave away.
///
/// A blob that is written to becomes a file of its own; another file of the same bytes is read from the
/// store again, which is not there.
fn needs_store(model: &Fs, op: &Op) -> bool {
    let path = match op {
        Op::Open { path, how, .. } if how.writes() || how.truncate => path,
        Op::Put { path, .. } | Op::Truncate { path, .. } => path,
        _ => return false,
    };
    let Ok(id) = model.find(path, true) else {
        return false;
    };
    let Body::File(bytes) = &model.node(id).body else {
        return false;
    };
    let mut others = model.nodes.iter().filter(|(other, _)| **other != id);
    !bytes.is_empty() && others.any(|(_, node)| matches!(&node.body, Body::File(other) if other == bytes))
}

/// Names that another machine took from an open file are known by their paths.
fn moves_shadows(model: &Fs, op: &Op) -> bool {
    let moved: Vec<&String> = match op {
        Op::Rename { from, to, .. } => vec![from, to],
        Op::Rmdir { path } => vec![path],
        _ => return false,
    };
    !model.shadows.is_empty()
        && moved.iter().any(|path| {
            let found = model.find(path, false);
            found.is_ok_and(|id| model.node(id).is_dir())
        })
}

/// Whether another machine says what is at a path, or that nothing is.
fn is_others(machine: usize, seen: &Seen, path: &str) -> bool {
    match seen.get(path) {
        Some(entry) => entry.by.is_some_and(|by| by != machine),
        None => true,
    }
}
