"""What one operation asks of the kernel and of the daemon: counts, which no noise of a machine changes.

For each operation, on the bare daemon and on casmount, with the files known to the kernel and everything at rest:

  requests       FUSE requests, by the kernel's own trace (fuse_request_send of this mount)
  system calls   of the daemon, while the program runs (raw_syscalls of its threads)
  afterwards     of the daemon, from then until it was at rest: recording, hashing and uploading in the background
  transactions   of the index: commits in the log of SQLite, background included

All are divided by the number of operations. Forgetting is not counted: the kernel tells it when it likes. The
most frequent requests and calls are named. Needs tracefs.
"""

import os
import re
import subprocess
import time
from collections import Counter
from pathlib import Path

import table
from lab import CLEANUP, run

TRACING = Path("/sys/kernel/tracing")
BUFFER_KIB = 64 * 1024
OPERATIONS = 1000
FORGETS = ("FORGET", "BATCH_FORGET")
CALLS = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")

# Name, operation of bench-io, what has to be there first.
MEASURED = [
    ("stat of a known file", "stat", True),
    ("stat of a name that is not there", "stat-missing", True),
    ("open, read 16 KiB, close", "open-read", True),
    ("utimensat", "utimens", True),
    ("create, write, close, rename", "create", False),
]


class Trace:
    """An instance of the kernel's tracing with one event, which is gone at the end."""

    def __init__(self, name, event, filter_=None):
        self.path = TRACING / "instances" / f"bench-{os.getpid()}-{name}"
        self.path.mkdir()
        CLEANUP.push(self.path.rmdir)
        (self.path / "buffer_size_kb").write_text(str(BUFFER_KIB))
        self.event = self.path / "events" / event
        if filter_:
            (self.event / "filter").write_text(filter_)

    def of_threads(self, pid):
        """Traces all threads of a process, also those to come."""
        (self.path / "options/event-fork").write_text("1")
        threads = [thread.name for thread in Path(f"/proc/{pid}/task").iterdir()]
        (self.path / "set_event_pid").write_text(" ".join(threads))

    def start(self):
        (self.path / "trace").write_text("")
        (self.event / "enable").write_text("1")

    def stop(self):
        (self.event / "enable").write_text("0")
        text = (self.path / "trace").read_text(errors="replace")
        written = re.search(r"entries-in-buffer/entries-written: (\d+)/(\d+)", text)
        if written and written.group(1) != written.group(2):
            raise RuntimeError("the buffer of the trace is too small")
        return text


def call_names():
    if not CALLS.exists():
        return {}
    return {number: name for name, number in re.findall(r"#define __NR_(\w+) (\d+)", CALLS.read_text())}


class Commits:
    """Commits in the write-ahead log of an index, read from the file: https://sqlite.org/fileformat2.html#walformat"""

    def __init__(self, log):
        self.log = log

    def all(self):
        """(salts, frame number) of every commit in it."""
        try:
            data = self.log.read_bytes()
        except FileNotFoundError:
            return set()
        if len(data) < 32:
            return set()
        page, salts = int.from_bytes(data[8:12], "big"), data[16:24]
        found = set()
        for number, at in enumerate(range(32, len(data) - 24, 24 + page)):
            # Frames of before the last start of the log have other salts.
            if data[at + 8 : at + 16] != salts:
                break
            if int.from_bytes(data[at + 4 : at + 8], "big"):
                found.add((salts, number))
        return found


def per_operation(counter):
    often = [(name, count) for name, count in counter.most_common(6) if count >= OPERATIONS / 100]
    named = ", ".join(f"{name} {count / OPERATIONS:.2f}" for name, count in often)
    return f"{sum(counter.values()) / OPERATIONS:.2f}" + (f" ({named})" if named else "")


def measure(measurement, kind):
    """Counts on the bare daemon and on casmount; returns rows, and prints them."""
    if not (TRACING / "events/fuse/fuse_request_send").exists():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], capture_output=True, check=False)
    if not (TRACING / "events/fuse/fuse_request_send").exists():
        print("counts: skipped, this kernel has no trace of FUSE requests", flush=True)
        return []
    names, rows = call_names(), []
    daemons = {"null": measurement.null.process.pid, "casmount": measurement.mount.process.pid}
    log = Commits(measurement.disk.path / "cache/index.db-wal")
    for system in measurement.systems:
        if system.name not in daemons:
            continue
        device = os.minor(os.stat(system.path).st_dev)
        requests = Trace(f"{system.name}-requests", "fuse/fuse_request_send", f"connection == {device}")
        calls = Trace(f"{system.name}-calls", "raw_syscalls/sys_enter")
        calls.of_threads(daemons[system.name])
        tree = system.path / "counted"
        run(measurement.io, "fill-tree", tree, OPERATIONS)
        measurement.settle(system)
        for title, operation, known in MEASURED:
            place = tree if known else system.path / "counted-new"
            if known:
                run(measurement.io, operation, place, OPERATIONS)
            else:
                place.mkdir()
            measurement.settle(system)
            # The absorber of the index waits a second; the poll of the store, too.
            time.sleep(3)
            before = log.all()

            def counted(act):
                requests.start()
                calls.start()
                act()
                by_number = Counter(re.findall(r"sys_enter: NR (-?\d+)", calls.stop()))
                asked = Counter(re.findall(r"fuse_request_send: .*\(FUSE_(\w+)\)", requests.stop()))
                return asked, Counter({names.get(number, number): count for number, count in by_number.items()})

            asked, during = counted(lambda: run(measurement.io, operation, place, OPERATIONS))

            def rest():
                measurement.settle(system)
                time.sleep(3)

            _, after = counted(rest)
            for name in FORGETS:
                asked.pop(name, None)
            row = {
                "fs": kind, "operation": title, "system": system.name, "operations": OPERATIONS, "requests": asked,
                "system calls": during, "afterwards": after,
                "transactions": len(log.all() - before) if system.name == "casmount" else None,
            }
            rows.append(row)
            print(f"{kind:5} counts       {title}, {system.name}", flush=True)
    show(kind, rows)
    return rows


def show(kind, rows):
    lines = [["operation", "system", "FUSE requests", "transactions", "system calls", "afterwards"]]
    for row in rows:
        transactions = row["transactions"]
        lines.append([
            row["operation"], row["system"], per_operation(row["requests"]),
            "-" if transactions is None else f"{transactions / row['operations']:.3f}",
            per_operation(row["system calls"]), f"{sum(row['afterwards'].values()) / row['operations']:.2f}",
        ])
    lines = table.aligned(lines)
    lines.insert(1, "-" * max(map(len, lines)))
    print(f"\n{kind}: counts of one operation", *lines, "", sep="\n", flush=True)
