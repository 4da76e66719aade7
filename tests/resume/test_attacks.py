"""Outcomes under attack: equal bytes for every batch size, number of workers and interruption."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.running import Standstill, command, contents, guard, ranks, start

OPTIONS = [
    "squeeze.epochs=2",
    "relabel.epochs=4",
    "recover.iterations=10",
    "attacks.epsilon=[8]",
    "attacks.max_images=40",
    "attacks.block=16",
    "attacks.forward_batch=8",
    "attacks.sanity_images=4",
    "attacks=custom",
    "+attacks.suite.pgd={attack: PGD, steps: 10, alpha_ratio: 0.25}",
    "+attacks.suite.aa={attack: AutoAttack, steps: 2, n_queries: 10, n_classes: 4}",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been evaluated by one process."""
    folder = tmp_path_factory.mktemp("whole")
    done = guard(command(folder, *OPTIONS), fresh=True)
    assert done.returncode == 0, done.stderr
    return folder


def _again(trained: Path, folder: Path) -> Path:
    """A copy of the run without outcomes."""
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    run = folder / "runs" / "run"
    shutil.rmtree(run / "outcomes")
    for name in ("results.json", "report.html", "report.md", "report.csv"):
        (run / name).unlink(missing_ok=True)
    return run


def _outcomes(run: Path) -> dict[str, bytes]:
    return {name: each for name, each in contents(run).items() if name.startswith("outcomes") or name == "results.json"}


def test_batches_and_workers_do_not_matter(trained: Path, tmp_path: Path) -> None:
    whole = _outcomes(trained / "runs" / "run")
    assert sum(".pgd@8." in name for name in whole) == 2 * 3, "a file for each network and block"
    for processes, size in ((1, 1), (2, 7), (3, 64)):
        folder = tmp_path / f"{processes}"
        run = _again(trained, folder)
        asked = command(folder, *OPTIONS, f"attacks.batch_size={size}", stage="evaluate")
        done = guard(asked) if processes == 1 else ranks(processes, asked)
        assert done.returncode == 0, done.stderr
        assert _outcomes(run) == whole


def test_killed_at_random_moments(trained: Path, tmp_path: Path) -> None:
    run = _again(trained, tmp_path)
    asked = command(tmp_path, *OPTIONS, stage="evaluate")
    dice, kills = random.Random(5), 0
    units = len(list((trained / "runs" / "run" / "outcomes").glob("*.safetensors")))
    limit = Standstill(tmp_path)
    for _ in range(2):
        limit.before("results.json")
        before = len(list((run / "outcomes").glob("*.safetensors"))) if (run / "outcomes").is_dir() else 0
        wanted = before + dice.randint(1, units // 5)
        process = start(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **limit.variables)
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            there = list((run / "outcomes").glob("*.safetensors")) if (run / "outcomes").is_dir() else []
            if len(there) >= wanted:
                time.sleep(dice.random() * 0.2)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    assert not (run / "results.json").is_file()
    done = guard(asked)
    assert done.returncode == 0, done.stderr
    assert _outcomes(run) == _outcomes(trained / "runs" / "run")
