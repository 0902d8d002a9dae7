//! Bazel's `--disk_cache` without a Bazel: the files that it makes, by the same system calls.

use std::{
    fs,
    io::{Read, Write},
    path::PathBuf,
    time::Duration,
};

use rustix::fs::{AtFlags, Timespec, Timestamps, UTIME_NOW};

use crate::support::{machine::Machine, tree, wait};

const SOON: Duration = Duration::from_secs(30);

/// What Bazel does with its `--disk_cache`, call by call.
pub struct Disk(pub PathBuf);

impl Disk {
    pub fn of(machine: &Machine) -> Self {
        Self(machine.path("disk"))
    }

    pub fn start(&self) {
        fs::create_dir_all(self.0.join("tmp")).unwrap();
    }

    pub fn place(&self, kind: &str, name: &str) -> PathBuf {
        self.0.join(kind).join(&name[..2]).join(name)
    }

    pub fn put(&self, kind: &str, name: &str, bytes: &[u8]) {
        let number = tree::hex(&tree::digest(format!("{kind}{name}").as_bytes()));
        let temp = self.0.join("tmp").join(&number[..36]);
        let mut file = fs::File::create(&temp).unwrap();
        for part in bytes.chunks(8192) {
            file.write_all(part).unwrap();
        }
        file.sync_all().unwrap();
        drop(file);
        let to = self.place(kind, name);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::rename(&temp, &to).unwrap();
    }

    /// Stores a blob and returns its digest.
    pub fn blob(&self, bytes: &[u8]) -> String {
        let name = tree::hex(&tree::digest(bytes));
        self.put("cas", &name, bytes);
        name
    }

    /// Whether a file is there: Bazel asks by touching it. Anything but "no such file" fails a build.
    pub fn touch(&self, kind: &str, name: &str) -> bool {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW,
        };
        let times = Timestamps {
            last_access: now,
            last_modification: now,
        };
        let path = self.place(kind, name);
        match rustix::fs::utimensat(rustix::fs::CWD, &path, &times, AtFlags::empty()) {
            Ok(()) => true,
            Err(rustix::io::Errno::NOENT) => false,
            Err(err) => panic!("{}: {err}", path.display()),
        }
    }

    /// Reads what an entry names, as a build with it would; false for a miss.
    pub fn hit(&self, action: &str, blobs: &[&str]) -> bool {
        if !self.touch("ac", action) {
            return false;
        }
        let mut bytes = Vec::new();
        let mut file = fs::File::open(self.place("ac", action)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        for blob in blobs {
            assert!(self.touch("cas", blob), "lost input {blob}");
            let bytes = fs::read(self.place("cas", blob)).unwrap();
            assert_eq!(tree::hex(&tree::digest(&bytes)), **blob);
        }
        true
    }

    #[track_caller]
    pub fn until(&self, what: &str, is_there: bool, kind: &str, name: &str) {
        wait::until(what, SOON, || (self.touch(kind, name) == is_there).then_some(()));
    }
}

pub fn key(text: &str) -> String {
    tree::hex(&tree::digest(text.as_bytes()))
}

/// A field of a protocol buffer that holds bytes.
fn field(tag: u8, bytes: &[u8]) -> Vec<u8> {
    assert!(bytes.len() < 1 << 14);
    let len = [bytes.len() as u8 | 0x80, (bytes.len() >> 7) as u8];
    [&[tag << 3 | 2], &len[..], bytes].concat()
}

fn digest(name: &str) -> Vec<u8> {
    [field(1, name.as_bytes()), vec![2 << 3, 7]].concat()
}

/// A file of an action result or of a directory.
fn named_file(name: &str) -> Vec<u8> {
    [field(1, b"out"), field(2, &digest(name))].concat()
}

pub fn action_result(files: &[&str], trees: &[&str]) -> Vec<u8> {
    let files = files.iter().map(|name| field(2, &named_file(name)));
    let trees = trees
        .iter()
        .map(|name| field(3, &[field(1, b"dir"), field(3, &digest(name))].concat()));
    files.chain(trees).flatten().collect()
}

pub fn tree_of(root: &[&str], child: &[&str]) -> Vec<u8> {
    let directory = |files: &[&str]| {
        files
            .iter()
            .flat_map(|name| field(1, &named_file(name)))
            .collect::<Vec<_>>()
    };
    [field(1, &directory(root)), field(2, &directory(child))].concat()
}
