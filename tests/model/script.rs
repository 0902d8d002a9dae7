//! Prints what was done as a shell script that does it again, with what was expected as comments.
//!
//! What coreutils do with exactly one system call of their own is theirs. Everything else, and
//! everything about files that stay open, is asked of one Python process through two FIFOs (`py`
//! in the script), which prints what it was answered. `A` and `B` are the directories to work in.

use std::fmt::Write as _;

use super::ops::{Access, How, Op, Renaming, Space};

/// One line of a script: in whose directory, what, and what came of it.
#[derive(Clone, Debug)]
pub struct Line {
    pub who: &'static str,
    pub what: What,
    pub note: String,
}

#[derive(Clone, Debug)]
pub enum What {
    Op(Op),
    /// Something that is done to a machine or to the store, in words of a shell.
    Event(String),
}

const PYTHON: &str = r#"# Answers what is asked of open files, and what the shell has no command for.
pipes=$(mktemp -d)
mkfifo "$pipes/ask" "$pipes/say"
trap 'rm -r "$pipes"' EXIT
python3 -u -c '
import ctypes, errno, os, stat, sys
from os import *
libc = ctypes.CDLL(None, use_errno=True)
h = {}
def bytes_of(fill, n):
    return bytes((fill + i * ((fill >> 8) * 2 + 1) + (i >> 8) * 13 + (i >> 16) * 101) & 255 for i in range(n))
def show(b):
    s = 0
    for x in b: s = (s * 31 + x) & 0xffffffff
    return "%d bytes (%s.., sum %08x)" % (len(b), bytes(b[:6]).hex(), s)
def meta(st):
    return "%s, %d links, %d bytes, mtime %d" % (stat.filemode(st.st_mode), st.st_nlink, st.st_size, st.st_mtime_ns)
def opened(n, path, flags):
    if n in h: close(h.pop(n))
    h[n] = open(path, flags, 0o666)
def put(path, fill, n):
    fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0o666)
    if n: pwrite(fd, bytes_of(fill, n), 0)
    close(fd)
def cat(path):
    fd = open(path, O_RDONLY)
    try: return show(pread(fd, 1 << 26, 0))
    finally: close(fd)
def ok(result):
    if result < 0: raise OSError(ctypes.get_errno(), "")
def fallocate(fd, mode, at, n): ok(libc.fallocate(fd, mode, ctypes.c_long(at), ctypes.c_long(n)))
def rename2(a, b, flags): ok(libc.renameat2(-100, a.encode(), -100, b.encode(), flags))
umask(0o022)
for line in sys.stdin:
    try: print(eval(line) or "done")
    except OSError as e: print(errno.errorcode[e.errno])
' <"$pipes/ask" >"$pipes/say" &
exec 8>"$pipes/ask" 9<"$pipes/say"
py() { printf '%s\n' "$1" >&8; read -r said <&9; echo "$said"; }
"#;

/// The whole script.
pub fn script(lines: &[Line]) -> String {
    let mut text =
        "#!/bin/sh\n# Do it again in directories of your own: A=/mnt/one/case B=/mnt/two/case sh THIS\n"
            .to_owned();
    text.push_str("umask 022\n");
    if lines
        .iter()
        .any(|line| matches!(&line.what, What::Op(op) if command(op, "$A").starts_with("py ")))
    {
        text.push_str(PYTHON);
    }
    for line in lines {
        let what = match &line.what {
            What::Op(op) => command(op, &format!("${}", line.who)),
            What::Event(words) => words.clone(),
        };
        let _ = writeln!(text, "{what:<64} # {}", line.note);
    }
    text
}

/// An operation as a command. Paths are put into double quotes.
pub fn command(op: &Op, dir: &str) -> String {
    let sh = |path: &str| format!("\"{dir}/{path}\"");
    // Within the double quotes of the shell, so that the directory is filled in.
    let py = |call: String| format!("py \"{call}\"");
    let quoted = |path: &str| format!("'{dir}/{path}'");
    // Open files of different machines have different names.
    let who = dir.trim_start_matches('$').to_lowercase();
    match op {
        Op::Put { path, len, fill } => py(format!("put({}, {fill}, {len})", quoted(path))),
        Op::Open { slot, path, how } => py(format!(
            "opened('{who}{slot}', {}, {})",
            quoted(path),
            flags(*how)
        )),
        Op::Close { slot } => py(format!("close(h.pop('{who}{slot}'))")),
        Op::Write { slot, at, len, fill } => {
            py(format!("pwrite(h['{who}{slot}'], bytes_of({fill}, {len}), {at})"))
        }
        Op::Read { slot, at, len } => py(format!("show(pread(h['{who}{slot}'], {len}, {at}))")),
        Op::SetLen { slot, len } => py(format!("ftruncate(h['{who}{slot}'], {len})")),
        Op::Space { slot, how, at, len } => py(format!(
            "fallocate(h['{who}{slot}'], {}, {at}, {len})",
            space(*how)
        )),
        Op::Copy {
            from,
            from_at,
            to,
            to_at,
            len,
        } => py(format!(
            "copy_file_range(h['{who}{from}'], h['{who}{to}'], {len}, {from_at}, {to_at})"
        )),
        Op::Fsync { slot } => py(format!("fsync(h['{who}{slot}'])")),
        Op::Fstat { slot } => py(format!("meta(fstat(h['{who}{slot}']))")),
        Op::Fchmod { slot, mode } => py(format!("fchmod(h['{who}{slot}'], 0o{mode:o})")),
        Op::SeekData { slot, at } => py(format!("lseek(h['{who}{slot}'], {at}, SEEK_DATA)")),
        Op::SeekHole { slot, at } => py(format!("lseek(h['{who}{slot}'], {at}, SEEK_HOLE)")),
        Op::Cat { path } => py(format!("cat({})", quoted(path))),
        Op::Truncate { path, len } => py(format!("truncate({}, {len})", quoted(path))),
        Op::Mkdir { path, mode } => {
            // `mkdir -m` takes the mode as it is, mkdir(2) less the umask.
            format!("mkdir -m {:o} {}", mode & !super::fs::UMASK, sh(path))
        }
        Op::Rmdir { path } => format!("rmdir {}", sh(path)),
        Op::Unlink { path } => format!("unlink {}", sh(path)),
        Op::Rename { from, to, how } => {
            let (from, to) = (quoted(from), quoted(to));
            py(match how {
                Renaming::Replace => format!("rename({from}, {to})"),
                Renaming::NoReplace => format!("rename2({from}, {to}, 1)"),
                Renaming::Exchange => format!("rename2({from}, {to}, 2)"),
            })
        }
        Op::Link { from, to } => format!("ln -P -T {} {}", sh(from), sh(to)),
        Op::Symlink { target, path } => format!("ln -s -T {target} {}", sh(path)),
        Op::Readlink { path } => format!("readlink {}", sh(path)),
        Op::Chmod { path, mode } => format!("chmod {mode:o} {}", sh(path)),
        Op::Utime {
            path,
            seconds,
            nofollow,
        } => {
            let link = if *nofollow { "-h " } else { "" };
            let nanos = super::ops::UTIME_NANOS;
            format!("touch -c {link}-m -d @{seconds}.{nanos} {}", sh(path))
        }
        Op::Stat { path } => format!("stat -L -c '%A, %h links, %s bytes, mtime %.9Y' {}", sh(path)),
        Op::Lstat { path } => format!("stat -c '%A, %h links, %s bytes, mtime %.9Y' {}", sh(path)),
        Op::List { path } => format!("ls -A {}", sh(path)),
        Op::SetXattr { path, name, value } => py(format!("setxattr({}, '{name}', b'{value}')", quoted(path))),
        Op::RemoveXattr { path, name } => py(format!("removexattr({}, '{name}')", quoted(path))),
    }
}

fn flags(how: How) -> String {
    let access = match how.access {
        Access::Read => "O_RDONLY",
        Access::Write => "O_WRONLY",
        Access::Both => "O_RDWR",
    };
    let more = [
        (how.create, "O_CREAT"),
        (how.exclusive, "O_EXCL"),
        (how.truncate, "O_TRUNC"),
        (how.append, "O_APPEND"),
        (how.nofollow, "O_NOFOLLOW"),
    ];
    let more = more.iter().filter(|(wanted, _)| *wanted).map(|(_, flag)| *flag);
    std::iter::once(access).chain(more).collect::<Vec<_>>().join("|")
}

/// The flags of fallocate(2), by their numbers.
fn space(how: Space) -> u32 {
    match how {
        Space::Allocate => 0,
        Space::AllocateKeepSize => 1,
        Space::Punch => 3,
        Space::Zero => 16,
        Space::ZeroKeepSize => 17,
    }
}
