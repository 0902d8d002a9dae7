//! The model: operations on the bytes of files, and on open files. See `fs`.

use super::{
    answer::{Answer, Expected, Time},
    fs::{Body, Fs, Handle, Id, Mistake, Res, UMASK},
    ops::{self, How, Op, Slot, Space},
};

impl Fs {
    pub(super) fn file_op(&mut self, op: &Op) -> Res<Expected> {
        let answer = match *op {
            Op::Put { ref path, len, fill } => {
                let id = self.open(path, How::NEW)?.0;
                if len > 0 {
                    self.write(id, 0, &ops::bytes(fill, len));
                }
                // It is told with this close, whoever else has it open.
                self.node_mut(id).dirty = true;
                self.record(id);
                Answer::Done
            }
            Op::Open { slot, ref path, how } => {
                self.close(slot);
                let (node, made) = self.open(path, how)?;
                self.handles[slot] = Some(Handle {
                    node,
                    reads: how.reads(),
                    writes: how.writes(),
                    append: how.append,
                    made,
                    emptied: how.truncate,
                });
                // A file that is made or emptied is told of when it is closed, also if nothing was written.
                self.node_mut(node).dirty |= made || how.truncate;
                Answer::Done
            }
            Op::Close { slot } => {
                self.close(slot);
                Answer::Done
            }
            Op::Write { slot, at, len, fill } => {
                let handle = self.handle(slot);
                if !handle.writes {
                    return Err(libc::EBADF);
                }
                if len > 0 {
                    let end = self.bytes(handle.node).len() as u64;
                    let at = if handle.append { end } else { at };
                    self.write(handle.node, at, &ops::bytes(fill, len));
                }
                Answer::Count(len as u64)
            }
            Op::Read { slot, at, len } => {
                let handle = self.handle(slot);
                if !handle.reads {
                    return Err(libc::EBADF);
                }
                if self.node(handle.node).is_dir() {
                    return Err(libc::EISDIR);
                }
                Answer::Bytes(part(self.bytes(handle.node), at, len).to_vec())
            }
            Op::Cat { ref path } => {
                let id = self.find(path, true)?;
                if self.node(id).is_dir() {
                    return Err(libc::EISDIR);
                }
                Answer::Bytes(self.bytes(id).clone())
            }
            Op::SetLen { slot, len } => {
                let handle = self.handle(slot);
                if !handle.writes {
                    return Err(libc::EINVAL);
                }
                self.resize(handle.node, len);
                self.changed(handle.node);
                self.node_mut(handle.node).dirty = true;
                Answer::Done
            }
            Op::Truncate { ref path, len } => {
                let id = self.find(path, true)?;
                if self.node(id).is_dir() {
                    return Err(libc::EISDIR);
                }
                let same = self.bytes(id).len() as u64 == len;
                self.resize(id, len);
                self.changed(id);
                if same {
                    // POSIX leaves it open whether that is a change.
                    self.node_mut(id).mtime = Time::Any;
                }
                self.written(id);
                Answer::Done
            }
            Op::Space { slot, how, at, len } => self.space(slot, how, at, len)?,
            Op::Copy {
                from,
                from_at,
                to,
                to_at,
                len,
            } => self.copy((from, from_at), (to, to_at), len)?,
            Op::Fsync { slot } => {
                let handle = self.handle(slot);
                if handle.is_writer() {
                    self.record(handle.node);
                }
                Answer::Done
            }
            Op::Fstat { slot } => return Ok(Expected::Meta(self.meta(self.handle(slot).node))),
            Op::Fchmod { slot, mode } => {
                let id = self.handle(slot).node;
                self.chmod(id, mode)
            }
            Op::SeekData { slot, at } => return self.seek(slot, at, true),
            Op::SeekHole { slot, at } => return self.seek(slot, at, false),
            _ => unreachable!("{op:?} is an operation on names"),
        };
        Ok(Expected::Exactly(answer))
    }

    fn handle(&self, slot: Slot) -> Handle {
        self.handles[slot].clone().expect("the caller looked")
    }

    pub fn bytes(&self, id: Id) -> &Vec<u8> {
        match &self.node(id).body {
            Body::File(bytes) => bytes,
            Body::Link(_) | Body::Dir { .. } => panic!("{id} is no file"),
        }
    }

    fn bytes_mut(&mut self, id: Id) -> &mut Vec<u8> {
        match &mut self.node_mut(id).body {
            Body::File(bytes) => bytes,
            Body::Link(_) | Body::Dir { .. } => panic!("{id} is no file"),
        }
    }

    /// Finds or makes what open(2) opens; tells whether it was made.
    fn open(&mut self, path: &str, how: How) -> Res<(Id, bool)> {
        // Of a name that must be new a link is not followed.
        let place = self.place(path, !(how.exclusive || how.nofollow))?;
        let Some(id) = place.node else {
            if !how.create {
                return Err(libc::ENOENT);
            }
            let id = self.put_new(place.dir, &place.name, Body::File(Vec::new()), 0o666 & !UMASK);
            return Ok((id, true));
        };
        if how.exclusive {
            return Err(libc::EEXIST);
        }
        match &self.node(id).body {
            Body::Link(_) => return Err(libc::ELOOP),
            Body::Dir { .. } if how.create || how.writes() || how.truncate => return Err(libc::EISDIR),
            Body::Dir { .. } | Body::File(_) => {}
        }
        if how.truncate {
            self.resize(id, 0);
            self.changed(id);
        }
        Ok((id, false))
    }

    pub fn close(&mut self, slot: Slot) {
        let Some(handle) = self.handles[slot].take() else {
            return;
        };
        if handle.is_writer() {
            self.record(handle.node);
            if !self.has_writer(handle.node) {
                self.shadows.retain(|_, node| *node != handle.node);
            }
        }
    }

    /// A change through a name is one for others at once, unless a writer has the file open: then it
    /// is one when that closes it.
    fn written(&mut self, id: Id) {
        self.node_mut(id).dirty = true;
        if !self.has_writer(id) {
            self.record(id);
        }
    }

    fn write(&mut self, id: Id, at: u64, bytes: &[u8]) {
        let (at, end) = (at as usize, at as usize + bytes.len());
        let gap = u8::from(self.mistake == Some(Mistake::GapOfOnes));
        let file = self.bytes_mut(id);
        if file.len() < end {
            file.resize(end, gap);
        }
        file[at..end].copy_from_slice(bytes);
        self.changed(id);
        self.node_mut(id).dirty = true;
    }

    fn resize(&mut self, id: Id, len: u64) {
        self.bytes_mut(id).resize(len as usize, 0);
    }

    fn space(&mut self, slot: Slot, how: Space, at: u64, len: u64) -> Res<Answer> {
        let handle = self.handle(slot);
        if len == 0 {
            return Err(libc::EINVAL);
        }
        if !handle.writes {
            return Err(libc::EBADF);
        }
        let file = self.bytes_mut(handle.node);
        let (start, end) = (at as usize, (at + len) as usize);
        if matches!(how, Space::Allocate | Space::Zero) && file.len() < end {
            file.resize(end, 0);
        }
        if matches!(how, Space::Punch | Space::Zero | Space::ZeroKeepSize) && start < file.len() {
            let end = end.min(file.len());
            file[start..end].fill(0);
        }
        // Which of these are changes of the time differs between file systems.
        self.node_mut(handle.node).mtime = Time::Any;
        self.node_mut(handle.node).dirty = true;
        Ok(Answer::Done)
    }

    fn copy(&mut self, from: (Slot, u64), to: (Slot, u64), len: usize) -> Res<Answer> {
        if self.handles[to.0].is_none() {
            return Ok(Answer::Skipped);
        }
        let (source, target) = (self.handle(from.0), self.handle(to.0));
        if self.node(source.node).is_dir() || self.node(target.node).is_dir() {
            return Err(libc::EISDIR);
        }
        if !source.reads || !target.writes || target.append {
            return Err(libc::EBADF);
        }
        let bytes = part(self.bytes(source.node), from.1, len).to_vec();
        let count = bytes.len() as u64;
        if source.node == target.node && from.1 < to.1 + count && to.1 < from.1 + count {
            return Err(libc::EINVAL);
        }
        if count > 0 {
            self.write(target.node, to.1, &bytes);
        }
        Ok(Answer::Count(count))
    }

    fn seek(&self, slot: Slot, at: u64, data: bool) -> Res<Expected> {
        let id = self.handle(slot).node;
        if self.node(id).is_dir() {
            return Ok(Expected::Anything);
        }
        let bytes = self.bytes(id);
        let size = bytes.len() as u64;
        if at >= size {
            return Err(libc::ENXIO);
        }
        if !data {
            return Ok(Expected::Offset {
                least: at,
                most: size,
                or_none: false,
            });
        }
        let written = bytes[at as usize..].iter().position(|byte| *byte != 0);
        Ok(Expected::Offset {
            least: at,
            most: written.map_or(size - 1, |behind| at + behind as u64),
            or_none: written.is_none(),
        })
    }
}

/// The part of some bytes that a read gets.
fn part(bytes: &[u8], at: u64, len: usize) -> &[u8] {
    let start = bytes.len().min(at as usize);
    &bytes[start..bytes.len().min(start + len)]
}
