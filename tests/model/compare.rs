//! Compares a whole tree with the model: names, types, rights, links, sizes, bytes, targets, times.

use std::{collections::BTreeMap, fmt::Write as _, io, path::Path};

use super::{
    answer::{Brief, DIR, Time},
    fs::{Body, Fs},
    real::{self, Found},
};

/// How many differences are told.
const MOST: usize = 12;

/// Lists how a tree differs from what the model has; empty when it does not.
///
/// Times that the model did not know are taken from the tree, so that they are known afterwards.
pub fn differences(model: &mut Fs, root: &Path) -> Vec<String> {
    match compare(model, root) {
        Ok(differences) => differences,
        Err(err) => vec![format!("the tree cannot be read: {err}")],
    }
}

fn compare(model: &mut Fs, root: &Path) -> io::Result<Vec<String>> {
    let paths = model.paths();
    let names = real::names_below(root)?;
    let mut told = Vec::new();
    for path in paths.keys().filter(|path| !names.contains(path)) {
        told.push(format!("{path}: missing"));
    }
    for path in names.iter().filter(|path| !paths.contains_key(*path)) {
        told.push(format!("{path}: not expected"));
    }
    let mut inodes = BTreeMap::new();
    for (path, &id) in &paths {
        if !names.contains(path) {
            continue;
        }
        let found =
            real::found(&root.join(path)).map_err(|err| io::Error::other(format!("{path}: {err}")))?;
        let mut line = String::new();
        differs(model, id, &found, &mut line);
        // Names of one file here are names of one file there.
        if !model.node(id).vague && *inodes.entry(id).or_insert(found.ino) != found.ino {
            let _ = write!(line, ", is another file than its other names");
        }
        if !line.is_empty() {
            told.push(format!("{path}: {}", line.trim_start_matches(", ")));
        }
        if line.is_empty() && model.node(id).mtime != Time::At(found.meta.mtime) {
            model.node_mut(id).mtime = Time::At(found.meta.mtime);
        }
    }
    told.truncate(MOST);
    Ok(told)
}

fn differs(model: &Fs, id: u64, found: &Found, line: &mut String) {
    let (node, want) = (model.node(id), model.meta(id));
    if want.kind != found.meta.kind {
        let _ = write!(line, ", is {} instead of {}", found.meta.kind, want.kind);
        return;
    }
    if want.perm != found.meta.perm && !node.vague {
        let _ = write!(
            line,
            ", has mode {:04o} instead of {:04o}",
            found.meta.perm, want.perm
        );
    }
    if want.nlink != found.meta.nlink && !node.vague {
        let _ = write!(line, ", has {} links instead of {}", found.meta.nlink, want.nlink);
    }
    if want.kind != DIR && want.size != found.meta.size {
        let _ = write!(line, ", has {} bytes instead of {}", found.meta.size, want.size);
    }
    if !want.mtime.admits(found.meta.mtime) && !node.vague {
        let _ = write!(
            line,
            ", has mtime {} instead of {:?}",
            found.meta.mtime, want.mtime
        );
    }
    let xattrs: Vec<_> = node
        .xattrs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.clone()))
        .collect();
    if xattrs != found.xattrs && !node.vague {
        let _ = write!(line, ", has attributes {:?} instead of {xattrs:?}", found.xattrs);
    }
    match &node.body {
        Body::File(bytes) if *bytes != found.bytes => {
            let same = bytes
                .iter()
                .zip(&found.bytes)
                .take_while(|(want, have)| want == have)
                .count();
            let _ = write!(line, ", has {} instead of {}", Brief(&found.bytes), Brief(bytes));
            let _ = write!(line, ", which differ from byte {same} on");
        }
        Body::Link(target) if *target != found.target => {
            let _ = write!(line, ", leads to {} instead of {target}", found.target);
        }
        _ => {}
    }
}
