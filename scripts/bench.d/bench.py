"""Measures casmount against the native file system, side by side.

On a loop file system of each kind (ext4 with a journal, XFS) every measurement runs on
  native     the file system itself
  null       a bare passthrough FUSE daemon over it: what FUSE itself costs
  casmount   a mount whose cache directory is on it
interleaved, so that noise of the machine meets all alike; medians are compared, with
their spread. The cold read compares with a plain parallel ranged GET of the same SDK.
`first-stat`, `find` and `find-memory` open a volume of --names names with an empty cache:
the time from the start of the daemon to the first stat of a file, of a whole find(1), and
the most memory by then. `job-*` and `flush-30ms` count and time what a build on a fresh machine
asks of the bucket, see job.py. `visibility*`, `follow-*` and `commit-*` are of a volume that many
machines mount, and of one of many names, see fleet.py.
Needs root, for the loop devices. Everything it makes is gone when it ends.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fleet
import job
from rows import COMMIT, FLEET, JOB, OPENING, TARGETS, show, verdict

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


def run(*command, env=None, check=True):
    done = subprocess.run(
        [str(part) for part in command],
        env=env, timeout=STEP_LIMIT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
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


class Bench:
    def __init__(self, options, work):
        self.options, self.work = options, work
        self.release = ROOT / "target/release"
        self.tools = self.release / "examples"
        self.program = self.release / "casmount"
        self.io = self.tools / "bench-io"
        self.rows = []

    def wants(self, name):
        return not self.options.only or name in self.options.only

    def add(self, kind, name, samples):
        row = {"fs": kind, "name": name, "unit": TARGETS[name][0], "samples": samples}
        if name in OPENING + COMMIT:
            row["names"] = self.options.names
        self.rows.append(row)
        show(row)

    def local(self, kind):
        """What needs no network: on the file system, on the null mount, on casmount."""
        options = self.options
        depth = len(CLEANUP.steps)
        disk = Disk(kind, self.work, (16 * options.size_mib + 4096) * MIB)
        null = NullMount(self.tools, disk, self.work)
        native = disk.path / "native"
        native.mkdir()
        store = self.work / "store"
        store.mkdir()
        CLEANUP.push(shutil.rmtree, store, True)
        mount = Casmount(
            self.program, "local", self.work, disk.path / "cache", f"file://{store}", {}, "--min-free", "0"
        )
        places = {"native": native, "null": null.path, "casmount": mount.path}

        def settle():
            mount.flush()
            # The image and the store are files of one disk.
            run("sync", "-f", store)
            disk.sync()

        def interleaved(name, amount, measure, tidy=lambda place: None, cold=False):
            if not self.wants(name):
                return
            samples = {system: [] for system in places}
            for number in range(options.runs):
                order = list(places.items())
                # Turned round each time, so that none always follows the same other.
                for system, place in order if number % 2 == 0 else reversed(order):
                    if cold:
                        # Else the first writes to memory that was just given back, and the last waits for some.
                        Path("/proc/sys/vm/drop_caches").write_text("1")
                    samples[system].append(amount / measure(place, number))
                    settle()
                for place in places.values():
                    tidy(place)
                settle()
            self.add(kind, name, samples)

        size = options.size_mib * MIB
        if self.wants("warm-read"):
            for seed, place in enumerate(places.values()):
                run(self.io, "fill", place / "read", size, seed)
            settle()
            for place in places.values():
                run(self.io, "read", place / "read")
        interleaved(
            "warm-read", options.size_mib, lambda place, number: seconds(self.io, "read", place / "read")
        )
        for place in places.values():
            (place / "read").unlink(missing_ok=True)
        interleaved(
            "write",
            options.size_mib,
            lambda place, number: seconds(self.io, "write", place / "written", size),
            lambda place: (place / "written").unlink(),
            cold=True,
        )
        interleaved(
            "create",
            options.files,
            lambda place, number: seconds(self.io, "create", place / f"dir{number}", options.files),
            # The null daemon keeps a descriptor for each file that the kernel knows.
            lambda place: [shutil.rmtree(made) for made in place.glob("dir*")],
        )
        mount.stop()
        CLEANUP.run_to(depth)

    def cold(self, kind):
        """A file that is only in S3, against a plain parallel ranged GET."""
        if not self.wants("cold-read"):
            return
        options, depth = self.options, len(CLEANUP.steps)
        disk = Disk(kind, self.work, (8 * options.size_mib + 2048) * MIB)
        server = S3Server(self.tools)
        env = dict(os.environ, **server.env)
        plain = disk.path / "plain"
        run(self.io, "fill", plain, options.size_mib * MIB, 1)
        run(self.tools / "s3-plain-get", "put", "bench", "plain", plain, env=env)
        writer = Casmount(self.program, "writer", self.work, disk.path / "writer", server.url, server.env)
        run(self.io, "fill", writer.path / "file", options.size_mib * MIB, 2)
        writer.flush()
        writer.stop()
        shutil.rmtree(disk.path / "writer")
        samples = {"plain-get": [], "casmount": []}

        def memory_as_before():
            """Leaves as much page cache to whoever is measured next, free and used a moment ago.

            A virtual machine may give free memory back to its host, and touching that again takes three
            times as long as the read itself: whoever comes first after an unlink would win.
            """
            filler = disk.path / "filler"
            run(self.io, "write", filler, 3 * options.size_mib * MIB)
            disk.sync()
            filler.unlink()
            disk.sync()

        for number in range(options.runs):
            plain.unlink()
            disk.sync()
            memory_as_before()
            took = seconds(self.tools / "s3-plain-get", "get", "bench", "plain", plain, env=env)
            samples["plain-get"].append(options.size_mib / took)
            disk.sync()
            cache = disk.path / f"cold{number}"
            reader = Casmount(self.program, f"cold{number}", self.work, cache, server.url, server.env)
            wait_for("the cold machine has the name", (reader.path / "file").exists)
            memory_as_before()
            samples["casmount"].append(options.size_mib / seconds(self.io, "read", reader.path / "file"))
            if number == 0:
                run(self.io, "check", reader.path / "file", 2)
            reader.stop()
            shutil.rmtree(cache)
            disk.sync()
        self.add(kind, "cold-read", samples)
        CLEANUP.run_to(depth)

    def memory(self, kind):
        """The most memory of a daemon through which much is written and read."""
        if not self.wants("memory"):
            return
        options, depth = self.options, len(CLEANUP.steps)
        disk = Disk(kind, self.work, (options.memory_mib * 3 // 2 + 4096) * MIB)
        server = S3Server(self.tools, self.work / "bodies")
        # Half of it fits, so that the other half is fetched again.
        keep = f"{options.memory_mib // 2}M"
        mount = Casmount(
            self.program, "memory", self.work, disk.path / "cache", server.url, server.env,
            "--cache-size", keep, "--min-free", "0",
        )
        count = 10
        for number in range(count):
            run(self.io, "fill", mount.path / f"f{number}", options.memory_mib // count * MIB, number)
        mount.flush()
        written = mount.memory_mb()
        for number in range(count):
            run(self.io, "check", mount.path / f"f{number}", number)
        samples = {"written": [written], "casmount": [mount.memory_mb()]}
        self.add(kind, "memory", samples)
        mount.stop()
        CLEANUP.run_to(depth)


    def opening(self, kind):
        """A volume of many names, on a machine with an empty cache."""
        if not any(map(self.wants, OPENING)):
            return
        options, depth = self.options, len(CLEANUP.steps)
        disk = Disk(kind, self.work, (options.names // 1000 + 4096) * MIB)
        server = S3Server(self.tools, self.work / "bodies")
        env = dict(os.environ, **server.env)
        print(run(
            self.tools / "make-volume", "--store", server.url, "--names", options.names, env=env
        ).strip(), flush=True)
        samples = {name: [] for name in OPENING}
        for number in range(options.runs):
            cache = disk.path / f"open{number}"
            began = time.monotonic()
            mount = Casmount(
                self.program, f"open{number}", self.work, cache, server.url, server.env, "--min-free", "0"
            )
            top = f"top-{min(options.names // 32000, 40):05}" if options.names > 32000 else "top-00000"
            leaf = mount.path / top / "dir-00007"
            with os.scandir(leaf) as entries:
                os.stat(next(entries).path)
            samples["first-stat"].append(time.monotonic() - began)
            began = time.monotonic()
            found = run("bash", "-c", 'find "$0" -type f | wc -l', mount.path)
            samples["find"].append(time.monotonic() - began)
            if int(found) != options.names:
                raise RuntimeError(f"find saw {found.strip()} of {options.names} names")
            samples["find-memory"].append(mount.memory_mb())
            mount.stop()
            shutil.rmtree(cache)
        for name in OPENING:
            if self.wants(name):
                self.add(kind, name, {"casmount": samples[name]})
        CLEANUP.run_to(depth)


    def reference_job(self, kind):
        """A build on a fresh machine, see `job`."""
        if not any(map(self.wants, JOB)):
            return
        depth = len(CLEANUP.steps)
        disk = Disk(kind, self.work, 24 * 1024 * MIB)
        server = S3Server(self.tools, self.work / "bodies")

        def machine(name):
            cache = disk.path / name
            return Casmount(self.program, name, self.work, cache, server.url, server.env, "--min-free", "0")

        def compact():
            run(self.program, "compact", "--store", server.url, "--trail", "0s", env=dict(os.environ, **server.env))

        samples = job.measure(server, machine, compact, self.options.runs, self.wants)
        for name in JOB:
            if self.wants(name):
                self.add(kind, name, {"casmount": samples[name]})
        CLEANUP.run_to(depth)


    def fleet(self, kind):
        """Many machines on one volume, see `fleet`."""
        if not any(map(self.wants, FLEET)):
            return
        depth = len(CLEANUP.steps)
        # A daemon keeps a reserve in its cache directory.
        disk = Disk(kind, self.work, (self.options.followers + 1) * 256 * MIB)
        server = S3Server(self.tools)

        def machine(name):
            cache = disk.path / name
            return Casmount(self.program, name, self.work, cache, server.url, server.env, "--min-free", "0")

        samples = fleet.follow(server, machine, self.options.followers, self.options.runs, self.wants)
        for name in FLEET:
            if self.wants(name):
                self.add(kind, name, {"casmount": samples[name]})
        CLEANUP.run_to(depth)

    def commit(self, kind):
        """The same commit in volumes of different sizes, see `fleet`."""
        if not any(map(self.wants, COMMIT)):
            return
        depth, samples = len(CLEANUP.steps), {}
        for system, names in (("of-10k", fleet.SMALL_NAMES), ("casmount", self.options.names)):
            inner = len(CLEANUP.steps)
            disk = Disk(kind, self.work, (names // 1000 + 4096) * MIB)
            server = S3Server(self.tools, self.work / "bodies")
            env = dict(os.environ, **server.env)
            run(self.tools / "make-volume", "--store", server.url, "--names", names, env=env)

            def machine(name):
                cache = disk.path / name
                return Casmount(self.program, name, self.work, cache, server.url, server.env, "--min-free", "0")

            for name, values in fleet.commit(server, machine, self.options.runs).items():
                samples.setdefault(name, {})[system] = values
            CLEANUP.run_to(inner)
        for name in COMMIT:
            if self.wants(name):
                self.add(kind, name, samples[name])
        CLEANUP.run_to(depth)


def parse():
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fs", default="ext4,xfs", help="file systems, by commas (default: %(default)s)")
    parser.add_argument("--only", help=f"measurements, by commas, of: {', '.join(TARGETS)}")
    parser.add_argument("--runs", type=int, default=5, help="runs of each measurement (default: %(default)s)")
    parser.add_argument("--size-mib", type=int, default=1024, help="size of large files (default: %(default)s)")
    parser.add_argument("--files", type=int, default=10000, help="files of `create` (default: %(default)s)")
    parser.add_argument("--memory-mib", type=int, default=10240, help="for `memory` (default: %(default)s)")
    parser.add_argument("--names", type=int, default=1_000_000, help="of the volume to open (default: %(default)s)")
    parser.add_argument("--followers", type=int, default=50, help="machines that follow (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    parser.add_argument("--dir", type=Path, help="where images are made (default: below target/)")
    parser.add_argument("--no-build", action="store_true", help="use what is built")
    options = parser.parse_args()
    if options.quick:
        options.size_mib, options.files, options.memory_mib = 128, 1000, 512
        options.runs, options.names, options.followers = min(options.runs, 3), 20_000, min(options.followers, 8)
    options.only = options.only.split(",") if options.only else []
    if options.quick and not options.only:
        # All but what waits for minutes.
        options.only = [name for name in TARGETS if name != "follow-idle"]
    unknown = set(options.only) - set(TARGETS)
    if unknown:
        parser.error(f"no such measurement: {', '.join(unknown)}")
    return options


def main():
    options = parse()
    if os.geteuid() != 0:
        sys.exit("bench: loop devices need root")
    if not options.no_build:
        examples = ["null-daemon", "bench-io", "s3-plain-get", "s3-test-server", "make-volume"]
        build = ["cargo", "build", "--release", "--locked", "--bin", "casmount"]
        subprocess.run(build + [f"--example={name}" for name in examples], cwd=ROOT, check=True)
    for name in [name for name in os.environ if name.startswith(("CASMOUNT_", "AWS_"))]:
        del os.environ[name]
    base = options.dir or ROOT / "target"
    base.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="bench-", dir=base))
    CLEANUP.push(shutil.rmtree, work, True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))
    bench = Bench(options, work)
    print(f"{platform.release()}, {os.cpu_count()} cores, {options.runs} runs, medians (min..max)", flush=True)
    try:
        for kind in options.fs.split(","):
            if any(map(bench.wants, ("warm-read", "write", "create"))):
                bench.local(kind)
            bench.cold(kind)
            bench.memory(kind)
            bench.opening(kind)
            bench.reference_job(kind)
            bench.fleet(kind)
            bench.commit(kind)
    finally:
        CLEANUP.run_to(0)
        if options.json:
            facts = {"kernel": platform.release(), "cores": os.cpu_count(), "runs": options.runs}
            options.json.write_text(json.dumps({"host": facts, "rows": bench.rows}, indent=2) + "\n")
    missed = [row for row in bench.rows if not verdict(row)[0]]
    print(f"{len(bench.rows) - len(missed)} of {len(bench.rows)} targets reached")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
