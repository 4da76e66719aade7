"""Processes that begin with the libraries loaded: for a small run, importing them is half of the work.

``Server`` starts ``python -m tests.warm``, which loads them once and then forks for every module that it is asked to
run, as ``python -m MODULE`` would: with its own arguments, environment, folder, session, output and exit code. So many
processes share one hash seed and one start, which a test that compares bytes must not rely on: there one side starts
on its own (``fresh`` in ``tests.running``).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.standing.sitecustomize import obey

LOADED = [
    "data_prep",
    "distill.cli",
    "distill.controls",
    "distill.exchange",
    "distill.pipeline",
    "distill.report",
    "distill.robustness.attacks",
    "distill.stages.evaluate",
    "distill.stages.recover",
    "distill.stages.relabel",
    "distill.stages.squeeze",
    "launchers.torchrun",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "safetensors.torch",
    "sklearn.datasets",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "torchattacks",
]
ROOT = Path(__file__).resolve().parents[1]


class Process:
    """A process of the server, used as ``subprocess.Popen`` is.

    Args:
        control: where the server tells its id and, in the end, its exit code.
        pipes: what is read of its stdout and stderr.
    """

    def __init__(self, control: socket.socket, pipes: Sequence[IO[str] | None]):
        self._control = control
        self.stdout, self.stderr = pipes
        self.pid = int(self._told())
        self.returncode: int | None = None

    def _told(self) -> str:
        text = self._control.recv(64).decode()
        assert text, "the server of warm processes has died"
        return text

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self._control], [], [], 0)[0]:
            self.returncode = int(self._told())
            self._control.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises subprocess.TimeoutExpired."""
        if self.returncode is None and not select.select([self._control], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"warm process {self.pid}", timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; what it wrote to its pipes, empty after the first call."""
        ends = None if timeout is None else time.monotonic() + timeout
        texts = {pipe.fileno(): b"" for pipe in (self.stdout, self.stderr) if pipe and not pipe.closed}
        order, waiting = list(texts), set(texts)
        while waiting:
            left = None if ends is None else max(0, ends - time.monotonic())
            ready = select.select(list(waiting), [], [], left)[0]
            if not ready:
                raise subprocess.TimeoutExpired(f"warm process {self.pid}", timeout or 0)
            for pipe in ready:
                content = os.read(pipe, 65536)
                texts[pipe] += content
                if not content:
                    waiting.discard(pipe)
        self.wait(None if ends is None else max(0, ends - time.monotonic()))
        for each in (self.stdout, self.stderr):
            if each:
                each.close()
        found = [texts[pipe].decode() for pipe in order]
        return (found[0], found[1]) if len(found) == 2 else ("".join(found), "")

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended, even where the server has not told that yet."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that forks; it ends when this one does."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(theirs.fileno())],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    def start(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        new_session: bool = False,
    ) -> Process:
        """Run a module.

        Args:
            arguments: ``[MODULE, argument, …]``.
            stdout: an open file, or subprocess.PIPE or DEVNULL; that of this process by default. So is ``stderr``.
        """
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pipes: list[IO[str] | None] = []
        given: list[int] = []
        with open(os.devnull, "r+b") as nowhere:
            for number, each in ((1, stdout), (2, stderr)):
                reader = None
                if each == subprocess.PIPE:
                    out, into = os.pipe()
                    reader = open(out)  # noqa: SIM115
                elif each == subprocess.DEVNULL:
                    into = os.dup(nowhere.fileno())
                else:
                    into = os.dup(number if each is None else each if isinstance(each, int) else each.fileno())
                pipes.append(reader)
                given.append(into)
            wanted = {"arguments": list(arguments), "environment": dict(environment), "session": new_session}
            message = json.dumps({**wanted, "folder": os.getcwd()}).encode()
            socket.send_fds(self._socket, [message], [theirs.fileno(), nowhere.fileno(), *given])
        for each in given:
            os.close(each)
        theirs.close()
        return Process(mine, pipes)


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for every request.

    Returns:
        What is asked of this process, which is then the new one; None in the server, at its end.
    """
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready = select.select([requests, *running], [], [])[0]
        for descriptor in [each for each in ready if each is not requests]:
            pid, control = running.pop(descriptor)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # Nobody waits for it.
                control.send(str(code).encode())
            control.close()
            os.close(descriptor)
        if requests not in ready:
            continue
        message, given, _, _ = socket.recv_fds(requests, 1 << 20, 5)
        if not message:
            return None
        assert len(os.listdir("/proc/self/task")) == 1, "a fork beside threads would copy their locks"
        control, descriptors = socket.socket(fileno=given[0]), given[1:]
        pid = os.fork()
        if not pid:
            wanted: dict[str, Any] = json.loads(message)
            if wanted["session"]:
                os.setsid()
            # Only now can others signal its group.
            control.send(str(os.getpid()).encode())
            for target, each in enumerate(descriptors):
                os.dup2(each, target)
            for each in (requests, control, *(other for _, other in running.values())):
                each.close()
            for each in (*descriptors, *running):
                os.close(each)
            return wanted
        running[os.pidfd_open(pid)] = (pid, control)
        for each in descriptors:
            os.close(each)


def main() -> None:
    """Load the libraries, then serve; in a new process run its module."""
    # pandas, which scikit-learn loads, would load it, and it starts a thread.
    sys.modules["pyarrow"] = None  # type: ignore[assignment]
    for name in LOADED:
        importlib.import_module(name)
    del sys.modules["pyarrow"]
    import numpy as np

    from distill.compose import compose

    # Hydra looks for its plugins at the first composition.
    compose([])
    gc.collect()
    gc.freeze()
    wanted = serve(socket.socket(fileno=int(sys.argv[1])))
    if wanted is None:
        return
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["folder"])
    if "GUARD_TESTS_ORDER" in os.environ:
        obey(os.environ["GUARD_TESTS_ORDER"])
    # What every interpreter draws for itself.
    random.seed()
    np.random.seed()
    module, *sys.argv[1:] = wanted["arguments"]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
