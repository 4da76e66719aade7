"""Ranks that are killed start again inside the same call; tasks of Slurm's srun are ranks without any launcher."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.errors import Preempted
from launchers.torchrun import children, hosts
from tests.running import Standstill, command, contents, guard, ranks, ranks_of, start, teacher, teacher_of_two_ranks

pytestmark = pytest.mark.distributed

PLAIN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3", "-m", "distill"]
LAUNCHER = ["-m", "launchers.torchrun", "2"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The teacher of two ranks that nobody disturbs."""
    return teacher_of_two_ranks(tmp_path_factory.mktemp("reference"))


class Elastic:
    """A run that starts again by itself."""

    def __init__(self, folder: Path, launcher: list[str], *overrides: str, stage: str = "run"):
        self.folder = folder
        wanted, self.limit = command(folder, *overrides, stage=stage)[3:], Standstill(folder)
        with (folder / "log").open("w") as log:
            asked = [sys.executable, *launcher, *wanted]
            self.process = start(asked, stdout=log, stderr=log, new_session=True, **self.limit.variables)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def kill_when(self, ready: Callable[[], object], rank: int) -> None:
        """Kill a rank and wait until two new ones have come in place of both.

        A rank that stands still at the limit goes on when the other is dead.
        """
        deadline = time.monotonic() + 300
        while not ready():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.005)
        before = ranks_of(self.process)
        os.kill(before[rank], signal.SIGKILL)
        self.limit.go_on()
        while len(set(children(self.process.pid)) - set(before)) < 2:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def step(self) -> int:
        found = self.folder.glob("runs/run/teacher/.checkpoint-*[0-9]")
        return max((int(path.name[-8:]) for path in found), default=0)

    def end(self) -> int:
        return self.process.wait(timeout=400)


SLOW = [pytest.param(PLAIN, 1, marks=pytest.mark.slow), pytest.param(PLAIN, 0, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("launcher", "rank"), [(LAUNCHER, 1), *SLOW])
def test_a_killed_rank_starts_again_in_the_same_call(
    reference: bytes, tmp_path: Path, launcher: list[str], rank: int
) -> None:
    """torchrun's store still holds the addresses of the ranks before: the new ones must not find those."""
    run = Elastic(tmp_path, launcher, stage="squeeze")
    run.limit.before(".checkpoint-*", 40)
    run.kill_when(lambda: run.step() >= 10, rank)
    assert run.end() == 0, run.log
    assert teacher(tmp_path) == reference
    begins = [int(step) for step in re.findall(r"^squeeze: (\d+)/80 step$", run.log, re.MULTILINE)]
    assert begins[0] == 0
    assert 10 <= begins[1] < 80, run.log
    if launcher == LAUNCHER:
        assert f"guard: killed: rank {rank} by signal 9; starting again from what is saved" in run.log


@pytest.mark.slow
def test_every_stage_goes_on_when_a_rank_is_killed_in_it(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = tmp_path_factory.mktemp("whole")
    done = ranks(2, command(whole))
    assert done.returncode == 0, done.stderr
    run, folder = Elastic(tmp_path, LAUNCHER), tmp_path / "runs/run"
    run.kill_when(lambda: run.step() >= 10, 0)
    # The other rank may have made a unit before rank 0 tells how far they are.
    run.kill_when(lambda: re.search(r"recover: \d+/", run.log), 1)
    run.kill_when(lambda: bool(list(folder.glob("student/.checkpoint-*"))), 0)
    assert run.end() == 0, run.log
    mine, theirs = contents(folder), contents(whole / "runs/run")
    for content in (mine, theirs):
        del content["config.yaml"]
    assert sorted(mine) == sorted(theirs)
    assert [name for name in mine if mine[name] != theirs[name]] == []


def test_a_signal_is_no_reason_to_start_again(tmp_path: Path) -> None:
    run = Elastic(tmp_path, LAUNCHER, "squeeze.epochs=50", stage="squeeze")
    deadline = time.monotonic() + 300
    while run.step() < 5:
        assert run.process.poll() is None, run.log
        assert time.monotonic() < deadline, run.log
        time.sleep(0.01)
    os.kill(run.process.pid, signal.SIGUSR1)
    assert run.end() == Preempted.exit_code, run.log
    assert run.log.count(f"guard: {Preempted()}") == 1
    assert "starting again" not in run.log


def test_what_has_failed_on_its_own_is_not_started_again(tmp_path: Path) -> None:
    wanted = command(tmp_path, "squeeze.batch_size=63", stage="squeeze")[3:]
    done = guard([sys.executable, *LAUNCHER, *wanted])
    assert done.returncode == 2
    assert done.stderr.count("squeeze.batch_size=63 does not divide") in (1, 2), "by each rank at most once"
    assert "starting again" not in done.stderr


def test_tasks_of_a_step_of_slurm_are_ranks(reference: bytes, tmp_path: Path) -> None:
    """``srun python -m distill``: two processes with the variables that srun sets, and no launcher."""
    wanted = command(tmp_path, stage="squeeze")
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}
    tasks = []
    for task in range(2):
        own = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}
        with (tmp_path / f"log{task}").open("w") as log:
            tasks.append(start(wanted, stdout=log, stderr=log, **step, **own))
    codes = [task.wait(timeout=300) for task in tasks]
    logs = [(tmp_path / f"log{task}").read_text() for task in range(2)]
    assert codes == [0, 0], logs
    assert teacher(tmp_path) == reference
    assert "squeeze (teacher) complete" in logs[0]
    assert "complete" not in logs[1], "rank 0 speaks"


def test_a_launcher_knows_its_own_addresses() -> None:
    """torch knows those only that belong to the name of the machine."""
    assert hosts("localhost:29400") is None
    assert hosts("127.0.0.1:29400") is None
    assert hosts("192.0.2.1:29400") is False, "an address of nobody"
    assert hosts("no.such.host.invalid:29400") is None
    assert hosts("localhost") is None
