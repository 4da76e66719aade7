"""How many metadata operations the shared folder sees when many workers share the units of one artifact.

    python -m benchmarks.shared_folder [--cases 1x100 10x100 50x100 1x400 10x400 50x400] [--seconds 0.02] [--wait]

A case is WORKERSxUNITS. Each worker is a process with the real ``Sharing`` and units of ``--seconds``; all begin in the
same moment, with nothing in the folder. ``strace`` sees every system call of theirs that names a path below the run
folder, lists one of its folders or waits for the disk; the call counts whether it succeeds or not, and whatever a cache
would answer. Not counted: reading, writing and ``fstat`` of a file that is open already. ``--wait`` keeps workers to
the end, as ``guard run`` does; without it they leave as those of ``guard recover`` do.

``--recover RUN`` counts real workers instead: ``guard recover`` on a copy of that run, which must hold a teacher.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tabulate import tabulate

from distill.files import digest, json_text, listed, write_atomic
from distill.progress import Progress
from distill.provenance import environment
from distill.run_folder import Artifact, Recipe
from distill.sharing import Sharing, Worker, units_left

KINDS = {
    "open": ("open", "openat", "openat2", "creat"),
    "stat": ("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat"),
    "link": ("link", "linkat"),
    "rename": ("rename", "renameat", "renameat2"),
    "remove": ("unlink", "unlinkat", "rmdir"),
    "mkdir": ("mkdir", "mkdirat"),
    "list": ("getdents", "getdents64"),
    "utime": ("utimensat", "utime", "utimes"),
    "fsync": ("fsync", "fdatasync"),
    "other": ("chmod", "fchmodat", "truncate", "symlink", "symlinkat", "statfs", "chdir"),
}
"""Kind of an operation → the system calls that are counted as it; ``fsync`` is told apart from the metadata."""
CALLS = {call: kind for kind, calls in KINDS.items() for call in calls}
LINE = re.compile(r"^(?:\d+ +)?(\w+)\((.*)$")
KIND = "labels"


def names(count: int) -> list[str]:
    """The files of the units."""
    return [f"unit_{number:05d}.bin" for number in range(count)]


def work(run: Path, count: int, seconds: float, wait: bool) -> None:
    """One worker: ready, begins when its standard input ends, makes units until none is left for it."""
    artifact = Artifact(run / KIND, KIND, Recipe({"units": count}))
    print("ready", flush=True)
    sys.stdin.read()
    artifact.begin(alone=False)
    recipe = digest(artifact.recipe.as_json())

    def make(number: int, path: Path, progress: Progress) -> None:
        time.sleep(seconds)
        write_atomic(path, f"{number}\n" * 1000)
        progress.update()

    with Worker(run, KIND, recipe, lease=120, hardware="CPU") as worker:
        sharing = Sharing(run, artifact, worker, wait=wait, quiet=True)
        sharing.work(names(count), make, lambda: artifact.finish(units=names(count)), "benchmark")
    if not sharing.finished():
        units_left(run, artifact)


def count_calls(traces: list[Path], run: Path) -> Counter[str]:
    """Operations of each kind below a folder, and how many of the links failed."""
    found: Counter[str] = Counter()
    below = str(run) + "/"
    for trace in traces:
        for line in trace.read_text(errors="replace").splitlines():
            match = LINE.match(line)
            if match is None or match[1] not in CALLS or below not in match[2] + "/" or "AT_EMPTY_PATH" in line:
                continue
            found[CALLS[match[1]]] += 1
            if CALLS[match[1]] == "link" and "EEXIST" in line:
                found["failed link"] += 1
    return found


def traced(trace: Path, command: list[str]) -> list[str]:
    """A command under strace; one file for each of its processes."""
    calls = ",".join(f"?{call}" for call in CALLS)
    options = ["-ff", "-y", "-qq", "-s", "4096", "-e", "signal=none", "-e", f"trace={calls}", "-o", str(trace)]
    return ["strace", *options, *command]


def run_case(workers: int, units: int, given: argparse.Namespace) -> dict[str, float]:
    """Operations of each kind by all workers together."""
    with tempfile.TemporaryDirectory(prefix="shared-folder-") as place:
        run, traces = Path(place) / "run", Path(place) / "traces"
        traces.mkdir()
        command = [sys.executable, "-m", "benchmarks.shared_folder", "--worker", str(run), "--seconds"]
        command += [str(given.seconds), "--cases", f"{workers}x{units}", *(["--wait"] if given.wait else [])]
        crew = [
            subprocess.Popen(traced(traces / str(n), command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for n in range(workers)
        ]
        for process in crew:
            assert process.stdout is not None
            process.stdout.readline()
        began = time.monotonic()
        for process in crew:
            assert process.stdin is not None
            process.stdin.close()
        codes = [process.wait() for process in crew]
        took = time.monotonic() - began
        if any(codes) or "manifest.json" not in listed(run / KIND):
            sys.exit(f"The workers ended with {codes}, and the artifact is {sorted(listed(run / KIND))[:5]} …")
        counts = count_calls(list(traces.iterdir()), run)
        return {**counts, "units": units, "workers": workers, "seconds": took}


def run_recover(workers: int, given: argparse.Namespace) -> dict[str, float]:
    """The same for real workers on a copy of a run."""
    with tempfile.TemporaryDirectory(prefix="shared-folder-") as place:
        run, traces = Path(place) / "runs/run", Path(place) / "traces"
        traces.mkdir()
        shutil.copytree(given.recover, run, ignore=shutil.ignore_patterns("distilled", "workers"))
        command = [sys.executable, "-m", "distill", "recover", *given.options]
        command += [f"run_root={run.parent}", "name=run"]
        began = time.monotonic()
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        crew = [
            subprocess.Popen(traced(traces / str(n), command), env=env, stdout=subprocess.DEVNULL)
            for n in range(workers)
        ]
        codes = [process.wait() for process in crew]
        took = time.monotonic() - began
        if any(codes):
            sys.exit(f"The workers ended with {codes}.")
        units = len(json.loads((run / "distilled/manifest.json").read_text())["units"])
        return {**count_calls(list(traces.iterdir()), run), "units": units, "workers": workers, "seconds": took}


def metadata(case: dict[str, float]) -> float:
    """All operations but fsync."""
    return sum(case.get(kind, 0) for kind in KINDS if kind != "fsync")


def report(cases: list[dict[str, float]], given: argparse.Namespace) -> None:
    """A table for people, then one JSON object."""
    rows = []
    for case in cases:
        units = case["units"]
        each = [case.get(kind, 0) / units for kind in [*KINDS, "failed link"]]
        rows.append([f"{case['workers']:.0f}", f"{units:.0f}", metadata(case) / units, *each, f"{case['seconds']:.1f}"])
    head = ["workers", "units", "metadata a unit", *KINDS, "failed link", "s"]
    print(tabulate(rows, head, floatfmt=".1f"))
    ratios = {f"{case['workers']}x{case['units']}": metadata(case) / case["units"] for case in cases}
    settings = {"seconds": given.seconds, "wait": given.wait, "recover": bool(given.recover), "options": given.options}
    result = {"ratios": ratios, "cases": cases, "settings": settings, "environment": environment()}
    print(json.dumps(json.loads(json_text(result))))


def main() -> None:
    """Count, print a table, then one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cases = ["1x100", "10x100", "50x100", "1x400", "10x400", "50x400"]
    parser.add_argument("--cases", nargs="+", default=cases, help="WORKERSxUNITS; of --recover the workers count")
    parser.add_argument("--seconds", type=float, default=0.02)
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--recover", type=Path)
    parser.add_argument("--options", nargs="*", default=[], help="of guard recover, key=value")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    wanted = [tuple(int(part) for part in case.split("x")) for case in given.cases]
    if given.worker:
        work(given.worker, wanted[0][1], given.seconds, given.wait)
        return
    if not shutil.which("strace") or subprocess.run(["strace", "-qq", "true"], capture_output=True).returncode:
        # On a machine that lets nobody trace there is nothing to measure, and the other benchmarks go on.
        print("strace is not installed, or not allowed here; nothing was counted.")
        print(json.dumps({"ratios": {}, "cases": [], "environment": environment()}))
        return
    if given.recover:
        report([run_recover(workers, given) for workers, _ in wanted], given)
    else:
        report([run_case(workers, units, given) for workers, units in wanted], given)


if __name__ == "__main__":
    main()
