//! The kernel's table of mounts, read without touching any of them.
//!
//! One line of `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`):
//!
//! ```text
//! 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
//! (1)(2)(3)   (4)   (5)      (6)      (7)   (8) (9)   (10)         (11)
//! ```
//!
//! Blanks in paths are written in octal (`\040`).

use std::{
    ffi::OsString,
    io,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

/// What `mount(8)` shows as the type of our mounts.
pub const FS_TYPE: &str = "fuse.casmount";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Of the file system, as `0:50`.
    pub device: String,
    pub path: PathBuf,
    pub fs_type: String,
    pub source: String,
    /// Of the file system, as `user_id=1000,rw`.
    pub options: String,
}

impl Mount {
    pub fn is_casmount(&self) -> bool {
        self.fs_type == FS_TYPE
    }

    /// The user whose daemon serves a FUSE mount.
    pub fn user_id(&self) -> Option<u32> {
        let id = self
            .options
            .split(',')
            .find_map(|option| option.strip_prefix("user_id="))?;
        id.parse().ok()
    }
}

/// Reads all mounts that this process sees, the lowest first.
pub fn all() -> io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The topmost mount at exactly `path`.
pub fn at(path: &Path) -> io::Result<Option<Mount>> {
    Ok(topmost(all()?, path))
}

fn topmost(mounts: Vec<Mount>, path: &Path) -> Option<Mount> {
    mounts.into_iter().rev().find(|mount| mount.path == path)
}

pub fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|&b| b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ');
    let text = |field: &[u8]| OsString::from_vec(unescape(field)).to_string_lossy().into_owned();
    let device = text(fields.nth(2)?);
    let path = unescape(fields.nth(1)?);
    // Optional fields end with a lone dash.
    fields.find(|field| *field == b"-")?;
    Some(Mount {
        device,
        path: OsString::from_vec(path).into(),
        fs_type: text(fields.next()?),
        source: text(fields.next()?),
        options: text(fields.next().unwrap_or_default()),
    })
}

fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(octal.unwrap_or(first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    out
}

/// Whether `path` is `dir` or below it, by their bytes alone.
pub fn is_within(path: &[u8], dir: &Path) -> bool {
    let dir = dir.as_os_str().as_bytes();
    path.strip_prefix(dir)
        .is_some_and(|rest| rest.is_empty() || rest[0] == b'/' || dir == b"/")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
        40 22 0:50 / /mnt/my\\040cache rw,nosuid shared:7 master:1 - fuse.casmount casmount:main rw,user_id=1000,group_id=0\n\
        41 22 0:51 / /mnt/x rw - tmpfs tmpfs rw\n\
        42 22 0:52 / /mnt/x rw - fuse.casmount casmount:x rw,user_id=0\n\
        nonsense\n";

    #[test]
    fn the_table_of_the_kernel_is_understood() {
        let mounts = parse(TABLE);
        assert_eq!(mounts.len(), 4);
        assert_eq!(mounts[1].path, Path::new("/mnt/my cache"));
        assert_eq!(mounts[1].device, "0:50");
        assert!(mounts[1].is_casmount());
        assert_eq!(mounts[1].user_id(), Some(1000));
        assert_eq!(mounts[1].source, "casmount:main");
        assert_eq!(mounts[0].user_id(), None);
    }

    #[test]
    fn the_topmost_mount_counts() {
        assert!(topmost(parse(TABLE), Path::new("/mnt/x")).unwrap().is_casmount());
        assert_eq!(topmost(parse(TABLE), Path::new("/mnt/y")), None);
        assert!(!all().unwrap().is_empty());
    }

    #[test]
    fn a_longer_name_is_not_within() {
        let dir = Path::new("/mnt/x");
        assert!(is_within(b"/mnt/x", dir) && is_within(b"/mnt/x/y", dir));
        assert!(!is_within(b"/mnt/xy", dir) && !is_within(b"/mnt", dir));
    }
}
