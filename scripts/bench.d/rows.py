"""The measurements outside of the table, what each has to reach, and how a row shows whether it did."""

import statistics

# name, unit, what is compared with, least ratio, alternative least value
TARGETS = {
    "cold-read": ("MiB/s", "plain-get", 0.80, None),
    "memory": ("MB", None, None, 300),
    # Of a volume of --names names that a machine with an empty cache opens from a catalog in S3.
    "first-stat": ("s", None, None, 2),
    "find": ("s", None, None, 20),
    "find-memory": ("MB", None, None, 250),
    # Requests of the reference job, and the flush of its files over a link of 30 ms.
    "job-lookups": ("GETs", None, None, 1),
    "job-gets": ("GETs", None, None, 1501),
    "job-puts": ("PUTs", None, None, 101),
    "flush-30ms": ("s", None, None, 1.5),
    # The same job where the volume is opened from a catalog, which is fetched behind the mount.
    "job-catalog-lookups": ("GETs", None, None, 1),
    "job-catalog-gets": ("GETs", None, None, 1501),
    "job-catalog-puts": ("PUTs", None, None, 101),
    # Settle time, two seconds, and what the upload of a small file takes over loopback.
    "visibility": ("s", None, None, 4.5),
    "visibility-worst": ("s", None, None, 4.5),
    "follow-use": ("1/s", None, None, 1.1),
    "follow-idle": ("1/s", None, None, 0.11),
    # The same in a volume of --names names and in a small one.
    "commit-requests": ("requests", "of-10k", 1.2, None),
    "commit-bytes": ("KB", "of-10k", 1.05, None),
    "commit-time": ("s", "of-10k", 1.5, None),
}
JOB = (
    "job-lookups", "job-gets", "job-puts", "flush-30ms",
    "job-catalog-lookups", "job-catalog-gets", "job-catalog-puts",
)
OPENING = ("first-stat", "find", "find-memory")
FLEET = ("visibility", "visibility-worst", "follow-use", "follow-idle")
COMMIT = ("commit-requests", "commit-bytes", "commit-time")
# Ratios that are not to be more than their target; others not less.
AT_MOST = COMMIT
# With ten million names.
TARGETS_10M = {"first-stat": 5, "find": None, "find-memory": 300}


def least_value(row):
    """What a measurement without anything to compare with has to be below."""
    least = TARGETS[row["name"]][3]
    return TARGETS_10M.get(row["name"], least) if row.get("names", 0) > 5_000_000 else least


def verdict(row):
    """Whether a row reaches its target; the ratio that decides."""
    _, base, least_ratio, least = TARGETS[row["name"]]
    middle = {system: statistics.median(values) for system, values in row["samples"].items()}
    if base is None:
        least = least_value(row)
        return least is None or middle["casmount"] < least, None
    ratio = middle["casmount"] / middle[base]
    if row["name"] in AT_MOST:
        return ratio <= least_ratio, ratio
    reached = ratio >= least_ratio or (least is not None and middle["casmount"] >= least)
    return reached, ratio


def show(row):
    reached, ratio = verdict(row)
    cells = []
    for system, values in row["samples"].items():
        digits = {"s": 2, "1/s": 3}.get(row["unit"], 0)
        spread = f" ({min(values):.{digits}f}..{max(values):.{digits}f})" if len(values) > 1 else ""
        cells.append(f"{system} {statistics.median(values):.{digits}f}{spread}")
    _, base, least_ratio, least = TARGETS[row["name"]]
    if base is None:
        least = least_value(row)
        target = f"below {least}" if least is not None else "no target"
    else:
        most = "at most " if row["name"] in AT_MOST else ""
        target = f"ratio {ratio:.2f}, target {most}{least_ratio:.2f}" + (f" or {least}" if least else "")
    word = "reached" if reached else "MISSED"
    print(f"{row['fs']:5} {row['name']:16} {row['unit']:8} {' | '.join(cells):78} {target}: {word}", flush=True)
