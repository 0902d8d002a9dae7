//! The tree of this machine: own changes, those of others and those of the volumes below, merged.
//!
//! A volume is a set of registers, one a path. What is mounted is a stack of volumes, numbered
//! from the top ([`crate::store::rows::TreeLayer`]): 0 is the mounted one with this machine's own changes, 1 its
//! parent, 2 the parent's parent. A [`NameRow`] is what the whole stack says of a path: layers
//! are merged when their changes arrive, so a lookup costs the same however many there are.
//! What a user sees is a function of the registers alone, so the order in which changes of
//! other machines and of other layers arrive does not matter:
//!
//! # Laws of the merge
//!
//! 1. Of two changes of one path, that of the upper layer counts; within a layer the one with
//!    the greater stamp. A deletion is such a change. A register that nobody wrote, which is
//!    there for those below it, says nothing, and yields to any layer. A layer never takes
//!    back what it said: whatever the layers below say of that path later stays unseen. (So
//!    a tombstone of a fork must outlive what it hides below.)
//! 2. A path is a directory if its register says so, *or* if anything below it
//!    can be seen: a live child keeps its ancestors alive, also below a path
//!    that another machine deleted or made a file. Such a directory has mode
//!    0755 and belongs to root until its register says otherwise; a file whose
//!    path is such a directory is hidden until the last child is gone. Of which layer the
//!    child is does not matter: what the parent makes later in a directory that was deleted
//!    here brings the directory back, as between two machines of one volume. What was seen
//!    in it when it was deleted has tombstones of its own, and stays away.
//! 3. The rename of a tree is, in the log, a tombstone for every path below the
//!    old name and a new entry for every path below the new one. What another
//!    machine made below the old name meanwhile stays there. All of them are of the
//!    uppermost layer, also where the tree was a lower one's: nothing is ever written to a
//!    volume below.
//! 4. A change of a file of several names is a change of each name.
//! 5. A remote replacement of a file that is open for writing here takes the
//!    name; when the writer closes it after a change, that close is the later
//!    write and takes the name back. That holds for changes of all layers, because a file
//!    that is open for writing is of the layer that it came from until it is closed.
//! 6. Names are names of one file only within a layer (link ids count there). A link to a
//!    file of a lower layer, or a change of it, brings all of its names that are known here to
//!    the uppermost layer; a name that the lower layer gives it later is a file of its own.
//! 7. A name that is of this machine alone (`here`: the preset of its directory says so) lies
//!    above all layers, and is told to nobody. What a layer says of it meanwhile is not seen, nor kept;
//!    when the name goes, it leaves no register if nobody else ever said anything of it, else a
//!    tombstone that is not told either. The same tombstone, of the layer that it hides, is
//!    what a delete leaves that is an opinion of this machine: the next change of that layer
//!    takes its place. Who makes again what an action-cache entry names makes the entry again, too ([`Tree::remake`]).
//! 8. The deletion of a name that expired ([`Stamp::expired`]) is a change as any other, whose stamp follows directly
//!    on that of the entry that it removes, so every later write counts for more. A machine that used the name
//!    lately, and has not told so in time, answers the deletion by writing the name again ([`super::touch`]): in the
//!    uppermost layer, as all that it writes.
//!
//! The time of a directory is not merged: it is that of its own register, or of a later change
//! seen in it, of whichever layer they are.
//!
//! # Catalogs
//!
//! What a catalog has of a directory comes among the rows when the directory is first touched (`load`):
//! until then its row says in which layers it has more ([`Unloaded`]), and whoever asks gets
//! [`TreeError::NotLoaded`]. The registers are merged by the laws above, as if they had come with the log,
//! but a directory's time is not moved by them. Names of a directory that is not loaded are unknown
//! to everybody, the kernel too. Changes of others are merged into it all the same: which of two
//! changes counts does not depend on which came first.
//!
//! # Shape
//!
//! Registers form a trie of directories with stable numbers: a row's `dir` is
//! the node below which the registers of its children are kept, also when the
//! name itself is dead or a file. Every change goes through an `edit::Edit`,
//! which keeps the counts of visible children and links, and is committed as one.
//!
//! # Locking
//!
//! One lock serialises changes and opens; reads take none. Nothing waits for
//! the disk or the network while it is held, but for the journal's append.

mod apply;
mod attributes;
mod edit;
mod editions;
mod forget;
mod held;
mod here;
mod load;
mod names;
mod open;
mod pending;
mod places;
mod remade;
mod rename;
mod span;
mod used;

use edit::Edit;
use editions::Editions;
use places::RecentPlaces;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, atomic::AtomicBool},
    time::Instant,
};

pub use apply::{Applied, Notice};
pub use attributes::{AttrChange, SetTime};
pub use load::{Reach, Undecided};
pub use names::{NewNode, Removed};
pub use open::SealOutcome;
pub use pending::{Pending, Readiness};
pub use remade::Made;
pub use rename::RenameMode;

use super::{TreeError, error::NotLoaded, preset::table::Presets, touch::Touched};
use crate::{
    base::{
        clock::{Hlc, Stamp},
        id::MachineId,
    },
    store::{
        ledger::Ledger,
        rows::{Change, Content, DirState, Ino, NameRow, NameState, NodeKind, NodeRow, Unloaded},
    },
};

/// Whoever tells the kernel; implemented by the FUSE front.
pub type TellKernel = Arc<dyn Fn(Vec<Notice>) + Send + Sync>;

/// The bucket's time in milliseconds since 1970.
pub type BucketTime = Arc<dyn Fn() -> u64 + Send + Sync>;

/// The longest name, in bytes, as on every file system of Linux.
pub const NAME_MAX: usize = 255;

/// Where the clock's newest reading is kept.
const META_CLOCK: &str = "clock";

/// How a file is in use on this machine.
#[derive(Debug, Default)]
struct Pin {
    opens: u32,
    writers: u32,
    /// Made by an open that is not known to be closed yet: if anybody built on it, then a moment ago.
    unmade: bool,
    /// The directory it is in was told of since, and is to be told of again after the first close.
    tell_dir: bool,
    /// A name it got while in use: saves looking for its names when it is closed.
    home: Option<(Ino, Vec<u8>)>,
}

/// What changes and opens are serialised by.
#[derive(Debug, Default)]
struct InUse {
    pins: HashMap<Ino, Pin>,
    /// Names that another machine's change took from a file while a writer had it open.
    shadowed: HashMap<(Ino, Vec<u8>), Ino>,
    /// Files being hashed; `true` once a writer came in between.
    sealing: HashMap<Ino, bool>,
    /// Closed files that a writer unknown to this daemon may still change.
    unquiet: HashSet<Ino>,
    /// Files that lost their last name, and when: a program that looked one up
    /// just before may still open it, as on a local disk.
    limbo: VecDeque<(Instant, Ino)>,
    places: RecentPlaces,
}

/// What a user sees at a name, and the register there.
type AtName = (Arc<NodeRow>, Arc<NameRow>);

/// Names of a directory with what they show, and where to go on.
pub type Listed = (Vec<(Vec<u8>, Arc<NodeRow>)>, Option<Vec<u8>>);

/// The tree of one volume on one machine.
pub struct Tree {
    ledger: Arc<Ledger>,
    clock: Hlc,
    bucket_time: BucketTime,
    presets: Presets,
    touched: Touched,
    editions: Editions,
    in_use: Mutex<InUse>,
    held: held::Held,
    tell_kernel: OnceLock<TellKernel>,
    /// Some directory may be unloaded: while none is, nobody has to look.
    has_catalogs: AtomicBool,
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tree")
            .field("clock", &self.clock)
            .finish_non_exhaustive()
    }
}

impl Tree {
    /// Opens the tree that `ledger` keeps, making its root if it is new.
    pub fn open(
        ledger: Arc<Ledger>,
        machine: MachineId,
        bucket_time: BucketTime,
    ) -> Result<Arc<Self>, TreeError> {
        let seen = ledger
            .meta(META_CLOCK)?
            .and_then(|bytes| decode_clock(&bytes))
            .unwrap_or(Stamp::ZERO);
        let tree = Self {
            ledger,
            clock: Hlc::new(machine, seen),
            bucket_time,
            presets: Presets::default(),
            touched: Touched::default(),
            editions: Editions::default(),
            in_use: Mutex::default(),
            held: held::Held::default(),
            tell_kernel: OnceLock::new(),
            has_catalogs: AtomicBool::new(false),
        };
        if tree.ledger.node(Ino::ROOT)?.is_none() {
            let now = wall_nanos();
            let root = NodeRow {
                dir: Some(DirState {
                    up: Ino::ROOT,
                    name: Vec::new(),
                    visible_children: 0,
                    subdirs: 0,
                    unloaded: Unloaded::default(),
                }),
                perm: 0o755,
                nlink: 2,
                ..NodeRow::new(Ino::ROOT, NodeKind::Dir, now)
            };
            tree.ledger.commit(vec![Change::PutNode(root)])?;
        }
        Ok(Arc::new(tree))
    }

    fn lock(&self) -> MutexGuard<'_, InUse> {
        self.in_use.lock().expect("a panic ends the process")
    }

    /// A node by its number, if it is still known.
    pub fn node(&self, ino: Ino) -> Result<Option<Arc<NodeRow>>, TreeError> {
        Ok(self.ledger.node(ino)?)
    }

    /// Whether a directory was removed, and is only there for who has it open. Costs a row if it is empty.
    pub fn is_removed(&self, node: &NodeRow) -> Result<bool, TreeError> {
        let Some(dir) = &node.dir else { return Ok(false) };
        if node.ino == Ino::ROOT || dir.visible_children > 0 || dir.unloaded.is_any() {
            return Ok(false);
        }
        let row = self.ledger.name(dir.up, &dir.name)?;
        Ok(row.is_none_or(|row| row.state != NameState::Live(node.ino)))
    }

    /// What a user sees at a name; the cost is that of two rows.
    pub fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Option<Arc<NodeRow>>, TreeError> {
        Ok(self.lookup_row(parent, name)?.map(|(node, _)| node))
    }

    fn lookup_row(&self, parent: Ino, name: &[u8]) -> Result<Option<AtName>, TreeError> {
        check_name(name)?;
        self.need(parent)?;
        let Some(row) = self.ledger.name(parent, name)? else {
            return Ok(None);
        };
        Ok(self.visible(&row)?.map(|node| (node, row)))
    }

    /// What a user sees at a register (laws 1 and 2).
    fn visible(&self, row: &NameRow) -> Result<Option<Arc<NodeRow>>, TreeError> {
        let own = match row.state {
            NameState::Live(ino) => self.ledger.node(ino)?,
            NameState::Dead => None,
        };
        let below = match row.dir {
            Some(dir) => self.ledger.node(dir)?,
            None => None,
        };
        if let Some(below) = &below
            && own.as_ref().is_none_or(|own| own.kind != NodeKind::Dir)
        {
            self.need_to_know(below)?;
        }
        Ok(seen_at(own, below))
    }

    /// Up to `limit` names that a user sees in `dir` behind the name `after`.
    ///
    /// The second value is where to go on; `None` at the end.
    pub fn list(&self, dir: Ino, after: Option<&[u8]>, limit: usize) -> Result<Listed, TreeError> {
        self.need(dir)?;
        let rows = self.ledger.names_in(dir, after, limit)?;
        let next = if rows.len() == limit {
            rows.last().map(|row| row.name.clone())
        } else {
            None
        };
        let mut seen = Vec::with_capacity(rows.len());
        for row in rows {
            if let Some(node) = self.visible(&row)? {
                seen.push((row.name.clone(), node));
            }
        }
        Ok((seen, next))
    }

    /// The first name in `dir`, in the order of [`Self::list`], that fits; also one that is deleted, or not seen.
    ///
    /// Looks at all names before it.
    pub fn find_known(&self, dir: Ino, fits: impl Fn(&[u8]) -> bool) -> Result<Option<Vec<u8>>, TreeError> {
        self.need(dir)?;
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.ledger.names_in(dir, after.as_deref(), 1000)?;
            if let Some(row) = page.iter().find(|row| fits(&row.name)) {
                return Ok(Some(row.name.clone()));
            }
            match page.last() {
                Some(last) => after = Some(last.name.clone()),
                None => return Ok(None),
            }
        }
    }

    /// Sets who tells the kernel what it does not know of: what follows from a change that a program asked for, beside what
    /// it asked for.
    pub fn set_tell_kernel(&self, tell_kernel: TellKernel) {
        let _ = self.tell_kernel.set(tell_kernel);
    }

    /// Tells the kernel. Before it can be told, it knows nothing.
    pub fn tell(&self, notices: Vec<Notice>) {
        if let Some(tell_kernel) = self.tell_kernel.get().filter(|_| !notices.is_empty()) {
            tell_kernel(notices);
        }
    }

    /// What [`Self::list`] gives of a directory is the same while this number is. Costs nothing.
    pub fn edition(&self, dir: Ino) -> u64 {
        self.editions.of(dir)
    }

    /// The path of a directory from the root, without a leading `/`.
    pub fn dir_path(&self, dir: Ino) -> Result<Vec<u8>, TreeError> {
        let mut names = Vec::new();
        let mut at = dir;
        while at != Ino::ROOT {
            let node = self.ledger.node(at)?.ok_or(TreeError::NotFound)?;
            let place = node.dir.as_ref().ok_or(TreeError::NotDirectory)?;
            names.push(place.name.clone());
            at = place.up;
        }
        names.reverse();
        Ok(names.join(&b'/'))
    }

    /// One path that a file has, for people; empty for the root and for a file without a name.
    pub fn path_of(&self, ino: Ino) -> Result<Vec<u8>, TreeError> {
        let node = self.ledger.node(ino)?.ok_or(TreeError::NotFound)?;
        if node.dir.is_some() {
            return self.dir_path(ino);
        }
        match self
            .ledger
            .names_of(ino)?
            .iter()
            .find(|row| row.parent != Ino::LINKS)
        {
            Some(row) => Ok(join(self.dir_path(row.parent)?, &row.name)),
            None => Ok(Vec::new()),
        }
    }

    /// What a user sees at a path from the root; names are separated by `/`.
    pub fn resolve(&self, path: &[u8]) -> Result<Arc<NodeRow>, TreeError> {
        let mut at = self.ledger.node(Ino::ROOT)?.ok_or(TreeError::NotFound)?;
        for name in path
            .split(|&byte| byte == b'/')
            .filter(|name| !name.is_empty() && *name != b".")
        {
            if at.kind != NodeKind::Dir {
                return Err(TreeError::NotDirectory);
            }
            at = self.lookup(at.ino, name)?.ok_or(TreeError::NotFound)?;
        }
        Ok(at)
    }

    fn stamp(&self) -> Stamp {
        self.clock.now((self.bucket_time)())
    }
}

fn not_loaded(dir: Ino) -> TreeError {
    TreeError::NotLoaded(NotLoaded { dir, below: false })
}

fn join(mut path: Vec<u8>, name: &[u8]) -> Vec<u8> {
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// What a user sees where a register names `own`, and `below` is known under it (law 2).
fn seen_at(own: Option<Arc<NodeRow>>, below: Option<Arc<NodeRow>>) -> Option<Arc<NodeRow>> {
    let is_dir = |node: &Arc<NodeRow>| node.kind == NodeKind::Dir;
    if own.as_ref().is_some_and(is_dir) {
        return own;
    }
    let populated = |node: &Arc<NodeRow>| node.dir.as_ref().is_some_and(|dir| dir.visible_children > 0);
    below
        .filter(populated)
        .or(own.filter(|node| !matches!(node.content, Content::Lost(_))))
}

fn check_name(name: &[u8]) -> Result<(), TreeError> {
    if name.len() > NAME_MAX {
        Err(TreeError::NameTooLong)
    } else {
        Ok(())
    }
}

/// This machine's own clock, in nanoseconds since 1970: what programs expect in
/// times of files.
pub(crate) fn wall_nanos() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(now.tv_nsec)
}

/// 8 bytes of milliseconds and 4 of the counter, little-endian.
fn encode_clock(stamp: Stamp) -> Change {
    let mut bytes = stamp.millis.to_le_bytes().to_vec();
    bytes.extend_from_slice(&stamp.counter.to_le_bytes());
    Change::PutMeta(META_CLOCK.to_owned(), bytes)
}

fn decode_clock(bytes: &[u8]) -> Option<Stamp> {
    let (millis, counter) = bytes.split_first_chunk::<8>()?;
    Some(Stamp {
        millis: u64::from_le_bytes(*millis),
        counter: u32::from_le_bytes(counter.try_into().ok()?),
        machine: MachineId(0),
    })
}
