"""The simulator against real workers on this machine: one, two, and two of which one is killed.

    python -m benchmarks.cluster.reality RUN [key=value …]

RUN holds a teacher; the options are those of its ``guard recover``, with at least a dozen units. The time of a unit and
of finishing is taken from the run of one worker. Into the others go also when each worker was ready and when one was
killed; what comes out is when the set is complete, counted from the first unit's begin.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.cluster.events import Conditions, shared
from distill.files import listed
from distill.provenance import environment


def run_workers(source: Path, options: list[str], workers: int, kill: bool) -> dict[str, Any]:
    """Begin, end, arrivals and kill of real workers, in seconds from the first unit's begin."""
    with tempfile.TemporaryDirectory(prefix="reality-") as place:
        run = Path(place) / "runs/run"
        shutil.copytree(source, run, ignore=shutil.ignore_patterns("distilled", "workers"))
        command = [sys.executable, "-m", "distill", "recover", *options, f"run_root={run.parent}", "name=run"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        crew = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) for _ in range(workers)]
        killed = _kill_in_second_unit(run, crew[0]) if kill else None
        codes = [process.wait() for process in crew]
        if any(code for code in codes[1 if kill else 0 :]):
            sys.exit(f"The workers ended with {codes}.")
        end = (run / "distilled/manifest.json").stat().st_mtime
        records = [json.loads(path.read_text()) for path in (run / "workers").glob("distilled-*.json")]
        units = [unit | {"began": each["began"] + unit["at"]} for each in records for unit in each["units"]]
        begin = min(unit["began"] for unit in units)
        arrivals = [
            min(each["began"] + unit["at"] for unit in each["units"]) - begin
            for each in sorted(records, key=lambda record: record["pid"] != crew[0].pid)
        ]
        return {
            "workers": workers,
            "units": len(json.loads((run / "distilled/manifest.json").read_text())["units"]),
            "seconds": end - begin,
            "arrivals": arrivals,
            "killed": None if killed is None else killed - begin,
            "unit": statistics.mean(unit["seconds"] for unit in units),
            "finish": end - max(unit["began"] + unit["seconds"] for unit in units),
        }


def _kill_in_second_unit(run: Path, process: subprocess.Popen[bytes]) -> float:
    """Kill a worker a moment after it has begun its second unit; returns when."""
    while process.poll() is None:
        for name in listed(run / "workers"):
            if not (name.startswith("distilled-") and f"-{process.pid}-" in name):
                continue
            if json.loads((run / "workers" / name).read_text())["units"]:
                time.sleep(0.3)
                os.kill(process.pid, signal.SIGKILL)
                return time.time()
        time.sleep(0.02)
    sys.exit("The worker ended before it could be killed.")


def _simulated(case: dict[str, Any], timed: dict[str, Any]) -> float:
    """Seconds that the simulator says, with the times of a unit and of finishing that another run had."""
    kills = {} if case["killed"] is None else {0: case["killed"]}
    crew = case["workers"], case["units"], timed["unit"], Conditions()
    return shared(*crew, arrivals=case["arrivals"], kills=kills).seconds + timed["finish"]


def main() -> None:
    """Run, simulate, print a table, then one JSON object."""
    source, options = Path(sys.argv[1]), sys.argv[2:]
    alone = run_workers(source, options, 1, False)
    cases = [alone, run_workers(source, options, 2, False), run_workers(source, options, 2, True)]
    rows = []
    for case in cases:
        case["predicted"], case["modelled"] = _simulated(case, alone), _simulated(case, case)
        errors = [case[name] / case["seconds"] - 1 for name in ("predicted", "modelled")]
        what = f"{case['workers']} workers" + ("" if case["killed"] is None else ", one killed")
        rows.append([what, case["unit"], case["seconds"], *(f"{100 * error:+.1f} %" for error in errors)])
    print(tabulate(rows, ["", "a unit, s", "measured, s", "predicted", "modelled"], floatfmt=".1f"))
    load = os.getloadavg()[0]
    print(json.dumps({"cases": cases, "load": load, "settings": {"options": options}, "environment": environment()}))


if __name__ == "__main__":
    main()
