"""Measures casmount against the native file system, a bare FUSE daemon and its peers, side by side.

On a loop file system of each kind (ext4 with a journal, XFS), the table has every row on
  native     the file system itself
  null       a bare passthrough FUSE daemon over it: what FUSE itself costs
  casmount   a mount whose cache directory is on it
  s3fs, rclone, where they are installed (--install-peers), with their caches on it
interleaved, so that noise of the machine meets all alike; medians are compared, with their spread. The rows are
  {operations}
  {programs}
and --help-rows says what each is. `counts` is another table: FUSE requests, system calls and index
transactions of single operations. Other measurements stand alone. The cold read compares with a plain
parallel ranged GET of the same SDK. `first-stat`, `find` and `find-memory` open a volume of --names names with an
empty cache: the time from the start of the daemon to the first stat of a file, of a whole find(1), and
the most memory by then. `job-*` and `flush-30ms` count and time what a build on a fresh machine
asks of the bucket, see job.py. `visibility*`, `follow-*` and `commit-*` are of a volume that many
machines mount, and of one of many names, see fleet.py.
Needs root, for the loop devices. Everything it makes is gone when it ends.
"""

EXAMPLES = """
examples:
  scripts/bench                                        everything, on ext4 and XFS
  scripts/bench --only table --fs ext4 --peers none    the table, on one file system, without peers
  scripts/bench --only stat,open-read,create --runs 9  some of its rows
  scripts/bench --only table-programs --json out.json  git, make, cargo, ccache and Bazel
  scripts/bench --only counts                          requests and system calls of one operation
  scripts/bench --quick --only table,counts            small sizes, to see that it works
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

import counts
import fleet
import job
import measure
import peers
import table
from lab import CLEANUP, MIB, ROOT, Casmount, Disk, S3Server, run, seconds, wait_for
from rows import COMMIT, FLEET, JOB, OPENING, TARGETS, show, verdict

class Bench:
    def __init__(self, options, work):
        self.options, self.work = options, work
        self.release = ROOT / "target/release"
        self.tools = self.release / "examples"
        self.program = self.release / "casmount"
        self.io = self.tools / "bench-io"
        self.rows, self.counts = [], []

    def wants(self, name):
        return not self.options.only or name in self.options.only

    def add(self, kind, name, samples):
        row = {"fs": kind, "name": name, "unit": TARGETS[name][0], "samples": samples}
        if name in OPENING + COMMIT:
            row["names"] = self.options.names
        self.rows.append(row)
        show(row)

    def table(self, kind):
        """Native beside the bare daemon, casmount and its peers, see `table`."""
        if any(map(self.wants, table.ROWS)):
            measure.measure(self.options, self.release, self.work, kind, self.wants, self.rows.append)

    def count(self, kind):
        """Requests, system calls and transactions of one operation, see `counts`."""
        if not self.wants("counts"):
            return
        depth = len(CLEANUP.steps)
        bare = argparse.Namespace(**{**vars(self.options), "peers": []})
        measurement = measure.Measurement(bare, self.release, self.work, kind, self.wants, self.rows.append)
        self.counts += counts.measure(measurement, kind)
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
            print(f"after the first stat the daemon has {mount.memory_mb():.0f} MB", flush=True)
            if self.wants("find") or self.wants("find-memory"):
                self.find_all(mount, samples)
            mount.stop()
            shutil.rmtree(cache)
        for name in OPENING:
            if self.wants(name):
                self.add(kind, name, {"casmount": samples[name]})
        CLEANUP.run_to(depth)


    def find_all(self, mount, samples):
        began = time.monotonic()
        found = run("bash", "-c", 'find "$0" -type f | wc -l', mount.path)
        samples["find"].append(time.monotonic() - began)
        if int(found) != self.options.names:
            raise RuntimeError(f"find saw {found.strip()} of {self.options.names} names")
        samples["find-memory"].append(mount.memory_mb())

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


GROUPS = {
    "table": list(table.ROWS),
    "table-operations": [row.name for row in table.OPERATIONS],
    "table-programs": [row.name for row in table.PROGRAMS],
}
ALL = [*table.ROWS, "counts", *TARGETS]


def chosen(parser, options):
    """The measurements that are asked for; nothing stands for all."""
    names = []
    for name in options.only.split(",") if options.only else []:
        names += GROUPS.get(name, [name])
    unknown = set(names) - set(ALL)
    if unknown:
        parser.error(f"no such measurement: {', '.join(unknown)}")
    if options.quick and not names:
        # All but what waits for minutes.
        names = [name for name in ALL if name != "follow-idle"]
    return names


def chosen_peers(parser, options):
    if options.peers == "none":
        return []
    if options.peers is None:
        return peers.installed()
    names = options.peers.split(",")
    missing = set(names) - set(peers.installed())
    if missing:
        parser.error(f"not installed: {', '.join(missing)} (scripts/bench --install-peers)")
    return names


def parse():
    operations, programs = (", ".join(GROUPS[f"table-{group}"]) for group in ("operations", "programs"))
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__.format(operations=operations, programs=programs), epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--fs", default="ext4,xfs", help="file systems, by commas (default: %(default)s)")
    add("--only", help=f"measurements, by commas, of: {', '.join([*GROUPS, *ALL])}")
    add("--runs", type=int, default=5, help="runs of each measurement (default: %(default)s)")
    add("--size-mib", type=int, default=1024, help="size of large files (default: %(default)s)")
    add("--files", type=int, default=10000, help="files of the rows of the table (default: %(default)s)")
    add("--find-files", type=int, default=100_000, help="files of find-first and find-second (default: %(default)s)")
    add("--random-reads", type=int, default=10000, help="reads of random-read (default: %(default)s)")
    add("--peers", help="peers, by commas, or none (default: those that are installed)")
    add("--peer-runs", type=int, default=2, help="runs with peers, at most --runs (default: %(default)s)")
    add("--peer-files", type=int, default=1000, help="files of the rows of peers (default: %(default)s)")
    add("--limit", type=int, default=120, help="seconds for a run of a peer (default: %(default)s)")
    add("--memory-mib", type=int, default=10240, help="for `memory` (default: %(default)s)")
    add("--names", type=int, default=1_000_000, help="of the volume to open (default: %(default)s)")
    add("--followers", type=int, default=50, help="machines that follow (default: %(default)s)")
    add("--quick", action="store_true", help="small sizes, to see that it works")
    add("--json", type=Path, help="also write all samples to this file")
    add("--dir", type=Path, help="where images are made (default: below target/)")
    add("--no-build", action="store_true", help="use what is built")
    add("--install-peers", action="store_true", help="install peers and programs of the table from Debian first")
    add("--help-rows", action="store_true", help="say what the rows of the table are, and end")
    options = parser.parse_args()
    if options.help_rows:
        print(table.__doc__.strip())
        sys.exit(0)
    if options.quick:
        options.size_mib, options.files, options.memory_mib = 128, 1000, 512
        options.find_files, options.random_reads, options.peer_files = 5000, 1000, 100
        options.runs, options.names, options.followers = min(options.runs, 3), 20_000, min(options.followers, 8)
        options.peer_runs = 1
    options.only = chosen(parser, options)
    if options.install_peers:
        if os.geteuid() != 0:
            sys.exit("bench: installing needs root")
        peers.install()
    options.peers = chosen_peers(parser, options)
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
            bench.table(kind)
            bench.count(kind)
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
            facts["peers"] = {name: peers.version(name) for name in options.peers}
            found = {"host": facts, "rows": bench.rows, "counts": bench.counts}
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    missed = [row for row in bench.rows if not (table.reached(row) if row["name"] in table.ROWS else verdict(row)[0])]
    print(f"{len(bench.rows) - len(missed)} of {len(bench.rows)} targets reached")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
