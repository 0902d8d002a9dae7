"""Measures limits for small blobs, up to which they travel in packs (MAX_SMALL_BYTES in src/store/pack.rs).

For each limit: earlier jobs leave files in a volume, and a machine with an empty cache reads what a build would
of them, eight at a time, over a link whose every reply takes 30 ms, and flushes files of its own. The sizes are
those that caches of builds have: results and manifests of ccache (compressed), and action results,
dependency files, objects and libraries below Bazel's --disk_cache. One build wants six files in ten of half of the
earlier jobs. Another wants three in a hundred of every job: what is next to a file is of no use to it.
The table is kept in the module doc of src/upload/small.rs. The server counts requests and bytes; seconds are
those of a development build, which alone listens to CASMOUNT_MEASURE_SMALL_BYTES. Needs root, for the mounts.

  python3 -B scripts/bench.d/limits.py [LIMIT IN KIB...]
"""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fleet
import job
import lab

JOBS, FILES_OF_JOB, READS_OF_JOB, FEW_OF_JOB = 6, 1500, 900, 45
READERS = 8

# Share of the files; median size in bytes and spread of its logarithm; bytes of which one is random. The sizes of ccache,
# of objects and dependency files are those of 132 C files of zstd and AWS-LC (-O2 -g) and of 350 crates, measured.
KINDS = {
    "ccache manifest": (0.18, 4_600, 0.25, 1),
    "ccache result": (0.32, 10_800, 1.5, 1),
    "Bazel action result": (0.20, 400, 0.5, 2),
    "Bazel dependency file": (0.08, 1_900, 1.3, 4),
    "Bazel object": (0.20, 30_600, 1.5, 3),
    "Bazel library": (0.02, 300_000, 1.5, 3),
}
LEAST, MOST = 100, 8_000_000


def size_and_kind(rng):
    share = rng.random()
    for part, median, spread, thin in KINDS.values():
        if share < part:
            break
        share -= part
    size = median * math.exp(rng.gauss(0, spread))
    return int(min(max(size, LEAST), MOST)), thin


def content(rng):
    size, thin = size_and_kind(rng)
    return (rng.randbytes(size // thin + 1) * thin)[:size]


def write_job(place, number, rng):
    names = []
    for file in range(FILES_OF_JOB):
        name = f"{(number * 7 + file) % 256:02x}/job-{number:02}-{file:04}"
        path = place / name
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(path.name + ".tmp")
        part.write_bytes(content(rng))
        part.rename(path)
        names.append(name)
    return names


def cost(before, after, *operations):
    return sum(after["requests"].get(name, 0) - before["requests"].get(name, 0) for name in operations)


def measure(work, program, tools, limit):
    rng = random.Random(64)
    depth = len(lab.CLEANUP.steps)
    server = lab.S3Server(tools, work / "bodies")
    env = dict(server.env, CASMOUNT_MEASURE_SMALL_BYTES=str(limit << 10))

    def machine(name):
        cache = work / f"cache-{name}"
        lab.CLEANUP.push(shutil.rmtree, cache, True)
        return lab.Casmount(program, name, work, cache, server.url, env, "--min-free", "0")

    writer, names = machine("writer"), []
    for number in range(JOBS):
        names.append(write_job(writer.path, number, rng))
        writer.flush()
    writer.stop()
    cells = [f"{limit} KiB"]
    for build, jobs, reads in (("dense", JOBS // 2, READS_OF_JOB), ("sparse", JOBS, FEW_OF_JOB)):
        wanted = [name for of_job in rng.sample(names, jobs) for name in rng.sample(of_job, reads)]
        rng.shuffle(wanted)
        cold = machine(build)
        lab.wait_for("the cold machine follows", lambda: all((cold.path / of_job[-1]).exists() for of_job in names))
        job.set_faults(server, {"latency_ms": job.LATENCY_MS})
        before, began = fleet.counts(server), time.monotonic()
        with ThreadPoolExecutor(READERS) as pool:
            read = sum(pool.map(lambda name: len((cold.path / name).read_bytes()), wanted))
        seconds, after = time.monotonic() - began, fleet.counts(server)
        received = (after["bytes_sent"] - before["bytes_sent"]) / 1e6
        cells += [cost(before, after, "GetObject", "HeadObject"), f"{received:.0f} of {read / 1e6:.0f}", f"{seconds:.1f}"]
        if build == "dense":
            # What is uploaded while it writes counts as well.
            before = fleet.counts(server)
            write_job(cold.path, JOBS, rng)
            began = time.monotonic()
            cold.flush()
            seconds, after = time.monotonic() - began, fleet.counts(server)
            sent = (after["bytes_received"] - before["bytes_received"]) / 1e6
            flushed = [cost(before, after, "PutObject"), f"{sent:.0f}", f"{seconds:.1f}"]
        job.set_faults(server, {})
        cold.stop()
    lab.CLEANUP.run_to(depth)
    print("| " + " | ".join(map(str, cells + flushed)) + " |", flush=True)


def main():
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    limits = [int(limit) for limit in sys.argv[1:]] or [16, 32, 64, 128, 256]
    build = ["cargo", "build", "--locked", "--bin", "casmount", "--example", "s3-test-server"]
    subprocess.run(build, cwd=lab.ROOT, check=True)
    built = lab.ROOT / "target/debug"
    for name in [name for name in os.environ if name.startswith(("CASMOUNT_", "AWS_"))]:
        del os.environ[name]
    work = Path(tempfile.mkdtemp(prefix="limits-", dir=lab.ROOT / "target"))
    lab.CLEANUP.push(shutil.rmtree, work, True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))
    sizes = random.Random(1)
    drawn = sorted(size_and_kind(sizes)[0] for _ in range(100_000))
    shares = ", ".join(f"{sum(size <= limit << 10 for size in drawn) / 1000:.0f} % to {limit} KiB" for limit in limits)
    print(f"sizes: median {drawn[50_000]} bytes, mean {sum(drawn) // 100_000}; {shares}")
    print("| limit | GETs | MB received of MB read | s | GETs, sparse | MB | s | PUTs of the flush | MB | s |")
    print("|---" * 10 + "|")
    try:
        for limit in limits:
            measure(work, built / "casmount", built / "examples", limit)
    finally:
        lab.CLEANUP.run_to(0)


if __name__ == "__main__":
    main()
