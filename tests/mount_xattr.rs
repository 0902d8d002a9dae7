//! Extended attributes of a mount: with `--xattr` they are kept, without they are refused.

mod support;

use std::fs;

use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};
use support::{place::Place, posix::file};

const NAME: &str = "user.casmount.test";

fn get(path: &std::path::Path, name: &str) -> rustix::io::Result<Vec<u8>> {
    let mut value = vec![0; 65_536];
    let count = getxattr(path, name, &mut value[..])?;
    value.truncate(count);
    Ok(value)
}

fn list(path: &std::path::Path) -> Vec<String> {
    let mut names = vec![0; 65_536];
    let count = listxattr(path, &mut names[..]).unwrap();
    let names = names[..count]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    let mut names: Vec<_> = names
        .map(|name| String::from_utf8(name.to_vec()).unwrap())
        .collect();
    names.retain(|name| name.starts_with("user."));
    names.sort();
    names
}

#[test]
fn without_the_flag_they_are_not_supported() {
    let place = Place::new();
    if !place.is_casmount() {
        skip!("only casmount has the flag");
    }
    let path = file(&place.path("f"), b"x");
    assert_errno!(setxattr(&path, NAME, b"v", XattrFlags::empty()), EOPNOTSUPP);
    assert_errno!(get(&path, NAME), EOPNOTSUPP);
    assert_errno!(removexattr(&path, NAME), EOPNOTSUPP);
    // Copying with all attributes does not fail for that.
    let mut copy = std::process::Command::new("cp");
    copy.arg("-a").arg(&path).arg(place.path("g"));
    support::wait::run_ok(&mut copy, std::time::Duration::from_secs(20));
}

#[test]
fn with_the_flag_they_are_set_read_listed_and_removed() {
    let mut place = Place::with(&["--xattr"]);
    let path = file(&place.path("f"), b"x");
    fs::create_dir(place.path("d")).unwrap();
    for target in [path, place.path("d")] {
        let binary: Vec<u8> = (0..=255).collect();
        setxattr(&target, NAME, &binary, XattrFlags::empty()).unwrap();
        setxattr(&target, "user.empty", b"", XattrFlags::CREATE).unwrap();
        assert_eq!(get(&target, NAME).unwrap(), binary);
        assert_eq!(get(&target, "user.empty").unwrap(), b"");
        assert_eq!(list(&target), [NAME, "user.empty"]);
        place.seal();
        place.remount();
        assert_eq!(get(&target, NAME).unwrap(), binary);
        assert_eq!(list(&target), [NAME, "user.empty"]);
        removexattr(&target, NAME).unwrap();
        assert_errno!(get(&target, NAME), ENODATA);
        assert_eq!(list(&target), ["user.empty"]);
        place.remount();
        assert_eq!(list(&target), ["user.empty"]);
    }
}

#[test]
fn errors_are_those_of_the_manual() {
    let place = Place::with(&["--xattr"]);
    let path = file(&place.path("f"), b"x");
    assert_errno!(get(&path, NAME), ENODATA);
    assert_errno!(removexattr(&path, NAME), ENODATA);
    assert_errno!(setxattr(&path, NAME, b"v", XattrFlags::REPLACE), ENODATA);
    setxattr(&path, NAME, b"value", XattrFlags::CREATE).unwrap();
    assert_errno!(setxattr(&path, NAME, b"v", XattrFlags::CREATE), EEXIST);
    setxattr(&path, NAME, b"other", XattrFlags::REPLACE).unwrap();
    assert_errno!(getxattr(&path, NAME, &mut [0_u8; 2][..]), ERANGE);
    assert_errno!(listxattr(&path, &mut [0_u8; 2][..]), ERANGE);
    assert_errno!(get(&place.path("missing"), NAME), ENOENT);
    let long = format!("user.{}", "x".repeat(251));
    assert_errno!(setxattr(&path, &long, b"v", XattrFlags::empty()), ERANGE);
}

#[test]
fn attributes_go_with_the_file_not_the_name() {
    let place = Place::with(&["--xattr"]);
    let (a, b) = (file(&place.path("a"), b"a"), place.path("b"));
    setxattr(&a, NAME, b"of a", XattrFlags::empty()).unwrap();
    fs::rename(&a, &b).unwrap();
    assert_eq!(get(&b, NAME).unwrap(), b"of a");
    file(&a, b"a");
    assert_errno!(get(&a, NAME), ENODATA);
    // Writing content keeps them.
    file(&b, b"new content");
    assert_eq!(get(&b, NAME).unwrap(), b"of a");
}
