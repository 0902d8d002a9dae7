"""The reference job: what a build on a fresh machine asks of the bucket.

Earlier jobs left 30,000 files of 1 to 64 KiB in the volume, each job 1,500 of them. A machine with an
empty cache looks up 5,000 names, of which a tenth do not exist, reads 9,000 files, taken at random
from all, and writes 1,500 new ones. The server counts, following apart: the machine has read the log before.
The flush of 1,500 new files is measured over a link whose every reply takes 30 ms.

`job-catalog-*` is the same where the machine opens the volume from a catalog, as a volume that was written to for a
while is opened: behind the mount its catalog is fetched whole. Once it is, lookups are counted; to the GETs all those that mounting
and the catalog cost are added.
"""

import json
import os
import random
import time
import urllib.request

JOBS, FILES_OF_JOB = 20, 1500
LOOKUPS, MISSES, READS = 5000, 500, 9000
LATENCY_MS = 30
DIR_FILES = 256


def counts(server):
    with urllib.request.urlopen(f"{server.endpoint}/_admin/counts", timeout=30) as reply:
        return json.load(reply)["requests"]


def set_faults(server, faults):
    body = json.dumps(faults).encode()
    request = urllib.request.Request(f"{server.endpoint}/_admin/faults", data=body, method="POST")
    urllib.request.urlopen(request, timeout=30).close()


def name(job, number):
    return f"{(job * 7 + number) % DIR_FILES:02x}/job-{job:02}-{number:04}"


def write_job(place, job, rng):
    """1,500 files as caches make them: under another name first."""
    for number in range(FILES_OF_JOB):
        path = place / name(job, number)
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(path.name + ".tmp")
        part.write_bytes(rng.randbytes(rng.randint(1024, 65536)))
        part.rename(path)


def asked(server, before, *operations):
    now = counts(server)
    return sum(now.get(operation, 0) - before.get(operation, 0) for operation in operations)


def measure(server, machine, compact, runs, wants):
    """Samples of each measurement that is wanted; `machine(name)` starts one with an empty cache."""
    rng = random.Random(20)
    writer = machine("earlier")
    for job in range(JOBS):
        write_job(writer.path, job, rng)
        writer.flush()
    samples = {"flush-30ms": []}
    jobs(server, machine, "job", runs, wants, samples, rng)
    if any(wants(f"job-catalog-{what}") for what in ("lookups", "gets", "puts")):
        compact()
        jobs(server, machine, "job-catalog", runs, wants, samples, rng)
    writer.stop()
    return samples


def jobs(server, machine, kind, runs, wants, samples, rng):
    lookups, gets, puts = (samples.setdefault(f"{kind}-{what}", []) for what in ("lookups", "gets", "puts"))
    # Of names that no job of another kind writes.
    first = JOBS + 2 + (1000 if kind == "job-catalog" else 0)
    for number in range(runs):
        unopened = counts(server)
        cold = machine(f"{kind}{number}")
        last = cold.path / name(JOBS - 1, FILES_OF_JOB - 1)
        deadline = time.monotonic() + 60
        while not last.exists():
            if time.monotonic() > deadline:
                raise RuntimeError("the cold machine did not follow")
            time.sleep(0.1)
        everything = [(job, file) for job in range(JOBS) for file in range(FILES_OF_JOB)]
        rng.shuffle(everything)
        if kind == "job-catalog":
            cold.until_whole()
        began = counts(server)
        for job, file in everything[: LOOKUPS - MISSES]:
            os.stat(cold.path / name(job, file))
        for file in range(MISSES):
            if (cold.path / name(JOBS + 1, file)).exists():
                raise RuntimeError("a name is there that nobody made")
        lookups.append(asked(server, began, "GetObject", "HeadObject"))
        for job, file in everything[:READS]:
            (cold.path / name(job, file)).read_bytes()
        # All that mounting cost is counted as well; without a catalog the log was read, which is counted apart.
        gets.append(asked(server, unopened if kind == "job-catalog" else began, "GetObject", "HeadObject"))
        before = counts(server)
        write_job(cold.path, first + number, rng)
        cold.flush()
        puts.append(asked(server, before, "PutObject"))
        if kind == "job" and wants("flush-30ms"):
            set_faults(server, {"latency_ms": LATENCY_MS})
            write_job(cold.path, JOBS + 100 + number, rng)
            began = time.monotonic()
            cold.flush()
            samples["flush-30ms"].append(time.monotonic() - began)
            set_faults(server, {})
        cold.stop()
