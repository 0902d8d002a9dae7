//! The cache directory: who holds it, what it belongs to, and how it was left.
//!
//! # Format (version 1)
//!
//! ```text
//! lock          flock(2) held by the daemon; its process id, decimal
//! format        "casmount cache 1\n"
//! machine.json  {"machine": id, "store": id, "stack": [{"volume": name, "until_millis": n}, ...],
//!               "host": {name: value}}; `stack` is what is mounted, from the top
//! stop.json     {"boot": boot id, "clean": bool}: the boot in which it was last used, and whether it was closed
//! ```
//!
//! # Invariants
//!
//! - A directory that is refused is unchanged, but for an empty file `lock` where there was none.
//! - What it belongs to is known without opening the index, which would mend what a crash left.
//! - It belongs to one store and one stack of volumes from its first use on: the tree in its index is
//!   that of the stack, and another one must never be mixed with it.
//! - `format` is written last: a directory without it was never used.
//! - `stop.json` says "not clean" on the disk before anything is changed.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::StoreError;
use crate::base::{
    durable,
    id::{MachineId, StoreId},
    volume::Stack,
};

/// A file that every cache directory in use has.
pub const FORMAT: &str = "format";
const FORMAT_PREFIX: &str = "casmount cache ";
const FORMAT_VERSION: u32 = 1;

/// What a directory may hold before it becomes a cache directory: what an interrupted start left, and
/// what a fresh file system has.
const HARMLESS: [&str; 3] = ["lock", "machine.json", "lost+found"];

const MACHINE: &str = "machine.json";

/// Where a machine says who it is. Values that both have and that differ tell
/// two machines apart; which of them can be read depends on platform and user.
const HOST_FILES: [(&str, &str); 3] = [
    ("machine-id", "/etc/machine-id"),
    // On EC2 the instance's id: machines started from one image share the machine-id.
    ("asset-tag", "/sys/devices/virtual/dmi/id/board_asset_tag"),
    ("product-uuid", "/sys/devices/virtual/dmi/id/product_uuid"),
];

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// How a cache directory was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastStop {
    /// Closed, or never used.
    Clean,
    /// The process ended, the kernel went on: every byte that was written is there.
    Crashed,
    /// The kernel ended: only what was synced is sure to be there.
    PowerLost,
}

/// What a directory belongs to: the content of `machine.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    machine: MachineId,
    pub store: StoreId,
    /// `None` until the first mount, and in a directory that is older than this member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stack: Option<Stack>,
    host: BTreeMap<String, String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Stop {
    boot: String,
    clean: bool,
}

/// A cache directory that this process holds until this is dropped.
#[derive(Debug)]
pub struct CacheDir {
    path: PathBuf,
    _lock: File,
    binding: Binding,
    machine_changed: bool,
    last_stop: LastStop,
    boot: String,
}

impl CacheDir {
    /// Takes the directory, making it (mode 0700) if there is none.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unusable`] when another process holds it, when it belongs to another store, was written
    /// by a newer version, or is a directory of something else.
    pub fn open(path: &Path, store: StoreId) -> Result<Self, StoreError> {
        Self::open_as(
            path,
            store,
            host(),
            read_line(Path::new(BOOT_ID)).unwrap_or_default(),
        )
    }

    fn open_as(
        path: &Path,
        store: StoreId,
        host: BTreeMap<String, String>,
        boot: String,
    ) -> Result<Self, StoreError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(StoreError::disk("create", path))?;
        let known = read_format(path)?;
        if !known {
            refuse_foreign(path)?;
        }
        let lock = take_lock(path)?;
        // Another process may have made it while this one waited for nothing.
        let known = known || read_format(path)?;
        let last_stop = if known {
            read_stop(path, &boot)?
        } else {
            LastStop::Clean
        };
        let (binding, machine_changed) = bind(path, store, host, known)?;
        note_pid(&lock, path)?;
        if !known {
            let format = path.join(FORMAT);
            durable::replace(&format, format!("{FORMAT_PREFIX}{FORMAT_VERSION}\n").as_bytes())
                .map_err(StoreError::disk("write", &format))?;
        }
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
            binding,
            machine_changed,
            last_stop,
            boot,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// This writer of logs. A new one when the directory woke up on another machine.
    pub fn machine(&self) -> MachineId {
        self.binding.machine
    }

    /// The volumes that it belongs to; `None` when that was never noted.
    pub fn stack(&self) -> Option<&Stack> {
        self.binding.stack.as_ref()
    }

    /// Makes it belong to these volumes. For a directory that belongs to none.
    pub fn bind_stack(&mut self, stack: Stack) -> Result<(), StoreError> {
        let binding = Binding {
            stack: Some(stack),
            ..self.binding.clone()
        };
        write_json(&self.path.join(MACHINE), &binding)?;
        self.binding = binding;
        Ok(())
    }

    /// Whether the directory was last used on another machine.
    pub fn machine_changed(&self) -> bool {
        self.machine_changed
    }

    pub fn last_stop(&self) -> LastStop {
        self.last_stop
    }

    /// Notes that the directory is in use, before the first change; after what
    /// power loss left was mended, because the note makes it forgotten.
    pub fn mark_running(&self) -> Result<(), StoreError> {
        self.write_stop(false)
    }

    /// Notes that all is on the disk.
    pub fn mark_clean(&self) -> Result<(), StoreError> {
        self.write_stop(true)
    }

    fn write_stop(&self, clean: bool) -> Result<(), StoreError> {
        let path = self.path.join("stop.json");
        let stop = Stop {
            boot: self.boot.clone(),
            clean,
        };
        write_json(&path, &stop)
    }
}

fn unusable<T>(why: String) -> Result<T, StoreError> {
    Err(StoreError::Unusable { why })
}

/// Whether it is a cache directory of a version that this program knows.
fn read_format(dir: &Path) -> Result<bool, StoreError> {
    let path = dir.join(FORMAT);
    let Some(text) = read_if_there(&path)? else {
        return Ok(false);
    };
    let version = text
        .trim_end()
        .strip_prefix(FORMAT_PREFIX)
        .and_then(|version| version.parse::<u32>().ok());
    match version {
        Some(version) if version <= FORMAT_VERSION => Ok(true),
        Some(version) => unusable(format!(
            "cache directory {} was written by a newer casmount (format {version}, this program knows \
             {FORMAT_VERSION}): use that version, or another directory",
            dir.display()
        )),
        None => unusable(format!(
            "{} is not a casmount cache directory: its file `format` says something else; choose another directory",
            dir.display()
        )),
    }
}

fn refuse_foreign(dir: &Path) -> Result<(), StoreError> {
    for entry in fs::read_dir(dir).map_err(StoreError::disk("list", dir))? {
        let name = entry.map_err(StoreError::disk("list", dir))?.file_name();
        let name = name.to_string_lossy();
        let temporary = name.ends_with(".tmp") && HARMLESS[1..].iter().any(|known| name.starts_with(known))
            || name.starts_with("format.");
        if !temporary && !HARMLESS.contains(&&*name) {
            return unusable(format!(
                "{} is not empty and not a casmount cache directory (it holds {name}): choose another directory",
                dir.display()
            ));
        }
    }
    Ok(())
}

/// Says who holds the lock. After the last refusal: a directory that is refused is unchanged.
fn note_pid(mut file: &File, dir: &Path) -> Result<(), StoreError> {
    let path = dir.join("lock");
    file.set_len(0)
        .and_then(|()| write!(file, "{}", std::process::id()))
        .map_err(StoreError::disk("write", &path))
}

fn take_lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(StoreError::disk("open", &path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            // Who holds it may be about to write its number.
            let _ = file.read_to_string(&mut pid);
            let pid = if pid.trim().is_empty() {
                "unknown"
            } else {
                pid.trim()
            };
            return unusable(format!(
                "cache directory {} is in use by another casmount daemon (pid {pid})",
                dir.display()
            ));
        }
        Err(err) => return Err(StoreError::disk("lock", &path)(err.into())),
    }
    Ok(file)
}

/// Reads what the directory belongs to, without looking whether it was ever used.
pub(super) fn read_binding(dir: &Path) -> Result<Option<Binding>, StoreError> {
    let path = dir.join(MACHINE);
    let Some(text) = read_if_there(&path)? else {
        return Ok(None);
    };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|err| StoreError::Unusable {
            why: format!("{} is damaged: {err}", path.display()),
        })
}

/// Checks what the directory belongs to, or makes it belong. Returns also
/// whether another machine had the directory before.
fn bind(
    dir: &Path,
    store: StoreId,
    host: BTreeMap<String, String>,
    known: bool,
) -> Result<(Binding, bool), StoreError> {
    let old = if known { read_binding(dir)? } else { None };
    if let Some(old) = &old {
        if old.store != store {
            return unusable(format!(
                "cache directory {} belongs to store {}, not to store {store}: use another --cache-dir for this \
                 store, or remove the directory if the old store is gone",
                dir.display(),
                old.store
            ));
        }
        let differs = |(name, value): (&String, &String)| host.get(name).is_some_and(|now| now != value);
        if !old.host.iter().any(differs) {
            return Ok((old.clone(), false));
        }
    }
    let binding = Binding {
        machine: MachineId::random(),
        store,
        stack: old.as_ref().and_then(|old| old.stack.clone()),
        host,
    };
    if let Some(old) = &old {
        tracing::info!(
            was = %old.machine, machine = %binding.machine,
            "the cache directory woke up on another machine and takes a new machine id"
        );
    }
    write_json(&dir.join(MACHINE), &binding)?;
    Ok((binding, old.is_some()))
}

fn read_stop(dir: &Path, boot: &str) -> Result<LastStop, StoreError> {
    let path = dir.join("stop.json");
    let Some(text) = read_if_there(&path)? else {
        // It was made, and never used.
        return Ok(LastStop::Clean);
    };
    // A file that does not read back was written while the power went.
    let stop = serde_json::from_str::<Stop>(&text).unwrap_or(Stop {
        boot: String::new(),
        clean: false,
    });
    Ok(match stop {
        Stop { clean: true, .. } => LastStop::Clean,
        // Without a boot id nobody knows: better to hash too much.
        Stop { boot: then, .. } if then == boot && !boot.is_empty() => LastStop::Crashed,
        Stop { .. } => LastStop::PowerLost,
    })
}

fn host() -> BTreeMap<String, String> {
    let values = HOST_FILES
        .iter()
        .filter_map(|(name, path)| Some(((*name).to_owned(), read_line(Path::new(path))?)));
    values.collect()
}

fn read_line(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

fn read_if_there(path: &Path) -> Result<Option<String>, StoreError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(StoreError::disk("read", path)(err)),
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), StoreError> {
    let mut text = serde_json::to_vec_pretty(value).expect("plain structures become JSON");
    text.push(b'\n');
    durable::replace(path, &text).map_err(StoreError::disk("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORE: StoreId = StoreId(7);

    fn host(id: &str) -> BTreeMap<String, String> {
        BTreeMap::from([("machine-id".to_owned(), id.to_owned())])
    }

    fn open(dir: &Path, machine: &str, boot: &str) -> Result<CacheDir, StoreError> {
        CacheDir::open_as(dir, STORE, host(machine), boot.to_owned())
    }

    fn why<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
        match result {
            Err(StoreError::Unusable { why }) => why,
            other => panic!("{other:?} is not a refusal"),
        }
    }

    /// Every file of a directory, but the lock.
    fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
        let files = entries.filter(|entry| entry.file_name() != "lock");
        files
            .map(|entry| {
                (
                    entry.file_name().into_string().unwrap(),
                    fs::read(entry.path()).unwrap(),
                )
            })
            .collect()
    }

    #[test]
    fn a_second_daemon_is_refused_with_the_pid_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path(), "a", "boot").unwrap();
        let why = why(open(dir.path(), "a", "boot"));
        assert!(why.contains(&format!("(pid {})", std::process::id())), "{why}");
        assert!(why.contains(&dir.path().display().to_string()), "{why}");
        drop(first);
        open(dir.path(), "a", "boot").unwrap();
    }

    #[test]
    fn a_newer_format_another_store_and_another_use_are_refused_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), "a", "boot").unwrap());
        let before = contents(dir.path());
        let other = CacheDir::open_as(dir.path(), StoreId(8), host("a"), String::new());
        let text = why(other);
        assert!(
            text.contains(&STORE.to_string()) && text.contains(&StoreId(8).to_string()),
            "{text}"
        );
        assert_eq!(contents(dir.path()), before);

        fs::write(dir.path().join("format"), "casmount cache 2\n").unwrap();
        let before = contents(dir.path());
        assert!(why(open(dir.path(), "a", "boot")).contains("newer casmount"));
        assert_eq!(contents(dir.path()), before);

        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("thesis.tex"), "x").unwrap();
        assert!(why(open(home.path(), "a", "boot")).contains("thesis.tex"));
        assert_eq!(contents(home.path()).len(), 1);
        assert!(!home.path().join("lock").exists());
    }

    #[test]
    fn another_machine_takes_a_new_id_and_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path(), "a", "boot").unwrap().machine();
        assert_eq!(open(dir.path(), "a", "boot").unwrap().machine(), first);
        let moved = open(dir.path(), "b", "boot").unwrap();
        assert!(moved.machine_changed());
        let second = moved.machine();
        assert_ne!(second, first);
        drop(moved);
        let again = open(dir.path(), "b", "boot").unwrap();
        assert_eq!((again.machine(), again.machine_changed()), (second, false));
    }

    #[test]
    fn the_stack_is_noted_once_and_stays_when_the_machine_changes() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = open(dir.path(), "a", "boot").unwrap();
        assert_eq!(cache.stack(), None);
        let stack = Stack::of("main".parse().unwrap());
        cache.bind_stack(stack.clone()).unwrap();
        let machine = cache.machine();
        drop(cache);
        let again = open(dir.path(), "a", "boot").unwrap();
        assert_eq!((again.stack(), again.machine()), (Some(&stack), machine));
        drop(again);
        assert_eq!(open(dir.path(), "b", "boot").unwrap().stack(), Some(&stack));
    }

    #[test]
    fn the_last_stop_is_told_by_the_note_and_the_boot() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), "a", "one").unwrap();
        assert_eq!(cache.last_stop(), LastStop::Clean);
        cache.mark_running().unwrap();
        drop(cache);
        assert_eq!(
            open(dir.path(), "a", "one").unwrap().last_stop(),
            LastStop::Crashed
        );
        let cache = open(dir.path(), "a", "two").unwrap();
        assert_eq!(cache.last_stop(), LastStop::PowerLost);
        // Until the mending is done, it stays a power loss.
        drop(cache);
        let cache = open(dir.path(), "a", "two").unwrap();
        assert_eq!(cache.last_stop(), LastStop::PowerLost);
        cache.mark_running().unwrap();
        cache.mark_clean().unwrap();
        drop(cache);
        assert_eq!(
            open(dir.path(), "a", "three").unwrap().last_stop(),
            LastStop::Clean
        );
    }

    #[test]
    fn a_start_that_was_interrupted_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), "a", "boot").unwrap());
        fs::remove_file(dir.path().join("format")).unwrap();
        fs::write(dir.path().join("machine.json"), "half").unwrap();
        fs::write(dir.path().join("format.12.tmp"), "casm").unwrap();
        open(dir.path(), "a", "boot").unwrap();
    }

    #[test]
    fn nobody_else_may_look_into_it() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/cache");
        open(&path, "a", "boot").unwrap();
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
