"""Real runs for the tests: small configurations on scikit-learn's digits, started as the user starts them."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from launchers.torchrun import children
from tests.warm import Process, Server

SMALL = [
    "dataset=digits",
    "teacher.network=resnet10",
    "teacher.stem=stride2",
    "teacher.width=8",
    "squeeze.epochs=4",
    "squeeze.batch_size=64",
    "squeeze.lr=0.05",
    "squeeze.crop=padded",
    "squeeze.flip=false",
    "recover.ipc=2",
    "recover.iterations=40",
    "recover.crop_scale=[0.7,1.0]",
    "recover.flip=false",
    "recover.jitter=2",
    "relabel.epochs=20",
    "relabel.flip=false",
    "evaluate.batch_size=10",
    "attacks.epsilon=[4,16]",
    "attacks.max_images=100",
    "attacks.sanity_images=4",
    "monitor.checkpoint_minutes=0.002",
    "monitor.every=10",
]
"""The whole way in a few seconds of work; checkpoints every 0.12 s, so that interruptions find some."""


def environment(threads: int = 1) -> dict[str, str]:
    """One thread a process: equal bits need equal threads, and busy cores stall OpenMP's barriers."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def command(folder: Path, *overrides: str, name: str = "run", stage: str = "run") -> list[str]:
    """The command line of a run below ``folder``."""
    places = [f"run_root={folder / 'runs'}", f"data_root={folder / 'data'}", f"name={name}"]
    return [sys.executable, "-m", "distill", stage, *SMALL, *places, *overrides]


Started = subprocess.Popen[str] | Process


@functools.cache
def _server(owner: int) -> Server:
    return Server()


def start(
    arguments: Sequence[str],
    *,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    new_session: bool = False,
    fresh: bool = False,
    **variables: str,
) -> Started:
    """Start ``[sys.executable, "-m", MODULE, …]``; pipes are text.

    Args:
        fresh: in an interpreter of its own, which loads its libraries first, instead of a warm one.
        new_session: as leader of a group, which can be signalled.
        variables: of its environment, beside those of this process.
    """
    assert list(arguments[:2]) == [sys.executable, "-m"]
    surroundings = environment() | variables
    if fresh:
        return subprocess.Popen(
            arguments, stdout=stdout, stderr=stderr, text=True, env=surroundings, start_new_session=new_session
        )
    return _server(os.getpid()).start(arguments[2:], surroundings, stdout, stderr, new_session)


class Standstill:
    """A point that a run does not pass before the test says so, however late on a busy machine the test comes to that.

    A test that waits for a file and then kills the run would otherwise find it done, when it is the test that waits for
    its turn.

    Args:
        folder: of the test; not that of the run.
    """

    def __init__(self, folder: Path):
        self._order = folder / "stand-still"

    @property
    def variables(self) -> dict[str, str]:
        """Of the environment of the processes that obey."""
        place = Path(__file__).parent / "standing"
        return {"GUARD_TESTS_ORDER": str(self._order), "PYTHONPATH": f"{place}:{os.environ.get('PYTHONPATH', '')}"}

    def before(self, pattern: str, least: int = 0) -> None:
        """The first process that is about to give a file such a name stands still, once.

        Args:
            pattern: the end of a path, as ``Path.match`` takes it.
            least: the least number at the end of the name.
        """
        self._order.parent.mkdir(parents=True, exist_ok=True)
        passing = self._order.with_name(f".{self._order.name}")
        passing.write_text(f"{pattern} {least}")
        passing.replace(self._order)

    def reached(self, process: Started) -> None:
        """Wait until a process stands there; the one that was started must not end before."""
        deadline = time.monotonic() + 300
        while not any(self._standing().values()):
            assert process.poll() is None, "it has ended before it stood still"
            assert time.monotonic() < deadline, "no process stands still"
            time.sleep(0.005)

    def go_on(self, pattern: str = "", least: int = 0) -> None:
        """Who stands still goes on, and who has not come to it need not stand still, or does before another file."""
        self._order.unlink(missing_ok=True)
        standing = self._standing()
        if pattern:
            self.before(pattern, least)
        for path, process in standing.items():
            path.unlink()
            if process:
                os.kill(process, signal.SIGCONT)

    def _standing(self) -> dict[Path, int]:
        """What is left of orders that were taken: the ids of processes that stand still, 0 for those that have died."""
        found = {}
        for path in self._order.parent.glob(f"{self._order.name}.*"):
            process = int(path.suffix[1:])
            # It takes the order first.
            while (state := _state(process)) not in ("T", "Z", "X", ""):
                time.sleep(0.001)
            found[path] = process if state == "T" else 0
        return found


def _state(process: int) -> str:
    """One letter, as ps shows it; nothing when there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def guard(arguments: Sequence[str], fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output is text."""
    process = start(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, fresh=fresh)
    try:
        output, said = process.communicate(timeout=500)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode or 0, output, said)


def torchrun(count: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command (which begins with the interpreter) in ``count`` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return guard([*launcher, *arguments[1:]])


def ranks(count: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in ``count`` warm processes that find each other as under torchrun, whose agent is not there.

    Returns:
        The exit code of the first that failed, and what all of them wrote, rank 0 first.
    """
    if count == 1:
        return guard(arguments)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": f"{count}"}
    with contextlib.ExitStack() as stack:
        started, written = [], []
        for rank in map(str, range(count)):
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
            variables = {**shared, "LOCAL_WORLD_SIZE": f"{count}", "RANK": rank, "LOCAL_RANK": rank}
            process = start(arguments, stdout=files[0], stderr=files[1], **variables)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
            written.append(files)
        deadline = time.monotonic() + 500
        # When one has failed, the others would wait for it.
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            assert time.monotonic() < deadline, "the ranks do not end"
            time.sleep(0.02)
        texts = ["".join(_content(files[number]) for files in written) for number in range(2)]
    return subprocess.CompletedProcess(arguments, next((code for code in codes if code), 0), *texts)


def ranks_of(launcher: Started) -> list[int]:
    """The ids of the processes that a launcher has started, rank 0 first; the system's ids begin anew one day."""
    found = {}
    for process in children(launcher.pid):
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        found.update({int(each[5:]): process for each in variables if each.startswith(b"RANK=")})
    return [process for _, process in sorted(found.items())]


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


_MARKS: list[socket.socket] = []


def free_port() -> str:
    """A port that nobody listens on, that the system gives to nobody who does not ask for it, and no other test takes.

    It is marked as taken from now on, for the ranks that are to listen there come to it much later.
    """
    while True:
        port, mark = random.randrange(20_000, 32_000), socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            # A name without a file, which ends with this process.
            mark.bind(f"\0guard-tests-port-{port}")
            with socket.create_server(("", port)):
                _MARKS.append(mark)
                return str(port)
        mark.close()


def teacher(folder: Path) -> bytes:
    """The weights of the teacher of the run below ``folder``."""
    return (folder / "runs/run/teacher/weights.safetensors").read_bytes()


def teacher_of_two_ranks(folder: Path, *overrides: str) -> bytes:
    """Train the teacher of a run in two processes that nobody disturbs; its weights."""
    done = ranks(2, command(folder, *overrides, stage="squeeze"))
    assert done.returncode == 0, done.stderr
    return teacher(folder)


def contents(run: Path) -> dict[str, bytes]:
    """Every byte of a run that must not depend on how it was interrupted: all but timings, provenance, logs,
    launches, the page that tells them, and the lock of those that do not share."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if (
            not path.is_file()
            or name.startswith(("metrics", "tensorboard", "workers", "launch"))
            or name in ("provenance.json", "report.html", ".lock")
        ):
            continue
        content = path.read_bytes()
        if name == "results.json":
            content = json.dumps({k: v for k, v in json.loads(content).items() if k != "provenance"}).encode()
        found[name] = content
    return found
