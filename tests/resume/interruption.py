"""Runs that are interrupted while they work on a stage, and what must be left of them in the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tests import running
from tests.running import Standstill, Started, command, contents

OPTIONS = ["relabel.epochs=60"]
"""Of every run that is compared with the whole one."""

MOMENTS = {
    "squeeze": ("teacher/.checkpoint-*", "teacher/manifest.json"),
    "recover": ("distilled/unit_00000.safetensors", "distilled/manifest.json"),
    "relabel": ("labels/epoch_0003.safetensors", "labels/manifest.json"),
    "student": ("student/.checkpoint-seed0-*", "student/seed0.safetensors"),
    "evaluate": ("outcomes/teacher.pgd20@4.0000.safetensors", "results.json"),
}
"""Stage → what is there while it is under way, and what is not yet."""


def start(
    folder: Path, arguments: Sequence[str] | None = None, fresh: bool = False, limit: Standstill | None = None
) -> Started:
    """A run in a process group of its own, which writes to ``folder/log``.

    Args:
        limit: what it obeys.
    """
    with (folder / "log").open("a") as log:
        asked, variables = arguments or command(folder, *OPTIONS), limit.variables if limit else {}
        return running.start(asked, stdout=log, stderr=log, new_session=True, fresh=fresh, **variables)


def wait_for(process: Started, folder: Path, pattern: str) -> None:
    """Wait until a file of the run is there; the process must not end before."""
    deadline = time.monotonic() + 200
    while not list((folder / "runs/run").glob(pattern)):
        assert process.poll() is None, f"ended before {pattern} was there: {(folder / 'log').read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def same(folder: Path, whole: Path) -> None:
    """Assert that two runs are equal, byte for byte."""
    mine, theirs = contents(folder / "runs/run"), contents(whole / "runs/run")
    # The configuration holds the paths of the run, which differ between the two folders of the test.
    for content in (mine, theirs):
        assert content.pop("config.yaml")
    assert sorted(mine) == sorted(theirs)
    assert [name for name in mine if mine[name] != theirs[name]] == []
