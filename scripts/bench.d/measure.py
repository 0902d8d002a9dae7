"""Measures the rows of the table on one file system, see `table`.

The systems take turns within each round, in the other order each time, so that noise of the machine meets all alike,
and what one left to be done is done before the next begins. Peers are measured in the first rounds only,
and on fewer files: each of their operations is a request over loopback, or many.
"""

import json
import os
import shutil
from pathlib import Path

import peers
import programs
import table
from lab import CLEANUP, Casmount, Disk, NullMount, run

MIB = 1 << 20
FIND_BYTES = 1024
# A run of the quickest rows is this many passes, so that it takes long enough to be measured.
PASSES = 5


class System:
    """One column: where it is, and how it comes to rest."""

    def __init__(self, name, path, options, peer=None, settle=lambda: None):
        self.name, self.path, self.peer, self.settle = name, path, peer, settle
        self.runs = options.peer_runs if peer else options.runs
        self.files = options.peer_files if peer else options.files
        self.find_files = options.peer_files if peer else options.find_files
        self.random_reads = min(options.random_reads, 2000) if peer else options.random_reads
        self.limit = options.limit
        # What could not be prepared, and why.
        self.lacks = {}

    def run(self, *command, env=None, cwd=None):
        """Runs a program on it; raises `Refused` for a peer that cannot, or not in time."""
        if self.peer:
            return peers.bounded(command, self.limit, self.peer, env=env, cwd=cwd)
        return run(*command, env=env, cwd=cwd)

    def wrong(self, said):
        """What it did is not right, so there is nothing to be compared."""
        raise peers.Refused(said) if self.peer else RuntimeError(f"{self.name}: {said}")


def drop_caches(what):
    Path("/proc/sys/vm/drop_caches").write_text(what)


class Measurement:
    """One file system with everything on it; `report` takes each row."""

    def __init__(self, options, release, work, kind, wants, report):
        self.options, self.kind, self.wants, self.report = options, kind, wants, report
        self.io, tools = release / "examples/bench-io", release / "examples"
        self.disk = Disk(kind, work, (40 * options.size_mib + 24 * 1024) * MIB)
        self.store = work / "store"
        self.store.mkdir()
        CLEANUP.push(shutil.rmtree, self.store, True)
        null = NullMount(tools, self.disk, work)
        native = self.disk.path / "native"
        native.mkdir()
        self.mount = Casmount(
            release / "casmount", "table", work, self.disk.path / "cache", f"file://{self.store}", {}, "--min-free", "0"
        )
        self.mount.until_commanded()
        self.null = null
        self.systems = [
            System("native", native, options),
            System("null", null.path, options),
            System("casmount", self.mount.path, options, settle=self.mount.flush),
        ]
        for name in options.peers:
            peer = peers.Peer(name, tools, work, self.disk)
            self.systems.append(System(name, peer.path, options, peer, peer.settle))
        self.names = [system.name for system in self.systems]

    def settle(self, system):
        system.settle()
        # The image and the store are files of one disk.
        run("sync", "-f", self.store)
        self.disk.sync()

    def operate(self, system, *command, passes=1):
        """Seconds of an operation of bench-io, on average of its passes."""
        if system.peer:
            passes = 1
        took = [json.loads(system.run(self.io, *command))["seconds"] for _ in range(passes)]
        return sum(took) / passes

    def prepare(self, what, act):
        """Has every system made ready for rows that need it; one that cannot is left out of them."""
        for system in self.systems:
            try:
                act(system)
            except peers.Refused as err:
                system.lacks[what] = str(err)
            self.settle(system)

    def rows(self, names, amount, act, needs=None):
        """Measures `names`, of which one run of `act` returns the seconds of each.

        `amount(system)` is what was done in them, or None for rows of seconds.
        """
        samples = {name: {system.name: [] for system in self.systems} for name in names}
        failed = {system.name: system.lacks[needs] for system in self.systems if needs in system.lacks}
        for round_ in range(self.options.runs):
            for system in self.systems if round_ % 2 == 0 else reversed(self.systems):
                if system.name in failed or round_ >= system.runs:
                    continue
                try:
                    took = act(system, round_)
                except peers.Refused as err:
                    failed[system.name] = str(err)
                    for name in names:
                        system.lacks[name] = str(err)
                    took = ()
                for name, seconds in zip(names, took):
                    done = amount and amount(system)
                    samples[name][system.name].append(done / seconds if done else seconds)
                self.settle(system)
        for name in names:
            if self.wants(name):
                self.add(name, samples[name], failed, amount)

    def add(self, name, samples, failed, amount):
        row = {
            "fs": self.kind, "name": name, "unit": table.ROWS[name].unit,
            "samples": {system: values for system, values in samples.items() if values},
            "failed": failed,
            "targets": {"native": table.ROWS[name].of_native, "null": table.ROWS[name].of_null},
        }
        if amount:
            row["amount"] = {system.name: amount(system) for system in self.systems}
        table.progress(row)
        self.report(row)

    def any(self, *names):
        return any(map(self.wants, names))

    def large_file(self):
        if not self.any("warm-read", "read-4", "random-read"):
            return
        size, seeds = self.options.size_mib * MIB, {name: n for n, name in enumerate(self.names)}

        def fill(system):
            system.run(self.io, "fill", system.path / "large", size, seeds[system.name])

        self.prepare("large", fill)
        self.prepare("large", lambda system: (
            "large" in system.lacks or self.operate(system, "read", system.path / "large")
        ))

        def mib(system):
            return self.options.size_mib

        for name, threads in (("warm-read", 1), ("read-4", 4)):
            if self.wants(name):
                self.rows([name], mib, lambda system, _: [
                    self.operate(system, "read", system.path / "large", size, threads, passes=PASSES)
                ], "large")

        def at_random(system, _):
            drop_caches("1")
            large = system.path / "large"
            return [self.operate(system, "random-read", large, system.random_reads, seeds[system.name])]

        if self.wants("random-read"):
            self.rows(["random-read"], lambda system: system.random_reads, at_random, "large")
        for system in self.systems:
            if not system.peer:
                (system.path / "large").unlink()

    def tree(self):
        operations = {"stat": PASSES, "stat-missing": PASSES, "open-read": 1, "utimens": 1}
        if not self.any(*operations):
            return
        self.prepare("tree", lambda system: system.run(self.io, "fill-tree", system.path / "tree", system.files))
        for name, passes in operations.items():
            if not self.wants(name):
                continue

            def act(system, _):
                return [self.operate(system, name, system.path / "tree", system.files, passes=passes)]

            self.prepare(name, lambda system: "tree" in system.lacks or act(system, None))
            for system in self.systems:
                if "tree" in system.lacks:
                    system.lacks[name] = system.lacks["tree"]
            self.rows([name], lambda system: system.files, act, name)

    def find(self):
        if not self.any("find-first", "find-second"):
            return

        def fill(system):
            system.run(self.io, "fill-tree", system.path / "many", system.find_files, FIND_BYTES)

        self.prepare("many", fill)

        def act(system, _):
            drop_caches("2")
            return [self.operate(system, "find", system.path / "many", system.find_files) for _ in range(2)]

        self.rows(["find-first", "find-second"], lambda system: system.find_files, act, "many")

    def written(self):
        def write(system, _):
            # Else the first writes to memory that was just given back, and the last waits for some.
            drop_caches("1")
            return [self.operate(system, "write", system.path / "written", self.options.size_mib * MIB)]

        if self.wants("write"):
            self.rows(["write"], lambda _: self.options.size_mib, write)
            for system in self.systems:
                if not system.peer:
                    (system.path / "written").unlink()
        for name, threads in (("create", 1), ("create-8", 8)):
            if not self.wants(name):
                continue

            def create(system, round_):
                place = system.path / f"{name}-{round_}"
                took = self.operate(system, "create", place, system.files, threads)
                if round_ == 0:
                    system.run(self.io, "check-created", place, system.files, threads)
                return [took]

            self.rows([name], lambda system: system.files, create)

    def programs(self, work):
        for program in programs.wanted(self.wants, work):
            def act(system, round_):
                return [program.run(system, round_)]

            if program.needs:
                for system in self.systems:
                    if program.needs in system.lacks:
                        system.lacks[program.name] = system.lacks[program.needs]
            self.prepare(program.name, lambda system: program.name in system.lacks or program.prepare(system))
            self.rows([program.name], None, act, program.name)
            program.end()

    def measure(self, work):
        self.large_file()
        self.tree()
        self.find()
        self.written()
        self.programs(work)


def measure(options, release, work, kind, wants, report):
    """Measures the rows that are wanted on one file system, and shows them as a table."""
    depth = len(CLEANUP.steps)
    rows = []

    def both(row):
        rows.append(row)
        report(row)

    measurement = Measurement(options, release, work, kind, wants, both)
    measurement.measure(work)
    notes = []
    if options.peers:
        of_peer = measurement.systems[-1]
        notes.append(
            f"peers: {', '.join(f'{name} {peers.version(name)}' for name in options.peers)}; of {of_peer.files} files and"
            f" {of_peer.random_reads} random reads, in {of_peer.runs} runs of at most {of_peer.limit} s"
        )
    for name in peers.PACKAGES:
        if not shutil.which(name):
            notes.append(f"{name}: not installed (apt-get install {name}, or scripts/bench --install-peers)")
    table.show(kind, rows, options.peers, notes)
    CLEANUP.run_to(depth)
