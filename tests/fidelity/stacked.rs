//! File systems that lie over a mount or in a file of it.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rustix::mount::MountFlags;

use crate::{
    assert_errno, need,
    support::{
        loopdev::{self, LoopFs},
        posix::{answer, content, file},
        tempdir::{self, TestDir},
        trial::{Trial, compare},
        wait,
    },
};

const LIMIT: Duration = Duration::from_secs(60);

/// A mount of the test's own; goes away when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn mount(kind: &str, at: &Path, data: &str) -> rustix::io::Result<Self> {
        fs::create_dir_all(at).unwrap();
        let data = CString::new(data).unwrap();
        rustix::mount::mount(kind, at, kind, MountFlags::empty(), data.as_c_str())?;
        Ok(Self(at.to_owned()))
    }

    fn overlay(at: &Path, lower: &Path, upper: &Path, work: &Path) -> rustix::io::Result<Self> {
        for dir in [upper, work] {
            fs::create_dir_all(dir).unwrap();
        }
        let (lower, upper, work) = (lower.display(), upper.display(), work.display());
        Self::mount(
            "overlay",
            at,
            &format!("lowerdir={lower},upperdir={upper},workdir={work}"),
        )
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        tempdir::unmount_below(&self.0);
    }
}

/// Every path below, with what is in it.
fn all(top: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![top.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            let bytes = if kind.is_file() {
                content(&path)
            } else if kind.is_symlink() {
                fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec()
            } else {
                dirs.push(path.clone());
                Vec::new()
            };
            found.insert(path.strip_prefix(top).unwrap().to_owned(), bytes);
        }
    }
    found
}

fn fill(t: &Trial) -> PathBuf {
    let lower = t.path("lower");
    fs::create_dir_all(lower.join("d/deep")).unwrap();
    for name in ["changed", "deleted", "kept", "d/renamed", "d/deep/one"] {
        file(&lower.join(name), name.as_bytes());
    }
    fs::hard_link(lower.join("kept"), lower.join("d/same")).unwrap();
    std::os::unix::fs::symlink("d/deep", lower.join("link")).unwrap();
    t.seal();
    lower
}

#[test]
fn overlays_lie_over_it() {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !rustix::process::geteuid().is_root() || !known.contains("\toverlay\n") {
        skip!("mounting an overlay needs root, and a kernel that knows it");
    }
    compare(&[], &[], |t| {
        let lower = fill(t);
        let elsewhere = TestDir::new();
        // What is written lies in memory: not every disk can be under an overlay's writes.
        let memory = Mounted::mount("tmpfs", &elsewhere.path().join("memory"), "size=16m").unwrap();
        let (upper, work) = (memory.0.join("upper"), memory.0.join("work"));
        let over = Mounted::overlay(&elsewhere.path().join("over"), &lower, &upper, &work).unwrap();
        t.note("before", all(&over.0));
        file(&over.0.join("changed"), b"above");
        fs::remove_file(over.0.join("deleted")).unwrap();
        fs::rename(over.0.join("d/renamed"), over.0.join("new")).unwrap();
        fs::remove_dir_all(over.0.join("d/deep")).unwrap();
        t.note("after", all(&over.0));
        drop(over);
        t.note("below", all(&lower));
        if t.machine().is_some() {
            let (upper, work) = (t.path("upper"), t.path("work"));
            let refused = Mounted::overlay(&elsewhere.path().join("under"), &lower, &upper, &work);
            assert_errno!(refused.map(|_| ()), EINVAL);
        }
    });
}

#[test]
fn a_file_of_it_holds_a_file_system_but_is_no_swap() {
    if let Err(why) = loopdev::supports("ext4") {
        skip!("{why}");
    }
    let [mkswap] = need!("mkswap");
    compare(&[], &[], |t| {
        let inner = LoopFs::make("ext4", &t.path(""), "inner", 16 << 20);
        for number in 0..20 {
            file(&inner.path().join(number.to_string()), &vec![number; 100_000]);
        }
        drop(inner);
        t.seal();
        let check = Command::new("e2fsck")
            .args(["-fn"])
            .arg(t.path("inner.img"))
            .output();
        t.note("the file system is whole", check.unwrap().status.code());
        if t.machine().is_some() {
            let swap = file(&t.path("swap"), &vec![0; 1 << 20]);
            wait::run_ok(Command::new(&mkswap).arg(&swap), LIMIT);
            let path = CString::new(swap.as_os_str().as_bytes()).unwrap();
            // SAFETY: the path is a string that ends with a zero.
            let refused = answer(unsafe { libc::swapon(path.as_ptr(), 0) }.into());
            assert_errno!(refused, EINVAL);
        }
    });
}
