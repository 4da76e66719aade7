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
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.errors import LOST_ANOTHER
from launchers.torchrun import children
from tests.running import command, environment, guard, torchrun

pytestmark = pytest.mark.distributed

ADDRESSES = ("10.77.0.1", "10.77.0.2")
ENDPOINT = f"{ADDRESSES[0]}:29400"
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
        self.started = 0

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

    def start(self, number: int, *overrides: str, stage: str = "squeeze") -> None:
        """Start the agent of one machine."""
        launcher = ["-m", "launchers.torchrun", "--nnodes=2", f"--rdzv-endpoint={ENDPOINT}"]
        launcher += [f"--local-addr={ADDRESSES[number]}", "1"]
        wanted = command(self.folder, *OPTIONS, *overrides, stage=stage)[3:]
        self.started += 1
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


def teacher(folder: Path) -> bytes:
    return (folder / "runs/run/teacher/weights.safetensors").read_bytes()


def undisturbed(folder: Path, *overrides: str) -> bytes:
    """The teacher of two ranks on one machine."""
    done = torchrun(2, command(folder, *OPTIONS, *overrides, stage="squeeze"))
    assert done.returncode == 0, done.stderr
    return teacher(folder)
