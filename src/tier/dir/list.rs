//! Lists the objects of a directory in the order of their keys' bytes.
//!
//! A folder is read only if it can hold keys that start with the prefix and
//! sort behind the last one seen, so that a look at the newest minutes of a
//! log costs those minutes, however long the log is.

use std::{fs, path::Path};

use super::{State, failed, is_absent, object_meta};
use crate::tier::{ObjectMeta, Page, TierError};

/// As many as S3 sends.
const PAGE: usize = 1000;

/// What a walk looks for, and what it found.
struct Walk<'a> {
    prefix: &'a str,
    after: &'a str,
    found: Vec<ObjectMeta>,
}

impl State {
    pub(super) fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, TierError> {
        self.renew_clock();
        let mut walk = Walk {
            prefix,
            after: after.unwrap_or_default(),
            found: Vec::new(),
        };
        // The deepest folder that holds every key with the prefix.
        let start = prefix.rfind('/').map_or("", |slash| &prefix[..=slash]);
        let steps_up = |part: &str| part.starts_with('.');
        if start.split('/').any(steps_up) || prefix.contains('\0') {
            return Ok(Page::default());
        }
        if walk.may_hold(start) {
            self.visit(start, &mut walk)?;
        }
        let more = walk.found.len() > PAGE;
        walk.found.truncate(PAGE);
        if walk.found.is_empty() {
            self.check_root(&self.root)?;
        }
        Ok(Page {
            objects: walk.found,
            more,
        })
    }

    /// Adds the objects below `folder`, which is empty or ends in a slash.
    fn visit(&self, folder: &str, walk: &mut Walk<'_>) -> Result<(), TierError> {
        let path = self.root.join(folder);
        for name in sorted_names(&path)? {
            if walk.found.len() > PAGE {
                return Ok(());
            }
            let key = format!("{folder}{name}");
            if key.ends_with('/') {
                if walk.may_hold(&key) {
                    self.visit(&key, walk)?;
                }
            } else if key.starts_with(walk.prefix) && key.as_str() > walk.after {
                let file = self.root.join(&key);
                match fs::symlink_metadata(&file) {
                    Ok(meta) => walk.found.push(object_meta(key, &meta)),
                    // Deleted since its folder was read.
                    Err(error) if is_absent(&error) => {}
                    Err(error) => return Err(failed("list", &file, error)),
                }
            }
        }
        Ok(())
    }
}

impl Walk<'_> {
    /// Whether a key below `folder` can be one that is looked for.
    fn may_hold(&self, folder: &str) -> bool {
        let on_the_way = folder.starts_with(self.prefix) || self.prefix.starts_with(folder);
        // All keys below a folder lie on one side of any key that is not below it.
        on_the_way && (folder > self.after || self.after.starts_with(folder))
    }
}

/// The objects and folders of a folder; folders end in a slash, which is part
/// of the keys below them and so decides their place in the order.
fn sorted_names(path: &Path) -> Result<Vec<String>, TierError> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        // A folder that became empty was removed, or the prefix leads nowhere.
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(failed("list", path, error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| failed("list", path, error))?;
        // What no key can name is not ours; the private folder begins with a dot for that.
        let Ok(mut name) = entry.file_name().into_string() else {
            continue;
        };
        if name.starts_with('.') {
            continue;
        }
        let kind = match entry.file_type() {
            Ok(kind) => kind,
            Err(error) if is_absent(&error) => continue,
            Err(error) => return Err(failed("list", path, error)),
        };
        if kind.is_dir() {
            name.push('/');
        } else if !kind.is_file() {
            continue;
        }
        names.push(name);
    }
    names.sort_unstable();
    Ok(names)
}
