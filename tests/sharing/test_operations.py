"""What sharing costs the folder: so much for a unit and so much for a worker, however many there are of both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from distill.files import listed
from distill.sharing.search import HOLDERS
from tests.running import environment
from tests.sharing.crew import ROOT, Crew, end, kill
from tests.sharing.driver import KIND, names

UNIT, WORKER = 12, 60
"""Operations for each unit and for each worker (docs/scaling.md), as an audit hook counts them: without ``stat``."""
LOOK = 16
"""Operations of a worker that waits once more, for one that takes long; the first pause of each is in the above."""


def counted(run: Path, workers: int, units: int, *options: str) -> Counter[str]:
    """Operations of workers that begin in the same moment, by kind."""
    command = [sys.executable, "-m", "tests.sharing.counted", str(run), str(units), *options]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    crew = [subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes) for _ in range(workers)]
    for process in crew:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in crew:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    found: Counter[str] = Counter()
    for process in crew:
        said, errors = process.communicate(timeout=100)
        assert (process.returncode, errors) == (0, "")
        found.update(json.loads(said.splitlines()[-1]))
    return found


@pytest.mark.parametrize("wait", ["wait=0", "wait=1"])
@pytest.mark.parametrize(("workers", "units"), [(12, 24), (12, 96), (3, 96)])
def test_so_many_operations_for_a_unit_and_for_a_worker(tmp_path: Path, workers: int, units: int, wait: str) -> None:
    found = counted(tmp_path, workers, units, "seconds=0.02", wait)
    print(workers, units, wait, sum(found.values()), dict(found))
    with Crew(tmp_path, units) as crew:
        crew.check()
    waited = max(found.pop("pause", 0) - workers, 0)
    assert sum(found.values()) <= UNIT * units + WORKER * workers + LOOK * waited
    # Each link is one that succeeds, twice for a unit, or one of the few that show a worker where the others are.
    assert 2 * units <= found["os.link"] <= 2 * units + 12 * workers


def test_more_dead_workers_than_are_asked_at_a_time(tmp_path: Path) -> None:
    """A worker that leaves has made the units of all of them, and not that of the one that lives."""
    count, dead = 14, 2 * HOLDERS
    with Crew(tmp_path, count) as crew:
        sleeper = crew.start("stop=0")
        crew.suspended(sleeper)
        victims = [crew.start("seconds=60") for _ in range(dead)]
        ends = time.monotonic() + 300
        while len(listed(tmp_path / KIND / ".claims")) < 1 + dead:
            assert time.monotonic() < ends
            time.sleep(0.01)
        for victim in victims:
            kill(victim)
        assert end(crew.start("wait=0")) == (0, "")
        assert {*names(count)} - listed(tmp_path / KIND) == {names(count)[0]}
        os.kill(sleeper.pid, signal.SIGCONT)
        assert end(sleeper) == (0, "")
        crew.check()
        assert crew.made("equal") == crew.made("dropped") == []
