"""``guard evaluate`` by several workers: they share the seeds, and a seed goes on from what is saved of it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.errors import Preempted
from distill.report.history import read_lines
from distill.sharing import artifact_state
from tests.running import Standstill, Started, command, contents, guard, start

SEEDS = 3
STEPS = 2 * 40
OPTIONS = ["squeeze.epochs=1", "recover.iterations=10", "relabel.epochs=40", "evaluate.seeds=[0,1,2]"]
OPTIONS += ["attacks=custom", "evaluate.max_images=50", "evaluate.teacher=false", "sharing.lease=10"]


AT = 12
"""The step in whose checkpoint a worker stands still."""


def evaluate(folder: Path, *more: str, ranks: int = 1, limit: Standstill | None = None) -> Started:
    """A worker of its own on a run, or several ranks under torchrun."""
    asked = command(folder, *OPTIONS, *more, stage="evaluate")
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        asked = [*launcher, *asked[1:]]
    return start(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **(limit.variables if limit else {}))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that students are made from."""
    folder = tmp_path_factory.mktemp("labelled")
    for stage in ("squeeze", "recover", "relabel"):
        assert main(command(folder, *OPTIONS, stage=stage)[3:]) == 0
    return folder


@pytest.fixture(scope="module")
def alone(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one worker makes, in an interpreter of its own."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(labelled, folder, dirs_exist_ok=True)
    done = guard(command(folder, *OPTIONS, stage="evaluate"), fresh=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def begun(labelled: Path, tmp_path: Path) -> tuple[Path, Started, Standstill]:
    """A copy of the run, and a worker that stands still in the training of its first seed."""
    shutil.copytree(labelled, tmp_path, dirs_exist_ok=True)
    limit = Standstill(tmp_path)
    limit.before(".checkpoint-seed0-*", AT)
    worker = evaluate(tmp_path, "monitor.checkpoint_minutes=0", limit=limit)
    limit.reached(worker)
    assert max(steps(tmp_path, 0)) == AT - 1
    return tmp_path, worker, limit


def steps(folder: Path, seed: int) -> list[int]:
    """The steps of a seed's checkpoints."""
    return [int(path.name[-8:]) for path in folder.glob(f"runs/run/student/.checkpoint-seed{seed}-*[0-9]")]


def ended(worker: Started, code: int = 0) -> str:
    """Wait for a worker; what it said on stderr."""
    output, said = worker.communicate(timeout=500)
    assert worker.returncode == code, (output, said)
    return said


def check(folder: Path, alone: Path) -> list[dict[str, Any]]:
    """Assert that the run is that of one worker, byte for byte, and each seed noted once; the records of students."""
    mine, theirs = (contents(each / "runs/run") for each in (folder, alone))
    for content in (mine, theirs):
        assert content.pop("config.yaml")
    assert sorted(mine) == sorted(theirs)
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert sum(name.startswith("student/") for name in mine) == SEEDS + 2
    run = folder / "runs/run"
    assert not list((run / "student").glob(".*"))
    entries = json.loads((run / "provenance.json").read_text())["student"]
    assert [entry["worker"] for entry in entries] == [each.worker for each in artifact_state(run, "student").workers]
    assert sum(entry["units"] for entry in entries) == SEEDS
    told = {(line["series"], line["step"]) for line in read_lines(run) if line["stage"] == "student"}
    assert told == {(f"seed{seed}", step) for seed in range(SEEDS) for step in range(10, STEPS + 1, 10)}
    records = [json.loads(path.read_text()) for path in (run / "workers").glob("student-*.json")]
    return sorted(records, key=lambda record: record["started"])


def went_on(said: list[str]) -> int:
    """The step from which the first seed's training was continued."""
    (step,) = re.findall(rf"^student 0: (\d+)/{STEPS} step$", "\n".join(said), re.MULTILINE)
    return int(step)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_killed_in_the_middle_of_a_seed(begun: tuple[Path, Started, Standstill], alone: Path, ranks: int) -> None:
    """Then two more workers, or one with two ranks, on what is left."""
    folder, first, _ = begun
    first.kill()
    first.communicate()
    workers = [evaluate(folder, ranks=ranks) for _ in range(3 - ranks)]
    assert went_on([ended(worker) for worker in workers]) == AT - 1
    records = check(folder, alone)
    assert [each["ended"] is None for each in records] == [True, False, False]
    assert sorted(unit["unit"] for each in records for unit in each["units"]) == [
        f"seed{seed}.safetensors" for seed in range(SEEDS)
    ]


def test_stopped_in_the_middle_of_a_seed(begun: tuple[Path, Started, Standstill], alone: Path) -> None:
    """It saves the step, and says that it has ended, so that others go on at once."""
    folder, first, limit = begun
    second = evaluate(folder)
    first.send_signal(signal.SIGTERM)
    limit.go_on()
    assert f"guard: {Preempted()}" in ended(first, Preempted.exit_code)
    assert went_on([ended(second)]) > AT
    records = check(folder, alone)
    assert [each["error"] for each in records] == ["Preempted", None]


def test_one_that_was_taken_for_dead_wakes_up(begun: tuple[Path, Started, Standstill], alone: Path) -> None:
    """After its lease another goes on with its seed, and it wakes up in the middle of that."""
    folder, first, limit = begun
    middle = Standstill(folder / "second")
    middle.before(".checkpoint-seed0-*", 2 * AT)
    second = evaluate(folder, limit=middle)
    middle.reached(second)
    limit.go_on()
    middle.go_on()
    for worker in (first, second):
        ended(worker)
    records = check(folder, alone)
    made = [(unit["unit"], unit["result"]) for each in records for unit in each["units"]]
    # The slower one finds an equal student there, or has looked before its end and left it to the other.
    results = [result for unit, result in made if unit == "seed0.safetensors"]
    assert sorted(results) in (["published"], ["equal", "published"])
