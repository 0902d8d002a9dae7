//! The model: what a file system of one machine is, in memory, by the letter of POSIX and Linux.
//!
//! Here are inodes, names and the walk along a path; what operations do to names is in `names`, what
//! they do to bytes in `files`. Everything runs as root, so rights never refuse anything.
//!
//! The model also notes which paths an operation has changed for other machines, and when ([`Fs::told`]).
//! That is the only thing here that a local file system does not have.

use std::collections::BTreeMap;

use super::{
    answer::{Answer, DIR, Expected, FILE, Kind, LINK, Meta, Nanos, Time},
    ops::{Op, SLOTS},
};

pub type Res<T> = Result<T, i32>;

/// The number of an inode.
pub type Id = u64;

pub const ROOT: Id = 0;

/// The umask under which everything runs.
pub const UMASK: u32 = 0o022;

/// How many symbolic links a path may lead through.
const MOST_LINKS: usize = 40;

#[derive(Clone, Debug)]
pub enum Body {
    File(Vec<u8>),
    Link(String),
    Dir { up: Id, names: BTreeMap<String, Id> },
}

impl Body {
    pub fn is_empty_file(&self) -> bool {
        matches!(self, Self::File(bytes) if bytes.is_empty())
    }
}

#[derive(Clone, Debug)]
pub struct Node {
    pub body: Body,
    pub perm: u32,
    /// Of a file or symbolic link: how many names it has. Of a directory whether it has one.
    pub names: u64,
    pub mtime: Time,
    pub xattrs: BTreeMap<&'static str, String>,
    /// Written by somebody who has it open since it was told of.
    pub dirty: bool,
    /// The names that carry the same number are, on other machines too, names of one file.
    pub link: Option<u64>,
    /// Machines disagreed about its links: which of its names are one file is not known.
    pub vague: bool,
}

impl Node {
    pub fn new(body: Body, perm: u32, now: Nanos) -> Self {
        Self {
            body,
            perm,
            names: 1,
            mtime: Time::Since(now),
            xattrs: BTreeMap::new(),
            dirty: false,
            link: None,
            vague: false,
        }
    }

    pub fn kind(&self) -> Kind {
        match self.body {
            Body::File(_) => FILE,
            Body::Link(_) => LINK,
            Body::Dir { .. } => DIR,
        }
    }

    pub fn is_dir(&self) -> bool {
        self.kind() == DIR
    }
}

/// An open file.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub struct Handle {
    pub node: Id,
    pub reads: bool,
    pub writes: bool,
    pub append: bool,
    /// The file was made by this open: for others it is there when this is closed.
    pub made: bool,
    /// The file was emptied by this open, which is told when this is closed, also of one for reading alone.
    pub emptied: bool,
}

impl Handle {
    /// Whether its close is what others are told.
    pub fn is_writer(&self) -> bool {
        self.writes || self.made || self.emptied
    }
}

/// Where a path leads: a name in a directory, and what has that name.
#[derive(Clone, Debug)]
pub struct Place {
    pub dir: Id,
    pub name: String,
    pub node: Option<Id>,
}

/// Mistakes that the model can be told to make, so that tests see them found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// The rename of a file onto another name of it removes the old name.
    RenameOntoItself,
    /// A file that grows has no zeros where nobody wrote.
    GapOfOnes,
}

#[derive(Clone, Debug)]
pub struct Fs {
    pub nodes: BTreeMap<Id, Node>,
    pub handles: [Option<Handle>; SLOTS],
    pub mistake: Option<Mistake>,
    /// The paths that were changed here since all machines agreed, with the number of the change.
    pub told: BTreeMap<String, u64>,
    /// Names that another machine took from a file that is open for writing here: its next close
    /// after a change takes them back.
    pub shadows: BTreeMap<String, Id>,
    /// The number of the operation that is done, and its time.
    pub now: Nanos,
    pub step: u64,
    next: Id,
}

impl Fs {
    pub fn new() -> Self {
        let root = Body::Dir {
            up: ROOT,
            names: BTreeMap::new(),
        };
        let root = Node {
            mtime: Time::Any,
            ..Node::new(root, 0o755, 0)
        };
        Self {
            nodes: BTreeMap::from([(ROOT, root)]),
            handles: [const { None }; SLOTS],
            mistake: None,
            told: BTreeMap::new(),
            shadows: BTreeMap::new(),
            now: 0,
            step: 0,
            next: 1,
        }
    }

    /// Does one operation, the `step`th of all, and says what it must answer.
    pub fn apply(&mut self, op: &Op, step: u64, now: Nanos) -> Expected {
        (self.step, self.now) = (step, now);
        match self.dispatch(op) {
            Ok(expected) => expected,
            Err(errno) => Expected::Exactly(Answer::Failed(errno)),
        }
    }

    fn dispatch(&mut self, op: &Op) -> Res<Expected> {
        if let Some(slot) = slot_of(op)
            && self.handles[slot].is_none()
        {
            return Ok(Expected::Exactly(Answer::Skipped));
        }
        if let Some(done) = self.name_op(op)? {
            return Ok(done);
        }
        self.file_op(op)
    }

    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[&id]
    }

    pub fn node_mut(&mut self, id: Id) -> &mut Node {
        self.nodes.get_mut(&id).expect("numbers are never used again")
    }

    pub fn add(&mut self, node: Node) -> Id {
        let id = self.next;
        self.next += 1;
        self.nodes.insert(id, node);
        id
    }

    pub fn entries(&self, dir: Id) -> &BTreeMap<String, Id> {
        match &self.node(dir).body {
            Body::Dir { names, .. } => names,
            Body::File(_) | Body::Link(_) => panic!("{dir} is no directory"),
        }
    }

    pub fn entries_mut(&mut self, dir: Id) -> &mut BTreeMap<String, Id> {
        match &mut self.node_mut(dir).body {
            Body::Dir { names, .. } => names,
            Body::File(_) | Body::Link(_) => panic!("{dir} is no directory"),
        }
    }

    pub fn up(&self, dir: Id) -> Id {
        match self.node(dir).body {
            Body::Dir { up, .. } => up,
            Body::File(_) | Body::Link(_) => panic!("{dir} is no directory"),
        }
    }

    /// Goes along a path, also where its last name is a symbolic link if `follow`.
    pub fn place(&self, path: &str, follow: bool) -> Res<Place> {
        let mut rest: Vec<String> = path.rsplit('/').map(str::to_owned).collect();
        let (mut at, mut links) = (ROOT, 0);
        while let Some(name) = rest.pop() {
            if name == ".." {
                at = self.up(at);
                continue;
            }
            let (node, last) = (self.entries(at).get(&name).copied(), rest.is_empty());
            match node.map(|id| (id, &self.node(id).body)) {
                None if last => return Ok(Place { dir: at, name, node }),
                None => return Err(libc::ENOENT),
                Some((_, Body::Link(target))) if !last || follow => {
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(libc::ELOOP);
                    }
                    rest.extend(target.rsplit('/').map(str::to_owned));
                }
                Some(_) if last => return Ok(Place { dir: at, name, node }),
                Some((id, Body::Dir { .. })) => at = id,
                Some(_) => return Err(libc::ENOTDIR),
            }
        }
        unreachable!("paths end with a name")
    }

    /// As [`Self::place`], for what must be there.
    pub fn find(&self, path: &str, follow: bool) -> Res<Id> {
        self.place(path, follow)?.node.ok_or(libc::ENOENT)
    }

    /// Every path below the root with its node, directories before what is in them.
    pub fn paths(&self) -> BTreeMap<String, Id> {
        let mut paths = BTreeMap::new();
        self.paths_below(ROOT, "", &mut paths);
        paths
    }

    fn paths_below(&self, dir: Id, at: &str, paths: &mut BTreeMap<String, Id>) {
        for (name, &id) in self.entries(dir) {
            let path = join(at, name);
            if self.node(id).is_dir() {
                self.paths_below(id, &path, paths);
            }
            paths.insert(path, id);
        }
    }

    pub fn paths_of(&self, id: Id) -> Vec<String> {
        let paths = self.paths().into_iter();
        paths
            .filter(|(_, node)| *node == id)
            .map(|(path, _)| path)
            .collect()
    }

    /// The path of a name in a directory.
    pub fn path_in(&self, dir: Id, name: &str) -> String {
        let above = self.paths_of(dir).pop().unwrap_or_default();
        join(&above, name)
    }

    /// Notes that others are to be told of a path.
    pub fn tell(&mut self, path: &str) {
        self.told.insert(path.to_owned(), self.step);
        self.shadows.remove(path);
    }

    /// Notes that a file or directory changed at all of its names.
    pub fn tell_node(&mut self, id: Id) {
        for path in self.paths_of(id) {
            self.tell(&path);
        }
    }

    /// What was written is a change for others from now on, and takes back the names that they took.
    pub fn record(&mut self, id: Id) {
        if !std::mem::take(&mut self.node_mut(id).dirty) {
            return;
        }
        self.tell_node(id);
        let back: Vec<_> = self.shadows.iter().filter(|(_, node)| **node == id).collect();
        let back: Vec<String> = back.into_iter().map(|(path, _)| path.clone()).collect();
        for path in back {
            let place = self
                .place(&path, false)
                .expect("its directory stays while a name is shadowed");
            self.detach(place.dir, &place.name);
            self.attach(place.dir, &place.name, id);
            self.tell(&path);
        }
    }

    pub fn has_writer(&self, id: Id) -> bool {
        self.handles
            .iter()
            .flatten()
            .any(|handle| handle.node == id && handle.is_writer())
    }

    /// Gives a file one more name.
    pub fn attach(&mut self, dir: Id, name: &str, id: Id) {
        self.entries_mut(dir).insert(name.to_owned(), id);
        let node = self.node_mut(id);
        node.names += 1;
        if let Body::Dir { up, .. } = &mut node.body {
            (*up, node.names) = (dir, 1);
        }
    }

    /// Takes a name away, if it is there.
    pub fn detach(&mut self, dir: Id, name: &str) -> Option<Id> {
        let id = self.entries_mut(dir).remove(name)?;
        self.node_mut(id).names -= 1;
        Some(id)
    }

    pub fn changed(&mut self, id: Id) {
        self.node_mut(id).mtime = Time::Since(self.now);
    }

    /// How many links stat(2) shows.
    pub fn links(&self, id: Id) -> u64 {
        let node = self.node(id);
        match &node.body {
            Body::Dir { names, .. } if node.names > 0 => {
                2 + names.values().filter(|id| self.node(**id).is_dir()).count() as u64
            }
            Body::Dir { .. } => 0,
            Body::File(_) | Body::Link(_) => node.names,
        }
    }

    pub fn meta(&self, id: Id) -> Meta<Time> {
        let node = self.node(id);
        Meta {
            kind: node.kind(),
            perm: node.perm,
            nlink: self.links(id),
            size: match &node.body {
                Body::File(bytes) => bytes.len() as u64,
                Body::Link(target) => target.len() as u64,
                Body::Dir { .. } => 0,
            },
            mtime: node.mtime,
        }
    }

    /// Takes in what an operation showed of a time that the model did not know.
    pub fn learn(&mut self, op: &Op, answer: &Answer) {
        let Answer::Meta(meta) = answer else { return };
        let id = match op {
            Op::Stat { path } => self.find(path, true).ok(),
            Op::Lstat { path } => self.find(path, false).ok(),
            Op::Fstat { slot } => self.handles[*slot].as_ref().map(|handle| handle.node),
            _ => None,
        };
        if let Some(id) = id {
            self.node_mut(id).mtime = Time::At(meta.mtime);
        }
    }
}

/// The open file that an operation is done to, if it is one of those.
pub fn slot_of(op: &Op) -> Option<usize> {
    match op {
        Op::Close { slot }
        | Op::Write { slot, .. }
        | Op::Read { slot, .. }
        | Op::SetLen { slot, .. }
        | Op::Space { slot, .. }
        | Op::Fsync { slot }
        | Op::Fstat { slot }
        | Op::Fchmod { slot, .. }
        | Op::SeekData { slot, .. }
        | Op::SeekHole { slot, .. }
        | Op::Copy { from: slot, .. } => Some(*slot),
        _ => None,
    }
}

pub fn join(above: &str, name: &str) -> String {
    if above.is_empty() {
        name.to_owned()
    } else {
        format!("{above}/{name}")
    }
}
