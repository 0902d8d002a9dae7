"""A volume with many machines: when they see what one writes, what following costs, and what a commit costs.

`visibility` is the time from close() on one machine to the moment at which a machine that follows has the
name: of each file and each of --followers real mounts, in use; `visibility-worst` is that of the last of them.
The settle time (2 s), the upload over loopback and the wait for the next poll (1 s) are in it.
`follow-use` and `follow-idle` are the requests of one machine a second, while nobody writes. A mount is idle
when it was not used for five minutes, and so long `follow-idle` waits.
`commit-*` compare the same commit, 100 new files and a flush, in a volume of --names names with one of 10,000:
requests and bytes by the server, following apart, and seconds.
"""

import json
import random
import time
import urllib.request

SMALL_NAMES = 10_000
COMMIT_FILES = 100
RESTS_AFTER, COUNTED = 300, 60  # seconds


def counts(server):
    with urllib.request.urlopen(f"{server.endpoint}/_admin/counts", timeout=30) as reply:
        return json.load(reply)


def total(counted):
    return sum(counted["requests"].values())


def seen(writer, followers, name):
    """Seconds from close() until each follower has the name."""
    for follower in followers:
        if (follower.path / name).exists():
            raise RuntimeError(f"{name} is there before it was written")
    (writer.path / name).write_bytes(name.encode())
    closed, took, pending = time.monotonic(), [], list(followers)
    while pending:
        waiting = []
        for follower in pending:
            if (follower.path / name).exists():
                took.append(time.monotonic() - closed)
            else:
                waiting.append(follower)
        pending = waiting
        if time.monotonic() - closed > 60:
            raise RuntimeError(f"{len(pending)} machines have no {name} after a minute")
        time.sleep(0.002)
    return took


def rate(server, machines, seconds):
    """Requests of one machine a second."""
    before, began = total(counts(server)), time.monotonic()
    time.sleep(seconds)
    return (total(counts(server)) - before) / (time.monotonic() - began) / machines


def follow(server, machine, followers, runs, wants):
    """Samples of what is wanted; `machine(name)` starts one with an empty cache."""
    rng = random.Random(50)
    writer = machine("writer")
    writer.until_commanded()
    (writer.path / "first").write_bytes(b"first")
    writer.flush()
    machines = [machine(f"follower{number}") for number in range(followers)]
    samples = {"visibility": [], "visibility-worst": [], "follow-use": [], "follow-idle": []}
    if wants("visibility") or wants("visibility-worst"):
        for number in range(4 * runs):
            # Anywhere between two polls.
            time.sleep(rng.random())
            took = seen(writer, machines, f"file{number}")
            samples["visibility"] += took
            samples["visibility-worst"].append(max(took))
    if wants("follow-use"):
        samples["follow-use"].append(rate(server, followers + 1, COUNTED / 2))
    if wants("follow-idle"):
        time.sleep(RESTS_AFTER + 15)
        samples["follow-idle"].append(rate(server, followers + 1, COUNTED))
    # The last first, as what they made is undone.
    for one in reversed([writer, *machines]):
        one.stop()
    return samples


def commit(server, machine, runs):
    """Samples of requests, KB and seconds of a commit; `machine(name)` starts one with an empty cache."""
    rng = random.Random(100)
    writer = machine("commit")
    writer.until_commanded()
    (writer.path / "first").write_bytes(b"first")
    writer.flush()
    # That is fetched behind the mount, whatever is committed.
    writer.until_whole()
    requests, kilobytes, seconds = [], [], []
    for number in range(runs):
        place = writer.path / f"new{number}"
        place.mkdir()
        before, began = counts(server), time.monotonic()
        for file in range(COMMIT_FILES):
            (place / f"{file}").write_bytes(rng.randbytes(5000))
        writer.flush()
        seconds.append(time.monotonic() - began)
        after = counts(server)
        asked = {name: after["requests"][name] - before["requests"].get(name, 0) for name in after["requests"]}
        requests.append(sum(asked.values()) - asked.get("ListObjectsV2", 0))
        kilobytes.append((after["bytes_received"] - before["bytes_received"]) / 1000)
    writer.stop()
    return {"commit-requests": requests, "commit-bytes": kilobytes, "commit-time": seconds}
