"""Other file systems over S3, measured beside casmount where they are installed.

s3fs keeps whole files in a cache directory (use_cache), rclone too (--vfs-cache-mode full); both are started as
their own advice for S3 says, each on a server of its own, and with their caches on the measured file system.
The server takes no multipart uploads. What a peer refuses is shown as what it said, instead of a figure, and what
takes longer than a bound as that.
"""

import errno
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import fleet
from lab import CLEANUP, S3Server, end_process, run, unmount, wait_for

PACKAGES = ("s3fs", "rclone")


class Refused(Exception):
    """A peer cannot do it, or not within its bound; says why in a few characters."""


def installed():
    return [name for name in PACKAGES if shutil.which(name)]


def install():
    """Brings what the table compares with, and what its programs need."""
    packages = [*PACKAGES, "fuse3", "ccache", "git", "make", "gcc", "libc6-dev", "binutils"]
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    run("apt-get", "update", "-qq", env=env)
    run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages, env=env)


def version(name):
    text = run(name, "--version").splitlines()[0]
    found = re.search(r"v?\d+\.\d+[\w.-]*", text, re.IGNORECASE)
    return found.group(0) if found else text


def why(text):
    """What a program said of its failure, in a few characters."""
    found = re.search(r"os error (\d+)", text)
    if found:
        return errno.errorcode.get(int(found.group(1)), found.group(0))
    for number, words in ((number, os.strerror(number)) for number in sorted(errno.errorcode)):
        if words in text:
            return errno.errorcode[number]
    lines = [one for one in text.strip().splitlines() if one.strip()] or ["failed"]
    said = re.search(r'error: "[^"]*: ([^"]*)"', lines[-1])
    return (said.group(1) if said else lines[-1])[-32:]


def bounded(command, limit, mount, env=None, cwd=None):
    """Runs a program on a peer's mount, and ends it and all that it started when it takes too long."""
    process = subprocess.Popen(
        [str(part) for part in command], env=env, cwd=cwd, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            # It waits for an answer of the peer, which is not going to come.
            Path(f"/sys/fs/fuse/connections/{os.minor(mount.device)}/abort").write_text("1")
            process.communicate(timeout=30)
        raise Refused(f"> {limit} s") from None
    if process.returncode != 0:
        raise Refused(why(err + out if err.strip() else out))
    return out


class Peer:
    """One of them, mounted, on a server of its own."""

    def __init__(self, name, tools, work, disk):
        self.name = name
        self.cache, self.path = disk.path / f"{name}-cache", work / f"mnt-{name}"
        self.cache.mkdir()
        self.path.mkdir(exist_ok=True)
        self.server = S3Server(tools, work / f"{name}-bodies")
        self.log = work / f"{name}.log"
        env = dict(os.environ, **self.server.env)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                getattr(self, name)(work), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        CLEANUP.push(end_process, self.process)
        CLEANUP.push(unmount, self.path)
        wait_for(f"{name} is mounted", self.answers)
        self.device = os.stat(self.path).st_dev

    def answers(self):
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name} ended: {self.log.read_text(errors='replace')[-2000:]}")
        return os.path.ismount(self.path)

    def s3fs(self, work):
        secret = work / "s3fs-password"
        secret.touch(mode=0o600)
        secret.write_text(f"{self.server.env['AWS_ACCESS_KEY_ID']}:{self.server.env['AWS_SECRET_ACCESS_KEY']}\n")
        return [
            "s3fs", "bench", self.path, "-f", "-o", f"passwd_file={secret}", "-o", f"url={self.server.endpoint}",
            "-o", "use_path_request_style", "-o", f"use_cache={self.cache}", "-o", "nomultipart",
            "-o", "stat_cache_expire=3600", "-o", "enable_noobj_cache", "-o", "max_stat_cache_size=1000000",
        ]

    def rclone(self, work):
        del work
        return [
            "rclone", "mount", ":s3:bench", self.path, "--config", "/dev/null", "--s3-provider", "Other",
            "--s3-env-auth", "--s3-endpoint", self.server.endpoint, "--s3-force-path-style", "--s3-region", "us-east-1",
            "--s3-upload-cutoff", "5G", "--s3-no-check-bucket", "--vfs-cache-mode", "full", "--cache-dir", self.cache,
            "--vfs-cache-max-size", "off", "--vfs-cache-max-age", "24h", "--vfs-write-back", "1s",
            "--vfs-read-chunk-size", "4M", "--dir-cache-time", "1h", "--attr-timeout", "1h",
        ]

    def settle(self, limit=60):
        """Waits until it sends nothing more: both upload behind the program's back."""
        deadline, before = time.monotonic() + limit, None
        while time.monotonic() < deadline:
            now = fleet.counts(self.server)
            now = (fleet.total(now), now["bytes_received"])
            if now == before:
                return
            before = now
            time.sleep(1.2)
