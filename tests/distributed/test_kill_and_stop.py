"""Two ranks that are killed and stopped in every way end with the teacher of two ranks that nobody disturbed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill.errors import LOST_ANOTHER, Preempted, sentence
from distill.errors import exit_code as error_code
from distill.training.preemption import GRACE
from launchers.torchrun import children, exit_code
from launchers.torchrun import main as launch
from tests.running import Standstill, command, environment, guard, ranks_of, start, teacher

pytestmark = pytest.mark.distributed

EPOCHS = 12
STEPS = 20 * EPOCHS
ENGINES = ["torch", "deepspeed_zero2"]


class Run:
    """``guard squeeze`` under the launcher, in two processes.

    Args:
        folder: where it works and writes its log.
        launcher: options of ``launchers.torchrun``; without any nothing starts again by itself.
    """

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        ranks: int = 2,
        launcher: tuple[str, ...] = ("--max-restarts=0",),
        log: str = "log",
    ):
        self.folder, self.log, self.limit = folder, folder / log, Standstill(folder / f"limit of {log}")
        folder.mkdir(parents=True, exist_ok=True)
        wanted = command(folder, f"squeeze.epochs={EPOCHS}", "monitor.every=5", *overrides, stage="squeeze")[3:]
        with self.log.open("w") as output:
            asked = [sys.executable, "-m", "launchers.torchrun", *launcher, str(ranks), *wanted]
            self.process = start(asked, stdout=output, stderr=output, new_session=True, **self.limit.variables)

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there."""
        return sorted(int(path.name[-8:]) for path in self.folder.glob("runs/run/teacher/.checkpoint-*[0-9]"))

    @property
    def workers(self) -> list[int]:
        """The process ids of the ranks, rank 0 first."""
        return ranks_of(self.process)

    def reach(self, step: int) -> None:
        """Wait for a checkpoint of this step or a later one."""
        deadline = time.monotonic() + 200
        while not any(each >= step for each in self.steps):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def end(self) -> int:
        """Let go on what stands still at the limit, and wait for the exit code."""
        self.limit.go_on()
        code = self.process.wait(timeout=200)
        assert "Traceback" not in self.log.read_text()
        return code

    @property
    def began(self) -> int:
        """The step that the training started from."""
        found = re.search(rf"^squeeze: (\d+)/{STEPS} step$", self.log.read_text(), re.MULTILINE)
        assert found, self.log.read_text()
        return int(found[1])


def kill_a_rank(run: Run) -> None:
    os.kill(run.workers[1], signal.SIGKILL)
    assert run.end() == 1
    assert "guard: killed: rank 1 by signal 9; the same command continues" in run.log.read_text()


def kill_the_agent(run: Run) -> None:
    workers = run.workers
    assert len(workers) == 2
    run.process.kill()
    run.process.wait()
    run.limit.go_on()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
        assert time.monotonic() < deadline, "orphans hold the run folder"
        time.sleep(0.05)


def signal_all_ranks(run: Run) -> None:
    for worker in run.workers:
        os.kill(worker, signal.SIGUSR2)
    stopped(run)


def signal_the_launcher(run: Run) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        run.process.send_signal(number)
        time.sleep(0.02)
    stopped(run)


def stopped(run: Run) -> None:
    assert run.end() == Preempted.exit_code
    assert run.log.read_text().count(f"guard: {Preempted()}") == 1


DISTURBANCES: list[Callable[[Run], None]] = [kill_a_rank, kill_the_agent, signal_all_ranks, signal_the_launcher]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", [ENGINES[0], pytest.param(ENGINES[1], marks=pytest.mark.slow)])
def test_killed_and_stopped_ends_as_if_nothing_had_happened(tmp_path: Path, engine: str) -> None:
    if engine != "torch":
        pytest.importorskip("deepspeed")
    whole = Run(tmp_path / "whole", f"engine={engine}")
    assert whole.end() == 0, whole.log.read_text()
    check_metrics(tmp_path / "whole/runs/run/metrics.jsonl")
    folder, last = tmp_path / "disturbed", 0
    for disturb in DISTURBANCES:
        run, least = Run(folder, f"engine={engine}"), last + 10 if last else 30
        # A busy machine may let many more steps pass, but not so many that none are left.
        run.limit.before(".checkpoint-*", least + 20)
        run.reach(least)
        disturb(run)
        assert run.began == last
        # A kill between a save and the removal of the oldest leaves three.
        assert len(run.steps) >= 2
        last = run.steps[-1]
    assert last < STEPS, "the training was still under way"
    final = Run(folder, f"engine={engine}")
    assert final.end() == 0, final.log.read_text()
    assert final.began == last
    assert teacher(folder) == teacher(tmp_path / "whole")


def check_metrics(path: Path) -> None:
    """The numbers of a training are those of all ranks: 64 images a step."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if "images_per_second" in line]
    assert [line["step"] for line in lines] == list(range(5, STEPS + 1, 5))
    # The times of all records fill the whole, however unequal they are on a busy machine.
    seconds = sum(64 * 5 / line["images_per_second"] for line in lines[1:])
    assert seconds == pytest.approx(lines[-1]["time"] - lines[0]["time"], rel=0.2)
    for line in lines:
        assert 0 <= line["data_wait"] <= 1
        assert min(line["learning_rate"], line["parameter_gradient"], line["loss"]) > 0


@pytest.mark.slow
def test_two_machines_stop_when_one_is_told_to(tmp_path: Path) -> None:
    """Two launchers that meet on the loopback, one rank each."""
    whole = Run(tmp_path / "whole")
    assert whole.end() == 0, whole.log.read_text()

    def machines() -> list[Run]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            launcher = ("--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}")
        return [Run(tmp_path, ranks=1, launcher=launcher, log=f"log{number}") for number in range(2)]

    for number in range(2):
        runs = machines()
        runs[0].reach(30 + max(runs[0].steps, default=0))
        runs[number].process.send_signal(signal.SIGUSR2)
        assert [run.end() for run in runs] == [75, 75], [run.log.read_text() for run in runs]
    assert [run.end() for run in machines()] == [0, 0]
    assert teacher(tmp_path) == teacher(tmp_path / "whole")


@pytest.mark.slow
def test_plain_torchrun_passes_sigterm_on(tmp_path: Path) -> None:
    """Its exit code is 1 whatever its processes say; they have saved all the same."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    wanted = [*launcher, *command(tmp_path, "squeeze.epochs=200", stage="squeeze")[1:]]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(wanted, stdout=log, stderr=log, env=environment(), start_new_session=True)
    while not list(tmp_path.glob("runs/run/teacher/.checkpoint-*[0-9]")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 1
    assert (tmp_path / "log").read_text().count(f"guard: {Preempted()}") == 1


@pytest.mark.slow
def test_plain_torchrun_that_dies_of_a_signal_leaves_the_present_step(tmp_path: Path) -> None:
    """Nobody tells it of SIGUSR2: when a scheduler signals every process, the ranks lose their agent."""
    # Steps of more than a second: an agent that is gone is noticed sooner. A checkpoint at the end of an epoch.
    options = ["squeeze.epochs=3", "squeeze.batch_size=640", "teacher.width=40", "monitor.checkpoint_minutes=0.1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    wanted, limit = [*launcher, *command(tmp_path, *options, stage="squeeze")[1:]], Standstill(tmp_path)
    limit.before(".checkpoint-*", 2)
    with (tmp_path / "torchrun").open("w") as log:
        agent = start(wanted, stdout=log, stderr=log, new_session=True, **limit.variables)
    limit.reached(agent)
    (under_way,) = tmp_path.glob("runs/run/teacher/.checkpoint-*.tmp")
    workers = children(agent.pid)
    assert len(workers) == 2
    for each in (*workers, agent.pid):
        os.kill(each, signal.SIGUSR2)
    assert agent.wait(timeout=60) == -signal.SIGUSR2
    limit.go_on()
    deadline = time.monotonic() + 100
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run = Run(tmp_path, *options)
    assert run.end() == 0, run.log.read_text()
    steps = re.search(r"^squeeze: (\d+)/6 step$", run.log.read_text(), re.MULTILINE)
    assert steps, run.log.read_text()
    assert int(under_way.name[12:20]) < int(steps[1]) < 6, "the latest checkpoint was the answer to the signal"


@pytest.mark.slow
def test_a_rank_that_waits_for_the_others_ends_too(tmp_path: Path) -> None:
    """One unit of recovery: rank 1 has none and waits inside a collective, where no Python runs."""
    options = ["recover.ipc=1", "recover.iterations=200000"]
    assert guard(command(tmp_path, *options, stage="squeeze")).returncode == 0
    wanted = command(tmp_path, *options, stage="recover")[3:]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launchers.torchrun", "2", *wanted], stdout=log, stderr=log, env=environment()
        )
    while "recover: 0/200000" not in (tmp_path / "log").read_text():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    time.sleep(2)
    os.kill(sorted(children(process.pid))[1], signal.SIGUSR2)
    began = time.monotonic()
    assert process.wait(timeout=60) == 75, (tmp_path / "log").read_text()
    assert time.monotonic() - began < GRACE + 10


def test_the_launchers_exit_code_is_that_of_its_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code({0: 75, 1: 75}, None) == 75
    assert exit_code({0: -signal.SIGTERM, 1: 75}, None) == 75, "the agent ends the slower one"
    assert exit_code({0: 75, 1: 76}, None) == 75, "the other one waited for it"
    assert exit_code({0: -signal.SIGUSR2}, signal.SIGUSR2) == 75, "told before it could answer"
    assert exit_code({0: 2, 1: 2}, None) == 2
    assert exit_code({0: 76, 1: 1}, None) == 1
    assert exit_code({0: 76}, None) == 76, "it happened on another machine"
    assert exit_code({0: 1, 1: 75}, signal.SIGTERM) == 1, "a full disk stays a failure"
    assert exit_code({0: 1, 1: -signal.SIGKILL}, None) == 1, "the agent killed what waited for the cause"
    assert exit_code({0: 2, 1: -signal.SIGKILL}, None) == 2
    assert capsys.readouterr().err == ""
    assert exit_code({0: 76, 1: -signal.SIGKILL}, None) == 1
    assert "killed: rank 1 by signal 9;" in capsys.readouterr().err
    assert exit_code({0: -signal.SIGTERM, 1: -signal.SIGKILL}, None) == 1
    assert "killed: rank 1 by signal 9;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rdzv-id=mine"], "--rdzv-id and --local-addr belong to --nnodes=2 or more"),
        (["--nnodes=2", "--rdzv-id=mine"], "--nnodes=2 or more and --rdzv-endpoint=HOST:PORT go together"),
        (["--rdzv-endpoint=localhost:1"], "--nnodes=2 or more and --rdzv-endpoint=HOST:PORT go together"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["torchrun", *options, "2", "run"])
    with pytest.raises(SystemExit) as stopped:
        launch()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:26183",
        "[enforce fail at ../gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:1: Connection reset by peer",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:446] writev [127.0.0.1]:40573: Broken pipe",
        "sendBytes failed on SocketImpl(fd=3, addr=[localhost]:1, remote=[localhost]:2): Broken pipe",
        "recvValue failed on SocketImpl(fd=3): Connection reset by peer",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "Failed to send, sent 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "socketProgress: Connection closed by remote peer node7<38412>",
        "NCCL error: remote process exited or there was a network error, NCCL version 2.29",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ],
)
def test_every_way_of_losing_another_rank_is_known(text: str) -> None:
    """As gloo, torch's store and NCCL write them."""
    for error in (
        RuntimeError(text),
        torch.distributed.DistNetworkError(text),
        torch.distributed.DistBackendError(text),
    ):
        assert error_code(error) == LOST_ANOTHER
        assert sentence(error).startswith("Another process of this run has ended;")
    assert error_code(ValueError(text)) == 1


def test_other_failures_of_a_collective_are_not_taken_for_it() -> None:
    assert error_code(RuntimeError("NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)")) == 1
    assert error_code(torch.OutOfMemoryError("CUDA out of memory.")) == 1
