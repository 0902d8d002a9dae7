"""Programs of every day, timed on a mount: git, make, cargo, ccache and Bazel.

What they work on is real: the sources of this project's own dependencies, which a build has brought. Each run
looks at what it made, so that a build that did nothing does not count as a quick one.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from lab import CLEANUP, ROOT, STEP_LIMIT, end_process, run

STATUSES, HIT_BUILDS, ACTIONS = 10, 3, 300

MAKEFILE = """
CFLAGS = -O0 -w -DZSTD_DISABLE_ASM=1 -Ilib -Ilib/common -MMD
objects := $(patsubst %.c,$(OUT)/%.o,$(wildcard lib/common/*.c lib/compress/*.c lib/decompress/*.c lib/dictBuilder/*.c))
all: $(OUT)/libzstd.a
$(OUT)/libzstd.a: $(objects)
\trm -f $@ && ar rcsD $@ $^
$(OUT)/%.o: %.c
\t@mkdir -p $(@D)
\t$(CC) $(CFLAGS) -c -o $@ $<
"""

CARGO_TOML = """
[package]
name = "small"
version = "0.1.0"
edition = "2021"

[dependencies]
serde = { version = "1", features = ["derive"] }
serde_json = "1"
toml = "1"

[workspace]
"""

MAIN = """
#[derive(serde::Serialize, serde::Deserialize)]
struct Answer { answer: u32 }

fn main() {
    let answer: Answer = toml::from_str("answer = 42").unwrap();
    println!("{}", serde_json::to_string(&answer).unwrap());
}
"""

RULES = """
[genrule(
    name = "part%%d" %% n,
    outs = ["part%%d.txt" %% n],
    cmd = "i=0; while [ $$i -lt 400 ]; do echo part %%d line $$i; i=$$((i + 1)); done > $@" %% n,
) for n in range(%d)]
""" % ACTIONS

# A Bazel in a root directory of its own, with the work directory at /lab, as in tests/bazel_lease.rs. Its server goes
# on between two commands, and a client has it only if it sees the same mounts: so one process holds them for all.
HOLD = r"""
mount --rbind "$1" "$0/lab"
mount --rbind /dev "$0/dev"
mount -t proc proc "$0/proc"
mount -t tmpfs tmpfs "$0/tmp"
echo mounted
exec sleep 14400
"""
INSIDE = [
    "/usr/bin/env", "-i", "USER=root", "HOME=/tmp", "LANG=C.UTF-8", "PATH=/usr/bin", "/usr/bin/bash", "-c",
    'cd "$0" && exec bazel "$@" 2>&1',
]


def clean_env(home, **more):
    """The settings are not the developer's."""
    hidden = ("GIT_", "XDG_", "MAKE", "MFLAGS", "CARGO_", "RUST", "CCACHE_", "CASMOUNT_")
    kept = {
        name: value for name, value in os.environ.items()
        if not name.startswith(hidden) or name in ("CARGO_HOME", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN")
    }
    # The toolchain is found below the real home.
    kept.setdefault("CARGO_HOME", os.path.expanduser("~/.cargo"))
    kept.setdefault("RUSTUP_HOME", os.path.expanduser("~/.rustup"))
    return dict(kept, HOME=str(home), LC_ALL="C", **more)


@functools.cache
def dependency(name):
    """The sources of one of this project's dependencies."""
    host = re.search(r"^host: (.*)$", run("rustc", "-vV"), re.MULTILINE).group(1)
    # Dependencies of other platforms are not fetched by a build.
    command = ["cargo", "metadata", "--offline", "--locked", "--format-version", "1", "--filter-platform", host]
    found = json.loads(run(*command, cwd=ROOT))
    for package in found["packages"]:
        if package["name"] == name:
            return Path(package["manifest_path"]).parent
    raise RuntimeError(f"no sources of {name}: is it still a dependency?")


class Program:
    """One row: `prepare` makes a system ready, `run` returns the seconds of one run on it."""

    name = needs = None
    tools = ()

    def __init__(self, work):
        self.work = work / "programs"
        if not self.work.exists():
            self.work.mkdir()
            CLEANUP.push(shutil.rmtree, self.work, True)
        self.env = clean_env(self.work, GIT_CONFIG_NOSYSTEM="1")

    @classmethod
    def missing(cls):
        return [tool for tool in cls.tools if not shutil.which(tool)]

    def prepare(self, system):
        pass

    def end(self):
        pass

    def timed(self, system, *command, cwd=None, env=None):
        began = time.monotonic()
        system.run(*command, cwd=cwd, env=env or self.env)
        return time.monotonic() - began


class GitClone(Program):
    name, tools = "git-clone", ("git",)

    def __init__(self, work):
        super().__init__(work)
        self.source = self.work / "git"
        if self.source.exists():
            return
        shutil.copytree(dependency("aws-lc-sys"), self.source)

        def git(*args):
            author = ("-c", "user.name=bench", "-c", "user.email=bench@localhost")
            run("git", *author, *args, cwd=self.source, env=self.env)

        git("init", "-q")
        # What its own ignore rules hide is committed all the same.
        git("add", "-f", ".")
        git("commit", "-q", "-m", "all")
        git("gc", "-q")

    def run(self, system, round_):
        place = system.path / f"clone-{round_}"
        took = self.timed(system, "git", "clone", "-q", "--no-local", self.source, place)
        if not (place / "Cargo.toml").exists():
            system.wrong("the clone lacks a file")
        return took


class GitStatus(GitClone):
    name, needs = "git-status", "git-clone"

    def prepare(self, system):
        place = system.path / "clone-0"
        if not place.exists():
            system.run("git", "clone", "-q", "--no-local", self.source, place, env=self.env)
        self.run(system, 0)

    def run(self, system, round_):
        place, took = system.path / "clone-0", 0
        for _ in range(STATUSES):
            began = time.monotonic()
            said = system.run("git", "status", "--porcelain", cwd=place, env=self.env)
            took += time.monotonic() - began
            if said:
                system.wrong(f"{len(said.splitlines())} changes in a fresh clone")
        return took


class Make(Program):
    name, tools = "make", ("make", "cc", "ar")

    def prepare(self, system):
        place = system.path / "make"
        system.run("cp", "-r", dependency("zstd-sys") / "zstd/lib", self.directory(place) / "lib")
        (place / "Makefile").write_text(MAKEFILE)
        # Once, so that the first that is measured does not read the compiler from the disk.
        if system.name == "native":
            self.run(system, "warm")

    @staticmethod
    def directory(place):
        place.mkdir()
        return place

    def run(self, system, round_):
        place = system.path / "make"
        took = self.timed(system, "make", "-s", "-j2", f"OUT=out-{round_}", cwd=place)
        objects = run("ar", "t", place / f"out-{round_}/libzstd.a").split()
        if len(objects) < 25:
            system.wrong(f"only {len(objects)} objects")
        return took


class Cargo(Program):
    name, tools = "cargo", ("cargo", "cc")

    def __init__(self, work):
        super().__init__(work)
        self.source = self.work / "cargo"
        if not self.source.exists():
            (self.source / "src").mkdir(parents=True)
            (self.source / "Cargo.toml").write_text(CARGO_TOML)
            (self.source / "src/main.rs").write_text(MAIN)
            # The versions that are here; what it does not need is left out.
            shutil.copy(ROOT / "Cargo.lock", self.source)

    def prepare(self, system):
        if system.name == "native":
            self.run(system, "warm")

    def run(self, system, round_):
        target = system.path / f"target-{round_}"
        took = self.timed(
            system, "cargo", "build", "-q", "--offline", "--jobs", "2", "--target-dir", target, cwd=self.source
        )
        said = system.run(target / "debug/small").strip()
        if said != '{"answer":42}':
            system.wrong(f"what was built says {said!r}")
        return took


class Ccache(Program):
    name, tools = "ccache", ("ccache", "make", "cc", "ar")

    def __init__(self, work):
        super().__init__(work)
        self.source = self.work / "ccache"
        if not self.source.exists():
            self.source.mkdir()
            shutil.copytree(dependency("zstd-sys") / "zstd/lib", self.source / "lib")
            (self.source / "Makefile").write_text(MAKEFILE)

    def settings(self, system):
        place = str(system.path / "ccache")
        return dict(self.env, CCACHE_DIR=place, CCACHE_CONFIGPATH="/dev/null", CCACHE_NOHASHDIR="1")

    def build(self, system):
        """Seconds of a build, and what ccache counted in it."""
        env, out = self.settings(system), f"out-{system.name}"
        shutil.rmtree(self.source / out, ignore_errors=True)
        system.run("ccache", "--zero-stats", env=env)
        took = self.timed(system, "make", "-s", "-j2", "CC=ccache cc", f"OUT={out}", cwd=self.source, env=env)
        lines = system.run("ccache", "--print-stats", env=env).splitlines()
        return took, {name: int(value) for name, value in (one.split("\t") for one in lines)}

    def prepare(self, system):
        (system.path / "ccache").mkdir()
        self.build(system)

    def run(self, system, round_):
        took = 0
        for _ in range(HIT_BUILDS):
            seconds, counted = self.build(system)
            hits = counted["direct_cache_hit"] + counted["preprocessed_cache_hit"]
            if counted["cache_miss"] or hits < 25:
                system.wrong(f"{hits} hits, {counted['cache_miss']} misses")
            took += seconds
        return took


class Bazel(Program):
    name = "bazel"
    root = ROOT / "target/tools/bazel-root"

    def __init__(self, work):
        super().__init__(work)
        self.lab = work
        self.place = self.work / "bazel"
        self.output = self.work / "bazel-output"
        if not self.place.exists():
            self.place.mkdir()
            (self.place / "WORKSPACE").touch()
            (self.place / "BUILD").write_text(RULES)
        self.holder = None

    @classmethod
    def missing(cls):
        there = (cls.root / "usr/bin/bazel").exists()
        return [] if there else ["Bazel (scripts/test.d/bazel-root target/tools/bazel-root)"]

    def inside(self, path):
        return f"/lab/{path.relative_to(self.lab)}"

    def bazel(self, runner, *args):
        return runner(
            "nsenter", f"--target={self.holder.pid}", "--mount", "chroot", self.root, *INSIDE, self.inside(self.place),
            "--nohome_rc", "--server_javabase=/java", "--max_idle_secs=900",
            f"--output_user_root={self.inside(self.output)}", *args,
        )

    def hold(self):
        command = ["unshare", "--mount", "--propagation", "private", "bash", "-ec", HOLD, self.root, self.lab]
        self.holder = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
        # What is mounted here stays mounted there, so it ends before any of that is undone.
        CLEANUP.push(self.end)
        if self.holder.stdout.readline().strip() != "mounted":
            raise RuntimeError("the mounts of Bazel cannot be made")

    def build(self, system):
        """What Bazel said."""
        cache = system.path / "bazel"
        return self.bazel(
            system.run, "build", "--noenable_bzlmod", "--enable_workspace", f"--disk_cache={self.inside(cache)}",
            "--spawn_strategy=local", "--color=no", "--curses=no", "--noshow_progress", "//:all",
        )

    def prepare(self, system):
        if not self.holder:
            self.hold()
        self.bazel(run, "clean", "--color=no", "--curses=no")
        self.build(system)
        if system.name == "native":
            # What its server does for the first time is compiled by then.
            for _ in range(3):
                self.run(system, None)

    def run(self, system, round_):
        self.bazel(run, "clean", "--color=no", "--curses=no")
        said = self.build(system)
        hits = re.search(r"(\d+) (?:remote|disk) cache hit", said)
        if not hits or int(hits.group(1)) != ACTIONS:
            system.wrong(f"{hits.group(1) if hits else 'no'} hits")
        return float(re.search(r"Elapsed time: ([\d.]+)s", said).group(1))

    def end(self):
        if not self.holder:
            return
        try:
            self.bazel(run, "shutdown")
        finally:
            end_process(self.holder)
            self.holder = None
        # Read-only trees, which nobody could remove.
        subprocess.run(["chmod", "-R", "u+w", self.output], timeout=STEP_LIMIT, check=False)
        shutil.rmtree(self.output, ignore_errors=True)


def wanted(wants, work):
    """The programs of the rows that are wanted, one after the other; those that are not here are named."""
    for kind in (GitClone, GitStatus, Make, Cargo, Ccache, Bazel):
        if not wants(kind.name):
            continue
        missing = kind.missing()
        if missing:
            print(f"{kind.name}: skipped, there is no {', '.join(missing)}", flush=True)
        else:
            yield kind(work)
