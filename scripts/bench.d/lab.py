"""What a measurement runs on: file systems, daemons and servers, and how all of it is undone."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
STEP_LIMIT = 1800  # seconds for any single program

class Cleanup:
    """Undoes what was made, last first, whatever ends the run."""

    def __init__(self):
        self.steps = []

    def push(self, step, *args):
        self.steps.append((step, args))
        return len(self.steps)

    def run_to(self, depth):
        while len(self.steps) > depth:
            step, args = self.steps.pop()
            try:
                step(*args)
            except Exception as err:  # the rest must still go
                print(f"bench: cleaning up: {err}", file=sys.stderr)


CLEANUP = Cleanup()


def run(*command, env=None, check=True, limit=STEP_LIMIT, cwd=None):
    done = subprocess.run(
        [str(part) for part in command],
        env=env, timeout=limit, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace",
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stderr}{done.stdout}")
    return done.stdout


def seconds(*command, env=None):
    return json.loads(run(*command, env=env))["seconds"]


def unmount(point):
    for _ in range(20):
        if not os.path.ismount(point) and str(point) not in Path("/proc/self/mountinfo").read_text():
            return
        run("umount", "-l", point, check=False)


def end_process(process):
    if process.poll() is None:
        process.kill()
    process.wait(timeout=30)


def detach(device):
    for _ in range(50):
        if subprocess.run(["losetup", "-d", device], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)


def wait_for(what, condition, limit=60):
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"still not so after {limit} s: {what}")
        time.sleep(0.02)


class Disk:
    """A file system of its own on a loop device."""

    def __init__(self, kind, work, size):
        image, self.path = work / f"{kind}.img", work / kind
        with open(image, "wb") as file:
            file.truncate(size)
        CLEANUP.push(image.unlink)
        run(f"mkfs.{kind}", "-q", "-f" if kind == "xfs" else "-F", image)
        self.device = run("losetup", "--find", "--show", "--direct-io=on", image).strip()
        CLEANUP.push(detach, self.device)
        self.path.mkdir(exist_ok=True)
        run("mount", "-t", kind, self.device, self.path)
        CLEANUP.push(unmount, self.path)

    def sync(self):
        run("sync", "-f", self.path)


class NullMount:
    def __init__(self, tools, disk, work):
        source, self.path = disk.path / "null", work / "null"
        source.mkdir()
        self.path.mkdir(exist_ok=True)
        process = subprocess.Popen([tools / "null-daemon", source, self.path])
        self.process = process
        CLEANUP.push(end_process, process)
        CLEANUP.push(unmount, self.path)
        wait_for("null-daemon is mounted", lambda: os.path.ismount(self.path))


class Casmount:
    """One daemon with its cache directory."""

    def __init__(self, program, name, work, cache, store, env, *args):
        self.program, self.cache, self.env = program, cache, dict(os.environ, **env)
        self.path = work / f"mnt-{name}"
        self.path.mkdir(exist_ok=True)
        self.log = open(work / f"{name}.log", "ab")
        self.process = subprocess.Popen(
            [program, "mount", "--store", store, "--cache-dir", cache, "--foreground", *args, self.path],
            env=self.env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )
        self.depth = len(CLEANUP.steps)
        CLEANUP.push(end_process, self.process)
        CLEANUP.push(unmount, self.path)
        wait_for(f"casmount {name} is mounted", self.answers)

    def answers(self):
        if self.process.poll() is not None:
            raise RuntimeError(f"casmount ended: {Path(self.log.name).read_text()[-2000:]}")
        return os.path.ismount(self.path)

    def until_commanded(self):
        """Waits until it takes commands, which is a moment after the mount is there."""

        def takes():
            return subprocess.run(
                [self.program, "status", self.path], env=self.env, capture_output=True, timeout=STEP_LIMIT
            ).returncode == 0

        wait_for("casmount takes commands", takes)

    def flush(self):
        run(self.program, "flush", self.path, "--deadline", "15m", env=self.env)

    def until_whole(self):
        """Waits until the catalogs of the mount are whole on its disk."""
        deadline = time.monotonic() + 60
        while True:
            catalogs = self.status()["catalogs"]
            if catalogs and all(catalog["kept_parts"] == catalog["parts"] for catalog in catalogs):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"the catalog did not come: {catalogs}")
            time.sleep(0.1)

    def status(self):
        return json.loads(run(self.program, "status", self.path, "--json", env=self.env))

    def memory_mb(self):
        """Most resident memory so far, in MB of 10^6 bytes."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise RuntimeError("no VmHWM")

    def stop(self):
        run(self.program, "unmount", self.path, "--deadline", "15m", env=self.env)
        self.process.wait(timeout=60)
        CLEANUP.run_to(self.depth)


class S3Server:
    def __init__(self, tools, bodies=None):
        command = [tools / "s3-test-server", "--bucket", "bench"]
        if bodies:
            bodies.mkdir()
            CLEANUP.push(shutil.rmtree, bodies, True)
            command += ["--dir", bodies]
        self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
        CLEANUP.push(end_process, self.process)
        self.endpoint = self.process.stdout.readline().strip()
        if not self.endpoint.startswith("http"):
            raise RuntimeError("s3-test-server did not start")
        self.env = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test-access-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret-key",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }
        self.url = "s3://bench"
