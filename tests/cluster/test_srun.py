"""Slurm without submitit, as docs/torchrun.md has it: srun's tasks as ranks, and an agent of torchrun on each node."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.machines import until
from tests.cluster.slurm import Slurm
from tests.running import command, free_port, teacher, teacher_of_two_ranks

pytestmark = pytest.mark.cluster
ASK = """
import dataclasses, json
from distill.environment import detect
print(json.dumps(dataclasses.asdict(detect())))
"""


@pytest.fixture
def submit(slurm: Slurm, tmp_path: Path) -> Callable[..., str]:
    """Submit a script of the given lines on both nodes; returns the job's id."""

    def send(*lines: str, tasks: int) -> str:
        script = tmp_path / "job.sh"
        head = ["#!/bin/bash", "#SBATCH --nodes=2", f"#SBATCH --ntasks-per-node={tasks}", "#SBATCH --requeue"]
        head += ["#SBATCH --open-mode=append", f"#SBATCH --output={tmp_path / 'log'}"]
        script.write_text("\n".join([*head, *lines, ""]))
        return slurm.run("sbatch", "--parsable", str(script)).strip()

    return send


def test_slurms_own_variables_are_understood(slurm: Slurm, submit: Callable[..., str], tmp_path: Path) -> None:
    ask = f"{sys.executable} -c {shlex.quote(ASK)}"
    job = submit(
        ask, f"srun --nodes=1 --ntasks=1 {ask}", f"srun {ask}", f"srun --ntasks=2 --ntasks-per-node=1 {ask}", tasks=2
    )
    assert slurm.wait(job, seconds=200) == "COMPLETED", (tmp_path / "log").read_text()
    found = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    kinds = [each["kind"] for each in found]
    assert kinds == ["single"] * 2 + ["slurm"] * 6, "the batch script, a step of one task, two steps of several"
    first = sorted(found[2:6], key=lambda each: each["rank"])
    assert [(each["rank"], each["local_rank"]) for each in first] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert {(each["world_size"], each["local_world_size"], each["master_address"]) for each in first} == {(4, 2, "n1")}
    second = found[6:]
    assert {(each["rank"], each["local_rank"], each["world_size"]) for each in second} == {(0, 0, 2), (1, 0, 2)}
    ports = [{each["master_port"] for each in step} for step in (first, second)]
    assert [len(each) for each in ports] == [1, 1]
    assert ports[0] != ports[1], "steps of one job do not disturb each other"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return teacher_of_two_ranks(tmp_path_factory.mktemp("reference"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["tasks", "agents"])
def test_a_job_that_is_told_to_stop_queues_again_and_ends_with_the_same_teacher(
    slurm: Slurm, submit: Callable[..., str], reference: bytes, tmp_path: Path, way: str
) -> None:
    wanted = command(tmp_path, stage="squeeze")
    if way == "agents":
        launcher = ["-m", "launchers.torchrun", "--nnodes=2", f"--rdzv-endpoint=n1:{free_port()}", "1"]
        wanted = [sys.executable, *launcher, *wanted[3:]]
    job = submit(
        f"srun --wait=90 {shlex.join(wanted)}",
        '[ $? -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"',
        tasks=1,
    )
    log = tmp_path / "log"
    try:
        until(lambda: list(tmp_path.glob("runs/run/teacher/.checkpoint-*[0-9]")), 200, "a checkpoint")
        slurm.signal(job, "USR2")
        slurm.wait(job, "PENDING", seconds=100)
        slurm.hurry(job)
        assert slurm.wait(job, seconds=200) == "COMPLETED"
    except (AssertionError, TimeoutError) as error:
        error.add_note(log.read_text())
        raise
    finally:
        slurm.run("scancel", job)
    assert log.read_text().count("guard: stopped by a signal;") == 1
    assert teacher(tmp_path) == reference
