"""What befalls jobs on a cluster, and that every run ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.cluster.configuration import NODES
from tests.cluster.launching import LONG, STEPS, TWO_NODES, Launched, differences, flat, steps, take_over
from tests.cluster.slurm import ENDED, Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2400)]
AT_WORK = {
    "squeeze": "teacher/.checkpoint-*",
    "recover": "distilled/unit_00001.safetensors",
    "relabel": "labels/epoch_0008.safetensors",
}
"""Stage → what is there when it is in the midst of its work."""
ARTIFACTS = ("teacher", "distilled", "labels")
"""In the order in which they are made."""
MADE = {"squeeze": "teacher", "recover": "distilled", "relabel": "labels"}
UNITS = {"recover": 6, "relabel": 80}
BEFORE = {"squeeze": (), "recover": ("teacher",), "relabel": ("teacher", "distilled")}
"""Stage → the artifacts that it needs, which are taken from the run that nothing interrupts."""


def launched_at(stage: str, slurm: Slurm, whole: Path, folder: Path, *overrides: str) -> Launched:
    """A run that is in the midst of a stage."""
    take_over(whole, folder, *BEFORE[stage])
    launched = Launched(slurm, folder, *LONG, *TWO_NODES, *overrides).launch()
    assert next(iter(launched.states())) == stage, "what is complete is not submitted"
    launched.at_work(AT_WORK[stage])
    return launched


def check(launched: Launched, whole: Path, stage: str) -> None:
    """Assert that what a stage makes is what nothing interrupted; the stages after it are not waited for."""
    launched.end(stage)
    made = ARTIFACTS[: ARTIFACTS.index(MADE[stage]) + 1]
    assert [name for name in differences(launched.run, whole / "runs/run") if name.split("/")[0] in made] == []
    slurm = launched.slurm
    slurm.run("scancel", *(each for job in launched.ledger["jobs"] for each in job["ids"]))
    launched.ended()


def check_units(launched: Launched, stage: str) -> None:
    """Assert that every unit of a stage was made, and none twice."""
    made = launched.units(MADE[stage])
    assert len(made) == UNITS[stage]
    assert set(made.values()) == {1}, made


@pytest.mark.parametrize("stage", ["squeeze", "recover", "relabel"])
def test_preempted(slurm: Slurm, whole: Path, tmp_path: Path, stage: str) -> None:
    """As Slurm says it: SIGCONT and SIGTERM first, then the signal that submitit knows."""
    launched = launched_at(stage, slurm, whole, tmp_path)
    job = launched.jobs(stage)[0]
    launched.preempt(job)
    launched.end()
    assert differences(launched.run, whole / "runs/run") == []
    assert launched.restarts(job) == 1
    assert launched.attempts(stage)[0] == ["start", "start", "exit 0"]
    if stage == "squeeze":
        assert steps(launched.run) == list(range(5, STEPS + 1, 5)), "no step is lost, none is done twice"
    else:
        check_units(launched, stage)


def test_killed_processes_are_tried_again_inside_the_job(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    launched = launched_at("recover", slurm, whole, tmp_path)
    slurm.run("scancel", "--signal=KILL", f"{launched.jobs('recover')[0]}.0")
    check(launched, whole, "recover")
    assert launched.attempts("recover") == [["start", "exit 137", "start", "exit 0"], ["start", "exit 0"]]
    check_units(launched, "recover")


def test_a_killed_task_of_an_array(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    """Slurm takes SIGKILL to a job for its cancellation: nothing comes after it until it is launched again."""
    launched = launched_at("recover", slurm, whole, tmp_path)
    killed = launched.jobs("recover")[0]
    slurm.signal(killed, "KILL")
    assert flat(launched.ended("relabel", "evaluate", "report")) == {"CANCELLED"}
    assert launched.ended("recover") == {"recover": ["CANCELLED", "COMPLETED"]}
    said = launched.guard("status", str(launched.run)).stdout
    assert re.search(
        rf"^ +recover +failed .*job {killed} ended without a word: .*CANCELLED AT .*_log\.out\)$", said, re.MULTILINE
    ), said
    assert re.search(r"^ +relabel +cancelled .*it needs recover, which has failed$", said, re.MULTILINE), said
    launched.launch().end()
    assert differences(launched.run, whole / "runs/run") == []
    check_units(launched, "recover")


@pytest.mark.parametrize("stage", ["squeeze", "relabel"])
def test_requeued_by_hand(slurm: Slurm, whole: Path, tmp_path: Path, stage: str) -> None:
    launched = launched_at(stage, slurm, whole, tmp_path)
    job = launched.jobs(stage)[0]
    slurm.run("scontrol", "requeue", job)
    slurm.wait(job, {"PENDING", *ENDED})
    slurm.hurry(job)
    check(launched, whole, stage)
    assert launched.restarts(job) == 1
    if stage == "squeeze":
        assert steps(launched.run) == list(range(5, STEPS + 1, 5))
    else:
        check_units(launched, stage)


@pytest.mark.parametrize("stage", ["squeeze", "recover"])
def test_a_daemon_dies_and_comes_back(slurm: Slurm, whole: Path, tmp_path: Path, stage: str) -> None:
    """Sooner than Slurm notices: the job does not."""
    launched = launched_at(stage, slurm, whole, tmp_path)
    slurm.kill_slurmd("n1")
    time.sleep(3)
    slurm.start_slurmd("n1")
    check(launched, whole, stage)
    assert {launched.restarts(job) for job in launched.jobs(stage)} == {0}


@pytest.mark.parametrize("stage", ["squeeze", "recover"])
def test_a_daemon_stays_away(slurm: Slurm, whole: Path, tmp_path: Path, stage: str) -> None:
    """Slurm gives the node up and starts the job on the other one, while the first one still works."""
    launched = launched_at(stage, slurm, whole, tmp_path, "cluster.squeeze.nodes=1", "cluster.squeeze.tasks=2")
    job = launched.jobs(stage)[0]
    node, first = slurm.jobs()[job]["NodeList"], slurm.tasks(job)
    slurm.kill_slurmd(node)
    try:
        send(first, signal.SIGSTOP)
        slurm.wait(job, {"PENDING", *ENDED}, 120)
        slurm.hurry(job)
        slurm.wait(job, {"RUNNING", *ENDED}, 120)
        assert slurm.jobs()[job]["NodeList"] != node
        send(first, signal.SIGCONT)
        time.sleep(3)
    finally:
        slurm.start_slurmd(node)
    check(launched, whole, stage)
    assert launched.restarts(job) == 1


@pytest.mark.parametrize(
    ("stage", "which"), [("squeeze", "first"), ("squeeze", "second"), ("recover", "first"), ("relabel", "first")]
)
def test_a_node_dies(slurm: Slurm, whole: Path, tmp_path: Path, stage: str, which: str) -> None:
    """With all that runs on it: both tasks of an array, or one of two ranks, with the job's shell or without it."""
    launched = launched_at(stage, slurm, whole, tmp_path, "sharing.lease=20")
    jobs = launched.jobs(stage)
    first = slurm.jobs()[jobs[0]]["BatchHost"]
    node = first if which == "first" else next(each for each in NODES if each != first)
    slurm.cut_power(node)
    try:
        for job in jobs:
            slurm.wait(job, {"PENDING", *ENDED}, 120)
        if stage != "squeeze":
            # They go on without it.
            for job in jobs:
                slurm.hurry(job)
                slurm.wait(job, {"RUNNING", *ENDED}, 120)
    finally:
        slurm.restore_power(node)
    check(launched, whole, stage)
    # What Slurm still had to say to the node may end the job once more when that is back.
    assert all(launched.restarts(job) >= 1 for job in jobs)


def test_a_time_limit_that_is_too_short(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    """Slurm counts in minutes, so the processes are stopped until it wakes them with what it sends before the limit."""
    launched = launched_at("squeeze", slurm, whole, tmp_path, "cluster.squeeze.minutes=2", "cluster.notice=60")
    (job,) = launched.jobs("squeeze")
    send(slurm.tasks(job), signal.SIGSTOP)
    slurm.wait(job, {"PENDING", *ENDED}, 150)
    slurm.hurry(job)
    check(launched, whole, "squeeze")
    assert launched.restarts(job) >= 1
    assert "this job is timed-out" in launched.guard("logs", str(launched.run), "squeeze", "--lines=400").stdout
    assert steps(launched.run) == list(range(5, STEPS + 1, 5))


def send(processes: Iterable[int], number: signal.Signals) -> None:
    """Signal processes, wherever they run, without Slurm."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def test_a_failing_stage(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    """Its loss is not a number; it is tried twice."""
    take_over(whole, tmp_path)
    launched = Launched(slurm, tmp_path, *LONG, "squeeze.lr=1e30", "cluster.retry=1").launch()
    assert launched.ended("squeeze") == {"squeeze": ["FAILED"]}
    assert flat(launched.ended("recover", "relabel", "evaluate", "report")) == {"CANCELLED"}
    assert launched.attempts("squeeze") == [["start", "exit 1", "start", "exit 1"]]
    assert not (launched.run / "distilled").exists()
    said = launched.guard("status", str(launched.run)).stdout
    why = r"exit code 1, tried 2 times: guard: cross_entropy became nan at step \d+; .*_log\.out\)"
    assert re.search(rf"^ +squeeze +failed .*{why}$", said, re.MULTILINE), said
    for stage, cause in (("recover", "squeeze, which has failed"), ("report", "evaluate, which was cancelled")):
        assert re.search(rf"^ +{stage} +cancelled .*it needs {cause}$", said, re.MULTILINE), said


def test_preempted_too_often(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    launched = launched_at("squeeze", slurm, whole, tmp_path, "cluster.requeues=0")
    slurm.signal(launched.jobs("squeeze")[0], "USR2")
    assert flat(launched.ended("squeeze")) == {"FAILED"}
    assert flat(launched.ended("recover", "relabel", "evaluate", "report")) == {"CANCELLED"}
    assert launched.attempts("squeeze") == [["start", "exit 77"]]
    said = launched.guard("status", str(launched.run)).stdout
    assert "squeeze has been stopped 1 times, and cluster.requeues=0" in said
    launched.launch("cluster.requeues=1")
    check(launched, whole, "squeeze")
    assert steps(launched.run) == list(range(5, STEPS + 1, 5)), "it goes on where it stopped"
