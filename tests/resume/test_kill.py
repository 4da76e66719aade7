"""kill -9 at any moment, then the same command: everything ends byte for byte as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.running import command, contents, environment, guard

MOMENTS = {
    "squeeze": "teacher/.checkpoint-*",
    "recover": "distilled/unit_00000.safetensors",
    "relabel": "labels/epoch_0003.safetensors",
    "student": "student/.checkpoint-seed0-*",
    "evaluate": "outcomes/teacher.pgd20@4.safetensors",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run, and how long it took from a prepared data set."""
    folder = tmp_path_factory.mktemp("whole")
    assert guard(command(folder, stage="prepare")).returncode == 0
    began = time.monotonic()
    done = guard(command(folder, "relabel.epochs=60"))
    assert done.returncode == 0, done.stderr
    return folder, time.monotonic() - began


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the whole group: loader workers too."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def start(folder: Path) -> subprocess.Popen[str]:
    log = (folder / "log").open("a")
    return subprocess.Popen(
        command(folder, "relabel.epochs=60"),
        stdout=log,
        stderr=log,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def same(folder: Path, whole: Path) -> None:
    mine, theirs = contents(folder / "runs/run"), contents(whole / "runs/run")
    # The configuration holds the paths of the run, which differ between the two folders of the test.
    for content in (mine, theirs):
        assert content.pop("config.yaml")
    assert sorted(mine) == sorted(theirs)
    assert [name for name in mine if mine[name] != theirs[name]] == []


def test_killed_once_in_every_stage(whole: tuple[Path, float], tmp_path: Path) -> None:
    for stage, pattern in MOMENTS.items():
        process = start(tmp_path)
        deadline = time.monotonic() + 200
        while not list((tmp_path / "runs/run").glob(pattern)):
            assert process.poll() is None, (
                f"{stage}: ended before {pattern} was there: {(tmp_path / 'log').read_text()}"
            )
            assert time.monotonic() < deadline
            time.sleep(0.005)
        kill(process)
        assert not (tmp_path / "runs/run/results.json").exists()
    process = start(tmp_path)
    assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    same(tmp_path, whole[0])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("number", range(20))
def test_killed_at_a_random_moment(whole: tuple[Path, float], tmp_path: Path, number: int) -> None:
    folder, seconds = whole
    moment = random.Random(number).uniform(0.05, 0.98) * seconds
    process = start(tmp_path)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        kill(process)
    again = start(tmp_path)
    assert again.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    same(tmp_path, folder)
