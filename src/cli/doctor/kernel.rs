//! The kernel, the helpers and the privileges that a mount needs.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use super::finding::Finding;
use crate::config::Settings;

/// `CAP_SYS_ADMIN` of linux/capability.h.
const CAP_SYS_ADMIN: u32 = 21;
/// The first kernel with FUSE passthrough.
const PASSTHROUGH_KERNEL: (u32, u32) = (6, 9);

/// What a machine has.
#[derive(Clone, Debug)]
struct Facts {
    uid: u32,
    /// What opening `/dev/fuse` answered.
    dev_fuse: Result<(), std::io::ErrorKind>,
    fusermount: bool,
    /// `/etc/fuse.conf` lets users share their mounts.
    user_allow_other: bool,
    sys_admin: bool,
    kernel: Option<(u32, u32)>,
}

pub fn check(settings: &Settings) -> Vec<Finding> {
    judge(&look(), settings.allow_other)
}

fn look() -> Facts {
    let fuse = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let conf = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let release = rustix::system::uname();
    Facts {
        uid: rustix::process::geteuid().as_raw(),
        dev_fuse: fuse.map(|_| ()).map_err(|err| err.kind()),
        fusermount: find_in_path("fusermount3"),
        user_allow_other: has_user_allow_other(&conf),
        sys_admin: has_capability(&status, CAP_SYS_ADMIN),
        kernel: parse_kernel(&release.release().to_string_lossy()),
    }
}

fn judge(facts: &Facts, allow_other: bool) -> Vec<Finding> {
    let mut findings = vec![match facts.dev_fuse {
        Ok(()) => Finding::ok("fuse-device", "/dev/fuse can be opened"),
        Err(std::io::ErrorKind::PermissionDenied) => Finding::fail(
            "fuse-device",
            "/dev/fuse is there, but this user may not open it",
            "chmod 666 /dev/fuse; in a container: allow the device (docker run --device /dev/fuse)",
        ),
        Err(_) => Finding::fail(
            "fuse-device",
            "there is no /dev/fuse",
            "modprobe fuse; in a container: docker run --device /dev/fuse --cap-add SYS_ADMIN",
        ),
    }];
    if facts.uid != 0 {
        findings.push(if facts.fusermount {
            Finding::ok(
                "fusermount3",
                "fusermount3 is there, which mounts for ordinary users",
            )
        } else {
            Finding::fail(
                "fusermount3",
                "there is no fusermount3, without which only root can mount",
                "apt-get install fuse3",
            )
        });
        if allow_other {
            findings.push(if facts.user_allow_other {
                Finding::ok("allow-other", "/etc/fuse.conf lets users share their mounts")
            } else {
                Finding::fail(
                    "allow-other",
                    "--allow-other is wanted, and /etc/fuse.conf does not let users share their mounts",
                    "add the line user_allow_other to /etc/fuse.conf, or give --no-allow-other",
                )
            });
        }
    }
    findings.push(match facts.kernel {
        Some(kernel) if kernel < PASSTHROUGH_KERNEL => Finding::warn(
            "kernel",
            format!("Linux {}.{} has no FUSE passthrough", kernel.0, kernel.1),
            "use Linux 6.9 or newer for reads and writes at the speed of the disk",
        ),
        Some(kernel) => Finding::ok(
            "kernel",
            format!("Linux {}.{} has FUSE passthrough", kernel.0, kernel.1),
        ),
        None => Finding::warn("kernel", "the version of the kernel is not known", "see uname -r"),
    });
    findings.push(if facts.sys_admin {
        Finding::ok(
            "passthrough",
            "this user may hand files to the kernel (CAP_SYS_ADMIN)",
        )
    } else {
        Finding::warn(
            "passthrough",
            "without CAP_SYS_ADMIN every read and write goes through the daemon",
            "mount as root; in a container: --cap-add SYS_ADMIN",
        )
    });
    findings
}

fn find_in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    std::env::split_paths(&path).any(|dir| is_executable(&dir.join(program)))
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn has_user_allow_other(conf: &str) -> bool {
    conf.lines().any(|line| line.trim() == "user_allow_other")
}

/// Reads the effective set of `/proc/self/status`: `CapEff:\t000001ffffffffff`.
fn has_capability(status: &str, capability: u32) -> bool {
    let set = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
    set.is_some_and(|set| set >> capability & 1 == 1)
}

/// `6.1.0-18-amd64` is 6.1.
fn parse_kernel(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Severity;

    fn machine() -> Facts {
        Facts {
            uid: 0,
            dev_fuse: Ok(()),
            fusermount: true,
            user_allow_other: true,
            sys_admin: true,
            kernel: Some((6, 12)),
        }
    }

    fn severity(facts: &Facts, allow_other: bool, check: &str) -> Option<Severity> {
        let findings = judge(facts, allow_other);
        findings
            .iter()
            .find(|finding| finding.check == check)
            .map(|finding| finding.severity)
    }

    #[test]
    fn a_good_machine_has_nothing_to_mend() {
        assert!(
            judge(&machine(), true)
                .iter()
                .all(|finding| finding.severity == Severity::Ok)
        );
    }

    #[test]
    fn without_the_device_nothing_works() {
        for kind in [std::io::ErrorKind::NotFound, std::io::ErrorKind::PermissionDenied] {
            let facts = Facts {
                dev_fuse: Err(kind),
                ..machine()
            };
            assert_eq!(severity(&facts, true, "fuse-device"), Some(Severity::Fail));
        }
    }

    #[test]
    fn users_need_the_helper_and_root_does_not() {
        let root = Facts {
            fusermount: false,
            ..machine()
        };
        assert_eq!(severity(&root, false, "fusermount3"), None);
        let user = Facts { uid: 1000, ..root };
        assert_eq!(severity(&user, false, "fusermount3"), Some(Severity::Fail));
    }

    #[test]
    fn sharing_a_users_mount_needs_a_line_in_fuse_conf() {
        let user = Facts {
            uid: 1000,
            user_allow_other: false,
            ..machine()
        };
        assert_eq!(severity(&user, true, "allow-other"), Some(Severity::Fail));
        assert_eq!(severity(&user, false, "allow-other"), None);
        assert!(has_user_allow_other("# x\nuser_allow_other\n"));
        assert!(!has_user_allow_other("#user_allow_other\n"));
    }

    #[test]
    fn what_only_slows_down_is_a_warning() {
        let old = Facts {
            kernel: Some((6, 1)),
            sys_admin: false,
            ..machine()
        };
        assert_eq!(severity(&old, true, "kernel"), Some(Severity::Warn));
        assert_eq!(severity(&old, true, "passthrough"), Some(Severity::Warn));
    }

    #[test]
    fn what_the_kernel_says_is_understood() {
        assert_eq!(parse_kernel("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(parse_kernel("6.10"), Some((6, 10)));
        assert_eq!(parse_kernel("odd"), None);
        assert!(has_capability("CapEff:\t0000000000200000\n", CAP_SYS_ADMIN));
        assert!(!has_capability("CapEff:\t0000000000000000\n", CAP_SYS_ADMIN));
    }
}
