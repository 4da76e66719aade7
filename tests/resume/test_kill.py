"""kill -9 at any moment, then the same command: everything ends byte for byte as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.data.reading import skip_without
from tests.resume.interruption import MOMENTS, same, start, wait_for
from tests.running import Standstill, Started, command, guard


def kill(process: Started) -> None:
    """SIGKILL to the whole group: loader workers too."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_once_in_every_stage(whole: tuple[Path, float], tmp_path: Path) -> None:
    limit = Standstill(tmp_path)
    for pattern, end in MOMENTS.values():
        limit.before(end)
        process = start(tmp_path, limit=limit)
        wait_for(process, tmp_path, pattern)
        kill(process)
        assert not (tmp_path / "runs/run/results.json").exists()
    process = start(tmp_path)
    assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    same(tmp_path, whole[0])


LOADERS = {
    "files": ["loader=folder", "dataset.stored_size=0", "loader.drop_last=false"],
    "ffcv": ["loader=ffcv", "loader.order=quasi_random", "loader.cache=process"],
    "dali": [
        "loader=dali",
        "squeeze.crop=resized",
        "loader.resolution=rising",
        "loader.sizes=[16,32]",
        "loader.size_step=8",
    ],
}


# FFCV's compiles its pipelines anew in each of four processes.
@pytest.mark.parametrize("name", ["files", "dali", pytest.param("ffcv", marks=pytest.mark.slow)])
def test_a_squeeze_killed_within_an_epoch(tmp_path: Path, name: str) -> None:
    """With every loader; checkpoints after every step or so, so that most lie within an epoch."""
    skip_without(name)
    folders = [tmp_path / "whole", tmp_path / "killed"]
    options = [*LOADERS[name], "squeeze.epochs=3", "monitor.checkpoint_minutes=0"]
    arguments = [command(folder, *options, stage="squeeze") for folder in folders]
    done = guard(arguments[0])
    assert done.returncode == 0, done.stderr
    folders[1].mkdir()
    limit = Standstill(folders[1])
    for step in (3, 31):
        limit.before(".checkpoint-*", step + 9)
        process = start(folders[1], arguments[1], limit=limit)
        deadline = time.monotonic() + 200
        while not any(
            int(p.name.split("-")[1]) >= step for p in folders[1].glob("runs/run/teacher/.checkpoint-*[0-9]")
        ):
            assert process.poll() is None, (folders[1] / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        kill(process)
    process = start(folders[1], arguments[1])
    assert process.wait(timeout=300) == 0, (folders[1] / "log").read_text()
    same(folders[1], folders[0])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("number", range(20))
def test_killed_at_a_random_moment(whole: tuple[Path, float], tmp_path: Path, number: int) -> None:
    folder, seconds = whole
    moment = random.Random(number).uniform(0.05, 0.98) * seconds
    process = start(tmp_path, fresh=True)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        kill(process)
    again = start(tmp_path, fresh=True)
    assert again.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    same(tmp_path, folder)
