//! The first mount on a machine that has nothing of casmount, without any setting.
//!
//! The default places of root are real ones. The test sees empty ones instead, in a mount
//! namespace of its own; and every process ends with the shell, in a PID namespace of its own.

mod support;

use std::{fs, process::Command, time::Duration};

use support::{tempdir::TestDir, wait};

const SCRIPT: &str = r#"
for dir in /var/lib /var/cache /var/log /run; do mount -t tmpfs none "$dir"; done
casmount=$1 mountpoint=$2
"$casmount" mount "$mountpoint"
echo kept > "$mountpoint/file"
"$casmount" flush "$mountpoint"
"$casmount" unmount "$mountpoint"
test -f /var/lib/casmount/store/casmount.json
"$casmount" mount "$mountpoint"
test "$(cat "$mountpoint/file")" = kept
"$casmount" unmount "$mountpoint"
"#;

#[test]
fn a_mount_without_settings_makes_what_it_needs() {
    if !rustix::process::geteuid().is_root() {
        skip!("namespaces need root");
    }
    let dir = TestDir::new();
    let mountpoint = dir.path().join("mnt");
    fs::create_dir(&mountpoint).unwrap();
    let mut command = Command::new("unshare");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CASMOUNT_") {
            command.env_remove(name);
        }
    }
    command
        .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["sh", "-euxc", SCRIPT, "sh", env!("CARGO_BIN_EXE_casmount")])
        .arg(&mountpoint);
    wait::run_ok(&mut command, Duration::from_secs(60));
}
