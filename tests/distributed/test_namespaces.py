"""Two machines, as far as the network goes: two network namespaces with a cable between them.

Each runs one agent with one rank of the same squeeze, ZeRO 2. Whatever happens to the cable and to the machines, the
teacher is that of two ranks on one machine that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.errors import LOST_ANOTHER
from distill.training.meeting import SILENCE
from launchers.torchrun import children
from tests.running import command, environment, teacher, teacher_of_two_ranks

pytestmark = pytest.mark.distributed

ADDRESSES = ("10.77.0.1", "10.77.0.2")
ENDPOINT = f"{ADDRESSES[0]}:29400"
STEPS = 80
OPTIONS = ["engine=deepspeed_zero2", "monitor.every=5"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Machines:
    """Two network namespaces and the agents that run in them.

    Args:
        folder: the file system that both see.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = [f"guard-{os.getpid()}-{number}" for number in range(2)]
        self.agents: dict[int, subprocess.Popen[bytes]] = {}

    def connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        first, second = self.names
        ip("-n", first, "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")

    def close(self) -> None:
        for number in list(self.agents):
            self.lose(number)
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)

    def start(self, number: int, *overrides: str) -> None:
        """Start the agent of one machine."""
        launcher = ["-m", "launchers.torchrun", "--nnodes=2", f"--rdzv-endpoint={ENDPOINT}"]
        launcher += [f"--local-addr={ADDRESSES[number]}", "1"]
        wanted = command(self.folder, *OPTIONS, *overrides, stage="squeeze")[3:]
        with self.log(number).open("a") as log:
            self.agents[number] = subprocess.Popen(
                ["ip", "netns", "exec", self.names[number], sys.executable, *launcher, *wanted],
                stdout=log,
                stderr=log,
                env={**environment(), "GLOO_SOCKET_IFNAME": "veth0"},
                start_new_session=True,
            )

    def lose(self, number: int) -> None:
        """Kill the agent of one machine and its processes, as a machine that is switched off."""
        agent = self.agents.pop(number)
        for process in (agent.pid, *children(agent.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        agent.wait()

    def cut(self, number: int) -> None:
        ip("-n", self.names[number], "link", "set", "veth0", "down")

    def mend(self, number: int) -> None:
        ip("-n", self.names[number], "link", "set", "veth0", "up")

    def log(self, number: int) -> Path:
        return self.folder / f"log{number}"

    def logs(self) -> str:
        return "\n".join(self.log(number).read_text() for number in range(2))

    @property
    def step(self) -> int:
        """The step of the latest checkpoint."""
        found = self.folder.glob("runs/run/teacher/.checkpoint-*[0-9]")
        return max((int(path.name[-8:]) for path in found), default=0)

    def reach(self, step: int) -> int:
        """Wait for a checkpoint of this step or a later one."""
        deadline = time.monotonic() + 300
        while self.step < step:
            assert all(agent.poll() is None for agent in self.agents.values()), self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.01)
        return self.step

    def end(self) -> list[int]:
        return [agent.wait(timeout=400) for agent in self.agents.values()]

    def begins(self) -> list[int]:
        """The step from which each start of the training went on."""
        return [int(step) for step in re.findall(r"^squeeze: (\d+)/\d+ step$", self.logs(), re.MULTILINE)]


def why_not() -> str | None:
    """Why namespaces cannot be made here."""
    if shutil.which("ip") is None:
        return "needs iproute2"
    if os.geteuid():
        return "network namespaces need root"
    name = f"guard-{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"no network namespaces here: {done.stderr.strip()}"
    ip("netns", "delete", name)
    return None


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    pytest.importorskip("deepspeed")
    reason = why_not()
    if reason:
        pytest.skip(reason)
    found = Machines(tmp_path)
    try:
        found.connect()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The teacher of two ranks on one machine that nobody disturbs."""
    pytest.importorskip("deepspeed")
    reason = why_not()
    if reason:
        pytest.skip(reason)
    return teacher_of_two_ranks(tmp_path_factory.mktemp("reference"), *OPTIONS)


def test_two_machines_make_the_teacher_of_one(machines: Machines, reference: bytes) -> None:
    machines.start(1)
    machines.start(0)
    assert machines.end() == [0, 0], machines.logs()
    assert teacher(machines.folder) == reference
    assert machines.begins() == [0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_cut_of_twenty_seconds_is_waited_out(machines: Machines, reference: bytes, number: int) -> None:
    for each in range(2):
        machines.start(each)
    machines.reach(10)
    machines.cut(number)
    # What is under way ends at the next exchange.
    time.sleep(3)
    step = machines.step
    time.sleep(17)
    assert machines.step == step < STEPS, "nothing goes on while the cable is cut"
    machines.mend(number)
    assert machines.end() == [0, 0], machines.logs()
    assert machines.begins() == [0], "it went on where it was"
    assert teacher(machines.folder) == reference


@pytest.mark.slow
def test_a_longer_cut_ends_the_ranks_and_they_start_again(machines: Machines, reference: bytes) -> None:
    """The agents wait for each other longer than the ranks."""
    for each in range(2):
        machines.start(each)
    machines.reach(10)
    machines.cut(1)
    time.sleep(SILENCE + 15)
    step = machines.step
    assert not any(children(agent.pid) for agent in machines.agents.values()), machines.logs()
    machines.mend(1)
    assert machines.end() == [0, 0], machines.logs()
    assert "Nothing was heard from rank 0 for 60 seconds" in machines.log(1).read_text()
    assert machines.begins() == [0, step]
    assert step < STEPS
    assert teacher(machines.folder) == reference


@pytest.mark.slow
def test_a_machine_that_is_lost_and_comes_back(machines: Machines, reference: bytes) -> None:
    """Its agent is killed, with its rank; the other agent waits for one in its place, and both ranks resume."""
    for each in range(2):
        machines.start(each)
    machines.reach(10)
    machines.lose(1)
    step = machines.step
    machines.start(1)
    assert machines.end() == [0, 0], machines.logs()
    assert machines.begins() == [0, step]
    assert step < STEPS
    assert teacher(machines.folder) == reference


@pytest.mark.slow
def test_when_the_machine_where_all_meet_is_lost_all_start_again(machines: Machines, reference: bytes) -> None:
    for each in range(2):
        machines.start(each)
    machines.reach(10)
    machines.lose(0)
    assert machines.agents.pop(1).wait(timeout=120) == LOST_ANOTHER, machines.logs()
    assert f"The machine of {ENDPOINT}, where all meet, is gone; the same command on every" in machines.logs()
    step = machines.step
    for each in range(2):
        machines.start(each)
    assert machines.end() == [0, 0], machines.logs()
    assert machines.begins() == [0, step]
    assert step < STEPS
    assert teacher(machines.folder) == reference


SILENT = """
import sys, time
from distill.training import meeting
from torch.distributed import TCPStore
rank = int(sys.argv[1])
store = TCPStore("10.77.0.1", 29411, 2, rank == 0)
def tell(value):
    if rank == 0: store.set("told", repr(value))
    return eval(store.get("told"))
with meeting.Lifeline(rank, 2, "10.77.0.1", tell, silence=6):
    print("there", flush=True)
    time.sleep(60)
"""


def test_ranks_end_when_the_other_machine_stays_silent(machines: Machines) -> None:
    """Nobody closes a connection when a cable is cut: a collective, which only reads, would wait for ever."""
    both = [
        subprocess.Popen(
            ["ip", "netns", "exec", machines.names[rank], sys.executable, "-c", SILENT, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        for rank in range(2)
    ]
    try:
        for rank in both:
            assert rank.stdout is not None
            while rank.stdout.readline() not in ("there\n", ""):
                pass
        machines.cut(1)
        time.sleep(2)
        machines.mend(1)
        time.sleep(5)
        assert [rank.poll() for rank in both] == [None, None], "a short cut is waited out"
        machines.cut(1)
        began = time.monotonic()
        output = [rank.communicate(timeout=40)[0] for rank in both]
        assert 3 < time.monotonic() - began < 20
        assert [rank.returncode for rank in both] == [LOST_ANOTHER] * 2
        assert "guard: Nothing was heard from a rank on 10.77.0.2 for 6 seconds; the same command" in output[0]
        assert "guard: Nothing was heard from rank 0 for 6 seconds; the same command" in output[1]
    finally:
        for rank in both:
            rank.kill()
