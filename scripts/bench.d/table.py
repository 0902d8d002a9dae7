"""The rows of the table, what each has to reach, and how it is shown.

Each row is measured on the file system itself, on the bare FUSE daemon over it, on casmount with its cache
directory on it, and on every peer that is installed. What casmount reaches is compared twice: with the file system,
and with what FUSE itself leaves of that. Rows of programs are compared in wall time, and with the file system only.
Nothing is cold but where a row says so: everything was written, and read once, before.

  warm-read     a large file from start to end, in pieces of 1 MiB
  read-4        four threads read a part each
  random-read   4 KiB at random places of it, no place twice; the page cache is dropped before
  stat          lstat of files that are known to the kernel
  stat-missing  lstat of names that are not there, asked for once before
  open-read     open, read 16 KiB at once, close
  utimens       utimensat(file, now), as Bazel asks whether it has an entry
  find-first    every directory is listed and every name gets an lstat, single threaded. The kernel's dentries and
                inodes are dropped before (echo 2 > drop_caches), with them what FUSE remembers; the daemon and the
                blocks of the disk stay warm. After a fresh mount the start of the daemon would be measured as well,
                which is what the row `first-stat` is for, and the file system has nothing to compare with
  find-second   the same, straight after
  write         sequentially, close included, then to rest before the next
  create        create, write 4 KiB, close, rename to another name of the directory
  create-8      the same in eight threads, each in a directory of its own, as caches spread their entries
  git-clone     of a repository with the sources of a large C library, on the disk, in one pack
  git-status    of that clone, which has to be clean; ten times
  make          a C library with make -j2 and gcc -O0; sources and objects are on the mount
  cargo         cargo build of a small program and its dependencies; the target directory is on the mount
  ccache        the C library again, only the cache on the mount, and all of it hits; three times
  bazel         300 actions, only the disk cache on the mount, and all of it hits, after bazel clean; Bazel's own figure
"""

import statistics
from typing import NamedTuple, Optional


class Row(NamedTuple):
    name: str
    unit: str
    # Least ratio of rates, or most ratio of seconds.
    of_native: Optional[float]
    of_null: Optional[float]

    @property
    def is_wall(self):
        return self.unit == "s"


OPERATIONS = [
    Row("warm-read", "MiB/s", 0.95, 0.95),
    Row("read-4", "MiB/s", 0.95, 0.95),
    Row("random-read", "reads/s", 0.9, 0.95),
    Row("stat", "files/s", 0.95, 0.95),
    Row("stat-missing", "names/s", 0.95, 0.95),
    Row("open-read", "files/s", 0.2, 0.8),
    Row("utimens", "files/s", 0.2, 0.8),
    Row("find-first", "files/s", 0.25, 0.7),
    Row("find-second", "files/s", 0.8, 0.7),
    Row("write", "MiB/s", 0.7, None),
    Row("create", "files/s", 0.25, 0.7),
    Row("create-8", "files/s", 0.25, 0.7),
]
PROGRAMS = [
    Row("git-clone", "s", 1.15, None),
    Row("git-status", "s", 1.15, None),
    Row("make", "s", 1.15, None),
    Row("cargo", "s", 1.15, None),
    Row("ccache", "s", 1.05, None),
    Row("bazel", "s", 1.05, None),
]
ROWS = {row.name: row for row in OPERATIONS + PROGRAMS}


def median(row, system):
    values = row["samples"].get(system)
    return statistics.median(values) if values else None


def ratio(row, base):
    own, other = median(row, "casmount"), median(row, base)
    return own / other if own is not None and other else None


def verdicts(row):
    """(base, ratio, target, whether reached) of each comparison that has a target."""
    spec = ROWS[row["name"]]
    found = []
    for base, target in (("native", spec.of_native), ("null", spec.of_null)):
        reached = ratio(row, base)
        if target is not None and reached is not None:
            found.append((base, reached, target, reached <= target if spec.is_wall else reached >= target))
    return found


def reached(row):
    """Whether it reaches its targets; without figures of casmount it does not."""
    return bool(row["samples"].get("casmount")) and all(verdict[3] for verdict in verdicts(row))


def number(row, value):
    if row["unit"] == "s":
        return f"{value:.3f}"
    return f"{value:,.0f}"


def cell(row, system):
    values = row["samples"].get(system)
    if row["failed"].get(system):
        return row["failed"][system]
    if not values:
        return "-"
    text = number(row, statistics.median(values))
    if len(values) > 1:
        text += f" ({number(row, min(values))}..{number(row, max(values))})"
    return text


def verdict_cell(row, base):
    for of, value, target, fine in verdicts(row):
        if of == base:
            sign = "<=" if ROWS[row["name"]].is_wall else ">="
            return f"{value:.2f} {sign} {target:.2f} {'reached' if fine else 'MISSED'}"
    value = ratio(row, base)
    return f"{value:.2f}" if value is not None else "-"


def line(row, peers):
    return [
        row["name"], row["unit"], cell(row, "native"), cell(row, "null"), cell(row, "casmount"),
        verdict_cell(row, "native"), verdict_cell(row, "null"), *(cell(row, peer) for peer in peers),
    ]


def aligned(lines):
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(text.ljust(width) for text, width in zip(one, widths)).rstrip() for one in lines]


def show(kind, rows, peers, notes):
    """Prints the table of one file system: medians (least..most), the ratios of the medians and their targets."""
    head = ["row", "unit", "native", "null", "casmount", "of native", "of null", *peers]
    lines = aligned([head] + [line(row, peers) for row in rows])
    lines.insert(1, "-" * max(map(len, lines)))
    print(f"\n{kind}: medians (least..most)", *lines, *notes, "", sep="\n", flush=True)


def progress(row):
    cells = [f"{system} {cell(row, system)}" for system in [*row["samples"], *row["failed"]]]
    words = [f"{value:.2f} of {base}" for base, value, _, _ in verdicts(row)]
    verdict = f"{', '.join(words)}: {'reached' if reached(row) else 'MISSED'}"
    print(f"{row['fs']:5} {row['name']:12} {row['unit']:8} {' | '.join(cells)}  {verdict}", flush=True)
