//! The model: operations on names and attributes. See `fs`.
//!
//! The order of the checks is that of Linux, because it decides which error a caller gets.

use super::{
    answer::{Answer, Expected, Time},
    fs::{Body, Fs, Id, Mistake, Node, ROOT, Res, UMASK},
    ops::{Op, Renaming, UTIME_NANOS},
};

impl Fs {
    /// Does an operation of this file; `None` for others.
    pub(super) fn name_op(&mut self, op: &Op) -> Res<Option<Expected>> {
        let answer = match op {
            Op::Mkdir { path, mode } => {
                let names = std::collections::BTreeMap::new();
                let body = Body::Dir { up: ROOT, names };
                self.make(path, body, mode & !UMASK)?
            }
            Op::Symlink { target, path } => self.make(path, Body::Link(target.clone()), 0o777)?,
            Op::Rmdir { path } => self.rmdir(path)?,
            Op::Unlink { path } => self.unlink(path)?,
            Op::Rename { from, to, how } => self.rename(from, to, *how)?,
            Op::Link { from, to } => self.link(from, to)?,
            Op::Readlink { path } => match &self.node(self.find(path, false)?).body {
                Body::Link(target) => Answer::Target(target.clone()),
                Body::File(_) | Body::Dir { .. } => return Err(libc::EINVAL),
            },
            Op::Chmod { path, mode } => {
                let id = self.find(path, true)?;
                self.chmod(id, *mode)
            }
            Op::Utime {
                path,
                seconds,
                nofollow,
            } => {
                let id = self.find(path, !nofollow)?;
                let nanos = i128::from(*seconds) * 1_000_000_000 + i128::from(UTIME_NANOS);
                self.node_mut(id).mtime = Time::At(nanos);
                self.tell_node(id);
                Answer::Done
            }
            Op::SetXattr { path, name, value } => {
                let id = self.find(path, true)?;
                self.node_mut(id).xattrs.insert(name, value.to_string());
                self.tell_node(id);
                Answer::Done
            }
            Op::RemoveXattr { path, name } => {
                let id = self.find(path, true)?;
                self.node_mut(id).xattrs.remove(name).ok_or(libc::ENODATA)?;
                self.tell_node(id);
                Answer::Done
            }
            Op::Stat { path } => return Ok(Some(Expected::Meta(self.meta(self.find(path, true)?)))),
            Op::Lstat { path } => return Ok(Some(Expected::Meta(self.meta(self.find(path, false)?)))),
            Op::List { path } => {
                let id = self.find(path, true)?;
                if !self.node(id).is_dir() {
                    return Err(libc::ENOTDIR);
                }
                let names = self.entries(id).iter();
                Answer::Names(
                    names
                        .map(|(name, id)| (name.clone(), self.node(*id).kind()))
                        .collect(),
                )
            }
            _ => return Ok(None),
        };
        Ok(Some(Expected::Exactly(answer)))
    }

    pub(super) fn chmod(&mut self, id: Id, mode: u32) -> Answer {
        self.node_mut(id).perm = mode;
        self.tell_node(id);
        Answer::Done
    }

    fn make(&mut self, path: &str, body: Body, perm: u32) -> Res<Answer> {
        let place = self.place(path, false)?;
        if place.node.is_some() {
            return Err(libc::EEXIST);
        }
        self.put_new(place.dir, &place.name, body, perm);
        Ok(Answer::Done)
    }

    /// Makes something at a name that is free.
    pub(super) fn put_new(&mut self, dir: Id, name: &str, body: Body, perm: u32) -> Id {
        let mut node = Node::new(body, perm, self.now);
        node.names = 0;
        let id = self.add(node);
        self.attach(dir, name, id);
        self.changed(dir);
        let path = self.path_in(dir, name);
        self.tell(&path);
        id
    }

    fn rmdir(&mut self, path: &str) -> Res<Answer> {
        let place = self.place(path, false)?;
        let id = place.node.ok_or(libc::ENOENT)?;
        if !self.node(id).is_dir() {
            return Err(libc::ENOTDIR);
        }
        if !self.entries(id).is_empty() {
            return Err(libc::ENOTEMPTY);
        }
        self.remove(place.dir, &place.name);
        Ok(Answer::Done)
    }

    fn unlink(&mut self, path: &str) -> Res<Answer> {
        let place = self.place(path, false)?;
        let id = place.node.ok_or(libc::ENOENT)?;
        if self.node(id).is_dir() {
            return Err(libc::EISDIR);
        }
        self.remove(place.dir, &place.name);
        Ok(Answer::Done)
    }

    fn remove(&mut self, dir: Id, name: &str) {
        let path = self.path_in(dir, name);
        self.detach(dir, name);
        self.changed(dir);
        self.tell(&path);
    }

    fn link(&mut self, from: &str, to: &str) -> Res<Answer> {
        let id = self.find(from, false)?;
        let place = self.place(to, false)?;
        if place.node.is_some() {
            return Err(libc::EEXIST);
        }
        if self.node(id).is_dir() {
            return Err(libc::EPERM);
        }
        if self.node(id).link.is_none() {
            self.node_mut(id).link = Some(self.step);
            self.tell_node(id);
        }
        self.attach(place.dir, &place.name, id);
        self.changed(place.dir);
        let path = self.path_in(place.dir, &place.name);
        self.tell(&path);
        Ok(Answer::Done)
    }

    fn rename(&mut self, from: &str, to: &str, how: Renaming) -> Res<Answer> {
        let (source, target) = (self.place(from, false), self.place(to, false));
        // Of two directories that cannot be found the first is named; names are looked up after both.
        let (source, target) = (source?, target?);
        let id = source.node.ok_or(libc::ENOENT)?;
        match (how, target.node) {
            (Renaming::NoReplace, Some(_)) => return Err(libc::EEXIST),
            (Renaming::Exchange, None) => return Err(libc::ENOENT),
            _ => {}
        }
        if self.is_below(target.dir, id) {
            return Err(libc::EINVAL);
        }
        if let Some(old) = target.node {
            if self.is_below(source.dir, old) {
                let exchange = how == Renaming::Exchange;
                return Err(if exchange { libc::EINVAL } else { libc::ENOTEMPTY });
            }
            if old == id {
                if self.mistake == Some(Mistake::RenameOntoItself) && from != to {
                    self.remove(source.dir, &source.name);
                }
                return Ok(Answer::Done);
            }
            if how != Renaming::Exchange {
                match (self.node(id).is_dir(), self.node(old).is_dir()) {
                    (true, false) => return Err(libc::ENOTDIR),
                    (false, true) => return Err(libc::EISDIR),
                    (true, true) if !self.entries(old).is_empty() => return Err(libc::ENOTEMPTY),
                    _ => {}
                }
            }
        }
        let paths = [
            self.path_in(source.dir, &source.name),
            self.path_in(target.dir, &target.name),
        ];
        let before = self.below(&paths);
        let old = self.detach(target.dir, &target.name);
        self.detach(source.dir, &source.name);
        self.attach(target.dir, &target.name, id);
        if let Some(old) = old.filter(|_| how == Renaming::Exchange) {
            self.attach(source.dir, &source.name, old);
        }
        self.changed(source.dir);
        self.changed(target.dir);
        for path in before.into_iter().chain(self.below(&paths)) {
            self.tell(&path);
        }
        Ok(Answer::Done)
    }

    /// Whether `dir` is `above` or lies below it.
    fn is_below(&self, dir: Id, above: Id) -> bool {
        let mut at = dir;
        while at != above {
            if at == ROOT {
                return false;
            }
            at = self.up(at);
        }
        true
    }

    /// All paths that there are at and below some.
    fn below(&self, tops: &[String]) -> Vec<String> {
        let is_below = |path: &str| {
            let rest = |top: &String| path.strip_prefix(top.as_str());
            tops.iter()
                .filter_map(rest)
                .any(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.paths().into_keys().filter(|path| is_below(path)).collect()
    }
}
