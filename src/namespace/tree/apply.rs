//! Merging what other machines changed, in the mounted volume and in those below it.

use super::{Edit, InUse, Tree, edit::live};
use crate::{
    base::{chunk::ChunkList, clock::Stamp},
    namespace::{
        TreeError,
        change::{Entry, EntryChunks, PathChange},
    },
    store::rows::{Change, Content, Ino, LinkId, NameRow, NameState, NodeKind, NodeRow, TreeLayer},
};

/// Something the kernel may hold in its caches and that is no longer so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The name means something else now, or nothing.
    Entry { parent: Ino, name: Vec<u8> },
    /// The attributes changed, the bytes did not.
    Attributes { ino: Ino },
    /// What the directory lists may be another thing already.
    Listing { dir: Ino },
    /// The directory is elsewhere, which it lists as `..`. Whoever moved it may list it next.
    Moved { dir: Ino },
}

/// Changes merged while the tree is locked once: bounds how long a program waits.
const BATCH: usize = 256;

impl Tree {
    /// Merges changes that were made in the volume of `layer`; idempotent, in any order.
    ///
    /// Returns what the kernel must be told, which the caller does from a
    /// thread of its own, and the staging files that no file needs any more.
    pub fn apply(&self, layer: TreeLayer, changes: Vec<PathChange>) -> Result<Applied, TreeError> {
        let mut applied = Applied::default();
        let mut changes = changes.into_iter().peekable();
        while changes.peek().is_some() {
            let mut in_use = self.lock();
            let mut edit = Edit::unasked(self, &mut in_use);
            for change in changes.by_ref().take(BATCH) {
                let told = edit.places_told_by(change.entry.as_ref())?;
                edit.also(told);
                apply_one(&mut edit, layer, change)?;
            }
            let (discarded, notices) = edit.commit()?;
            applied.notices.extend(notices);
            applied.discarded.extend(discarded);
        }
        Ok(applied)
    }
}

/// What merging changed on this machine.
#[derive(Debug, Default)]
pub struct Applied {
    pub notices: Vec<Notice>,
    pub discarded: Vec<crate::store::rows::StagingId>,
}

pub(super) fn apply_one(edit: &mut Edit<'_>, layer: TreeLayer, change: PathChange) -> Result<(), TreeError> {
    edit.observe(change.stamp);
    let mut names = change.path.split(|&byte| byte == b'/').collect::<Vec<_>>();
    let Some(name) = names.pop() else { return Ok(()) };
    let mut parent = Ino::ROOT;
    for above in names {
        parent = edit.dir_below(parent, above)?;
    }
    let (stamp, entry) = (change.stamp, change.entry);
    if entry.is_none() && edit.keeps_used(layer, (parent, name), stamp)? {
        return Ok(());
    }
    let above = edit.node(parent)?.ok_or(TreeError::NotFound)?;
    if !merge_at(edit, layer, (parent, name), stamp, entry)? || edit.is_load {
        return Ok(());
    }
    // A directory's time is that of its own entry, or of a later change in it,
    // whichever of the two arrived first.
    let described = register_stamp(edit, &above)?;
    let changed = edit.node(parent)?.is_some_and(|node| node.mtime != above.mtime);
    if changed {
        let changed_at = i64::try_from(stamp.millis)
            .unwrap_or(i64::MAX)
            .saturating_mul(1_000_000);
        let mtime = if described > stamp {
            above.mtime
        } else {
            above.mtime.max(changed_at)
        };
        edit.node_mut(parent)?.mtime = mtime;
        edit.notice(|| Notice::Attributes { ino: parent });
    }
    Ok(())
}

/// Merges one register; false when what is there counts for more.
pub(super) fn merge_at(
    edit: &mut Edit<'_>,
    layer: TreeLayer,
    (parent, name): (Ino, &[u8]),
    stamp: Stamp,
    entry: Option<Entry>,
) -> Result<bool, TreeError> {
    let old = edit.name(parent, name)?;
    if old.as_ref().is_some_and(|old| !old.yields_to(layer, stamp)) {
        return Ok(false);
    }
    if edit.is_misnamed(parent, name, entry.as_ref())? {
        return Ok(false);
    }
    let old_ino = old.as_ref().and_then(|old| live(old.state));
    let dir = old.as_ref().and_then(|old| old.dir);
    let state = match entry {
        None => NameState::Dead,
        Some(entry) if entry.kind == NodeKind::Dir => {
            NameState::Live(place_dir(edit, parent, name, dir, &entry)?)
        }
        Some(entry) => NameState::Live(place_file(edit, (layer, stamp), old.as_deref(), &entry)?),
    };
    if let Some(ino) = old_ino.filter(|&ino| state != NameState::Live(ino)) {
        shadow(edit.in_use, ino, parent, name);
    }
    edit.set_name(NameRow {
        parent,
        name: name.to_vec(),
        layer,
        stamp,
        state,
        dir,
        pending: None,
    })?;
    Ok(true)
}

/// When the entry of a directory was written; the root has none.
fn register_stamp(edit: &Edit<'_>, dir: &NodeRow) -> Result<Stamp, TreeError> {
    match dir.dir.as_ref().filter(|_| dir.ino != Ino::ROOT) {
        Some(place) => Ok(edit
            .name(place.up, &place.name)?
            .map_or(Stamp::ZERO, |row| row.stamp)),
        None => Ok(Stamp::ZERO),
    }
}

/// The directory that an entry describes: the one that is seen there, else a new one.
fn place_dir(
    edit: &mut Edit<'_>,
    parent: Ino,
    name: &[u8],
    dir: Option<Ino>,
    entry: &Entry,
) -> Result<Ino, TreeError> {
    let seen = edit.visible(parent, name)?.map(|node| node.ino);
    let ino = match dir {
        Some(dir) if seen == Some(dir) => dir,
        known => {
            let new = edit.new_dir(parent, name);
            if let Some(known) = known {
                edit.inherit(known, new)?;
            }
            new
        }
    };
    describe(edit, ino, entry)?;
    Ok(ino)
}

/// The node that an entry describes: one that is there if its bytes are the same, else a new one.
fn place_file(
    edit: &mut Edit<'_>,
    (layer, stamp): (TreeLayer, Stamp),
    old: Option<&NameRow>,
    entry: &Entry,
) -> Result<Ino, TreeError> {
    let content = match &entry.blob {
        None => Content::None,
        Some(blob) => Content::Blob(blob.digest),
    };
    if let Some(blob) = &entry.blob
        && let EntryChunks::Inline(list) = &blob.chunks
    {
        edit.also([Change::PutManifest(blob.digest, list.clone())]);
    }
    let linked = entry
        .link_id
        .map(|id| edit.linked(layer, id))
        .transpose()?
        .flatten();
    let known = match linked.map(|ino| edit.node(ino)).transpose()?.flatten() {
        Some(node)
            if node.link_id == entry.link_id
                && holds(&node, &content, entry)
                && edit.span(&node)?.is_of(layer) =>
        {
            Some(node.ino)
        }
        _ => None,
    };
    let ino = match (known, old) {
        (Some(known), _) => known,
        (None, Some(old)) => match live(old.state).map(|ino| edit.node(ino)).transpose()?.flatten() {
            // What this entry says holds for one name; other names of the file may say something else.
            Some(node)
                if holds(&node, &content, entry)
                    && (node.nlink <= 1 || (old.layer == layer && node.link_id == entry.link_id)) =>
            {
                node.ino
            }
            _ => new_file(edit, content, entry),
        },
        (None, None) => new_file(edit, content, entry),
    };
    // Of a file of several names the newest says what it is like, whichever arrives first.
    let is_newest = match known {
        Some(known) => {
            let node = edit.node(known)?.ok_or(TreeError::NotFound)?;
            edit.span(&node)?.is_up_to(stamp)
        }
        None => true,
    };
    if is_newest {
        describe(edit, ino, entry)?;
    }
    if let Some(id) = entry.link_id.filter(|_| known.is_none()) {
        edit.remember_link_id(layer, id, ino)?;
    }
    Ok(ino)
}

fn holds(node: &NodeRow, content: &Content, entry: &Entry) -> bool {
    node.kind == entry.kind
        && node.content == *content
        && node.target == entry.target
        && node.rdev == entry.rdev
}

fn new_file(edit: &mut Edit<'_>, content: Content, entry: &Entry) -> Ino {
    let ino = edit.next_ino();
    edit.put_node(NodeRow {
        rdev: entry.rdev,
        size: entry
            .blob
            .as_ref()
            .map_or(entry.target.len() as u64, |blob| blob.size),
        content,
        target: entry.target.clone(),
        ..NodeRow::new(ino, entry.kind, edit.now)
    });
    ino
}

impl Edit<'_> {
    /// Where packs have the chunks of the blob that an entry names.
    pub(super) fn places_told_by(&self, entry: Option<&Entry>) -> Result<Vec<Change>, TreeError> {
        let Some(blob) = entry
            .and_then(|entry| entry.blob.as_ref())
            .filter(|blob| !blob.places.is_empty())
        else {
            return Ok(Vec::new());
        };
        Ok(match &blob.chunks {
            EntryChunks::Inline(list) => self.ledger().told_places(list, &blob.places)?,
            EntryChunks::Single => {
                let list = ChunkList::single(blob.digest, blob.size);
                self.ledger().told_places(&list, &blob.places)?
            }
            EntryChunks::Listed { .. } => Vec::new(),
        })
    }

    /// Makes a file known under its link id, so that its other names of the same layer find it.
    pub(super) fn remember_link_id(
        &mut self,
        layer: TreeLayer,
        id: LinkId,
        ino: Ino,
    ) -> Result<(), TreeError> {
        self.set_name(NameRow {
            parent: Ino::LINKS,
            name: link_name(layer, id),
            layer: TreeLayer::TOP,
            stamp: Stamp::ZERO,
            state: NameState::Live(ino),
            dir: None,
            pending: None,
        })
    }

    /// The file that was last known under a link id in a layer; its names may be of an upper one by now.
    pub(super) fn linked(&self, layer: TreeLayer, id: LinkId) -> Result<Option<Ino>, TreeError> {
        Ok(self
            .name(Ino::LINKS, &link_name(layer, id))?
            .and_then(|row| live(row.state)))
    }
}

/// Takes over the attributes of an entry.
fn describe(edit: &mut Edit<'_>, ino: Ino, entry: &Entry) -> Result<(), TreeError> {
    let now = edit.now;
    let node = edit.node_mut(ino)?;
    node.perm = entry.perm;
    node.uid = entry.uid;
    node.gid = entry.gid;
    node.mtime = entry.mtime;
    node.atime = node.atime.max(entry.mtime);
    node.ctime = now;
    node.xattrs.clone_from(&entry.xattrs);
    node.link_id = entry.link_id;
    edit.notice(|| Notice::Attributes { ino });
    Ok(())
}

fn link_name(layer: TreeLayer, id: LinkId) -> Vec<u8> {
    let name = format!("{}-{:x}", id.machine, id.ino);
    match layer.number() {
        0 => name.into_bytes(),
        below => format!("{name}-{below}").into_bytes(),
    }
}

/// Remembers that a name was taken from a file while it is open for writing (law 5).
fn shadow(in_use: &mut InUse, ino: Ino, parent: Ino, name: &[u8]) {
    if in_use.pins.get(&ino).is_some_and(|pin| pin.writers > 0) {
        in_use.shadowed.insert((parent, name.to_vec()), ino);
    }
}
